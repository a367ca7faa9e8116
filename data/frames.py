"""The frames behind embeddings of a cache, read again."""

from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.cache import EmbeddingCache, Provenance
from data.clock import read_frames_at
from data.decoder import Damage
from data.errors import VideoError
from data.parallel import map_ahead
from data.video import FrameSize, probe_video


def fitting_size(video: Path, provenance: Provenance, within: FrameSize) -> FrameSize:
    """(height, width), even numbers, of the largest pictures with a video's shape. Raises `VideoError`."""
    shape = probe_video(video, provenance.image_fps)
    scale = min(within[0] / shape.height, within[1] / shape.width)
    return max(2, round(shape.height * scale / 2) * 2), max(2, round(shape.width * scale / 2) * 2)


def read_again(video: Path, times_s: np.ndarray, size: FrameSize, provenance: Provenance) -> np.ndarray:
    """Frames at the times of embeddings, (T,) in any order, uint8 (T, 3, height, width), in one pass.

    Raises `VideoError` where the video is gone, cannot be decoded, or has no frame there any more.
    """
    fps = provenance.image_fps
    frames, found_s = read_frames_at(video, size, times_s=times_s, damage=Damage(), image_fps=fps)  # told of before
    for time_s in times_s[np.abs(found_s - times_s) > 0.5 / provenance.fps][:1]:
        raise VideoError(f"{video}: there is no frame at {time_s:.2f} s: was it changed since it was cached?")
    return frames


def read_frames(cache: EmbeddingCache, rows: np.ndarray, size: FrameSize, *, keep_shape: bool = False) -> np.ndarray:
    """Frames behind rows of a cache, (...) -> uint8 (..., 3, height, width), video by video, several side by side.

    They are stretched to the size, as the encoder saw them, or keep their shape, with black beside them. Raises as
    `read_again`.
    """
    flat, frames = rows.ravel(), np.zeros((rows.size, 3, *size), np.uint8)
    videos = np.array([clip.key.source for clip in cache.clips])[cache.clip_of(flat)]
    times_s = cache.take(flat, "times_s")

    def fill(video: str) -> None:
        (places,) = (videos == video).nonzero()
        height, width = fitting_size(Path(video), cache.provenance, size) if keep_shape else size
        top, left = (size[0] - height) // 2, (size[1] - width) // 2
        inner = frames[:, :, top : top + height, left : left + width]
        inner[places] = read_again(Path(video), times_s[places], (height, width), cache.provenance)

    names = np.unique(videos).tolist()
    for _ in tqdm(map_ahead(fill, names), "reading frames", len(names), unit="video", leave=False):
        pass
    return frames.reshape((*rows.shape, *frames.shape[1:]))
