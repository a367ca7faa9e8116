"""Videos held out in turn: nothing that a member is judged on was among what it learned from."""

import numpy as np
import pytest
import torch

from data.embedding_cache import ClipKey, EmbeddedClip, EmbeddingCache
from data.windows import Windows
from jepa.predictor import Predictor, PredictorConfig
from pipelines.stage import UserError
from pipelines.train_predictor import (
    Options,
    Split,
    Trial,
    draw_batches,
    fit_ridge_on,
    hold_out,
    hold_out_in_turn,
    measure_embeddings,
    members_by_split,
)

CONTEXT = 3


@pytest.fixture
def cache(tmp_path, make_clip, write_cache):
    """Five videos, each on two phases of the clock."""
    clips = [
        make_clip(f"/{name}.mp4", 30, seed=10 * seed + int(10 * phase_s), phase_s=phase_s)
        for seed, name in enumerate("abcde")
        for phase_s in (0.0, 0.1)
    ]
    return EmbeddingCache(write_cache(tmp_path, clips))


def ensemble(members: int) -> Predictor:
    """Members that disagree."""
    torch.manual_seed(0)
    predictor = Predictor(PredictorConfig(context=CONTEXT, width=16, depth=1), 5, 4.0, "abc", members).eval()
    for member in predictor.members:
        torch.nn.init.normal_(member.head.weight)  # type: ignore[union-attr, arg-type]
    return predictor


def test_each_video_is_held_out_once_with_all_its_phases(cache):
    splits = hold_out_in_turn(cache, 3)
    held_out = [{clip.key.source for clip in split.validation.clips} for split in splits]
    assert held_out == [{"/a.mp4", "/b.mp4"}, {"/c.mp4", "/d.mp4"}, {"/e.mp4"}]
    for split, sources in zip(splits, held_out, strict=True):
        assert len(split.validation.clips) == 2 * len(sources)
        assert len(split.train.clips) == 10 - 2 * len(sources)
        learned, judged = Windows(split.train, 5), Windows(split.validation, 5)
        rows = [set(windows.rows(np.arange(len(windows))).ravel()) for windows in (learned, judged)]
        assert not rows[0] & rows[1]
        assert rows[0] | rows[1] == set(range(300))


def test_too_few_videos_and_too_few_parts_are_refused(cache):
    with pytest.raises(UserError, match="--folds is 1"):
        hold_out_in_turn(cache, 1)
    with pytest.raises(UserError, match=r"--folds is 6, but .* holds 5 videos"):
        hold_out_in_turn(cache, 6)


def test_an_ensemble_predicts_the_mean_of_its_members(tmp_path):
    predictor, past = ensemble(3), torch.randn(4, 6, 5)
    alone = [predictor.only([member])(past, 2) for member in range(3)]
    assert not torch.allclose(alone[0], alone[1])
    assert torch.allclose(predictor(past, 2), torch.stack(alone).mean(dim=0), atol=1e-6)
    assert len(predictor.members) == 3
    predictor.save_pretrained(tmp_path)
    assert torch.equal(Predictor.from_pretrained(tmp_path).eval()(past, 2), predictor(past, 2))


def test_members_of_a_split_stand_together_before_those_that_learn_from_everything():
    predictor, past = ensemble(6), torch.randn(4, 6, 5)
    first, second = members_by_split(predictor, 2, members=2)
    means = [torch.stack([predictor.only([member])(past) for member in pair]).mean(dim=0) for pair in ((0, 1), (2, 3))]
    assert torch.allclose(first(past), means[0], atol=1e-6)
    assert torch.allclose(second(past), means[1], atol=1e-6)


def test_members_draw_from_what_they_learn_from(cache):
    learned_from = [*(split.train for split in hold_out_in_turn(cache, 5)), cache]
    options = Options(steps=1, batch_size=200, rollout_steps=2, members=2, predictor=PredictorConfig(context=CONTEXT))
    batch = next(draw_batches([Windows(part, CONTEXT + 2) for part in learned_from], options, rank=0, step=0))
    of_video = {tuple(row): clip.key.source for clip in cache.clips for row in cache.clip_embeddings(clip).tolist()}
    drawn = [{of_video[tuple(row)] for row in member.flatten(0, 1).tolist()} for member in batch.windows]
    videos = {f"/{name}.mp4" for name in "abcde"}
    assert drawn == [videos - {f"/{name}.mp4"} for name in "abcde" for _ in range(2)] + [videos, videos]


def test_one_member_shares_its_weights():
    predictor, past = ensemble(2), torch.randn(4, 6, 5)
    predictor.only([1])(past).square().sum().backward()
    gradients = [member.head.weight.grad for member in predictor.members]
    assert gradients[0] is None
    assert gradients[1].abs().max() > 0


def test_trials_use_only_what_was_held_out(cache):
    predictor = ensemble(5)
    measure_embeddings(predictor, cache)
    splits = hold_out_in_turn(cache, 5)
    held_out = [hold_out(split, predictor, CONTEXT + 4, 10_000) for split in splits]
    members = members_by_split(predictor, 5, members=1)
    trial = Trial.of(members, held_out, CONTEXT)
    assert len(trial.imagined) == sum(len(part.windows) for part in held_out) == 10 * (30 - CONTEXT - 3)
    first = len(held_out[0].windows)
    assert torch.equal(trial.imagined[:first, 0], members[0](held_out[0].windows[:, :CONTEXT])[:, 0])
    assert torch.equal(trial.imagined[-first:, 0], members[4](held_out[4].windows[:, :CONTEXT])[:, 0])
    # The mean that a member knows is that of the others' embeddings: with the held-out part it adds up to 0.
    own = predictor.standardise(torch.from_numpy(cache.take(np.concatenate(splits[0].validation.unbroken_runs()))))
    assert torch.allclose(0.8 * held_out[0].mean + 0.2 * own.mean(dim=0), torch.zeros(5), atol=1e-5)


def test_ridge_is_chosen_and_trusted_by_what_was_held_out(tmp_path, write_cache):
    """Each video has a walk of its own, round and round: who has seen it knows what comes, and nobody else can."""
    generator, clips = np.random.default_rng(0), []
    for name in "abcde":
        walk = generator.normal(size=(CONTEXT + 2, 16))[np.arange(40) % (CONTEXT + 2)]
        noisy = (walk + 0.1 * generator.normal(size=walk.shape)).astype(np.float32)
        clips.append(EmbeddedClip(ClipKey(f"/{name}.mp4", 100, 1, 0.0), noisy, np.arange(40) / 4, np.arange(40)))
    cache = EmbeddingCache(write_cache(tmp_path, clips, embedding_dimension=16))
    predictor = Predictor(PredictorConfig(context=CONTEXT, width=16, depth=1), 16, 4.0, "abc")
    measure_embeddings(predictor, cache)
    splits = hold_out_in_turn(cache, 5)
    held_out = [hold_out(split, predictor, CONTEXT + 4, 10_000) for split in splits]
    fit_ridge_on(splits, held_out, predictor)
    trust, size = float(predictor.ridge_shrinkage[0, 0]), predictor.ridge.weight.norm()
    fit_ridge_on([Split(cache, split.validation) for split in splits], held_out, predictor)  # as if it had leaked
    assert predictor.ridge_shrinkage[0, 0] > 0.9
    assert trust < 0.1
    assert size < 0.7 * predictor.ridge.weight.norm()
