"""Affinities, Sinkhorn and the random walk beyond the shared matrix: golden vectors, memory at large N, strided maps."""

import pytest
import torch
from conftest import golden, load

import wsss_kernels as wk
from wsss_kernels import registry
from wsss_kernels.bench.timing import Gate, bind
from wsss_kernels.ops.random_walk.api import STREAMING_FROM
from wsss_kernels.testing import cast, peak_memory, runnable_backends, threads

MIB = 2**20
BACKENDS = [*runnable_backends(registry.spec("random_walk")), ("reference", "cpu")]


def close(actual, wanted, relative):
    torch.testing.assert_close(actual.cpu().double(), wanted.double(), rtol=0, atol=relative * float(wanted.abs().max()))


def where(op, backend):
    """The backend, if the operator has it; otherwise whatever runs there."""
    return backend if backend in (*registry.spec(op).backends, "reference") else None


@pytest.mark.parametrize("file", golden("walk_*.npz"))
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_golden(file, backend, device):
    data = {name: value.double().to(device) for name, value in load(file).items() if isinstance(value, torch.Tensor)}
    maps, decoder, cam = data["attention"][None], data["decoder_feature"][None], data["cam"]
    for signed, suffix in ((False, "abs"), (True, "signed")):
        options = {"encoder_is": "affinity", "signed": signed, "clamp_min": None}
        result = wk.refining_map(decoder, maps, **options, backend=where("refining_map", backend))
        close(result.deviation[0], data[f"deviation_{suffix}"].cpu(), 1e-8)
        assert torch.equal(result.gate[0], data[f"gate_{suffix}"].bool())
        refined = wk.random_walk(result.matrix[0], cam, data["box_mask"], backend=backend)
        close(refined, data[f"refined_{suffix}"].cpu(), 1e-4)  # the release divides by count + 1e-5
        options["backend"] = where("affinity_random_walk", backend)
        for streaming in (False, True):
            whole = wk.affinity_random_walk(cam[None], decoder, maps, data["box_mask"][None], streaming=streaming, **options)
            close(whole[0], refined.cpu(), 1e-12)
    normalised = wk.sinkhorn(data["attention"].mean(0), backend=backend)
    close(normalised.sum(1), data["sinkhorn_rows"].cpu(), 1e-8)
    close(normalised.sum(0), data["sinkhorn_cols"].cpu(), 1e-8)
    close(normalised[:8], data["sinkhorn_sample"].cpu(), 1e-8)


