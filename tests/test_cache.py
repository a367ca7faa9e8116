import functools
import itertools
import json
import multiprocessing
import operator
import os
import signal
import time
from dataclasses import replace

import h5py
import numpy as np
import pytest

import data.cache
import data.cache_writer
from data.cache import CacheError, ClipKey, Column, EmbeddingCache
from data.cache_writer import CacheWriter, remaining_clips


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
        for name, column in cache.provenance.columns.items():
            got, stored = cache.take(cached.rows, name), clip.columns[name].astype(column.dtype)
            assert got.dtype == (np.float64 if column.dtype == "float64" else np.float32)
            np.testing.assert_array_equal(got, stored.astype(got.dtype))
        np.testing.assert_array_equal(cache.take(cached.rows, "times_s"), clip.times_s)
        np.testing.assert_array_equal(cache.take(cached.rows, "ticks"), clip.ticks)
        assert cache.is_intact(cached)


@pytest.fixture
def clips(make_clip):
    return [make_clip(f"/{name}.mp4", 4 + at, seed=at, gaps=(2,)) for at, name in enumerate("cabed")]


@pytest.fixture
def columns():
    """Columns beside the embeddings."""
    return {"speed": Column("float32"), "höhe über null": Column("float64"), "steering": Column("float64", (2,))}


@pytest.fixture
def clips_of_tokens(make_clip, columns):
    """Clips of 3 x 2 tokens with other columns, in which some values are missing."""

    def make(name, seed):
        generator = np.random.default_rng(seed)
        values = {name: generator.normal(size=(6, *column.shape)) for name, column in columns.items()}
        values["steering"][2:4] = np.nan
        return make_clip(f"/{name}.mp4", 6, seed=seed, shape=(3, 2, 5), **values)

    return [make(name, seed) for seed, name in enumerate("bac")]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("clips_per_shard", [1, 2, 64])
