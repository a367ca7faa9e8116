r"""Stage 1: train the frame encoder on a folder of videos, without labels (VICReg).

  accelerate launch --quiet --config_file accelerate_config.yaml pipelines/pretrain_encoder.py \
      --videos DIR --output-dir runs/encoder

Leaves `encoder/{model.safetensors,config.json}`, `metrics.json`, `config.json` and tracker logs in the output folder.
Ctrl-C saves; the same command with --resume goes on.
"""

from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object, set_seed
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

from data.frames import ClipsState, FramePairs, read_sequences
from data.map_ahead import stream_ahead
from data.video import IMAGE_FPS
from data.views import ViewsConfig, make_views
from jepa.batch_norm import synchronise_batch_norm
from jepa.cached_gradients import backward_in_parts
from jepa.collectives import average_gradients
from jepa.diagnostics import encoder_alarms, sequence_spread
from jepa.encoder import EncoderConfig, FrameEncoder, create_encoder
from jepa.expander import Expander, ExpanderConfig
from jepa.objectives import ObjectiveConfig, Terms, objective
from pipelines.checkpoints import CheckpointConfig, Checkpoints
from pipelines.compute import ComputeConfig, MemoryEstimate, describe_devices, start_accelerator
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
    DIAGNOSTIC_FRAMES,
    FIRST_ALARM_STEP,
    SHARED,
    Progress,
    Rates,
    cores_of_this_process,
    feed,
    find_usable_videos,
    on_main,
    save_artefact,
    step_generator,
)


