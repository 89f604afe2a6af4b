"""Converts SGD's momentum between PyTorch's optimizer state and the trace of optax."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from epsanet_jax.convert.contents import strip_prefix
from epsanet_jax.convert.state_dict import Table, name_table, read_tensors, to_torch_layout
from epsanet_jax.errors import InputError, some
from epsanet_jax.models.epsanet import EPSANet


@dataclasses.dataclass(frozen=True)
class SGDState:
    """The checked content of `torch.optim.SGD(...).state_dict()` with one parameter group.

    Attributes:
        lr, momentum, weight_decay, nesterov: the settings of SGD.
        numbers: the numbers of the parameters, in order.
        buffers: number -> momentum buffer, without the parameters that have none.
    """

    lr: float
    momentum: float
    weight_decay: float
    nesterov: bool
    numbers: tuple[int, ...]
    buffers: Mapping[int, Any]


def parse_sgd(optimizer: Any) -> SGDState:
    """Returns the checked state dict of PyTorch's SGD with one parameter group.

    Raises:
        InputError: the optimizer is not SGD, has several groups, or has a setting that is not supported here.
    """
    try:
        groups, state = optimizer['param_groups'], optimizer['state']
        if len(groups) != 1:
            raise InputError(f'the optimizer has {len(groups)} groups of parameters, expected one')
        group = groups[0]
        for field, expected in (('dampening', 0), ('maximize', False)):
            if group.get(field, expected) != expected:
                raise InputError(
                    f'the optimizer has {field} {group[field]}, which is not supported, expected {expected}'
                )
        entries = {number: dict(entry) for number, entry in state.items() if entry}
        other = sorted({str(key) for entry in entries.values() for key in entry} - {'momentum_buffer'})
        if other:
            raise InputError(f'the optimizer is not SGD: its state keeps {", ".join(other)}')
        parsed = SGDState(
            lr=float(group['lr']),
            momentum=float(group['momentum']),
            weight_decay=float(group['weight_decay']),
            nesterov=bool(group.get('nesterov', False)),
            numbers=tuple(int(number) for number in group['params']),
            buffers={n: e['momentum_buffer'] for n, e in entries.items() if e['momentum_buffer'] is not None},
        )
    except InputError:
        raise
    except Exception as e:  # the content of a file may be anything
        raise InputError(f'the optimizer state is not that of SGD: {type(e).__name__}: {e}') from e
    settings = (parsed.lr, parsed.momentum, parsed.weight_decay)
    if not all(math.isfinite(value) and value >= 0 for value in settings):
        raise InputError(f'learning rate, momentum and weight decay must be finite and >= 0, got {settings}')
    return parsed


def momentum_from_torch(
    optimizer: Mapping[str, Any], state_dict: Mapping[str, Any], model: EPSANet
) -> dict[str, Any]:
    """Returns the momentum buffers as a tree with the structure of the model's parameters.

    PyTorch numbers parameters in the order of the state dict. Missing buffers become zeros, which gives the
    same next update.

    Args:
        optimizer: `torch.optim.SGD(...).state_dict()` with one group of all parameters.
        state_dict: state dict of the network, which gives the order of the parameters.
        model: the network.

    Raises:
        InputError: the optimizer is not SGD, or its buffers do not fit the parameters of the model.
    """
    sgd = parse_sgd(optimizer)
    table = _parameters(model)
    names = [name for name in strip_prefix(state_dict) if name in table]
    if len(sgd.numbers) != len(names):
        raise InputError(f'the optimizer has {len(sgd.numbers)} parameters, but the network has {len(names)}')
    buffers = {n: sgd.buffers[i] for i, n in zip(sgd.numbers, names, strict=True) if i in sgd.buffers}
    flat, problems = read_tensors(buffers, table)
    if problems:
        raise InputError(f'the momentum buffers do not fit the model: {some(problems, 3)}')
    zeros = {path: np.zeros(leaf.shape, leaf.dtype) for path, leaf in table.values()}
    return traverse_util.unflatten_dict({**zeros, **flat})['params']


def _parameters(model: EPSANet) -> Table:
    return {name: entry for name, entry in name_table(model).items() if entry[0][0] == 'params'}


def momentum_to_torch(
    momentum: Mapping[str, Any], model: EPSANet, group: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns a state dict that `torch.optim.SGD` of all parameters of the network can load.

    Args:
        momentum: the momentum buffers, a tree with the structure of the model's parameters.
        model: the network.
        group: 'lr', 'momentum', 'weight_decay' and 'nesterov'.
    """
    flat = traverse_util.flatten_dict(dict(momentum))
    buffers = [to_torch_layout(np.asarray(flat[path[1:]])) for path, _ in _parameters(model).values()]
    constants = {'dampening': 0, 'maximize': False, 'foreach': None, 'differentiable': False}
    return {
        'state': {i: {'momentum_buffer': buffer} for i, buffer in enumerate(buffers)},
        'param_groups': [{**group, **constants, 'params': list(range(len(buffers)))}],
    }
