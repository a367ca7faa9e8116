r"""Kill the caching of embeddings again and again, and prove that nothing is lost, doubled or damaged.

  python -m benchmarks.kill_caching --kills 50

Small videos are embedded once undisturbed. Then the same is done in runs of 1 or 2 processes in turn, all of which get
SIGKILL at a random moment after they have begun to embed. After each kill every shard that has a manifest must be
readable, and each clip that was finished must be committed, but for one buffer a process; in the end a last run is left
in peace, and every clip must be there once, bit for bit as in the undisturbed run. When a cache is complete before
there were enough kills, the next one is begun.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks.common import ROOT, descendants, make_encoder
from data.cache import EmbeddingCache
from data.synthetic import BallWorld, write_ball_videos
from jepa.config import Bounded, NotNegativeInt, PositiveInt
from pipelines.run.command import require, run_command
from pipelines.run.files import write_json

WATCHED = """
import os, runpy, sys
from data.cache_writer import CacheWriter

log = os.open(os.environ["KILL_LOG"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
add = CacheWriter.add

def watched(self, clip):
    os.write(log, (clip.key.source + "\\n").encode())
    add(self, clip)

CacheWriter.add = watched
runpy.run_path(os.path.join(os.environ["PYTHONPATH"], "pipelines", "cache_embeddings.py"), run_name="__main__")
"""
"""The command as it is, but each finished clip leaves a line, from which one sees what a kill cost."""


@dataclass(frozen=True)
class Options(Bounded):
    """Kill the caching of embeddings at random moments."""

    kills: PositiveInt = 50
    """Number of kills."""
    videos: PositiveInt = 150
    """Videos to embed."""
    frames: PositiveInt = 120
    """Frames in a video."""
    clips_per_shard: PositiveInt = 4
    """The buffer: what a kill may cost each process."""
    seed: NotNegativeInt = 0
    """Seed of the moments."""
    output_dir: Path = Path("runs/benchmarks/kill_caching")
    """Folder for results.json."""


def main(options: Options) -> None:
    """The story: embed undisturbed, then kill and look, kill and look, and compare."""
    generator = np.random.default_rng(options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_ball_videos(folder / "videos", options.videos, BallWorld(frames=options.frames), seed=options.seed)
        make_encoder(folder / "encoder", 64)
        (folder / "watched.py").write_text(WATCHED)
        run = Embedding(folder, folder / "undisturbed", options.clips_per_shard, processes=1)
        started_s = run.wait_for_first_clip()
        run.wait()
        whole_s = time.monotonic() - run.began
        undisturbed = EmbeddingCache(folder / "undisturbed")

        lost: list[int] = []
        caches = 0
        with tqdm(total=options.kills, unit="kill") as bar:
            while len(lost) < options.kills:
                cache = folder / f"killed_{caches}"
                caches += 1
                processes, is_complete = int(generator.integers(1, 3)), False
                while not is_complete:
                    run = Embedding(folder, cache, options.clips_per_shard, processes)
                    wait_s = generator.uniform(0.9 * started_s, whole_s)
                    is_complete = len(lost) == options.kills or not run.kill_after(wait_s)
                    if is_complete:
                        run.wait()
                    else:
                        lost.append(finished_but_gone(run, cache))
                        buffered = processes * options.clips_per_shard
                        require(lost[-1] <= buffered, f"a kill cost {lost[-1]} clips: more than {buffered} in buffers")
                        bar.update()
                    processes = 3 - processes
                require_equal(EmbeddingCache(cache), undisturbed)
                shutil.rmtree(cache)
    results = {
        "kills": len(lost), "caches": caches, "clips": options.videos, "clips_per_shard": options.clips_per_shard,
        "kills_that_cost_something": sum(count > 0 for count in lost), "most_clips_lost_by_a_kill": max(lost),
    }  # fmt: skip
    options.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(options.output_dir / "results.json", results)
    print(
        f"{len(lost)} kills over {caches} caches of {options.videos} clips: every clip there once, bit for bit as in "
        f"an undisturbed run, every shard readable; a kill cost at most {max(lost)} finished clips "
        f"({options.clips_per_shard} a buffer), {sum(lost)} in all"
    )


class Embedding:
    """One start of the command, with as many processes as asked for."""

    def __init__(self, folder: Path, cache: Path, clips_per_shard: int, processes: int) -> None:
        self.log, self.output = folder / "log", folder / "output"
        self.log.unlink(missing_ok=True)
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [*launcher, folder / "watched.py", "--videos", folder / "videos", "--encoder", folder / "encoder",
                   "--fps", 10, "--output-dir", cache, "--clips-per-shard", clips_per_shard]  # fmt: skip
        environment = os.environ | {"KILL_LOG": str(self.log), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.began = time.monotonic()
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                list(map(str, command)), stdout=output, stderr=output, env=environment, start_new_session=True
            )

    def wait_for_first_clip(self) -> float:
        """Seconds until the first clip is finished."""
        while not (self.log.exists() and self.log.stat().st_size) and self.process.poll() is None:
            time.sleep(0.01)
        return time.monotonic() - self.began

    def wait(self) -> None:
        """Let it end. Raises `UserError` if it fails."""
        require(self.process.wait() == 0, f"a run that was not killed failed: {self.output.read_text()[-500:]}")

    def kill_after(self, seconds: float) -> bool:
        """SIGKILL to all of its processes after so many seconds; False if it was done before."""
        try:
            self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            for process in descendants(self.process.pid):
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            self.process.wait()
            return True
        return False


def finished_but_gone(run: Embedding, cache: Path) -> int:
    """Clips that a killed run had finished and that are not in the cache; all shards in it must be readable."""
    finished = set(run.log.read_text().splitlines()) if run.log.exists() else set()
    if not list((cache / "shards").glob("[!.]*.json")):
        return len(finished)
    kept = EmbeddingCache(cache)
    require(all(map(kept.is_intact, kept.clips)), f"{cache}: a shard is damaged after a kill")
    return len(finished - {clip.key.source for clip in kept.clips})


def require_equal(cache: EmbeddingCache, undisturbed: EmbeddingCache) -> None:
    """Raises `UserError` unless two caches hold the same clips, bit for bit, each once."""
    written = [path.read_text() for path in (cache.folder / "shards").glob("*.json")]
    times = sum(text.count(".mp4") for text in written)
    require(times == len(cache.clips), f"{cache.folder}: {times} clips were written, and {len(cache.clips)} are there")
    require([clip.key for clip in cache.clips] == [clip.key for clip in undisturbed.clips], "clips are missing")
    for one, other in zip(cache.clips, undisturbed.clips, strict=True):
        same = np.array_equal(cache.clip_embeddings(one), undisturbed.clip_embeddings(other))
        require(same and one.crc32 == other.crc32, f"{one.key.source}: other embeddings than in an undisturbed run")


if __name__ == "__main__":
    run_command(main, Options)
