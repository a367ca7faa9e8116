"""Does a decoded future show what came? PSNR beside copying, and, of balls, where they are in the picture.

  python -m benchmarks.decoded --run demo --balls
  python -m benchmarks.decoded --run runs/robot

Of test windows, at each horizon: PSNR in dB, of the mean squared error, of decoded forecasts, of decoded true
embeddings, which is the best that the decoder can show, of the last embedding decoded and of the last frame. With
--balls also the share of windows in which the centroid of each ball's colour is within three pixels of where the ball
was. The bar: at horizon 5 at least .9 of the share of decoded true embeddings.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.frames import read_frames
from data.synthetic import BALL_COLOURS, STATE_COLUMNS
from jepa.config import Bounded, PositiveInt
from pipelines.imagine import DECODED, Dreams, load_decoder
from pipelines.run.command import run_command
from pipelines.run.evaluation import read_columns
from pipelines.run.files import write_json
from pipelines.run.models import in_batches, load_predictor, open_cache, windows_for

NEAR, GREY = 3.0, 0.4
"""Pixels; the mean of backgrounds."""


@dataclass(frozen=True)
class Options(Bounded):
    """Judge decoded futures."""

    run: Path = Path("demo")
    """Folder of `video-jepa demo` or `video-jepa all`."""
    horizon: PositiveInt = 20
    """Steps into the future."""
    windows: PositiveInt = 1000
    """Rollouts at most, evenly over the test cache."""
    balls: bool = False
    """Look for the balls."""


def main(options: Options) -> None:
    """Decode, compare, print."""
    predictor, calibration = load_predictor(options.run / "predictor")
    decoder, context = load_decoder(options.run / "decoder", predictor), predictor.config.context
    cache = open_cache(options.run / "cache" / "test", predictor)
    windows = windows_for(cache, predictor, context + options.horizon)
    dreams, chosen = Dreams(predictor, calibration, decoder, windows), windows.evenly(options.windows)
    errors, near = defaultdict[str, list[Tensor]](list), defaultdict[str, list[Tensor]](list)
    for part, taken in in_batches(windows, chosen, torch.device("cpu"), doing="decoding"):
        real = torch.from_numpy(read_frames(cache, windows.rows(chosen[part])[:, context - 1 :], decoder.size)) / 255
        came, last = taken.embeddings[:, context:], taken.embeddings[:, context - 1 : context]
        ways = {DECODED: came, **dreams.futures(taken, chosen[part]), "the last embedding, decoded": last}
        shown = {name: dreams.decode(one).expand_as(real[:, 1:]) for name, one in ways.items()}
        for name, pictures in (shown | {"the last frame": real[:, :1]}).items():
            errors[name].append((pictures - real[:, 1:]).square().flatten(2).mean(dim=2))
        for name, pictures in shown.items() if options.balls else ():
            where = read_columns(windows, chosen[part], STATE_COLUMNS)[:, context:].unflatten(2, (2, 2))
            off = (positions(pictures, decoder.mean_picture) - where).norm(dim=3)  # (B, H, balls)
            near[name].append((off <= NEAR).all(dim=2).double())
    psnr = {name: (-10 * torch.cat(parts).mean(dim=0).log10()).tolist() for name, parts in errors.items()}
    shares = {name: torch.cat(parts).mean(dim=0).tolist() for name, parts in near.items()}
    write_json(options.run / "decoded.json", {"windows": len(chosen), "psnr": psnr, "near": shares})
    steps = [step for step in (1, 5, 10, 15, 20) if step <= options.horizon]
    for title, table in {f"PSNR in dB, {len(chosen)} windows": psnr, "both balls within 3 pixels": shares}.items():
        print(f"{title:42}" + "".join(f"{step:>8}" for step in steps) if table else "")
        for name, values in table.items():
            print(f"  {name:40}" + "".join(f"{values[step - 1]:8.3f}" for step in steps))


def positions(pictures: Tensor, mean_picture: Tensor) -> Tensor:
    """Centroids (..., balls, xy) in pixels of where each ball's colour is at least half as strong as anywhere."""
    directions = torch.from_numpy(BALL_COLOURS - GREY).to(pictures)  # (balls, 3)
    strength = torch.einsum("bc, ...chw -> ...bhw", torch.linalg.pinv(directions).T, pictures - mean_picture)
    weight = (strength - strength.amax(dim=(-2, -1), keepdim=True) / 2).clamp_min(0)
    weight = weight / weight.sum(dim=(-2, -1), keepdim=True).clamp_min(1e-9)
    places = torch.arange(pictures.shape[-1]) + 0.5
    return torch.stack([(weight.sum(dim=axis) * places).sum(dim=-1) for axis in (-2, -1)], dim=-1)


if __name__ == "__main__":
    run_command(main, Options)
