"""Affinities between tokens, their deviation, and the refining map."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _args
from ..._dispatch import Backend, Operator, apply
from ..._once import once_differentiable
from . import reference
from .reference import RefiningMap

COSINE_OP = Operator("cosine_affinity", backends=(Backend("triton"), Backend("cpu")))
SIGMOID_OP = Operator("sigmoid_affinity", backends=(Backend("triton"), Backend("cpu")))
DEVIATION_OP = Operator("affinity_deviation", backends=(Backend("triton"), Backend("cpu")))
REFINING_OP = Operator("refining_map", backends=(Backend("triton"), Backend("cpu")))

_TRITON = f"{__package__}.triton_impl"
REFINE_OPTIONS = "bool maps, int first_layer, bool signed, float? clamp_min"


def _square(feature, *options):
    return feature.new_empty(*feature.shape[:-2], feature.shape[-1], feature.shape[-1])


def _fake_refining_map(decoder, encoder, *options):
    dtype = torch.promote_types(encoder.dtype, torch.float32)
    batch, layers, _, n = encoder.shape
    new = encoder.new_empty
    return new(batch, n, n, dtype=dtype), new(batch, layers, dtype=torch.bool), new(batch, layers, dtype=dtype)


def empty_gradients(decoder: Tensor | None, encoder: Tensor, need_decoder: bool, need_encoder: bool) -> tuple[Tensor, Tensor]:
    """The shapes in which the kernels return the gradients of the decoder's features and of the encoder."""
    dtype = torch.promote_types(encoder.dtype, torch.float32)
    batch, n = encoder.shape[0], encoder.shape[-1]
    channels = 0 if decoder is None else decoder.shape[1]
    return (
        encoder.new_empty(batch if need_decoder and decoder is not None else 0, channels, n, dtype=dtype),
        encoder.new_empty(batch if need_encoder else 0, *encoder.shape[1:], dtype=dtype),
    )


def _fake_refining_map_bwd(grad_matrix, grad_deviation, decoder, encoder, gate, maps, first, signed, clamp_min, need_decoder, need_encoder):
    return empty_gradients(decoder, encoder, need_decoder, need_encoder)


_fwd = COSINE_OP.raw_op("affinity_fwd(Tensor feature, bool cosine, float scale, float? clamp_min) -> Tensor", _square, triton=_TRITON)
_bwd = COSINE_OP.raw_op(
    "affinity_bwd(Tensor grad, Tensor affinity, Tensor feature, bool cosine, float scale, float? clamp_min) -> Tensor",
    lambda grad, affinity, feature, *options: feature.new_empty(feature.shape),
    triton=_TRITON,
)
SIGMOID_OP.raw += [_fwd, _bwd]
_deviation_fwd = DEVIATION_OP.raw_op(
    "affinity_deviation_fwd(Tensor decoder, Tensor encoder, bool signed) -> Tensor",
    lambda decoder, encoder, signed: encoder.new_empty(encoder.shape[:2], dtype=_args.accumulator(encoder.dtype)),
    triton=_TRITON,
)
_deviation_bwd = DEVIATION_OP.raw_op(
    "affinity_deviation_bwd(Tensor grad, Tensor decoder, Tensor encoder, bool signed) -> (Tensor, Tensor)",
    lambda grad, decoder, encoder, signed: (decoder.new_empty(decoder.shape), encoder.new_empty(encoder.shape)),
    triton=_TRITON,
)
_refining_fwd = REFINING_OP.raw_op(
    f"refining_map_fwd(Tensor? decoder, Tensor encoder, {REFINE_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _fake_refining_map,
    triton=_TRITON,
)
_refining_bwd = REFINING_OP.raw_op(
    f"refining_map_bwd(Tensor grad_matrix, Tensor grad_deviation, Tensor? decoder, Tensor encoder, Tensor gate, {REFINE_OPTIONS}, "
    "bool need_decoder, bool need_encoder) -> (Tensor, Tensor)",
    _fake_refining_map_bwd,
    triton=_TRITON,
)


