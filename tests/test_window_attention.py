"""What the shared matrix cannot hold: Swin's own arithmetic, and the exchange module."""

import pytest
import torch

import wsss_kernels as wk
from benchmarks.baselines import window_attention as swin


@pytest.mark.parametrize("shift", [0, 1, 3])
def test_agrees_with_swin(shift):
    query, key, value = torch.randn(3, 2, 12, 8, 6, dtype=torch.float64)
    options = {"num_heads": 3, "window_size": 4, "shift": shift, "bias": torch.randn(49, 3, dtype=torch.float64)}
    # Swin's mask subtracts 100 where ours excludes: e^-100 is below the resolution of float64
    torch.testing.assert_close(wk.window_attention(query, key, value, **options), swin.eager(query, key, value, **options))


def test_explain_names_the_library_for_global_attention():
    x = torch.rand(1, 3, 4, 8)
    assert "scaled_dot_product_attention" in str(wk.explain("window_attention", x, x, x, num_heads=2))
    assert "scaled_dot_product_attention" not in str(wk.explain("window_attention", x, x, x, num_heads=2, window_size=2))


def test_parameters_of_the_published_exchange():
    """M0 §1.4: two stages with two directions each have 4.244 M parameters."""
    stages = [wk.CrossAttentionExchange(dim, 4, kv_reduction=r) for dim, r in ((128, 4), (320, 2))]
    assert sum(p.numel() for stage in stages for p in stage.parameters()) == 4_244_480


@pytest.mark.parametrize("options", [{}, {"window_size": 3}, {"kv_reduction": 2}, {"residual": "target"}])
def test_exchange_module(options):
    module = wk.CrossAttentionExchange(8, 2, **options)
    primary, structural = torch.randn(2, 2, 6, 5, 8)
    for result in (results := module(primary, structural)):
        assert result.shape == primary.shape
    sum(r.square().sum() for r in results).backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("residual", ["query", "target"])
def test_residual(residual):
    """Without attention and Mix-FFN what is left is the skip."""
    module = wk.CrossAttentionExchange(8, 2, residual=residual)
    for block in (module.primary, module.structural):
        torch.nn.init.zeros_(block.project.weight)
        torch.nn.init.zeros_(block.contract.weight)
    primary, structural = torch.randn(2, 1, 4, 5, 8)
    new_primary, new_structural = module(primary, structural)
    swapped = residual == "query"
    assert torch.equal(new_primary, structural if swapped else primary)
    assert torch.equal(new_structural, primary if swapped else structural)


def test_mirrored_branches():
    """With the blocks exchanged, exchanged inputs give exchanged outputs."""
    module, mirror = wk.CrossAttentionExchange(8, 2, window_size=3), wk.CrossAttentionExchange(8, 2, window_size=3)
    mirror.primary.load_state_dict(module.structural.state_dict())
    mirror.structural.load_state_dict(module.primary.state_dict())
    primary, structural = torch.randn(2, 1, 4, 5, 8)
    for a, b in zip(module(primary, structural), reversed(mirror(structural, primary)), strict=True):
        torch.testing.assert_close(a, b)


def test_malformed_module():
    with pytest.raises(ValueError, match="kv_reduction needs window_size=None, got 2 and 4"):
        wk.CrossAttentionExchange(8, 2, window_size=4, kv_reduction=2)
    with pytest.raises(ValueError, match="residual must be one of 'query', 'target', got 'key'"):
        wk.CrossAttentionExchange(8, 2, residual="key")


@pytest.mark.parametrize(
    ("module", "arguments", "match"),
    [
        (wk.CrossAttentionExchange, {"dim": 7, "num_heads": 2}, "num_heads must divide dim"),
        (wk.CrossAttentionExchange, {"dim": 8, "window_size": 0}, "window_size must be at least 1"),
        (wk.MPFP, {"num_classes": 0}, "num_classes must be at least 1"),
        (wk.MPFP, {"num_classes": 2, "scales": ()}, "at least one scale"),
    ],
)
def test_modules_refuse_what_could_not_run(module, arguments, match):
    with pytest.raises(ValueError, match=f"{module.__name__}: .*{match}"):
        module(**arguments)
