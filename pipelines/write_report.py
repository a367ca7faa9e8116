r"""One page about finished runs: what was trained, how good it is, and what surprised it, under the videos themselves.

  video-jepa report --runs runs/encoder runs/predictor runs/evaluation runs/surprise --output-dir runs/report

Leaves `report.html`, of at most 25 MB, which needs no network and no other file: it may be sent, and opens from a disk.
Small films of the most surprising videos are in it, so mind to whom it goes. A click on a timeline or a row of a table
shows that moment.
"""

import base64
import csv
import json
import math
import shlex
from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import MISSING, dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateError
from markupsafe import escape
from plotly.offline import get_plotlyjs

from data.account import Account
from data.decoder import Damage
from data.errors import DataError, printable
from data.files import write_whole
from data.film import make_film
from jepa.config import Bounded, PositiveInt
from pipelines.cli import COMMANDS
from pipelines.run.command import counted, first_few, imported, require, run_command
from pipelines.run.files import differences, flat, read_json, reading, to_json
from pipelines.run.folder import RunFolder, read_mark
from pipelines.run.maps import MapKind, map_of
from pipelines.run.options import as_arguments
from pipelines.run.recording import write_recording
from pipelines.run.report import table

WORDS = {
    COMMANDS[word]: word for word in ("pretrain", "train", "evaluate", "train-decoder", "imagine", "surprise", "act")
}
"""Commands whose runs are shown, in this order."""
MOST_BYTES, FILM_FRAME_BYTES, VIDEO_BYTES, CELL_BYTES = 25_000_000, 7_000, 150_000, 10
"""Weight of the page, of a frame of a film at worst, in base64, of the numbers of a video, and of one of its maps'."""
AROUND_S = 5.0
"""Of a video that is too long for the page, so much is shown on either side of a moment."""
CURVE_POINTS = 2000
"""Moments of a timeline at most."""

Row = dict[str, float]


@dataclass(frozen=True)
class Options(Bounded):
    """Write a page about finished runs."""

    runs: tuple[Path, ...] = tuple(Path("runs", name) for name in ("encoder", "predictor", "evaluation", "surprise"))
    """Folders of finished runs of pretrain, train, evaluate, train-decoder, imagine, surprise and act, each as many as
    are to be shown."""
    output_dir: Path = Path("runs/report")
    """Where report.html is left."""
    videos: PositiveInt = 12
    """Videos shown at most, the most surprising first."""
    map: MapKind = "pca"
    """How embeddings are laid out in a plane: by two principal components, or by UMAP (video-jepa[umap])."""
    rerun: bool = False
    """Leave the films and timelines as report.rrd, too, for the viewer Rerun (video-jepa[rerun])."""
    overwrite: bool = False
    """Replace the page in the output folder."""


def main(options: Options) -> None:
    """Read the runs, cut the films, write the page."""
    require(bool(options.runs), "--runs names no folder: name those of finished runs")
    mend = "--rerun takes rerun-sdk: pip install 'video-jepa[rerun]', or leave it out"
    rerun = imported("rerun", mend) if options.rerun else None
    output = RunFolder(options, "write_report", ("report.html", "report.rrd"))
    found = [(folder, read_mark(folder)) for folder in options.runs]
    for folder, record in found:
        known = record.get("command") in WORDS and record["finished"]
        require(known, f"--runs {folder} holds no finished run of {', '.join(WORDS.values())}: name such folders")
    found.sort(key=lambda run: list(WORDS).index(run[1]["command"]))
    names = ("runs", "curves", "skills", "maps", "dreams", "plans", "surprises")
    page, script = {name: list[Any]() for name in names}, get_plotlyjs()
    left = MOST_BYTES - len(script) - 1_000_000  # a million for its own words
    for folder, record in found:
        with reading(f"--runs {folder}", csv.Error):
            for name, part in parts_of(folder, record, options, left):
                page[name].append({"folder": folder} | part)
                left -= len(json.dumps(to_json(part)))
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.globals["counted"] = counted
    environment.filters["number"] = lambda value: "-" if value is None else f"{value:.3f}"  # undefined, or known
    environment.filters["data"] = lambda value: escape(json.dumps(to_json(value)))
    with reading(f"--runs {first_few(options.runs)}", TemplateError):
        text = environment.get_template("report.html").render(page, script=script)
    content = text.encode(errors="backslashreplace")  # names need not be UTF-8
    output.begin({str(folder): record["command"] for folder, record in found})
    write_whole(options.output_dir / "report.html", content)
    if rerun is not None:
        write_recording(rerun, options.output_dir / "report.rrd", page)
    videos = [video for surprise in page["surprises"] for video in surprise["videos"]]
    films = sum(bool(video["film"]) for video in videos)
    films += sum(len(part["films"]) for part in page["dreams"] + page["plans"])
    output.finish({"bytes": len(content), "videos": len(videos), "films": films})
    for video in videos:
        if not video["film"]:
            print(printable(f"  no film of {video['name']}: {video['said']}"))
    print(
        f"wrote {options.output_dir}/report.html, {len(content) / 1e6:.1f} MB, with {counted(films, 'film')}: open it"
    )


