"""Box masks of class activation maps, and the connected components below them: the public functions."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _args
from ..._dispatch import Backend, Operator
from . import reference

BOX_MASK_OP = Operator("box_mask", backends=(Backend("cuda"), Backend("cpu")))
COMPONENTS_OP = Operator("connected_components", backends=(Backend("cuda"), Backend("cpu")))

_box_mask = BOX_MASK_OP.raw_op(
    "box_mask_fwd(Tensor cam, float threshold, bool clip_border) -> Tensor", lambda cam, *options: cam.new_empty(cam.shape)
)
_components = COMPONENTS_OP.raw_op(
    "connected_components_fwd(Tensor mask, int connectivity) -> Tensor",
    lambda mask, connectivity: mask.new_empty(mask.shape, dtype=torch.int32),
)


def _result_dtype(cam: Tensor) -> torch.dtype:
    # Rounding `cam` itself to the autocast dtype would move grey levels; the zeros and ones of the result lose nothing.
    device = cam.device.type
    if torch.is_autocast_enabled(device) and cam.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return cam.dtype


def box_mask(cam: Tensor, threshold: float = 0.4, *, clip_border: bool = False, backend: str | None = None) -> Tensor:
    """The union of the bounding boxes of what a class activation map shows (M4 §3.5.6; CLIP-ES, CVPR 2023).

    Per map, with `v = trunc(255·cam)` clamped to 0…255 (NaN → 0): the foreground is `v > trunc(threshold · max v)`, and
    the result is 1 inside the bounding box of any of its 8-connected components. Nothing in the foreground gives zeros.

    Args:
        cam: `Tensor[…, h, w]`, any floating type, meant to lie in [0, 1] (other values are clamped).
        threshold: share of the map's maximum, any finite number. Useful in [0, 1): 0.4 for VOC, 0.7 for COCO. From 1 on
            nothing is foreground; below 0 every pixel is, as soon as `threshold · max v` reaches −1.
        clip_border: as released: box ends are cut to w − 1 and h − 1 and used as exclusive ends, so that the last row
            and the last column are never covered.
        backend: `"cuda"`, `"cpu"`, `"reference"`, or `None` to choose.

    Returns:
        `Tensor[…, h, w]` of 0 and 1 in the dtype of `cam`. Under autocast it has the autocast dtype, while the
        decision is still taken on `cam` as given.

    Gradient: none, the mask is a step function of `cam`.

    Raises:
        TypeError: `cam` is not a floating-point tensor, `threshold` is not a number.
        ValueError: fewer than two dimensions, an empty map, a threshold that is NaN or infinite.
        NotImplementedError: `cam` requires a gradient.
    """
    _args.tensor("box_mask", "cam", cam, "…×h×w", spatial=2)
    threshold = _args.number("box_mask", "threshold", threshold)
    _args.flag("box_mask", "clip_border", clip_border)
    _args.no_gradient("box_mask", cam=cam)
    chosen = BOX_MASK_OP.resolve((cam,), backend)
    if chosen == "reference":
        mask = reference.box_mask(cam, threshold, clip_border=clip_border)
    else:
        mask = _box_mask[chosen](*_args.widen(chosen, cam), threshold, clip_border)
    return mask.to(_result_dtype(cam))


def connected_components(mask: Tensor, *, connectivity: int = 8, backend: str | None = None) -> Tensor:
    """Labels the connected components of each map.

    Args:
        mask: `Tensor[…, h, w]` of any dtype; what is not 0 is foreground (NaN is not 0).
        connectivity: 8, or 4 (pixels that only touch at a corner are not connected).
        backend: `"cuda"`, `"cpu"`, `"reference"`, or `None` to choose.

    Returns:
        int32 `Tensor[…, h, w]`: 0 is background, 1…n are the map's components in the order of their first pixels, row by row.

    Gradient: none.

    Raises:
        TypeError: `mask` is not a tensor.
        ValueError: fewer than two dimensions, an empty map, a connectivity other than 4 and 8.
        NotImplementedError: `mask` requires a gradient.
    """
    _args.tensor("connected_components", "mask", mask, "…×h×w", kind="any", spatial=2)
    _args.choice("connected_components", "connectivity", connectivity, (4, 8))
    _args.no_gradient("connected_components", mask=mask)
    chosen = COMPONENTS_OP.resolve((mask,), backend)
    if chosen == "reference":
        return reference.connected_components(mask, connectivity=int(connectivity))
    return _components[chosen](mask if mask.dtype in (torch.bool, torch.uint8) else mask != 0, int(connectivity))
