"""The command that judges forecasts, on random embeddings and with a predictor that never trained."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from data.cache import Column, EmbeddingCache
from data.windows import Windows
from jepa.baselines import Ridge
from jepa.calibration import Calibration
from jepa.metrics import squared_error
from jepa.networks import MLPConfig
from jepa.predictor import Predictor
from jepa.rollout import rollout
from jepa.sequence import Future, Sequence
from pipelines import evaluate_rollout
from pipelines.run import evaluation, models
from pipelines.run.artefacts import save_artefact
from pipelines.run.command import UserError
from pipelines.run.evaluation import Evaluation, fit_readout
from pipelines.run.models import calibration_artefact
from tests.conftest import assert_near, read_rows

CONTEXT, HORIZON = 3, 4
WINDOW = CONTEXT + HORIZON
ROWS = ["model", "rollout", "ridge", "copy_last", "linear_extrapolation", "mean"]


def make_model(shape=(5,), latent_dimension=0):
    """A predictor with random weights, and a calibration that believes some of everything."""
    torch.manual_seed(0)
    config = MLPConfig(context=CONTEXT, width=8, depth=1, latent_dimension=latent_dimension)
    predictor = Predictor(config, shape, fps=4.0, encoder_fingerprint="0123abcd")
    torch.nn.init.normal_(predictor.head.weight, std=0.3)
    predictor.mean.normal_()
    predictor.std.uniform_(0.5, 2)
    ridge = Ridge(4.0, 2, mean=predictor.mean, std=predictor.std, on_grid=False)
    torch.nn.init.normal_(ridge.weight, std=0.2)
    calibration = Calibration(ridge, HORIZON)
    calibration.blend[:] = torch.tensor([0.4, 0.3, 0.2, 0.1])
    return predictor.eval(), calibration.eval()


def save_model(folder, **kind):
    predictor, calibration = make_model(**kind)
    folder.mkdir()
    save_artefact(folder / "predictor", "predictor", predictor.description(), predictor)
    save_artefact(folder / "calibration", *calibration_artefact(calibration, predictor, "others"))


@pytest.fixture
def judge(tmp_path, make_clip, write_cache):
    """Make a cache of clips of so many frames, judge on it, and return what was found."""
    save_model(tmp_path / "predictor")

    def run(frames, change=lambda folder: folder, **options):
        clips = [make_clip(str(tmp_path / f"{number}.mp4"), count, seed=number) for number, count in enumerate(frames)]
        cache = change(write_cache(tmp_path / "cache", clips))
        options = {"horizon": HORIZON, "predictor": tmp_path / "predictor"} | options
        evaluate_rollout.main(evaluate_rollout.Options(cache=cache, output_dir=tmp_path / "out", **options))
        return json.loads((tmp_path / "out" / "rollout.json").read_text(), parse_constant=refuse_constant)

    return run


def refuse_constant(name):
    """NaN and Infinity are no JSON."""
    raise AssertionError(f"{name} in a JSON file")


@pytest.fixture
def judged_on(tmp_path, write_cache):
    """Judge a model with random weights on clips of one shape."""

    def make(clips, latent_dimension=0, samples=0):
        shape = clips[0].columns["embeddings"].shape[1:]
        predictor, calibration = make_model(shape, latent_dimension)
        folder = write_cache(tmp_path / "cache", clips, shape=shape)
        return Evaluation(predictor, calibration, Windows(EmbeddingCache(folder), WINDOW), samples=samples)

    return make


def forecast_all(judge):
    return judge.forecast(models.take_windows(judge.windows, np.arange(len(judge.windows)), torch.device("cpu")))


@pytest.mark.parametrize(("shape", "latent_dimension"), [((5,), 0), ((5,), 2), ((2, 3, 4), 0)])
def test_the_model_is_the_calibrated_forecast_and_the_rollout_the_bare_network(
    judged_on, make_clip, shape, latent_dimension
):
    judge = judged_on([make_clip("/a.mp4", 30, shape=shape)], latent_dimension)
    embeddings, batch = judge.windows.take(np.arange(len(judge.windows))), forecast_all(judge)
    past, future = Sequence.on_clock(embeddings[:, :CONTEXT], 4.0), Future.ticks(HORIZON, 4.0)
    with torch.no_grad():
        believed = rollout(judge.predictor, past, future, calibration=judge.calibration)
        bare = rollout(judge.predictor, past, future)
    assert list(batch.forecasts) == ROWS
    assert torch.allclose(batch.forecasts["model"], judge.predictor.standardise(believed), atol=1e-6)
    assert torch.allclose(batch.came, judge.predictor.standardise(embeddings[:, CONTEXT:]))
    if not latent_dimension:
        assert torch.allclose(batch.forecasts["rollout"], judge.predictor.standardise(bare), atol=1e-6)
    assert torch.allclose(batch.forecasts["mean"], torch.zeros_like(batch.came), atol=1e-6)
    last, before = (judge.predictor.standardise(embeddings[:, CONTEXT - back]) for back in (1, 2))
    for step in range(HORIZON):
        assert torch.allclose(batch.forecasts["copy_last"][:, step], last, atol=1e-6)
        extrapolated = last + (step + 1) * (last - before)
        assert torch.allclose(batch.forecasts["linear_extrapolation"][:, step], extrapolated, atol=1e-5)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4)])
def test_numbers_are_those_of_all_windows_at_once(judged_on, make_clip, shape, monkeypatch):
    clips = [make_clip(f"/{number}.mp4", 40, gaps=(9,), seed=number, shape=shape) for number in range(3)]
    judge = judged_on(clips)
    whole, batch = judge.run(resamples=20), forecast_all(judge)
    monkeypatch.setattr(models, "BATCH_NUMBERS", 5000)
    assert_near(judge.run(resamples=20), whole)
    errors = {name: squared_error(value, batch.came).double().mean(dim=0) for name, value in batch.forecasts.items()}
    for step in range(HORIZON):
        record = whole["predictors"]["model"][step]
        assert record["mse"] == pytest.approx(float(errors["model"][step]), rel=1e-5)
        for to in ("copy_last", "ridge", "mean"):
            expected = float(errors["model"][step] / errors[to][step])
            assert record[f"relative_to_{to}"] == pytest.approx(expected, rel=1e-5)


def test_fewer_windows_are_spread_evenly(judge, monkeypatch):
    monkeypatch.setattr(evaluation, "DETAILED", 7)
    results = judge([80, 80], windows=25)
    assert results["windows"] == 25
    assert judge([80, 80], windows=1000, overwrite=True)["windows"] == 148


def test_a_damaged_cache_is_refused(judge, damage_cache):
    with pytest.raises(
        UserError, match=r"cache holds embeddings that are not finite: `video-jepa inspect .*cache --verify`"
    ):
        judge([40, 40], damage_cache)


def test_one_window_is_judged_without_intervals(judge):
    results = judge([WINDOW])
    assert results["windows"] == 1
    assert results["predictors"]["model"][0]["mse"] > 0
    assert results["predictors"]["model"][0]["mse_low"] is None


def test_futures_that_copying_foretells_are_refused(judge, make_clip, write_cache, tmp_path):
    def freeze(folder):
        """Only the past of every window moves."""
        clip = make_clip("/still.mp4", WINDOW + 2)
        clip.columns["embeddings"][CONTEXT - 1 :] = 1
        return write_cache(tmp_path / "still", [clip])

    with pytest.raises(UserError, match="still: no embedding ever changes, so nothing can beat copying it"):
        judge([40], freeze)


def test_another_encoder_is_refused_and_finished_results_are_kept(judge, tmp_path, write_cache, make_clip, monkeypatch):
    def other(folder):
        return write_cache(tmp_path / "other", [make_clip("/a.mp4", 40)], encoder_fingerprint="other")

    with pytest.raises(Exception, match="other"):
        judge([40], other)
    results = judge([40])
    with pytest.raises(UserError, match="holds a finished run: add --overwrite"):
        judge([40])

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(evaluate_rollout, "write_table", full)
    with pytest.raises(OSError, match="No space"):
        judge([40], windows=3, overwrite=True)
    assert json.loads((tmp_path / "out" / ".replaced" / "rollout.json").read_text()) == results


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"samples": 18}, "--samples is 18: a central interval of 90 % takes at least 19"),
        ({"probe_columns": ("speed",)}, "--probe-cache and --probe-columns belong together"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(judge, options, said):
    with pytest.raises((UserError, ValueError), match=said):
        judge([40], **options)


def test_of_few_segments_no_interval_is_claimed(judge, tmp_path, capsys):
    """A segment is 14 embeddings long, twice a window: 60 make four groups and the rest of a fifth."""
    results = judge([55])
    assert results["interval"] == "too few segments of 3.5 s (4) for an interval"
    for record in results["predictors"]["model"]:
        assert record["relative_to_mean_high"] is record["mse_low"] is None
    assert [row["relative_to_mean"] for row in results["predictors"]["mean"]] == [1, 1, 1, 1]
    assert results["useful_horizon"]["mean"]["steps"] == 0
    row = read_rows(tmp_path / "out" / "rollout.csv")[0]
    assert float(row["mse"]) > 0
    assert row["mse_low"] == row["mse_high"] == ""
    assert "by point estimates" in capsys.readouterr().out


def test_of_enough_segments_intervals_are_claimed(judge, tmp_path, capsys):
    results = judge([55, 20])
    assert results["interval"] == "95 %, bootstrap over 5 segments of 3.5 s"
    for record in results["predictors"]["model"]:
        assert record["mse_low"] < record["mse"] < record["mse_high"]
    rows = read_rows(tmp_path / "out" / "rollout.csv")
    assert float(rows[0]["mse_low"]) > 0
    assert [row["predictor"] for row in rows[::HORIZON]] == [*ROWS, "truth"]
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["relative_to_copy_last_at_4"] == results["predictors"]["model"][3]["relative_to_copy_last"]
    assert metrics["useful_horizon_s"] == results["useful_horizon"]["model"]["time_s"]
    assert "too few" not in capsys.readouterr().out


def test_copies_cover_nothing_and_usual_errors_what_they_promise(judged_on, make_clip):
    """Without a latent, futures are the forecast with Gaussian errors as wide as they are usually."""
    judge = judged_on([make_clip(f"/{number}.mp4", 60, seed=number) for number in range(8)], samples=40)
    batch = forecast_all(judge)
    errors = (batch.came - batch.forecasts["model"]).double()
    judge.calibration.error_mean.copy_(errors.mean(dim=0))
    for step in range(HORIZON):
        values, vectors = torch.linalg.eigh(errors[:, step].T.cov())
        judge.calibration.whitening[step] = (vectors / values.sqrt()) @ vectors.T
    record = judge.run(resamples=20)["predictors"]["model"][2]
    assert record["coverage_50"] == pytest.approx(0.5, abs=0.03)
    assert record["coverage_90"] == pytest.approx(0.9, abs=0.03)
    judge.calibration.whitening *= 1e4  # errors that are next to nothing
    sure = judge.run(resamples=20)["predictors"]["model"][2]
    assert sure["coverage_90"] < 0.05
    assert sure["energy_score"] > 1.1 * record["energy_score"]


def test_a_latent_draws_futures_that_calibration_widens(judged_on, make_clip):
    judge = judged_on([make_clip("/a.mp4", 60)], latent_dimension=2, samples=30)
    batch, drawn = forecast_all(judge), []
    for spread in (1.0, 2.0):
        judge.calibration.sample_spread.fill_(spread)
        judge.generator.manual_seed(0)
        drawn.append(judge.sample(batch))
    assert drawn[0].shape == (30, 54, HORIZON, 5)
    assert drawn[0].std() > 0
    assert torch.allclose(drawn[1].std(dim=0), 2 * drawn[0].std(dim=0), rtol=1e-3)


def with_state(clip, gap=()):
    """`x`, which is linear in the embeddings, `still`, and `x_low`, like an interval's end, used in one video alone."""
    x = clip.columns["embeddings"][:, 0].astype(np.float64)
    pedal = x if "52" in clip.key.source else np.full_like(x, 0.1)
    x = x.copy()
    x[list(gap)] = np.nan
    columns = {"x": x, "still": np.full_like(pedal, 7.0), "x_low": pedal}
    return replace(clip, columns=clip.columns | columns)


