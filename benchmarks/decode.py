r"""Decoding and resizing: CPU time against ffmpeg's own command line, torchcodec and decord, in one run.

  pip install --no-deps torchcodec decord     # if they are to be compared; ffmpeg must be on the path
  python -m benchmarks.decode --rounds 7

Ratios of CPU time (user and system, this process and its children) to `ffmpeg -threads 1 -vf scale=...:flags=bilinear
-pix_fmt rgb24 -f rawvideo`, contestants taking turns, medians of several rounds; above 1 is faster than ffmpeg. Each
decodes on one thread to RGB frames of the size asked for. Clips are made here from `$JEPA_SHARED/clips` (default
`../shared/clips`). Also the error of our resized frames against torch's antialiased bilinear filter.
"""

import importlib.util
import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as functional
from av.video.reformatter import Interpolation, VideoReformatter
from einops import rearrange

from benchmarks.reading import read_clips, read_frames
from data.clock import read_on_clock
from data.video import probe_video
from pipelines.run.command import require, run_command
from pipelines.run.files import write_json

ROOT = Path(__file__).parent.parent
CASES = {"960x540 to 224": ((540, 960), 224), "320x180 to 64": ((180, 320), 64)}
CLIP_FRAMES = 16
CLIPS = 20
CLIP_SECONDS = 20

Run = Callable[[], int]
"""Decodes, and returns how many frames it gave."""


@dataclass(frozen=True)
class Options:
    """Time decoding and resizing against ffmpeg, torchcodec and decord."""

    rounds: int = 7
    """Turns of each contestant; the median counts."""
    output_dir: Path = Path("runs/benchmarks/decode")
    """Where results.json is left."""
    seed: int = 0
    """Of the random clips."""


def main(options: Options) -> None:
    """The story: make the clips, let the contestants take turns, print ratios."""
    require(options.rounds > 0, f"--rounds is {options.rounds}: it must be positive")
    require(shutil.which("ffmpeg") is not None, "ffmpeg is not on the path: install it")
    torch.set_num_threads(1)
    source = Path(os.environ.get("JEPA_SHARED", ROOT.parent / "shared")) / "clips" / "bigbuckbunny.mp4"
    require(source.exists(), f"{source}: the clip to measure on is not there; set JEPA_SHARED")
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (size, target) in CASES.items():
            video = encode(source, Path(folder) / f"{target}.mp4", size)
            error = resize_error(video, target)
            print(f"{name}: error against torch's antialiased bilinear {error:.2f} levels")
            results[f"{name}: resize error in levels"] = {"ours": error}
            starts_s = random_starts(video, options.seed)
            for task, contestants in {
                "every frame": every_frame(video, target),
                "every 5th frame": every_5th_frame(video, target),
                f"{CLIPS} random clips of {CLIP_FRAMES}": random_clips(video, target, starts_s),
            }.items():
                ratios = take_turns(contestants, options.rounds)
                results[f"{name}: {task}"] = ratios
                print(f"  {task:28}" + "".join(f"{who} {ratio:.2f}   " for who, ratio in ratios.items()), flush=True)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(options.output_dir / "results.json", results)


def encode(source: Path, path: Path, size: tuple[int, int]) -> Path:
    """The source, looped, scaled and given 25 even frames per second, as H.264 with x264's defaults."""
    height, width = size
    command = ["ffmpeg", "-v", "error", "-stream_loop", "-1", "-i", source, "-t", CLIP_SECONDS, "-an", "-vf",
               f"scale={width}:{height},setpts=N/25/TB", "-r", 25, "-pix_fmt", "yuv420p", path]  # fmt: skip
    subprocess.run(list(map(str, command)), check=True)
    return path


def resize_error(video: Path, target: int) -> float:
    """Mean absolute difference in 8-bit levels to full-size RGB resized by torch with antialiasing.

    The reference is converted with swscale's exact arithmetic: its usual short cut without resizing is 1.1 levels too
    bright.
    """
    exact = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
    differences = []
    with av.open(str(video)) as container:
        both = zip(container.decode(video=0), read_frames(video, (target, target)), strict=True)
        for index, (raw, (ours, _)) in enumerate(both):
            if index % 50 == 0:
                full = VideoReformatter().reformat(raw, format="rgb24", interpolation=exact).to_ndarray()
                pixels = rearrange(torch.from_numpy(full), "h w c -> 1 c h w").float()
                reference = functional.interpolate(pixels, (target, target), mode="bilinear", antialias=True)
                differences.append(float((reference[0] - torch.from_numpy(ours)).abs().mean()))
    return float(np.mean(differences))


