r"""Train the frame encoder on a folder of videos, without labels.

  video-jepa pretrain --videos DIR --output-dir runs/encoder

Two neighbouring frames under different light are to have like embeddings, and all frames different ones (--objective).
With `--prediction-weight 1` the error of a small predictor, rolled out on the embeddings of longer clips, trains the
encoder, too. That predictor only serves the encoder: train_predictor trains the one to keep, on cached embeddings.

Leaves `encoder/` (`model.safetensors` and `config.json`), `metrics.json`, `account.json` (what was read, what could not
be), `curve.jsonl` and tracker logs. Ctrl-C saves; the same command with --resume goes on.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from data.clips import FrameClips, read_sequences
from data.manifest import check_videos
from data.picture import IMAGE_FPS
from data.views import Neighbours
from jepa.batch_norm import synchronise_batch_norm
from jepa.config import NotNegative, NotNegativeInt, Positive, PositiveInt, SeveralInt
from jepa.diagnostics import encoder_alarms, sequence_stats
from jepa.distributed import sum_over_ranks, world_size
from jepa.encoder import EncoderConfig, FrameEncoder, create_encoder
from jepa.expander import Expander, ExpanderConfig
from jepa.objectives import Objective, Terms, VICReg
from pipelines.run.artefacts import load_module
from pipelines.run.command import counted, require, run_command
from pipelines.run.devices import ACTIVATIONS, cores_of_this_process, main_first
from pipelines.run.files import summary
from pipelines.run.memory import require_memory
from pipelines.run.run import Run
from pipelines.run.training import OptimizerOptions, RunOptions

CONTEXT, ROLLOUT_STEPS, WIDTH = 4, 8, 512
"""Embeddings that the predictor of joint training starts from, steps of its rollouts, and its width."""
SLOW_TICKS = 16  # how far apart the frames are in which what is slow is compared
WATCHED_CLIPS, WATCHED_FRAMES = 16, 16
"""Clips that collapse is looked for in, and their least length."""


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """Train a frame encoder on videos, without labels."""

    videos: tuple[Path, ...]
    """Folders (searched recursively), video files, folders of images, and manifests."""
    output_dir: Path = Path("runs/encoder")
    """Folder for the encoder, its metrics and its logs."""
    steps: PositiveInt = 1000
    """Optimiser steps. A run may be resumed with more of them."""
    initial_encoder: Path | None = None
    """Folder of an encoder to go on from, instead of a new one."""
    fps: Positive = 4.0
    """Frames per second that videos are sampled at, by time; neighbouring views are one such step apart."""
    image_fps: Positive = IMAGE_FPS
    """Rate of folders of images whose names are no times."""
    batch_size: SeveralInt = 128
    """Clips in a batch on each process, of two frames or, with a prediction weight, more."""
    shuffle_memory: Positive = 2.0
    """Gigabytes of decoded frames on each process at most; larger data sets are streamed through them."""
    strict: bool = False
    """A video that cannot be used or is damaged is an error; otherwise it is left out and listed."""
    prediction_weight: NotNegative = 0.0
    """Weight of the error of rollouts on the embeddings, in units of their variance, beside the objective."""
    slow_dimension: NotNegativeInt = 0
    """Numbers of the embedding, its last ones, that are to be alike in frames 16 ticks apart, such as what a room is
    like; the others, in neighbouring ones, are to say what has changed since then, such as what moves in it."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    expander: ExpanderConfig = field(default_factory=ExpanderConfig)
    objective: Objective = field(default_factory=VICReg)
    views: Neighbours = field(default_factory=Neighbours)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)


