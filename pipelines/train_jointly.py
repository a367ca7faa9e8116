r"""Stages 1 and 3 in one: train encoder and predictor together, or fine-tune trained ones end to end.

  accelerate launch --quiet --config_file accelerate_config.yaml pipelines/train_jointly.py \
      --videos DIR --output-dir runs/joint

  ... pipelines/train_jointly.py --videos DIR --encoder-weights runs/encoder/encoder \
      --predictor-weights runs/predictor/predictor --encoder-learning-rate-factor 0.1 --output-dir runs/tuned

Short clips are embedded frame by frame, and the predictor is rolled out on the embeddings. Its error trains both, with
gradients through what is predicted as well as through what it is predicted from; the encoder's objective, here on
neighbouring embeddings themselves instead of an expander's outputs, keeps them from collapsing.

Leaves `encoder/` and `predictor/` (`model.safetensors`, `config.json`), `metrics.json`, `config.json` and tracker logs.
Cache embeddings with that encoder; `train_predictor --initial-predictor` then goes on from that predictor, or, with
`--steps 0`, only measures what evaluation and surprise need. Ctrl-C saves; the same command with --resume goes on.
"""

from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as functional
from accelerate.utils import DistributedType, gather_object, set_seed
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

from data.frames import ClipsState, FrameClips, read_sequences
from data.map_ahead import stream_ahead
from data.video import IMAGE_FPS
from data.views import ViewsConfig, make_views
from jepa.batch_norm import synchronise_batch_norm
from jepa.collectives import sum_over_ranks, world_size
from jepa.diagnostics import encoder_alarms, floor_std, prediction_alarms, sequence_spread
from jepa.encoder import EncoderConfig, FrameEncoder, create_encoder
from jepa.objectives import ObjectiveConfig, Terms, objective
from jepa.predictor import Predictor, PredictorConfig
from jepa.rollout import rollout
from pipelines.artefacts import load_encoder, load_predictor
from pipelines.checkpoints import CheckpointConfig, Checkpoints
from pipelines.compute import (
    ComputeConfig,
    MemoryEstimate,
    cores_of_this_process,
    describe_devices,
    start_accelerator,
)
from pipelines.guards import FiniteGuard, Heartbeat, memory_advice, require_agreement, summary
from pipelines.optimizer import OptimizerConfig, clip_length, lr_at, make_optimizer, moving_average, set_learning_rate
from pipelines.stage import (
    LAUNCH,
    RunFolder,
    counted,
    leave_account,
    parse_bytes,
    readable_bytes,
    require,
    run_stage,
    to_json,
)
from pipelines.trackers import start_trackers
from pipelines.training import (
    DIAGNOSTIC_CLIPS,
    FIRST_ALARM_STEP,
    SHARED,
    Progress,
    Rates,
    feed,
    find_usable_videos,
    on_main,
    require_all_steps_trained,
    save_artefact,
    step_generator,
)

MOMENTUM = 0.1
"""Of the running statistics of embeddings, as batch normalisation has it."""


