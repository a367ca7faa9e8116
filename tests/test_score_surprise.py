"""Surprise: scored from caches, peaks shown with their frames, a video that is unlike the others said to be so."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.cache import Column, EmbeddingCache
from data.errors import DataError
from jepa.networks import MLPConfig, TransformerConfig
from jepa.rollout import rollout
from jepa.sequence import Future, Sequence
from pipelines import score_surprise, train_predictor
from pipelines.run import models
from pipelines.run.command import UserError
from pipelines.run.models import load_predictor
from pipelines.run.scoring import Scores
from tests.conftest import read_rows
from tests.test_train_predictor import turning


@pytest.fixture(scope="module")
def world(tmp_path_factory, make_clip, write_cache, encode_video):
    """A trained predictor, and a cache of two videos that are there, one with an event; the last is too short."""
    folder = tmp_path_factory.mktemp("world")
    for split, clips in (("train", 12), ("val", 8)):
        made = [
            make_clip(f"/videos/{split}_{clip}.mp4", 40, embeddings=turning(40, seed=len(split) * 100 + clip))
            for clip in range(clips)
        ]
        write_cache(folder / split, made)
    train_predictor.main(
        train_predictor.Options(
            train_cache=folder / "train", validation_cache=folder / "val", output_dir=folder / "predictor",
            steps=100, batch_size=16, rollout_steps=2, validation_horizon=4, tracker=("none",),
            predictor=MLPConfig(context=4, width=32, depth=1),
        )
    )  # fmt: skip
    made = []
    for name, frames, gaps in (("a $plain", 40, [20]), ("event", 40, []), ("short", 3, [])):
        video = encode_video(folder / f"{name}.mp4", np.arange(frames) / 4)
        made.append(make_clip(video, frames, gaps, embeddings=turning(frames, seed=7)))
    made[1].columns["embeddings"][25:] += 1.5
    write_cache(folder / "test", made)
    return folder


def score(world, output, **changes):
    values = {"cache": world / "test", "predictor": world / "predictor", "output_dir": output}
    score_surprise.main(score_surprise.Options(**values | changes))
    return read_rows(output / "surprise.csv"), read_rows(output / "peaks.csv")


def test_an_event_is_the_highest_peak_and_its_echo_is_none(world, tmp_path, capsys):
    rows, peaks = score(world, tmp_path / "run", peaks=2)
    event = [row for row in peaks if "event" in row["video"]]
    assert float(event[0]["time_s"]) == 25 / 4
    assert float(event[0]["percentile"]) > 99
    assert all(abs(float(row["time_s"]) - 25 / 4) > 1 for row in event[1:])  # the context is four ticks
    # After the gap there is no forecast until a whole past has been seen again.
    times = [float(row["time_s"]) for row in rows if "plain" in row["video"]]
    assert times == [tick / 4 for tick in (*range(4, 20), *range(26, 42))]
    assert {path.name for path in (tmp_path / "run").glob("*.csv")} == {"surprise.csv", "peaks.csv"}
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (metrics["videos"], metrics["too_short_videos"]) == (2, 1)
    assert "1 video without 5 frames in a row: not scored" in capsys.readouterr().out


@pytest.mark.parametrize("horizons", [(1,), (3,), (1, 2, 3)])
def test_energies_are_those_of_the_calibrated_forecast(world, tmp_path, horizons, monkeypatch):
    monkeypatch.setattr(models, "BATCH_NUMBERS", 2000)
    rows, _ = score(world, tmp_path / "run", horizons=horizons)
    horizon, middle = max(horizons), sum(horizons) // len(horizons)
    predictor, calibration = load_predictor(world / "predictor")
    cache = EmbeddingCache(world / "test")
    (clip,) = [clip for clip in cache.clips if "event" in clip.key.source]
    embeddings = torch.from_numpy(cache.take(clip.rows))
    past = Sequence.on_clock(embeddings[None, 10:14], 4.0)
    with torch.no_grad():
        believed = rollout(predictor, past, Future.ticks(horizon, 4.0), calibration=calibration)
    came = embeddings[None, 14 : 14 + horizon]
    energies = calibration.energy(believed, came, torch.arange(1, horizon + 1))[0]
    expected = energies[[step - 1 for step in horizons]].mean()
    (row,) = [row for row in rows if "event" in row["video"] and float(row["time_s"]) == (13 + middle) / 4]
    assert float(row["energy"]) == pytest.approx(float(expected), abs=1e-3)


def test_no_name_costs_the_others_their_scores(world, tmp_path, make_clip, write_cache, encode_video, capsys):
    names = ["a$5_$10", "new\nline", "\x1b[31mred", os.fsdecode(b"M\xe4rz"), "x" * 250, "ü" * 125, "-f", "%s\\"]
    made = []
    for seed, name in enumerate(names):
        video = encode_video(tmp_path / "v.mp4", np.arange(20) / 4).rename(tmp_path / f"{name}.mp4")
        made.append(make_clip(video, 20, embeddings=turning(20, seed=seed)))
    rows, peaks = score(world, tmp_path / "run", cache=write_cache(tmp_path / "names", made))
    assert len({row["video"] for row in rows}) == len({row["video"] for row in peaks}) == len(names)
    said = capsys.readouterr().out.splitlines()
    assert all(line.isprintable() for line in said)
    assert sum("most surprising at" in line for line in said) == len(names)


def test_alarms_are_as_rare_as_is_asked_and_say_from_when_to_when(world, tmp_path, make_clip, write_cache, capsys):
    made = [make_clip(f"/videos/n_{seed}.mp4", 60, embeddings=turning(60, seed=900 + seed)) for seed in range(10)]
    normal = write_cache(tmp_path / "normal", made)
    score(world, tmp_path / "run", normal=normal, alarms_per_hour=60)
    events = read_rows(tmp_path / "run" / "events.csv")
    assert {"event" in row["video"] for row in events} == {True}
    assert float(events[0]["begin_s"]) == float(events[0]["peak_s"]) == 25 / 4
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["events"] == len(events)
    assert f"of an energy above {metrics['threshold']:.2f} in 0.3 minutes; were" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"normal: 2.3 minutes of ordinary video say nothing of 2 alarms an hour"):
        score(world, tmp_path / "other", normal=normal, alarms_per_hour=2)
    with pytest.raises(UserError, match="is in both"):
        score(world, tmp_path / "other", normal=world / "test", alarms_per_hour=60)


@pytest.mark.parametrize("truth", ["event", "energy", "video", "mahalanobis"])
def test_what_happened_stands_beside_our_own_columns_whatever_it_is_called(
    world, tmp_path, make_clip, write_cache, truth
):
    happened = np.zeros(40)
    happened[25:] = 1
    clip = make_clip("/videos/event.mp4", 40, embeddings=turning(40, seed=7), **{truth: happened})
    clip.columns["embeddings"][25:] += 1.5
    folder = write_cache(tmp_path / "cache", [clip], columns={truth: Column("float64")})
    rows, _ = score(world, tmp_path / "run", cache=folder, truth=truth)
    ours = ["video", "time_s", "energy", "percentile", "change_cosine", "copying", "mahalanobis", "difference"]
    shown = truth if truth == "event" else f"own_{truth}"
    assert list(rows[0]) == [*ours, shown]
    assert [float(row[shown]) for row in rows] == happened[4:].tolist()
    assert {row["video"] for row in rows} == {"/videos/event.mp4"}
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["auroc_mahalanobis"] > 0.9


def test_one_column_tells_what_happened(world, tmp_path, make_clip, write_cache):
    columns = {name: np.zeros(40) for name in ("is_a", "is_b")}
    clip = make_clip("/videos/event.mp4", 40, embeddings=turning(40, seed=7), **columns)
    folder = write_cache(tmp_path / "cache", [clip], columns=dict.fromkeys(columns, Column("float64")))
    with pytest.raises(UserError, match=r"--truth is_\* stands for is_a, is_b: name one"):
        score(world, tmp_path / "run", cache=folder, truth="is_*")


@pytest.fixture(scope="module")
def grid_world(tmp_path_factory, make_clip, write_cache):
    """A predictor of 4 x 6 places, and a cache in which one place changes its ways after 5 s; two clocks take turns."""
    folder = tmp_path_factory.mktemp("grid")
    columns = {"embeddings": Column("float32", (4, 6, 5))}

    def clip(name, seed, offset_s=0.0):
        steps = turning(30, seed=seed)[:, None, None].repeat(4, 1).repeat(6, 2)
        return make_clip(f"/videos/{name}.mp4", 30, offset_s=offset_s, embeddings=steps)

    for split, number in (("train", 6), ("val", 4)):
        write_cache(folder / split, [clip(f"{split}_{one}", one + number) for one in range(number)], columns=columns)
    write_cache(folder / "normal", [clip(f"normal_{one}", one + 50) for one in range(4)], columns=columns)
    strange = [clip("strange", 77, offset_s) for offset_s in (0.0, 0.125)]
    for one in strange:
        one.columns["embeddings"][20:22, 1, 4] += 2
    write_cache(folder / "test", strange, columns=columns)
    train_predictor.main(
        train_predictor.Options(
            train_cache=folder / "train", validation_cache=folder / "val", output_dir=folder / "predictor",
            steps=20, batch_size=48, rollout_steps=2, validation_horizon=3, tracker=("none",),
            predictor=TransformerConfig(context=4, width=16, depth=1, heads=2),
        )
    )  # fmt: skip
    return folder


def test_of_a_grid_the_place_is_told_and_clocks_are_one_timeline(grid_world, tmp_path):
    rows, peaks = score(grid_world, tmp_path / "run", horizons=(1, 2, 3), peaks=1)
    times = [float(row["time_s"]) for row in rows]
    assert times == sorted(times)
    assert np.diff(times) == pytest.approx(0.125)
    assert (peaks[0]["row"], peaks[0]["column"]) == ("1", "4")
    with (tmp_path / "run" / "maps.csv").open() as file:
        (_, rank, *cells), *_ = [*csv.reader(file)][1:]
    assert (rank, len(cells), np.argmax([float(cell) for cell in cells])) == ("1", 4 * 6, 1 * 6 + 4)
    assert float(peaks[0]["time_s"]) == pytest.approx(5, abs=0.8)


def draw(path, *places, size=(40, 60), grid=(4, 6)):
    """A picture, white on some places."""
    picture = np.zeros(grid, np.uint8)
    for place in places:
        picture[place] = 255
    Image.fromarray(picture).resize(size[::-1], Image.Resampling.NEAREST).save(path)
    return path


def test_what_happens_in_an_ignored_region_is_no_alarm(grid_world, tmp_path):
    def events(**changes):
        rows, _ = score(grid_world, output := tmp_path / str(len(changes)), normal=grid_world / "normal", **changes)
        return rows, json.loads((output / "metrics.json").read_text())

    rows, metrics = events(alarms_per_hour=200)
    masked, ignoring = events(alarms_per_hour=200, ignore_region=draw(tmp_path / "mask.png", (1, 4), (0, 0)))
    assert (metrics["events"], ignoring["events"]) == (1, 0)
    assert {(row["row"], row["column"]) for row in masked}.isdisjoint({("1", "4"), ("0", "0")})
    assert (
        max(float(row["energy"]) for row in masked) < ignoring["threshold"] < max(float(row["energy"]) for row in rows)
    )


def test_a_region_that_cannot_be_ignored_is_refused(world, grid_world, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    everything = [(row, column) for row in range(4) for column in range(6)]
    for picture, reason in (
        (tmp_path / "none.png", r"none.png: not a readable picture \(No such file or directory\)"),
        (tmp_path / "text.png", "text.png: not a readable picture: give one of AVIF, .*WEBP"),
        (draw(tmp_path / "small.png", (0, 0), size=(3, 60)), "3 x 60 pixels are fewer than the 4 x 6 places"),
        (draw(tmp_path / "black.png"), "cover 0 of 24 places for the most part: white is what is ignored"),
        (draw(tmp_path / "white.png", *everything), "cover 24 of 24"),
    ):
        with pytest.raises((UserError, DataError), match=f"--ignore-region .*{reason}"):
            score(grid_world, tmp_path / picture.stem, ignore_region=picture)
    with pytest.raises(UserError, match="embeddings without places have no region to ignore"):
        score(world, tmp_path / "run", ignore_region=draw(tmp_path / "mask.png", (1, 4)))


def test_a_video_unlike_all_others_is_said_to_be_so(world, tmp_path, make_clip, write_cache, capsys):
    noise = make_clip("/videos/gone.mp4", 60)
    noise.columns["embeddings"] *= 3
    write_cache(tmp_path / "strange", [noise])
    score(world, tmp_path / "run", cache=tmp_path / "strange")
    assert "its ordinary level is far above what the calibration calls ordinary" in capsys.readouterr().out


def test_what_cannot_be_scored_is_refused(world, tmp_path, make_clip, write_cache, damage_cache):
    with pytest.raises(UserError, match="give --cache, or --videos"):
        score(world, tmp_path / "run", videos=(Path("x.mp4"),))
    with pytest.raises(UserError, match="the calibration knows what is usual from 1 to 4"):
        score(world, tmp_path / "run", horizons=(9,))
    broken = damage_cache(write_cache(tmp_path / "broken", [make_clip("/videos/x.mp4", 30)]))
    with pytest.raises(UserError, match="not finite"):
        score(world, tmp_path / "run", cache=broken)


def test_peaks_are_the_highest_within_reach():
    energies = np.array([0, 5, 4, 3, 1, 1, 6, 1, 1, 2.0])
    scores = Scores("v", np.arange(10) / 4, energies, energies, energies, energies, level=50.0, reach_s=0.5)
    assert scores.peaks(5) == [6, 1, 9]
    assert scores.peaks(2) == [6, 1]


def test_energy_is_the_mean_of_the_seconds_up_to_a_moment(world, tmp_path):
    plain, _ = score(world, tmp_path / "plain")
    smooth, _ = score(world, tmp_path / "smooth", smoothing=0.5)  # two ticks
    by_time = {(row["video"], row["time_s"]): row for row in plain}
    for row in smooth:
        before = by_time.get((row["video"], f"{float(row['time_s']) - 0.25:.3f}"), by_time[row["video"], row["time_s"]])
        of_both = [float(one["energy"]) for one in (before, by_time[row["video"], row["time_s"]])]
        assert float(row["energy"]) == pytest.approx(np.mean(of_both), abs=1e-3)
        assert row["percentile"] == by_time[row["video"], row["time_s"]]["percentile"]
