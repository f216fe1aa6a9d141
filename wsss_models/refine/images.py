"""Reads any image that Pillow knows as upright 8-bit RGB."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import InputError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm")
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, struct.error, zlib.error)
_DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")


def read_image(path: Path) -> np.ndarray:
    """H×W×3 uint8: turned upright by its EXIF entry, transparency laid on white, deep grey levels stretched to 0…255.

    Raises:
        InputError: no such file, not an image, a truncated or broken one, one with infinite or NaN levels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()
                return np.array(_rgb(ImageOps.exif_transpose(image), path))
    except FileNotFoundError:
        raise InputError(f"image {path}: there is no such file") from None
    except UnidentifiedImageError:
        raise InputError(
            f"image {path}: expected an image file, got something that Pillow cannot identify ({path.stat().st_size} bytes)"
        ) from None
    except Image.DecompressionBombError as error:
        raise InputError(f"image {path}: expected at most {2 * Image.MAX_IMAGE_PIXELS:,} pixels: {error}") from None
    except _BROKEN as error:
        raise InputError(f"image {path}: expected a complete image, got a broken or truncated one ({error})") from None


def _rgb(image: Image.Image, path: Path) -> Image.Image:
    if image.mode in _DEEP:
        levels = np.asarray(image).astype(np.float64)
        if not np.isfinite(levels).all():
            raise InputError(f"image {path}: expected finite grey levels, got NaN or infinity")
        span = max(float(levels.max() - levels.min()), 1.0 if image.mode != "F" else 1e-12)
        image = Image.fromarray(((levels - levels.min()) / span * 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
