"""Checkpoints. Nothing else knows Orbax.

A checkpoint holds the variables ('model'), the optimizer's state and step ('optimizer'), and everything that
use of the weights needs ('metadata'): model, class names, preprocessing, configuration, package version.
"""

import contextlib
import dataclasses
import os
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from epsanet_jax.errors import InputError, one_line
from epsanet_jax.models.epsanet import EPSANet
from epsanet_jax.training.config import (
    OptimizerConfig,
    build_model,
    model_config,
)
from epsanet_jax.training.metadata import check_metadata
from epsanet_jax.training.optimizer import make_optimizer
from epsanet_jax.training.paths import resolve
from epsanet_jax.training.state import TrainState

FOLDER = 'checkpoints'


@contextlib.contextmanager
def _one_error():
    """Keeps the reads that fail after the first one from printing tracebacks of their own.

    Orbax reads all arrays at once in an event loop, which the first failure closes. The others then report to
    a closed loop, or are found never to have begun, from other threads and for as long as the process lives.
    """
    before = sys.unraisablehook

    def hook(unraisable):
        if str(unraisable.exc_value) != 'Event loop is closed':
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    except Exception:  # leaves the hook where it is
        warnings.filterwarnings('ignore', r"coroutine '.*' was never awaited", RuntimeWarning)
        raise
    sys.unraisablehook = before


def _best_by(metrics: dict[str, float]) -> float:
    return metrics.get('top1', -1.0)  # a checkpoint between two evaluations has no metrics


class Checkpoints:
    """The checkpoints of a run: the latest few, and the one with the best top-1.

    Saving is asynchronous: `save` returns once the arrays are copied from the devices.

    Args:
        workdir: of the run; checkpoints lie in its folder 'checkpoints'.
        keep: how many of the latest to keep.
    """

    def __init__(self, workdir: epath.Path, keep: int = 2):
        policies = checkpoint_managers
        options = ocp.CheckpointManagerOptions(
            # With best_fn alone, max_to_keep would delete the newest checkpoint if it is not among the best.
            preservation_policy=policies.AnyPreservationPolicy(
                [
                    policies.LatestN(keep),
                    policies.BestN(get_metric_fn=_best_by, n=1),
                ]
            ),
            best_fn=_best_by,
            best_mode='max',
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(workdir / FOLDER, options=options)

    @property
    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, state: TrainState, metadata: dict[str, Any], metrics: dict[str, float] | None) -> None:
        """Saves under the state's step, unless that is saved already.

        Args:
            state: to be saved whole.
            metadata: from `metadata.make_metadata`.
            metrics: of an evaluation at this very step.
        """
        step = int(state.step)
        if step == self.latest_step:
            if not metrics or self._manager.metrics(step) or len(self._manager.all_steps()) < 2:
                return
            self._manager.delete(step)  # to be written anew, with the metrics of an evaluation made late
        args = ocp.args.Composite(
            model=ocp.args.StandardSave(state.variables),
            optimizer=ocp.args.StandardSave({'step': state.step, 'state': state.opt_state}),
            metadata=ocp.args.JsonSave(metadata),
        )
        self._manager.save(step, args=args, metrics=metrics or {})

    def restore(self, abstract: TrainState) -> TrainState:
        """Returns the newest state, placed as `abstract` (ShapeDtypeStructs with shardings) says."""
        optimizer = {'step': abstract.step, 'state': abstract.opt_state}
        args = ocp.args.Composite(
            model=ocp.args.StandardRestore(abstract.variables),
            optimizer=ocp.args.StandardRestore(optimizer),
        )
        try:
            with _one_error():
                saved = self._manager.restore(self.latest_step, args=args)
        except (KeyError, ValueError, OSError) as e:
            folder = self._manager.directory / str(self.latest_step)
            raise InputError(
                f'the checkpoint {folder} is damaged: {one_line(e)}; remove it to go on before'
            ) from e
        return TrainState(
            step=saved['optimizer']['step'],
            params=saved['model']['params'],
            batch_stats=saved['model']['batch_stats'],
            opt_state=saved['optimizer']['state'],
        )

    def close(self) -> None:
        """Waits until everything is written."""
        self._manager.wait_until_finished()
        self._manager.close()


