"""From a folder to a page by one command."""

import re
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from data.errors import VideoError
from data.manifest import read_manifest
from data.splits import split_videos
from data.synthetic import BallWorld, write_ball_videos
from data.video import VideoInfo
from pipelines.cli import COMMANDS
from pipelines.run import stages
from pipelines.run.command import Finished, Interrupted
from pipelines.run.files import read_json
from tests.test_commands import call, refusal


def videos(*names):
    fields = dict.fromkeys(VideoInfo.__dataclass_fields__, 0)
    return [VideoInfo(**fields | {"path": Path("/v", name), "content": name}) for name in names]


def names(part):
    return [str(video.path.relative_to("/v")) for video in part]


def test_a_recording_is_in_one_split_only():
    parts = split_videos(videos(*(f"{number:02}.mp4" for number in range(20))))
    assert {split: len(part) for split, part in parts.items()} == {"train": 14, "val": 3, "test": 3}
    assert names(parts["val"]) == ["14.mp4", "15.mp4", "16.mp4"]
    cameras = videos(*(f"{side}/{number}.mp4" for side in ("left", "right") for number in range(4)))
    assert names(split_videos(cameras)["test"]) == ["left/3.mp4", "right/3.mp4"]
    trips = videos(*(f"trip {number}/{side}.mp4" for number in range(4) for side in ("front", "rear", "left")))
    assert len(split_videos(trips)["test"]) == 3
    assert {name.partition("/")[0] for name in names(split_videos(trips)["test"])} == {"trip 3"}
    own = videos(*(f"{split}/{number}.mp4" for split in ("train", "val", "test") for number in range(2)))
    assert {split: names(part) for split, part in split_videos(own).items()} == {
        split: [f"{split}/0.mp4", f"{split}/1.mp4"] for split in ("train", "val", "test")
    }
    with pytest.raises(VideoError, match=r"stray\.mp4 is in none of the folders train, val and test"):
        split_videos([*own, *videos("stray.mp4")])
    with pytest.raises(VideoError, match=r"in folders train and test, and none in one called val"):
        split_videos(videos("train/0.mp4", "train/1.mp4", "test/0.mp4", "2.mp4"))


@pytest.mark.parametrize("name", [
    "GX{part:02}{number:04}.MP4", "20240501_0630{number:02}_{camera}.mp4", "20240501_0630{number:02}{camera}.MP4",
    "20240501_0630{number:02}_N{camera}.mp4", "2024-05-01_06-30-{number:02}-{side}.mp4", "{side}/{case}{number:02}.mp4",
])  # fmt: skip
def test_cameras_and_chapters_are_of_one_recording(name):
    marks = [{"part": 1, "camera": "F", "side": "left_repeater", "case": "CLIP"},
             {"part": 2, "camera": "R", "side": "back", "case": "clip"}]  # fmt: skip
    parts = split_videos(videos(*(name.format(number=number, **mark) for number in range(10) for mark in marks)))
    assert {split: len(part) for split, part in parts.items()} == {"train": 12, "val": 4, "test": 4}
    for part in parts.values():
        numbers = [re.search(r"(\d\d)\D*$", video.path.stem).group(1) for video in part]
        assert all(numbers.count(number) == 2 for number in numbers)


class Here:
    """A process that is this one; the one of the number `dies` is interrupted."""

    words, dies = (), -1

    def __init__(self, command, cwd):
        Here.words.append(command[3:])

    def wait(self):
        if len(Here.words) == Here.dies:
            Here.dies = -1
            raise KeyboardInterrupt
        word, *rest = Here.words[-1]
        with suppress(Finished):
            call(COMMANDS[word], " ".join(rest))
        return 0


