r"""Evaluate a predictor: by how much does it beat the trivial guesses, and how far into the future?

  video-jepa evaluate --cache cache/test --predictor runs/predictor --output-dir runs/evaluation

Leaves `rollout.json` and `rollout.csv`, which `video-jepa report` draws: for each forecast and horizon its error, also
relative to copying the last embedding, to ridge regression and to the mean, with confidence intervals; and for how long
it is better than the mean. `model` is what the predictor's calibration believes, `rollout` the network alone. With
--samples also how good sampled futures are; with --probe-cache and --probe-columns also how well true state, columns of
the caches, can be read off forecasts.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from jepa.config import Bounded, NotNegativeInt, PositiveInt
from pipelines.run.caches import require_no_video_in_both
from pipelines.run.command import require, run_command
from pipelines.run.evaluation import Evaluation, fit_readout
from pipelines.run.files import write_json
from pipelines.run.folder import RunFolder
from pipelines.run.memory import require_memory
from pipelines.run.models import inputs_of, load_predictor, open_cache, windows_for
from pipelines.run.report import table, write_table

LEAST_SAMPLES = 19  # fewest samples with a central interval of 90 %


@dataclass(frozen=True)
class Options(Bounded):
    """Evaluate forecasts against copy-last, linear extrapolation, ridge regression and the mean."""

    cache: Path = Path("cache/test")
    """Embeddings of videos that served neither training nor the choice of the model."""
    predictor: Path = Path("runs/predictor")
    """Run folder of train_predictor: the predictor and its calibration."""
    output_dir: Path = Path("runs/evaluation")
    """Folder for the results."""
    horizon: PositiveInt = 20
    """Steps into the future."""
    windows: PositiveInt = 20_000
    """Rollouts at most, evenly over the cache."""
    samples: NotNegativeInt = 0
    """Futures drawn for each rollout; of a predictor without a latent, its forecast with usual errors. 0: none."""
    probe_cache: Path | None = None
    """Embeddings of other videos to fit probes on, cached with --columns."""
    probe_columns: tuple[str, ...] = ()
    """Columns of both caches to read off forecasts."""
    seed: NotNegativeInt = 0
    """Seed of the bootstrap and of the samples."""
    overwrite: bool = False
    """Replace the results in the output folder."""


def main(options: Options) -> None:
    """Load, forecast and measure, write, print."""
    both = bool(options.probe_cache) == bool(options.probe_columns)
    require(both, "--probe-cache and --probe-columns belong together: give both or neither")
    enough = options.samples == 0 or options.samples >= LEAST_SAMPLES
    require(enough, f"--samples is {options.samples}: a central interval of 90 % takes at least {LEAST_SAMPLES}")
    device, folder = Accelerator().device, options.output_dir
    output = RunFolder(options, "evaluate_rollout", ("rollout.json", "rollout.csv"))
    predictor, calibration = load_predictor(options.predictor, device)
    cache, readout = open_cache(options.cache, predictor), None
    inputs = inputs_of(options.predictor, cache)
    if options.horizon > (fitted := calibration.horizon):
        warning = f"the calibration was fitted up to {fitted} ticks ahead; beyond, that of the last one is taken"
        print(f"warning: {warning}", file=sys.stderr)
    windows = windows_for(cache, predictor, predictor.config.context + options.horizon)
    if options.probe_cache:
        probe_cache = open_cache(options.probe_cache, predictor)
        require_no_video_in_both(cache, probe_cache)
        readout = fit_readout(probe_cache, options.probe_columns, predictor)
    require_memory(4 * options.samples * options.horizon * math.prod(cache.shape), f"--samples {options.samples}")
    judge = Evaluation(predictor, calibration, windows, samples=options.samples, readout=readout, seed=options.seed)
    results = judge.run(most=options.windows)
    output.begin(inputs)
    write_json(folder / "rollout.json", results)
    write_table(results, folder / "rollout.csv")
    print(table(results))
    metrics = {"useful_horizon_s": results["useful_horizon"]["model"]["time_s"]}
    for row in results["predictors"]["model"]:
        metrics[f"relative_to_copy_last_at_{row['horizon']}"] = row["relative_to_copy_last"]
    output.finish(metrics)
    print(
        f"wrote {folder}/rollout.json and rollout.csv. To see them, and next:\n"
        f"  video-jepa report --runs {options.predictor} {folder} --output-dir runs/report\n"
        f"  video-jepa surprise --cache {options.cache} --predictor {options.predictor} --output-dir runs/surprise"
    )


if __name__ == "__main__":
    run_command(main, Options)
