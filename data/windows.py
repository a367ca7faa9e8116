"""Windows of a cache: what a predictor is trained and judged on.

A window is a run of rows on consecutive ticks of one clip: it never crosses a clip or a gap in time, nor, where actions
are wanted, a tick of which the table beside the video says nothing.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.cache import CacheError, EmbeddingCache


class Windows:
    """All windows of `length` embeddings, numbered through; within a clip in the order of time.

    With actions, columns of the cache, ticks without them are left out: so many as `without_actions` says. Raises
    `CacheError` if no clip is long enough for a single window.
    """

    def __init__(self, cache: EmbeddingCache, length: int, actions: Sequence[str] = ()) -> None:
        self.cache, self.length, self.names = cache, length, actions
        runs = [
            (run[0], len(run), index)
            for index, clip in enumerate(cache.clips)
            for run in cache.unbroken_runs(clip, actions)
        ]
        starts, lengths, clips = np.array(runs, np.int64).reshape(-1, 3).T
        self.without_actions = cache.frames - int(lengths.sum())
        fit = lengths >= length
        if not fit.any():
            fps, longest = cache.provenance.fps, lengths.max(initial=0)
            raise CacheError(
                f"no clip in {cache.folder} is long enough: a window takes {length} embeddings "
                f"({length / fps:.1f} s at {fps:g} fps), the longest unbroken clip has {longest}; "
                "bring longer videos, or lower the context or the horizon"
            )
        self._run_starts, self._run_clips = starts[fit], clips[fit]  # (runs,): first row; index into `cache.clips`
        self._run_videos = np.unique([clip.key.source for clip in cache.clips], return_inverse=True)[1][clips[fit]]
        counts = lengths[fit] - length + 1
        self._ends = np.cumsum(counts)  # (runs,): number after the run's last window
        self._firsts = self._ends - counts

    def __len__(self) -> int:
        return int(self._ends[-1])

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Rows in the cache of the given windows, (N,) -> int64 (N, length). Raises `IndexError`."""
        return self._starts(indices)[:, None] + np.arange(self.length)

    def take(self, indices: np.ndarray) -> Tensor:
        """Embeddings of the given windows, (N,) -> float32 (N, length, *tokens, D)."""
        return torch.from_numpy(self.column(indices, "embeddings"))

    def actions(self, indices: np.ndarray) -> Tensor | None:
        """Actions of the given windows, (N,) -> float32 (N, length, A); None if none are wanted."""
        columns = [self.column(indices, name) for name in self.names]
        return torch.from_numpy(np.stack(columns, axis=-1)).float() if columns else None

    def column(self, indices: np.ndarray, name: str) -> np.ndarray:
        """A column of the cache, be it "times_s", on the given windows, (N,) -> (N, length, *shape)."""
        return self.cache.take_windows(self._starts(indices), self.length, column=name)

    def clip_of(self, indices: np.ndarray) -> np.ndarray:
        """Clips of the given windows, (N,) -> int64 (N,), indices into `cache.clips`."""
        return self._run_clips[self._runs(indices)]

    def video_of(self, indices: np.ndarray) -> np.ndarray:
        """Numbers of the windows' videos, in the order of names, clocks taken together, (N,) -> int64 (N,)."""
        return self._run_videos[self._runs(indices)]

    def videos(self, indices: np.ndarray) -> tuple[Path, ...]:
        """Videos of the given windows, each once."""
        clips = (self.cache.clips[clip] for clip in np.unique(self.clip_of(indices)))
        return tuple(dict.fromkeys(Path(clip.key.source) for clip in clips))

    def of_other_videos(self, indices: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Numbers of windows of other videos than the given ones, drawn uniformly, (N,) -> int64 (N,)."""
        begin, after = (np.searchsorted(self._run_videos, self.video_of(indices), side) for side in ("left", "right"))
        first, end = self._firsts[begin], self._ends[after - 1]  # of the windows of the same video
        drawn = generator.integers(len(self) - (end - first))
        return np.where(drawn < first, drawn, drawn + end - first)

    def sample(self, count: int, generator: torch.Generator) -> np.ndarray:
        """Numbers of windows drawn uniformly with replacement, int64 (count,)."""
        return torch.randint(len(self), (count,), generator=generator).numpy()

    def evenly(self, most: int) -> np.ndarray:
        """Numbers of at most `most` windows, evenly spaced from the first to the last, int64 (N,)."""
        count = min(most, len(self))
        return np.arange(count) * (len(self) - 1) // max(count - 1, 1)

    def _starts(self, indices: np.ndarray) -> np.ndarray:
        runs = self._runs(indices)
        return self._run_starts[runs] + indices - self._firsts[runs]

    def _runs(self, indices: np.ndarray) -> np.ndarray:
        if ((indices < 0) | (indices >= len(self))).any():
            raise IndexError(f"there are {len(self)} windows, numbered from 0")
        return np.searchsorted(self._ends, indices, side="right")
