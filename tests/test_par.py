"""What the shared matrix cannot hold: the modules of the released code and their checkpoints."""

import pytest
import torch

import wsss_kernels as wk


def test_par_module():
    image, mask = torch.rand(2, 3, 12, 10), torch.rand(2, 4, 6, 5)
    module = wk.PAR(num_iter=3, dilations=[1, 2])
    assert torch.equal(module(image, mask), wk.par(image, mask, (1, 2), 3))
    assert wk.PAR([1, 2], 3, resize="image")(image, mask).shape == mask.shape
    assert {k: tuple(v.shape) for k, v in module.state_dict().items()} == {"kernel": (8, 1, 3, 3)}


def test_pamr_module():
    image, mask = torch.rand(2, 3, 12, 10), torch.rand(2, 4, 6, 5)
    module = wk.PAMR(3, [1, 2])
    assert torch.equal(module(image, mask), wk.par(image, mask, (1, 2), 3, variant="pamr"))
    shapes = {"aff_x.kernel": (8, 1, 3, 3), "aff_m.kernel": (8, 1, 3, 3), "aff_std.kernel": (9, 1, 3, 3)}
    assert {k: tuple(v.shape) for k, v in module.state_dict().items()} == shapes
    assert module.aff_x.kernel.sum() == 0 and module.aff_std.kernel.sum() == 9


@pytest.mark.parametrize("module", [wk.PAR([1], 2), wk.PAMR()])
def test_checkpoints(module):
    state = {k: v.clone() for k, v in module.state_dict().items()}
    module.load_state_dict(state)
    key = next(iter(state))
    with pytest.raises(RuntimeError, match="other neighbour weights"):
        module.load_state_dict({**state, key: state[key] + 1})


def test_dilations_beyond_the_map_cost_nothing_wrong():
    image, mask = torch.rand(1, 3, 2, 3, dtype=torch.float64), torch.rand(1, 1, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(wk.par(image, mask, (1000,), 2), wk.par(image, mask, (1000,), 2, backend="reference"))


@pytest.mark.parametrize("module", [wk.PAR, lambda dilations, num_iter: wk.PAMR(num_iter, dilations)], ids=["PAR", "PAMR"])
def test_modules_check_what_they_are_constructed_with(module):
    with pytest.raises(ValueError, match="dilations must hold at least one dilation"):
        module([], 3)
    with pytest.raises(ValueError, match="every dilation must be at least 1, got 0"):
        module([1, 0], 3)
    with pytest.raises(ValueError, match="num_iter must be at least 0, got -1"):
        module([1], -1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("resize", ["mask", "image"])
def test_strided_half_tensors_are_read_in_place(dtype, resize):
    image = torch.rand(2, 12, 3, 10).to(dtype).permute(0, 2, 1, 3)
    mask = torch.rand(1, 4, 7, 6).to(dtype)[:, :, ::2, 1:].expand(2, -1, -1, -1)
    result = wk.par(image, mask, (1, 3), 2, resize=resize)
    truth = wk.par(image.double(), mask.double(), (1, 3), 2, resize=resize, backend="reference")
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), truth, rtol=4 * torch.finfo(dtype).eps, atol=1e-3)


@pytest.mark.parametrize("size", [(9, 4), (1, 1), (40, 3)])
def test_gradient_of_a_resized_mask(size):
    image, mask = torch.rand(1, 3, 12, 13, dtype=torch.float64), torch.rand(1, 2, *size, dtype=torch.float64)
    cotangent = torch.randn(1, 2, 12, 13, dtype=torch.float64)
    grads = []
    for backend in (None, "reference"):
        leaf = mask.clone().requires_grad_()
        grads.append(torch.autograd.grad(wk.par(image, leaf, (1, 30), 2, backend=backend), leaf, cotangent)[0])
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


def test_more_dilations_and_larger_ones_than_a_kernel_argument_holds():
    image, mask = torch.rand(1, 1, 2, 3, dtype=torch.float64), torch.rand(1, 1, 2, 3, dtype=torch.float64)
    for dilations in (range(1, 201), (1, 2**31 - 1)):
        torch.testing.assert_close(wk.par(image, mask, dilations, 2), wk.par(image, mask, dilations, 2, backend="reference"))