def save_weights(folder: str, variables: Mapping[str, Any], metadata: dict[str, Any]) -> None:
    """Writes a checkpoint of weights alone, as step 0, under a temporary name and renames it.

    Raises:
        InputError: `folder` exists, or cannot be written.
    """
    path = resolve(folder)
    if path.exists():
        raise InputError(f'{folder} exists; choose another name')
    temporary = path.parent / f'{path.name}.tmp-{os.getpid()}'
    args = ocp.args.Composite(model=ocp.args.StandardSave(variables), metadata=ocp.args.JsonSave(metadata))
    try:
        with ocp.CheckpointManager(temporary) as manager:
            manager.save(0, args=args)
            manager.wait_until_finished()
        temporary.rename(path)
    except (OSError, ValueError) as e:
        raise InputError(f'cannot write {folder}: {one_line(e)}') from e
    finally:
        if temporary.exists():
            temporary.rmtree()


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checkpoint.

    Attributes:
        model: the network.
        variables: its parameters and statistics.
        metadata: from `metadata.make_metadata`; those of a run have its 'epoch' and 'lr' too.
        step: at which it was saved.
        momentum: SGD's buffers, a tree like the parameters; None if not asked for, or if there are none.
    """

    model: EPSANet
    variables: dict[str, Any]
    metadata: dict[str, Any]
    step: int
    momentum: Any = None


def load(path: str, step: str = 'latest', with_momentum: bool = False) -> Loaded:
    """Reads a checkpoint for use, onto one device.

    Args:
        path: a workdir, its folder 'checkpoints', or one checkpoint in it.
        step: 'latest', 'best' (by top-1) or a number, where the path leaves the choice.
        with_momentum: whether to read SGD's buffers too, where there are any.

    Raises:
        InputError: there is no such checkpoint, or it is not one of this package.
    """
    folder, number = _locate(resolve(path), step)
    try:
        with _one_error():
            return _load(folder, number, step, with_momentum)
    except InputError:
        raise
    except Exception as e:  # damaged files make Orbax raise anything
        raise InputError(f'no readable checkpoint in {folder}: {one_line(e)}') from e


def _load(folder: epath.Path, number: int | None, step: str, with_momentum: bool) -> Loaded:
    options = ocp.CheckpointManagerOptions(best_fn=_best_by, best_mode='max', create=False)
    with ocp.CheckpointManager(folder, options=options) as manager:
        steps = sorted(manager.all_steps())
        if not steps:
            raise InputError(f'no checkpoint in {folder}')
        if step == 'best' and number is None:
            number = manager.best_step()
        number = steps[-1] if number is None else number
        if number not in steps:
            raise InputError(f'no checkpoint of step {number} in {folder}; there are {steps}')
        place = folder / str(number)
        read = manager.restore(number, args=ocp.args.Composite(metadata=ocp.args.JsonRestore()))
        metadata = check_metadata(read['metadata'], str(place))
        settings = model_config(metadata['model'])
        model = build_model(settings, settings.num_classes)
        size = metadata['preprocessing']['image_size']
        images = jax.ShapeDtypeStruct((1, size, size, 3), model.dtype)
        abstract = _on_one_device(jax.eval_shape(model.init, jax.random.key(0), images))
        items = {'model': ocp.args.StandardRestore(abstract)}
        if with_momentum and metadata['config'] is not None and (place / 'optimizer').exists():
            optimizer = make_optimizer(OptimizerConfig(**metadata['config']['optimizer']), lambda step: 0.0)
            state = jax.eval_shape(optimizer.init, abstract['params'])
            counter = jax.ShapeDtypeStruct((), jnp.int32)
            items['optimizer'] = ocp.args.StandardRestore(_on_one_device({'step': counter, 'state': state}))
        read = manager.restore(number, args=ocp.args.Composite(**items))
    momentum = None
    if 'optimizer' in items:
        momentum = optax.tree_utils.tree_get(read['optimizer']['state'], 'trace', None)
    return Loaded(model, read['model'], metadata, number, momentum)


def _on_one_device(abstract: Any) -> Any:
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), abstract)


def _locate(path: epath.Path, step: str) -> tuple[epath.Path, int | None]:
    """Returns the folder of checkpoints that a path means, and the step if path or `step` name one."""
    if not path.exists():
        raise InputError(f'no such checkpoint: {path}')
    if path.name.isdigit() and (path / 'metadata').exists():
        return path.parent, int(path.name)
    is_number = step.isascii() and step.isdecimal()
    if step not in ('latest', 'best') and not is_number:
        raise InputError(f"step must be 'latest', 'best' or a number, got {step!r}")
    number = int(step) if is_number else None
    if (path / FOLDER).is_dir():
        return path / FOLDER, number
    if not path.is_dir():
        raise InputError(f'{path} is no checkpoint: expected a workdir or a folder in its {FOLDER}/')
    return path, number
