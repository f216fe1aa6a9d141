"""Every kind of image that Pillow opens, and every kind that is broken."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from wsss_models.errors import InputError
from wsss_models.refine import Settings, pipeline, tokens
from wsss_models.refine.images import read_image

from .conftest import scene

RGB = scene()[0]
GREY = RGB.mean(axis=2)


def upside_down(path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored rotated: to be shown turned by 90 degrees
    Image.fromarray(np.rot90(RGB).copy()).save(path, exif=exif, quality=95)


def transparent(path):
    alpha = np.where(scene()[1], 255, 0).astype(np.uint8)
    Image.fromarray(np.dstack([RGB, alpha])).save(path)


def palette(path):
    image = Image.fromarray(RGB).quantize(8)
    image.save(path, transparency=3)


WRITERS = {
    "grey.png": lambda path: Image.fromarray(GREY.astype(np.uint8)).save(path),
    "grey_alpha.png": lambda path: Image.fromarray(GREY.astype(np.uint8)).convert("LA").save(path),
    "bits.png": lambda path: Image.fromarray(GREY > 90).save(path),
    "deep.png": lambda path: Image.fromarray((GREY * 16).astype(np.uint16)).save(path),
    "deep.tif": lambda path: Image.fromarray((GREY * 16).astype(np.uint16)).save(path),
    "integers.tif": lambda path: Image.fromarray((GREY * 1000).astype(np.int32)).save(path),
    "floats.tif": lambda path: Image.fromarray((GREY / 1000).astype(np.float32)).save(path),
    "cmyk.jpg": lambda path: Image.fromarray(RGB).convert("CMYK").save(path),
    "photo.jpg": lambda path: Image.fromarray(RGB).save(path, quality=95),
    "rotated.jpg": upside_down,
    "transparent.png": transparent,
    "palette.png": palette,
    "photo.webp": lambda path: Image.fromarray(RGB).save(path),
    "animation.gif": lambda path: Image.fromarray(RGB).save(path, save_all=True, append_images=[Image.fromarray(RGB)]),
}


@pytest.mark.parametrize("name", WRITERS)
def test_kinds_of_images(refine, tmp_path, name):
    WRITERS[name](tmp_path / name)
    image = read_image(tmp_path / name)
    assert image.shape == (48, 64, 3) and image.dtype == np.uint8
    assert abs(image[24, 26].mean() - image[2, 2].mean()) > 5, "upright, and with contrast"
    assert refine(tmp_path / name, "--point", "disc:26,24", "--par-iter", 2)[0] == 0
    mask = np.array(Image.open(tmp_path / "out" / f"{name.partition('.')[0]}.png"))
    assert mask.shape == (48, 64) and mask[24, 26] == 1 and mask[2, 2] == 0


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 2), (3, 500), (500, 3), (7, 7), (1500, 2500)])
def test_sizes(refine, tmp_path, height, width):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)).save(tmp_path / "a.png")
    options = ("--par-iter", 1, "--max-side", 256, "--max-tokens", 300)
    assert refine(tmp_path / "a.png", "--point", f"thing:{width // 2},{height // 2}", *options)[0] == 0
    assert Image.open(tmp_path / "out/a.png").size == (width, height)


def test_token_grids_are_bounded():
    for height, width in ((1, 1), (5000, 7000), (3, 5000), (999, 1001), (4096, 1)):
        rows, columns = tokens.grid_size(height, width, Settings())
        assert 1 <= rows <= height and 1 <= columns <= width and rows * columns <= 4096
    assert tokens.grid_size(512, 512, Settings()) == (64, 64)


def test_cell_means():
    values = np.random.default_rng(0).random((7, 11, 2))
    means = tokens.cell_means(values, 3, 4)
    assert means.shape == (3, 4, 2)
    np.testing.assert_allclose(means[0, 0], values[:2, :2].mean(axis=(0, 1)))
    np.testing.assert_allclose(means[2, 3], values[4:, 8:].mean(axis=(0, 1)))


def test_path_lengths_go_around_edges():
    colour = np.zeros((5, 9, 3))
    colour[:4, 4] = 100  # a wall with a gap below
    grid = tokens.TokenGrid(colour, np.zeros((5, 9)))
    free = tokens.path_lengths(grid, np.array([0]), 0.0)[0]
    walled = tokens.path_lengths(grid, np.array([0]), 1.0)[0]
    assert free[0, 8] == pytest.approx(8 / 9)
    assert walled[0, 8] == pytest.approx((2 * (4 * 2**0.5)) / 9) and walled[0, 3] == pytest.approx(3 / 9)


def test_a_cam_on_another_grid_is_resized():
    cam = torch.rand(2, 28, 28)
    assert pipeline.on_grid(cam, (14, 7)).shape == (2, 14, 7) and pipeline.on_grid(cam, (60, 40)).shape == (2, 60, 40)
    torch.testing.assert_close(pipeline.on_grid(cam, (14, 14)), cam.unflatten(2, (14, 2)).unflatten(1, (14, 2)).mean(dim=(2, 4)))


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp", "gif", "bmp"])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.9])
def test_truncated_images(tmp_path, suffix, share):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(RGB).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(InputError, match=r"a\.\w+: expected a(n image file| complete image), got"):
        read_image(path)


def test_not_images(tmp_path):
    (tmp_path / "text.png").write_text("this is no image")
    with pytest.raises(InputError, match=r"text\.png: expected an image file, got something that Pillow cannot identify \(16 bytes\)"):
        read_image(tmp_path / "text.png")
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "nan.tif")
    with pytest.raises(InputError, match=r"nan\.tif: expected finite grey levels, got NaN or infinity"):
        read_image(tmp_path / "nan.tif")
    with pytest.raises(InputError, match="there is no such file"):
        read_image(tmp_path / "absent.png")
