import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import data.embedding_cache
from data.embedding_cache import (
    FORMAT_VERSION,
    CacheError,
    CacheWriter,
    ClipKey,
    EmbeddedClip,
    EmbeddingCache,
    committed_clips,
    read_provenance,
    remaining_clips,
)
from data.manifest import file_state

ROOT = Path(__file__).resolve().parents[1]


def shards(folder, suffix=".h5"):
    return sorted((folder / "shards").glob(f"*{suffix}"))


def names(folder):
    return [clip.key.source for clip in EmbeddingCache(folder).clips]


def assert_holds(folder, clips):
    """The cache holds exactly these clips, in order of their names, bit for bit."""
    cache = EmbeddingCache(folder)
    clips = sorted(clips, key=lambda clip: clip.key)
    assert [clip.key for clip in cache.clips] == [clip.key for clip in clips]
    assert cache.frames == sum(len(clip.ticks) for clip in clips)
    for cached, clip in zip(cache.clips, clips, strict=True):
        stored = clip.embeddings.astype(cache.provenance.dtype)
        got = cache.clip_embeddings(cached)
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, stored.astype(np.float32))
        np.testing.assert_array_equal(cache.clip_times_s(cached), clip.times_s)
        np.testing.assert_array_equal(cache.ticks[cached.start : cached.start + cached.frames], clip.ticks)


@pytest.fixture
def clips(make_clip):
    return [make_clip(f"/{name}.mp4", 4 + at, seed=at, gaps=(2,)) for at, name in enumerate("cabed")]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("clips_per_shard", [1, 2, 64])
