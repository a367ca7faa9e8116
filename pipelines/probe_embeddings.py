r"""Beside the stages: what do the embeddings know of what a CSV beside each video says?

  python pipelines/probe_embeddings.py --cache cache/train --columns speed steering --window 1 8 \
      --output-dir runs/probes

For each kind of probe and each number of frames, R² and Pearson's r of every column on videos that the probe never saw:
by cross-validation over videos, or on --test-cache. Leaves `probes.json`, `probes.csv`, `probes.png`, `metrics.json`
and `config.json`.
"""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from data.embedding_cache import EmbeddingCache
from data.groups import group_rows, stretch_for
from data.sidecar import read_states
from data.windows import Windows
from jepa.bootstrap import Bootstrap
from jepa.probe import Agreement, ProbeKind, fit_probe, measure_agreement, read_out_of_fold
from pipelines.artefacts import require_finite, require_no_video_in_both
from pipelines.stage import RunFolder, counted, require, run_stage, write_json

ENOUGH_GROUPS = 20
"""With fewer videos, the bootstrap resamples so many stretches of them."""
LEAST_MOMENTS = 20


@dataclass(frozen=True)
class Options:
    """Probe embeddings for true state."""

    cache: Path = Path("cache/train")
    """Embeddings, with a CSV beside each of their videos."""
    columns: tuple[str, ...] = ()
    """Columns of the CSVs to probe for."""
    test_cache: Path | None = None
    """Fit on --cache and test on these embeddings, instead of cross-validating."""
    kind: tuple[ProbeKind, ...] = ("ridge", "mlp", "knn")
    """Ridge regression, a small MLP, the nearest neighbours."""
    window: tuple[int, ...] = (1,)
    """How many last frames a probe is shown; several are compared on the same moments."""
    folds: int = 5
    """Parts that are held out in turn: videos or, where these are fewer, contiguous stretches of them."""
    samples: int = 10_000
    """Moments that are taken at most, evenly over all."""
    resamples: int = 1000
    """Bootstrap resamples for the confidence intervals."""
    seed: int = 0
    """Of the MLP and of the bootstrap."""
    output_dir: Path = Path("runs/probes")
    """Where the results are left."""
    overwrite: bool = False
    """Replace the results in the output folder."""


def main(options: Options) -> None:
    """The story: label, fit and read, measure, draw, print."""
    require(bool(options.columns), "--columns is empty: name columns of the CSVs beside the videos")
    require(bool(options.kind), "--kind is empty: choose among ridge, mlp and knn")
    shown = " ".join(map(str, options.window)) or "empty"
    require(min(options.window, default=0) > 0, f"--window is {shown}: give one or more positive numbers of frames")
    require(options.folds >= 3, f"--folds is {options.folds}: at least 3, so that two remain to choose a penalty by")
    require(options.resamples > 0, f"--resamples is {options.resamples}: it must be positive")
    require(options.samples >= 100, f"--samples is {options.samples}: at least 100 are needed")
    output = RunFolder(options.output_dir, ("probes.json", "probes.csv", "probes.png"))
    output.require_unfinished(options.overwrite)
    cache, test_cache = EmbeddingCache(options.cache), None
    # Of two groups at least one is left to choose a penalty by.
    stretch_s = stretch_for(cache, 2 if options.test_cache else options.folds)
    windows, test = label_windows(cache, options.columns, max(options.window), options.samples, stretch_s), None
    validation = f"{options.folds} folds over {describe(cache, stretch_s)}"
    if stretch_s < math.inf:
        validation += ": fewer videos than folds, and neighbouring stretches are alike, which flatters"
    if options.test_cache:
        test_cache = EmbeddingCache(options.test_cache)
        test_cache.require_same_space(cache.provenance.encoder_fingerprint, cache.provenance.fps, str(options.cache))
        test = label_windows(test_cache, options.columns, max(options.window), options.samples)
        require_no_video_in_both(cache, "--cache", test_cache, "--test-cache")
        validation = f"fitted on {options.cache}, tested on {options.test_cache}"
    require_enough(windows, cache, 2 if test else options.folds, ", or lower --folds or --window")
    if test and test_cache:
        require_enough(test, test_cache, 1, ", or lower --window")
    judged, judged_cache = test or windows, test_cache or cache
    for column, values in zip(options.columns, judged.states.T, strict=True):
        require(bool(values.std() > 0), f"--columns {column}: it never changes beside {judged_cache.folder}")
    output.prepare(options, overwrite=True, inputs={"provenance": cache.provenance})

    stretch_s = stretch_for(judged_cache, ENOUGH_GROUPS)
    bootstrap = Bootstrap(group_rows(judged_cache, stretch_s)[judged.rows[:, -1]], options.resamples, options.seed)
    readings = read_all(windows, test, options.kind, options.window, bootstrap, options.folds, options.seed)
    results: dict[str, Any] = {
        "fps": cache.provenance.fps,
        "columns": options.columns,
        "moments": len(judged.states),
        "validation": validation,
        "interval": bootstrap.describe("videos" if stretch_s == math.inf else describe(judged_cache, stretch_s)),
        "probes": bootstrap.claim([record for reading in readings for record in reading.records(options.columns)]),
    }
    write_json(options.output_dir / "probes.json", results)
    write_table(results["probes"], options.output_dir / "probes.csv")
    draw(readings, judged.states, options.columns, options.output_dir / "probes.png")
    output.finish(
        {f"{record['kind']}_{record['window']}_{record['column']}_{score}": record[score]
         for record in results["probes"] for score in ("r2", "r")}
    )  # fmt: skip
    print(table(results))
    best = max(readings, key=lambda reading: float(reading.agreement.r2.mean()))
    print(
        f"wrote {options.output_dir}/probes.json, probes.csv and probes.png. Next, read off imagined futures:\n"
        f"  python pipelines/evaluate_rollout.py --cache cache/test --predictor runs/predictor/predictor "
        f"--probe-cache {options.cache} --probe-columns {' '.join(options.columns)} --probe-kind {best.kind}"
    )


