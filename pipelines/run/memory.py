"""What memory can hold."""

import psutil
import torch

from pipelines.run.command import require


def require_memory(numbers: float, option: str) -> None:
    """Raises `UserError` where so many float32 numbers, which an option asks for, are more than memory can hold now."""
    size, free = 4 * numbers, psutil.virtual_memory().available
    message = f"{option} takes some {size / 1e9:,.0f} GB of memory, and {free / 1e9:,.0f} are free: lower it"
    require(torch.cuda.is_available() or size <= free, message)
