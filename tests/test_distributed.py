"""Two gloo processes against one with the joint batch."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import wsss_kernels as wk
from wsss_kernels.distributed import gather_with_grad

SHARDS = {"equal": (4, 4), "ragged": (5, 2), "one empty": (6, 0)}


def joint(count: int):
    g = torch.Generator().manual_seed(3)
    x, y = (torch.randn(count, 6, generator=g, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(6, 5, generator=g, dtype=torch.float64)
    return x, y, torch.randint(3, (count,), generator=g), weight


def loss_of(x, y, label, weight, gather):
    return wk.info_nce(gather(x @ weight), gather(y @ weight), 0.2, label=gather(label))


def work(rank: int, port: int, shards: tuple[int, int], results):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        x, y, label, weight = joint(sum(shards))
        rows = slice(sum(shards[:rank]), sum(shards[: rank + 1]))
        x = x[rows].clone().requires_grad_()
        weight.requires_grad_()
        loss = loss_of(x, y[rows], label[rows], weight, gather_with_grad)
        loss.backward()
        dist.all_reduce(weight.grad)  # what DistributedDataParallel does
        results[rank] = (loss.item(), (weight.grad / 2).tolist(), (x.grad / 2).tolist())
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("shards", SHARDS.values(), ids=SHARDS.keys())
def test_loss_and_gradients_of_the_joint_batch(shards):
    x, y, label, weight = joint(sum(shards))
    x.requires_grad_()
    weight.requires_grad_()
    wanted = loss_of(x, y, label, weight, lambda t: t)
    wanted.backward()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(work, args=(port, shards, results), nprocs=2)
        results = dict(results)
    for rank in range(2):
        loss, weight_grad, x_grad = (torch.tensor(t, dtype=torch.float64) for t in results[rank])
        rows = slice(sum(shards[:rank]), sum(shards[: rank + 1]))
        torch.testing.assert_close(loss, wanted.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(weight_grad, weight.grad, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(x_grad.view(-1, 6), x.grad[rows], rtol=1e-10, atol=1e-13)


def test_without_a_process_group():
    x = torch.rand(3, 4, requires_grad=True)
    assert gather_with_grad(x) is x and wk.distributed.gather_with_grad is gather_with_grad


def test_malformed():
    with pytest.raises(TypeError, match="gather_with_grad: tensor must be a tensor, got 1"):
        gather_with_grad(1)
    with pytest.raises(ValueError, match="gather_with_grad: tensor must have at least one dimension"):
        gather_with_grad(torch.tensor(1.0))