@dataclass(frozen=True)
class Options:
    """Train encoder and predictor together on videos, without labels."""

    videos: tuple[Path, ...]
    """Folders (searched recursively), video files, folders of images, zips of them, and manifests."""
    output_dir: Path = Path("runs/joint")
    """Where encoder, predictor, metrics and logs are left."""
    encoder_weights: Path | None = None
    """Go on from this encoder, with --predictor-weights; otherwise both start anew."""
    predictor_weights: Path | None = None
    """Go on from this predictor of that encoder's embeddings."""
    encoder_learning_rate_factor: float = 1.0
    """Times the learning rate, for the encoder; below 1 for one that is trained already."""
    prediction_weight: float = 25.0
    """Of the mean squared error of the rollouts, beside the terms of the objective."""
    fps: float = 4.0
    """Frames per second that videos are sampled at, by time."""
    phases: int = 1
    """Sample each video on this many clocks, shifted against each other: more clips from the same video."""
    steps: int = 1000
    """Optimiser steps."""
    batch_size: int = 16
    """Clips in a batch, on each process. The objective's statistics are those of all frames on all processes."""
    clip_length: int = 16
    """Frames in a clip. The predictor is rolled out from wherever the context fits before and the rollout after."""
    rollout_steps: int = 5
    """Train on rollouts of this many steps, through the predictor's own predictions."""
    shuffle_memory: str = "2GB"
    """Most memory for decoded frames on each process; larger data sets are streamed through it."""
    image_fps: float = IMAGE_FPS
    """Rate of folders of images, which have no times of their own."""
    strict: bool = False
    """A video that cannot be used or is damaged is an error; otherwise it is left out and listed."""
    log_every: int = 100
    """Steps between two entries in the log, each with a check for collapse."""
    tracker: tuple[str, ...] = ("tensorboard",)
    """Where curves go, one or several: tensorboard, csv, wandb, mlflow; or none."""
    seed: int = 0
    """Of the weights, the order of the clips and the light on them."""
    resume: bool = False
    """Go on with the unfinished run in the output folder."""
    overwrite: bool = False
    """Replace the run in the output folder."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    predictor: PredictorConfig = field(default_factory=PredictorConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)


def main(options: Options) -> None:
    """The story: check, build or load, train both, save both."""
    for name in ("fps", "steps", "phases", "batch_size", "rollout_steps", "log_every", "image_fps"):
        value = getattr(options, name)
        require(value > 0, f"--{name.replace('_', '-')} is {value:g}: it must be positive")
    for name in ("encoder_learning_rate_factor", "prediction_weight"):
        value = getattr(options, name)
        require(value >= 0, f"--{name.replace('_', '-')} is {value:g}: it must not be negative")
    require(
        options.views.kind == "neighbours",
        f"--views.kind is {options.views.kind}, which would tear the frames of a clip apart: take neighbours",
    )
    require(
        options.objective.kind != "infonce",
        "--objective.kind is infonce, which leaves the size of the embedding open: the prediction error would shrink "
        "it to nothing; take vicreg or sigreg",
    )
    options.optimizer.check()
    options.checkpoints.check()
    shuffle_memory = parse_bytes(options.shuffle_memory, "--shuffle-memory")
    output = RunFolder(options.output_dir, ("encoder", "predictor", "training_state", "logs"))
    accelerator = start_accelerator(options.compute, options.tracker, options.output_dir / "logs")
    heartbeat = Heartbeat(accelerator)
    is_main, device = accelerator.is_main_process, accelerator.device
    require(
        accelerator.distributed_type != DistributedType.FSDP,
        "joint training needs whole weights: use configs/accelerate/multi_gpu.yaml instead of fsdp.yaml",
    )
    set_seed(options.seed)

    world = build(options)
    require_all_steps_trained(world.predictor, options.rollout_steps)
    require(
        not (latent := world.predictor.config.latent_dimension),
        f"the predictor's latent dimension is {latent}: joint training knows one future; leave it at 0, or train the "
        "predictor by pipelines/train_predictor.py",
    )
    context, size = world.predictor.config.context, world.encoder.config.image_size
    shortest = context + options.rollout_steps
    require(
        options.clip_length >= shortest,
        f"--clip-length is {options.clip_length}: a context of {context} and a rollout of {options.rollout_steps} take "
        f"{shortest} frames",
    )
    require_agreement(accelerator, options=options)
    videos = find_usable_videos(
        accelerator, options.videos, options.fps, options.output_dir, options.image_fps, options.strict
    )
    names = [str(video.path) for video in videos.videos]
    require_agreement(accelerator, videos=summary(names))
    inputs = {"videos": names, "refused": videos.refused, "encoder_fingerprint": world.predictor.encoder_fingerprint}
    on_main(accelerator, lambda: output.prepare(options, options.overwrite, options.resume, inputs))
    global_batch = options.batch_size * accelerator.num_processes
    memory = MemoryEstimate.of(world, torch.zeros(2, options.clip_length, 3, *size), 2, accelerator)
    peak = options.optimizer.peak_learning_rate(global_batch)
    if is_main:
        print(
            f"training {world.encoder.config.backbone} and {world.predictor.config.kind} "
            f"({sum(p.numel() for p in world.parameters()):,} weights) on {describe_devices(accelerator)}: global "
            f"batch {global_batch} clips of {options.clip_length} frames, learning rate {peak:g}, about "
            f"{readable_bytes(memory.total(options.batch_size))} of tensors and at most {options.shuffle_memory} of "
            f"decoded frames on each; {counted(len(names), 'video')}, {len(videos.refused)} refused"
        )

    synchronise_batch_norm(world.to(device).to(memory_format=torch.channels_last))
    if options.compute.compile:
        world.encoder.compile()
    averaged = moving_average(world, options.optimizer, buffers=True)
    network, optimizer = accelerator.prepare(world, make_joint_optimizer(world, options))
    if averaged is not None:
        accelerator.register_for_checkpointing(averaged)

    clips = FrameClips(
        videos.videos, size, options.fps, options.batch_size, options.seed, accelerator.process_index,
        accelerator.num_processes, shuffle_memory, is_main, options.phases, options.strict, cores_of_this_process(),
        options.clip_length,
    )  # fmt: skip
    progress, rates = Progress(place=asdict(ClipsState())), Rates(device)
    states = options.output_dir / "training_state"
    guard = FiniteGuard(accelerator, states)
    checkpoints = Checkpoints(accelerator, states, options.checkpoints, progress, guard.settle, heartbeat.stop)
    step = checkpoints.load_newest() if options.resume else None
    if step is None:
        checkpoints.save(step := 0)
    clips.state = ClipsState(**progress.place)
    start_trackers(accelerator, "train_jointly", to_json(options), step)
    sequences = read_sequences(videos.videos, size, options.fps, DIAGNOSTIC_CLIPS, options.clip_length).to(device)
    require_agreement(accelerator, frames_for_diagnostics=list(sequences.shape))

    bar = tqdm(total=options.steps, initial=step, unit="step", desc="joint", disable=not is_main)
    batches = stream_ahead(lambda clips: feed(clips, device), [clips], workers=1, ahead=2)
    if step < options.steps:
        batches = chain([next(batches)], batches)
        checkpoints.listen()  # not before: decoding the first frames may take long, and there is nothing to save yet
        rates.start()
    while step < options.steps:
        batch = rates.wait_for(batches, global_batch * options.clip_length)
        rate = lr_at(step, options.steps, options.optimizer.warmup_steps, peak)
        set_learning_rates(optimizer, rate, options.encoder_learning_rate_factor)
        generator = step_generator(options.seed, step, accelerator.process_index, device)
        shared = step_generator(options.seed, step, SHARED, torch.device("cpu"))
        with memory_advice(
            memory, options.batch_size, "--batch-size", "lower it to {samples}, with --overwrite", device
        ):
            embeddings, error = network(relight(batch.frames, options.views, generator))
            terms = joint_objective(embeddings, error, options, shared)
            accelerator.backward(terms.loss)
            gradient_norm = accelerator.clip_grad_norm_(network.parameters(), clip_length(options.optimizer))
            guard.watch(step, batch.videos, terms.loss, gradient_norm)
            optimizer.step()
            optimizer.zero_grad()
            follow(world.predictor, embeddings.detach())
        if averaged is not None:
            averaged.update_parameters(world)
        weighted = {f"weighted_{name}": value for name, value in terms.weighted.items()}
        progress.add({"loss": terms.loss, **terms.unweighted, **weighted})
        step += 1
        progress.place = asdict(batch.state)
        bar.update()

        if step % options.log_every == 0 or step == options.steps:
            speed = rates.report(progress)
            metrics, alarms = diagnose(world, sequences)
            values = progress.take_means(accelerator)
            bar.set_postfix({name: f"{values[name]:.3f}" for name in ("loss", *terms.unweighted)})
            progress.report(metrics | values, alarms if step >= FIRST_ALARM_STEP else [], step, bar)
            guard.check_scale(step)
            extra = {"gradient_norm": gradient_norm.item(), "learning_rate": rate}
            accelerator.log({**progress.metrics, **extra, **speed}, step=step)
            rates.start()
        checkpoints.after_step(step)
    bar.close()
    clips.close()
    checkpoints.save(step)

    account = videos.account()
    account.merge(gather_object([clips.account]))
    if is_main:
        trained: World = world if averaged is None else averaged.module  # type: ignore[assignment]
        encoder, predictor = take_apart(trained)
        save_artefact(encoder, options.output_dir / "encoder")
        save_artefact(predictor, options.output_dir / "predictor")
        leave_account(account, options.output_dir)
        output.finish(
            {
                **progress.metrics,
                **progress.verdict(),
                "steps": step,
                "frames_per_second": step * global_batch * options.clip_length / max(progress.seconds, 1e-9),
                "encoder_fingerprint": predictor.encoder_fingerprint,
                "videos": len(videos.videos),
                "refused_videos": len(videos.refused),
                "damaged_videos": len(account.damaged),
            }
        )
        print(
            f"wrote {options.output_dir}/encoder, {options.output_dir}/predictor and metrics.json. Next:\n"
            f"  {LAUNCH} pipelines/cache_embeddings.py --videos {' '.join(map(str, options.videos))} "
            f"--encoder {options.output_dir}/encoder --fps {options.fps:g} --output-dir cache/train\n"
            "  (the same with other videos to cache/val)\n"
            f"  {LAUNCH} pipelines/train_predictor.py --train-cache cache/train --validation-cache cache/val "
            f"--initial-predictor {options.output_dir}/predictor --steps 0"
        )
    heartbeat.stop()
    accelerator.end_training()


class World(nn.Module):
    """Encoder and predictor as one module, so that one call does all that ranks must agree on."""

    def __init__(self, encoder: FrameEncoder, predictor: Predictor, rollout_steps: int) -> None:
        super().__init__()
        self.encoder, self.predictor, self.rollout_steps = encoder, predictor, rollout_steps

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Clips (B, T, 3, H, W) to embeddings (B, T, D), and the squared error of rollouts, (N, rollout_steps, D).

        The error is in the embeddings' own units, not standardised ones: those would shrink with the embeddings, and
        nothing would be gained or lost by shrinking them for ever.
        """
        embeddings = self.embed(frames)
        context = self.predictor.config.context
        standardised = self.predictor.standardise(embeddings)
        windows = standardised.unfold(1, context + self.rollout_steps, 1)  # (B, windows in a clip, D, T')
        windows = rearrange(windows, "b w d t -> (b w) t d")
        imagined = rollout(self.predictor, windows[:, :context], self.rollout_steps)
        return embeddings, ((imagined - windows[:, context:]) * self.predictor.std).square()

    def embed(self, frames: Tensor) -> Tensor:
        """Clips (B, T, 3, H, W) to embeddings (B, T, D), float32."""
        flat = rearrange(frames, "b t c h w -> (b t) c h w")
        return rearrange(self.encoder(flat), "(b t) d -> b t d", b=len(frames)).float()


