from dataclasses import replace

import pytest
import torch

from data.views import ViewsConfig, make_views

KINDS = ["neighbours", "augmentations"]


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


def test_augmentations_are_of_the_first_frame_only():
    frames, following = random_frames(4)
    config = ViewsConfig(kind="augmentations")
    here, there = (
        make_views(frames, following, config, seeded(0)),
        make_views(frames, 255 - following, config, seeded(0)),
    )
    assert torch.equal(here[1], there[1])


def test_augmentations_crop_and_flip():
    # Brightness rises from left to right: a flip turns the slope round, a crop makes it flatter.
    ramp = torch.linspace(0, 255, 64).round().to(torch.uint8).expand(200, 3, 64, 64)
    config = ViewsConfig(kind="augmentations", colour_strength=0, blur_probability=0)
    view, _ = make_views(ramp, ramp, config, seeded(0))
    slope = view[:, 0, 32, 48] - view[:, 0, 32, 16]
    assert 60 < (slope < 0).sum() < 140
    widths = slope.abs() / 0.5
    assert widths.min() < 0.65  # smallest_crop 0.3: sides from 0.55 on, narrower still where the crop is stretched
    assert widths.max() > 0.9
    # Crops lie inside the frame: nowhere does brightness leave the range of the ramp, or turn back.
    steps = view.diff(dim=-1) * slope.sign()[:, None, None, None]
    assert steps.min() > -1e-5


def test_augmentations_change_colour_sample_by_sample():
    colour = torch.tensor([90, 120, 150], dtype=torch.uint8).reshape(1, 3, 1, 1).expand(16, 3, 32, 32)
    plain = ViewsConfig(kind="augmentations", colour_strength=0)
    view, _ = make_views(colour, colour, plain, seeded(0))
    torch.testing.assert_close(view, colour / 255)
    bright, _ = make_views(colour, colour, replace(plain, colour_strength=0.4), seeded(0))
    brightness = bright.mean(dim=(1, 2, 3)) / view.mean(dim=(1, 2, 3))
    assert brightness.std() > 0.1
    assert brightness.min() > 0.59
    assert brightness.max() < 1.41
    saturation = (bright[:, 2] - bright[:, 0]).mean(dim=(1, 2)) / brightness
    assert saturation.std() > 0.02


def test_augmentations_blur_as_often_as_asked():
    frames = random_frames(1, 32, 32)[0].expand(64, 3, 32, 32)
    config = ViewsConfig(kind="augmentations", colour_strength=0, smallest_crop=1, blur_probability=0)
    sharp, _ = make_views(frames, frames, config, seeded(0))
    some, _ = make_views(frames, frames, replace(config, blur_probability=0.5), seeded(0))
    every, _ = make_views(frames, frames, replace(config, blur_probability=1), seeded(0))
    untouched = (some == sharp).flatten(1).all(dim=1)
    assert 16 < untouched.sum() < 48
    detail, blurred = sharp.diff(dim=-1).abs().mean(dim=(1, 2, 3)), every.diff(dim=-1).abs().mean(dim=(1, 2, 3))
    assert (blurred < detail * 1.001).all()
    assert blurred.mean() < 0.7 * detail.mean()
