import pytest
import torch

from data.views import Neighbours


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def random_clips(batch, height=24, width=32):
    frames = torch.randint(0, 256, (2, batch, 3, height, width), generator=seeded(0), dtype=torch.uint8)
    return frames.transpose(0, 1)


def grey(batch, length=2):
    return torch.full((batch, length, 3, 64, 64), 128, dtype=torch.uint8)


def test_a_pure_function_of_frames_and_generator():
    clips = random_clips(4)
    before = clips.clone()
    generator = seeded(3)
    once, again = Neighbours()(clips, generator), Neighbours()(clips, seeded(3))
    assert once.shape == clips.shape
    assert once.dtype == torch.float32
    assert (once.min() >= 0) & (once.max() <= 1) & (once.std() > 0.05)
    assert torch.equal(once, again)
    assert torch.equal(clips, before)
    # The generator moves on: the same frames look different next time.
    assert not torch.equal(once, Neighbours()(clips, generator))


def test_the_views_of_a_seed_stay_the_same():
    views = Neighbours()(random_clips(4), seeded(7))
    assert views[0, 0, 0, 0, :3].tolist() == pytest.approx([0.616721, 0.199529, 0.443568], abs=2e-6)
    assert views[3, 1, 2, -1, -3:].tolist() == pytest.approx([0.988960, 0.622741, 0.060627], abs=2e-6)


def test_without_light_and_noise_they_are_the_frames():
    clips = random_clips(4)
    assert torch.equal(Neighbours(light_amplitude=0, pixel_noise=0)(clips, seeded(0)), clips.float() / 255)


def test_light_is_bounded_smooth_and_as_strong_as_asked():
    light = Neighbours(light_amplitude=0.2, pixel_noise=0)(grey(8), seeded(0)) - 128 / 255
    assert 0.15 < light.abs().max() <= 0.2
    # Eight cells over 64 pixels: 9 pixels from cell to cell, so a step of at most 2 x 0.2 / 9 a pixel.
    assert light.diff(dim=-1).abs().max() < 0.045
    assert light.diff(dim=-2).abs().max() < 0.045


def test_pixel_noise_has_the_deviation_asked_for():
    views = Neighbours(light_amplitude=0, pixel_noise=0.07)(grey(4), seeded(0))
    assert (views - 128 / 255).std().item() == pytest.approx(0.07, rel=0.02)


@pytest.mark.parametrize("length", [2, 5])
@pytest.mark.parametrize("views", [Neighbours(0.1, 0), Neighbours(0, 0.1)])
def test_each_frame_of_each_clip_has_its_own_light_and_noise(views, length):
    flat = views(grey(6, length), seeded(0)).flatten(0, 1).flatten(1)
    correlation = torch.corrcoef(flat) - torch.eye(6 * length)
    # Light has 3 x 8 x 8 independent cells, so correlations by chance have a deviation near 0.08.
    assert correlation.abs().max() < 0.5
