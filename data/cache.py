"""Embeddings on disk, with provenance, in immutable HDF5 shards that a kill cannot harm.

A cache is a folder:

    cache.json        what the embeddings are: encoder, clock, transform, precision, columns, versions
    shards/NAME.h5    a contiguous dataset for each column, all on the same rows: `embeddings` (N, *tokens, D),
                      `times_s` (N,), `ticks` (N,), and what a table beside the video says; and `shard`, its id
    shards/NAME.json  which clips are in NAME.h5, with the checksum of each; its size, its id, where its datasets begin

A shard is written under a temporary name, synced and renamed; its small JSON manifest follows in the same way, and
*the manifest is the commit*: an HDF5 file without one does not exist for the reader, and its clips are embedded
again. No file is ever changed after it has its name, so many ranks write side by side without locks between them,
and a resumed run may have another number of ranks.

A cache is opened from the manifests alone, and a shard is mapped to memory when it is first read from: nothing ever
holds a whole cache. Nor is it trusted: what does not fit is a `CacheError`.
"""

import fcntl
import io
import json
import math
import os
import time
import uuid
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

import h5py
import numpy as np
import torch

from data.errors import DataError

FORMAT_VERSION = 4
LARGEST_SHARD = 1 << 28
"""Bytes of embeddings at which a shard is written, however few clips they are: tokens are large."""


class CacheError(DataError):
    """A cache that cannot be used as asked; the message names it, the reason and the mend."""


@dataclass(frozen=True)
class Column:
    """A quantity with a value on each row of a cache."""

    dtype: str
    """Stored type: float16 or float32 for embeddings, float32 or float64 for other columns."""
    shape: tuple[int, ...] = ()
    """Shape of a row's value: `(*tokens, D)` for embeddings, `()` for a number."""

    def __repr__(self) -> str:
        return f"{self.dtype} {self.shape}"

    def is_valid(self, name: str) -> bool:
        """Whether a cache can hold such a column under such a name."""
        is_free = name.strip(".") != "" and not {"/", "\0"} & set(name) and name not in (*CLOCK, "shard")
        dtypes = ("float16", "float32") if name == "embeddings" else ("float32", "float64")
        return (
            is_free and self.dtype in dtypes and _are_sizes(*self.shape) and (name != "embeddings" or self.shape != ())
        )


CLOCK = {"times_s": Column("float64"), "ticks": Column("int64")}
"""Columns of every cache: presentation times in seconds, and ticks of the clock."""


@dataclass(frozen=True)
class Provenance:
    """Origin of the embeddings in a cache. Two caches fit together if these agree.

    Raises:
        ValueError: a field has a value that no cache can have.
    """

    encoder: str
    """Name that the encoder was given by; recorded, not compared."""
    encoder_fingerprint: str
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
            "fps": 0 < self.fps < math.inf,
            "image_fps": 0 < self.image_fps < math.inf,
            "image_size": len(self.image_size) == 2 and _are_sizes(*self.image_size),
            "window": _are_sizes(self.window),
            "precision": self.precision in ("fp32", "bf16", "fp16"),
            "columns": "embeddings" in self.columns and all(one.is_valid(name) for name, one in self.columns.items()),
        }
        for name, is_valid in valid.items():
            if not is_valid:
                raise ValueError(f"{name} is {getattr(self, name)!r}")

    def comparable(self) -> dict[str, Any]:
        """Fields in which caches must agree."""
        return {name: value for name, value in vars(self).items() if name not in ("encoder", "versions")}


class ClipKey(NamedTuple):
    """Name of a clip: a stretch of a file; a changed file is another clip."""

    source: str
    """Absolute path of the video; with the next two, `data.manifest.FileState`."""
    size_bytes: int
    modified_ns: int
    offset_s: float
    """Shift of the clock in seconds: one video on two clocks makes two clips."""


