"""M0: readers, texts by real model classes with tiny weights, the chain."""

import json

import numpy as np
import pytest
from PIL import Image

import wsss_kernels as wk
from wsss_models import cli
from wsss_models.data import duke, resc
from wsss_models.data.oct import read_mat
from wsss_models.engine import config as configs
from wsss_models.errors import InputError
from wsss_models.oct_multimodal import text
from wsss_models.oct_multimodal.config import OctConfig
from wsss_models.oct_multimodal.method import balanced


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path)


def scan_of(i, size=(64, 96)):
    """A noisy band; odd ones hold a dark disc."""
    y, x = np.mgrid[: size[0], : size[1]]
    disc = (y - 32) ** 2 + (x - 30 - 6 * i) ** 2 < 120
    band = 150 * (np.abs(y - 32) < 20) + np.random.default_rng(i).integers(0, 40, size)
    fluid = disc & bool(i % 2)
    return np.where(fluid, 20, band).astype(np.uint8), fluid


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "duke"
    for i in range(4):
        image, fluid = scan_of(i)
        write(root / "images" / f"Subject_0{i // 2 + 1}_annotated{i:02d}.png", image)
        write(root / "manualFluid" / f"Subject_0{i // 2 + 1}_annotated{i:02d}.png", np.where(fluid, 255 - i, 0))
    return root


def test_duke_as_pictures_and_as_matlab(folder, tmp_path):
    from scipy.io import savemat

    found = duke.read(folder)["all"]
    assert [s.subject for s in found] == ["Subject_01", "Subject_01", "Subject_02", "Subject_02"]
    assert duke.read_label(found[1], (64, 96)).sum() == scan_of(1)[1].sum() and not duke.read_label(found[0], (64, 96)).any()
    volumes = tmp_path / "mat"
    volumes.mkdir()
    images = np.stack([scan_of(i)[0] for i in range(4)], 2).astype(np.float64)
    fluid = np.full(images.shape, np.nan)
    fluid[..., 1], fluid[..., 2] = scan_of(1)[1] * 3.0, 0
    savemat(volumes / "Subject_07.mat", {"images": images, "manualFluid1": fluid})
    found = duke.read(volumes)["all"]
    assert [s.name for s in found] == ["Subject_07_01", "Subject_07_02"]
    assert np.array_equal(duke.read_scan(found[0]), scan_of(1)[0]) and np.array_equal(duke.read_label(found[0], (64, 96)), scan_of(1)[1])
    (volumes / "Subject_07.mat").write_bytes(b"MATLAB 7.3 nothing")
    read_mat.cache_clear()
    with pytest.raises(InputError, match=r"volume .*Subject_07.mat: cannot be read as a MATLAB file"):
        duke.read(volumes)
    with pytest.raises(InputError, match="expected Subject_NN.mat, or images"):
        duke.read(tmp_path)


def test_duke_with_lists(tmp_path):
    for i in range(3):
        image, fluid = scan_of(i)
        write(tmp_path / "images" / f"s{i}.png", image)
        write(tmp_path / "labels" / f"s{i}.png", np.where(fluid, 255, 100))
        write(tmp_path / "gan_healthy" / f"s{i}.png", image)
        (tmp_path / "mask").mkdir(exist_ok=True)
        np.save(tmp_path / "mask" / f"s{i}.npy", np.zeros((12, 4, 4), np.float32))
    (tmp_path / "train.csv").write_text("path,label\nimages/s0.png,0\n/elsewhere/s1.png,1\n")
    (tmp_path / "valid.csv").write_text("path,label\nimages/s2.png,0\n")
    found = duke.read(tmp_path)
    assert [s.labels for s in found["train"]] == [(0.0,), (1.0,)] and len(found["validation"]) == 1
    assert found["train"][1].healthy and found["train"][1].layers
    assert np.array_equal(duke.read_label(found["train"][1], (64, 96)), scan_of(1)[1])
    (tmp_path / "train.csv").write_text("path,label\n../../etc/passwd.png,1\n")
    assert duke.read(tmp_path)["train"][0].image == tmp_path / "images" / "passwd.png"
    (tmp_path / "train.csv").write_text("file,label\na,1\n")
    with pytest.raises(InputError, match="expected the columns path and label"):
        duke.read(tmp_path)


