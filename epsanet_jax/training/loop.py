"""The run: batches in, steps, evaluations, checkpoints."""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from epsanet_jax.data.decode import BadImageError
from epsanet_jax.errors import InputError, Interrupted, TrainingError
from epsanet_jax.training import distributed, inputs, sharding
from epsanet_jax.training.checkpoint import Checkpoints
from epsanet_jax.training.config import CheckpointConfig, Config
from epsanet_jax.training.evaluation import run_evaluation
from epsanet_jax.training.malloc import keep_freed_memory
from epsanet_jax.training.meter import Meter
from epsanet_jax.training.profiler import Profiler
from epsanet_jax.training.report import Report, say
from epsanet_jax.training.result import Result, make_result
from epsanet_jax.training.run import Run, prepare
from epsanet_jax.training.signals import StopSignals
from epsanet_jax.training.state import TrainState, create_state
from epsanet_jax.training.tracing import trace_eval_step, trace_train_step
from epsanet_jax.weights import Network
from epsanet_jax.workdir import read_metrics


def train(config: Config, workdir: str, init_from: Network | None = None) -> Result:
    """Trains, or continues what lies in `workdir`; a finished run is left as it is.

    Args:
        config: of the run.
        workdir: folder for config.json, metrics.jsonl and checkpoints/.
        init_from: network to start from instead of the file that `config.init_from` names.

    Raises:
        InputError: the configuration, the data or the workdir will not do.
        TrainingError: the loss is not finite, or a checkpoint or the metrics cannot be written.
        Interrupted: SIGTERM or SIGINT came, and what was done is saved.
    """
    with StopSignals() as signals:
        run = prepare(config, workdir, init_from)
        run.write_config()
        with Checkpoints(run.workdir, config.checkpoint.keep) as checkpoints:
            if not _finished(run, checkpoints.latest_step):
                _fit(run, checkpoints, signals)
            step = checkpoints.latest_step
    distributed.barrier('metrics are written')  # by process 0, and read by all
    return make_result(run, step or 0, str(workdir))


def _evaluations(run: Run) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run.workdir) if line['split'] == 'eval']


def _finished(run: Run, latest_step: int | None) -> bool:
    evaluated = any(line['step'] == latest_step for line in _evaluations(run))
    return latest_step is not None and latest_step >= run.total_steps and evaluated


def _fit(run: Run, checkpoints: Checkpoints, signals: StopSignals) -> None:
    """Trains from the newest checkpoint, or from nothing, to the end."""
    config = run.config
    state, sums = _initial_state(run, checkpoints)
    step = int(state.step)
    report = Report(run.workdir, step, run.total_steps, config.tensorboard)
    profiler = Profiler(config.profile, run.workdir, step, report.say)
    saving = _SaveSchedule(config.checkpoint)
    batches = inputs.train_batches(config, run.train_source, step)
    feed = inputs.Feed(
        batches, run.mesh, lambda: (signals.requested, saving.overdue()), config.gradient_accumulation_steps
    )
    meter = Meter(run, report, feed, sums)

    def save(evaluation: dict[str, float] | None) -> None:
        metadata = {**run.metadata_at(step), 'window': meter.sums}
        report.before_checkpoint()
        signals.unsaved = True  # an evaluation made late replaces its checkpoint
        checkpoints.save(state, metadata, evaluation)
        saving.done()

    for line in inputs.skipped_lines(run.train_source, run.eval_source):
        report.say(line)
    report.say(_opening(run, step))
    if run.initial is not None:
        for line in run.initial.report:
            report.say(f'{config.init_from or "init_from"}: {line}')
    try:
        train_step, eval_step = _compile(run, state)
        if run.mesh.devices.flat[0].platform == 'cpu':
            keep_freed_memory()
        while True:
            stop, overdue = meter.requests or (False, False)
            evaluate_now = _evaluation_due(run, step) and not report.has_evaluation(step) and not stop
            if stop or evaluate_now or overdue or saving.due(step):
                with meter.pause():
                    _check_finite(state, step)
                    try:
                        evaluation = (
                            _evaluate(run, eval_step, state, report, signals) if evaluate_now else None
                        )
                    except Interrupted:
                        stop, evaluation = True, None
                    save(evaluation)
            if stop:
                raise Interrupted(f'stopped at step {step}, which is saved; the same command continues')
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
        if step and jax.process_count() == 1:  # costs none of the steps made; others know nothing of it yet
            meter.collect()
            save(None)
        raise InputError(_advice(e, config.data.on_bad, step)) from e
    finally:
        profiler.close()
        meter.close()
        feed.close()
        report.close()


