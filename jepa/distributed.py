"""Sums and rows over all ranks, differentiable; in one process they do nothing.

Convention: every rank computes the same loss of the whole batch, and the *sum* of the ranks' losses is differentiated.
The backward pass of a sum over ranks is therefore a sum over ranks again, and the average over ranks that
DistributedDataParallel takes is the gradient of one process with the whole batch. All ranks bring equally many rows.

`torch.distributed`'s own operations drop gradients, and `torch.distributed.nn` is deprecated. All ranks call these
functions in the same order.
"""

from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor


def world_size() -> int:
    """Number of ranks; 1 where `torch.distributed` has not been started."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Number of this process among the ranks; 0 where there is only one."""
    return distributed.get_rank() if world_size() > 1 else 0


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum of the ranks' tensors, of one shape, on all of them."""
    return tensor if world_size() == 1 else _Sum.apply(tensor)


def gather_rows(local: Tensor) -> Tensor:
    """Rows of all ranks below each other, (N, ...) -> (ranks x N, ...)."""
    if world_size() == 1:
        return local
    places = local.new_zeros(world_size(), *local.shape)
    places[rank()] = local
    # Where one rank has a row the others have zeros: the sum is exact, and is its own backward pass.
    return sum_over_ranks(places).flatten(0, 1)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, local: Tensor) -> Tensor:
        return _all_reduced(local)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        return _all_reduced(gradients[0])


def _all_reduced(tensor: Tensor) -> Tensor:
    # A copy: gradients that autograd hands over may be shared, or expanded views of a single number.
    total = tensor.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(total)
    return total
