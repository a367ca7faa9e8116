"""Embeddings on disk, with provenance, in immutable HDF5 shards that a kill cannot harm.

A cache is a folder:

    cache.json               what the embeddings are: encoder, clock, transform, versions
    shards/NAME.h5           contiguous `embeddings` (N, D), `times_s` (N,), `ticks` (N,)
    shards/NAME.json         which clips are in NAME.h5, with the checksum of each; its size, and where in it the
                             datasets begin, in bytes

A shard is written under a temporary name, synced and renamed; its small JSON manifest follows in the same way, and
*the manifest is the commit*: an HDF5 file without one does not exist for the reader, and its clips are embedded
again. No file is ever changed after it has its name, so many ranks write side by side without locks between them,
and a resumed run may have another number of ranks.

The reader needs the manifests alone to open a cache, and no HDF5 library: what the datasets hold is mapped to memory.
"""

import copy
import fcntl
import gc
import json
import math
import os
import time
import uuid
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, Literal, NamedTuple, TypeVar

import h5py
import numpy as np
import torch
from torch import Tensor

FORMAT_VERSION = 3
DATASETS = ("embeddings", "times_s", "ticks")
Result = TypeVar("Result")


class CacheError(Exception):
    """A cache that cannot be used as asked; the message names it, the reason and the mend."""


@dataclass(frozen=True)
class Provenance:
    """What the embeddings in a cache are. Two caches fit together if these agree."""

    encoder_fingerprint: str
    """`FrameEncoder.fingerprint()` of the encoder."""
    embedding_dimension: int
    fps: float
    """Rate of the clock that frames were sampled on, in ticks per second."""
    image_fps: float
    """Rate that folders of images were given, which have no times of their own."""
    image_size: tuple[int, int]
    """(height, width) in pixels of the frames."""
    transform: str
    """What was done to the frames before the encoder."""
    dtype: Literal["float16", "float32"]
    versions: dict[str, str]
    """Of the decoder and the libraries; recorded, not compared."""

    def comparable(self) -> dict[str, Any]:
        """The fields that must agree, as JSON values."""
        fields = asdict(self)
        del fields["versions"]
        fields["image_size"] = list(fields["image_size"])
        return fields


class ClipKey(NamedTuple):
    """Which stretch of which file: a changed file is another clip."""

    source: str
    """Absolute path of the video; with the next two, `data.manifest.FileState`."""
    size_bytes: int
    modified_ns: int
    phase_s: float
    """By how much the clock was shifted, in seconds."""


@dataclass(frozen=True)
class EmbeddedClip:
    """The embeddings of one video on one clock."""

    key: ClipKey
    embeddings: np.ndarray
    """(T, D), the cache's dtype (or float32 before it is written)."""
    times_s: np.ndarray
    """float64 (T,), exact presentation times in seconds."""
    ticks: np.ndarray
    """int64 (T,), strictly increasing; a jump by more than 1 is a gap in the recording."""


