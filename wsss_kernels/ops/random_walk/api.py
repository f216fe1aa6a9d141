"""The random walk of class activation maps over an affinity."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _args
from ..._dispatch import Backend, Operator, apply
from ..._once import once_differentiable
from ..affinity.api import REFINE_OPTIONS, check_refining, empty_gradients, refined_matrix, widen_refining
from . import reference

STREAMING_FROM = 8192
"""`streaming=None` stores the refining map below this many tokens (256 MiB in float32) and recomputes it from there on."""


def _note(**call) -> str:
    n = call["encoder"].shape[-1]
    streams = n >= STREAMING_FROM if call["streaming"] is None else call["streaming"]
    reason = f"streaming=None, N = {n} {'≥' if streams else '<'} {STREAMING_FROM}" if call["streaming"] is None else f"streaming={streams}"
    return f"{'streaming: tiles of the refining map are recomputed in every pass' if streams else 'stored: the refining map is computed once'} ({reason})"


_TRITON = f"{__package__}.triton_impl"
WALK_OP = Operator("random_walk", backends=(Backend("cuda"), Backend("triton"), Backend("cpu")))
AFFINITY_WALK_OP = Operator("affinity_random_walk", backends=(Backend("triton"), Backend("cpu")), note=_note)


WALK_OPTIONS = "bool target, int sinkhorn_iter, int power"


def _fake_fwd(affinity, cam, mask, target, sinkhorn_iter, power):
    batch, classes, height, width = cam.shape
    rows = 2 * sinkhorn_iter + 3 * classes * power if power and classes else 0
    return cam.new_empty(cam.shape), cam.new_empty(batch, rows, height * width, dtype=torch.float64)


def _fake_bwd(grad, affinity, tape, mask, target, sinkhorn_iter, power, need_affinity):
    n = affinity.shape[-1]
    return grad.new_empty(grad.shape), affinity.new_empty(affinity.shape[0] if need_affinity else 0, n, n)


_fwd = WALK_OP.raw_op(
    f"random_walk_fwd(Tensor affinity, Tensor cam, Tensor? mask, {WALK_OPTIONS}) -> (Tensor, Tensor)", _fake_fwd, triton=_TRITON
)
_bwd = WALK_OP.raw_op(
    f"random_walk_bwd(Tensor grad, Tensor affinity, Tensor tape, Tensor? mask, {WALK_OPTIONS}, bool need_affinity) -> (Tensor, Tensor)",
    _fake_bwd,
    triton=_TRITON,
)


def _fake_streaming(cam, mask, decoder, encoder, maps, first_layer, signed, clamp_min, *options):
    return *_fake_fwd(None, cam, mask, *options), encoder.new_empty(encoder.shape[:2], dtype=torch.bool)


def _fake_streaming_bwd(grad, mask, decoder, encoder, *options):
    return grad.new_empty(grad.shape), *empty_gradients(decoder, encoder, *options[-2:])


_streaming_fwd = AFFINITY_WALK_OP.raw_op(
    f"affinity_random_walk_fwd(Tensor cam, Tensor? mask, Tensor? decoder, Tensor encoder, {REFINE_OPTIONS}, {WALK_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor)",
    _fake_streaming,
    triton=_TRITON,
)
_streaming_bwd = AFFINITY_WALK_OP.raw_op(
    f"affinity_random_walk_bwd(Tensor grad, Tensor? mask, Tensor? decoder, Tensor encoder, Tensor tape, Tensor gate, {REFINE_OPTIONS}, "
    f"{WALK_OPTIONS}, bool need_decoder, bool need_encoder) -> (Tensor, Tensor, Tensor)",
    _fake_streaming_bwd,
    triton=_TRITON,
)


class _Walk(torch.autograd.Function):
    """T^power (mask ⊙ cam), or mask ⊙ T^power cam, for affinity B×N×N and cam B×K×h×w."""

    @staticmethod
    def forward(ctx, affinity, cam, mask, backend, *options):
        result, tape = _fwd[backend](affinity, cam, mask, *options)
        ctx.save_for_backward(affinity, tape, mask)
        ctx.backend, ctx.options = backend, options
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        need_affinity, need_cam = ctx.needs_input_grad[:2]
        grad_cam, grad_affinity = _bwd[ctx.backend](grad, *ctx.saved_tensors, *ctx.options, need_affinity)
        return grad_affinity if need_affinity else None, grad_cam if need_cam else None, *[None] * (2 + len(ctx.options))


class _StreamingWalk(torch.autograd.Function):
    """The same over a refining map that is never stored."""

    @staticmethod
    def forward(ctx, cam, mask, decoder, encoder, backend, *options):
        result, tape, gate = _streaming_fwd[backend](cam, mask, decoder, encoder, *options)
        ctx.save_for_backward(mask, decoder, encoder, tape, gate)
        ctx.backend, ctx.options = backend, options
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        need_cam, _, need_decoder, need_encoder = ctx.needs_input_grad[:4]
        grads = _streaming_bwd[ctx.backend](grad, *ctx.saved_tensors, *ctx.options, need_decoder, need_encoder)
        to_cam, to_decoder, to_encoder = (
            g if need else None for g, need in zip(grads, (need_cam, need_decoder, need_encoder), strict=True)
        )
        return to_cam, None, to_decoder, to_encoder, *[None] * (1 + len(ctx.options))


def check_cam(op: str, cam: Tensor, mask: Tensor | None, shape: str) -> None:
    _args.tensor(op, "cam", cam, shape, spatial=2)
    if mask is not None:
        _args.tensor(op, "mask", mask, shape)
        _args.same(op, "cam", cam.shape, "mask", mask.shape, "shape")
        _args.no_gradient(op, mask=mask)


def check_options(op: str, sinkhorn_iter: int, power: int, mask_side: str) -> tuple[bool, int, int]:
    _args.choice(op, "mask_side", mask_side, ("source", "target"))
    return mask_side == "target", _args.integer(op, "sinkhorn_iter", sinkhorn_iter, 0), _args.integer(op, "power", power, 0)


def random_walk(
    affinity: Tensor,
    cam: Tensor,
    mask: Tensor | None = None,
    *,
    sinkhorn_iter: int = 3,
    power: int = 2,
    mask_side: str = "source",
    backend: str | None = None,
) -> Tensor:
    """Spreads class activation maps along an affinity: `T^power (mask ⊙ cam)`, T = ½ (S + Sᵀ), S = sinkhorn(affinity).

    M4 Eq. 3.16. Neither S nor T nor its power is formed: the Sinkhorn scalings are two vectors, and each step is one
    pass over `affinity` that gives the products with it and with its transpose.

    Args:
        affinity: `Tensor[B, N, N]`, N = h·w in row-major order, any floating type. Entries must be ≥ 0 (not checked).
            `Tensor[N, N]` goes with a `cam` without batch.
        cam: `Tensor[B, K, h, w]` or `Tensor[K, h, w]`, K ≥ 0.
        mask: the shape of `cam`, values 0 or 1 in the same floating type, such as `box_mask(cam)`; `None` for no mask.
        sinkhorn_iter: rounds of Sinkhorn normalisation, ≥ 0.
        power: steps of the walk, ≥ 0; 0 returns `mask ⊙ cam`.
        mask_side: `"source"` masks before the walk (M4: the mask is 1×hw and cuts columns), `"target"` after it.
        backend: `"cuda"`, `"triton"`, `"cpu"`, `"reference"`, or `None` to choose.

    Returns:
        A tensor of the shape of `cam`, in the dtype of `affinity`; float32 under autocast.

    Gradient: with respect to `affinity` (through every Sinkhorn round, exactly) and `cam`, not `mask`. Rows and columns of
    the affinity that are empty have gradient 0.

    Raises:
        TypeError: not floating-point tensors, mixed dtypes or devices.
        ValueError: wrong rank, N other than h·w, batch sizes or mask shape that differ, h·w = 0, `sinkhorn_iter` or `power` < 0.
        NotImplementedError: `mask` requires a gradient.
    """
    batched = not isinstance(affinity, Tensor) or affinity.dim() != 2
    _args.tensor("random_walk", "affinity", affinity, "B×N×N" if batched else "N×N", spatial=2)
    check_cam("random_walk", cam, mask, "B×K×h×w" if batched else "K×h×w")
    _args.same("random_walk", "the rows", affinity.shape[-2], "the columns of affinity", affinity.shape[-1], "number")
    _args.same("random_walk", "affinity", affinity.shape[-1], "cam", cam.shape[-2] * cam.shape[-1], "number of tokens (N and h·w)")
    if batched:
        _args.same("random_walk", "affinity", affinity.shape[0], "cam", cam.shape[0], "batch size")
    options = check_options("random_walk", sinkhorn_iter, power, mask_side)
    given = (affinity, cam) if mask is None else (affinity, cam, mask)
    tensors = _args.align("random_walk", ("affinity", "cam", "mask")[: len(given)], given, autocast="fp32")
    chosen = WALK_OP.resolve(tensors, backend)
    if chosen == "reference":
        return reference.random_walk(*tensors, sinkhorn_iter=options[1], power=options[2], mask_side=mask_side)
    wide = _args.widen(chosen, *tensors) if batched else [t[None] for t in _args.widen(chosen, *tensors)]
    result = apply(_Walk, *wide[:2], wide[2] if mask is not None else None, chosen, *options)
    return _args.rounded(result if batched else result[0], tensors[0].dtype)


def affinity_random_walk(
    cam: Tensor,
    decoder_feature: Tensor | None,
    encoder: Tensor,
    mask: Tensor | None = None,
    *,
    encoder_is: str = "feature",
    first_layer: int = 0,
    signed: bool = False,
    clamp_min: float | None = 0.0,
    sinkhorn_iter: int = 3,
    power: int = 2,
    mask_side: str = "source",
    streaming: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    """`refining_map`, then `random_walk`, in one call (M4 Eq. 3.8–3.16), if wanted without ever storing the N×N map.

    Args:
        cam: `Tensor[B, K, h, w]`, N = h·w in row-major order, any floating type, K ≥ 0.
        decoder_feature: `Tensor[B, d, N]` or `None`, as in `refining_map`.
        encoder: `Tensor[B, L, C, N]` features or `Tensor[B, L, N, N]` maps, as in `refining_map`.
        mask: the shape of `cam`, values 0 or 1 in the same floating type, or `None`.
        encoder_is, first_layer, signed, clamp_min: as in `refining_map`. `clamp_min=None` is for maps that are ≥ 0 themselves.
        sinkhorn_iter, power, mask_side: as in `random_walk`.
        streaming: `True` recomputes tiles of the map in every pass and stores nothing N×N beyond the inputs; `False`
            stores the map once; `None` streams from N = 8192 on. The results are the same.
        backend: `"triton"`, `"cpu"`, `"reference"`, or `None` to choose.

    Returns:
        `Tensor[B, K, h, w]` in the dtype of `cam`; float32 under autocast.

    Gradient: with respect to `cam`, `decoder_feature` and `encoder`, not `mask`, and none through the gate.

    Raises:
        TypeError: not floating-point tensors, mixed dtypes or devices, `streaming` not a bool or `None`.
        ValueError: wrong rank, N other than h·w, batch sizes or mask shape that differ, `first_layer` outside [0, L), h·w = 0,
            `sinkhorn_iter` or `power` < 0.
        NotImplementedError: `mask` requires a gradient.
    """
    op = "affinity_random_walk"
    check_cam(op, cam, mask, "B×K×h×w")
    check_refining(op, decoder_feature, encoder, encoder_is, first_layer, signed, clamp_min)
    _args.same(op, "cam", cam.shape[0], "encoder", encoder.shape[0], "batch size")
    _args.same(op, "cam", cam.shape[-2] * cam.shape[-1], "encoder", encoder.shape[-1], "number of tokens (h·w and N)")
    options = check_options(op, sinkhorn_iter, power, mask_side)
    if streaming is not None and not isinstance(streaming, bool):
        raise TypeError(f"{op}: streaming must be True, False or None, got {_args.describe(streaming)}")
    names = ("cam", "encoder", *(() if decoder_feature is None else ("decoder_feature",)), *(() if mask is None else ("mask",)))
    given = [t for t in (cam, encoder, decoder_feature, mask) if t is not None]
    cam, encoder, *rest = tensors = _args.align(op, names, given, autocast="fp32")
    decoder = None if decoder_feature is None else rest[0]
    mask = None if mask is None else rest[-1]
    chosen = AFFINITY_WALK_OP.resolve(tensors, backend)
    if chosen == "reference":
        return reference.affinity_random_walk(
            cam,
            decoder,
            encoder,
            mask,
            encoder_is=encoder_is,
            first_layer=first_layer,
            signed=signed,
            clamp_min=clamp_min,
            sinkhorn_iter=options[1],
            power=options[2],
            mask_side=mask_side,
        )
    maps = encoder_is == "affinity"
    refine = (maps, int(first_layer), signed, None if clamp_min is None else float(clamp_min))
    decoder, wide = widen_refining(decoder, encoder, maps, chosen)
    (start,) = _args.widen(chosen, cam)
    weight = None if mask is None else _args.widen(chosen, mask)[0]
    if streaming or (streaming is None and encoder.shape[-1] >= STREAMING_FROM):
        return _args.rounded(apply(_StreamingWalk, start, weight, decoder, wide, chosen, *refine, *options), cam.dtype)
    matrix = refined_matrix(decoder, wide, chosen, *refine)
    if chosen == "triton" and wide.dtype in _args.HALVES:
        matrix = matrix.bfloat16()  # what every pass reads; rounding averages out in the sums
    return _args.rounded(apply(_Walk, matrix, start, weight, chosen, *options), cam.dtype)
