"""Embeddings on disk, with provenance, in immutable HDF5 shards that a kill cannot harm.

A cache is a folder:

    cache.json               what the embeddings are: encoder, clock, transform, precision, columns, versions
    shards/NAME.h5           a contiguous dataset for each column, all on the same rows: `embeddings` (N, *tokens, D),
                             `times_s` (N,), `ticks` (N,), and what a table beside the video said; `shard`, its id
    shards/NAME.json         the clips in NAME.h5, with the checksum of each; its size and its id; and where in it the
                             datasets begin, in bytes, as HDF5 says

A shard is written under a temporary name, synced and renamed; its small JSON manifest follows in the same way, and
*the manifest is the commit*: an HDF5 file without one does not exist for the reader, and its clips are embedded
again. No file is ever changed after it has its name, so many ranks write side by side without locks between them,
and a resumed run may have another number of ranks.

The reader opens a cache from the manifests alone; a shard is mapped to memory when it is first read from, so nothing
ever holds a whole cache. What others wrote is not trusted: whatever does not fit is a `CacheError`.
"""

import fcntl
import json
import math
import os
import time
import uuid
import zlib
from collections.abc import Callable, Collection, Sequence
from copy import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, Self, TypeVar

import h5py
import numpy as np
import torch

from data.errors import DataError

FORMAT_VERSION = 4
Result = TypeVar("Result")


class CacheError(DataError):
    """A cache that cannot be used as asked; the message names it, the reason and the mend."""


@dataclass(frozen=True)
class Column:
    """A quantity with a value on each row of a cache."""

    dtype: str
    """Stored type: float16 or float32 for embeddings, float32 or float64 for other columns."""
    shape: tuple[int, ...] = ()
    """Shape of a row's value: `(*tokens, D)` for embeddings, `()` for a number."""

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"

    @property
    def row_bytes(self) -> int:
        """Size of a row's value in bytes."""
        return np.dtype(self.dtype).itemsize * math.prod(self.shape)


CLOCK = {"times_s": Column("float64"), "ticks": Column("int64")}
"""Columns of every cache: presentation times in seconds, and ticks of the clock."""


@dataclass(frozen=True)
class Provenance:
    """What the embeddings in a cache are. Two caches fit together if these agree.

    Raises:
        ValueError: a field has a value that no cache can have.
    """

    encoder: str
    """Name that the encoder was given by; another spelling of it is no other encoder."""
    encoder_fingerprint: str
    """`fingerprint` of the encoder."""
    fps: float
    """Rate of the clock that frames were sampled on, in ticks per second."""
    image_fps: float
    """Rate that folders of images were given, which have no times of their own."""
    image_size: tuple[int, int]
    """(height, width) in pixels of the frames."""
    window: int
    """Frames that the encoder sees for an embedding, the last one on the tick."""
    transform: str
    """What was done to the frames before the encoder."""
    precision: str
    """Arithmetic of the encoder: fp32, bf16 or fp16."""
    columns: dict[str, Column]
    """Columns beside times and ticks; one is `embeddings`."""
    versions: dict[str, str]
    """Versions of the decoder and the libraries; recorded, not compared."""

    def __post_init__(self) -> None:
        valid = {
            "encoder": isinstance(self.encoder, str),
            "encoder_fingerprint": isinstance(self.encoder_fingerprint, str),
            "fps": _is_rate(self.fps),
            "image_fps": _is_rate(self.image_fps),
            "image_size": _is_shape(self.image_size) and len(self.image_size) == 2,
            "window": _is_shape((self.window,)),
            "transform": isinstance(self.transform, str),
            "precision": self.precision in ("fp32", "bf16", "fp16"),
            "columns": "embeddings" in self.columns and all(map(_is_column, self.columns, self.columns.values())),
        }
        for name, is_valid in valid.items():
            if not is_valid:
                raise ValueError(f"{name} is {getattr(self, name)!r}")

    def comparable(self) -> dict[str, Any]:
        """The fields that must agree."""
        fields = {name: value for name, value in vars(self).items() if name not in ("encoder", "versions")}
        return fields | {"columns": ", ".join(f"{name} {column}" for name, column in sorted(self.columns.items()))}


