r"""Flip bytes of videos and cut them off: nothing may hang, crash, or be lost without a word.

  python -m benchmarks.fuzz_videos --mutations 200

Copies of the clips in a folder, and of one of them in further containers, are mutated at random, with a fixed seed, and
read in every way that the commands read: all frames counted, on two clocks, in random clips. Each is read in a child
process under a time limit, so that a hang or a crash costs one file. Faults, any of which makes the exit status 1:

- hang: the child did not end in time;
- crash: the child died of a signal;
- traceback: anything but a `VideoError` or the system's own `OSError`;
- silent skip: fewer frames than in the unharmed clip, or clips of other times than reading in order gives, and neither
  damage nor a gap was reported.

A changed picture among the right number of frames is no fault: most codecs have no checksum, and no decoder can see it.
Nor is a stream that was cut off and says nowhere how long it is.
"""

import multiprocessing
import shutil
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import av
import numpy as np
from tqdm import tqdm

from benchmarks.reading import read_clips, read_frames
from data.clock import read_on_clock
from data.counting import count_frames
from data.decoder import Damage
from data.errors import VideoError
from jepa.config import Bounded, Positive, PositiveInt
from pipelines.run.command import require, run_command
from pipelines.run.files import write_json

SIZE = (16, 24)
CLIPS = 4
CLIP_FRAMES = 16
TRUNCATED = 0.25
"""Share of the mutations that cut the end off; the others flip bytes."""
CONTAINERS = {
    "a.mxf": "mpeg2video", "a.asf": "wmv2", "a.flv": "flv", "a.ogg": "libvpx", "a.ts": "libx264", "a.mpg": "mpeg2video",
    "fragmented.mp4": "libx264", "a.h264": "libx264", "a.avi": "mpeg4", "a.mov": "mjpeg",
}  # fmt: skip
"""Codecs of the clips that are made, by name."""
ENDLESS = (".ts", ".mpg", ".h264", ".ogg")
"""Streams that do not say how long they are."""
FAULTS = ("hang", "crash", "traceback", "silent skip", "too much")


@dataclass(frozen=True)
class FuzzOptions(Bounded):
    """What all fuzzing is asked."""

    mutations: PositiveInt = 200
    """How many files to make and read."""
    limit_s: Positive = 60.0
    """A file that takes longer hangs."""
    seed: int = 0
    """Of the mutations."""
    output_dir: Path = Path("runs/benchmarks/fuzz")
    """Where results.json is left, and the files with faults."""


@dataclass(frozen=True)
class Options(FuzzOptions):
    """Read mutated videos, and count what goes wrong."""

    videos: Path = Path("../shared/clips")
    """The folder of clips that are mutated."""
    largest_bytes: PositiveInt = 10**9
    """Larger clips are left out."""


@dataclass(frozen=True)
class Outcome:
    """What reading something came to."""

    verdict: str
    """One of `FAULTS`, or "refused", "reported" or "nothing seen"."""
    detail: str
    frames: int = 0


def main(options: Options) -> None:
    """The story: mutate a clip, read it in a child, judge what came of it; again and again."""
    require(options.videos.is_dir(), f"{options.videos}: no clips to mutate here; name their folder with --videos")
    clips = [path for path in sorted(options.videos.iterdir()) if path.stat().st_size <= options.largest_bytes]
    require(bool(clips), f"{options.videos}: no clip of at most {options.largest_bytes} bytes")

    def harm(folder: Path, generator: np.random.Generator) -> tuple[str, Path, int]:
        clip = clips[generator.integers(len(clips))]
        content, what = mutate(clip.read_bytes(), generator)
        (folder / clip.name).write_bytes(content)
        is_cut = len(content) < clip.stat().st_size and clip.suffix in ENDLESS
        return what, folder / clip.name, 0 if is_cut else whole[clip]

    with tempfile.TemporaryDirectory() as made:
        clips += [encode(clips[0], Path(made) / name, codec) for name, codec in CONTAINERS.items()]
        whole = {clip: count_frames(clip).frames or 0 for clip in clips}
        fuzz(options, harm, read_in_every_way)