def test_round_trip_is_exact(tmp_path, write_cache, make_provenance, clips, dtype, clips_per_shard):
    folder = write_cache(tmp_path / "new" / "cache", clips, clips_per_shard, dtype=dtype)
    assert_holds(folder, clips)
    assert EmbeddingCache(folder).provenance == make_provenance(dtype=dtype)
    assert remaining_clips(folder, [clip.key for clip in clips]) == []
    assert {path.name for path in folder.iterdir()} == {"cache.json", "shards", ".lock"}
    files = -(-len(clips) // clips_per_shard)
    assert sorted(path.suffix for path in (folder / "shards").iterdir()) == [".h5"] * files + [".json"] * files


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_tokens_and_other_columns_come_back_exactly(tmp_path, write_cache, clips_of_tokens, columns, dtype):
    cache = EmbeddingCache(write_cache(tmp_path, clips_of_tokens, 2, shape=(3, 2, 5), dtype=dtype, columns=columns))
    assert_holds(tmp_path, clips_of_tokens)
    assert cache.shape == (3, 2, 5)
    rows = np.array([[17, 0], [9, 9]])
    assert cache.take(rows).shape == (2, 2, 3, 2, 5)
    assert [cache.take(rows, name).dtype for name in ("times_s", "ticks")] == [np.float64, np.int64]
    assert cache.take(rows[0, 0], "ticks") == cache.take(rows, "ticks")[0, 0]  # one row, as in the notebook
    with pytest.raises(KeyError, match="brake"):
        cache.take(rows, "brake")


def test_shards_are_plain_hdf5(tmp_path, write_cache, clips):
    folder = write_cache(tmp_path, clips, 64, dtype="float16")
    (manifest,) = shards(folder, ".json")
    offsets = json.loads(manifest.read_text())["offsets"]
    with h5py.File(manifest.with_suffix(".h5")) as file:
        assert set(file) == set(offsets) == {"embeddings", "times_s", "ticks", "shard"}
        expected = {"embeddings": np.concatenate([clip.columns["embeddings"] for clip in clips]).astype(np.float16)}
        expected |= {name: np.concatenate([getattr(clip, name) for clip in clips]) for name in ("times_s", "ticks")}
        for name, values in expected.items():
            assert file[name].dtype == values.dtype
            assert file[name].chunks is None
            assert file[name].id.get_offset() == offsets[name]
            np.testing.assert_array_equal(file[name][:], values)


@pytest.mark.parametrize("rows", [[-1], [30], [4, 30, 5], [-1000]])
def test_rows_that_do_not_exist_are_refused(tmp_path, write_cache, clips, rows):
    cache = EmbeddingCache(write_cache(tmp_path, clips))
    assert cache.frames == 30
    with pytest.raises(IndexError, match="out of range: there are 30"):
        cache.take(np.array(rows))


@pytest.mark.parametrize("clips_per_shard", [2, 64])
def test_windows_are_rows_one_after_the_other(tmp_path, write_cache, clips_of_tokens, columns, clips_per_shard):
    cache = EmbeddingCache(write_cache(tmp_path, clips_of_tokens, clips_per_shard, shape=(3, 2, 5), columns=columns))
    starts = np.array([[clip.start, clip.start + clip.frames - 3] for clip in cache.clips])
    for name in ("embeddings", "times_s", "ticks", *columns):
        read = cache.take_windows(starts, 3, column=name)
        assert read.flags.c_contiguous
        np.testing.assert_array_equal(read, cache.take(starts[..., None] + np.arange(3), name))
    assert cache.take_windows(starts[:0], 3).shape == (0, 2, 3, 3, 2, 5)
    with pytest.raises(IndexError, match="out of bounds"):  # over the end of its shard
        cache.take_windows(np.array([cache.clips[1].start + cache.clips[1].frames - 2]), 40)


def test_order_of_clips_does_not_depend_on_the_writers(tmp_path, write_cache, make_provenance, clips):
    one = write_cache(tmp_path / "one", clips, 64)
    with (
        CacheWriter(tmp_path / "two", make_provenance(), clips_per_shard=2) as main,
        CacheWriter(tmp_path / "two", make_provenance(), clips_per_shard=1, is_main=False) as other,
    ):
        for at, clip in enumerate(reversed(clips)):
            (main, other)[at % 2].add(clip)
    assert names(one) == names(tmp_path / "two") == [f"/{name}.mp4" for name in "abcde"]
    assert_holds(one, clips)
    assert_holds(tmp_path / "two", clips)


def test_a_cache_is_added_to(tmp_path, write_cache, clips_of_tokens, columns):
    """In whatever order the columns are named."""
    write_cache(tmp_path, clips_of_tokens[:2], shape=(3, 2, 5), columns=columns)
    wanted = [clip.key for clip in clips_of_tokens]
    assert remaining_clips(tmp_path, wanted) == wanted[2:]
    reordered = dict(reversed(columns.items()))
    write_cache(tmp_path, clips_of_tokens[2:], shape=(3, 2, 5), columns=reordered)
    assert_holds(tmp_path, clips_of_tokens)


def test_an_error_while_writing_keeps_what_is_committed(tmp_path, make_provenance, clips):
    def unlucky():
        with CacheWriter(tmp_path, make_provenance(), clips_per_shard=2) as writer:
            for clip in clips[:3]:
                writer.add(clip)
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        unlucky()
    assert_holds(tmp_path, clips[:2])
    with CacheWriter(tmp_path, make_provenance()):
        pass  # the lock is free again


def test_a_shard_without_a_manifest_does_not_exist(tmp_path, write_cache, clips):
    write_cache(tmp_path, clips, 1)
    lost = shards(tmp_path, ".json")[2]
    ((source, *_),) = json.loads(lost.read_text())["clips"]
    lost.unlink()
    assert_holds(tmp_path, [clip for clip in clips if clip.key.source != source])
    again = remaining_clips(tmp_path, [clip.key for clip in clips])
    assert [one.source for one in again] == [source]
    write_cache(tmp_path, [clip for clip in clips if clip.key in again])
    assert_holds(tmp_path, clips)


@pytest.mark.parametrize("change", [-1, 1, None])
def test_a_truncated_or_missing_shard_is_named(tmp_path, write_cache, make_provenance, clips, change):
    write_cache(tmp_path, clips)
    shard = shards(tmp_path)[0]
    inside = len(json.loads(shard.with_suffix(".json").read_text())["clips"])
    size = shard.stat().st_size
    if change is None:
        shard.unlink()
    else:
        os.truncate(shard, size + change)
    message = rf"{shard} has {size + change if change else 0} bytes instead of {size}: delete it and {shard.stem}\.json"
    wanted = [clip.key for clip in clips]
    for use in (EmbeddingCache, lambda folder: remaining_clips(folder, wanted)):
        with pytest.raises(CacheError, match=message):
            use(tmp_path)
    shard.with_suffix(".json").unlink()  # the mend
    assert len(remaining_clips(tmp_path, wanted)) == inside


@pytest.mark.parametrize("is_mapped", [False, True])
def test_a_shard_that_is_truncated_after_opening_is_named(tmp_path, write_cache, clips, is_mapped):
    """Its reader must not die of a bus error."""
    cache = EmbeddingCache(write_cache(tmp_path, clips, 64))
    clip = cache.clips[0]
    if is_mapped:
        cache.take(clip.rows)
    os.truncate(shards(tmp_path)[0], 100)
    for read in (lambda one: cache.take(one.rows), cache.unbroken_runs, cache.is_intact):
        with pytest.raises(CacheError, match="has 100 bytes instead of"):
            read(clip)


def test_swapped_shards_are_noticed(tmp_path, write_cache, make_clip):
    """They have the same size and look like each other, but belong to other videos."""
    write_cache(tmp_path, [make_clip(f"/{name}.mp4", 6, seed=at) for at, name in enumerate("ab")], 1)
    one, other = shards(tmp_path)
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    cache = EmbeddingCache(tmp_path)
    for clip in cache.clips:
        with pytest.raises(CacheError, match=rf"{clip.shard} does not belong to its manifest: delete it"):
            cache.take(clip.rows)


JUNK = (b"", b"{", b"[]", b"null", b"{}", b"\xff\xfe{\xe4", b"[" * 100_000)
FRAMES, TICKS = ("clips", 0, -2), ("offsets", "ticks")
CHANGED_MANIFESTS = (  # what stands somewhere in them, and should not
    (("clips",), None), (("clips",), [3]), (("clips",), [["/a.mp4"]]), (("clips", 1), "abcdefgh"),
    (("clips", 0, 0), 7), (("clips", 0, 1), 100), (("clips", 0, 2), "1e9"), (("clips", 0, -1), 1.5),
    *((FRAMES, frames) for frames in (-4, 4.5, True, 10**9, 2**62)), *((TICKS, at) for at in (-8, 2048.5, 10**30)),
    (("offsets", "embeddings"), 2**62), (("offsets",), {"embeddings": 2048}), (("bytes",), None),
    (("bytes",), float("inf")), (("written_ns",), "yesterday"),
)  # fmt: skip


@pytest.mark.parametrize("damage", [*JUNK, *CHANGED_MANIFESTS], ids=lambda damage: repr(damage)[:60])
def test_a_damaged_manifest_is_named(tmp_path, write_cache, make_provenance, clips, damage):
    write_cache(tmp_path, clips[:2])
    (manifest,) = shards(tmp_path, ".json")
    shard = manifest.with_suffix(".h5")
    write_cache(tmp_path, clips[2:], 64)
    if not isinstance(damage, bytes):
        ((*way, last), value), record = damage, json.loads(manifest.read_text())
        functools.reduce(operator.getitem, way, record)[last] = value
        damage = json.dumps(record).encode()
    manifest.write_bytes(damage)
    message = rf"{shard} has a damaged manifest \(.*\): delete it and {manifest.name}, and embed the videos again"
    uses = EmbeddingCache, lambda at: remaining_clips(at, []), lambda at: CacheWriter(at, make_provenance())
    for use in uses:
        with pytest.raises(CacheError, match=message) as refused:
            use(tmp_path)
        assert "\n" not in str(refused.value)
    manifest.unlink()
    shard.unlink()
    assert_holds(tmp_path, clips[2:])
    assert remaining_clips(tmp_path, [clip.key for clip in clips]) == [clip.key for clip in clips[:2]]


def test_mapped_shards_are_not_kept_open(tmp_path, write_cache, make_clip):
    """A process may have 1024 open files, and a cache more shards."""
    cache = EmbeddingCache(write_cache(tmp_path, [make_clip(f"/{name}.mp4", 3) for name in range(20)], 1))
    before = os.listdir("/proc/self/fd")
    assert cache.take(np.arange(cache.frames), "ticks").shape == (60,)
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_fingerprint": "ffff"}, "encoder_fingerprint 0123abcd, not ffff"),
        ({"precision": "bf16"}, "precision fp32, not bf16"),
        ({"dtype": "float16"}, r"columns .*float32.*\(5,\).*, not .*float16.*\(5,\)\)}"),
        ({"columns": {"speed": Column("float64")}}, r"columns .*, not .*'speed': Column\(.*float64.*\(\)\)}"),
    ],
)
def test_other_embeddings_are_not_mixed_in(tmp_path, write_cache, make_provenance, clips, change, message):
    write_cache(tmp_path, clips)
    for is_main in (True, False):
        with pytest.raises(CacheError, match=f"holds embeddings with {message}: choose another folder"):
            CacheWriter(tmp_path, make_provenance(**change), is_main=is_main)
    assert_holds(tmp_path, clips)
    # Other versions, or another spelling of the encoder, are no reason.
    write_cache(tmp_path, clips, versions={"av": "99"}, encoder="./runs/encoder")