@dataclass(frozen=True)
class EmbeddedClip:
    """Embeddings of one video on one clock."""

    key: ClipKey
    columns: dict[str, np.ndarray]
    """(T, *shape) for each column of the cache, in any floating type; NaN where a table says nothing."""
    times_s: np.ndarray
    """float64 (T,), exact presentation times in seconds."""
    ticks: np.ndarray
    """int64 (T,), strictly increasing; a jump by more than 1 is a gap in the recording."""

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """All columns, the clock's last."""
        return self.columns | {"times_s": self.times_s, "ticks": self.ticks}


class CachedClip(NamedTuple):
    """Place of a clip in a cache."""

    key: ClipKey
    start: int
    """Row of its first embedding in the whole cache."""
    frames: int
    crc32: int
    """Checksum of its columns as stored, in the order of the cache's, then of times and ticks."""
    shard: Path

    @property
    def rows(self) -> np.ndarray:
        """Rows of its embeddings in the whole cache, int64 (T,)."""
        return np.arange(self.start, self.start + self.frames)


class CacheWriter:
    """Writer of one rank's clips. Use as a context manager; leaving it without an error commits what is buffered.

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
        self.folder, self.clips_per_shard = folder, clips_per_shard
        self._buffer: list[EmbeddedClip] = []
        self.lock: IO[bytes] | None = None
        try:
            if is_main:
                (folder / "shards").mkdir(parents=True, exist_ok=True)
                self.lock = _lock(folder)
                for abandoned in (*folder.glob(".tmp.*"), *folder.glob("shards/.tmp.*")):
                    abandoned.unlink()
                if not (folder / "cache.json").exists():
                    _write_json(folder / "cache.json", {"format_version": FORMAT_VERSION, **asdict(provenance)})
            stored = read_provenance(folder)
            for name, ours in provenance.comparable().items():
                if (theirs := getattr(stored, name)) != ours:
                    raise CacheError(
                        f"{folder} holds embeddings with {name} {theirs}, not {ours}: "
                        "choose another folder, or delete that one"
                    )
            self.columns = stored.columns | CLOCK
            shards, _ = _read_shards(folder, self.columns)
            self.written_ns = shards[-1].written_ns if shards else 0
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
        """Buffer a clip in the cache's types; `clips_per_shard` clips, or a large buffer, become a shard.

        Raises:
            ValueError: the clip is empty, or its arrays do not fit together or to the cache's columns.
            CacheError: an embedding is not finite in the cache's type.
        """
        self._buffer.append(_as_stored(clip, self.columns))
        size = sum(one.columns["embeddings"].nbytes for one in self._buffer)
        if len(self._buffer) >= self.clips_per_shard or size >= LARGEST_SHARD:
            self.commit()

    def commit(self) -> None:
        """Write the buffered clips as one shard, durably."""
        if not self._buffer:
            return
        name = uuid.uuid4().hex
        shard = self.folder / "shards" / f"{name}.h5"
        columns = {column: np.concatenate([clip.arrays[column] for clip in self._buffer]) for column in self.columns}
        columns["shard"] = np.frombuffer(name.encode(), np.uint8)
        image = io.BytesIO()  # not on the disk: where that is full, HDF5 crashes the process
        with h5py.File(image, "w") as file:
            offsets = {
                column: file.create_dataset(column, data=data).id.get_offset() for column, data in columns.items()
            }
        with _synced(shard) as unfinished, unfinished.open("xb") as raw:
            raw.write(image.getbuffer())
        clips = [[*clip.key, len(clip.ticks), _checksum(clip.arrays.values())] for clip in self._buffer]
        # Later than all that is there, even if that was written by a clock that was ahead.
        self.written_ns = max(time.time_ns(), self.written_ns + 1)
        manifest = {"shard": name, "bytes": shard.stat().st_size, "written_ns": self.written_ns, "offsets": offsets}
        _write_json(shard.with_suffix(".json"), manifest | {"clips": clips})
        self._buffer = []

    def close(self) -> None:
        """Let go of the lock; what is still buffered is dropped."""
        if self.lock is not None:
            self.lock.close()
            self.lock = None


class EmbeddingCache:
    """Reader of a cache: opened from its manifests, each shard mapped to memory when it is first read from.

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
        self._shards, self.clips = _read_shards(folder, self._columns)
        if not self.clips:
            raise CacheError(f"{folder} holds no embeddings: embed videos into it first")
        self._ends = np.cumsum([shard.rows for shard in self._shards])  # row after the last of each shard
        self._maps: dict[int, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_maps": {}}

    @property
    def frames(self) -> int:
        """Number of embeddings in all clips."""
        return sum(clip.frames for clip in self.clips)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of an embedding, `(*tokens, D)`."""
        return self.provenance.columns["embeddings"].shape

    def take(self, rows: np.ndarray, column: str = "embeddings") -> np.ndarray:
        """Values of a column on the given rows, (...) -> (..., *shape).

        float16 comes as float32, all else as it is stored.

        Raises:
            IndexError: there is no such row.
            KeyError: there is no such column, neither in the provenance nor "times_s" or "ticks".
        """
        stored = self._gather(rows, column)
        if stored.dtype == np.float16:  # NumPy takes 25 times as long to convert it
            return torch.from_numpy(stored).float().numpy()
        return stored

    def clip_embeddings(self, clip: CachedClip) -> np.ndarray:
        """All embeddings of a clip, float32 (T, *tokens, D)."""
        return self.take(clip.rows)

    def clip_times_s(self, clip: CachedClip) -> np.ndarray:
        """Times of a clip's embeddings in seconds, float64 (T,)."""
        return self.take(clip.rows, "times_s")

    def clip_ticks(self, clip: CachedClip) -> np.ndarray:
        """Ticks of a clip's embeddings, int64 (T,)."""
        return self.take(clip.rows, "ticks")

    def unbroken_runs(self, clip: CachedClip) -> list[np.ndarray]:
        """Rows of each run of a clip without a gap in time, int64 (T,) each."""
        return np.split(clip.rows, np.flatnonzero(np.diff(self.clip_ticks(clip)) != 1) + 1)

    def is_intact(self, clip: CachedClip) -> bool:
        """Whether a clip still matches its checksum. A flipped bit is read without an error."""
        return _checksum(self._gather(clip.rows, name) for name in self._columns) == clip.crc32

    def require_same_space(self, fingerprint: str, fps: float, owner: str) -> None:
        """Refuse to be used with a model of other embeddings.

        Raises:
            CacheError: encoder or clock differ.
        """
        made_by, clock = self.provenance.encoder_fingerprint, self.provenance.fps
        if (made_by, clock) != (fingerprint, fps):
            raise CacheError(
                f"{self.folder} was made by encoder {made_by} at {clock:g} fps, but {owner} belongs to encoder "
                f"{fingerprint} at {fps:g} fps: embed the videos again with that encoder and clock"
            )

    def _gather(self, rows: np.ndarray, name: str) -> np.ndarray:
        """Values as stored, (...) -> (..., *shape), shard by shard."""
        column, flat = self._columns[name], rows.ravel()
        if len(flat) == 0:
            return np.empty((*rows.shape, *column.shape), column.dtype)
        lowest, highest = flat.min(), flat.max()
        if lowest < 0 or highest >= self._ends[-1]:
            raise IndexError(f"rows {lowest} to {highest} are out of range: there are {self._ends[-1]}")
        first, last = np.searchsorted(self._ends, (lowest, highest), side="right").tolist()
        if first == last:
            return self._gather_from(first, rows, name)
        shards = np.searchsorted(self._ends, flat, side="right")
        order = shards.argsort(kind="stable")
        values = np.empty((len(flat), *column.shape), column.dtype)
        for part in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1):
            values[part] = self._gather_from(int(shards[part[0]]), flat[part], name)
        return values.reshape(*rows.shape, *column.shape)

    def _gather_from(self, index: int, rows: np.ndarray, name: str) -> np.ndarray:
        """The same, where all rows lie in one shard."""
        shard, column = self._shards[index], self._columns[name]
        shard.require_whole()
        if index not in self._maps:  # where two threads map a file at once, both use the first mapping
            self._maps.setdefault(index, shard.map())
        buffer, offset = self._maps[index].data, shard.offsets[name]
        values = np.ndarray((shard.rows, *column.shape), column.dtype, buffer, offset)
        return np.take(values, rows - (self._ends[index] - shard.rows), axis=0)


