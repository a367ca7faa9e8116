"""Sums and rows over all ranks, differentiable; in one process they do nothing.

Convention: every rank computes the same loss L of the whole batch. What is differentiated is the *sum* of all
ranks' losses, R x L for R ranks, so the backward pass of each collective adds up what all ranks say about its input.
The gradients that a rank then finds are those of R x L with respect to what the rank itself computed; the average
over ranks, which DistributedDataParallel (or `average_gradients`) takes, adds the ranks up and divides by R: the
gradients of one process with the whole batch. Nothing here is a mean over ranks, so ranks may bring unequally many
rows, or none.

`torch.distributed`'s own operations, and `accelerator.gather`, drop gradients.

All functions are collective where several processes run: all ranks call them in the same order. In the backward pass
that order is that of the graph, the same on all ranks when they run the same code.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor, nn


def world_size() -> int:
    """How many ranks there are; 1 where `torch.distributed` has not been started."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of the ranks' tensors, of one shape, on all of them."""
    return tensor if world_size() == 1 else _Sum.apply(tensor)


def rows_of_ranks(count: int, device: torch.device) -> list[int]:
    """The `count` of each rank, in rank order. With several ranks the host waits for the device."""
    if world_size() == 1:
        return [count]
    counts = [torch.empty(1, dtype=torch.int64, device=device) for _ in range(world_size())]
    distributed.all_gather(counts, torch.tensor([count], device=device))
    return torch.cat(counts).tolist()


def gather_rows(local: Tensor, rows: Sequence[int] | None = None) -> Tensor:
    """The ranks' rows below each other, in rank order, on all ranks.

    Args:
        local: (N_r, D), where N_r may differ between ranks and may be 0.
        rows: N_r of each rank where the caller has them already, from `rows_of_ranks`.

    Returns:
        (sum of N_r, D).
    """
    if world_size() == 1:
        return local
    return _Gather.apply(local, rows or rows_of_ranks(len(local), local.device))


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients over ranks, in one all-reduce: what DistributedDataParallel does, when it was kept from it.

    A missing gradient counts as zero, because the others may have one (a rank without rows has none); afterwards every
    trainable parameter has one.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if world_size() == 1 or not trainable:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trainable]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= world_size()
    for parameter, gradient, average in zip(
        trainable, gradients, flat.split([g.numel() for g in gradients]), strict=True
    ):
        parameter.grad = gradient.copy_(average.view_as(gradient))


def _all_reduced(tensor: Tensor) -> Tensor:
    # A copy: gradients that autograd hands over may be shared, or expanded views of a single number.
    total = tensor.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(total)
    return total


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, local: Tensor) -> Tensor:
        return _all_reduced(local)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        return _all_reduced(gradients[0])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, local: Tensor, rows: Sequence[int]) -> Tensor:
        context.rows = rows
        # Backends exchange tensors of one size: short ranks are padded, and the padding is cut away.
        padded = local.new_zeros(max(rows), *local.shape[1:])
        padded[: len(local)] = local
        gathered = [torch.empty_like(padded) for _ in rows]
        distributed.all_gather(gathered, padded)
        return torch.cat([part[:count] for part, count in zip(gathered, rows, strict=True)])

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _all_reduced(gradients[0]).split(context.rows)[distributed.get_rank()], None