def _is_rate(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < math.inf


def _is_shape(value: tuple[Any, ...]) -> bool:
    return all(type(size) is int and size > 0 for size in value)


def _is_column(name: str, column: Column) -> bool:
    """Whether HDF5 and the rest of the house can hold such a column under such a name."""
    dtypes, least = (("float16", "float32"), 1) if name == "embeddings" else (("float32", "float64"), 0)
    is_free = name.strip(".") != "" and "/" not in name and "\0" not in name and name not in (*CLOCK, "shard")
    return is_free and column.dtype in dtypes and len(column.shape) >= least and _is_shape(column.shape)


class ClipKey(NamedTuple):
    """Which stretch of which file: a changed file is another clip."""

    source: str
    """Absolute path of the video; with the next two, `data.manifest.FileState`."""
    size_bytes: int
    modified_ns: int
    offset_s: float
    """Shift of the clock, in seconds: one video on two clocks makes two clips."""


@dataclass(frozen=True)
class EmbeddedClip:
    """The embeddings of one video on one clock."""

    key: ClipKey
    columns: dict[str, np.ndarray]
    """(T, *shape) for each column of the cache, in any floating type; NaN where a table says nothing."""
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

    def __init__(
        self, folder: Path, provenance: Provenance, *, clips_per_shard: int = 64, is_main: bool = True
    ) -> None:
        self.folder, self.provenance, self.clips_per_shard = folder, provenance, clips_per_shard
        self.buffer: list[EmbeddedClip] = []
        self.lock: IO[str] | None = None
        try:
            if is_main:
                (folder / "shards").mkdir(parents=True, exist_ok=True)
                self.lock = _lock(folder)
                for abandoned in (*folder.glob(".tmp.*"), *(folder / "shards").glob(".tmp.*")):
                    abandoned.unlink()
                if not (folder / "cache.json").exists():
                    _write_json(folder / "cache.json", {"format_version": FORMAT_VERSION, **asdict(provenance)})
            theirs, ours = read_provenance(folder).comparable(), provenance.comparable()
            for name in ours:
                if theirs[name] != ours[name]:
                    raise CacheError(
                        f"{folder} holds embeddings with {name} {theirs[name]}, not {ours[name]}: "
                        "choose another folder, or delete that one"
                    )
            # What is written now comes after what is there, even if it was written by a clock that is ahead.
            self.written_ns = max((shard.written_ns for shard in _read_shards(folder)), default=0)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        try:
            if error_type is None:
                self.commit()
        finally:
            self.close()

    def add(self, clip: EmbeddedClip) -> None:
        """Buffer a clip in the cache's types; every `clips_per_shard` clips the buffer becomes a shard.

        Raises:
            ValueError: the clip is empty, or its arrays do not fit together or to the cache's columns.
            CacheError: an embedding is not finite in the cache's type.
        """
        self.buffer.append(_as_stored(clip, self.provenance.columns))
        if len(self.buffer) >= self.clips_per_shard:
            self.commit()

    def commit(self) -> None:
        """Write the buffered clips as one shard, durably."""
        if not self.buffer:
            return
        clips, name = self.buffer, uuid.uuid4().hex
        shard = self.folder / "shards" / f"{name}.h5"
        offsets = _write_synced(shard, lambda path: _write_shard(path, name, clips))
        self.written_ns = max(time.time_ns(), self.written_ns + 1)
        # A list for each field, not an object for each clip: a reader parses it in half the time.
        fields: dict[str, list[Any]] = {
            field: [getattr(clip.key, field) for clip in clips] for field in ClipKey._fields
        }
        fields["frames"] = [len(clip.ticks) for clip in clips]
        fields["crc32"] = [_checksum([*clip.columns.values(), clip.times_s, clip.ticks]) for clip in clips]
        manifest = {"bytes": shard.stat().st_size, "shard": name, "written_ns": self.written_ns, "offsets": offsets}
        _write_json(shard.with_suffix(".json"), manifest | {"clips": fields})
        self.buffer = []

    def close(self) -> None:
        """Let go of the lock; what is still buffered is dropped."""
        if self.lock is not None:
            self.lock.close()
            self.lock = None


class CachedClip(NamedTuple):
    """Where a clip lies in the cache."""

    key: ClipKey
    start: int
    """Row of its first embedding in the whole cache."""
    frames: int
    crc32: int
    """Checksum of its columns as stored, in order, then of its times and ticks."""
    shard: Path


class EmbeddingCache:
    """Reads a cache: opened from its manifests, each shard memory-mapped when it is first read from.

    Rows of all shards are numbered through. `clips` are ordered by source and offset, so their order does not depend
    on how many ranks wrote them; of a file that was embedded before and after a change only the clip that was written
    last is there. May be sent to other processes, which map the shards themselves.

    Raises:
        CacheError: there is no cache, it has another format, it is empty, a manifest is damaged, or a shard has the
            wrong size. Reading raises it too if a shard has lost its size since, or belongs to another manifest.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.provenance = folder, read_provenance(folder)
        self._columns = self.provenance.columns | CLOCK
        self._shards = _read_shards(folder)
        self._maps: dict[int, np.ndarray] = {}
        newest: dict[tuple[str, float], CachedClip] = {}
        row = 0
        for shard in self._shards:
            shard.require_whole()
            shard.require_inside(self._columns)
            for key, frames, crc32 in zip(shard.keys, shard.frames, shard.checksums, strict=True):
                newest[key.source, key.offset_s] = CachedClip(key, row, frames, crc32, shard.path)
                row += frames
        if not newest:
            raise CacheError(f"{folder} holds no embeddings: embed videos into it first")
        self._ends = np.cumsum([shard.rows for shard in self._shards])  # row after the last of each shard
        self.clips = [newest[name] for name in sorted(newest)]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_maps": {}}

    def only(self, sources: Collection[str]) -> "EmbeddingCache":
        """The same cache with the clips of some videos alone; rows keep their numbers."""
        part = copy(self)
        part.clips = [clip for clip in self.clips if clip.key.source in sources]
        return part

    @property
    def frames(self) -> int:
        """How many embeddings the clips hold together."""
        return sum(clip.frames for clip in self.clips)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of an embedding, `(*tokens, D)`."""
        return self.provenance.columns["embeddings"].shape

    def take(self, rows: np.ndarray, column: str = "embeddings") -> np.ndarray:
        """Values of a column on the given rows, int (...), as (..., *shape): float16 as float32, the rest as stored.

        Args:
            rows: numbers of rows, in any order and as often as wanted.
            column: one of `provenance.columns`, "times_s" or "ticks".

        Raises:
            IndexError: there is no such row.
            KeyError: there is no such column.
        """
        stored = self._gather(np.asarray(rows), column)
        if stored.dtype == np.float16:  # NumPy takes 25 times as long to convert it
            return torch.from_numpy(stored).float().numpy()
        return stored

    def clip_embeddings(self, clip: CachedClip) -> np.ndarray:
        """All embeddings of a clip, float32 (T, *tokens, D)."""
        return self.take(_rows(clip))

    def clip_times_s(self, clip: CachedClip) -> np.ndarray:
        """Times of a clip's embeddings in seconds, float64 (T,)."""
        return self.take(_rows(clip), "times_s")

    def clip_ticks(self, clip: CachedClip) -> np.ndarray:
        """Ticks of a clip's embeddings, int64 (T,)."""
        return self.take(_rows(clip), "ticks")

    def unbroken_runs(self, clip: CachedClip) -> list[np.ndarray]:
        """Rows of each run of a clip without a gap in time, int64 (T,) each."""
        return np.split(_rows(clip), np.flatnonzero(np.diff(self.clip_ticks(clip)) != 1) + 1)

    def is_intact(self, clip: CachedClip) -> bool:
        """Whether a clip still has the checksum that it was written with. A flipped bit is read without an error."""
        return _checksum([self._gather(_rows(clip), name) for name in self._columns]) == clip.crc32

    def require_same_space(self, fingerprint: str, fps: float, owner: str) -> None:
        """Refuse to be used with a model of other embeddings.

        Raises:
            CacheError: encoder or clock differ.
        """
        made_by, clock = self.provenance.encoder_fingerprint, self.provenance.fps
        if made_by != fingerprint:
            raise CacheError(
                f"{self.folder} was made by encoder {made_by}, but {owner} belongs to encoder {fingerprint}: "
                "embed the videos again with that encoder"
            )
        if clock != fps:
            raise CacheError(
                f"{self.folder} lies on a clock of {clock:g} fps, but {owner} on one of {fps:g} fps: "
                f"embed the videos again at {fps:g} fps"
            )

    def _gather(self, rows: np.ndarray, column: str) -> np.ndarray:
        """Values as stored, (...) -> (..., *shape), shard by shard."""
        shape, dtype = self._columns[column].shape, self._columns[column].dtype
        if rows.size == 0:
            return np.empty((*rows.shape, *shape), dtype)
        lowest, highest = rows.min(), rows.max()
        if lowest < 0 or highest >= self._ends[-1]:
            raise IndexError(f"rows {lowest} to {highest} are out of range: there are {self._ends[-1]}")
        first, last = np.searchsorted(self._ends, (lowest, highest), side="right")
        if first == last:
            return self._gather_from(int(first), rows, column)
        flat = rows.ravel()
        shards = np.searchsorted(self._ends, flat, side="right")
        order = shards.argsort(kind="stable")
        values = np.empty((len(flat), *shape), dtype)
        for part in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1):
            values[part] = self._gather_from(int(shards[part[0]]), flat[part], column)
        return values.reshape(*rows.shape, *shape)

    def _gather_from(self, shard: int, rows: np.ndarray, column: str) -> np.ndarray:
        """The same, where all rows lie in one shard."""
        found = self._shards[shard]
        found.require_whole()
        # Where two threads map a file at once, `setdefault` lets both use the first mapping.
        mapped = self._maps.get(shard)
        if mapped is None:
            mapped = self._maps.setdefault(shard, found.map())
        shape, dtype, offset = self._columns[column].shape, self._columns[column].dtype, found.offsets[column]
        values = np.ndarray((found.rows, *shape), dtype, buffer=mapped.data, offset=offset)
        return values[rows - (self._ends[shard] - found.rows)]


