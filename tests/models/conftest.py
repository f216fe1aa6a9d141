"""A small scene, and the command `wsss refine` run in this process."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from wsss_models import cli


def scene(height=48, width=64, seed=0):
    """A speckled orange disc on speckled blue: the image, and the disc."""
    y, x = np.mgrid[:height, :width]
    disc = (y - height * 0.5) ** 2 + (x - width * 0.4) ** 2 < (min(height, width) * 0.3) ** 2
    colour = np.where(disc[..., None], (230, 120, 40), (40, 70, 150))
    noise = np.random.default_rng(seed).integers(-12, 13, (height, width, 3))
    return (colour + noise).clip(0, 255).astype(np.uint8), disc


def disc_cam(height=6, width=8):
    y, x = np.mgrid[:height, :width]
    return np.exp(-(((y - height * 0.5 + 0.5) / height) ** 2 + ((x - width * 0.4 + 0.5) / width) ** 2) * 8).astype(np.float32)[None]


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disc.png"
    Image.fromarray(scene()[0]).save(path)
    return path


@pytest.fixture
def refine(tmp_path, capsys):
    """`refine(arguments…) -> (exit code, stderr)`; results in tmp_path/out."""

    def run(*arguments, out=tmp_path / "out"):
        try:
            code = cli.main(["refine", *map(str, arguments), "--out", str(out)])
        except SystemExit as stop:  # argparse
            code = stop.code
        return code, capsys.readouterr().err

    return run
