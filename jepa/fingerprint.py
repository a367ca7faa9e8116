"""A short hash of a model: which one made an embedding."""

import hashlib
import json
from typing import Any

import torch


def fingerprint(state: dict[str, Any], config: dict[str, Any]) -> str:
    """A hash of all weights and buffers of a module, and of its configuration, given as JSON values."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, value in sorted(state.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
