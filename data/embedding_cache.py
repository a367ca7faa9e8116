"""Embeddings on disk, with provenance, in immutable HDF5 shards that a kill cannot harm.

A cache is a folder:

    cache.json               what the embeddings are: encoder, clock, transform, versions
    shards/NAME.h5           contiguous `embeddings` (N, D), `times_s` (N,), `ticks` (N,)
    shards/NAME.json         which clips are in NAME.h5, with the checksum of each, and its size in bytes

A shard is written under a temporary name, synced and renamed; its small JSON manifest follows in the same way, and
*the manifest is the commit*: an HDF5 file without one does not exist for the reader, and its clips are embedded
again. No file is ever changed after it has its name, so many ranks write side by side without locks between them,
and a resumed run may have another number of ranks.
"""

import copy
import fcntl
import json
import os
import time
import uuid
import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import h5py
import numpy as np

FORMAT_VERSION = 2


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
    image_size: tuple[int, int]
    """(height, width) in pixels that frames were stretched to."""
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
    """Absolute path of the video."""
    size_bytes: int
    modified_ns: int
    phase_s: float
    """By how much the clock was shifted, in seconds."""


def clip_key(source: Path, phase_s: float = 0.0) -> ClipKey:
    """The key of a video file as it lies on disk now."""
    status = source.stat()
    return ClipKey(str(source.resolve()), status.st_size, status.st_mtime_ns, phase_s)


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
        CacheError: the folder holds other embeddings, a newer format, or is being written by another process.
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
        """Buffer a clip; every `clips_per_shard` clips the buffer becomes a shard."""
        self.buffer.append(clip)
        if len(self.buffer) >= self.clips_per_shard:
            self.commit()

    def commit(self) -> None:
        """Write the buffered clips as one shard, durably."""
        if not self.buffer:
            return
        clips, dtype = self.buffer, self.provenance.dtype
        name = uuid.uuid4().hex
        shard = self.folder / "shards" / f"{name}.h5"
        with np.errstate(over="ignore"):
            embeddings = np.concatenate([clip.embeddings for clip in clips]).astype(dtype)
        if not np.isfinite(embeddings).all():
            bounds = np.cumsum([len(clip.ticks) for clip in clips])[:-1]
            sources = sorted(
                clip.key.source
                for clip, part in zip(clips, np.split(embeddings, bounds), strict=True)
                if not np.isfinite(part).all()
            )
            raise CacheError(f"the embeddings of {sources[0]} are not finite in {dtype}: check the encoder")

        times_s = np.concatenate([clip.times_s for clip in clips]).astype(np.float64)
        ticks = np.concatenate([clip.ticks for clip in clips]).astype(np.int64)
        records, start = [], 0
        for clip in clips:
            rows = slice(start, start := start + len(clip.ticks))
            checksum = _checksum(embeddings[rows], times_s[rows], ticks[rows])
            records.append({**clip.key._asdict(), "frames": len(clip.ticks), "crc32": checksum})

        def write(path: Path) -> None:
            with h5py.File(path, "w") as file:
                file["embeddings"], file["times_s"], file["ticks"] = embeddings, times_s, ticks

        _write_synced(shard, write)
        manifest = {"bytes": shard.stat().st_size, "written_ns": time.time_ns(), "clips": records}
        _write_synced(shard.with_suffix(".json"), lambda path: path.write_text(json.dumps(manifest)))
        self.buffer = []

    def close(self) -> None:
        """Let go of the lock; what is still buffered is dropped."""
        if self.lock is not None:
            self.lock.close()
            self.lock = None


@dataclass(frozen=True)
class CachedClip:
    """Where a clip lies in the cache."""

    key: ClipKey
    start: int
    """Row of its first embedding in the whole cache."""
    frames: int
    crc32: int
    """Of its embeddings as stored, times and ticks."""
    shard: Path


