r"""Is what happens now as expected? Surprise while a video is being recorded.

  video-jepa surprise --cache cache/today --normal cache/other_nights --alarms-per-hour 1 --output-dir runs/surprise
  video-jepa watch rtsp://camera/stream --surprise runs/surprise | jq --unbuffered -c 'select(.alarm)'

SOURCE is a file, which may still grow, a camera of Linux such as /dev/video0, or an address that FFmpeg opens (rtsp,
http, ...). It is watched as the finished run of `surprise` scored: by its predictor, horizons and clocks, without its
ignored region, and with its threshold if it had ordinary videos. Of each moment there is a line of JSON as soon as the
frames of its horizons have come, with what `surprise.csv` says; `alarm`, which is null or the event that is going on,
the last line of which is as in `events.csv`; and `latency_s`, the seconds since the moment's frame was decoded.
"""

import json
import math
import signal
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import tee
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import numpy as np
import torch
import tyro
from accelerate import Accelerator

from data.errors import printable
from data.live import watch_on_clock, without_password
from jepa.alarms import Moment, follow_events
from jepa.config import Bounded, Positive
from jepa.encoder import Encoder
from jepa.sequence import Sequence
from pipelines.run.command import Interrupted, counted, require, run_command
from pipelines.run.devices import start_accelerator
from pipelines.run.embed import embed_frames, windows_of
from pipelines.run.encoders import load_encoder
from pipelines.run.files import read_json, reading
from pipelines.run.folder import read_mark
from pipelines.run.models import load_predictor
from pipelines.run.scoring import BOX, DIGITS, PLACE, SPAN, Scorer, box_of, ignored_places

AHEAD = 8  # ticks that are decoded ahead at most
Item = TypeVar("Item")


@dataclass(frozen=True)
class Options(Bounded):
    """Score a video while it is being recorded."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A file, a camera, or an address."""
    surprise: Path = Path("runs/surprise")
    """Finished run of surprise that says by what to watch."""
    encoder: Path | None = None
    """Folder of the encoder, where it is elsewhere by now."""
    give_up_after: Positive = 30.0
    """Seconds that are waited for a file to grow, or for a stream to come back."""


class Watch(NamedTuple):
    """What a run of surprise scored by; `dtype` is that of stored embeddings, whose rounding is in its scores."""

    accelerator: Accelerator
    encoder: Encoder
    scorer: Scorer
    threshold: float
    offsets_s: list[float]
    dtype: torch.dtype


class Scored(NamedTuple):
    """A moment, scored; `places` are energies of places (*tokens), its frame was decoded at `seen_s` of our clock."""

    time_s: float
    energy: float
    percentile: float
    change_cosine: float
    places: np.ndarray
    seen_s: float


def main(options: Options) -> None:
    """Say of each moment how surprising it is, until nothing comes any more."""
    with reading(f"--surprise {options.surprise}"):
        watch = load_watch(options)
    moments, alarms, time_s, begin_s, interrupted = 0, 0, 0.0, math.nan, False
    try:
        for line in lines(score(options, watch), watch.threshold):
            print(json.dumps(line), flush=True)
            moments, time_s = moments + 1, line["time_s"]
            if line["alarm"] and line["alarm"]["begin_s"] != begin_s:
                alarms, begin_s = alarms + 1, line["alarm"]["begin_s"]
    except KeyboardInterrupt:
        interrupted = True
    said = f"{counted(moments, 'moment')} scored, the last at {time_s:.2f} s; {counted(alarms, 'alarm')}"
    said = f"{printable(without_password(options.source))}: {said}"
    if interrupted:
        raise Interrupted(said, signal.SIGINT)
    print(said, file=sys.stderr)


