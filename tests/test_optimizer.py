"""Optimisers against their formulas, written again here."""

import math

import pytest
import torch
from torch import nn

from jepa.encoder import EncoderConfig, FrameEncoder
from jepa.infilling import Infiller, InfillerConfig
from jepa.predictor import Predictor, PredictorConfig
from pipelines.optimizer import (
    OptimizerConfig,
    clip_length,
    lr_at,
    make_optimizer,
    moving_average,
    set_learning_rate,
)
from pipelines.stage import UserError


def test_schedule_without_warm_up_and_with_nothing_else():
    assert [lr_at(step, 2, 0, 4.0) for step in range(3)] == pytest.approx([4.0, 2.0, 0.0])
    assert [lr_at(step, 3, 3, 3.0) for step in range(4)] == pytest.approx([1.0, 2.0, 3.0, 3.0])
    assert lr_at(0, 10, 20, 2.0) == 0.1  # a run that is shorter than its warm-up


@pytest.mark.parametrize(
    ("scaling", "batch", "factor"),
    [("none", 4096, 1), ("linear", 256, 1), ("linear", 4096, 16), ("linear", 128, 0.5), ("sqrt", 4096, 4)],
)
def test_learning_rate_is_scaled_as_stated(scaling, batch, factor):
    config = OptimizerConfig(learning_rate=3e-4, scaling=scaling)
    assert config.peak_learning_rate(batch) == pytest.approx(3e-4 * factor)


@pytest.mark.parametrize(
    ("name", "value"),
    [("learning_rate", 0.0), ("warmup_steps", -1), ("weight_decay", -0.1), ("clip_norm", -1.0), ("ema_decay", 1.0)],
)
def test_senseless_values_are_refused_by_name(name, value):
    OptimizerConfig().check()
    with pytest.raises(UserError, match=f"--optimizer.{name.replace('_', '-')} is {value}"):
        OptimizerConfig(**{name: value}).check()


def undecayed(network, **config):
    groups = make_optimizer(network, OptimizerConfig(**{"weight_decay": 0.1, **config})).param_groups
    without = {id(weight) for group in groups if group["weight_decay"] == 0 for weight in group["params"]}
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in network.parameters())
    assert all(group["weight_decay"] in (0, 0.1) for group in groups)
    return {name for name, weight in network.named_parameters() if id(weight) in without}


@pytest.mark.parametrize("kind", ["adamw", "lars", "sgd"])
def test_biases_and_normalisation_do_not_decay(kind):
    predictor = Predictor(PredictorConfig("transformer", width=8, heads=2), 4, 4.0, "", 1)
    assert undecayed(predictor, kind=kind) == {
        name for name, _ in predictor.named_parameters() if "norm" in name or name.endswith("bias") or ".mlp.0." in name
    }
    infiller = Infiller(InfillerConfig(width=8, heads=2), 4, 4.0, "")
    assert "blocks.0.distance_bias" in undecayed(infiller, kind=kind)  # a bias for each head and distance
    gru = Predictor(PredictorConfig("gru", width=8), 4, 4.0, "", 1)
    assert {name.split(".")[-1][:4] for name in undecayed(gru, kind=kind)} == {"bias"}


def test_only_what_is_trained_is_moved():
    encoder = FrameEncoder(EncoderConfig(frozen_backbone=True, embedding_dimension=4))
    assert undecayed(encoder) == {"head.bias"}
    assert undecayed(nn.Linear(2, 2, bias=False)) == set()
    assert undecayed(nn.BatchNorm1d(2)) == {"weight", "bias"}


@pytest.mark.parametrize(("kind", "rate"), [("adamw", 1e-2), ("lars", 0.1), ("sgd", 1e-2)])
def test_steps_lower_a_loss(kind, rate):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 1))
    inputs, targets = torch.randn(64, 4), torch.randn(64, 1)
    optimizer = make_optimizer(network, OptimizerConfig(kind=kind, learning_rate=1.0))
    set_learning_rate(optimizer, rate)
    losses = []
    for _ in range(20):
        loss = (network(inputs) - targets).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_lars_is_its_formula(decay):
    """You et al. 2017, algorithm 1 with momentum .9 and trust .001; biases move as in plain SGD."""
    torch.manual_seed(0)
    network = nn.Linear(5, 3).double()
    optimizer = make_optimizer(network, OptimizerConfig(kind="lars", weight_decay=decay))
    set_learning_rate(optimizer, 2.0)
    expected = {name: weight.detach().clone() for name, weight in network.named_parameters()}
    velocity = {name: torch.zeros_like(weight) for name, weight in expected.items()}
    for _ in range(3):
        gradients = {"weight": torch.randn(3, 5).double(), "bias": torch.randn(3).double()}
        for name, parameter in network.named_parameters():
            parameter.grad = gradients[name].clone()
        optimizer.step()
        for name, weight in expected.items():
            gradient = gradients[name]
            if name == "weight":
                local_rate = 0.001 * weight.norm() / (gradient.norm() + decay * weight.norm())
                gradient = local_rate * (gradient + decay * weight)
            velocity[name] = 0.9 * velocity[name] + gradient
            expected[name] = weight - 2.0 * velocity[name]
    for name, weight in network.named_parameters():
        torch.testing.assert_close(weight.detach(), expected[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("buffers", [True, False])
def test_moving_average_is_its_formula(buffers):
    torch.manual_seed(0)
    module = nn.BatchNorm1d(3)
    averaged = moving_average(module, OptimizerConfig(ema_decay=0.9), buffers)
    expected = {}
    for step in range(3):
        with torch.no_grad():
            module(torch.randn(8, 3) + step)
            module.weight.add_(torch.randn(3))
        averaged.update_parameters(module)
        for name, value in module.state_dict().items():
            mixed = value.is_floating_point() and (buffers or not name.startswith("running"))
            before = expected.get(name, value)
            expected[name] = 0.9 * before + 0.1 * value if mixed else value.clone()
    for name, value in averaged.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, expected[name])
    assert not torch.equal(averaged.module.weight, module.weight)
    assert torch.equal(averaged.module.running_mean, module.running_mean) != buffers
    assert moving_average(module, OptimizerConfig(), buffers) is None


def test_gradients_are_shortened_only_where_asked():
    for clip_norm, left in ((0.0, 5.0), (10.0, 5.0), (1.0, 1.0)):
        weight = nn.Parameter(torch.zeros(2))
        weight.grad = torch.tensor([3.0, 4.0])
        length = nn.utils.clip_grad_norm_([weight], clip_length(OptimizerConfig(clip_norm=clip_norm)))
        assert length == 5
        assert weight.grad.norm().item() == pytest.approx(left)
    assert clip_length(OptimizerConfig()) == math.inf
