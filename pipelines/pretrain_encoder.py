r"""Stage 1: train the frame encoder on a folder of videos, without labels (VICReg).

  accelerate launch --quiet --config_file accelerate_config.yaml pipelines/pretrain_encoder.py \
      --videos DIR --output-dir runs/encoder

Leaves `encoder/{model.safetensors,config.json}`, `metrics.json`, `config.json` and tracker logs in the output folder.
Ctrl-C saves; the same command with --resume goes on.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate.utils import gather_object, set_seed
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

from data.frames import FramePairs, PairsState, read_sequences
from data.video import IMAGE_FPS
from data.views import ViewsConfig, make_views
from jepa.diagnostics import encoder_alarms, sequence_spread
from jepa.encoder import EncoderConfig, FrameEncoder, create_encoder
from jepa.expander import Expander, ExpanderConfig
from jepa.objectives import VICRegConfig, vicreg
from pipelines.stage import LAUNCH, RunFolder, counted, leave_account, parse_bytes, require, run_stage
from pipelines.training import (
    Checkpoints,
    Interruption,
    find_usable_videos,
    lr_at,
    save_artefact,
    start_accelerator,
    step_generator,
)

DIAGNOSTIC_CLIPS, DIAGNOSTIC_FRAMES = 16, 16
FIRST_ALARM_STEP = 50
"""Before, nothing has had time to spread out, and batch normalisation has seen too little: every run would alarm."""


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
    learning_rate: float = 2e-3
    """Peak learning rate of AdamW."""
    weight_decay: float = 1e-4
    """Weight decay of AdamW."""
    warmup_steps: int = 50
    """Steps of linear warm-up before the cosine."""
    shuffle_memory: str = "2GB"
    """Most memory for decoded frames on each process; larger data sets are streamed through it."""
    image_fps: float = IMAGE_FPS
    """Rate of folders of images, which have no times of their own."""
    strict: bool = False
    """A video that cannot be used or is damaged is an error; otherwise it is left out and listed."""
    log_every: int = 100
    """Steps between two entries in the log, each with a check for collapse."""
    checkpoint_every: int = 500
    """Steps between two checkpoints."""
    tracker: str = "tensorboard"
    """Where curves go: tensorboard, wandb, mlflow, ..., or none."""
    seed: int = 0
    """Of the weights, the order of the frames and the views."""
    resume: bool = False
    """Go on with the unfinished run in the output folder."""
    overwrite: bool = False
    """Replace the run in the output folder."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    expander: ExpanderConfig = field(default_factory=ExpanderConfig)
    objective: VICRegConfig = field(default_factory=VICRegConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)


