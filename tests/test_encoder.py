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
    for backbone in ("small_conv", "resnet18", "vgg16", "vit_tiny_patch16_224"):
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


def test_expander_has_the_layers_that_it_says():
    expander = Expander(8, ExpanderConfig(width=16, hidden_layers=2))
    assert expander(torch.randn(4, 8)).shape == (4, 16)
    assert sum(isinstance(layer, torch.nn.BatchNorm1d) for layer in expander) == 2