def test_a_model_of_another_encoder_clock_or_shape_is_refused(tmp_path, write_cache, clips):
    cache = EmbeddingCache(write_cache(tmp_path, clips))
    cache.require_same_space("0123abcd", 4.0, cache.shape, "the predictor")
    message = r"made by encoder 0123abcd at 4 fps .* shape \(5,\), but the predictor belongs to encoder "
    for fingerprint, fps, shape in (("ffff", 4.0, (5,)), ("0123abcd", 2.5, (5,)), ("0123abcd", 4.0, (2, 9))):
        ours = rf"{fingerprint} at {fps:g} fps and shape \({', '.join(map(str, shape))},?\): embed the videos again"
        with pytest.raises(CacheError, match=message + ours):
            cache.require_same_space(fingerprint, fps, shape, "the predictor")


def test_no_cache_and_an_empty_cache(tmp_path, make_provenance):
    with pytest.raises(CacheError, match="is not an embedding cache"):
        EmbeddingCache(tmp_path)
    with pytest.raises(CacheError, match="is not an embedding cache"):
        CacheWriter(tmp_path, make_provenance(), is_main=False)
    with CacheWriter(tmp_path, make_provenance()), pytest.raises(CacheError, match="holds no embeddings"):
        EmbeddingCache(tmp_path)