def load_watch(options: Options) -> Watch:
    """What the run scored by, on its device. Raises `UserError` where it is not there any more."""
    folder, record = options.surprise, read_mark(options.surprise)
    is_ours = record.get("command") == "score_surprise" and record["finished"] and "offsets_s" in record["inputs"]
    require(is_ours, f"--surprise {folder}: there is no finished run of surprise here, of this version")
    given, inputs, provenance = record["options"], record["inputs"], record["inputs"]["provenance"]
    accelerator = start_accelerator(provenance["precision"])
    predictor, calibration = load_predictor(Path(given["predictor"]), accelerator.device)
    require(not predictor.actions, f"{given['predictor']} takes actions, and what is watched comes without a table")
    now = read_json(Path(given["predictor"]) / "calibration" / "config.json")["config"]
    require(now == inputs["calibration"], f"{folder} was scored by another calibration than {given['predictor']} has")
    ignored = ignored_places(Path(given["ignore_region"]), predictor) if given["ignore_region"] else None
    name = options.encoder or Path(provenance["encoder"])
    require(name.is_dir(), f"there is no encoder {name}, by which {folder} was embedded: give its folder as --encoder")
    encoder = load_encoder(name).to(accelerator.device)
    found, wanted = encoder.fingerprint, predictor.encoder_fingerprint
    require(found == wanted, f"{name} is encoder {found}, and the predictor's is {wanted}: give that one as --encoder")
    threshold = read_json(folder / "metrics.json")["threshold"]
    return Watch(
        accelerator, encoder,
        Scorer(predictor, calibration, tuple(map(int, given["horizons"])), ignored, float(given["smoothing"])),
        threshold=math.inf if threshold is None else float(threshold), offsets_s=[*map(float, inputs["offsets_s"])],
        dtype={"float16": torch.float16, "float32": torch.float32}[provenance["columns"]["embeddings"]["dtype"]],
    )  # fmt: skip


def score(options: Options, watch: Watch) -> Iterator[Scored]:
    """Moments of the source, as soon as the frames of their horizons have come."""
    accelerator, encoder, scorer, _, offsets_s, dtype = watch
    frames = watch_on_clock(
        options.source, encoder.image_size, fps=scorer.predictor.fps, offsets_s=offsets_s,
        patience_s=options.give_up_after, say=lambda said: print(printable(said), file=sys.stderr),
    )  # fmt: skip
    timed = ((*one, time.monotonic()) for one in windows_of(frames, encoder.window, clocks=len(offsets_s)))
    pasts: list[deque[Any]] = [deque(maxlen=scorer.length) for _ in offsets_s]
    recent = deque[tuple[float, float]]()
    for (_, time_s, tick, clock), window, seen_s in run_ahead(timed, AHEAD):
        past = pasts[clock]
        if past and past[-1][0] != tick - 1:
            past.clear()
        embedded = embed_frames(accelerator, encoder, torch.from_numpy(np.stack(window))[None])
        past.append((tick, time_s, seen_s, embedded.to(dtype).float()))
        if len(past) == scorer.length:
            embeddings = torch.stack([one[3] for one in past], dim=1).to(accelerator.device)
            windows = Sequence.on_clock(embeddings, scorer.predictor.fps)
            energy, cosine, places = (part[0].cpu() for part in scorer(windows))
            percentile = float(scorer.ordinary.percentile(energy))
            _, time_s, seen_s, _ = past[scorer.moment]
            recent.append((time_s, float(energy)))
            while len(recent) > 1 and recent[0][0] < time_s - scorer.smoothing_s + 1e-3:
                recent.popleft()
            mean = sum(one for _, one in recent) / len(recent)
            yield Scored(time_s, mean, percentile, float(cosine), places=places.numpy(), seen_s=seen_s)


def run_ahead(items: Iterable[Item], at_most: int) -> Iterator[Item]:
    """Items in order, found by a thread that is so many ahead at most; Ctrl-C does not wait for it."""
    pool, stream, end = ThreadPoolExecutor(1), iter(items), object()
    found = deque(pool.submit(next, stream, end) for _ in range(at_most))
    try:
        while (item := found.popleft().result()) is not end:
            found.append(pool.submit(next, stream, end))
            yield item  # type: ignore[misc]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def lines(moments: Iterable[Scored], threshold: float) -> Iterator[dict[str, Any]]:
    """What is said of each moment."""
    moments, followed = tee(moments)
    stretches = follow_events((Moment(one.energy, one.time_s, at) for at, one in enumerate(followed)), threshold)
    seen = loudest = np.zeros(())
    for at, (moment, stretch) in enumerate(zip(moments, stretches, strict=True)):
        cell, alarm = np.unravel_index(moment.places.argmax(), moment.places.shape), None
        if stretch:
            seen = moment.places if stretch.first.place == at else np.maximum(seen, moment.places)
            loudest = seen if stretch.last.place == at else loudest
            if stretch.peak.energy >= threshold:
                times = [round(one.time_s, 3) for one in stretch]
                box = box_of(loudest) if cell else ()
                alarm = dict(zip((*SPAN, *BOX), (*times, round(stretch.peak.energy, 4), *box), strict=False))
        yield {
            **{name: round(getattr(moment, name), digits) for name, digits in DIGITS.items()},
            **dict(zip(PLACE, map(int, cell), strict=False)),
            "alarm": alarm, "latency_s": round(time.monotonic() - moment.seen_s, 3),
        }  # fmt: skip


if __name__ == "__main__":
    run_command(main, Options)