def main(options: Options) -> None:
    """Check the videos, build the encoder, train it until views agree and frames differ, save it."""
    run = Run(options, "pretrain_encoder", ("encoder",))
    videos, account = main_first(
        run.accelerator,
        lambda: check_videos(
            options.videos, fps=options.fps, manifest=options.output_dir / "videos.jsonl", image_fps=options.image_fps,
            strict=options.strict, is_main=run.is_main,
        ),
    )  # fmt: skip
    encoder = make_encoder(options)
    slow = options.slow_dimension
    dimension = f"an embedding of {encoder.shape[-1]}"
    require(slow < encoder.shape[-1], f"--slow-dimension {slow} leaves nothing of {dimension}: take less")
    length = CONTEXT + ROLLOUT_STEPS if options.prediction_weight else 2
    length = max(length, SLOW_TICKS + 1) if slow else length
    inputs: dict[str, object] = {"videos": summary(sorted(video.content for video in videos))}
    if options.initial_encoder is not None:
        inputs["initial_encoder"] = encoder.fingerprint
    pixels = options.batch_size * length * math.prod(encoder.image_size)
    require_memory(ACTIVATIONS * 3 * pixels, f"--batch-size {options.batch_size}")
    said = f"{encoder.config.backbone}, {options.batch_size} clips of {length} frames in a batch on each; "
    said += f"{counted(len(videos), 'video')}, {len(account.refused)} refused"
    run.begin(inputs, said, sources={video.content: str(video.path) for video in videos})
    pretraining = synchronise_batch_norm(Pretraining(encoder, options).to(run.device))
    network = run.prepare(pretraining, options.optimizer)
    clips = FrameClips(
        videos, encoder.image_size, fps=options.fps, batch_size=options.batch_size, length=length,
        seed=options.seed, rank=run.rank, ranks=run.ranks, memory_bytes=1e9 * options.shuffle_memory,
        strict=options.strict, workers=cores_of_this_process(), progress=run.is_main,
    )  # fmt: skip
    watched = read_sequences(
        videos, encoder.image_size, fps=options.fps, clips=WATCHED_CLIPS, length=max(length, WATCHED_FRAMES)
    ).to(run.device)

    for step, batch in run.steps(clips.batches):
        ends = options.slow_dimension and not options.prediction_weight  # what is between them is nothing to the loss
        seen = batch.frames[:, [0, 1, -2, -1]] if ends else batch.frames
        frames = options.views(seen, run.generator(step))  # (B, T, 3, H, W)
        _, outputs, error = network(frames)
        terms = loss_of(outputs, error, options, run.generator(step, shared=True))
        weighted = {f"weighted_{name}": term for name, term in terms.weighted.items()}
        run.update(terms.loss, {**terms.unweighted, **weighted}, batch.videos)
        if run.due:
            run.show("views", frames[:8, :2].flatten(0, 1))
            run.log(*diagnose(pretraining, watched), show=("loss", *terms.unweighted))

    account.merge([clips.account])
    counts = {"videos": len(videos), "refused_videos": len(account.refused)}
    embed = f"video-jepa embed --videos {' '.join(map(str, options.videos))} --encoder {options.output_dir}/encoder"
    run.finish(
        {"encoder_fingerprint": encoder.fingerprint, **counts}, {"encoder": ("encoder", encoder.config, encoder)},
        account=account, next=f"{embed} --fps {options.fps:g} --output-dir cache/train",
    )  # fmt: skip


def loss_of(outputs: list[Tensor], error: Tensor | None, options: Options, generator: torch.Generator) -> Terms:
    """The objective on outputs (B, T, *tokens, E) of clips, and the error of rollouts. Collective.

    Outputs for what is fast are compared in neighbouring frames, those for what is slow in the first and the last.
    """
    fast, *slow = outputs
    terms = options.objective(fast[:, :-1], fast[:, 1:], generator=generator)
    for part in slow:
        distant = options.objective(part[:, :1], part[:, -1:], generator=generator)
        terms = terms.plus({f"slow_{name}": value for name, value in distant.unweighted.items()},
                           {f"slow_{name}": value for name, value in distant.weighted.items()})  # fmt: skip
    if error is not None:
        prediction = sum_over_ranks(error.mean()) / world_size()
        terms = terms.plus({"prediction": prediction}, {"prediction": options.prediction_weight * prediction})
    return terms


