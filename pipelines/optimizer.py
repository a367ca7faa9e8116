"""Optimisers and the learning rate as a pure function of the step."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipelines.stage import require

REFERENCE_BATCH = 256
"""Samples that a learning rate is meant for, where it is scaled with the batch."""


@dataclass(frozen=True)
class OptimizerConfig:
    """How weights are moved."""

    kind: Literal["adamw", "lars", "sgd"] = "adamw"
    """`adamw`; `lars`: VICReg's own, for large batches of images; `sgd`: with momentum .9."""
    learning_rate: float = 2e-3
    """Peak learning rate. `lars` wants about a hundred times that of `adamw`."""
    scaling: Literal["none", "linear", "sqrt"] = "none"
    """`linear`: multiply the learning rate by (global batch / 256). `sqrt`: by the root of that."""
    warmup_steps: int = 50
    """Steps of linear warm-up before the cosine."""
    weight_decay: float = 1e-4
    """Of weights; biases and normalisation layers have none."""
    clip_norm: float = 0.0
    """Longest gradient; longer ones are shortened to it. 0 for any length."""
    ema_decay: float = 0.0
    """Keep an exponential moving average of the weights with this decay, such as .999, and leave that behind. 0 for
    none."""

    def check(self) -> None:
        """Raises `UserError` for values that make no sense."""
        require(self.learning_rate > 0, f"--optimizer.learning-rate is {self.learning_rate}: it must be positive")
        for name in ("warmup_steps", "weight_decay", "clip_norm"):
            value = getattr(self, name)
            require(value >= 0, f"--optimizer.{name.replace('_', '-')} is {value}: it must not be negative")
        require(0 <= self.ema_decay < 1, f"--optimizer.ema-decay is {self.ema_decay}: it must be from 0 to below 1")

    def peak_learning_rate(self, global_batch: int) -> float:
        """Learning rate after warm-up, for so many samples in all ranks' batches together."""
        ratio = global_batch / REFERENCE_BATCH
        return self.learning_rate * {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[self.scaling]


def make_optimizer(network: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Over the weights that are trained; weight decay is not applied to biases and normalisation layers.

    LARS (You et al. 2017, arXiv:1708.03888) does not adapt the rate of those either, as in VICReg's code.
    """
    named = [(name, weight) for name, weight in network.named_parameters() if weight.requires_grad]
    undecayed = [weight for name, weight in named if weight.ndim <= 1 or name.endswith("bias")]
    decayed = [weight for name, weight in named if not (weight.ndim <= 1 or name.endswith("bias"))]
    # Lars would otherwise take no decay for a wish not to adapt.
    adapt = {"always_adapt": True} if config.kind == "lars" else {}
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay, **adapt},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.kind == "adamw":
        return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
    if config.kind == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=0.9, fused=True)
    from timm.optim.lars import Lars  # here, because it takes seconds, and every stage would wait for it

    return Lars(groups, lr=config.learning_rate, momentum=0.9)


def lr_at(step: int, steps: int, warmup_steps: int, peak: float) -> float:
    """Learning rate at a step: linear warm-up to `peak`, then a cosine to 0.

    A pure function, because a prepared scheduler would step once for each process.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """The same for all weights."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def clip_length(config: OptimizerConfig) -> float:
    """For `clip_grad_norm_`, which also tells how long the gradient was: asked for even where nothing is clipped."""
    return config.clip_norm or math.inf


def moving_average(module: nn.Module, config: OptimizerConfig, buffers: bool) -> AveragedModel | None:
    """An exponential moving average of a module's weights, if asked for; of its buffers too, or else copies of them."""
    if not config.ema_decay:
        return None
    return AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay), use_buffers=buffers)
