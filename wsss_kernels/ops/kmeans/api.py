"""k-means by Lloyd's algorithm: the public function. No gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _args
from ..._dispatch import Backend, Operator
from . import reference

KMEANS_OP = Operator("kmeans", backends=(Backend("cuda"), Backend("cpu")))

_fwd = KMEANS_OP.raw_op(
    "kmeans_fwd(Tensor x, Tensor init, int num_iter, float tol) -> (Tensor, Tensor)",
    lambda x, init, num_iter, tol: (x.new_empty(x.shape[:2], dtype=torch.int64), init.new_empty(init.shape)),
)


def kmeans(
    x: Tensor, k: int, *, init: Tensor | None = None, num_iter: int = 20, tol: float = 0.0, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Splits each set of points into k clusters by Lloyd's algorithm (M3: foreground from background embeddings).

    Deterministic. Each point belongs to the nearest centroid, the one of lowest index if several are equally near; a
    centroid becomes the mean of its points, and stays where it is if it has none.

    Args:
        x: `Tensor[B, N, d]`, any floating type.
        k: number of clusters, 1 ≤ k ≤ N.
        init: `Tensor[B, k, d]`, the first centroids; `None` takes the rows ⌊i·N/k⌋ of `x`.
        num_iter: largest number of iterations, ≥ 0.
        tol: stop, per set, when no centroid moved farther than this.
        backend: `"cuda"`, `"cpu"`, `"reference"`, or `None` to choose.

    Returns:
        `(label, centroid)`: `Tensor[B, N]` of int64, those of the returned centroids, and `Tensor[B, k, d]` in the dtype of `x`.

    Gradient: none.

    Raises:
        TypeError: not tensors, integer tensors, mixed dtypes or devices.
        ValueError: wrong rank, no feature, k < 1, k > N, an init of another shape, a negative num_iter or tol.
        NotImplementedError: `x` or `init` requires a gradient.
    """
    _args.tensor("kmeans", "x", x, "B×N×d")
    k = _args.integer("kmeans", "k", k, 1)
    if k > x.shape[1]:
        raise ValueError(f"kmeans: k must be at most the number of points, {x.shape[1]}, got {k}")
    if x.shape[2] == 0:
        raise ValueError(f"kmeans: x must have at least one feature, got {_args.describe(x)}")
    if init is not None:
        _args.tensor("kmeans", "init", init, "B×k×d")
        _args.same("kmeans", "init", init.shape, "the centroids", (x.shape[0], k, x.shape[2]), "shape")
    num_iter = _args.integer("kmeans", "num_iter", num_iter, 0)
    tol = _args.number("kmeans", "tol", tol)
    if tol < 0:
        raise ValueError(f"kmeans: tol must be at least 0, got {tol}")
    _args.no_gradient("kmeans", x=x, init=init)
    given = {"x": x} if init is None else {"x": x, "init": init}
    aligned = _args.align("kmeans", list(given), list(given.values()))
    chosen = KMEANS_OP.resolve(aligned, backend)
    x, start = aligned[0], aligned[-1] if init is not None else None
    if chosen == "reference":
        return reference.kmeans(x, k, init=start, num_iter=num_iter, tol=tol)
    dtype = x.dtype
    x, start = _args.widen(chosen, x, reference.evenly_spaced(x, k) if start is None else start)
    label, centroid = _fwd[chosen](x, start, num_iter, tol)
    return label, _args.rounded(centroid, dtype)
