"""Gradients in parts: random numbers, buffers, memory. That losses and gradients are right is in test_ranks.py."""

import pytest
import torch
from torch import nn

from jepa.cached_gradients import backward_in_parts


def make_module():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 5, bias=False))
    return module, torch.randn(22, 4).split(8)


def loss_of(embeddings):
    """Not a sum over parts, and with dropout of its own."""
    return nn.functional.dropout(torch.cat(embeddings).T @ torch.cat(embeddings), 0.5).square().sum()


def gradients(module):
    return [parameter.grad for parameter in module.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_one_graph_over_the_parts(dtype):
    # Autocast around everything, as a caller may have it: it remembers cast weights.
    whole, parts = make_module()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        expected = loss_of([whole(part) for part in parts])
        expected.backward()
    following = torch.rand(3)

    module, parts = make_module()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = backward_in_parts(module, parts, module, loss_of, lambda loss: loss.backward())
    assert torch.equal(torch.rand(3), following)
    assert torch.equal(loss, expected)
    for ours, theirs in zip(gradients(module), gradients(whole), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5 if dtype == torch.float32 else 0.05, atol=1e-4)
    for ours, theirs in zip(module.buffers(), whole.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_one_part_is_in_memory_at_a_time():
    module, parts = make_module()
    alive, most = set(), 0

    def pack(tensor):
        nonlocal most
        handle = object()
        alive.add(id(handle))
        most = max(most, len(alive))
        return handle, tensor, Release(alive, id(handle))

    class Release:
        def __init__(self, alive, key):
            self.alive, self.key = alive, key

        def __del__(self):
            self.alive.discard(self.key)

    def embed(part):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed[1]):
            return module(part)

    backward_in_parts(module, parts[:1], embed, loss_of, lambda loss: loss.backward())
    for_one = most
    assert for_one > 0
    backward_in_parts(module, parts, embed, loss_of, lambda loss: loss.backward())
    assert most == for_one
    sum(embed(part).sum() for part in parts)
    assert most > for_one


def test_what_comes_after_learns_too():
    module, parts = make_module()
    head = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6))
    result = backward_in_parts(
        module,
        parts,
        module,
        lambda embeddings: {"loss": head(torch.cat(embeddings)).pow(3).sum(), "more": len(embeddings)},
        lambda result: (2 * result["loss"]).backward(),
    )
    assert result["more"] == 3
    assert head[1].num_batches_tracked == 1  # of the whole batch
    assert module[1].num_batches_tracked == 3  # once a part
    assert all(gradient.abs().max() > 0 for gradient in gradients(head)[:1] + gradients(module)[:1])
