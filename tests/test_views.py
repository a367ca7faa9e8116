from dataclasses import replace

import pytest
import torch
from torchvision.transforms.v2 import functional as reference

from data.views import RECIPES, Augmentation, ViewsConfig, augment, make_views

KINDS = ["neighbours", *RECIPES]
UNCHANGED = Augmentation(smallest_crop=1, jitter_probability=0, grey_probability=0)
"""But for mirroring."""


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def random_frames(batch, height=24, width=32, seed=0):
    return torch.randint(0, 256, (2, batch, 3, height, width), generator=seeded(seed), dtype=torch.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_and_range(kind):
    frames, following = random_frames(5)
    for view in make_views(frames, following, ViewsConfig(kind=kind), seeded(0)):
        assert view.shape == (5, 3, 24, 32)
        assert view.dtype == torch.float32
        assert view.min() >= 0
        assert view.max() <= 1
        assert view.std() > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_a_pure_function_of_frames_and_generator(kind):
    frames, following = random_frames(4)
    before = frames.clone()
    config = ViewsConfig(kind=kind)
    generator = seeded(3)
    once, again = make_views(frames, following, config, generator), make_views(frames, following, config, seeded(3))
    assert torch.equal(once[0], again[0])
    assert torch.equal(once[1], again[1])
    assert torch.equal(frames, before)
    # The generator moves on: the same frames look different next time.
    assert not torch.equal(once[0], make_views(frames, following, config, generator)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_views_differ_even_of_the_same_frame(kind):
    frames, _ = random_frames(4)
    first, second = make_views(frames, frames, ViewsConfig(kind=kind), seeded(0))
    assert ((first - second).abs().mean(dim=(1, 2, 3)) > 0.02).all()


def test_neighbours_without_light_and_noise_are_the_two_frames():
    frames, following = random_frames(4)
    dark = ViewsConfig(light_amplitude=0, pixel_noise=0)
    first, second = make_views(frames, following, dark, seeded(0))
    torch.testing.assert_close(first, frames / 255)
    torch.testing.assert_close(second, following / 255)


def test_neighbours_light_is_bounded_smooth_and_as_strong_as_asked():
    grey = torch.full((8, 3, 64, 64), 128, dtype=torch.uint8)
    view, _ = make_views(grey, grey, ViewsConfig(light_amplitude=0.2, light_cells=4, pixel_noise=0), seeded(0))
    light = view - 128 / 255
    assert 0.15 < light.abs().max() <= 0.2
    # Four cells over 64 pixels: 21 pixels from cell to cell, so a step of at most 2 x 0.2 / 21 a pixel.
    assert light.diff(dim=-1).abs().max() < 0.02
    assert light.diff(dim=-2).abs().max() < 0.02


def test_neighbours_pixel_noise_has_the_deviation_asked_for():
    grey = torch.full((4, 3, 64, 64), 128, dtype=torch.uint8)
    view, _ = make_views(grey, grey, ViewsConfig(light_amplitude=0, pixel_noise=0.07), seeded(0))
    assert (view - 128 / 255).std().item() == pytest.approx(0.07, rel=0.02)


@pytest.mark.parametrize("part", ["light_amplitude", "pixel_noise"])
def test_each_sample_and_each_view_has_its_own_light_and_noise(part):
    grey = torch.full((6, 3, 48, 48), 128, dtype=torch.uint8)
    config = replace(ViewsConfig(light_amplitude=0, pixel_noise=0), **{part: 0.1})
    views = torch.cat(make_views(grey, grey, config, seeded(0)))
    correlation = torch.corrcoef(views.flatten(1)) - torch.eye(12)
    # Light has 3 x 8 x 8 independent cells, so correlations by chance have a deviation near 0.08.
    assert correlation.abs().max() < 0.5


@pytest.mark.parametrize("kind", RECIPES)
def test_recipes_see_the_first_frame_only(kind):
    frames, following = random_frames(4)
    config = ViewsConfig(kind=kind)
    here, there = (
        make_views(frames, following, config, seeded(0)),
        make_views(frames, 255 - following, config, seeded(0)),
    )
    assert torch.equal(here[1], there[1])


def test_crops_mirror_and_enlarge():
    # Brightness rises from left to right: a mirror turns the slope round, a crop makes it flatter.
    ramp = torch.linspace(0, 1, 64).expand(200, 3, 64, 64)
    view = augment(ramp, replace(UNCHANGED, smallest_crop=0.3), seeded(0))
    slope = view[:, 0, 32, 48] - view[:, 0, 32, 16]
    assert 60 < (slope < 0).sum() < 140
    widths = slope.abs() / 0.5
    assert widths.min() < 0.65  # sides from 0.55 on, narrower still where the crop is stretched
    assert widths.max() > 0.9
    # Crops lie inside the frame: nowhere does brightness leave the range of the ramp, or turn back.
    steps = view.diff(dim=-1) * slope.sign()[:, None, None, None]
    assert steps.min() > -1e-5


@pytest.mark.parametrize(
    ("part", "adjust"),
    [
        ("brightness", reference.adjust_brightness),
        ("contrast", reference.adjust_contrast),
        ("saturation", reference.adjust_saturation),
    ],
)
def test_colours_change_as_in_torchvision_by_a_factor_for_each_sample(part, adjust):
    images = random_frames(1)[0].expand(64, 3, 24, 32) / 255
    plain = replace(UNCHANGED, jitter_probability=1, brightness=0, contrast=0, saturation=0, hue=0)
    before, after = augment(images, plain, seeded(0)), augment(images, replace(plain, **{part: 0.4}), seeded(0))
    factors = torch.linspace(0.6, 1.4, 801)
    found = []
    for image, changed in zip(before, after, strict=True):
        errors = torch.stack([(adjust(image, factor.item()) - changed).abs().mean() for factor in factors[::40]])
        near = factors[::40][errors.argmin()]
        fine = factors[(factors - near).abs() < 0.04]
        errors = torch.stack([(adjust(image, factor.item()) - changed).abs().mean() for factor in fine])
        assert errors.min() < 1e-3
        found.append(fine[errors.argmin()])
    assert min(found) < 0.65
    assert max(found) > 1.35


def test_hue_turns_colours_and_leaves_their_luma():
    colour = torch.tensor([0.5, 0.4, 0.45]).reshape(1, 3, 1, 1).expand(64, 3, 8, 8)
    plain = replace(UNCHANGED, jitter_probability=1, brightness=0, contrast=0, saturation=0, hue=0)
    turned = augment(colour, replace(plain, hue=0.1), seeded(0))
    luma = reference.rgb_to_grayscale(turned)
    torch.testing.assert_close(luma, reference.rgb_to_grayscale(colour), atol=1e-3, rtol=0)
    assert turned[:, 0].std() > 0.005
    # As far round as torchvision's turn in HSV, on the whole.
    furthest = torch.stack([reference.adjust_hue(colour[0], turn) for turn in (-0.1, 0.1)])
    assert (turned - colour).abs().max() == pytest.approx((furthest - colour[:2]).abs().max().item(), rel=0.4)


def test_grey_and_jitter_as_often_as_asked():
    images = random_frames(1)[0].expand(300, 3, 24, 32) / 255
    grey = augment(images, replace(UNCHANGED, grey_probability=0.2), seeded(0))
    assert 35 < (grey[:, 0] == grey[:, 2]).flatten(1).all(dim=1).sum() < 90
    jittered = augment(images, replace(UNCHANGED, jitter_probability=0.8), seeded(0))
    plain = augment(images, UNCHANGED, seeded(0))
    assert 210 < ((jittered - plain).abs() > 1e-4).flatten(1).any(dim=1).sum() < 270


def test_solarising_inverts_what_is_bright():
    images = random_frames(1)[0].expand(64, 3, 24, 32) / 255
    plain = augment(images, UNCHANGED, seeded(0))
    solarised = augment(images, replace(UNCHANGED, solarise_probability=0.5), seeded(0))
    chosen = (solarised != plain).flatten(1).any(dim=1)
    assert 16 < chosen.sum() < 48
    expected = reference.solarize(plain, 0.5)
    torch.testing.assert_close(solarised[chosen], expected[chosen])


def test_blur_as_often_as_asked():
    images = random_frames(1, 32, 32)[0].expand(64, 3, 32, 32) / 255
    sharp = augment(images, UNCHANGED, seeded(0))
    some = augment(images, replace(UNCHANGED, blur_probability=0.5), seeded(0))
    every = augment(images, replace(UNCHANGED, blur_probability=1), seeded(0))
    untouched = (some == sharp).flatten(1).all(dim=1)
    assert 16 < untouched.sum() < 48
    detail, blurred = sharp.diff(dim=-1).abs().mean(dim=(1, 2, 3)), every.diff(dim=-1).abs().mean(dim=(1, 2, 3))
    assert (blurred < detail * 1.001).all()
    assert blurred.mean() < 0.7 * detail.mean()


def test_asymmetric_recipes_differ_between_the_views():
    assert {kind for kind, (one, other) in RECIPES.items() if one != other} == {"vicreg", "cifar_asymmetric"}
    images = torch.full((400, 3, 16, 16), 230, dtype=torch.uint8)
    dark = [(view.mean(dim=(1, 2, 3)) < 0.5).float().mean()
            for view in make_views(images, images, ViewsConfig(kind="vicreg"), seeded(0))]  # fmt: skip
    assert dark[0] == 0  # brightness .6 of .9 at least
    assert 0.13 < dark[1] < 0.27  # solarised
