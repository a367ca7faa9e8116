import numpy as np
import pytest

from data.manifest import check_videos, find_videos
from data.video import VideoError


@pytest.fixture
def folder(tmp_path, encode_video):
    """Three good videos of 10 fps, one of them deep inside, and a file that is not a video."""
    (tmp_path / "videos" / "deep" / "er").mkdir(parents=True)
    for name in ("b.mp4", "a.MKV", "deep/er/c.mov"):
        encode_video(tmp_path / "videos" / name, np.arange(15) / 10, rate=10, ticks_per_second=10)
    (tmp_path / "videos" / "notes.txt").write_text("not a video, and not called one")
    return tmp_path / "videos"


def test_folders_are_searched_recursively_in_order(folder):
    assert find_videos([folder]) == [folder / "a.MKV", folder / "b.mp4", folder / "deep" / "er" / "c.mov"]


def test_a_folder_that_is_called_like_a_video_is_no_video(folder):
    (folder / "holiday.mp4").mkdir()
    assert len(find_videos([folder])) == 3


def test_several_paths_without_doubles(folder, tmp_path, monkeypatch):
    paths = [folder / "deep", folder / "b.mp4", folder / "b.mp4", folder / "deep" / "er" / "c.mov"]
    assert find_videos(paths) == [folder / "b.mp4", folder / "deep" / "er" / "c.mov"]


def test_one_file_by_two_names_is_one_video(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    absolute = folder / "b.mp4"
    found = find_videos([absolute, absolute.relative_to(tmp_path), folder / "deep" / ".." / "b.mp4"])
    assert [path.resolve() for path in found] == [absolute.resolve()]


def test_a_single_file_is_taken_as_it_is_named(folder):
    assert find_videos([folder / "b.mp4"]) == [folder / "b.mp4"]
    # A name that is not known as a video's: the person asked for it, so the decoder decides.
    (folder / "b.mp4").rename(folder / "clip.dat")
    videos = check_videos([folder / "clip.dat"], fps=4, progress=False)
    assert [video.path for video in videos.videos] == [folder / "clip.dat"]


def test_a_missing_path_is_an_error_even_beside_good_ones(folder):
    with pytest.raises(VideoError, match=r"nowhere: no such file or folder"):
        find_videos([folder, folder / "nowhere"])


def test_an_empty_folder_is_an_error(tmp_path):
    (tmp_path / "notes.txt").write_text("no video")
    with pytest.raises(VideoError, match=r"no videos in this folder .*\.mp4"):
        find_videos([tmp_path])


def test_unusable_files_are_refused_and_the_others_used(folder):
    (folder / "text.mp4").write_text("no video\n" * 50)
    (folder / "deep" / "empty.mp4").touch()
    checked = check_videos([folder], fps=4, progress=False)
    assert [video.path.name for video in checked.videos] == ["a.MKV", "b.mp4", "c.mov"]
    assert set(checked.refused) == {folder / "text.mp4", folder / "deep" / "empty.mp4"}
    assert "not a readable video" in checked.refused[folder / "text.mp4"]
    assert "the file is empty" in checked.refused[folder / "deep" / "empty.mp4"]
    account = checked.account().splitlines()
    assert account[0].startswith("3 videos")
    assert account[0].endswith("2 refused")
    assert len(account) == 3
    assert any("text.mp4" in line for line in account[1:])


def test_a_video_slower_than_the_clock_is_refused(folder, encode_video):
    encode_video(folder / "slow.mp4", np.arange(8) / 2, rate=2, ticks_per_second=2)
    checked = check_videos([folder], fps=5, progress=False)
    assert len(checked.videos) == 3
    assert list(checked.refused) == [folder / "slow.mp4"]
    # The last frame of an mp4 may be shown for longer or shorter: its average rate is not exactly 2.
    assert "fps are fewer than the clock's 5" in checked.refused[folder / "slow.mp4"]
    assert "--fps" in checked.refused[folder / "slow.mp4"]


def test_a_video_as_fast_as_the_clock_is_used(folder):
    assert len(check_videos([folder], fps=10, progress=False).videos) == 3


def test_nothing_usable_is_an_error_that_counts_the_others(tmp_path):
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        (tmp_path / name).write_text("no video\n" * 50)
    with pytest.raises(VideoError, match=r"a\.mp4: not a readable video .*2 more files"):
        check_videos([tmp_path], fps=4, progress=False)
    with pytest.raises(VideoError, match=r"c\.mp4: not a readable video \([^(]*\)$"):
        check_videos([tmp_path / "c.mp4"], fps=4, progress=False)


def test_all_too_slow_is_an_error(folder):
    with pytest.raises(VideoError, match=r"fewer than the clock's 60: lower --fps"):
        check_videos([folder], fps=60, progress=False)
