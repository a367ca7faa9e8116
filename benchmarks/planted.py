r"""Is what was planted seen, and where it was planted? Events in ordinary videos, to choose settings by.

  python -m benchmarks.planted --output-dir runs/benchmarks/planted

Into each ordinary video, by default the training clips of UCSD Ped2, events of seven kinds are planted, each for three
seconds: cut-outs of people of that clip, found by what differs from its median, who go faster or backwards, glide
without a gait (one or three), walk where nobody does, or are larger, and patches of another video. The clips are held
out a part at a time; of the others every fourth calibrates and the rest are learned from, by ridge regression or, with
`--predictor-options`, by `video-jepa train`. For each setting of what tells a moment: the area under the ROC curve
between moments with and without an event, pooled over all clips, by kind, for the believed forecast, copying, and the
Mahalanobis distance; and, above thresholds that ordinary moments pass rarely, the share of the moments of events that
are there, and of these the share whose highest cell lies on the event (`on it`).
Settings whose mean over kinds is within the paired interval of the best's are marked. No label of a test is looked at.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as functional
from PIL import Image, ImageDraw
from scipy import ndimage
from torch import Tensor
from tqdm import tqdm

from benchmarks.common import markdown, shared, train_on, write_results
from benchmarks.ped2 import Options as Walkway
from benchmarks.ped2 import cached, videos_in
from data.clock import read_on_clock
from data.video import probe_video
from jepa.baselines import Ridge
from jepa.calibration import Calibration
from jepa.config import Bounded, NotNegativeInt, PositiveInt
from jepa.encoder import Encoder
from jepa.fitting import Forecasts, cross_fit_energy, fit_calibration, fit_ridge, hold_out
from jepa.predictor import Predictor
from jepa.rollout import rollout
from jepa.sequence import Sequence
from pipelines.run.command import run_command
from pipelines.run.encoders import load_encoder
from pipelines.run.models import load_predictor

SECONDS = 3.0
"""How long an event is there."""
DIFFERS, SMALLEST, LARGEST = 20, 120, 1500
"""What is a person: levels of grey away from the median, and pixels."""
KINDS = ("faster", "backwards", "glides", "place", "larger", "elsewhere", "several")
CONTEXT, HORIZON = 4, 4
SIDES, SHARES = (1, 3, 5, 7), (0.003, 0.01, 0.03, 0.1, 0.2)
HORIZONS = ((1, 2, 3, 4), (2, 3, 4), (2, 3))
SMOOTHING_S = (0.0, 0.5, 1.0)
LEVELS = (0.95, 0.99, 0.999)
"""Shares of the moments without an event below a threshold."""
GRID, RESAMPLES = (15, 22), 1000

Cut = tuple[np.ndarray, np.ndarray]
"""What is pasted: pixels float32 (3, h, w), and opacity (h, w)."""


@dataclass(frozen=True)
class Options(Bounded):
    """Events that are planted in ordinary videos."""

    train: Path | None = None
    """Folder of ordinary videos; by default Ped2's."""
    encoder: Path = Path("runs/benchmarks/ped2/cache/train/encoder")
    """Encoder of a grid, as a run of `benchmarks/ped2.py` leaves one."""
    folds: PositiveInt = 4
    """Parts that the videos are held out in."""
    draws: PositiveInt = 2
    """Events of each kind in each video."""
    every: PositiveInt = 1
    """Moments that are passed over; all if 1."""
    seed: NotNegativeInt = 0
    """Of what is planted, and of predictors."""
    predictors: str = ""
    """Options of `train_predictor`, to train one for each part; none: ridge regression."""
    output_dir: Path = Path("runs/benchmarks/planted")
    """Where pictures, predictors and results are left."""