class EmbeddingCache:
    """Reads a cache: memory-mapped, opened in a moment whatever its size.

    Rows of all shards are numbered through. `clips` are ordered by source and phase, so their order does not depend
    on how many ranks wrote them; of a file that was embedded before and after a change only the clip that was written
    last is there.

    Raises:
        CacheError: there is no cache, it has a newer format, it is empty, or a shard has the wrong size.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.provenance = read_provenance(folder)
        newest: dict[tuple[str, float], CachedClip] = {}
        self._embeddings: list[np.ndarray] = []
        times_s, ticks, first_rows = [], [], []
        row = 0
        for manifest_path, manifest in _manifests(folder):
            shard = manifest_path.with_suffix(".h5")
            size = shard.stat().st_size if shard.exists() else 0
            if size != manifest["bytes"]:
                # Mapping a truncated file would end the process with a bus error.
                raise CacheError(
                    f"{shard} has {size} bytes instead of {manifest['bytes']}: delete it and {manifest_path.name}, "
                    "and run cache_embeddings again"
                )
            with h5py.File(shard, "r") as file:
                dataset = file["embeddings"]
                offset, shape, dtype = dataset.id.get_offset(), dataset.shape, dataset.dtype
                times_s.append(file["times_s"][:])
                ticks.append(file["ticks"][:])
            if shape[0] == 0:
                mapped = np.empty(shape, dtype)
            else:
                mapped = np.memmap(shard, mode="r", dtype=dtype, shape=shape, offset=offset)
            self._embeddings.append(mapped)
            first_rows.append(row)
            for record in manifest["clips"]:
                frames, crc32 = record.pop("frames"), record.pop("crc32")
                clip = CachedClip(ClipKey(**record), row, frames, crc32, shard)
                row += frames
                newest[clip.key.source, clip.key.phase_s] = clip
        if not newest:
            raise CacheError(f"{folder} holds no embeddings: run cache_embeddings first")
        self.clips = [newest[name] for name in sorted(newest)]
        self.times_s = np.concatenate(times_s)
        """float64 (rows,), seconds."""
        self.ticks = np.concatenate(ticks)
        """int64 (rows,)."""
        self._first_rows = np.array(first_rows)

    def only(self, sources: Collection[str]) -> "EmbeddingCache":
        """The same cache with the clips of some videos alone; rows keep their numbers."""
        part = copy.copy(self)
        part.clips = [clip for clip in self.clips if clip.key.source in sources]
        return part

    @property
    def frames(self) -> int:
        """How many embeddings the clips hold together."""
        return sum(clip.frames for clip in self.clips)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Embeddings of the given rows, int (...), as float32 (..., D)."""
        flat = rows.ravel()
        output = np.empty((len(flat), self.provenance.embedding_dimension), dtype=np.float32)
        shard_of_row = np.searchsorted(self._first_rows, flat, side="right") - 1
        for shard in np.unique(shard_of_row):
            chosen = np.flatnonzero(shard_of_row == shard)
            output[chosen] = np.take(self._embeddings[shard], flat[chosen] - self._first_rows[shard], axis=0)
        return output.reshape(*rows.shape, -1)

    def is_intact(self, clip: CachedClip) -> bool:
        """Whether a clip still has the checksum that it was written with. A flipped bit is read without an error."""
        rows = slice(clip.start, clip.start + clip.frames)
        shard = int(np.searchsorted(self._first_rows, clip.start, side="right")) - 1
        first = clip.start - self._first_rows[shard]
        stored = self._embeddings[shard][first : first + clip.frames]
        return _checksum(stored, self.times_s[rows], self.ticks[rows]) == clip.crc32

    def clip_embeddings(self, clip: CachedClip) -> np.ndarray:
        """All embeddings of a clip, float32 (T, D)."""
        return self.take(np.arange(clip.start, clip.start + clip.frames))

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
        CacheError: there is no cache, it cannot be read, or it has a newer format.
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


def committed_clips(folder: Path) -> set[ClipKey]:
    """The clips that a cache holds for good, from its manifests alone; of a changed file the one written last."""
    newest: dict[tuple[str, float], ClipKey] = {}
    for _, manifest in _manifests(folder):
        for record in manifest["clips"]:
            key = ClipKey(**{name: record[name] for name in ClipKey._fields})
            newest[key.source, key.phase_s] = key
    return set(newest.values())


def _manifests(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """All manifests, in the order in which they were written: a later clip of a video replaces an earlier one."""
    paths = sorted((folder / "shards").glob("[!.]*.json"))
    return sorted(((path, json.loads(path.read_text())) for path in paths), key=lambda entry: entry[1]["written_ns"])


def remaining_clips(folder: Path, wanted: Sequence[ClipKey]) -> list[ClipKey]:
    """Those of `wanted` that are still to be embedded, in order."""
    done = committed_clips(folder)
    return [key for key in wanted if key not in done]


def _checksum(embeddings: np.ndarray, times_s: np.ndarray, ticks: np.ndarray) -> int:
    checksum = 0
    for array in (embeddings, times_s, ticks):
        checksum = zlib.crc32(np.ascontiguousarray(array).tobytes(), checksum)
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


def _write_synced(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file under a temporary name; it gets its own name only once it is safely on disk."""
    unfinished = path.with_name(f".tmp.{path.name}")
    try:
        write(unfinished)
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
