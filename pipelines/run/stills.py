"""The frames behind a cache, decoded again for people to look at."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.cache import CachedClip, EmbeddingCache
from data.decoder import VideoError
from data.frames_at import read_frames_at
from data.video import probe_video


def clip_of_row(cache: EmbeddingCache, row: int) -> CachedClip:
    """The clip that a row of a cache belongs to."""
    return next(clip for clip in cache.clips if clip.start <= row < clip.start + clip.frames)


def read_pictures(cache: EmbeddingCache, rows: Sequence[int] | np.ndarray, *, height: int = 144) -> list[np.ndarray]:
    """The frames behind rows int (N,) of a cache, uint8 (height, width, 3) each; every video is opened once.

    Their width follows the shape of the video.

    Raises:
        VideoError: a video is gone, cannot be decoded, or has no frame there any more.
    """
    fps, image_fps = cache.provenance.fps, cache.provenance.image_fps
    sources = [clip_of_row(cache, int(row)).key.source for row in rows]
    pictures: dict[int, np.ndarray] = {}
    for source in dict.fromkeys(sources):
        places = [place for place, other in enumerate(sources) if other == source]
        video = probe_video(Path(source), image_fps)
        size = (height, max(1, round(height * video.width / video.height)))
        times_s = cache.take(np.asarray(rows)[places], "times_s")
        frames, found_s = read_frames_at(video.path, size, times_s=times_s, image_fps=image_fps)
        for time_s in times_s[np.abs(found_s - times_s) > 0.5 / fps][:1]:
            raise VideoError(f"{source}: there is no frame at {time_s:.2f} s: was it changed since it was cached?")
        pictures |= {place: frame.transpose(1, 2, 0) for place, frame in zip(places, frames, strict=True)}
    return [pictures[place] for place in range(len(sources))]