def main(options: Options) -> None:
    """The story: plant, embed, learn from the other videos, score by each setting, compare."""
    folder, videos = options.output_dir, videos_in(options.train or shared("ped2") / "train")
    folder.mkdir(parents=True, exist_ok=True)
    fps = probe_video(videos[0]).average_fps
    plain, events = made(options, videos, round(SECONDS * fps))
    stride, told = round(fps / Walkway().fps), dict[str, list[Told | None]]()
    parts = np.array_split(np.arange(len(videos)), options.folds)
    for number, held_out in enumerate(tqdm(parts, desc="parts", leave=False)):
        known = [clip for clip in range(len(videos)) if clip not in held_out]
        learned = train_without(options, [videos[clip] for clip in known], folder / f"part_{number}")
        measure, units = contestants(plain, known, stride, learned)
        for clip in held_out:
            mine = [place for place, event in enumerate(events) if event.clip == clip]
            answers = listen(measure, plain[clip], [events[place] for place in mine], stride, options.every)
            for place, answer in zip(mine, answers, strict=True):
                for name, (energies, cells) in answer.items():
                    told.setdefault(name, [None] * len(events))[place] = Told(energies / units[name].numpy(), cells)
    results = {name: compare(events, one, stride, options.every) for name, one in told.items()}
    write_results(folder, results)
    for name, found in results.items():
        print(f"\n{name}\n\n{table(found)}")


def made(options: Options, videos: list[Path], length: int) -> tuple[list[np.ndarray], list["Event"]]:
    """Embeddings of each clip as it is, and of the frames of each event; made once."""
    kept = options.output_dir / "embedded.pt"
    if kept.exists():
        plain, events = torch.load(kept, weights_only=True)
        return [one.numpy() for one in plain], [
            Event(*rest, boxes.numpy(), embedded.numpy()) for *rest, boxes, embedded in events
        ]
    encoder = load_encoder(options.encoder)
    clips = [read_clip(video, encoder.image_size) for video in videos]
    people = [find_people(frames) for frames in clips]
    plain = [embed(encoder, frames) for frames in tqdm(clips, desc="embedding", leave=False)]
    todo = list(itertools.product(KINDS, range(options.draws), range(len(clips))))
    events, pictures = list[Event](), dict[str, np.ndarray]()
    for kind, draw, clip in tqdm(todo, desc="planting", leave=False):
        generator = np.random.default_rng([options.seed, KINDS.index(kind), draw, clip])
        trodden = sum(where for other, (_, where) in enumerate(people) if other != clip)
        frames, first, boxes = plant(kind, clips[clip], people[clip][0], trodden, generator=generator, length=length)
        events.append(Event(kind, clip, first, boxes, embed(encoder, frames)))
        pictures.setdefault(kind, drawn(frames, boxes))
    Image.fromarray(np.concatenate(list(pictures.values()))).save(options.output_dir / "planted.png")
    tensors = [(*event[:3], *map(torch.from_numpy, event[3:])) for event in events]
    torch.save(([torch.from_numpy(one) for one in plain], tensors), kept)
    return plain, events


# Planting


class Person(NamedTuple):
    """Cut-outs of a person in consecutive frames: pixels (3, h, w) and opacity (h, w); and centres (n, 2)."""

    cuts: list[Cut]
    centres: np.ndarray

    @property
    def pace(self) -> np.ndarray:
        """Pixels a frame, down and to the right."""
        return (self.centres[-1] - self.centres[0]) / (len(self.centres) - 1)


def read_clip(video: Path, size: tuple[int, int]) -> np.ndarray:
    """Its frames, uint8 (T, 3, H, W)."""
    return np.stack([one.frame for one in read_on_clock(video, size, fps=probe_video(video).average_fps)])


