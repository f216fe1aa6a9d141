"""M1: readers of images with masks and sentences, the split, the chain."""

import json

import numpy as np
import openpyxl
import pytest
import torch
from PIL import Image

from wsss_models import cli
from wsss_models.data import lvit, monuseg, qata
from wsss_models.dusss.data import turned
from wsss_models.engine import dice_and_iou
from wsss_models.errors import InputError

from .conftest import scene


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path)


def table(path, rows, titles=("Image", "Description")):
    path.parent.mkdir(parents=True, exist_ok=True)
    book = openpyxl.Workbook()
    for row in (titles, *rows):
        book.active.append(row)
    book.save(path)


@pytest.fixture
def data(tmp_path):
    root = tmp_path / "lvit"
    for part, word, count in (("train", "Train", 6), ("validation", "Val", 2), ("test", "Test", 2)):
        rows = []
        for i in range(count):
            image, disc = scene(40, 40, seed=i)
            name = f"{part}{i}"
            save(root / f"{word}_Folder" / "img" / f"{name}.{'tif' if part == 'test' else 'png'}", image)
            save(root / f"{word}_Folder" / "labelcol" / f"{name}.png", disc * 255)
            rows.append((f"{name}.png", f"The disc {i} is on the left."))
        table(root / f"{word}_Folder" / f"{word}_text.xlsx", rows)
    return root


def test_lvit_layout(data):
    found = lvit.read(data)
    assert {k: len(v) for k, v in found.items()} == {"train": 6, "validation": 2, "test": 2}
    first = found["test"][0]
    assert first.image.suffix == ".tif" and first.mask.suffix == ".png" and first.text == "The disc 0 is on the left."
    with pytest.raises(InputError, match="expected Train_Folder"):
        lvit.read(data / "Train_Folder")


def test_qata_names(tmp_path):
    save(tmp_path / "Train_Folder" / "img" / "covid_1.png", np.zeros((8, 8)))
    save(tmp_path / "Train_Folder" / "labelcol" / "mask_covid_1.png", np.zeros((8, 8)))
    table(tmp_path / "Train_Folder" / "Train_text.xlsx", [("mask_covid_1.png", "Bilateral pulmonary infection")])
    (pair,) = lvit.read(tmp_path)["train"]
    assert pair.name == "covid_1" and pair.mask.name == "mask_covid_1.png" and pair.text == "Bilateral pulmonary infection"
    for part in ("Train Set", "Test Set"):
        save(tmp_path / "q" / part / "Images" / "a.png", np.zeros((8, 8)))
        save(tmp_path / "q" / part / "Ground-truths" / "mask_a.png", np.zeros((8, 8)))
    found = qata.read(tmp_path / "q")
    assert found["train"][0].mask.name == "mask_a.png" and found["test"][0].text is None
    with pytest.raises(InputError, match="expected 'Train Set'"):
        qata.read(tmp_path)


def test_bad_tables(tmp_path):
    table(tmp_path / "a.xlsx", [("a.png", "b")], titles=("File", "Words"))
    with pytest.raises(InputError, match=r"table .*a.xlsx: expected the columns Image and Description, got file, words"):
        lvit.read_texts(tmp_path / "a.xlsx")
    (tmp_path / "b.xlsx").write_bytes(b"PK nothing")
    with pytest.raises(InputError, match="cannot be read as a spreadsheet"):
        lvit.read_texts(tmp_path / "b.xlsx")
    with pytest.raises(InputError, match="there is no such file"):
        lvit.read_texts(tmp_path / "c.csv")
    save(tmp_path / "img" / "a.png", np.zeros((8, 8)))
    save(tmp_path / "img" / "a.tif", np.zeros((8, 8)))
    with pytest.raises(InputError, match="two images have the same name but for their ending"):
        lvit.pairs_of(tmp_path / "img", None, {})


XML = """<?xml version="1.0"?><Annotations><Annotation><Regions>{}</Regions></Annotation></Annotations>"""
REGION = "<Region><Vertices>{}</Vertices></Region>"


def test_monuseg_outlines(tmp_path):
    square = "".join(f'<Vertex X="{x}" Y="{y}" Z="0"/>' for x, y in ((2, 1), (7, 1), (7, 4), (2, 4)))
    outside = "".join(f'<Vertex X="{x}" Y="{y}"/>' for x, y in ((-5, -5), (1, -5), (1, 0.4), (-5, 0.4)))
    save(tmp_path / "Tissue Images" / "a.tif", np.zeros((8, 10, 3)))
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "Annotations" / "a.xml").write_text(XML.format(REGION.format(square) + REGION.format(outside)))
    save(tmp_path / "MoNuSegTestData" / "b.tif", np.zeros((8, 10, 3)))
    (tmp_path / "MoNuSegTestData" / "b.xml").write_text(XML.format(""))
    found = monuseg.read(tmp_path)
    assert [p.name for p in found["train"]] == ["a"] and [p.name for p in found["test"]] == ["b"]
    mask = monuseg.read_mask(found["train"][0].mask, (8, 10))
    assert mask[2:4, 3:7].all() and not mask[5:].any() and 12 <= mask.sum() <= 26
    bomb = '<!DOCTYPE a [<!ENTITY b "c">]>' + XML.format("")
    (tmp_path / "Annotations" / "a.xml").write_text(bomb)
    with pytest.raises(InputError, match="expected a plain XML file"):
        monuseg.read_outlines(tmp_path / "Annotations" / "a.xml")
    (tmp_path / "Annotations" / "a.xml").write_text("<Annotations>")
    with pytest.raises(InputError, match="cannot be read as Aperio XML"):
        monuseg.read_outlines(tmp_path / "Annotations" / "a.xml")


