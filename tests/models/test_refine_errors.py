"""Bad input of `wsss refine`: each names the argument, what was expected and what came."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from wsss_models import cli
from wsss_models.errors import InputError, UsageError
from wsss_models.refine import Settings, arrays, compare, refine as refine_arrays
from wsss_models.refine.pipeline import belongs
from wsss_models.refine.points import parse_point, read_points

from .conftest import disc_cam, scene

CAM = disc_cam()
BAD_CAMS = {
    "above 1": (CAM * 1.5, r"--cam .*a\.npy: expected values in 0…1, got .* … 1\.\d+ \(wsss_kernels\.normalize_cam"),
    "below 0": (CAM - 0.5, r"expected values in 0…1, got -0\.\d+ … "),
    "NaN": (np.where(CAM > 0.9, np.nan, CAM), r"expected values in 0…1, got \d+ NaN among 48"),
    "infinite": (np.where(CAM > 0.9, np.inf, CAM), r"expected values in 0…1, got .* … inf"),
    "integers": ((CAM * 255).astype(np.uint8), r"expected floating-point maps of shape K×h×w with values in 0…1, got uint8 of shape 1×6×8"),
    "rank 4": (CAM[None], r"shape K×h×w .*, got float32 of shape 1×1×6×8"),
    "rank 1": (CAM.ravel(), r"shape K×h×w .*, got float32 of shape 48"),
    "transposed": (
        CAM.transpose(0, 2, 1),
        r"--cam .*a\.npy: expected h×w in the proportions of the image's 48×64, or square .*, got 8×6 \(transposed\?\)",
    ),
    "another image's": (
        np.repeat(CAM, 2, axis=2),
        r"--cam .*a\.npy: expected h×w in the proportions of the image's 48×64, or square .*, got 6×16\n",
    ),
    "empty": (CAM[:, :0], r"got float32 of shape 1×0×8"),
    "number of classes": (np.repeat(CAM, 3, axis=0), r"--cam: expected 2 maps, one for each of --classes, got 3"),
}
BAD_FEATURES = {
    "rank 2": (
        np.zeros((6, 8), np.float32),
        r"--features .*: expected floating-point maps of shape C×h×w or L×C×h×w, got float32 of shape 6×8",
    ),
    "integers": (np.zeros((4, 6, 8), np.int64), r"got int64 of shape 4×6×8"),
    "infinite": (np.full((4, 6, 8), np.inf, np.float32), r"--features .*: expected finite values, got NaN or infinity"),
    "another shape": (
        np.ones((4, 8, 6), np.float32),
        r"--features .*f\.npy: expected h×w in the proportions of the image's 48×64, or square .*, got 8×6 \(transposed\?\)",
    ),
}


@pytest.mark.parametrize("name", BAD_CAMS)
def test_bad_cams(refine, image, tmp_path, name):
    array, message = BAD_CAMS[name]
    np.save(tmp_path / "a.npy", array)
    code, err = refine(image, "--cam", tmp_path / "a.npy", "--classes", "disc,ring")
    assert code == 1 and re.search(message, err), err
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("name", BAD_FEATURES)
def test_bad_features(refine, image, tmp_path, name):
    array, message = BAD_FEATURES[name]
    np.save(tmp_path / "cam.npy", CAM)
    np.save(tmp_path / "f.npy", array)
    code, err = refine(image, "--cam", tmp_path / "cam.npy", "--features", tmp_path / "f.npy")
    assert code == 1 and re.search(message, err), err


def test_bad_layers(refine, image, tmp_path):
    np.save(tmp_path / "f.npy", np.ones((2, 4, 6, 8), np.float32))
    code, err = refine(image, "--point", "disc:26,24", "--features", tmp_path / "f.npy", "--first-layer", 2)
    assert code == 1 and "expected more than first_layer = 2 layers, got 2" in err


BAD_FILES = {
    "a.npz": (b"not a zip file", "cannot be read"),
    "a.npy": (b"\x93NUMPY\x01\x00v\x00", "cannot be read"),
    "a.txt": (b"1 2 3", r"expected a \.npy or \.npz file"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_unreadable_arrays(tmp_path, name):
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"--cam .*{re.escape(name)}: {message}"):
        arrays.read_cam(tmp_path / name)


def test_pickles_run_no_code(tmp_path):
    class Hostile:
        def __reduce__(self):
            return open, (str(tmp_path / "written"), "w")

    np.save(tmp_path / "a.npy", {"keys": np.array([1]), "cam": Hostile()}, allow_pickle=True)
    with pytest.raises(InputError, match=r"only NumPy arrays are read from pickles"):
        arrays.read_cam(tmp_path / "a.npy")
    np.savez(tmp_path / "b.npz", cam=np.array([Hostile()], dtype=object))
    with pytest.raises(InputError, match="cannot be read"):
        arrays.read_cam(tmp_path / "b.npz")
    (tmp_path / "c.npy").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(InputError, match="cannot be read"):
        arrays.read_cam(tmp_path / "c.npy")
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (np.array(["a", "b"]), r"expected 1 names or integers in classes, one for each map, got <U1 of shape 2"),
        (np.array([0.5]), r"one for each map, got float64 of shape 1"),
        (np.array([255]), r"expected classes in 1…254 \(0 is background, 255 ignored\), got 255 … 255"),
    ],
)
def test_bad_classes_in_a_cam_file(tmp_path, classes, message):
    np.savez(tmp_path / "a.npz", cam=CAM, classes=classes)
    with pytest.raises(InputError, match=message):
        arrays.read_cam(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", maps=CAM, others=CAM)
    with pytest.raises(InputError, match=r"expected an array named cam or attn_highres or high_res, got maps, others"):
        arrays.read_cam(tmp_path / "b.npz")


@pytest.mark.parametrize("text", ["cat", "cat:", "cat:1", "cat:1;2", ":1,2", "cat:a,b", "cat:1,2,3", "cat:nan,1", "255:1,2", "-1:1,2", ""])
def test_malformed_points(refine, image, text):
    with pytest.raises(UsageError, match="--point: expected"):
        parse_point(text)
    code, err = refine(image, f"--point={text}")
    assert (code == 2 and "--point: expected" in err and repr(text) in err) or "255" in err or "-1" in err


def test_class_names_that_look_like_numbers():
    assert parse_point("²:10,10").name == "²"
    with pytest.raises(UsageError, match="expected a class name or an integer in 0…254"):
        parse_point("9" * 5000 + ":1,1")


@pytest.mark.parametrize("content", ['{"a": {"b": [[1' + "0" * 400 + ", 2]]}}", "[" * 100000])
def test_points_files_beyond_reason(tmp_path, content):
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(UsageError, match=r"--points .*p\.json: "):
        read_points(tmp_path / "p.json")


def test_a_name_that_cannot_be_written_fails_alone(refine, tmp_path):
    a, b = two(tmp_path)
    (tmp_path / "p.json").write_text(json.dumps({name: {"disc": [[26, 24]]} for name in ("a.png", "b.png")}))
    (tmp_path / "out" / "a.png").mkdir(parents=True)
    code, err = refine(a, b, "--points", tmp_path / "p.json", out=tmp_path / "out")
    assert code == 1 and "a: cannot write" in err and (tmp_path / "out" / "b.json").is_file()


@pytest.mark.parametrize("place", ["64,0", "0,48", "-1,5", "1000,1000"])
def test_points_outside_the_image(refine, image, place):
    code, err = refine(image, "--point", f"disc:{place}")
    assert code == 1 and f"point disc:{place}: expected x in 0…63 and y in 0…47 (pixels from the top left), got {place}" in err


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"a": []}', '{"a": {"b": 3}}', '{"a": {"b": [[1]]}}', '{"a": {"b": [[1, "2"]]}}', '{"a": {"b": [[true, 2]]}}']
)
def test_bad_points_files(tmp_path, content):
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(UsageError, match=r"--points .*p\.json: (expected \{\"IMAGE\"|cannot be read as JSON)"):
        read_points(tmp_path / "p.json")


def two(tmp_path):
    for name in ("a.png", "b.png"):
        Image.fromarray(scene()[0]).save(tmp_path / name)
    return tmp_path / "a.png", tmp_path / "b.png"


def test_wrong_use(refine, image, tmp_path):
    a, b = two(tmp_path)
    np.save(tmp_path / "cam.npy", CAM)
    (tmp_path / "p.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    point = ("--point", "disc:26,24")
    calls = {
        (image,): "expected one of --cam, --point (with one image) and --points, got none",
        (image, *point, "--cam", tmp_path / "cam.npy"): "got --cam and --point",
        (a, b, *point): "--point: expected one image, got 2",
        (a, b, "--cam", tmp_path / "cam.npy"): "expected a folder with a file for each of 2 images, got one file",
        (image, "--cam", tmp_path / "absent.npy"): "there is no such file or folder",
        (tmp_path / "empty", "--points", tmp_path / "p.json"): "the folder holds no image",
        (image, *point, "--classes", "cat,dog"): "expected one of the --classes cat, dog, got disc",
        (image, *point, "--classes", "disc,disc"): "--classes: expected up to 254 different names",
        (image, *point, "--device", "cuda:77"): "--device cuda:77: expected cpu or a CUDA device that is there",
        (image, *point, "--backend", "cuda"): "--backend cuda: ",
        (image, *point, "--threads", "0"): "--threads must be between 1 and 4096, got 0",
        (image, *point, "--threads", 10**12): "--threads must be between 1 and 4096, got 1000000000000",
        (image, *point, "--first-layer", 2): "--first-layer must be 0 or 1 without --features",
        (image, *point, "--par-iter", 2**31): "--par-iter must be between 0 and 2147483647, got 2147483648",
        (image, *point, "--par-dilations", ","): "argument --par-dilations: invalid integers value: ','",
        (image, *point, "--device", "mps"): "--device mps: expected cpu or",
        (image, *point, "--par-dilations", "0,1"): "--par-dilations must be between 1 and 2147483647, got 0,1",
        (image, *point, "--par-dilations", "x"): "argument --par-dilations: invalid integers value: 'x'",
        (image, *point, "--box-threshold", "2"): "--box-threshold must be between 0 and 1, got 2.0",
        (image, *point, "--box-threshold", "nan"): "--box-threshold must be between 0 and 1, got nan",
        (image, *point, "--unknown"): "unrecognized arguments: --unknown",
    }
    for arguments, message in calls.items():
        code, err = refine(*arguments)
        assert code == 2 and message in err, (arguments, err)
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_compare_needs_the_source_tree(refine, image, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    code, err = refine(image, "--point", "disc:26,24", "--compare")
    assert code == 2 and "--compare: expected the source tree" in err and not (tmp_path / "out").exists()


def test_names_that_collide(refine, tmp_path):
    two(tmp_path)
    (tmp_path / "p.json").write_text("{}")
    Image.fromarray(scene()[0]).save(tmp_path / "a.jpg")
    Image.fromarray(scene()[0]).save(tmp_path / "a_overlay.png")
    for other in ("a.jpg", "a_overlay.png"):
        code, err = refine(tmp_path / "a.png", tmp_path / other, "--points", tmp_path / "p.json")
        assert code == 2 and "two images would both write" in err and other in err
    code, err = refine(tmp_path / "a.png", "--point", "disc:26,24", out=tmp_path)
    assert code == 2 and "a.png would overwrite the image" in err


@pytest.mark.parametrize("folder", ["file/inside", "file", "/proc/wsss"])
def test_output_folder_that_cannot_be_written(refine, image, tmp_path, folder):
    (tmp_path / "file").write_text("a file, not a folder")
    code, err = refine(image, "--point", "disc:26,24", out=tmp_path / folder)
    assert code == 2 and f"{folder}: expected a folder that can be written, got: " in err


def test_images_without_a_label(refine, tmp_path):
    a, b = two(tmp_path)
    (tmp_path / "p.json").write_text(json.dumps({"a": {"disc": [[26, 24]]}, "b": {"background": [[1, 1]]}}))
    code, err = refine(a, b, tmp_path / "absent.png", "--points", tmp_path / "p.json")
    assert code == 1 and "b.png: expected a CAM or at least one point of an object, got none" in err
    assert "absent.png: there is no such file" in err and (tmp_path / "out/a.json").exists()


def test_class_names_in_files_of_many_images_need_an_order(refine, tmp_path):
    a, b = two(tmp_path)
    (tmp_path / "cams").mkdir()
    for name in "ab":
        np.savez(tmp_path / f"cams/{name}.npz", cam=CAM, classes=np.array(["disc"]))
    code, err = refine(a, b, "--cam", tmp_path / "cams")
    assert code == 1 and "say their order for all images with --classes" in err
    assert refine(a, b, "--cam", tmp_path / "cams", "--classes", "disc")[0] == 0


ARRAYS = {"image": scene()[0], "cam": CAM, "encoder": np.ones((2, 4, 6, 8), np.float32)}
BAD_ARRAYS = {
    "image dtype": (
        {"image": ARRAYS["image"] / 255},
        r"image: expected an array \[H, W, 3\] uint8, not empty, got float64 of shape 48×64×3",
    ),
    "image rank": ({"image": ARRAYS["image"][..., 0]}, "image: expected an array .* got uint8 of shape 48×64"),
    "no image": ({"image": "a.png"}, "image: expected an array .* got str"),
    "empty image": ({"image": ARRAYS["image"][:0]}, "image: expected an array .*, not empty, got uint8 of shape 0×64×3"),
    "cam rank": ({"cam": CAM[0]}, "cam: expected an array .* got float32 of shape 6×8"),
    "cam range": ({"cam": CAM * 255}, r"cam: expected values in 0…1, got .* … 2\d\d"),
    "cam NaN": ({"cam": np.where(CAM > 0.9, np.nan, CAM)}, "cam: expected values in 0…1, got nan"),
    "cam of another image": ({"cam": CAM.transpose(0, 2, 1)}, r"cam: expected h×w in the proportions .* \(transposed\?\)"),
    "encoder rank": ({"encoder": ARRAYS["encoder"][0]}, "encoder: expected an array .* got float32 of shape 4×6×8"),
    "encoder infinite": ({"encoder": ARRAYS["encoder"] * np.inf}, "encoder: expected finite values"),
    "values": ({"values": [1, 2]}, r"values: expected 1 different integers in 0…254, .* got \[1, 2\]"),
    "value 255": ({"values": [255]}, r"values: expected 1 .* got \[255\]"),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_bad_arrays_of_the_function(name):
    changes, message = BAD_ARRAYS[name]
    with pytest.raises(InputError, match=message):
        refine_arrays(**{**ARRAYS, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"par_iter": "3"}, "--par-iter must be an integer, got '3'"),
        ({"par_iter": 2.5}, "--par-iter must be an integer, got 2.5"),
        ({"par_fast": 1}, "--par-fast must be True or False, got 1"),
        ({"par_dilations": [1, 2]}, r"--par-dilations must be a tuple of integers, got \[1, 2\]"),
        ({"box_threshold": None}, "--box-threshold must be a number, got None"),
        ({"background_score": "none"}, "--background-score must be a number or None, got 'none'"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(UsageError, match=message):
        Settings(**changes)


def test_names_that_the_terminal_cannot_print(image, tmp_path):
    odd = image.with_name("\udce9t\u00e9 \u732b.png")
    image.rename(odd)
    command = [sys.executable, "-m", "wsss_models.cli", "refine", str(odd), "--point", "猫:26,24", "--out", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1", "PYTHONPATH": os.pathsep.join(p or "." for p in sys.path)}
    done = subprocess.run(command, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / f"{odd.stem}.json").read_text())["classes"] == {"0": "background", "1": "猫"}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_standard_output(image, tmp_path):
    command = [sys.executable, "-m", "wsss_models.cli", "refine", str(image), "--point", "disc:26,24", "--out", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p or "." for p in sys.path)}
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert done.returncode == 1 and "No space left on device" in done.stderr and "Traceback" not in done.stderr


def test_missing_packages(refine, image, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in ("tqdm", "PIL") else find(name, *rest))
    code, err = refine(image, "--point", "disc:26,24")
    assert code == 2 and 'not installed: pillow, tqdm. Run: pip install "wsss_kernels[refine]"' in err


def test_the_command_itself(capsys):
    for arguments, code in ((["--help"], 0), (["refine", "--help"], 0), ([], 2), (["unknown"], 2), (["--version"], 0)):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == code
    assert "--par-dilations" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("size", "fits", "does_not"),
    [
        ((375, 500), [(24, 32), (23, 31), (24, 31), (368, 496), (384, 512), (375, 500), (14, 14), (1, 1), (2, 3)], [(3, 2), (32, 24), (28, 27), (24, 36)]),
        ((500, 375), [(32, 24), (3, 2), (28, 28)], [(2, 3), (24, 32), (36, 24)]),
        ((10, 3000), [(1, 7), (1, 190), (2, 300)], [(3, 300), (7, 1), (300, 1)]),
        ((512, 512), [(32, 32), (32, 33)], [(32, 64), (16, 32)]),
    ],
)  # fmt: skip
def test_which_grids_belong_to_an_image(size, fits, does_not):
    assert [grid for grid in fits if not belongs(grid, size)] == [] and [grid for grid in does_not if belongs(grid, size)] == []


def test_square_maps_of_an_image_that_is_not(refine, image, tmp_path):
    """A network with a square input stretches the image: the disc lies where it lies in the image, an ellipse in the maps."""
    for name, side in (("a", 7), ("b", 12)):
        np.save(tmp_path / f"{name}.npy", disc_cam(side, side))
        assert refine(image, "--cam", tmp_path / f"{name}.npy", "--overwrite") == (0, "")
        mask, disc = np.array(Image.open(tmp_path / "out/disc.png")) == 1, scene()[1]
        assert (mask & disc).sum() / (mask | disc).sum() > 0.8
    np.save(tmp_path / "f.npy", np.random.default_rng(0).random((5, 9, 9), np.float32))
    for cam in (tmp_path / "a.npy", tmp_path / "b.npy"):
        assert refine(image, "--cam", cam, "--features", tmp_path / "f.npy") == (0, "")
