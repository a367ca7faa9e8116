"""Videos for training, validation and test, no recording in two of them."""

import re
import unicodedata
from collections.abc import Sequence
from itertools import chain, groupby

from data.errors import VideoError
from data.video import VideoInfo

SPLITS = ("train", "val", "test")
CHAPTER = re.compile(r"(G[HXLP]\d\d|GOPR|GP\d\d)(?=\d{4}$)")
"""What a GoPro puts before the number of a recording."""
CAMERA = re.compile(
    r"((?<=\d)|[ _-]+[NEPM]?)[FRBI]$|[ _-]+(FRONT|REAR|BACK|CABIN|INSIDE|INTERIOR|(LEFT|RIGHT)(_REPEATER|_PILLAR)?)$"
)
"""What the cameras of a car put after it."""
HELD_OUT = 0.15  # share of the recordings that validation gets, and the test


def split_videos(videos: Sequence[VideoInfo]) -> dict[str, list[VideoInfo]]:
    """Videos by split: by folders, where these are called `train`, `val` and `test`; else by recordings, as follows.

    In the order of their names the last ones are for the test, those before for validation.

    Neighbours in that order are often parts of one drive or night, which so stay together. Files of one name in several
    folders are one recording, of several cameras; so are, where there are fewer names than folders, those of a folder.
    Chapters of a GoPro and marks of a car's cameras (`_F`, `-left_repeater`) make no other recording, nor does case.
    Raises `VideoError` where there are fewer than three recordings, where one of these folders is missing, or a video
    lies beside them.
    """
    own = [next((part for part in video.path.parts[::-1] if part in SPLITS), "") for video in videos]
    if len(named := {*own} - {""}) > 1:
        if missing := [split for split in SPLITS if split not in named]:
            found = " and ".join(split for split in SPLITS if split in named)
            raise VideoError(f"there are videos in folders {found}, and none in one called {missing[0]}: bring it, too")
        if "" in own:
            stray = videos[own.index("")].path
            raise VideoError(f"{stray} is in none of the folders train, val and test that others are in: move it there")
        return {split: [video for video, its in zip(videos, own, strict=True) if its == split] for split in SPLITS}
    names, folders = {_name_of(video) for video in videos}, {video.path.parent for video in videos}
    by_name = len(names) >= len(folders)

    def recording(video: VideoInfo) -> str:
        return _name_of(video) if by_name else str(video.path.parent)

    groups = [list(group) for _, group in groupby(sorted(videos, key=recording), key=recording)]
    if len(groups) < len(SPLITS):
        raise VideoError(
            f"{groups[0][0].path} {'is' if len(videos) == 1 else 'and others are'} of {len(groups)} of the three "
            "recordings that training, validation and test take: bring more, or cut a long one into parts (ffmpeg -i "
            "LONG.mp4 -c copy -f segment -segment_time 60 -reset_timestamps 1 part_%03d.mp4)"
        )
    held_out = max(1, round(HELD_OUT * len(groups)))
    parts = groups[: -2 * held_out], groups[-2 * held_out : -held_out], groups[-held_out:]
    return {split: [*chain(*part)] for split, part in zip(SPLITS, parts, strict=True)}


def _name_of(video: VideoInfo) -> str:
    """The name of a video's recording."""
    return CHAPTER.sub("", CAMERA.sub("", unicodedata.normalize("NFC", video.path.stem).upper()))
