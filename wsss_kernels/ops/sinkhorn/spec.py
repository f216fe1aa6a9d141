from __future__ import annotations

import torch

from ..._spec import Case, Malformed, OpSpec, Sample, Sweep, rand
from . import api, reference

CHUNKS = 32
"""Most chunks of rows whose column sums the CPU kernel keeps apart."""


def positive(*size: int, seed: int = 0) -> torch.Tensor:
    """Positive entries over three orders of magnitude, exact in bfloat16."""
    return (rand(*size, seed=seed) ** 3 + 1 / 256).bfloat16().double()


def with_empty(matrix: torch.Tensor) -> torch.Tensor:
    matrix = matrix.clone()
    matrix[..., 3, :] = 0
    matrix[..., :, 5] = 0
    return matrix


def samples() -> list[Sample]:
    wide = torch.exp2(torch.linspace(-20, 4, 12, dtype=torch.float64).round())
    below = positive(6, 6)
    below[2] = 1e-39
    return [
        Sample("typical", (positive(2, 17, 17),)),
        Sample("no leading dimension", (positive(13, 13), 2)),
        Sample("two leading dimensions", (positive(2, 3, 5, 5),)),
        Sample("one round", (positive(2, 11, 11), 1)),
        Sample("no round", (positive(2, 7, 7), 0)),
        Sample("many rounds", (positive(1, 9, 9), 12)),
        # one entry has derivative 0, which only a power of two gives without rounding
        Sample("1×1", (torch.full((2, 1, 1), 0.5, dtype=torch.float64),)),
        Sample("empty batch", (positive(0, 5, 5),)),
        Sample("zeros among the entries", (rand(1, 19, 19, seed=3),)),
        # gradients beyond the range of float16; entries far below gradcheck's step
        Sample(
            "rows of other scales",
            (positive(1, 12, 12) * wide[:, None] * wide.flip(0),),
            gradcheck=False,
            dtypes=(torch.float32, torch.float64, torch.bfloat16),
        ),
        Sample("empty row and column (kink)", (with_empty(positive(2, 9, 9)),), gradcheck=False),
        Sample("nothing but zeros (kink)", (torch.zeros(1, 4, 4, dtype=torch.float64),), gradcheck=False),
        Sample("a row below the smallest float32 (kink)", (below,), gradcheck=False, dtypes=(torch.float32, torch.float64)),
        Sample("more tokens than a block takes", (positive(1, 131, 131), 2)),
        Sample("several chunks of rows, prime", (positive(1, 211, 211),), small=False),
        Sample("several segments of columns", (positive(1, 2053, 2053), 1), small=False, dtypes=(torch.float32,)),
    ]


def malformed() -> list[Malformed]:
    m = torch.rand(2, 3, 3)
    return [
        Malformed("rank", (m[0, 0],), {}, ValueError, "matrix must be a floating-point tensor of shape …×N×N, got float32 of shape 3"),
        Malformed("not square", (m[:, :2],), {}, ValueError, "the rows and the columns of matrix must have the same number, got 2 and 3"),
        Malformed("integers", (m.long(),), {}, TypeError, "matrix must be a floating-point tensor .* got int64"),
        Malformed("not a tensor", ([1.0],), {}, TypeError, "matrix must be a floating-point tensor .* got list"),
        Malformed("N = 0", (m[:, :0, :0],), {}, ValueError, "a spatial extent must not be 0"),
        Malformed("negative rounds", (m, -1), {}, ValueError, "num_iter must be at least 0, got -1"),
        Malformed("fractional rounds", (m, 1.5), {}, TypeError, "num_iter must be an int, got 1.5"),
    ]


def rows_and_columns_sum_to_one(run) -> None:
    result = run(positive(2, 31, 31), 60)
    one = torch.ones(2, 31, dtype=torch.float64)
    torch.testing.assert_close(result.sum(-1), one, rtol=1e-12, atol=0)
    torch.testing.assert_close(result.sum(-2), one, rtol=1e-9, atol=0)


def only_proportions_matter(run) -> None:
    m, scale = positive(1, 12, 12), positive(1, 1, 12, seed=4)
    torch.testing.assert_close(run(m * scale, 3), run(m, 3), rtol=1e-12, atol=0)


