"""`Run`: the order of a trainer, which calls `begin`, `prepare`, `steps` with `update` and `log` for each, `finish`."""

import copy
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from types import FrameType
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as distributed
from accelerate.utils import gather_object, send_to_device, set_seed
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data._utils.pin_memory import pin_memory
from tqdm import tqdm

from data.files import write_whole
from data.parallel import stream_ahead
from pipelines.run import devices
from pipelines.run.artefacts import save_artefact
from pipelines.run.checkpoints import Checkpoints
from pipelines.run.command import Interrupted, UserError, first_few
from pipelines.run.files import START_AGAIN, reading, to_json, write_json
from pipelines.run.folder import RunFolder
from pipelines.run.training import OptimizerOptions, RunOptions

FIRST_ALARM_STEP = 50  # before, nothing has had time to spread out, and every run would alarm
SAVE_EVERY_S = 600.0
LONGEST_WARMUP = 500
SHARED = 2**32 - 1  # a rank that there is not, for the random numbers that all of them share

AnyBatch = TypeVar("AnyBatch", bound=tuple[Any, ...])
"""A named tuple of tensors, the first with a row for each sample, and `place`, where the next batch begins, if any."""


@dataclass
class Progress:
    """What each rank remembers beside weights: of all of the run, and sums since the last entry in the log."""

    place: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    first_collapse_step: int | None = None
    collapse_alarms: list[str] = field(default_factory=list)
    curve: list[dict[str, Any]] = field(default_factory=list)
    sums: dict[str, float | Tensor] = field(default_factory=dict)
    summed_steps: int = 0


class Best:
    """The weights of a module with the lowest value of a metric so far."""

    def __init__(self, module: nn.Module, metric: str) -> None:
        self.module, self.metric = module, metric
        self.step, self.metrics, self.weights = 0, dict[str, Any](), dict[str, Tensor]()

    def consider(self, step: int, metrics: dict[str, Any]) -> None:
        """Keep the present weights if they are the best."""
        if not self.metrics or metrics[self.metric] < self.metrics[self.metric]:
            self.step, self.metrics, self.weights = step, metrics, copy.deepcopy(self.module.state_dict())

    def restore(self) -> None:
        """Give the module its best weights back."""
        self.module.load_state_dict(self.weights)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "metrics": self.metrics, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.metrics, self.weights = state["step"], state["metrics"], state["weights"]
        own = {name: value.shape for name, value in self.module.state_dict().items()}
        are_numbers = all(isinstance(value, int | float | None) for value in self.metrics.values())
        if not are_numbers or {name: value.shape for name, value in self.weights.items()} not in (own, {}):
            raise ValueError("its best weights are others")


