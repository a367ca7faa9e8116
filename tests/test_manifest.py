import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data import video
from data.counting import count_frames
from data.decoder import Damage, VideoError
from data.manifest import Account, check_videos, find_videos, index_videos, read_manifest
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
    assert find_videos([folder]) == [folder / "a.MKV", folder / "b.mp4", folder / "deep" / "er" / "c.mov"]


def test_one_file_by_several_names_is_one_video(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = folder / "b.mp4"
    found = find_videos([folder / "deep", one, one, one.relative_to(tmp_path), folder / "deep" / ".." / "b.mp4"])
    assert {path.resolve() for path in found} == {one, folder / "deep" / "er" / "c.mov"}
    assert len(found) == 2


def test_a_single_file_is_taken_as_it_is_named(folder):
    assert find_videos([folder / "b.mp4"]) == [folder / "b.mp4"]
    # A name that is not known as a video's: the person asked for it, so the decoder decides.
    (folder / "b.mp4").rename(folder / "clip.dat")
    videos = check_videos([folder / "clip.dat"], fps=4, progress=False)
    assert [video.path for video in videos.videos] == [folder / "clip.dat"]


def test_where_there_is_nothing_it_is_said(folder, tmp_path):
    with pytest.raises(VideoError, match=r"nowhere: no such file or folder"):  # even beside good ones
        find_videos([folder, folder / "nowhere"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no video")
    with pytest.raises(VideoError, match=r"no videos in this folder .*\.mp4"):
        find_videos([tmp_path / "empty"])


def test_unusable_files_are_refused_and_the_others_used(folder):
    (folder / "text.mp4").write_text("no video\n" * 50)
    (folder / "deep" / "empty.mp4").touch()
    checked = check_videos([folder], fps=4, progress=False)
    assert [video.path.name for video in checked.videos] == ["a.MKV", "b.mp4", "c.mov"]
    assert set(checked.refused) == {folder / "text.mp4", folder / "deep" / "empty.mp4"}
    assert "not a readable video" in checked.refused[folder / "text.mp4"]
    assert "the file is empty" in checked.refused[folder / "deep" / "empty.mp4"]


def test_a_video_slower_than_the_clock_is_refused(folder, encode_video):
    assert len(check_videos([folder], fps=10, progress=False).videos) == 3  # as fast as the clock
    encode_video(folder / "slow.mp4", 8, rate=2)
    checked = check_videos([folder], fps=5, progress=False)
    assert len(checked.videos) == 3
    assert list(checked.refused) == [folder / "slow.mp4"]
    # The last frame of an mp4 may be shown for longer or shorter: its average rate is not exactly 2.
    assert "fps are fewer than the clock's 5" in checked.refused[folder / "slow.mp4"]
    with pytest.raises(VideoError, match=r"fewer than the clock's 60: lower the clock"):
        check_videos([folder], fps=60, progress=False)


def test_nothing_usable_is_an_error_that_counts_the_others(tmp_path):
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        (tmp_path / name).write_text("no video\n" * 50)
    with pytest.raises(VideoError, match=r"a\.mp4: not a readable video .*2 more files"):
        check_videos([tmp_path], fps=4, progress=False)
    with pytest.raises(VideoError, match=r"c\.mp4: not a readable video \([^(]*\)$"):
        check_videos([tmp_path / "c.mp4"], fps=4, progress=False)


def test_a_linked_folder_is_searched(folder, tmp_path, encode_video):
    (tmp_path / "elsewhere").mkdir()
    encode_video(tmp_path / "elsewhere" / "d.mp4", np.arange(15) / 10)
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "broken.mp4").symlink_to(tmp_path / "nowhere.mp4")
    os.mkfifo(folder / "pipe.mp4")
    assert [path.name for path in find_videos([folder])] == ["a.MKV", "b.mp4", "c.mov", "d.mp4"]


# Manifests


@pytest.fixture
def looks(monkeypatch):
    """Names of the files that were decoded, or of which the header was read."""
    looks = []
    open_video = video.open_video
    monkeypatch.setattr(video, "open_video", lambda path, *rest: looks.append(path.name) or open_video(path, *rest))
    return looks


@pytest.fixture
def manifest(tmp_path):
    return tmp_path / "out" / "videos.jsonl"


@pytest.fixture
def index(folder, manifest):
    """Index the folder; the records by name, and the names of what is gone."""

    def run(*paths, look=count_frames):
        records, vanished = index_videos(paths or [folder], manifest, look=look, progress=False)
        assert [record.state.path for record in records] == sorted(record.state.path for record in records)
        return {Path(record.state.path).name: record for record in records}, [Path(path).name for path in vanished]

    return run


def test_a_manifest_tells_what_is_there(folder, manifest, index):
    (folder / "text.mp4").write_text("no video\n" * 50)
    records, vanished = index()
    assert vanished == []
    assert {record.state.path: record for record in read_manifest(manifest)} == {
        record.state.path: record for record in records.values()
    }
    assert [name for name, record in records.items() if record.refused] == ["text.mp4"]
    video = records["b.mp4"].video
    assert (video.path, video.frames, video.codec) == (folder / "b.mp4", 15, "h264")
    assert (video.duration_s, video.average_fps) == pytest.approx((1.5, 10))
    lines = manifest.read_text().splitlines()
    assert json.loads(lines[0]) == {"format": "video-jepa manifest", "version": 1}
    assert len(lines) == 5


def test_paths_are_resolved(folder, manifest, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(folder)
    records, _ = index_videos([Path("link")], manifest, progress=False)
    assert [record.state.path for record in records] == [
        str(folder / name) for name in ("a.MKV", "b.mp4", "deep/er/c.mov")
    ]
    monkeypatch.chdir("/")
    assert len(check_videos([manifest], fps=4, progress=False).videos) == 3


def test_a_second_look_decodes_nothing(index, looks, folder, manifest):
    (folder / "text.mp4").write_text("no video\n" * 50)
    before = index()
    assert sorted(looks) == ["a.MKV", "b.mp4", "c.mov", "text.mp4"]
    written = manifest.read_text()
    looks.clear()
    assert index() == before
    assert check_videos([folder], fps=4, manifest=manifest, progress=False).videos == [
        record.video for record in before[0].values() if record.video
    ]
    assert set(looks) == {"text.mp4"}  # what was refused is tried again
    assert sorted(manifest.read_text().splitlines()) == sorted(written.splitlines())


def test_what_was_looked_at_is_not_yet_counted(index, looks):
    records, _ = index(look=probe_video)
    assert records["b.mp4"].video.frames is None
    looks.clear()
    records, _ = index()
    assert sorted(looks) == ["a.MKV", "b.mp4", "c.mov"]
    assert records["b.mp4"].video.frames == 15


def test_what_has_changed_is_looked_at_again(index, looks, folder, encode_video):
    index()
    encode_video(folder / "b.mp4", np.arange(20) / 10)
    status = (folder / "a.MKV").stat()
    os.utime(folder / "a.MKV", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    encode_video(folder / "new.mp4", np.arange(7) / 10)
    looks.clear()
    records, vanished = index()
    assert sorted(looks) == ["a.MKV", "b.mp4", "new.mp4"]
    assert (records["b.mp4"].video.frames, records["new.mp4"].video.frames, vanished) == (20, 7, [])


def test_what_was_refused_is_tried_again(index, folder, encode_video):
    def look(path, fps):
        raise PermissionError(f"{path}: not now")

    (folder / "z.mp4").write_text("no video\n" * 50)
    assert all(record.refused for record in index(look=look)[0].values())
    assert [name for name, record in index()[0].items() if record.refused] == ["z.mp4"]
    encode_video(folder / "z.mp4", np.arange(7) / 10)
    assert index()[0]["z.mp4"].video.frames == 7


def test_what_is_gone_is_told_once(index, folder, manifest):
    index()
    (folder / "b.mp4").unlink()
    records, vanished = index()
    assert (sorted(records), vanished) == (["a.MKV", "c.mov"], ["b.mp4"])
    assert index()[1] == []
    assert "b.mp4" not in manifest.read_text()


def test_a_line_that_was_cut_off_is_looked_at_again(index, looks, manifest):
    before, _ = index()
    whole = manifest.read_text()
    for kept in (1, 20, 150):
        lines = whole.splitlines(keepends=True)
        manifest.write_text("".join(lines[:-1]) + lines[-1][:kept])
        assert len(read_manifest(manifest)) == 2
        looks.clear()
        assert index()[0] == before
        assert len(looks) == 1
        assert len(read_manifest(manifest)) == 3


def test_a_later_line_of_a_file_counts(index, manifest):
    index()
    lines = manifest.read_text().splitlines(keepends=True)
    fields = json.loads(lines[1])
    manifest.write_text("".join(lines) + json.dumps(fields | {"frames": 3}) + "\n")
    records = read_manifest(manifest)
    assert len(records) == 3
    assert [record.video.frames for record in records if record.state.path == fields["path"]] == [3]


@pytest.mark.parametrize("line", ["{", "", "7", "null", "[]", '"text"', "{}", '{"path": "/a", "size_bytes": 1}'])
def test_a_damaged_line_is_an_error(index, manifest, folder, line):
    index()
    lines = manifest.read_text().splitlines()
    manifest.write_text("\n".join([*lines[:2], line, *lines[2:]]) + "\n")
    for use in (index, lambda: check_videos([manifest], fps=4, progress=False)):
        with pytest.raises(
            VideoError, match=r"videos\.jsonl: line 3 is damaged \(.*\): delete it and index again"
        ) as caught:
            use()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a manifest of videos"),
        (b"{}\n", "not a manifest of videos"),
        (b"[1, 2]\n", "not a manifest of videos"),
        (b'{"format": "another"}\n', "not a manifest of videos"),
        (b"hello\n", "not a readable manifest"),
        (b"\xff\xfe\x00\n", "not a readable manifest"),
        (b'{"format": "video-jepa manifest", "version": 2}\n', "a manifest of version 2, not 1"),
        (b'{"format": "video-jepa manifest"}\n', "a manifest of version None, not 1"),
    ],
)
def test_a_foreign_file_is_no_manifest(index, manifest, content, message):
    manifest.parent.mkdir()
    manifest.write_bytes(content)
    for use in (index, lambda: check_videos([manifest], fps=4, progress=False)):
        with pytest.raises(VideoError, match=rf"videos\.jsonl: {message}") as caught:
            use()
        assert "\n" not in str(caught.value)
    assert manifest.read_bytes() == content
    manifest.unlink()
    with pytest.raises(VideoError, match=r"videos\.jsonl: not a readable manifest \(.*No such file"):
        check_videos([manifest], fps=4, progress=False)


def test_a_manifest_stands_for_a_folder(index, looks, folder, manifest, tmp_path, encode_video):
    (folder / "text.mp4").write_text("no video\n" * 50)
    index()
    looks.clear()
    checked = check_videos([manifest], fps=4, progress=False)
    assert [video.path.name for video in checked.videos] == ["a.MKV", "b.mp4", "c.mov"]
    assert all(video.frames == 15 for video in checked.videos)
    assert list(checked.refused) == [folder / "text.mp4"]
    assert looks == []
    # Beside a file, and the folder that it describes: each file once, and what is known is not looked at again.
    more = encode_video(tmp_path / "more.mp4", np.arange(7) / 10)
    checked = check_videos([manifest, more, folder], fps=4, progress=False)
    assert [video.path.name for video in checked.videos] == ["more.mp4", "a.MKV", "b.mp4", "c.mov"]
    assert looks == ["more.mp4", "text.mp4"]  # what was refused is tried again


def test_a_manifest_whose_files_are_others_now(index, folder, manifest, encode_video):
    index()
    encode_video(folder / "b.mp4", np.arange(20) / 10)
    (folder / "deep" / "er" / "c.mov").unlink()
    checked = check_videos([manifest], fps=4, progress=False)
    assert [video.path.name for video in checked.videos] == ["a.MKV"]
    assert checked.refused == {
        folder / "b.mp4": f"{folder}/b.mp4: has changed since it was indexed: index it again",
        folder / "deep/er/c.mov": f"{folder}/deep/er/c.mov: is gone since it was indexed",
    }
    with pytest.raises(VideoError, match=r"b\.mp4: has changed .* \(and 1 more files cannot be used\)"):
        check_videos([manifest], fps=4, strict=True, progress=False)


def test_one_file_that_cannot_be_used_is_an_error_if_strict(folder):
    assert len(check_videos([folder], fps=4, strict=True, progress=False).videos) == 3
    (folder / "text.mp4").write_text("no video\n" * 50)
    with pytest.raises(VideoError, match=r"text\.mp4: not a readable video \([^(]*\)$"):
        check_videos([folder], fps=4, strict=True, progress=False)


def test_a_manifest_that_is_being_written_is_left_alone(index, manifest):
    index()
    written = manifest.read_text()
    with manifest.with_name(".videos.jsonl.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(VideoError, match=r"videos\.jsonl is being written by another process"):
            index()
    assert manifest.read_text() == written
    index()


SLOW = """
import sys, time
from pathlib import Path
from data.counting import count_frames
from data.manifest import index_videos
def slowly(path, fps):
    time.sleep(0.25)
    sys.stdout.write(f"{path.name}\\n")  # in one piece: threads print at the same time
    return count_frames(path, fps)
index_videos([Path(sys.argv[1])], Path(sys.argv[2]), look=slowly, progress=False)
"""


def test_a_killed_process_keeps_what_was_done_and_the_next_finishes_it(folder, manifest, encode_video):
    for number in range(9):
        encode_video(folder / f"{number}.mp4", 5, rate=10)
    command = [sys.executable, "-c", SLOW, str(folder), str(manifest)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(video.__file__).parents[1]) as process:
        until = time.monotonic() + 60
        while not manifest.exists() or len(manifest.read_text().splitlines()) <= 3:
            assert time.monotonic() < until
            time.sleep(0.02)
        process.kill()
    done = {Path(record.state.path).name for record in read_manifest(manifest)}
    assert 3 <= len(done) < 12
    again = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=Path(video.__file__).parents[1], check=True)
    counted = again.stdout.split()
    assert len(counted) == len(set(counted)) == 12 - len(done)
    assert done.isdisjoint(counted)
    assert len(read_manifest(manifest)) == 12
    assert not list(manifest.parent.glob(".tmp*"))


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
    records, _ = index()
    assert all(records[name].video.frames == 15 for name in names)
    assert index()[0] == records


def test_accounts_add_up():
    one, other = Account(), Account()
    one.add(Path("/a.mp4"), 60.0, Damage())
    one.add(Path("/a.mp4"), 30.0, Damage(1))
    other.add(Path("/a.mp4"), 60.0, Damage())
    other.add(Path("/b.mp4"), 30.0, Damage(2, ["decoding failed after 1.00 s (why)"]))
    for account in (one, other):
        account.refuse(Path("/c.mp4"), "/c.mp4: the file is empty")
    one.merge([other])  # of another process
    assert one.read_s == {"/a.mp4": 150.0, "/b.mp4": 30.0}
    assert str(one).splitlines() == [
        "read 2 videos, 3.0 minutes; refused 1; damaged 2, 3 corrupt frames left out",
        "  refused: /c.mp4: the file is empty",
        "  damaged: /a.mp4: 1 corrupt frames left out",
        "  damaged: /b.mp4: 2 corrupt frames left out; decoding failed after 1.00 s (why)",
    ]


def test_a_long_account_is_cut_short():
    account = Account()
    for index in range(1500):
        account.refuse(Path(f"/{index}.mp4"), f"/{index}.mp4: the file is empty")
    lines = str(account).splitlines()
    assert lines[0].startswith("read 0 videos, 0.0 minutes; refused 1,500;")
    assert len(lines) == 12
    assert lines[-1] == "  refused: and 1,490 more"


def test_a_folder_that_may_not_be_entered_is_listed(folder, monkeypatch):
    """The tests may run as root, who may enter any folder: so the system says no by itself."""
    closed = str(folder / "deep" / "er")
    originals = {"scandir": os.scandir, "listdir": os.listdir}

    def refusing(name):
        def look(path="."):
            if str(path) == closed:
                raise PermissionError(13, "Permission denied", closed)
            return originals[name](path)

        return look

    for name in originals:
        monkeypatch.setattr(os, name, refusing(name))
    refused = check_videos([folder], fps=4).refused
    assert "Permission denied" in refused[folder / "deep" / "er"]
    with pytest.raises(VideoError, match="Permission denied"):
        check_videos([folder], fps=4, strict=True)
