from __future__ import annotations

import torch
from torch import Tensor

from ..._spec import Case, Malformed, OpSpec, Sample, Sweep, generator, randn
from . import api, reference


def _pair(batch: int, channels: int, height: int, width: int, classes: int) -> tuple[Tensor, Tensor]:
    return randn(batch, channels, height, width), randn(classes, channels, seed=1)


def samples() -> list[Sample]:
    def sample(note: str, *size: int, scale=None, **options) -> Sample:
        args = _pair(*size) if scale is None else (*_pair(*size), scale)
        small = size[0] * size[1] * size[2] * size[3] <= 900
        return Sample(note, args, options, small=small)

    visual, text = _pair(2, 3, 4, 5, 2)
    holes = visual.clone()
    holes[:, :, 1:3, 2] = 0
    learned = torch.tensor(1.75, dtype=torch.float64)
    return [
        sample("learned scale", 2, 5, 3, 4, 3, scale=learned),
        sample("typical", 2, 16, 7, 9, 5),
        sample("more pixels than a block", 1, 6, 9, 13, 3, scale=2.5),
        sample("prime sizes", 2, 11, 13, 17, 7, scale=learned),
        sample("deeper than a panel", 1, 301, 3, 5, 9),
        sample("more pixels than a partial sum", 1, 5, 67, 71, 2),
        sample("many texts", 1, 8, 5, 7, 23),
        sample("vectors as they are", 2, 5, 3, 4, 3, scale=learned, normalize_visual=False),
        sample("negative scale", 1, 5, 6, 7, 3, scale=-0.5),
        sample("one text", 2, 5, 3, 4, 1),
        sample("one channel", 1, 1, 3, 4, 2, normalize_visual=False),
        sample("1×1", 2, 5, 1, 1, 3),
        sample("no text", 2, 5, 3, 4, 0),
        sample("empty batch", 0, 5, 3, 4, 3, scale=learned),
        Sample("zero vectors (a kink)", (holes, text), gradcheck=False),
        Sample("scale 0", (visual, text, torch.zeros((), dtype=torch.float64))),
    ]


def pool_samples() -> list[Sample]:
    """Without those whose maximum is not unique (scale 0), plus ties, whose gradient goes to the first."""
    visual, text = _pair(1, 3, 4, 5, 2)
    tied = torch.cat([visual, visual], dim=3)
    kept = [s for s in samples() if s.note != "scale 0"]
    return [*kept, Sample("ties (a kink)", (tied, text, 2.0), gradcheck=False)]


def malformed() -> list[Malformed]:
    visual, text = (t.float() for t in _pair(2, 5, 3, 4, 3))
    return [
        Malformed("rank", (visual[0], text), {}, ValueError, "visual must be .* B×C×h×w, got float32 of shape 5×3×4"),
        Malformed("text rank", (visual, text[0]), {}, ValueError, "text must be .* K×C, got float32 of shape 5"),
        Malformed("integer", (visual.long(), text), {}, TypeError, "visual must be a floating-point tensor .* got int64"),
        Malformed("not a tensor", (visual, [1.0]), {}, TypeError, "text must be a floating-point tensor .* got list"),
        Malformed("empty map", (visual[..., :0], text), {}, ValueError, "visual must be .* a spatial extent must not be 0"),
        Malformed("channels", (visual, text[:, :4]), {}, ValueError, "visual and text must have the same number of channels, got 5 and 4"),
        Malformed("mixed dtypes", (visual, text.double()), {}, TypeError, "visual and text must have one dtype"),
        Malformed("scale dtype", (visual, text, torch.tensor(1.0).double()), {}, TypeError, "visual and scale must have one dtype"),
        Malformed(
            "scale per class",
            (visual, text, torch.rand(3)),
            {},
            ValueError,
            "scale must be a number or a floating-point tensor without dimensions",
        ),
        Malformed("integer scale", (visual, text, torch.tensor(2)), {}, TypeError, "scale must be a number or a floating-point tensor"),
        Malformed("normalize", (visual, text), {"normalize_visual": "no"}, TypeError, "normalize_visual must be True or False, got 'no'"),
        Malformed("NaN scale", (visual, text, float("nan")), {}, ValueError, "scale must be a finite number, got nan"),
        Malformed("scale no number", (visual, text, "1"), {}, TypeError, "scale must be a number, got '1'"),
    ]


