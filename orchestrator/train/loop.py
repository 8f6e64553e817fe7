"""The one training loop: every method, one process or a rank of a DDP group, on any device."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from methods.contract import Batch, Learner, Recipe
from methods.ranks import GlobalBatchNorm, even_labels
from orchestrator.errors import WorkError
from orchestrator.models.precision import autocast
from orchestrator.store.store import Mirror
from orchestrator.train.feed import Feeder, StreamFeeder, TokenFeeder
from orchestrator.train.memory import is_out_of_memory
from orchestrator.train.notice import Ending

HURRY_S = 5.0  # between two saves of a process that will be taken away
SLOW_S = 1.0  # a save that takes longer is slow:
SPARSE = 20  # times as long as it took, training goes on before the next one
CHECK_STEPS = 500  # between two looks at whether the loss is finite, at most


class DivergedError(WorkError):
    """The loss is not finite."""


class DeviceMemoryError(WorkError):
    """A stage did not fit into the device's memory; the sentence says with how many images."""


@contextlib.contextmanager
def memory_told(tried: Callable[[], str]) -> Iterator[None]:
    """Names what was tried where the device's memory is too small for it.

    Raises:
        DeviceMemoryError: with the sentence that `tried` then gives.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise DeviceMemoryError(tried()) from error


@dataclass
class Report:
    """What the loop tells while it runs: how far it is, and the parts of the loss (means since the last report)."""

    step: int
    steps: int
    parts: dict[str, float]
    learner: Learner


Tell = Callable[[float, float | None], None]


class Gauge(Protocol):
    """Measures a network while it trains. Picklable: each rank of a group has its own, and asks it alike."""

    def due(self, step: int) -> bool:
        """Whether something is to be measured after this step; ask once a step."""
        ...

    def share(self, step: int) -> float:
        """Of the trial's whole budget that is done after this step."""
        ...

    def measure(self, state: Report) -> float:
        """The val metric."""
        ...

    def note(self, state: Report) -> None:
        """Keeps the parts of the loss, for whoever looks at a trial that has not ended well; one rank does."""
        ...


@dataclass
class Reporter:
    """Measures in this process, and tells how far the trial is: (share of its budget, val metric or None).

    What `tell` raises ends the training.
    """

    gauge: Gauge
    tell: Tell

    def __call__(self, state: Report) -> None:
        self.gauge.note(state)
        due = self.gauge.due(state.step)
        self.tell(self.gauge.share(state.step), self.gauge.measure(state) if due else None)