def test_resc_layouts(tmp_path):
    for part in ("train", "valid"):
        write(tmp_path / "a" / part / "original_images" / "P1_3.bmp", np.zeros((8, 8)))
        write(tmp_path / "a" / part / "label_images" / "P1_3.bmp", np.array([[191, 128, 255, 0]] * 8).repeat(2, 1))
    np.save(tmp_path / "a" / "resc_cls_labels.npy", {"P1_3.bmp": [1, 0]}, allow_pickle=True)
    found = resc.read(tmp_path / "a")
    scan = found["train"][0]
    assert scan.labels == (1.0, 0.0) and scan.subject == "P1"
    assert resc.read_label(scan, (8, 8))[0].tolist() == [1, 1, 2, 2, 0, 0, 0, 0]
    for i in (1, 2, 10):
        write(tmp_path / "b" / "validset" / "PC7.img" / f"{i}.bmp", np.zeros((8, 8)))
        write(tmp_path / "b" / "validset" / "label" / "PC7_labelMark" / f"{i}.bmp", np.full((8, 8), 128))
    found = resc.read(tmp_path / "b")["validation"]
    assert [s.name for s in found] == ["PC7_001", "PC7_002", "PC7_010"] and (resc.read_label(found[2], (8, 8)) == 2).all()
    with pytest.raises(InputError, match="expected train/original_images"):
        resc.read(tmp_path / "a" / "train")


def tiny_clip(path, width):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    vocabulary = {w: i for i, w in enumerate([*"abcdefghijklmnopqrstuvwxyz-", *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz-")])}
    vocabulary |= {"<|startoftext|>": len(vocabulary), "<|endoftext|>": len(vocabulary) + 1}
    path.mkdir()
    (path / "vocab.json").write_text(json.dumps(vocabulary))
    (path / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(path / "vocab.json"), str(path / "merges.txt")).save_pretrained(path)
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        eos_token_id=vocabulary["<|endoftext|>"],
        bos_token_id=vocabulary["<|startoftext|>"],
    )
    CLIPTextModel(config).save_pretrained(path)


def tiny_blip(path):
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

    path.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]", "a", "black", "and", "white", "photo", "of", "retina", "fluid"]
    (path / "vocab.txt").write_text("\n".join(words))
    text_config = {"vocab_size": len(words), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text_config |= {
        "projection_dim": 8,
        "encoder_hidden_size": 16,
        "bos_token_id": 5,
        "sep_token_id": 3,
        "pad_token_id": 0,
        "eos_token_id": 3,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 16,
    }
    model = BlipForConditionalGeneration(BlipConfig(text_config=text_config, vision_config=vision, projection_dim=8))
    model.save_pretrained(path)
    processor = BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), BertTokenizer(str(path / "vocab.txt")))
    processor.save_pretrained(path)


SETTINGS = ["device=cpu", "data.dataset=duke", "data.size=[64, 64]", "data.labels_from_mask=true", "data.layers=zero", "data.validation=1"]
SETTINGS += ["data.healthy=zero", "model.encoder=mit_tiny", "model.drop_path=0.0", "text.labels=random", "text.width=8", "train.steps=2"]
SETTINGS += ["text.captions=none", "text.caption_width=4", "train.batch_size=2", "segment.encoder=mit_tiny", "segment.size=[64, 64]"]
SETTINGS += ["segment.steps=2", "segment.batch_size=2", "train.epochs=1"]


def run(*arguments, settings=()):
    return cli.main([*map(str, arguments), *[a for s in (*SETTINGS, *settings) for a in ("--set", s)]])