class CacheWriter:
    """Writes the clips of one rank. Use as a context manager; leaving it without an error commits what is buffered.

    Args:
        folder: the cache; made if missing.
        provenance: what the embeddings are.
        clips_per_shard: how many clips are buffered, and lost at most, when the process dies.
        is_main: this rank makes the folder and holds its lock; the others must construct theirs after it.

    Raises:
        CacheError: the folder holds other embeddings, another format, or is being written by another process.
    """

    def __init__(self, folder: Path, provenance: Provenance, clips_per_shard: int = 64, is_main: bool = True) -> None:
        self.folder, self.provenance, self.clips_per_shard = folder, provenance, clips_per_shard
        self.buffer: list[EmbeddedClip] = []
        self.lock: IO[str] | None = None
        if is_main:
            (folder / "shards").mkdir(parents=True, exist_ok=True)
            self.lock = _lock(folder)
            if not (folder / "cache.json").exists():
                record = {"format_version": FORMAT_VERSION, **asdict(provenance)}
                _write_synced(folder / "cache.json", lambda path: path.write_text(json.dumps(record, indent=2)))
            for abandoned in (folder / "shards").glob(".tmp.*"):
                abandoned.unlink()
        try:
            stored = read_provenance(folder)
        except CacheError:
            self.close()
            raise
        theirs, ours = stored.comparable(), provenance.comparable()
        for name in ours:
            if theirs[name] != ours[name]:
                self.close()
                raise CacheError(
                    f"{folder} holds embeddings with {name} {theirs[name]}, not {ours[name]}: "
                    "choose another --output-dir, or delete that folder"
                )

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        try:
            if error_type is None:
                self.commit()
        finally:
            self.close()

    def add(self, clip: EmbeddedClip) -> None:
        """Buffer a clip in the cache's dtype; every `clips_per_shard` clips the buffer becomes a shard.

        Raises:
            ValueError: the clip is empty, or its arrays do not fit together or to the cache's dimension.
            CacheError: as `commit` does.
        """
        self.buffer.append(_as_stored(clip, self.provenance))
        if len(self.buffer) >= self.clips_per_shard:
            self.commit()

    def commit(self) -> None:
        """Write the buffered clips as one shard, durably.

        Raises:
            CacheError: an embedding is not finite in the cache's dtype; nothing is written then.
        """
        if not self.buffer:
            return
        clips, shard = self.buffer, self.folder / "shards" / f"{uuid.uuid4().hex}.h5"
        with ThreadPoolExecutor(1) as beside:  # it takes as long to inspect clips as to write them: do both at once
            inspected = beside.map(_inspect, clips)
            offsets, checksums = _write_synced(shard, lambda path: (_write_shard(path, clips), list(inspected)))
        # A list for each field, not an object for each clip: a reader parses it in half the time.
        columns = {name: [getattr(clip.key, name) for clip in clips] for name in ClipKey._fields}
        columns["frames"] = [len(clip.ticks) for clip in clips]
        columns["crc32"] = checksums
        manifest = {
            "bytes": shard.stat().st_size,
            "written_ns": time.time_ns(),
            "offsets": offsets,
            "clips": columns,
        }
        _write_synced(shard.with_suffix(".json"), lambda path: path.write_text(json.dumps(manifest)))
        self.buffer = []

    def close(self) -> None:
        """Let go of the lock; what is still buffered is dropped."""
        if self.lock is not None:
            self.lock.close()
            self.lock = None


@contextmanager
def _garbage_collector_paused() -> Iterator[None]:
    """Looking for garbage among 100,000 clips, where there is none, would take longer than making them."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class CachedClip(NamedTuple):
    """Where a clip lies in the cache."""

    key: ClipKey
    start: int
    """Row of its first embedding in the whole cache."""
    frames: int
    crc32: int
    """Of its embeddings as stored, times and ticks."""
    shard: Path


class EmbeddingCache:
    """Reads a cache: opened from its manifests in a moment, each shard memory-mapped when it is first read from.

    Rows of all shards are numbered through. `clips` are ordered by source and phase, so their order does not depend
    on how many ranks wrote them; of a file that was embedded before and after a change only the clip that was written
    last is there. May be sent to other processes, which map the shards themselves.

    Raises:
        CacheError: there is no cache, it has another format, it is empty, a manifest is damaged, or a shard has the
            wrong size. Reading raises it too if a shard has lost its size since.
    """

    @_garbage_collector_paused()
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.provenance = read_provenance(folder)
        newest: dict[tuple[str, float], CachedClip] = {}
        shards = []
        row = 0
        for manifest in _manifests(folder):
            manifest.shard.require_whole()
            shards.append(manifest.shard)
            for key, frames, crc32 in zip(manifest.keys, manifest.frames, manifest.checksums, strict=True):
                newest[key.source, key.phase_s] = CachedClip(key, row, frames, crc32, manifest.shard.path)
                row += frames
        if not newest:
            raise CacheError(f"{folder} holds no embeddings: run cache_embeddings first")
        self.clips = [newest[name] for name in sorted(newest)]
        self._shards = _Shards(shards, self.provenance.embedding_dimension, self.provenance.dtype)

    def only(self, sources: Collection[str]) -> "EmbeddingCache":
        """The same cache with the clips of some videos alone; rows keep their numbers."""
        part = copy.copy(self)
        part.clips = [clip for clip in self.clips if clip.key.source in sources]
        return part

    @property
    def frames(self) -> int:
        """How many embeddings the clips hold together."""
        return sum(clip.frames for clip in self.clips)

    @property
    def times_s(self) -> np.ndarray:
        """Presentation times in seconds, float64 (rows,); read from all shards when first asked for."""
        return self._shards.times_s

    @property
    def ticks(self) -> np.ndarray:
        """Ticks of the clock, int64 (rows,); read from all shards when first asked for."""
        return self._shards.ticks

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Runs of `length` rows that begin at `starts`, int (N,), in the dtype they are stored in, (N, length, D).

        Raises:
            IndexError: a run is not inside one shard.
        """
        return self._shards.windows(starts, length)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Embeddings of the given rows, int (...), as float32 (..., D).

        Raises:
            IndexError: there is no such row.
        """
        stored = self.windows(rows.ravel(), 1).reshape(*rows.shape, self.provenance.embedding_dimension)
        return _as_float32(stored)

    def is_intact(self, clip: CachedClip) -> bool:
        """Whether a clip still has the checksum that it was written with. A flipped bit is read without an error."""
        rows = slice(clip.start, clip.start + clip.frames)
        stored = self.windows(np.array([clip.start]), clip.frames)[0]
        return _checksum(stored, self.times_s[rows], self.ticks[rows]) == clip.crc32

    def clip_embeddings(self, clip: CachedClip) -> np.ndarray:
        """All embeddings of a clip, float32 (T, D)."""
        return _as_float32(self.windows(np.array([clip.start]), clip.frames)[0])

    def clip_times_s(self, clip: CachedClip) -> np.ndarray:
        """Times of a clip's embeddings in seconds, float64 (T,)."""
        return self.times_s[clip.start : clip.start + clip.frames]

    def unbroken_runs(self, clip: CachedClip | None = None) -> list[np.ndarray]:
        """Rows of each stretch without a gap in time, of one clip or of all, int64 (T,) each."""
        runs = []
        for one in self.clips if clip is None else [clip]:
            rows = np.arange(one.start, one.start + one.frames)
            runs += np.split(rows, np.flatnonzero(np.diff(self.ticks[rows]) != 1) + 1)
        return runs

    def require_same_space(self, fingerprint: str, fps: float, owner: str) -> None:
        """Refuse to be used with a model of other embeddings.

        Raises:
            CacheError: encoder or clock differ.
        """
        made_by, clock = self.provenance.encoder_fingerprint, self.provenance.fps
        if made_by != fingerprint:
            raise CacheError(
                f"{self.folder} was made by encoder {made_by}, but {owner} belongs to encoder {fingerprint}: "
                "cache the videos again with that encoder"
            )
        if clock != fps:
            raise CacheError(
                f"{self.folder} lies on a clock of {clock:g} fps, but {owner} on one of {fps:g} fps: "
                f"cache the videos again with --fps {fps:g}"
            )


