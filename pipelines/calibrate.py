r"""Calibrate a predictor anew, on other validation videos than it was trained with.

  video-jepa calibrate --predictor runs/predictor --cache cache/more

Replaces `calibration/` beside the predictor: how far to believe its rollouts, what errors are usual, what is ordinary.
The more clips, the more its percentiles say. `train_predictor` has done this on its validation cache.
"""

from dataclasses import dataclass
from pathlib import Path

from data.files import hold, require_no_links
from jepa.config import Bounded, PositiveInt
from pipelines.run.artefacts import save_artefact
from pipelines.run.caches import clips_in_short
from pipelines.run.command import require, run_command
from pipelines.run.devices import start_accelerator
from pipelines.run.judging import calibrate
from pipelines.run.models import calibration_artefact, load_predictor, open_cache, trained_on


@dataclass(frozen=True)
class Options(Bounded):
    """Calibrate a predictor anew."""

    predictor: Path = Path("runs/predictor")
    """Run folder of train_predictor."""
    cache: Path = Path("cache/val")
    """Embeddings of ordinary videos that the predictor was not trained on."""
    horizon: PositiveInt = 20
    """Ticks ahead that get numbers of their own."""


def main(options: Options) -> None:
    """Load, forecast ordinary video, fit, replace the calibration."""
    folder = options.predictor
    predictor, before = load_predictor(folder, start_accelerator().device)
    require_no_links(folder, ("calibration",))
    with hold(folder):
        cache = open_cache(options.cache, predictor)
        clips = clips_in_short(cache)
        said = f"{folder} was trained on {options.cache}, whose errors are not usual ones: take other videos"
        require(clips != trained_on(folder), said)
        calibration, said = calibrate(predictor, before.ridge, cache, horizon=options.horizon)
        save_artefact(folder / "calibration", *calibration_artefact(calibration, predictor, clips))
        print(f"{said}\nwrote {folder}/calibration")


if __name__ == "__main__":
    run_command(main, Options)
