"""What is like what in a cache, and how its embeddings are taken out."""

import json

import numpy as np
import pytest
import torch

from data.cache import ClipKey, Column, EmbeddingCache
from data.cache_writer import EmbeddedClip
from data.files import hold
from jepa.search import nearest
from pipelines.run import searching
from pipelines.run.searching import Search
from tests.conftest import read_rows
from tests.test_commands import call, refusal


def walk(seed, frames, shape=(5,)):
    """Embeddings that change slowly, as those of videos do."""
    return np.random.default_rng(seed).normal(size=(frames, *shape)).cumsum(axis=0).astype(np.float32)


def clip(name, embeddings, **columns):
    ticks = np.arange(len(embeddings))
    key = ClipKey(f"/v/{name}.mp4", f"content of {name}", 0.0)
    return EmbeddedClip(key, {"embeddings": embeddings.astype(np.float32), **columns}, ticks / 4, ticks)


@pytest.fixture
def cache(tmp_path, write_cache):
    """Seven videos, of two of which there are copies: later, cropped (all is moved alike), and a little worse."""
    walks = {f"{seed}": walk(seed, 40) for seed in range(7)}
    worse = np.random.default_rng(9).normal(size=(2, 40, 5)) * 0.1
    walks["copy of 2"], walks["copy of 5"] = (walks["2"] + worse[0] + 3)[6:], (walks["5"] + worse[1] - 2)[:30]
    return write_cache(tmp_path / "cache", [clip(name, walked) for name, walked in walks.items()])


@pytest.mark.parametrize("block", [7, 4096])
def test_the_nearest_are_those_that_all_comparisons_find(cache, monkeypatch, block):
    monkeypatch.setattr(searching, "BLOCK", block)
    opened = EmbeddingCache(cache)
    embeddings = torch.from_numpy(opened.take(opened.rows))
    search = Search(opened, mean=torch.zeros(5), std=torch.ones(5))
    distances, rows = search.near(embeddings[:10] + 0.5, 3)
    wanted = torch.cdist(embeddings[:10] + 0.5, embeddings).topk(3, largest=False)
    np.testing.assert_allclose(distances, wanted.values, rtol=1e-3)
    np.testing.assert_array_equal(rows, opened.rows[wanted.indices])
    of_others = torch.cdist(embeddings, embeddings)
    of_others[torch.from_numpy(search.videos[:, None] == search.videos)] = torch.inf
    found = [part for _, *part in search.to_others(2)]
    np.testing.assert_allclose(
        np.concatenate([part[0] for part in found]), of_others.topk(2, largest=False).values, rtol=1e-2
    )


def test_where_too_few_are_there_it_says_so():
    blocks = [(torch.ones(2, 3), torch.tensor([4, 5]), torch.tensor([0, 1]))]
    distances, numbers = nearest(torch.zeros(1, 3), blocks, 3, groups=torch.tensor([1]))
    assert numbers.tolist() == [[4, -1, -1]]
    assert distances[0, 0] == pytest.approx(3**0.5)


def test_copies_are_found_and_nothing_else(cache, tmp_path, capsys):
    call("search_cache", f"duplicates --cache {cache} --output-dir {tmp_path}/found")
    found = read_rows(tmp_path / "found" / "found.csv")
    pairs = [{row["video"], row["other_video"]} for row in found]
    assert sorted(map(sorted, pairs)) == [["/v/2.mp4", "/v/copy of 2.mp4"], ["/v/5.mp4", "/v/copy of 5.mp4"]]
    for row in found:
        shift_s = float(row["other_time_s"]) - float(row["time_s"])
        assert abs(abs(shift_s) - (1.5 if "2" in row["video"] else 0)) <= 0.25
        assert float(row["score"]) > 0.8
    assert "no pictures: /v/" in capsys.readouterr().out  # there are no such videos


def test_outliers_and_neighbours_are_one_of_each_video(cache, tmp_path, monkeypatch):
    opened = EmbeddingCache(cache)
    monkeypatch.chdir(tmp_path)
    call("search_cache", f"outliers --cache {cache}")
    found = read_rows(tmp_path / "runs" / "outliers" / "found.csv")
    assert len({row["video"] for row in found}) == len(found) == 9
    scores = [float(row["score"]) for row in found]
    assert scores == sorted(scores, reverse=True)
    call("search_cache", f"neighbours --of 3.mp4@2.6 --cache {cache} --output-dir {tmp_path}/near")
    found = read_rows(tmp_path / "near" / "found.csv")
    assert {(row["video"], row["time_s"]) for row in found} == {("/v/3.mp4", "2.500")}
    assert len(found) == 8
    search = Search.within(opened)
    embeddings = search.standardise(torch.from_numpy(opened.take(opened.rows)))
    clip = [one.key.source for one in opened.clips].index("/v/3.mp4")
    distances = (embeddings - embeddings[np.flatnonzero(opened.clip_of(opened.rows) == clip)[10]]).norm(dim=1)
    distances[torch.from_numpy(opened.clip_of(opened.rows) == clip)] = torch.inf
    assert float(found[0]["score"]) == pytest.approx(float(distances.min()), abs=1e-3)