def length_of_the_visual_vectors_does_not_matter(run) -> None:
    visual, text = _pair(2, 5, 3, 4, 3)
    torch.testing.assert_close(run(8 * visual, text), run(visual, text), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(run(visual, text, 3.0), 3 * run(visual, text), rtol=1e-13, atol=1e-14)


def bounded_by_the_length_of_the_text(run) -> None:
    visual, text = _pair(2, 5, 3, 4, 3)
    bound = text.norm(dim=1).view(1, 3, *[1] * (run(visual, text).dim() - 2))
    assert bool((run(visual, text).cpu().abs() <= bound * (1 + 1e-14)).all())


def pool_is_the_maximum(run) -> None:
    visual, text = _pair(2, 5, 9, 13, 3)
    for scale in (1.5, -1.5):
        torch.testing.assert_close(
            run(visual, text, scale), reference.text_similarity(visual, text, scale).amax((2, 3)), rtol=1e-13, atol=1e-14
        )


def _case(batch: int, channels: int, size: int, classes: int, *, backward: bool = True, target: float | None = None) -> Case:
    def make():
        g = generator(0)
        visual = torch.randn(batch, channels, size, size, generator=g)
        return (visual, torch.randn(classes, channels, generator=g), torch.tensor(1.5)), {}

    return Case(f"{batch}x{channels}x{size}x{size}_{classes}_texts{'' if backward else '_forward'}", make, backward=backward, target=target)


# Where eager code is a few calls on tensors that fit the first-level cache, and where channels or texts are few.
SMALL = ((1, 4, 1, 1), (1, 16, 4, 2), (1, 64, 7, 5), (2, 512, 7, 20), (1, 8, 64, 1), (1, 768, 14, 1))


def _flops(visual, text, *rest, **_) -> float:
    return 2.0 * visual.numel() * (text.shape[0] + 1)


_SHARED = {"paper": "M0 Eq. 6", "gradients": ("visual", "text", "scale"), "malformed": malformed, "flops": _flops}

SPECS = (
    OpSpec(
        operator=api.SIMILARITY_OP,
        public=api.text_similarity,
        reference=reference.text_similarity,
        samples=samples,
        invariants=(length_of_the_visual_vectors_does_not_matter, bounded_by_the_length_of_the_text),
        paths={
            "cpu": ("text_similarity.fwd", "text_similarity.bwd"),
            "triton": ("text_similarity.triton", "text_similarity.triton.backward", "text_similarity.triton.text"),
        },
        cases=(_case(8, 320, 32, 3), _case(4, 512, 32, 80)),
        sweeps=(Sweep("texts", {k: _case(4, 320, 32, k) for k in (3, 10, 40, 80)}, 1),),
        baselines=("eager",),
        bytes_moved=lambda visual, text, *rest, **_: 4.0 * (visual.numel() + visual.numel() // max(1, text.shape[1]) * text.shape[0]),
        peak_bytes=lambda *args, **_: 0,
        **_SHARED,
    ),
    OpSpec(
        operator=api.POOL_OP,
        public=api.text_similarity_pool,
        reference=reference.text_similarity_pool,
        samples=pool_samples,
        invariants=(length_of_the_visual_vectors_does_not_matter, bounded_by_the_length_of_the_text, pool_is_the_maximum),
        paths={
            "cpu": ("text_similarity_pool.fwd", "text_similarity_pool.bwd"),
            "triton": ("text_similarity_pool.triton", "text_similarity_pool.triton.backward"),
        },
        cases=(
            _case(8, 320, 32, 3, target=1.0),
            _case(8, 320, 32, 3, backward=False, target=1.0),
            _case(4, 512, 32, 80, target=1.0),
            _case(4, 512, 32, 80, backward=False, target=1.0),
            *(_case(*size, backward=grad, target=1.0) for size in SMALL for grad in (True, False)),
        ),
        sweeps=(Sweep("H·W", {n * n: _case(8, 320, n, 3) for n in (16, 32, 64)}, 1),),
        baselines=("eager_pool",),
        bytes_moved=lambda visual, *rest, **_: 4.0 * visual.numel(),
        peak_bytes=lambda visual, text, *rest, **_: (
            20 * visual.shape[0] * text.shape[0] * (visual.shape[2] * visual.shape[3] // 64 + 1)
            + 256 * text.shape[0] * torch.get_num_threads()
        ),
        **_SHARED,
    ),
)
