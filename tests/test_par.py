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
