"""Embeddings on disk, with provenance, in immutable HDF5 shards: what a cache is (docs/formats.md), and its reader.

The small JSON manifest of a shard is written last, and *the manifest is the commit*: an HDF5 file without one does not
exist. No file is ever changed after it has its name. A cache is opened from the manifests alone, and a shard is mapped
to memory when it is first read from: nothing ever holds a whole cache. What does not fit is a `CacheError`.
"""

import math
import zlib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import numpy as np
import torch
from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from data.errors import DataError
from data.files import read_json

FORMAT_VERSION = 5
DAMAGES = (OSError, ValueError, LookupError, TypeError, AttributeError)
"""Errors that JSON of another shape than expected can raise."""


class CacheError(DataError):
    """A cache that cannot be used as asked; the message names it, the reason and the mend."""


@dataclass(frozen=True)
class Column:
    """A quantity with a value on each row of a cache."""

    dtype: str
    """Stored type: float16 or float32 for embeddings, float32 or float64 for other columns."""
    shape: tuple[int, ...] = ()  # of a row's value: `(*tokens, D)` for embeddings, `()` for a number

    def is_valid(self, name: str) -> bool:
        """Whether a cache can hold such a column under such a name."""
        is_free = name.strip(".") != "" and not {"/", "\0"} & set(name) and name not in (*CLOCK, "shard")
        dtypes = ("float16", "float32") if name == "embeddings" else ("float32", "float64")
        return is_free and self.dtype in dtypes and _are_sizes(*self.shape)


CLOCK = {"times_s": Column("float64"), "ticks": Column("int64")}
"""Columns of every cache: presentation times in seconds, and ticks of the clock."""


