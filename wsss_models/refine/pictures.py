"""What a person looks at: the indexed mask, the overlay, and the CAM before and after refinement."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .points import Point

_PANEL = 420  # pixels, longer side of a panel
_MARGIN, _TITLE = 14, 34
_INK, _PAPER = (32, 32, 32), (255, 255, 255)


def voc_palette() -> np.ndarray:
    """`[256, 3]` uint8: the colours of Pascal VOC's masks, made by spreading the bits of the class index."""
    index = np.arange(256)
    channels = [sum(((index >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(8)) for channel in range(3)]
    return np.stack(channels, axis=1).astype(np.uint8)


PALETTE = voc_palette()


def mask_image(label: np.ndarray) -> Image.Image:
    """`[H, W]` uint8 → an indexed image whose pixels are the classes."""
    image = Image.fromarray(label)
    image.putpalette(PALETTE.tobytes())
    return image


def _boundary(label: np.ndarray, width: int) -> np.ndarray:
    """True within `width` pixels of a change of class."""
    edge = np.zeros(label.shape, bool)
    for shift in range(1, width + 1):
        for a, b in (
            ((slice(shift, None),), (slice(None, -shift),)),
            ((slice(None), slice(shift, None)), (slice(None), slice(None, -shift))),
        ):
            edge[a] |= label[a] != label[b]
    return edge


def overlay(image: np.ndarray, label: np.ndarray, strength: float = 0.55) -> Image.Image:
    """The image with each class in its colour, and a white line around it."""
    share = np.full(256, round(256 * strength), np.uint16)
    share[0] = 0
    colour = (np.stack([_vivid(value) for value in range(256)]) * share[:, None]).astype(np.uint16)
    mixed = ((image * (256 - share)[label][..., None] + colour[label]) >> 8).astype(np.uint8)  # 16 bits: photographs can be large
    mixed[_boundary(label, max(1, round(max(label.shape) / 400)))] = 255
    return Image.fromarray(mixed)


def cam_picture(image: np.ndarray, cam: np.ndarray, values: Sequence[int]) -> Image.Image:
    """The image in grey with each class's map as its colour, as strong as the map is high. Maps of value 0 are left out."""
    height, width = image.shape[:2]
    mixed = np.repeat(image.mean(axis=2, keepdims=True), 3, axis=2) * 0.55 + 40
    for plane, value in zip(cam, values, strict=True):
        if value:
            alpha = np.array(Image.fromarray(plane).resize((width, height), Image.Resampling.BILINEAR)).clip(0, 1)[..., None]
            mixed = mixed * (1 - 0.85 * alpha) + (_vivid(value) * 0.85) * alpha
    return Image.fromarray(mixed.clip(0, 255).round().astype(np.uint8))


def _vivid(value: int) -> np.ndarray:
    """The class's colour, brightened to show on grey."""
    colour = PALETTE[value].astype(np.float32)
    return colour * (255 / max(colour.max(), 1))


def _with_points(panel: Image.Image, points: Sequence[Point], scale: float, value_of: dict[str, int]) -> Image.Image:
    draw = ImageDraw.Draw(panel)
    for point in points:
        x, y, radius = point.x * scale, point.y * scale, 5
        draw.ellipse((x - radius - 2, y - radius - 2, x + radius + 2, y + radius + 2), fill=(0, 0, 0))
        draw.ellipse(
            (x - radius, y - radius, x + radius, y + radius), fill=tuple(int(v) for v in _vivid(value_of[point.name])), outline=_PAPER
        )
    return panel


def before_after(
    image: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    label: np.ndarray,
    values: Sequence[int],
    names: dict[int, str],
    points: Sequence[Point] = (),
    value_of: dict[str, int] | None = None,
) -> Image.Image:
    """Image, CAM before, CAM after box mask and random walk, final mask, side by side with titles and a legend."""
    height, width = image.shape[:2]
    scale = _PANEL / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = np.array(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC))
    mask = np.array(Image.fromarray(label).resize(size, Image.Resampling.NEAREST))
    panels = [
        ("image and points" if points else "image", _with_points(Image.fromarray(small), points, scale, value_of or {})),
        ("CAM before", cam_picture(small, before, values)),
        ("CAM after random walk", cam_picture(small, after, values)),
        ("mask after PAR", overlay(small, mask)),
    ]
    return _sheet(panels, [(names[v], v) for v in dict.fromkeys(values) if v])


def _sheet(panels: Sequence[tuple[str, Image.Image]], legend: Sequence[tuple[str, int]]) -> Image.Image:
    font = ImageFont.load_default(18)
    cell = max(panels[0][1].width, 220), panels[0][1].height
    wide, high = len(panels) * (cell[0] + _MARGIN) + _MARGIN, cell[1] + 2 * _TITLE + _MARGIN
    sheet = Image.new("RGB", (wide, high), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for k, (title, panel) in enumerate(panels):
        x = _MARGIN + k * (cell[0] + _MARGIN)
        draw.text((x + cell[0] // 2, _TITLE // 2 + 2), title, fill=_INK, font=font, anchor="mm")
        sheet.paste(panel, (x + (cell[0] - panel.width) // 2, _TITLE))
    x, y = _MARGIN, _TITLE + cell[1] + _MARGIN // 2 + _TITLE // 2
    for name, value in legend:
        draw.rectangle((x, y - 8, x + 24, y + 8), fill=tuple(int(v) for v in _vivid(value)), outline=_INK)
        draw.text((x + 32, y), name, fill=_INK, font=font, anchor="lm")
        x += 32 + int(draw.textlength(name, font=font)) + 28
    return sheet