@dataclass(frozen=True)
class LabelledWindows:
    """Some last frames of many moments, and the true state of each moment."""

    inputs: Tensor
    """float32 (N, frames, D)."""
    states: Tensor
    """float64 (N, columns), at the last frame."""
    rows: np.ndarray
    """int64 (N, frames): rows in the cache."""
    groups: np.ndarray
    """int64 (N,): which are held out together."""


def label_windows(
    cache: EmbeddingCache, columns: Sequence[str], frames: int, limit: int, stretch_s: float = math.inf
) -> LabelledWindows:
    """At most `limit` windows, evenly over a cache with a CSV beside each video; none crosses a stretch's border.

    Raises:
        CacheError: no clip is long enough.
        SidecarError: a CSV cannot be used.
        UserError: embeddings are not finite.
    """
    windows = Windows(cache, frames)
    rows = windows.rows(np.arange(len(windows)))
    groups = group_rows(cache, stretch_s)[rows]  # (N, frames)
    inside = np.flatnonzero(groups[:, 0] == groups[:, -1])
    chosen = inside[np.linspace(0, len(inside) - 1, min(len(inside), limit)).astype(int)]
    rows = rows[chosen]
    inputs = torch.from_numpy(cache.take(rows))
    require_finite(cache, [inputs])
    states = read_states(cache, columns)[rows[:, -1]]
    return LabelledWindows(inputs, torch.from_numpy(states), rows, groups[chosen, -1])


def require_enough(windows: LabelledWindows, cache: EmbeddingCache, groups: int, or_lower: str = "") -> None:
    """So many groups that can be held out, and enough moments for any kind of probe. Raises `UserError`."""
    found, moments = len(np.unique(windows.groups)), len(windows.states)
    require(
        found >= groups,
        f"{cache.folder}: only {found} videos or stretches are as long as a window, and {groups} are needed: "
        f"bring longer videos{or_lower}",
    )
    require(
        moments >= LEAST_MOMENTS,
        f"{cache.folder}: only {moments} moments can be probed, and {LEAST_MOMENTS} are needed: "
        f"bring longer videos{or_lower}",
    )


@dataclass(frozen=True)
class Reading:
    """What one kind of probe reads off so many frames."""

    kind: ProbeKind
    window: int
    read: Tensor
    """float64 (N, columns)."""
    agreement: Agreement
    chosen: list[list[float]]
    """Penalty per sample, or number of neighbours, for each fold and column."""

    def records(self, columns: Sequence[str]) -> list[dict[str, Any]]:
        """One for each column."""
        return [
            {
                "kind": self.kind,
                "window": self.window,
                "column": column,
                **{name: values[index].tolist() for name, values in vars(self.agreement).items()},
                "chosen": [fold[index] for fold in self.chosen],
            }
            for index, column in enumerate(columns)
        ]