def of_embeddings(dtype, shape):
    return {"columns": {"embeddings": {"dtype": dtype, "shape": shape}}}


CHANGED_DESCRIPTIONS = (
    {"format_version": 3}, {"format_version": 99}, {"fps": 0.0}, {"fps": "4"}, {"fps": 1e300}, {"image_fps": -1},
    {"image_size": 16}, {"image_size": [16]}, {"window": 0}, {"window": 1.5}, {"encoder": None}, {"versions": []},
    {"columns": {}}, {"codebook": 7}, of_embeddings("int8", [5]),
    *(of_embeddings("float32", shape) for shape in ([-5], ["5"], [], [1] * 70)),
)  # fmt: skip


@pytest.mark.parametrize("damage", [*JUNK, *CHANGED_DESCRIPTIONS], ids=lambda damage: repr(damage)[:60])
def test_a_damaged_description_is_named(tmp_path, write_cache, make_provenance, clips, damage):
    write_cache(tmp_path, clips)
    path = tmp_path / "cache.json"
    record = json.loads(path.read_text())
    path.write_bytes(damage if isinstance(damage, bytes) else json.dumps(record | damage).encode())
    for use in (EmbeddingCache, lambda folder: CacheWriter(folder, make_provenance())):
        with pytest.raises(CacheError, match=r"cache\.json cannot be used \(.*embed the videos again") as refused:
            use(tmp_path)
        assert "\n" not in str(refused.value)


