"""One command that runs another, as a person would."""

import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from data.errors import printable
from pipelines.run.command import Interrupted, require


def run_stage(command: str, options: dict[str, Any], which: str = "") -> None:
    """Show a command, a word of `video-jepa`, and which it is, and run it, its messages on this screen.

    Options come by name, "" for what has none: True for a switch, a tuple for several values, False and () for none.
    Ctrl-C reaches both, and we wait for it to save. Raises `UserError` where it stopped with an error, which it has
    explained itself.
    """
    words = [command]
    for name, value in options.items():
        if value is not False and value != ():
            values = [] if value is True else value if isinstance(value, tuple) else [value]
            words += [f"--{name}"] * bool(name) + [*map(str, values)]
    print(f"\n{which}$", printable(shlex.join(["video-jepa", *words])), flush=True)
    # In the folder of our packages, which Python then finds first; all paths are absolute.
    process = subprocess.Popen([sys.executable, "-m", "pipelines.cli", *words], cwd=Path(__file__).parents[2])
    try:
        status = process.wait()
    except KeyboardInterrupt as error:  # after which subprocess.run would kill it
        process.wait()
        raise Interrupted(f"{command} was interrupted: run this again, and it goes on", signal.SIGINT) from error
    require(status == 0, f"{command} stopped as it says above (exit code {status}): mend that, and run this again")
