"""Pixel-adaptive refinement: the public function, its gradient, and the modules of the released code."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ... import _args, _dispatch
from ..._dispatch import Backend, Operator, apply
from ..._once import once_differentiable
from . import reference
from .resize import resized

PAR_OP = Operator("par", backends=(Backend("cuda"), Backend("cpu")))

_MOST_DILATIONS = 192  # kMaxDilations of par_kernels.cuh
_OPTIONS = "int[] size, int[] dilations, int num_iter, bool pamr, float w1, float w2, float w3, bool exact"


def _like(image, mask, size, *options):
    return mask.new_empty((*mask.shape[:2], *(size or mask.shape[2:])))


_fwd = PAR_OP.raw_op(f"par_fwd(Tensor image, Tensor mask, {_OPTIONS}) -> Tensor", _like)
_bwd = PAR_OP.raw_op(f"par_bwd(Tensor image, Tensor grad, {_OPTIONS}) -> Tensor", _like)


class _Par(torch.autograd.Function):
    """`size` is that of the result where the mask has another, else empty: a shape that no guard depends on."""

    @staticmethod
    def forward(ctx, image, mask, backend, size, *options):
        ctx.save_for_backward(image)
        ctx.backend, ctx.size, ctx.options = backend, list(mask.shape[2:]) if size else [], options
        return _fwd[backend](image, mask, size, *options)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (image,) = ctx.saved_tensors
        return None, _bwd[ctx.backend](image, grad, ctx.size, *ctx.options), None, None, *[None] * len(ctx.options)


def _checked(
    image: Tensor, mask: Tensor, dilations: Sequence[int], num_iter: int, variant: str, resize: str | None
) -> tuple[list[int], int]:
    _args.tensor("par", "image", image, "B×Q×H×W", spatial=2)
    _args.tensor("par", "mask", mask, "B×C×h×w", spatial=2)
    _args.same("par", "image", image.shape[0], "mask", mask.shape[0], "batch size")
    if image.shape[1] == 0:
        raise ValueError(f"par: image must have at least one channel, got {_args.describe(image)}")
    _args.choice("par", "variant", variant, ("par", "pamr"))
    steps, num_iter, _ = _module_options(dilations, num_iter, resize)
    if resize is None:
        _args.same("par", "image", image.shape[-2:], "mask", mask.shape[-2:], "height and width (or pass resize='mask' or 'image')")
    return steps, num_iter


def _resolve(tensors: Sequence[Tensor], backend: str | None, dilations: int) -> str:
    """The backend of this call. The CUDA kernels get the dilations as an argument, which holds a limited number."""
    chosen = PAR_OP.resolve(tensors, backend)
    if chosen == "cuda" and dilations > _MOST_DILATIONS:
        if backend or _dispatch.requested():
            raise _dispatch.BackendUnavailable(
                f"par: backend='cuda' cannot run this call: its kernels take at most {_MOST_DILATIONS} dilations, got {dilations}"
            )
        return "reference"
    return chosen


def _module_options(dilations: Sequence[int], num_iter: int, resize: str | None) -> tuple[list[int], int, str | None]:
    """The options that a module is constructed with, checked."""
    _args.choice("par", "resize", resize, ("mask", "image", None))
    num_iter = _args.integer("par", "num_iter", num_iter, 0)
    if isinstance(dilations, (int, str)) or not hasattr(dilations, "__iter__"):
        raise TypeError(f"par: dilations must be a sequence of ints, got {_args.describe(dilations)}")
    values = [_args.integer("par", "every dilation", d, 1) for d in dilations]
    if not values:
        raise ValueError("par: dilations must hold at least one dilation, got an empty sequence")
    return values, num_iter, resize


def par(
    image: Tensor,
    mask: Tensor,
    dilations: Sequence[int] = (1, 2, 4, 8, 12, 24),
    num_iter: int = 10,
    *,
    variant: str = "par",
    resize: str | None = "mask",
    w1: float = 0.3,
    w2: float = 0.3,
    w3: float = 0.01,
    exact: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Pixel-adaptive refinement: `num_iter` times each pixel becomes the weighted mean of its dilated neighbours.

    `M_0 ← Σ_k weight_k M_k` over the P = 8·len(dilations) neighbours, coordinates clamped to the image; the weights
    compare colours, so that the mask follows the edges of the image. `"par"` is M4 Eq. 3.17 and AFA (CVPR 2022), whose
    weights sum to 1 + w3; `"pamr"` is PAMR (CVPR 2020), whose weights sum to 1 and have no position term.

    Args:
        image: `Tensor[B, Q, H, W]`, any floating type, any range (the weights are invariant to its scale), Q ≥ 1.
        mask: `Tensor[B, C, h, w]`, same dtype and device.
        dilations: distances of the neighbours in pixels, each ≥ 1.
        num_iter: number of iterations, ≥ 0.
        variant: `"par"` or `"pamr"`.
        resize: `"mask"` resizes the mask to H×W (AFA, PAMR), `"image"` the image to h×w (WeCLIP), both bilinear with
            `align_corners=True`; `None` demands equal sizes.
        w1, w2, w3: colour scale, position scale and position weight of `"par"`.
        exact: `False` stores the weights in half precision: error ≤ 5e-4·max|mask| at 20 iterations, about twice as
            fast and half the memory. Half-precision inputs may always be computed so.
        backend: `"cuda"`, `"cpu"`, `"reference"`, or `None` to choose.

    Returns:
        `Tensor[B, C, H, W]` (`[B, C, h, w]` for `resize="image"`), in the dtype of `image`; float32 under autocast.

    Gradient: with respect to `mask` (the exact adjoint, for which nothing of size P·H·W·C is saved), not `image`.

    Raises:
        TypeError: not tensors, integer tensors, mixed dtypes or devices, dilations or num_iter that are no ints.
        ValueError: wrong rank, batch sizes that differ, an empty map, dilation < 1, no dilation, num_iter < 0.
        NotImplementedError: `image` requires a gradient.
    """
    steps, num_iter = _checked(image, mask, dilations, num_iter, variant, resize)
    _args.flag("par", "exact", exact)
    scales = [_args.number("par", name, value, positive=True) for name, value in (("w1", w1), ("w2", w2))]
    w3 = _args.number("par", "w3", w3)
    _args.no_gradient("par", image=image)
    image, mask = _args.align("par", ("image", "mask"), (image, mask), autocast="fp32")
    chosen = _resolve((image, mask), backend, len(steps))
    if chosen == "reference":
        return reference.par(image, mask, steps, num_iter, variant=variant, resize=resize, w1=w1, w2=w2, w3=w3)
    size: list[int] = []
    if chosen == "cuda":  # the CPU's kernels resize row by row
        if resize == "mask":
            mask = resized(mask, image.shape[-2:])
        elif resize == "image":
            image = resized(image, mask.shape[-2:])
    elif resize == "mask" and mask.shape[-2:] != image.shape[-2:]:
        size = list(image.shape[-2:])
    return apply(_Par, image, mask, chosen, size, steps, num_iter, variant == "pamr", *scales, w3, exact)


