r"""One page about finished runs: what was trained, how good it is, and what surprised it, under the videos themselves.

  video-jepa report --runs runs/encoder runs/predictor runs/evaluation runs/surprise --output-dir runs/report

Leaves `report.html`, of at most 25 MB, which needs no network and no other file: it may be sent, and opens from a disk.
Small films of the most surprising videos are in it, so mind to whom it goes. A click on a timeline or a row of a table
shows that moment. Takes `pip install 'video-jepa[report]'`.
"""

import base64
import csv
import json
import math
import shlex
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from data.decoder import Damage
from data.errors import DataError
from data.film import make_film
from data.manifest import Account
from jepa.config import Bounded, PositiveInt
from pipelines.run.command import UserError, counted, require, require_one_process, run_command
from pipelines.run.figures import curve_figures, skill_figure, skill_rows, timeline_figure
from pipelines.run.files import differences, flat, read_json, to_json, write_text
from pipelines.run.folder import RunFolder, read_mark
from pipelines.run.options import as_arguments
from pipelines.run.report import table

WORDS = {
    "pretrain_encoder": "pretrain",
    "train_predictor": "train",
    "evaluate_rollout": "evaluate",
    "score_surprise": "surprise",
}
"""Commands whose runs are shown, in this order."""
MOST_BYTES, FILM_FRAME_BYTES, VIDEO_BYTES = 25_000_000, 7_000, 150_000
"""Weight of the page, of a frame of a film at worst, in base64, and of the numbers of a video."""
AROUND_S = 5.0
"""Of a video that is too long for the page, so much is shown on either side of a moment."""
CURVE_POINTS = 2000
"""Moments of a timeline at most."""

Row = dict[str, float]


@dataclass(frozen=True)
class Options(Bounded):
    """Write a page about finished runs."""

    runs: tuple[Path, ...] = tuple(Path("runs", name) for name in ("encoder", "predictor", "evaluation", "surprise"))
    """Folders of finished runs of pretrain, train, evaluate and surprise, of each as many as are to be shown."""
    output_dir: Path = Path("runs/report")
    """Where report.html is left."""
    videos: PositiveInt = 12
    """Videos shown at most, the most surprising first."""
    overwrite: bool = False
    """Replace the page in the output folder."""


def main(options: Options) -> None:
    """Read the runs, cut the films, write the page."""
    require_one_process()
    template, script = page_template()
    output = RunFolder(options, "write_report", ("report.html",))
    found = [(folder, read_mark(folder)) for folder in options.runs]
    for folder, record in found:
        known = record.get("command") in WORDS and record["finished"]
        require(known, f"--runs {folder} holds no finished run of {', '.join(WORDS.values())}: name such folders")
    found.sort(key=lambda run: list(WORDS).index(run[1]["command"]))
    page: dict[str, Any] = {"runs": [], "curves": [], "skills": [], "surprises": []}
    left = MOST_BYTES - len(script) - 1_000_000  # for all that is neither library nor film
    for folder, record in found:
        with reading(folder):
            page["runs"].append(describe(folder, record))
            if (folder / "curve.jsonl").exists():
                page["curves"].append({"folder": folder, **collapse_of(folder)})
            if record["command"] == "evaluate_rollout":
                page["skills"].append({"folder": folder, **skill_of(folder)})
            if record["command"] == "score_surprise":
                surprise = surprise_of(folder, record, options.videos, left=left)
                left -= sum(len(video["film"]) for video in surprise["videos"])
                page["surprises"].append({"folder": folder, **surprise})
    text = template.render(page, script=script).encode(errors="backslashreplace").decode()  # names need not be UTF-8
    output.begin({str(folder): record["command"] for folder, record in found})
    write_text(options.output_dir / "report.html", text)
    videos = [video for surprise in page["surprises"] for video in surprise["videos"]]
    films = sum(bool(video["film"]) for video in videos)
    output.finish({"bytes": len(text.encode()), "videos": len(videos), "films": films})
    for video in videos:
        if not video["film"]:
            print(f"  no film of {video['name']}: {video['said']}")
    print(f"wrote {options.output_dir}/report.html, {len(text) / 1e6:.1f} MB, with {counted(films, 'film')}: open it")


