import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from data.cache import CacheError, Column, EmbeddingCache
from data.windows import Windows
from pipelines.run.evaluation import group_windows


@pytest.fixture
def clips(make_clip):
    """Clips of 9, 12 (runs of 5, 1 and 6) and 3 embeddings, in several shards."""
    return [make_clip("/a.mp4", 9), make_clip("/b.mp4", 12, gaps=(5, 6), seed=1), make_clip("/c.mp4", 3, seed=2)]


@pytest.fixture(params=[1, 2, 64])
def cache(request, tmp_path, clips, write_cache):
    return EmbeddingCache(write_cache(tmp_path, clips, clips_per_shard=request.param))


def read_all(windows):
    return windows.take(np.arange(len(windows))).numpy()


def test_windows_are_all_runs_of_one_clip_without_a_gap(cache, clips):
    windows = Windows(cache, length=4)
    first, second, _ = (clip.columns["embeddings"] for clip in clips)
    runs = (first, second[:5], second[6:])
    expected = [run[start : start + 4] for run in runs for start in range(len(run) - 3)]
    assert len(windows) == len(expected)
    np.testing.assert_array_equal(read_all(windows), np.stack(expected))
    assert windows.clip_of(np.arange(len(windows))).tolist() == [0] * 6 + [1] * 5


def test_windows_of_tokens_carry_times_and_other_columns(tmp_path, make_clip, write_cache):
    clips = [
        make_clip(f"/{name}.mp4", 7, shape=(2, 3, 4), speed=np.arange(7) / at) for at, name in ((1, "a"), (2, "b"))
    ]
    folder = write_cache(tmp_path, clips, shape=(2, 3, 4), dtype="float16", columns={"speed": Column("float64")})
    windows = Windows(EmbeddingCache(folder), 5)
    assert read_all(windows).shape == (6, 5, 2, 3, 4)
    indices = np.array([5, 1])
    assert windows.take(indices).dtype == torch.float32
    stored = clips[1].columns["embeddings"][2:7].astype(np.float16)
    np.testing.assert_array_equal(windows.take(indices)[0].numpy(), stored)
    np.testing.assert_array_equal(windows.column(indices, "speed"), [np.arange(2, 7) / 2, np.arange(1, 6)])
    np.testing.assert_array_equal(windows.column(indices, "times_s"), [np.arange(2, 7) / 4, np.arange(1, 6) / 4])


@pytest.mark.parametrize("index", [-1, 11])
def test_windows_that_do_not_exist_are_refused(cache, index):
    windows = Windows(cache, length=4)
    for use in (windows.take, windows.clip_of):
        with pytest.raises(IndexError, match="there are 11 windows"):
            use(np.array([0, index]))


def test_memory_is_by_the_run_and_not_by_the_window(tmp_path, make_clip, write_cache):
    """Neither embeddings nor windows are held: what is sent to another process is all there is."""
    sizes = []
    for frames in (2_000, 20_000):
        cache = EmbeddingCache(write_cache(tmp_path / str(frames), [make_clip("/a.mp4", frames, gaps=(50,))]))
        windows = Windows(cache, length=16)
        assert len(windows) == frames - 50 - 15 + 50 - 15
        sizes.append(len(pickle.dumps(windows)))
        windows.take(np.arange(len(windows)))
        assert len(pickle.dumps(windows)) == sizes[-1]
    assert max(sizes) < 5_000


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_windows_are_read_in_other_processes(tmp_path, clips, write_cache, method):
    windows = Windows(EmbeddingCache(write_cache(tmp_path, clips)), length=4)
    here = read_all(windows)
    with multiprocessing.get_context(method).Pool(1) as pool:
        np.testing.assert_array_equal(pool.apply(read_all, (windows,)), here)


def test_too_short_clips_say_by_how_much(cache):
    message = r"takes 10 embeddings \(2\.5 s at 4 fps\), the longest unbroken clip has 9"
    with pytest.raises(CacheError, match=message):
        Windows(cache, length=10)


def test_samples_are_uniform_and_a_pure_function_of_the_generator(cache):
    windows = Windows(cache, length=4)
    sample = windows.sample(300, torch.Generator().manual_seed(0))
    assert sample.dtype == np.int64
    np.testing.assert_array_equal(sample, windows.sample(300, torch.Generator().manual_seed(0)))
    assert not np.array_equal(sample, windows.sample(300, torch.Generator().manual_seed(1)))
    # 300 draws from 11 windows reach every one, none of them far too often.
    counts = np.bincount(sample, minlength=len(windows))
    assert len(counts) == len(windows) == 11
    assert counts.min() > 10
    assert counts.max() < 50


@pytest.mark.parametrize("most", [1, 2, 5, 10, 11, 1000])
def test_windows_are_spaced_evenly_from_the_first_to_the_last(cache, most):
    found = Windows(cache, length=4).evenly(most)
    assert len(found) == min(most, 11)
    assert found[0] == 0
    assert most == 1 or found[-1] == 10
    assert np.ptp(np.diff(found)) <= 1 if most > 1 else True
    assert len(set(found.tolist())) == len(found)


