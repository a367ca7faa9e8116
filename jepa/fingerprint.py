"""A short hash of a model: which one made an embedding."""

import hashlib
import json
from typing import Any

import torch
from torch import nn


def fingerprint(module: nn.Module, config: dict[str, Any]) -> str:
    """A hash of all weights and buffers, and of the configuration, given as JSON values."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
