from __future__ import annotations

import torch
from torch import Tensor

from ..._spec import Case, Malformed, OpSpec, Sample, Sweep, generator, randn
from . import api, reference


def _maps(count: int, *size: int, seed: int = 0) -> tuple[Tensor, ...]:
    return tuple(randn(*size, seed=seed + i) for i in range(count))


def _bias(window: tuple[int, int], heads: int) -> Tensor:
    return randn((2 * window[0] - 1) * (2 * window[1] - 1), heads, seed=9)


def samples() -> list[Sample]:
    def sample(note: str, size: tuple[int, ...], heads: int, window, shift=0, *, biased: bool = False, **options) -> Sample:
        kwargs = {"num_heads": heads, "window_size": window, "shift": shift, **options}
        if biased:
            kwargs["bias"] = _bias((window, window) if isinstance(window, int) else window, heads)
        small = size[0] * size[1] * size[2] * size[3] <= 600
        return Sample(note, _maps(3, *size), kwargs, small=small)

    reduced = (randn(2, 5, 4, 6), *_maps(2, 2, 3, 2, 6, seed=1))
    return [
        sample("typical", (2, 6, 6, 4), 2, 3, 1, biased=True),
        sample("no shift, no bias", (1, 4, 6, 6), 3, 2),
        sample("ragged map", (1, 7, 5, 4), 2, 3, (2, 1), biased=True),
        sample("rectangular window", (1, 6, 8, 4), 1, (3, 4), (0, 3), biased=True),
        sample("window larger than the map", (1, 3, 4, 4), 2, 5, biased=True),
        sample("window larger than the map, shifted", (1, 3, 4, 4), 2, 5, 2, biased=True),
        sample("7×7 of Swin", (1, 14, 15, 12), 3, 7, 3, biased=True),
        sample("8×8, 32 channels per head", (1, 16, 17, 64), 2, 8, 4, biased=True),
        sample("80 channels per head", (1, 8, 8, 160), 2, 8),
        sample("more windows than parts", (3, 11, 13, 3), 1, 2, 1, biased=True),
        sample("windows of one pixel", (1, 3, 4, 4), 2, 1, biased=True),
        sample("more than 64 tokens", (1, 9, 7, 4), 2, 9, 4, biased=True),
        sample("one row", (1, 1, 9, 4), 2, 4, 1),
        sample("1×1", (2, 1, 1, 4), 2, 3, 1, biased=True),
        sample("other scale", (1, 4, 4, 4), 2, 2, scale=0.25),
        sample("large logits", (1, 4, 4, 4), 2, 4, scale=40.0),
        sample("global", (1, 4, 5, 6), 3, None),
        Sample("global, smaller key and value", reduced, {"num_heads": 2}),
        sample("empty batch", (0, 4, 4, 4), 2, 2, 1, biased=True),
        sample("global, empty batch", (0, 4, 4, 4), 2, None),
    ]


def _exchange(sample: Sample) -> Sample:
    query, key, value = sample.args
    other = tuple(randn(*t.shape, seed=20 + i) for i, t in enumerate(sample.args))
    return Sample(sample.note, ((query, key, value), other), sample.kwargs, small=sample.small and query.numel() <= 300)


def exchange_samples() -> list[Sample]:
    return [_exchange(s) for s in samples() if s.note not in ("80 channels per head", "large logits", "windows of one pixel")]