def read_provenance(folder: Path) -> Provenance:
    """What a cache says it holds.

    Raises:
        CacheError: there is no cache, it cannot be read, or it has another format.
    """
    path = folder / "cache.json"
    if not path.is_file():
        raise CacheError(
            f"{folder} is not an embedding cache (there is no cache.json in it): embed videos into it first"
        )
    try:
        record = json.loads(path.read_bytes())
        version = record.pop("format_version")
        if version > FORMAT_VERSION:
            raise CacheError(f"{folder} has cache format {version}, newer than {FORMAT_VERSION}: update video-jepa")
        if version < FORMAT_VERSION:
            raise CacheError(
                f"{folder} has cache format {version}, older than {FORMAT_VERSION}: "
                "delete it and embed the videos again"
            )
        columns = {name: Column(one["dtype"], tuple(one["shape"])) for name, one in record["columns"].items()}
        return Provenance(**record | {"image_size": tuple(record["image_size"]), "columns": columns})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CacheError(f"{path} is damaged ({error}): delete {folder} and embed the videos again") from error


def committed_clips(folder: Path) -> set[ClipKey]:
    """The clips that a cache holds for good, from its manifests alone; of a changed file the one written last.

    Raises:
        CacheError: a manifest is damaged.
    """
    return set({(key.source, key.offset_s): key for shard in _read_shards(folder) for key in shard.keys}.values())