def test_one_command_leads_from_a_folder_to_a_page_and_goes_on(tmp_path, monkeypatch, capsys):
    write_ball_videos(tmp_path / "my_videos", 9, BallWorld(size=32, radius=3, frames=30, fps=8), seed=0)
    (tmp_path / "my_videos" / "notes.mp4").write_text("this is no video")
    monkeypatch.setattr(stages, "subprocess", SimpleNamespace(Popen=Here))
    monkeypatch.setattr(Here, "words", [])
    monkeypatch.setattr(Here, "dies", 4)
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    line = f"{tmp_path}/my_videos --output-dir {tmp_path}/runs --fps 8 --encoder-steps 2"
    line += " --predictor-steps 2 --decoder-steps 2 --columns ball_1_x --actions ball_?_vx --open"
    with pytest.raises(Interrupted, match="embed was interrupted: run this again, and it goes on"):
        call("all_stages", line)
    call("all_stages", line)
    shown = re.findall(r"^(\d+) of (\d+): \$ video-jepa (\S+)", capsys.readouterr().out, re.MULTILINE)
    assert [int(number) for number, *_ in shown] == [*range(1, 5), *range(1, 11)]
    assert {of for _, of, _ in shown} == {"10"}
    shown = [word for *_, word in shown]
    assert [words[0] for words in Here.words[4:]] == [
        "pretrain", "embed", "embed", "embed", "train", "evaluate", "train-decoder", "imagine", "surprise", "report",
    ]  # fmt: skip
    assert shown == [words[0] for words in Here.words]
    parts = {
        split: read_manifest(tmp_path / "runs" / "videos" / f"{split}.jsonl") for split in ("train", "val", "test")
    }
    assert {split: len(part) for split, part in parts.items()} == {"train": 7, "val": 1, "test": 1}
    page = (tmp_path / "runs" / "report" / "report.html").read_text()
    assert "refused 1" in page
    assert "notes.mp4" in page
    assert opened == [(tmp_path / "runs" / "report" / "report.html").as_uri()]
    assert read_json(tmp_path / "runs" / "predictor" / "run.json")["options"]["actions"] == ["ball_?_vx"]
    films = read_json(tmp_path / "runs" / "imagined" / "imagined.json")["films"]
    assert films[0]["panels"][-1] == "imagined with mean actions"  # of one video there are no other's
    assert read_json(tmp_path / "runs" / "evaluation" / "rollout.json")["probe_columns"] == ["ball_1_x"]
    call("inspect_folder", f"{tmp_path}/runs")
    said = capsys.readouterr().out
    assert said.count(": a cache, ") == 3
    assert said.count(": a run, with models: ") == 7
    (tmp_path / "my_videos" / "clip_00000.mp4").unlink()
    assert "was begun with other videos (gone: 1, new: 0)" in refusal("all_stages", line)


def test_few_images_are_enough_for_smaller_batches(tmp_path, monkeypatch):
    write_ball_videos(tmp_path / "clips", 3, BallWorld(size=32, radius=3, frames=25, fps=8), seed=1)
    monkeypatch.setattr(stages, "subprocess", SimpleNamespace(Popen=Here))
    monkeypatch.setattr(Here, "words", [])
    monkeypatch.setattr(Here, "dies", 2)
    with pytest.raises(Interrupted):  # after the encoder is trained, in the next command
        call("all_stages", f"{tmp_path}/clips --output-dir {tmp_path}/runs --fps 8 --encoder-steps 2")
    assert read_json(tmp_path / "runs" / "encoder" / "run.json")["options"]["batch_size"] == 16
    assert read_json(tmp_path / "runs" / "encoder" / "run.json")["finished"]


def test_slips_are_one_line(tmp_path):
    to = f"--output-dir {tmp_path}/runs"
    assert "no videos are given" in refusal("all_stages", to)
    (tmp_path / "empty").mkdir()
    assert "no videos in this folder" in refusal("all_stages", f"{tmp_path}/empty {to}")
    mine = tmp_path / "mine" / "videos"
    mine.mkdir(parents=True)
    (mine / "account.json").write_text("mine")
    assert "mine has a folder videos of somebody else" in refusal("all_stages", f"{mine} --output-dir {mine.parent}")
    assert [(path.name, path.read_text()) for path in mine.iterdir()] == [("account.json", "mine")]
    assert "--tokens is for a published encoder" in refusal("all_stages", f"{tmp_path} {to} --tokens grid")
    write_ball_videos(tmp_path / "one", 1, BallWorld(size=32, radius=3, frames=30, fps=8), seed=0)
    assert "clip_00000.mp4 is of 1 of the three recordings" in refusal("all_stages", f"{tmp_path}/one {to}")
    write_ball_videos(tmp_path / "short", 3, BallWorld(size=32, radius=3, frames=8, fps=8), seed=0)
    assert "its 1.0 s are less than the 2.5 s that a forecast takes at --fps 4" in refusal(
        "all_stages", f"{tmp_path}/short {to}2"
    )
