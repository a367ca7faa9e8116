import multiprocessing
import pickle

import numpy as np
import pytest
import torch

from data.embedding_cache import CacheError, EmbeddingCache
from data.windows import Windows


@pytest.fixture
def clips(make_clip):
    """Clips of 9, 12 (runs of 5, 1 and 6) and 3 embeddings, in several shards."""
    return [make_clip("/a.mp4", 9), make_clip("/b.mp4", 12, gaps=(5, 6), seed=1), make_clip("/c.mp4", 3, seed=2)]


@pytest.fixture(params=[1, 2, 64])
def cache(request, tmp_path, clips, write_cache):
    return EmbeddingCache(write_cache(tmp_path, clips, clips_per_shard=request.param))


@pytest.mark.parametrize("stride", [1, 3])
def test_windows_are_all_runs_of_one_clip_without_a_gap(cache, clips, stride):
    windows = Windows(cache, length=4, stride=stride)
    runs = [clips[0].embeddings, clips[1].embeddings[:5], clips[1].embeddings[6:]]
    expected = [run[start : start + 4] for run in runs for start in range(0, len(run) - 3, stride)]
    assert len(windows) == len(expected)
    np.testing.assert_array_equal(windows.take(np.arange(len(windows))).numpy(), np.stack(expected))
    assert windows.clips.tolist() == [0] * len(range(0, 6, stride)) + [1] * (
        len(range(0, 2, stride)) + len(range(0, 3, stride))
    )


def test_windows_of_each_clip_that_has_any(cache):
    windows = Windows(cache, length=4)  # the third clip is too short
    assert windows.by_clip() == [slice(0, 6), slice(6, 11)]
    assert Windows(cache, length=9).by_clip() == [slice(0, 1)]


def test_ticks_of_a_window_are_consecutive(cache):
    for length in (1, 2, 5, 6):
        windows = Windows(cache, length)
        rows = windows.rows(np.arange(len(windows)))
        assert rows.shape == (len(windows), length)
        assert (np.diff(cache.ticks[rows], axis=1) == 1).all()
        bounds = np.array([(clip.start, clip.start + clip.frames) for clip in cache.clips])[windows.clips]
        assert (rows[:, 0] >= bounds[:, 0]).all()
        assert (rows[:, -1] < bounds[:, 1]).all()


def test_windows_as_long_as_a_clip(cache, clips):
    windows = Windows(cache, length=9)
    assert len(windows) == 1
    np.testing.assert_array_equal(windows.take(np.array([0]))[0].numpy(), clips[0].embeddings)


def test_take_follows_the_order_asked_for(cache):
    windows = Windows(cache, length=3)
    everything = windows.take(np.arange(len(windows)))
    assert everything.dtype == torch.float32
    order = np.array([7, 0, 7, 2])
    assert torch.equal(windows.take(order), everything[order])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_windows_are_the_same_from_one_shard_and_from_many(tmp_path, make_clip, write_cache, dtype):
    clips = [make_clip(f"/{at:03}.mp4", 7 + at % 5, gaps=(3,) if at % 3 else (), seed=at) for at in range(100)]
    one, many = (
        Windows(EmbeddingCache(write_cache(tmp_path / str(size), clips, size, dtype=dtype)), length=3)
        for size in (100, 1)
    )
    assert len(list((tmp_path / "100" / "shards").glob("*.h5"))) == 1
    assert len(list((tmp_path / "1" / "shards").glob("*.h5"))) == 100
    np.testing.assert_array_equal(one.clips, many.clips)
    order = np.random.default_rng(0).permutation(len(one))
    assert torch.equal(one.take(order), many.take(order))
    gathered = [windows.cache.windows(windows.starts[order], 3) for windows in (one, many)]
    assert gathered[0].dtype == gathered[1].dtype == dtype
    assert gathered[0].tobytes() == gathered[1].tobytes()
    np.testing.assert_array_equal(one.take(order).numpy(), gathered[0].astype(np.float32))


def read_all(windows):
    return windows.take(np.arange(len(windows))).numpy()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("read_before", [False, True])
def test_windows_are_read_in_other_processes(tmp_path, clips, write_cache, method, read_before):
    windows = Windows(EmbeddingCache(write_cache(tmp_path, clips)), length=4)
    if read_before:
        read_all(windows)
    with multiprocessing.get_context(method).Pool(1) as pool:
        theirs = pool.apply(read_all, (windows,))
    np.testing.assert_array_equal(theirs, read_all(windows))


def test_windows_for_another_process_carry_no_embeddings(tmp_path, make_clip, write_cache):
    cache = EmbeddingCache(write_cache(tmp_path, [make_clip("/a.mp4", 2000, dimension=500)], embedding_dimension=500))
    windows = Windows(cache, length=16)
    assert read_all(windows).nbytes > 10_000_000
    assert len(pickle.dumps(windows)) < windows.starts.nbytes + windows.clips.nbytes + 5_000


def test_too_short_clips_say_by_how_much(cache):
    message = r"takes 10 embeddings \(2\.5 s at 4 fps\), the longest unbroken clip has 9"
    with pytest.raises(CacheError, match=message):
        Windows(cache, length=10)


def test_samples_are_windows_and_a_pure_function_of_the_generator(cache):
    windows = Windows(cache, length=4)
    everything = windows.take(np.arange(len(windows)))
    sample, clips = windows.sample(300, torch.Generator().manual_seed(0))
    assert set(clips) <= set(cache.clips)
    assert sample.shape == (300, 4, 5)
    assert torch.equal(sample, windows.sample(300, torch.Generator().manual_seed(0))[0])
    assert not torch.equal(sample, windows.sample(300, torch.Generator().manual_seed(1))[0])
    hits = (sample[:, None] == everything[None]).flatten(2).all(dim=2)
    assert (hits.sum(dim=1) == 1).all()
    # Uniform: 300 draws from 11 windows reach every one, none of them far too often.
    assert hits.sum(dim=0).min() > 10
    assert hits.sum(dim=0).max() < 50