def remaining_clips(folder: Path, wanted: Sequence[ClipKey]) -> list[ClipKey]:
    """Those of `wanted` that are still to be embedded, in order."""
    done = committed_clips(folder)
    return [key for key in wanted if key not in done]


class _Shard(NamedTuple):
    """An HDF5 file, as its manifest describes it."""

    path: Path
    size_bytes: int
    id: str
    written_ns: int
    rows: int
    offsets: dict[str, int]
    """Where in the file each dataset begins, in bytes."""
    keys: list[ClipKey]
    """Keys of the clips in the order of their rows, as are the next two."""
    frames: list[int]
    checksums: list[int]

    def require_whole(self) -> None:
        """Raises `CacheError` if the file has another size: a truncated one, mapped, ends the process (bus error)."""
        try:
            size = os.stat(self.path).st_size
        except FileNotFoundError:
            size = 0
        if size != self.size_bytes:
            raise CacheError(
                f"{self.path} has {size} bytes instead of {self.size_bytes}: delete it and {self.path.stem}.json, "
                "and embed its videos again"
            )

    def require_inside(self, columns: dict[str, Column]) -> None:
        """Raises `CacheError` unless all columns lie inside the file."""
        for name, row_bytes in [*((name, column.row_bytes) for name, column in columns.items()), ("shard", 0)]:
            offset = self.offsets.get(name)
            if type(offset) is not int or not 0 <= offset <= self.size_bytes - self.rows * row_bytes:
                raise _damaged_manifest(self.path.with_suffix(".json"), f"{name} is not inside the shard")

    def map(self) -> np.ndarray:
        """The bytes of the file, uint8 (bytes,). Raises `CacheError` if they belong to another manifest."""
        # Not `numpy.memmap`: it keeps each file open, and a process may have 1024 open files.
        mapped = torch.from_file(str(self.path), size=self.size_bytes, dtype=torch.uint8).numpy()
        start = self.offsets["shard"]
        if mapped[start : start + len(self.id)].tobytes() != self.id.encode():
            raise _damaged_manifest(self.path.with_suffix(".json"), "it belongs to another shard")
        return mapped


def _read_shards(folder: Path) -> list[_Shard]:
    """All shards in the order in which they were written: a later clip of a video replaces an earlier one."""
    paths = sorted((folder / "shards").glob("[!.]*.json"))
    return sorted(map(_read_manifest, paths), key=lambda shard: shard.written_ns)