class _Affinity(torch.autograd.Function):
    @staticmethod
    def forward(ctx, feature, backend, *options):
        result = _fwd[backend](feature, *options)
        ctx.save_for_backward(result, feature)
        ctx.backend, ctx.options = backend, options
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _bwd[ctx.backend](grad, *ctx.saved_tensors, *ctx.options), None, None, None, None


class _Deviation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, decoder, encoder, signed, backend):
        ctx.save_for_backward(decoder, encoder)
        ctx.backend, ctx.signed = backend, signed
        return _deviation_fwd[backend](decoder, encoder, signed)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *_deviation_bwd[ctx.backend](grad, *ctx.saved_tensors, ctx.signed), None, None


class _RefiningMap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, decoder, encoder, backend, *options):
        matrix, gate, deviation = _refining_fwd[backend](decoder, encoder, *options)
        ctx.save_for_backward(decoder, encoder, gate)
        ctx.backend, ctx.options = backend, options
        ctx.mark_non_differentiable(gate)
        return matrix, gate, deviation

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_matrix, grad_gate, grad_deviation):
        decoder, encoder, gate = ctx.saved_tensors
        need_decoder, need_encoder = ctx.needs_input_grad[:2]
        grads = _refining_bwd[ctx.backend](grad_matrix, grad_deviation, decoder, encoder, gate, *ctx.options, need_decoder, need_encoder)
        given = [g if need else None for g, need in zip(grads, (need_decoder, need_encoder), strict=True)]
        return *given, *[None] * (1 + len(ctx.options))


def _square_affinity(op: Operator, feature: Tensor, backend: str, cosine: bool, scale: float, clamp_min: float | None) -> Tensor:
    (wide,) = _args.widen(backend, feature)
    return _args.rounded(apply(_Affinity, wide, backend, cosine, scale, clamp_min), feature.dtype)


def cosine_affinity(feature: Tensor, *, clamp_min: float | None = None, backend: str | None = None) -> Tensor:
    """Cosine of every pair of columns of a feature map (M4 Eq. 3.8–3.9).

    Args:
        feature: `Tensor[..., C, N]`, any floating type.
        clamp_min: results are at least this; `None` for no bound. Sinkhorn normalisation needs 0.
        backend: `"triton"`, `"cpu"`, `"reference"`, or `None` to choose.

    Returns:
        `Tensor[..., N, N]` in [−1, 1], symmetric to the last bit, in the dtype of `feature`. Zero vectors give 0.

    Gradient: with respect to `feature`; 0 at zero vectors and from entries at or below `clamp_min`.

    Raises:
        TypeError: not a floating-point tensor, `clamp_min` not a number.
        ValueError: fewer than two dimensions, N = 0, `clamp_min` not finite.
    """
    _args.tensor("cosine_affinity", "feature", feature, "…×C×N", spatial=1)
    clamp_min = None if clamp_min is None else _args.number("cosine_affinity", "clamp_min", clamp_min)
    (feature,) = _args.align("cosine_affinity", ("feature",), (feature,))
    chosen = COSINE_OP.resolve((feature,), backend)
    if chosen == "reference":
        return reference.cosine_affinity(feature, clamp_min=clamp_min)
    return _square_affinity(COSINE_OP, feature, chosen, True, 1.0, clamp_min)


def sigmoid_affinity(feature: Tensor, *, scale: float = 1.0, backend: str | None = None) -> Tensor:
    """σ(scale · FᵀF) of a feature map (M4 Eq. 3.11).

    Args:
        feature: `Tensor[..., C, N]`, any floating type.
        scale: a finite number.
        backend: `"triton"`, `"cpu"`, `"reference"`, or `None` to choose.

    Returns:
        `Tensor[..., N, N]` in [0, 1], symmetric to the last bit, in the dtype of `feature`.

    Gradient: with respect to `feature`.

    Raises:
        TypeError: not a floating-point tensor, `scale` not a number.
        ValueError: fewer than two dimensions, N = 0, `scale` not finite.
    """
    _args.tensor("sigmoid_affinity", "feature", feature, "…×C×N", spatial=1)
    scale = _args.number("sigmoid_affinity", "scale", scale)
    (feature,) = _args.align("sigmoid_affinity", ("feature",), (feature,))
    chosen = SIGMOID_OP.resolve((feature,), backend)
    if chosen == "reference":
        return reference.sigmoid_affinity(feature, scale=scale)
    return _square_affinity(SIGMOID_OP, feature, chosen, False, scale, None)