def read_provenance(folder: Path) -> Provenance:
    """Provenance of a cache, as it says itself.

    Raises:
        CacheError: there is no cache, it cannot be read, or it has another format.
    """
    path = folder / "cache.json"
    if not path.is_file():
        raise CacheError(f"{folder} is not an embedding cache (there is no {path.name} in it): embed videos into it")
    try:
        record = json.loads(path.read_bytes())
        version = record.pop("format_version")
        if version != FORMAT_VERSION:
            mend = "update video-jepa" if version > FORMAT_VERSION else "delete it and embed the videos again"
            raise CacheError(f"{folder} has cache format {version}, and this is for {FORMAT_VERSION}: {mend}")
        columns = {name: Column(one["dtype"], tuple(one["shape"])) for name, one in record["columns"].items()}
        return Provenance(**record | {"image_size": tuple(record["image_size"]), "columns": columns})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CacheError(f"{path} is damaged ({error}): delete {folder} and embed the videos again") from error


def remaining_clips(folder: Path, wanted: Sequence[ClipKey]) -> list[ClipKey]:
    """Clips of `wanted` missing in a cache, in order.

    Raises:
        CacheError: as opening the cache does, but for an empty one.
    """
    _, clips = _read_shards(folder, read_provenance(folder).columns | CLOCK)
    done = {clip.key for clip in clips}
    return [key for key in wanted if key not in done]