def _one_hot(positions: Sequence[tuple[int, int]], value: float = 1.0) -> Tensor:
    kernel = torch.zeros(len(positions), 1, 3, 3)
    for k, (dy, dx) in enumerate(positions):
        kernel[k, 0, 1 + dy, 1 + dx] = value
    return kernel


class _Kernel(nn.Module):
    """Holds a constant of the released code, so that its checkpoints load; a checkpoint with other values is refused."""

    def __init__(self, kernel: Tensor):
        super().__init__()
        self.register_buffer("kernel", kernel)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs):
        loaded = state_dict.get(prefix + "kernel")
        if loaded is not None and (loaded.shape != self.kernel.shape or not torch.equal(loaded.to(self.kernel), self.kernel)):
            error_msgs.append(
                f"{prefix}kernel: the checkpoint holds other neighbour weights than the released module; they cannot be reproduced"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)


class PAR(_Kernel):
    """Drop-in for AFA's `PAR` (and WeCLIP's, with `resize="image"`): same constructor, same buffer, `forward(imgs, masks)`.

    Args:
        dilations: distances of the neighbours in pixels.
        num_iter: number of iterations.
        resize: as in `wsss_kernels.par`.

    Raises:
        TypeError, ValueError: as `wsss_kernels.par` does for these arguments, at construction.
    """

    def __init__(self, dilations: Sequence[int], num_iter: int, *, resize: str | None = "mask"):
        super().__init__(_one_hot(reference.DIRECTIONS))
        self.dilations, self.num_iter, self.resize = _module_options(dilations, num_iter, resize)

    def forward(self, imgs: Tensor, masks: Tensor) -> Tensor:
        """`Tensor[B, Q, H, W]`, `Tensor[B, C, h, w]` → `Tensor[B, C, H, W]`."""
        return par(imgs, masks, self.dilations, self.num_iter, resize=self.resize)

    def extra_repr(self) -> str:
        return f"dilations={self.dilations}, num_iter={self.num_iter}, resize={self.resize!r}"


class PAMR(nn.Module):
    """Drop-in for PAMR of 1-stage-wseg: same constructor, same buffers, `forward(x, mask)`.

    Args:
        num_iter: number of iterations.
        dilations: distances of the neighbours in pixels.
        resize: as in `wsss_kernels.par`.

    Raises:
        TypeError, ValueError: as `wsss_kernels.par` does for these arguments, at construction.
    """

    def __init__(self, num_iter: int = 1, dilations: Sequence[int] = (1,), *, resize: str | None = "mask"):
        super().__init__()
        self.dilations, self.num_iter, self.resize = _module_options(dilations, num_iter, resize)
        centre = _one_hot([(0, 0)] * 8)
        window = sorted((*reference.DIRECTIONS, (0, 0)))
        self.aff_x = _Kernel(centre + _one_hot(reference.DIRECTIONS, -1.0))
        self.aff_m = _Kernel(_one_hot(reference.DIRECTIONS))
        self.aff_std = _Kernel(_one_hot(window))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """`Tensor[B, Q, H, W]`, `Tensor[B, C, h, w]` → `Tensor[B, C, H, W]`."""
        return par(x, mask, self.dilations, self.num_iter, variant="pamr", resize=self.resize)

    def extra_repr(self) -> str:
        return f"num_iter={self.num_iter}, dilations={self.dilations}, resize={self.resize!r}"
