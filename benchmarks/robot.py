r"""Little data: a robot's arms, 48 short episodes. Is anything gained over simple guesses, at every horizon?

  python -m benchmarks.robot --seeds 0 1 2

Needs the episodes in `$JEPA_SHARED/robot`. The last eight are the test, the eight before them choose and calibrate; all
options but the clock, the frames' size and the number of steps are defaults. Prints the error relative to copying of
the believed forecast and of its rivals, and that of the forecast relative to the best of copying, ridge and the mean,
which nobody could know beforehand.
"""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import Figures, Recipe, SeedOptions, figures, make_model, measure_seeds, shared
from pipelines.run.command import require, run_command

EPISODES, HELD_OUT = 64, 8
RECIPE = Recipe(fps=5, encoder={"encoder.image-size": (96, 128), "steps": 500}, predictor={"steps": 400})


@dataclass(frozen=True)
class Options(SeedOptions):
    """A robot's arms, several seeds; the episodes are the same."""

    output_dir: Path = Path("runs/benchmarks/robot")
    """Where all runs and the results are left."""


def main(options: Options) -> None:
    """The story: divide the episodes, make a model of each seed, compare."""
    episodes = sorted(shared("robot").glob("*.mp4"))
    require(len(episodes) == EPISODES, f"{shared('robot')} holds {len(episodes)} episodes, not {EPISODES}")
    videos = {
        "train": episodes[: -2 * HELD_OUT],
        "val": episodes[-2 * HELD_OUT : -HELD_OUT],
        "test": episodes[-HELD_OUT:],
    }

    def measure(seed: int, folder: Path) -> Figures:
        return figures(make_model(folder, videos, RECIPE, seed))

    measure_seeds(options, measure)


if __name__ == "__main__":
    run_command(main, Options)
