r"""Take embeddings out of a cache, for other tools, as they are: a table of Parquet or Lance, or an array of NumPy.

  video-jepa export cache/test --to parquet --output-dir exported

parquet, which takes `pip install 'video-jepa[parquet]'`: `embeddings.parquet`, a row for each embedding with video,
content, time, tick and columns, the embedding as a list of float32, its shape and the cache's provenance in the file's
metadata. lance, which takes `video-jepa[lance]`: the same table as `embeddings.lance`. npy: `embeddings.npy`, float32
(rows, *tokens, D), the rest in `rows.csv` and `provenance.json`. docs/python.md shows the way back into a cache.
"""

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
from tqdm import tqdm
from tyro.conf import Positional

from data.cache import EmbeddingCache
from data.files import apart, hold
from jepa.config import Bounded
from pipelines.run.command import imported, require, run_command
from pipelines.run.files import to_json, write_json

OURS = ("video", "content", "clock_offset_s", "time_s", "tick", "embedding")  # a user's column so called is `own_...`


@dataclass(frozen=True)
class Options(Bounded):
    """Take embeddings out of a cache."""

    cache: Positional[Path]
    """The cache."""
    output_dir: Path = Path("exported")
    """Where the files are left; a new or empty folder."""
    to: Literal["parquet", "lance", "npy"] = "parquet"
    """Kind of the files."""


def main(options: Options) -> None:
    """Clip by clip, in memory for one of them."""
    cache, folder = EmbeddingCache(options.cache), options.output_dir
    is_free = not folder.exists() or (folder.is_dir() and not any(folder.glob("[!.]*")))
    require(is_free, f"--output-dir {folder} holds something: take a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    with hold(folder), TemporaryDirectory(dir=folder, prefix=".tmp.") as unfinished:  # what is not whole has no name
        if options.to == "npy":
            to_npy(cache, Path(unfinished))
        else:
            to_table(cache, Path(unfinished), options.to)
        for path in Path(unfinished).iterdir():
            path.rename(folder / path.name)
    print(f"wrote {folder}: {cache.frames:,} embeddings of shape {cache.shape}")


def columns_of(cache: EmbeddingCache) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Of each clip its columns by name, (T,) each, and its embeddings, float32 (T, *tokens, D)."""
    own = apart([name for name in cache.provenance.columns if name != "embeddings"], OURS)
    names = {"time_s": "times_s", "tick": "ticks"} | own
    for clip in tqdm(cache.clips, "exporting", unit="clip", leave=False):
        video = clip.key.source.encode(errors="backslashreplace").decode()  # names need not be UTF-8
        key = {"video": video, "content": clip.key.content, "clock_offset_s": clip.key.offset_s}
        columns = {name: [value] * clip.frames for name, value in key.items()}
        columns |= {name: cache.take(clip.rows, own).tolist() for name, own in names.items()}
        yield columns, cache.take(clip.rows)


def to_npy(cache: EmbeddingCache, folder: Path) -> None:
    """Embeddings as one array, a row of a table for each, and the provenance."""
    shape, first = (cache.frames, *cache.shape), 0
    stored = np.lib.format.open_memmap(folder / "embeddings.npy", mode="w+", dtype=np.float32, shape=shape)
    with (folder / "rows.csv").open("w", newline="") as file:
        for columns, embeddings in columns_of(cache):
            csv.writer(file).writerows([[*columns]] * (first == 0) + [*zip(*columns.values(), strict=True)])
            stored[first : (first := first + len(embeddings))] = embeddings
    stored.flush()
    write_json(folder / "provenance.json", cache.provenance)


def to_table(cache: EmbeddingCache, folder: Path, kind: str) -> None:
    """One table, clip after clip. Raises `UserError` where what writes it is missing."""
    mend = f"--to {kind} takes more: pip install 'video-jepa[{kind}]', or --to npy"
    pyarrow = imported("pyarrow", mend)
    library = imported("lance" if kind == "lance" else "pyarrow.parquet", mend)
    said = {"shape": json.dumps(cache.shape), "provenance": json.dumps(to_json(cache.provenance))}
    tables = (
        pyarrow.table(
            columns | {"embedding": pyarrow.FixedSizeListArray.from_arrays(embeddings.ravel(), math.prod(cache.shape))}
        ).replace_schema_metadata(said)
        for columns, embeddings in columns_of(cache)
    )
    first = next(tables)  # a cache has clips
    batches = (batch for table in chain([first], tables) for batch in table.to_batches())
    if kind == "lance":
        library.write_dataset(batches, folder / "embeddings.lance", schema=first.schema)
    else:
        with library.ParquetWriter(folder / "embeddings.parquet", first.schema) as writer:
            for batch in batches:
                writer.write_batch(batch)


if __name__ == "__main__":
    run_command(main, Options)
