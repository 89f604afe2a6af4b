"""The run: batches in, steps, evaluations, checkpoints."""

import dataclasses
import math
import time
from typing import Any

import jax
import jax.numpy as jnp

from epsanet_jax.data.transforms import BadImageError
from epsanet_jax.errors import InputError, TrainingError
from epsanet_jax.training import inputs, parallel, steps
from epsanet_jax.training.checkpoint import Checkpoints
from epsanet_jax.training.config import CheckpointConfig, Config
from epsanet_jax.training.evaluation import evaluate
from epsanet_jax.training.report import Report, describe, read_metrics
from epsanet_jax.training.setup import Run, prepare
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
        TrainingError: the loss is not finite.
    """
    run = prepare(config, workdir)
    run.write_config()
    checkpoints = Checkpoints(run.workdir, config.checkpoint.keep)
    try:
        if not _finished(run, checkpoints.latest_step):
            _fit(run, checkpoints)
        step = checkpoints.latest_step
    finally:
        checkpoints.close()
    evaluations = _evaluations(run)
    best = max(evaluations, key=lambda line: (line['top1'], line['step']))
    return Result(step or 0, evaluations[-1], best, str(workdir))


def _evaluations(run: Run) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run.workdir) if line['split'] == 'eval']


def _finished(run: Run, latest_step: int | None) -> bool:
    evaluated = any(line['step'] == latest_step for line in _evaluations(run))
    return latest_step is not None and latest_step >= run.total_steps and evaluated


def _fit(run: Run, checkpoints: Checkpoints) -> None:
    """Trains from the newest checkpoint, or from nothing, to the end."""
    config, data = run.config, run.config.data
    settings: dict[str, Any] = {'smoothing': config.label_smoothing, 'mean': data.mean, 'std': data.std}
    train_step = steps.make_train_step(run.model, run.optimizer, run.mesh, **settings)
    eval_step = steps.make_eval_step(run.model, run.mesh, **settings)
    state = _initial_state(run, checkpoints)
    step = int(state.step)
    report = Report(run.workdir, step, run.total_steps)
    feed = inputs.Feed(inputs.train_batches(config, run.train_source, step), run.mesh)
    window = Window(run, report, feed)
    saving = _SaveSchedule(config.checkpoint)
    report.say(_opening(run, step))
    if run.initial is not None:
        for line in run.initial.said:
            report.say(f'{config.init_from}: {line}')
    try:
        while True:
            evaluate_now = _evaluation_due(run, step) and not report.has_evaluation(step)
            if evaluate_now or saving.due(step):
                with window.pause():
                    _check_finite(state, step)
                    evaluation = _evaluate(run, eval_step, state, report) if evaluate_now else None
                    checkpoints.save(state, run.metadata_at(step), evaluation)
                saving.done()
            if step >= run.total_steps:
                break
            state, sums = train_step(state, next(feed))
            step += 1
            window.add(step, sums)
            report.advance()
            if step % config.log_every_steps == 0 or step == run.total_steps:
                window.write(step)
    except BadImageError as e:
        if step:  # a picture that stops the run costs none of the steps made
            window.collect()
            checkpoints.save(state, run.metadata_at(step), None)
        raise InputError(
            f'{e}; remove it, or set --config.data.on_bad=skip; the run continues at step {step}'
        ) from e
    finally:
        window.close()
        feed.close()
        report.close()


def _initial_state(run: Run, checkpoints: Checkpoints) -> TrainState:
    """Restores the newest state, or initialises one, on all devices of the mesh."""

    def init(key):
        return create_state(run.model, run.optimizer, key, run.config.data.image_size)

    key, placement = jax.random.key(run.config.seed), parallel.replicated(run.mesh)
    if checkpoints.latest_step is None:
        state = jax.jit(init, out_shardings=placement)(key)
        if run.initial is None:
            return state
        state = jax.device_put(run.initial.put_into(state), placement)
    else:
        abstract = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=placement), jax.eval_shape(init, key)
        )
        state = checkpoints.restore(abstract)
    # A computed copy: the step is given the state's memory, which must be nobody else's, and arrays that
    # were read may share theirs with numpy.
    return jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=placement)(state)


def _evaluation_due(run: Run, step: int) -> bool:
    return step > 0 and (step % run.eval_every == 0 or step >= run.total_steps)


def _evaluate(run: Run, eval_step: Any, state: TrainState, report: Report) -> dict[str, float]:
    began = time.perf_counter()
    means = evaluate(
        eval_step,
        state.variables,
        run.eval_source,
        run.config.data,
        run.mesh,
        run.eval_batch_size,
        report.say,
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
        by_count = every > 0 and step % every == 0
        minutes = (time.monotonic() - self._saved) / 60
        return step > 0 and (by_count or 0 < self._config.every_minutes <= minutes)

    def done(self) -> None:
        self._saved = time.monotonic()
