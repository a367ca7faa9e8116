r"""Films of the imagined future: what came beside what was imagined, decoded, and the real frames nearest to that.

  video-jepa imagine --cache cache/test --predictor runs/predictor --decoder runs/decoder --output-dir runs/imagined

Each film shows a past, darker, and what follows it, in panels: the frames that came; their embeddings, decoded, which
is the best that the decoder can show; the imagined embeddings, decoded; and the real frames nearest to these. Of a
predictor with actions, also what the same past leads to with another video's actions and with mean ones. Leaves
`films/` and `imagined.json`. `video-jepa report` plays them.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from data.frames import fitting_size, read_frames
from data.synthetic import write_video
from data.windows import Windows
from jepa.calibration import Calibration
from jepa.config import Bounded, PositiveInt
from jepa.picture_decoder import PictureDecoder
from jepa.predictor import Predictor
from jepa.rollout import rollout
from jepa.sequence import Sequence
from pipelines.run.artefacts import load_module
from pipelines.run.command import counted, require, run_command
from pipelines.run.devices import start_accelerator
from pipelines.run.files import write_json
from pipelines.run.folder import RunFolder
from pipelines.run.models import in_batches, inputs_of, load_predictor, open_cache, windows_for
from pipelines.run.searching import Search

CAME, DECODED, IMAGINED, NEAREST = "what came", "its embeddings, decoded", "imagined, decoded", "nearest real frames"
OTHERS, MEAN = "imagined with another video's actions", "imagined with mean actions"
PANEL = 160  # longer side of a panel in pixels


@dataclass(frozen=True)
class Options(Bounded):
    """Show what a predictor imagines."""

    cache: Path = Path("cache/test")
    """Embeddings of videos that served neither training nor the choice of the model."""
    predictor: Path = Path("runs/predictor")
    """Run folder of train_predictor: the predictor and its calibration."""
    decoder: Path = Path("runs/decoder")
    """Run folder of train_decoder."""
    among: Path = Path("cache/train")
    """Embeddings among which the nearest real frames are looked for."""
    output_dir: Path = Path("runs/imagined")
    """Where the films are left."""
    films: PositiveInt = 8
    """Films, evenly over the cache."""
    horizon: PositiveInt = 20
    """Steps into the future."""
    overwrite: bool = False
    """Replace the films in the output folder."""


def main(options: Options) -> None:
    """Forecast, decode, look for the nearest frames, write films."""
    folder, device = options.output_dir, start_accelerator().device
    output = RunFolder(options, "imagine", ("films", "imagined.json"))
    predictor, calibration = load_predictor(options.predictor, device)
    decoder = load_decoder(options.decoder, predictor)
    cache, among = open_cache(options.cache, predictor), open_cache(options.among, predictor)
    context = predictor.config.context
    windows = windows_for(cache, predictor, context + options.horizon)
    dreams = Dreams(predictor, calibration, decoder, windows)
    search = Search(among, mean=predictor.mean, std=predictor.std)
    output.begin(inputs_of(options.predictor, cache))
    (folder / "films").mkdir(exist_ok=True)
    films = []
    for number, chosen in enumerate(windows.evenly(options.films)[:, None]):
        size = fitting_size(Path(windows.videos(chosen)[0]), cache.provenance, (PANEL, PANEL))
        panels, nearest = dreams.panels(chosen, search, size)
        name, shown = f"film_{number:03}.mp4", [*panels.values()]
        shown += [np.zeros_like(shown[0])] * (len(shown) % 2)  # two beside each other
        rows = [np.concatenate(shown[first : first + 2], axis=2) for first in range(0, len(shown), 2)]
        write_video(folder / "films" / name, np.concatenate(rows, axis=1), predictor.fps)
        times_s = windows.column(chosen, "times_s")[0]
        found = {"film": name, "video": windows.videos(chosen)[0], "times_s": times_s, **nearest, "panels": [*panels]}
        films.append(found)
    write_json(folder / "imagined.json", {"fps": predictor.fps, "context": context, "films": films})
    output.finish({"films": len(films)})
    print(f"wrote {folder}/imagined.json and films, {counted(len(films), 'film')}. To see them in a page:")
    print(f"  video-jepa report --runs {options.predictor} {folder} --output-dir runs/report")


def load_decoder(folder: Path, predictor: Predictor) -> PictureDecoder:
    """The decoder of a run, where the predictor is. Raises `UserError` where it is of other embeddings."""
    decoder = load_module(folder / "decoder", "picture_decoder", lambda known: PictureDecoder(**known))
    is_same = (decoder.encoder_fingerprint, decoder.shape) == (predictor.encoder_fingerprint, predictor.shape)
    said = f"{folder} holds a decoder of another encoder's embeddings than the predictor's: train one on these"
    require(is_same, said)
    return decoder.to(predictor.mean.device)


class Dreams:
    """What a predictor imagines on windows of a cache, as embeddings and as pictures."""

    def __init__(
        self, predictor: Predictor, calibration: Calibration, decoder: PictureDecoder, windows: Windows
    ) -> None:
        self.predictor, self.calibration, self.decoder, self.windows = predictor, calibration, decoder, windows
        self.context, self.draws = predictor.config.context, np.random.default_rng(0)

    @torch.no_grad()
    def futures(self, taken: Sequence, chosen: np.ndarray) -> dict[str, Tensor]:
        """Imagined embeddings (B, H, *tokens, D) of windows (B, length), with their own actions and with others."""
        past, future, _ = taken.cut(self.context, self.predictor.fps)
        asked = {IMAGINED: future}
        if future.actions is not None:
            if len({clip.key.source for clip in self.windows.cache.clips}) > 1:
                others = self.windows.actions(self.windows.of_other_videos(chosen, self.draws))
                asked[OTHERS] = replace(future, actions=others[:, self.context - 1 : -1].to(future.actions))  # type: ignore[index]
            asked[MEAN] = replace(future, actions=self.predictor.action_mean.expand_as(future.actions))
        return {name: rollout(self.predictor, past, one, calibration=self.calibration) for name, one in asked.items()}

    @torch.no_grad()
    def decode(self, embeddings: Tensor) -> Tensor:
        """Pictures (B, T, 3, height, width) in [0, 1] of embeddings (B, T, *tokens, D)."""
        parts = [self.decoder(part).clamp(0, 1) for part in embeddings.flatten(0, 1).split(256)]
        return torch.cat(parts).unflatten(0, embeddings.shape[:2])

    def panels(
        self, chosen: np.ndarray, search: Search, size: tuple[int, int]
    ) -> tuple[dict[str, np.ndarray], dict[str, list[tuple[str, float, float]]]]:
        """Pictures of one window by panel, uint8 (T, height, width, 3), and `nearest`: videos, times, distances."""
        _, taken = next(in_batches(self.windows, chosen, self.predictor.mean.device))
        past, rows, among = taken.embeddings[:, : self.context], self.windows.rows(chosen)[0], search.cache
        ways = {name: torch.cat([past, one], dim=1) for name, one in self.futures(taken, chosen).items()}
        distances, found = (one[:, 0] for one in search.near(ways[IMAGINED][0], 1))
        decoded = {name: self.decode(one)[0] for name, one in ({DECODED: taken.embeddings} | ways).items()}
        shown = {name: functional.interpolate(one, size, mode="bilinear").cpu() for name, one in decoded.items()}
        real = {CAME: read_frames(self.windows.cache, rows, size), NEAREST: read_frames(among, found, size)}
        shown |= {name: torch.from_numpy(one) / 255 for name, one in real.items()}
        light = torch.where(torch.arange(len(rows)) < self.context, 0.55 * 255, 255).view(-1, 1, 1, 1)
        order = [name for name in (CAME, DECODED, IMAGINED, NEAREST, OTHERS, MEAN) if name in shown]
        panels = {name: (shown[name].movedim(1, 3) * light).round().byte().numpy() for name in order}
        sources = [among.clips[clip].key.source for clip in among.clip_of(found)]
        times_s = among.take(found, "times_s").tolist()
        return panels, {"nearest": [*zip(sources, times_s, distances.tolist(), strict=True)]}


if __name__ == "__main__":
    run_command(main, Options)