def test_a_refused_writer_lets_go_of_the_folder(tmp_path, write_cache, make_provenance, clips):
    write_cache(tmp_path, clips)
    with pytest.raises(CacheError, match="fps") as refused:
        CacheWriter(tmp_path, make_provenance(fps=9.0))
    write_cache(tmp_path, clips)
    assert refused.traceback  # kept until here: the lock must not wait for the garbage collector


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(np.nan, "float32"), (np.inf, "float16"), (-np.inf, "float32"), (1e5, "float16"), (-7e4, "float16"),
     (1e30, "float16")],
)  # fmt: skip
def test_embeddings_that_are_not_finite_are_refused(tmp_path, write_cache, clips, value, dtype):
    embeddings = clips[1].columns["embeddings"].copy()
    embeddings[2, 3] = value
    three = [clips[0], replace(clips[1], columns={"embeddings": embeddings}), clips[2]]
    mend = "they are too large for it, take dtype float32" if np.isfinite(value) else "check the encoder"
    with pytest.raises(CacheError, match=rf"embeddings of {clips[1].key.source} are not finite in {dtype}: {mend}"):
        write_cache(tmp_path, three, 3, dtype=dtype)
    assert list((tmp_path / "shards").iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [
        {"columns": {"embeddings": np.zeros((5, 5), np.float32)}},
        {"columns": {}},
        {"columns": {"embeddings": np.zeros((6, 5), np.float32), "speed": np.zeros(6)}},
        {"times_s": np.zeros(5)},
        {"columns": {"embeddings": np.zeros((0, 5))}, "times_s": np.zeros(0), "ticks": np.arange(0)},
    ],
)
def test_arrays_that_are_no_clip_are_refused(tmp_path, write_cache, make_clip, clips, change):
    with pytest.raises(ValueError, match=r"/odd\.mp4: arrays of shapes .* do not fit the columns"):
        write_cache(tmp_path, [clips[0], replace(make_clip("/odd.mp4", 6), **change)], 1)
    assert_holds(tmp_path, clips[:1])


def test_a_changed_file_is_wanted_again_and_a_moved_one_is_not(tmp_path, write_cache, make_clip):
    before = ClipKey("/a.mp4", "content", 0.0)
    folder = write_cache(tmp_path / "cache", [replace(make_clip("", 4), key=before)])
    wanted = [before, before._replace(offset_s=0.5), before._replace(source="/b.mp4"), before._replace(content="new")]
    assert remaining_clips(folder, wanted) == [wanted[1], wanted[3]]


PLACES = {  # where contents lie now, by path; and which clips, made of A at /a, B at /b and then C at /a, are read then
    "moved": ({"/x": "A", "/b": "B"}, [("/a", "C"), ("/b", "B"), ("/x", "A")]),
    "swapped": ({"/b": "A", "/a": "B"}, [("/a", "B"), ("/b", "A")]),
    "restored": ({"/a": "A"}, [("/a", "A"), ("/b", "B")]),
    "replaced by what is not embedded yet": ({"/b": "D"}, [("/a", "C")]),
    "moved over another one": ({"/b": "C"}, [("/a", "A"), ("/b", "C")]),
}


@pytest.mark.parametrize("clips_per_shard", [1, 4])
@pytest.mark.parametrize("name", PLACES)
def test_clips_follow_their_videos(tmp_path, write_cache, make_provenance, make_clip, clips_per_shard, name):
    places, expected = PLACES[name]
    contents = [("/a", "A"), ("/b", "B"), ("/a", "C")]
    clips = {content: make_clip(path, 4, content=content, seed=ord(content)) for path, content in contents}
    write_cache(tmp_path, clips.values(), clips_per_shard)
    for _ in range(2):  # what was said before is forgotten where a content lies elsewhere now
        with CacheWriter(tmp_path, make_provenance(), places=places):
            pass
        cache = EmbeddingCache(tmp_path)
        assert [clip.key[:2] for clip in cache.clips] == expected
        for clip in cache.clips:
            given = clips[clip.key.content].columns["embeddings"]
            np.testing.assert_array_equal(cache.take(clip.rows), given)
        assert cache.clips == EmbeddingCache(tmp_path).clips


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"/a": 1}', b"\xff"])
def test_damaged_places_are_refused(tmp_path, write_cache, clips, content):
    (write_cache(tmp_path, clips) / "places.json").write_bytes(content)
    with pytest.raises(CacheError, match=r"places\.json is damaged \(.*\): delete it, and embed the videos again$"):
        EmbeddingCache(tmp_path)


@pytest.mark.parametrize("clips_per_shard", [1, 4])
def test_of_a_changed_file_the_clip_written_last_is_read(tmp_path, write_cache, make_clip, clips_per_shard):
    before = [make_clip(f"/{name}.mp4", 4, seed=0, content=f"{name} before") for name in "abc"]
    after = [make_clip(f"/{name}.mp4", 6, seed=1, content=f"{name} after") for name in "abc"]
    folder = write_cache(tmp_path, [*before, *after], clips_per_shard)
    assert_holds(folder, after)
    assert remaining_clips(folder, [clip.key for clip in after]) == []
    assert remaining_clips(folder, [clip.key for clip in before]) == [clip.key for clip in before]


