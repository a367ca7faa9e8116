r"""Real video: recorded laps of a driving simulator, trained on three recordings, tested on a fourth.

  python -m benchmarks.driving --seeds 0 1 2
  python -m benchmarks.driving --seeds 0 --test a_00

Needs the recordings (`a_00 b_00 b_01 b_02`, mp4 and csv) in `$JEPA_SHARED/driving`. At 4 fps and by the plain recipe:
encoder and predictor learn from the first four fifths of a_00, b_00 and b_01, the last fifth of each chooses and
calibrates, and b_02 is the test; the forecasts' speed and steering are read off by ridge regression. Whatever is to be
found out goes by the second command, which never reads b_02.
"""

import csv
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import av
import numpy as np

from benchmarks.common import Figures, Recipe, SeedOptions, figures, make_model, measure_seeds, shared
from pipelines.run.command import run_command

RECORDINGS = ("a_00", "b_00", "b_01")
HELD_OUT, GAP_S = 0.2, 2.0
"""Share of each training recording that is validation, and what is left out before it: one context."""
RECIPE = Recipe(
    fps=4,
    encoder={"steps": 1000, "views.light-amplitude": 0, "views.pixel-noise": 0,
             "encoder.image-size": (32, 64), "encoder.embedding-dimension": 128, "encoder.head-widths": 256},
    predictor={"rollout-steps": 20, "steps": 400},
    columns=("speed", "steering"),
)  # fmt: skip
"""The camera moves: there is no static background that changing light would have to make useless."""


@dataclass(frozen=True)
class Options(SeedOptions):
    """Real video, several seeds; the recordings are the same."""

    test: Literal["b_02", "a_00", "b_00"] = "b_02"
    """What is learned from the other recordings is tested on this one; b_02 is only ever the test."""
    output_dir: Path = Path("runs/benchmarks/driving")
    """Where all runs and the results are left."""


def main(options: Options) -> None:
    """The story: cut the recordings, make a model of each seed, compare."""
    recordings, folder = shared("driving"), options.output_dir / options.test
    (folder / "cut").mkdir(parents=True, exist_ok=True)
    names = [name for name in RECORDINGS if name != options.test]
    heads, tails = zip(*(cut_recording(recordings / f"{name}.mp4", folder / "cut") for name in names), strict=True)
    videos = {"train": heads, "val": tails, "test": recordings / f"{options.test}.mp4"}

    def measure(seed: int, folder: Path) -> Figures:
        return figures(make_model(folder, videos, RECIPE, seed), "relative_to_ridge", "probe_r2")

    measure_seeds(replace(options, output_dir=folder), measure)


def cut_recording(path: Path, folder: Path) -> tuple[Path, Path]:
    """The beginning and the end of a recording with their tables, cut at a key frame and not encoded again."""
    parts = folder / f"{path.stem}_head.mp4", folder / f"{path.stem}_tail.mp4"
    if parts[1].with_suffix(".csv").exists():
        return parts
    with av.open(str(path)) as source:
        stream = source.streams.video[0]
        packets = [packet for packet in source.demux(stream) if packet.size]
        times_s = np.array([float(packet.pts * packet.time_base) for packet in packets])
        wanted_s = times_s.min() + (1 - HELD_OUT) * np.ptp(times_s)
        keys = [index for index, packet in enumerate(packets) if packet.is_keyframe]
        begin = min(keys, key=lambda index: abs(times_s[index] - wanted_s))
        end = int(np.argmax(times_s >= times_s[begin] - GAP_S))  # in the order of decoding: all before it is whole
        rows = list(csv.DictReader(path.with_suffix(".csv").read_text().splitlines()))
        for part, chosen in zip(parts, (slice(0, end), slice(begin, None)), strict=True):
            start_s = times_s[chosen].min()
            with av.open(str(part), "w") as target:
                copy = target.add_stream_from_template(stream)
                for packet in packets[chosen]:
                    ticks = round(start_s / packet.time_base)
                    packet.pts, packet.dts, packet.stream = packet.pts - ticks, packet.dts - ticks, copy
                    target.mux(packet)
            shown = np.sort(times_s[chosen])
            own = rows[: len(shown)] if chosen.start == 0 else rows[-len(shown) :]
            with part.with_suffix(".csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0].keys())
                writer.writeheader()
                writer.writerows(row | {"frame": number, "time_s": f"{time_s - start_s:.6f}"}
                                 for number, (row, time_s) in enumerate(zip(own, shown, strict=True)))  # fmt: skip
    return parts


if __name__ == "__main__":
    run_command(main, Options)