def _advice(error: BadImageError, on_bad: str, step: int) -> str:
    mend = 'look at the data'
    if on_bad == 'stop':  # a name more or less would be another run
        mend = 'mend it under its name, or set --config.data.on_bad=skip'
    place = f'step {step}' if jax.process_count() == 1 else 'its last checkpoint'
    return f'{error}; {mend}; the run continues at {place}'


def _compile(run: Run, state: TrainState) -> tuple[Any, Any]:
    """Compiles both steps before the first one is made, while a signal can still end the process at once."""
    train_step = trace_train_step(run.config, run.model, run.optimizer, run.mesh, state)
    eval_step = trace_eval_step(run.config, run.model, run.mesh, state.variables, run.eval_batch_size)
    return train_step.lower().compile(), eval_step.lower().compile()


def _initial_state(run: Run, checkpoints: Checkpoints) -> tuple[TrainState, dict[str, float]]:
    """Restores the newest state, or initialises one, on all devices of the mesh.

    Returns:
        The state, and the sums of its last steps, of which no line of metrics tells yet.
    """
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
        abstract = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=placement), jax.eval_shape(init, key)
        )
        state, metadata = checkpoints.restore(abstract, say)
        sums = metadata.get('window', {})
    # A computed copy: the step is given the state's memory, which must be nobody else's, and arrays that
    # were read may share theirs with numpy.
    return jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=placement)(state), sums


def _evaluation_due(run: Run, step: int) -> bool:
    return step > 0 and (step % run.eval_every == 0 or step >= run.total_steps)


def _evaluate(
    run: Run, eval_step: Any, state: TrainState, report: Report, signals: StopSignals
) -> dict[str, float]:
    """Evaluates the state's variables and, under names with 'ema_', their averages."""
    began = time.perf_counter()

    def evaluate_these(variables: Any, warn: Callable[[str], None] = report.warn) -> dict[str, float]:
        return run_evaluation(
            eval_step,
            variables,
            run.eval_source,
            run.config.data,
            run.mesh,
            run.eval_batch_size,
            warn,
            lambda: signals.requested,
        )

    means = evaluate_these(state.variables)
    if state.ema is not None:
        averaged = evaluate_these(state.ema, warn=lambda text: None)  # it is said already
        means |= {f'ema_{name}': averaged[name] for name in ('loss', 'top1', 'top5')}
    if not math.isfinite(means['loss']):
        raise TrainingError(f'the loss of the evaluation at step {int(state.step)} is {means["loss"]}')
    report.evaluation(int(state.step), means, time.perf_counter() - began)
    return means


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def _check_finite(state: TrainState, step: int) -> None:
    """Raises TrainingError if the update of the last step, whose own loss was in order, blew up."""
    if not _all_finite(state.variables):
        raise TrainingError(
            f'the loss is not finite at step {step + 1}: parameters or statistics are not after step {step}; '
            'lower config.optimizer.lr and start anew, or go on from an earlier checkpoint'
        )


def _opening(run: Run, step: int) -> str:
    kind = run.mesh.devices.flat[0].device_kind
    return (
        f'{run.config.model.name} on {run.mesh.size} x {kind}; {len(run.train_source)} pictures of '
        f'{len(run.train_source.class_names)} classes to train on, {len(run.eval_source)} to evaluate on; '
        f'{"continuing at" if step else "from"} step {step} to {run.total_steps}; compiling ...'
    )


class _SaveSchedule:
    """When to save between evaluations: by count of steps and by time."""

    def __init__(self, config: CheckpointConfig):
        self._config, self._saved = config, time.monotonic()

    def due(self, step: int) -> bool:
        every = self._config.every_steps
        return step > 0 and every > 0 and step % every == 0

    def overdue(self) -> bool:
        """Whether it is time, by the clock of process 0, which asks the others."""
        minutes = (time.monotonic() - self._saved) / 60
        return jax.process_index() == 0 and 0 < self._config.every_minutes <= minutes

    def done(self) -> None:
        self._saved = time.monotonic()
