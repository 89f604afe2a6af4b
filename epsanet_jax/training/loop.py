"""The training loop: steps, evaluations and checkpoints of a run."""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from epsanet_jax.data.decode import BadImageError
from epsanet_jax.errors import InputError, Interrupted, TrainingError
from epsanet_jax.training import distributed, inputs, kernel_check, sharding
from epsanet_jax.training.checkpoint import Checkpoints
from epsanet_jax.training.clock import Clock
from epsanet_jax.training.config import CheckpointConfig, Config
from epsanet_jax.training.evaluation import run_evaluation
from epsanet_jax.training.lock import Lock
from epsanet_jax.training.malloc import keep_freed_memory
from epsanet_jax.training.meter import Meter
from epsanet_jax.training.profiler import Profiler
from epsanet_jax.training.report import Report, log
from epsanet_jax.training.result import Result, make_result
from epsanet_jax.training.run import Run, prepare
from epsanet_jax.training.signals import StopSignals
from epsanet_jax.training.state import TrainState, create_state
from epsanet_jax.training.tracing import trace_eval_step, trace_train_step
from epsanet_jax.training.tracker import Tracker
from epsanet_jax.weights import Network
from epsanet_jax.workdir import evaluations, read_metrics


def train(config: Config, workdir: str, init_from: Network | None = None) -> Result:
    """Trains a network, or continues the run in `workdir`; a finished run is not changed.

    Args:
        config: configuration of the run.
        workdir: folder for config.json, metrics.jsonl and checkpoints/.
        init_from: network to start from instead of the file that `config.init_from` names.

    Raises:
        InputError: the configuration, the data or the workdir is invalid, or another process trains in it.
        TrainingError: the loss is not finite, or a checkpoint or the metrics cannot be written.
        Interrupted: the process received SIGTERM, SIGINT or SIGHUP; the last step is saved.
    """
    clock = Clock()
    with StopSignals() as signals:
        run = prepare(config, workdir, init_from)
        with Lock(run.workdir, log) as lock:
            run.write_config()
            with Checkpoints(run.workdir, config.checkpoint.keep) as checkpoints:
                if not _finished(run, checkpoints.latest_step):
                    _fit(run, checkpoints, signals, lock, clock)
                step = checkpoints.latest_step
    distributed.barrier('metrics are written')  # process 0 writes them, all processes read them
    return make_result(run, step or 0, str(workdir))


def _finished(run: Run, latest_step: int | None) -> bool:
    if latest_step is None or latest_step < run.total_steps:
        return False
    return any(line['step'] == latest_step for line in evaluations(read_metrics(run.workdir)))


def _fit(run: Run, checkpoints: Checkpoints, signals: StopSignals, lock: Lock, clock: Clock) -> None:
    """Trains from the newest checkpoint, or from the initial state, to the end."""
    config = run.config
    state, sums = _initial_state(run, checkpoints)
    step = int(state.step)
    report = Report(run.workdir, step, run.total_steps, clock, config.tensorboard, _tracker(run))
    profiler = Profiler(config.profile, run.workdir, step)
    saving = _SaveSchedule(config.checkpoint)
    batches = inputs.train_batches(config, run.train_source, step)
    feed = inputs.Feed(
        batches, run.mesh, lambda: (signals.requested, saving.overdue()), config.gradient_accumulation_steps
    )
    meter = Meter(run, report, feed, sums)

    def save(evaluation: dict[str, float] | None) -> None:
        metadata = {**run.metadata_at(step), 'window': meter.sums}
        report.before_checkpoint()
        signals.unsaved = True  # a late evaluation changes a checkpoint that is saved already
        checkpoints.save(state, metadata, evaluation)
        saving.done()

    for line in (*run.remarks, _opening(run, step)):
        log(line)
    for line in () if run.initial is None else run.initial.report:
        log(f'{config.init_from or "init_from"}: {line}')
    try:
        clock.enter('compiling')
        train_step, eval_step = _compile(run, state)
        clock.enter('steps')
        if run.mesh.devices.flat[0].platform == 'cpu':
            keep_freed_memory()
        while True:
            lock.check()
            stop, overdue = meter.requests or (False, False)
            evaluate_now = _evaluation_due(run, step) and not report.has_evaluation(step) and not stop
            if stop or evaluate_now or overdue or saving.due(step):
                with meter.pause(), clock.during('saving'):
                    _check_finite(state, step)
                    evaluation = None
                    try:
                        if evaluate_now:
                            with clock.during('evaluation'):
                                evaluation = _evaluate(run, eval_step, state, report, signals)
                    except Interrupted:
                        stop = True
                    save(evaluation)
                report.time(step)
            if stop:
                raise Interrupted(f'stopped at step {step} and saved; the same command continues')
            if step >= run.total_steps:
                break
            batch = next(feed)
            signals.unsaved = True
            profiler.before(step)
            state, sums = train_step(state, batch)
            step += 1
            meter.add(step, sums)
            profiler.after(step, sums)
            checkpoints.check()
            report.advance()
            if step % config.log_every_steps == 0 or step == run.total_steps:
                meter.write(step)
        report.flush()
    except BadImageError as e:
        if step and jax.process_count() == 1:  # other processes do not know yet and could not save too
            meter.collect()
            save(None)
        raise InputError(_advice(e, config.data.on_bad, step)) from e
    finally:
        profiler.close()
        meter.close()
        feed.close()
        report.close(step)


