"""What commands ask of caches, whatever they do with them."""

from typing import Any

from torch import Tensor

from data.cache import EmbeddingCache
from pipelines.run.command import UserError, require
from pipelines.run.files import summary

BATCH_NUMBERS = 32_000_000  # numbers that are held at a time where windows of a cache go by in batches
MOST_NUMBERS, MOST_WINDOWS = 32_000_000, 8192  # in each tensor that a calibration or simple scores are fitted on


def clips_in_short(cache: EmbeddingCache) -> str:
    """The clips of a cache as runs record them: alike where they are the same."""
    return summary(sorted(clip.key[1:] for clip in cache.clips))


def learned_from(train: EmbeddingCache, validation: EmbeddingCache) -> tuple[dict[str, Any], dict[str, str]]:
    """What a run learns from, for its record, and the videos, paths by content. Raises `UserError` if they overlap."""
    require_no_video_in_both(train, validation)
    clips = {"train": clips_in_short(train), "validation": clips_in_short(validation)}
    sources = {clip.key.content: clip.key.source for cache in (train, validation) for clip in cache.clips}
    return {"provenance": train.provenance, **clips}, sources


def require_no_video_in_both(one: EmbeddingCache, other: EmbeddingCache) -> None:
    """What is fitted and judged on the same videos flatters. Raises `UserError`."""
    theirs = {clip.key.content: clip.key.source for clip in other.clips}
    for clip in one.clips:
        if (source := theirs.get(clip.key.content)) is not None:
            also = "" if source == clip.key.source else f", there as {source}"
            raise UserError(f"{clip.key.source} is in both {one.folder} and {other.folder}{also}: keep videos apart")


def require_finite(cache: EmbeddingCache, embeddings: Tensor) -> Tensor:
    """The same embeddings. Raises `UserError` where they are NaN or infinite."""
    where = f"`video-jepa inspect {cache.folder} --verify` says where"
    require(bool(embeddings.isfinite().all()), f"{cache.folder} holds embeddings that are not finite: {where}")
    return embeddings


def require_changing(cache: EmbeddingCache, changing: bool) -> None:
    """Raises `UserError` where no embedding of a cache ever changes."""
    require(changing, f"{cache.folder}: no embedding ever changes, so nothing can beat copying it: bring moving video")