def test_a_clock_that_was_ahead_does_not_keep_a_stale_clip(tmp_path, write_cache, make_clip, monkeypatch):
    now = time.time_ns()
    before, after = (make_clip("/a.mp4", 4, seed=seed, content=str(seed)) for seed in (1, 2))
    with monkeypatch.context() as patch:
        patch.setattr(data.cache_writer.time, "time_ns", lambda: now + 3_600_000_000_000)
        write_cache(tmp_path, [before])
    write_cache(tmp_path, [after])
    assert_holds(tmp_path, [after])


@pytest.mark.parametrize("name", ["embeddings", "speed", "times_s", "ticks"])
def test_a_flipped_bit_is_found(tmp_path, write_cache, clips_of_tokens, columns, name):
    folder = write_cache(tmp_path, clips_of_tokens, 10, shape=(3, 2, 5), columns=columns)
    victim = EmbeddingCache(folder).clips[1]
    with h5py.File(victim.shard) as file:
        dataset = file[name]
        row_bytes = dataset.dtype.itemsize * int(np.prod(dataset.shape[1:]))
        offset = dataset.id.get_offset() + victim.start * row_bytes
    content = bytearray(victim.shard.read_bytes())
    content[offset] ^= 1
    victim.shard.write_bytes(content)
    cache = EmbeddingCache(folder)
    assert [cache.is_intact(clip) for clip in cache.clips] == [clip != victim for clip in cache.clips]


def test_what_a_kill_left_half_written_is_passed_over(tmp_path, write_cache, clips):
    write_cache(tmp_path, clips)
    manifest = shards(tmp_path, ".json")[0].read_bytes()
    (tmp_path / "shards" / f".tmp.{32 * 'a'}").write_bytes(b"half")
    for content in (b"", manifest[:40], manifest.replace(b".mp4", b".mkv")):
        (tmp_path / "shards" / f".tmp.{32 * 'b'}").write_bytes(content)
        assert_holds(tmp_path, clips)
        assert remaining_clips(tmp_path, [clip.key for clip in clips]) == []
    write_cache(tmp_path, [])
    assert not list((tmp_path / "shards").glob(".tmp.*"))


def write_and_die(folder, provenance, clips, stop_at):
    """Killed in the third shard, when it synchronises a file for the `stop_at`-th time."""
    sync, synced = os.fsync, itertools.count(1)
    with CacheWriter(folder, provenance, clips_per_shard=2) as writer:
        for number, clip in enumerate(clips):
            if number == 4:
                os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL) if next(synced) == stop_at else sync(file)
            writer.add(clip)


# The moments of a commit: the shard is written but has no name yet; it has one but no manifest; the manifest is
# written but has no name yet.
@pytest.mark.parametrize("stop_at", [1, 2, 3])
def test_a_kill_in_the_middle_of_writing_loses_no_committed_clip(
    tmp_path, write_cache, make_provenance, make_clip, stop_at
):
    clips = [make_clip(f"/{number}.mp4", 1000, seed=number) for number in range(6)]
    arguments = (tmp_path, make_provenance(), clips, stop_at)
    process = multiprocessing.get_context("spawn").Process(target=write_and_die, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert_holds(tmp_path, clips[:4])
    wanted = [clip.key for clip in clips]
    assert remaining_clips(tmp_path, wanted) == wanted[4:]
    # The lock died with the process; the next run takes up the rest and clears away what was abandoned.
    write_cache(tmp_path, clips[4:])
    assert_holds(tmp_path, clips)
    assert not list((tmp_path / "shards").glob(".tmp.*"))


def test_large_clips_do_not_wait_for_others(tmp_path, write_cache, make_clip, monkeypatch):
    """Of patch tokens, 64 clips would be more than memory."""
    monkeypatch.setattr(data.cache_writer, "LARGEST_SHARD", 10 * 5 * 4)
    clips = [make_clip(f"/{at}.mp4", frames) for at, frames in enumerate((4, 4, 4, 20, 3, 3))]
    folder = write_cache(tmp_path, clips, 64)
    assert_holds(folder, clips)
    assert sorted(len(json.loads(path.read_text())["clips"]) for path in shards(folder, ".json")) == [1, 2, 3]
