"""A second device that is none: tensors say they are elsewhere and compute on the CPU. It finds mix-ups without a GPU.

As on a GPU, an operation on tensors of both devices is an error (but for single numbers and indices), and so are a
generator of the other device and `numpy()` without `cpu()`. It takes the name of torch's device `meta`, which needs no
driver. Only eager code of this process can be run on it.
"""

from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

FAR, CPU = torch.device("meta"), torch.device("cpu")
COPIES = ("aten::_to_copy", "aten::copy_")
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
autocast = torch.autocast


class FarTensor(torch.Tensor):
    """Says that it is on the device; its numbers are in a tensor of the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, near):
        return torch.Tensor._make_wrapper_subclass(
            cls, near.shape, strides=near.stride(), storage_offset=near.storage_offset(), dtype=near.dtype, device=FAR
        )

    def __init__(self, near):
        self.near = near

    def tolist(self):
        return self.near.tolist()

    @classmethod
    def __torch_dispatch__(cls, operation, types, arguments=(), options=None):
        raise RuntimeError(f"{operation} outside of the pretended device")


class Generator(torch.Generator):
    """Of either device."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls, "cpu")
        made.device = torch.device(device)
        return made

    device = None


class Functions(TorchFunctionMode):
    def __torch_function__(self, function, types, arguments=(), options=None):
        if function in (
            torch.Tensor.__getitem__,
            torch.Tensor.__setitem__,
        ):  # lists would become tensors that are empty
            arguments = (arguments[0], without_lists(arguments[1]), *arguments[2:])
        options = options or {}
        if (generator := options.get("generator")) is not None:
            asked = torch.device(options.get("device") or CPU)
            assert generator.device.type == asked.type, f"{function}: the generator is on {generator.device}"
        return function(*arguments, **options)


def without_lists(index):
    """An index with its lists as tensors of the CPU."""
    if isinstance(index, tuple):
        return tuple(map(without_lists, index))
    return torch.as_tensor(index) if isinstance(index, list | np.ndarray) else index


class Operations(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        options = dict(options or {})
        name, leaves = operation._schema.name, tree_leaves((arguments, options))
        far = any(isinstance(leaf, FarTensor) for leaf in leaves)
        near = any(isinstance(leaf, torch.Tensor) and not isinstance(leaf, FarTensor) and leaf.ndim for leaf in leaves)
        if name in INDEXING:  # by indices of the CPU
            near = not isinstance(arguments[0], FarTensor)
        assert not any(
            isinstance(leaf, torch.Tensor) and type(leaf) is not FarTensor and leaf.is_meta for leaf in leaves
        )
        assert name in COPIES or not (far and near), f"{name}: at least two devices"
        if options.get("device") is not None:
            far, options["device"] = torch.device(options["device"]) == FAR, CPU
        within = tree_map_only(FarTensor, lambda leaf: leaf.near, (arguments, options))
        found = operation(*within[0], **within[1])
        if name.endswith("_"):  # in place
            return arguments[0]
        return tree_map_only(torch.Tensor, FarTensor, found) if far else found


@contextmanager
def pretend_device():
    """Within, the device that this gives holds numbers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "Generator", Generator)
        patch.setattr(
            torch,
            "autocast",
            lambda kind, *given, **named: nullcontext() if kind == FAR.type else autocast(kind, *given, **named),
        )
        with Functions(), Operations():
            yield FAR
