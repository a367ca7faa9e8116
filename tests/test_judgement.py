"""The numbers that judge a model: diagnostics, skill and energy, each against a case known beforehand."""

import numpy as np
import pytest
import torch

from jepa.baselines import CopyLast, Mean
from jepa.bootstrap import Bootstrap
from jepa.diagnostics import effective_rank, encoder_alarms, floor_std, prediction_alarms, sequence_spread, spread
from jepa.energy import (
    LATENTS,
    UsualErrors,
    agreement,
    calibrate_energy,
    energy,
    measure_usual_errors,
    percentile,
    prediction_errors,
    predictions,
)
from jepa.predictor import Predictor, PredictorConfig
from jepa.skill import imagine, imagine_unshrunk, measure_skill, retrieval_at_1, spread_by_horizon


def test_effective_rank_counts_dimensions():
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(20, 20)).Q
    samples = torch.linalg.qr(torch.randn(500, 5) - 0).Q @ basis[:5] * 100
    assert effective_rank(samples + 7) == pytest.approx(5, rel=0.02)  # a constant is not a dimension
    assert effective_rank(torch.ones(10, 4)) == 1
    assert spread(torch.randn(1, 4)) == (0, 1)  # which would not be a number, and is written to metrics.json


def test_the_floor_under_deviations_is_that_of_the_features_that_vary():
    std = torch.tensor([1.0, 2.0, 3.0, 1e-3, 0.0])
    assert floor_std(std).tolist() == pytest.approx([1, 2, 3, 0.01, 0.01])  # the lower of the two in the middle
    mostly_dead = torch.cat([std[:3], 1e-9 * torch.rand(20)])
    assert floor_std(mostly_dead).tolist() == pytest.approx([1, 2, 3, *[0.02] * 20])
    for rounding in (0.0, 1e-9):  # nothing varies
        assert floor_std(torch.full((2,), rounding)).tolist() == pytest.approx([1e-6, 1e-6])


def healthy(clips: int = 8, time: int = 16, features: int = 12) -> torch.Tensor:
    return torch.randn(clips, time, features, generator=torch.Generator().manual_seed(1))


def test_healthy_embeddings_raise_no_alarm():
    assert encoder_alarms(healthy(), healthy()) == []
    assert prediction_alarms(healthy() * 0.9, healthy()) == []


def test_each_way_to_collapse_is_noticed():
    points = 5 + 1e-3 * healthy()
    assert any("expander output's standard deviation" in alarm for alarm in encoder_alarms(healthy(), 0.05 * healthy()))
    assert any("embedding's standard deviation" in alarm for alarm in encoder_alarms(points, healthy()))
    line = healthy(features=1) * torch.ones(12)
    assert any("effective rank" in alarm for alarm in encoder_alarms(line, healthy()))
    clip_identity = healthy(time=1).expand(8, 16, 12) + 1e-3 * healthy()
    assert any("not moments" in alarm for alarm in encoder_alarms(clip_identity, healthy()))
    assert prediction_alarms(0.1 * healthy(), healthy())
    assert any("effective rank" in alarm for alarm in prediction_alarms(line, healthy()))


def test_spread_over_time_leaves_clip_identity_out():
    clip_identity = 10 * healthy(time=1).expand(8, 16, 12) + healthy()
    spread = sequence_spread(clip_identity)
    assert spread.batch.std > 8
    assert spread.time.std == pytest.approx(1, rel=0.1)


def skill_of_known_errors():
    generator = torch.Generator().manual_seed(0)
    future = torch.randn(60, 3, 4, generator=generator)
    off = {"copy_last": 2.0, "ridge": 1.0, "mean": 4.0, "model": 0.5}
    imagined = {name: future + value for name, value in off.items()}
    bank = torch.cat([future.flatten(0, 1), torch.full((1, 4), 100.0)])
    rows = torch.arange(180).reshape(60, 3)
    return measure_skill(imagined, future, Bootstrap(np.repeat(np.arange(20), 3), 200), bank, rows)


def test_skill_of_known_errors():
    skills = skill_of_known_errors()
    assert np.allclose(skills["model"].mse, 0.25, rtol=1e-4)
    assert np.allclose(skills["model"].relative["copy_last"], 1 / 16, rtol=1e-4)
    assert np.allclose(skills["model"].relative["ridge"], 1 / 4, rtol=1e-4)
    assert np.allclose(skills["model"].relative_interval["mean"], 1 / 64, rtol=1e-4)  # the same error everywhere


