"""The stages that judge rollouts and samples, on random embeddings and with a predictor that never trained."""

import csv
import json

import pytest
import torch

from data.embedding_cache import EmbeddingCache
from jepa.predictor import Predictor, PredictorConfig
from jepa.scoring import live_features
from pipelines import evaluate_rollout, evaluate_samples
from pipelines.stage import UserError

CONTEXT, HORIZON = 3, 4
WINDOW = CONTEXT + HORIZON


@pytest.fixture
def judge(tmp_path, make_clip, write_cache):
    """Make a cache of clips of so many frames, judge on it, and return what was found."""
    predictor = Predictor(PredictorConfig(context=CONTEXT, width=8, depth=1, latent_dimension=1), 5, 4.0, "0123abcd")
    predictor.energy_quantiles.fill_(1)  # as if it were calibrated
    predictor.save_pretrained(tmp_path / "predictor")

    def run(frames, stage=evaluate_rollout, change=lambda folder: folder, **options):
        clips = [make_clip(str(tmp_path / f"{number}.mp4"), count, seed=number) for number, count in enumerate(frames)]
        cache = change(write_cache(tmp_path / "cache", clips))
        if stage is evaluate_samples:
            usual = [make_clip("/usual.mp4", 40, seed=99)]
            options = {"validation_cache": write_cache(tmp_path / "usual", usual), "samples": 19} | options
        options = {"horizon": HORIZON, "resamples": 50} | options
        stage.main(stage.Options(cache=cache, predictor=tmp_path / "predictor", output_dir=tmp_path / "out", **options))
        name = "rollout" if stage is evaluate_rollout else "samples"
        return json.loads((tmp_path / "out" / f"{name}.json").read_text(), parse_constant=refuse_constant)

    return run


def refuse_constant(name):
    """NaN and Infinity are no JSON."""
    raise AssertionError(f"{name} in a JSON file")


@pytest.mark.parametrize("stage", [evaluate_rollout, evaluate_samples])
def test_a_damaged_cache_is_refused(judge, tmp_path, damage_cache, stage):
    with pytest.raises(UserError, match=r"cache holds embeddings that are not finite, first of .*/0\.mp4: see what"):
        judge([40, 40], stage, damage_cache)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", [evaluate_rollout, evaluate_samples])
def test_one_window_is_too_few(judge, tmp_path, stage):
    with pytest.raises(UserError, match=f"cache holds one window of {WINDOW} embeddings, and at least 2 are needed"):
        judge([WINDOW], stage)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", [evaluate_rollout, evaluate_samples])
def test_more_rollouts_than_memory_holds_are_refused_with_the_stride_that_fits(judge, monkeypatch, stage):
    monkeypatch.setattr(evaluate_rollout, "MOST_MEMORY", 30_000)  # 74 windows of 43 times 5 numbers are 63,640 bytes
    with pytest.raises(UserError, match=r"--stride is 1: 74 rollouts of 4 steps .* more .*: take .* with --stride 3,"):
        judge([80], stage, overwrite=True)
    assert judge([80], stage, overwrite=True, stride=3)["windows"] == 25


@pytest.mark.parametrize("stage", [evaluate_rollout, evaluate_samples])
def test_two_windows_are_judged(judge, stage):
    assert judge([WINDOW + 1], stage)["windows"] == 2


@pytest.mark.parametrize("stage", [evaluate_rollout, evaluate_samples])
def test_futures_that_copying_foretells_are_refused(judge, make_clip, write_cache, tmp_path, stage):
    def freeze(folder):
        """Only the past of every window moves."""
        clip = make_clip("/still.mp4", WINDOW + 2)
        clip.embeddings[CONTEXT - 1 :] = 1
        return write_cache(tmp_path / "still", [clip])

    with pytest.raises(UserError, match="still: no embedding ever changes, so nothing can beat copying it"):
        judge([40], stage, freeze)


