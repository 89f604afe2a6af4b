"""Orbax checkpoints of runs and of weights alone: reading one for use onto one device, and writing weights.

`training.checkpoint` is the other half: a run's own checkpoints. Nothing else knows Orbax.
"""

import dataclasses
import logging
import os
import sys
import warnings
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from etils import epath

from epsanet_jax.convert.files import Checkpoint
from epsanet_jax.convert.momentum import momentum_to_torch
from epsanet_jax.convert.state_dict import to_torch
from epsanet_jax.errors import InputError, one_line
from epsanet_jax.models.epsanet import abstract_variables
from epsanet_jax.models.zoo import build_model
from epsanet_jax.paths import resolve
from epsanet_jax.weights.metadata import read_metadata
from epsanet_jax.weights.network import Network, Source
from epsanet_jax.workdir import CHECKPOINTS, best_by

_LOGGERS = (absl_logging.get_absl_logger(), logging.getLogger('asyncio'))


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


def load(
    path: str,
    step: str = 'latest',
    ema: bool = True,
    with_checkpoint: bool = False,
) -> Network:
    """Reads a checkpoint for use, onto one device.

    Args:
        path: a workdir, its folder 'checkpoints', or one checkpoint in it.
        step: 'latest', 'best' (by top-1) or a number, if the path leaves the choice.
        ema: whether to take the moving averages if the run kept them.
        with_checkpoint: whether to keep the weights under PyTorch's names too, with SGD's momentum.

    Raises:
        InputError: there is no such checkpoint, or it is not one of this package.
    """
    folder, number = _locate(resolve(path), step)
    try:
        with FirstErrorOnly():
            network, momentum = _restore(folder, number, step, ema, with_checkpoint)
    except InputError:
        raise
    except Exception as e:  # damaged files make Orbax raise anything
        raise InputError(f'no readable checkpoint in {folder}: {one_line(e)}') from e
    return _with_checkpoint(network, momentum) if with_checkpoint else network


def _restore(
    folder: epath.Path, number: int | None, step: str, ema: bool, with_momentum: bool
) -> tuple[Network, Any]:
    """Returns the network, and SGD's momentum or None."""
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
        metadata = manager.restore(number, args=ocp.args.Composite(metadata=ocp.args.JsonRestore()))
        metadata = metadata['metadata']
        config, class_names, preprocessing = read_metadata(metadata, str(place))
        model = build_model(config)
        abstract = _on_one_device(abstract_variables(model))
        weights = 'ema' if ema and (place / 'ema').exists() else 'model'
        items = {weights: ocp.args.StandardRestore(abstract)}
        read = manager.restore(number, args=ocp.args.Composite(**items))
    momentum = None
    if with_momentum and _has_momentum(metadata['config']) and (place / 'optimizer').exists():
        momentum = _read_momentum(place / 'optimizer')
    source = Source(str(place), number, weights == 'ema', metadata)
    return Network(model, read[weights], class_names, preprocessing, source), momentum


def _read_momentum(folder: epath.Path) -> Any:
    """Returns the momentum buffers of an optimizer state, a tree like the parameters, or None."""
    with ocp.StandardCheckpointer() as checkpointer:
        stored: Any = checkpointer.metadata(folder)
        abstract = _on_one_device(dict(stored.item_metadata.tree))
        return _find(checkpointer.restore(folder, abstract), 'trace')


def _find(tree: Any, key: str) -> Any:
    """Returns the first subtree with that key, or None."""
    if not isinstance(tree, Mapping | list | tuple):
        return None
    if isinstance(tree, Mapping) and key in tree:
        return tree[key]
    below = tree.values() if isinstance(tree, Mapping) else tree
    return next((found for child in below if (found := _find(child, key)) is not None), None)


def _has_momentum(config: dict[str, Any] | None) -> bool:
    """Whether a run's optimizer keeps what PyTorch's SGD keeps."""
    return config is not None and config['optimizer'].get('name', 'sgd') == 'sgd' and not config.get('freeze')


def _with_checkpoint(network: Network, momentum: Any) -> Network:
    """Adds the weights under PyTorch's names, and the optimizer state that goes with them."""
    metadata, optimizer = network.source.metadata, None
    config, reason = metadata['config'], _no_optimizer(network.source)
    if momentum is not None and config is not None and not reason:
        try:
            group = {k: config['optimizer'][k] for k in ('momentum', 'weight_decay', 'nesterov')}
            group['lr'] = metadata.get('lr', config['optimizer']['lr'])
        except KeyError as e:
            raise InputError(f'{network.source.path}: the configuration has no optimizer.{e.args[0]}') from e
        optimizer = momentum_to_torch(momentum, network.model, group)
    checkpoint = Checkpoint(
        to_torch(network.variables, network.model),
        epoch=metadata.get('epoch'),
        optimizer=optimizer,
        arch=metadata['model']['name'],
    )
    source = dataclasses.replace(network.source, checkpoint=checkpoint, no_optimizer=reason)
    return dataclasses.replace(network, source=source)


def _no_optimizer(source: Source) -> str:
    """Returns why PyTorch's SGD cannot continue from the optimizer state of a run, or ''."""
    if source.config is None:
        return ''
    optimizer = source.config['optimizer']
    if source.averaged:
        return 'it belongs to the weights themselves, not to their moving averages (--no-ema)'
    if optimizer.get('name', 'sgd') != 'sgd':
        return f'it belongs to {optimizer["name"]}'
    if source.config.get('freeze'):
        return f'parameters are frozen ({source.config["freeze"]})'
    if not optimizer.get('decay_norm_and_bias', True):
        return 'weight decay leaves out BatchNorm and biases'
    return ''


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
    if (path / CHECKPOINTS).is_dir():
        return path / CHECKPOINTS, number
    if not path.is_dir():
        raise InputError(f'{path} is not a checkpoint: expected a workdir or a folder in its {CHECKPOINTS}/')
    return path, number


class FirstErrorOnly:
    """Keeps the errors that follow from the first one in Orbax from being printed.

    Orbax handles all arrays at once in an event loop, which the first failure closes. The other arrays then
    fail because the loop is closed, or were never started, or raise errors that nobody collects, in other
    threads and as long as the process lives. Each thread also logs the final error with a traceback.
    """

    def __enter__(self) -> None:
        self._hook = sys.unraisablehook
        sys.unraisablehook = self._without_closed_loops
        for logger in _LOGGERS:
            logger.addFilter(_not_of_orbax)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if error is not None:  # late errors may still come: keep hook and filters
            warnings.filterwarnings('ignore', r"coroutine '.*' was never awaited", RuntimeWarning)
            return
        sys.unraisablehook = self._hook
        for logger in _LOGGERS:
            logger.removeFilter(_not_of_orbax)

    def _without_closed_loops(self, unraisable: Any) -> None:
        if str(unraisable.exc_value) != 'Event loop is closed':
            self._hook(unraisable)


def _not_of_orbax(record: logging.LogRecord) -> bool:
    nobody_asked = record.name == 'asyncio' and 'exception was never retrieved' in record.getMessage()
    return not nobody_asked and '/orbax/' not in record.pathname