def test_chain(folder, tmp_path):
    assert run("run", "oct_multimodal", "--data", folder, "--out", tmp_path / "run") == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    quality = summary["stages"]["pseudo_label_quality"]["metrics"]
    assert summary["complete"] and {"label_auc", "pixel_auc", "hit", "chance", "brightness_auc"} <= set(quality)
    assert 0 <= summary["stages"]["sweep"]["metrics"]["threshold"] <= 1 and (tmp_path / "run" / "sweep" / "sweep.csv").is_file()
    assert summary["stages"]["test"]["metrics"]["images"] == 1
    image = next(iter((folder / "images").glob("*1.png")))
    assert run("predict", "oct_multimodal", "--out", tmp_path / "run", "--images", image, "--to", tmp_path / "seen") == 0
    assert Image.open(tmp_path / "seen" / image.name).size == (96, 64)


@pytest.mark.filterwarnings("ignore")
def test_chain_with_texts_generator_and_crops(folder, tmp_path):
    """Label prompts by CLIP, captions by BLIP and CLIP (real classes, tiny random weights), a generator, crops, windows."""
    tiny_clip(tmp_path / "large", 12)
    tiny_clip(tmp_path / "base", 8)
    tiny_blip(tmp_path / "blip")
    settings = [f"text.labels={tmp_path / 'large'}", f"text.captions={tmp_path / 'blip'}", f"text.caption_encoder={tmp_path / 'base'}"]
    settings += ["data.healthy=generator", "generator.size=16", "generator.width=4", "generator.latent=4", "generator.steps=2"]
    settings += ["generator.batch_size=2", "data.crop=[48, 48]", "data.stride=[16, 48]", "data.cover=0.02", "model.exchange_window=2"]
    settings += [
        "segment.network=deeplabv3plus",
        "segment.encoder=resnet18",
        "masks.threshold=0.4",
        "data.validation=0",
        "text.new_tokens=4",
    ]
    assert run("run", "oct_multimodal", "--data", folder, "--out", tmp_path / "run", settings=settings) == 0
    out = tmp_path / "run"
    caption = json.loads((out / "captions" / "Subject_01_annotated00.json").read_text())["caption"]
    assert isinstance(caption, str) and np.load(out / "captions" / "Subject_01_annotated00.npy").shape == (8,)
    assert np.load(out / "label_text" / "labels.npy").shape == (2, 12)
    assert Image.open(out / "healthy" / "Subject_01_annotated00.png").size == (96, 64)
    assert len(list((out / "pseudo_labels").glob("*.png"))) >= 2
    (tmp_path / "large" / "config.json").write_text("{}")
    other = [f"text.labels={tmp_path / 'nowhere'}"]
    assert run("run", "oct_multimodal", "--data", folder, "--out", tmp_path / "second", settings=other) == 2


def test_balanced_lists():
    assert balanced(["a"], list("bcdef")).count("a") == 5 and balanced([], ["b"]) == ["b"]
    assert sorted(balanced(["a", "b", "c"], ["d", "e"])) == ["a", "b", "c", "d", "d", "e", "e"]


def test_what_is_missing_is_said(folder, tmp_path, capsys):
    for settings, message in (
        (["data.layers=files"], "it has no layer map; set data.layers=zero"),
        (["data.healthy=files"], "it has no healthy counterpart; set data.healthy=generator or zero"),
        (["data.labels_from_mask=false"], "no label is stated; set data.labels_from_mask=true"),
        (["text.prompts=[one]"], "text.prompts: expected 2, of healthy and of each lesion, got 1"),
    ):
        assert run("run", "oct_multimodal", "--data", folder, "--out", tmp_path / settings[0].partition("=")[0], settings=settings) != 0
        assert message in capsys.readouterr().err


def test_defaults_of_the_paper():
    paper, small = configs.load(OctConfig), configs.load(OctConfig, "configs/oct_multimodal_small.yaml")
    assert (paper.train.lr, paper.train.batch_size, paper.train.epochs, paper.data.size) == (1e-4, 8, 30, (512, 512))
    assert paper.model.encoder == "mit_b2" and paper.model.residual == "query" and paper.model.heads == 4
    assert paper.masks.weights == (0.4, 0.3, 0.3) and paper.masks.step == 0.01 and small.model.encoder == "mit_tiny"
    assert text.random_vectors(2, 3, 0).shape == (2, 3) and wk.CrossAttentionExchange is not None
