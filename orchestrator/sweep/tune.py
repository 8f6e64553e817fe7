"""Running a search on a cluster: the only module that knows Ray Tune.

Tune starts, stops and restarts trial processes. What is proposed comes from `Study`, what happened lies in `Ledger`:
after any death, these two say where the sweep stands.
"""

from __future__ import annotations

import math
import os
import platform
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Searcher

from orchestrator.data.pool import Mapper, ShardJob, make_here
from orchestrator.errors import FullDiskError, StudyLostError, WorkError
from orchestrator.process import settle
from orchestrator.sweep.capacity import DRIVER, has, nodes_now
from orchestrator.sweep.capacity import concurrency as concurrency_of
from orchestrator.sweep.held import Held
from orchestrator.sweep.ledger import FINAL, Clock, Ledger
from orchestrator.sweep.nodes import GONE_S
from orchestrator.train.job import TrainJob
from orchestrator.train.loop import Reporter
from orchestrator.train.memory import device_lost
from orchestrator.train.notice import draining, watched
from orchestrator.train.work import run_job
from orchestrator.trial.context import SweepContext
from orchestrator.trial.plan import TrialConfig
from orchestrator.trial.repeat import run_repeats
from orchestrator.trial.row import blank_row

if TYPE_CHECKING:
    from orchestrator.sweep.study import Study  # and with it Optuna, which trials' processes have no use for
    from orchestrator.train.group import GroupRunner

RESTARTS = 2  # of a trial whose process died; a trial that fails by itself is not repeated
LOSSES = 20  # of a trial's processes in all, with those whose node died, which was no fault of the trial


class _Bridge(Searcher):
    """Hands Tune the study's proposals.

    With `search.reproducible`, proposal n waits until trials 0 to n - c are done (c: trials at a time) and is made from
    exactly these, told in order: what is proposed then does not depend on which trial finishes first.
    """

    def __init__(
        self, context: SweepContext, study: Study, ledger: Ledger, concurrency: int, clock: Clock, held: Held
    ) -> None:
        super().__init__(metric="val_metric", mode="max")
        self.context, self.study, self.ledger = context, study, ledger
        # A resumed sweep may find fewer nodes. What is proposed must not depend on that.
        self.concurrency, self.clock, self.held = study.keep("concurrency", concurrency), clock, held
        self.open: dict[str, TrialConfig] = {}
        self.finished: dict[int, dict[str, Any]] = {}
        self.told: set[int] = set()
        self.again: list[TrialConfig] = []
        self.count = 0
        self.halted: WorkError | None = None  # why nothing more is proposed in this life of the driver
        for config, told in study.proposed():
            self.count += 1
            row = ledger.read(config.trial_id)
            if told:
                self.told.add(config.number)
            elif row is not None and row["status"] in FINAL:
                self.finished[config.number] = row
            else:
                self.again.append(config)

    @property
    def lag(self) -> int:
        return self.concurrency if self.context.spec.search.reproducible else 0

    def suggest(self, trial_id: str) -> Any:
        try:
            config = self._next()
        except StudyLostError as error:
            self.halted = error  # what runs goes on to its row; the study hears of it when the sweep is continued
            config = self._next()
        if not isinstance(config, TrialConfig):
            return config
        self.open[trial_id] = config
        self.ledger.revive(config.trial_id)
        self.ledger.write(blank_row(self.context.spec, config) | {"started": time.time()})
        self.ledger.publish(now=False)
        return {"trial": config.to_json(), "method": config.cell.method, **config.knobs}

    def _next(self) -> TrialConfig | str | None:
        if self.halted:
            return Searcher.FINISHED if not self.open else None
        if self.again:
            return self.again.pop(0)
        if self.count >= self.study.size or self.spent():
            return Searcher.FINISHED if not self.open else None
        if self.study.needs_results(self.count):
            visible = self.count - self.lag if self.lag else max([*self.finished, *self.told, -1])
            if self.lag and any(n not in self.finished and n not in self.told for n in range(visible + 1)):
                return None
            self._tell(visible)
        config = self.study.ask()
        self.count += 1
        return config

    def _tell(self, up_to: int) -> None:
        for number in sorted(n for n in self.finished if n <= up_to):
            self.study.tell(number, self.finished.pop(number))
            self.told.add(number)

    def spent(self) -> bool:
        """Whether the sweep's time or its device-hours are used up, in this life of its driver or earlier ones."""
        search = self.context.spec.search
        if search.time_budget_s is not None and self.clock.seconds >= search.time_budget_s:
            return True
        if search.device_hours is None and search.budget is None:
            return False
        done = [row["trial_id"] for row in self.ledger.rows() if row["status"] == "complete"]
        going = [config.trial_id for config in self.open.values()]
        return self.held.exhausted(done, going)

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        config = self.open.pop(trial_id, None)
        if config is None:
            return
        if (result or {}).get("full_disk"):
            self.halted = self.halted or FullDiskError(str((result or {})["full_disk"]))
            return  # its row is not final: it is run again when the sweep is continued
        row = self.ledger.read(config.trial_id) or blank_row(self.context.spec, config)
        if row["status"] not in FINAL:
            result = result or {}
            metric = result.get("val_metric", float("nan"))
            spent = float(result.get("time_total_s", 0.0)) * self.context.devices
            row |= {"ended": time.time(), "device_seconds": spent}
            if error:
                row |= {"status": "failed", "reason": f"its process or its node died {LOSSES + 1} times"}
            else:
                share = float(result.get("progress", 0)) / 100
                reason = (
                    f"stopped by {self.context.spec.search.scheduler} at {share:.0%} of its budget, val {metric:.3f}"
                )
                row |= {"status": "pruned", "reason": reason, "val_metric": metric}
        self.ledger.write(row)
        self.ledger.publish(now=False)
        self.finished[config.number] = self.ledger.final(config.trial_id) or row

    def flush(self) -> None:
        """Tells everything that is finished."""
        if isinstance(self.halted, StudyLostError):
            return
        self._tell(max(self.finished, default=-1))

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: study and ledger are on disk already."""

    def restore(self, checkpoint_path: str) -> None:
        """See `save`."""


class _Ticks(tune.Callback):
    """Keeps on disk, while Tune runs, the sweep's clock and what trials hold of the cluster."""

    def __init__(self, clock: Clock, held: Held) -> None:
        self.clock, self.held = clock, held

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        self.clock.save()
        running = [trial.config["trial"] for trial in trials if trial.status == Trial.RUNNING]
        self.held.tick(TrialConfig.from_json(config).trial_id for config in running)


