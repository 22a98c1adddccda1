"""The training loop of every model: steps, accumulation, logging, validation, checkpoints, signals."""

from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from pathlib import Path
from signal import Signals

import torch
from torch import nn

from kernels.compile.modes import cache_directory
from kernels.registry import Ops
from launch.runtime import heartbeat
from launch.runtime.lifetime import StopRequest
from launch.runtime.processes import Processes
from launch.training import checkpoint
from launch.training.deepspeed_options import deepspeed_config
from launch.training.dump import RunParts
from launch.training.engine import Engine, compile_mode
from launch.training.evaluations import Evaluations
from launch.training.figures import Figures
from launch.training.gradient_sums import engine_options
from launch.training.incidents import Incidents
from launch.training.loader import Batches, BatchSplit, SampleOrder, Streams, Tensors, micro_batches, to_device
from launch.training.log import Meter, RunLog
from launch.training.optimizer import AdamWEma, NonFiniteError
from launch.training.progress import Progress
from launch.training.restore import agree_on_start, config_changes, load_optimizer_states, load_weights
from launch.training.rollback import Rollback
from launch.training.saving import Saver, report, versions
from launch.training.skips import all_skipped
from launch.training.task import Previews, SampleFigures, Task
from launch.training.trainer_config import TrainerConfig
from launch.training.watch import Watch


