"""Commands as trees of processes that can be watched and struck."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from benchmarks.common import ROOT, words
from pipelines.run.command import require

ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}


def tree(pid: int) -> list[psutil.Process]:
    """A process and all that it has started, as far as they are there."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


class Life:
    """One start of a script, from its first process to its last; two and more processes are started by torchrun.

    Args:
        processes: how many of them share the work.
        given: the script and its options, see `words`.
        output: the file that what it says goes to.
        environment: more variables.
    """

    def __init__(self, processes: int, *given: object, output: Path, **environment: str) -> None:
        self.output, self.processes, self.began = output, processes, time.monotonic()
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *(torchrun if processes > 1 else []), *words(*given)]
        with output.open("w") as file:
            self.launcher = subprocess.Popen(
                command, stdout=file, stderr=file, cwd=ROOT, env=os.environ | ENVIRONMENT | environment,
                start_new_session=True,
            )  # fmt: skip
        self.struck: set[psutil.Process] = set()

    def said(self) -> str:
        """All that it has printed so far."""
        return self.output.read_text(errors="replace")

    def ranks(self) -> list[int]:
        """The processes that do the work, as far as they have been started."""
        return [self.launcher.pid] if self.processes == 1 else [
            process.pid for process in tree(self.launcher.pid) if is_rank(process)
        ]  # fmt: skip

    def is_over(self) -> bool:
        """Whether all of its processes are gone: after a blow, those that were there, too."""
        return self.launcher.poll() is not None and not any(map(is_alive, self.struck))

    def wait(self, seconds: float, until: Callable[[], bool] = lambda: False, poll_s: float = 0.005) -> bool:
        """Wait for all of its processes to be gone, or for something else; False if nothing came in time."""
        deadline = time.monotonic() + seconds
        while not (self.is_over() or until()):
            if time.monotonic() >= deadline:
                return False
            time.sleep(poll_s)
        return True

    def end(self) -> float:
        """Let it come to its end; the seconds that all of it took. Raises `UserError` if it fails or does not."""
        is_over = self.wait(600)
        require(is_over and self.launcher.returncode == 0, f"a run left in peace failed: {self.said()[-1000:]}")
        return time.monotonic() - self.began

    def strike(self, number: signal.Signals, pid: int | None = None) -> None:
        """Send a signal to one of its processes, by default the launcher."""
        self.struck |= set(tree(self.launcher.pid))
        with suppress(ProcessLookupError):
            os.kill(pid or self.launcher.pid, number)

    def kill(self) -> None:
        """SIGKILL to all of its processes."""
        self.strike(signal.SIGSTOP)  # it shall not start another one meanwhile
        for process in tree(self.launcher.pid):
            self.strike(signal.SIGKILL, process.pid)


def is_rank(process: psutil.Process) -> bool:
    """Whether torchrun has started a process to work."""
    with suppress(psutil.Error):
        return "RANK" in process.environ()
    return False


def is_alive(process: psutil.Process) -> bool:
    """Whether a process is there and not a zombie, which nobody may ever fetch."""
    with suppress(psutil.Error):
        return process.is_running() and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    return False
