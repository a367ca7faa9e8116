"""Families of backbones from timm: each can be trained, saved and loaded; and what is particular to some of them."""

import pytest
import torch
from torch import nn

from jepa.encoder import EncoderConfig, FrameEncoder, create_encoder
from jepa.expander import Expander, ExpanderConfig
from jepa.objectives import ObjectiveConfig, objective

STEPS = 10


def make_frames(count: int, size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def train(encoder: FrameEncoder, frames: torch.Tensor) -> None:
    """A few steps of VICReg, as `pretrain_encoder` takes them."""
    network = nn.Sequential(encoder, Expander(encoder.embedding_dimension, ExpanderConfig(32))).train()
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    optimizer, generator = torch.optim.AdamW(weights, 1e-3), torch.Generator().manual_seed(0)
    noise = torch.rand(2 * len(frames), *frames.shape[1:], generator=generator) / 4
    for _ in range(STEPS):
        first, second = network(torch.cat([frames, frames]) / 255 + noise).chunk(2)
        terms = objective(first, second, ObjectiveConfig(), generator)
        terms.loss.backward()
        # DistributedDataParallel refuses weights without a gradient.
        assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in weights)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("backbone", "size", "changes"),
    [
        ("resnet10t", 64, {}),
        ("convnext_atto", 64, {}),
        ("vit_tiny_patch16_224", 64, {}),
        ("efficientnet_lite0", 64, {}),
        ("vgg11", 64, {}),
        ("mobilenetv4_conv_small", 64, {}),
        # Of the same families, but made for tests: larger frames take long. A frozen one has no backward pass.
        ("test_resnet", 224, {}),
        ("test_convnext", 224, {}),
        ("test_vit", 224, {}),
        ("test_efficientnet", 224, {}),
        ("vgg11", 224, {"frozen_backbone": True, "head_widths": (32,), "head_dropout": 0.1}),
        ("mobilenetv4_conv_small_035", 224, {}),
        # What some of them have besides.
        ("resnet18", 32, {"stem": "cifar", "embedding_dimension": 0}),
        ("test_vit", 64, {"pooling": "class_token", "register_tokens": 3}),
        ("test_vit", 224, {"pooling": "class_token", "register_tokens": 3}),
        ("test_vit", 224, {"pooling": "flatten", "register_tokens": 3}),
    ],
)
def test_a_trained_backbone_is_the_same_after_saving_and_loading(backbone, size, changes, tmp_path):
    torch.manual_seed(0)
    config = EncoderConfig(
        backbone, **{"embedding_dimension": 16, "pooling": "average", **changes}, image_size=(size, size)
    )
    encoder, frames = create_encoder(config), make_frames(2, size)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    train(encoder, frames)
    moved = {name for name, value in encoder.state_dict().items() if not torch.equal(value, before[name])}
    assert any(name.startswith("backbone.") for name in moved) != config.frozen_backbone  # running statistics too
    encoder.eval().save_pretrained(tmp_path)
    loaded = FrameEncoder.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        embeddings = encoder(frames)
        assert torch.equal(embeddings, loaded(frames))
    assert embeddings.shape == (2, encoder.embedding_dimension)
    assert not torch.equal(embeddings[0], embeddings[1])
    assert loaded.config == encoder.config
    assert loaded.fingerprint() == encoder.fingerprint()


def test_the_cifar_stem_keeps_the_size_of_small_images():
    shapes = {}
    for stem in ("published", "cifar"):
        encoder = FrameEncoder(EncoderConfig("resnet18", image_size=(32, 32), stem=stem))
        shapes[stem] = tuple(encoder.backbone.forward_features(torch.zeros(2, 3, 32, 32)).shape)
    assert shapes == {"published": (2, 512, 1, 1), "cifar": (2, 512, 4, 4)}
    # A stem of several convolutions is one afterwards, too.
    deep = FrameEncoder(EncoderConfig("resnet10t", image_size=(32, 32), stem="cifar"))
    assert deep.backbone.forward_features(torch.zeros(2, 3, 32, 32)).shape == (2, 512, 4, 4)


@pytest.mark.parametrize(
    ("backbone", "registers", "prefix"),
    [
        ("test_vit", 0, 1),  # a class token
        ("test_vit", 3, 4),
        ("test_vit3", 0, 1),  # a register token, and no class token
        ("test_vit3", 2, 2),
        ("volo_d1_224", 0, 1),  # a class token that timm does not count
        ("mixer_s32_224", 0, 0),
    ],
)
def test_pooling_takes_the_tokens_that_it_should(backbone, registers, prefix):
    def pooled(pooling):
        encoder = FrameEncoder(EncoderConfig(backbone, 0, pooling=pooling, register_tokens=registers)).eval()
        encoder.backbone.forward_features = lambda images: tokens
        return encoder(make_frames(2, 64))

    config = EncoderConfig(backbone, 0, pooling="average", register_tokens=registers)
    with torch.no_grad():
        tokens = FrameEncoder(config).eval().backbone.forward_features(torch.zeros(2, 3, 64, 64))
        tokens = torch.randn(tokens.shape)
        patches = tokens[:, prefix:]
        assert patches.shape[1] in (4, 16)
        torch.testing.assert_close(pooled("average"), patches.mean(dim=1))
        assert torch.equal(pooled("flatten"), patches.flatten(1))
        if prefix and not backbone.startswith("test_vit3"):
            assert torch.equal(pooled("class_token"), tokens[:, 0])


def test_register_tokens_take_part():
    encoder = FrameEncoder(EncoderConfig("test_vit", image_size=(64, 64), pooling="average", register_tokens=2)).eval()
    frames = make_frames(2, 64)
    with torch.no_grad():
        before = encoder(frames)
        encoder.backbone.reg_token += 1
        assert not torch.equal(encoder(frames), before)