class Trainer:
    """Train `task` as `config` says, from the newest checkpoint of its directory or from the start.

    Args:
        validation: batches to validate on every `train.valid_every` steps, or None.
        on_device: the task's batches, made from what lies in the devices' memory, to train on instead; or None.
        previews, sample_figures: samples to look at, and what is measured of samples; each may be None.
        rollback: what an earlier trainer of the run has raised, if it has.
    """

    def __init__(
        self,
        task: Task,
        config: TrainerConfig,
        processes: Processes,
        ops: Ops,
        validation: Batches | None = None,
        on_device: Streams | None = None,
        *,
        previews: Previews | None = None,
        sample_figures: SampleFigures | None = None,
        rollback: Rollback | None = None,
    ):
        self.task, self.config, self.processes, self._ops = task, config, processes, ops
        self._on_device = on_device
        train = config.train
        micro = train.micro_batch_size or max(train.global_batch_size // processes.world_size, 1)
        self.split = BatchSplit(train.global_batch_size, processes.world_size, micro)
        self._rollback = rollback
        self._meter = Meter()
        self._progress = Progress(
            last_step=config.last_step,
            global_batch_size=train.global_batch_size,
            num_samples=len(task.batches),
            processes=processes,
            precision=train.precision,
            flops=config.flops,
            paced=config.paced,
        )
        self._draws: Tensors | None = None
        self.step = 0
        start = agree_on_start(self._checkpoints, train, processes, going_on=rollback is not None)
        self._resumed_from = None if start is None or rollback is not None else start.path
        if start is not None:
            self.step = load_weights(start, task, {"kind": config.kind, **self._identity()})
        redrawn = rollback.redrawn if rollback else start.state.get("redrawn", ()) if start else ()
        self.order = SampleOrder(len(task.batches), train.global_batch_size, train.global_seed, redrawn)
        task.to(processes.device)
        self._compile_mode = self._choose_compile_mode()
        task.compile(self._compile_mode, train.deterministic)
        self.engines = {name: self._make_engine(network) for name, network in task.networks.items()}
        parts = RunParts(config, task, self.engines, self.order, self.split, processes)
        self.incidents = Incidents(parts, self.step, save=self.save, wait=lambda: self.saver.wait())
        self._figures = Figures(task, self.engines, train.watch, averaged=config.optimizer.ema_decay > 0)
        if start is not None:
            load_optimizer_states(start, task.networks, self.engines)
            self._restore_row(start)
            self._print_changes(start)
        if rollback is not None:
            self._progress.time.load_state(rollback.time)
        self._evaluations = Evaluations(
            task,
            self.engines,
            self.split,
            processes,
            train,
            config.optimizer,
            data=validation,
            previews=previews,
            figures=sample_figures,
            last_step=config.last_step,
            compiled=self._compile_mode != "none",
        )
        self._watch = Watch(task)
        self._start_counters = self._read_counters()
        self.saver = Saver(self._checkpoints, self.engines, processes, train)

    def run(self) -> int | None:
        """Train to the last step; a signal ends the run early, after a checkpoint → the signal, or None.

        Raises Rollback, or NonFiniteError with a dump in the run's directory, where steps are skipped or losses spikes
        (see `launch.training.incidents`).
        """
        config, log = self.config, None
        if self.processes.is_main:
            log = RunLog(
                config.directory,
                self.step,
                config.last_step,
                tensorboard=config.train.tensorboard,
                wandb=config.train.wandb,
                run=config.run,
            )
        stop = StopRequest(heartbeat.leave_at_once)
        try:
            self._begin_again(log)
            with stop, closing(self.stream()) as stream:
                return self._loop(stream, log, stop)
        except Rollback as rollback:
            rollback.time = self._progress.time.state_dict()
            stop.pass_on()  # one that came after the last step's agreement
            raise
        finally:
            self.saver.leave()
            with suppress(OSError):  # of the log, which may be what ends the run
                self._report_saved(log)
            if log is not None:
                log.close()

    def _begin_again(self, log: RunLog | None) -> None:
        """Say what the run goes on from, and what samples are measured by; after a rollback keep the former in a
        checkpoint: what is drawn anew stays so over a restart."""
        if log is not None and self._resumed_from is not None:
            log.write_event({"step": self.step, "event": "resumed", "checkpoint": str(self._resumed_from)})
        figures = self._evaluations.figures
        if log is not None and figures is not None and self._rollback is None and self.step < self.config.last_step:
            log.write_event({"step": self.step, "event": "evaluation", **figures.facts})
        if self._rollback is not None:
            if log is not None:
                log.warn(self._rollback.line())
                log.write_event(self._rollback.event())
            self.save()

    def close(self) -> None:
        """Free the memory of networks, optimizers and data; nothing can be trained afterwards."""
        self.saver.close()
        if self._on_device is not None:
            self._on_device.close()
        for engine in self.engines.values():
            engine.close()

    def _loop(self, stream: Iterator[Tensors], log: RunLog | None, stop: StopRequest) -> int | None:
        train, last = self.config.train, self.config.last_step
        self._progress.begin(self.step)
        if self.step >= last:
            if all_skipped({}, self._start_counters):
                raise NonFiniteError(f"all steps of this run up to the last, {last}, were skipped: nothing was trained")
            if log is not None:
                print(f"already at step {self.step} of {last}: nothing to train")
        while self.step < last:
            self.train_step(stream)
            self._report_saved(log)
            if log is not None:
                log.step()
            # All processes agree on a signal to any of them, so that they stop after the same step.
            stopped_by = stop.agree(self.processes.all_reduce_max) if self.step < last else None
            save = stopped_by or self.step == last or self.step % train.ckpt_every == 0
            if self._row_due():
                self._log(log, going_on=not stopped_by)
            paused = self._evaluations.run(self.step, self._progress.position, log)
            if save:
                if log is not None:
                    log.check()
                self.save(wait=bool(stopped_by) or self.step == last)
                self._report_saved(log)
            if save or paused:
                self._progress.start(self.step)  # the next rate is that of training alone
            if stopped_by:
                if log is not None:
                    print(f"stopped by {Signals(stopped_by).name} after step {self.step}; the same command goes on")
                return stopped_by
        return None

    def _row_due(self) -> bool:
        return self.step % self.config.train.log_every == 0 or self.step == self.config.last_step

    def stream(self) -> Generator[Tensors]:
        """This process's micro-batches from the next step to the last, for `train_step`; to be closed."""
        for engine in self.engines.values():
            engine.train()
        return micro_batches(
            self.task.batches if self._on_device is None else self._on_device,
            self.order,
            self.split,
            self.processes.rank,
            first_step=self.step + 1,
            last_step=self.config.last_step,
            num_workers=self.config.run["data"]["num_workers"],
            pin_memory=self.processes.device.type == "cuda",
        )

    def train_step(self, stream: Iterator[Tensors]) -> None:
        """One optimizer step on the next micro-batches of the stream; waits for no device."""
        self.step += 1
        self.incidents.begin_step(self.step)
        self._figures.begin_step(due=self._row_due())
        optimizer = self.config.optimizer
        for engine in self.engines.values():
            engine.optimizer.set_lr(optimizer.lr_at(self.step, self.config.last_step))
        images, seed = self.split.global_batch_size, self.order.seed_of(self.step)
        draws = self._draws = self.task.draw(self.step, images, self.processes.device, self._draws, seed=seed)
        for micro in range(self.split.accumulation):
            with self._progress.data_wait:
                batch = to_device(next(stream), self.processes.device)
            start, stop = self.split.bounds(micro, self.processes.rank)
            stepped: list[str] = []

            def backward(name: str, loss: torch.Tensor, stepped=stepped) -> None:
                self.incidents.add_loss(self.step, name, loss)
                self.engines[name].backward(loss)
                stepped.append(name)

            own_draws = {name: value[start:stop] for name, value in draws.items()}
            logs = self.task.train_step(self.engines, batch, own_draws, self.step, backward)
            self._figures.keep(batch, own_draws)
            self._meter.add(logs, self.split.micro_batch_size / self.split.global_batch_size)
            for name in stepped:
                self.engines[name].step()
        for name in stepped:
            prefix = "" if len(self.engines) == 1 else f"{name}/"
            norm = {f"{prefix}grad_norm": self.engines[name].optimizer.grad_norm}
            self._meter.add(norm, 1 / self.processes.world_size)
        skip_flags = {name: self.engines[name].optimizer.skip_flags for name in stepped}
        self.incidents.end_step(self.step, skip_flags)
        skipped = torch.stack(list(skip_flags.values()))[:, 0].any()
        for engine in self.engines.values():
            engine.restore_statistics(skipped)

    def _log(self, log: RunLog | None, *, going_on: bool = True) -> None:
        means = self._meter.read()
        counters = self._read_counters()
        row = {
            **self._progress.position(self.step),
            **means,
            **self.incidents.figures(self.step),
            **self._figures.read(),
            "lr": self.config.optimizer.lr_at(self.step, self.config.last_step),
            "skipped": int(sum(c["skipped"] for c in counters.values())),
            **self._progress.read(self.step),
        }
        if log is not None:
            log.write_row(row)
            for warning in self._watch.new_warnings(row):
                log.warn(warning)
        if going_on:  # else the next start judges: there may be no time for a rollback
            self.incidents.check(self.step, row, self._start_counters, counters)

    def _read_counters(self) -> dict[str, dict[str, float]]:
        return {name: engine.optimizer.read_counters() for name, engine in self.engines.items()}

    def _identity(self) -> dict:
        """Values that must not change for a step to mean the same images and the same noise."""
        return {
            "global_batch_size": self.split.global_batch_size,
            "seed": self.config.train.global_seed,
            "num_samples": len(self.task.batches),
        }

    def save(self, *, wait: bool = True) -> None:
        """Save the present step (every process takes part, the main one writes); unless `wait`, it may still be written
        when this returns, and `saver.poll` raises what that meets."""
        counters, meters = self._read_counters(), self.processes.all_gather(self._meter.state_dict())
        self.incidents.read(self.step)
        incidents = self.incidents.state_dict()
        state = None
        if self.processes.is_main:
            state = {
                "kind": self.config.kind,
                **self._progress.position(self.step),
                **self._progress.time.state_dict(),
                **self._identity(),
                "counters": counters,
                "task": self.task.state_dict(),
                "ops": self._ops.table(),
                "config": self.config.run,
                "versions": versions(),
                "world_size": self.processes.world_size,
                "since_last_row": {"meters": meters, "skipped_steps": incidents["skipped_steps"]},
                "losses": incidents["losses"],
                **({"redrawn": [list(each) for each in self.order.redrawn]} if self.order.redrawn else {}),
            }
        self.saver.save(state)
        if wait:
            self.saver.wait()
            self.processes.barrier()

    def _report_saved(self, log: RunLog | None) -> None:
        for saved in self.saver.poll():
            if log is not None:
                report(saved, log)

    @property
    def _checkpoints(self) -> Path:
        return self.config.directory / "checkpoints"

    def _restore_row(self, start: checkpoint.Checkpoint) -> None:
        """Restore what belongs to the row of the log that was not yet due; earlier checkpoints have none."""
        self._progress.time.load_state(start.state)
        kept = start.state.get("since_last_row")
        if kept is not None:
            processes = self.processes
            self._meter.load_state_dicts(kept["meters"], processes.rank, processes.world_size, processes.device)
        self.incidents.load_state_dict(start.state)

    def _print_changes(self, start: checkpoint.Checkpoint) -> None:
        if self.processes.is_main:
            for change in config_changes(start.state["config"], self.config.run):
                print(f"resuming with a changed config: {change}")

    def _make_engine(self, network: nn.Module) -> Engine:
        o, train, ds = self.config.optimizer, self.config.train, self.config.deepspeed
        config = deepspeed_config(
            stage=ds.zero_stage,
            bf16=train.precision == "bfloat16",
            micro_batch_size=self.split.micro_batch_size,
            accumulation=self.split.accumulation,
            world_size=self.processes.world_size,
            overrides=engine_options(train, ds),
        )

        def make_optimizer(params, partitioned: bool) -> AdamWEma:
            return AdamWEma(
                params,
                self._ops,
                lr=o.lr,
                betas=(o.beta1, o.beta2),
                eps=o.eps,
                weight_decay=o.weight_decay,
                ema_decay=o.ema_decay,
                max_grad_norm=o.max_grad_norm,
                partitioned=partitioned,
            )

        return Engine(network, make_optimizer, config, self._compile_mode, self._ops, train.deterministic)

    def _choose_compile_mode(self) -> str:
        """The mode that `train.compile` means for this run."""
        train, ds = self.config.train, self.config.deepspeed
        options = ds.merged_overrides(train.precision)
        profiled = options.get("flops_profiler", {}).get("enabled")  # it looks into modules
        asked = "none" if profiled and train.compile == "auto" else train.compile
        mode = compile_mode(asked, ds.zero_stage, self.split.accumulation)
        if mode not in ("none", "aot_eager") and self.processes.is_main:
            print(f"what is compiled is kept in {cache_directory() or 'a temporary folder'} for the next start")
        return mode
