"""What lies in folders is read, refused by name or counted: nothing is passed over in silence."""

import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data.manifest
from data.content import is_content_of
from data.counting import count_frames
from data.errors import VideoError
from data.folders import find_videos
from data.manifest import check_videos, index_videos
from pipelines import score_surprise
from pipelines.run.folder import RunFolder

ROOT = Path(__file__).parents[1]


@pytest.fixture
def video(tmp_path, encode_video):
    """A good video, apart from the folders that are searched."""
    (tmp_path / "apart").mkdir()
    return encode_video(tmp_path / "apart" / "good.mp4", 15, rate=10)


@pytest.fixture
def folder(tmp_path, video):
    """A folder with a video in it."""
    (tmp_path / "videos").mkdir()
    shutil.copy(video, tmp_path / "videos" / "a.mp4")
    return tmp_path / "videos"


def put(path, content=b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "name", ["a.vob", "f.264", "d.ASF", "n.divx", "m.m2v", "x.mxf", "y.y4m", "i.ivf", "c.3g2", "l.lrv"]
)
def test_suffixes_of_all_kinds_of_video_are_looked_at(tmp_path, name):
    put(tmp_path / name)
    assert find_videos([tmp_path])[0] == [tmp_path / name]


@pytest.mark.parametrize(("name", "codec"), [("a.vob", "mpeg2video"), ("a.mxf", "mpeg2video"), ("a.nut", "ffv1")])
def test_other_suffixes_are_read(tmp_path, encode_video, name, codec):
    encode_video(tmp_path / name, 15, rate=25, codec=codec)
    ((video,), account) = check_videos([tmp_path], fps=4)
    assert (video.path.name, account.refused) == (name, {})


def test_what_is_no_video_is_counted_by_suffix(folder):
    for name in ("1.txt", "2.TXT", "3.json", "photo.HEIC", "README", "clip.mp4.part", "a.csv", "lonely.png"):
        put(folder / name)
    videos, account = check_videos([folder], fps=4)
    assert [video.path.name for video in videos] == ["a.mp4"]
    others = {".txt": 2, ".json": 1, ".heic": 1, "without suffix": 1, ".part": 1, ".csv": 1, ".png": 1}
    assert account.found == {"looked at": 1, **others}
    assert str(account).startswith("found 9 files: 2 .txt, 1 ")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("._x.mp4", "hidden"), (".thumbnails/x.mp4", "hidden"), ("@eaDir/x.mp4/SYNOPHOTO.mp4", "hidden"),
        (".Trash-1000/files/x.mp4", "hidden"), ("#recycle/x.mp4", "hidden"), ("$RECYCLE.BIN/$R1.mp4", "hidden"),
        ("__MACOSX/._x.mp4", "hidden"), ("~snapshot/daily.0/a.mp4", "hidden"), ("@Recently-Snapshot/1/x.mp4", "hidden"),
        ("System Volume Information/x.mp4", "hidden"), ("lost+found/#12.mp4", "hidden"), ("FOUND.000/1.avi", "hidden"),
        ("run/pictures/x.mp4", "ours"), ("cache/x.gif", "ours"),
    ],
)  # fmt: skip
def test_what_nobody_wants_is_not_read_but_counted(folder, video, name, why):
    put(folder / name, video.read_bytes() + b"other")
    if why == "ours":
        put(folder / "run" / "run.json", b'{\n  "format": "video-jepa run 1",')
        put(folder / "cache" / "cache.json", b'{"format_version": 5, "encoder": "e", "encoder_fingerprint": "f"}')
    videos, account = check_videos([folder], fps=4)
    assert [video.path for video in videos] == [folder / "a.mp4"]
    assert account.found == {"looked at": 1, why: 1 if why == "hidden" else 3}
    # Named by oneself it is taken; and a mark that somebody else made is none.
    assert find_videos([folder / name])[0] == [folder / name]
    for mark in folder.glob("*/*.json"):
        mark.write_text('{"format": "of a robot"}')
    assert (folder / name in find_videos([folder])[0]) == (why == "ours")


