"""The training loop: steps, evaluation, recorded windows, a re-planning and choices on the way, checkpoints, a stop on SIGTERM.

It receives a model and never imports one. Every decision is the same on every rank: it follows from the step number, from reduced numbers,
or from one broadcast record.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from crossdock import atomic
from crossdock.errors import BadConfig, BadData, CrossdockError, Preempted
from crossdock.placement.costs.cost import Workload
from crossdock.placement.records.plan import Plan
from crossdock.placement.strategies.strategy import Strategy
from crossdock.runtime.adaptation.adaptation import Adaptation, StepNumbers
from crossdock.runtime.adaptation.calibrate import Calibrated, calibrate
from crossdock.runtime.adaptation.capture import Capture
from crossdock.runtime.adaptation.choice import Adaptable, strategies_of
from crossdock.runtime.adaptation.migrate import RoutedLayer, migrate
from crossdock.runtime.adaptation.replan import decide, topology_of, window_steps, workload_of
from crossdock.runtime.adaptation.windows import Measured, Window
from crossdock.runtime.checkpoints import checkpoint
from crossdock.runtime.checkpoints.checkpoint import RunState
from crossdock.runtime.checkpoints.saver import Saved, Saver
from crossdock.runtime.data import DataState
from crossdock.runtime.optimization.deepspeed_engine import DeepSpeedEngine
from crossdock.runtime.optimization.engine import Engine
from crossdock.runtime.optimization.engines import AnyEngine
from crossdock.runtime.profiler import Profiler
from crossdock.runtime.training.homing import Homing, Movable
from crossdock.runtime.training.metrics import console_line
from crossdock.runtime.training.result import Speeds, TrainResult, WindowReport, median, report_window
from crossdock.runtime.training.steps import Stepper
from crossdock.runtime.training.training import Training
from crossdock.runtime.transport import collectives


def train(training: Training) -> TrainResult:
    """Train to the target step and write `result.json`; every rank calls it and gets the result.

    Raises `Preempted` after SIGTERM with the state saved, `NonFiniteLoss`, `BadConfig`, `BadData`, `IoFailure`, `PeerLost`, and on resuming
    `MissingInput` and `BadCheckpoint`. Rank 0 writes `result.json` for these as well.
    """
    run = _Run(training)
    try:
        return run.run()
    except CrossdockError as error:
        status = "preempted" if isinstance(error, Preempted) else "failed"
        run.write_result(run.result(status, error.exit_code, str(error)))
        run.event("preempted" if isinstance(error, Preempted) else "failed", message=str(error), exit_code=error.exit_code)
        raise


class _Run:
    """The state of a run between steps; mutable."""

    def __init__(self, training: Training) -> None:
        config, mesh = training.config, training.mesh
        self.training, self.config, self.mesh, self.directory = training, config, mesh, training.directory
        self.layers: Sequence[RoutedLayer] = tuple(getattr(training.model, "moe_layers", ()))
        self.windows = window_steps(config.steps, training.capture.steps, training.replan) if self.layers else None
        if training.replan.at_step is not None and not self.layers:
            raise BadConfig("replan.at_step is set, and the model has no experts to move; choose a block with experts")
        self.topology = topology_of(mesh, training.topology) if self.layers else None
        self.engine = _engine(training)
        self.saver = Saver(training.directory.checkpoints, self.engine, mesh, training.checkpoint)
        homing = None
        if training.forecast is not None and self.topology is not None:
            homing = Homing(training.forecast, cast(Movable, training.model), mesh, self.topology)
        self.stepper = Stepper(training.model, self.engine, training.corpus, training.seq_len, config, mesh, homing)
        self.state, self.step, self.stop_asked = DataState(), 0, False
        self.resumed_at: int | None = None
        self.window: Window | None = None
        self.before: tuple[Measured, Calibrated] | None = None
        self.reports: dict[str, WindowReport] = {}
        self.speeds = Speeds()
        self.loss: float | None = None
        self.eval_loss: float | None = None
        self.moves: int | None = None
        self.profiler = Profiler(training.profile.until(config.steps), mesh, self.directory.path)
        self.adaptation: Adaptation | None = None
        if self.topology is not None and training.adapt.mode_asked != "off":
            model, tokens = cast(Adaptable, training.model), self.stepper.tokens_per_rank
            self.adaptation = Adaptation(
                training.adapt,
                model,
                mesh,
                self.topology,
                tokens,
                training.seq_len,
                config.accumulate,
                self.directory.choices,
                self.event,
                training.progress.table,
            )

    # ---- the run -------------------------------------------------------------------------------------------------

    def run(self) -> TrainResult:
        self._clear_the_directory()
        self._announce()
        if self.training.resume:
            self._resume()
        with _on_sigterm(self._ask_to_stop):
            self._window_edges()
            while self.step < self.config.steps:
                if self.adaptation is not None and self.engine.plan is not None:
                    self.adaptation.before(self.step, self.engine.plan, is_busy=self.window is not None)
                stop = self._train_step()
                self._window_edges()  # before anything is saved: a checkpoint of the step that re-plans holds the new plan
                self._tell_saved(self.saver.poll())
                if stop and self.step < self.config.steps:
                    folder = self._save(at_once=True)
                    self._tell_profiled(self.profiler.close())
                    raise Preempted(f"asked to stop after step {self.step} of {self.config.steps}; the state is saved in {folder}")
                if self._due(self.training.checkpoint.every) and self.step < self.config.steps:
                    self._save()
            if self.training.checkpoint.at_end and self.step != self.resumed_at:  # there it is whole already: never touch it again
                self._save(at_once=True)
            self._tell_saved(self.saver.finish())
        result = self.result("done", 0)
        self.write_result(result)
        self.event("finished", step=self.step, loss=self.loss, eval_loss=self.eval_loss)
        return result

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _clear_the_directory(self) -> None:
        """Take away what an earlier run in the same directory left; raises `BadConfig` where that would be its checkpoints."""
        if not self.training.resume and collectives.broadcast_object(checkpoint.finished(self.directory.checkpoints), self.mesh):
            raise BadConfig(
                f"{self.directory.path} holds checkpoints of an earlier run; resume that run, set run.dir to another folder, or remove them"
            )
        if self.mesh.rank == 0:
            self.directory.start_anew(keep_history=self.training.resume)

    def _announce(self) -> None:
        ranks = collectives.gather_objects((self.mesh.rank, os.getpid(), self.mesh.node_of_rank[self.mesh.rank]), self.mesh)
        for rank, pid, node in ranks or ():
            self.event("rank_started", rank=rank, pid=pid, node=node)
        self.event("transport_chosen", **self.mesh.carrier.as_event())
        if self.mesh.rank == 0 and self.engine.plan is not None:
            self.engine.plan.save(self.directory.plan)
            self.event("plan_applied", step=0, method=self.engine.plan.method, plan_hash=self.engine.plan.digest, moves=0, bytes=0)

    def event(self, event: str, **details: Any) -> None:
        """Write an event and tell the progress of it; on rank 0 alone."""
        if self.mesh.rank == 0:
            self.directory.write_event(event, **details)
            self.training.progress.event(event, details)

    def write_result(self, result: TrainResult) -> None:
        """Write `result.json`; on rank 0 alone."""
        if self.mesh.rank == 0:
            self.directory.write_result(result.as_json())

    def result(self, status: str, exit_code: int, message: str = "") -> TrainResult:
        """The result as things stand."""
        return TrainResult(
            status=status,
            exit_code=exit_code,
            reached_step=self.step,
            target_step=self.config.steps,
            world_size=self.mesh.world_size,
            loss=self.loss,
            eval_loss=self.eval_loss,
            tokens_per_s=median(self.speeds.tokens_per_s),
            step_s=median(self.speeds.step_s),
            exposed_s=median(self.speeds.exposed_s),
            window=self.reports.get("after"),
            before=self.reports.get("before"),
            plan=self.engine.plan,
            message=message,
            moves=self.moves,
        )

    # ---- a step --------------------------------------------------------------------------------------------------

    def _train_step(self) -> bool:
        """One optimizer step and what belongs to it; says whether any rank was asked to stop."""
        config = self.config
        self.profiler.before(self.step + 1)
        looking = None if self.adaptation is None else self.adaptation.window
        windows = [window for window in (self.window, looking) if window is not None]
        step = self.stepper.run(self.step, self.state, [window.capture for window in windows], self.stop_asked)
        self.state = self.stepper.after(self.state)
        self.step += 1
        self._tell_profiled(self.profiler.after(self.step, step.flights))
        self.loss = step.loss
        self.speeds.tokens_per_s.append(step.metrics["tokens_per_s"])
        self.speeds.step_s.append(step.step_s)
        self.speeds.exposed_s.append(step.exposed_s)
        if self.window is not None:
            self.window.add(step.flights, step.bytes_by_class, step.step_s, step.exposed_s)
        if self.adaptation is not None:
            self.adaptation.after(StepNumbers(step.flights, step.bytes_by_class, step.step_s, step.exposed_s, step.load_LE))
        row = step.metrics
        if config.eval_batches and (self.step == config.steps or self._due(config.eval_every)):
            self.eval_loss = self.stepper.evaluate()
            row = {**row, "eval_loss": self.eval_loss}
        if self.mesh.rank == 0:
            self.directory.write_metrics(row)
            self.training.progress.step(row, console_line(row, config.steps))
        return step.stop

    def _tell_profiled(self, written: Path | None) -> None:
        if written is not None:
            self.event("profiled", step=self.step, path=str(written), asked_step=self.training.profile.last_step)

    # ---- windows and re-planning ---------------------------------------------------------------------------------

    def _window_edges(self) -> None:
        """Begin, switch or end the recorded windows, as the step number says; called between steps."""
        if self.windows is None:
            return
        if self.step == self.windows.end and self.window is not None:
            self._close_after()
        if self.step == self.windows.boundary and self.step < self.windows.end:
            self._cross_boundary()
        elif self.windows.begin <= self.step < self.windows.end and self.window is None:
            self.window = self._new_window()  # later than it would begin where a run was resumed inside the window

    def _workload(self) -> Workload:
        return workload_of(self.layers[0], self.stepper.tokens_per_rank, self.config.accumulate)

    def _strategies(self) -> tuple[Strategy, ...]:
        return strategies_of(cast(Adaptable, self.training.model), self.training.seq_len)

    def _new_window(self) -> Window:
        plan = self.engine.plan
        assert plan is not None
        source = f"training steps from {self.step + 1} on {self.training.corpus.source}"
        return Window(Capture(plan.num_layers, plan.num_experts, self.training.capture.weights, source))

    def _cross_boundary(self) -> None:
        """End the first window, re-plan where that is asked for, begin the second."""
        plan, topology, replan = self.engine.plan, self.topology, self.training.replan
        assert plan is not None
        assert topology is not None
        window = self.window
        measured = window.close(self.mesh) if window is not None else None
        calibrated = None
        if measured is not None:
            calibrated = calibrate(measured, plan, topology, self._workload(), self._strategies())
            calibrated.topology.save(self.directory.topology)  # with the workload, what `crossdock plan` needs to try other plans
            atomic.write_json(self.directory.workload, calibrated.workload.to_mapping())
            self.before = (measured, calibrated)
            self.reports["before"] = report_window(measured, plan, topology, calibrated, None, self._strategies(), self.mesh)
        if replan.at_step is not None and window is not None:
            if measured is not None:
                measured.trace.save(self.directory.trace)
            steps_left = self.config.steps - self.step
            found = decide(replan, measured, calibrated, plan, self._strategies(), steps_left, self.mesh, self.config.seed)
            self.event("replan", step=self.step, method=replan.method, objective=replan.objective, **found.as_event())
            if found.is_accepted:
                self._apply(found.plan)
            else:
                self.moves = 0
        self.window = self._new_window()

    def _apply(self, plan: Plan) -> None:
        begin_s = time.perf_counter()
        assert isinstance(self.engine, Engine), "experts move under the native engine alone"
        done = migrate(self.engine, self.layers, plan, self.mesh)
        self.mesh.ledger.take()
        self.moves = done.moves
        if self.mesh.rank == 0:
            plan.save(self.directory.plan)
        seconds = time.perf_counter() - begin_s
        self.event(
            "plan_applied", step=self.step, method=plan.method, plan_hash=plan.digest, moves=done.moves, bytes=done.bytes, seconds=seconds
        )

    def _close_after(self) -> None:
        plan, topology = self.engine.plan, self.topology
        assert self.window is not None
        assert plan is not None
        assert topology is not None
        measured = self.window.close(self.mesh)
        self.window = None
        if measured is None:
            return
        measured.trace.save(self.directory.trace)
        earlier = self.before[0] if self.before is not None else None
        calibrated = (
            self.before[1] if self.before is not None else calibrate(measured, plan, topology, self._workload(), self._strategies())
        )
        self.reports["after"] = report = report_window(measured, plan, topology, calibrated, earlier, self._strategies(), self.mesh)
        self.event("window_measured", step=self.step, **report.as_json())

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def _save(self, at_once: bool = False) -> Path | None:
        """Save, or begin to, after whatever is still being written; the folder, where it is there already: always with `at_once`."""
        self._tell_saved(self.saver.finish())
        saved = self.saver.save(RunState(self.step, self.state, self.config.seed, self.training.corpus.digest))
        if saved is None and at_once:
            saved = self.saver.finish()
        self._tell_saved(saved)
        return None if saved is None else saved.folder

    def _tell_saved(self, saved: Saved | None) -> None:
        if saved is not None:
            times = {"stall_s": saved.stall_s, "write_s": saved.write_s, "seconds": saved.seconds}
            self.event("checkpoint_saved", step=saved.step, path=str(saved.folder), **times)

    def _resume(self) -> None:
        folder, manifest, passed_over = checkpoint.latest(self.directory.checkpoints, self.mesh)
        for problem in passed_over:
            self.event("checkpoint_passed_over", message=problem)
        saved_plan, plan = manifest.placement(), self.engine.plan
        at_step = self.training.replan.at_step
        is_replanned = at_step is not None and manifest.step >= at_step  # then the checkpoint's plan is the one that was solved on the way
        if saved_plan is not None and plan is not None and (is_replanned or not self.training.keep_plan):
            same_devices = saved_plan.slots_LRS.shape[:2] == plan.slots_LRS.shape[:2] and saved_plan.num_experts == plan.num_experts
            can_move = isinstance(self.engine, Engine)  # under another engine the run's own plan goes on: checkpoints fit any
            if same_devices and saved_plan.digest != plan.digest and can_move:
                self._apply(saved_plan)
                self.moves = None
        state = checkpoint.restore(folder, manifest, self.engine).state
        has_read = state.corpus_digest != ""  # an imported model has not
        if has_read and (state.seed != self.config.seed or state.corpus_digest != self.training.corpus.digest):
            raise BadData(
                f"{folder} was made with seed {state.seed} on data {state.corpus_digest[:12]}, and this run seed {self.config.seed} and "
                f"data {self.training.corpus.digest[:12]}; resume with the same seed and files, or start a new run.dir"
            )
        self.step, self.state, self.resumed_at = state.step, state.data, state.step
        if self.mesh.rank == 0:
            self.directory.forget_after(self.step)
        self.event("resumed", step=self.step, path=str(folder))
        if self.adaptation is not None:
            self.adaptation.resume(self.step)

    def _ask_to_stop(self) -> None:
        self.stop_asked = True


def _engine(training: Training) -> AnyEngine:
    """The engine that `training` asks for."""
    model, mesh, plan, config = training.model, training.mesh, training.plan, training.config.optimizer
    if training.engine == "deepspeed":
        return DeepSpeedEngine(model, mesh, plan, config, training.deepspeed)
    return Engine(model, mesh, plan, config)


@contextlib.contextmanager
def _on_sigterm(call: Callable[[], None]) -> Iterator[None]:
    """While the block runs, SIGTERM calls `call`; only the main thread can have it so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda _signal, _frame: call())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
