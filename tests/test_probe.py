"""Probes and their agreement with the truth, against cases known beforehand."""

import numpy as np
import pytest
import torch

from jepa.bootstrap import Bootstrap, interval
from jepa.probe import fit_probe, measure_agreement, read_out_of_fold

GROUPS = np.repeat(np.arange(10), 40)


def linear_world(noise=0.0):
    """400 embeddings whose columns are linear in them, on scales that differ by a thousand."""
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(400, 6, generator=generator) * 5 + 2
    targets = embeddings.double() @ torch.randn(6, 2, generator=generator).double() * torch.tensor([1.0, 1000.0]) + 3
    return embeddings, targets + noise * torch.randn(400, 2, generator=generator) * targets.std(dim=0)


def r2(read, true):
    return measure_agreement(read, true, Bootstrap(np.arange(len(true)), resamples=2)).r2


def test_ridge_reads_what_is_linear_and_keeps_shapes():
    embeddings, targets = linear_world()
    probe = fit_probe("ridge", embeddings[:300], targets[:300], GROUPS[:300])
    assert r2(probe(embeddings[300:]), targets[300:]).min() > 0.9999
    assert torch.equal(probe(embeddings[:12].reshape(3, 4, 6)).flatten(0, 1), probe(embeddings[:12]))
    assert probe(embeddings[:12]).dtype == torch.float64
    nonsense = fit_probe("ridge", embeddings[torch.randperm(300)], targets[:300], GROUPS[:300])
    assert r2(nonsense(embeddings[300:]), targets[300:]).max() < 0.3


@pytest.mark.parametrize("kind", ["mlp", "knn"])
def test_mlp_and_neighbours_read_what_is_not_linear(kind):
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.rand(1000, 2, generator=generator) * 4 - 2
    targets = (embeddings**2).sum(dim=1, keepdim=True)
    groups = np.arange(1000) // 100
    read = {
        name: fit_probe(name, embeddings[:700], targets[:700], groups[:700])(embeddings[700:])
        for name in ("ridge", kind)
    }
    assert r2(read["ridge"], targets[700:]).max() < 0.1
    assert r2(read[kind], targets[700:]).min() > 0.9


