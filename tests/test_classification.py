import pytest
import torch

from jepa.classification import LinearProbes, OnlineProbe, accuracy, knn_accuracies, knn_scores, ridge_scores

CLASSES = 3


@pytest.fixture
def world():
    """Training and test samples (N, 8) of three classes that lie in three directions."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % CLASSES
    centres = torch.eye(8)[:CLASSES] * 4
    samples = centres[labels] + torch.randn(300, 8, generator=generator)
    return samples[:200], labels[:200], samples[200:], labels[200:]


def test_nearest_neighbours_vote_by_cosine():
    bank = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 5.0]])
    labels = torch.tensor([0, 1, 1])
    (scores,) = knn_scores(bank, labels, torch.tensor([[3.0, 0.0]]), classes=2, neighbours=2, temperature=0.5)
    # Relative to the weight of a cosine of 1; the third is not among the two nearest.
    torch.testing.assert_close(scores, torch.tensor([1.0, torch.tensor(-0.2 / 0.5).exp()]))


def test_nearest_neighbours_without_oneself():
    bank = torch.tensor([[1.0, 0.0], [0.99, 0.1], [0.0, 1.0], [0.1, 0.99]])
    labels = torch.tensor([0, 1, 0, 1])
    scores = knn_scores(bank, labels, None, classes=2, neighbours=1)
    assert scores.argmax(dim=1).tolist() == [1, 0, 1, 0]
    # More neighbours than there are: all others.
    assert knn_scores(bank, labels, None, classes=2, neighbours=200).shape == (4, 2)


def test_neighbours_of_many_queries_are_those_of_each(world):
    bank, labels, _, _ = world
    many = bank.repeat(8, 1)[:1500]
    together = knn_scores(bank, labels, many, CLASSES)
    assert torch.allclose(together[1400:1410], knn_scores(bank, labels, many[1400:1410], CLASSES), atol=1e-5)
    own = knn_scores(many, labels.repeat(8)[:1500], None, CLASSES, neighbours=1)
    assert accuracy(own, labels.repeat(8)[:1500]) == 1  # a copy of oneself is near


def test_all_probes_tell_classes_apart(world):
    train, labels, test, true = world
    assert accuracy(knn_scores(train, labels, test, CLASSES), true) > 0.9
    scores = ridge_scores(train, labels, test)
    assert scores.shape == (100, CLASSES)
    assert accuracy(scores, true) > 0.9
    assert accuracy(ridge_scores(train, labels, torch.randn(100, 8)), true) < 0.6


def test_ridge_on_two_classes(world):
    train, labels, test, true = world
    scores = ridge_scores(train[labels < 2], labels[labels < 2], test[true < 2])
    assert scores.shape[1] == 2
    assert accuracy(scores, true[true < 2]) > 0.9


def test_accuracy_among_the_best():
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.9, 0.1, 0.5]])
    labels = torch.tensor([2, 2])
    assert [accuracy(scores, labels, top) for top in (1, 2, 5)] == [0, 1, 1]


def test_linear_probes_learn_side_by_side_as_each_alone(world):
    train, labels, test, true = world

    def learn(rates):
        torch.manual_seed(0)
        probes = LinearProbes(train.mean(dim=0), train.std(dim=0), CLASSES, rates)
        for head in probes.heads:
            torch.nn.init.zeros_(head.weight)
            torch.nn.init.zeros_(head.bias)
        optimizer = torch.optim.SGD(probes.parameter_groups(), momentum=0.9)
        for _ in range(30):
            probes.loss(train, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        return probes(test)

    both = learn((0.1, 1e-9))
    assert both.shape == (2, 100, CLASSES)
    assert accuracy(both[0], true) > 0.9
    assert both[1].abs().max() < 1e-5  # hardly anything learnt at that rate
    torch.testing.assert_close(both[0], learn((0.1,))[0])


def test_online_probe_learns_and_the_encoder_does_not(world):
    train, labels, _, _ = world
    encoder = torch.nn.Linear(8, 6)
    probe = OnlineProbe(6, 6, CLASSES)
    optimizer = torch.optim.AdamW(probe.parameters(), 0.05)
    found = []
    for _ in range(100):
        embeddings = encoder(train.repeat(2, 1))  # two views
        loss, accuracies = probe(embeddings, -embeddings, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(accuracies)
    assert encoder.weight.grad is None
    assert set(found[0]) == {"embedding_linear_accuracy", "expander_linear_accuracy"}
    for name, value in found[-1].items():
        assert value > 0.8, name
        assert found[0][name] < 0.7


def test_online_nearest_neighbours_of_both(world):
    train, labels, _, _ = world
    found = knn_accuracies(train[:, None], torch.randn(200, 1, 5), labels, CLASSES)
    assert found["embedding_knn_accuracy"] > 0.9
    assert found["expander_knn_accuracy"] < 0.6
