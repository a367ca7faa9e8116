r"""Stage 1: train the frame encoder on a folder of videos, without labels (VICReg).

  accelerate launch --quiet --config_file accelerate_config.yaml pipelines/pretrain_encoder.py \
      --videos DIR --output-dir runs/encoder

Or on still images, in folders that are named after their classes, or in a zip of such folders:

  accelerate launch --quiet --config_file accelerate_config.yaml pipelines/pretrain_encoder.py \
      --images cifar10.zip --views.kind cifar --encoder.image-size 32 32 --output-dir runs/encoder

Labels are only looked at by probes that tell how good the embeddings are; the encoder learns nothing from them.

Leaves `encoder/{model.safetensors,config.json}`, `expander/` likewise (not with `--optimizer.ema-decay`, which
averages the encoder alone), `metrics.json`, `config.json` and tracker logs in the output folder. Ctrl-C saves; the same
command with --resume goes on.
"""

from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

from data.frames import ClipsState
from data.map_ahead import stream_ahead
from data.video import IMAGE_FPS
from data.views import ViewsConfig, make_views
from jepa.batch_norm import synchronise_batch_norm
from jepa.cached_gradients import backward_in_parts
from jepa.classification import OnlineProbe, knn_accuracies
from jepa.collectives import average_gradients, sum_over_ranks, world_size
from jepa.diagnostics import encoder_alarms, sequence_spread
from jepa.encoder import EncoderConfig, FrameEncoder, create_encoder
from jepa.expander import Expander, ExpanderConfig
from jepa.objectives import ObjectiveConfig, Terms, objective
from pipelines.checkpoints import CheckpointConfig, Checkpoints
from pipelines.compute import ComputeConfig, MemoryEstimate, describe_devices, start_accelerator
from pipelines.guards import FiniteGuard, Heartbeat, memory_advice, require_agreement, summary
from pipelines.optimizer import OptimizerConfig, clip_length, lr_at, make_optimizer, moving_average, set_learning_rate
from pipelines.sources import ImageSource, Source, VideoSource
from pipelines.stage import (
    LAUNCH,
    RunFolder,
    parse_bytes,
    readable_bytes,
    require,
    run_stage,
    to_json,
)
from pipelines.trackers import start_trackers
from pipelines.training import FIRST_ALARM_STEP, SHARED, Progress, Rates, feed, on_main, save_artefact, step_generator