def test_coverage_is_of_the_features_that_move():
    """Samples and what came are one distribution, but for a feature that never moves and samples that do."""
    generator = torch.Generator().manual_seed(0)
    drawn, future = torch.randn(99, 400, 2, 4, generator=generator), torch.randn(400, 2, 4, generator=generator)
    future[..., 1] = 5
    found = evaluate_samples.score(drawn, future, live_features(future))
    assert found["coverage_90%"].mean().item() == pytest.approx(0.9, abs=0.02)
    assert found["coverage_50%"].mean().item() == pytest.approx(0.5, abs=0.03)


def test_where_next_to_nothing_moves_no_coverage_is_claimed(judge, make_clip, write_cache, tmp_path):
    def calm(folder):
        clip = make_clip("/calm.mp4", 40)
        clip.embeddings[:] *= 1e-5
        return write_cache(tmp_path / "calm", [clip])

    with pytest.raises(UserError, match="calm: embeddings hardly change, so nothing can be foretold: bring moving"):
        judge([40], evaluate_samples, calm)
    assert not (tmp_path / "out").exists()


def test_of_few_stretches_no_interval_is_claimed(judge, tmp_path, capsys):
    """A stretch is 14 embeddings long, twice a window: 60 make four groups and the rest of a fifth."""
    results = judge([55])
    assert results["interval"] == "too few stretches of 3.5 s (4) for an interval"
    for record in results["predictors"]["model"]:
        assert record["relative_to_mean_interval"] is record["mse_interval"] is None
    useful, relative = results["useful_horizon"], [row["relative_to_mean"] for row in results["predictors"]["mean"]]
    assert all(one["by_point_estimate"] for one in useful.values())
    assert relative == [1, 1, 1, 1]
    assert useful["mean"]["steps"] == 0
    with (tmp_path / "out" / "rollout.csv").open() as file:
        row = next(csv.DictReader(file))
    assert float(row["mse"]) > 0
    assert row["mse_low"] == row["mse_high"] == ""
    assert "too few stretches of 3.5 s (4) for an interval: how long they are better" in capsys.readouterr().out


def test_of_enough_stretches_intervals_are_claimed(judge, tmp_path, capsys):
    results = judge([55, 20])
    assert results["interval"] == "95 %, bootstrap over 5 stretches of 3.5 s"
    for record in results["predictors"]["model"]:
        low, high = record["mse_interval"]
        assert low < record["mse"] < high
    assert not results["useful_horizon"]["model"]["by_point_estimate"]
    with (tmp_path / "out" / "rollout.csv").open() as file:
        assert float(next(csv.DictReader(file))["mse_low"]) > 0
    assert "too few" not in capsys.readouterr().out


@pytest.mark.parametrize(("frames", "interval"), [([55], None), ([55, 20], list)])
def test_of_samples_too(judge, frames, interval, capsys):
    results = judge(frames, evaluate_samples)
    for name in ("model", "gaussian"):
        for record in results[name]:
            found = record["energy_score_interval"]
            assert found is None if interval is None else found[0] <= record["energy_score"] <= found[1]
    assert ("too few stretches of 3.5 s (4) for an interval" in capsys.readouterr().out) == (interval is None)


@pytest.mark.parametrize(("frames", "message"), [(1, "only 1 videos or stretches"), (12, "only 12 moments can be pro")])
def test_probes_take_more_than_a_few_moments(make_clip, write_cache, tmp_path, frames, message):
    clip = make_clip(str(tmp_path / "a.mp4"), frames)
    (tmp_path / "a.csv").write_text("time_s,speed\n" + "".join(f"{time},{time}\n" for time in clip.times_s))
    cache = EmbeddingCache(write_cache(tmp_path / "cache", [clip]))
    predictor = Predictor(PredictorConfig(context=CONTEXT, width=8), 5, 4.0, "0123abcd")
    with pytest.raises(UserError, match=f"cache: {message}"):
        evaluate_rollout.fit_probe_on(cache, ["speed"], predictor)