def test_generic_layout(tmp_path):
    for i in range(3):
        save(tmp_path / "images" / f"i{i}.jpg", np.zeros((8, 8, 3)))
        save(tmp_path / "derived" / "infection" / f"i{i}.png", np.zeros((8, 8)))
    (tmp_path / "text.csv").write_text("image,finding,notes\ni0.jpg,x,one\ni1.jpg,x,\n")
    found = lvit.read_generic(tmp_path, "images", "derived/infection", "text.csv", ("image", "notes"))["all"]
    assert [p.text for p in found] == ["one", "", None] and all(p.mask for p in found)


def test_turns_keep_together():
    from wsss_models.dusss.config import Data

    for seed in range(20):
        torch.manual_seed(seed)
        x = torch.rand(1, 9, 9)
        turn = turned(Data())
        assert torch.equal(turn(x, 0.0), turn(x.repeat(3, 1, 1), 0.0)[2:])
    kinds = set()
    for seed in range(60):
        torch.manual_seed(seed)
        kinds.add(turned(Data(rotation=0.0))(torch.arange(4.0).reshape(1, 2, 2), 0.0).flatten().tolist().__str__())
    assert len(kinds) == 8  # all flips and quarter turns


def test_dice():
    assert dice_and_iou(np.zeros(4), np.zeros(4)) == (1, 1)
    assert dice_and_iou(np.array([1, 1, 0]), np.array([1, 0, 1])) == pytest.approx((0.5, 1 / 3), rel=1e-4)


SETTINGS = ["device=cpu", "data.size=32", "data.labelled=0.5", "image.encoder=tiny", "text.encoder=tiny", "text.tokenizer=words"]
SETTINGS += ["vlm.width=8", "vlm.hidden=16", "vlm.distribution=16", "vlm.heads=2", "vlm.steps=2", "vlm.batch_size=4", "grounding.steps=2"]
SETTINGS += ["grounding.batch_size=4", "semi.width=4", "semi.steps=3", "semi.batch_size=2", "semi.patience=5", "checkpoint_every=1"]


def run(*arguments, settings=()):
    return cli.main([*map(str, arguments), *[a for s in (*SETTINGS, *settings) for a in ("--set", s)]])


def test_chain(data, tmp_path):
    assert run("run", "dusss", "--data", data, "--out", tmp_path / "run", settings=["semi.ramp=2"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    test = summary["stages"]["test"]["metrics"]
    assert summary["complete"] and {"dice_per_image", "iou_per_image", "teacher_dice"} <= set(test)
    assert (test["labelled"], test["unlabelled"]) == (3, 3)
    guides = list((tmp_path / "run" / "text_masks").glob("*.npy"))
    assert len(guides) == 3 and np.load(guides[0]).shape == (16, 16)
    image = data / "Test_Folder" / "img" / "test0.tif"
    assert run("predict", "dusss", "--out", tmp_path / "run", "--images", image, "--to", tmp_path / "seen") == 0
    assert np.array_equal(Image.open(tmp_path / "seen" / "test0.png"), Image.open(tmp_path / "run" / "predictions" / "test0.png"))


@pytest.mark.parametrize(
    "settings", [["semi.text=false"], ["semi.unlabelled=false"], ["data.crop=20", "semi.literal=true", "semi.loss=bce", "semi.jitter=0.3"]]
)
def test_variants(data, tmp_path, settings):
    assert run("run", "dusss", "--data", data, "--out", tmp_path / "run", settings=settings) == 0
    stages = json.loads((tmp_path / "run" / "summary.json").read_text())["stages"]
    assert ("vlm" in stages) == ("data.crop=20" in settings) and 0 <= stages["test"]["metrics"]["dice_per_image"] <= 1


def test_labelled_ones_by_a_list(data, tmp_path, capsys):
    (data / "labelled.txt").write_text("train0.png\ntrain4\n")
    settings = ["data.split_file=labelled.txt", "semi.text=false"]
    assert run("run", "dusss", "--data", data, "--out", tmp_path / "run", settings=settings) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["stages"]["test"]["metrics"]["labelled"] == 2
    (data / "labelled.txt").write_text("nothing.png\n")
    assert run("run", "dusss", "--data", data, "--out", tmp_path / "other", settings=settings) != 0
    assert "1 names are no training images, such as nothing" in capsys.readouterr().err


def test_what_is_missing_is_said(data, tmp_path, capsys):
    cases = {
        "data.labelled=1.0": "every training image is labelled; set semi.unlabelled=false",
        "data.labelled=0.01": "expected at least one",
        "data.size=40": "expected a multiple of 16",
    }
    for setting, message in cases.items():
        out = tmp_path / setting.replace("=", "_")
        assert run("run", "dusss", "--data", data, "--out", out, settings=["semi.text=false", setting]) != 0
        assert message in capsys.readouterr().err
    both = ["semi.unlabelled=false", "data.test_on_validation=true"]
    assert run("run", "dusss", "--data", data, "--out", tmp_path / "both", settings=both) == 2
    assert "set semi.patience=null" in capsys.readouterr().err
    assert run("run", "dusss", "--data", data, "--out", tmp_path / "four", settings=[*both, "semi.patience=null"]) == 0
    assert json.loads((tmp_path / "four" / "summary.json").read_text())["stages"]["test"]["metrics"]["images"] == 4
    capsys.readouterr()
    (data / "Train_Folder" / "Train_text.xlsx").unlink()
    assert run("run", "dusss", "--data", data, "--out", tmp_path / "text") != 0
    assert "it has no sentence in the table; set semi.text=false" in capsys.readouterr().err