class _Shard(NamedTuple):
    """An HDF5 file, as its manifest describes it."""

    path: Path
    rows: int
    size_bytes: int
    id: bytes
    written_ns: int
    offsets: dict[str, int]
    """Place in the file where each dataset begins, in bytes."""

    def damaged(self, reason: object) -> CacheError:
        """The error that names the shard and the mend."""
        return CacheError(f"{self.path} {reason}: delete it and {self.path.stem}.json, and embed the videos again")

    def require_whole(self) -> None:
        """Raises `CacheError` if the file has another size: a truncated one, mapped, ends the process (bus error)."""
        try:
            size = os.stat(self.path).st_size
        except FileNotFoundError:
            size = 0
        if size != self.size_bytes:
            raise self.damaged(f"has {size} bytes instead of {self.size_bytes}")

    def map(self) -> np.ndarray:
        """The bytes of the file, uint8 (bytes,). Raises `CacheError` if they belong to another manifest."""
        # Not `numpy.memmap`: it keeps each file open, and a process may have 1024 open files.
        mapped = torch.from_file(str(self.path), size=self.size_bytes, dtype=torch.uint8).numpy()
        start = self.offsets["shard"]
        if mapped[start : start + len(self.id)].tobytes() != self.id:
            raise self.damaged("does not belong to its manifest")
        return mapped


def _read_shards(folder: Path, columns: dict[str, Column]) -> tuple[list[_Shard], list[CachedClip]]:
    """All shards in the order in which they were written, and the clips in the order of their names.

    A later clip of a video replaces an earlier one.
    """
    manifests = [
        _read_manifest(path, columns) for path in sorted((folder / "shards").glob("[!.]*.json")) if path.is_file()
    ]
    manifests.sort(key=lambda manifest: manifest[0].written_ns)
    newest: dict[tuple[str, float], CachedClip] = {}
    row = 0
    for shard, clips in manifests:
        for clip in clips:
            newest[clip.key.source, clip.key.offset_s] = clip._replace(start=row + clip.start)
        row += shard.rows
    return [shard for shard, _ in manifests], [newest[name] for name in sorted(newest)]


