"""M4 as the command runs it: the whole chain on a small VOC folder, resumed, with masks, and on single images."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import end_to_end
from wsss_models import cli
from wsss_models.data import read_mask
from wsss_models.engine import config as configs
from wsss_models.errors import UsageError
from wsss_models.unicl_affseg.config import UniclConfig

NAMES = ("2007_000001", "2007_000002", "2007_000003")
SETTINGS = ["device=cpu", "encoder.weights=random", "encoder.tokenizer=bytes", "encoder.embed_dim=8", "encoder.depths=[1, 1, 2, 1]"]
SETTINGS += [
    "encoder.heads=[1, 2, 2, 4]",
    "encoder.text_width=16",
    "encoder.text_layers=1",
    "encoder.text_heads=2",
    "encoder.projection=12",
]
SETTINGS += ["decoder.width=8", "decoder.heads=2", "decoder.layers=1", "data.crop=64", "data.train=train", "refine.warmup=2"]
SETTINGS += ["refine.par_iter=2", "refine.dilations=[1, 2]", "train.steps=4", "train.batch_size=2", "train.accumulate=1", "train.warmup=1"]
SETTINGS += ["inference.size=64", "checkpoint_every=2", "log_every=1"]


@pytest.fixture
def data(tmp_path):
    """Three images with masks, image labels from XML."""
    home = tmp_path / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "SegmentationClassAug", "Annotations", "ImageSets/Segmentation"):
        (home / folder).mkdir(parents=True)
    y, x = np.mgrid[:48, :64]
    for i, name in enumerate(NAMES):
        disc = (y - 24) ** 2 + (x - 20 - 8 * i) ** 2 < 200
        noise = np.random.default_rng(i).integers(0, 30, (48, 64, 3))
        Image.fromarray((np.where(disc[..., None], (200, 90, 30), (40, 70, 150)) + noise).astype(np.uint8)).save(
            home / "JPEGImages" / f"{name}.jpg"
        )
        mask = Image.fromarray((disc * (8 + i)).astype(np.uint8), "P")
        mask.putpalette([0] * 768)
        for folder in ("SegmentationClass", "SegmentationClassAug"):
            mask.save(home / folder / f"{name}.png")
        kind = ("cat", "chair", "cow")[i]
        (home / "Annotations" / f"{name}.xml").write_text(f"<annotation><object><name>{kind}</name></object></annotation>")
    for listed, names in (("train", NAMES), ("val", NAMES[:2])):
        (home / "ImageSets" / "Segmentation" / f"{listed}.txt").write_text("\n".join(names) + "\n")
    return tmp_path / "VOCdevkit"


def run(*arguments, settings=()):
    return cli.main([*map(str, arguments), *[a for s in (*SETTINGS, *settings) for a in ("--set", s)]])


def test_chain_resumed_and_predicting(data, tmp_path, monkeypatch):
    """From image labels to metrics; killed after two steps it ends in the same weights; a second run does nothing."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run("run", "unicl_affseg", "--data", data, "--out", whole) == 0
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["complete"] and list(summary["stages"]) == ["decoder", "pseudo_labels", "pseudo_label_quality", "predictions", "test"]
    assert summary["stages"]["pseudo_labels"]["metrics"] == {"items": 3, "written": 3}
    assert 0 <= summary["stages"]["test"]["metrics"]["miou"] <= 1 and summary["stages"]["test"]["metrics"]["images"] == 2
    for i, name in enumerate(NAMES):
        assert set(np.unique(read_mask(whole / "pseudo_labels" / f"{name}.png", (48, 64)))) <= {0, 8 + i}
    rows = (whole / "decoder" / "log.csv").read_text().splitlines()
    assert rows[0] == "step,lr,seconds,loss,segmentation,affinity" and len(rows) == 5
    weights = torch.load(whole / "decoder" / "model.pt", weights_only=True)
    assert int(weights["steps"]) == 4

    from wsss_models.engine.training import _Loop

    save = _Loop.save

    def killed(self):
        save(self)
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(_Loop, "save", killed)
        with pytest.raises(RuntimeError, match="killed"):
            run("run", "unicl_affseg", "--data", data, "--out", cut)
    assert run("run", "unicl_affseg", "--data", data, "--out", cut) == 0
    again = torch.load(cut / "decoder" / "model.pt", weights_only=True)
    assert all(torch.equal(weights[name], again[name]) for name in weights)

    before = (whole / "pseudo_labels" / f"{NAMES[0]}.png").stat().st_mtime_ns
    assert run("pseudo-label", "unicl_affseg", "--out", whole) == 0
    assert (whole / "pseudo_labels" / f"{NAMES[0]}.png").stat().st_mtime_ns == before
    assert run("predict", "unicl_affseg", "--out", whole, "--images", data / "VOC2012" / "JPEGImages", "--to", tmp_path / "seen") == 0
    assert (tmp_path / "seen" / f"{NAMES[0]}.png").read_bytes() == (whole / "predictions" / f"{NAMES[0]}.png").read_bytes()


