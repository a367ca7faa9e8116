"""The processes that were started, the memory that they need, and the line that says so."""

import multiprocessing
import re
import resource
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from data.views import ViewsConfig, make_views
from jepa.encoder import EncoderConfig, FrameEncoder
from jepa.expander import Expander, ExpanderConfig
from jepa.objectives import ObjectiveConfig, objective
from jepa.predictor import Predictor, PredictorConfig
from pipelines import compute
from pipelines.compute import (
    ComputeConfig,
    MemoryEstimate,
    cores_of_this_process,
    describe_devices,
    memory_capacity,
    memory_in_use,
    start_accelerator,
)
from pipelines.optimizer import OptimizerConfig, make_optimizer
from pipelines.pretrain_encoder import Pretraining
from pipelines.stage import UserError
from pipelines.train_predictor import Losses, example_inputs

CPU = torch.device("cpu")
FP32 = SimpleNamespace(mixed_precision="no")
BF16 = SimpleNamespace(mixed_precision="bf16")


FORKS = multiprocessing.get_context("forkserver")
pytestmark = pytest.mark.usefixtures("forks")


@pytest.fixture
def fresh():
    """As at the start of a process; accelerate keeps its state for as long as that lives."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def make_network(backbone, size, frozen=False):
    pooling = "flatten" if backbone == "small_conv" else "average"
    config = EncoderConfig(backbone, image_size=(size, size), pooling=pooling, frozen_backbone=frozen)
    return Pretraining(FrameEncoder(config), Expander(64, ExpanderConfig()))


def estimate(network, size, precision=FP32, samples=2):
    return MemoryEstimate.of(network, torch.zeros(2 * samples, 3, size, size), samples, precision)


def train_twice(backbone, size, samples, half, frozen, answer):
    """In a process of its own, so that nobody else's memory is counted or used again."""
    torch.manual_seed(0)
    network, generator = make_network(backbone, size, frozen).train(), torch.Generator().manual_seed(0)
    optimizer = make_optimizer(network, OptimizerConfig())
    for _ in range(2):
        frames = torch.randint(0, 255, (samples, 3, size, size), dtype=torch.uint8)
        views = make_views(frames, frames, ViewsConfig(), generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            _, outputs = network(torch.cat(views))
        first, second = outputs.float().chunk(2)
        objective(first, second, ObjectiveConfig(), generator).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    answer.send(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def peaks(*arguments, batches):
    """The most memory that training with each of two batches takes, side by side."""
    backbone, size, half, frozen = arguments
    answers = []
    for samples in batches:
        ours, theirs = FORKS.Pipe(duplex=False)
        FORKS.Process(target=train_twice, args=(backbone, size, samples, half, frozen, theirs), daemon=True).start()
        theirs.close()
        answers.append(ours)
    return [answer.recv() for answer in answers]


@pytest.mark.parametrize(
    ("backbone", "size", "precision", "frozen", "batches"),
    [
        ("small_conv", 64, FP32, False, (64, 192)),
        ("resnet18", 64, FP32, False, (8, 32)),
        ("resnet18", 64, FP32, True, (16, 64)),
        ("vit_tiny_patch16_224", 64, BF16, False, (16, 48)),
    ],
    ids=["small_conv", "resnet18", "resnet18_frozen", "vit_tiny_bf16"],
)
def test_the_estimate_is_what_training_takes(backbone, size, precision, frozen, batches):
    low, high = peaks(backbone, size, precision is BF16, frozen, batches=batches)
    measured = (high - low) / (batches[1] - batches[0])
    assert 0.5 < estimate(make_network(backbone, size, frozen), size, precision).per_sample / measured < 2


def test_estimating_leaves_no_trace():
    torch.manual_seed(0)
    network = make_network("small_conv", 32)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.get_rng_state()
    with torch.random.fork_rng():
        one = estimate(nn.Sequential(network, Dropouts()), 32)
    assert torch.equal(torch.get_rng_state(), state)
    assert one == estimate(nn.Sequential(network, Dropouts()), 32)
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert network.training
    assert all(weight.grad is None for weight in network.parameters())


class Dropouts(nn.Module):
    """Draws random numbers."""

    def forward(self, embeddings_and_outputs):
        return nn.functional.dropout(embeddings_and_outputs[1])


def test_the_estimate_counts_weights_once_and_samples_each():
    two, eight = (estimate(make_network("resnet18", 64), 64, BF16, samples) for samples in (2, 8))
    assert two.fixed == eight.fixed
    # Copies of the weights in half precision would make it 11 MB for each sample, or 3.
    assert two.per_sample == pytest.approx(eight.per_sample, rel=0.02)
    assert 1.3 < estimate(make_network("resnet18", 64), 64).per_sample / two.per_sample < 2.2
    trained, frozen = (make_network("resnet18", 64, frozen) for frozen in (False, True))
    weights = sum(weight.nbytes for weight in trained.parameters())
    assert estimate(trained, 64).fixed == pytest.approx(4 * weights, rel=0.01)
    assert estimate(frozen, 64).fixed < 1.5 * weights
    assert estimate(frozen, 64).per_sample < estimate(trained, 64).per_sample / 2


@pytest.mark.parametrize("kind", ["mlp", "transformer", "gru"])
def test_predictors_can_be_estimated(kind):
    predictor = Predictor(PredictorConfig(kind, width=32, heads=2), 8, 4.0, "", 2)
    memory = MemoryEstimate.of(Losses(predictor, torch.ones(3)), example_inputs(predictor, 3), 2, FP32)
    # Three steps of two members, a few tensors of the width for each of eight embeddings or for all of them.
    assert 3 * 2 * 4 * 32 * 4 < memory.per_sample < 3 * 2 * 8 * 32 * 4 * 100


def test_batches_that_fit():
    memory = MemoryEstimate(fixed=1000, per_sample=100, per_waiting_sample=10)
    assert [memory.largest_batch(capacity) for capacity in (0, 1500, 2500, 5250, 10_000)] == [1, 2, 8, 32, 64]
    assert (memory.total(8), memory.total(8, 8), memory.total(8, 32)) == (1800, 1800, 2040)


def test_capacity_heeds_the_limits_of_a_container_and_a_shell(tmp_path, monkeypatch):
    machine = memory_capacity(CPU)
    assert 0 < memory_in_use(CPU) < machine
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(compute, "CGROUP_LIMITS", (tmp_path / "absent", limit))
    limit.write_text("max\n")
    assert memory_capacity(CPU) == machine
    limit.write_text("300000000\n")
    assert memory_capacity(CPU) == 300_000_000
    in_use = SimpleNamespace(vms=700, rss=500)
    monkeypatch.setattr(compute.psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: in_use))
    monkeypatch.setattr(compute.resource, "getrlimit", lambda kind: (1000, 2000))
    assert memory_capacity(CPU) == 800


def test_cores_are_those_granted_shared_with_other_processes(monkeypatch):
    monkeypatch.setattr(compute.joblib, "cpu_count", lambda: 6)
    assert cores_of_this_process() == 6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert cores_of_this_process() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert cores_of_this_process() == 1


@pytest.mark.parametrize(
    ("chosen", "launched", "expected"),
    [(None, False, 6), (None, True, 6), ("1", True, 6), ("1", False, None), ("2", True, None), ("2", False, None)],
)
def test_one_process_computes_on_all_cores_unless_told_otherwise(chosen, launched, expected, monkeypatch, fresh):
    for name, value in (("OMP_NUM_THREADS", chosen), ("ACCELERATE_MIXED_PRECISION", "no" if launched else None)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    threads: list[int] = []
    monkeypatch.setattr(compute.torch, "set_num_threads", threads.append)
    monkeypatch.setattr(compute.joblib, "cpu_count", lambda: 6)
    start_accelerator()
    assert threads == ([] if expected is None else [expected])


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_one_process_and_how_it_is_described(precision, fresh):
    accelerator = start_accelerator(ComputeConfig(precision=precision))
    assert re.fullmatch(rf"1 x cpu \(\d+ threads\), precision {precision}", describe_devices(accelerator))


def test_more_processes_than_accelerate_sees_are_refused(monkeypatch, fresh):
    start_accelerator()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes were started, but accelerate sees 1: check the --config_file"):
        start_accelerator()