def malformed() -> list[Malformed]:
    q, k, v = (t.float() for t in _maps(3, 1, 4, 6, 8))
    two = {"num_heads": 2}
    windowed = {"num_heads": 2, "window_size": 2}
    return [
        Malformed("rank", (q[0], k, v), two, ValueError, "query must be .* B×H×W×C, got float32 of shape 4×6×8"),
        Malformed("integer", (q, k.long(), v), two, TypeError, "key must be a floating-point tensor .* got int64"),
        Malformed("not a tensor", (q, k, 1.0), two, TypeError, "value must be a floating-point tensor .* got 1.0"),
        Malformed("empty map", (q[:, :0], k, v), two, ValueError, "query must be .* a spatial extent must not be 0"),
        Malformed("heads", (q, k, v), {"num_heads": 3}, ValueError, "num_heads must divide the number of channels, got 3 heads and 8"),
        Malformed("no head", (q, k, v), {"num_heads": 0}, ValueError, "num_heads must be at least 1, got 0"),
        Malformed("value size", (q, k, v[:, :3]), two, ValueError, "key and value must have the same shape"),
        Malformed(
            "smaller keys in windows", (q, k[:, :3], v[:, :3]), windowed, ValueError, "query and key must have the same shape in windows"
        ),
        Malformed("channels", (q, k[..., :4], v[..., :4]), two, ValueError, "query and key must have the same batch size and channels"),
        Malformed("window 0", (q, k, v), {**two, "window_size": 0}, ValueError, "window_size must be at least 1, got 0"),
        Malformed("window triple", (q, k, v), {**two, "window_size": (2, 2, 2)}, TypeError, "window_size must be an int or a pair of ints"),
        Malformed("large shift", (q, k, v), {**windowed, "shift": 2}, ValueError, r"shift must be smaller than window_size, got \(2, 2\)"),
        Malformed("negative shift", (q, k, v), {**windowed, "shift": -1}, ValueError, "shift must be at least 0, got -1"),
        Malformed("global shift", (q, k, v), {**two, "shift": 1}, ValueError, "window_size=None .* takes neither bias nor shift"),
        Malformed("bias size", (q, k, v), {**windowed, "bias": torch.rand(4, 2)}, ValueError, "bias must be of shape 9×2, got .* 4×2"),
        Malformed(
            "bias dtype", (q, k, v), {**windowed, "bias": torch.rand(9, 2).double()}, TypeError, "query and bias must have one dtype"
        ),
        Malformed("scale", (q, k, v), {**two, "scale": float("nan")}, ValueError, "scale must be a finite number, got nan"),
    ]


def exchange_malformed() -> list[Malformed]:
    branch, two = tuple(t.float() for t in _maps(3, 1, 4, 6, 8)), {"num_heads": 2}
    small = tuple(t[:, :2] for t in branch)
    return [
        Malformed("no triple", (branch, branch[:2]), two, TypeError, r"structural must be a triple \(query, key, value\)"),
        Malformed("tensor", (branch[0], branch), two, TypeError, "primary must be a triple"),
        Malformed(
            "integer", (branch, (branch[0].long(), *branch[1:])), two, TypeError, "query of structural must be a floating-point tensor"
        ),
        Malformed("sizes", (branch, small), {**two, "window_size": 2}, ValueError, "query of .* must have the same shape"),
        Malformed("heads", (branch, branch), {"num_heads": 5}, ValueError, "num_heads must divide the number of channels"),
    ]


def weights_sum_to_one(run) -> None:
    query, key, value = _maps(3, 2, 7, 9, 6)
    for options in ({"window_size": 4, "shift": 2, "bias": _bias((4, 4), 3)}, {"window_size": 4}, {}):
        result = run(query, key, torch.ones_like(value), num_heads=3, **options)
        torch.testing.assert_close(result, torch.ones_like(value), rtol=1e-13, atol=0)


def another_window_does_not_matter(run) -> None:
    query, key, value = _maps(3, 1, 8, 8, 4)
    options = {"num_heads": 2, "window_size": 4, "bias": _bias((4, 4), 2)}
    for shift in (0, 2):
        other = [t.clone() for t in (key, value)]
        for t in other:
            t[:, 2, 3] += 5.0
        changed = (run(query, key, value, shift=shift, **options) != run(query, *other, shift=shift, **options)).any(-1)[0]
        inside = torch.zeros(8, 8, dtype=torch.bool)
        # the wrapped rows and columns of the last windows are regions of their own
        inside[(slice(0, 4), slice(0, 4)) if shift == 0 else (slice(2, 6), slice(2, 6))] = True
        assert bool(changed.any()) and not bool((changed.cpu() & ~inside).any())


def window_of_the_whole_map_is_global(run) -> None:
    query, key, value = _maps(3, 2, 5, 6, 4)
    torch.testing.assert_close(
        run(query, key, value, num_heads=2, window_size=(5, 6)), run(query, key, value, num_heads=2), rtol=1e-12, atol=1e-13
    )