def test_the_same_seed_reads_the_same(monkeypatch):
    monkeypatch.setattr("jepa.probe.MLP_STEPS", 50)
    embeddings, targets = linear_world(noise=1.0)
    embeddings, targets, groups = embeddings[:60], targets[:60], np.arange(60) % 2
    first, again, other = (fit_probe("mlp", embeddings, targets, groups, seed)(embeddings) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("kind", ["ridge", "knn"])
def test_what_is_asked_beside_a_column_does_not_matter(kind):
    embeddings, targets = linear_world(noise=1.0)
    targets[:, 0] = torch.randn(400, generator=torch.Generator().manual_seed(1))
    both = fit_probe(kind, embeddings, targets, GROUPS)
    alone = fit_probe(kind, embeddings, targets[:, 1:], GROUPS)
    assert both.chosen[0] > both.chosen[1] == alone.chosen[0]  # what cannot be known is held back more
    assert torch.allclose(both(embeddings)[:, 1:], alone(embeddings), rtol=1e-3)


def recognisable_groups():
    """Embeddings that say which group they are from, and a target that is nothing but its group's: not to be known."""
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(10, 8, generator=generator)[GROUPS]
    target = torch.randn(10, 1, generator=generator)[GROUPS]
    return own + 0.1 * torch.randn(400, 8, generator=generator), target


@pytest.mark.parametrize("kind", ["ridge", "knn"])
def test_a_group_is_read_only_by_probes_that_never_saw_it(kind):
    embeddings, target = recognisable_groups()
    shuffled = np.random.default_rng(0).permutation(GROUPS)
    assert r2(read_out_of_fold(kind, embeddings, target, shuffled, 5)[0], target)[0] > 0.8  # frames alone leak
    assert r2(read_out_of_fold(kind, embeddings, target, GROUPS, 5)[0], target)[0] < 0.1


def test_penalties_are_chosen_by_group_too():
    embeddings, target = recognisable_groups()
    of_frames = fit_probe("knn", embeddings, target, np.random.default_rng(0).permutation(GROUPS)).chosen
    of_groups = fit_probe("knn", embeddings, target, GROUPS).chosen
    assert of_frames[0] <= 10
    assert of_groups[0] >= 30


def test_few_samples_are_enough_for_every_kind(monkeypatch):
    monkeypatch.setattr("jepa.probe.MLP_STEPS", 20)
    embeddings, targets = torch.randn(6, 3), torch.randn(6, 1)
    for kind in ("ridge", "mlp", "knn"):
        assert fit_probe(kind, embeddings, targets, np.repeat([0, 1], 3))(embeddings).isfinite().all()


def test_nearest_neighbours_of_two_samples_are_both():
    embeddings, targets = torch.randn(4, 3), torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    probe = fit_probe("knn", embeddings, targets, np.repeat([0, 1], 2))
    assert probe.chosen == [2]


def test_agreement_is_that_of_the_textbook():
    generator = np.random.default_rng(0)
    true = generator.normal(size=(200, 3, 2)) + 1000
    read = 0.5 * (true - 1000) + generator.normal(size=true.shape) + 999.5
    agreement = measure_agreement(torch.from_numpy(read), torch.from_numpy(true), Bootstrap(np.arange(200)))
    assert agreement.r2.shape == agreement.r.shape == (3, 2)
    assert agreement.r2_interval.shape == agreement.r_interval.shape == (3, 2, 2)
    for place in np.ndindex(3, 2):
        y, p = (value[(slice(None), *place)] for value in (true, read))
        assert agreement.r2[place] == pytest.approx(1 - ((y - p) ** 2).sum() / ((y - y.mean()) ** 2).sum())
        assert agreement.r[place] == pytest.approx(np.corrcoef(y, p)[0, 1])
        for score in ("r2", "r"):
            low, high = getattr(agreement, f"{score}_interval")[place]
            assert low < getattr(agreement, score)[place] < high


def test_what_does_not_vary_does_not_agree():
    true = torch.randn(50, 1, generator=torch.Generator().manual_seed(0))
    agreement = measure_agreement(torch.full((50, 1), 0.1), true, Bootstrap(np.arange(50), 100))
    assert agreement.r == 0
    assert agreement.r_interval.tolist() == [[0, 0]]
    assert agreement.r2 < 0


def test_resamples_draw_whole_groups():
    """A group of two ones, and four groups of three twos."""
    groups = np.array([7, 7, *np.repeat([1, 4, 3, 0], 3)])
    bootstrap = Bootstrap(groups, resamples=50)
    values = np.where(groups == 7, 1.0, 2.0)[:, None] * np.array([1, 10])
    expected = {(2 * ones + 6 * (5 - ones), 2 * ones + 3 * (5 - ones)) for ones in range(6)}
    found = set(zip(bootstrap.sums(values)[:, 0], bootstrap.sums(np.ones(len(groups))), strict=True))
    assert len(found) > 2
    assert found <= expected
    assert np.allclose(bootstrap.means(values)[:, 1], 10 * bootstrap.means(values)[:, 0])
    assert {tuple(row) for row in bootstrap.means(values)} <= {(total / n, 10 * total / n) for total, n in expected}


def test_of_few_groups_no_interval_is_claimed():
    values = np.random.default_rng(0).normal(size=40)
    few, enough = (Bootstrap(np.arange(40) * count // 40, resamples=50) for count in (4, 5))
    assert interval(few.means(values)).tolist() == pytest.approx([values.mean()] * 2)
    assert few.describe("videos") == "too few videos (4) for an interval"
    records = {"a": [{"mse": 1.0, "mse_interval": [0.5, 2.0], "places": {"mse_interval": [[1, 2]]}}], "b": "text"}
    assert few.claim(records) == {
        "a": [{"mse": 1.0, "mse_interval": None, "places": {"mse_interval": None}}],
        "b": "text",
    }
    assert np.ptp(interval(enough.means(values))) > 0
    assert enough.describe("videos") == "95 %, bootstrap over 5 videos"
    assert enough.claim(records) == records