def test_masks_as_supervision_and_validation(data, tmp_path):
    settings = ["train.supervision=masks", "data.fit=true", "data.scale=[1.0, 1.0]", "data.flip=false", "decoder.blocks=all"]
    settings += ["train.validate_images=1", "train.validate_every=2"]
    assert run("run", "unicl_affseg", "--data", data, "--out", tmp_path / "run", settings=settings) == 0
    found = json.loads((tmp_path / "run" / "summary.json").read_text())["stages"]
    assert list(found) == ["decoder", "fit", "refinement"] and found["fit"]["metrics"]["images"] == 3
    check = found["refinement"]["metrics"]
    assert check["gain"] == check["miou_refined"] - check["miou_cams"] and 0 < check["miou_cams"] < 1
    assert len((tmp_path / "run" / "decoder" / "validation.csv").read_text().splitlines()) == 3


def test_labels_and_masks_that_are_missing(data, tmp_path, capsys):
    (data / "VOC2012" / "Annotations" / f"{NAMES[1]}.xml").unlink()
    assert run("train", "unicl_affseg", "--data", data, "--out", tmp_path / "a") == 1
    assert f"labels: {NAMES[1]} has neither" in capsys.readouterr().err
    assert run("train", "unicl_affseg", "--data", data, "--out", tmp_path / "b", settings=["data.labels_from_mask=true"]) == 0
    assert run("train", "unicl_affseg", "--data", data, "--out", tmp_path / "c", settings=["data.names=[nobody]"]) == 1
    assert "data.names: the list train has no nobody" in capsys.readouterr().err
    for mask in (data / "VOC2012" / "SegmentationClass").iterdir():
        mask.unlink()
    settings = ["data.labels_from_mask=true", "train.validate_images=1"]
    assert run("train", "unicl_affseg", "--data", data, "--out", tmp_path / "d", settings=settings) == 1
    assert "no image of the list val has a mask" in capsys.readouterr().err


def test_training_benchmark(data, tmp_path):
    arguments = ["unicl_affseg", "--data", str(data), "--out", str(tmp_path / "run"), "--steps", "2"]
    assert end_to_end.main([*arguments, *[a for s in SETTINGS for a in ("--set", s)]]) == 0
    found = json.loads((tmp_path / "run" / "end_to_end" / "decoder.json").read_text())
    assert all(0 < found[name]["operator_share"] < 1 for name in ("fused", "reference"))
    assert len(found["fused"]["losses"]) == len(found["reference"]["losses"]) == 2
    assert found["fused"]["losses"] == pytest.approx(found["reference"]["losses"], rel=0.05)  # labels of ties go either way


def test_shipped_configuration_and_the_papers_defaults():
    small, paper = configs.load(UniclConfig, "configs/unicl_affseg_small.yaml"), configs.load(UniclConfig)
    assert small.encoder.weights == "random" and small.train.supervision == "masks" and len(small.data.names) == 8
    assert (paper.train.lr, paper.train.steps, paper.train.batch_size * paper.train.accumulate, paper.train.warmup) == (5e-5, 30000, 8, 500)
    assert paper.refine.dilations == (1, 2, 4, 8, 12, 24) and paper.refine.mask_side == "source" and paper.data.crop == 224
    for change in ("data.crop=16", "refine.first_layer=1.0", "refine.warmup_maps=0"):
        with pytest.raises(UsageError, match=change.partition("=")[0].replace(".", r"\.")):
            configs.load(UniclConfig, None, [change])
