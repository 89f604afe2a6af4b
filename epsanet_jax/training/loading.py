"""Checkpoints for use: reading them onto one device, and writing weights alone."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from etils import epath

from epsanet_jax.errors import InputError, one_line
from epsanet_jax.models.epsanet import EPSANet
from epsanet_jax.paths import resolve
from epsanet_jax.training.checkpoint import FOLDER
from epsanet_jax.training.config import (
    OptimizerConfig,
    build_model,
    model_config,
)
from epsanet_jax.training.metadata import check_metadata
from epsanet_jax.training.metrics import best_by
from epsanet_jax.training.one_error import OneError
from epsanet_jax.training.optimizer import make_optimizer


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
        variables: its parameters and statistics, or their moving averages.
        metadata: from `metadata.make_metadata`; those of a run have its 'epoch' and 'lr' too.
        step: at which it was saved.
        momentum: SGD's buffers, a tree like the parameters; None if not asked for, or if there are none.
        averaged: whether the variables are averages.
    """

    model: EPSANet
    variables: dict[str, Any]
    metadata: dict[str, Any]
    step: int
    momentum: Any = None
    averaged: bool = False


def load(path: str, step: str = 'latest', with_momentum: bool = False, ema: bool = True) -> Loaded:
    """Reads a checkpoint for use, onto one device.

    Args:
        path: a workdir, its folder 'checkpoints', or one checkpoint in it.
        step: 'latest', 'best' (by top-1) or a number, where the path leaves the choice.
        with_momentum: whether to read SGD's buffers too, where there are any.
        ema: whether to take the moving averages where the run kept any.

    Raises:
        InputError: there is no such checkpoint, or it is not one of this package.
    """
    folder, number = _locate(resolve(path), step)
    try:
        with OneError():
            return _load(folder, number, step, with_momentum, ema)
    except InputError:
        raise
    except Exception as e:  # damaged files make Orbax raise anything
        raise InputError(f'no readable checkpoint in {folder}: {one_line(e)}') from e


def _load(folder: epath.Path, number: int | None, step: str, with_momentum: bool, ema: bool) -> Loaded:
    options = ocp.CheckpointManagerOptions(best_fn=best_by, best_mode='max', create=False)
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
        weights = 'ema' if ema and (place / 'ema').exists() else 'model'
        items = {weights: ocp.args.StandardRestore(abstract)}
        if with_momentum and _has_momentum(metadata['config']) and (place / 'optimizer').exists():
            optimizer = make_optimizer(OptimizerConfig(**metadata['config']['optimizer']), lambda step: 0.0)
            state = jax.eval_shape(optimizer.init, abstract['params'])
            counter = jax.ShapeDtypeStruct((), jnp.int32)
            items['optimizer'] = ocp.args.StandardRestore(_on_one_device({'step': counter, 'state': state}))
        read = manager.restore(number, args=ocp.args.Composite(**items))
    momentum = None
    if 'optimizer' in items:
        momentum = optax.tree_utils.tree_get(read['optimizer']['state'], 'trace', None)
    return Loaded(model, read[weights], metadata, number, momentum, weights == 'ema')


def _has_momentum(config: dict[str, Any] | None) -> bool:
    """Whether a run's optimizer keeps what PyTorch's SGD keeps."""
    return config is not None and config['optimizer'].get('name', 'sgd') == 'sgd' and not config.get('freeze')


def _on_one_device(abstract: Any) -> Any:
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), abstract)


def _locate(path: epath.Path, step: str) -> tuple[epath.Path, int | None]:
    """Returns the folder of checkpoints that a path means, and the step if path or `step` name one."""
    if not path.exists():
        raise InputError(f'no such checkpoint: {path}')
    is_number = step.isascii() and step.isdecimal()
    if step not in ('latest', 'best') and not is_number:
        raise InputError(f"step must be 'latest', 'best' or a number, got {step!r}")
    number = int(step) if is_number else None
    if path.name.isdigit() and (path / 'metadata').exists():
        if step != 'latest' and number != int(path.name):
            raise InputError(f'{path} is the checkpoint of step {path.name}, not {step}')
        return path.parent, int(path.name)
    if (path / FOLDER).is_dir():
        return path / FOLDER, number
    if not path.is_dir():
        raise InputError(f'{path} is no checkpoint: expected a workdir or a folder in its {FOLDER}/')
    return path, number