@dataclass(frozen=True)
class Options:
    """Train a frame encoder on videos, without labels."""

    videos: tuple[Path, ...]
    """Folders (searched recursively), video files, folders of images, zips of them, and manifests."""
    output_dir: Path = Path("runs/encoder")
    """Where the encoder, its metrics and its logs are left."""
    fps: float = 4.0
    """Frames per second that videos are sampled at, by time; neighbouring views are one such step apart."""
    phases: int = 1
    """Sample each video on this many clocks, shifted against each other: more pairs from the same video."""
    steps: int = 1000
    """Optimiser steps."""
    batch_size: int = 128
    """Frames in a batch, each with two views, on each process. The statistics are those of all processes."""
    micro_batch_size: int = 0
    """Frames that go through the encoder at a time, for batches that do not fit in memory: the objective is still that
    of the whole batch; only batch normalisation inside the encoder sees so few. 0 for all at once."""
    channels_last: bool = True
    """Keep images with their channels last in memory: faster convolutions."""
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
    """Of the weights, the order of the frames and the views."""
    resume: bool = False
    """Go on with the unfinished run in the output folder."""
    overwrite: bool = False
    """Replace the run in the output folder."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    expander: ExpanderConfig = field(default_factory=ExpanderConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)


def main(options: Options) -> None:
    """The story: check, build, train, save."""
    require(options.fps > 0, f"--fps is {options.fps:g}: it must be positive")
    for name in ("steps", "phases", "log_every", "image_fps"):
        value = getattr(options, name)
        require(value > 0, f"--{name.replace('_', '-')} is {value}: it must be positive")
    require(options.batch_size > 1, f"--batch-size is {options.batch_size}: variance needs at least 2")
    require(
        options.micro_batch_size >= 0 and options.micro_batch_size != 1,
        f"--micro-batch-size is {options.micro_batch_size}: it must be 0, or at least 2",
    )
    options.optimizer.check()
    options.checkpoints.check()
    shuffle_memory = parse_bytes(options.shuffle_memory, "--shuffle-memory")
    output = RunFolder(options.output_dir, ("encoder", "training_state", "logs"))
    accelerator = start_accelerator(options.compute, options.tracker, options.output_dir / "logs")
    heartbeat = Heartbeat(accelerator)
    is_main, device = accelerator.is_main_process, accelerator.device
    fsdp = accelerator.distributed_type == DistributedType.FSDP
    require(
        not fsdp or accelerator.mixed_precision == "no",
        f"precision {accelerator.mixed_precision} does not go with fsdp.yaml, which would turn weights into it: take "
        "--compute.precision fp32",
    )
    require(
        not fsdp or not (options.micro_batch_size or options.optimizer.ema_decay),
        "--micro-batch-size and --optimizer.ema-decay need whole weights: take configs/accelerate/multi_gpu.yaml, not "
        "fsdp.yaml",
    )
    set_seed(options.seed)

    encoder = create_encoder(options.encoder)
    network: nn.Module = Pretraining(encoder, Expander(options.encoder.embedding_dimension, options.expander))
    require_agreement(accelerator, options=options)
    videos = find_usable_videos(
        accelerator, options.videos, options.fps, options.output_dir, options.image_fps, options.strict
    )
    names = [str(video.path) for video in videos.videos]
    require_agreement(accelerator, videos=summary(names))
    inputs = {"videos": names, "refused": videos.refused}
    on_main(accelerator, lambda: output.prepare(options, options.overwrite, options.resume, inputs))
    global_batch = options.batch_size * accelerator.num_processes
    held = min(options.micro_batch_size or options.batch_size, options.batch_size)  # frames at a time
    memory = MemoryEstimate.of(network, torch.zeros(4, 3, *options.encoder.image_size), 2, accelerator)
    peak = options.optimizer.peak_learning_rate(global_batch)
    if is_main:
        print(
            f"training {options.encoder.backbone} ({sum(p.numel() for p in encoder.parameters()):,} weights) on "
            f"{describe_devices(accelerator)}: global batch {global_batch}"
            + (f" in parts of {held} on each" if held < options.batch_size else "")
            + f", learning rate {peak:g}, about {readable_bytes(memory.total(held, options.batch_size))} of tensors "
            f"and at most {options.shuffle_memory} of decoded frames on each; {counted(len(names), 'video')}, "
            f"{len(videos.refused)} refused"
        )

    network = synchronise_batch_norm(network.to(device))
    if options.channels_last and not fsdp:  # which refuses them
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if options.compute.compile:
        encoder.compile()
    averaged = moving_average(encoder, options.optimizer, buffers=True)
    network, optimizer = accelerator.prepare(network, make_optimizer(network, options.optimizer))
    if averaged is not None:
        accelerator.register_for_checkpointing(averaged)

    pairs = FramePairs(
        videos.videos, options.encoder.image_size, options.fps, options.batch_size, options.seed,
        accelerator.process_index, accelerator.num_processes, shuffle_memory, is_main, options.phases, options.strict,
        cores_of_this_process(),
    )  # fmt: skip
    progress, rates = Progress(place=asdict(ClipsState())), Rates(device)
    states = options.output_dir / "training_state"
    guard = FiniteGuard(accelerator, states)
    checkpoints = Checkpoints(accelerator, states, options.checkpoints, progress, guard.settle, heartbeat.stop)
    step = checkpoints.load_newest() if options.resume else None
    if step is None:
        step = 0
        if not fsdp:  # where saving itself would take an optimiser step
            checkpoints.save(step)
    pairs.state = ClipsState(**progress.place)
    start_trackers(accelerator, "pretrain_encoder", to_json(options), step)
    sequences = read_sequences(
        videos.videos, options.encoder.image_size, options.fps, DIAGNOSTIC_CLIPS, DIAGNOSTIC_FRAMES
    ).to(device)
    require_agreement(accelerator, frames_for_diagnostics=list(sequences.shape))

    mend = (
        "lower it to {samples}, with --overwrite"
        if fsdp
        else "add --micro-batch-size {samples}, which leaves the objective as it is, and --resume"
    )
    advice = ("--micro-batch-size" if options.micro_batch_size else "--batch-size", mend)
    bar = tqdm(total=options.steps, initial=step, unit="step", desc="encoder", disable=not is_main)
    batches = stream_ahead(lambda pairs: feed(pairs, device), [pairs], workers=1, ahead=2)
    if step < options.steps:
        batches = chain([next(batches)], batches)
        checkpoints.listen()  # not before: decoding the first frames may take long, and there is nothing to save yet
        rates.start()
    while step < options.steps:
        batch = rates.wait_for(batches, global_batch)
        set_learning_rate(optimizer, lr_at(step, options.steps, options.optimizer.warmup_steps, peak))
        generator = step_generator(options.seed, step, accelerator.process_index, device)
        with memory_advice(memory, held, *advice, device):
            views = make_views(batch.frames, batch.following, options.views, generator)
            terms = forward_and_backward(accelerator, network, views, held, options, step)
            gradient_norm = accelerator.clip_grad_norm_(network.parameters(), clip_length(options.optimizer))
            guard.watch(step, batch.videos, terms.loss, gradient_norm)
            optimizer.step()
            optimizer.zero_grad()
        if averaged is not None:
            averaged.update_parameters(encoder)
        step += 1
        progress.place = asdict(batch.state)
        bar.update()

        if step % options.log_every == 0 or step == options.steps:
            speed = rates.report(progress)
            metrics, alarms = diagnose(network, sequences)
            values = {name: value.item() for name, value in {"loss": terms.loss, **terms.unweighted}.items()}
            bar.set_postfix({name: f"{value:.3f}" for name, value in values.items()})
            values |= {f"weighted_{name}": value.item() for name, value in terms.weighted.items()}
            progress.report(metrics | values, alarms if step >= FIRST_ALARM_STEP else [], step, bar)
            guard.check_scale(step)
            extra = {"gradient_norm": gradient_norm.item(), "learning_rate": optimizer.param_groups[0]["lr"]}
            accelerator.log({**progress.metrics, **extra, **speed}, step=step)
            rates.start()
        checkpoints.after_step(step)
    bar.close()
    pairs.close()
    checkpoints.save(step)

    account = videos.account()
    account.merge(gather_object([pairs.account]))
    weights = averaged.module.state_dict() if averaged is not None else encoder_weights(accelerator, network)
    if is_main:
        trained = FrameEncoder(encoder.config)
        trained.load_state_dict(weights)
        save_artefact(trained, options.output_dir / "encoder")
        leave_account(account, options.output_dir)
        output.finish(
            {
                **progress.metrics,
                **progress.verdict(),
                "steps": step,
                "frames_per_second": step * global_batch / max(progress.seconds, 1e-9),
                "encoder_fingerprint": trained.fingerprint(),
                "videos": len(videos.videos),
                "refused_videos": len(videos.refused),
                "damaged_videos": len(account.damaged),
            }
        )
        print(
            f"wrote {options.output_dir}/encoder and metrics.json. Next:\n"
            f"  {LAUNCH} pipelines/cache_embeddings.py --videos {' '.join(map(str, options.videos))} "
            f"--encoder {options.output_dir}/encoder --fps {options.fps:g} --output-dir cache/train"
        )
    heartbeat.stop()
    accelerator.end_training()


class Pretraining(nn.Module):
    """The encoder and the expander as one module: frames (B, 3, H, W) to embeddings (B, D) and outputs (B, E)."""

    def __init__(self, encoder: FrameEncoder, expander: Expander) -> None:
        super().__init__()
        self.encoder, self.expander = encoder, expander

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        embeddings = self.encoder(frames)
        return embeddings, self.expander(embeddings)


def forward_and_backward(
    accelerator: Accelerator, network: nn.Module, views: tuple[Tensor, Tensor], held: int, options: Options, step: int
) -> Terms:
    """Forward and backward pass of the objective of the whole batch on all ranks, `held` frames at a time."""
    shared = step_generator(options.seed, step, SHARED, torch.device("cpu"))
    rows = [options.batch_size] * accelerator.num_processes
    if held == options.batch_size:
        _, outputs = network(torch.cat(views))  # (2 B, E)
        first, second = outputs.chunk(2)
        terms = objective(first, second, options.objective, shared, rows)
        accelerator.backward(terms.loss)
        return terms

    pretraining = accelerator.unwrap_model(network)

    def embed(part: Tensor) -> Tensor:
        with accelerator.autocast():
            return pretraining.encoder(part).float()

    def objective_of(embeddings: list[Tensor]) -> Terms:
        halves = zip(*(part.chunk(2) for part in embeddings), strict=True)
        with accelerator.autocast():
            outputs = pretraining.expander(torch.cat([torch.cat(view) for view in halves])).float()
        first, second = outputs.chunk(2)
        return objective(first, second, options.objective, shared, rows)

    # Both views of the same frames, so that batch normalisation in the encoder sees both.
    parts = [torch.cat(both) for both in zip(*(view.split(held) for view in views), strict=True)]
    with accelerator.no_sync(network):
        terms = backward_in_parts(
            pretraining.encoder, parts, embed, objective_of, lambda terms: accelerator.backward(terms.loss)
        )
    average_gradients(network.parameters())
    return terms


@torch.no_grad()
def diagnose(network: nn.Module, sequences: Tensor) -> tuple[dict[str, float], list[str]]:
    """Spread of embeddings and outputs over batch and time on fixed frames (C, T, 3, H, W), and alarms. Collective."""
    if len(sequences) == 0:
        return {}, []
    network.eval()
    flat = rearrange(sequences, "c t ... -> (c t) ...")
    parts = zip(*(network(part) for part in flat.split(128)), strict=True)
    embeddings, outputs = (rearrange(torch.cat(part), "(c t) d -> c t d", c=len(sequences)) for part in parts)
    network.train()
    metrics: dict[str, float] = {}
    for name, value in (("embedding", embeddings), ("expander", outputs)):
        for over, numbers in sequence_spread(value)._asdict().items():
            metrics |= {f"{name}_{over}_std": numbers.std, f"{name}_{over}_rank": numbers.rank}
    return metrics, encoder_alarms(embeddings, outputs)


def encoder_weights(accelerator: Accelerator, network: nn.Module) -> dict[str, Tensor]:
    """The encoder's part of the prepared network, whole on the main process however it was spread. Collective."""
    weights = accelerator.get_state_dict(network)
    return {name.removeprefix("encoder."): value for name, value in weights.items() if name.startswith("encoder.")}


if __name__ == "__main__":
    run_stage(main, Options)
