"""The global batch in a process group, for losses that compare every sample with every other."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from . import _args
from ._once import once_differentiable


def _gathered(tensor: Tensor, sizes: list[int], group) -> Tensor:
    """Shards padded to the longest, since collectives want equal shapes."""
    longest = max(sizes)
    padded = tensor.new_zeros(longest, *tensor.shape[1:])
    padded[: tensor.shape[0]] = tensor
    shards = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(shards, padded, group=group)
    return torch.cat([shard[:size] for shard, size in zip(shards, sizes, strict=True)])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, sizes, group):
        rank = dist.get_rank(group)
        ctx.group, ctx.rows = group, slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        return _gathered(tensor, sizes, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        total = grad.contiguous().clone()  # the engine may still use grad
        dist.all_reduce(total, group=ctx.group)
        return total[ctx.rows].clone(), None, None


def gather_with_grad(tensor: Tensor, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """The shards of all processes, one after the other in the order of their ranks, with gradients back to each.

    Every process then computes the loss of the whole batch. The gradient of a shard is the sum over the processes of what
    their losses give it, so that `DistributedDataParallel`, which averages the gradients of the parameters over the
    processes, arrives at those of one process with the whole batch.

    Args:
        tensor: `Tensor[n, ...]`, any dtype; n may differ between the processes, the other dimensions may not. Integer tensors
            (labels) are gathered without gradient.
        group: a process group; `None` is the default group.

    Returns:
        `Tensor[Σ n, ...]`, the same on every process. Without a process group, or in one of a single process, `tensor` itself.

    Gradient: with respect to `tensor`. All processes must take part in forward and backward pass, also those with n = 0.

    Raises:
        TypeError: not a tensor.
        ValueError: a tensor without dimensions.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"gather_with_grad: tensor must be a tensor, got {_args.describe(tensor)}")
    if tensor.dim() == 0:
        raise ValueError(f"gather_with_grad: tensor must have at least one dimension, got {_args.describe(tensor)}")
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return tensor
    mine = torch.tensor([tensor.shape[0]], device=tensor.device)
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, mine, group=group)
    sizes = [int(n) for n in every]
    if tensor.is_floating_point():
        return _Gather.apply(tensor, sizes, group)
    return _gathered(tensor, sizes, group)
