r"""Little data: a robot's arms, 48 short episodes. Is anything gained over simple guesses, at every horizon?

  python -m benchmarks.robot --seeds 0 1 2

Needs the episodes in `$JEPA_SHARED/robot`. The last eight are the test, the eight before them choose and calibrate; all
options but the clock, the frames' size and the number of steps are defaults. Prints the error relative to copying of
the believed forecast and of its rivals, and that of the forecast relative to the best of copying, ridge and the mean,
which nobody could know beforehand. Writes `results.json`.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.common import Recipe, forecasts, make_model, shared, table_by_horizon, table_of_measures
from pipelines.run.command import require, run_command
from pipelines.run.files import write_json

EPISODES, HELD_OUT = 64, 8
HORIZONS = (1, 5, 10, 15, 20)
EVERY_HORIZON = range(1, 21)
SIMPLE = ("copy_last", "ridge", "mean")


@dataclass(frozen=True)
class Options:
    """A robot's arms, several seeds."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the weights, the order and the noise; the episodes are the same."""
    steps: tuple[int, int] = (500, 400)
    """Steps of the encoder and of the predictor."""
    output_dir: Path = Path("runs/benchmarks/robot")
    """Where all runs and the results are left."""


def main(options: Options) -> None:
    """The story: make a model of each seed, compare, print."""
    episodes = sorted(shared("robot").glob("*.mp4"))
    require(len(episodes) == EPISODES, f"{shared('robot')} holds {len(episodes)} episodes, not {EPISODES}")
    videos = {"train": episodes[: -2 * HELD_OUT], "val": episodes[-2 * HELD_OUT : -HELD_OUT],
              "test": episodes[-HELD_OUT:]}  # fmt: skip
    recipe = Recipe(
        fps=5,
        encoder={"encoder.image-size": (96, 128), "steps": options.steps[0]},
        predictor={"steps": options.steps[1]},
        evaluation={"horizon": max(EVERY_HORIZON)},
    )
    errors, measures = [], []
    for seed in options.seeds:
        folder = options.output_dir / f"seed_{seed}"
        seconds = make_model(folder, videos, recipe, seed)
        errors.append(forecasts(folder / "evaluation", "relative_to_copy_last", HORIZONS))
        measures.append(compare_with_the_best(folder / "evaluation") | seconds)
    write_json(options.output_dir / "results.json", {"errors": errors, "measures": measures})
    print(table_by_horizon(errors, HORIZONS), table_of_measures({"": measures}), sep="\n\n")


def compare_with_the_best(evaluation: Path) -> dict[str, float]:
    """The forecast's error relative to the best simple guess at each horizon, and to ridge regression's."""
    found = forecasts(evaluation, "relative_to_copy_last", EVERY_HORIZON)
    model = np.array(found["model"])
    best = np.min([found[name] for name in SIMPLE], axis=0)
    return {
        "of the best simple guess, worst horizon": float((model / best).max()),
        **{f"of the best simple guess, {horizon} ahead": float(model[horizon - 1] / best[horizon - 1])
           for horizon in HORIZONS},
        "of ridge, mean over horizons": float((model / found["ridge"]).mean()),
    }  # fmt: skip


if __name__ == "__main__":
    run_command(main, Options)
