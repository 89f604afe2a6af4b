"""Orbax checkpoints: reads those of runs and of weights onto one device, and writes those of weights.

`training.checkpoint` writes and restores the checkpoints of runs. No other module uses Orbax.
"""

import dataclasses
import logging
import os
import sys
import time
import warnings
from collections.abc import Mapping
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

_TRIES = 10
_LOGGERS = (absl_logging.get_absl_logger(), logging.getLogger('asyncio'))


def save_weights(folder: str, variables: Mapping[str, Any], metadata: dict[str, Any]) -> None:
    """Writes a checkpoint of weights without a run, as step 0, to a temporary folder and renames it.

    Raises:
        InputError: the folder exists or cannot be written.
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


def load(path: str, step: str = 'latest', ema: bool = True, with_checkpoint: bool = False) -> Network:
    """Reads a workdir, its folder 'checkpoints' or a checkpoint in it onto one device; see `weights.load`."""
    folder, number = _locate(resolve(path), step)
    tries = 0
    while True:
        listed, tries = _listing(folder), tries + 1
        try:
            with FirstErrorOnly():
                network, momentum = _restore(folder, number, step, ema, with_checkpoint)
            break
        except InputError:
            if tries == _TRIES or _listing(folder) == listed:
                raise
        except Exception as e:  # for damaged files Orbax raises almost any type of exception
            time.sleep(1)  # deleting takes a moment
            if tries == _TRIES or _listing(folder) == listed:
                raise InputError(f'cannot read the checkpoint in {folder}: {one_line(e)}') from e
    return _with_checkpoint(network, momentum) if with_checkpoint else network


def _listing(folder: epath.Path) -> set[str]:
    """Returns the names in a folder; a run that is training deletes old checkpoints and adds new ones."""
    return {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()


def _restore(
    folder: epath.Path, number: int | None, step: str, ema: bool, with_momentum: bool
) -> tuple[Network, Any]:
    """Returns the network and SGD's momentum, or None for the momentum."""
    options = ocp.CheckpointManagerOptions(best_fn=best_by, best_mode='max', create=False)
    with ocp.CheckpointManager(folder, options=options) as manager:
        steps = sorted(manager.all_steps())
        if not steps:
            raise InputError(f'no checkpoint in {folder}')
        if step == 'best' and number is None:
            number = manager.best_step()
            if best_by(manager.metrics(number) or {}) < 0:
                raise InputError(f'no checkpoint in {folder} is evaluated: choose --step=latest or a number')
        number = steps[-1] if number is None else number
        if number not in steps:
            raise InputError(f'no checkpoint of step {number} in {folder}; existing steps: {steps}')
        place = folder / str(number)
        metadata = manager.restore(number, args=ocp.args.Composite(metadata=ocp.args.JsonRestore()))
        metadata = metadata['metadata']
        config, class_names, preprocessing = read_metadata(metadata, str(place))
        model = build_model(config)
        abstract = _on_one_device(abstract_variables(model))
        weights = 'ema' if ema and (place / 'ema').exists() else 'model'
        source = Source(str(place), number, weights == 'ema', metadata)
        items = {weights: ocp.args.StandardRestore(abstract)}
        read = manager.restore(number, args=ocp.args.Composite(**items))
    usable = source.config is not None and not _no_optimizer(source)
    momentum = None
    if with_momentum and usable and (place / 'optimizer').exists():
        momentum = _read_momentum(place / 'optimizer')
    return Network(model, read[weights], class_names, preprocessing, source), momentum


def _read_momentum(folder: epath.Path) -> Any:
    """Returns the momentum buffers of an optimizer state as a tree like the parameters, or None."""
    with ocp.StandardCheckpointer() as checkpointer:
        stored: Any = checkpointer.metadata(folder)
        abstract = _on_one_device(dict(stored.item_metadata.tree))
        return _find(checkpointer.restore(folder, abstract), 'trace')


def _find(tree: Any, key: str) -> Any:
    """Returns the first subtree under a key, or None."""
    if not isinstance(tree, Mapping | list | tuple):
        return None
    if isinstance(tree, Mapping) and key in tree:
        return tree[key]
    below = tree.values() if isinstance(tree, Mapping) else tree
    return next((found for child in below if (found := _find(child, key)) is not None), None)


def _with_checkpoint(network: Network, momentum: Any) -> Network:
    """Adds the weights under PyTorch's names and the optimizer state."""
    metadata, config, optimizer = network.source.metadata, network.source.config, None
    if momentum is not None and config is not None:
        try:
            group = {k: config['optimizer'][k] for k in ('momentum', 'weight_decay', 'nesterov')}
            group['lr'] = metadata.get('lr', config['optimizer']['lr'])
        except KeyError as e:
            raise InputError(f'{network.source.path}: the configuration lacks optimizer.{e.args[0]}') from e
        optimizer = momentum_to_torch(momentum, network.model, group)
    checkpoint = Checkpoint(
        to_torch(network.variables, network.model),
        epoch=metadata.get('epoch'),
        optimizer=optimizer,
        arch=metadata['model']['name'],
    )
    source = dataclasses.replace(
        network.source, checkpoint=checkpoint, no_optimizer=_no_optimizer(network.source)
    )
    return dataclasses.replace(network, source=source)


def _no_optimizer(source: Source) -> str:
    """Returns why PyTorch's SGD cannot continue from the optimizer state of a run, or ''."""
    if source.config is None:
        return ''
    optimizer = source.config['optimizer']
    if source.averaged:
        return 'it belongs to the weights, not to their moving averages: use --no-ema'
    if optimizer.get('name', 'sgd') != 'sgd':
        return f'it belongs to {optimizer["name"]}'
    if source.config.get('freeze'):
        return f'parameters are frozen ({source.config["freeze"]})'
    if not optimizer.get('decay_norm_and_bias', True):
        return 'BatchNorm and biases have no weight decay'
    return ''


def _on_one_device(abstract: Any) -> Any:
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), abstract)


def _locate(path: epath.Path, step: str) -> tuple[epath.Path, int | None]:
    """Returns the folder of checkpoints of a path, and the step if the path or `step` names one."""
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
        raise InputError(f'{path} is not a checkpoint: expected a workdir or a folder in {CHECKPOINTS}/')
    return path, number


class FirstErrorOnly:
    """Suppresses the messages that follow the first error in Orbax.

    Orbax reads all arrays in one event loop, which the first error closes. The other arrays then fail too, in
    other threads and until the process ends, and log tracebacks.
    """

    def __enter__(self) -> None:
        self._hook = sys.unraisablehook
        sys.unraisablehook = self._without_closed_loops
        for logger in _LOGGERS:
            logger.addFilter(_not_of_orbax)

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if error is not None:  # later errors may follow: keep hook and filters
            warnings.filterwarnings('ignore', r"coroutine '.*' was never awaited", RuntimeWarning)
            return
        sys.unraisablehook = self._hook
        for logger in _LOGGERS:
            logger.removeFilter(_not_of_orbax)

    def _without_closed_loops(self, unraisable: Any) -> None:
        if str(unraisable.exc_value) != 'Event loop is closed':
            self._hook(unraisable)


def _not_of_orbax(record: logging.LogRecord) -> bool:
    uncollected = record.name == 'asyncio' and 'exception was never retrieved' in record.getMessage()
    return not uncollected and '/orbax/' not in record.pathname