def large(n, layers=2, channels=16, classes=2):
    g = torch.Generator().manual_seed(0)
    cam = torch.rand(1, classes, n // 128, 128, generator=g)
    return cam, torch.randn(1, channels, n, generator=g) / 4, torch.randn(1, layers, channels, n, generator=g) + 0.2


@pytest.mark.parametrize(("backend", "device"), [p for p in BACKENDS if p[0] == "cpu"])
def test_streaming_stays_small(backend, device):
    """At N = 16384 one N×N matrix would take 1 GiB. Forward and backward."""
    call = [t.requires_grad_() for t in large(16384)]
    options = {"streaming": True, "sinkhorn_iter": 1, "power": 1, "backend": backend}

    def run():
        result = wk.affinity_random_walk(*call, **options)
        return result.detach(), torch.autograd.grad(result.sum(), call)

    peak, (result, grads) = peak_memory(run)
    assert peak < 200 * MIB, f"{peak / MIB:.0f} MiB"
    assert result.isfinite().all() and all(g.isfinite().all() and g.any() for g in grads)


@pytest.mark.parametrize(("backend", "device"), [p for p in BACKENDS if p[0] == "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_streaming_reads_maps_in_place(backend, device, dtype):
    """Slices of larger maps, and half-precision maps: no copy, the same bits as from a dense float32 copy."""
    n = 1024
    whole = torch.rand(1, 3, n + 8, n + 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    maps, cam = whole[:, 1:, 3 : n + 3, 5 : n + 5], torch.rand(1, 2, 32, 32).to(dtype)
    options = {"encoder_is": "affinity", "streaming": True, "backend": backend}
    peak, result = peak_memory(lambda: wk.affinity_random_walk(cam, None, maps, **options))
    assert peak < 2 * MIB < maps.numel() * maps.element_size()
    dense = wk.affinity_random_walk(cam.float(), None, maps.float().contiguous(), **options)
    assert torch.equal(result, dense.to(dtype))


@pytest.mark.parametrize(("backend", "device"), [p for p in BACKENDS if p[0] == "cpu"])
def test_bits_do_not_depend_on_threads(backend, device):
    """Streaming, where every pass computes its strips."""
    call = [t.requires_grad_() for t in large(1024, channels=40)]
    found = []
    for count in (2, 1, 2):
        with threads(count):
            result = wk.affinity_random_walk(*call, streaming=True, backend=backend)
            found.append([result.detach(), *torch.autograd.grad(result.sum(), call)])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_the_choice_of_streaming_is_explained():
    n = STREAMING_FROM
    cam, encoder = torch.empty(1, 1, n // 64, 64, device="meta"), torch.empty(1, 1, 4, n, device="meta")
    assert "streaming=None, N = 8192 ≥ 8192" in str(wk.explain(wk.affinity_random_walk, cam, None, encoder))
    assert "stored" in str(wk.explain(wk.affinity_random_walk, cam[:, :, :4], None, encoder[..., :256]))
    assert "streaming=True" in str(wk.explain(wk.affinity_random_walk, cam[:, :, :4], None, encoder[..., :256], streaming=True))


def test_chosen_streaming_equals_stored():
    cam, decoder, encoder = large(STREAMING_FROM, layers=1, channels=4, classes=1)
    options = {"sinkhorn_iter": 1, "power": 1}
    with torch.no_grad():
        chosen = wk.affinity_random_walk(cam, decoder, encoder, **options)
        assert torch.equal(chosen, wk.affinity_random_walk(cam, decoder, encoder, streaming=False, **options))


def test_a_dead_row_costs_no_gradient():
    """Neither a NaN nor a gradient reaches entries of empty rows and columns; the others have theirs."""
    affinity = torch.rand(1, 9, 9, dtype=torch.float64) + 0.1
    affinity[:, 2], affinity[:, :, 4] = 0, 0
    affinity.requires_grad_()
    wk.random_walk(affinity, torch.rand(1, 2, 3, 3, dtype=torch.float64)).square().sum().backward()
    grad = affinity.grad[0]
    assert not grad[2].any() and not grad[:, 4].any() and grad.isfinite().all() and grad.any()


def test_many_threads_of_small_matrices_agree_with_one_by_one():
    matrix = torch.rand(33, 17, 17)
    assert torch.equal(wk.sinkhorn(matrix), torch.stack([wk.sinkhorn(m) for m in matrix]))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_directions_of_the_shortest_vectors(backend, device):
    """Reciprocal lengths beyond float32 (whose gradients are too: hence no sample of the matrix)."""
    feature = torch.randn(2, 7, 13, generator=torch.Generator().manual_seed(0)).bfloat16().float().to(device)
    short = feature * 2.0**-130
    torch.testing.assert_close(
        wk.cosine_affinity(short, backend=backend), wk.cosine_affinity(short.double(), backend="reference").float(), rtol=0, atol=1e-6
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="the sums of the CPU kernels")
def test_sums_of_a_long_row_keep_their_digits():
    """Features with a common direction add up what the sums over N = 784 tokens lose: the encoder's gradient shows it."""
    spec = registry.spec("affinity_random_walk")
    case = next(c for c in spec.cases if c.name == "n784_l6_k5_c768")
    args, kwargs = cast(case.make(), torch.float32)
    results = bind(spec, lambda *a, **k: spec.public(*a, **k, backend="cpu"), args, kwargs, "forward+backward")()
    assert Gate(spec, case, "forward+backward").check("ours", results) < 1