def _trainable(config: dict[str, Any], context: SweepContext) -> None:
    from orchestrator.data.actors import make_on_actors

    settle()
    trial = TrialConfig.from_json(config["trial"])
    ledger = Ledger(context.folder)
    known = ledger.final(trial.trial_id)
    if known is None and _deaths(ledger, trial.trial_id) > RESTARTS:
        reason = f"its process died {RESTARTS + 1} times"
        known = blank_row(context.spec, trial) | {"status": "failed", "reason": reason, "ended": time.time()}
        ledger.write(known)
    if known is not None:
        tune.report({"progress": 100, "val_metric": known["val_metric"]})
        return
    process = {"started": time.time(), "pid": os.getpid(), "node": platform.node(), "node_type": _node_type()}
    ledger.write(blank_row(context.spec, trial) | process)
    best = float("nan")

    def progress(share: float, metric: float | None) -> None:
        nonlocal best
        if metric is not None:
            best = metric
            ledger.mark(trial.trial_id, share, metric)
            tune.report({"progress": share * 100, "val_metric": metric})

    try:
        if context.spec.train.workers > 1:
            runner = _runner_of(context)
            row = run_repeats(context, trial, progress, runner, _made_by(runner))
        else:
            row = run_repeats(context, trial, progress, _run_watched, make_on_actors)
    except FullDiskError as error:
        tune.report({"progress": 0, "val_metric": best, "full_disk": str(error)})
        return
    # A worker that died was a trial's misfortune, and its row already says so; writing it makes it final.
    ledger.write(row)
    if device_lost():
        # No other trial is to run in this process. Tune begins this one again in a new one, which finds its row.
        os._exit(1)
    metric = row["val_metric"]
    tune.report({"progress": 100, "val_metric": metric if math.isfinite(metric) else best})


def _made_by(runner: GroupRunner) -> Mapper:
    """What makes shards for trials whose own process holds no device."""
    from orchestrator.data.actors import make_on_actors

    def make(job: ShardJob, shards: list[int]) -> list[int]:
        if job.unreserved:
            return runner.elsewhere(partial(make_here, job, shards))
        runner.end()  # the actors need the devices that idle workers hold
        return make_on_actors(job, shards)

    return make


