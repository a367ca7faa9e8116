import numpy as np
import pytest
import torch

from jepa.detection import DetectionHead, average_precision, fit_detection_head, occupied_cells


def test_cells_are_those_of_the_centres_row_by_row():
    positions = torch.tensor([[[0.0, 0.0], [63.9, 8.0]], [[15.9, 56.0], [8.0, 63.9]]])  # x, y
    occupied = occupied_cells(positions, 64).reshape(2, 8, 8)
    assert occupied.dtype == torch.float32
    assert occupied[0].nonzero().tolist() == [[0, 0], [1, 7]]
    assert occupied[1].nonzero().tolist() == [[7, 1]]  # both in one cell


def test_cells_on_the_rim_stay_inside():
    occupied = occupied_cells(torch.tensor([[[64.0, -1.0]]]), 64, cells=4).reshape(4, 4)
    assert occupied.nonzero().tolist() == [[0, 3]]


def test_average_precision_is_the_mean_precision_at_each_hit():
    logits = torch.tensor([[4.0, 1.0], [3.0, 2.0]])
    occupied = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # hits at ranks 1 and 3 of 4
    assert average_precision(logits, occupied) == pytest.approx((1 / 1 + 2 / 3) / 2)
    assert average_precision(logits, logits.gt(2.5).float()) == 1


def test_weights_are_repetitions():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 16, generator=generator)
    occupied = (torch.rand(5, 16, generator=generator) < 0.3).float()
    times = [2, 0, 1, 3, 1]
    repeated = torch.tensor(times)
    expected = average_precision(logits.repeat_interleave(repeated, 0), occupied.repeat_interleave(repeated, 0))
    assert average_precision(logits, occupied, np.array(times, dtype=float)) == pytest.approx(expected)
    assert average_precision(logits, occupied) != pytest.approx(expected)


@pytest.fixture(scope="module")
def readable():
    """Embeddings that positions can be read off, and the cells, for training and for validation."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(4, 12, generator=generator)

    def make(count):
        positions = 64 * torch.rand(count, 2, 2, generator=generator)
        return (positions.flatten(1) / 20 - 1.6) @ mixing, occupied_cells(positions, 64, cells=4)

    return *make(2000), *make(200)


def test_a_head_learns_where_objects_are(readable):
    head = fit_detection_head(*readable, steps=300)
    _, _, embeddings, occupied = readable
    with torch.no_grad():
        assert average_precision(head(embeddings), occupied) > 0.6
        assert average_precision(head(embeddings.roll(1, dims=0)), occupied) < 0.2


def test_heads_of_one_seed_are_the_same_and_leave_others_random_numbers_alone(readable):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, again, other = (fit_detection_head(*readable, seed=seed, steps=3) for seed in (0, 0, 1))
    torch.testing.assert_close(torch.rand(3), expected)
    torch.testing.assert_close(one[0].weight, again[0].weight, rtol=0, atol=0)
    assert not torch.allclose(one[0].weight, other[0].weight)


def test_the_best_on_validation_is_kept(readable, monkeypatch):
    monkeypatch.setattr("jepa.detection.VALIDATE_EVERY", 1)
    kept, precisions = [], iter([0.1, 0.9, 0.3])

    def judge(logits, occupied):
        kept.append(logits.clone())
        return next(precisions)

    monkeypatch.setattr("jepa.detection.average_precision", judge)
    head = fit_detection_head(*readable, steps=3)
    with torch.no_grad():
        torch.testing.assert_close(head(readable[2]), kept[1], rtol=0, atol=0)


def test_heads_take_any_leading_shape():
    head = DetectionHead(6, cells=3)
    assert head(torch.zeros(2, 5, 6)).shape == (2, 5, 9)