def test_round_trip_is_exact(tmp_path, write_cache, clips, dtype, clips_per_shard):
    folder = write_cache(tmp_path / "new" / "cache", clips, clips_per_shard, dtype=dtype)
    assert_holds(folder, clips)
    assert len(shards(folder)) == len(shards(folder, ".json")) == -(-len(clips) // clips_per_shard)
    assert remaining_clips(folder, [clip.key for clip in clips]) == []


def test_shards_are_plain_hdf5(tmp_path, write_cache, clips):
    folder = write_cache(tmp_path, clips, 64, dtype="float16")
    with h5py.File(shards(folder)[0]) as file:
        assert set(file) == {"embeddings", "times_s", "ticks"}
        for name, dtype in (("embeddings", np.float16), ("times_s", np.float64), ("ticks", np.int64)):
            expected = np.concatenate([getattr(clip, name) for clip in clips]).astype(dtype)
            assert file[name].dtype == dtype
            assert file[name].chunks is None
            np.testing.assert_array_equal(file[name][:], expected)


def test_provenance_is_kept(tmp_path, write_cache, clips, make_provenance):
    folder = write_cache(tmp_path, clips, fps=29.97, versions={"av": "1", "torch": "2"})
    assert read_provenance(folder) == make_provenance(fps=29.97, versions={"av": "1", "torch": "2"})
    assert EmbeddingCache(folder).provenance == read_provenance(folder)


def test_rows_are_taken_across_shards(tmp_path, write_cache, clips):
    cache = EmbeddingCache(write_cache(tmp_path, clips))
    everything = cache.take(np.arange(cache.frames))
    rows = np.random.default_rng(0).integers(0, cache.frames, size=(7, 3))
    got = cache.take(rows)
    assert got.shape == (7, 3, 5)
    np.testing.assert_array_equal(got, everything[rows])


@pytest.mark.parametrize("rows", [[-1], [30], [4, 30, 5], [-1000]])
def test_rows_that_do_not_exist_are_refused(tmp_path, write_cache, clips, rows):
    cache = EmbeddingCache(write_cache(tmp_path, clips))
    assert cache.frames == 30
    with pytest.raises(IndexError, match="out of range"):
        cache.take(np.array(rows))
    assert cache.take(np.empty((0, 3), np.int64)).shape == (0, 3, 5)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_windows_are_as_stored_and_inside_one_shard(tmp_path, write_cache, clips, dtype):
    cache = EmbeddingCache(write_cache(tmp_path, clips, 3, dtype=dtype))
    stored = np.concatenate([clip.embeddings for clip in clips]).astype(dtype)
    first = sum(len(clip.ticks) for clip in clips[:3])  # rows of the first shard
    for length in (1, 4, first):
        inside = np.concatenate([np.arange(first - length + 1), np.arange(first, len(stored) - length + 1)])[::-1]
        windows = cache.windows(inside, length)
        assert windows.dtype == dtype
        np.testing.assert_array_equal(windows, stored[inside[:, None] + np.arange(length)])
    for start, length in (
        (first - 1, 2),
        (-1, 2),
        (len(stored) - 1, 2),
        (len(stored), 1),
        (0, first + 1),
        (0, 0),
        (2, -1),
    ):
        with pytest.raises(IndexError, match=f"not every run of {length} is inside one shard"):
            cache.windows(np.array([0, start]), length)
    assert cache.windows(np.array([], dtype=int), 4).shape == (0, 4, 5)


def test_runs_end_at_gaps_and_at_clips(tmp_path, write_cache, make_clip):
    cache = EmbeddingCache(write_cache(tmp_path, [make_clip("/a.mp4", 7, gaps=(3,)), make_clip("/b.mp4", 2)]))
    assert [run.tolist() for run in cache.unbroken_runs()] == [[0, 1, 2], [3, 4, 5, 6], [7, 8]]
    assert [run.tolist() for run in cache.unbroken_runs(cache.clips[1])] == [[7, 8]]


def test_order_of_clips_does_not_depend_on_the_writers(tmp_path, write_cache, make_provenance, clips):
    one = write_cache(tmp_path / "one", clips, 64)
    with (
        CacheWriter(tmp_path / "two", make_provenance(), 2) as main,
        CacheWriter(tmp_path / "two", make_provenance(), 1, is_main=False) as other,
    ):
        for at, clip in enumerate(reversed(clips)):
            (main, other)[at % 2].add(clip)
    assert names(one) == names(tmp_path / "two") == [f"/{name}.mp4" for name in "abcde"]
    assert_holds(one, clips)
    assert_holds(tmp_path / "two", clips)


def test_phases_of_one_video_are_clips_of_their_own(tmp_path, write_cache, make_clip):
    clips = [make_clip("/a.mp4", 5, phase_s=phase_s, seed=at) for at, phase_s in enumerate((0.125, 0.0))]
    assert_holds(write_cache(tmp_path, clips), clips)


def test_a_cache_is_added_to(tmp_path, write_cache, clips):
    write_cache(tmp_path, clips[:2])
    wanted = [clip.key for clip in clips]
    assert remaining_clips(tmp_path, wanted) == wanted[2:]
    write_cache(tmp_path, clips[2:])
    assert_holds(tmp_path, clips)


def test_an_error_while_writing_keeps_what_is_committed(tmp_path, make_provenance, clips):
    def unlucky():
        with CacheWriter(tmp_path, make_provenance(), 2) as writer:
            for clip in clips[:3]:
                writer.add(clip)
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        unlucky()
    assert_holds(tmp_path, clips[:2])
    with CacheWriter(tmp_path, make_provenance(), 2):
        pass  # the lock is free again


def test_a_shard_without_a_manifest_does_not_exist(tmp_path, write_cache, clips):
    write_cache(tmp_path, clips, 1)
    lost = shards(tmp_path, ".json")[2]
    (key,) = json.loads(lost.read_text())["clips"]["source"]
    lost.unlink()
    left = [clip for clip in clips if clip.key.source != key]
    assert_holds(tmp_path, left)
    again = remaining_clips(tmp_path, [clip.key for clip in clips])
    assert [one.source for one in again] == [key]
    write_cache(tmp_path, [clip for clip in clips if clip.key in again])
    assert_holds(tmp_path, clips)


def test_a_truncated_or_missing_shard_is_named(tmp_path, write_cache, clips):
    write_cache(tmp_path, clips)
    shard = shards(tmp_path)[0]
    inside = len(json.loads(shard.with_suffix(".json").read_text())["clips"]["frames"])
    size = shard.stat().st_size
    os.truncate(shard, size - 1)
    with pytest.raises(CacheError, match=rf"{shard.name} has {size - 1} bytes instead of {size}: delete it"):
        EmbeddingCache(tmp_path)
    os.truncate(shard, size + 1)
    with pytest.raises(CacheError, match=rf"{shard.name} has {size + 1} bytes instead of {size}: delete it"):
        EmbeddingCache(tmp_path)
    shard.unlink()
    with pytest.raises(CacheError, match=rf"{shard.name} has 0 bytes"):
        EmbeddingCache(tmp_path)
    shard.with_suffix(".json").unlink()  # the mend
    assert len(remaining_clips(tmp_path, [clip.key for clip in clips])) == inside


def test_a_shard_that_is_truncated_after_opening_is_named(tmp_path, write_cache, clips):
    """Its first reader must not die of a bus error."""
    cache = EmbeddingCache(write_cache(tmp_path, clips, 64))
    os.truncate(shards(tmp_path)[0], 100)
    for read in (lambda: cache.clip_embeddings(cache.clips[0]), lambda: cache.times_s, lambda: cache.unbroken_runs()):
        with pytest.raises(CacheError, match="has 100 bytes instead of"):
            read()


def changed(**changes):
    """A manifest with other fields, or with other columns of clips."""

    def change(manifest):
        columns = {name: value for name, value in changes.items() if name in manifest["clips"]}
        rest = {name: value for name, value in changes.items() if name not in columns}
        return json.dumps(manifest | {"clips": manifest["clips"] | columns} | rest).encode()

    return change


@pytest.mark.parametrize(
    "damage",
    [
        lambda manifest: b"",
        lambda manifest: b"{",
        lambda manifest: b"[]",
        lambda manifest: b"null",
        lambda manifest: b"{}",
        lambda manifest: b"\0" * 100,
        lambda manifest: b"\xff\xfe{\xe4",
        lambda manifest: json.dumps(manifest).encode()[:-1],
        changed(clips=[]),
        changed(bytes=None),
        changed(written_ns="yesterday"),
        changed(offsets={"embeddings": 2048}),
        changed(source=["/a.mp4"]),
        changed(frames=[4, 5, 6]),
        changed(frames=["4", "5"]),
        changed(crc32=[]),
    ],
)
def test_a_damaged_manifest_is_named(tmp_path, write_cache, clips, damage):
    write_cache(tmp_path, clips[:2])
    (manifest,) = shards(tmp_path, ".json")
    shard = manifest.with_suffix(".h5")
    write_cache(tmp_path, clips[2:], 64)
    manifest.write_bytes(damage(json.loads(manifest.read_text())))
    message = rf"{manifest} is damaged \(.*\): delete it and {shard.name}, and run cache_embeddings again"
    for use in (EmbeddingCache, committed_clips, lambda folder: remaining_clips(folder, [])):
        with pytest.raises(CacheError, match=message):
            use(tmp_path)
    manifest.unlink()
    shard.unlink()
    assert_holds(tmp_path, clips[2:])
    assert remaining_clips(tmp_path, [clip.key for clip in clips]) == [clip.key for clip in clips[:2]]


def test_rows_outside_their_shard_are_not_read(tmp_path, write_cache, clips):
    write_cache(tmp_path, clips, 64)
    (manifest,) = shards(tmp_path, ".json")
    record = json.loads(manifest.read_text())
    offsets = dict.fromkeys(record["offsets"], record["bytes"] - 8)
    manifest.write_text(json.dumps(record | {"offsets": offsets}))
    cache = EmbeddingCache(tmp_path)
    for name, read in {"embeddings": lambda: cache.take(np.array([0])), "ticks": lambda: cache.ticks}.items():
        with pytest.raises(CacheError, match=rf"{manifest.name} is damaged \({name} are not inside the shard\)"):
            read()


def test_opening_reads_manifests_alone_and_reading_maps_what_it_reads(tmp_path, write_cache, clips, monkeypatch):
    folder = write_cache(tmp_path, clips, 1)
    map_file, mapped = torch.from_file, []

    def watched(path, **options):
        mapped.append(Path(path))
        return map_file(path, **options)

    monkeypatch.setattr(data.embedding_cache.torch, "from_file", watched)
    cache = EmbeddingCache(folder)
    assert [clip.key for clip in cache.clips] == sorted(clip.key for clip in clips)
    part = cache.only({cache.clips[1].key.source, cache.clips[3].key.source})
    assert mapped == []
    for _ in range(2):
        part.clip_embeddings(part.clips[1])
        assert mapped == [cache.clips[3].shard]
    cache.clip_embeddings(cache.clips[3])
    assert mapped == [cache.clips[3].shard]  # a part and the whole share what is mapped
    assert len(cache.times_s) == len(part.ticks) == cache.frames
    assert sorted(mapped) == shards(folder)


def test_mapped_shards_are_not_kept_open(tmp_path, write_cache, make_clip):
    """A process may have 1024 open files, and a cache more shards."""
    cache = EmbeddingCache(write_cache(tmp_path, [make_clip(f"/{name}.mp4", 3) for name in range(20)], 1))
    before = os.listdir("/proc/self/fd")
    cache.take(np.arange(cache.frames))
    assert len(cache.ticks) == 60
    assert os.listdir("/proc/self/fd") == before


def test_only_some_videos(tmp_path, write_cache, clips):
    cache = EmbeddingCache(write_cache(tmp_path, clips))
    part = cache.only({"/b.mp4", "/e.mp4", "/unknown.mp4"})
    assert part.clips == [cache.clips[1], cache.clips[4]]
    assert part.frames == sum(clip.frames for clip in part.clips)
    assert len(cache.clips) == len(clips)
    assert all(part.is_intact(clip) for clip in part.clips)
    for clip in part.clips:
        np.testing.assert_array_equal(part.clip_embeddings(clip), cache.clip_embeddings(clip))
        np.testing.assert_array_equal(part.clip_times_s(clip), cache.clip_times_s(clip))


def test_a_copy_for_another_process_is_small(tmp_path, write_cache, make_clip):
    cache = EmbeddingCache(write_cache(tmp_path, [make_clip(f"/{name}.mp4", 10_000) for name in "abc"]))
    unread = pickle.dumps(cache)
    everything, ticks = cache.take(np.arange(cache.frames)), cache.ticks
    assert everything.nbytes > 500_000
    assert len(pickle.dumps(cache)) == len(unread) < 5_000
    again = pickle.loads(pickle.dumps(cache.only({"/b.mp4", "/c.mp4"})))
    assert again.clips == cache.clips[1:]
    assert again.provenance == cache.provenance
    np.testing.assert_array_equal(again.take(np.arange(cache.frames)), everything)
    np.testing.assert_array_equal(again.ticks, ticks)


def read_as_nobody(folder):
    """Errors and embeddings of a reader without any right to write."""
    os.chdir(folder)
    if os.geteuid() == 0:  # whom no permission stops
        os.setgid(65534)
        os.setuid(65534)
    try:
        (Path("shards") / "new").touch()
    except PermissionError:
        cache = EmbeddingCache(Path())
        return cache.take(np.arange(cache.frames)), cache.ticks
    return "may write"


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_reading_needs_no_right_to_write(tmp_path, write_cache, clips):
    cache = EmbeddingCache(write_cache(tmp_path, clips))
    paths = [*(tmp_path / "shards").iterdir(), tmp_path / "cache.json", tmp_path / "shards", tmp_path]
    modes = [path.stat().st_mode for path in paths]
    try:
        for path in paths:
            path.chmod(0o555 if path.is_dir() else 0o444)
        with multiprocessing.get_context("fork").Pool(1) as pool:
            embeddings, ticks = pool.apply(read_as_nobody, (tmp_path,))
    finally:
        for path, mode in reversed(list(zip(paths, modes, strict=True))):
            path.chmod(mode)
    np.testing.assert_array_equal(embeddings, cache.take(np.arange(cache.frames)))
    np.testing.assert_array_equal(ticks, cache.ticks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_fingerprint": "ffff"}, "encoder_fingerprint 0123abcd, not ffff"),
        ({"fps": 5.0}, r"fps 4\.0, not 5\.0"),
        ({"image_fps": 30.0}, r"image_fps 25\.0, not 30\.0"),
        ({"transform": "cropped"}, "transform stretched, not cropped"),
        ({"image_size": (40, 16)}, r"image_size \[16, 40\], not \[40, 16\]"),
        ({"dtype": "float16"}, "dtype float32, not float16"),
        ({"embedding_dimension": 6}, "embedding_dimension 5, not 6"),
    ],
)
def test_other_embeddings_are_not_mixed_in(tmp_path, write_cache, make_provenance, clips, change, message):
    write_cache(tmp_path, clips)
    with pytest.raises(CacheError, match=message):
        CacheWriter(tmp_path, make_provenance(**change))
    with pytest.raises(CacheError, match=message):
        CacheWriter(tmp_path, make_provenance(**change), is_main=False)
    assert_holds(tmp_path, clips)
    # Other versions of the libraries are no reason, and the refusal has not kept the lock.
    CacheWriter(tmp_path, make_provenance(versions={"av": "99"})).close()