@dataclass
class History:
    """What a run leaves behind: (step, parts of the loss) and the seconds inside the loop."""

    points: list[dict[str, float]] = field(default_factory=list)
    loop_seconds: float = 0.0


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """Linear rise over the first `warmup` share of the steps, then half a cosine to 0."""
    warm = max(1, round(recipe.warmup * steps)) if recipe.warmup > 0 else 0
    if step < warm:
        return recipe.lr * (step + 1) / warm
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def build_optimizer(learner: Learner, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimiser. The learner says by parameter what is decayed and at which share of the learning rate,
    which each group keeps as `scale`.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in learner.named_parameters():
        if parameter.requires_grad:
            scale, decay = learner.lr_scale(name), recipe.weight_decay * learner.decays(name, parameter)
            group = groups.setdefault((scale, decay), {"params": [], "scale": scale, "weight_decay": decay})
            group["params"].append(parameter)
    # Fused: one pass over each tensor instead of one for each operation, a fifth of the time on a CPU.
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(list(groups.values()), lr=recipe.lr, momentum=0.9, fused=True)
    return torch.optim.AdamW(list(groups.values()), lr=recipe.lr, betas=recipe.betas, fused=True)


class Checkpoint:
    """The latest state of a run in one file, replaced at once.

    Args:
        path: the file.
        every_s: seconds between two saves; more where a save is slow.
        every_steps: optimizer steps after which one is due whatever the time; None for never.
        mirror: keeps copies for whoever goes on on another node, which does not see the file; its copy is the latest.
    """

    def __init__(
        self, path: Path, every_s: float, every_steps: int | None = None, mirror: Mirror | None = None
    ) -> None:
        self.path, self.every_s, self.every_steps, self.mirror = path, every_s, every_steps, mirror
        self.saved = time.monotonic()
        self.pause_s = every_s

    def due(self, step: int) -> bool:
        """Whether the state after this step is to be saved."""
        if self.every_steps is not None and step % self.every_steps == 0:
            return True
        return time.monotonic() - self.saved >= self.pause_s

    def save(self, state: dict[str, Any], hurry: bool = False) -> None:
        """Replaces the file. After a slow save training goes on for longer before the next one is due.

        Args:
            hurry: the process will be taken away: the next one is due after `HURRY_S`, however slow this one was.
        """
        began = time.monotonic()
        state = _on_cpu(state)  # once, for its hash and for the file
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(f".{platform.node()}-{os.getpid()}")
        torch.save(state | {"digest": _digest(state)}, temporary)
        os.replace(temporary, self.path)
        if self.mirror is not None:
            self.mirror.put(self.path)
        self.saved = time.monotonic()
        took = self.saved - began
        if hurry:
            self.pause_s = min(self.every_s, HURRY_S)
        else:
            self.pause_s = max(self.every_s, SPARSE * took if took > SLOW_S else 0.0)

    def load(self) -> dict[str, Any] | None:
        """The state, or None; a damaged file is removed with a warning, since training can begin anew."""
        if self.mirror is not None:
            self.mirror.get(self.path)
        if not self.path.is_file():
            return None
        try:
            state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
            if state.pop("digest") == _digest(state):
                return state
        except FileNotFoundError:  # another rank found it damaged
            return None
        except Exception as error:  # what torch raises for a spoilt file is of many kinds
            if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which it says of one that was cut
                raise
        warnings.warn(f"The checkpoint {str(self.path)!r} is damaged: training begins anew.", stacklevel=2)
        self.path.unlink(missing_ok=True)
        return None


def _on_cpu(part: Any) -> Any:
    """The same state with all tensors on the CPU; those that are there already are not copied."""
    if isinstance(part, Tensor):
        return part.detach().cpu()
    if isinstance(part, dict):
        return {key: _on_cpu(value) for key, value in part.items()}
    if isinstance(part, list | tuple):
        return type(part)(_on_cpu(one) for one in part)
    return part


def _digest(part: Any) -> str:
    """SHA-256 of a state: torch does not notice a changed byte."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, dict):
            for key in value:
                digest.update(repr(key).encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            for one in value:
                add(one)
        else:
            digest.update(repr(value).encode())

    add(part)
    return digest.hexdigest()


def _moving(learner: nn.Module) -> dict[str, Tensor]:
    """What training changes: trainable parameters and all buffers."""
    frozen = {n for n, p in learner.named_parameters() if not p.requires_grad}
    return {n: t for n, t in learner.state_dict().items() if n not in frozen}


def _finite(learner: nn.Module, loss: Tensor | None) -> bool:
    """Whether a sum of losses, and what is trained, are numbers. Waits for the device once."""
    tensors = [p.detach() for p in learner.parameters() if p.requires_grad]
    if loss is not None:
        tensors.append(loss)
    return bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())


def part_of(batch: Batch, part: int, parts: int) -> Batch:
    """Every `parts`-th row of a batch from row `part` on; all texts, which are of no row, unless only texts come."""
    if parts == 1:
        return batch

    def cut(rows: Tensor | None) -> Tensor | None:
        return rows[part::parts] if rows is not None else None

    return Batch(
        batch.images[part::parts],
        cut(batch.labels),
        {key: rows[part::parts] for key, rows in batch.outputs.items()},
        cut(batch.teacher_images),
        part_of(batch.generated, part, parts) if batch.generated is not None else None,
        batch.texts if batch.tokens is None else cut(batch.texts),
        cut(batch.captions),
        cut(batch.tokens),
    )


def fit(
    learner: Learner,
    feeder: Feeder | StreamFeeder | TokenFeeder,
    recipe: Recipe,
    steps: int,
    *,
    device: str = "cpu",
    precision: str = "fp32",
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    sync_batchnorm: bool = True,
    accumulate: int = 1,
    checkpoint: Checkpoint | None = None,
    notice: Callable[[], bool] | None = None,
    report: Callable[[Report], None] | None = None,
    report_every: int | None = None,
) -> History:
    """Trains `learner` in place for `steps` optimizer steps, from its checkpoint if there is one.

    Args:
        learner, feeder, recipe, steps: what, on what, how, and for how long.
        device: `cpu` or `cuda` (this process's device).
        precision: autocast type; `fp16` scales the loss.
        seed: of dropout and drop path; each rank and step has its own draw.
        rank, world: with `world > 1` the process group must exist.
        sync_batchnorm: batch norm over the rows of all ranks.
        accumulate: micro batches that a rank's part of a batch is cut into: every so many rows of it, one part after
            another. The step is the mean of theirs; rows are related, and normalised, within a micro batch (of all
            ranks).
        checkpoint: where to resume from and save to (rank 0 saves). A state that is not finite is not saved.
        notice: whether this process is about to be taken away; asked after each step. Once it says so, the state is
            saved at once and then every `HURRY_S` seconds, and training goes on for as long as it may. SIGTERM saves
            the state after the step, and then ends the process.
        report: called on every rank about every `report_every` steps and after the last one.

    Raises:
        DivergedError: if the loss is not finite; on all ranks at the same step.
        DeviceMemoryError: if the network or a step does not fit into the device's memory; on the rank that it happens
            to.
    """
    history = History()
    start = 0
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}  # a part may occur in some steps only
    with memory_told(lambda: "out of device memory before the first step, for the network and its optimiser's state"):
        learner.to(device)
        wrapped: nn.Module = learner
        if world > 1:
            ids = [torch.cuda.current_device()] if device != "cpu" else None
            # A parameter may have no gradient in a step. To look for those takes time in each step; where they are
            # always the same, the first step tells, unless gradients gather over several.
            once = learner.steady and accumulate == 1
            wrapped = DistributedDataParallel(
                learner,
                device_ids=ids,
                find_unused_parameters=not once,
                static_graph=once,
                gradient_as_bucket_view=True,
            )
        optimizer = build_optimizer(learner, recipe)
        scaler = torch.amp.GradScaler(device, enabled=precision == "fp16")
        state = checkpoint.load() if checkpoint is not None else None
        if state is not None:
            learner.load_state_dict(state["moving"], strict=False)
            optimizer.load_state_dict(state["optimizer"])
            scaler.load_state_dict(state["scaler"])
            history = History(state["points"], state["loop_seconds"])
            start = state["step"]
            if world == 1:  # of several ranks only the first one's are known: the next means begin here
                counts = dict(state["counts"])
                sums = {k: torch.tensor(v, device=device) for k, v in state["sums"].items()}
    # It looks at every function that torch is asked for, so it is on only where there is something to find.
    shared = world > 1 and sync_batchnorm and any(isinstance(m, _BatchNorm) for m in learner.modules())
    norms = GlobalBatchNorm() if shared else contextlib.nullcontext()
    every = report_every or max(1, steps // 20)
    began = time.perf_counter()
    wrapped.train()
    noticed = False
    ending = Ending()
    step, images = start, 0

    def tried() -> str:
        parts = f"{images // accumulate} images at a time ({world} x {images} a step, accumulate {accumulate})"
        return f"out of device memory at step {step + 1} of {steps} with train.batch {images * world}: {parts}"

    with contextlib.ExitStack() as held:
        held.callback(ending.close)
        held.callback(feeder.close)
        held.enter_context(memory_told(tried))
        for step in range(start, steps):
            torch.manual_seed((seed * 1_000_003 + step) * max(64, world) + rank)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, step, steps) * group["scale"]
            batch = feeder(step, device)
            images = len(batch.images)
            # Masks have as many labels as they have pixels that count.
            masks = batch.labels is not None and batch.labels.ndim > 2
            even = isinstance(feeder, Feeder) and not masks and feeder.even(accumulate)
            for number in range(accumulate):
                last = number == accumulate - 1
                # Gradients meet those of other ranks once a step.
                alone = wrapped.no_sync() if world > 1 and not last else contextlib.nullcontext()  # type: ignore[operator]
                with alone:
                    with autocast(device, precision), norms, even_labels(even):
                        parts = wrapped(part_of(batch, number, accumulate), step / steps)
                    scaler.scale(parts["loss"] / accumulate).backward()
                for name, value in parts.items():
                    sums[name] = sums.get(name, torch.zeros((), device=device)) + value.detach().float()
                    counts[name] = counts.get(name, 0) + 1
                del parts
            if recipe.clip is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_([p for p in learner.parameters() if p.requires_grad], recipe.clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            done = step + 1
            tells = done % every == 0 or done == steps
            if tells or done % CHECK_STEPS == 0:
                asked = sums if tells else {"loss": sums["loss"]}
                means = _mean_over_ranks({k: v / counts[k] for k, v in asked.items()}, world)
                if not math.isfinite(means["loss"]):
                    raise DivergedError(
                        f"The loss is {means['loss']} at step {done} of {steps}: try a smaller learning rate."
                    )
            if tells:
                history.points.append({"step": float(done), **means})
                sums, counts = {}, {}
                history.loop_seconds += time.perf_counter() - began
                if report is not None:
                    learner.eval()
                    report(Report(done, steps, means, learner))
                    wrapped.train()
                began = time.perf_counter()
            # At any step, not only after a report: at scale an hour lies between two of these.
            leaving = ending.asked or (not noticed and notice is not None and notice())
            if leaving and checkpoint is not None:
                noticed = True
            # Ranks are alike: one that must go does not wait for the first one to hear of it.
            saves = rank == 0 or (ending.asked and sync_batchnorm)
            if (
                checkpoint is not None
                and saves
                and done < steps
                and (leaving or checkpoint.due(done))
                and _finite(learner, sums.get("loss"))
            ):
                checkpoint.save(
                    {
                        "moving": _moving(learner),
                        "optimizer": optimizer.state_dict(),
                        "scaler": scaler.state_dict(),
                        "points": history.points,
                        "sums": {k: float(v) for k, v in sums.items()},
                        "counts": counts,
                        "loop_seconds": history.loop_seconds + time.perf_counter() - began,
                        "step": done,
                    },
                    hurry=noticed,
                )
            if ending.asked:
                break
    learner.eval()
    return history


def _mean_over_ranks(values: dict[str, Tensor], world: int) -> dict[str, float]:
    """Loss parts averaged over all ranks, not rank 0's alone."""
    names = sorted(values)
    stacked = torch.stack([values[n] for n in names])
    if world > 1:
        dist.all_reduce(stacked)
        stacked /= world
    return dict(zip(names, stacked.tolist(), strict=True))
