"""What a page shows, as a recording for the viewer Rerun."""

import base64
from pathlib import Path
from typing import Any


def write_recording(rerun: Any, path: Path, page: dict[str, Any]) -> None:
    """Films of surprise, with energy and percentile, and of what was imagined, all on a timeline of seconds."""
    with rerun.RecordingStream("video-jepa") as stream:
        stream.save(path)
        for video in (video for part in page["surprises"] for video in part["videos"]):
            entity, moments = rerun.new_entity_path(["surprise", video["name"]]), video["moments"]
            log_film(rerun, f"{entity}/film", video["film"])
            for name in ("energy", "percentile"):
                seconds = rerun.TimeColumn("time", duration=moments["time_s"])
                rerun.send_columns(f"{entity}/{name}", [seconds], rerun.Scalars.columns(scalars=moments[name]))
        for number, film in enumerate(film for part in page["dreams"] for film in part["films"]):
            entity = rerun.new_entity_path(["imagined", f"{number}: {film['video']}"])
            log_film(rerun, entity, film["data"])


def log_film(rerun: Any, entity: str, encoded: str) -> None:
    """A film, in base64, and which of its frames is to be seen when; nothing where it is empty."""
    if encoded:
        film = rerun.AssetVideo(contents=base64.b64decode(encoded), media_type="video/mp4")
        times_ns = film.read_frame_timestamps_nanos()
        rerun.log(entity, film, static=True)
        seconds = rerun.TimeColumn("time", duration=1e-9 * times_ns)
        rerun.send_columns(entity, [seconds], rerun.VideoFrameReference.columns_nanos(times_ns))