def test_our_own_folders_are_known_by_the_marks_that_are_written(tmp_path, make_clip, write_cache, folder):
    RunFolder(score_surprise.Options(output_dir=folder / "run"), "score_surprise", ()).begin({})
    put(folder / "run" / "pictures" / "1.png"), put(folder / "run" / "pictures" / "2.png")
    write_cache(folder / "cache", [make_clip("/a.mp4", 4)])
    videos, found = find_videos([folder])
    assert videos == [folder / "a.mp4"]
    assert set(found) == {"ours", "looked at"}


@pytest.mark.parametrize(
    "name", ["dead.mp4", "dead", "round.mp4", "pipe.mp4", "pipe.png", "socket.mkv", "a.tar.gz", "a.zip"]
)
def test_what_cannot_be_looked_at_is_refused_by_name(folder, name, monkeypatch):
    path = folder / name
    if name.startswith("dead"):
        path.symlink_to(folder / "nowhere")
    elif name == "round.mp4":
        path.symlink_to(path)
    elif name.startswith("pipe"):
        os.mkfifo(path)
    elif name.startswith("socket"):
        monkeypatch.chdir(folder)
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(name)
    else:
        put(path)
    _, account = check_videos([folder], fps=4)
    ((refused, reason),) = account.refused.items()
    assert refused == str(path)
    assert any(word in reason for word in (f"{path}: a dead link, to ", "neither a file nor", "an archive: unpack it"))
    assert account.found == {"looked at": 2}
    with pytest.raises(VideoError):
        check_videos([folder], fps=4, strict=True)
    path.unlink()  # what was refused is tried again
    assert check_videos([folder], fps=4)[1].refused == {}


LOOK = """
import os, sys
from pathlib import Path
from data.manifest import check_videos
if os.getuid() == 0:
    os.setuid(65534)
print(check_videos([Path(sys.argv[1])], fps=4)[1])
"""


def test_what_is_closed_to_another_user_is_refused_by_name(video):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path in ("closed/a.mp4", "listed/b.mp4", "listed/notes.txt", "c.mp4", "good.mp4"):
            put(folder / path, video.read_bytes() + path.encode())
        for path, mode in (("", 0o755), ("closed", 0), ("listed", 0o744), ("c.mp4", 0), ("good.mp4", 0o644)):
            (folder / path).chmod(mode)
        said = subprocess.check_output([sys.executable, "-c", LOOK, name], text=True, cwd=ROOT)
        refused = [line.split(": ")[1:] for line in said.splitlines()[2:]]
        closed = ("c.mp4", "closed", "listed/b.mp4", "listed/notes.txt")
        assert refused == [[str(folder / path), "permission denied"] for path in closed]
        assert said.startswith("found 5 files: 5 looked at\nread 0 videos")
        (folder / "closed").chmod(0o755)
        (folder / "listed").chmod(0o755)


def test_links_into_a_store_are_called_by_their_names(tmp_path, video):
    (store := tmp_path / "blobs").mkdir()
    (snapshot := tmp_path / "snapshots" / "main").mkdir(parents=True)
    shutil.copy(video, store / "2f6ee4")
    shutil.copy(video, store / "other.mp4")
    (snapshot / "drive.mp4").symlink_to("../../blobs/2f6ee4")
    (snapshot / "again.mp4").symlink_to("../../blobs/2f6ee4")
    (tmp_path / "whole").symlink_to(snapshot)
    (tmp_path / "zeroth.mp4").symlink_to("blobs/other.mp4")
    videos, found = find_videos([tmp_path])
    assert videos == [video, store / "other.mp4", snapshot / "again.mp4"]
    # The file without a suffix, the link to it under a second name, the folder, and the link to `other.mp4`.
    assert found == {"looked at": 3, "without suffix": 1, "double": 3}
    assert find_videos([tmp_path / "whole"])[0] == [tmp_path / "whole" / "again.mp4"]


