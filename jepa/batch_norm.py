"""Batch normalisation whose batch is that of all ranks, on any device."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from jepa.distributed import sum_over_ranks, world_size


def synchronise_batch_norm(module: nn.Module) -> nn.Module:
    """Make every batch normalisation in `module` one over all ranks; in one process nothing changes.

    The keys of the state stay what they are. On a CUDA device torch's own layer is used, which is fused and refuses
    other devices: convert after the module has been moved, and before DistributedDataParallel wraps it. Afterwards a
    forward pass in training mode is collective.
    """
    if world_size() == 1:
        return module
    if any(isinstance(layer, nn.SyncBatchNorm) for layer in module.modules()):
        return module  # done before: once more, and timm's function would drop activations, too
    if any(tensor.is_cuda for tensor in module.parameters()):
        # timm's function: torch's drops the activation that timm's layers carry. Imported here, as it takes seconds.
        from timm.layers import convert_sync_batchnorm  # type: ignore[attr-defined]

        return convert_sync_batchnorm(module)
    for layer in module.modules():
        if isinstance(layer, _BatchNorm):
            layer.__class__ = SynchronisedBatchNorm  # the tensors, and what else there is in it, stay
    return module


class SynchronisedBatchNorm(_BatchNorm):
    """Takes the place of a BatchNorm1d, 2d or 3d, or of timm's with an activation; (N, D, ...), N equal on all ranks.

    In training, the statistics are those of the values of all ranks, in float32 at least; the output has the input's
    dtype. Evaluation is as ever.
    """

    def _check_input_dim(self, inputs: Tensor) -> None:
        """The layer whose place this takes knows how many dimensions it has; any will do."""

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self._normalise(inputs) if self.training else super().forward(inputs)
        for name in ("drop", "act"):  # timm's
            if hasattr(self, name):
                outputs = getattr(self, name)(outputs)
        return outputs

    def _normalise(self, inputs: Tensor) -> Tensor:
        # Nothing here is what autocast would lower.
        values = (inputs if inputs.dtype == torch.float64 else inputs.float()).transpose(1, -1)  # (N, ..., D)
        count = values.numel() // self.num_features * world_size()
        if count < 2:
            raise ValueError(f"{count} value per channel on all ranks together: training needs more than 1")
        across = list(range(values.ndim - 1))
        mean = sum_over_ranks(values.sum(across)) / count  # (D,)
        centred = values - mean
        variance = sum_over_ranks(centred.square().sum(across)) / count
        self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        for running, now in ((self.running_mean, mean), (self.running_var, variance * count / (count - 1))):
            running.lerp_(now.detach().to(running.dtype), self.momentum)  # type: ignore[union-attr, arg-type]
        outputs = centred * (variance + self.eps).rsqrt()
        if self.affine:
            outputs = outputs * self.weight + self.bias
        return outputs.transpose(1, -1).to(inputs.dtype)