def test_a_model_of_another_encoder_or_clock_is_refused(tmp_path, write_cache, clips):
    cache = EmbeddingCache(write_cache(tmp_path, clips))
    cache.require_same_space("0123abcd", 4.0, "the predictor")
    with pytest.raises(CacheError, match="made by encoder 0123abcd, but the predictor belongs to encoder ffff"):
        cache.require_same_space("ffff", 4.0, "the predictor")
    with pytest.raises(CacheError, match=r"clock of 4 fps, but the predictor on one of 2\.5 fps"):
        cache.require_same_space("0123abcd", 2.5, "the predictor")


def test_no_cache_and_an_empty_cache(tmp_path, make_provenance):
    with pytest.raises(CacheError, match="is not an embedding cache"):
        EmbeddingCache(tmp_path)
    with pytest.raises(CacheError, match="is not an embedding cache"):
        CacheWriter(tmp_path, make_provenance(), is_main=False)
    CacheWriter(tmp_path, make_provenance()).close()
    with pytest.raises(CacheError, match="holds no embeddings"):
        EmbeddingCache(tmp_path)


def test_a_newer_format_is_refused(tmp_path, write_cache, make_provenance, clips):
    write_cache(tmp_path, clips)
    record = json.loads((tmp_path / "cache.json").read_text())
    (tmp_path / "cache.json").write_text(json.dumps(record | {"format_version": 99, "codebook": 7}))
    with pytest.raises(CacheError, match="cache format 99, newer than"):
        EmbeddingCache(tmp_path)
    with pytest.raises(CacheError, match="cache format 99, newer than"):
        CacheWriter(tmp_path, make_provenance())