def main(options: Options) -> None:
    """The story: check, build, train, save."""
    require(options.fps > 0, f"--fps is {options.fps:g}: it must be positive")
    for name in ("steps", "phases", "log_every", "checkpoint_every", "image_fps"):
        value = getattr(options, name)
        require(value > 0, f"--{name.replace('_', '-')} is {value}: it must be positive")
    require(options.batch_size > 1, f"--batch-size is {options.batch_size}: variance needs at least 2")
    shuffle_memory = parse_bytes(options.shuffle_memory, "--shuffle-memory")
    output = RunFolder(options.output_dir, ("encoder", "training_state", "logs"))
    accelerator = start_accelerator(options.tracker, options.output_dir / "logs")
    is_main = accelerator.is_main_process
    set_seed(options.seed)

    encoder = create_encoder(options.encoder)
    expander = Expander(options.encoder.embedding_dimension, options.expander)
    videos = find_usable_videos(
        accelerator, options.videos, options.fps, options.output_dir, options.image_fps, options.strict
    )
    if is_main:
        inputs = {"videos": [video.path for video in videos.videos], "refused": videos.refused}
        output.prepare(options, options.overwrite, options.resume, inputs)
        print(
            f"training {options.encoder.backbone} ({sum(p.numel() for p in encoder.parameters()):,} weights) on "
            f"{accelerator.num_processes} x {accelerator.device.type}, precision {accelerator.mixed_precision}, "
            f"global batch {options.batch_size * accelerator.num_processes}, at most {options.shuffle_memory} of "
            f"decoded frames on each; {counted(len(videos.videos), 'video')}, {len(videos.refused)} refused"
        )
    accelerator.wait_for_everyone()

    trainable = [p for p in [*encoder.parameters(), *expander.parameters()] if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=options.learning_rate, weight_decay=options.weight_decay)
    network: nn.Module = nn.Sequential(encoder, expander)
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    network, optimizer = accelerator.prepare(network, optimizer)

    pairs = FramePairs(
        videos.videos, options.encoder.image_size, options.fps, options.batch_size, options.seed,
        accelerator.process_index, accelerator.num_processes, shuffle_memory, is_main, options.phases, options.strict,
    )  # fmt: skip
    checkpoints = Checkpoints(accelerator, options.output_dir / "training_state")
    accelerator.register_for_checkpointing(progress := Progress(pairs))
    step = checkpoints.load_newest() if options.resume else 0
    interruption = Interruption(accelerator)
    accelerator.init_trackers("pretrain_encoder")
    sequences = read_sequences(
        videos.videos, options.encoder.image_size, options.fps, DIAGNOSTIC_CLIPS, DIAGNOSTIC_FRAMES
    ).to(accelerator.device)

    started, started_at = time.monotonic(), step
    bar = tqdm(total=options.steps, initial=step, unit="step", desc="encoder", disable=not is_main)
    for batch in pairs:
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, options.steps, options.warmup_steps, options.learning_rate)
        generator = step_generator(options.seed, step, accelerator.process_index, accelerator.device)
        frames, following = (part.to(accelerator.device) for part in batch)
        views = make_views(frames, following, options.views, generator)
        with accelerator.autocast():
            outputs = network(torch.cat(views))  # (2 B, E)
        first, second = outputs.chunk(2)
        terms = vicreg(first, second, options.objective)
        optimizer.zero_grad()
        accelerator.backward(terms.loss)
        optimizer.step()
        step += 1
        bar.update()

        if step % options.log_every == 0 or step == options.steps:
            values = {name: value.item() for name, value in terms._asdict().items()}
            bar.set_postfix({name: f"{value:.3f}" for name, value in values.items()})
            if is_main:
                metrics, alarms = diagnose(encoder, expander, sequences)
                alarms = alarms if step >= FIRST_ALARM_STEP else []
                metrics |= values
                accelerator.log({**metrics, "learning_rate": optimizer.param_groups[0]["lr"]}, step=step)
                progress.report(alarms, step, bar)
        if step == options.steps:
            break
        if step % options.checkpoint_every == 0:
            checkpoints.save(step)
        interruption.save_and_stop(checkpoints, step)
    bar.close()

    account = videos.account()
    account.merge(gather_object([pairs.account]))
    if is_main:
        save_artefact(encoder, options.output_dir / "encoder")
        elapsed = time.monotonic() - started
        frames = (step - started_at) * options.batch_size * accelerator.num_processes
        output.finish(
            {
                **metrics,
                "collapsed": bool(alarms),
                "collapse_alarms": progress.alarms,
                "first_collapse_step": progress.first_alarm_step,
                "steps": step,
                "seconds": elapsed,
                "frames_per_second": frames / elapsed,
                "encoder_fingerprint": encoder.fingerprint(),
                "videos": len(videos.videos),
                "refused_videos": len(videos.refused),
                "damaged_videos": len(account.damaged),
            }
        )
        leave_account(account, options.output_dir)
        print(
            f"wrote {options.output_dir}/encoder and metrics.json. Next:\n"
            f"  {LAUNCH} pipelines/cache_embeddings.py --videos {' '.join(map(str, options.videos))} "
            f"--encoder {options.output_dir}/encoder --fps {options.fps:g} --output-dir cache/train"
        )
    accelerator.end_training()


class Progress:
    """What must survive an interruption beside the weights: the place in the data, and the alarms so far."""

    def __init__(self, pairs: FramePairs) -> None:
        self.pairs = pairs
        self.alarms: list[str] = []
        self.first_alarm_step: int | None = None

    def report(self, alarms: list[str], step: int, bar: "tqdm[None]") -> None:
        """Say loudly, once for each kind of alarm, that the run has collapsed."""
        if alarms and self.first_alarm_step is None:
            self.first_alarm_step = step
            self.alarms = alarms
            bar.write(f"COLLAPSE at step {step}: {'; '.join(alarms)}")

    def state_dict(self) -> dict[str, object]:
        """For the checkpoint."""
        return {"pairs": vars(self.pairs.state), "alarms": self.alarms, "first_alarm_step": self.first_alarm_step}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """From the checkpoint."""
        self.pairs.state = PairsState(**state["pairs"])  # type: ignore[arg-type]
        self.alarms, self.first_alarm_step = state["alarms"], state["first_alarm_step"]  # type: ignore[assignment]


@torch.no_grad()
def diagnose(encoder: FrameEncoder, expander: Expander, sequences: Tensor) -> tuple[dict[str, float], list[str]]:
    """Spread of embeddings and expander outputs over batch and time on fixed frames (C, T, 3, H, W), and alarms."""
    if len(sequences) == 0:
        return {}, []
    encoder.eval()
    expander.eval()
    flat = rearrange(sequences, "c t ... -> (c t) ...")
    embeddings = torch.cat([encoder(part) for part in flat.split(128)])
    outputs = expander(embeddings)
    encoder.train()
    expander.train()
    embeddings, outputs = (rearrange(x, "(c t) d -> c t d", c=len(sequences)) for x in (embeddings, outputs))
    metrics: dict[str, float] = {}
    for name, value in (("embedding", embeddings), ("expander", outputs)):
        for over, numbers in sequence_spread(value)._asdict().items():
            metrics |= {f"{name}_{over}_std": numbers.std, f"{name}_{over}_rank": numbers.rank}
    return metrics, encoder_alarms(embeddings, outputs)


if __name__ == "__main__":
    run_stage(main, Options)
