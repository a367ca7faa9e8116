"""Scores of sampled futures: proper, fair to few samples, and calibrated where the samples are the truth."""

import numpy as np
import pytest
import torch

from jepa.scoring import best_of, coverage, energy_score


def test_energy_score_is_its_definition():
    generator = torch.Generator().manual_seed(0)
    for n in (2, 3, 6, 7):
        samples, future = torch.randn(n, 4, 5, generator=generator), torch.randn(4, 5, generator=generator)
        for window in range(4):
            points, came = samples[:, window].double().numpy(), future[window].double().numpy()
            near = np.mean([np.sqrt(np.mean((x - came) ** 2)) for x in points])
            pairs = [
                np.sqrt(np.mean((x - y) ** 2)) for i, x in enumerate(points) for j, y in enumerate(points) if i != j
            ]
            assert energy_score(samples, future)[window].item() == pytest.approx(near - np.mean(pairs) / 2, abs=1e-5)
    with pytest.raises(ValueError, match="at least 2"):
        energy_score(samples[:1], future)


def test_honest_samples_have_the_best_energy_score():
    generator = torch.Generator().manual_seed(0)
    future = torch.randn(2000, 3, generator=generator)
    samples = torch.randn(8, 2000, 3, generator=generator)
    scores = {spread: energy_score(spread * samples, future).mean().item() for spread in (0.3, 0.7, 1.0, 1.4, 2.0)}
    assert min(scores, key=lambda spread: scores[spread]) == 1.0
    assert energy_score(samples + 0.5, future).mean() > scores[1.0]


def test_the_energy_score_has_a_gradient_where_all_samples_are_one():
    samples = torch.zeros(2, 4, 3, requires_grad=True)
    energy_score(samples, torch.ones(4, 3)).sum().backward()
    assert samples.grad is not None
    assert samples.grad.isfinite().all()
    assert (samples.grad < 0).all()


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_honest_samples_cover_as_often_as_they_say(share):
    generator = torch.Generator().manual_seed(0)
    future, samples = torch.randn(20000, 3, generator=generator), torch.randn(25, 20000, 3, generator=generator)
    assert coverage(samples, future, share).mean().item() == pytest.approx(share, abs=0.01)
    assert coverage(0.5 * samples, future, share).mean() < share - 0.1
    assert coverage(2 * samples, future, share).mean() > share + 0.05


def test_best_of_is_the_nearest():
    samples = torch.tensor([[[3.0, 3.0]], [[1.0, 2.0]]])
    assert best_of(samples, torch.tensor([[1.0, 1.0]])).tolist() == [0.5]
