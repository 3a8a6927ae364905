"""Trains a model: `python -m nuner_jax.train --config=configs/quickstart.py --workdir=runs/quickstart`.

The only training loop of the project; what is trained, and on what, is the `Task` of the config. Started
again with the same workdir, it goes on where the latest checkpoint is, exactly.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict

from nuner_jax import checkpoint, command, evaluate, export, initialise, sharding
from nuner_jax import config as config_lib
from nuner_jax import workdir as workdir_lib
from nuner_jax.aot.compile import compile_to_run
from nuner_jax.data.prefetch import Prefetch
from nuner_jax.distributed import cluster
from nuner_jax.distributed.preemption import StopRequest
from nuner_jax.errors import run_command
from nuner_jax.fewshot import transfer
from nuner_jax.folders import writing
from nuner_jax.performance import costs
from nuner_jax.performance.device_rates import reference_matrix_rate
from nuner_jax.program import make_program
from nuner_jax.progress import Progress
from nuner_jax.state import TrainState
from nuner_jax.tasks import make_task, run_evaluators
from nuner_jax.tasks.protocol import Task
from nuner_jax.writers import Console, MetricWriter, NoWriter, duration, plot_training

_STOPPED = 75  # exit status of a run that was asked to stop: a scheduler is to start it again (sysexits: EX_TEMPFAIL)


def main(argv: Sequence[str]) -> None:
    """Reads the flags, and trains."""
    config = read_config(argv)
    workdir = command.workdir()
    join(config)
    with cluster.ending_together():
        metrics = train(config, workdir)
    if metrics is None:
        sys.exit(_STOPPED)


def read_config(argv: Sequence[str]) -> ConfigDict:
    """The config of a command line that trains, or looks at training; see `command.read_config`."""
    tasks = ("pretrain", "pretrain_classes", "finetune")
    return command.read_config(argv, tasks=tasks, example="configs/quickstart.py")


def join(config: ConfigDict) -> None:
    """Joins the processes of a run that has several, and says where compiled programs are kept."""
    command.keep_compiled(config.data.cache_dir)
    cluster.join(config)


def train(config: ConfigDict, workdir: Path) -> dict[str, float] | None:
    """Trains the task of a config to its last step, until its patience is at an end, or until it is asked to stop.

    Args:
      config: see `nuner_jax.config`.
      workdir: where checkpoints, metrics and all else goes; if it holds a checkpoint, the run resumes.

    Returns:
      The metrics of the best checkpoint, those of the final evaluation among them; None where it was asked to stop,
      and has saved.

    Raises:
      NunerError: bad input, named before anything is compiled; a loss that is not finite, with its step.
    """
    began = time.time()
    console = Console(jax.process_index() == 0)
    with writing(workdir):
        run = prepare(config, workdir, console)
        stopped_by = loop(run, console)
        if stopped_by:
            console.say(f"{stopped_by}: saved at step {run.checkpoints.latest:,}; the same command resumes there")
            return None
        metrics = run.checkpoints.metrics(run.checkpoints.best) | _final_metrics(run)
        if jax.process_index() == 0:
            _finish(run, metrics, began, console)
    return metrics


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that the loop needs, made and checked before it starts."""

    config: ConfigDict
    workdir: Path
    mesh: jax.sharding.Mesh
    task: Task
    train_step: Callable
    checkpoints: checkpoint.Checkpoints
    state: TrainState
    resumed: bool
    total_steps: int


def prepare(config: ConfigDict, workdir: Path, console: Console) -> Run:
    """Opens the data, places the parameters, and makes the (not yet compiled) train step."""
    workdir_lib.refuse_other_task(config, workdir)
    workdir_lib.make(workdir)
    transfer.check(config)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    console.say(f"devices: {cluster.describe()}, mesh {dict(mesh.shape)}")
    task = make_task(config, mesh, console.say)
    cluster.same_data(task.export_info()["data"])
    for line in task.describe():
        console.say(line)

    program = make_program(config, task, mesh)
    checkpoint.check_space(workdir, program.abstract, config.checkpoint.keep)
    checkpoints = checkpoint.Checkpoints(
        workdir, keep=config.checkpoint.keep, best_metric=task.best_metric, best_is_lower=task.best_is_lower
    )
    start = initialise.start(config, task, program.optimizer, checkpoints, program.abstract)
    console.say(f"initialisation: {start.origin}")
    task.begin(start.state.params, console.say)
    for change in workdir_lib.write_config(config, workdir, start.resumed):
        console.say(f"config changed since the last start: {change}")
    if jax.process_index() == 0:
        task.save_assets(workdir)
    return Run(
        config,
        workdir,
        mesh,
        task,
        program.train_step,
        checkpoints,
        start.state,
        start.resumed,
        program.total_steps,
    )


