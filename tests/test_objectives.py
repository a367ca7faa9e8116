"""VICReg against an independent implementation of the published formulas, and N ranks against one."""

import math
import os

import numpy as np
import pytest
import torch
import torch.distributed as distributed
import torch.multiprocessing as multiprocessing

from jepa.objectives import VICRegConfig, vicreg


def reference(first: np.ndarray, second: np.ndarray, config: VICRegConfig) -> float:
    """The authors' published code, written out feature by feature in float64."""
    samples, features = first.shape
    invariance = sum((a - b) ** 2 for a, b in zip(first.ravel(), second.ravel(), strict=True)) / (samples * features)
    variance = covariance = 0.0
    for view in (first, second):
        centred = view - view.mean(axis=0)
        for j in range(features):
            std = math.sqrt((centred[:, j] ** 2).sum() / (samples - 1) + config.epsilon)
            variance += max(0.0, config.margin - std) / features / 2
            for k in range(features):
                if j != k:
                    covariance += ((centred[:, j] * centred[:, k]).sum() / (samples - 1)) ** 2 / features
    return (
        config.variance_weight * variance
        + config.invariance_weight * invariance
        + config.covariance_weight * covariance
    )


@pytest.mark.parametrize("config", [VICRegConfig(), VICRegConfig(1.0, 2.0, 3.0, margin=2.0, epsilon=1e-2)])
def test_equals_the_reference(config):
    generator = np.random.default_rng(0)
    first = generator.normal(size=(12, 5)) * generator.uniform(0.3, 2, size=5)
    second = first + 0.3 * generator.normal(size=(12, 5))
    ours = vicreg(torch.from_numpy(first), torch.from_numpy(second), config)
    assert ours.loss.item() == pytest.approx(reference(first, second, config), rel=1e-10)


def test_gradient_equals_the_reference():
    generator = np.random.default_rng(1)
    first, second = generator.normal(size=(2, 6, 3)) * 0.8
    config = VICRegConfig()
    leaf = torch.from_numpy(first.copy()).requires_grad_()
    vicreg(leaf, torch.from_numpy(second), config).loss.backward()
    for i, j in [(0, 0), (3, 1), (5, 2)]:
        moved = first.copy()
        moved[i, j] += 1e-6
        up = reference(moved, second, config)
        moved[i, j] -= 2e-6
        slope = (up - reference(moved, second, config)) / 2e-6
        assert leaf.grad is not None
        assert leaf.grad[i, j].item() == pytest.approx(slope, rel=1e-5, abs=1e-7)


def test_half_precision_views_are_measured_in_float32():
    first, second = torch.randn(2, 64, 8).bfloat16()
    terms = vicreg(first, second, VICRegConfig())
    assert terms.loss.dtype == torch.float32
    assert terms.loss.item() == pytest.approx(vicreg(first.float(), second.float(), VICRegConfig()).loss.item())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = vicreg(first.float(), second.float(), VICRegConfig())
    assert under_autocast.loss.item() == pytest.approx(terms.loss.item(), rel=1e-6)


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match="must be"):
        vicreg(torch.randn(4, 3), torch.randn(4, 2), VICRegConfig())
    with pytest.raises(ValueError, match="batch of 1"):
        vicreg(torch.randn(1, 3), torch.randn(1, 3), VICRegConfig())


def _views() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    first = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    return first, first + 0.2 * torch.randn(8, 6, generator=generator, dtype=torch.float64)


def _train_step(rank: int, ranks: int, address: str, queue: multiprocessing.SimpleQueue) -> None:
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=ranks)
    torch.manual_seed(0)
    layer = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(6, 4, dtype=torch.float64))
    first, second = (view.chunk(ranks)[rank] for view in _views())
    outputs = layer(torch.cat([first, second]))
    loss = vicreg(*outputs.chunk(2), VICRegConfig()).loss
    loss.backward()
    queue.put((loss.item(), layer.module.weight.grad.tolist()))
    distributed.barrier()
    # As `run_stage` does: gloo's threads may abort an interpreter that shuts down.
    os._exit(0)


def test_two_ranks_equal_one(tmp_path):
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 4, dtype=torch.float64)
    loss = vicreg(*layer(torch.cat(_views())).chunk(2), VICRegConfig()).loss
    loss.backward()
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    multiprocessing.start_processes(
        _train_step, args=(2, f"file://{tmp_path}/rendezvous", queue), nprocs=2, start_method="spawn"
    )
    for _ in range(2):
        their_loss, their_gradient = queue.get()
        assert their_loss == pytest.approx(loss.item(), rel=1e-10)
        assert torch.allclose(torch.tensor(their_gradient, dtype=torch.float64), layer.weight.grad, rtol=1e-10)
