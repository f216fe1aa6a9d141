from __future__ import annotations

import torch

from ..._spec import Case, Malformed, OpSpec, Sample, Sweep, generator, randint, randn
from . import api, reference


def _clusters(count: int, depth: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    label = randint(classes, count, seed=seed)
    return (randn(count, depth, seed=seed) + 2 * randn(classes, depth, seed=seed + 1)[label]).bfloat16().double(), label


def _temperature(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.bfloat16).double()


def supcon_samples() -> list[Sample]:
    z, label = _clusters(13, 5, 3)
    gaps = torch.where(torch.arange(13) % 4 == 0, -1, label)
    large, large_label = _clusters(331, 37, 3)
    holes = z * (torch.arange(13) % 5 > 0)[:, None]
    return [
        Sample("typical", (z, label, _temperature(0.5))),
        Sample("number as temperature", (z, label, 0.1)),
        Sample("sum", (z, label, _temperature(0.25)), {"reduction": "sum"}),
        Sample("ignored", (z, gaps, _temperature(0.5))),
        Sample("other ignored label", (z, label, _temperature(0.5)), {"ignore_index": 1}),
        Sample("all ignored", (z, torch.full_like(label, -1), _temperature(0.5))),
        Sample("zero vectors", (holes, label, _temperature(0.5)), gradcheck=False),
        Sample("no positive", (z, torch.arange(13), _temperature(0.5))),
        Sample("one class", (z, torch.zeros_like(label), _temperature(0.5))),
        Sample("one pair", (z[:2], torch.tensor([4, 4]), _temperature(0.5))),
        Sample("one embedding", (z[:1], label[:1], _temperature(0.5))),
        Sample("empty", (z[:0], label[:0], _temperature(0.5))),
        Sample("two features", (randn(7, 2), label[:7], _temperature(0.5))),
        Sample("label type", (z, label.to(torch.uint8), _temperature(0.5))),
        Sample("separated", (10 * torch.eye(8, dtype=torch.float64)[label] + 0.01 * randn(13, 8), label, _temperature(0.25))),
        Sample("sharp", (z, label, 0.004), gradcheck=False),
        Sample("several blocks", (large, large_label, _temperature(0.125)), small=False),
        Sample("wide blocks", (*_clusters(2111, 16, 2), 0.1), {"reduction": "sum"}, small=False),
        Sample("long rows", (*_clusters(600, 300, 4), 0.1), {"reduction": "sum"}, small=False),
    ]


def info_nce_samples() -> list[Sample]:
    x, label = _clusters(13, 5, 3)
    y = (x + randn(13, 5, seed=5)).bfloat16().double()
    big, big_label = _clusters(331, 37, 5)
    other = (big + randn(331, 37, seed=5)).bfloat16().double()
    wide = randn(13, 48, seed=6)
    rows = (torch.arange(13) % 5 > 0)[:, None]
    return [
        Sample("typical", (x, y, _temperature(0.5))),
        Sample("labels", (x, y, _temperature(0.5)), {"label": label}),
        Sample("number as temperature", (x, y, 0.07)),
        Sample("sum", (x, y, _temperature(0.5)), {"label": label, "reduction": "sum"}),
        Sample("zero vectors", (x * rows, y, _temperature(0.5)), gradcheck=False),
        Sample("one pair", (x[:1], y[:1], _temperature(0.5))),
        Sample("two pairs of one label", (x[:2], y[:2], _temperature(0.5)), {"label": torch.tensor([3, 3])}),
        Sample("empty", (x[:0], y[:0], _temperature(0.5))),
        Sample("two features", (randn(7, 2), randn(7, 2, seed=2), _temperature(0.5))),
        Sample("label type", (x, y, _temperature(0.5)), {"label": label.int()}),
        Sample("separated", (torch.eye(13, dtype=torch.float64), torch.eye(13, dtype=torch.float64) + 0.01 * randn(13, 13), 0.25)),
        Sample("sharp", (x, y, 0.004), gradcheck=False),
        Sample("several blocks", (big, other, _temperature(0.125)), {"label": big_label}, small=False),
        Sample("many features", (wide, wide + randn(13, 48, seed=7), _temperature(0.5)), {"label": label}),
        Sample("many features, sharp", (wide, randn(13, 48, seed=7), 0.004), gradcheck=False),
        Sample("many features, one pair", (wide[:1], wide[1:2], _temperature(0.5)), {"reduction": "sum"}),
        Sample("many features, empty", (wide[:0], wide[:0], _temperature(0.5))),
        Sample("several groups", (randn(1201, 40), randn(1201, 40, seed=1), 0.07), {"reduction": "sum"}, small=False),
        Sample("wide blocks", (randn(2111, 16), randn(2111, 16, seed=1), 0.1), {"reduction": "sum"}, small=False),
        Sample("long rows", (randn(300, 300), randn(300, 300, seed=1), 0.07), {"reduction": "sum"}, small=False),
    ]


def _common(name: str, *after: object) -> list[Malformed]:
    """Malformed first arguments of both losses."""
    x = torch.rand(4, 3)
    return [
        Malformed("rank", (x[0], *after), {}, ValueError, f"{name} must be a floating-point tensor of shape N×d, got float32 of shape 3"),
        Malformed("integer", (x.long(), *after), {}, TypeError, f"{name} must be a floating-point tensor .* got int64"),
        Malformed("no feature", (x[:, :0], *after), {}, ValueError, f"{name} must have at least one feature, got float32 of shape 4×0"),
    ]


def supcon_malformed() -> list[Malformed]:
    z, label = torch.rand(4, 3), torch.tensor([0, 1, 0, 1])
    return [
        *_common("z", label),
        Malformed("label length", (z, label[:3]), {}, ValueError, "z and label must have the same length, got 4 and 3"),
        Malformed("label type", (z, label.float()), {}, TypeError, "label must be an int64, int32 or uint8 tensor of shape N, got float32"),
        Malformed("label rank", (z, label[None]), {}, ValueError, "label must be .* of shape N, got int64 of shape 1×4"),
        Malformed("temperature 0", (z, label, 0.0), {}, ValueError, "temperature must be a positive finite number, got 0.0"),
        Malformed("NaN", (z, label, float("nan")), {}, ValueError, "temperature must be a positive finite number, got nan"),
        Malformed("text", (z, label, "warm"), {}, TypeError, "temperature must be a number, got 'warm'"),
        Malformed("vector", (z, label, torch.rand(1)), {}, TypeError, r"temperature must be .* of shape \(\), got float32 of shape 1"),
        Malformed("dtype", (z, label, torch.tensor(0.1).double()), {}, TypeError, "temperature must have the dtype of the other tensors"),
        Malformed("reduction", (z, label), {"reduction": "none"}, ValueError, "reduction must be one of 'mean', 'sum', got 'none'"),
        Malformed("ignore_index", (z, label), {"ignore_index": 0.5}, TypeError, "ignore_index must be an int, got 0.5"),
    ]


def info_nce_malformed() -> list[Malformed]:
    x, y = torch.rand(4, 3), torch.rand(4, 3)
    return [
        *_common("x", y, 0.1),
        Malformed("shapes", (x, y[:3], 0.1), {}, ValueError, r"x and y must have the same shape, got \(4, 3\) and \(3, 3\)"),
        Malformed("dtypes", (x, y.double(), 0.1), {}, TypeError, "x and y must have one dtype"),
        Malformed("label", (x, y, 0.1), {"label": torch.arange(3)}, ValueError, "x and label must have the same length, got 4 and 3"),
        Malformed("temperature", (x, y, -1.0), {}, ValueError, "temperature must be a positive finite number, got -1.0"),
        Malformed("reduction", (x, y, 0.1), {"reduction": None}, ValueError, "reduction must be one of 'mean', 'sum', got None"),
    ]


def order_does_not_matter(run) -> None:
    z, label = _clusters(67, 9, 3)
    order = torch.randperm(67, generator=generator(3))
    torch.testing.assert_close(run(z[order], label[order], 0.1), run(z, label, 0.1), rtol=1e-12, atol=0)


def ignored_embeddings_are_as_if_removed(run) -> None:
    z, label = _clusters(67, 9, 4)
    kept = label != 2
    torch.testing.assert_close(run(z, label, 0.1, ignore_index=2), run(z[kept], label[kept], 0.1), rtol=1e-12, atol=0)


def equal_embeddings_give_log_of_the_candidates(run) -> None:
    z = randn(1, 5).expand(9, 5)
    torch.testing.assert_close(run(z, torch.arange(9) // 3, 0.1), torch.tensor(8.0, dtype=torch.float64).log(), rtol=1e-12, atol=0)


def distinct_labels_are_the_plain_loss(run) -> None:
    x, y = randn(45, 6), randn(45, 6, seed=1)
    label = torch.randperm(45, generator=generator(2)) * 3 - 50
    for reduction in ("mean", "sum"):
        plain = run(x, y, 0.07, reduction=reduction)
        torch.testing.assert_close(run(x, y, 0.07, label=label, reduction=reduction), plain, rtol=1e-12, atol=0)


def exchange_of_the_sides_does_not_matter(run) -> None:
    x, y, label = randn(45, 6), randn(45, 6, seed=1), randint(4, 45)
    torch.testing.assert_close(run(x, y, 0.1, label=label), run(y, x, 0.1, label=label), rtol=1e-12, atol=0)


def mean_is_sum_over_anchors(run) -> None:
    x, y = randn(45, 6), randn(45, 6, seed=1)
    torch.testing.assert_close(run(x, y, 0.1) * 45, run(x, y, 0.1, reduction="sum"), rtol=1e-12, atol=0)


def _supcon_case(count: int, **options) -> Case:
    def make():
        g = generator(0)
        return (torch.randn(count, 16, generator=g), torch.randint(2, (count,), generator=g), 0.1), {}

    return Case(f"n{count}_d16", make, backward=True, **options)


def _info_nce_case(count: int, depth: int, *, labels: bool = False, **options) -> Case:
    def make():
        g = generator(0)
        x, y = (torch.randn(count, depth, generator=g) for _ in range(2))
        return (x, y, 0.07), {"label": torch.randint(20, (count,), generator=g)} if labels else {}

    return Case(f"n{count}_d{depth}{'_labels' if labels else ''}", make, backward=True, **options)


def _side(count: int, depth: int, size: int) -> float:
    """Bytes of one padded, normalised side and its statistics."""
    return (count + 256) * (depth + 64) * size


def _supcon_peak(z, label, temperature=0.1, **_) -> float:
    """Normalised rows, tiles of each thread, per-anchor statistics, O(N·d)."""
    return _side(*z.shape, z.element_size()) + 64 * z.shape[0] + 16 * (z.shape[1] * 256 + 16384) * z.element_size()


def _info_nce_peak(x, y, temperature, **_) -> float:
    """As above for both sides, and 32 partial statistics of every row; on a GPU a strip of products and 8 numbers per 32 of them."""
    size = max(4, x.element_size())
    usual = 2 * _side(*x.shape, x.element_size()) + 400 * x.shape[0] + 16 * (x.shape[1] * 256 + 16384) * x.element_size()
    if not x.is_cuda:
        return usual
    strip = min(x.shape[0] ** 2 * size, max(32 << 20, 128 * x.shape[0] * size))
    return usual + 1.25 * strip + 256 * x.shape[0] * size


SPECS = (
    OpSpec(
        operator=api.SUPCON_OP,
        public=api.supervised_contrastive_loss,
        reference=reference.supervised_contrastive_loss,
        paper="M3 Eq. 1",
        samples=supcon_samples,
        gradients=("z", "temperature"),
        float32_outputs=(0,),
        invariants=(order_does_not_matter, ignored_embeddings_are_as_if_removed, equal_embeddings_give_log_of_the_candidates),
        malformed=supcon_malformed,
        paths={"cpu": ("supcon.cpu",), "triton": ("supcon.triton", "supcon.triton.backward")},
        cases=(_supcon_case(1024), _supcon_case(8192, quick=False, target=15.0), _supcon_case(20000, quick=False, gpu=True)),
        sweeps=(Sweep("N", {n: _supcon_case(n) for n in (512, 1024, 2048, 4096)}, 2),),
        baselines=("eager",),
        flops=lambda z, *_, **__: 2.0 * z.shape[0] ** 2 * z.shape[1],
        bytes_moved=lambda z, *_, **__: 4.0 * z.numel(),
        peak_bytes=_supcon_peak,
        streaming=True,
    ),
    OpSpec(
        operator=api.INFO_NCE_OP,
        public=api.info_nce,
        reference=reference.info_nce,
        paper="M1 Eq. 6–8; M4 Eq. 3.1–3.5",
        samples=info_nce_samples,
        gradients=("x", "y", "temperature"),
        float32_outputs=(0,),
        invariants=(distinct_labels_are_the_plain_loss, exchange_of_the_sides_does_not_matter, mean_is_sum_over_anchors),
        malformed=info_nce_malformed,
        paths={
            "cpu": ("info_nce.cpu",),
            "triton": tuple(f"info_nce.triton{strip}{way}" for strip in ("", ".strip") for way in ("", ".backward")),
        },
        cases=(
            _info_nce_case(256, 128),
            _info_nce_case(1024, 128),
            _info_nce_case(4096, 128, quick=False, labels=True),
            _info_nce_case(16384, 128, quick=False, gpu=True),
        ),
        sweeps=(Sweep("N", {n: _info_nce_case(n, 128) for n in (256, 512, 1024, 2048)}, 2),),
        baselines=("info_nce_eager",),
        flops=lambda x, *_, **__: 2.0 * x.shape[0] ** 2 * x.shape[1],
        bytes_moved=lambda x, *_, **__: 8.0 * x.numel(),
        peak_bytes=_info_nce_peak,
        streaming=True,
    ),
)
