"""Wasserstein distance of Gaussians, the similarity that it tempers, and its contrastive loss: public functions and gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _args
from ..._dispatch import Backend, Operator, apply
from ..._once import once_differentiable
from . import reference

WASSERSTEIN_OP = Operator("wasserstein2", backends=(Backend("triton"), Backend("cpu")))
SIMILARITY_OP = Operator("uncertainty_similarity", backends=(Backend("triton"), Backend("cpu")))
LOSS_OP = Operator("uncertainty_info_nce", backends=(Backend("triton"), Backend("cpu")))

_TRITON = f"{__package__}.triton_impl"
_GAUSSIANS = "Tensor mu_x, Tensor sigma_x, Tensor mu_y, Tensor sigma_y"
_ALL = "Tensor sem_x, Tensor mu_x, Tensor sigma_x, Tensor sem_y, Tensor mu_y, Tensor sigma_y, Tensor constants"
_SEVEN = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
_NAMES = ("sem_x", "mu_x", "sigma_x", "sem_y", "mu_y", "sigma_y")


def _like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in tensors)


_distance_fwd = WASSERSTEIN_OP.raw_op(
    f"wasserstein_fwd({_GAUSSIANS}) -> Tensor",
    lambda mu_x, _, mu_y, *rest: mu_x.new_empty((mu_x.shape[0], mu_y.shape[0]), dtype=_args.accumulator(mu_x.dtype)),
    triton=_TRITON,
)
_distance_bwd = WASSERSTEIN_OP.raw_op(
    f"wasserstein_bwd({_GAUSSIANS}, Tensor grad) -> (Tensor, Tensor, Tensor, Tensor)", lambda *tensors: _like(*tensors[:4]), triton=_TRITON
)


def _fake_similarity(*arguments):
    mu, rows, columns = arguments[1], arguments[1].shape[0], arguments[4].shape[0]
    kept = (2, rows, columns) if arguments[7] else (0,)
    return mu.new_empty((rows, columns)), mu.new_empty(kept, dtype=_args.accumulator(mu.dtype))


_similarity_fwd = SIMILARITY_OP.raw_op(f"uncertainty_fwd({_ALL}, bool keep) -> (Tensor, Tensor)", _fake_similarity, triton=_TRITON)
_similarity_bwd = SIMILARITY_OP.raw_op(
    f"uncertainty_bwd({_ALL}, Tensor kept, Tensor grad) -> {_SEVEN}", lambda *tensors: _like(*tensors[:7]), triton=_TRITON
)


def _fake_loss(*arguments):
    mu, keep = arguments[1], arguments[7]
    rows, kind = mu.shape[0], _args.accumulator(mu.dtype)
    shapes = ((), (4, rows), (2, rows, rows) if keep else (0,))
    return tuple(mu.new_empty(shape, dtype=kind) for shape in shapes)


_loss_fwd = LOSS_OP.raw_op(f"uncertainty_infonce_fwd({_ALL}, bool keep) -> (Tensor, Tensor, Tensor)", _fake_loss, triton=_TRITON)
_loss_bwd = LOSS_OP.raw_op(
    f"uncertainty_infonce_bwd({_ALL}, Tensor stats, Tensor kept, Tensor grad) -> {_SEVEN}",
    lambda *tensors: _like(*tensors[:7]),
    triton=_TRITON,
)


class _Distance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.backend = backend
        return _distance_fwd[backend](*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return None, *_distance_bwd[ctx.backend](*ctx.saved_tensors, grad)


_SCORED = {"uncertainty_similarity": (_similarity_fwd, _similarity_bwd), "uncertainty_info_nce": (_loss_fwd, _loss_bwd)}


class _Scored(torch.autograd.Function):
    """The operators on six tensors and constants; `op` names their kernels, which give the result and what its gradient needs."""

    @staticmethod
    def forward(ctx, op, backend, keep, *tensors):
        result, *more = _SCORED[op][0][backend](*tensors, keep)
        ctx.save_for_backward(*tensors, *more)
        ctx.op, ctx.backend = op, backend
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return None, None, None, *_SCORED[ctx.op][1][ctx.backend](*ctx.saved_tensors, grad)


def _scored(op: str, backend: str, *tensors: Tensor) -> Tensor:
    """Both products of all pairs spare the backward pass a third of its work; they are kept where the inputs are larger."""
    pairs, inputs = tensors[1].shape[0] * tensors[4].shape[0], sum(t.numel() for t in tensors[:6])
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in tensors) and 2 * pairs <= inputs
    return apply(_Scored, op, backend, keep, *tensors)


def _checked_gaussians(op: str, mu_x: Tensor, sigma_x: Tensor, mu_y: Tensor, sigma_y: Tensor) -> None:
    for side, mu, sigma, rows in (("x", mu_x, sigma_x, "N"), ("y", mu_y, sigma_y, "M")):
        _args.tensor(op, f"mu_{side}", mu, f"{rows}×d")
        _args.tensor(op, f"sigma_{side}", sigma, f"{rows}×d")
        _args.same(op, f"mu_{side}", mu.shape, f"sigma_{side}", sigma.shape, "shape")
    _args.same(op, "mu_x", mu_x.shape[1], "mu_y", mu_y.shape[1], "number of features")
    if mu_x.shape[1] == 0:
        raise ValueError(f"{op}: mu_x must have at least one feature, got {_args.describe(mu_x)}")


def _checked(op: str, sem_x: Tensor, mu_x: Tensor, sigma_x: Tensor, sem_y: Tensor, mu_y: Tensor, sigma_y: Tensor) -> None:
    _args.tensor(op, "sem_x", sem_x, "N×D")
    _args.tensor(op, "sem_y", sem_y, "M×D")
    _checked_gaussians(op, mu_x, sigma_x, mu_y, sigma_y)
    _args.same(op, "sem_x", sem_x.shape[0], "mu_x", mu_x.shape[0], "length")
    _args.same(op, "sem_y", sem_y.shape[0], "mu_y", mu_y.shape[0], "length")
    _args.same(op, "sem_x", sem_x.shape[1], "sem_y", sem_y.shape[1], "number of features")
    if sem_x.shape[1] == 0:
        raise ValueError(f"{op}: sem_x must have at least one feature, got {_args.describe(sem_x)}")


def wasserstein2(mu_x: Tensor, sigma_x: Tensor, mu_y: Tensor, sigma_y: Tensor, *, backend: str | None = None) -> Tensor:
    """Squared 2-Wasserstein distance of all pairs of diagonal Gaussians: `‖μx − μy‖² + ‖σx − σy‖²` (M1 Eq. 1).

    Args:
        mu_x, sigma_x: `Tensor[N, d]`, any floating type: means and standard deviations.
        mu_y, sigma_y: `Tensor[M, d]`, same dtype and device.
        backend: `"triton"`, `"cpu"`, `"reference"`, or `None` to choose.

    Returns:
        `Tensor[N, M]` in the dtype of `mu_x`, float32 for half-precision input; never negative, exactly 0 for equal Gaussians.
        Computed on data from which the common mean is subtracted: an offset of the batch costs no accuracy.

    Gradient: with respect to all four tensors.

    Raises:
        TypeError: not tensors, integer tensors, mixed dtypes or devices.
        ValueError: wrong rank, shapes that do not fit, no feature.
    """
    op = "wasserstein2"
    _checked_gaussians(op, mu_x, sigma_x, mu_y, sigma_y)
    tensors = _args.align(op, ("mu_x", "sigma_x", "mu_y", "sigma_y"), (mu_x, sigma_x, mu_y, sigma_y))
    chosen = WASSERSTEIN_OP.resolve(tensors, backend)
    if chosen == "reference":
        return reference.wasserstein2(*tensors)
    return apply(_Distance, chosen, *_args.widen(chosen, *tensors))


def uncertainty_similarity(
    sem_x: Tensor,
    mu_x: Tensor,
    sigma_x: Tensor,
    sem_y: Tensor,
    mu_y: Tensor,
    sigma_y: Tensor,
    *,
    a: float | Tensor = 1 / 200,
    b: float | Tensor = 4.0,
    lam: float | Tensor = 0.2,
    backend: str | None = None,
) -> Tensor:
    """Cosine similarity that uncertainty pulls towards 1: `1 − (1 − cos)·exp(−lam·D_u/D_s)` for all pairs (M1 Eq. 2–5).

    `D_u = a·D_2W + b`, D_2W as in `wasserstein2`; `D_s = ‖ŝx − ŝy‖`, at least 1e-6, ŝ the normalised semantic embedding.

    Args:
        sem_x, sem_y: `Tensor[N, D]`, `Tensor[M, D]`: semantic embeddings, normalised inside (zero vectors stay zero).
        mu_x, sigma_x: `Tensor[N, d]`, same dtype and device.
        mu_y, sigma_y: `Tensor[M, d]`.
        a, b, lam: finite numbers or 0-d tensors of the same dtype.
        backend: `"triton"`, `"cpu"`, `"reference"`, or `None` to choose.

    Returns:
        `Tensor[N, M]` in the dtype of `sem_x`.

    Gradient: with respect to the six tensors, `a`, `b` and `lam`; 0 through D_s where it is clamped, and for zero vectors. Two more
    matrices N×M are kept for it where they are smaller than the inputs.

    Raises:
        TypeError: not tensors, integer tensors, mixed dtypes or devices.
        ValueError: wrong rank, shapes that do not fit, no feature, a constant that is not finite.
    """
    op, given = "uncertainty_similarity", (sem_x, mu_x, sigma_x, sem_y, mu_y, sigma_y)
    _checked(op, *given)
    constants = _args.scalars(op, {"a": a, "b": b, "lam": lam}, sem_x)
    tensors = _args.align(op, _NAMES, given)
    chosen = SIMILARITY_OP.resolve(tensors, backend)
    if chosen == "reference":
        return reference.uncertainty_similarity(*tensors, a=a, b=b, lam=lam)
    dtype = tensors[0].dtype
    return _args.rounded(_scored(op, chosen, *_args.widen(chosen, *tensors), constants), dtype)


def uncertainty_info_nce(
    sem_x: Tensor,
    mu_x: Tensor,
    sigma_x: Tensor,
    sem_y: Tensor,
    mu_y: Tensor,
    sigma_y: Tensor,
    temperature: float | Tensor,
    *,
    a: float | Tensor = 1 / 200,
    b: float | Tensor = 4.0,
    lam: float | Tensor = 0.2,
    backend: str | None = None,
) -> Tensor:
    """Symmetric InfoNCE on `uncertainty_similarity` (M1 Eq. 6–8), without storing a matrix of pairs.

    `½ (x→y + y→x)`: cross-entropies of the similarities divided by `temperature`, with the diagonal as target.

    Args:
        sem_x, sem_y: `Tensor[N, D]`: semantic embeddings, normalised inside (zero vectors stay zero).
        mu_x, sigma_x, mu_y, sigma_y: `Tensor[N, d]`, same dtype and device.
        temperature: a positive number, or a 0-d tensor of the same dtype (its value is not checked).
        a, b, lam: finite numbers or 0-d tensors of the same dtype.
        backend: `"triton"`, `"cpu"`, `"reference"`, or `None` to choose.

    Returns:
        0-d tensor in the dtype of `sem_x`, float32 for half-precision input. 0 if N = 0.

    Gradient: with respect to the six tensors, `temperature`, `a`, `b` and `lam`. Memory beyond inputs and gradients is
    O(N·(D + d)), forward and backward: products of pairs are kept only where all of them are smaller than the inputs.

    Raises:
        TypeError: not tensors, integer tensors, mixed dtypes or devices.
        ValueError: wrong rank, shapes that do not fit, no feature, a temperature that is not positive.
    """
    op, given = "uncertainty_info_nce", (sem_x, mu_x, sigma_x, sem_y, mu_y, sigma_y)
    _checked(op, *given)
    _args.same(op, "sem_x", sem_x.shape[0], "sem_y", sem_y.shape[0], "length")
    constants = _args.scalars(op, {"a": a, "b": b, "lam": lam, "temperature": temperature}, sem_x, positive=("temperature",))
    tensors = _args.align(op, _NAMES, given)
    chosen = LOSS_OP.resolve(tensors, backend)
    if chosen == "reference":
        sem_x, mu_x, sigma_x, sem_y, mu_y, sigma_y = tensors
        return reference.uncertainty_info_nce(sem_x, mu_x, sigma_x, sem_y, mu_y, sigma_y, temperature, a=a, b=b, lam=lam)
    return _scored(op, chosen, *_args.widen(chosen, *tensors), constants)
