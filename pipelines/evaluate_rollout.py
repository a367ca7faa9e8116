r"""Stage 4: by how much does the predictor beat the trivial guesses, and how far into the future?

  python pipelines/evaluate_rollout.py --cache cache/test --predictor runs/predictor/predictor \
      --output-dir runs/evaluation

Leaves `rollout.json` (for each predictor and horizon: error, confidence interval, error relative to copying the last
embedding, to ridge regression and to the mean, retrieval), `rollout.png`, `metrics.json` and `config.json`. With
--probe-cache and --probe-columns, also how well true state (a CSV beside each video) can be read off the imagined
embeddings.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from torch import Tensor
from tqdm import tqdm

from data.decoder import Damage, VideoError
from data.embedding_cache import CachedClip, EmbeddingCache
from data.sidecar import read_sidecar
from data.video import probe_video, read_frames_at
from data.windows import Windows
from jepa.predictor import Predictor
from jepa.probe import fit_linear_probe, r_squared
from jepa.skill import Skill, imagine, measure_skill
from pipelines.artefacts import load_predictor
from pipelines.stage import RunFolder, counted, require, run_stage, write_json

ENOUGH_CLIPS = 20
"""With fewer clips, the bootstrap resamples stretches of a clip instead of clips."""


@dataclass(frozen=True)
class Options:
    """Evaluate rollouts against copy-last, linear extrapolation, ridge regression and the mean."""

    cache: Path = Path("cache/test")
    """Embeddings of videos that were used neither for training nor for choosing the model."""
    predictor: Path = Path("runs/predictor/predictor")
    """The trained predictor."""
    output_dir: Path = Path("runs/evaluation")
    """Where the results are left."""
    horizon: int = 20
    """Steps into the future."""
    stride: int = 1
    """Steps between the beginnings of rollouts."""
    probe_cache: Path | None = None
    """Fit linear probes on these embeddings, from the CSV beside each of their videos."""
    probe_columns: tuple[str, ...] = ()
    """Columns of the CSVs to probe for."""
    resamples: int = 1000
    """Bootstrap resamples for the confidence intervals."""
    seed: int = 0
    """Of the bootstrap."""
    overwrite: bool = False
    """Replace the results in the output folder."""


def main(options: Options) -> None:
    """The story: load, imagine, measure, draw, print."""
    require(options.horizon > 0, f"--horizon is {options.horizon}: it must be positive")
    require(options.stride > 0, f"--stride is {options.stride}: it must be positive")
    require(
        bool(options.probe_cache) == bool(options.probe_columns),
        "--probe-cache and --probe-columns belong together: give both or neither",
    )
    output = RunFolder(options.output_dir, ("rollout.json", "rollout.png"))
    output.require_unfinished(options.overwrite)
    predictor = load_predictor(options.predictor)
    cache = EmbeddingCache(options.cache)
    cache.require_same_space(predictor.encoder_fingerprint, predictor.fps, str(options.predictor))
    trials = lay_out_trials(cache, predictor, options.horizon, options.stride)
    probes = fit_probes(options, predictor, cache, trials.future_rows) if options.probe_cache else None
    changing = bool((trials.future != trials.past[:, -1:]).any())
    require(changing, f"{options.cache}: no embedding ever changes, so nothing can beat copying it: bring moving video")
    # What an interrupted evaluation left can go: there is nothing in it to go on from.
    output.prepare(options, overwrite=True, inputs={"provenance": cache.provenance})

    imagined = imagine_all(predictor, trials.past, options.horizon)
    results = measure(trials, imagined, predictor, options.seed, options.resamples)
    if probes is not None:
        probe, true_state = probes
        results["probe_columns"] = list(options.probe_columns)
        for name, value in imagined.items():
            for step, entry in enumerate(results["predictors"][name]):
                entry["probe_r2"] = r_squared(probe(value[:, step]), true_state[:, step]).tolist()
        results["probe_r2_of_true_embeddings"] = r_squared(
            probe(trials.future).flatten(0, 1), true_state.flatten(0, 1)
        ).tolist()
    write_json(options.output_dir / "rollout.json", results)
    draw(results, options.output_dir / "rollout.png")
    output.finish(flat_metrics(results))
    print(table(results))
    print(
        f"wrote {options.output_dir}/rollout.json and rollout.png. Next:\n"
        f"  python pipelines/score_surprise.py --videos VIDEO --encoder runs/encoder/encoder "
        f"--predictor {options.predictor} --output-dir runs/surprise"
    )


@dataclass(frozen=True)
class Trials:
    """Every window of a cache as a trial: the past that predictors are shown, and the future that came."""

    windows: Windows
    past: Tensor
    """(N, context, D), standardised."""
    future: Tensor
    """(N, horizon, D), standardised."""
    future_rows: np.ndarray
    """int64 (N, horizon): rows of the future in the cache."""
    bank: Tensor
    """(frames, D), standardised: all frames of the cache, among which the one that came is searched."""
    bank_rows: np.ndarray
    """int64 (frames,): rows of the bank in the cache."""


def lay_out_trials(cache: EmbeddingCache, predictor: Predictor, horizon: int, stride: int = 1) -> Trials:
    """All windows of a context and `horizon` steps, their beginnings `stride` steps apart.

    Raises:
        CacheError: no clip is long enough for a single window.
    """
    context = predictor.config.context
    windows = Windows(cache, context + horizon, stride)
    sequences = predictor.standardise(windows.take(np.arange(len(windows))))
    bank_rows = np.concatenate(cache.unbroken_runs())
    return Trials(
        windows=windows,
        past=sequences[:, :context],
        future=sequences[:, context:],
        future_rows=windows.rows(np.arange(len(windows)))[:, context:],
        bank=predictor.standardise(torch.from_numpy(cache.take(bank_rows))),
        bank_rows=bank_rows,
    )


def imagine_all(predictor: Predictor, past: Tensor, horizon: int) -> dict[str, Tensor]:
    """Rollouts (N, horizon, D) of the predictor, under the name `model`, and of each of its baselines."""
    predictors = {"model": predictor, **predictor.baselines()}
    bar = tqdm(predictors.items(), desc="imagining", unit="predictor", leave=False)
    return {name: imagine(one, past, horizon) for name, one in bar}


def measure(
    trials: Trials, imagined: dict[str, Tensor], predictor: Predictor, seed: int = 0, resamples: int = 1000
) -> dict[str, Any]:
    """What is written to `rollout.json`: a record for each predictor and horizon, and what they were measured on."""
    cache, bank_rows = trials.windows.cache, trials.bank_rows
    place = np.empty(bank_rows.max() + 1, dtype=np.int64)
    place[bank_rows] = np.arange(len(bank_rows))
    true_rows = torch.from_numpy(place[trials.future_rows])
    groups, grouped_by = bootstrap_groups(trials.windows, cache, predictor)
    skills = measure_skill(imagined, trials.future, groups, trials.bank, true_rows, seed, resamples)
    return {
        "fps": predictor.fps,
        "context": predictor.config.context,
        "windows": len(trials.windows),
        "clips": len(cache.clips),
        "frames": len(trials.bank),
        "interval": f"95 %, bootstrap over {len(np.unique(groups))} {grouped_by}",
        "predictors": {name: by_horizon(skill, predictor.fps) for name, skill in skills.items()},
    }


def bootstrap_groups(windows: Windows, cache: EmbeddingCache, predictor: Predictor) -> tuple[np.ndarray, str]:
    """Which windows are resampled together: those of a clip, or of a stretch as long as two windows of one."""
    if len(np.unique(windows.clips)) >= ENOUGH_CLIPS:
        return windows.clips, "clips"
    length = 2 * windows.length
    stretches = windows.clips * (len(cache.times_s) + 1) + windows.starts // length
    return stretches, f"stretches of {length / predictor.fps:.0f} s"


def fit_probes(
    options: Options, predictor: Predictor, cache: EmbeddingCache, future_rows: np.ndarray
) -> tuple[Any, Tensor]:
    """A linear probe fitted on the probe cache, and the true state of the future frames, (N, horizon, columns)."""
    assert options.probe_cache is not None
    probe_cache = EmbeddingCache(options.probe_cache)
    probe_cache.require_same_space(predictor.encoder_fingerprint, predictor.fps, str(options.predictor))
    inputs, targets = states(probe_cache, options.probe_columns)
    probe = fit_linear_probe(predictor.standardise(inputs), targets)
    _, test_states = states(cache, options.probe_columns)
    by_row = torch.full((len(cache.times_s), len(options.probe_columns)), math.nan, dtype=torch.float64)
    by_row[np.concatenate(cache.unbroken_runs())] = test_states
    return probe, by_row[torch.from_numpy(future_rows)]


def states(cache: EmbeddingCache, columns: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """All embeddings of a cache (frames, D) and the state of each from the CSV beside its video (frames, columns)."""
    embeddings, values = [], []
    for clip in cache.clips:
        embeddings.append(cache.clip_embeddings(clip))
        times_s = cache.clip_times_s(clip)
        values.append(read_sidecar(Path(clip.key.source), times_s, columns, tolerance_s=0.5 / cache.provenance.fps))
    return torch.from_numpy(np.concatenate(embeddings)), torch.from_numpy(np.concatenate(values))


def by_horizon(skill: Skill, fps: float) -> list[dict[str, Any]]:
    """One flat record for each horizon."""
    records = []
    for step in range(len(skill.mse)):
        record: dict[str, Any] = {
            "horizon": step + 1,
            "time_s": (step + 1) / fps,
            "mse": float(skill.mse[step]),
            "mse_interval": skill.mse_interval[step].tolist(),
        }
        for to, value in skill.relative.items():
            record[f"relative_to_{to}"] = float(value[step])
            record[f"relative_to_{to}_interval"] = skill.relative_interval[to][step].tolist()
        record["retrieval_at_1"] = float(skill.retrieval_at_1[step])
        records.append(record)
    return records


def flat_metrics(results: dict[str, Any]) -> dict[str, float]:
    """The model's final values under flat keys."""
    metrics = {}
    for record in results["predictors"]["model"]:
        for name, value in record.items():
            if isinstance(value, float) and name != "time_s":
                metrics[f"{name}_at_{record['horizon']}"] = value
    return metrics


