"""Where curves go: TensorBoard, W&B, MLflow or a CSV file. A run that was killed and resumed leaves one curve."""

import csv
import difflib
import functools
import importlib
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, get_available_trackers, on_main_process

from pipelines.stage import UserError, flat, require, to_json, write_json

TRACKERS = ("tensorboard", "wandb", "mlflow", "csv", "none")
LONGEST_OPTION = 500
"""Characters. MLflow refuses longer ones, and accelerate drops them; config.json beside the logs has all of them."""
MLFLOW_BATCH = 1000
"""Metrics that MLflow takes in one call."""


def find_trackers(names: Sequence[str], folder: Path) -> list[str | GeneralTracker]:
    """The trackers of these names, for `Accelerator(log_with=... or None, project_dir=folder)`. Touches no file.

    Args:
        names: of tensorboard, wandb, mlflow and csv, one or several; or none alone.
        folder: for whatever they write.

    Raises:
        UserError: there is no tracker of this name, or its library is not installed.
    """
    for name in names:
        similar = difflib.get_close_matches(name, TRACKERS, n=1)
        hint = f"perhaps you meant {similar[0]}" if similar else f"choose from {', '.join(TRACKERS)}"
        require(name in TRACKERS, f"there is no tracker {name}: {hint}")
    chosen = [name for name in dict.fromkeys(names) if name != "none"]
    require(not chosen or "none" not in names, f"trackers are {' and '.join(names)}: give none alone, or leave it out")
    # Accelerate passes silently over a tracker that it does not find.
    available = {"csv", *map(str, get_available_trackers())}
    for name in chosen:
        require(name in available, f"the tracker {name} needs a library that is not installed: pip install {name}")
    return [CurveFile(folder) if name == "csv" else name for name in chosen]


def start_trackers(accelerator: Accelerator, stage: str, options: dict[str, Any], step: int) -> None:
    """Start the accelerator's trackers, or go on where they were after `step` steps.

    A run may have logged more than its newest checkpoint knows of. What it logged after `step` is

    - csv: removed;
    - tensorboard: hidden by its readers, which take it for the end of a crashed run. That holds for numbers and texts;
      a dict of numbers, for which accelerate makes further runs in folders of their own, should not be logged;
    - mlflow: left behind, as the run goes on under a new id if, and only if, there is something to leave behind;
    - wandb: kept. W&B cannot take steps back: it ignores, with a warning, what is logged again, up to the last step
      that it knows. The curve is right as far as the resumed run computes what the killed one did.

    `trackers.json` in the accelerator's logging folder keeps the ids of the runs. The options are stored once, at the
    first start. MLflow keeps its data in that folder too, unless it has been told otherwise (MLFLOW_TRACKING_URI).

    Raises:
        UserError: a library refuses, as W&B does without an account.
    """
    if not accelerator.is_main_process or not accelerator.log_with:
        return
    folder = Path(accelerator.logging_dir)
    folder.mkdir(parents=True, exist_ok=True)  # W&B would turn to a temporary folder
    record = folder / "trackers.json"
    run_ids = json.loads(record.read_text()) if record.exists() else {}
    for tracker in accelerator.log_with:
        if isinstance(tracker, CurveFile):
            tracker.last_step = step
    try:
        settings = {
            "tensorboard": {"purge_step": step + 1},
            "wandb": {"dir": str(folder), "id": run_ids.get("wandb"), "resume": "allow"},
        }
        if "mlflow" in map(str, accelerator.log_with):
            settings["mlflow"] = _prepare_mlflow(folder, run_ids.get("mlflow"), step)
        accelerator.init_trackers(stage, init_kwargs=settings)
        for tracker in accelerator.trackers:
            if tracker.name not in run_ids:
                tracker.store_init_configuration(flatten(options))
            run_ids[tracker.name] = _run_id(tracker)
            write_json(record, run_ids)
    except Exception as error:
        # These two talk to servers, where much can go wrong that is no fault of the code.
        library = type(error).__module__.partition(".")[0]
        if library not in ("wandb", "mlflow"):
            raise
        reason = (str(error) or repr(error)).splitlines()[0]
        raise UserError(f"the tracker {library} could not start: {reason}") from error


def flatten(options: Any) -> dict[str, str | int | float | bool]:
    """Nested options as dotted names and plain values; a list becomes one text, and long texts are cut.

    TensorBoard rejects nested dicts and tuples.
    """
    return {name: _plain(value) for name, value in flat(to_json(options)).items()}