def build(options: Options) -> World:
    """New ones, or trained ones whose embeddings are brought to mean 0 and standard deviation 1.

    Raises:
        UserError: the weights do not go together, or come with a configuration that was also given.
    """
    if options.encoder_weights is None or options.predictor_weights is None:
        require(
            options.encoder_weights is options.predictor_weights,
            "--encoder-weights and --predictor-weights belong together: give both or neither",
        )
        encoder = create_encoder(options.encoder)
        predictor = Predictor(options.predictor, encoder.embedding_dimension, options.fps, "")
        return World(encoder, predictor, options.rollout_steps)
    for name, config, default in (
        ("encoder", options.encoder, EncoderConfig()),
        ("predictor", options.predictor, PredictorConfig()),
    ):
        require(config == default, f"--{name}-weights bring their own configuration: drop the options --{name}.*")
    encoder, predictor = load_encoder(options.encoder_weights), load_predictor(options.predictor_weights)
    require(
        predictor.encoder_fingerprint == encoder.fingerprint(),
        f"{options.predictor_weights} predicts embeddings of encoder {predictor.encoder_fingerprint}, and "
        f"{options.encoder_weights} is {encoder.fingerprint()}: give those that belong together",
    )
    require(
        predictor.fps == options.fps,
        f"--fps is {options.fps:g}, and {options.predictor_weights} lives on {predictor.fps:g} fps: give that",
    )
    require(
        isinstance(encoder.head, nn.Linear),
        f"{options.encoder_weights} has no embedding head (--encoder.embedding-dimension 0), which is to take over the "
        f"standardisation of {options.predictor_weights}: give an encoder that has one",
    )
    assert isinstance(encoder.head, nn.Linear)
    # The encoder takes over the predictor's standardisation. Nothing changes but the units, in which the objective's
    # margin is the present spread.
    with torch.no_grad():
        encoder.head.weight.div_(predictor.std[:, None])
        encoder.head.bias.sub_(predictor.mean).div_(predictor.std)
        predictor.mean.zero_()
        predictor.std.fill_(1)
    return World(encoder, predictor, options.rollout_steps).train()


