"""The base of all errors that a person reads about data."""


class DataError(Exception):
    """A video, a cache or a table that cannot be used; the message names it, the reason and the mend."""
