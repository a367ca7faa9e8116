"""Errors that a person reads about data."""


class DataError(Exception):
    """A video, a cache or a table that cannot be used; the message names it, the reason and the mend."""


class VideoError(DataError):
    """An unusable video; the message names the file and the reason."""


def printable(text: str) -> str:
    """A text in one line in which nothing reaches a terminal but letters: all else is escaped."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