COLUMNS = {name: Column("float64") for name in ("x", "still", "x_low")}


@pytest.fixture
def probed(tmp_path, make_clip, write_cache):
    """Two caches whose columns say what the embeddings are."""
    for name, offset in (("probe", 0), ("test", 50)):
        clips = [
            with_state(make_clip(f"/{name}/{offset + number}.mp4", 60, seed=offset + number)) for number in range(6)
        ]
        write_cache(tmp_path / name, clips, columns=COLUMNS)
    return tmp_path


def test_true_state_is_read_off_what_came_and_less_off_forecasts(probed, judge):
    results = judge([], lambda _: probed / "test", probe_cache=probed / "probe", probe_columns=("x", "still", "x_low"))
    assert results["probe_columns"] == ["x", "still", "x_low"]
    for step in range(HORIZON):
        truth, model = results["truth"][step], results["predictors"]["model"][step]
        assert truth["probe_r2_x"] > 0.99
        assert truth["probe_r2_x_low"] > 0.98
        assert model["probe_r2_x"] < 0.9
        assert truth["probe_r2_still"] is truth["probe_r2_still_low"] is None  # it never varies
        assert truth["probe_r2"] == pytest.approx((truth["probe_r2_x"] + truth["probe_r2_own_x_low"]) / 2)
        assert min(truth["probe_r2_own_x_low_low"], model["probe_r2_own_x_low_low"]) > -100