PROBE_LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Options:
    """Train a frame encoder on videos, without labels."""

    videos: tuple[Path, ...] = ()
    """Folders (searched recursively), video files, folders of images, zips of them, and manifests."""
    images: Path | None = None
    """Instead of videos: a folder, or a zip, with still images in a folder for each class. Of a data set in parts,
    `train` is taken."""
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
    """Most memory for decoded frames on each process; larger data sets are streamed through it. Still images that fit
    are kept on the GPU, where there is one."""
    image_fps: float = IMAGE_FPS
    """Rate of folders of images, which have no times of their own."""
    strict: bool = False
    """A video that cannot be used or is damaged, or an image, is an error; otherwise it is left out and listed."""
    log_every: int = 100
    """Steps between two entries in the log: means of the loss and its terms over them, and a check for collapse."""
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
    require(
        bool(options.videos) != bool(options.images),
        "--videos PATH or --images PATH says what to train on: give one of them",
    )
    require(
        not options.images or options.views.kind != "neighbours",
        "--views.kind is neighbours, which still images do not have: take cifar for small images, vicreg for others",
    )
    for name in ("fps", "phases", "image_fps"):
        require(
            not options.images or getattr(options, name) == getattr(Options, name),
            f"--{name.replace('_', '-')} says how videos are sampled, which --images are not: leave it out",
        )
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
    output = RunFolder(options.output_dir, ("encoder", "expander", "training_state", "logs"))
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
    expander = Expander(encoder.embedding_dimension, options.expander)
    network: nn.Module = Pretraining(encoder, expander)
    require_agreement(accelerator, options=options)
    size = options.encoder.image_size
    source: Source = (
        ImageSource(accelerator, options.images, size, options.strict, options.batch_size)
        if options.images
        else VideoSource(
            accelerator, options.videos, options.output_dir, size, options.fps, options.phases, options.image_fps,
            options.strict,
        )
    )  # fmt: skip
    require_agreement(accelerator, **{source.noun: summary(source.names)})
    on_main(accelerator, lambda: output.prepare(options, options.overwrite, options.resume, source.inputs))
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
            f"and at most {options.shuffle_memory} of decoded frames on each; {source}"
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

    probe = None
    if source.classes:
        probe = OnlineProbe(encoder.embedding_dimension, expander.output_dimension, source.classes).to(device)
        probe_optimizer = torch.optim.AdamW(probe.parameters(), PROBE_LEARNING_RATE, weight_decay=0)
        accelerator.register_for_checkpointing(probe, probe_optimizer)
    source.open(options.batch_size, options.seed, shuffle_memory)
    progress, rates = Progress(place=asdict(ClipsState())), Rates(device)
    states = options.output_dir / "training_state"
    guard = FiniteGuard(accelerator, states)
    checkpoints = Checkpoints(accelerator, states, options.checkpoints, progress, guard.settle, heartbeat.stop)
    step = checkpoints.load_newest() if options.resume else None
    if step is None:
        step = 0
        if not fsdp:  # where saving itself would take an optimiser step
            checkpoints.save(step)
    source.pairs.state = ClipsState(**progress.place)
    start_trackers(accelerator, "pretrain_encoder", to_json(options), step)
    sequences = source.read_sequences().to(device)
    require_agreement(accelerator, frames_for_diagnostics=list(sequences.shape))

    mend = (
        "lower it to {samples}, with --overwrite"
        if fsdp
        else "add --micro-batch-size {samples}, which leaves the objective as it is, and --resume"
    )
    advice = ("--micro-batch-size" if options.micro_batch_size else "--batch-size", mend)
    bar = tqdm(total=options.steps, initial=step, unit="step", desc="encoder", disable=not is_main)
    batches = stream_ahead(lambda pairs: feed(pairs, device), [source.pairs], workers=1, ahead=2)
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
            terms, embeddings, outputs = forward_and_backward(accelerator, network, views, held, options, step)
            gradient_norm = accelerator.clip_grad_norm_(network.parameters(), clip_length(options.optimizer))
            guard.watch(step, batch.videos, terms.loss, gradient_norm)
            optimizer.step()
            optimizer.zero_grad()
        if averaged is not None:
            averaged.update_parameters(encoder)
        probed: dict[str, Tensor] = {}
        if probe is not None and batch.labels is not None:
            probed = train_probe(probe, probe_optimizer, embeddings, outputs, batch.labels)
        weighted = {f"weighted_{name}": value for name, value in terms.weighted.items()}
        progress.add({"loss": terms.loss, **terms.unweighted, **weighted, **probed})
        step += 1
        progress.place = asdict(batch.state)
        bar.update()

        if step % options.log_every == 0 or step == options.steps:
            speed = rates.report(progress)
            metrics, alarms = diagnose(network, sequences, source.labels, source.classes)
            values = progress.take_means(accelerator)
            bar.set_postfix({name: f"{values[name]:.3f}" for name in ("loss", *terms.unweighted)})
            progress.report(metrics | values, alarms if step >= FIRST_ALARM_STEP else [], step, bar)
            guard.check_scale(step)
            extra = {"gradient_norm": gradient_norm.item(), "learning_rate": optimizer.param_groups[0]["lr"]}
            accelerator.log({**progress.metrics, **extra, **speed}, step=step)
            rates.start()
        checkpoints.after_step(step)
    bar.close()
    source.pairs.close()
    checkpoints.save(step)

    counts = source.leave_account(options.output_dir)
    weights = accelerator.get_state_dict(network)  # whole on the main process however it was spread; collective
    if is_main:
        trained = FrameEncoder(encoder.config)
        trained.load_state_dict(averaged.module.state_dict() if averaged else part_of(weights, "encoder"))
        save_artefact(trained, options.output_dir / "encoder")
        if averaged is None:  # the last step's expander has never seen an averaged encoder
            trained_expander = Expander(encoder.embedding_dimension, options.expander)
            trained_expander.load_state_dict(part_of(weights, "expander"))
            save_artefact(trained_expander, options.output_dir / "expander")
        output.finish(
            {
                **progress.metrics,
                **progress.verdict(),
                "steps": step,
                "frames_per_second": step * global_batch / max(progress.seconds, 1e-9),
                "encoder_fingerprint": trained.fingerprint(),
                **counts,
            }
        )
        following = (
            f"python pipelines/probe_encoder.py --images {options.images} --encoder {options.output_dir}/encoder"
            if options.images
            else f"{LAUNCH} pipelines/cache_embeddings.py --videos {' '.join(map(str, options.videos))} "
            f"--encoder {options.output_dir}/encoder --fps {options.fps:g} --output-dir cache/train"
        )
        print(f"wrote {options.output_dir}/encoder and metrics.json. Next:\n  {following}")
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
) -> tuple[Terms, Tensor, Tensor]:
    """Forward and backward pass of the objective of the whole batch on all ranks, `held` frames at a time.

    Returns:
        The terms, and of this rank's batch the embeddings (2 B, D) and the expander's outputs (2 B, E): those of the
        first views, then those of the second.
    """
    shared = step_generator(options.seed, step, SHARED, torch.device("cpu"))
    rows = [options.batch_size] * accelerator.num_processes
    if held == options.batch_size:
        embeddings, outputs = network(torch.cat(views))  # (2 B, D), (2 B, E)
        first, second = outputs.chunk(2)
        terms = objective(first, second, options.objective, shared, rows)
        accelerator.backward(terms.loss)
        return terms, embeddings.detach(), outputs.detach()

    pretraining = accelerator.unwrap_model(network)
    seen: list[Tensor] = []

    def embed(part: Tensor) -> Tensor:
        with accelerator.autocast():
            return pretraining.encoder(part).float()

    def objective_of(embeddings: list[Tensor]) -> Terms:
        halves = zip(*(part.chunk(2) for part in embeddings), strict=True)
        whole = torch.cat([torch.cat(view) for view in halves])
        with accelerator.autocast():
            outputs = pretraining.expander(whole).float()
        seen[:] = whole.detach(), outputs.detach()
        first, second = outputs.chunk(2)
        return objective(first, second, options.objective, shared, rows)

    # Both views of the same frames, so that batch normalisation in the encoder sees both.
    parts = [torch.cat(both) for both in zip(*(view.split(held) for view in views), strict=True)]
    with accelerator.no_sync(network):
        terms = backward_in_parts(
            pretraining.encoder, parts, embed, objective_of, lambda terms: accelerator.backward(terms.loss)
        )
    average_gradients(network.parameters())
    return terms, seen[0], seen[1]


def train_probe(
    probe: OnlineProbe, optimizer: torch.optim.Optimizer, embeddings: Tensor, outputs: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """One step of the online probe, and its accuracies on the batch of all ranks before it. Collective."""
    loss, accuracies = probe(embeddings, outputs, labels)
    loss.backward()
    average_gradients(probe.parameters())
    optimizer.step()
    optimizer.zero_grad()
    return {name: sum_over_ranks(value) / world_size() for name, value in accuracies.items()}


@torch.no_grad()
def diagnose(
    network: nn.Module, sequences: Tensor, labels: Tensor | None, classes: int
) -> tuple[dict[str, float], list[str]]:
    """Spread of embeddings and outputs over batch and time on fixed frames (C, T, 3, H, W), and alarms. Collective.

    Where there are labels (C,), also how many are classified rightly by the nearest of the others.
    """
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
    if labels is not None and classes:
        metrics |= knn_accuracies(embeddings, outputs, labels, classes)
    return metrics, encoder_alarms(embeddings, outputs)


def part_of(weights: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """The weights of one part of a network, by their names inside it."""
    return {name.removeprefix(f"{part}."): value for name, value in weights.items() if name.startswith(f"{part}.")}


if __name__ == "__main__":
    run_stage(main, Options)
