"""The trainers themselves, killed, stopped and damaged: the short form of benchmarks/kill_training.py."""

import signal

import pytest

from benchmarks import kill_training
from benchmarks.kill_training import Blow, Trial

KILL, TERM = signal.SIGKILL, signal.SIGTERM


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return kill_training.make_world(tmp_path_factory.mktemp("kill_training") / "world", clips=6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "processes", "blows"),
    [
        ("pretrain_encoder", 1, [Blow(KILL, "all", "saving", damages=True), Blow(TERM, "all", "training")]),
        ("train_predictor", 1, [Blow(KILL, "all", "saving", damages=True), Blow(TERM, "all", "training")]),
        ("pretrain_encoder", 2, [Blow(KILL, "rank", "training"), Blow(TERM, "rank", "training")]),
    ],
)
def test_killed_stopped_and_damaged_runs_equal_undisturbed_ones(trainer, processes, blows, world, tmp_path):
    trial = Trial(trainer, processes, world, tmp_path / "runs", steps=60)
    trial.prove(blows)
    assert sum(count for name, count in trial.counts.items() if name.startswith("SIG")) == len(blows)
    assert trial.counts["resumed after step 0"] > 0  # SIGTERM has saved
