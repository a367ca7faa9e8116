"""The numbers that judge a model: diagnostics, probes, skill and energy, each against a case known beforehand."""

import numpy as np
import pytest
import torch

from jepa.diagnostics import effective_rank, encoder_alarms, prediction_alarms, sequence_spread
from jepa.energy import calibrate_energy, energy, measure_usual_errors, percentile, prediction_errors
from jepa.predictor import CopyLast, Mean, Predictor, PredictorConfig
from jepa.probe import fit_linear_probe, r_squared
from jepa.skill import imagine, measure_skill, retrieval_at_1


def test_effective_rank_counts_dimensions():
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(20, 20)).Q
    samples = torch.linalg.qr(torch.randn(500, 5) - 0).Q @ basis[:5] * 100
    assert effective_rank(samples + 7) == pytest.approx(5, rel=0.02)  # a constant is not a dimension
    assert effective_rank(torch.ones(10, 4)) == 1


def healthy(clips: int = 8, time: int = 16, features: int = 12) -> torch.Tensor:
    return torch.randn(clips, time, features, generator=torch.Generator().manual_seed(1))


def test_healthy_embeddings_raise_no_alarm():
    assert encoder_alarms(healthy(), healthy()) == []
    assert prediction_alarms(healthy() * 0.9, healthy()) == []


def test_each_way_to_collapse_is_noticed():
    points = 5 + 1e-3 * healthy()
    assert any("expander's standard deviation" in alarm for alarm in encoder_alarms(healthy(), 0.05 * healthy()))
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


def test_probe_reads_what_is_linear():
    torch.manual_seed(0)
    embeddings = torch.randn(500, 6)
    targets = embeddings @ torch.randn(6, 2) + 3
    probe = fit_linear_probe(embeddings[:400], targets[:400], penalty=1e-8)
    assert r_squared(probe(embeddings[400:]), targets[400:]).min() > 0.9999
    nonsense = fit_linear_probe(torch.randn(400, 6), targets[:400])
    assert r_squared(nonsense(embeddings[400:]), targets[400:]).max() < 0.3


def skill_of_known_errors():
    generator = torch.Generator().manual_seed(0)
    future = torch.randn(60, 3, 4, generator=generator)
    off = {"copy_last": 2.0, "ridge": 1.0, "mean": 4.0, "model": 0.5}
    imagined = {name: future + value for name, value in off.items()}
    bank = torch.cat([future.flatten(0, 1), torch.full((1, 4), 100.0)])
    rows = torch.arange(180).reshape(60, 3)
    return measure_skill(imagined, future, np.repeat(np.arange(20), 3), bank, rows, resamples=200)


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
            dict.fromkeys(names, error), future, np.repeat(np.arange(30), 4), torch.zeros(1, 50), rows, seed, 200
        )["model"]
        covered += skill.mse_interval[0, 0] <= 0.5 <= skill.mse_interval[0, 1]
    assert 85 <= covered <= 100  # ignoring that windows belong to groups, it would be about 70


def test_retrieval():
    bank = torch.eye(5)
    imagined = bank[:3, None] * 0.6
    assert retrieval_at_1(imagined, bank, torch.tensor([[0], [1], [4]])).tolist() == pytest.approx([2 / 3])


def test_imagining_in_batches_changes_nothing():
    past = torch.randn(7, 4, 3)
    assert torch.equal(imagine(CopyLast(), past, 5, batch=2), imagine(CopyLast(), past, 5))


def calibrated_predictor() -> tuple[Predictor, list[torch.Tensor]]:
    torch.manual_seed(0)
    predictor = Predictor(PredictorConfig(context=4, width=16), 6, 4.0, "abc").eval()
    scales = torch.tensor([0.01, 0.1, 1, 1, 1, 1])
    walks = [(torch.randn(1, 80, 6) * scales).cumsum(dim=1) for _ in range(30)]
    calibrate_energy(predictor, torch.cat([prediction_errors(predictor, walk, 4).flatten(0, 1) for walk in walks[:20]]))
    return predictor, walks[20:]


def test_energy_is_one_and_percentiles_are_even_on_ordinary_video():
    predictor, held_out = calibrated_predictor()
    with torch.no_grad():
        energies = torch.cat([energy(predictor, walk).flatten() for walk in held_out])
    assert energies.mean() == pytest.approx(1, rel=0.1)
    shares = percentile(predictor, energies)
    for level in (10, 50, 90):
        assert float((shares < level).float().mean()) * 100 == pytest.approx(level, abs=6)


def test_energy_notices_a_small_jump_where_nothing_ever_moves():
    predictor, held_out = calibrated_predictor()
    walk = held_out[0].clone()
    walk[:, 40:, 0] += 0.2  # invisible to plain squared error, 20 times the usual change of this feature
    with torch.no_grad():
        energies = energy(predictor, walk)[0]
    assert energies.argmax() == 40 - 4
    assert percentile(predictor, energies.max()[None])[0] > 99


def test_errors_are_of_the_right_moments():
    sequence = torch.arange(8.0)[None, :, None].expand(1, 8, 2)
    assert torch.equal(prediction_errors(Mean(), sequence, 3)[0, :, 0], torch.arange(3.0, 8.0))
    assert torch.equal(prediction_errors(CopyLast(), sequence, 3)[0, :, 0], torch.ones(5))
    with pytest.raises(ValueError, match="not more than the context"):
        prediction_errors(CopyLast(), sequence, 8)


def test_whitening_makes_usual_errors_round():
    torch.manual_seed(0)
    errors = torch.randn(5000, 4) @ torch.randn(4, 4) + 2
    usual = measure_usual_errors(errors, shrinkage=0.0)
    white = (errors - usual.mean) @ usual.whitening
    assert torch.allclose(white.T @ white / len(white), torch.eye(4), atol=1e-2)
