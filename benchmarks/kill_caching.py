r"""Kill the caching of embeddings again and again, and prove that nothing is lost, doubled or damaged.

  python -m benchmarks.kill_caching --kills 50

Small videos are embedded once undisturbed. Then the same is done in runs of 1 or 2 processes in turn, all of which get
SIGKILL at a random moment after they have begun to embed. After each kill every shard that has a manifest must be
readable, and each clip that was finished must be committed, but for one buffer a process; in the end a last run is left
in peace, and every clip must be there once, bit for bit as in the undisturbed run. When a cache is complete before
there were enough kills, the next one is begun.
"""

import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks.common import make_encoder, write_results
from benchmarks.lives import Life
from data.cache import EmbeddingCache
from data.synthetic import BallWorld, write_ball_videos
from jepa.config import Bounded, PositiveInt
from pipelines.run.command import require, run_command

CLIPS_PER_SHARD = 4
"""The buffer: what a kill may cost each process."""
WATCHED = """
import os, runpy
from data.cache_writer import CacheWriter

log = os.open(os.environ["KILL_LOG"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
add = CacheWriter.add

def watched(self, clip):
    os.write(log, (clip.key.source + "\\n").encode())
    add(self, clip)

CacheWriter.add = watched
runpy.run_path("pipelines/cache_embeddings.py", run_name="__main__")
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
    output_dir: Path = Path("runs/benchmarks/kill_caching")
    """Folder for results.json."""


def main(options: Options) -> None:
    """The story: embed undisturbed, then kill and look, kill and look, and compare."""
    generator, lost, caches, processes = np.random.default_rng(0), list[int](), 0, 1
    with tempfile.TemporaryDirectory() as scratch, tqdm(total=options.kills, unit="kill") as bar:
        folder = Path(scratch)
        write_ball_videos(folder / "videos", options.videos, BallWorld(frames=options.frames), seed=0)
        make_encoder(folder / "encoder", 64)
        (folder / "watched.py").write_text(WATCHED)
        life = start(folder, folder / "undisturbed", processes)
        life.wait(600, lambda: bool(finished(folder)))
        begun_s = time.monotonic() - life.began
        whole_s = life.end()
        while len(lost) < options.kills:
            cache, is_complete = folder / f"killed_{caches}", False
            caches += 1
            while not is_complete:
                processes = 3 - processes
                life = start(folder, cache, processes)
                is_complete = len(lost) == options.kills or life.wait(generator.uniform(0.9 * begun_s, whole_s))
                if is_complete:
                    life.end()
                    continue
                life.kill()
                require(life.wait(60), f"a killed run does not end: {life.said()[-500:]}")
                lost.append(finished_but_gone(folder, cache))
                buffered = processes * CLIPS_PER_SHARD
                require(lost[-1] <= buffered, f"a kill cost {lost[-1]} clips: more than {buffered} in buffers")
                bar.update()
            require_equal(EmbeddingCache(cache), EmbeddingCache(folder / "undisturbed"))
            shutil.rmtree(cache)
    write_results(options.output_dir, {"kills": len(lost), "caches": caches, "clips lost by each kill": lost})
    print(
        f"{len(lost)} kills over {caches} caches of {options.videos} clips: every clip there once, bit for bit as in "
        f"an undisturbed run, every shard readable; a kill cost at most {max(lost)} finished clips "
        f"({CLIPS_PER_SHARD} a buffer), {sum(lost)} in all"
    )


def start(folder: Path, cache: Path, processes: int) -> Life:
    """Begin a cache, or go on with it."""
    (folder / "log").unlink(missing_ok=True)
    given = {"videos": folder / "videos", "encoder": folder / "encoder", "fps": 10, "output-dir": cache}
    return Life(processes, folder / "watched.py", given, {"clips-per-shard": CLIPS_PER_SHARD},
                output=folder / "said", KILL_LOG=str(folder / "log"))  # fmt: skip


def finished(folder: Path) -> set[str]:
    """Videos of the clips that the newest run has finished."""
    return set((folder / "log").read_text().splitlines()) if (folder / "log").exists() else set()


def finished_but_gone(folder: Path, cache: Path) -> int:
    """Clips that a killed run had finished and that are not in the cache; all shards in it must be readable."""
    if not list((cache / "shards").glob("[!.]*.json")):
        return len(finished(folder))
    kept = EmbeddingCache(cache)
    require(all(map(kept.is_intact, kept.clips)), f"{cache}: a shard is damaged after a kill")
    return len(finished(folder) - {clip.key.source for clip in kept.clips})


def require_equal(cache: EmbeddingCache, undisturbed: EmbeddingCache) -> None:
    """Raises `UserError` unless two caches hold the same clips, bit for bit, each once."""
    written = [path.read_text() for path in (cache.folder / "shards").glob("*.json")]
    times = sum(text.count(".mp4") for text in written)
    require(times == len(cache.clips), f"{cache.folder}: {times} clips were written, and {len(cache.clips)} are there")
    require([clip.key for clip in cache.clips] == [clip.key for clip in undisturbed.clips], "clips are missing")
    for one, other in zip(cache.clips, undisturbed.clips, strict=True):
        same = np.array_equal(cache.take(one.rows), undisturbed.take(other.rows))
        require(same and one.crc32 == other.crc32, f"{one.key.source}: other embeddings than in an undisturbed run")


if __name__ == "__main__":
    run_command(main, Options)