def _read_manifest(path: Path, columns: dict[str, Column]) -> tuple[_Shard, list[CachedClip]]:
    """A shard, and its clips at their rows in it."""
    shard = _Shard(path.with_suffix(".h5"), rows=0, size_bytes=0, id=b"", written_ns=0, offsets={})
    try:
        record = json.loads(path.read_bytes())
        clips, rows = [], 0
        for *key, frames, crc32 in record["clips"]:
            clips.append(CachedClip(ClipKey(*key), rows, frames, crc32, shard.path))
            rows += frames
        shard = _Shard(
            shard.path,
            rows=rows,
            size_bytes=record["bytes"],
            id=record["shard"].encode(),
            written_ns=record["written_ns"],
            offsets=dict(record["offsets"]),
        )
        begins = [shard.offsets[name] for name in (*columns, "shard")]
        if not _are_sizes(shard.size_bytes, shard.written_ns, *begins, *(clip.frames for clip in clips)):
            raise ValueError("a size is not a positive whole number")
        for source, size_bytes, modified_ns, offset_s in (clip.key for clip in clips):
            if [type(source), type(size_bytes), type(modified_ns)] != [str, int, int] or not math.isfinite(offset_s):
                raise ValueError("a clip has no name, no state or no clock")
        for name, column in columns.items():
            row_bytes = np.dtype(column.dtype).itemsize * math.prod(column.shape)
            if shard.offsets[name] + rows * row_bytes > shard.size_bytes:
                raise ValueError(f"{name} is not inside the shard")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise shard.damaged(f"has a damaged manifest ({error})") from error
    shard.require_whole()
    return shard, clips


def _are_sizes(*values: Any) -> bool:
    return all(type(value) is int and value > 0 for value in values)


def _as_stored(clip: EmbeddedClip, columns: dict[str, Column]) -> EmbeddedClip:
    """The clip as it is written: contiguous, in the types and the order of the cache's columns."""
    given = clip.arrays
    shapes = {name: values.shape for name, values in given.items()}
    if len(clip.ticks) == 0 or shapes != {name: (len(clip.ticks), *column.shape) for name, column in columns.items()}:
        raise ValueError(f"{clip.key.source}: arrays of shapes {shapes} do not fit the columns {columns}")
    with np.errstate(over="ignore"):  # what a type cannot hold is infinite, and refused
        stored = {name: np.require(given[name], column.dtype, ["C", "W"]) for name, column in columns.items()}
    # Extremes tell of NaN and infinity alike, in a small part of the time that `np.isfinite` takes for float16.
    if not all(map(math.isfinite, torch.aminmax(torch.from_numpy(stored["embeddings"])))):
        dtype = columns["embeddings"].dtype
        raise CacheError(f"the embeddings of {clip.key.source} are not finite in {dtype}: check the encoder")
    return EmbeddedClip(clip.key, times_s=stored.pop("times_s"), ticks=stored.pop("ticks"), columns=stored)


def _checksum(arrays: Iterable[np.ndarray]) -> int:
    checksum = 0
    for array in arrays:
        checksum = zlib.crc32(array.data, checksum)
    return checksum


def _lock(folder: Path) -> IO[bytes]:
    """Hold the folder until the file is closed or the process dies, however it dies."""
    # Never through a link, which could lead to a file of somebody else's.
    lock = os.fdopen(os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "wb")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise CacheError(f"{folder} is being written by another process: wait for it, or stop it") from error
    return lock


def _write_json(path: Path, record: dict[str, Any]) -> None:
    with _synced(path) as unfinished, unfinished.open("x") as file:
        json.dump(record, file)


@contextmanager
def _synced(path: Path) -> Iterator[Path]:
    """A temporary path for a file, which gets its own name only once it is safely on disk."""
    unfinished = path.with_name(f".tmp.{uuid.uuid4().hex}{path.suffix}")
    try:
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)
