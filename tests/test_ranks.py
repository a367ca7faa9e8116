"""However a batch is divided between ranks, the gradients are those of one process with all of it.

Two pools of real processes (2 and 4, gloo) evaluate all cases once; each test compares one of them with this process.
"""

import os
from dataclasses import dataclass
from datetime import timedelta

import pytest
import torch
import torch.distributed as distributed
import torch.multiprocessing as multiprocessing
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from jepa.batch_norm import SynchronisedBatchNorm, synchronise_batch_norm
from jepa.distributed import sum_over_ranks, world_size
from jepa.expander import Expander, ExpanderConfig
from jepa.objectives import Objective, SIGReg, VICReg

INPUTS, EMBEDDING, WIDTH = 6, 10, 24
OBJECTIVES = (VICReg(), SIGReg())


def all_of(batch, ranks, rank, axis=0):
    """A rank's share of a batch; all of it where there is one process."""
    return batch if rank is None else batch.chunk(ranks, dim=axis)[rank]


@dataclass(frozen=True)
class Step:
    """Forward and backward of encoder, expander and objective."""

    objective: Objective
    ranks: int
    rows: int
    tokens: tuple[int, ...] = ()
    batch_norm: bool = True
    dtype: torch.dtype = torch.float64
    device: str = "cpu"

    def run(self, rank=None):
        torch.manual_seed(0)
        encoder = nn.Sequential(nn.Linear(INPUTS, 16), nn.GELU(), nn.Linear(16, EMBEDDING, bias=False))
        # No biases at the end: VICReg does not see them, and their gradient is nothing but rounding.
        plain = nn.Sequential(nn.Linear(EMBEDDING, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH, bias=False))
        expander = Expander(EMBEDDING, ExpanderConfig((WIDTH, WIDTH))) if self.batch_norm else plain
        shape = (self.ranks * self.rows, *self.tokens, INPUTS)
        views = torch.randn(1, *shape) + 0.3 * torch.randn(2, *shape)
        views = all_of(views.to(self.device, self.dtype), self.ranks, rank, axis=1)
        network = nn.Sequential(encoder, expander).to(self.device, self.dtype)
        wrapped = network if rank is None else DistributedDataParallel(synchronise_batch_norm(network))
        outputs = wrapped(views.flatten(0, 1)).unflatten(0, (2, -1))  # both views, as the command has it
        terms = self.objective(*outputs, generator=torch.Generator().manual_seed(7))
        terms.loss.backward()
        return {
            "loss": terms.loss.detach(),
            "gradients": {name: parameter.grad for name, parameter in network.named_parameters()},
            "buffers": dict(network.named_buffers()),
        }


@dataclass(frozen=True)
class Normalise:
    """Two training steps and an evaluation of batch normalisation."""

    shape: tuple[int, ...]
    ranks: int
    rows: int
    options: tuple[tuple[str, object], ...] = ()
    layer: str = "torch"
    dtype: torch.dtype = torch.float64
    autocast: bool = False
    device: str = "cpu"

    def run(self, rank=None):
        torch.manual_seed(0)
        layers = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
        kind = BatchNormAct2d if self.layer == "timm" else layers[1 + len(self.shape)]
        layer = kind(self.shape[0], **dict(self.options)).to(torch.float32 if self.autocast else self.dtype)
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
        network = nn.Sequential(layer).to(self.device)
        keys = list(network.state_dict())
        parameters = list(network.parameters())
        if rank is not None:
            network = synchronise_batch_norm(synchronise_batch_norm(network))
            assert isinstance(network[0], SynchronisedBatchNorm | nn.SyncBatchNorm)
            assert list(network.state_dict()) == keys
            # An optimiser that was made before goes on.
            assert all(a is b for a, b in zip(network.parameters(), parameters, strict=True))
        outputs = []
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            for step in range(3):
                network.train(step < 2)
                batch, aim = torch.randn(2, self.ranks * self.rows, *self.shape, dtype=torch.float64)
                batch, aim = (batch * (1 + step) + 2).to(self.device, self.dtype), aim.to(self.device)
                inputs = all_of(batch, self.ranks, rank).clone().requires_grad_()
                outputs.append(network(inputs))
                loss = (outputs[-1].double() * all_of(aim, self.ranks, rank)).sum() + outputs[-1].double().pow(3).sum()
                loss.backward()  # the sum of the ranks' losses is that of the whole batch
                outputs.append(inputs.grad)
        if rank is not None:
            for parameter in parameters:
                distributed.all_reduce(parameter.grad)
        return {
            "outputs": [output.detach() for output in outputs],
            "gradients": [parameter.grad for parameter in parameters],
            "buffers": dict(network.named_buffers()),
        }


@dataclass(frozen=True)
class Rows:
    """The sum alone, with losses that differ between ranks."""

    ranks: int
    rows: int

    def run(self, rank=None):
        torch.manual_seed(0)
        batch = torch.randn(self.ranks * self.rows, 3, dtype=torch.float64)
        inputs = all_of(batch, self.ranks, rank).clone().requires_grad_()
        shares = inputs.chunk(self.ranks) if rank is None else [inputs]  # one process plays all ranks
        sums = [share.square().sum(dim=0) for share in shares]
        whole = sum(sums)
        total, again = sum_over_ranks(whole), sum_over_ranks(whole)
        loss = 0
        for weight, share in enumerate(sums, 1 if rank is None else rank + 1):
            # The gradient of `total` is that of `share` too, the gradient of `again` one expanded number.
            loss = loss + weight * ((total + share) ** 3).sum() + again.sum()
        loss.backward()
        return {
            "totals": torch.stack([total, again]).detach(),
            "gradient": inputs.grad,
            "ranks": world_size(),
        }


