"""The gradient of a large batch in the memory of a small one (GradCache; Gao et al. 2021, arXiv:2101.06983).

A loss over a batch's statistics cannot be accumulated over parts of it: the mean of the parts' losses is another
loss. But given the gradient of the loss with respect to each embedding, the parts are independent.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

Result = TypeVar("Result")


def backward_in_parts(
    module: nn.Module,
    parts: Sequence[Tensor],
    embed: Callable[[Tensor], Tensor],
    loss_of: Callable[[list[Tensor]], Result],
    backward: Callable[[Result], None],
) -> Result:
    """Gradients of a loss over all parts, with the activations of one part at a time in memory.

    Each part is embedded twice, without a graph for the loss and with one for the gradient. Everything equals one pass
    over the concatenated parts, random numbers aside: dropout draws the same in both passes, but not what it would for
    the whole batch. The exception is batch normalisation *inside* `module`, which sees one part at a time; in
    what `loss_of` runs, such as an expander, it sees the whole batch. Running statistics are updated by one of the two
    passes only.

    Collective where `module` or the loss is, in which case all ranks bring equally many parts. Under
    DistributedDataParallel, call it within `no_sync()`, and `jepa.collectives.average_gradients` afterwards.

    Args:
        module: what `embed` runs; its buffers are those that are protected.
        parts: inputs of `embed`.
        embed: a part to its embeddings, differentiable in `module`'s parameters.
        loss_of: the embeddings of all parts to the loss, together with whatever else the caller wants to know.
        backward: the caller's backward pass from what `loss_of` returned.

    Returns:
        What `loss_of` returned.
    """
    devices = sorted({part.get_device() for part in parts if part.is_cuda})
    buffers = [buffer.clone() for buffer in module.buffers()]
    random_states, leaves = [], []
    with torch.no_grad():
        for part in parts:
            random_states.append((torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in devices]))
            leaves.append(embed(part).detach().requires_grad_())
        for buffer, before in zip(module.buffers(), buffers, strict=True):
            buffer.copy_(before)

    result = loss_of(leaves)
    backward(result)

    with torch.random.fork_rng(devices):  # afterwards, random numbers go on from the loss
        for part, leaf, (cpu_state, cuda_states) in zip(parts, leaves, random_states, strict=True):
            torch.set_rng_state(cpu_state)
            for device, state in zip(devices, cuda_states, strict=True):
                torch.cuda.set_rng_state(state, device)
            embed(part).backward(leaf.grad)
    return result
