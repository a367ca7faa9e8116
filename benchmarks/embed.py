r"""Embedding videos end to end: against decoding alone and the encoder alone.

  python benchmarks/embed.py --rounds 5 --backbone resnet18 --size 112

Wall-clock seconds on the driving clips of `$JEPA_SHARED/driving` (default `../shared/driving`), taking turns, medians:
of decoding as the stage does it, of embedding frames that are there already, and of the whole stage with writing. Where
decoder and encoder have hardware of their own (a GPU), the whole can be as fast as the slower of the two; where they
share cores, their times add up. A ratio of 1 is that ideal; in CPU time it shows through other load.
"""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import joblib
import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from data.embedding_cache import CacheWriter, ClipKey, Provenance
from data.manifest import file_state
from data.map_ahead import stream_ahead
from data.video import IMAGE_FPS, TRANSFORM
from jepa.encoder import SMALL_CONV, EncoderConfig, FrameEncoder, create_encoder
from pipelines.compute import start_accelerator
from pipelines.embed_videos import Chunk, Task, decode, embed, embed_videos
from pipelines.stage import require, run_stage, write_json

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Options:
    """Time the embedding of videos."""

    rounds: int = 5
    """Turns of each contestant; the median counts."""
    backbone: str = SMALL_CONV
    """Of the encoder."""
    size: int = 64
    """Height and width of the frames in pixels."""
    fps: float = 8.0
    """Ticks per second."""
    batch_size: int = 64
    """Frames that are embedded together."""
    videos: tuple[Path, ...] = ()
    """Other videos than the driving clips."""
    output_dir: Path = Path("runs/benchmarks/embed")
    """Where results.json is left."""


def main(options: Options) -> None:
    """The story: decode alone, embed alone, do both and write; compare."""
    require(options.rounds > 0, f"--rounds is {options.rounds}: it must be positive")
    folder = Path(os.environ.get("JEPA_SHARED", ROOT.parent / "shared")) / "driving"
    paths = options.videos or tuple(sorted(folder.glob("*.mp4")))
    require(bool(paths), f"{folder}: the clips to measure on are not there; set JEPA_SHARED")
    accelerator = start_accelerator()
    torch.set_num_threads(joblib.cpu_count())
    encoder = create_encoder(EncoderConfig(backbone=options.backbone, image_size=(options.size, options.size)))
    encoder = encoder.to(accelerator.device).eval()

    seconds: dict[str, list[tuple[float, float]]] = {"decode": [], "encode": [], "both": []}
    chunks = list(decode_all(paths, options))
    frames = sum(len(chunk.frames) for chunk in chunks)
    for _ in range(options.rounds):
        seconds["decode"].append(timed(lambda: list(decode_all(paths, options))))
        seconds["encode"].append(timed(lambda: embed_chunks(accelerator, encoder, chunks, options)))
        seconds["both"].append(timed(lambda: whole_stage(accelerator, encoder, paths, options)))
    medians, cpu = (
        {name: float(np.median([value[which] for value in values])) for name, values in seconds.items()}
        for which in range(2)
    )
    results = {f"{name}: frames per second": frames / value for name, value in medians.items()}
    apart, together = max(medians["decode"], medians["encode"]), medians["decode"] + medians["encode"]
    results["of the slower of decoder and encoder alone"] = apart / medians["both"]
    results["of both, one after the other (shared cores)"] = together / medians["both"]
    results["the same in CPU time"] = (cpu["decode"] + cpu["encode"]) / cpu["both"]
    print(f"{options.backbone}, {options.size}x{options.size}, {frames:,} frames, on {accelerator.device.type}")
    for name, value in results.items():
        print(f"  {name:50} {value:.3g}")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(options.output_dir / "results.json", results)


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock seconds, and CPU seconds of all threads."""
    before = time.monotonic(), time.process_time()
    work()
    return time.monotonic() - before[0], time.process_time() - before[1]


def new_tasks(paths: tuple[Path, ...]) -> list[Task]:
    """Every video on one clock."""
    return [Task(path, [ClipKey(*file_state(path), 0.0)]) for path in paths]


def decode_all(paths: tuple[Path, ...], options: Options) -> list[Chunk]:
    """All frames, decoded by as many threads as the stage takes."""
    size = (options.size, options.size)

    def decode_one(task: Task) -> list[Chunk]:
        return list(decode(task, size, options.fps, IMAGE_FPS, options.batch_size, strict=False))

    return list(stream_ahead(decode_one, new_tasks(paths)))


def embed_chunks(accelerator: Accelerator, encoder: FrameEncoder, chunks: list[Chunk], options: Options) -> None:
    """Frames that are in memory already."""
    for chunk in chunks:
        chunk.task.embeddings.clear()
    with tqdm(disable=True) as bar:
        for _ in embed(accelerator, encoder, chunks, options.batch_size, bar):
            pass


def whole_stage(accelerator: Accelerator, encoder: FrameEncoder, paths: tuple[Path, ...], options: Options) -> None:
    """Decode, embed and write into a new cache."""
    provenance = Provenance(
        encoder_fingerprint="benchmark", embedding_dimension=encoder.embedding_dimension, fps=options.fps,
        image_fps=IMAGE_FPS, image_size=encoder.config.image_size, transform=TRANSFORM, dtype="float16", versions={},
    )  # fmt: skip
    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(disable=True) as bar,
        CacheWriter(Path(folder) / "cache", provenance) as writer,
    ):
        for task in embed_videos(
            accelerator, encoder, new_tasks(paths), options.fps, IMAGE_FPS, options.batch_size, False, bar
        ):
            for clip in task.clips():
                writer.add(clip)


if __name__ == "__main__":
    run_stage(main, Options)
