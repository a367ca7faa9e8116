"""The command `video-jepa`: one word for each pipeline.

  video-jepa demo
  video-jepa pretrain --videos DIR --output-dir runs/encoder

Starts one process; many are started by `accelerate launch pipelines/pretrain_encoder.py` from a clone, or by
`accelerate launch --no_python video-jepa pretrain` from anywhere.
"""

import ast
import base64
import csv
import hashlib
import importlib
import re
import sys
from importlib.metadata import distributions
from pathlib import Path

COMMANDS = {
    "demo": "demo",
    "all": "all_stages",
    "inspect": "inspect_folder",
    "pretrain": "pretrain_encoder",
    "embed": "cache_embeddings",
    "train": "train_predictor",
    "calibrate": "calibrate",
    "train-decoder": "train_decoder",
    "imagine": "imagine",
    "evaluate": "evaluate_rollout",
    "surprise": "score_surprise",
    "watch": "watch",
    "search": "search_cache",
    "export": "export_cache",
    "act": "act",
    "report": "write_report",
}
"""Words and their modules, in the order in which a person needs them."""
NAME, PACKAGES = "video-jepa", ("jepa", "data", "pipelines")
ROOT = Path(__file__).resolve().parents[1]


def usage() -> str:
    """The commands, each with the first line of its module, which need not be imported for that."""
    modules = {word: Path(__file__).with_name(f"{name}.py").read_text() for word, name in COMMANDS.items()}
    first = {word: (ast.get_docstring(ast.parse(code)) or "").split("\n")[0] for word, code in modules.items()}
    lines = "\n".join(f"  {word:13} {line}" for word, line in first.items())
    return f"usage: video-jepa COMMAND [OPTIONS]\n\n{lines}\n\nvideo-jepa COMMAND --help explains each."


def check_packages() -> None:
    """Warn of another distribution with a package of our names, or exit where ours is not whole.

    Two such distributions share a folder: the one installed later overwrites files of the other, and pip is silent.
    """
    for package in PACKAGES:
        found = importlib.import_module(package).__file__
        if Path(found or "").resolve() != ROOT / package / "__init__.py":
            sys.exit(f"error: import {package} finds {found}, not {ROOT / package}: take an environment of its own")
    records = {one.name: one.read_text("RECORD") or "" for one in distributions() if one.locate_file("") == ROOT}
    rows = [row for row in csv.reader(records.pop(NAME, "").splitlines()) if row[0].endswith(".py")]
    others = [name for name, rows in records.items() if re.search(rf"^({'|'.join(PACKAGES)})/", rows, re.MULTILINE)]
    names, mend = " and ".join(others) or "another distribution", f"give {NAME} an environment of its own"
    for file, digest, _ in rows:  # file, sha256=digest, size
        content = (ROOT / file).read_bytes() if (ROOT / file).exists() else b""
        if digest != "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode():
            sys.exit(f"error: {names} has overwritten {ROOT / file} or taken it away: {mend}")
    if others:
        print(f"warning: {NAME} has overwritten files of {names}, which may not work any more: {mend}", file=sys.stderr)


def main() -> None:
    """Look whether our packages are ours, then run the command that the first word names."""
    check_packages()
    word = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if word in ("-h", "--help"):
        print(usage())
    elif word not in COMMANDS:
        sys.exit(f"error: there is no command {word}\n{usage()}")
    else:
        try:
            command = importlib.import_module(f"pipelines.{COMMANDS[word]}")
            run_command = importlib.import_module("pipelines.run.command").run_command
        except KeyboardInterrupt:
            sys.exit(130)
        sys.argv[:2] = [f"video-jepa {word}"]
        run_command(command.main, command.Options)


if __name__ == "__main__":
    main()
