"""The numbers that judge a forecast, each against a case known beforehand."""

import numpy as np
import pytest
import torch

from jepa.bootstrap import Bootstrap, divide, r2, reading_moments, useful_steps
from jepa.metrics import change_cosine
from jepa.samples import coverage, energy_score


def test_resamples_draw_whole_groups():
    """A group of two ones, and four groups of three twos."""
    groups = np.array([0, 0, *np.repeat([1, 2, 3, 4], 3)])
    values = np.where(groups == 0, 1.0, 2.0)[:, None] * np.array([1, 10])
    means = Bootstrap(groups, resamples=100).means(values)
    expected = {round((2 * n + 6 * (5 - n)) / (2 * n + 3 * (5 - n)), 9) for n in range(6)}
    assert len(set(means[:, 0])) > 2
    assert {round(mean, 9) for mean in means[:, 0]} <= expected
    np.testing.assert_allclose(means[:, 1], 10 * means[:, 0])
    assert not np.array_equal(means, Bootstrap(groups, resamples=100, seed=1).means(values))


def test_intervals_are_as_wide_as_the_groups_differ():
    level = np.random.default_rng(0).normal(size=400)
    bootstrap = Bootstrap(np.arange(400).repeat(10))
    low, high = bootstrap.interval(bootstrap.means(level.repeat(10)))
    assert (high - low) / 2 == pytest.approx(1.96 * level.std() / 20, rel=0.1)  # not of 4,000 independent windows
    assert (high + low) / 2 == pytest.approx(level.mean(), abs=0.01)


def test_of_few_groups_no_interval_is_claimed():
    values = np.random.default_rng(0).normal(size=(40, 2))
    few, enough = (Bootstrap(np.arange(40) % groups, resamples=50) for groups in (4, 5))
    assert np.isnan(few.interval(few.means(values))).all()
    assert few.describe("videos") == "too few videos (4) for an interval"
    low, high = enough.interval(enough.means(values))
    assert (low < high).all()
    assert enough.describe("videos") == "95 %, bootstrap over 5 videos"


def test_a_resample_without_a_window_and_a_quotient_without_a_denominator_are_left_out():
    bootstrap = Bootstrap(np.arange(15) // 3)
    means = bootstrap.means(np.ones(3))  # of the first group alone: in a third of the resamples, there is nothing
    assert np.isnan(means).any()
    assert bootstrap.interval(means).tolist() == [1, 1]
    assert np.isnan(bootstrap.interval(np.full((9, 2), np.nan))).all()
    quotients = divide(np.array([1.0, 0.0, 3.0]), np.array([0.0, 0.0, 2.0]))
    assert quotients.tolist() == pytest.approx([np.nan, np.nan, 1.5], nan_ok=True)


def read_off(read, true, groups):
    """R2 and its interval, of (N, ...) twice."""
    moments, bootstrap = reading_moments(read, true).numpy(), Bootstrap(groups)
    return r2(moments.sum(axis=0)), bootstrap.interval(r2(bootstrap.sums(moments)))


def test_r2_is_that_of_the_textbook():
    generator = np.random.default_rng(0)
    true = generator.normal(size=(200, 3, 2)) + 10
    read = 0.5 * (true - 10) + generator.normal(size=true.shape) + 9.5
    found, interval = read_off(torch.from_numpy(read), torch.from_numpy(true), np.arange(200))
    expected = 1 - ((true - read) ** 2).sum(axis=0) / ((true - true.mean(axis=0)) ** 2).sum(axis=0)
    np.testing.assert_allclose(found, expected)
    assert ((interval[0] < found) & (found < interval[1])).all()


def test_six_videos_and_a_pedal_that_is_used_in_one():
    """Resamples without that video hold a constant: its variance is rounding, and R2 would be -1e14."""
    generator = torch.Generator().manual_seed(0)
    groups = np.arange(6).repeat(100)
    pedal = torch.where(torch.from_numpy(groups == 2), torch.rand(600, generator=generator), 0.1)[:, None]
    read = pedal + 0.05 * torch.randn(600, 1, generator=generator)
    found, interval = read_off(read - 0.234, pedal - 0.234, groups)
    assert 0.5 < interval[0] < found < interval[1] < 1
    still, varied = torch.full((600, 1), 0.1), torch.randn(600, 1, generator=generator)
    assert read_off(still, varied, groups)[0] < 0
    assert np.isnan(np.concatenate(read_off(varied, still, groups), axis=None)).all()


@pytest.mark.parametrize("tokens", [(), (3,)])
def test_the_cosine_is_of_the_directions_of_the_changes(tokens):
    torch.manual_seed(0)
    last, change = torch.randn(50, *tokens, 6), torch.randn(50, 4, *tokens, 6)
    came = last[:, None] + change
    for forecast, expected in ((0.1 * change, 1.0), (3 * change, 1.0), (-2 * change, -1.0), (0 * change, 0.0)):
        found = change_cosine(last[:, None] + forecast, came, last)
        assert torch.allclose(found, torch.full((50, 4), expected), atol=1e-4)
    unrelated = change_cosine(last[:, None] + torch.randn_like(change), came, last)
    assert float(unrelated.mean()) == pytest.approx(0, abs=0.1)


def test_the_useful_horizon_ends_where_the_mean_is_as_good():
    def steps(*relative, half_width=0.01):
        relative = np.array(relative)
        return useful_steps(relative, relative + half_width)

    assert steps(0.1, 0.5, 0.9, 1.1, 1.2) == 3
    assert steps(0.1, 1.1, 0.1) == 1  # counted without interruption
    assert steps(0.1, 0.2) == 2
    assert steps(1.0, 0.1) == 0
    assert steps(0.1, 0.9, 1.1, half_width=0.2) == 1  # of what is certain
    assert steps(0.1, 0.9, 1.1, half_width=np.nan) == 2  # no interval: the numbers themselves
    assert steps(0.1, np.nan, 0.1) == 1


def test_the_energy_score_is_its_definition():
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


def test_the_energy_score_has_a_gradient_where_all_samples_are_one():
    samples = torch.zeros(2, 4, 3, requires_grad=True)
    energy_score(samples, torch.ones(4, 3)).sum().backward()
    assert samples.grad.isfinite().all()
    assert (samples.grad < 0).all()


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_honest_samples_cover_as_often_as_they_say(share):
    generator = torch.Generator().manual_seed(0)
    future, samples = torch.randn(20000, 3, generator=generator), torch.randn(25, 20000, 3, generator=generator)
    assert coverage(samples, future, share).mean().item() == pytest.approx(share, abs=0.01)
    assert coverage(0.5 * samples, future, share).mean() < share - 0.1
    assert coverage(2 * samples, future, share).mean() > share + 0.05
