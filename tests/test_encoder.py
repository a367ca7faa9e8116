"""The frame encoder: vectors and grids from any backbone, published weights or none, the same after saving."""

import dataclasses
from typing import ClassVar

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import nn
from torch.nn import functional

from jepa.components import principal_components
from jepa.config import Bounded
from jepa.encoder import Encoder, EncoderConfig, FrameEncoder, create_encoder, resize_map, spatial_softmax
from jepa.errors import ConfigurationError
from jepa.fingerprint import fingerprint
from pipelines.run.artefacts import save_artefact
from pipelines.run.encoders import load_encoder


def frames(count, height=64, width=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def normalised(encoder, images):
    return (images / 255 - encoder.pixel_mean) / encoder.pixel_std


def unsettle(network):
    """Normalisation statistics that are not those of a new network."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network.eval()


@pytest.mark.parametrize(
    ("changes", "shape"),
    [
        ({}, (16,)),
        ({"levels": (0, 1), "grid": (6, 8)}, (6, 8, 16)),
        ({"backbone": "resnet18", "pooling": "average"}, (16,)),
        ({"levels": (-2, -1), "pooling": "softmax", "embedding_dimension": 0}, (2 * (32 + 64),)),
        ({"backbone": "resnet18", "grid": (2, 3), "embedding_dimension": 0}, (2, 3, 512)),
        ({"backbone": "resnet18", "levels": (1,), "pooling": "average", "embedding_dimension": 0}, (64,)),
        ({"backbone": "test_vit", "pooling": "native", "embedding_dimension": 0}, (64,)),
        ({"backbone": "test_vit", "levels": (2, -1), "grid": (4, 6), "head_widths": (8,)}, (4, 6, 16)),
        ({"backbone": "test_vit3"}, (16,)),  # a register token, and no class token
        ({"backbone": "swin_tiny_patch4_window7_224", "image_size": (56, 56), "grid": (2, 2)}, (2, 2, 16)),
        ({"backbone": "vgg11", "pooling": "average"}, (16,)),
        ({"backbone": "mobilenetv3_small_050", "pooling": "native", "embedding_dimension": 0}, (1024,)),
        ({"backbone": "test_convnext", "head_widths": (8,)}, (16,)),
    ],
)
def test_a_trained_encoder_is_the_same_after_saving(changes, shape, tmp_path):
    torch.manual_seed(0)
    config = EncoderConfig(**{"image_size": (64, 96), "embedding_dimension": 16} | changes)
    encoder, images = create_encoder(config), frames(3, *config.image_size)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    weights = [weight for weight in encoder.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=1e-3)
    encoder(images).square().mean().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in weights)  # none is idle
    optimizer.step()
    assert any(not torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    embeddings = encoder.embed(images[:, None])
    save_artefact(tmp_path / "encoder", "encoder", dataclasses.asdict(config), encoder)
    loaded = load_encoder(tmp_path / "encoder")
    assert embeddings.shape == (3, *shape) == (3, *encoder.shape)
    assert torch.equal(embeddings, loaded.embed(images[:, None]))
    assert not torch.equal(embeddings[0], embeddings[1])
    assert (loaded.config, loaded.fingerprint) == (encoder.config, encoder.fingerprint)
    next(loaded.parameters()).data.view(-1)[0] += 1e-3
    assert loaded.fingerprint != encoder.fingerprint


@pytest.mark.parametrize(("backbone", "size"), [("resnet18", (64, 96)), ("tf_efficientnet_lite0", (64, 64))])
def test_a_grid_of_a_level_is_what_timm_calls_its_features(backbone, size):
    whole = unsettle(timm.create_model(backbone))
    reference = timm.create_model(backbone, features_only=True, out_indices=(2, 3)).eval()
    assert reference.load_state_dict(whole.state_dict(), strict=False).missing_keys == []
    images = frames(2, *size)
    mean, std = (torch.tensor(whole.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        fine, coarse = reference((images / 255 - mean) / std)
    whole.reset_classifier(0)
    cells = tuple(fine.shape[2:])
    encoder = FrameEncoder(EncoderConfig(backbone, "frozen", size, cells, (2, 3), embedding_dimension=0), whole).eval()
    coarse = functional.interpolate(coarse, cells, mode="bilinear")
    expected = torch.cat([fine, coarse], dim=1).permute(0, 2, 3, 1)
    torch.testing.assert_close(encoder.embed(images[:, None]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backbone", ["resnet18", "test_vit", "tf_efficientnet_lite0"])
def test_native_pooling_is_timms_own(backbone):
    encoder = create_encoder(EncoderConfig(backbone, image_size=(64, 64), pooling="native", embedding_dimension=0))
    images = frames(2)
    sizes = {"img_size": 64} if backbone == "test_vit" else {}
    reference = timm.create_model(backbone, num_classes=0, **sizes).eval()
    reference.load_state_dict(encoder.backbone.state_dict())
    with torch.no_grad():
        expected = reference(normalised(encoder, images))
    torch.testing.assert_close(encoder.embed(images[:, None]), expected)


def test_patches_of_a_transformer_are_those_of_its_end_without_other_tokens():
    encoder = create_encoder(EncoderConfig("test_vit", image_size=(64, 96), grid=(4, 6), embedding_dimension=0)).eval()
    images = frames(2, 64, 96)
    with torch.no_grad():
        tokens = encoder.backbone.forward_features(normalised(encoder, images))
    assert tokens.shape == (2, 1 + 4 * 6, 64)
    torch.testing.assert_close(encoder.embed(images[:, None]), tokens[:, 1:].unflatten(1, (4, 6)))


@pytest.mark.parametrize("grid", [(15, 22), (5, 11), (30, 44), (5, 44), (15, 7)])
def test_maps_shrink_by_averages_and_grow_by_interpolation(grid):
    features = torch.randn(2, 3, 15, 22)
    rows = functional.adaptive_avg_pool2d(features, (min(15, grid[0]), min(22, grid[1])))
    expected = functional.interpolate(rows, grid, mode="bilinear").permute(0, 2, 3, 1)
    torch.testing.assert_close(resize_map(features, grid), expected)


def test_the_head_normalises_over_all_tokens_of_a_batch():
    torch.manual_seed(0)
    encoder = create_encoder(EncoderConfig(grid=(8, 8), head_widths=(12,), embedding_dimension=5)).train()
    images = frames(4)
    with torch.no_grad():
        maps = encoder.backbone.forward_intermediates(normalised(encoder, images), [2])[0]
        hidden = encoder.head[0](maps.permute(0, 2, 3, 1))
        flat = hidden.reshape(-1, 12)
        hidden = (hidden - flat.mean(0)) / (flat.var(0, unbiased=False) + 1e-5).sqrt()
        expected = encoder.head[3](hidden.relu())
        torch.testing.assert_close(encoder(images), expected, rtol=1e-3, atol=1e-4)
    assert [type(layer).__name__ for layer in encoder.head] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]


def test_uint8_and_float_frames_mean_the_same_and_each_frame_stands_alone():
    encoder = create_encoder(EncoderConfig()).eval()
    images = frames(6)
    changed = images.clone()
    changed[3:] = 255 - changed[3:]
    with torch.no_grad():
        before, after = encoder(images), encoder(changed)
        torch.testing.assert_close(before, encoder(images.float() / 255))
    assert torch.equal(before[:3], after[:3])
    assert not torch.equal(before[3:], after[3:])
    with pytest.raises(ValueError, match=r"\(6, 3, 32, 32\)"):
        encoder(images[..., ::2, ::2])


def test_embedding_is_evaluation_whatever_the_mode():
    encoder = create_encoder(EncoderConfig(head_widths=(8,)))
    images, state = frames(4)[:, None], encoder.state_dict()
    before = {name: value.clone() for name, value in state.items()}
    training = encoder.train().embed(images)
    assert encoder.training
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert torch.equal(training, encoder.eval().embed(images))
    assert training.grad_fn is None


@dataclasses.dataclass(frozen=True)
class ColoursConfig(Bounded):
    kind: ClassVar[str] = "colours"
    embedding_dimension: int = 0


class Colours(Encoder):
    configuration = ColoursConfig

    def __init__(self, config):
        pixels = (0.5,) * 3, (0.5,) * 3
        place = {"window": 1, "image_size": (8, 8), "tokens": (2, 2), "features": 3}
        super().__init__(config, nn.AvgPool2d(4), pixels=pixels, **place)

    def embed(self, frames):
        return self.head(self.backbone(self.normalise(frames, (1, 3, 8, 8))[:, 0]).movedim(1, -1))


def test_an_encoder_of_ones_own_is_a_class_and_its_configuration(tmp_path):
    encoder = Colours(ColoursConfig())
    save_artefact(tmp_path / "encoder", "encoder", encoder.config, encoder)
    loaded = load_encoder(tmp_path / "encoder")
    images = frames(5, 8, 8)[:, None]
    assert torch.equal(loaded.embed(images), encoder.embed(images))
    assert loaded.embed(images).shape == (5, *loaded.shape)
    assert (
        loaded.fingerprint
        == encoder.fingerprint
        == fingerprint(encoder.state_dict(), {"kind": "colours"} | {"embedding_dimension": 0})
    )


def test_a_frozen_backbone_does_not_move():
    backbone = timm.create_model("resnet18", num_classes=0)
    config = EncoderConfig("resnet18", "frozen", embedding_dimension=4, pooling="average")
    encoder = FrameEncoder(config, backbone).train()
    before = {name: value.clone() for name, value in encoder.backbone.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], lr=0.1)
    encoder(frames(4)).square().mean().backward()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in encoder.backbone.state_dict().items())
    moved = {name for name, weight in encoder.named_parameters() if weight.grad is not None}
    assert moved == {"head.0.weight", "head.0.bias"}


def test_principal_components_are_those_of_the_singular_value_decomposition():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(40, 6, 5, 8, generator=generator) * torch.arange(1.0, 9) + 1000
    head = principal_components(tokens.split(7), 3)
    rows = tokens.reshape(-1, 8).double().numpy()
    centred = rows - rows.mean(axis=0)
    _, _, components = np.linalg.svd(centred, full_matrices=False)
    signs = np.sign(components[np.arange(8), np.abs(components).argmax(axis=1)])
    expected = centred @ (components * signs[:, None])[:3].T
    reduced = head.double()(tokens.double()).reshape(-1, 3).detach().numpy()
    np.testing.assert_allclose(reduced, expected, atol=2e-3)  # the weights are float32, the mean is 1000
    with pytest.raises(ConfigurationError, match="pca is 9: 1200 tokens of 8 features have at most 8"):
        principal_components([tokens], 9)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"backbone": "resnet_18"}, r"backbone is resnet_18, which timm does not know"),
        ({"head_widths": (8, 0)}, r"head_widths is 8 0: it must be at least 1"),
        ({"head_widths": (8,), "embedding_dimension": 0}, r"head_widths need a head: give an embedding_dimension"),
        ({"grid": (4, 0)}, r"grid is 4 0: rows and columns must both be positive, or 0 0"),
        ({"levels": (3,)}, r"levels is 3: small_conv has 0 to 2"),
        ({"levels": ()}, r"levels is empty: name each level once"),
        ({"weights": "published"}, r"weights are published for models of timm, not for small_conv"),
        ({"backbone": "resnet18.no_such_tag", "weights": "published"}, r"weights the hub does not give .*no_such_tag"),
    ],
)
def test_what_cannot_be_built_names_the_field_and_the_mend(changes, complaint):
    with pytest.raises(ConfigurationError, match=complaint) as raised:
        create_encoder(EncoderConfig(**changes))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("backbone", "size"),
    [
        ("vit_tiny_patch16_224", (8, 8)), ("vgg11", (16, 16)), ("vgg11", (48, 48)), ("levit_128s", (70, 70)),
        ("bat_resnext26ts", (64, 64)),
    ],
)  # fmt: skip
def test_what_a_backbone_does_not_take_is_one_line_at_the_first_frame(backbone, size):
    with pytest.raises(
        ConfigurationError, match=r"image_size is \d+ \d+, .*take 2\d\d 2\d\d, which it was made for"
    ) as raised:
        create_encoder(EncoderConfig(backbone, image_size=size)).embed(frames(1, *size)[:, None])
    assert "\n" not in str(raised.value)


def test_weights_from_a_file_are_those_of_the_whole_model_and_nothing_less(tmp_path):
    torch.manual_seed(0)
    published = unsettle(timm.create_model("test_resnet"))
    state, config = published.state_dict(), EncoderConfig("test_resnet", "frozen", pooling="native")
    path = tmp_path / "weights.safetensors"

    def load(tensors):
        safetensors.torch.save_file(tensors, path)
        return create_encoder(config, path)

    encoder = load(state)
    classifier = {name for name in state if name.startswith(published.default_cfg["classifier"])}
    assert set(encoder.backbone.state_dict()) == state.keys() - classifier
    assert all(torch.equal(value, state[name]) for name, value in encoder.backbone.state_dict().items())
    first, *others = state
    for wrong in (
        {name: state[name] for name in others},
        {**state, "stranger.weight": torch.zeros(1)},
        {**state, first: torch.zeros(1)},
        {name: value for name, value in state.items() if name not in classifier},
        timm.create_model("test_vit").state_dict(),
    ):
        with pytest.raises(ConfigurationError, match=r"does not hold the weights of test_resnet") as raised:
            load(wrong)
        assert "\n" not in str(raised.value)
    path.write_bytes(b"no tensors")
    with pytest.raises(ConfigurationError, match=r"does not hold the weights of test_resnet"):
        create_encoder(config, path)
    with pytest.raises(ConfigurationError, match=r"there is no such safetensors file"):
        create_encoder(config, tmp_path / "weights.bin")


def test_the_spatial_softmax_says_where_a_channel_is_strong():
    features = torch.zeros(2, 3, 5, 9)
    features[0, 1, 4, 0] = features[1, 1, 2, 6] = 9
    found = spatial_softmax(features)
    assert found.shape == (2, 6)
    torch.testing.assert_close(found[:, 1], torch.tensor([1.0, 0.0]))  # rows
    torch.testing.assert_close(found[:, 4], torch.tensor([-1.0, 0.5]))  # columns
    torch.testing.assert_close(found[:, [0, 2, 3, 5]], torch.zeros(2, 4))  # nowhere, so in the middle
