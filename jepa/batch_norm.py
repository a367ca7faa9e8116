"""Batch normalisation whose batch is that of all ranks, on any device."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from jepa.collectives import sum_over_ranks, world_size


def synchronise_batch_norm(module: nn.Module) -> nn.Module:
    """Make every batch normalisation in `module` one over all ranks; in one process nothing changes.

    Parameters, buffers and the keys of the state stay what they are. On a CUDA device torch's own layer is used, which
    is fused and refuses other devices, elsewhere `SynchronisedBatchNorm`: convert after the module has been moved
    (converted before, it computes the same, only slower), and before DistributedDataParallel wraps it. Afterwards a
    forward pass in training mode is collective.

    Returns:
        `module`, or what replaces it where it is a batch normalisation itself.
    """
    if world_size() == 1:
        return module
    if any(tensor.is_cuda for tensor in module.parameters()):
        # timm's function, because torch's drops the activation that timm's batch normalisation layers carry. Imported
        # here, because it takes seconds, and every stage would wait for it.
        from timm.layers import convert_sync_batchnorm  # type: ignore[attr-defined]

        return convert_sync_batchnorm(module)
    return _replace(module)


def _replace(module: nn.Module) -> nn.Module:
    if isinstance(module, _BatchNorm) and not isinstance(module, SynchronisedBatchNorm):
        return SynchronisedBatchNorm(module)
    for name, child in module.named_children():
        setattr(module, name, _replace(child))
    return module


class SynchronisedBatchNorm(_BatchNorm):
    """Takes the place of a BatchNorm1d, 2d or 3d, or of timm's with an activation, and shares its tensors.

    In training, the statistics are those of the values of all ranks, which may have unequally many or none, in
    float32 at least; the output has the input's dtype. Evaluation is as ever.
    """

    def __init__(self, original: _BatchNorm) -> None:
        if type(original).forward is not _BatchNorm.forward and type(original).__name__ != "BatchNormAct2d":
            raise TypeError(f"{type(original).__name__} does more than batch normalisation: it cannot be synchronised")
        super().__init__(
            original.num_features, original.eps, original.momentum, original.affine, original.track_running_stats,
            device="meta",
        )  # fmt: skip
        self._parameters.update(original._parameters)
        self._buffers.update(original._buffers)
        self.training = original.training
        self.drop = getattr(original, "drop", nn.Identity())
        self.act = getattr(original, "act", nn.Identity())

    def _check_input_dim(self, inputs: Tensor) -> None:
        if inputs.ndim < 2 or inputs.shape[1] != self.num_features:
            raise ValueError(f"the input has shape {tuple(inputs.shape)}: it must be (N, {self.num_features}, ...)")

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, D, ...) to the same shape; N may differ between ranks."""
        if self.training or self.running_mean is None:
            self._check_input_dim(inputs)
            # Nothing here is what autocast would lower.
            values = inputs if inputs.dtype == torch.float64 else inputs.float()
            outputs = self._normalise(values).to(inputs.dtype)
        else:
            outputs = super().forward(inputs)
        return self.act(self.drop(outputs))

    def _normalise(self, values: Tensor) -> Tensor:
        across = [0, *range(2, values.ndim)]
        ones = [1] * (values.ndim - 2)
        # In float64 a count is exact.
        local_count = values.new_tensor(values.numel() // self.num_features, dtype=torch.float64)
        count = sum_over_ranks(local_count).to(values.dtype)
        if count < 2:
            raise ValueError(f"{int(count)} value per channel on all ranks together: training needs more than 1")
        mean = sum_over_ranks(values.sum(across)) / count  # (D,)
        centred = values - mean.view(-1, *ones)
        variance = sum_over_ranks(centred.square().sum(across)) / count
        if self.training and self.track_running_stats:
            self._track(mean.detach(), variance.detach() * count / (count - 1))
        scale = (variance + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        outputs = centred * scale.view(-1, *ones)
        return outputs if self.bias is None else outputs + self.bias.view(-1, *ones)

    def _track(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        # Without a momentum: the mean of all batches so far.
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(unbiased_variance.to(self.running_var.dtype), share)