def _run_watched(job: TrainJob, folder: Path, report: Reporter | None = None) -> dict[str, Any]:
    """Trains in this process, which saves its state when its node is about to go."""
    with watched([ray.get_runtime_context().get_node_id()]) as notice:
        return run_job(job, folder, report, notice=notice)


_runner: GroupRunner | None = None  # kept by a trial's process from one trial to the next


def _runner_of(context: SweepContext) -> GroupRunner:
    from orchestrator.train.group import GroupRunner

    global _runner
    if _runner is None or _runner.context != context:
        if _runner is not None:
            _runner.end()
        _runner = GroupRunner(context)
    return _runner


def _deaths(ledger: Ledger, trial_id: str) -> int:
    """How often the trial's process died on a node that lived on; notes that it begins once more."""
    before = ledger.live(trial_id, ray.get_runtime_context().get_node_id())
    if len(before) <= RESTARTS:
        return len(before)
    deadline = time.monotonic() + GONE_S
    while True:
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]} - draining()
        deaths = sum(node in alive for node in before)
        # A process that died with its node may be missed before the node is.
        if deaths <= RESTARTS or time.monotonic() > deadline:
            return deaths
        time.sleep(0.5)


def _node_type() -> str:
    """The kind of node that this process is on, as the cluster's file calls it."""
    return str(ray.get_runtime_context().get_node_labels().get("ray.io/node-group", ""))


def scheduler_of(context: SweepContext) -> TrialScheduler:
    """What decides which trials stop early."""
    search = context.spec.search
    if search.scheduler == "asha":
        # stop_last_trials would end a trial at its last report, before its row is written.
        return ASHAScheduler(
            time_attr="progress",
            max_t=100,
            grace_period=max(1, int(search.grace * 100)),
            reduction_factor=search.reduction,
            metric="val_metric",
            mode="max",
            stop_last_trials=False,
        )
    if search.scheduler == "median":
        grace = int(search.grace * 100)
        return MedianStoppingRule(time_attr="progress", grace_period=grace, metric="val_metric", mode="max")
    return FIFOScheduler()


def run_search(context: SweepContext, study: Study, on_event: Any = None) -> bool:
    """Runs the sweep to its end; False if a Ctrl-C broke it off, which Tune takes and comes back as if it were done."""
    train = context.spec.train
    ledger = Ledger(context.folder)
    nodes = nodes_now()
    concurrency = concurrency_of(context.spec, context.device, nodes)
    clock = Clock(context.folder)
    held = Held(context.folder, context.spec, context.device)
    bridge = _Bridge(context, study, ledger, concurrency, clock, held)
    remaining = len(bridge.again) + (0 if bridge.spent() else study.size - bridge.count)
    if remaining > 0:
        alone = train.workers == 1
        # The process of a trial whose workers train elsewhere only waits: it takes no CPU from them.
        resources: dict[str, float] = {"CPU": train.threads} if alone else {"CPU": 0, "memory": 1}
        if alone and context.device == "cuda":
            resources["GPU"] = train.gpus_per_worker
        if not alone and has(DRIVER, context.spec, nodes):
            resources[DRIVER] = 1  # it would take its whole group with it, so it waits where no node is taken away
        trainable = tune.with_resources(tune.with_parameters(_trainable, context=context), resources)
        callbacks = [_Ticks(clock, held), *([on_event] if on_event is not None else [])]
        tuner = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=bridge,
                scheduler=scheduler_of(context),
                num_samples=remaining,
                max_concurrent_trials=concurrency,
                reuse_actors=True,
                trial_dirname_creator=_folder_name,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=tempfile.mkdtemp(prefix="tune-", dir=_scratch(context)),
                failure_config=tune.FailureConfig(max_failures=LOSSES),
                callbacks=callbacks,
                verbose=0,
            ),
        )
        tuner.fit()
    proposed = bridge.count >= study.size or bridge.spent()
    if proposed and not bridge.halted:
        bridge.flush()  # else it goes on later, and a proposal hears of no more results than it would have
    ledger.publish()
    clock.save(force=True)
    held.save(force=True)
    if bridge.halted:
        raise bridge.halted
    return proposed and not bridge.again and not bridge.open


def _scratch(context: SweepContext) -> Path:
    folder = Path(context.folder) / ".tune"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _folder_name(trial: Trial) -> str:
    config = TrialConfig.from_json(trial.config["trial"])
    return f"{config.trial_id}-{config.cell.method}"