def parts_of(folder: Path, record: dict[str, Any], options: Options, left: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """What the page shows of a run, with the names of the parts, in `left` bytes."""
    yield "runs", describe(folder, record)
    match record["command"]:
        case "pretrain_encoder" | "train_predictor":
            lines = (folder / "curve.jsonl").read_text().splitlines()
            yield "curves", {"curve": [*map(json.loads, lines)], "metrics": read_json(folder / "metrics.json")}
        case "evaluate_rollout":
            results = read_json(folder / "rollout.json")
            yield "skills", {"results": results, "text": table(results)}
            if ((cache := Path(record["options"]["cache"])) / "cache.json").exists():
                yield "maps", {"folder": cache} | map_of(cache, options.map)
        case "imagine":
            results = read_json(folder / "imagined.json")
            yield "dreams", results | films_in(folder, results["films"], left // 3)
        case "act":
            results = read_json(folder / "act.json")
            named = [one | {"film": f"episode_{one['episode']:05}.mp4"} for one in results["episodes"]]
            films = [one for one in named if (folder / "films" / one["film"]).exists()]
            yield "plans", results | films_in(folder, films, left // 3)
        case "score_surprise":
            yield "surprises", surprise_of(folder, record, options.videos, left=left)


def describe(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """What a run was: its command, and what its numbers must be traced back to."""
    options = record["options"]
    caches = {name: Path(path) for name, path in options.items() if name.endswith("cache") and path}
    lists = [Path(path).parent for path in options.get("videos") or () if path.endswith(".jsonl")]
    read = {f"all files, divided in {path}": path for path in lists}
    read |= {"what it read": folder, "its videos": folder / "cache"}
    read |= {f"--{name.replace('_', '-')} {path}": path for name, path in caches.items()}
    accounts = {title: account_of(path) for title, path in read.items() if (path / "account.json").is_file()}
    facts = {"seed": options.get("seed"), "steps": options.get("steps"), "commit": record["code"]}
    return {
        "word": WORDS[record["command"]], "line": command_line(record), "accounts": accounts,
        "facts": {name: value for name, value in facts.items() if value is not None},
        "versions": {"machine": record["machine"], **record["versions"]},
        "inputs": flat(record["inputs"]), "metrics": flat(read_json(folder / "metrics.json")),
    }  # fmt: skip


def command_line(record: dict[str, Any]) -> str:
    """The command that a run was started by, with the options that are not the default."""
    kind = import_module(f"pipelines.{record['command']}").Options
    defaults = to_json({
        one.name: one.default if one.default_factory is MISSING else one.default_factory() for one in fields(kind)
    })  # fmt: skip
    changed = differences(defaults, defaults | record["options"] | {"overwrite": False, "resume": False})
    given = {name: now for name, _, now in changed if not (now is None or now is False)}
    return shlex.join(["video-jepa", WORDS[record["command"]], *as_arguments(given)])


def account_of(folder: Path) -> str:
    """What was read, refused and damaged, as the command said at its end."""
    known = read_json(folder / "account.json")
    damaged = {path: Damage(**faults) for path, faults in known.pop("damaged").items()}
    return str(Account(found=Counter(known.pop("found")), damaged=damaged, **known))


def films_in(folder: Path, films: list[dict[str, Any]], most: int) -> dict[str, Any]:
    """Films of a run with their data, as many as weigh at most so much in base64, and what is said of the others."""
    found: list[dict[str, Any]] = []
    for film in films:
        path = folder / "films" / film["film"]
        if (most := most - 4 * math.ceil(path.stat().st_size / 3)) >= 0:
            found.append(film | {"data": base64.b64encode(path.read_bytes()).decode()})
    left = len(films) - len(found)
    return {"films": found, "said": f"{counted(left, 'film')} more in {folder}." if left else ""}


def rows_of(path: Path) -> Iterator[dict[str, str]]:
    """Rows of a CSV, one at a time; none where there is no such file."""
    if path.exists():
        with path.open(newline="") as file:
            yield from csv.DictReader(file)


def read_table(path: Path, videos: Container[str]) -> dict[str, list[Row]]:
    """Rows of a CSV of numbers by video, of these videos alone: a table may be of thousands."""
    found: dict[str, list[Row]] = {}
    for row in rows_of(path):
        if (video := row.pop("video")) in videos:
            found.setdefault(video, []).append({name: float(value) for name, value in row.items()})
    return found


def surprise_of(folder: Path, record: dict[str, Any], most: int, *, left: int) -> dict[str, Any]:
    """The most surprising videos with films of `left` bytes of base64 at most, their timelines, peaks and events."""
    tops: dict[str, float] = {}
    for row in rows_of(folder / "surprise.csv"):
        tops[row["video"]] = max(float(row["energy"]), tops.get(row["video"], 0.0))
    order = sorted(tops, key=lambda video: -tops[video])[:most]
    names = ("surprise", "peaks", "maps", "events")
    moments, peaks, maps, events = (read_table(folder / f"{name}.csv", order) for name in names)
    left -= VIDEO_BYTES * len(order) + CELL_BYTES * sum(len(row) for rows in maps.values() for row in rows)
    inputs, metrics = record["inputs"], read_json(folder / "metrics.json")
    shape = inputs["provenance"]["columns"]["embeddings"]["shape"]
    videos: list[dict[str, Any]] = []
    for number, name in enumerate(order):
        # Clocks may share a frame: it is as surprising as it is to the more surprised of them.
        highest = {row["time_s"]: row for row in sorted(moments[name], key=lambda row: row["energy"])}
        rows, its_events = sorted(highest.values(), key=lambda row: row["time_s"]), events.get(name, [])
        energies = {row["peak_s"]: row["energy"] for row in its_events}
        energies |= {row["time_s"]: row["energy"] for row in peaks[name]}
        share = (left - sum(len(video["film"]) for video in videos)) // (len(order) - number)
        film = film_of(name, energies, inputs, length_s=rows[-1]["time_s"], most=share)
        cells = [[value for name, value in row.items() if name != "rank"] for row in maps.get(name, [])]
        parts = np.array_split(np.arange(len(rows)), min(CURVE_POINTS, len(rows)))
        shown = [max((rows[place] for place in part), key=lambda row: row["energy"]) for part in parts]
        videos.append({
            "name": name, **film, "events": its_events, "peaks": peaks[name], "maps": cells,
            "moments": {column: [row[column] for row in shown] for column in shown[0]},
        })  # fmt: skip
    return {"metrics": metrics, "videos": videos, "grid": shape[:2] if len(shape) == 3 else []}


def film_of(name: str, energies: dict[float, float], inputs: Any, *, length_s: float, most: int) -> dict[str, Any]:
    """The film of a video in base64, empty where there is none, its spans if it is not whole, and a remark.

    If it is not, it is of what is around the times with the highest energies.
    """
    provenance, offsets_s = inputs["provenance"], inputs["offsets_s"]
    rate = provenance["fps"] * len(offsets_s)
    spans, said = [(0.0, math.inf)], ""
    if length_s * rate * FILM_FRAME_BYTES > most:
        kept = sorted(energies, key=lambda time_s: -energies[time_s])
        kept = kept[: max(1, int(most / (2 * AROUND_S * rate * FILM_FRAME_BYTES)))]
        spans = [(max(0.0, time_s - AROUND_S), time_s + AROUND_S) for time_s in kept]
        said = f"only {AROUND_S:g} s around {counted(len(kept), 'moment')}; between, the picture stands still"
    try:
        film = make_film(
            Path(name), fps=provenance["fps"], offsets_s=offsets_s, spans_s=spans, image_fps=provenance["image_fps"]
        )
    except (DataError, OSError) as error:  # its numbers are there, all the same
        return {"film": "", "said": str(error), "spans": []}
    encoded = base64.b64encode(film).decode()
    if len(encoded) > most:
        return {"film": "", "said": f"the page would weigh more than {MOST_BYTES / 1e6:g} MB", "spans": []}
    return {"film": encoded, "said": said, "spans": spans if said else []}


if __name__ == "__main__":
    run_command(main, Options)