def order_of_tokens_does_not_matter(run) -> None:
    m, order = positive(1, 12, 12), torch.randperm(12, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(run(m[:, order][:, :, order], 3), run(m, 3)[:, order][:, :, order], rtol=1e-13, atol=0)


def empty_stays_empty(run) -> None:
    result = run(with_empty(positive(1, 9, 9)), 3)
    assert not result.isnan().any() and not result[:, 3].any() and not result[:, :, 5].any()


def scalings_normalise(run) -> None:
    m = with_empty(positive(2, 31, 31))
    row, col = run(m, 4)
    torch.testing.assert_close(row[:, :, None] * m * col[:, None], reference.sinkhorn(m, 4), rtol=1e-12, atol=1e-300)


def _case(n: int, target: float | None = None, **options) -> Case:
    def make():
        return (torch.rand(1, n, n, generator=torch.Generator().manual_seed(0)) ** 4,), {}

    return Case(f"n{n}", make, target=target, **options)


def slice_bytes(like: torch.Tensor, n: int, vectors: int) -> float:
    """Of the CUDA kernels' sums over slices of rows: about four tiles of 32 columns for each multiprocessor."""
    if not like.is_cuda:
        return 0.0
    return 8.0 * vectors * (128 * torch.cuda.get_device_properties(like.device).multi_processor_count + n)


def _vectors(matrix: torch.Tensor, num_iter: int = 3) -> float:
    """Bytes of a chunk's column sums, the scalings of every round, and two vectors of scratch."""
    n = matrix.shape[-1]
    images = matrix.numel() // max(n * n, 1)
    return n * (4.0 * (CHUNKS + 1) + 16 + images * (16 * num_iter + 8)) + slice_bytes(matrix, n, 1)


CPU_PATHS = ("sinkhorn.forward", "sinkhorn.forward.small")
CUDA_PATHS = ("sinkhorn.cuda.block.fwd", "sinkhorn.cuda.launches.fwd")
SHARED = {
    "paper": "M4 section 3.5.5; Sinkhorn, Canadian J. Math. 18 (1966)",
    "samples": samples,
    "autocast": "fp32",
    "malformed": malformed,
    "flops": lambda matrix, num_iter=3: 4.0 * num_iter * matrix.numel(),
    "peak_bytes": _vectors,
}

SPECS = (
    OpSpec(
        operator=api.SINKHORN_OP,
        public=api.sinkhorn,
        reference=reference.sinkhorn,
        gradients=("matrix",),
        invariants=(rows_and_columns_sum_to_one, only_proportions_matter, order_of_tokens_does_not_matter, empty_stays_empty),
        paths={
            "cpu": (*CPU_PATHS, "sinkhorn.backward"),
            "cuda": (*CUDA_PATHS, "sinkhorn.cuda.block.bwd", "sinkhorn.cuda.launches.bwd"),
            "triton": ("sinkhorn.triton", "sinkhorn.triton.backward"),
        },
        cases=(_case(784), _case(2048), _case(784, backward=True), _case(4096, quick=False, gpu=True)),
        sweeps=(Sweep("N", {n: _case(n) for n in (392, 784, 1568, 3136)}, 2),),
        baselines=("eager",),
        bytes_moved=lambda matrix, num_iter=3: 4.0 * matrix.numel() * (num_iter + 2),
        **SHARED,
    ),
    OpSpec(
        operator=api.SCALING_OP,
        public=api.sinkhorn_scaling,
        reference=reference.sinkhorn_scaling,
        refused=("matrix",),
        float32_outputs=(0, 1),
        invariants=(scalings_normalise,),
        paths={"cpu": CPU_PATHS, "cuda": CUDA_PATHS, "triton": ("sinkhorn.triton",)},
        cases=(_case(784), _case(2048)),
        sweeps=(Sweep("N", {n: _case(n) for n in (392, 784, 1568, 3136)}, 2),),
        baselines=("eager_scaling",),
        bytes_moved=lambda matrix, num_iter=3: 4.0 * matrix.numel() * (num_iter + 1),
        **SHARED,
    ),
)
