import math

import numpy as np
import pytest

from data.embedding_cache import EmbeddingCache
from data.groups import group_rows, stretch_for


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