def affinity_deviation(decoder_affinity: Tensor, encoder_affinity: Tensor, *, signed: bool = False, backend: str | None = None) -> Tensor:
    """How far each encoder affinity is from the decoder's: `S^l = Σ_ij |A_f − A^l|` (M4 Eq. 3.12).

    Args:
        decoder_affinity: `Tensor[B, N, N]`, any floating type.
        encoder_affinity: `Tensor[B, L, N, N]`, the same dtype.
        signed: without the absolute value, as in WeCLIP's released code.
        backend: `"triton"`, `"cpu"`, `"reference"`, or `None` to choose.

    Returns:
        `Tensor[B, L]` in the dtype of the inputs, float32 for half types.

    Gradient: with respect to both; 0 where the two are equal.

    Raises:
        TypeError: not floating-point tensors, mixed dtypes or devices.
        ValueError: wrong rank, batch sizes or N that differ, N = 0.
    """
    op = "affinity_deviation"
    _args.tensor(op, "decoder_affinity", decoder_affinity, "B×N×N", spatial=2)
    _args.tensor(op, "encoder_affinity", encoder_affinity, "B×L×N×N", spatial=2)
    _args.same(op, "decoder_affinity", decoder_affinity.shape[0], "encoder_affinity", encoder_affinity.shape[0], "batch size")
    for name, t in (("decoder_affinity", decoder_affinity), ("encoder_affinity", encoder_affinity)):
        _args.same(op, "the rows", t.shape[-2], f"the columns of {name}", t.shape[-1], "number")
    _args.same(op, "decoder_affinity", decoder_affinity.shape[-1], "encoder_affinity", encoder_affinity.shape[-1], "number of tokens")
    _args.flag(op, "signed", signed)
    pair = _args.align(op, ("decoder_affinity", "encoder_affinity"), (decoder_affinity, encoder_affinity))
    chosen = DEVIATION_OP.resolve(pair, backend)
    if chosen == "reference":
        return reference.affinity_deviation(*pair, signed=signed)
    return apply(_Deviation, *_args.widen(chosen, *pair), signed, chosen)


def check_refining(
    op: str, decoder_feature: Tensor | None, encoder: Tensor, encoder_is: str, first_layer: int, signed: bool, clamp_min: float | None
) -> None:
    """Checks what `refining_map` and `affinity_random_walk` have in common."""
    _args.choice(op, "encoder_is", encoder_is, ("feature", "affinity"))
    maps = encoder_is == "affinity"
    _args.tensor(op, "encoder", encoder, "B×L×N×N" if maps else "B×L×C×N", spatial=1)
    if maps:
        _args.same(op, "the rows", encoder.shape[-2], "the columns of encoder", encoder.shape[-1], "number")
    if decoder_feature is not None:
        _args.tensor(op, "decoder_feature", decoder_feature, "B×d×N", spatial=1)
        _args.same(op, "decoder_feature", decoder_feature.shape[0], "encoder", encoder.shape[0], "batch size")
        _args.same(op, "decoder_feature", decoder_feature.shape[-1], "encoder", encoder.shape[-1], "number of tokens")
    if encoder.shape[1] == 0:
        raise ValueError(f"{op}: encoder must have at least one layer, got {_args.describe(encoder)}")
    if _args.integer(op, "first_layer", first_layer, 0) >= encoder.shape[1]:
        raise ValueError(f"{op}: first_layer must be below the number of layers {encoder.shape[1]}, got {first_layer}")
    _args.flag(op, "signed", signed)
    if clamp_min is not None:
        _args.number(op, "clamp_min", clamp_min)


