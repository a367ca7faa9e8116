"""What the site has beside the pages here: the README, and a page of all commands, made of their own `--help`."""

import contextlib
import importlib
import io
import os
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    readme = (ROOT / "README.md").read_text().replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=readme))
    files.append(File.generated(config, "commands.md", content=commands()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead to the README as a page, name files that are in the clone alone, show formulas as they were written."""
    del page, config, files
    markdown = markdown.replace("](../README.md)", "](index.md)")
    markdown = re.sub(r"\$\$(.+?)\$\$", r"```tex\n\1\n```", markdown, flags=re.DOTALL)
    markdown = re.sub(r"\$([^$\n`]+)\$", r"`\1`", markdown)
    return re.sub(r"\[([^\]]+)\]\((?:\.\./)*((?:notebooks|examples|configs)/[^)]+)\)", r"\1 (`\2`)", markdown)


def commands() -> str:
    """Each command with what its `--help` prints."""
    sys.path.insert(0, str(ROOT))
    cli = importlib.import_module("pipelines.cli")
    parts = [
        "# Commands",
        "Each explains itself with `--help`; this is what that says.",
        f"```text\n{cli.usage()}\n```",
    ]
    for word, name in cli.COMMANDS.items():
        parts.append(f"## {word}\n\n```text\n{help_of(word, importlib.import_module(f'pipelines.{name}'))}\n```")
    return "\n\n".join(parts)


def help_of(word: str, command: Any) -> str:
    """What `video-jepa WORD --help` prints, on a screen of a page's width."""
    run_command = importlib.import_module("pipelines.run.command").run_command
    before, sys.argv = sys.argv, [f"video-jepa {word}", "--help"]
    os.environ |= {"COLUMNS": "100", "NO_COLOR": "1"}
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        run_command(command.main, command.Options)
    sys.argv = before
    return re.sub(r"\x1b\[[0-9;]*m", "", printed.getvalue()).strip()
