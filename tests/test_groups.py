import math

import numpy as np
import pytest

from data.embedding_cache import EmbeddingCache
from data.groups import group_rows, group_windows, stretch_for
from data.windows import Windows


@pytest.fixture
def cache(tmp_path, make_clip, write_cache):
    """Three videos of 10 s at 4 fps, one of them on two phases of the clock."""
    names = [("a", 0.0), ("a", 0.1), ("b", 0.0), ("c", 0.0)]
    return EmbeddingCache(
        write_cache(tmp_path, [make_clip(f"/{name}.mp4", 40, phase_s=phase) for name, phase in names])
    )


def groups_of(cache, groups, source):
    return [set(groups[clip.start : clip.start + 40]) for clip in cache.clips if clip.key.source == source]


def test_phases_of_a_video_are_one_group(cache):
    groups = group_rows(cache)
    assert groups_of(cache, groups, "/a.mp4") == [{0}, {0}]
    assert groups_of(cache, groups, "/b.mp4") + groups_of(cache, groups, "/c.mp4") == [{1}, {2}]


def test_stretches_are_of_time_and_never_of_two_videos(cache):
    groups = group_rows(cache, stretch_s=4)
    assert groups_of(cache, groups, "/a.mp4") == [{0, 1, 2}, {0, 1, 2}]
    assert groups_of(cache, groups, "/c.mp4") == [{6, 7, 8}]
    for clip in cache.clips:
        rows = slice(clip.start, clip.start + clip.frames)
        own = groups[rows]
        assert (np.diff(own) >= 0).all()
        assert cache.clip_times_s(clip)[own == own[0]].max() < 4


def test_rows_of_no_clip_have_no_group(cache):
    groups = group_rows(cache.only({"/b.mp4"}))
    assert sorted(groups) == [-1] * 120 + [0] * 40


def test_stretches_are_only_made_where_videos_are_too_few(cache):
    assert stretch_for(cache, 3) == math.inf
    assert stretch_for(cache, 6) == pytest.approx(5, rel=0.05)
    assert len(np.unique(group_rows(cache, stretch_for(cache, 6)))) == 6


def test_windows_are_grouped_by_video_where_enough_videos_have_any(tmp_path, make_clip, write_cache):
    clips = [make_clip(f"/{number}.mp4", 40 if number < 20 else 4) for number in range(25)]
    cache = EmbeddingCache(write_cache(tmp_path, clips))
    windows = Windows(cache, 5)
    groups, together = group_windows(windows)
    assert together == "videos"
    assert (np.diff(groups) == np.diff(windows.clips)).all()
    windows = Windows(cache.only({"/1.mp4", "/21.mp4", "/22.mp4"}), 5)
    groups, together = group_windows(windows)
    assert together == "stretches of 2.5 s"  # twice 5 embeddings at 4 fps
    assert np.unique(groups, return_counts=True)[1].tolist() == [10, 10, 10, 6]
    few = cache.only({f"/{number}.mp4" for number in range(19)} | {"/21.mp4", "/22.mp4"})
    assert "stretches" in group_windows(Windows(few, 5))[1]  # two of 21 videos have no window
