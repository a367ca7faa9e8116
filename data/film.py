"""Small films of long videos, for pages: each frame is shown at its own time."""

import math
from collections.abc import Sequence
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import av

from data.clock import read_on_clock
from data.decoder import Damage
from data.picture import IMAGE_FPS
from data.video import probe_video

TICKS_PER_SECOND = 10_000
"""Finer than containers and tables round times, coarse enough for days in a track's 32 bits."""
CODEC = {"crf": "33", "preset": "veryfast", "bf": "0", "g": "25"}
"""Without frames that are shown later than they are stored, so that times begin at 0; a keyframe is never far."""


def make_film(
    path: Path, *, fps: float, offsets_s: Sequence[float], spans_s: Sequence[tuple[float, float]] = ((0.0, math.inf),),
    image_fps: float = IMAGE_FPS, longest_side: int = 320,
) -> bytes:  # fmt: skip
    """An MP4 of the frames on clocks, as `read_on_clock` reads them, within spans; between these the picture stands.

    The first frame is always there, so that times begin at 0. What is damaged is left out. Raises `VideoError`.
    """
    info = probe_video(path, image_fps)
    scale = min(1, longest_side / max(info.height, info.width))
    height, width = (max(16, round(side * scale / 2) * 2) for side in (info.height, info.width))  # chroma takes pairs
    film, last = BytesIO(), -1
    with av.open(film, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000), options=CODEC)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = Fraction(1, TICKS_PER_SECOND)
        for start_s, end_s in sorted({(0.0, 1 / fps), *spans_s}):
            for timed in read_on_clock(
                path, (height, width), fps=fps, offsets_s=offsets_s, start_s=start_s, end_s=end_s, damage=Damage(),
                image_fps=image_fps,
            ):  # fmt: skip
                pts = round(timed.time_s * TICKS_PER_SECOND)
                if pts > last:  # spans overlap, and clocks share frames
                    frame = av.VideoFrame.from_ndarray(timed.frame.transpose(1, 2, 0).copy(), format="rgb24")
                    frame.pts, frame.time_base, last = pts, stream.codec_context.time_base, pts
                    container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return film.getvalue()