def fuzz(
    options: FuzzOptions,
    harm: Callable[[Path, np.random.Generator], tuple[Any, ...]],
    read: Callable[..., Outcome],
) -> None:
    """Harm something in an empty folder, read it in a child, judge what came of it; again and again.

    `harm` says what it did, and gives the arguments for `read`. Raises `UserError` if there were faults.
    """
    options.output_dir.mkdir(parents=True, exist_ok=True)
    results = []
    with tempfile.TemporaryDirectory() as folder, Child(read, options.limit_s) as child:
        for number in tqdm(range(options.mutations), unit="file", desc="fuzzing"):
            harmed = Path(folder) / f"{number:05d}"
            harmed.mkdir()
            what, *arguments = harm(harmed, np.random.default_rng([options.seed, number]))
            outcome = child(*arguments)
            results.append({"file": number, "mutation": what, **vars(outcome)})
            if outcome.verdict in FAULTS:
                shutil.copytree(harmed, options.output_dir / harmed.name, dirs_exist_ok=True)
                tqdm.write(f"{outcome.verdict}: {number} ({what}): {outcome.detail}")
            shutil.rmtree(harmed)
    counts = Counter(result["verdict"] for result in results)
    write_json(options.output_dir / "results.json", {"counts": counts, "files": results})
    print("; ".join(f"{verdict}: {number}" for verdict, number in sorted(counts.items())))
    faults = sum(counts[fault] for fault in FAULTS)
    require(faults == 0, f"{faults} of {options.mutations} files were not read as they should be: {options.output_dir}")


def encode(source: Path, path: Path, codec: str) -> Path:
    """The first frames of a clip, in another container."""
    options = {"movflags": "frag_keyframe+empty_moov"} if path.suffix == ".mp4" else {}
    with av.open(str(source)) as whole, av.open(str(path), "w", options=options) as target:
        stream = target.add_stream(codec, rate=25, options={"g": "12"})
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for index, frame in enumerate(islice(whole.decode(video=0), 60)):
            picture = frame.reformat(160, 96, stream.pix_fmt)
            picture.pts, picture.time_base = index, Fraction(1, 25)
            target.mux(stream.encode(picture))
        target.mux(stream.encode())
    return path


def mutate(content: bytes, generator: np.random.Generator) -> tuple[bytes, str]:
    """Another file, and what was done to it."""
    if generator.random() < TRUNCATED:
        length = int(generator.integers(1, len(content)))
        return content[:length], f"cut off after {length} of {len(content)} bytes"
    flips = int(10 ** generator.uniform(0, 2))
    flipped = np.frombuffer(content, np.uint8).copy()
    flipped[generator.integers(len(content), size=flips)] ^= generator.integers(1, 256, flips, dtype=np.uint8)
    return flipped.tobytes(), f"{flips} bytes flipped"


def read_in_every_way(path: Path, frames_before: int) -> Outcome:
    """What the commands would see of a file that had `frames_before` frames before it was harmed."""
    try:
        info = count_frames(path)
        damage, clip_damage = Damage(), Damage()
        times_s = [time_s for _, time_s in read_frames(path, SIZE, damage=damage)]
        for _ in read_on_clock(path, SIZE, fps=10.0, offsets_s=(0.0, 0.05), damage=Damage()):
            pass
        starts_s = np.random.default_rng(0).uniform(0, info.duration_s, CLIPS)
        clips = read_clips(path, SIZE, starts_s, length=CLIP_FRAMES, damage=clip_damage)
    except (VideoError, OSError) as error:  # a damaged header may ask for more memory than there is
        return Outcome("refused", str(error))
    except Exception:
        return Outcome("traceback", traceback.format_exc())
    frames = info.frames or 0
    reports = [info.damage, str(damage), str(clip_damage), f"{len(info.gaps_s)} gaps" if info.gaps_s else ""]
    if any(reports):
        return Outcome("reported", "; ".join(dict.fromkeys(filter(None, reports))), frames)
    if frames < frames_before:
        return Outcome("silent skip", f"{frames} of {frames_before} frames", frames)
    for start_s, (_, shown_s) in zip(starts_s, clips, strict=True):
        expected_s = [time_s for time_s in times_s if time_s >= start_s][:CLIP_FRAMES]
        if expected_s != shown_s.tolist():
            return Outcome("silent skip", f"the clip at {start_s:.3f} s is not what reading in order gives", frames)
    return Outcome("nothing seen", "", frames)


def serve(connection: Connection, read: Callable[..., Outcome]) -> None:
    """A child: read what is asked for until the other end is closed."""
    while True:
        try:
            connection.send(read(*connection.recv()))
        except EOFError:
            return


class Child:
    """A process that reads files, and is replaced when it hangs or dies."""

    def __init__(self, read: Callable[..., Outcome], limit_s: float) -> None:
        self.read, self.limit_s = read, limit_s

    def __enter__(self) -> Self:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, self.read), daemon=True)
        self.process.start()
        theirs.close()
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()

    def __call__(self, *arguments: Any) -> Outcome:
        try:
            self.connection.send(arguments)
            if self.connection.poll(self.limit_s):
                return self.connection.recv()
            outcome = Outcome("hang", f"not done after {self.limit_s:g} s")
        except (EOFError, ConnectionError):
            self.process.join()
            outcome = Outcome("crash", f"exit status {self.process.exitcode}")
        self.__exit__()
        self.__enter__()
        return outcome


if __name__ == "__main__":
    run_command(main, Options)