def take_apart(world: World) -> tuple[FrameEncoder, Predictor]:
    """The artefacts; the predictor knows whose embeddings it predicts."""
    encoder, old = FrameEncoder(world.encoder.config), world.predictor
    encoder.load_state_dict(world.encoder.state_dict())
    predictor = Predictor(
        old.config, len(old.mean), old.fps, encoder.fingerprint(), len(old.members), longest_gap=old.longest_gap
    )
    predictor.members.load_state_dict(old.members.state_dict())
    # Ridge and calibration belong to the embeddings of another encoder: they are left to train_predictor.
    for name in ("mean", "std", "change_std"):
        predictor.get_buffer(name).copy_(old.get_buffer(name))
    return encoder, predictor


def make_joint_optimizer(world: World, options: Options) -> torch.optim.Optimizer:
    """One for both; each group of weights knows whether it is the encoder's."""
    optimizer = make_optimizer(world.encoder, options.optimizer)
    encoder_groups = len(optimizer.param_groups)
    for group in make_optimizer(world.predictor, options.optimizer).param_groups:
        optimizer.add_param_group(group)
    for index, group in enumerate(optimizer.param_groups):
        group["of_encoder"] = index < encoder_groups
    return optimizer


def set_learning_rates(optimizer: torch.optim.Optimizer, rate: float, encoder_factor: float) -> None:
    """The same for all weights but the encoder's."""
    set_learning_rate(optimizer, rate)
    for group in optimizer.param_groups:
        if group["of_encoder"]:
            group["lr"] *= encoder_factor


