import pytest
import torch

from data.views import Neighbours


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def random_frames(batch, height=24, width=32):
    return torch.randint(0, 256, (2, batch, 3, height, width), generator=seeded(0), dtype=torch.uint8)


def grey(batch):
    return torch.full((batch, 3, 64, 64), 128, dtype=torch.uint8)


def test_shapes_and_range():
    for view in Neighbours()(*random_frames(5), seeded(0)):
        assert view.shape == (5, 3, 24, 32)
        assert view.dtype == torch.float32
        assert view.min() >= 0
        assert view.max() <= 1
        assert view.std() > 0.05


def test_a_pure_function_of_frames_and_generator():
    frames, following = random_frames(4)
    before = frames.clone()
    generator = seeded(3)
    once, again = Neighbours()(frames, following, generator), Neighbours()(frames, following, seeded(3))
    assert torch.equal(once[0], again[0])
    assert torch.equal(once[1], again[1])
    assert torch.equal(frames, before)
    # The generator moves on: the same frames look different next time.
    assert not torch.equal(once[0], Neighbours()(frames, following, generator)[0])


def test_the_views_of_a_seed_stay_the_same():
    first, second = Neighbours()(*random_frames(4), seeded(7))
    assert first[0, 0, 0, :3].tolist() == pytest.approx([0.616721, 0.199529, 0.443568], abs=2e-6)
    assert second[3, 2, -1, -3:].tolist() == pytest.approx([0.988960, 0.622741, 0.060627], abs=2e-6)


def test_without_light_and_noise_they_are_the_two_frames():
    frames, following = random_frames(4)
    first, second = Neighbours(light_amplitude=0, pixel_noise=0)(frames, following, seeded(0))
    torch.testing.assert_close(first, frames / 255)
    torch.testing.assert_close(second, following / 255)


def test_light_is_bounded_smooth_and_as_strong_as_asked():
    view, _ = Neighbours(light_amplitude=0.2, pixel_noise=0)(grey(8), grey(8), seeded(0))
    light = view - 128 / 255
    assert 0.15 < light.abs().max() <= 0.2
    # Eight cells over 64 pixels: 9 pixels from cell to cell, so a step of at most 2 x 0.2 / 9 a pixel.
    assert light.diff(dim=-1).abs().max() < 0.045
    assert light.diff(dim=-2).abs().max() < 0.045


def test_pixel_noise_has_the_deviation_asked_for():
    view, _ = Neighbours(light_amplitude=0, pixel_noise=0.07)(grey(4), grey(4), seeded(0))
    assert (view - 128 / 255).std().item() == pytest.approx(0.07, rel=0.02)


@pytest.mark.parametrize("views", [Neighbours(0.1, 0), Neighbours(0, 0.1)])
def test_each_sample_and_each_view_has_its_own_light_and_noise(views):
    both = torch.cat(views(grey(6), grey(6), seeded(0)))
    correlation = torch.corrcoef(both.flatten(1)) - torch.eye(12)
    # Light has 3 x 8 x 8 independent cells, so correlations by chance have a deviation near 0.08.
    assert correlation.abs().max() < 0.5
