"""Writer of a cache of embeddings, so that a kill harms nothing.

A shard is written under a temporary name, synced and renamed; its manifest follows in the same way, and is the commit.
Many ranks write side by side without locks between them, and a resumed run may have another number of ranks.
"""

import io
import json
import math
import time
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import h5py
import numpy as np
import torch

from data.cache import CLOCK, FORMAT_VERSION, CacheError, ClipKey, Provenance, checksum, read_provenance, read_shards
from data.files import hold, require_no_links, sweep, write_whole

LARGEST_SHARD = 1 << 28  # bytes of embeddings at which a shard is written, however few clips they are: tokens are large
NOT_COMPARED = ("encoder", "versions")  # fields of the provenance in which embeddings of one cache may differ


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


class CacheWriter:
    """Writer of one rank's clips. Use as a context manager; leaving it without an error commits what is buffered.

    At most `clips_per_shard` clips are lost when the process dies. The main rank makes the folder, holds its lock, and
    writes down which contents lie at which paths now (`places`); the others construct theirs after it. Raises
    `CacheError` if the folder holds other embeddings, or another format; `DataError` if another process holds it.
    """

    def __init__(
        self, folder: Path, provenance: Provenance, *, clips_per_shard: int = 64, is_main: bool = True,
        places: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.clips_per_shard = folder, clips_per_shard
        self._buffer: list[tuple[ClipKey, dict[str, np.ndarray]]] = []
        self._sums: torch.Tensor | None = None
        self._rows = 0
        with ExitStack() as held:
            if is_main:
                require_no_links(folder, ("shards",))
                (folder / "shards").mkdir(parents=True, exist_ok=True)
                held.enter_context(hold(folder))
                if not (folder / "cache.json").exists():
                    described = {"format_version": FORMAT_VERSION, **asdict(provenance)}
                    write_whole(folder / "cache.json", json.dumps(described).encode())
                sweep(folder)
                sweep(folder / "shards")
            stored = read_provenance(folder)
            for name, ours in vars(provenance).items():
                theirs = getattr(stored, name)
                if theirs != ours and name not in NOT_COMPARED:
                    raise CacheError(
                        f"{folder} holds embeddings with {name} {theirs}, not {ours}: "
                        "choose another folder, or delete that one"
                    )
            self.columns = stored.columns | CLOCK
            shards, _ = read_shards(folder, self.columns)
            self.written_ns = shards[-1].written_ns if shards else 0
            if is_main and places:
                path, here = folder / "places.json", set(places.values())
                before = json.loads(path.read_bytes()) if path.exists() else {}  # which `read_shards` has checked
                others = {path: content for path, content in before.items() if content not in here}
                write_whole(path, json.dumps(others | places).encode())
            self._held = held.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        with self._held:  # the lock; after an error, what is still buffered is dropped
            if error_type is None:
                self.commit()

    def add(self, clip: EmbeddedClip) -> None:
        """Buffer a clip in the cache's types; `clips_per_shard` clips, or a large buffer, become a shard.

        Raises `ValueError` if it is empty, or its arrays do not fit the columns; `CacheError` if an embedding is not
        finite in the cache's type.
        """
        self._buffer.append((clip.key, self._as_stored(clip)))
        size = sum(arrays["embeddings"].nbytes for _, arrays in self._buffer)
        if len(self._buffer) >= self.clips_per_shard or size >= LARGEST_SHARD:
            self.commit()

    def commit(self) -> None:
        """Write the buffered clips as one shard, durably."""
        if not self._buffer:
            return
        shard = uuid.uuid4().hex
        columns = {name: np.concatenate([arrays[name] for _, arrays in self._buffer]) for name in self.columns}
        columns["shard"] = np.frombuffer(shard.encode(), np.uint8)
        image = io.BytesIO()  # not on the disk: where that is full, HDF5 crashes the process
        with h5py.File(image, "w") as file:
            offsets = {name: file.create_dataset(name, data=data).id.get_offset() for name, data in columns.items()}
        write_whole(self.folder / "shards" / f"{shard}.h5", image.getbuffer())
        clips = [[*key, len(arrays["ticks"]), checksum(arrays.values())] for key, arrays in self._buffer]
        # Later than all that is there, even if that was written by a clock that was ahead.
        self.written_ns = max(time.time_ns(), self.written_ns + 1)
        manifest = {
            "shard": shard, "bytes": len(image.getbuffer()), "written_ns": self.written_ns, "offsets": offsets,
            "clips": clips,
        }  # fmt: skip
        write_whole(self.folder / "shards" / f"{shard}.json", json.dumps(manifest).encode())
        self._buffer = []

    def _as_stored(self, clip: EmbeddedClip) -> dict[str, np.ndarray]:
        """The arrays as they are written: contiguous, in the types and the order of the cache's columns."""
        given = clip.columns | {"times_s": clip.times_s, "ticks": clip.ticks}
        shapes = {name: values.shape for name, values in given.items()}
        length = len(clip.ticks)
        if length == 0 or shapes != {name: (length, *column.shape) for name, column in self.columns.items()}:
            raise ValueError(f"{clip.key.source}: arrays of shapes {shapes} do not fit the columns {self.columns}")
        with np.errstate(over="ignore"):  # what a type cannot hold is infinite, and refused
            stored = {name: np.require(given[name], column.dtype, ["C", "W"]) for name, column in self.columns.items()}
        # Extremes tell of NaN and infinity alike, in a small part of the time that `np.isfinite` takes for float16.
        exact, kept = (torch.from_numpy(one["embeddings"]) for one in (clip.columns, stored))
        if not all(map(math.isfinite, torch.aminmax(kept))):
            source, dtype = clip.key.source, self.columns["embeddings"].dtype
            fits = not all(map(math.isfinite, torch.aminmax(exact)))
            mend = "check the encoder" if fits else "they are too large for it, take dtype float32"
            raise CacheError(f"the embeddings of {source} are not finite in {dtype}: {mend}")
        if kept.dtype != exact.dtype:
            self._measure_rounding(exact.flatten(0, -2), kept.flatten(0, -2))
        return stored

    def _measure_rounding(self, exact: torch.Tensor, kept: torch.Tensor) -> None:
        """Sum up what tells the rounding of storage, (rows, D) twice."""
        if self._sums is None:
            self._origin, self._sums = exact[0].double(), torch.zeros(3, exact.shape[1], dtype=torch.float64)
        centred = exact.double() - self._origin  # sums of squares around 0 would cancel where the mean is large
        parts = centred.sum(dim=0), centred.square().sum(dim=0), (kept.double() - exact).square().sum(dim=0)
        self._sums, self._rows = self._sums + torch.stack(parts), self._rows + len(exact)

    @property
    def rounding(self) -> np.ndarray:
        """Rounding of what was stored as a share of its variance, by feature, (D,); 0 where nothing varies."""
        if self._sums is None:
            return np.zeros(1)
        mean, square, noise = self._sums / self._rows
        return (noise / (square - mean.square())).nan_to_num(0, 0, 0).numpy()


def remaining_clips(folder: Path, wanted: Sequence[ClipKey]) -> list[ClipKey]:
    """Clips of `wanted` missing in a cache, in order. Raises `CacheError` as opening does, but for an empty one."""
    _, clips = read_shards(folder, read_provenance(folder).columns | CLOCK)
    done = {(clip.key.content, clip.key.offset_s) for clip in clips}
    return [key for key in wanted if (key.content, key.offset_s) not in done]