def relight(clips: Tensor, config: ViewsConfig, generator: torch.Generator) -> Tensor:
    """Clips, uint8 (B, T, 3, H, W), each frame under light of its own, float in [0, 1].

    Light that stayed for a clip would be the easiest thing to predict.
    """
    first_half, second_half = rearrange(clips, "b t c h w -> (b t) c h w").chunk(2)
    lit = torch.cat(make_views(first_half, second_half, config, generator))  # as if they were the two views of a batch
    return rearrange(lit, "(b t) c h w -> b t c h w", b=len(clips))


def joint_objective(embeddings: Tensor, error: Tensor, options: Options, shared: torch.Generator) -> Terms:
    """The encoder's objective on neighbouring embeddings (B, T, D), and the error of the rollouts. Collective."""
    before, after = (rearrange(part, "b t d -> (b t) d") for part in (embeddings[:, :-1], embeddings[:, 1:]))
    terms = objective(before, after, options.objective, shared, [len(before)] * world_size())
    prediction = mean_over_ranks(error.mean())
    weighted = options.prediction_weight * prediction
    return Terms(
        terms.loss + weighted,
        {"prediction": prediction, **terms.unweighted},
        {"prediction": weighted, **terms.weighted},
    )


def mean_over_ranks(value: Tensor) -> Tensor:
    """Of a tensor that each rank has computed from equally many samples."""
    return sum_over_ranks(value) / world_size()


@torch.no_grad()
def follow(predictor: Predictor, embeddings: Tensor) -> None:
    """Running mean and standard deviation of embeddings (B, T, D) on all ranks, and of their changes. Collective."""
    mean = mean_over_ranks(embeddings.mean(dim=(0, 1)))
    variance = mean_over_ranks((embeddings - mean).square().mean(dim=(0, 1)))
    predictor.mean.lerp_(mean, MOMENTUM)
    predictor.std.lerp_(floor_std(variance.sqrt()), MOMENTUM)
    change = predictor.standardise(embeddings).diff(dim=1).square().mean(dim=(0, 1))
    predictor.change_std.lerp_(floor_std(mean_over_ranks(change).sqrt()), MOMENTUM)


@torch.no_grad()
def diagnose(world: World, sequences: Tensor) -> tuple[dict[str, float], list[str]]:
    """Spread of embeddings and of next steps predicted from them, on fixed frames (C, T, 3, H, W), and alarms."""
    if len(sequences) == 0:
        return {}, []
    world.eval()
    embeddings = torch.cat([world.embed(part) for part in sequences.split(8)])
    standardised = world.predictor.standardise(embeddings)
    true = standardised[:, world.predictor.config.context :]
    predicted = world.predictor(standardised[:, :-1], outputs=true.shape[1])
    world.train()
    copied = functional.mse_loss(standardised[:, -true.shape[1] - 1 : -1], true).clamp_min(1e-12)
    metrics = {"one_step_relative_to_copy_last": float(functional.mse_loss(predicted, true) / copied)}
    for name, value in (("embedding", embeddings), ("predicted", predicted), ("true", true)):
        for over, numbers in sequence_spread(value)._asdict().items():
            metrics |= {f"{name}_{over}_std": numbers.std, f"{name}_{over}_rank": numbers.rank}
    return metrics, encoder_alarms(embeddings, outputs=None) + prediction_alarms(predicted, true)


if __name__ == "__main__":
    run_stage(main, Options)
