r"""Evaluate a predictor: by how much does it beat the trivial guesses, and how far into the future?

  video-jepa evaluate --cache cache/test --predictor runs/predictor --output-dir runs/evaluation

Leaves `rollout.json`, `rollout.csv` and `rollout.png`: for each forecast and horizon its error, also relative to
copying the last embedding, to ridge regression and to the mean, with confidence intervals, retrieval and collapse; and
for how long it is better than the mean. `model` is what the predictor's calibration believes, `rollout` the network
alone. With --samples also how good sampled futures are; with --probe-cache and --probe-columns also how well true
state, columns of the caches, can be read off forecasts.
"""

from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from data.cache import EmbeddingCache
from data.windows import Windows
from jepa.config import Bounded, NotNegativeInt, PositiveInt
from pipelines.run.command import require, require_one_process, run_command
from pipelines.run.evaluation import Judged, evaluate, fit_readout
from pipelines.run.files import write_json
from pipelines.run.folder import RunFolder
from pipelines.run.models import load_predictor, require_no_video_in_both
from pipelines.run.report import draw, flat_metrics, table, write_table

LEAST_SAMPLES = 19
"""Fewest samples with a central interval of 90 %."""


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
    resamples: PositiveInt = 1000
    """Bootstrap resamples for the confidence intervals."""
    seed: NotNegativeInt = 0
    """Seed of the bootstrap and of the samples."""
    overwrite: bool = False
    """Replace the results in the output folder."""


def main(options: Options) -> None:
    """Load, forecast and measure, write, draw, print."""
    both = bool(options.probe_cache) == bool(options.probe_columns)
    require(both, "--probe-cache and --probe-columns belong together: give both or neither")
    enough = options.samples == 0 or options.samples >= LEAST_SAMPLES
    require(enough, f"--samples is {options.samples}: a central interval of 90 % takes at least {LEAST_SAMPLES}")
    require_one_process()
    accelerator = Accelerator()
    output = RunFolder(options, "evaluate_rollout", ("rollout.json", "rollout.csv", "rollout.png"))
    predictor, calibration = load_predictor(options.predictor)
    predictor, calibration = predictor.to(accelerator.device), calibration.to(accelerator.device)
    cache = EmbeddingCache(options.cache)
    cache.require_same_space(
        predictor.encoder_fingerprint, predictor.fps, str(options.predictor), shape=predictor.shape
    )
    windows = Windows(cache, predictor.config.context + options.horizon)
    readout = None
    if options.probe_cache:
        probe_cache = EmbeddingCache(options.probe_cache)
        probe_cache.require_same_space(
            predictor.encoder_fingerprint, predictor.fps, str(options.predictor), shape=predictor.shape
        )
        require_no_video_in_both(cache, probe_cache)
        readout = fit_readout(probe_cache, options.probe_columns, predictor)
    output.begin({"provenance": cache.provenance, "calibration": calibration.description()})

    judged = Judged(predictor, calibration, windows, accelerator.autocast)
    results = evaluate(
        judged,
        most=options.windows,
        samples=options.samples,
        readout=readout,
        resamples=options.resamples,
        seed=options.seed,
    )
    write_json(options.output_dir / "rollout.json", results)
    write_table(results, options.output_dir / "rollout.csv")
    draw(results, options.output_dir / "rollout.png")
    print(table(results))
    output.finish(flat_metrics(results))
    print(
        f"wrote {options.output_dir}/rollout.json, rollout.csv and rollout.png. Next:\n"
        f"  video-jepa surprise --cache {options.cache} --predictor {options.predictor} "
        "--output-dir runs/surprise"
    )


if __name__ == "__main__":
    run_command(main, Options)