def test_columns_that_are_not_there_are_named(probed, judge):
    with pytest.raises(UserError, match=r"probe has no numbers speed, .* cache its videos again with --columns speed"):
        judge([], lambda _: probed / "test", probe_cache=probed / "probe", probe_columns=("speed",))
    with pytest.raises(UserError, match=r"/test/50\.mp4 is in both|is in both .*test and .*test"):
        judge([], lambda _: probed / "test", probe_cache=probed / "test", probe_columns=("x",), overwrite=True)


def test_frames_without_state_are_left_out_of_probes(tmp_path, make_clip, write_cache):
    predictor, _ = make_model()
    clip = make_clip("/a.mp4", 60)
    whole, holey = (write_cache(tmp_path / name, [with_state(clip, gap)], columns=COLUMNS) for name, gap in
                    (("whole", ()), ("holey", range(5, 12))))  # fmt: skip
    probes = [fit_readout(EmbeddingCache(folder), ("x",), predictor).probe for folder in (whole, holey)]
    assert torch.allclose(probes[0].columns[0], probes[1].columns[0], atol=0.5)
    assert not torch.equal(probes[0].columns[0], probes[1].columns[0])
    empty = write_cache(tmp_path / "empty", [with_state(clip, range(60))], columns=COLUMNS)
    with pytest.raises(UserError, match="empty: only 0 frames say x, and 3 are needed"):
        fit_readout(EmbeddingCache(empty), ("x",), predictor)


def test_a_predictor_without_its_calibration_is_refused(judge, tmp_path):
    (tmp_path / "predictor" / "calibration" / "config.json").unlink()
    with pytest.raises(UserError, match="calibration"):
        judge([40])
