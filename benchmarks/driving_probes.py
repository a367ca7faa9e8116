r"""Real video: do embeddings know the speed and the steering of a car better than its pixels do?

  python benchmarks/driving_probes.py --encoder runs/benchmarks/driving/b_02/seed_0/encoder/encoder \
      --output-dir runs/benchmarks/driving_probes

The recordings and their CSVs lie beside the project, in `../shared/driving` or where JEPA_SHARED says. Probes are
fitted, and their penalties chosen, on a_00, b_00 and b_01 and tested on b_02: on single frames and on windows, on the
embeddings and on as many principal components of the pixels of the same frames, at the encoder's size. Prints a table
in Markdown and writes `results.json`.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from sklearn.decomposition import PCA

from data.embedding_cache import EmbeddingCache
from data.groups import group_rows, stretch_for
from data.video import read_on_clock
from jepa.bootstrap import Bootstrap
from jepa.probe import ProbeKind
from pipelines.probe_embeddings import ENOUGH_GROUPS, describe, label_windows, read_all
from pipelines.stage import require, run_python, run_stage, write_json

ROOT = Path(__file__).parent.parent
RECORDINGS = {"train": ("a_00", "b_00", "b_01"), "test": ("b_02",)}
COLUMNS = ("speed", "steering")
KINDS: tuple[ProbeKind, ...] = ("ridge", "mlp", "knn")
FPS = 4


@dataclass(frozen=True)
class Options:
    """Speed and steering, off embeddings and off pixels."""

    encoder: Path = Path("runs/benchmarks/driving/b_02/seed_0/encoder/encoder")
    """The trained encoder, such as benchmarks/driving.py leaves behind."""
    output_dir: Path = Path("runs/benchmarks/driving_probes")
    """Where the caches and the results are left."""
    window: tuple[int, ...] = (1, 8)
    """How many last frames a probe is shown."""
    seed: int = 0
    """Of the MLP and of the bootstrap."""


def main(options: Options) -> None:
    """The story: embed, label, reduce the pixels, probe both, print."""
    recordings = Path(os.environ.get("JEPA_SHARED", ROOT.parent / "shared")) / "driving"
    require(recordings.is_dir(), f"{recordings}: the driving recordings are not there; set JEPA_SHARED")
    folder = options.output_dir.absolute()
    for split, names in RECORDINGS.items():
        videos = [recordings / f"{name}.mp4" for name in names]
        words = ["--encoder", options.encoder.absolute(), "--fps", FPS, "--output-dir", folder / "cache" / split]
        run_python("pipelines/cache_embeddings.py", "--videos", *videos, *words)
    train, test = (EmbeddingCache(folder / "cache" / split) for split in RECORDINGS)
    longest, limit = max(options.window), max(train.frames, test.frames)
    learned, judged = (label_windows(cache, COLUMNS, longest, limit) for cache in (train, test))
    components = PCA(train.provenance.embedding_dimension, svd_solver="randomized", random_state=options.seed)
    reduced = components.fit_transform(read_pixels(train)), components.transform(read_pixels(test))
    pixels = [
        replace(windows, inputs=torch.from_numpy(values[windows.rows]))
        for windows, values in zip((learned, judged), reduced, strict=True)
    ]

    stretch_s = stretch_for(test, ENOUGH_GROUPS)
    bootstrap = Bootstrap(group_rows(test, stretch_s)[judged.rows[:, -1]], seed=options.seed)
    results = [
        {"input": name, **record}
        for name, (fitted_on, tested_on) in {"embeddings": (learned, judged), "pixels": pixels}.items()
        for reading in read_all(fitted_on, tested_on, KINDS, options.window, bootstrap, seed=options.seed)
        for record in reading.records(COLUMNS)
    ]
    write_json(folder / "results.json", results)
    print(f"{len(judged.states):,} moments of b_02; 95 %, bootstrap over {describe(test, stretch_s)}\n")
    print("| column | probe | frames | input | R2 | Pearson r |\n| --- | --- | --- | --- | --- | --- |")
    for record in sorted(results, key=lambda record: [record[name] for name in ("column", "kind", "window", "input")]):
        r2, r = (
            f"{record[score]:.3f} ({record[f'{score}_interval'][0]:.3f} to {record[f'{score}_interval'][1]:.3f})"
            for score in ("r2", "r")
        )
        print(f"| {record['column']} | {record['kind']} | {record['window']} | {record['input']} | {r2} | {r} |")


def read_pixels(cache: EmbeddingCache) -> np.ndarray:
    """The pixels behind each row of a cache, float32 (rows, 3 x height x width)."""
    height, width = cache.provenance.image_size
    pixels = np.zeros((len(cache.times_s), 3 * height * width), np.float32)
    for clip in cache.clips:
        frames = read_on_clock(Path(clip.key.source), (height, width), cache.provenance.fps, clip.key.phase_s)
        for row, timed in enumerate(frames, clip.start):
            pixels[row] = timed.frame.ravel()
    return pixels


if __name__ == "__main__":
    run_stage(main, Options)
