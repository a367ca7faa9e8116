r"""Kill the caching of embeddings again and again, and prove that nothing is lost, doubled or damaged.

  python benchmarks/kill_caching.py --kills 50

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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.embedding_cache import EmbeddingCache
from data.synthetic import BallWorld, write_ball_videos
from jepa.encoder import EncoderConfig, create_encoder
from pipelines.stage import UserError, require, run_stage, write_json

ROOT = Path(__file__).parent.parent
WATCHED = """
import os, runpy, sys
from data.embedding_cache import CacheWriter

log = os.open(os.environ["KILL_LOG"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
add = CacheWriter.add

def watched(self, clip):
    os.write(log, (clip.key.source + "\\n").encode())
    add(self, clip)

CacheWriter.add = watched
runpy.run_path(os.path.join(os.environ["KILL_ROOT"], "pipelines", "cache_embeddings.py"), run_name="__main__")
"""
"""The stage as it is, but each finished clip leaves a line, from which one sees what a kill cost."""


@dataclass(frozen=True)
class Options:
    """Kill the caching of embeddings at random moments."""

    kills: int = 50
    """How often."""
    videos: int = 150
    """Videos to embed."""
    frames: int = 120
    """Frames in a video."""
    clips_per_shard: int = 4
    """The buffer: what a kill may cost each process."""
    seed: int = 0
    """Of the moments."""
    output_dir: Path = Path("runs/benchmarks/kill_caching")
    """Where results.json is left."""


def main(options: Options) -> None:
    """The story: embed undisturbed, then kill and look, kill and look, and compare."""
    require(options.kills > 0, f"--kills is {options.kills}: it must be positive")
    generator = np.random.default_rng(options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_ball_videos(folder / "videos", options.videos, BallWorld(frames=options.frames), options.seed)
        torch.manual_seed(0)
        create_encoder(EncoderConfig()).eval().save_pretrained(folder / "encoder")
        (folder / "watched.py").write_text(WATCHED)

        run = Run(folder, folder / "undisturbed", options.clips_per_shard, processes=1)
        started_s = run.wait_for_first_clip()
        require(run.process.wait() == 0, f"the undisturbed run failed: {run.said()}")
        whole_s = time.monotonic() - run.began
        undisturbed = EmbeddingCache(folder / "undisturbed")

        kills, lost, redone, caches = 0, [], 0, 0
        bar = tqdm(total=options.kills, unit="kill")
        while kills < options.kills:
            cache = folder / f"killed_{caches}"
            caches += 1
            processes, complete = int(generator.integers(1, 3)), False
            while not complete:
                run = Run(folder, cache, options.clips_per_shard, processes)
                if kills < options.kills and run.kill_after(generator.uniform(0.9 * started_s, whole_s)):
                    kills += 1
                    bar.update()
                    lost.append(finished_but_gone(run, cache))
                    require(
                        lost[-1] <= processes * options.clips_per_shard,
                        f"a kill of {processes} processes cost {lost[-1]} clips: more than a buffer each",
                    )
                    redone += lost[-1]
                else:
                    require(run.process.wait() == 0, f"a run after a kill failed: {run.said()}")
                    complete = True
                processes = 3 - processes
            require_equal(EmbeddingCache(cache), undisturbed)
            shutil.rmtree(cache)
        bar.close()
    results = {
        "kills": kills, "caches": caches, "clips": options.videos, "clips_per_shard": options.clips_per_shard,
        "kills_that_cost_something": sum(count > 0 for count in lost), "most_clips_lost_by_a_kill": max(lost),
    }  # fmt: skip
    options.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(options.output_dir / "results.json", results)
    print(
        f"{kills} kills over {caches} caches of {options.videos} clips: every clip there once and bit for bit as in an "
        f"undisturbed run, every shard readable; a kill cost at most {max(lost)} finished clips "
        f"({options.clips_per_shard} a buffer), {redone} in all"
    )


class Run:
    """One start of the stage, with as many processes as asked for."""

    def __init__(self, folder: Path, cache: Path, clips_per_shard: int, processes: int) -> None:
        self.log = folder / "log"
        self.log.unlink(missing_ok=True)
        self.output = folder / "output"
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [*launcher, folder / "watched.py", "--videos", folder / "videos", "--encoder", folder / "encoder",
                   "--fps", 10, "--output-dir", cache, "--clips-per-shard", clips_per_shard]  # fmt: skip
        environment = os.environ | {
            "KILL_LOG": str(self.log), "KILL_ROOT": str(ROOT), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
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

    def kill_after(self, seconds: float) -> bool:
        """SIGKILL to all of its processes after so many seconds; False if it was done before."""
        try:
            self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            for process in descendants(self.process.pid):
                os.kill(process, signal.SIGKILL)
            self.process.wait()
            return True
        return False

    def finished(self) -> list[str]:
        """The videos that were finished, in order."""
        return self.log.read_text().splitlines() if self.log.exists() else []

    def said(self) -> str:
        """The last that it printed."""
        return self.output.read_text()[-500:]


def descendants(pid: int) -> list[int]:
    """A process and all that it has started; torchrun gives each of its workers a session of its own."""
    children = [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]
    return [pid, *(process for child in children for process in descendants(child))]


def finished_but_gone(run: Run, cache: Path) -> int:
    """How many of the clips that a killed run had finished are not in the cache; all shards in it must be readable."""
    finished = run.finished()
    if not list((cache / "shards").glob("[!.]*.json")):
        return len(finished)
    kept = EmbeddingCache(cache)
    require(all(kept.is_intact(clip) for clip in kept.clips), f"{cache}: a shard is damaged after a kill")
    return len(set(finished) - {clip.key.source for clip in kept.clips})


def require_equal(cache: EmbeddingCache, undisturbed: EmbeddingCache) -> None:
    """Raises `UserError` unless two caches hold the same clips, bit for bit, each once."""
    require(len(cache.times_s) == cache.frames, f"{cache.folder}: a clip is there twice")
    require([clip.key for clip in cache.clips] == [clip.key for clip in undisturbed.clips], "clips are missing")
    for one, other in zip(cache.clips, undisturbed.clips, strict=True):
        if one.crc32 != other.crc32 or not np.array_equal(
            cache.clip_embeddings(one), undisturbed.clip_embeddings(other)
        ):
            raise UserError(f"{one.key.source}: its embeddings differ from those of an undisturbed run")


if __name__ == "__main__":
    run_stage(main, Options)
