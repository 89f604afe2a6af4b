"""The run: batches in, steps, evaluations, checkpoints."""

import dataclasses
import math
import time
from typing import Any

import jax
import jax.numpy as jnp

from epsanet_jax.data.decode import BadImageError
from epsanet_jax.errors import InputError, Interrupted, TrainingError
from epsanet_jax.training import distributed, inputs, parallel, steps
from epsanet_jax.training.checkpoint import Checkpoints
from epsanet_jax.training.config import CheckpointConfig, Config, mixing
from epsanet_jax.training.evaluation import evaluate
from epsanet_jax.training.report import Report, describe, read_metrics, say
from epsanet_jax.training.setup import Run, prepare
from epsanet_jax.training.signals import StopSignals
from epsanet_jax.training.state import TrainState, create_state
from epsanet_jax.training.window import Window


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        step: updates made.
        last: the last evaluation, a line of metrics.jsonl.
        best: the evaluation with the highest top-1 (the latest of equals), likewise.
        workdir: of the run.
    """

    step: int
    last: dict[str, Any]
    best: dict[str, Any]
    workdir: str

    def __str__(self) -> str:
        return (
            f'finished at step {self.step}, {describe(self.last)}\n'
            f'best: top-1 {self.best["top1"]:.2%} at step {self.best["step"]}\n'
            f'workdir: {self.workdir} (config.json, metrics.jsonl, checkpoints/)'
        )


def train(config: Config, workdir: str) -> Result:
    """Trains, or continues what lies in `workdir`; a finished run is left as it is.

    Args:
        config: of the run.
        workdir: folder for config.json, metrics.jsonl and checkpoints/.

    Raises:
        InputError: the configuration, the data or the workdir will not do.
        TrainingError: the loss is not finite, or a checkpoint cannot be written.
        Interrupted: SIGTERM or SIGINT came, and what was done is saved.
    """
    with StopSignals() as signals:
        run = prepare(config, workdir)
        run.write_config()
        with Checkpoints(run.workdir, config.checkpoint.keep) as checkpoints:
            if not _finished(run, checkpoints.latest_step):
                _fit(run, checkpoints, signals)
            step = checkpoints.latest_step
    distributed.barrier('metrics are written')  # by process 0, and read by all
    evaluations = _evaluations(run)
    best = max(evaluations, key=lambda line: (line['top1'], line['step']))
    return Result(step or 0, evaluations[-1], best, str(workdir))


def _evaluations(run: Run) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run.workdir) if line['split'] == 'eval']


def _finished(run: Run, latest_step: int | None) -> bool:
    evaluated = any(line['step'] == latest_step for line in _evaluations(run))
    return latest_step is not None and latest_step >= run.total_steps and evaluated


def _fit(run: Run, checkpoints: Checkpoints, signals: StopSignals) -> None:
    """Trains from the newest checkpoint, or from nothing, to the end."""
    config, data = run.config, run.config.data
    settings: dict[str, Any] = {'smoothing': config.label_smoothing, 'mean': data.mean, 'std': data.std}
    microbatches = config.gradient_accumulation_steps
    train_step = steps.make_train_step(
        run.model, run.optimizer, run.mesh, microbatches=microbatches, mixing=mixing(config), **settings
    )
    eval_step = steps.make_eval_step(run.model, run.mesh, **settings)
    state, sums = _initial_state(run, checkpoints)
    step = int(state.step)
    report = Report(run.workdir, step, run.total_steps)
    saving = _SaveSchedule(config.checkpoint)
    batches = inputs.train_batches(config, run.train_source, step)
    feed = inputs.Feed(batches, run.mesh, lambda: (signals.requested, saving.overdue()), microbatches)
    window = Window(run, report, feed, sums)

    def save(evaluation: dict[str, float] | None) -> None:
        metadata = {**run.metadata_at(step), 'window': window.sums}
        report.before_checkpoint()
        signals.unsaved = True  # an evaluation made late replaces its checkpoint
        checkpoints.save(state, metadata, evaluation)
        saving.done()

    report.say(_opening(run, step))
    if run.initial is not None:
        for line in run.initial.said:
            report.say(f'{config.init_from}: {line}')
    try:
        train_step, eval_step = _compile(run, train_step, eval_step, state)
        while True:
            stop, overdue = window.requests or (False, False)
            evaluate_now = _evaluation_due(run, step) and not report.has_evaluation(step) and not stop
            if stop or evaluate_now or overdue or saving.due(step):
                with window.pause():
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
            state, sums = train_step(state, batch)
            step += 1
            window.add(step, sums)
            checkpoints.check()
            report.advance()
            if step % config.log_every_steps == 0 or step == run.total_steps:
                window.write(step)
    except BadImageError as e:
        if step and jax.process_count() == 1:  # costs none of the steps made; others know nothing of it yet
            window.collect()
            save(None)
        mend = 'remove it, or set --config.data.on_bad=skip' if data.on_bad == 'stop' else 'look at the data'
        place = f'step {step}' if jax.process_count() == 1 else 'its last checkpoint'
        raise InputError(f'{e}; {mend}; the run continues at {place}') from e
    finally:
        window.close()
        feed.close()
        report.close()


def _compile(run: Run, train_step: Any, eval_step: Any, state: TrainState) -> tuple[Any, Any]:
    """Compiles both steps before the first one is made, while a signal can still end the process at once."""
    config = run.config
    size, microbatches = config.data.image_size, config.gradient_accumulation_steps
    train_rows = inputs.abstract_batch(config.batch_size, size, microbatches, requests=2)
    eval_rows = inputs.abstract_batch(run.eval_batch_size, size, requests=1, mask=True)
    train_compiled = train_step.lower(state, train_rows).compile()
    return train_compiled, eval_step.lower(state.variables, eval_rows).compile()


def _initial_state(run: Run, checkpoints: Checkpoints) -> tuple[TrainState, dict[str, float]]:
    """Restores the newest state, or initialises one, on all devices of the mesh.

    Returns:
        The state, and the sums of its last steps, of which no line of metrics tells yet.
    """
    sums = {}

    def init(key):
        return create_state(run.model, run.optimizer, key, run.config.data.image_size)

    key, placement = jax.random.key(run.config.seed), parallel.replicated(run.mesh)
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
    began = time.perf_counter()
    means = evaluate(
        eval_step,
        state.variables,
        run.eval_source,
        run.config.data,
        run.mesh,
        run.eval_batch_size,
        report.warn,
        lambda: signals.requested,
    )
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
