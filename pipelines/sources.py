"""What an encoder is trained on, videos or still images, behind one face: the trainer does not care which."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from data.frames import FramePairs, read_sequences
from data.images import ImagePairs, Images, find_images, require_batch
from data.manifest import EXAMPLES
from data.video import FrameSize
from pipelines.compute import cores_of_this_process
from pipelines.guards import require_agreement, summary
from pipelines.stage import counted, leave_account, write_json
from pipelines.training import (
    DIAGNOSTIC_CLIPS,
    DIAGNOSTIC_FRAMES,
    find_usable_videos,
    main_first,
)

DIAGNOSTIC_IMAGES = 2000


class Source(ABC):
    """Samples for training, samples for diagnostics, and an account of both."""

    noun: str
    """What they are called, in the plural."""
    names: list[str]
    """Of all samples' files, in an order that is the same on all ranks."""
    pairs: FramePairs | ImagePairs
    """Batches without end; `state` says where to begin."""
    inputs: dict[str, Any]
    """For the record."""
    labels: Tensor | None = None
    """int64 (C,), the classes of the samples for diagnostics, where they are known."""
    classes: int = 0
    """How many there are."""

    @abstractmethod
    def open(self, batch_size: int, seed: int, memory_bytes: int) -> None:
        """Make `pairs`, once the run's folder is ready."""

    @abstractmethod
    def read_sequences(self) -> Tensor:
        """Fixed samples for diagnostics, uint8 (C, T, 3, H, W), frames that follow each other; T = 1 for images."""

    @abstractmethod
    def leave_account(self, folder: Path) -> dict[str, int]:
        """Say what was read and what was not, leave it in account.json, and count it for metrics.json. Collective."""

    @abstractmethod
    def __str__(self) -> str:
        """How many there are."""


class VideoSource(Source):
    """Pairs of neighbouring frames. Finding them is collective; raises VideoError as `find_usable_videos` does."""

    noun = "videos"
    pairs: FramePairs

    def __init__(
        self,
        accelerator: Accelerator,
        paths: Sequence[Path],
        folder: Path,
        size: FrameSize,
        fps: float,
        phases: int,
        image_fps: float,
        strict: bool,
    ) -> None:
        self.accelerator, self.size, self.fps, self.phases, self.strict = accelerator, size, fps, phases, strict
        self.videos = find_usable_videos(accelerator, paths, fps, folder, image_fps, strict)
        self.names = [str(video.path) for video in self.videos.videos]
        self.inputs = {"videos": self.names, "refused": self.videos.refused}

    def open(self, batch_size: int, seed: int, memory_bytes: int) -> None:
        self.pairs = FramePairs(
            self.videos.videos, self.size, self.fps, batch_size, seed, self.accelerator.process_index,
            self.accelerator.num_processes, memory_bytes, self.accelerator.is_main_process, self.phases, self.strict,
            cores_of_this_process(),
        )  # fmt: skip

    def read_sequences(self) -> Tensor:
        return read_sequences(self.videos.videos, self.size, self.fps, DIAGNOSTIC_CLIPS, DIAGNOSTIC_FRAMES)

    def leave_account(self, folder: Path) -> dict[str, int]:
        account = self.videos.account()
        account.merge(gather_object([self.pairs.account]))
        if self.accelerator.is_main_process:
            leave_account(account, folder)
        return {
            "videos": len(self.names),
            "refused_videos": len(self.videos.refused),
            "damaged_videos": len(account.damaged),
        }

    def __str__(self) -> str:
        return f"{counted(len(self.names), 'video')}, {len(self.videos.refused)} refused"


class ImageSource(Source):
    """Still images, each a pair with itself. Finding them is collective; raises ImageError as `find_images` does."""

    noun = "images"
    pairs: ImagePairs

    def __init__(self, accelerator: Accelerator, path: Path, size: FrameSize, strict: bool, batch_size: int) -> None:
        self.accelerator = accelerator
        self.images = Images(main_first(accelerator, lambda: find_images(path, "train")), size, strict)
        require_batch(self.images, batch_size * accelerator.num_processes)  # before anything is written
        self.names = list(self.images.found.names)
        self.inputs = {"images": str(self.images.found.root), "classes": self.images.found.classes}
        if len(self.images.found.classes) > 1:
            self.classes = len(self.images.found.classes)

    def open(self, batch_size: int, seed: int, memory_bytes: int) -> None:
        cores, main = cores_of_this_process(), self.accelerator.is_main_process
        if self.images.bytes_needed <= memory_bytes:
            self.images.load(self.accelerator.device, cores, main)
        require_agreement(self.accelerator, readable_images=summary(self.images.found.names))
        self.pairs = ImagePairs(
            self.images, batch_size, seed, self.accelerator.process_index, self.accelerator.num_processes, cores
        )

    def read_sequences(self) -> Tensor:
        every = -(-len(self.images.found.names) // DIAGNOSTIC_IMAGES)
        rows = range(0, len(self.images.found.names), every)
        images = self.images.read(rows, cores_of_this_process())[:, None]
        self.labels = self.images.labels(rows)
        return images

    def leave_account(self, folder: Path) -> dict[str, int]:
        refused: dict[str, str] = {}
        for of_rank in gather_object([self.images.refused]):
            refused |= of_rank
        if self.accelerator.is_main_process:
            print("\n  refused: ".join([f"{self}; refused {len(refused):,}", *list(refused.values())[:EXAMPLES]]))
            write_json(folder / "account.json", {"refused": refused})
        return {"images": len(self.names) - len(refused), "refused_images": len(refused)}

    def __str__(self) -> str:
        return f"{counted(len(self.names), 'image')} of {len(self.images.found.classes)} classes"