def read_provenance(folder: Path) -> Provenance:
    """What a cache says it holds.

    Raises:
        CacheError: there is no cache, it cannot be read, or it has another format.
    """
    path = folder / "cache.json"
    if not path.exists():
        raise CacheError(f"{folder} is not an embedding cache (there is no cache.json in it): run cache_embeddings")
    try:
        record = json.loads(path.read_text())
        version = record.pop("format_version")
        if version > FORMAT_VERSION:
            raise CacheError(f"{folder} has cache format {version}, newer than {FORMAT_VERSION}: update video-jepa")
        if version < FORMAT_VERSION:
            raise CacheError(
                f"{folder} has cache format {version}, older than {FORMAT_VERSION}: "
                "delete it and run cache_embeddings again"
            )
        record["image_size"] = tuple(record["image_size"])
        return Provenance(**record)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheError(f"{path} is damaged ({error}): delete {folder} and run cache_embeddings again") from error


@_garbage_collector_paused()
def committed_clips(folder: Path) -> set[ClipKey]:
    """The clips that a cache holds for good, from its manifests alone; of a changed file the one written last.

    Raises:
        CacheError: a manifest is damaged.
    """
    newest = {(key.source, key.phase_s): key for manifest in _manifests(folder) for key in manifest.keys}
    return set(newest.values())


def remaining_clips(folder: Path, wanted: Sequence[ClipKey]) -> list[ClipKey]:
    """Those of `wanted` that are still to be embedded, in order."""
    done = committed_clips(folder)
    return [key for key in wanted if key not in done]


class _Shard(NamedTuple):
    """An HDF5 file, as its manifest describes it."""

    path: Path
    size_bytes: int
    rows: int
    offsets: dict[str, int]
    """Where in the file each dataset begins, in bytes."""

    def require_whole(self) -> None:
        """Raises `CacheError` if the file has another size: a truncated one, mapped, ends the process (bus error)."""
        size = self.path.stat().st_size if self.path.exists() else 0
        if size != self.size_bytes:
            raise CacheError(
                f"{self.path} has {size} bytes instead of {self.size_bytes}: delete it and {self.path.stem}.json, "
                "and run cache_embeddings again"
            )


