"""Sampled futures against a Gaussian: whose numbers are whose, and what cannot be compared."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from data.embedding_cache import CacheError
from jepa.bootstrap import Bootstrap
from jepa.predictor import Predictor, PredictorConfig
from pipelines.evaluate_samples import Options, main, score, summarise, table
from pipelines.stage import UserError


def test_numbers_of_known_samples():
    """19 samples in a row: around what came, or beside it by 100 and 50 times the distance of neighbours."""
    row = torch.arange(19.0) - 9
    scale = torch.tensor([1.0, 2.0]).repeat_interleave(6)  # of six videos with two windows each
    beside = {"model": torch.tensor([0.0, 0.0]), "gaussian": torch.tensor([100.0, 50.0])}
    future = torch.randn(12, 2, 3, generator=torch.Generator().manual_seed(0))
    measured = {
        name: [
            score(
                future[part] + (scale[part, None] * (row[:, None, None] + off))[..., None].expand(19, 6, 2, 3),
                future[part],
                torch.ones(3, dtype=torch.bool),
            )
            for part in (slice(6), slice(6, 12))
        ]
        for name, off in beside.items()
    }
    found = summarise(measured, Bootstrap(np.arange(12) // 2), fps=4.0)
    apart = 20 / 3 / 2  # half of what two different ones in a row of 19 lie apart
    expected = {"model": [90 / 19 - apart] * 2, "gaussian": [100 - apart, 50 - apart]}
    best = {"model": [0.0, 0.0], "gaussian": [2.5 * 91**2, 2.5 * 41**2]}
    for name, records in found.items():
        assert [(record["horizon"], record["time_s"]) for record in records] == [(1, 0.25), (2, 0.5)]
        for step, record in enumerate(records):
            assert record["energy_score"] == pytest.approx(1.5 * expected[name][step], rel=1e-4)
            # Of six draws, with 95 % from one to five are of the videos with the larger scale.
            ends = [(1 + larger / 6) * expected[name][step] for larger in (1, 5)]
            assert record["energy_score_interval"] == pytest.approx(ends, rel=1e-4)
            assert record["best_of"] == pytest.approx(best[name][step], rel=1e-3, abs=1e-3)
            assert record["coverage_50%"] == record["coverage_90%"] == (name == "model")
    for step, record in enumerate(found["model"]):
        ratio = expected["model"][step] / expected["gaussian"][step]
        assert record["energy_score_relative_to_gaussian"] == pytest.approx(ratio, rel=1e-4)
        # The same on each video, so that both together have no doubt about it.
        assert record["energy_score_relative_to_gaussian_interval"] == pytest.approx([ratio, ratio], rel=1e-4)
    shown = table({**found, "fps": 4.0, "samples": 19, "windows": 4}).splitlines()
    assert [line.split()[0] for line in shown[2:4]] == ["model", "gaussian"]
    assert float(shown[2].split()[1]) == pytest.approx(1.5 * expected["model"][0], abs=1e-3)


def make(folder, **changes):
    """A calibrated predictor that copies, whatever it draws, left in a folder."""
    config = PredictorConfig(context=3, width=16, depth=1, latent_dimension=changes.pop("latent_dimension", 2))
    config = replace(config, context=changes.pop("context", 3))
    predictor = Predictor(config, 5, 4.0, changes.pop("encoder", "0123abcd")).eval()
    predictor.mean.fill_(changes.pop("mean", 0.0))
    predictor.energy_quantiles.fill_(changes.pop("quantiles", 1.0))
    assert not changes
    predictor.save_pretrained(folder)
    return predictor


@pytest.fixture
def options(tmp_path, make_clip, write_cache):
    """Random embeddings of videos that are not in both caches, and a predictor that copies."""
    for seed, split in enumerate(("test", "val")):
        write_cache(tmp_path / split, [make_clip(f"/{split}_{name}.mp4", 60, seed=2 * seed + name) for name in (0, 1)])
    make(tmp_path / "predictor")
    return Options(
        tmp_path / "test", tmp_path / "val", tmp_path / "predictor", output_dir=tmp_path / "out", horizon=2,
        samples=40, resamples=50,
    )  # fmt: skip


def test_equal_samples_cover_nothing_and_a_gaussian_what_it_promises(options):
    """All samples of an untrained predictor are one copy; the noise around it is as wide as its errors."""
    main(options)
    results = json.loads((options.output_dir / "samples.json").read_text())
    for copied, spread in zip(results["model"], results["gaussian"], strict=True):
        assert copied["coverage_90%"] == 0
        assert spread["coverage_50%"] == pytest.approx(0.5, abs=0.1)
        assert spread["coverage_90%"] == pytest.approx(0.9, abs=0.1)
        assert copied["energy_score_relative_to_gaussian"] > 1.1
        assert copied["best_of"] > spread["best_of"]
    metrics = json.loads((options.output_dir / "metrics.json").read_text())
    assert metrics["gaussian_2_coverage_90%"] == results["gaussian"][1]["coverage_90%"]


def test_a_point_forecast_on_the_same_embeddings_is_taken(options, tmp_path):
    point = make(tmp_path / "point", latent_dimension=0)
    torch.nn.init.constant_(point.members[0].head.bias, 5.0)
    point.save_pretrained(tmp_path / "point")
    main(options)
    around_samples = json.loads((options.output_dir / "samples.json").read_text())
    main(replace(options, point_predictor=tmp_path / "point", overwrite=True))
    around_point = json.loads((options.output_dir / "samples.json").read_text())
    assert around_point["gaussian"][0]["energy_score"] > 1.5 * around_samples["gaussian"][0]["energy_score"]
    assert around_point["model"][0]["coverage_50%"] == around_samples["model"][0]["coverage_50%"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quantiles": 0.0}, "point is not calibrated"),
        ({"encoder": "other"}, "point was trained on other embeddings than the predictor"),
        ({"mean": 0.5}, "point was trained on other embeddings than the predictor"),
        ({"context": 4}, "point has a context of 4, the predictor of 3"),
    ],
)
def test_a_point_forecast_that_cannot_be_compared_is_refused(options, tmp_path, changes, said):
    make(tmp_path / "point", latent_dimension=0, **changes)
    with pytest.raises(UserError, match=said):
        main(replace(options, point_predictor=tmp_path / "point"))
    assert not options.output_dir.exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"latent_dimension": 0}, "knows one future only: train one with --predictor.latent-dimension"),
        ({"quantiles": 0.0}, "predictor is not calibrated"),
    ],
)
def test_a_predictor_that_cannot_be_sampled_is_refused(options, tmp_path, changes, said):
    make(tmp_path / "predictor", **changes)
    with pytest.raises(UserError, match=said):
        main(options)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"samples": 18}, "--samples is 18: a central interval of 90 % takes at least 19"),
        *(({name: 0}, f"--{name} is 0: it must be positive") for name in ("horizon", "stride", "resamples")),
    ],
)
def test_numbers_that_make_no_sense_are_refused(options, changes, said):
    with pytest.raises(UserError, match=said):
        main(replace(options, **changes))


def test_a_video_in_both_caches_is_refused(options, tmp_path, make_clip, write_cache):
    clips = [make_clip(f"/{name}.mp4", 60) for name in ("val_0", "test_1")]
    write_cache(tmp_path / "overlapping", clips)
    with pytest.raises(UserError, match=r"test_1\.mp4 is in both --cache and --validation-cache"):
        main(replace(options, validation_cache=tmp_path / "overlapping"))
    assert not options.output_dir.exists()


@pytest.mark.parametrize("which", ["cache", "validation_cache"])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"encoder_fingerprint": "other"}, "other was made by encoder other, but .*predictor belongs to"),
        ({"fps": 8.0}, "other lies on a clock of 8 fps, but .*predictor on one of 4 fps"),
    ],
)
def test_a_cache_of_other_embeddings_is_refused(options, tmp_path, make_clip, write_cache, which, changes, said):
    write_cache(tmp_path / "other", [make_clip("/other.mp4", 60)], **changes)
    with pytest.raises(CacheError, match=said):
        main(replace(options, **{which: tmp_path / "other"}))