def summary(results: dict[str, Any]) -> str:
    """How much was measured."""
    return f"{counted(results['windows'], 'rollout')} in {counted(results['clips'], 'clip')}"


def shown_horizons(horizon: int) -> list[int]:
    """Some horizons to print, the first and the last among them."""
    return sorted({1, *range(5, horizon, 5), horizon})


def table(results: dict[str, Any]) -> str:
    """The results on one screen."""
    predictors = results["predictors"]
    shown = shown_horizons(len(predictors["model"]))
    heads = [f"{h} ({h / results['fps']:.3g} s)" for h in shown]

    def block(title: str, cell: Any) -> list[str]:
        lines = [title, f"  {'':22}" + "".join(f"{head:>14}" for head in heads)]
        for name, records in predictors.items():
            lines.append(f"  {name:22}" + "".join(f"{cell(records[h - 1]):>14.3f}" for h in shown))
        return lines

    lines = [
        f"{summary(results)}; horizon in steps (seconds)",
        *block("error relative to copying the last embedding (below 1 is skill)", lambda r: r["relative_to_copy_last"]),
        *block("how often the nearest of all frames is the one that came", lambda r: r["retrieval_at_1"]),
    ]
    if "probe_columns" in results:
        ceiling = float(np.mean(results["probe_r2_of_true_embeddings"]))
        title = f"R2 of {', '.join(results['probe_columns'])} (true embeddings: {ceiling:.3f})"
        lines += block(title, lambda r: float(np.mean(r["probe_r2"])))
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Leave the picture of the skill in a file."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    draw_skill(results, figure.add_subplot())
    figure.savefig(path, dpi=120)


