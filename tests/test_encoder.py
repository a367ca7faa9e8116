"""The frame encoder: any backbone, any input, the same embeddings after saving and loading."""

import dataclasses

import pytest
import torch

from jepa.encoder import ConfigurationError, EncoderConfig, FrameEncoder, create_encoder
from jepa.expander import Expander, ExpanderConfig


def frames(count: int, height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("backbone", "size"),
    [
        ("small_conv", (32, 64)),
        ("resnet18", (64, 64)),
        ("vit_tiny_patch16_224", (64, 96)),
        ("vgg16", (32, 32)),
        ("mobilenetv3_small_050", (64, 64)),
        ("swin_tiny_patch4_window7_224", (56, 56)),
    ],
)
@pytest.mark.parametrize("pooling", ["flatten", "average"])
def test_save_and_load_gives_the_same_embeddings(backbone, size, pooling, tmp_path):
    config = EncoderConfig(backbone=backbone, image_size=size, embedding_dimension=8, pooling=pooling)
    encoder = create_encoder(config).eval()
    images = frames(2, *size)
    encoder.save_pretrained(tmp_path)
    loaded = FrameEncoder.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(encoder(images), loaded(images))
    assert loaded.fingerprint() == encoder.fingerprint()
    assert loaded.config == encoder.config


def test_every_weight_that_is_trained_has_a_gradient():
    # DistributedDataParallel refuses weights without one.
    # cait's class token and the layers that are its own have no part in the patches.
    for backbone in ("small_conv", "resnet18", "vgg16", "vit_tiny_patch16_224", "test_convnext", "cait_xxs24_224"):
        encoder = create_encoder(EncoderConfig(backbone=backbone))
        encoder(frames(2, 64, 64)).sum().backward()
        without = [name for name, p in encoder.named_parameters() if p.requires_grad and p.grad is None]
        assert without == [], backbone


def test_uint8_and_float_frames_mean_the_same():
    encoder = create_encoder(EncoderConfig()).eval()
    images = frames(4, 64, 64)
    with torch.no_grad():
        assert torch.allclose(encoder(images), encoder(images.float() / 255))


def test_an_embedding_depends_on_its_own_frame_only():
    encoder = create_encoder(EncoderConfig()).eval()
    images = frames(6, 64, 64)
    changed = images.clone()
    changed[3:] = 255 - changed[3:]
    with torch.no_grad():
        before, after = encoder(images), encoder(changed)
    assert torch.equal(before[:3], after[:3])
    assert not torch.equal(before[3:], after[3:])


def test_fingerprint_tells_encoders_apart():
    encoder = create_encoder(EncoderConfig())
    before = encoder.fingerprint()
    assert encoder.fingerprint() == before
    with torch.no_grad():
        encoder.head.bias[0] += 1e-3
    assert encoder.fingerprint() != before


def test_unknown_backbone_gets_suggestions():
    with pytest.raises(ConfigurationError, match=r"unknown backbone 'resnet_18'.*resnet18"):
        create_encoder(EncoderConfig(backbone="resnet_18"))


def test_impossible_size_names_the_mend():
    with pytest.raises(ConfigurationError, match=r"--encoder\.image-size"):
        create_encoder(EncoderConfig(backbone="vit_tiny_patch16_224", image_size=(8, 8)))


def test_frames_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3, 32, 32\)"):
        create_encoder(EncoderConfig())(frames(2, 32, 32))


def test_frozen_backbone_does_not_move():
    encoder = create_encoder(EncoderConfig(frozen_backbone=True)).train()
    before = {name: value.clone() for name, value in encoder.backbone.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], lr=0.1)
    encoder(frames(4, 64, 64)).square().mean().backward()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in encoder.backbone.state_dict().items())
    assert encoder.head.weight.grad is not None


def test_configuration_survives_json():
    encoder = create_encoder(EncoderConfig(image_size=[32, 64]))  # type: ignore[arg-type]
    assert encoder.config.image_size == (32, 64)
    assert dataclasses.asdict(encoder.config)["pretrained"] is False


@pytest.mark.parametrize(("pooling", "features"), [("average", 512), ("flatten", 512 * 2 * 2)])
def test_without_a_head_the_embedding_is_the_features(pooling, features, tmp_path):
    encoder = create_encoder(EncoderConfig("resnet18", 0, pooling=pooling)).eval()
    encoder.save_pretrained(tmp_path)
    loaded = FrameEncoder.from_pretrained(tmp_path).eval()
    images = frames(2, 64, 64)
    with torch.no_grad():
        maps = encoder.backbone.forward_features((images / 255 - encoder.pixel_mean) / encoder.pixel_std)
        expected = maps.mean(dim=(2, 3)) if pooling == "average" else maps.flatten(1)
        assert torch.equal(loaded(images), expected)
    assert encoder.embedding_dimension == loaded.embedding_dimension == features
    assert loaded.config == encoder.config
    assert loaded.fingerprint() == encoder.fingerprint()