def padding_does_not_matter(run) -> None:
    """A ragged map gives what its windows, cut by hand, give."""
    query, key, value = _maps(3, 1, 5, 7, 4)
    result = run(query, key, value, num_heads=2, window_size=4)
    corner = (slice(None), slice(4, 5), slice(4, 7))
    torch.testing.assert_close(result[corner], run(query[corner], key[corner], value[corner], num_heads=2), rtol=1e-12, atol=1e-13)


def exchange_is_two_attentions(run) -> None:
    sample = exchange_samples()[0]
    z_p, z_t = run(*sample.args, **sample.kwargs)
    (q_p, k_p, v_p), (q_t, k_t, v_t) = sample.args
    torch.testing.assert_close(z_p, reference.window_attention(q_t, k_p, v_p, **sample.kwargs), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(z_t, reference.window_attention(q_p, k_t, v_t, **sample.kwargs), rtol=1e-12, atol=1e-13)


def _options(window: int | None, heads: int) -> dict:
    if window is None:
        return {"num_heads": heads}
    table = 0.2 * torch.randn((2 * window - 1) ** 2, heads, generator=generator(1))
    return {"num_heads": heads, "window_size": window, "shift": window // 2, "bias": table}


def _case(size: int, channels: int, *, batch: int = 1, target: float | None = None, maps: int = 3, **options) -> Case:
    def make():
        g = generator(0)
        tensors = [torch.randn(batch, size, size, channels, generator=g) for _ in range(maps)]
        args = tuple(tensors) if maps == 3 else (tuple(tensors[:3]), tuple(tensors[3:]))
        return args, _options(8, 4)

    return Case(f"{batch}x{size}x{size}x{channels}_w8", make, backward=True, target=target, **options)


def _flops(query, key, value, *, num_heads, window_size=None, **_) -> float:
    slots = key.shape[1] * key.shape[2] if window_size is None else window_size**2
    return 4.0 * query.numel() * slots


def _peak(query, key, value, *, num_heads, window_size=None, bias=None, **_) -> int:
    """The bias of each head, and per thread one block of tokens and one of weights, rows rounded up to 32."""
    slots, depth = window_size**2, query.shape[3] // num_heads
    stride = -(-slots // 32) * 32
    return 4 * (num_heads * slots * stride + torch.get_num_threads() * (stride * depth + (slots + 2) * stride + 6 * slots))


_TRITON = [f"window_attention.triton{end}" for end in ("", ".statistics", ".large", ".backward")]
_TRITON += [f"window_attention.triton.backward.{end}" for end in ("statistics", "large", "bias", "table")]
_SHARED = {
    "paper": "M0 Eq. 3; M2 Eq. 2; Swin, ICCV 2021",
    "paths": {"cpu": ("window_attention.fwd", "window_attention.bwd"), "triton": tuple(_TRITON)},
}

SPECS = (
    OpSpec(
        operator=api.WINDOW_OP,
        public=api.window_attention,
        reference=reference.window_attention,
        samples=samples,
        gradients=("query", "key", "value", "bias"),
        invariants=(weights_sum_to_one, another_window_does_not_matter, window_of_the_whole_map_is_global, padding_does_not_matter),
        malformed=malformed,
        cases=(_case(64, 128, target=3.0), _case(32, 320), _case(64, 128, batch=8, quick=False, gpu=True)),
        sweeps=(Sweep("H·W", {n * n: _case(n, 128) for n in (16, 32, 64)}, 1),),
        baselines=("eager", "sdpa"),
        flops=_flops,
        bytes_moved=lambda query, *rest, **_: 16.0 * query.numel(),
        peak_bytes=_peak,
        **_SHARED,
    ),
    OpSpec(
        operator=api.EXCHANGE_OP,
        public=api.exchange_attention,
        reference=reference.exchange_attention,
        samples=exchange_samples,
        gradients=("primary", "structural", "bias"),
        invariants=(exchange_is_two_attentions,),
        malformed=exchange_malformed,
        cases=(_case(64, 128, maps=6),),
        sweeps=(Sweep("H·W", {n * n: _case(n, 128, maps=6) for n in (16, 32, 64)}, 1),),
        baselines=("eager_exchange",),
        flops=lambda primary, structural, **options: 2 * _flops(*primary, **options),
        peak_bytes=lambda primary, structural, **options: _peak(*primary, **options),
        **_SHARED,
    ),
)