def draw_skill(results: dict[str, Any], axes: Axes) -> None:
    """Error relative to copy-last against the horizon in seconds, with confidence bands."""
    colours = {
        "model": "C0",
        "copy_last": "0.5",
        "linear_extrapolation": "C1",
        "ridge": "C2",
        "shrunk_ridge": "C4",
        "mean": "C3",
    }
    for name, records in results["predictors"].items():
        time_s = [record["time_s"] for record in records]
        axes.plot(
            time_s,
            [record["relative_to_copy_last"] for record in records],
            label=name.replace("_", " "),
            color=colours.get(name, "C0"),
            linewidth=2.5 if name == "model" else 1.5,
        )
        low, high = np.array([record["relative_to_copy_last_interval"] for record in records]).T
        axes.fill_between(time_s, low, high, color=colours.get(name, "C0"), alpha=0.2, linewidth=0)
    # Logarithmic: extrapolation and the mean are wrong by factors that would flatten the rest on a linear scale.
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("horizon in seconds")
    axes.set_ylabel("error relative to copying the last embedding")
    axes.set_title(f"{summary(results)}; {results['interval']}", fontsize=9)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def read_pictures(cache: EmbeddingCache, rows: Sequence[int] | np.ndarray, height: int = 144) -> list[np.ndarray]:
    """Decode the frames behind rows of a cache once more from their videos, for people to look at.

    Args:
        cache: its clips say where the videos lie.
        rows: int (N,).
        height: of the pictures in pixels; their width follows the shape of the video.

    Returns:
        For each row, uint8 (height, width, 3).

    Raises:
        VideoError: a video is gone, cannot be decoded, or has no frame there any more.
    """
    pictures = []
    fps, image_fps = cache.provenance.fps, cache.provenance.image_fps
    for row in rows:
        video = probe_video(Path(clip_of_row(cache, int(row)).key.source), image_fps)
        size = (height, max(1, round(height * video.width / video.height)))
        time_s = float(cache.times_s[row])
        frames, found_s = read_frames_at(video.path, size, [time_s], Damage(), image_fps)
        if abs(found_s[0] - time_s) > 0.5 / fps:
            raise VideoError(f"{video.path}: there is no frame at {time_s:.2f} s: was it changed since it was cached?")
        pictures.append(frames[0].transpose(1, 2, 0))
    return pictures


def clip_of_row(cache: EmbeddingCache, row: int) -> CachedClip:
    """The clip that a row of a cache belongs to."""
    return next(clip for clip in cache.clips if clip.start <= row < clip.start + clip.frames)


if __name__ == "__main__":
    run_stage(main, Options)
