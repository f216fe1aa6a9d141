"""CAM → box mask → affinity → Sinkhorn and random walk → background score → pixel-adaptive refinement → label of each pixel.

This is the refinement of M4 (UniCL-AffSeg §3.5.5–3.5.7) after WeCLIP and CLIP-ES, with the operators of `wsss_kernels`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..errors import InputError
from .settings import Settings

CAM_TOLERANCE = 1e-3
"""Half-precision files overshoot 1 by rounding."""


@dataclass(frozen=True)
class Operators:
    """What the pipeline is made of: the operators of `wsss_kernels`, or others with their signatures (see `compare`)."""

    box_mask: Callable[..., Tensor]
    affinity_random_walk: Callable[..., Tensor]
    par: Callable[..., Tensor]

    @staticmethod
    def compiled() -> Operators:
        import wsss_kernels as wk

        return Operators(wk.box_mask, wk.affinity_random_walk, wk.par)


@dataclass
class Refined:
    """The result for one image.

    Args:
        label: `[H, W]` uint8, the class of each pixel, 0 background.
        values: the pixel value of each map below. Maps that were zero everywhere are left out.
        before: `[K, h, w]`, the class activation maps on the token grid.
        after: `[K, h, w]`, the same after box mask and random walk, each in 0…1.
        milliseconds: time of each stage.
    """

    label: np.ndarray
    values: list[int]
    before: np.ndarray
    after: np.ndarray
    milliseconds: dict[str, float] = field(default_factory=dict)


class Stopwatch:
    """Wall-clock milliseconds by stage, with the GPU waited for."""

    def __init__(self, device: torch.device):
        self.device, self.milliseconds = device, {}

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.milliseconds[stage] = round(self.milliseconds.get(stage, 0.0) + 1e3 * (time.perf_counter() - start), 3)


def working_image(image: np.ndarray, max_side: int) -> np.ndarray:
    """The image itself, or a smaller copy whose longer side is `max_side`."""
    height, width = image.shape[:2]
    if max(height, width) <= max_side:
        return image
    scale = max_side / max(height, width)
    return np.array(Image.fromarray(image).resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BOX))


def on_grid(cam: Tensor, size: Sequence[int]) -> Tensor:
    """`Tensor[K, h', w']` → `Tensor[K, h, w]`: bilinear where the grid is finer, the mean of each cell where it is coarser."""
    if tuple(cam.shape[-2:]) == tuple(size):
        return cam
    if cam.shape[-2] > size[0] and cam.shape[-1] > size[1]:
        return F.adaptive_avg_pool2d(cam[None], tuple(size))[0]
    return F.interpolate(cam[None], size=tuple(size), mode="bilinear", align_corners=False)[0]


def walk(cam: Tensor, encoder: Tensor, settings: Settings, operators: Operators, watch: Stopwatch) -> Tensor:
    """Box mask and random walk, then min–max per map: `Tensor[K, h, w]`, `Tensor[L, C, h, w]` → `Tensor[K, h, w]`."""
    with watch("box_mask"):
        mask = operators.box_mask(cam, settings.box_threshold, clip_border=settings.box_clip_border)
        empty = mask.amax(dim=(-2, -1), keepdim=True) == 0
        mask = torch.where(empty, torch.ones_like(mask), mask)
    with watch("affinity_random_walk"):
        walked = operators.affinity_random_walk(
            cam[None],
            None,
            encoder.flatten(2)[None],
            mask[None],
            first_layer=settings.first_layer,
            clamp_min=settings.clamp_min,
            sinkhorn_iter=settings.sinkhorn_iter,
            power=settings.power,
            mask_side=settings.mask_side,
        )[0]
    with watch("background"):
        low, high = walked.amin(dim=(-2, -1), keepdim=True), walked.amax(dim=(-2, -1), keepdim=True)
        return (walked - low) / (high - low).clamp_min(1e-7)


def scores(cam: Tensor, values: Sequence[int], size: Sequence[int], settings: Settings) -> Tensor:
    """`Tensor[K, h, w]` → `Tensor[1 + K, H, W]`: the background score, then the maps at full size."""
    up = F.interpolate(cam[None], size=tuple(size), mode="bilinear", align_corners=False)[0]
    if settings.background_score is not None:
        background = torch.full_like(up[:1], settings.background_score)
    else:
        objects = [k for k, value in enumerate(values) if value > 0]
        highest = up[objects].amax(dim=0, keepdim=True) if objects else torch.zeros_like(up[:1])
        background = (1 - highest) ** settings.background_power
    return torch.cat([background, up])


def argmax_at(score: Tensor, size: Sequence[int]) -> Tensor:
    """`Tensor[K, h, w]` → `Tensor[H, W]`: the first of the highest maps after bilinear resizing, one map at a time."""
    best = label = None
    for k in range(len(score)):
        plane = score[k]
        if tuple(plane.shape) != tuple(size):
            plane = F.interpolate(plane[None, None], size=tuple(size), mode="bilinear", align_corners=False)[0, 0]
        if best is None:
            best, label = plane, torch.zeros(tuple(size), dtype=torch.uint8, device=score.device)
        else:
            higher = plane > best
            best = torch.where(higher, plane, best)
            label = torch.where(higher, torch.full_like(label, k), label)
    return label


def belongs(grid: Sequence[int], size: Sequence[int]) -> bool:
    """Whether maps on this grid can cover an image of this (height, width).

    Networks see an image in its own proportions, rounded to whole tokens or patches, or resized to a square.
    """
    (h, w), (height, width) = grid, size
    slack = max(height, width, h * width / 10)  # one token along either side; a tenth where maps were enlarged after rounding
    return h == w or abs(h * width - w * height) <= slack


def check_grid(what: str, grid: Sequence[int], size: Sequence[int]) -> None:
    """Refuses maps that cannot belong to an image of this (height, width)."""
    if not belongs(grid, size):
        (h, w), (height, width) = grid, size
        hint = " (transposed?)" if belongs((w, h), size) else ""
        raise InputError(
            f"{what}: expected h×w in the proportions of the image's {height}×{width}, or square as a square network input gives it, got {h}×{w}{hint}"
        )


def _checked(image: np.ndarray, cam: np.ndarray, encoder: np.ndarray, values: Sequence[int] | None, settings: Settings) -> list[int]:
    """The pixel value of each map; raises `InputError` naming what cannot be refined."""
    expected = {
        "image": (image, lambda a: a.ndim == 3 and a.shape[2] == 3 and a.dtype == np.uint8, "[H, W, 3] uint8"),
        "cam": (cam, lambda a: a.ndim == 3 and a.dtype.kind == "f", "[K, h, w], floating point"),
        "encoder": (encoder, lambda a: a.ndim == 4 and a.dtype.kind == "f" and a.shape[1] > 0, "[L, C, h, w], floating point"),
    }
    for name, (array, fits, words) in expected.items():
        if not isinstance(array, np.ndarray) or not fits(array) or 0 in array.shape[-2:] or 0 in image.shape:
            found = f"{array.dtype} of shape {'×'.join(map(str, array.shape))}" if isinstance(array, np.ndarray) else type(array).__name__
            raise InputError(f"{name}: expected an array {words}, not empty, got {found}")
    if cam.size and not (cam.min() >= -CAM_TOLERANCE and cam.max() <= 1 + CAM_TOLERANCE):  # false for NaN
        raise InputError(f"cam: expected values in 0…1, got {cam.min():g} … {cam.max():g} (wsss_kernels.normalize_cam brings them there)")
    if not np.isfinite(encoder).all():
        raise InputError("encoder: expected finite values, got NaN or infinity")
    check_grid("cam", cam.shape[-2:], image.shape[:2])
    check_grid("features", encoder.shape[-2:], image.shape[:2])
    if settings.first_layer >= len(encoder):
        raise InputError(f"features: expected more than first_layer = {settings.first_layer} layers, got {len(encoder)}")
    numbers = list(values) if values is not None else list(range(1, len(cam) + 1))
    if len(numbers) != len(cam) or len(set(numbers)) != len(numbers) or not all(n in range(255) for n in numbers):
        raise InputError(f"values: expected {len(cam)} different integers in 0…254, one for each map of cam, got {numbers}")
    return [int(n) for n in numbers]


def refine(
    image: np.ndarray,
    cam: np.ndarray,
    encoder: np.ndarray,
    values: Sequence[int] | None = None,
    settings: Settings | None = None,
    *,
    device: str | torch.device = "cpu",
    operators: Operators | None = None,
) -> Refined:
    """Refines the class activation maps of one image into a mask.

    Args:
        image: `[H, W, 3]` uint8.
        cam: `[K, h', w']` in 0…1, for the classes that the image holds (zero maps are ignored). It covers the whole image, in
            the image's proportions or resized to a square.
        encoder: feature maps `[L, C, h, w]`, covering the image likewise; their grid is that of the random walk.
        values: the pixel value of each map in the mask, 1, 2, … by default; 0 marks a map of the background.
        settings: parameters.
        device: where the operators run.
        operators: `Operators.compiled()` by default.

    Raises:
        InputError: arrays of another shape, dtype or range; a CAM or feature maps that do not belong to the image, or with
            fewer layers than `first_layer` needs; values that are not different integers in 0…254.
    """
    settings, device = settings or Settings(), torch.device(device)
    operators = operators or Operators.compiled()
    numbers = _checked(image, cam, encoder, values, settings)
    watch = Stopwatch(device)
    with watch("prepare"), torch.no_grad():
        picture = torch.from_numpy(working_image(image, settings.max_side)).to(device).permute(2, 0, 1).float() / 255
        maps = torch.from_numpy(np.ascontiguousarray(cam, dtype=np.float32)).to(device)
        features = torch.from_numpy(np.ascontiguousarray(encoder, dtype=np.float32)).to(device)
        maps = on_grid(maps, features.shape[-2:])
        kept = [k for k, highest in enumerate(maps.amax(dim=(1, 2)).tolist()) if highest > 0]
        maps, numbers = maps[kept], [numbers[k] for k in kept]
    if not kept:
        nothing = np.zeros((0, *features.shape[-2:]), np.float32)
        return Refined(np.zeros(image.shape[:2], np.uint8), [], nothing, nothing, watch.milliseconds)
    with torch.no_grad():
        walked = walk(maps, features, settings, operators, watch)
        label = classify(picture, walked, numbers, image.shape[:2], settings, operators, watch)
    return Refined(label.cpu().numpy(), numbers, maps.cpu().numpy(), walked.cpu().numpy(), watch.milliseconds)


def classify(
    picture: Tensor, walked: Tensor, values: Sequence[int], size: Sequence[int], settings: Settings, operators: Operators, watch: Stopwatch
) -> Tensor:
    """Background score, PAR and argmax: `Tensor[3, H', W']`, `Tensor[K, h, w]` → the mask `Tensor[H, W]`, uint8."""
    with watch("background"):
        score = scores(walked, values, picture.shape[-2:], settings)
    if settings.par_iter:
        with watch("par"):
            weights = {"w1": settings.par_w1, "w2": settings.par_w2, "w3": settings.par_w3, "exact": not settings.par_fast}
            score = operators.par(picture[None], score[None], settings.par_dilations, settings.par_iter, **weights)[0]
    with watch("argmax"):
        table = torch.tensor([0, *values], dtype=torch.uint8, device=score.device)
        return table[argmax_at(score, size).long()]