def _read_manifest(path: Path) -> _Shard:
    try:
        record = json.loads(path.read_bytes())
        clips = record["clips"]
        keys = [ClipKey(*fields) for fields in zip(*(clips[name] for name in ClipKey._fields), strict=True)]
        shard = _Shard(
            path=path.with_suffix(".h5"),
            size_bytes=record["bytes"],
            id=record["shard"],
            written_ns=record["written_ns"],
            rows=sum(clips["frames"]),
            offsets=record["offsets"],
            keys=keys,
            frames=clips["frames"],
            checksums=clips["crc32"],
        )
        if not len(keys) == len(shard.frames) == len(shard.checksums):
            raise ValueError("its columns have different lengths")
        if not _is_shape((shard.size_bytes, shard.written_ns, *shard.frames)):
            raise ValueError("a size is not a positive whole number")
        if not all(isinstance(source, str) and math.isfinite(offset_s) for source, *_, offset_s in keys):
            raise ValueError("a clip has no name or no clock")
        if not isinstance(shard.id, str) or not isinstance(shard.offsets, dict):
            raise ValueError("it does not say what is where")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged_manifest(path, error) from error
    return shard


def _damaged_manifest(path: Path, reason: object) -> CacheError:
    return CacheError(f"{path} is damaged ({reason}): delete it and {path.stem}.h5, and embed the videos again")


def _rows(clip: CachedClip) -> np.ndarray:
    return np.arange(clip.start, clip.start + clip.frames)


def _as_stored(clip: EmbeddedClip, columns: dict[str, Column]) -> EmbeddedClip:
    """The clip as it is written: contiguous, in the types and the order of the cache's columns."""
    frames, source = len(clip.ticks), clip.key.source
    given = {name: value.shape for name, value in clip.columns.items()}
    if (
        frames == 0
        or len(clip.times_s) != frames
        or given != {name: (frames, *column.shape) for name, column in columns.items()}
    ):
        expected = ", ".join(f"{name} {column}" for name, column in columns.items())
        raise ValueError(
            f"{source}: {given} with {len(clip.times_s)} times and {frames} ticks are no clip of {expected}"
        )
    with np.errstate(over="ignore"):  # what a type cannot hold is infinite, and refused
        stored = {name: np.ascontiguousarray(clip.columns[name], column.dtype) for name, column in columns.items()}
    if not np.isfinite(stored["embeddings"]).all():
        dtype = stored["embeddings"].dtype
        raise CacheError(f"the embeddings of {source} are not finite in {dtype}: check the encoder")
    times_s, ticks = np.ascontiguousarray(clip.times_s, np.float64), np.ascontiguousarray(clip.ticks, np.int64)
    return EmbeddedClip(clip.key, stored, times_s, ticks)


def _write_shard(path: Path, name: str, clips: Sequence[EmbeddedClip]) -> dict[str, int]:
    """Write clips to an HDF5 file of contiguous datasets; returns where in it each dataset begins, in bytes."""
    columns = {column: np.concatenate([clip.columns[column] for clip in clips]) for column in clips[0].columns}
    columns["times_s"] = np.concatenate([clip.times_s for clip in clips])
    columns["ticks"] = np.concatenate([clip.ticks for clip in clips])
    columns["shard"] = np.frombuffer(name.encode(), np.uint8)
    with h5py.File(path, "x") as file:
        return {column: file.create_dataset(column, data=data).id.get_offset() for column, data in columns.items()}


def _checksum(arrays: Sequence[np.ndarray]) -> int:
    checksum = 0
    for array in arrays:
        checksum = zlib.crc32(array.data, checksum)
    return checksum


def _lock(folder: Path) -> IO[str]:
    """Hold the folder until the file is closed or the process dies, however it dies."""
    # Never through a link, which could lead to a file of somebody else's.
    lock = os.fdopen(os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise CacheError(f"{folder} is being written by another process: wait for it, or stop it") from error
    return lock


def _write_json(path: Path, record: dict[str, Any]) -> None:
    def write(unfinished: Path) -> None:
        with unfinished.open("x") as file:
            json.dump(record, file)

    _write_synced(path, write)


def _write_synced(path: Path, write: Callable[[Path], Result]) -> Result:
    """Let `write` make a file under a temporary name; it gets its own name only once it is safely on disk."""
    unfinished = path.with_name(f".tmp.{uuid.uuid4().hex}{path.suffix}")
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
