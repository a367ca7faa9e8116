"""The stage as its options run it, on caches whose embeddings know a known part of what lies beside the videos."""

import csv
import json

import numpy as np
import pytest

from data.embedding_cache import CacheError, EmbeddingCache
from data.sidecar import SidecarError
from pipelines.probe_embeddings import Options, label_windows, main
from pipelines.stage import UserError


@pytest.fixture
def write_world(tmp_path, make_clip, write_cache):
    """A cache of some videos, beside each of which a CSV says what the embeddings of one frame tell and what not."""

    def write(folder, names, frames=40, **changes):
        clips = []
        for seed, name in enumerate(names):
            clip = make_clip(str(tmp_path / f"{name}.mp4"), frames, seed=ord(name))
            clips.append(clip)
            known, velocity = clip.embeddings[:, 0], np.diff(clip.embeddings[:, 0], prepend=0)
            luck = np.random.default_rng(seed).normal(size=frames)
            with (tmp_path / f"{name}.csv").open("w") as file:
                file.write("time_s,place,velocity,luck,gear\n")
                for row in zip(clip.times_s, known, velocity, luck, strict=True):
                    file.write(",".join(map(str, row)) + ",1\n")
        return write_cache(tmp_path / folder, clips, **changes)

    return write


def run(tmp_path, cache, **changes):
    options = {"kind": ("ridge",), "columns": ("place", "velocity", "luck"), "window": (1, 2), "resamples": 200}
    main(Options(cache=cache, output_dir=tmp_path / "out", **options | changes))
    results = json.loads((tmp_path / "out" / "probes.json").read_text())
    return results, {(record["column"], record["window"]): record for record in results["probes"]}


def test_probes_know_what_the_frames_know(tmp_path, write_world, capsys):
    results, records = run(tmp_path, write_world("cache", "abcdefgh"))
    assert results["validation"] == "5 folds over 8 videos"
    assert results["moments"] == 8 * 39  # those with two frames, also for the probe of one
    assert records["place", 1]["r2"] > 0.99
    assert 0.2 < records["velocity", 1]["r2"] < 0.8  # one frame tells half of it
    assert records["velocity", 2]["r2"] > 0.99
    assert records["luck", 1]["r2"] < 0.1
    for record in records.values():
        assert record["r2_interval"][0] < record["r2"] < record["r2_interval"][1]
        assert len(record["chosen"]) == 5
    with (tmp_path / "out" / "probes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert float(rows[0]["r2_low"]) == records["place", 1]["r2_interval"][0]
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["ridge_2_velocity_r"] == records["velocity", 2]["r"]
    assert (tmp_path / "out" / "probes.png").stat().st_size > 5000
    shown = capsys.readouterr().out
    assert "--probe-columns place velocity luck --probe-kind ridge" in shown
    assert max(map(len, shown.split("wrote")[0].splitlines())) <= 100


def test_few_videos_are_cut_into_stretches_and_it_is_said(tmp_path, write_world):
    results, records = run(tmp_path, write_world("cache", "ab", frames=60))
    assert "5 folds over stretches of 6 s of 2 videos: fewer videos than folds" in results["validation"]
    assert records["place", 1]["r2"] > 0.99


def test_windows_do_not_reach_into_another_stretch(tmp_path, write_world):
    cache = EmbeddingCache(write_world("cache", "a"))
    windows = label_windows(cache, ["place"], 3, 1000, stretch_s=2.0)
    assert len(windows.rows) == 40 - 2 * 5
    assert (windows.rows[:, 0] // 8 == windows.rows[:, -1] // 8).all()
    assert len(label_windows(cache, ["place"], 3, 10).rows) == 10


def test_a_test_cache_is_judged_by_probes_of_the_other(tmp_path, write_world):
    train, test = write_world("train", "abcd"), write_world("test", "ef", frames=50)
    results, records = run(tmp_path, train, test_cache=test)
    assert "fitted on" in results["validation"]
    assert results["moments"] == 2 * 49
    assert records["velocity", 2]["r2"] > 0.99
    assert len(records["velocity", 2]["chosen"]) == 1
    with pytest.raises(UserError, match=r"a\.mp4 is in both"):
        run(tmp_path, train, test_cache=train, overwrite=True)
    other = write_world("other", "ef", encoder_fingerprint="another")
    with pytest.raises(CacheError, match="was made by encoder another"):
        run(tmp_path, train, test_cache=other, overwrite=True)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"columns": ()}, UserError, "--columns is empty"),
        ({"columns": ("brake",)}, SidecarError, "no column 'brake'"),
        ({"columns": ("place", "gear")}, UserError, "--columns gear: it never changes"),
        ({"kind": ()}, UserError, "--kind is empty"),
        ({"window": (1, 0)}, UserError, "--window is 1 0"),
        ({"window": ()}, UserError, "--window is empty"),
        ({"window": (50,)}, CacheError, "no clip in .* is long enough"),
        ({"window": (12,), "folds": 30}, UserError, "only 0 videos or stretches are as long as a window, and 30"),
        ({"window": (39,), "folds": 3}, UserError, "only 6 moments can be probed, and 20 are needed: bring longer"),
        ({"folds": 2}, UserError, "--folds is 2"),
        ({"samples": 1}, UserError, "--samples is 1"),
    ],
)
def test_mistakes_leave_nothing(tmp_path, write_world, changes, error, message):
    with pytest.raises(error, match=message):
        run(tmp_path, write_world("cache", "abc"), **changes)
    assert not (tmp_path / "out").exists()


def test_of_few_stretches_no_interval_is_claimed(tmp_path, write_world, capsys):
    train, test = write_world("train", "abc", frames=100), write_world("test", "g", frames=100)
    results, records = run(tmp_path, train, test_cache=test, window=(81,), columns=("place",))
    assert results["interval"] == "too few stretches of 1 s of 1 video (4) for an interval"
    assert records["place", 81]["r2_interval"] is records["place", 81]["r_interval"] is None
    with (tmp_path / "out" / "probes.csv").open() as file:
        assert next(csv.DictReader(file))["r2_low"] == ""
    assert "too few stretches" in capsys.readouterr().out


def test_a_damaged_cache_is_refused(tmp_path, write_world, damage_cache):
    train, test = write_world("train", "abcde"), damage_cache(write_world("test", "fg"))
    for options in ({"cache": test}, {"cache": train, "test_cache": test}):
        with pytest.raises(UserError, match=r"test holds embeddings that are not finite, first of .*/f\.mp4"):
            run(tmp_path, **options)


def test_a_finished_run_is_kept(tmp_path, write_world):
    cache = write_world("cache", "abcde")
    run(tmp_path, cache, columns=("place",))
    with pytest.raises(UserError, match="already holds a finished run"):
        run(tmp_path, cache)