@pytest.mark.parametrize("version", [1, 2])
def test_an_older_format_is_refused(tmp_path, write_cache, make_provenance, clips, version):
    write_cache(tmp_path, clips)
    record = json.loads((tmp_path / "cache.json").read_text())
    (tmp_path / "cache.json").write_text(json.dumps(record | {"format_version": version}))
    message = f"cache format {version}, older than {FORMAT_VERSION}: delete it and run cache_embeddings again"
    with pytest.raises(CacheError, match=message):
        EmbeddingCache(tmp_path)
    with pytest.raises(CacheError, match=message):
        CacheWriter(tmp_path, make_provenance())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"format_version": %d}' % FORMAT_VERSION,
        b"\0" * 100,
        b"\xff\xfe{\xe4",
        b'{"format_version"',
    ],
)
def test_a_damaged_description_is_named(tmp_path, write_cache, clips, content):
    write_cache(tmp_path, clips)
    (tmp_path / "cache.json").write_bytes(content)
    with pytest.raises(CacheError, match=r"cache\.json is damaged .* run cache_embeddings again"):
        EmbeddingCache(tmp_path)


def test_a_refused_writer_lets_go_of_the_folder(tmp_path, write_cache, make_provenance, clips):
    write_cache(tmp_path, clips)
    good = (tmp_path / "cache.json").read_text()
    (tmp_path / "cache.json").write_text("{")
    with pytest.raises(CacheError, match="damaged") as refused:
        CacheWriter(tmp_path, make_provenance())
    (tmp_path / "cache.json").write_text(good)
    CacheWriter(tmp_path, make_provenance()).close()
    assert refused.traceback  # kept until here: the lock must not wait for the garbage collector


