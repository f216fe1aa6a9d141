"""`wsss refine`: what it writes, that it resumes, and that nothing half-written is left behind."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from wsss_models import cli, demo
from wsss_models.refine import Settings, arrays, interrupts, outputs, points, refine as refine_arrays, tokens
from wsss_models.refine.pictures import overlay, voc_palette

from .conftest import disc_cam, scene

FILES = ("disc.json", "disc.png", "disc_before_after.png", "disc_overlay.png")
POINT = ("--point", "disc:26,24")


def made(folder):
    return sorted(path.name for path in folder.iterdir())


def iou(mask, truth):
    return (mask & truth).sum() / (mask | truth).sum()


def prepared(height=48, width=64, **changes):
    settings = Settings(**changes)
    image, disc = scene(height, width)
    grid = tokens.token_grid(image, *tokens.grid_size(height, width, settings))
    cam = points.point_cam([points.Point("disc", width * 0.4, height * 0.5)], ["disc"], grid, height, width, settings)
    return image, disc, cam, tokens.features(grid, settings), settings


def test_a_point_becomes_a_sharp_mask():
    image, disc, cam, features, settings = prepared(96, 128)
    result = refine_arrays(image, cam, features, settings=settings)
    assert iou(result.label == 1, disc) > 0.97
    before = np.array(Image.fromarray(cam[0]).resize((128, 96), Image.Resampling.BILINEAR)) > 0.5
    assert iou(result.label == 1, disc) > iou(before, disc) + 0.1
    assert result.label.dtype == np.uint8 and result.after.shape == cam.shape
    assert result.after.min() == 0 and result.after.max() == 1


def test_the_files(refine, image, tmp_path):
    assert refine(image, *POINT, "--point", "background:60,2")[0] == 0
    out = tmp_path / "out"
    assert made(out) == sorted(FILES)
    mask = Image.open(out / "disc.png")
    assert mask.mode == "P" and mask.size == (64, 48)
    assert np.array_equal(np.array(mask.getpalette()).reshape(-1, 3), voc_palette())
    assert iou(np.array(mask) == 1, scene()[1]) > 0.95 and set(np.unique(mask)) == {0, 1}
    assert Image.open(out / "disc_overlay.png").size == (64, 48)
    sheet = Image.open(out / "disc_before_after.png")
    assert sheet.width > 4 * 220 and sheet.mode == "RGB"
    record = json.loads((out / "disc.json").read_text())
    assert record["classes"] == {"0": "background", "1": "disc"} and record["size"] == {"width": 64, "height": 48}
    assert {"read", "features", "box_mask", "affinity_random_walk", "par", "total"} <= set(record["milliseconds"])
    assert {"torch", "wsss_kernels", "numpy", "pillow"} <= set(record["versions"]) and record["device"]
    assert set(record["backends"]) == {"box_mask", "affinity_random_walk", "par"} and record["inputs"]["parameters"]["par_iter"] == 20
    assert sum(record["pixels"].values()) == 48 * 64 and len(record["inputs"]["sha256"]["image"]) == 64


def test_voc_palette():
    assert voc_palette()[[0, 1, 2, 3, 15, 20, 255]].tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [192, 128, 128], [0, 64, 128], [224, 224, 192]
    ]  # fmt: skip


def test_overlay_leaves_the_background_and_colours_the_classes():
    image = np.full((4, 900, 3), 200, np.uint8)
    label = np.zeros((4, 900), np.uint8)
    label[:, 450:] = 1
    seen = np.array(overlay(image, label))
    assert (seen[:, :440] == 200).all() and (seen[:, 460:] == seen[0, 899]).all() and (seen[:, 450:452] == 255).all()
    assert seen[0, 899, 0] > 200 and seen[0, 899, 1] < 100


def test_what_is_done_is_skipped(refine, image, tmp_path, capsys):
    stamp = lambda: (tmp_path / "out/disc.png").stat().st_mtime_ns  # noqa: E731
    refine(image, *POINT)
    first = stamp()
    assert refine(image, *POINT)[0] == 0 and stamp() == first
    refine(image, *POINT, "--overwrite")
    second = stamp()
    assert second > first
    refine(image, *POINT, "--par-iter", 3)
    third = stamp()
    assert third > second, "other parameters"
    refine(image, "--point", "disc:27,24", "--par-iter", 3)
    assert stamp() > third, "another point"
    Image.fromarray(scene(seed=1)[0]).save(image)
    fourth = stamp()
    refine(image, "--point", "disc:27,24", "--par-iter", 3)
    assert stamp() > fourth, "another image under the same name"
    fifth = stamp()
    (tmp_path / "out/disc_overlay.png").unlink()
    refine(image, "--point", "disc:27,24", "--par-iter", 3)
    assert stamp() > fifth, "a file is missing"


def test_only_the_mask(refine, image, tmp_path):
    assert refine(image, *POINT, "--no-pictures")[0] == 0
    assert made(tmp_path / "out") == ["disc.json", "disc.png"]


def test_pictures_belong_to_their_mask(refine, image, tmp_path):
    refine(image, *POINT)
    refine(image, *POINT, "--par-iter", 3, "--no-pictures")
    assert made(tmp_path / "out") == ["disc.json", "disc.png"]  # the old pictures showed another mask
    assert refine(image, *POINT, "--par-iter", 3)[0] == 0
    assert made(tmp_path / "out") == sorted(FILES)


def test_pictures_that_are_not_of_this_record_are_made_again(refine, image, tmp_path):
    refine(image, *POINT, "--no-pictures")
    for name in ("disc_overlay.png", "disc_before_after.png"):
        (tmp_path / "out" / name).write_bytes(b"of another run")
    refine(image, *POINT)
    for name in ("disc_overlay.png", "disc_before_after.png"):
        assert (tmp_path / "out" / name).read_bytes() != b"of another run"


@pytest.mark.parametrize("files_written", range(4))
def test_a_run_that_dies_between_two_files_is_done_again(refine, image, tmp_path, monkeypatch, files_written):
    refine(image, *POINT)
    calls, replace = [], os.replace

    def dying(source, target):
        calls.append(target)
        if len(calls) > files_written:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(outputs.os, "replace", dying)
    code, err = refine(image, *POINT, "--par-iter", 3)
    assert code == 130 and "0 of 1 images are done" in err and "Run the same command again" in err
    assert made(tmp_path / "out") == sorted(FILES[1:]), "the old record is gone, whole files are there, and nothing temporary"
    for name in FILES[1:]:
        Image.open(tmp_path / "out" / name).load()
    monkeypatch.undo()
    assert refine(image, *POINT, "--par-iter", 3)[0] == 0
    assert json.loads((tmp_path / "out/disc.json").read_text())["inputs"]["parameters"]["par_iter"] == 3


def test_a_broken_record_counts_as_none(refine, image, tmp_path):
    refine(image, *POINT)
    for text in ("", "[]", "{", '{"format": 1}'):
        (tmp_path / "out/disc.json").write_text(text)
        assert refine(image, *POINT)[0] == 0
        assert json.loads((tmp_path / "out/disc.json").read_text())["format"] == 1


@pytest.mark.parametrize(("number", "words"), [(errno.ENOSPC, "the disk is full"), (errno.EACCES, "Permission denied")])
def test_a_full_disk_ends_the_run(refine, tmp_path, monkeypatch, number, words):
    for name in ("a", "b"):
        Image.fromarray(scene()[0]).save(tmp_path / f"{name}.png")
    (tmp_path / "points.json").write_text(json.dumps({name: {"disc": [[26, 24]]} for name in "ab"}))

    def refuse(source, target):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(outputs.os, "replace", refuse)
    code, err = refine(tmp_path / "a.png", tmp_path / "b.png", "--points", tmp_path / "points.json")
    assert code == 1 and words in err and "out/a.png" in err and "2 images are not done" in err
    assert made(tmp_path / "out") == []


def test_a_full_disk_leaves_the_earlier_result(refine, image, tmp_path, monkeypatch):
    refine(image, *POINT)
    before = {name: (tmp_path / "out" / name).read_bytes() for name in FILES}

    def refuse(descriptor, mode):
        os.close(descriptor)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(outputs.os, "fdopen", refuse)
    code, err = refine(image, *POINT, "--par-iter", 3)
    assert code == 1 and "the disk is full; 1 image is not done" in err
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_what_a_killed_run_left_half_written_is_removed(refine, image, tmp_path):
    (tmp_path / "out").mkdir()
    for name, age in (("old", 7200), ("fresh", 1)):
        path = tmp_path / f"out/.wsss.{name}.tmp"
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
    assert refine(image, *POINT)[0] == 0
    assert made(tmp_path / "out") == sorted([".wsss.fresh.tmp", *FILES])


def test_an_interrupt_that_has_to_wait_is_acknowledged(capsys):
    """As while an operator runs, Python does not hear of the signal: here because its handler is another one."""
    before, left = signal.signal(signal.SIGINT, lambda *_: None), []
    try:
        with interrupts.told(leave=left.append):
            signal.raise_signal(signal.SIGINT)
            time.sleep(1)
            assert "interrupted: waiting for the current step; Ctrl-C again ends it at once" in capsys.readouterr().err and not left
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.5)
    finally:
        signal.signal(signal.SIGINT, before)
    assert left == [130] and "interrupted at once" in capsys.readouterr().err


def test_control_c(tmp_path):
    listed = {}
    (tmp_path / "images").mkdir()
    for k in range(200):
        Image.fromarray(scene(96, 128, k)[0]).save(tmp_path / f"images/{k:03}.png")
        listed[f"{k:03}"] = {"disc": [[51, 48]]}
    (tmp_path / "points.json").write_text(json.dumps(listed))
    command = [sys.executable, "-m", "wsss_models.cli", "refine", "images", "--points", "points.json", "--out", "out"]
    root = os.pathsep.join([str(cli.__file__).rpartition("/wsss_models/")[0], os.environ.get("PYTHONPATH", "")])
    child = subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it, and so would the child
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "out/001.json").exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    err = child.communicate(timeout=120)[1]
    assert child.returncode == 130, err
    assert "interrupted" in err and "of 200 images are done" in err and "Traceback" not in err
    names = made(tmp_path / "out")
    assert not [name for name in names if name.endswith(".tmp")] and len([n for n in names if n.endswith(".json")]) < 200
    for name in names:
        assert Image.open(tmp_path / "out" / name).load() if name.endswith(".png") else json.loads((tmp_path / "out" / name).read_text())


def test_many_images_with_files(refine, tmp_path):
    """A folder of images, of CAMs and of features; one CAM is missing, one image is truncated, the others are done."""
    for kind in ("images", "cams", "features"):
        (tmp_path / kind).mkdir()
    for k, name in enumerate("abcd"):
        Image.fromarray(scene(seed=k)[0]).save(tmp_path / f"images/{name}.png")
        np.save(tmp_path / f"features/{name}.npy", np.random.default_rng(k).random((3, 5, 6, 8), np.float32))
        if name != "b":
            np.savez(tmp_path / f"cams/{name}.npz", cam=np.concatenate([disc_cam(), 0 * disc_cam()]), classes=np.array(["disc", "ring"]))
    whole = (tmp_path / "images/c.png").read_bytes()
    (tmp_path / "images/c.png").write_bytes(whole[: len(whole) // 2])
    code, err = refine(tmp_path / "images", "--cam", tmp_path / "cams", "--features", tmp_path / "features", "--classes", "ring,disc")
    assert code == 1
    assert "b.npy: there is no such file" in err and "c.png: expected a complete image, got a broken or truncated one" in err
    assert [n for n in made(tmp_path / "out") if n.endswith(".json")] == ["a.json", "d.json"]
    assert set(np.unique(Image.open(tmp_path / "out/a.png"))) <= {0, 2}, "disc is the second of --classes, and ring is absent"
    assert json.loads((tmp_path / "out/a.json").read_text())["grid"] == {"layers": 3, "channels": 5, "h": 6, "w": 8}


@pytest.mark.parametrize("changes", [{}, {"par_fast": True}, {"mask_side": "target", "power": 3}], ids=str)
def test_same_bits_with_one_and_two_threads(changes):
    image, _, cam, features, settings = prepared(97, 131, **changes)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        results.append(refine_arrays(image, cam, features, settings=settings))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert np.array_equal(results[0].label, other.label) and np.array_equal(results[0].after, other.after)


def test_background_points_and_several_classes(refine, image, tmp_path):
    assert refine(image, *POINT, "--point", "7:60,40", "--point", "background:4,4")[0] == 0
    mask = np.array(Image.open(tmp_path / "out/disc.png"))
    assert mask[24, 26] == 1 and mask[40, 60] == 7 and mask[2, 2] == 0


def test_zero_maps_are_absent_and_an_empty_cam_is_background():
    image, _, cam, features, _ = prepared()
    result = refine_arrays(image, np.concatenate([0 * cam, cam]), features, [3, 9])
    assert set(np.unique(result.label)) == {0, 9} and result.values == [9]
    assert not refine_arrays(image, 0 * cam, features).label.any()


def test_a_large_image_is_refined_at_a_smaller_size():
    image, disc, cam, features, settings = prepared(300, 400, max_side=100)
    result = refine_arrays(image, cam, features, settings=settings)
    assert result.label.shape == (300, 400) and iou(result.label == 1, disc) > 0.93


def test_compare_reports_stages_and_agreement(image, tmp_path, capsys):
    assert cli.main(["refine", str(image), *POINT, "--out", str(tmp_path / "o"), "--compare"]) == 0
    printed = capsys.readouterr().out
    for word in ("box_mask", "affinity_random_walk", "par", "together", "same class to 100.000 %", "MiB", "threads, PyTorch"):
        assert word in printed


def test_the_demo_has_its_photographs():
    for path in demo.photographs():
        with Image.open(path) as photograph:
            for name, places in demo.POINTS[path.name].items():
                assert all(0 <= x < photograph.width and 0 <= y < photograph.height for x, y in places), name


@pytest.mark.slow
def test_the_demo(tmp_path, capsys):
    assert demo.main(["--out", str(tmp_path / "demo")]) == 0
    printed = capsys.readouterr().out
    assert "Look at:" in printed and "together" in printed
    assert len(list((tmp_path / "demo").glob("*_before_after.png"))) == len(demo.POINTS)


def test_clip_es_and_irnet_dictionaries(tmp_path):
    """Dictionaries that `np.save` pickles: keys count the foreground classes from 0, the mask from 1."""
    np.save(tmp_path / "a.npy", {"keys": np.array([7, 14]), "attn_highres": np.random.default_rng(0).random((2, 4, 6)).astype(np.float16)})
    found = arrays.read_cam(tmp_path / "a.npy")
    assert found.classes == (8, 15) and found.cam.shape == (2, 4, 6) and found.cam.dtype == np.float32