def test_the_head_has_the_layers_that_it_says(tmp_path):
    config = EncoderConfig(
        "vgg16", 50, (32, 32), "average", head_widths=(128, 32), head_dropout=0.3, frozen_backbone=True
    )
    encoder = create_encoder(config).train()
    layers = [*encoder.head_layers, encoder.head]
    assert [type(layer).__name__ for layer in layers] == 2 * ["Linear", "BatchNorm1d", "ReLU", "Dropout"] + ["Linear"]
    linear = [layer for layer in layers if isinstance(layer, torch.nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [(512, 128), (128, 32), (32, 50)]
    assert [layer.p for layer in layers if isinstance(layer, torch.nn.Dropout)] == [0.3, 0.3]
    assert encoder.embedding_dimension == 50

    images = frames(4, 32, 32)
    assert not torch.equal(encoder(images), encoder(images))  # dropout
    encoder(images).sum().backward()
    assert {name for name, weight in encoder.named_parameters() if weight.grad is not None} == {
        name for name, _ in encoder.named_parameters() if name.startswith("head")
    }
    encoder.eval().save_pretrained(tmp_path)
    loaded = FrameEncoder.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(encoder(images), loaded(images))
    assert loaded.config == encoder.config


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"embedding_dimension": -1}, r"--encoder\.embedding-dimension is -1: it must be 0 or more"),
        ({"register_tokens": -1}, r"--encoder\.register-tokens is -1: it must be 0 or more"),
        ({"head_widths": (8, 0)}, r"--encoder\.head-widths has 0: widths must be positive"),
        ({"head_widths": (8,), "embedding_dimension": 0}, r"give an --encoder\.embedding-dimension"),
        ({"head_widths": (8,), "head_dropout": 1.0}, r"--encoder\.head-dropout is 1: it must be at least 0, below 1"),
        ({"head_dropout": 0.5}, r"--encoder\.head-dropout needs hidden layers: give --encoder\.head-widths"),
        ({"stem": "cifar"}, r"small_conv has no cifar stem: .* resnet18"),
        ({"backbone": "vgg11", "stem": "cifar"}, r"vgg11 has no cifar stem"),
        ({"pooling": "class_token"}, r"small_conv has no class token: take --encoder\.pooling average"),
        ({"backbone": "test_vit3", "pooling": "class_token"}, r"test_vit3 has no class token"),  # a register token only
        ({"backbone": "pit_ti_224", "pooling": "average"}, r"pit_ti_224 has no patches .* --encoder\.pooling class_t"),
        ({"register_tokens": 2}, r"small_conv has no place for register tokens: drop --encoder\.register-tokens"),
        ({"backbone": "test_resnet", "register_tokens": 2}, r"test_resnet has no place for register tokens"),
        ({"backbone": "test_byobnet", "register_tokens": 2}, r"test_byobnet has no place for register tokens"),
        ({"pretrained": True}, r"small_conv has no published weights: drop --encoder\.pretrained"),
        ({"pretrained": True, "backbone": "resnet18", "stem": "cifar"}, r"--encoder\.pretrained, or --encoder\.stem"),
        ({"pretrained": True, "backbone": "test_vit", "register_tokens": 1}, r"and --encoder\.register-tokens"),
    ],
)  # fmt: skip
def test_what_cannot_be_built_names_the_mend(changes, complaint):
    with pytest.raises(ConfigurationError, match=complaint) as raised:
        create_encoder(EncoderConfig(**changes))
    assert "\n" not in str(raised.value)


def test_published_weights_that_cannot_be_had_are_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ConfigurationError, match=r"weights of test_resnet cannot be had .*--encoder\.pretrained"
    ) as raised:
        create_encoder(EncoderConfig("test_resnet", pretrained=True))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("output", "expected"), [(0, 80), (100, 100)])
def test_expander_has_the_layers_that_it_says(output, expected):
    expander = Expander(50, ExpanderConfig(width=80, hidden_layers=2, output_dimension=output))
    assert expander(torch.randn(4, 50)).shape == (4, expected)
    assert sum(isinstance(layer, torch.nn.BatchNorm1d) for layer in expander) == 2
    linear = [layer for layer in expander if isinstance(layer, torch.nn.Linear)]
    assert [layer.out_features for layer in linear] == [80, 80, expected]


@pytest.mark.parametrize(("option", "value"), [("width", 0), ("hidden_layers", -1), ("output_dimension", -1)])
def test_an_impossible_expander_is_one_line(option, value):
    with pytest.raises(
        ConfigurationError, match=rf"--expander\.{option.replace('_', '-')} is {value}: it must be at lea"
    ):
        Expander(8, ExpanderConfig(**{option: value}))
