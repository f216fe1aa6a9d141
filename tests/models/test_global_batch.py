"""Contrast over the global batch: two gloo processes with half the images each against one with all."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from wsss_models.cldf import decoder
from wsss_models.cldf.config import Decoder
from wsss_models.dusss import grounding, vlm
from wsss_models.dusss.config import Grounding, Vlm

COUNT = 6


def joint() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, COUNT, 5, generator=generator).double(), torch.randn(5, 4, generator=generator).double()


def dusss_loss(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    views = [vlm.Embedding(v @ weight, v @ weight, (v @ weight).exp(), (v @ weight)[:, None], torch.ones(len(v), 1).double()) for v in x]
    return vlm.vlm_loss((*views, torch.tensor(0.3).double()), Vlm())["loss"]


def grounding_loss(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    decoder = grounding.GroundingDecoder(4, Grounding(blocks=0)).double()
    patches = torch.stack([x[0], x[1], x[2], -x[1]], dim=1) @ weight
    return grounding.text_guided_loss(decoder, patches, x[3, :, :4])


def cldf_loss(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    z = (x[0] @ weight).float()
    return decoder.contrastive_loss(z, (x[1, :, 0] > 0).long(), Decoder())


LOSSES = {"dusss": dusss_loss, "grounding": grounding_loss, "cldf": cldf_loss}


def work(rank: int, port: int, name: str, results) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        x, weight = joint()
        rows = slice(0, 4) if rank == 0 else slice(4, COUNT)
        weight.requires_grad_()
        loss = LOSSES[name](x[:, rows], weight)
        loss.backward()
        dist.all_reduce(weight.grad)
        results[rank] = (loss.item(), (weight.grad / 2).tolist())
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", LOSSES)
def test_two_processes_equal_one(name):
    x, weight = joint()
    weight.requires_grad_()
    wanted = LOSSES[name](x, weight)
    wanted.backward()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(work, args=(port, name, results), nprocs=2)
        results = dict(results)
    for rank in range(2):
        loss, gradient = (torch.tensor(t, dtype=torch.float64) for t in results[rank])
        torch.testing.assert_close(loss, wanted.detach().double(), rtol=1e-5, atol=0)
        torch.testing.assert_close(gradient, weight.grad, rtol=1e-4, atol=1e-6)
