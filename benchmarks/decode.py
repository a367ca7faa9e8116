r"""Decoding and resizing: CPU time against ffmpeg's own command line, torchcodec and decord, in one run.

  pip install --no-deps torchcodec decord     # if they are to be compared; ffmpeg must be on the path
  python -m benchmarks.decode --rounds 7

Ratios of CPU time (user and system, this process and its children) to `ffmpeg -threads 1 -vf scale=...:flags=bilinear
-pix_fmt rgb24 -f rawvideo`, contestants taking turns, medians of several rounds; above 1 is faster than ffmpeg. Each
decodes on one thread to RGB frames of the size asked for. Clips are made here from `$JEPA_SHARED/clips`. Also the error
of our resized frames against torch's antialiased bilinear filter.
"""

import importlib.util
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

from benchmarks.common import shared, write_results
from benchmarks.reading import read_frames
from data.clock import read_on_clock
from data.video import probe_video
from jepa.config import Bounded, PositiveInt
from pipelines.run.command import require, run_command

CASES = {"960x540 to 224": ((540, 960), 224), "320x180 to 64": ((180, 320), 64)}
FPS, CLIP_SECONDS = 25, 20

Run = Callable[[], int]
"""Decodes, and returns how many frames it gave."""


@dataclass(frozen=True)
class Options(Bounded):
    """Time decoding and resizing against ffmpeg, torchcodec and decord."""

    rounds: PositiveInt = 7
    """Turns of each contestant; the median counts."""
    output_dir: Path = Path("runs/benchmarks/decode")
    """Where results.json is left."""


def main(options: Options) -> None:
    """The story: make the clips, let the contestants take turns, print ratios."""
    require(shutil.which("ffmpeg") is not None, "ffmpeg is not on the path: install it")
    torch.set_num_threads(1)
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (size, target) in CASES.items():
            video = encode(shared("clips/bigbuckbunny.mp4"), Path(folder) / f"{target}.mp4", size)
            error = resize_error(video, target)
            print(f"{name}: error against torch's antialiased bilinear {error:.2f} levels")
            results[f"{name}: resize error in levels"] = {"ours": error}
            for task, every in {"every frame": 1, "every 5th frame": 5}.items():
                ratios = take_turns(make_contestants(video, target, every), options.rounds)
                results[f"{name}: {task}"] = ratios
                print(f"  {task:20}" + "".join(f"{who} {ratio:.2f}   " for who, ratio in ratios.items()))
    write_results(options.output_dir, results)


def encode(source: Path, path: Path, size: tuple[int, int]) -> Path:
    """The source, looped, scaled and given even frames, as H.264 with x264's defaults."""
    height, width = size
    command = ["ffmpeg", "-v", "error", "-stream_loop", "-1", "-i", source, "-t", CLIP_SECONDS, "-an", "-vf",
               f"scale={width}:{height},setpts=N/{FPS}/TB", "-r", FPS, "-pix_fmt", "yuv420p", path]  # fmt: skip
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


def make_contestants(video: Path, target: int, every: int) -> dict[str, Run]:
    """Who gives each frame, or each fifth: we, ffmpeg's command line, torchcodec and decord where installed."""
    size = (target, target)
    until_s = probe_video(video).duration_s - 0.5 / FPS  # a tick after the last frame is not one of every five
    scale = f"scale={target}:{target}:flags=bilinear"
    found: dict[str, Run] = {}
    if every == 1:
        found["ours"] = lambda: sum(1 for _ in read_frames(video, size))
        found["ffmpeg"] = lambda: ffmpeg(video, scale, target)
    else:
        found["ours"] = lambda: sum(1 for _ in read_on_clock(video, size, fps=FPS / every, end_s=until_s))
        chain = f"select='not(mod(n\\,{every}))',{scale}"
        found["ffmpeg"] = lambda: ffmpeg(video, chain, target, "-fps_mode", "passthrough")
    if importlib.util.find_spec("torchcodec"):
        from torchcodec.decoders import VideoDecoder
        from torchvision.transforms.v2 import Resize

        def torchcodec() -> int:
            decoder = VideoDecoder(str(video), num_ffmpeg_threads=1, transforms=[Resize(size)])
            return len(decoder.get_frames_at(list(range(0, decoder.metadata.num_frames, every))).data)

        found["torchcodec"] = torchcodec
    if importlib.util.find_spec("decord"):
        from decord import VideoReader

        def decord() -> int:
            reader = VideoReader(str(video), width=target, height=target, num_threads=1)
            return len(reader.get_batch(list(range(0, len(reader), every))).asnumpy())

        found["decord"] = decord
    return found


def ffmpeg(video: Path, filters: str, target: int, *options: str) -> int:
    """The command line; its pixels go nowhere, but are made."""
    command = ["ffmpeg", "-v", "error", "-threads", "1", "-i", str(video), "-vf", filters, *options,
               "-pix_fmt", "rgb24", "-f", "rawvideo", "-filter_threads", "1", "-"]  # fmt: skip
    piped = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    return len(piped) // (3 * target * target)


def take_turns(contestants: dict[str, Run], rounds: int) -> dict[str, float]:
    """Median CPU time of ffmpeg divided by each contestant's own."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    counts: dict[str, int] = {}
    for _ in range(rounds):
        for name, run in contestants.items():
            before = cpu_seconds()
            counts[name] = run()
            seconds[name].append(cpu_seconds() - before)
    require(len(set(counts.values())) == 1, f"the contestants gave different numbers of frames: {counts}")
    return {name: float(np.median(seconds["ffmpeg"]) / np.median(values)) for name, values in seconds.items()}


def cpu_seconds() -> float:
    """User and system time of this process and of its ended children."""
    usages = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    run_command(main, Options)
