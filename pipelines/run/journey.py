"""The stages from videos to a page, each by the command that a person may run alone."""

import webbrowser
from pathlib import Path
from typing import Any

from pipelines.run.stages import run_stage

Given = dict[str, Any]


def run_journey(
    folder: Path, videos: dict[str, Path], given: dict[str, Given], *, fps: float, seed: int, columns: tuple[str, ...],
    actions: tuple[str, ...] = (), shown: Path | tuple[Path, ...] | None = None, is_opened: bool = False,
) -> None:  # fmt: skip
    """Encode, cache, train, evaluate, score and report, in a folder; what is done already is not done again.

    Args:
        folder: of all that is left; absolute, as all paths are.
        videos: for `train`, `val` and `test`.
        given: options by command; without any for `pretrain`, those for `embed` name a published encoder.
        fps: rate of the clock.
        seed: of all commands.
        columns: of the tables beside the videos, kept and read off forecasts.
        actions: columns that are actions.
        shown: videos in which surprise is looked for, or all of the test.
        is_opened: whether a browser opens the page.
    """
    encoder, predictor, caches = folder / "encoder", folder / "predictor", folder / "cache"
    again, clock = {"seed": seed, "resume": True}, {"fps": fps}
    kept, published = encoder / "encoder", given["embed"]
    if "pretrain" in given:
        run_stage("pretrain", {"videos": videos["train"], "output-dir": encoder} | clock | given["pretrain"] | again)
        published = {"encoder": kept}
    else:
        kept = caches / "train" / "encoder"
    for split, source in (videos | ({"shown": shown} if shown else {})).items():
        taken = published if split == "train" else {"encoder": kept}
        made = {"videos": source, **taken, **clock} | ({"columns": (*columns, *actions)} if columns or actions else {})
        run_stage("embed", made | given["images"] | {"output-dir": caches / split})
    made = {"train-cache": caches / "train", "validation-cache": caches / "val", "output-dir": predictor}
    run_stage("train", made | given["train"] | ({"actions": actions} if actions else {}) | again)
    judge = {"predictor": predictor, "overwrite": True}
    probe = {"probe-cache": caches / "train", "probe-columns": columns} if columns else {}
    made = {"cache": caches / "test", "output-dir": folder / "evaluation"} | given["evaluate"]
    run_stage("evaluate", made | judge | probe)
    made = {"train-cache": caches / "train", "validation-cache": caches / "val", "output-dir": folder / "decoder"}
    run_stage("train-decoder", made | given["train-decoder"] | again)
    made = {"cache": caches / "test", "among": caches / "train", "decoder": folder / "decoder"} | given["evaluate"]
    run_stage("imagine", made | {"output-dir": folder / "imagined"} | judge)
    run_stage("surprise", {"cache": caches / ("shown" if shown else "test"), "output-dir": folder / "surprise"} | judge)
    names = ("encoder",) * ("pretrain" in given) + ("predictor", "evaluation", "decoder", "imagined", "surprise")
    runs = tuple(folder / name for name in names)
    run_stage("report", {"runs": runs, "output-dir": folder / "report", "overwrite": True})
    page = folder / "report" / "report.html"
    print(f"\nLook at {page}")
    if is_opened:
        webbrowser.open(page.as_uri())
