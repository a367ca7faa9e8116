"""Collapse, each kind against a case known beforehand."""

import pytest
import torch

from jepa.diagnostics import (
    MOST_ROWS,
    collapse_stats,
    effective_rank,
    encoder_alarms,
    floor_std,
    prediction_alarms,
    sequence_stats,
)


def test_effective_rank_counts_dimensions():
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(20, 20)).Q
    samples = torch.linalg.qr(torch.randn(500, 5)).Q @ basis[:5] * 100
    assert effective_rank(samples + 7) == pytest.approx(5, rel=0.02)  # a constant is not a dimension
    assert effective_rank(torch.ones(10, 4)) == 1
    assert collapse_stats(torch.randn(1, 4)) == (0, 1)  # which would not be a number, and is written to metrics.json


@pytest.mark.parametrize("shape", [(7, 30), (30, 7), (9000, 6), (30_000, 6)])
def test_effective_rank_is_the_entropy_of_the_singular_values(shape):
    samples = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, shape[1] + 1)
    values = torch.linalg.svdvals((samples - samples.mean(dim=0)).double())
    share = values / values.sum()
    expected = (-(share * share.clamp_min(1e-30).log()).sum()).exp()
    every = len(samples) <= MOST_ROWS
    assert effective_rank(samples) == pytest.approx(float(expected), rel=1e-5 if every else 0.01)


def test_the_floor_under_deviations_is_that_of_the_features_that_vary():
    std = torch.tensor([1.0, 2.0, 3.0, 1e-3, 0.0])
    assert floor_std(std).tolist() == pytest.approx([1, 2, 3, 0.01, 0.01])  # the lower of the two in the middle
    mostly_dead = torch.cat([std[:3], 1e-9 * torch.rand(20)])
    assert floor_std(mostly_dead).tolist() == pytest.approx([1, 2, 3, *[0.02] * 20])
    for rounding in (0.0, 1e-9):  # nothing varies
        assert floor_std(torch.full((2,), rounding)).tolist() == pytest.approx([1e-6, 1e-6])


def healthy(clips: int = 8, time: int = 16, tokens: tuple[int, ...] = (), features: int = 12) -> torch.Tensor:
    return torch.randn(clips, time, *tokens, features, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tokens", [(), (5,), (2, 3)])
def test_healthy_embeddings_raise_no_alarm(tokens):
    embeddings = healthy(tokens=tokens)
    assert encoder_alarms(embeddings, embeddings) == []
    assert prediction_alarms(embeddings * 0.9, embeddings) == []


@pytest.mark.parametrize("tokens", [(), (5,)])
def test_each_way_to_collapse_is_noticed(tokens):
    sound = healthy(tokens=tokens)

    def alarms(embeddings, outputs=sound):
        return " ".join(encoder_alarms(embeddings, outputs))

    assert "expander output's standard deviation" in alarms(sound, 0.05 * sound)
    assert "embedding's standard deviation" in alarms(5 + 1e-3 * sound)
    line = healthy(tokens=tokens, features=1) * torch.ones(12)
    assert "embedding's effective rank" in alarms(line)
    assert "expander output's effective rank" in alarms(sound, line)
    clip_identity = healthy(time=1, tokens=tokens).expand(8, 16, *tokens, 12) + 1e-3 * sound
    assert "not moments" in alarms(clip_identity)
    assert "vary over time" in " ".join(prediction_alarms(0.1 * sound, sound))
    assert "effective rank" in " ".join(prediction_alarms(line, sound))


def test_statistics_over_time_leave_out_what_tells_clips_and_places_apart():
    constant = 10 * healthy(time=1, tokens=(3,))
    stats = sequence_stats(constant + healthy(tokens=(3,)))
    assert stats["batch"].std > 8
    assert stats["time"].std == pytest.approx(1, rel=0.1)
    assert sequence_stats(healthy(time=1))["time"] == (0, 1)