@dataclass(frozen=True)
class Provenance:
    """Origin of the embeddings in a cache; a value that no cache can have raises `ValueError`."""

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
        for name, hint in get_type_hints(Provenance).items():
            try:
                check_type(getattr(self, name), hint, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
            except TypeCheckError as error:
                raise ValueError(f"{name} cannot be: {error}") from error
        rates = 1e-6 < self.fps < 1e6 and 1e-6 < self.image_fps < 1e6
        if not (rates and _are_sizes(*self.image_size, self.window)):
            raise ValueError(f"fps {self.fps}, {self.image_fps}, image_size {self.image_size} or window cannot be")
        embeddings = self.columns.get("embeddings", Column("none"))
        is_shaped = 1 <= len(embeddings.shape) <= 8
        if not is_shaped or not all(one.is_valid(name) for name, one in self.columns.items()):
            raise ValueError(f"columns {', '.join(self.columns)} or their types cannot be")


class ClipKey(NamedTuple):
    """Name of a clip: a video on a clock; a changed video is another clip, a moved one is not."""

    source: str
    """Absolute path of the video, when it was seen last."""
    content: str
    """What tells the video from all others (`data.content.content_of`)."""
    offset_s: float
    """Shift of the clock in seconds: one video on two clocks makes two clips."""


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


class EmbeddingCache:
    """Reader of a cache.

    Rows of all shards are numbered through; `clips` are ordered by source and offset. Other processes may be sent it.
    Raises `CacheError` where there is none, it has another format, is empty or is damaged; reading raises it too.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.provenance = folder, read_provenance(folder)
        self._columns = self.provenance.columns | CLOCK
        self._shards, self.clips = read_shards(folder, self._columns)
        if not self.clips:
            raise CacheError(f"{folder} holds no embeddings: embed videos into it first")
        self._edges = np.cumsum([0, *(shard.rows for shard in self._shards)])  # shard i: rows edges[i] to edges[i + 1]
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
        """Values of a column, be it "times_s" or "ticks", on the given rows, (...) -> (..., *shape).

        float16 comes as float32, all else as it is stored. Raises `IndexError` or `KeyError` if there is none.
        """
        return self.take_windows(rows, 1, column=column).squeeze(rows.ndim)

    def take_windows(self, starts: np.ndarray, length: int, *, column: str = "embeddings") -> np.ndarray:
        """Values, as of `take`, of windows that begin at some rows, within a shard, (...) -> (..., length, *shape)."""
        stored = self._gather(starts, length, column=column)
        # NumPy would take 25 times as long to convert it.
        return torch.from_numpy(stored).float().numpy() if stored.dtype == np.float16 else stored

    @property
    def rows(self) -> np.ndarray:
        """Rows of all clips, in their order, int64 (N,): those of clips that were replaced are left out."""
        return np.concatenate([clip.rows for clip in self.clips])

    def clip_of(self, rows: np.ndarray) -> np.ndarray:
        """Clips that rows belong to, (N,) -> int64 (N,), indices into `clips`."""
        starts = np.array([clip.start for clip in self.clips])
        order = starts.argsort()
        return order[np.searchsorted(starts[order], rows, side="right") - 1]

    def unbroken_runs(self, clip: CachedClip, columns: Iterable[str] = ()) -> list[np.ndarray]:
        """Rows of each run of a clip without a gap in time or a NaN in some columns, int64 (T,) each.

        Raises `CacheError` if time goes back.
        """
        steps = np.diff(self.take(clip.rows, "ticks"))
        if (steps < 1).any() or not np.isfinite(self.take(clip.rows, "times_s")).all():
            raise _damaged(clip.shard, f"holds times of {clip.key.source} that cannot be")
        is_known = np.ones(clip.frames, bool)
        for name in columns:
            is_known &= np.isfinite(self.take(clip.rows, name))
        runs = np.split(clip.rows, np.flatnonzero((steps != 1) | (np.diff(is_known) != 0)) + 1)
        return [run for run in runs if is_known[run[0] - clip.start]]

    def is_intact(self, clip: CachedClip) -> bool:
        """Whether a clip still matches its checksum. A flipped bit is read without an error."""
        return checksum(self._gather(clip.rows, 1, column=name) for name in self._columns) == clip.crc32

    def require_same_space(self, fingerprint: str, fps: float, shape: tuple[int, ...], owner: str) -> None:
        """Raise `CacheError` if a model belongs to other embeddings, or to embeddings of another shape."""
        stored = self.provenance
        if (stored.encoder_fingerprint, stored.fps, self.shape) != (fingerprint, fps, shape):
            raise CacheError(
                f"{self.folder} was made by encoder {stored.encoder_fingerprint} at {stored.fps:g} fps with embeddings "
                f"of shape {self.shape}, but {owner} belongs to encoder {fingerprint} at {fps:g} fps and shape "
                f"{shape}: embed the videos again with that encoder and clock"
            )

    def _gather(self, starts: np.ndarray, length: int, *, column: str) -> np.ndarray:
        """Windows as stored, (...) -> (..., length, *shape), shard by shard."""
        low, high = int(starts.min(initial=self._edges[-1] - 1)), int(starts.max(initial=0))
        if low < 0 or high >= self._edges[-1]:
            raise IndexError(f"rows {low} to {high} are out of range: there are {self._edges[-1]}")
        first, last = (np.searchsorted(self._edges, (low, high), side="right") - 1).tolist()
        kind, flat = self._columns[column], starts.ravel()
        if first >= last:  # of one shard, or none at all
            values = self._stored(first, length, column=column)[flat - self._edges[first]]
            return values.reshape((*starts.shape, *values.shape[1:]))
        values = np.empty((len(flat), length, *kind.shape), kind.dtype)
        shards = np.searchsorted(self._edges, flat, side="right") - 1
        order = shards.argsort(kind="stable")
        for part in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1):
            index = int(shards[part[0]])
            values[part] = self._stored(index, length, column=column)[flat[part] - self._edges[index]]
        return values.reshape((*starts.shape, *values.shape[1:]))

    def _stored(self, index: int, length: int, *, column: str) -> np.ndarray:
        """All windows of a shard, mapped, overlapping, (rows - length + 1, length, *shape)."""
        shard, kind = self._shards[index], self._columns[column]
        shard.require_whole()
        if index not in self._maps:
            self._maps[index] = shard.map()
        rows = np.ndarray((shard.rows, *kind.shape), kind.dtype, self._maps[index].data, shard.offsets[column])
        shape = (max(shard.rows - length + 1, 0), length, *kind.shape)
        return np.ndarray(shape, kind.dtype, rows.data, strides=rows.strides[:1] + rows.strides)


def read_provenance(folder: Path) -> Provenance:
    """Provenance of a cache, as it says itself. Raises `CacheError`."""
    path = folder / "cache.json"
    if not path.is_file():
        raise CacheError(f"{folder} is not an embedding cache (there is no {path.name} in it): embed videos into it")
    try:
        record = read_json(path)
        version = record.pop("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(f"its format is {version}, and this video-jepa is for {FORMAT_VERSION}")
        columns = {name: Column(one["dtype"], tuple(one["shape"])) for name, one in record["columns"].items()}
        return Provenance(**record | {"image_size": tuple(record["image_size"]), "columns": columns})
    except DAMAGES as error:
        raise CacheError(f"{path} cannot be used ({error}): delete {folder} and embed the videos again") from error


class Shard(NamedTuple):
    """An HDF5 file, as its manifest describes it."""

    path: Path
    rows: int
    size_bytes: int
    id: bytes
    written_ns: int
    offsets: dict[str, int]
    """Place in the file where each dataset begins, in bytes."""

    def require_whole(self) -> None:
        """Raise `CacheError` if the file has another size: a truncated one, mapped, ends the process (bus error)."""
        size = 0
        with suppress(FileNotFoundError):
            size = self.path.stat().st_size
        if size != self.size_bytes:
            raise _damaged(self.path, f"has {size} bytes instead of {self.size_bytes}")

    def map(self) -> np.ndarray:
        """The bytes of the file, uint8 (bytes,). Raises `CacheError` if they belong to another manifest."""
        # Not `numpy.memmap`: it keeps each file open, and a process may have 1024 open files.
        mapped = torch.from_file(str(self.path), size=self.size_bytes, dtype=torch.uint8).numpy()
        if mapped[self.offsets["shard"] :][: len(self.id)].tobytes() != self.id:
            raise _damaged(self.path, "does not belong to its manifest")
        return mapped


def read_shards(folder: Path, columns: dict[str, Column]) -> tuple[list[Shard], list[CachedClip]]:
    """All shards in the order in which they were written, and the clips in the order of their names.

    Clips go with their videos to where `read_places` says that these lie, and what lay there before gives way. Where
    it says nothing, a later clip of a path replaces an earlier one.
    """
    places = read_places(folder)
    moved = {content: path for path, content in places.items()}
    paths = [path for path in sorted((folder / "shards").glob("[!.]*.json")) if path.is_file()]
    manifests = sorted((_read_manifest(path, columns) for path in paths), key=lambda manifest: manifest[0].written_ns)
    newest: dict[tuple[str, float], CachedClip] = {}
    row = 0
    for shard, clips in manifests:
        for clip in clips:
            _, content, offset_s = clip.key
            source = moved.get(content, clip.key.source)
            if places.get(source, content) == content:
                key = clip.key._replace(source=source)
                newest[source, offset_s] = clip._replace(key=key, start=row + clip.start)
        row += shard.rows
    return [shard for shard, _ in manifests], [newest[name] for name in sorted(newest)]


def read_places(folder: Path) -> dict[str, str]:
    """Contents of videos by the paths at which they lay when they were embedded last. Raises `CacheError`."""
    path = folder / "places.json"
    try:
        places = read_json(path) if path.exists() else {}
        if not all(isinstance(one, str) for one in places.values()):
            raise ValueError("it is no list of contents by path")
    except DAMAGES as error:
        raise CacheError(f"{path} is damaged ({error}): delete it, and embed the videos again") from error
    return places


def _read_manifest(path: Path, columns: dict[str, Column]) -> tuple[Shard, list[CachedClip]]:
    """A shard, and its clips at their rows in it."""
    shard_path = path.with_suffix(".h5")
    try:
        record = read_json(path)
        clips, rows = [], 0
        for *key, frames, crc32 in record["clips"]:
            if [type(value) for value in (*key, crc32)] != [str, str, float, int]:
                raise ValueError(f"{key} is no clip")
            clips.append(CachedClip(ClipKey(*key), rows, frames, crc32, shard_path))
            rows += frames
        offsets = {name: record["offsets"][name] for name in (*columns, "shard")}
        shard_id, written_ns = record["shard"].encode(), record["written_ns"]
        shard = Shard(shard_path, rows, record["bytes"], id=shard_id, written_ns=written_ns, offsets=offsets)
        if not _are_sizes(shard.size_bytes, shard.written_ns, *offsets.values(), *(clip.frames for clip in clips)):
            raise ValueError("a size is not a positive whole number")
        for name, column in columns.items():
            size_bytes = rows * np.dtype(column.dtype).itemsize * math.prod(column.shape)
            if offsets[name] + size_bytes > shard.size_bytes:
                raise ValueError(f"{name} is not inside the shard")
    except DAMAGES as error:
        raise _damaged(shard_path, f"has a damaged manifest ({error})") from error
    shard.require_whole()
    return shard, clips


def _damaged(shard: Path, reason: str) -> CacheError:
    return CacheError(f"{shard} {reason}: delete it and {shard.stem}.json, and embed the videos again")


def checksum(arrays: Iterable[np.ndarray]) -> int:
    """CRC-32 of contiguous arrays, one after the other."""
    crc32 = 0
    for array in arrays:
        crc32 = zlib.crc32(array.data, crc32)
    return crc32


def _are_sizes(*values: Any) -> bool:
    return all(type(value) is int and value > 0 for value in values)
