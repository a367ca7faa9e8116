r"""Embedding videos end to end: against decoding alone and the encoder alone.

  python -m benchmarks.embed --rounds 5 --backbone resnet18 --size 112

Wall-clock seconds on the driving clips of `$JEPA_SHARED/driving`, taking turns, medians: of decoding as the command
does it, of embedding frames that are there already, and of the whole with writing. Where decoder and encoder have
hardware of their own (a GPU), the whole can be as fast as the slower of the two; where they share cores, their times
add up. A ratio of 1 is that ideal; in CPU time it shows through other load.
"""

import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from benchmarks.common import shared
from data.cache import ClipKey, Column, Provenance
from data.cache_writer import CacheWriter
from data.content import content_of
from data.parallel import stream_ahead
from data.picture import IMAGE_FPS
from data.video import TRANSFORM
from jepa.config import Bounded, Positive, PositiveInt
from jepa.encoder import EncoderConfig, FrameEncoder, create_encoder
from pipelines.run.command import run_command
from pipelines.run.devices import cores_of_this_process, start_accelerator
from pipelines.run.embed import Task, decode, embed_videos
from pipelines.run.files import write_json


@dataclass(frozen=True)
class Options(Bounded):
    """Time the embedding of videos."""

    rounds: PositiveInt = 5
    """Turns of each contestant; the median counts."""
    backbone: str = "small_conv"
    """Backbone of the encoder."""
    pooling: Literal["flatten", "average", "native"] = "flatten"
    """Pooling of its features, without a head where it is `native`."""
    precision: str = "launched"
    """Precision of the encoder."""
    size: PositiveInt = 64
    """Height and width of the frames in pixels."""
    fps: Positive = 8.0
    """Ticks per second."""
    batch_size: PositiveInt = 64
    """Frames that are embedded together."""
    videos: tuple[Path, ...] = ()
    """Other videos than the driving clips."""
    output_dir: Path = Path("runs/benchmarks/embed")
    """Folder for results.json."""


def main(options: Options) -> None:
    """The story: decode alone, embed alone, do both and write; compare."""
    paths = options.videos or tuple(sorted(shared("driving").glob("*.mp4")))
    accelerator = start_accelerator(options.precision)
    torch.set_num_threads(cores_of_this_process())
    config = EncoderConfig(
        backbone=options.backbone, image_size=(options.size, options.size), pooling=options.pooling,
        embedding_dimension=0 if options.pooling == "native" else 64,
    )  # fmt: skip
    encoder = create_encoder(config)
    encoder = encoder.to(accelerator.device).eval()

    frames = [batch.to(accelerator.device) for batch in decode_all(paths, encoder, options)]
    contestants: dict[str, Callable[[], object]] = {
        "decode": lambda: decode_all(paths, encoder, options),
        "encode": lambda: embed_all(accelerator, encoder, frames),
        "both": lambda: embed_and_write(accelerator, encoder, paths, options),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for _ in range(options.rounds):
        for name, work in contestants.items():
            before = time.monotonic(), time.process_time()
            work()
            seconds[name].append((time.monotonic() - before[0], time.process_time() - before[1]))
    (decode_s, encode_s, both_s), (decode_cpu_s, encode_cpu_s, both_cpu_s) = (
        [float(np.median([turn[clock] for turn in turns])) for turns in seconds.values()] for clock in range(2)
    )
    count = sum(map(len, frames))
    results = {
        "decode: frames per second": count / decode_s,
        "encode: frames per second": count / encode_s,
        "both: frames per second": count / both_s,
        "of the slower of decoder and encoder alone": max(decode_s, encode_s) / both_s,
        "of both, one after the other (shared cores)": (decode_s + encode_s) / both_s,
        "threads that decode": cores_of_this_process(),
        "the same in CPU time": (decode_cpu_s + encode_cpu_s) / both_cpu_s,
    }
    print(f"{options.backbone}, {options.size}x{options.size}, {count:,} frames, on {accelerator.device.type}")
    for name, value in results.items():
        print(f"  {name:50} {value:.3g}")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(options.output_dir / "results.json", results)


def new_tasks(paths: tuple[Path, ...]) -> list[Task]:
    """Every video on one clock."""
    return [Task(path, [ClipKey(str(path), content_of(path), 0.0)]) for path in paths]


def decode_all(paths: tuple[Path, ...], encoder: FrameEncoder, options: Options) -> list[Tensor]:
    """All frames in batches uint8 (n, 1, 3, H, W), decoded by as many threads as the command takes."""

    def decode_one(task: Task) -> list[Tensor]:
        chunks = decode(
            task, encoder=encoder, fps=options.fps, image_fps=IMAGE_FPS, chunk_size=options.batch_size, strict=False
        )
        return [torch.from_numpy(np.stack(windows)) for _, windows, _ in chunks if windows]

    return list(stream_ahead(decode_one, new_tasks(paths), workers=cores_of_this_process()))


def embed_all(accelerator: Accelerator, encoder: FrameEncoder, batches: list[Tensor]) -> None:
    """Frames that are on the device already, a batch on each core."""
    is_gpu = accelerator.device.type == "cuda"

    def embed(batch: Tensor) -> Tensor:
        with accelerator.autocast():
            return encoder.embed(batch).cpu()

    workers = 1 if is_gpu else cores_of_this_process()
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(embed, batches))


def embed_and_write(accelerator: Accelerator, encoder: FrameEncoder, paths: tuple[Path, ...], options: Options) -> None:
    """Decode, embed and write into a new cache."""
    provenance = Provenance(
        encoder="benchmark", encoder_fingerprint="benchmark", fps=options.fps, image_fps=IMAGE_FPS,
        image_size=encoder.image_size, window=1, transform=TRANSFORM, precision="fp32",
        columns={"embeddings": Column("float16", encoder.shape)}, versions={},
    )  # fmt: skip
    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(disable=True) as bar,
        CacheWriter(Path(folder) / "cache", provenance) as writer,
    ):
        for task in embed_videos(
            accelerator, encoder, new_tasks(paths), fps=options.fps, image_fps=IMAGE_FPS,
            batch_size=options.batch_size, strict=False, bar=bar,
        ):  # fmt: skip
            for clip in task.clips():
                writer.add(clip)


if __name__ == "__main__":
    run_command(main, Options)