STEPS = [
    Step(objective, ranks, rows, tokens, batch_norm, dtype)
    for objective in OBJECTIVES
    for ranks, rows, tokens in [(2, 32, ()), (2, 8, (2, 2)), (4, 16, ()), (4, 1, ()), (2, 3, (5,))]
    for batch_norm in (False, True)
    for dtype in (torch.float32, torch.float64)
]
NORMALISATIONS = [
    Normalise((5,), 2, 8), Normalise((5,), 4, 3), Normalise((5, 3), 2, 5), Normalise((5, 3, 2), 2, 5),
    Normalise((5, 3, 2, 2), 2, 1), Normalise((5,), 2, 1), Normalise((5, 3, 2), 2, 5, layer="timm"),
    Normalise((5,), 2, 5, (("momentum", 0.3), ("eps", 0.1))), Normalise((5,), 2, 5, (("affine", False),)),
    Normalise((5, 3, 2), 2, 5, dtype=torch.float32), Normalise((5, 3, 2), 2, 5, dtype=torch.bfloat16, autocast=True),
]  # fmt: skip
ROWS = [Rows(2, 3), Rows(2, 1), Rows(4, 3)]
CASES = {ranks: [case for case in [*STEPS, *NORMALISATIONS, *ROWS] if case.ranks == ranks] for ranks in (2, 4)}


def work(rank, ranks, folder, cases=None, backend="gloo"):
    torch.set_num_threads(1)
    distributed.init_process_group(
        backend, f"file://{folder}/rendezvous", timedelta(minutes=5), rank=rank, world_size=ranks
    )
    torch.save([case.run(rank) for case in cases or CASES[ranks]], folder / f"{rank}.pt")
    distributed.barrier()
    os._exit(0)  # gloo's threads may abort an interpreter that shuts down


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each rank found, by case."""
    pools = {}
    for ranks in CASES:
        folder = tmp_path_factory.mktemp(f"ranks{ranks}")
        pools[ranks] = folder, multiprocessing.start_processes(
            work, (ranks, folder), ranks, join=False, start_method="spawn"
        )  # fmt: skip
    found = {}
    for ranks, (folder, pool) in pools.items():
        while not pool.join():
            pass
        of_ranks = [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]
        found |= dict(zip(CASES[ranks], zip(*of_ranks, strict=True), strict=True))
    return found


@pytest.mark.parametrize("case", STEPS, ids=str)
def test_ranks_equal_one_process(results, case):
    whole = case.run()
    tolerance = {torch.float32: (1e-6, 1e-5), torch.float64: (1e-12, 1e-10)}[case.dtype]
    for ours in results[case]:
        assert ours["loss"].item() == pytest.approx(whole["loss"].item(), rel=tolerance[0])
        assert ours["gradients"].keys() == whole["gradients"].keys()
        for name, gradient in whole["gradients"].items():
            largest = gradient.abs().max()
            assert largest > 0
            assert (ours["gradients"][name] - gradient).abs().max() <= tolerance[1] * largest, name
        assert ours["buffers"].keys() == whole["buffers"].keys()
        for name, buffer in whole["buffers"].items():
            torch.testing.assert_close(ours["buffers"][name], buffer, rtol=tolerance[1], atol=tolerance[1])


@pytest.mark.parametrize("case", NORMALISATIONS, ids=str)
def test_batch_normalisation_is_that_of_the_whole_batch(results, case):
    whole = case.run()
    tolerance = {torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-10}[case.dtype]
    for rank, ours in enumerate(results[case]):
        for output, of_whole in zip(ours["outputs"], whole["outputs"], strict=True):
            assert output.dtype == of_whole.dtype
            expected = of_whole.chunk(case.ranks)[rank]
            torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance * of_whole.abs().max().item())
        for gradient, of_whole in zip(ours["gradients"], whole["gradients"], strict=True):
            torch.testing.assert_close(gradient, of_whole, rtol=tolerance, atol=tolerance * of_whole.abs().max().item())
        assert ours["buffers"].keys() == whole["buffers"].keys()
        for name, buffer in ours["buffers"].items():
            statistics = 1e-10 if case.dtype == torch.float64 else 1e-6  # in float32 also under autocast
            torch.testing.assert_close(buffer, whole["buffers"][name], rtol=statistics, atol=statistics)


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_collectives_differentiate_the_sum_of_the_losses(results, case):
    whole = case.run()
    for rank, ours in enumerate(results[case]):
        torch.testing.assert_close(ours["totals"], whole["totals"])
        torch.testing.assert_close(ours["gradient"], whole["gradient"].chunk(case.ranks)[rank])
        assert ours["ranks"] == case.ranks


def test_one_process_is_left_alone():
    network = nn.Sequential(nn.BatchNorm1d(3))
    assert synchronise_batch_norm(network) is network
    assert type(network[0]) is nn.BatchNorm1d
    rows = torch.randn(4, 3)
    assert sum_over_ranks(rows) is rows
    with pytest.raises(ValueError, match="more than 1"):
        SynchronisedBatchNorm(3)(rows[:1])