def test_clocks_of_a_video_are_one_video_which_is_named_once(tmp_path, make_clip, write_cache):
    made = [make_clip(name, 6, offset_s=offset_s) for name in ("/a.mp4", "/b.mp4") for offset_s in (0.0, 0.1)]
    windows = Windows(EmbeddingCache(write_cache(tmp_path, made)), length=5)
    everything = np.arange(len(windows))
    assert windows.clip_of(everything).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert windows.video_of(everything).tolist() == [0] * 4 + [1] * 4
    assert windows.video_of(np.array([7, 0])).tolist() == [1, 0]
    assert windows.videos(everything) == (Path("/a.mp4"), Path("/b.mp4"))
    assert windows.videos(np.array([5, 4])) == (Path("/b.mp4"),)


def test_a_window_never_crosses_a_tick_without_actions(tmp_path, make_clip, write_cache):
    steer = np.arange(12.0)
    steer[[0, 6, 11]] = np.nan
    clips = [
        make_clip("/a.mp4", 12, gaps=(4,), steer=steer, gas=-steer),
        make_clip("/b.mp4", 3, steer=np.ones(3), gas=np.ones(3)),
    ]
    clips.append(make_clip("/c.mp4", 5, steer=np.full(5, np.nan), gas=np.ones(5)))
    columns = {"steer": Column("float64"), "gas": Column("float32")}
    cache = EmbeddingCache(write_cache(tmp_path, clips, columns=columns))
    windows = Windows(cache, 2, ("steer", "gas"))
    everything = np.arange(len(windows))
    assert windows.actions(everything)[:, :, 0].tolist() == [
        [1, 2],
        [2, 3],
        [4, 5],
        *([n, n + 1] for n in (7, 8, 9)),
        [1, 1],
        [1, 1],
    ]
    assert windows.actions(everything)[0].tolist() == [[1, -1], [2, -2]]
    assert windows.actions(everything).dtype == torch.float32
    np.testing.assert_array_equal(windows.take(everything)[2], clips[0].columns["embeddings"][4:6])
    assert windows.without_actions == 3 + 5
    assert len(Windows(cache, 2)) == 3 + 7 + 2 + 4
    assert Windows(cache, 2).actions(everything) is None
    with pytest.raises(CacheError, match="longest unbroken clip has 4"):
        Windows(cache, 5, ("steer",))


def test_other_videos_are_never_the_same(few):
    windows = Windows(few, 5)
    everything, generator = np.arange(len(windows)), np.random.default_rng(0)
    drawn = np.stack([windows.of_other_videos(everything, generator) for _ in range(50)])
    assert (windows.video_of(drawn.ravel()) != windows.video_of(np.tile(everything, 50))).all()
    for video in range(3):  # and each window of each other video is drawn
        mine = windows.video_of(everything) == video
        np.testing.assert_array_equal(np.unique(drawn[:, mine]), everything[~mine])


@pytest.fixture
def few(tmp_path, make_clip, write_cache):
    """Three videos of 10 s at 4 fps, one of them on two clocks."""
    names = [("a", 0.0), ("a", 0.1), ("b", 0.0), ("c", 0.0)]
    clips = [make_clip(f"/{name}.mp4", 40, offset_s=offset_s) for name, offset_s in names]
    return EmbeddingCache(write_cache(tmp_path, clips))


def test_segments_are_of_time_and_never_of_two_videos(few):
    windows = Windows(few, 5)
    everything = np.arange(len(windows))
    groups, together = group_windows(windows, everything)
    assert together == "segments of 2.5 s"  # twice 5 embeddings at 4 fps
    assert groups.dtype == np.int64
    assert sorted(set(groups)) == list(range(12))
    sources = np.array([few.clips[clip].key.source for clip in windows.clip_of(everything)])
    segments = windows.column(everything, "times_s")[:, 0] // 2.5
    for group in range(12):
        assert len(set(sources[groups == group])) == len(set(segments[groups == group])) == 1
    # Both clocks of a video are together.
    first, second = (groups[windows.clip_of(everything) == clip] for clip in (0, 1))
    assert set(first) == set(second)
    # The groups of some windows are those that they have among all.
    some = np.array([130, 3, 4, 77, 100])
    ours, _ = group_windows(windows, some)
    np.testing.assert_array_equal(ours[:, None] == ours, groups[some][:, None] == groups[some])


def test_windows_are_grouped_by_video_where_enough_videos_have_any(tmp_path, make_clip, write_cache):
    clips = [make_clip(f"/{number:02}.mp4", 40 if number < 20 else 4) for number in range(25)]
    windows = Windows(EmbeddingCache(write_cache(tmp_path, clips)), 5)
    everything = np.arange(len(windows))
    groups, together = group_windows(windows, everything)
    assert together == "videos"
    np.testing.assert_array_equal(groups, windows.clip_of(everything))
    without_one = everything[windows.clip_of(everything) != 7]
    assert "segments" in group_windows(windows, without_one)[1]
