"""Data sets in LeRobot's layout: rows belong to their frames, episodes are kept apart, what is missing is named."""

import json
import os

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data.cache import EmbeddingCache
from data.lerobot import DataSetError, episodes_in, missing_files, read_table
from data.sidecar import SidecarError, read_sidecar
from pipelines import cache_embeddings
from tests.conftest import save_encoder

FPS, LENGTHS, CAMERAS = 10, (20, 15, 12), ("observation.images.top", "observation.images.wrist")


def rows_of(episode, length):
    """A table whose first action is 100 times the episode and the frame; its own clock is late."""
    frames = np.arange(length)
    return {
        "action": [[100.0 * episode + frame, 1.0] for frame in frames], "observation.state": [[0.5, 0.5]] * length,
        "timestamp": (frames * 1.07 / FPS).tolist(), "frame_index": frames.tolist(),
        "episode_index": [episode] * length,
        "task": ["pick"] * length,
    }  # fmt: skip


def write_parquet(path, columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def write_info(root, version, **paths):
    features = {name: {"dtype": "video"} for name in CAMERAS} | {"action": {"dtype": "float32", "shape": [2]}}
    (root / "meta").mkdir(parents=True)
    info = {"codebase_version": version, "fps": FPS, "features": features, "chunks_size": 2} | paths
    (root / "meta" / "info.json").write_text(json.dumps(info))


@pytest.fixture
def version_2(tmp_path, encode_video):
    """Three episodes, two in a chunk; of the second one a video is missing, of the third the table."""
    root = tmp_path / "v2"
    write_info(
        root, "v2.1", data_path="data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        video_path="videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    )  # fmt: skip
    lines = [json.dumps({"episode_index": one, "length": length}) for one, length in enumerate(LENGTHS)]
    (root / "meta" / "episodes.jsonl").write_text("\n".join(lines))
    for one, length in enumerate(LENGTHS):
        if one != 2:
            write_parquet(root / f"data/chunk-{one // 2:03d}/episode_{one:06d}.parquet", rows_of(one, length))
        for camera in CAMERAS[: 2 - (one == 1)]:
            video = root / f"videos/chunk-{one // 2:03d}/{camera}/episode_{one:06d}.mp4"
            video.parent.mkdir(parents=True, exist_ok=True)
            encode_video(
                video, length, range(50 * one + 9 * len(camera), 50 * one + 9 * len(camera) + length), rate=FPS
            )
    return root


@pytest.fixture
def version_3(tmp_path, encode_video):
    """Three episodes in one video of each camera; the last one's rows are in another table."""
    root = tmp_path / "v3"
    write_info(
        root, "v3.0", data_path="data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        video_path="videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    )  # fmt: skip
    ends = np.cumsum(LENGTHS)
    episodes = []
    for one, (length, end) in enumerate(zip(LENGTHS, ends, strict=True)):
        row = {"episode_index": one, "length": length, "data/chunk_index": 0, "data/file_index": one // 2}
        for camera in CAMERAS:
            at = f"videos/{camera}"
            row |= {f"{at}/chunk_index": 0, f"{at}/file_index": 0}
            row |= {f"{at}/from_timestamp": (end - length) / FPS, f"{at}/to_timestamp": end / FPS}
        episodes.append(row)
    write_parquet(
        root / "meta/episodes/chunk-000/file-000.parquet", {name: [row[name] for row in episodes] for name in row}
    )
    first, second, third = (rows_of(one, length) for one, length in enumerate(LENGTHS))
    write_parquet(root / "data/chunk-000/file-000.parquet", {name: second[name] + first[name] for name in first})
    write_parquet(root / "data/chunk-000/file-001.parquet", third)
    for camera in CAMERAS:
        video = root / f"videos/{camera}/chunk-000/file-000.mp4"
        video.parent.mkdir(parents=True)
        encode_video(video, int(ends[-1]), range(9 * len(camera), 9 * len(camera) + int(ends[-1])), rate=FPS)
    return root


def test_a_row_belongs_to_its_frame_whatever_its_own_clock_says(version_2):
    video = version_2 / f"videos/chunk-000/{CAMERAS[0]}/episode_000001.mp4"
    found = read_sidecar(video, np.arange(15) / FPS, columns=("action_0", "timestamp"), tolerance_s=0.05)
    assert found[:, 0].tolist() == [100 + frame for frame in range(15)]
    assert found[-1, 1] == pytest.approx(1.4 * 1.07)
    names, _ = read_table(video)
    assert names[:3] == ["time_s", "action_0", "action_1"]
    assert "task" not in names
    assert [missing.relative_to(version_2).as_posix() for missing in missing_files([video])] == [
        f"videos/chunk-000/{CAMERAS[1]}/episode_000001.mp4", "data/chunk-001/episode_000002.parquet",
    ]  # fmt: skip


def embed(videos, folder):
    save_encoder(folder / "encoder", image_size=(32, 48), embedding_dimension=4)
    given = {"encoder": str(folder / "encoder"), "output_dir": folder / "cache", "columns": ("action_*",)}
    cache_embeddings.main(cache_embeddings.Options(videos=(videos,), fps=5.0, **given))
    return EmbeddingCache(folder / "cache")


def test_several_episodes_of_a_video_are_kept_apart_at_their_very_borders(version_3, tmp_path):
    cache = embed(version_3, tmp_path)
    assert len(cache.clips) == len(CAMERAS)
    for clip in cache.clips:
        actions, times_s = cache.take(clip.rows, "action_0"), cache.take(clip.rows, "times_s")
        runs = cache.unbroken_runs(clip, ("action_0",))
        assert [len(run) for run in runs] == [10, 8, 6]  # ticks of .2 s: frames 0 to 19, 20 to 34, 35 to 46
        borders = np.cumsum([0, *LENGTHS])
        frames = (times_s * FPS).round().astype(int)
        episode = np.searchsorted(borders, frames, side="right") - 1
        assert actions.tolist() == (100 * episode + frames - borders[episode]).tolist()


def test_what_is_missing_or_odd_is_named(version_2, version_3, tmp_path, capsys):
    embed(version_2, tmp_path)
    said = capsys.readouterr().out
    assert f"{CAMERAS[1]}/episode_000001.mp4: its data set promises it, and it is not there" in said
    assert "episode_000002.parquet" in said
    video = version_3 / f"videos/{CAMERAS[0]}/chunk-000/file-000.mp4"
    with pytest.raises(SidecarError, match="no column 'speed' among action_0"):
        read_sidecar(video, np.arange(3.0), columns=("speed",), tolerance_s=1)
    long = version_2 / f"videos/chunk-000/{CAMERAS[0]}/episode_000000.mp4"
    write_parquet(version_2 / "data/chunk-000/episode_000000.parquet", rows_of(0, 25))
    with pytest.raises(SidecarError, match="episode 0 has 25 rows, not one a frame"):
        read_sidecar(long, np.arange(3.0), columns=("action_0",), tolerance_s=1)
    write_parquet(version_2 / "data/chunk-000/episode_000000.parquet", rows_of(0, 20) | {"action_0": [7.0] * 20})
    with pytest.raises(SidecarError, match="several columns 'action_0'"):
        read_sidecar(long, np.arange(20) / FPS, columns=("action_0",), tolerance_s=1)


@pytest.mark.parametrize(
    "change",
    [
        {"fps": "x"}, {"data_path": "../{episode_index}"}, {"features": 3}, {"video_path": "{x}"}, {"fps": 0},
        {"chunks_size": 0}, {"data_path": "{episode_index:09999999999d}"}, {"video_path": "{video_key:>999999999}"},
        {"video_path": "{video_key:.{episode_index}}"}, {"fps": float("inf")}, {"fps": float("nan")}, {"fps": -10},
    ],
)  # fmt: skip
def test_a_set_that_cannot_be_is_refused(version_2, change):
    path = version_2 / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataSetError, match="v2: cannot be read as a LeRobot data set"):
        episodes_in(version_2 / f"videos/chunk-000/{CAMERAS[0]}/episode_000000.mp4")


def test_episodes_without_end_are_refused(version_2):
    episodes = version_2 / "meta" / "episodes.jsonl"
    episodes.write_text("[" * 100_000)
    with pytest.raises(DataSetError, match="v2: cannot be read as a LeRobot data set"):
        missing_files([version_2 / "videos" / "a.mp4"])
    episodes.unlink()
    os.mkfifo(episodes)
    assert missing_files([version_2 / "videos" / "a.mp4"]) == []


def test_a_set_whose_rate_is_not_its_videos_is_refused(version_2):
    path, video = version_2 / "meta/info.json", version_2 / f"videos/chunk-000/{CAMERAS[0]}/episode_000000.mp4"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fps": FPS / 2}))
    with pytest.raises(SidecarError, match=r"says 5 frames a second, and the video 10"):
        read_sidecar(video, np.arange(20) / FPS, columns=("action_0",), tolerance_s=0.05)


@pytest.mark.parametrize("odd", [[[1], [2, 3]] * 10, [["a"]] * 20, [[[1.0]]] * 20, [[1.0], [None]] * 10])
def test_an_odd_column_costs_no_other_one(version_2, odd):
    video = version_2 / f"videos/chunk-000/{CAMERAS[0]}/episode_000000.mp4"
    write_parquet(version_2 / "data/chunk-000/episode_000000.parquet", rows_of(0, 20) | {"odd": odd})
    found = read_sidecar(video, np.arange(20) / FPS, columns=("action_0",), tolerance_s=0.05)
    assert found[:, 0].tolist() == list(range(20))


def test_frames_are_counted_from_0(version_2):
    video = version_2 / f"videos/chunk-000/{CAMERAS[0]}/episode_000000.mp4"
    rows = rows_of(0, 20)
    write_parquet(
        version_2 / "data/chunk-000/episode_000000.parquet",
        rows | {"frame_index": [frame + 1 for frame in rows["frame_index"]]},
    )
    with pytest.raises(SidecarError, match="episode 0 has 20 rows, not one a frame"):
        read_sidecar(video, np.arange(20) / FPS, columns=("action_0",), tolerance_s=0.05)


def test_a_video_elsewhere_is_in_no_set(tmp_path):
    assert episodes_in(tmp_path / "x.mp4") == []
    assert read_table(tmp_path / "x.mp4") is None