def frame_rate(video: Path) -> float:
    """Frames per second by the frames' own times; headers round."""
    times_s = [time_s for _, time_s in read_frames(video, (8, 8))]
    return (len(times_s) - 1) / (times_s[-1] - times_s[0])


def random_starts(video: Path, seed: int) -> list[float]:
    """Seconds at which random clips begin, each on a frame."""
    times_s = [time_s for _, time_s in read_frames(video, (8, 8))]
    chosen = np.random.default_rng(seed).integers(0, len(times_s) - CLIP_FRAMES, CLIPS)
    return [times_s[index] for index in chosen]


def every_frame(video: Path, target: int) -> dict[str, Run]:
    """All frames in order."""
    return {
        "ours": lambda: sum(1 for _ in read_frames(video, (target, target))),
        "ffmpeg": lambda: ffmpeg(video, f"scale={target}:{target}:flags=bilinear", target),
        **rivals(video, target, lambda count, fps: list(range(count))),
    }


def every_5th_frame(video: Path, target: int) -> dict[str, Run]:
    """Exactly every fifth frame."""
    fps = frame_rate(video)
    until_s = probe_video(video).duration_s - 0.5 / fps  # a tick after the last frame is not one of every five
    chain = f"select='not(mod(n\\,5))',scale={target}:{target}:flags=bilinear"
    return {
        "ours": lambda: sum(1 for _ in read_on_clock(video, (target, target), fps=fps / 5, end_s=until_s)),
        "ffmpeg": lambda: ffmpeg(video, chain, target, "-fps_mode", "passthrough"),
        **rivals(video, target, lambda count, fps: list(range(0, count, 5))),
    }


def random_clips(video: Path, target: int, starts_s: list[float]) -> dict[str, Run]:
    """Clips of consecutive frames from random places, all in one call."""

    def ours() -> int:
        return sum(len(frames) for frames, _ in read_clips(video, (target, target), starts_s, length=CLIP_FRAMES))

    def clips(count: int, fps: float) -> list[int]:
        return [round(start_s * fps) + at for start_s in starts_s for at in range(CLIP_FRAMES)]

    return {"ours": ours, **rivals(video, target, clips)}


def ffmpeg(video: Path, filters: str, target: int, *options: str) -> int:
    """The command line; its pixels go nowhere, but are made."""
    command = ["ffmpeg", "-v", "error", "-threads", "1", "-i", str(video), "-vf", filters, *options,
               "-pix_fmt", "rgb24", "-f", "rawvideo", "-filter_threads", "1", "-"]  # fmt: skip
    piped = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    return len(piped) // (3 * target * target)


def rivals(video: Path, target: int, choose: Callable[[int, float], list[int]]) -> dict[str, Run]:
    """Those of torchcodec and decord that are installed; `choose` says which frames, by number."""
    found: dict[str, Run] = {}
    if importlib.util.find_spec("torchcodec"):
        from torchcodec.decoders import VideoDecoder
        from torchvision.transforms.v2 import Resize

        def torchcodec() -> int:
            decoder = VideoDecoder(str(video), num_ffmpeg_threads=1, transforms=[Resize((target, target))])
            metadata = decoder.metadata
            return len(decoder.get_frames_at(choose(metadata.num_frames, metadata.average_fps)).data)

        found["torchcodec"] = torchcodec
    if importlib.util.find_spec("decord"):
        from decord import VideoReader

        def decord() -> int:
            reader = VideoReader(str(video), width=target, height=target, num_threads=1)
            return len(reader.get_batch(choose(len(reader), reader.get_avg_fps())).asnumpy())

        found["decord"] = decord
    return found


def take_turns(contestants: dict[str, Run], rounds: int) -> dict[str, float]:
    """Median CPU time of the reference (ffmpeg, or else the fastest rival) divided by each contestant's own."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    counts: dict[str, int] = {}
    for _ in range(rounds):
        for name, run in contestants.items():
            before = cpu_seconds()
            counts[name] = run()
            seconds[name].append(cpu_seconds() - before)
    require(len(set(counts.values())) == 1, f"the contestants gave different numbers of frames: {counts}")
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    others = [value for name, value in medians.items() if name != "ours"] or [medians["ours"]]
    reference = medians.get("ffmpeg", min(others))
    return {name: reference / value for name, value in medians.items()}


def cpu_seconds() -> float:
    """User and system time of this process and of its ended children."""
    usages = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    run_command(main, Options)