def find_people(frames: np.ndarray) -> tuple[list[Person], np.ndarray]:
    """Those that walk by themselves for two seconds, the farthest first; and how often there is someone, (H, W)."""
    grey = frames.mean(axis=1)
    differs = np.abs(grey - np.median(grey, axis=0)) > DIFFERS
    masks = [ndimage.binary_opening(ndimage.binary_closing(mask, iterations=2)) for mask in differs]
    labels = [ndimage.label(mask)[0] for mask in masks]
    people, seen = [], set[tuple[int, int]]()
    for first in range(0, len(frames) - 20, 5):
        for label in range(1, labels[first].max() + 1):
            track = [label] if (first, label) not in seen and is_person(labels[first] == label) else []
            while track and first + len(track) < len(frames):
                mask, now = labels[first + len(track) - 1] == track[-1], labels[first + len(track)]
                below = np.bincount(now[mask])
                below[0] = 0
                ratio = (now == below.argmax()).sum() / mask.sum() if below.any() else 0
                if not 0.6 < ratio < 1.6 or not is_person(now == below.argmax()):
                    break
                track.append(int(below.argmax()))
            seen |= {(first + step, one) for step, one in enumerate(track)}
            if len(track) >= 20:
                people.append(cut_out(frames[first:], [labels[first + step] == one for step, one in enumerate(track)]))
    walking = [person for person in people if abs(person.pace[1]) > 0.4]
    return sorted(walking, key=lambda one: -abs(np.subtract(*one.centres[[0, -1], 1]))), np.mean(masks, axis=0)


def is_person(mask: np.ndarray) -> bool:
    """Whether it is as large as one, and inside the picture."""
    return SMALLEST < mask.sum() < LARGEST and not (mask[[0, -1]].any() or mask[:, [0, -1]].any())


def cut_out(frames: np.ndarray, masks: list[np.ndarray]) -> Person:
    """What is in the masks, one a frame, with soft edges."""
    cuts, centres = [], []
    for frame, mask in zip(frames, masks, strict=False):
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        box = slice(max(0, rows[0] - 3), rows[-1] + 4), slice(max(0, columns[0] - 3), columns[-1] + 4)
        opacity = ndimage.gaussian_filter(ndimage.binary_dilation(mask[box], iterations=1).astype(np.float32), 0.8)
        cuts.append((frame[:, box[0], box[1]].astype(np.float32), opacity))
        centres.append([(rows[0] + rows[-1]) / 2, (columns[0] + columns[-1]) / 2])
    return Person(cuts, np.array(centres))