def test_each_dead_link_is_named(folder):
    for name in ("one.mp4", "two.mp4", "three"):
        (folder / name).symlink_to("nowhere")
    _, account = check_videos([folder], fps=4)
    assert [Path(path).name for path in account.refused] == ["one.mp4", "three", "two.mp4"]


def test_copies_are_one_video_and_counted(folder, video):
    (folder / "copy.mp4").write_bytes(video.read_bytes())
    for red, name in ((1, "frames"), (1, "same frames"), (2, "other frames")):
        (folder / name).mkdir()
        for index in range(3):
            Image.new("RGB", (8, 8), (red, 0, index)).save(folder / name / f"{index}.png")
    videos, account = check_videos([folder], fps=4)
    assert [video.path.name for video in videos] == ["a.mp4", "frames", "other frames"]
    assert account.doubles == {
        str(folder / "copy.mp4"): str(folder / "a.mp4"),
        str(folder / "same frames"): str(folder / "frames"),
    }
    assert f"\n  doubles: {folder}/copy.mp4: the same as {folder}/a.mp4\n" in str(account)
    assert account.found == {"looked at": 11}


NOISE = np.random.default_rng(0).integers(0, 256, (3, 240, 400, 3), dtype=np.uint8)


def write_raw(path, changed_at):
    """A recording without compression, in one byte of which one bit may be another than in others."""
    path.parent.mkdir(exist_ok=True)
    if path.suffix:
        frames = [b"FRAME\n" + frame.tobytes()[: 400 * 240 * 3 // 2] for frame in NOISE]
        contents = {path: bytearray(b"YUV4MPEG2 W400 H240 F10:1 C420jpeg\n" + b"".join(frames))}
    else:
        path.mkdir()
        for number, picture in enumerate(NOISE):
            Image.fromarray(picture).save(path / f"{number}.bmp")
        contents = {path / f"{number}.bmp": bytearray((path / f"{number}.bmp").read_bytes()) for number in range(3)}
    changed = contents[max(contents) if path.suffix else path / "1.bmp"]
    if changed_at:
        changed[round(changed_at * len(changed))] ^= 1
    for file, content in contents.items():
        file.write_bytes(content)


@pytest.mark.parametrize("suffix", [".y4m", ""])
@pytest.mark.parametrize("at_once", [True, False])
def test_what_differs_only_where_content_is_not_hashed_is_no_double(tmp_path, suffix, at_once):
    folder, manifest = tmp_path / "videos", tmp_path / "videos.jsonl"
    for name, changed_at in (("first", 0), ("first copied", 0), ("second one", 0.3), ("the third one", 0.7)):
        write_raw(folder / f"{name}{suffix}", changed_at)
        if not at_once:
            check_videos([folder], fps=4, manifest=manifest)
    found = videos, account = check_videos([folder], fps=4, manifest=manifest)
    assert [video.path.stem for video in videos] == ["first", "second one", "the third one"]
    assert len({video.content for video in videos}) == 3
    assert all(is_content_of(video.path, video.content) for video in videos)
    assert [Path(path).stem for path in account.doubles] == ["first copied"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.manifest, "content_of", None)  # what is known is not read again
        assert check_videos([folder], fps=4, manifest=manifest) == found


@pytest.mark.parametrize("at", [0, 0.5, 1])
def test_a_change_of_content_is_seen_though_size_and_time_are_as_before(tmp_path, video, encode_video, at):
    big = encode_video(tmp_path / "big.avi", 30, rate=10, codec="rawvideo", pixel_format="rgb24")
    manifest = tmp_path / "videos.jsonl"
    ((before,), _) = index_videos([big], manifest)
    content, status = bytearray(big.read_bytes()), big.stat()
    content[round(at * (len(content) - 1))] ^= 1
    big.write_bytes(content)
    os.utime(big, ns=(status.st_atime_ns, status.st_mtime_ns))
    ((after,), _) = index_videos([big], manifest)
    assert before.state[:2] == after.state[:2]
    assert (after.video is None) or before.video.content != after.video.content


def test_what_was_moved_is_not_counted_again(folder, tmp_path):
    manifest = tmp_path / "videos.jsonl"
    ((before,), _) = index_videos([folder], manifest, look=count_frames)
    (folder / "deep").mkdir()
    (folder / "a.mp4").rename(folder / "deep" / "b.mp4")

    def look(path, fps):
        raise AssertionError(path)

    ((after,), _) = index_videos([folder], manifest, look=look)
    assert after.video.path == folder / "deep" / "b.mp4"
    assert after.video.content == before.video.content


# Random trees

NAMES = ["a", "b\n", "\x1b[31m", "$5", "x" * 200, os.fsdecode(b"\xe4"), "-rf", " ", "ü", ".h", "@eaDir", "Trash"]
KINDS = ["", ".mp4", ".MKV", ".txt", ".zip", ".png", ".jpg", ".tar.gz", ".\n", ".\x1b[0m", ".mp4 ", ".xyz"]


def grow(folder, chance, tmp, depth=0):
    """Fill a folder with whatever there is: folders, files, dead links, pipes, images, marks, links to a video."""
    for _ in range(chance.randrange(12)):
        path = folder / (chance.choice(NAMES) + chance.choice(KINDS))
        kind = chance.randrange(9)
        if os.path.lexists(path):
            continue
        if kind < 3 and depth < 4:
            path.mkdir()
            grow(path, chance, tmp, depth + 1)
        elif kind == 3:
            path.symlink_to(chance.choice(["nowhere", path.name, "../z.MKV", tmp / "apart" / "good.mp4"]))
        elif kind == 4:
            os.mkfifo(folder / "pipe.mp4") if not os.path.lexists(folder / "pipe.mp4") else None
        elif kind == 5:
            for index in range(chance.randrange(4)):
                put(folder / f"{index}.png")
        elif kind == 6 and depth > 1:
            put(folder / "run.json", b'{"format": "video-jepa run 1"}')
        else:
            put(path, chance.randbytes(chance.randrange(3)))


@pytest.mark.parametrize("seed", range(40))
def test_everything_in_a_random_tree_is_accounted_for(tmp_path, video, seed):
    chance = random.Random(seed)
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    shutil.copy(video, root / "sure.mp4")
    grow(root, chance, tmp_path)
    files = sum(len(names) for _, _, names in os.walk(root))
    videos, account = check_videos([root], fps=4)
    assert account.found.total() == files
    looked_at = {str(video.path) for video in videos} | account.refused.keys() | account.doubles.keys()
    assert looked_at == set(map(str, find_videos([root])[0]))
    assert str(root / "sure.mp4") in looked_at - account.refused.keys()
    assert all(line.isprintable() for line in str(account).split("\n"))
    # With links to folders, which may lead in circles: each video is found by some name.
    outside.mkdir()
    grow(outside, chance, tmp_path)
    for index, where in enumerate(chance.sample([where for where, _, _ in os.walk(root)] * 3, 3)):
        Path(where, f"out{index}").symlink_to(chance.choice([outside, root, where, tmp_path]))
    found = {os.path.realpath(path) for path in find_videos([root])[0]}
    inside = {os.path.realpath(path) for path in find_videos([root, outside])[0] if root in path.parents}
    assert set(map(os.path.realpath, looked_at)) <= found
    assert inside <= found


def test_a_huge_folder_is_looked_through_in_linear_time(tmp_path):
    for index in range(20_000):
        (tmp_path / f"{index}.txt").touch()
    put(tmp_path / "deep" / "a.mp4")
    for index in range(200):
        (tmp_path / "deep" / f"back{index}").symlink_to("..")
    videos, found = find_videos([tmp_path])
    assert found == {"looked at": 1, ".txt": 20_000, "double": 200}
    assert videos == [tmp_path / "deep" / "a.mp4"]