def page_template() -> tuple[Any, str]:
    """The page to fill in, and the plotting library that goes into it."""
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from markupsafe import escape
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise UserError(f"report takes {error.name}: pip install 'video-jepa[report]'") from error
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["data"] = lambda value: escape(json.dumps(to_json(value)))
    return environment.get_template("report.html"), get_plotlyjs()


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Damage to what a run has left is one line."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, csv.Error) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"--runs {folder} is not as its run left it ({said}): restore it, or run it again") from error


def describe(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """What a run was: its command, and what its numbers must be traced back to."""
    options = record["options"]
    caches = {name: Path(path) for name, path in options.items() if name.endswith("cache") and path}
    read = {"what it read": folder, "its videos": folder / "cache"} | {
        f"--{name.replace('_', '-')} {path}": path for name, path in caches.items()
    }
    accounts = {title: account_of(path) for title, path in read.items() if (path / "account.json").is_file()}
    facts = {"seed": options.get("seed"), "steps": options.get("steps"), "commit": record["code"]}
    return {
        "folder": folder, "word": WORDS[record["command"]], "line": command_line(record), "accounts": accounts,
        "facts": {name: value for name, value in facts.items() if value is not None},
        "versions": {"machine": record["machine"], **record["versions"]},
        "inputs": flat(record["inputs"]), "metrics": flat(read_json(folder / "metrics.json")),
    }  # fmt: skip


def command_line(record: dict[str, Any]) -> str:
    """The command that a run was started by, with the options that are not the default."""
    kind = import_module(f"pipelines.{record['command']}").Options
    values = {
        one.name: one.default if one.default_factory is MISSING else one.default_factory() for one in fields(kind)
    }
    defaults = {name: to_json(value) for name, value in values.items() if value is not MISSING}
    given = {
        name: now
        for name, _, now in differences(defaults, record["options"])
        if now is not None and name not in ("overwrite", "resume")
    }
    return shlex.join(["video-jepa", WORDS[record["command"]], *as_arguments(given)])


def account_of(folder: Path) -> str:
    """What was read, refused and damaged, as the command said at its end."""
    known = read_json(folder / "account.json")
    damaged = {path: Damage(**faults) for path, faults in known.pop("damaged").items()}
    return str(Account(found=Counter(known.pop("found")), damaged=damaged, **known))


def collapse_of(folder: Path) -> dict[str, Any]:
    """Curves of a training, and whether it collapsed."""
    curve = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    metrics = read_json(folder / "metrics.json")
    step, alarms = metrics["first_collapse_step"], "; ".join(metrics["collapse_alarms"])
    said = f"No collapse in {curve[-1]['step']:,} steps." if step is None else f"Collapse at step {step:,}: {alarms}."
    return {"said": said, "collapsed": step is not None, "figures": curve_figures(curve, step)}


def skill_of(folder: Path) -> dict[str, Any]:
    """Errors of all forecasts relative to copying, by horizon."""
    results = read_json(folder / "rollout.json")
    useful = results["useful_horizon"]["model"]
    for records in (*results["predictors"].values(), results["truth"]):  # null is what could not be computed
        records[:] = [{name: math.nan if value is None else value for name, value in row.items()} for row in records]
    said = (
        f"The forecast is better than the mean for {'more than ' * useful['exceeds_longest']}{useful['time_s']:.3g} s"
    )
    return {
        "said": f"{said}. {counted(results['windows'], 'rollout')} in {counted(results['clips'], 'clip')}; intervals: "
        f"{results['interval']}.",
        "figure": skill_figure(results), "rows": skill_rows(results), "text": table(results),
    }  # fmt: skip


def read_table(path: Path) -> dict[str, list[Row]]:
    """Rows of a CSV of numbers, by video; none where there is no such file."""
    found: dict[str, list[Row]] = {}
    if path.exists():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                found.setdefault(row.pop("video"), []).append({name: float(value) for name, value in row.items()})
    return found


def surprise_of(folder: Path, record: dict[str, Any], most: int, *, left: int) -> dict[str, Any]:
    """The most surprising videos with films of `left` bytes of base64 at most, their timelines, peaks and events."""
    moments, peaks, events = (read_table(folder / f"{name}.csv") for name in ("surprise", "peaks", "events"))
    order = sorted(moments, key=lambda video: -max(row["energy"] for row in moments[video]))
    order, others = order[:most], len(order) - most
    left -= VIDEO_BYTES * len(order)
    shape, metrics = (
        record["inputs"]["provenance"]["columns"]["embeddings"]["shape"],
        read_json(folder / "metrics.json"),
    )
    videos: list[dict[str, Any]] = []
    for number, name in enumerate(order):
        # Clocks may share a frame: it is as surprising as it is to the more surprised of them.
        highest = {row["time_s"]: row for row in sorted(moments[name], key=lambda row: row["energy"])}
        rows, its_events = sorted(highest.values(), key=lambda row: row["time_s"]), events.get(name, [])
        jumps = [*(row["peak_s"] for row in its_events), *(row["time_s"] for row in peaks[name])]
        share = (left - sum(len(video["film"]) for video in videos)) // (len(order) - number)
        spans = spans_s(jumps, rows[-1]["time_s"], record["inputs"], frames=share // FILM_FRAME_BYTES)
        film, said = film_of(name, record["inputs"], spans, most=share)
        parts = np.array_split(np.arange(len(rows)), min(CURVE_POINTS, len(rows)))
        shown = [max((rows[place] for place in part), key=lambda row: row["energy"]) for part in parts]
        videos.append({
            "name": name, "film": film, "said": said, "events": its_events, "peaks": peaks[name],
            "spans": [span for span in spans if film and math.isfinite(span[1])],
            "moments": {column: [row[column] for row in shown] for column in shown[0]},
            "figure": timeline_figure(shown, peaks[name], its_events, metrics["threshold"]),
        })  # fmt: skip
    events_said = "" if metrics["events"] is None else (
        f" {counted(metrics['events'], 'event')} of an energy above {metrics['threshold']:.2f}."
    )  # fmt: skip
    more = f" Shown are the {len(videos)} with the highest." if others > 0 else ""
    said = f"Energy in {counted(len(moments), 'video')}: mean {metrics['mean_energy']:.2f}, of ordinary video 1."
    return {"said": said + events_said + more, "videos": videos, "grid": shape[:2] if len(shape) == 3 else []}


def spans_s(jumps: list[float], length_s: float, inputs: dict[str, Any], *, frames: int) -> list[tuple[float, float]]:
    """What of a video a film of so many frames shows: all, or what is around the first moments to jump to."""
    rate = inputs["provenance"]["fps"] * len(inputs["offsets_s"])
    if length_s * rate <= frames:
        return [(0.0, math.inf)]
    kept = jumps[: max(1, int(frames / (2 * AROUND_S * rate)))]
    return [(max(0.0, jump_s - AROUND_S), jump_s + AROUND_S) for jump_s in kept]


def film_of(
    video: str, inputs: dict[str, Any], spans: list[tuple[float, float]], *, most: int
) -> tuple[str, str]:  # fmt: skip
    """The film of a video in base64, and what is to be said of it; an empty one where there is none."""
    provenance = inputs["provenance"]
    fps, offsets_s, image_fps = provenance["fps"], inputs["offsets_s"], provenance["image_fps"]
    try:
        film = make_film(Path(video), fps=fps, offsets_s=offsets_s, spans_s=spans, image_fps=image_fps)
    except (DataError, OSError) as error:  # its numbers are there, all the same
        return "", str(error)
    encoded = base64.b64encode(film).decode()
    if len(encoded) > most:
        return "", f"the page would weigh more than {MOST_BYTES / 1e6:.0f} MB"
    if math.isfinite(spans[0][1]):
        return encoded, f"only {AROUND_S:g} s around {counted(len(spans), 'moment')}; else the picture stands still"
    return encoded, ""


if __name__ == "__main__":
    run_command(main, Options)