@pytest.mark.parametrize(
    ("value", "dtype"), [(np.nan, "float32"), (np.inf, "float16"), (-np.inf, "float32"), (1e6, "float16")]
)
def test_embeddings_that_are_not_finite_are_refused(tmp_path, write_cache, clips, value, dtype):
    bad = replace(clips[1], embeddings=clips[1].embeddings.copy())
    bad.embeddings[2, 3] = value
    three = [clips[0], bad, clips[2]]
    with pytest.raises(CacheError, match=rf"embeddings of {clips[1].key.source} are not finite in {dtype}"):
        write_cache(tmp_path, three, 3, dtype=dtype)
    assert committed_clips(tmp_path) == set()
    assert list((tmp_path / "shards").iterdir()) == []


def test_clips_may_come_in_any_memory_layout(tmp_path, make_provenance, clips):
    with CacheWriter(tmp_path, make_provenance(), 2) as writer:
        for clip, scattered in zip(clips, [False, True] * 3, strict=False):
            embeddings = np.repeat(clip.embeddings, 2, axis=1)[:, ::2] if scattered else clip.embeddings.copy()
            embeddings.flags.writeable = scattered
            times_s = np.repeat(clip.times_s, 3)[::3]
            writer.add(EmbeddedClip(clip.key, embeddings, times_s, clip.ticks.astype(np.int32)))
    assert_holds(tmp_path, clips)
    assert all(EmbeddingCache(tmp_path).is_intact(clip) for clip in EmbeddingCache(tmp_path).clips)


