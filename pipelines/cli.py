"""The command `video-jepa`: one word for each pipeline.

  video-jepa demo
  video-jepa pretrain --videos DIR --output-dir runs/encoder

Starts one process; many are started by `accelerate launch pipelines/pretrain_encoder.py` from a clone, or by
`accelerate launch --no_python video-jepa pretrain` from anywhere.
"""

import ast
import importlib
import sys
from pathlib import Path

COMMANDS = {
    "demo": "demo",
    "inspect": "inspect_folder",
    "pretrain": "pretrain_encoder",
    "embed": "cache_embeddings",
    "train": "train_predictor",
    "calibrate": "calibrate",
    "evaluate": "evaluate_rollout",
    "surprise": "score_surprise",
}
"""Words and their modules, in the order in which a person needs them."""
ROOT = Path(__file__).resolve().parents[1]


def usage() -> str:
    """The commands, each with the first line of its module, which need not be imported for that."""
    modules = {word: Path(__file__).with_name(f"{name}.py").read_text() for word, name in COMMANDS.items()}
    first = {word: (ast.get_docstring(ast.parse(code)) or "").split("\n")[0] for word, code in modules.items()}
    lines = [f"  {word:10} {line}" for word, line in first.items()]
    return "\n".join(
        ["usage: video-jepa COMMAND [OPTIONS]", "", *lines, "", "video-jepa COMMAND --help explains each."]
    )


def main() -> None:
    """Look whether our packages are ours, then run the command that the first word names."""
    for package in ("jepa", "data", "pipelines"):  # other distributions own packages of these names, too
        found = importlib.import_module(package).__file__
        if Path(found or "").resolve() != ROOT / package / "__init__.py":
            sys.exit(f"error: import {package} finds {found}, not {ROOT / package}: take an environment of its own")
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