class Run:
    """The run of a trainer, on this rank, in the folder of its options. Collective.

    Raises `UserError` where the folder cannot be used, or ranks were started differently; and `Finished`.
    """

    def __init__(self, options: RunOptions, command: str, artefacts: tuple[str, ...]) -> None:
        self.options, self.command, self.path = options, command, options.output_dir
        self.accelerator = devices.start_accelerator(
            options.precision, options.execution, trackers=options.tracker, logs=self.path / "logs"
        )
        self.device: torch.device = self.accelerator.device
        self.rank, self.ranks = self.accelerator.process_index, self.accelerator.num_processes
        self.is_main: bool = self.accelerator.is_main_process
        devices.require_agreement(self.accelerator, options=options)
        self.folder = devices.on_main(self.accelerator, lambda: RunFolder(options, command, artefacts))
        self.checkpoints = Checkpoints(self.accelerator, self.path / "training_state")
        set_seed(options.seed)
        self.step, self.saved_step, self.received = 0, -1, 0
        self.progress, self.parts = Progress(), dict[str, Any]()
        self.restored: dict[str, Any] | None = None
        self.best: Best | None = None
        self.unseen: list[tuple[int, Sequence[Any], Tensor]] = []
        self.lived = self.saved_at = time.monotonic()
        # Ranks agree through the CPU: nobody has to wait for the GPU's queue of work to run empty.
        self.group = distributed.new_group(backend="gloo", timeout=devices.LONGEST_WAIT) if self.ranks > 1 else None

    def begin(self, inputs: dict[str, Any], *facts: str, sources: dict[str, str] | None = None) -> None:
        """Make the folder or resume the run in it, and print the facts: what is trained on what. Collective.

        Inputs say in short what is learned from, `sources` which videos these are, paths by content. Raises `UserError`
        where ranks see other inputs, or a resumed run began with others, or has lost its training state.
        """
        devices.require_agreement(self.accelerator, inputs=inputs)
        curve = self.path / "curve.jsonl"
        if self.options.resume:
            has_learned = curve.exists() and curve.stat().st_size > 0
            if (state := self.checkpoints.load_newest(is_needed=has_learned)) is not None:
                self.step, self.restored, own = state
                with reading(str(self.path), RuntimeError, mend=START_AGAIN):
                    self.saved_step, self.progress = self.step, Progress(**own)

        def start() -> None:
            self.folder.begin(inputs, sources)  # type: ignore[union-attr]
            # What was logged after the newest state is logged again.
            write_whole(curve, "".join(json.dumps(entry) + "\n" for entry in self.progress.curve).encode())
            self.accelerator.init_trackers(self.command, init_kwargs={"tensorboard": {"purge_step": self.step + 1}})
            print(f"{self.command} on {devices.describe_devices(self.accelerator)}: {'; '.join(facts)}")

        devices.on_main(self.accelerator, start)

    def prepare(self, network: nn.Module, optimizer: OptimizerOptions, *, clip_norm: float = math.inf) -> nn.Module:
        """The network on its device, ready for several ranks, with its weights restored; after `begin`.

        Batch normalisation, where there is any, is synchronised already. Gradients longer than `clip_norm` are clipped.
        """
        network = network.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.peak, self.clip_norm = optimizer.learning_rate, clip_norm
        if self.options.execution == "compiled":
            network.compile()
        adamw = torch.optim.AdamW(decayed_groups(network, optimizer.weight_decay), lr=self.peak, fused=True)
        self.trained, self.optimizer = self.accelerator.prepare(network, adamw)
        self._keep(network=network, optimizer=self.optimizer)
        if self.accelerator.scaler is not None:
            self._keep(scaler=self.accelerator.scaler)
        return self.trained

    def keep_best(self, module: nn.Module, metric: str) -> Best:
        """From now on, keep the weights for which a logged metric is lowest; after `prepare`."""
        self.best = Best(module, metric)
        self._keep(best=self.best)
        return self.best

    def _keep(self, **parts: Any) -> None:
        """Make something part of the training state, and restore it if the run is resumed."""
        self.parts |= parts
        if self.restored is not None:
            for name, part in parts.items():
                with reading(str(self.path), RuntimeError, mend=START_AGAIN):
                    part.load_state_dict(self.restored[name])

    def steps(self, batches: Callable[[dict[str, int]], Iterable[AnyBatch]]) -> Iterator[tuple[int, AnyBatch]]:
        """The number of each step from 0 and its batch; `update` is called once for each. Collective.

        Batches without end come from a place in the data on, at first an empty one; a thread reads ahead. States are
        saved; Ctrl-C and SIGTERM save after the step under way, and raise `Interrupted`.
        """
        self._save()  # a folder that cannot be written is found out before the first hour
        self.restored = None
        ahead = stream_ahead(lambda place: self._feed(batches(place)), [self.progress.place], workers=1, at_once=2)
        self.bar = tqdm(total=self.options.steps, initial=self.step, unit="step", disable=not self.is_main)
        self._count_anew()
        try:
            while self.step < self.options.steps:
                began = time.monotonic()
                batch = send_to_device(next(ahead), self.device, non_blocking=True)
                self.waited_s += time.monotonic() - began
                # Not before: decoding the first frames may take long, and there is nothing to save yet.
                signal.signal(signal.SIGINT, self._receive)
                signal.signal(signal.SIGTERM, self._receive)
                self.samples += next(len(value) for value in batch if isinstance(value, Tensor)) * self.ranks
                for group in self.optimizer.param_groups:
                    group["lr"] = lr_at(self.step, self.options.steps, self.peak)
                # Dropout and the like: as random as they were, however often the run was interrupted.
                torch.manual_seed(self.generator(self.step).initial_seed())
                yield self.step, batch
                self.progress.place = dict(getattr(batch, "place", {}))
                self.bar.update()
                self._after_step()
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self.bar.close()
        ahead.close()  # type: ignore[attr-defined]

    def draws(self, draw: Callable[[torch.Generator], AnyBatch]) -> Iterator[tuple[int, AnyBatch]]:
        """As `steps`, of batches without a place: each is drawn by the randomness of its step on this rank."""
        cpu = torch.device("cpu")
        chances = (step_generator(self.options.seed, step, self.rank, cpu) for step in count(self.step))
        return self.steps(lambda _: map(draw, chances))

    def _feed(self, batches: Iterable[AnyBatch]) -> Iterator[AnyBatch]:
        """Batches in memory from which a GPU copies while it computes; for the thread that reads ahead."""
        # Two pools of threads on the same cores wait for each other in busy loops, at .69 of the speed.
        torch.set_num_threads(1)
        for batch in batches:
            yield pin_memory(batch) if self.device.type == "cuda" else batch

    def generator(self, step: int, *, shared: bool = False) -> torch.Generator:
        """The randomness of a step on this rank's device, or that which all ranks share."""
        return step_generator(self.options.seed, step, SHARED if shared else self.rank, self.device)

    def update(self, loss: Tensor, terms: dict[str, Tensor], videos: Sequence[Any] = ()) -> None:
        """One step of the optimiser. Means of the loss and its terms, all scalars, are logged.

        A loss or gradient that is NaN or infinite is a `UserError` before the next entry in the log, and before any
        state is saved: it names the step and the videos of its batch.
        """
        self.accelerator.backward(loss)
        self.gradient_norm = self.accelerator.clip_grad_norm_(self.trained.parameters(), self.clip_norm)
        # With fp16, infinite gradients are ordinary: the scaler skips the step and lowers its scale.
        numbers = loss.detach() if self.accelerator.scaler is not None else loss.detach() + self.gradient_norm
        self.unseen.append((self.step, videos, numbers.isfinite()))
        self.optimizer.step()
        self.optimizer.zero_grad()
        for name, value in {"loss": loss, **terms}.items():
            self.progress.sums[name] = self.progress.sums.get(name, 0.0) + value.detach()
        self.progress.summed_steps += 1
        self.step += 1
        if self.due:
            self._require_finite()  # which waits for steps that are still under way
        self.worked_s = time.monotonic() - self.since

    def _require_finite(self) -> None:
        for step, videos, finite in self.unseen:
            if not finite:
                names = first_few(videos) or "unnamed data"
                raise UserError(
                    f"the loss or its gradient is not finite in step {step + 1}, with {names}: look at that "
                    "data, or --resume with a lower learning rate; the newest checkpoint, of step "
                    f"{self.saved_step}, is from before, but delete it if its weights have grown too large already"
                )
        self.unseen.clear()

    @property
    def due(self) -> bool:
        """Whether a log entry is due after this step."""
        return self.step % self.options.log_every == 0 or self.step == self.options.steps

    def log(self, metrics: dict[str, float], alarms: Sequence[str] = (), show: Sequence[str] = ("loss",)) -> None:
        """Log metrics alike on all ranks, the means of the terms since the last entry, and rates. Collective.

        The first alarms, signs of collapse in words, are said loudly; what `show` names stands beside the bar.
        """
        progress, alarms = self.progress, alarms if self.step >= FIRST_ALARM_STEP else []
        sums = torch.stack([torch.as_tensor(value, device=self.device).float() for value in progress.sums.values()])
        means = self.accelerator.reduce(sums / progress.summed_steps, "mean").tolist()
        entry = {
            "step": self.step, **metrics, **dict(zip(progress.sums, means, strict=True)), "collapsed": bool(alarms),
            "samples_per_second": self.samples / self.worked_s, "data_wait_fraction": self.waited_s / self.worked_s,
            "gradient_norm": float(self.gradient_norm), "learning_rate": self.optimizer.param_groups[0]["lr"],
        }  # fmt: skip
        progress.sums, progress.summed_steps = {}, 0
        progress.curve.append(to_json(entry))
        if self.best is not None:
            self.best.consider(self.step, entry)
        if alarms and progress.first_collapse_step is None:
            progress.first_collapse_step, progress.collapse_alarms = self.step, list(alarms)
            if self.is_main:
                tqdm.write(f"COLLAPSE at step {self.step}: {'; '.join(alarms)}")
        if self.is_main:
            with (self.path / "curve.jsonl").open("a") as curve:
                curve.write(json.dumps(progress.curve[-1]) + "\n")
            self.accelerator.log(entry, step=self.step)
            self.bar.set_postfix({name: f"{entry[name]:.4g}" for name in show if name in entry})
        self._count_anew()

    def show(self, name: str, pictures: Tensor, embeddings: Tensor | None = None) -> None:
        """Pictures (N, 3, H, W) in [0, 1] for TensorBoard, where that is a tracker; with embeddings its projector."""
        if self.is_main and "tensorboard" in self.options.tracker:
            writer = self.accelerator.get_tracker("tensorboard", unwrap=True)
            pictures = pictures.detach().float().clamp(0, 1).cpu()
            if embeddings is None:
                writer.add_images(name, pictures, self.step)
            else:
                thumbnails = functional.interpolate(pictures, (32, 32))
                writer.add_embedding(embeddings.flatten(1), label_img=thumbnails, global_step=self.step, tag=name)

    def _count_anew(self) -> None:
        """Rates are those of training and of waiting for data: validation and logging do not count."""
        self.samples, self.waited_s, self.since = 0, 0.0, time.monotonic()

    def _save(self) -> None:
        """Write the state, unless that has been done. Collective."""
        if self.step != self.saved_step:
            self._require_finite()
            self.progress.seconds, self.lived = self.progress.seconds + time.monotonic() - self.lived, time.monotonic()
            shared = {name: part.state_dict() for name, part in self.parts.items()}
            self.checkpoints.save((self.step, shared, to_json(self.progress)))
            self.saved_step, self.saved_at = self.step, time.monotonic()

    def _after_step(self) -> None:
        """Save if it is time to; if any rank was asked to stop, save and raise `Interrupted` on all. Collective."""
        # Signals reach ranks at different steps, and clocks differ: they must agree, or one waits for ever.
        wishes = torch.tensor([self.received, time.monotonic() - self.saved_at >= SAVE_EVERY_S], dtype=torch.int64)
        if self.group is not None:
            distributed.all_reduce(wishes, distributed.ReduceOp.MAX, self.group)  # type: ignore[arg-type]
        received, is_time = wishes.tolist()
        every = self.options.checkpoint_every
        if received or is_time or self.step % every == 0 or self.step == self.options.steps:
            self._save()
        if received:
            self.accelerator.end_training()
            raise Interrupted(f"stopped and saved after step {self.step}: add --resume to go on", received)

    def _receive(self, signal_number: int, frame: FrameType | None) -> None:
        if self.received and signal_number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal_number
        if self.is_main:
            # Not by print: the progress bar may be writing at this moment, and streams refuse to be entered twice.
            os.write(2, b"\nsaving after this step; Ctrl-C again to stop at once\n")

    def finish(
        self, metrics: dict[str, Any], artefacts: dict[str, tuple[str, Any, nn.Module]], *, account: Any = None,
        next: str = "",
    ) -> None:  # fmt: skip
        """Leave account, artefacts and metrics, in this order, mark the run as finished, say what is next. Collective.

        Metrics are beside those of the last, or of the best, entry in the log. Artefacts are kind, configuration and
        module by the name of their folder, those of the main process. The account is of this rank's reading.
        """
        if account is not None:
            account, *others = gather_object([account])
            account.merge(others)

        def leave() -> None:
            if account is not None:
                print(account)
                write_json(self.path / "account.json", account)
            for name, artefact in artefacts.items():
                save_artefact(self.path / name, *artefact)
            progress, best = self.progress, self.best
            found = progress.curve[-1] if best is None else {"collapsed": False, **best.metrics, "best_step": best.step}
            lived = {name: getattr(progress, name) for name in ("first_collapse_step", "collapse_alarms", "seconds")}
            self.folder.finish({**found, **lived, "steps": self.step, **metrics})  # type: ignore[union-attr]
            print(f"wrote {', '.join(f'{self.path}/{name}' for name in (*artefacts, 'metrics.json'))}")
            if next:
                print(f"Next:\n  {next}")

        devices.on_main(self.accelerator, leave)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()


def step_generator(seed: int, step: int, rank: int, device: torch.device) -> torch.Generator:
    """The randomness of one step on one rank: the same however often a run was interrupted."""
    state = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state) >> 1)


def decayed_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups of trained parameters for an optimiser; biases and normalisation layers do not decay."""
    trained = [weight for weight in network.parameters() if weight.requires_grad]
    return [
        {"params": [weight for weight in trained if weight.ndim > 1], "weight_decay": weight_decay},
        {"params": [weight for weight in trained if weight.ndim <= 1], "weight_decay": 0.0},
    ]


def lr_at(step: int, steps: int, peak: float) -> float:
    """Learning rate at a step: linear warm-up over a tenth of the steps, then a cosine to 0; no state to restore."""
    warmup = min(LONGEST_WARMUP, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
