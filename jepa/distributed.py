"""Sums over all ranks, differentiable; in one process they do nothing.

Convention: every rank computes the same loss of the whole batch, and the *sum* of the ranks' losses is differentiated.
The backward pass of a sum over ranks is therefore a sum over ranks again, and the average over ranks that
DistributedDataParallel takes is the gradient of one process with the whole batch. All ranks bring equally many rows,
and call these functions in the same order.

`torch.distributed`'s own operations drop gradients, and `torch.distributed.nn` is deprecated.
"""

from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor


def world_size() -> int:
    """Number of ranks; 1 where `torch.distributed` has not been started."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum of the ranks' tensors, of one shape, on all of them."""
    return tensor if world_size() == 1 else _Sum.apply(tensor)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, local: Tensor) -> Tensor:
        # A copy: gradients that autograd hands over may be shared, or expanded views of a single number.
        total = local.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Any:
        return sum_over_ranks(gradients[0])