@pytest.mark.parametrize(
    "change",
    [
        {"embeddings": np.zeros((6, 4), np.float32)},
        {"embeddings": np.zeros((5, 5), np.float32)},
        {"embeddings": np.zeros((5, 6), np.float32)},
        {"times_s": np.zeros(5)},
        {"ticks": np.arange(5)},
        {"embeddings": np.zeros((0, 5), np.float32), "times_s": np.zeros(0), "ticks": np.arange(0)},
    ],
)
def test_arrays_that_are_no_clip_are_refused(tmp_path, write_cache, make_clip, clips, change):
    with pytest.raises(ValueError, match=r"/odd\.mp4: embeddings of shape .* are no clip of dimension 5"):
        write_cache(tmp_path, [clips[0], replace(make_clip("/odd.mp4", 6), **change)], 1)
    assert_holds(tmp_path, clips[:1])


def test_a_changed_file_is_wanted_again(tmp_path, write_cache, make_clip):
    video = tmp_path / "a.mp4"
    video.write_bytes(b"first")
    before = ClipKey(*file_state(video), 0.0)
    assert file_state(video) == file_state(tmp_path / "." / "a.mp4")
    folder = write_cache(tmp_path / "cache", [replace(make_clip("", 4), key=before)])
    assert remaining_clips(folder, [before, before._replace(phase_s=0.5)]) == [before._replace(phase_s=0.5)]

    def remaining():
        return remaining_clips(folder, [ClipKey(*file_state(video), 0.0)])

    os.utime(video, ns=(before.modified_ns + 1, before.modified_ns + 1))
    assert len(remaining()) == 1
    os.utime(video, ns=(before.modified_ns, before.modified_ns))
    assert remaining() == []
    video.write_bytes(b"longer than before")
    os.utime(video, ns=(before.modified_ns, before.modified_ns))
    assert len(remaining()) == 1


@pytest.mark.parametrize("clips_per_shard", [1, 4])
@pytest.mark.parametrize("restored", [False, True])
def test_of_a_changed_file_the_clip_written_last_is_read(tmp_path, write_cache, make_clip, clips_per_shard, restored):
    """Whatever the files' dates say: a file may have been replaced by an older one."""
    before = [make_clip(f"/{name}.mp4", 4, seed=0, modified_ns=2 if restored else 1) for name in "abc"]
    after = [make_clip(f"/{name}.mp4", 6, seed=1, modified_ns=1 if restored else 2) for name in "abc"]
    folder = write_cache(tmp_path, [*before, *after], clips_per_shard)
    assert_holds(folder, after)
    assert remaining_clips(folder, [clip.key for clip in after]) == []
    assert remaining_clips(folder, [clip.key for clip in before]) == [clip.key for clip in before]


@pytest.mark.parametrize("name", ["embeddings", "times_s", "ticks"])
def test_a_flipped_bit_is_found(tmp_path, write_cache, clips, name):
    folder = write_cache(tmp_path, clips, clips_per_shard=10)
    cache = EmbeddingCache(folder)
    assert [cache.is_intact(clip) for clip in cache.clips] == [True] * len(clips)
    victim = cache.clips[1]
    with h5py.File(victim.shard) as file:
        dataset = file[name]
        row_bytes = dataset.dtype.itemsize * int(np.prod(dataset.shape[1:]))
        offset = dataset.id.get_offset() + victim.start * row_bytes
    content = bytearray(victim.shard.read_bytes())
    content[offset] ^= 1
    victim.shard.write_bytes(content)
    cache = EmbeddingCache(folder)
    assert [cache.is_intact(clip) for clip in cache.clips] == [clip != victim for clip in cache.clips]


