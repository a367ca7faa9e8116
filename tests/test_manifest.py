import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from data import counting, video
from data.account import Account
from data.counting import count_frames
from data.decoder import Damage
from data.errors import VideoError
from data.folders import find_videos
from data.manifest import check_videos, index_videos, read_manifest
from data.video import probe_video


@pytest.fixture
def folder(tmp_path, encode_video):
    """Three good videos of 10 fps, one of them deep inside, and a file that is not a video."""
    (tmp_path / "videos" / "deep" / "er").mkdir(parents=True)
    for name in ("b.mp4", "a.MKV", "deep/er/c.mov"):
        encode_video(tmp_path / "videos" / name, 15, rate=10)
    (tmp_path / "videos" / "notes.txt").write_text("not a video, and not called one")
    return tmp_path / "videos"


def test_folders_are_searched_recursively_in_order(folder):
    (folder / "holiday.mp4").mkdir()  # called like a video
    (folder / "deep" / "back").symlink_to(folder)  # links may lead in circles
    (folder / "deep" / "er" / "round").symlink_to(folder / "deep")
    names = ("a.MKV", "b.mp4", "deep/er/c.mov")
    assert find_videos([folder])[0] == [folder / name for name in names]


def test_one_file_by_several_names_is_one_video(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = folder / "b.mp4"
    found = find_videos([folder / "deep", one, one, one.relative_to(tmp_path), folder / "deep" / ".." / "b.mp4"])
    assert found[0] == [one, folder / "deep" / "er" / "c.mov"]


def test_a_single_file_is_taken_as_it_is_named(folder):
    # A name that is not known as a video's: the person asked for it, so the decoder decides.
    (folder / "b.mp4").rename(folder / "clip.dat")
    videos, _ = check_videos([folder / "clip.dat"], fps=4)
    assert [video.path for video in videos] == [folder / "clip.dat"]


def test_where_there_is_nothing_it_is_said(folder, tmp_path):
    with pytest.raises(VideoError, match=r"nowhere: no such file or folder"):  # even beside good ones
        find_videos([folder, folder / "nowhere"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no video")
    with pytest.raises(VideoError, match=r"no videos in this folder.*; there is 1 \.txt$"):
        find_videos([tmp_path / "empty"])


def test_unusable_files_are_refused_and_the_others_used_unless_strict(folder):
    (folder / "text.mp4").write_text("no video\n" * 50)
    (folder / "deep" / "empty.mp4").touch()
    videos, account = check_videos([folder], fps=4)
    assert [video.path.name for video in videos] == ["a.MKV", "b.mp4", "c.mov"]
    assert set(account.refused) == {str(folder / "text.mp4"), str(folder / "deep" / "empty.mp4")}
    assert "not a readable video" in account.refused[str(folder / "text.mp4")]
    with pytest.raises(VideoError, match=r"empty\.mp4: not a readable video \(.*\) \(and 1 more\)$"):
        check_videos([folder], fps=4, strict=True)
    with pytest.raises(VideoError, match=r"text\.mp4: not a readable video \([^(]*\)$"):
        check_videos([folder / "text.mp4"], fps=4)


def test_a_video_slower_than_the_clock_is_refused(folder, encode_video):
    assert len(check_videos([folder], fps=10)[0]) == 3  # as fast as the clock
    slow = encode_video(folder / "slow.mp4", 8, rate=2)
    videos, account = check_videos([folder], fps=5)
    assert len(videos) == 3
    assert list(account.refused) == [str(slow)]
    # The last frame of an mp4 may be shown for longer or shorter: its average rate is not exactly 2.
    assert "fps are fewer than the clock's 5: lower the clock's rate (4.0 s left out)" in account.refused[str(slow)]


# Manifests


@pytest.fixture
def looks(monkeypatch):
    """Names of the files that were decoded, or of which the header was read."""
    looks = []
    open_video = video.open_video
    for module in (video, counting):
        monkeypatch.setattr(
            module, "open_video", lambda path, *rest: looks.append(path.name) or open_video(path, *rest)
        )
    return looks


@pytest.fixture
def manifest(tmp_path):
    return tmp_path / "out" / "videos.jsonl"


@pytest.fixture
def index(folder, manifest):
    """Index the folder; the records by name."""

    def run(look=count_frames):
        records, _ = index_videos([folder], manifest, look=look)
        assert [record.state.path for record in records] == sorted(record.state.path for record in records)
        assert read_manifest(manifest) == records
        return {Path(record.state.path).name: record for record in records}

    return run


def test_paths_are_absolute_and_as_they_were_given(folder, manifest, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(folder)
    records, _ = index_videos([Path("link")], manifest)
    assert [record.state.path for record in records] == [
        str(tmp_path / "link" / name) for name in ("a.MKV", "b.mp4", "deep/er/c.mov")
    ]
    monkeypatch.chdir("/")
    assert len(check_videos([manifest], fps=4)[0]) == 3


def test_a_second_look_decodes_nothing(index, looks, folder, manifest):
    (folder / "text.mp4").write_text("no video\n" * 50)
    before = index()
    assert sorted(looks) == ["a.MKV", "b.mp4", "c.mov", "text.mp4"]
    written = manifest.read_text()
    assert written.startswith(HEADER.decode())
    looks.clear()
    assert index() == before
    known = [record.video for record in before.values() if record.video]
    assert check_videos([folder], fps=4, manifest=manifest)[0] == known
    assert set(looks) == {"text.mp4"}  # what was refused is tried again
    assert manifest.read_text() == written
    looks.clear()
    videos, account = check_videos([folder], fps=4, manifest=manifest, is_main=False)  # another rank believes it
    assert (videos, list(account.refused), looks) == (known, [str(folder / "text.mp4")], [])


def test_what_was_looked_at_is_not_yet_counted(index, looks):
    assert index(look=probe_video)["b.mp4"].video.frames is None
    looks.clear()
    assert index()["b.mp4"].video.frames == 15
    assert sorted(looks) == ["a.MKV", "b.mp4", "c.mov"]


def test_what_has_changed_is_looked_at_again_and_what_is_gone_is_forgotten(index, looks, folder, encode_video):
    index()
    encode_video(folder / "b.mp4", np.arange(20) / 10)
    status = (folder / "a.MKV").stat()
    os.utime(folder / "a.MKV", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    encode_video(folder / "new.mp4", np.arange(7) / 10)
    (folder / "deep" / "er" / "c.mov").unlink()
    looks.clear()
    records = index()
    assert sorted(looks) == ["b.mp4", "new.mp4"]  # of what is as it was, only the time has changed
    assert sorted(records) == ["a.MKV", "b.mp4", "new.mp4"]
    assert (records["b.mp4"].video.frames, records["new.mp4"].video.frames) == (20, 7)


def test_a_line_that_was_cut_off_is_looked_at_again(index, looks, manifest):
    before = index()
    *lines, last = manifest.read_text().splitlines(keepends=True)
    for kept in (1, 20, 150):
        manifest.write_text("".join(lines) + last[:kept])
        assert len(read_manifest(manifest)) == 2
        looks.clear()
        assert index() == before
        assert len(looks) == 1


def test_the_last_line_needs_no_end(index, looks, manifest):
    before = index()
    manifest.write_text(manifest.read_text().removesuffix("\n"))
    assert len(read_manifest(manifest)) == len(before) == 3
    looks.clear()
    assert index() == before
    assert looks == []


HEADER = b'{"format": "video-jepa manifest", "version": 4}\n'
FOREIGN = [b"", b"{}\n", b"[1, 2]\n", b"hello\n", b"\xff\xfe\x00\n", HEADER.replace(b"4", b"3")]
DAMAGED = [b"{", b"", b"7", b"null", b"[]", b"[" * 100_000, b'"text"', b"{}", b'{"path": "/a", "size_bytes": 1}']
HOSTILE = [
    {"duration_s": math.inf}, {"duration_s": -1}, {"average_fps": math.nan}, {"height": 10**30}, {"width": "4"},
    {"keyframes_s": ["a"]}, {"keyframes_s": [1e300]}, {"gaps_s": [[0, None]]}, {"codec": None}, {"path": 7},
    {"code": "print()"}, {"size_bytes": {}}, {"changed_ns": []}, {"refused": 7}, {"refused": "x", "path": ["a"]},
]  # fmt: skip


@pytest.mark.parametrize(
    "content", [*FOREIGN, *(HEADER + line + b"\n" for line in DAMAGED), *HOSTILE], ids=lambda one: repr(one)[:60]
)
def test_a_foreign_or_damaged_file_is_no_manifest(index, manifest, content):
    index()
    if isinstance(content, dict):  # a line in which a video has other values
        content = HEADER + json.dumps(json.loads(manifest.read_text().splitlines()[1]) | content).encode() + b"\n"
    manifest.write_bytes(content)
    for use in (index, lambda: check_videos([manifest], fps=4)):
        with pytest.raises(VideoError, match=r"videos\.jsonl: not a manifest of videos, or damaged \(") as caught:
            use()
        assert "\n" not in str(caught.value)
    assert manifest.read_bytes() == content


def test_a_manifest_stands_for_a_folder(index, looks, folder, manifest, tmp_path, encode_video):
    (folder / "text.mp4").write_text("no video\n" * 50)
    index()
    looks.clear()
    videos, account = check_videos([manifest], fps=4)
    assert [video.path.name for video in videos] == ["a.MKV", "b.mp4", "c.mov"]
    assert all(video.frames == 15 for video in videos)
    assert list(account.refused) == [str(folder / "text.mp4")]
    # Beside a file, and the folder that it describes: each file once, and what is known is not looked at again.
    more = encode_video(tmp_path / "more.mp4", np.arange(7) / 10)
    videos, _ = check_videos([manifest, more, folder], fps=4)
    assert [video.path.name for video in videos] == ["more.mp4", "a.MKV", "b.mp4", "c.mov"]
    assert sorted(looks) == ["more.mp4", "text.mp4", "text.mp4"]


def test_a_manifest_whose_files_are_others_now(index, folder, manifest, encode_video):
    index()
    encode_video(folder / "b.mp4", np.arange(20) / 10)
    (folder / "deep" / "er" / "c.mov").unlink()
    videos, account = check_videos([manifest], fps=4)
    assert [(video.path.name, video.frames) for video in videos] == [("a.MKV", 15), ("b.mp4", None)]
    assert list(account.refused) == [str(folder / "deep/er/c.mov")]
    assert "no such file" in account.refused[str(folder / "deep/er/c.mov")]


def test_what_was_done_before_an_error_is_kept(index, manifest, looks):
    def fail(path, fps):
        if path.name == "c.mov":
            raise KeyboardInterrupt
        return count_frames(path, fps)

    with pytest.raises(KeyboardInterrupt):
        index(look=fail)
    assert [Path(record.state.path).name for record in read_manifest(manifest)] == ["a.MKV", "b.mp4"]
    looks.clear()
    index()
    assert looks == ["c.mov"]


def test_names_of_all_kinds(index, folder, encode_video):
    names = ["with space.mp4", "ümläut.mp4", "new\nline.mp4", "100%.mp4", "'quoted\".mp4", os.fsdecode(b"M\xe4rz.mp4")]
    for name in names:
        encode_video(folder / "b.mp4", np.arange(15) / 10).rename(folder / name)
    records = index()
    assert all(records[name].video.frames == 15 for name in names)
    assert index() == records


def test_accounts_add_up():
    one, other = Account(), Account()
    one.add(Path("/a.mp4"), 60.0, Damage())
    one.add(Path("/a.mp4"), 30.0, Damage(1))
    other.add(Path("/a.mp4"), 60.0, Damage())
    other.add(Path("/b.mp4"), 30.0, Damage(2, ["decoding failed after 1.00 s (why)"]))
    for account in (one, other):
        account.refused["/c.mp4"] = "/c.mp4: the file is empty"
    one.merge([other])  # of another process
    assert one.read_s == {"/a.mp4": 150.0, "/b.mp4": 30.0}
    assert str(one).splitlines() == [
        "read 2 videos, 3.0 minutes; refused 1; doubles 0; damaged 2, 3 corrupt frames left out",
        "  refused: /c.mp4: the file is empty",
        "  damaged: /a.mp4: 1 corrupt frames left out",
        "  damaged: /b.mp4: 2 corrupt frames left out; decoding failed after 1.00 s (why)",
    ]


def test_a_long_account_is_cut_short():
    account = Account(refused={f"/{index}.mp4": f"/{index}.mp4: the file is empty" for index in range(1500)})
    lines = str(account).splitlines()
    assert lines[0].startswith("read 0 videos, 0.0 minutes; refused 1,500;")
    assert len(lines) == 12
    assert lines[-1] == "  refused: and 1,490 more"