def _advice(error: BadImageError, on_bad: str, step: int) -> str:
    fix = 'check the data'
    if on_bad == 'stop':  # the file's name must stay: names identify the data of a run
        fix = 'replace the file by a valid image of the same name, or set --config.data.on_bad=skip'
    place = f'step {step}' if jax.process_count() == 1 else 'its last checkpoint'
    return f'{error}; {fix}; the run continues at {place}'


def _compile(run: Run, state: TrainState) -> tuple[Any, Any]:
    """Compiles both steps before the first one runs, while a signal can still end the process at once."""
    config, model, mesh = run.config, run.model, run.mesh
    if config.check_kernels:
        rows = config.batch_size // config.gradient_accumulation_steps // mesh.size
        images = (rows, *[config.data.image_size] * 2, model.in_channels)
        model = kernel_check.choose_conv(model, images, mesh.local_devices[0], run.workdir, log)
    train_step = trace_train_step(config, model, run.optimizer, mesh, state)
    eval_step = trace_eval_step(config, model, mesh, state.variables, run.eval_batch_size)
    return train_step.lower().compile(), eval_step.lower().compile()


def _initial_state(run: Run, checkpoints: Checkpoints) -> tuple[TrainState, dict[str, float]]:
    """Returns the newest or a new state, on all devices, and the sums of its steps since the last line."""
    sums = {}

    def init(key):
        ema = run.config.ema_decay > 0
        return create_state(run.model, run.optimizer, key, run.config.data.image_size, ema)

    key, placement = jax.random.key(run.config.seed), sharding.replicated(run.mesh)
    if checkpoints.latest_step is None:
        state = jax.jit(init, out_shardings=placement)(key)
        if run.initial is None:
            return state, sums
        state = jax.device_put(run.initial.put_into(state), placement)
    else:
        placed = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=placement)  # noqa: E731
        abstract = jax.tree.map(placed, jax.eval_shape(init, key))
        state, metadata = checkpoints.restore(abstract, log)
        sums = metadata.get('window', {})
    # A computed copy: the train step reuses the state's memory, which restored arrays may share with numpy.
    return jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=placement)(state), sums


def _tracker(run: Run) -> Callable[[list[dict[str, Any]]], Tracker] | None:
    """Returns what starts the tracker of a run, given the lines of metrics.jsonl so far."""
    config, content = run.config, run.metadata['config']
    if not config.tracker:
        return None
    return lambda lines: Tracker(config.tracker, config.tracker_project, run.workdir, content, lines, log)


def _evaluation_due(run: Run, step: int) -> bool:
    return step > 0 and (step % run.eval_every == 0 or step >= run.total_steps)


def _evaluate(
    run: Run, eval_step: Any, state: TrainState, report: Report, signals: StopSignals
) -> dict[str, float]:
    """Evaluates the state's variables and, with the prefix 'ema_', their moving averages."""
    began = time.perf_counter()
    source, data, size = run.eval_source, run.config.data, run.eval_batch_size

    def evaluate(variables: Any, warn: Callable[[str], None]) -> dict[str, float]:
        stop = lambda: signals.requested  # noqa: E731
        return run_evaluation(eval_step, variables, source, data, run.mesh, size, warn, stop)

    means = evaluate(state.variables, report.warn)
    if state.ema is not None:
        averaged = evaluate(state.ema, lambda text: None)  # the same warnings again
        means |= {f'ema_{name}': averaged[name] for name in ('loss', 'top1', 'top5', 'mean_class_accuracy')}
    if not math.isfinite(means['loss']):
        raise TrainingError(f'the loss of the evaluation at step {int(state.step)} is {means["loss"]}')
    report.evaluation(int(state.step), means, time.perf_counter() - began)
    return means


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def _check_finite(state: TrainState, step: int) -> None:
    """Raises TrainingError if the last update, made from a finite loss, left values that are not finite."""
    if not _all_finite(state.variables):
        raise TrainingError(
            f'the loss is not finite at step {step + 1}, because parameters or statistics are not after step '
            f'{step}; lower config.optimizer.lr and start again, or continue from an earlier checkpoint'
        )


def _opening(run: Run, step: int) -> str:
    kind = run.mesh.devices.flat[0].device_kind
    return (
        f'{run.config.model.name} on {run.mesh.size} x {kind}; {len(run.train_source)} training images of '
        f'{len(run.train_source.class_names)} classes, {len(run.eval_source)} images for evaluation; '
        f'{"continuing at" if step else "from"} step {step} to {run.total_steps}; compiling ...'
    )


class _SaveSchedule:
    """When to save between evaluations: after a number of steps or minutes."""

    def __init__(self, config: CheckpointConfig):
        self._config, self._saved = config, time.monotonic()

    def due(self, step: int) -> bool:
        every = self._config.every_steps
        return step > 0 and every > 0 and step % every == 0

    def overdue(self) -> bool:
        """Whether it is time by the clock of process 0, which then asks all processes to save."""
        minutes = (time.monotonic() - self._saved) / 60
        return jax.process_index() == 0 and 0 < self._config.every_minutes <= minutes

    def done(self) -> None:
        self._saved = time.monotonic()