def widen_refining(decoder_feature: Tensor | None, encoder: Tensor, maps: bool, backend: str) -> tuple[Tensor | None, Tensor]:
    """Half-precision features in float32; maps stay as they are, since the kernels widen them tile by tile."""
    decoder = None if decoder_feature is None else _args.widen(backend, decoder_feature)[0]
    return decoder, encoder if maps else _args.widen(backend, encoder)[0]


def refined_matrix(decoder: Tensor | None, encoder: Tensor, backend: str, *options) -> Tensor:
    """The matrix of the refining map, unrounded."""
    return apply(_RefiningMap, decoder, encoder, backend, *options)[0]


def refining_map(
    decoder_feature: Tensor | None,
    encoder: Tensor,
    *,
    encoder_is: str = "feature",
    first_layer: int = 0,
    signed: bool = False,
    clamp_min: float | None = 0.0,
    backend: str | None = None,
) -> RefiningMap:
    """The affinity for the random walk: those encoder layers that agree with the decoder, times the decoder's affinity.

    `R = A_f ⊙ (Σ gate_l A_l) / Σ gate_l` with `A_f = σ(FᵀF)` of the decoder and `gate_l = S_l ≤ mean S` over the candidates
    l ≥ `first_layer` (M4 Eq. 3.8–3.15; ≤ where M4 prints <, so that one layer always survives).

    Args:
        decoder_feature: `Tensor[B, d, N]`, any floating type, or `None`: no A_f, no selection, R = mean of the candidates.
        encoder: `Tensor[B, L, C, N]` features, whose cosines are the A_l, or `Tensor[B, L, N, N]` maps; the same dtype.
        encoder_is: `"feature"` or `"affinity"`.
        first_layer: the first candidate, in [0, L).
        signed: deviations without the absolute value (WeCLIP's released code).
        clamp_min: every A_l is at least this before it is used; `None` for no bound (the released code).
        backend: `"triton"`, `"cpu"`, `"reference"`, or `None` to choose.

    Returns:
        `RefiningMap(matrix, gate, deviation)`: `Tensor[B, N, N]` in the dtype of the first tensor, bool `Tensor[B, L]`, and
        `Tensor[B, L]`, float32 for half types. Below `first_layer` the gate is False and the deviation NaN; without a
        decoder all candidates are selected and every deviation is NaN.

    Gradient: of `matrix` and `deviation` with respect to `decoder_feature` and `encoder`; 0 from entries at or below
    `clamp_min`, at zero vectors, and through the gate.

    Raises:
        TypeError: not floating-point tensors, mixed dtypes or devices.
        ValueError: wrong rank, batch sizes or N that differ, no layer, `first_layer` outside [0, L), N = 0.
    """
    check_refining("refining_map", decoder_feature, encoder, encoder_is, first_layer, signed, clamp_min)
    if decoder_feature is None:
        (encoder,) = tensors = _args.align("refining_map", ("encoder",), (encoder,))
    else:
        decoder_feature, encoder = tensors = _args.align("refining_map", ("decoder_feature", "encoder"), (decoder_feature, encoder))
    chosen = REFINING_OP.resolve(tensors, backend)
    maps = encoder_is == "affinity"
    if chosen == "reference":
        return reference.refining_map(
            decoder_feature, encoder, encoder_is=encoder_is, first_layer=first_layer, signed=signed, clamp_min=clamp_min
        )
    minimum = None if clamp_min is None else float(clamp_min)
    decoder, wide = widen_refining(decoder_feature, encoder, maps, chosen)
    matrix, gate, deviation = apply(_RefiningMap, decoder, wide, chosen, maps, int(first_layer), signed, minimum)
    return RefiningMap(_args.rounded(matrix, tensors[0].dtype), gate, deviation)