def plant(
    kind: str, frames: np.ndarray, people: list[Person], trodden: np.ndarray, *,
    generator: np.random.Generator, length: int,
) -> tuple[np.ndarray, int, np.ndarray]:  # fmt: skip
    """Frames with an event (length, 3, H, W), the first of them, and boxes (things, length, 4), in shares."""
    size, first = np.array(frames.shape[2:]), int(generator.integers(5, len(frames) - length - 5))
    shown, boxes = frames[first : first + length].astype(np.float32), []
    for _ in range(3 if kind == "several" else 1):
        person = people[int(generator.integers(min(len(people), 6)))]
        way = np.array([0.0, person.pace[1]])
        cuts, row = person.cuts, person.centres[:, 0].mean() + generator.uniform(-6, 6)
        if kind == "faster":
            factor = generator.uniform(1.5, 3)
            cuts, way = [cuts[int(step * factor) % len(cuts)] for step in range(length)], way * factor
        elif kind == "backwards":
            cuts, way = cuts[::-1], -way
        elif kind in ("glides", "several"):
            cuts, way = [cuts[len(cuts) // 2]], way * generator.uniform(1.2, 2.5)
        elif kind == "larger":
            cuts = enlarge(cuts, generator.uniform(1.3, 2))
        elif kind == "elsewhere":
            cuts, way = [from_elsewhere(generator)], way * generator.uniform(1, 2)
        elif kind == "place":
            row = untrodden_row(trodden, cuts[0][1].shape[0], generator)
        path = walk(way, cuts, size, row, length=length, generator=generator)
        boxes.append([paste(shown[step], cuts[step % len(cuts)], place) for step, place in enumerate(path)])
    return shown.round().astype(np.uint8), first, np.array(boxes)


def enlarge(cuts: list[Cut], factor: float) -> list[Cut]:
    """The same, so many times as large."""
    return [(ndimage.zoom(pixels, (1, factor, factor), order=1), ndimage.zoom(opacity, factor, order=1))
            for pixels, opacity in cuts]  # fmt: skip


def from_elsewhere(generator: np.random.Generator) -> Cut:
    """A patch of a driving simulator, as grey as the walkway, of a person's to a cart's size, with soft edges."""
    height, width = int(generator.integers(30, 51)), int(generator.integers(18, 61))
    start_s = float(generator.uniform(0, 60))
    frame = next(iter(read_on_clock(shared("driving") / "b_01.mp4", (160, 320), fps=4, start_s=start_s))).frame
    top, left = int(generator.integers(40, 150 - height)), int(generator.integers(0, 320 - width))
    grey = frame[:, top : top + height, left : left + width].mean(axis=0, keepdims=True).astype(np.float32)
    inside = np.pad(np.ones((height - 4, width - 4), np.float32), 2)
    return grey.repeat(3, axis=0), ndimage.gaussian_filter(inside, 0.8)


def untrodden_row(trodden: np.ndarray, height: int, generator: np.random.Generator) -> float:
    """The middle of a row in which hardly anyone walks in other clips."""
    half = height // 2 + 1
    often = trodden.mean(axis=1)
    rows = np.arange(half + 20, len(often) - half)  # below the uppermost, where there are trees
    busiest = np.array([often[row - half : row + half].max() for row in rows])
    free = rows[busiest <= max(0.05 * often.max(), float(busiest.min()))]
    return float(generator.choice(free))


def walk(
    way: np.ndarray, cuts: list[Cut], size: np.ndarray, row: float, *,
    length: int, generator: np.random.Generator,
) -> np.ndarray:  # fmt: skip
    """Centres (length, 2) in a row, inside the picture as far as the way is short enough."""
    margin = max(cut[1].shape[1] for cut in cuts) / 2
    room = max(0.0, size[1] - 2 * margin - abs(way[1]) * length)
    start = margin + generator.uniform(0, room) + (0 if way[1] > 0 else abs(way[1]) * length)
    return np.stack([np.full(length, row), start + way[1] * np.arange(length)], axis=1)


def paste(frame: np.ndarray, cut: Cut, centre: np.ndarray) -> list[float]:
    """Into a frame float (3, H, W), in place; where it is now."""
    pixels, opacity = cut
    size, shape = np.array(frame.shape[1:]), np.array(opacity.shape)
    corner = np.round(centre - shape / 2).astype(int)
    low, high = corner.clip(0, size), (corner + shape).clip(0, size)
    inner = tuple(slice(*ends) for ends in zip(low - corner, high - corner, strict=True))
    outer = tuple(slice(*ends) for ends in zip(low, high, strict=True))
    part = frame[:, outer[0], outer[1]]
    part += opacity[inner] * (pixels[:, inner[0], inner[1]] - part)
    return [*(low / size), *(high / size)]


def drawn(frames: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """A moment of an event with a box around it, beside it two seconds of it, uint8 (H, 3 W, 3)."""
    shown = [frames[step].transpose(1, 2, 0).copy() for step in (0, len(frames) // 2, -1)]
    picture = Image.fromarray(shown[1])
    for box in boxes[:, len(frames) // 2]:
        corners = box.reshape(2, 2)[:, ::-1] * picture.size
        ImageDraw.Draw(picture).rectangle([tuple(corner) for corner in corners.tolist()], outline="red")
    return np.concatenate([shown[0], np.asarray(picture), shown[2]], axis=1)


# Learning and scoring


class Event(NamedTuple):
    """A planted event: its kind, its clip, the first of its frames, boxes (things, n, 4) and embeddings (n, ...)."""

    kind: str
    clip: int
    first: int
    boxes: np.ndarray
    embeddings: np.ndarray

    def in_clip(self, plain: np.ndarray) -> np.ndarray:
        """Embeddings of the clip with the event."""
        return np.concatenate([plain[: self.first], self.embeddings, plain[self.first + len(self.embeddings) :]])


def embed(encoder: Encoder, frames: np.ndarray) -> np.ndarray:
    """Embeddings of frames uint8 (n, 3, H, W), float16 (n, rows, columns, D), as caches keep them."""
    parts = torch.from_numpy(frames)[:, None].split(16)
    return torch.cat([encoder.embed(part) for part in parts]).half().numpy()


def windows(embeddings: np.ndarray, starts: np.ndarray, stride: int, length: int = CONTEXT + HORIZON) -> Tensor:
    """Windows float32 (N, length, rows, columns, D), every so many frames."""
    return torch.from_numpy(embeddings[starts[:, None] + stride * np.arange(length)]).float()


def train_without(options: Options, videos: list[Path], folder: Path) -> tuple[Predictor, Calibration] | None:
    """A predictor that was trained on some of these videos and calibrated on the others, if one is asked for."""
    if not options.predictors:
        return None
    splits = {"train": [one for number, one in enumerate(videos) if number % 4], "val": videos[::4]}
    walkway = Walkway(encoder_options=f"--encoder {options.encoder.absolute()} --batch-size 16")
    cached(folder, splits, walkway)
    train_on(folder / "cache", folder / "predictor", options.predictors.split(), {"seed": options.seed})
    return load_predictor(folder / "predictor")


Measure = Callable[[Tensor], dict[str, Tensor]]
"""From windows (N, CONTEXT + HORIZON, ...) to energies of places (N, HORIZON, rows, columns) by name."""


def contestants(
    plain: list[np.ndarray], known: list[int], stride: int, learned: tuple[Predictor, Calibration] | None
) -> tuple[Measure, dict[str, Tensor]]:
    """What forecasts, learned from some clips, and what of them is usual in the calibrating ones, by setting."""
    calibrating = known[::4]
    learning = [clip for clip in known if clip not in calibrating]
    starts = {clip: np.arange(len(plain[clip]) - stride * (CONTEXT + HORIZON - 1)) for clip in known}
    some = torch.cat([torch.from_numpy(plain[clip][::8]).float().flatten(0, 2) for clip in learning])
    mean, std = some.mean(dim=0), some.std(dim=0)
    empty = Ridge(Walkway().fps, CONTEXT, mean=mean, std=std, on_grid=True)
    batches = (windows(plain[clip], starts[clip][::12], stride, CONTEXT + 1) for clip in learning)
    (ridge,) = fit_ridge(batches, empty, [1e-2])
    step = max(1, sum(len(starts[clip]) for clip in calibrating) // 216)
    seen = torch.cat([windows(plain[clip], starts[clip][::step], stride) for clip in calibrating])
    groups = np.repeat(calibrating, [len(starts[clip][::step]) for clip in calibrating])
    past, future, came = Sequence.on_clock(seen, ridge.fps).cut(CONTEXT, ridge.fps)
    ridged = rollout(ridge, past, future)
    forecasts = Forecasts(*((part - mean) / std for part in (ridged, ridged, past.embeddings[:, -1:], came)), groups)
    believed, copying = fit_calibration(ridge, forecasts), Calibration(ridge, HORIZON)
    copying.blend.copy_(torch.tensor([0.0, 0.0, 1.0, 0.0]).expand(HORIZON, 4))
    for ahead in range(HORIZON):
        usual, _ = cross_fit_energy(forecasts.errors(ahead)[2], hold_out(groups))
        copying.error_mean[ahead], copying.whitening[ahead] = usual

    @torch.no_grad()
    def measure(seen: Tensor) -> dict[str, Tensor]:
        ticks = torch.arange(1, HORIZON + 1)
        past, future, came = Sequence.on_clock(seen, ridge.fps).cut(CONTEXT, ridge.fps)
        rolled = rollout(ridge, past, future)
        found = {name: one.energy_map(one.believe(rolled, rolled, past, ticks), came, ticks)
                 for name, one in {"ridge": believed, "copying": copying}.items()}  # fmt: skip
        if learned:
            predictor, calibration = learned
            found["model"] = calibration.energy_map(
                rollout(predictor, past, future, calibration=calibration), came, ticks
            )
        return found

    return measure, {name: tell(maps)[0].mean(dim=0) for name, maps in measure(seen).items()}


def tell(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Energies (N, HORIZON, sides, shares) of maps (N, HORIZON, rows, columns); the highest cells (N, sides, 2)."""
    energies, cells = [], []
    for side in SIDES:
        near = functional.avg_pool2d(maps, side, stride=1, padding=side // 2, count_include_pad=False)
        ordered = near.flatten(2).sort(dim=2, descending=True).values.cumsum(dim=2)
        counts = [max(1, round(ordered.shape[2] * share)) for share in SHARES]
        energies.append(torch.stack([ordered[..., count - 1] / count for count in counts], dim=-1))
        highest = near.mean(dim=1).flatten(1).argmax(dim=1)
        cells.append(torch.stack([highest // maps.shape[3], highest % maps.shape[3]], dim=-1))
    return torch.stack(energies, dim=2), torch.stack(cells, dim=1)


class Told(NamedTuple):
    """What is said of a clip with an event: energies (N, HORIZON, sides, shares), highest cells (N, sides, 2)."""

    energies: np.ndarray
    cells: np.ndarray


def listen(
    measure: Measure, plain: np.ndarray, events: list[Event], stride: int, every: int
) -> list[dict[str, Told]]:  # fmt: skip
    """What is said of a clip with each event; only windows that see it are scored anew."""
    starts = np.arange(0, len(plain) - stride * (CONTEXT + HORIZON - 1), every)

    def told(embeddings: np.ndarray, chosen: np.ndarray) -> dict[str, Told]:
        maps = [measure(windows(embeddings, part, stride)) for part in np.array_split(chosen, -(-len(chosen) // 32))]
        return {
            name: Told(*(part.numpy() for part in tell(torch.cat([one[name] for one in maps])))) for name in maps[0]
        }

    without, found = told(plain, starts), []
    for event in events:
        sees = starts + stride * (CONTEXT + HORIZON - 1) >= event.first
        sees &= starts < event.first + len(event.embeddings)
        anew, both = told(event.in_clip(plain), starts[sees]), dict[str, Told]()
        for name, old in without.items():
            both[name] = Told(*(part.copy() for part in old))
            for part, new in zip(both[name], anew[name], strict=True):
                part[sees] = new
        found.append(both)
    return found


# Judgement


def compare(events: list[Event], told: list[Told | None], stride: int, every: int) -> list[dict[str, Any]]:
    """Each setting: areas under the curve by kind and their mean, the best first, and what the best is ahead by."""
    clips, found = 1 + max(event.clip for event in events), []
    weights = np.random.default_rng(0).multinomial(clips, np.full(clips, 1 / clips), size=RESAMPLES)
    settings = itertools.product(range(len(SIDES)), range(len(SHARES)), HORIZONS, SMOOTHING_S)
    for side, share, horizons, smoothing_s in settings:
        judged, resampled, on_it = {}, [], {}
        middle = stride * (CONTEXT + round(sum(horizons) / len(horizons)) - 1)
        for kind in KINDS:
            positives, negatives = [[] for _ in range(clips)], [[] for _ in range(clips)]
            places, loud = [], []
            for event, said in zip(events, told, strict=True):
                if event.kind != kind or said is None:
                    continue
                energy = said.energies[:, [ahead - 1 for ahead in horizons], side, share].mean(axis=1)
                energy = trailing_mean(energy, max(1, round(smoothing_s * stride * Walkway().fps / every)))
                moments = every * np.arange(len(energy)) + middle
                there = (moments >= event.first) & (moments < event.first + len(event.embeddings))
                positives[event.clip].append(energy[there])
                negatives[event.clip].append(energy[~there])
                places.append(is_on(said.cells[there, side], event.boxes[:, moments[there] - event.first]))
                loud.append(energy[there])
            pairs = wins(list(map(np.concatenate, positives)), list(map(np.concatenate, negatives)))
            judged[kind], ordinary = (
                area(pairs, np.ones((1, clips)))[0],
                np.concatenate(list(itertools.chain(*negatives))),
            )
            on, energies = np.concatenate(places), np.concatenate(loud)
            above = {f"{level:g}": on[energies > np.quantile(ordinary, level)] for level in LEVELS}
            on_it[kind] = {level: [len(one) / len(on), one.sum() / max(1, len(one))] for level, one in above.items()}
            resampled.append(area(pairs, weights))
        found.append({
            "side": SIDES[side], "share": SHARES[share], "horizons": horizons, "smoothing_s": smoothing_s,
            "mean": np.mean(list(judged.values())), "worst": min(judged.values()), "kinds": judged, "on it": on_it,
            "resampled": np.mean(resampled, axis=0),
        })  # fmt: skip
    found.sort(key=lambda one: -one["mean"])
    best = found[0]["resampled"]
    for one in found:
        one["interval"] = np.quantile(one["resampled"], [0.025, 0.975]).tolist()
        one["behind"] = np.quantile(best - one["resampled"], [0.025, 0.975]).tolist()
        one["alike"] = bool(one["behind"][0] <= 0)
    return [{name: value for name, value in one.items() if name != "resampled"} for one in found]


def trailing_mean(energies: np.ndarray, length: int) -> np.ndarray:
    """The mean of each and those before it, (N,) to the same shape."""
    sums = np.concatenate([np.zeros(1), energies.cumsum(dtype=np.float64)])
    ends = np.arange(1, len(energies) + 1)
    begins = (ends - length).clip(0)
    return (sums[ends] - sums[begins]) / (ends - begins)


def is_on(cells: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Whether cells (N, 2) of the grid touch one of the boxes (things, N, 4) or are next to one."""
    grid = np.array(GRID)
    low, high = boxes[..., :2] * grid - 1, boxes[..., 2:] * grid + 1
    return ((cells + 0.5 >= low) & (cells + 0.5 <= high)).all(axis=-1).any(axis=0)


def wins(positives: list[np.ndarray], negatives: list[np.ndarray]) -> np.ndarray:
    """Of each pair of clips how many pairs of moments are in the right order, and how many there are, (2, C, C)."""
    found = np.zeros((2, len(positives), len(negatives)))
    for column, ordinary in enumerate(map(np.sort, negatives)):
        for row, planted in enumerate(positives):
            below = [np.searchsorted(ordinary, planted, side).sum() for side in ("left", "right")]
            found[:, row, column] = np.mean(below), len(planted) * len(ordinary)
    return found


def area(pairs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Areas under the curve of clips with some weights (N, C), (N,)."""
    right, all_of_them = np.einsum("nr,krc,nc->kn", weights, pairs, weights)
    return right / all_of_them


def table(found: list[dict[str, Any]]) -> str:
    """The twelve best and the one of today, in Markdown."""
    heads = ["side", "share", "horizons", "smoothing", "mean", "best ahead by", "worst", *KINDS]
    rows = []
    for one in found[:12]:
        behind = "{:.3f} to {:.3f}".format(*one["behind"])
        setting = [one["side"], str(one["share"]), " ".join(map(str, one["horizons"])), str(one["smoothing_s"])]
        rows.append([*setting, one["mean"], behind, one["worst"], *one["kinds"].values()])
    return markdown([heads, *rows])


if __name__ == "__main__":
    run_command(main, Options)