def make_encoder(options: Options) -> FrameEncoder:
    """A new encoder, or the one to go on from.

    Raises `ConfigurationError` where it cannot be built, or does not take frames of this size, and `UserError` where
    there is none to go on from, or it comes with a configuration that was also given.
    """
    if options.initial_encoder is None:
        encoder = create_encoder(options.encoder)
    else:
        said = "--initial-encoder brings its own configuration: drop the options --encoder.*"
        require(options.encoder == EncoderConfig(), said)
        encoder = load_module(options.initial_encoder, "encoder", lambda config: FrameEncoder(EncoderConfig(**config)))
    # What its backbone refuses is said before anything begins.
    encoder.train().embed(torch.zeros(1, 1, 3, *encoder.image_size))
    return encoder


class Pretraining(nn.Module):
    """Encoder, expanders and joint training's predictor as one module, so that one call does all that ranks share."""

    def __init__(self, encoder: FrameEncoder, options: Options) -> None:
        super().__init__()
        slow = options.slow_dimension
        self.widths = [encoder.shape[-1] - slow, slow] if slow else [encoder.shape[-1]]
        self.encoder = encoder
        self.expanders = nn.ModuleList(Expander(width, options.expander) for width in self.widths)
        self.dynamics = Dynamics(encoder.shape[-1]) if options.prediction_weight else None

    def forward(self, frames: Tensor) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """Clips (B, T, 3, H, W) to embeddings (B, T, *tokens, D), outputs (B, T, *tokens, E), errors of rollouts."""
        flat = rearrange(frames, "b t c h w -> (b t) c h w")
        embeddings = rearrange(self.encoder(flat), "(b t) ... -> b t ...", b=len(frames)).float()
        parts = list(embeddings.split(self.widths, dim=-1))
        if len(parts) > 1:  # the change since long ago: what stands still in a clip is no way to tell frames apart
            parts[0] = parts[0][:, :2] - parts[0][:, -2:]
        outputs = [expander(part) for expander, part in zip(self.expanders, parts, strict=True)]
        return embeddings, outputs, self.dynamics(embeddings) if self.dynamics is not None else None


class Dynamics(nn.Module):
    """Rollouts of a small predictor from the first embeddings of each clip; only the loss sees it.

    It starts from copying the last embedding. Embeddings are standardised by the batch, with gradients: an error in
    their own units could be lowered for ever by shrinking them.
    """

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.standardise = nn.BatchNorm1d(dimension, affine=False)
        last = nn.Linear(WIDTH, dimension, bias=False)
        nn.init.zeros_(last.weight)
        hidden = [nn.Linear(CONTEXT * dimension, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU()]
        self.change = nn.Sequential(*hidden, last)

    def forward(self, embeddings: Tensor) -> Tensor:
        """(B, T, *tokens, D) to squared errors (B x tokens, T - CONTEXT, D)."""
        clips = rearrange(embeddings, "b t ... d -> (b ...) t d")
        clips = self.standardise(clips.flatten(0, 1)).view_as(clips)
        way = list(clips[:, :CONTEXT].unbind(dim=1))
        while len(way) < clips.shape[1]:
            way.append(way[-1] + self.change(torch.cat(way[-CONTEXT:], dim=1)))
        return (torch.stack(way, dim=1) - clips)[:, CONTEXT:].square()


@torch.no_grad()
def diagnose(network: nn.Module, clips: Tensor) -> tuple[dict[str, float], list[str]]:
    """Collapse statistics and alarms on fixed clips (C, T, 3, H, W). Collective."""
    if len(clips) == 0:
        return {}, []
    network.eval()
    parts = [network(part) for part in clips.split(8)]
    network.train()
    embeddings, outputs = torch.cat([part[0] for part in parts]), torch.cat([part[1][0] for part in parts])
    errors = [float(error.mean()) for _, _, error in parts if error is not None]
    metrics = {"prediction_on_watched_clips": sum(errors) / len(errors)} if errors else {}
    for name, value in (("embedding", embeddings), ("expander", outputs)):
        for over, stats in sequence_stats(value).items():
            metrics |= {f"{name}_{over}_std": stats.std, f"{name}_{over}_rank": stats.effective_rank}
    return metrics, encoder_alarms(embeddings, outputs)


if __name__ == "__main__":
    run_command(main, Options)
