"""Options that trainers share."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jepa.config import Bounded, NotNegative, NotNegativeInt, Positive, PositiveInt


@dataclass(frozen=True, kw_only=True)
class RunOptions(Bounded):
    """Options of every trainer, beside `output_dir` and `steps`, for which each has a default of its own."""

    if TYPE_CHECKING:
        output_dir: Path
        steps: PositiveInt
    log_every: PositiveInt = 100
    """Steps between two entries in the log, each with a check for collapse."""
    checkpoint_every: PositiveInt = 500
    """Steps between two saved training states; one is saved every 10 minutes, too."""
    seed: NotNegativeInt = 0
    """Seed of the weights, of the order of the data, and of all noise."""
    tracker: tuple[str, ...] = ("tensorboard",)
    """Trackers of the curves beside curve.jsonl: tensorboard, wandb, mlflow, ...; or none."""
    precision: Literal["launched", "fp32", "bf16", "fp16"] = "launched"
    """Precision of forward and backward passes; weights and statistics stay float32. launched: as accelerate says."""
    execution: Literal["eager", "compiled", "deterministic"] = "eager"
    """compiled: by torch.compile, a minute at the start for faster steps. deterministic: equal to the bit on a GPU."""
    resume: bool = False
    """Go on with the run in the output folder."""
    overwrite: bool = False
    """Replace the run in the output folder."""


@dataclass(frozen=True)
class OptimizerOptions(Bounded):
    """AdamW: a tenth of the steps warms up, then a cosine leads to 0."""

    learning_rate: Positive = 2e-3
    """Peak learning rate."""
    weight_decay: NotNegative = 1e-4
    """Decay of weights; biases and normalisation layers have none."""