def test_interval_covers_the_truth_about_as_often_as_it_says():
    covered = 0
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        group_effect = torch.rand(30, 1, 1, generator=generator).repeat_interleave(4, dim=0)
        future = torch.zeros(120, 1, 50)
        error = group_effect.sqrt() * torch.randn(120, 1, 50, generator=generator)  # expected square 1 / 2
        names = ("copy_last", "ridge", "mean", "model")
        rows = torch.zeros(120, 1, dtype=torch.int64)
        skill = measure_skill(
            dict.fromkeys(names, error),
            future,
            Bootstrap(np.repeat(np.arange(30), 4), 200, seed),
            torch.zeros(1, 50),
            rows,
        )["model"]
        covered += skill.mse_interval[0, 0] <= 0.5 <= skill.mse_interval[0, 1]
    assert 85 <= covered <= 100  # ignoring that windows belong to groups, it would be about 70


def useful_steps(errors: list[float], spread: float = 0.0) -> int:
    """Of a model whose error is so many times the mean's at each horizon, more or less so by group."""
    generator = torch.Generator().manual_seed(0)
    future = torch.zeros(200, len(errors), 4)
    ones = torch.ones_like(future)
    by_group = 1 + spread * torch.randn(20, 1, 1, generator=generator).repeat_interleave(10, dim=0)
    model = ones * torch.tensor(errors).sqrt()[:, None] * by_group
    imagined = {"model": model, "copy_last": ones, "ridge": ones, "mean": ones}
    rows = torch.zeros(200, len(errors), dtype=torch.int64)
    return measure_skill(imagined, future, Bootstrap(np.arange(200) // 10), future[:1, 0], rows)["model"].useful_steps


def test_the_useful_horizon_ends_where_the_mean_is_as_good():
    assert useful_steps([0.1, 0.5, 0.9, 1.1, 1.2]) == 3
    assert useful_steps([0.1, 1.1, 0.1]) == 1  # counted without interruption
    assert useful_steps([0.1, 0.2]) == 2
    assert useful_steps([1.0, 0.1]) == 0


def test_the_useful_horizon_is_of_what_is_certain():
    assert useful_steps([0.1, 0.9, 1.1]) == 2
    assert useful_steps([0.1, 0.9, 1.1], spread=0.5) == 1


def test_timid_predictions_lose_spread():
    generator = torch.Generator().manual_seed(0)
    future = torch.randn(300, 2, 6, generator=generator)
    timid = future * torch.tensor([1.0, 0.1])[:, None]
    line = future[:, :, :1].expand(-1, -1, 6)
    imagined = {"model": timid, "copy_last": line, "ridge": line, "mean": torch.zeros_like(future)}
    skills = measure_skill(
        imagined, future, Bootstrap(np.arange(300), 2), future[:1, 0], torch.zeros(300, 2, dtype=torch.int64)
    )
    true = spread_by_horizon(future)
    assert [spread.std for spread in skills["model"].spread] == pytest.approx([true[0].std, true[1].std / 10])
    assert skills["model"].spread[1].rank == pytest.approx(true[1].rank)
    assert skills["copy_last"].spread[0].rank == pytest.approx(1, abs=1e-3)
    assert skills["mean"].spread[0] == (0, 1)


def test_retrieval():
    bank = torch.eye(5)
    imagined = bank[:3, None] * 0.6
    assert retrieval_at_1(imagined, bank, torch.tensor([[0], [1], [4]])).tolist() == pytest.approx([2 / 3])


def test_imagining_in_batches_changes_nothing():
    past = torch.randn(7, 4, 3)
    assert torch.equal(imagine_unshrunk(CopyLast(), past, 5, batch=2), imagine(CopyLast(), past, 5))


CONTEXT, HORIZON = 4, 3


def split_walks(walks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All windows of (N, T, D) as past (M, CONTEXT, D) and future (M, HORIZON, D)."""
    windows = walks.unfold(1, CONTEXT + HORIZON, 1).flatten(0, 1).mT  # (M, CONTEXT + HORIZON, D)
    return windows[:, :CONTEXT], windows[:, CONTEXT:]


def calibrated_predictor(latent_dimension: int = 0) -> tuple[Predictor, torch.Tensor]:
    """It copies, and knows how random walks go on; beside it walks that it was not calibrated on."""
    torch.manual_seed(0)
    config = PredictorConfig(context=CONTEXT, width=16, latent_dimension=latent_dimension)
    predictor = Predictor(config, 6, 4.0, "abc", energy_horizon=HORIZON).eval()
    walks = (torch.randn(30, 80, 6) * torch.tensor([0.01, 0.1, 1, 1, 1, 1])).cumsum(dim=1)
    calibrate_energy(predictor, prediction_errors(predictor, *split_walks(walks[:20])))
    return predictor, walks[20:]


@pytest.mark.parametrize("latent_dimension", [0, 2])
def test_energy_is_one_and_percentiles_are_even_on_ordinary_video(latent_dimension):
    predictor, held_out = calibrated_predictor(latent_dimension)
    energies = energy(predictor, *split_walks(held_out))
    for step in range(HORIZON):
        assert energies[:, step].mean() == pytest.approx(1, rel=0.15)
        shares = percentile(predictor, energies[:, step], step + 1)
        for level in (10, 50, 90):
            assert float((shares < level).float().mean()) * 100 == pytest.approx(level, abs=6)
    with pytest.raises(ValueError, match="horizons up to 3"):
        energy(predictor, held_out[:, :4], held_out[:, 4:8])


def test_energy_notices_a_small_jump_where_nothing_ever_moves():
    predictor, held_out = calibrated_predictor()
    walk = held_out[:1].clone()
    walk[:, 40:, 0] += 0.2  # invisible to plain squared error, 20 times the usual change of this feature
    energies = energy(predictor, *split_walks(walk))
    assert energies[:, 0].argmax() == 40 - CONTEXT
    assert percentile(predictor, energies[:, 0].max()[None])[0] > 99


@pytest.mark.parametrize("latent_dimension", [0, 2])
def test_agreement_is_of_the_directions_of_the_changes(latent_dimension):
    torch.manual_seed(0)
    config = PredictorConfig(context=CONTEXT, width=16, latent_dimension=latent_dimension)
    predictor = Predictor(config, 6, 4.0, "abc").eval()
    past = torch.randn(50, CONTEXT, 6)
    assert torch.equal(agreement(CopyLast(), past, torch.randn(50, HORIZON, 6)), torch.zeros(50, HORIZON))
    torch.nn.init.normal_(predictor.members[0].head.weight)
    change = predictions(predictor, past, HORIZON).mean(dim=0) - past[:, -1:]
    for future, expected in ((0.1 * change, 1), (3 * change, 1), (-2 * change, -1)):
        found = agreement(predictor, past, past[:, -1:] + future)
        assert torch.allclose(found, torch.full_like(found, expected), atol=1e-4)
    unrelated = agreement(predictor, past, past[:, -1:] + torch.randn(50, HORIZON, 6))
    assert float(unrelated.mean()) == pytest.approx(0, abs=0.15)


def test_energy_is_little_where_one_of_several_predictions_is_near():
    """-2 / D log of the mean of exp(-D E / 2), written out; for one prediction E itself."""
    torch.manual_seed(0)
    errors, usual = torch.randn(5, 7, 2, 6), UsualErrors(torch.randn(2, 6), torch.randn(2, 6, 6))
    each = torch.stack(
        [((errors[:, :, h] - usual.mean[h]) @ usual.whitening[h]).square().mean(dim=-1) for h in range(2)], dim=-1
    )
    free = -2 / 6 * (-6 / 2 * each.double()).exp().mean(dim=0).log()
    assert torch.allclose(usual.energy(errors).double(), free, rtol=1e-4)
    assert torch.allclose(usual.energy(errors[:1]), each[0])
    assert (usual.energy(errors) < each.mean(dim=0)).all()


def test_errors_are_of_the_right_moments():
    past = torch.arange(3.0)[None, :, None].expand(1, 3, 2)
    future = torch.arange(3.0, 8.0)[None, :, None].expand(1, 5, 2)
    assert torch.equal(prediction_errors(Mean(), past, future)[0, 0, :, 0], torch.arange(3.0, 8.0))
    assert torch.equal(prediction_errors(CopyLast(), past, future)[0, 0, :, 0], torch.arange(1.0, 6.0))
    predictor, walks = calibrated_predictor(2)
    assert prediction_errors(predictor, walks[:, :4], walks[:, 4:6]).shape == (LATENTS, 10, 2, 6)


def test_whitening_makes_usual_errors_round():
    torch.manual_seed(0)
    errors = torch.randn(1, 2, 5000, 4).matmul(torch.randn(2, 4, 4)).transpose(1, 2) + 2
    usual = measure_usual_errors(errors, shrinkage=0.0)
    for step in range(2):
        white = (errors[0, :, step] - usual.mean[step]) @ usual.whitening[step]
        assert torch.allclose(white.T @ white / len(white), torch.eye(4), atol=1e-2)


def test_of_several_predictions_the_nearest_tells_what_is_usual():
    far, near = torch.full((1, 400, 1, 3), 5.0), torch.randn(1, 400, 1, 3)
    alone, beside = measure_usual_errors(near), measure_usual_errors(torch.cat([far, near]))
    assert torch.equal(alone.whitening, beside.whitening)