class _Manifest(NamedTuple):
    """The commit of a shard."""

    written_ns: int
    shard: _Shard
    keys: list[ClipKey]
    """Of the clips, in the order of their rows, as are the others."""
    frames: list[int]
    checksums: list[int]


def _manifests(folder: Path) -> list[_Manifest]:
    """All manifests, in the order in which they were written: a later clip of a video replaces an earlier one."""
    paths = sorted((folder / "shards").glob("[!.]*.json"))
    return sorted(map(_read_manifest, paths), key=lambda manifest: manifest.written_ns)


def _read_manifest(path: Path) -> _Manifest:
    try:
        record = json.loads(path.read_bytes())
        columns = record["clips"]
        frames, checksums = columns["frames"], columns["crc32"]
        keys = list(map(ClipKey._make, zip(*(columns[name] for name in ClipKey._fields), strict=True)))
        if not len(keys) == len(frames) == len(checksums):
            raise ValueError("its columns have different lengths")
        offsets = {name: int(record["offsets"][name]) for name in DATASETS}
        return _Manifest(
            written_ns=int(record["written_ns"]),
            shard=_Shard(path.with_suffix(".h5"), int(record["bytes"]), sum(frames), offsets),
            keys=keys,
            frames=frames,
            checksums=checksums,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged_manifest(path, error) from error


def _damaged_manifest(path: Path, reason: object) -> CacheError:
    return CacheError(f"{path} is damaged ({reason}): delete it and {path.stem}.h5, and run cache_embeddings again")


class _Shards:
    """The shards of a cache as one run of rows; each file is mapped when it is first read from.

    What is mapped stays with the process: a copy that is sent to another one maps the files again.
    """

    def __init__(self, shards: Sequence[_Shard], dimension: int, dtype: str) -> None:
        self.shards, self.dimension, self.dtype = shards, dimension, np.dtype(dtype)
        self.row_bytes = dimension * self.dtype.itemsize
        self.rows = np.array([shard.rows for shard in shards])
        self.first_rows = np.cumsum(self.rows) - self.rows
        self.files: dict[int, Tensor] = {}
        self.addresses = np.zeros(len(shards), np.int64)
        """In memory, of the first embedding of each shard; 0 for a shard that is not mapped yet."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _Shards, (self.shards, self.dimension, self.dtype)

    @cached_property
    def times_s(self) -> np.ndarray:
        """float64 (rows,)."""
        return self._column("times_s", np.dtype(np.float64))

    @cached_property
    def ticks(self) -> np.ndarray:
        """int64 (rows,)."""
        return self._column("ticks", np.dtype(np.int64))

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Runs of `length` rows from `starts`, int (N,) -> (N, length, D) as stored. Raises `IndexError`."""
        shards = np.searchsorted(self.first_rows, starts, side="right") - 1
        rows = starts - self.first_rows[shards]
        # Nothing else stands between a wrong number and memory that is not ours.
        if length < 1 or ((rows < 0) | (rows + length > self.rows[shards])).any():
            raise IndexError(f"rows are out of range: not every run of {length} is inside one shard")
        if len(starts) == 0:
            return np.empty((0, length, self.dimension), self.dtype)
        for shard in set(shards[self.addresses[shards] == 0].tolist()):
            self.addresses[shard] = self._dataset(shard, "embeddings", self.row_bytes).data_ptr()
        # All windows are gathered at once, whichever shards they lie in: a loop over shards or windows takes longer
        # than the copying. So memory from the lowest window on is seen as one array, whose element k is the window
        # that would begin at byte k. It reaches over what lies between the shards, too; only true windows are picked.
        addresses = self.addresses[shards] + rows * self.row_bytes
        lowest = int(addresses.min())
        memory = {
            "version": 3,
            "data": (lowest, True),
            "shape": (int(addresses.max()) - lowest + 1,),
            "strides": (1,),
            "typestr": f"|V{length * self.row_bytes}",
        }
        windows = np.asarray(SimpleNamespace(__array_interface__=memory))[addresses - lowest]
        return windows.view(self.dtype).reshape(len(starts), length, self.dimension)

    def _column(self, name: str, dtype: np.dtype[Any]) -> np.ndarray:
        parts = [self._dataset(shard, name, dtype.itemsize) for shard in range(len(self.shards))]
        return np.concatenate([part.numpy().view(dtype) for part in parts])

    def _dataset(self, shard: int, name: str, row_bytes: int) -> Tensor:
        """The mapped bytes of one dataset, uint8 (rows * row_bytes,)."""
        path, size_bytes, rows, offsets = self.shards[shard]
        if shard not in self.files:
            self.shards[shard].require_whole()
            # Not `numpy.memmap`: it keeps each file open, and a process may have 1024 open files. `setdefault`: where
            # two threads map a file at once, both use the first mapping, and none in use is taken away.
            self.files.setdefault(shard, torch.from_file(str(path), size=size_bytes, dtype=torch.uint8))
        found = self.files[shard][offsets[name] : offsets[name] + rows * row_bytes]
        if len(found) != rows * row_bytes:
            raise _damaged_manifest(path.with_suffix(".json"), f"{name} are not inside the shard")
        return found


def _as_float32(stored: np.ndarray) -> np.ndarray:
    return torch.from_numpy(stored).float().numpy()  # NumPy takes 25 times as long for float16


def _as_stored(clip: EmbeddedClip, provenance: Provenance) -> EmbeddedClip:
    """The clip as it is written: contiguous, embeddings in the dtype of the cache."""
    frames = len(clip.ticks)
    if frames == 0 or clip.embeddings.shape != (frames, provenance.embedding_dimension) or len(clip.times_s) != frames:
        raise ValueError(
            f"{clip.key.source}: embeddings of shape {clip.embeddings.shape} with {len(clip.times_s)} times and "
            f"{frames} ticks are no clip of dimension {provenance.embedding_dimension}"
        )
    embeddings = torch.from_numpy(np.require(clip.embeddings, requirements=["C", "W"]))
    return EmbeddedClip(
        key=clip.key,
        embeddings=embeddings.to(getattr(torch, provenance.dtype)).numpy(),
        times_s=np.ascontiguousarray(clip.times_s, np.float64),
        ticks=np.ascontiguousarray(clip.ticks, np.int64),
    )


def _inspect(clip: EmbeddedClip) -> int:
    """The checksum of a clip as stored. Raises `CacheError` if an embedding is not finite."""
    # Extremes tell of NaN and infinity alike, in a small part of the time that `isfinite` takes for float16.
    if not all(math.isfinite(extreme) for extreme in torch.aminmax(torch.from_numpy(clip.embeddings))):
        dtype = clip.embeddings.dtype
        raise CacheError(f"the embeddings of {clip.key.source} are not finite in {dtype}: check the encoder")
    return _checksum(clip.embeddings, clip.times_s, clip.ticks)


def _write_shard(path: Path, clips: Sequence[EmbeddedClip]) -> dict[str, int]:
    """Write clips to an HDF5 file of contiguous datasets; returns where in it each dataset begins, in bytes."""
    rows = sum(len(clip.ticks) for clip in clips)
    columns = {name: [getattr(clip, name) for clip in clips] for name in DATASETS}
    allocated = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    allocated.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    allocated.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    offsets = {}
    with h5py.File(path, "w") as file:
        for name, (first, *_) in columns.items():
            dataset = file.create_dataset(name, (rows, *first.shape[1:]), first.dtype, dcpl=allocated)
            offsets[name] = dataset.id.get_offset()
    # HDF5 has laid the file out and is done: it would want all clips copied together, and write them half as fast.
    with path.open("r+b") as file:
        if hasattr(os, "posix_fallocate"):  # macOS does without; reserved space is filled faster
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        for name, parts in columns.items():
            file.seek(offsets[name])
            file.writelines(parts)
    return offsets


def _checksum(embeddings: np.ndarray, times_s: np.ndarray, ticks: np.ndarray) -> int:
    checksum = 0
    for array in (embeddings, times_s, ticks):
        checksum = zlib.crc32(array.data, checksum)
    return checksum


def _lock(folder: Path) -> IO[str]:
    """Hold the folder until the file is closed or the process dies, however it dies."""
    lock = (folder / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise CacheError(f"{folder} is being written by another process: wait for it, or stop it") from error
    return lock


def _write_synced(path: Path, write: Callable[[Path], Result]) -> Result:
    """Let `write` make a file under a temporary name; it gets its own name only once it is safely on disk."""
    unfinished = path.with_name(f".tmp.{path.name}")
    try:
        result = write(unfinished)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    return result