def _plain(value: Any) -> str | int | float | bool:
    if isinstance(value, bool | int | float):
        return value
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= LONGEST_OPTION else text[: LONGEST_OPTION - 3] + "..."


class CurveFile(GeneralTracker):  # type: ignore[misc]
    """`curve.csv`: a row for each call of `log`, and a new column wherever a new name appears.

    Numbers are written as `repr(float)`: read back, they are the same bits. What is logged is on disk when `log`
    returns.

    Args:
        folder: of the file.
    """

    name = "csv"
    requires_logging_directory = False
    main_process_only = True

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = folder / "curve.csv"
        self.last_step = 0
        """Rows of later steps are dropped at the start."""

    @property
    def tracker(self) -> Path:
        """The file."""
        return self.path

    @on_main_process  # type: ignore[untyped-decorator]
    def start(self) -> None:
        """Open the file and drop the rows of an earlier life that will be logged again."""
        self._rewrite(row for row in self._read() if int(row["step"]) <= self.last_step)

    @on_main_process  # type: ignore[untyped-decorator]
    def log(self, values: dict[str, Any], step: int, **_: Any) -> None:
        """Append a row."""
        cells = {name: value if isinstance(value, str) else repr(float(value)) for name, value in values.items()}
        row = {"step": str(step), **cells}
        if row.keys() <= set(self._writer.fieldnames):
            self._writer.writerow(row)
            self._file.flush()
        else:
            self._file.close()
            self._rewrite([*self._read(), row])

    @on_main_process  # type: ignore[untyped-decorator]
    def finish(self) -> None:
        """Close the file."""
        self._file.close()

    def _read(self) -> list[dict[str, str]]:
        """All whole rows, without their empty cells."""
        if not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8", errors="replace")
        whole = text[: text.rfind("\n") + 1]  # a crash may have torn the last line
        return [
            {name: cell for name, cell in row.items() if cell} for row in csv.DictReader(io.StringIO(whole, newline=""))
        ]

    def _rewrite(self, rows: Iterable[dict[str, str]]) -> None:
        """Replace the file in one move, with the columns of these rows, and leave it open for more."""
        rows = list(rows)
        columns = list(dict.fromkeys(["step", *(name for row in rows for name in row)]))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_name(f".tmp.{self.path.name}")
        with unfinished.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        unfinished.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8", newline="")
        self._writer = csv.DictWriter(self._file, columns, lineterminator="\n")


def _prepare_mlflow(folder: Path, run_id: str | None, step: int) -> dict[str, str | None]:
    """How accelerate is to start MLflow: where it writes, and in which run."""
    mlflow = importlib.import_module("mlflow")  # here, because it takes seconds and need not be installed
    artefacts = None
    if not _mlflow_was_told(mlflow):
        # Of the two local stores the other, of plain files, is being retired.
        mlflow.set_tracking_uri(f"sqlite:///{folder.resolve() / 'mlflow.db'}")
        artefacts = str(folder.resolve() / "mlflow")
    return {"logging_dir": artefacts, "run_id": run_id and _rewind_mlflow(mlflow, run_id, step)}


@functools.cache
def _mlflow_was_told(mlflow: Any) -> bool:
    """Whether somebody chose where MLflow writes. Asked once: for a second run in this process it was the first."""
    return mlflow.is_tracking_uri_set()


def _rewind_mlflow(mlflow: Any, run_id: str, step: int) -> str:
    """A run without what this one logged after `step`; MLflow can add to a run, and not remove from it."""
    client = mlflow.MlflowClient()
    run = client.get_run(run_id)
    logged = [entry for name in run.data.metrics for entry in client.get_metric_history(run_id, name)]
    kept = [entry for entry in logged if entry.step <= step]
    if len(kept) == len(logged):
        return run_id
    copy: str = client.create_run(run.info.experiment_id, tags=run.data.tags, run_name=run.info.run_name).info.run_id
    for name, value in run.data.params.items():
        client.log_param(copy, name, value)
    for start in range(0, len(kept), MLFLOW_BATCH):
        client.log_batch(copy, metrics=kept[start : start + MLFLOW_BATCH])
    if run.info.lifecycle_stage == "active":  # it is not, if a kill came before the new id was written down
        client.delete_run(run_id)
    return copy


def _run_id(tracker: GeneralTracker) -> str | None:
    """What the library needs to find the run again; None where the folder says it."""
    if tracker.name == "wandb":
        return tracker.tracker.id
    return tracker.tracker.info.run_id if tracker.name == "mlflow" else None