def test_slips_are_one_line(cache, tmp_path, make_clip, write_cache):
    to = f"--cache {cache} --output-dir {tmp_path}/found"
    assert "--of VIDEO@SECONDS belongs to neighbours" in refusal("search_cache", f"neighbours {to}")
    for moment in ("9.mp4@1", "3.mp4", "3.mp4@noon", "3.mp4@nan", "3.mp4@inf", "3.mp4@1e6", "3.mp4@-2"):
        assert f"--of {moment} is no moment of a video in {cache}" in refusal(
            "search_cache", f"neighbours {to} --of {moment}"
        )
    one = write_cache(tmp_path / "one", [make_clip("/v/a.mp4", 9)])
    line = refusal("search_cache", f"duplicates --cache {one} --output-dir {tmp_path}/found")
    assert "holds one video, and others are searched" in line
    assert f"--output-dir {cache} holds something" in refusal("export_cache", f"{cache} --output-dir {cache}")


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4)])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_is_exported_is_what_is_there_to_the_bit(shape, dtype, tmp_path, make_clip, write_cache):
    parquet = pytest.importorskip("pyarrow.parquet")
    speeds = np.random.default_rng(0).normal(size=12)
    speeds[3] = np.nan
    ticks = {"tick": speeds, "own_tick": 2 * speeds}
    clips = [
        make_clip(f'/v/,"{name}\n.mp4', 12, gaps=[4], shape=shape, speed=speeds * place, **ticks)
        for place, name in enumerate("ab")
    ]
    for one in clips:
        one.columns["embeddings"] = one.columns["embeddings"].astype(dtype)
    column = dict.fromkeys(("speed", "tick", "own_tick"), Column("float64"))
    cache = EmbeddingCache(write_cache(tmp_path / "cache", clips, shape=shape, dtype=dtype, columns=column))
    for kind in ("npy", "parquet", "lance"):
        call("export_cache", f"{cache.folder} --to {kind} --output-dir {tmp_path}/{kind}")
    rows = read_rows(tmp_path / "npy" / "rows.csv")
    tables = [
        parquet.read_table(tmp_path / "parquet" / "embeddings.parquet"),
        pytest.importorskip("lance").dataset(tmp_path / "lance" / "embeddings.lance").to_table(),
    ]
    for table in tables:
        shape = json.loads(table.schema.metadata[b"shape"])
        embeddings = np.stack(table["embedding"].to_numpy(zero_copy_only=False)).reshape(-1, *shape)
        wanted = cache.take(cache.rows)
        assert np.load(tmp_path / "npy" / "embeddings.npy").tobytes() == embeddings.tobytes() == wanted.tobytes()
        own = {"speed": "speed", "own_own_tick": "tick", "own_tick": "own_tick"}
        for ours, theirs in {"time_s": "times_s", "tick": "ticks", **own}.items():
            values = cache.take(cache.rows, theirs)
            np.testing.assert_array_equal([float(row[ours]) for row in rows], values)
            np.testing.assert_array_equal(table[ours].to_numpy(), values)
        sources = [cache.clips[clip].key.source for clip in cache.clip_of(cache.rows)]
        assert [row["video"] for row in rows] == table["video"].to_pylist() == sources
        said = json.loads(table.schema.metadata[b"provenance"])
        assert said == json.loads((tmp_path / "npy" / "provenance.json").read_text())
        assert said["encoder_fingerprint"] == cache.provenance.encoder_fingerprint


def test_an_export_that_was_interrupted_leaves_no_half_and_goes_on(tmp_path, make_clip, write_cache, monkeypatch):
    cache = write_cache(tmp_path / "cache", [make_clip(f"/v/{name}.mp4", 9) for name in "ab"])
    line = f"{cache} --to npy --output-dir {tmp_path}/out"
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.export_cache.write_json", interrupt)
        with pytest.raises(KeyboardInterrupt):
            call("export_cache", line)
    assert list((tmp_path / "out").glob("[!.]*")) == []
    with hold(tmp_path / "out"):
        assert "is in use by another process" in refusal("export_cache", line)
    call("export_cache", line)
    assert {path.name for path in (tmp_path / "out").glob("[!.]*")} == {"embeddings.npy", "rows.csv", "provenance.json"}


def interrupt(*_):
    raise KeyboardInterrupt