def test_what_a_kill_left_half_written_is_passed_over(tmp_path, write_cache, make_provenance, clips):
    write_cache(tmp_path, clips)
    manifest = shards(tmp_path, ".json")[0].read_bytes()
    (tmp_path / "shards" / ".tmp.0123.h5").write_bytes(b"half")
    for content in (b"", manifest[:40], manifest.replace(b".mp4", b".mkv")):
        (tmp_path / "shards" / ".tmp.0123.json").write_bytes(content)
        assert_holds(tmp_path, clips)
        assert committed_clips(tmp_path) == {clip.key for clip in clips}


WRITE = """
import os, sys, time
from pathlib import Path
import numpy as np
from data.embedding_cache import CacheError, CacheWriter, ClipKey, EmbeddedClip, Provenance

folder, stop_at = Path(sys.argv[1]), int(sys.argv[2])
provenance = Provenance("0123abcd", 5, 4.0, 25.0, (16, 40), "stretched", "float32", {"av": "18.1.0"})

def clip(number):
    ticks = np.arange(1000)
    return EmbeddedClip(ClipKey(f"/{number}.mp4", 100, 1, 0.0), np.full((1000, 5), number), ticks / 4, ticks)

def stop_in_the_middle(file):
    global synced
    synced += 1
    if synced == stop_at:
        print("in the middle", flush=True)
        time.sleep(120)
    sync(file)

try:
    with CacheWriter(folder, provenance, 2) as writer:
        for number in range(4):
            writer.add(clip(number))
        synced, sync, os.fsync = 0, os.fsync, stop_in_the_middle
        for number in range(4, 6):
            writer.add(clip(number))
    print("done", flush=True)
except CacheError as error:
    print(error, flush=True)
    sys.exit(3)
"""


def writer_process(folder, stop_at=0):
    command = [sys.executable, "-W", "error", "-c", WRITE, str(folder), str(stop_at)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


# The moments of a commit: the shard is written but has no name yet; it has one but no manifest; the manifest is
# written but has no name yet.
@pytest.mark.parametrize("stop_at", [1, 2, 3])
def test_a_kill_in_the_middle_of_writing_loses_no_committed_clip(tmp_path, write_cache, make_clip, stop_at):
    with writer_process(tmp_path, stop_at) as process:
        assert process.stdout.readline() == "in the middle\n", process.stderr.read()
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    cache = EmbeddingCache(tmp_path)
    assert [clip.key.source for clip in cache.clips] == [f"/{number}.mp4" for number in range(4)]
    for number, clip in enumerate(cache.clips):
        np.testing.assert_array_equal(cache.clip_embeddings(clip), np.full((1000, 5), number, np.float32))
    wanted = [
        clip.key._replace(source=f"/{number}.mp4") for number, clip in enumerate([*cache.clips, *cache.clips[:2]])
    ]
    assert remaining_clips(tmp_path, wanted) == wanted[4:]
    # The lock died with the process; the next run takes up the rest and clears away what was abandoned.
    write_cache(tmp_path, [replace(make_clip("", 3), key=key) for key in wanted[4:]])
    assert names(tmp_path) == [f"/{number}.mp4" for number in range(6)]
    assert not list((tmp_path / "shards").glob(".tmp.*"))


def test_a_second_writing_process_is_refused_and_nothing_is_lost(tmp_path, make_provenance, clips):
    with CacheWriter(tmp_path, make_provenance(), 2) as writer:
        for clip in clips[:3]:
            writer.add(clip)
        unfinished = tmp_path / "shards" / ".tmp.being_written.h5"
        unfinished.touch()
        with writer_process(tmp_path) as second:
            output, errors = second.communicate(timeout=60)
        assert second.returncode == 3, errors
        assert output.splitlines() == [f"{tmp_path} is being written by another process: wait for it, or stop it"]
        assert errors == ""
        assert unfinished.exists()
        for clip in clips[3:]:
            writer.add(clip)
    assert_holds(tmp_path, clips)


def test_writing_leaves_nothing_but_the_cache(tmp_path, write_cache, clips):
    write_cache(tmp_path, clips)
    assert {path.name for path in tmp_path.iterdir()} == {"cache.json", "shards", ".lock"}
    assert {path.suffix for path in (tmp_path / "shards").iterdir()} == {".h5", ".json"}
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".tmp")]
