"""Triton kernels of the random walk: a step is two products with the matrix for all classes at once, in one launch.

y ← ½ (S + Sᵀ) y with S = diag(row)·A·diag(col): the owner of rows i reads A_ij and A_ji, whose products with col ∘ y and row ∘ y end in
the same rows, so that no partial sums are stored. The matrix is stored, or a refining map whose tiles are recomputed in every pass.
Tape and scalings are those of the C++ kernels: float64[2·rounds + 3·classes·power][n], col_1, row_1, ..., then for each step its
input y, A (col ∘ y) and Aᵀ (row ∘ y).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton import dot, launch, power_of_2
from ..affinity import triton_adjoint
from ..affinity.api import empty_gradients
from ..affinity.triton_impl import candidates, decoded, inverse_norms, options, refined, refined_tile, select
from ..sinkhorn.triton_impl import LowRank, Matrix, low_rank_tile, of, stored, vector


@triton.jit
def _maps(ptr, per_image, image, class_, at, classes, n):
    """Pointers and mask of entries of [classes][n] vectors, as a tile of tokens × classes."""
    place = ptr + image * per_image + class_.to(tl.int64)[None, :] * n + at[:, None]
    return place, (class_ < classes)[None, :] & (at < n)[:, None]


@triton.jit
def _step_kernel(next_ptr, next_per_image, source, row_scaling, col_scaling, y, by_col, by_row, classes, n, blocks, TILE: tl.constexpr,
                 SYMMETRIC: tl.constexpr, kind: tl.constexpr, OPTIONS: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
                 BN: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """by_col = A (col ∘ y), by_row = Aᵀ (row ∘ y), next = ½ (row ∘ by_col + col ∘ by_row)."""
    image = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    class_ = tl.program_id(1) * BC + tl.arange(0, BC)
    direct, turned = tl.zeros((BM, BC), tl.float64), tl.zeros((BM, BC), tl.float64)
    for start in range(0, n, BN):
        column = start + tl.arange(0, BN)
        place, inside = _maps(y[0], y[1], image, class_, column, classes, n)
        x = tl.load(place, mask=inside, other=0.0)
        m = TILE(source, image, row, column, n, False, kind, OPTIONS)
        w = (x * vector(col_scaling, image, column, n)[:, None]).to(kind)
        direct += dot(m, w, tl.zeros((BM, BC), kind), PRECISION).to(tl.float64)
        if not SYMMETRIC:
            m = TILE(source, image, row, column, n, True, kind, OPTIONS)
        w = (x * vector(row_scaling, image, column, n)[:, None]).to(kind)
        turned += dot(m, w, tl.zeros((BM, BC), kind), PRECISION).to(tl.float64)
    place, inside = _maps(by_col[0], by_col[1], image, class_, row, classes, n)
    tl.store(place, direct, mask=inside)
    place, inside = _maps(by_row[0], by_row[1], image, class_, row, classes, n)
    tl.store(place, turned, mask=inside)
    result = 0.5 * (vector(row_scaling, image, row, n)[:, None] * direct + vector(col_scaling, image, row, n)[:, None] * turned)
    place, inside = _maps(next_ptr, next_per_image, image, class_, row, classes, n)
    if next_ptr.dtype.element_ty != tl.float64:
        result = result.to(tl.float32)
    tl.store(place, result.to(next_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _scaling_adjoint_kernel(sums_ptr, grad_row_ptr, grad_col_ptr, u, v, row_scaling, col_scaling, y, g, by_col, by_row, g_by_col, g_by_row,
                            first, classes, n, blocks, START: tl.constexpr, LAST: tl.constexpr, BM: tl.constexpr):  # fmt: skip
    """What a step adds to the gradients of the scalings and, in low rank, of A; after the last, sums = −grad_row · row²."""
    image = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    inside = at < n
    row, col = vector(row_scaling, image, at, n), vector(col_scaling, image, at, n)
    grad_row, grad_col = tl.zeros((BM,), tl.float64), tl.zeros((BM,), tl.float64)
    if not START:
        grad_row = tl.load(grad_row_ptr + image * n + at, mask=inside, other=0.0)
        grad_col = tl.load(grad_col_ptr + image * n + at, mask=inside, other=0.0)
    for k in range(0, classes):
        place = k * n + at
        a = tl.load(y[0] + image * y[1] + place, mask=inside, other=0.0)
        b = tl.load(g[0] + image * g[1] + place, mask=inside, other=0.0)
        grad_row += 0.5 * b * tl.load(by_col[0] + image * by_col[1] + place, mask=inside, other=0.0)
        grad_row += 0.5 * a * tl.load(g_by_col[0] + image * g_by_col[1] + place, mask=inside, other=0.0)
        grad_col += 0.5 * b * tl.load(by_row[0] + image * by_row[1] + place, mask=inside, other=0.0)
        grad_col += 0.5 * a * tl.load(g_by_row[0] + image * g_by_row[1] + place, mask=inside, other=0.0)
        left, right = u[0] + image * u[1] + (first + 2 * k) * n + at, v[0] + image * v[1] + (first + 2 * k) * n + at
        tl.store(left, 0.5 * row * b, mask=inside)
        tl.store(right, col * a, mask=inside)
        tl.store(left + n, 0.5 * row * a, mask=inside)
        tl.store(right + n, col * b, mask=inside)
    tl.store(grad_row_ptr + image * n + at, grad_row, mask=inside)
    tl.store(grad_col_ptr + image * n + at, grad_col, mask=inside)
    if LAST:
        tl.store(sums_ptr[0] + image * sums_ptr[1] + at, -(grad_row * row) * row, mask=inside)


class _Walk:
    """A walk of `classes` maps over a matrix, with its tape."""

    def __init__(self, path: str, matrix: Matrix, symmetric: bool, tape: Tensor, classes: int, rounds: int, power: int):
        self.path, self.matrix, self.symmetric, self.tape = path, matrix, symmetric, tape
        self.classes, self.rounds, self.power = classes, rounds, power

    def row(self) -> tuple[Tensor, int] | None:
        return of(self.tape, 2 * self.rounds - 1) if self.rounds else None

    def col(self) -> tuple[Tensor, int] | None:
        return of(self.tape, 2 * self.rounds - 2) if self.rounds else None

    def part(self, step: int, part: int) -> tuple[Tensor, int]:
        """Of a step: 0 its input, 1 A (col ∘ y), 2 Aᵀ (row ∘ y)."""
        return of(self.tape, 2 * self.rounds + (3 * step + part) * self.classes)

    def step(self, y, by_col, by_row, after) -> None:
        matrix, meta = self.matrix, self.matrix.blocks()
        blocks, width = triton.cdiv(matrix.n, meta["BM"]), power_of_2(self.classes, most=32)
        launch(self.path, _step_kernel, (matrix.batch * blocks, triton.cdiv(self.classes, width)), *after, matrix.source, self.row(),
               self.col(), y, by_col, by_row, self.classes, matrix.n, blocks, TILE=matrix.tile, SYMMETRIC=self.symmetric, kind=matrix.kind,
               OPTIONS=matrix.options, PRECISION=matrix.precision, BC=width, **meta)  # fmt: skip

    def forward(self, cam: Tensor) -> Tensor:
        """T^power cam."""
        out, start = cam.new_empty(cam.shape), 2 * self.rounds
        self.tape[:, start : start + self.classes] = cam
        if self.rounds:
            self.matrix.scale(self.path, self.tape, self.rounds)
        for s in range(self.power):
            after = self.part(s + 1, 0) if s + 1 < self.power else (out, out.stride(0))
            self.step(self.part(s, 0), self.part(s, 1), self.part(s, 2), after)
        return out

    def backward(self, grad: Tensor, wanted: bool) -> tuple[Tensor, LowRank | None]:
        """(the gradient of the maps, that of the matrix if it is wanted)."""
        batch, classes, n = grad.shape
        out = grad.new_empty(grad.shape)
        g, after, by_col, by_row = ((t, classes * n) for t in self.tape.new_empty(4, batch, classes, n))
        g[0].copy_(grad)
        low = LowRank(self.tape, 2 * classes * self.power, self.rounds) if wanted else None
        to_scalings = self.tape.new_empty(2, batch, n)
        for s in range(self.power - 1, -1, -1):
            self.step(g, by_col, by_row, after if s else (out, classes * n))
            if low is not None:
                self._scalings(s, low, to_scalings, g, by_col, by_row)
            g, after = after, g
        if low is not None and self.rounds:
            of_rows, of_columns = low.first()
            add = (to_scalings[1], n)
            self.matrix.run(self.path, of_columns, of_rows, turned=True, scaling=self.col(), add=add)
            low.rounds_adjoint(self.path, self.matrix)
        return out, low

    def _scalings(self, s: int, low: LowRank, to_scalings: Tensor, g, by_col, by_row) -> None:
        n, last = self.matrix.n, s == 0 and self.rounds > 0
        sums = low.first()[0] if last else None
        blocks = triton.cdiv(n, 128)
        launch(self.path, _scaling_adjoint_kernel, (self.matrix.batch * blocks,), sums, *to_scalings, of(low.u, 0), of(low.v, 0), self.row(), self.col(),
               self.part(s, 0), g, self.part(s, 1), self.part(s, 2), by_col, by_row, 2 * self.classes * s, self.classes, n, blocks,
               START=s == self.power - 1, LAST=last, BM=128, num_warps=4)  # fmt: skip


def _tape(cam: Tensor, rounds: int, power: int) -> Tensor:
    batch, classes, n = cam.shape
    return cam.new_empty(batch, 2 * rounds + 3 * classes * power if power and classes else 0, n, dtype=torch.float64)


def _masked(maps: Tensor, mask: Tensor | None, here: bool) -> Tensor:
    """`maps` times the mask if it applies here (before the walk for `"source"`, after it for `"target"`)."""
    return maps if mask is None or not here else maps * mask


def random_walk_fwd(
    affinity: Tensor, cam: Tensor, mask: Tensor | None, target: bool, sinkhorn_iter: int, power: int
) -> tuple[Tensor, Tensor]:
    start = _masked(cam, mask, not target).flatten(2)
    tape = _tape(start, sinkhorn_iter, power)
    if not tape.shape[1]:
        return _masked(cam, mask, True).clone(memory_format=torch.contiguous_format), tape
    walk = _Walk("random_walk.triton", Matrix(affinity, stored(affinity)), False, tape, cam.shape[1], sinkhorn_iter, power)
    return _masked(walk.forward(start).view(cam.shape), mask, target), tape


def random_walk_bwd(
    grad: Tensor, affinity: Tensor, tape: Tensor, mask: Tensor | None, target: bool, sinkhorn_iter: int, power: int, need_affinity: bool
) -> tuple[Tensor, Tensor]:
    n, path = affinity.shape[-1], "random_walk.triton.backward"
    out = affinity.new_empty(affinity.shape[0] if need_affinity else 0, n, n)
    if not tape.shape[1]:
        return _masked(grad, mask, True).clone(memory_format=torch.contiguous_format), out.zero_()
    walk = _Walk(path, Matrix(affinity, stored(affinity)), False, tape.contiguous(), grad.shape[1], sinkhorn_iter, power)
    to_cam, low = walk.backward(_masked(grad, mask, target).flatten(2), need_affinity)
    if low is not None:
        low.write(path, out)
    return _masked(to_cam.view(grad.shape), mask, not target), out


def _refined(decoder: Tensor | None, encoder: Tensor, maps: bool, first: int, gate: Tensor, clamp_min: float | None, inverse) -> Matrix:
    """The refining map by recomputed tiles."""
    source = refined(decoder, candidates(encoder, maps, inverse), gate, first, encoder.shape[1])
    return Matrix(encoder, source, refined_tile, options(encoder, maps, False, clamp_min))


def affinity_random_walk_fwd(
    cam: Tensor,
    mask: Tensor | None,
    decoder: Tensor | None,
    encoder: Tensor,
    maps: bool,
    first: int,
    signed: bool,
    clamp_min: float | None,
    target: bool,
    rounds: int,
    power: int,
) -> tuple[Tensor, Tensor, Tensor]:
    path, inverse = "affinity_random_walk.triton.streaming", None if maps else inverse_norms(encoder, first)
    given, option = None if decoder is None else decoded(decoder), options(encoder, maps, False, clamp_min)
    gate, _ = select(path, given, encoder, candidates(encoder, maps, inverse), first, signed, option)
    start = _masked(cam, mask, not target).flatten(2)
    tape = _tape(start, rounds, power)
    if not tape.shape[1]:
        return _masked(cam, mask, True).clone(memory_format=torch.contiguous_format), tape, gate
    matrix = _refined(decoder, encoder, maps, first, gate, clamp_min, inverse)
    walked = _Walk(path, matrix, not maps, tape, cam.shape[1], rounds, power).forward(start)
    return _masked(walked.view(cam.shape), mask, target), tape, gate


def affinity_random_walk_bwd(
    grad, mask, decoder, encoder, tape, gate, maps, first, signed, clamp_min, target, rounds, power, need_decoder, need_encoder
) -> tuple[Tensor, Tensor, Tensor]:
    path, wanted = "affinity_random_walk.triton.streaming.backward", need_decoder or need_encoder
    shape, step = grad.shape, tape.shape[1] > 0
    grad = _masked(grad, mask, target or not step).flatten(2)
    to_cam, low = grad.clone(memory_format=torch.contiguous_format), None
    if tape.shape[1]:
        matrix = _refined(decoder, encoder, maps, first, gate, clamp_min, None if maps else inverse_norms(encoder, first))
        to_cam, low = _Walk(path, matrix, not maps, tape.contiguous(), grad.shape[1], rounds, power).backward(grad, wanted)
    elif wanted:  # no step: the matrix has no gradient
        low = LowRank(grad.new_empty(len(grad), 0, grad.shape[-1], dtype=torch.float64), 0, 0)
    to_cam = _masked(to_cam.view(shape), mask, step and not target)
    if low is None:
        return to_cam, *empty_gradients(decoder, encoder, False, False)
    return to_cam, *triton_adjoint.refining(path, low.source(), low_rank_tile, None, decoder, encoder, gate, maps, first, signed, clamp_min,
                                            need_decoder, need_encoder)  # fmt: skip