def loop(run: Run, console: Console) -> str | None:
    """Steps until the last, or until no evaluation is better; returns the signal that ended it before, if one did."""
    config, checkpoints, state, total = run.config, run.checkpoints, run.state, run.total_steps
    evaluators = run.task.evaluators()
    step = int(state.step)
    # What an interrupted run found at the step that it resumes from is not measured again.
    evaluated_at = step if run.resumed and checkpoints.metrics(step) else -1
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        writer = MetricWriter(run.workdir, step if run.resumed else None) if console.active else NoWriter()
        stack.callback(writer.close)
        stack.callback(checkpoints.close)
        batches = Prefetch(functools.partial(global_batch, run), step, total, config.data.prefetch)
        stack.callback(batches.close)
        progress = Progress(
            step=step,
            total=total,
            log_every=config.log_every,
            counts=run.task.counts,
            full_rate_seconds=_full_rate_seconds(run, console),
            waited=lambda: batches.waited,
            last_good=lambda: _last_good(checkpoints),
            writer=writer,
            console=console,
        )
        if step < total:
            compile_to_run(config, run.task, run.mesh, run.train_step, state, console.say)
        console.say(f"training from step {step:,} to {total:,}, {run.task.steps_per_epoch:,.1f} steps an epoch")
        while True:
            # The order matters: a step's numbers, its evaluation, then its checkpoint, which vouches for both.
            last = step >= total
            stopped_by = None if last else stop.reached(step)
            # A notice leaves little time: an evaluation that is due then is what the next start begins with.
            evaluating = bool(evaluators) and not stopped_by and step != evaluated_at
            evaluating = evaluating and (last or step % config.eval.every == 0)
            metrics = {}
            if evaluating:
                progress.flush()
                with progress.paused():
                    metrics = run_evaluators(evaluators, state.params)
                progress.evaluated(step, metrics)
                stopped_by = None if last else stop.reached(step)  # a notice that came meanwhile
            if not stopped_by and (evaluating or step == evaluated_at):
                last = last or _patience_ended(run, step, metrics, console)
            due = last or stopped_by or (step > 0 and step % config.checkpoint.every == 0)
            if due:
                progress.flush()
                with progress.paused():
                    checkpoints.save(state, metrics, run.task.export_info())
            if last or stopped_by:
                break
            batch = batches.get()
            with jax.transfer_guard("disallow"):  # a step that moves data unasked would wait for it every time
                state, step_metrics = run.train_step(state, batch)
            step += 1
            progress.step(step, step_metrics)
        checkpoints.wait()
        return stopped_by


def _full_rate_seconds(run: Run, console: Console) -> float | None:
    """How long a step would take if it were matrix products alone, at their full rate; only the one who tells asks."""
    if not console.active:
        return None
    rate = reference_matrix_rate(run.config.model.dtype)
    operations = costs.total(run.task.costs().values()).operations
    console.say(
        f"a step: {operations:.3g} operations; mfu is the share of {rate.per_second:.3g} a second and device, "
        f"{rate.origin}"
    )
    return operations / (rate.per_second * run.mesh.size)


def global_batch(run: Run, step: int) -> dict[str, jax.Array]:
    """The batch of a step on the devices: each process gathers its own rows."""
    place = sharding.batch_sharding(run.mesh)
    batch = run.task.train_batch(step, lambda rows: sharding.local_rows(place, rows))
    return sharding.to_global(place, batch, run.task.batch_rows)


def _patience_ended(run: Run, step: int, metrics: dict[str, float], console: Console) -> bool:
    """Whether the best checkpoint is as old as the task's patience, and this evaluation (none: saved) no better.

    All of it is read from the checkpoints, so that a resumed run, and every process, decides alike.
    """
    patience, name = run.task.patience, run.task.best_metric
    if patience is None:
        return False
    run.checkpoints.wait()
    best = run.checkpoints.best
    if not best or step - best < patience:  # step 0 is evaluated, but not saved
        return False
    sign = -1 if run.task.best_is_lower else 1
    if metrics and sign * metrics[name] > sign * run.checkpoints.metrics(best)[name]:
        return False
    console.say(f"no better {name} since step {best:,}: training ends at step {step:,}")
    return True


def _last_good(checkpoints: checkpoint.Checkpoints) -> str:
    checkpoints.wait()
    if checkpoints.latest is None:
        return "No checkpoint was saved before it."
    return f"The last good checkpoint is {checkpoints.path(checkpoints.latest)}."


def _final_metrics(run: Run) -> dict[str, float]:
    """What the task measures once, at the end, of the best checkpoint."""
    evaluators = run.task.final_evaluators()
    if not evaluators:
        return {}
    folder = run.checkpoints.path(run.checkpoints.best)
    return evaluate.measure(folder, run.task, evaluators, run.mesh, run.config.mesh.rules)


def _finish(run: Run, metrics: dict[str, float], began: float, console: Console) -> None:
    """Result, plot, export and few-shot table of the best checkpoint; what was made, where, and what to do next."""
    best, info = run.checkpoints.best, run.task.export_info()
    made = {"result": workdir_lib.write_result(run.workdir, run.config, best, metrics, info, began)}
    if run.config.plot:
        made["plot"] = run.workdir / "training.png"
        plot_training(run.workdir, made["plot"])
    made["best checkpoint"] = run.checkpoints.path(best)
    if run.config.export:
        made["Hugging Face folder"] = run.workdir / "export"
        export.export(made["best checkpoint"], made["Hugging Face folder"])
    if transfer.sets(run.config):
        console.say("few-shot transfer, before and after pre-training:")
        transfer.measure(run.config, run.workdir, made["best checkpoint"], console)
    console.say()
    console.say(f"Trained to step {run.checkpoints.latest:,} in {duration(time.time() - began)} (this start).")
    for name, path in made.items():
        console.say(f"  {name + ':':<22}{path}")
    for line in run.task.closing_lines(metrics, run.workdir):
        console.say(line)


if __name__ == "__main__":
    command.define_flags()
    cluster.define_flags()
    run_command(main, config_lib.parse_flags)