def read_all(
    windows: LabelledWindows,
    test: LabelledWindows | None,
    kinds: Sequence[ProbeKind],
    lengths: Sequence[int],
    bootstrap: Bootstrap,
    folds: int = 5,
    seed: int = 0,
) -> list[Reading]:
    """Each kind of probe on the last frames of each number: on `test`, or out of fold without it."""
    readings = []
    for kind, length in tqdm([(kind, length) for length in lengths for kind in kinds], desc="probing", leave=False):
        inputs = flatten_last(windows.inputs, length)
        if test is None:
            read, probes = read_out_of_fold(kind, inputs, windows.states, windows.groups, folds, seed)
        else:
            probes = [fit_probe(kind, inputs, windows.states, windows.groups, seed)]
            read = probes[0](flatten_last(test.inputs, length))
        agreement = measure_agreement(read, (test or windows).states, bootstrap)
        readings.append(Reading(kind, length, read, agreement, [probe.chosen for probe in probes]))
    return readings


def flatten_last(inputs: Tensor, frames: int) -> Tensor:
    """The last frames of each window as one vector, (N, T, D) -> (N, frames x D)."""
    return rearrange(inputs[:, -frames:], "n t d -> n (t d)")


def describe(cache: EmbeddingCache, stretch_s: float) -> str:
    """What is held out or drawn together."""
    videos = counted(len({clip.key.source for clip in cache.clips}), "video")
    if stretch_s == math.inf:
        return videos
    return f"stretches of {stretch_s:.0f} s of {videos}"


def write_table(records: list[dict[str, Any]], path: Path) -> None:
    """A row for each column of each probe."""
    rows = [
        {
            **{name: record[name] for name in ("kind", "window", "column", "r2", "r")},
            **{f"{score}_{end}": bound for score in ("r2", "r")
               for end, bound in zip(("low", "high"), record[f"{score}_interval"] or (None, None), strict=True)},
        }
        for record in records
    ]  # fmt: skip
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def table(results: dict[str, Any]) -> str:
    """The results on one screen."""
    lines = [
        results["validation"],
        f"{counted(results['moments'], 'moment')}; intervals {results['interval']}",
        f"  {'column':20}{'probe':6}{'frames':>7}{'R2':>10}{'Pearson r':>26}",
    ]
    for record in sorted(results["probes"], key=lambda record: results["columns"].index(record["column"])):
        scores = []
        for score in ("r2", "r"):
            ends = record[f"{score}_interval"]
            scores.append(f"{record[score]:>9.3f}" + (f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else ""))
        lines.append(
            f"  {record['column']:20}{record['kind']:6}{record['window']:>7}" + "".join(map("{:26}".format, scores))
        )
    return "\n".join(lines)


def draw(readings: list[Reading], states: Tensor, columns: Sequence[str], path: Path) -> None:
    """For each column: what the best probe reads against the truth, and R² of all probes with their intervals."""
    figure = Figure(figsize=(8, 3.5 * len(columns)), layout="constrained")
    grid = figure.subplots(len(columns), 2, squeeze=False)
    names = [f"{reading.kind}, {counted(reading.window, 'frame')}" for reading in readings]
    for index, (column, (left, right)) in enumerate(zip(columns, grid, strict=True)):
        r2 = np.array([reading.agreement.r2[index] for reading in readings])
        intervals = np.array([reading.agreement.r2_interval[index] for reading in readings])  # (readings, 2)
        best = int(r2.argmax())
        true = states[:, index].numpy()
        left.plot(true, readings[best].read[:, index].numpy(), ".", markersize=2, alpha=0.4, rasterized=True)
        left.axline((true.mean(), true.mean()), slope=1, color="0.5", linewidth=1)
        left.set_title(f"{column}, read by {names[best]}", fontsize=9)
        left.set_xlabel("true")
        left.set_ylabel("read off embeddings")
        right.hlines(names, *intervals.T, linewidth=2)
        right.plot(r2, names, "o")
        right.set_xlim(min(0.0, max(-1.0, float(intervals.min()))), 1)
        right.set_title(f"R² of {column}", fontsize=9)
        right.invert_yaxis()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run_stage(main, Options)
