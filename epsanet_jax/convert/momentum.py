"""SGD's momentum buffers: PyTorch's optimiser state <-> the trace of optax."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from epsanet_jax.convert.state_dict import (
    name_table,
    read_values,
    strip_prefix,
    to_jax_layout,
    to_torch_layout,
    torch_order,
)
from epsanet_jax.errors import InputError
from epsanet_jax.models.epsanet import EPSANet


@dataclasses.dataclass(frozen=True)
class SGDState:
    """What `torch.optim.SGD(...).state_dict()` says, checked.

    Attributes:
        lr, momentum, weight_decay, nesterov: of the one group of parameters.
        numbers: of the parameters, in their order.
        buffers: number -> momentum buffer; parameters without a buffer are left out.
    """

    lr: float
    momentum: float
    weight_decay: float
    nesterov: bool
    numbers: tuple[int, ...]
    buffers: Mapping[int, Any]


def parse_sgd(optimizer: Any) -> SGDState:
    """Reads the state dict of PyTorch's SGD with one group.

    Raises:
        InputError: it is of another optimiser, has several groups, or settings that have no counterpart here.
    """
    try:
        groups, state = optimizer['param_groups'], optimizer['state']
        if len(groups) != 1:
            raise InputError(f'the optimizer has {len(groups)} groups of parameters, expected one')
        group = groups[0]
        for field, expected in (('dampening', 0), ('maximize', False)):
            if group.get(field, expected) != expected:
                raise InputError(f'the optimizer has {field} {group[field]}, which has no counterpart here')
        entries = {number: dict(entry) for number, entry in state.items() if entry}
        other = sorted({str(key) for entry in entries.values() for key in entry} - {'momentum_buffer'})
        if other:
            raise InputError(f'the optimizer is not SGD: it keeps {", ".join(other)}')
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
    except Exception as e:  # it may hold anything that a file can hold
        raise InputError(f'the optimizer state is not that of SGD: {type(e).__name__}: {e}') from e
    if not all(math.isfinite(v) and v >= 0 for v in (parsed.lr, parsed.momentum, parsed.weight_decay)):
        numbers = (parsed.lr, parsed.momentum, parsed.weight_decay)
        raise InputError(f'the optimizer has learning rate, momentum and decay {numbers}')
    return parsed


def momentum_from_torch(
    optimizer: Mapping[str, Any], state_dict: Mapping[str, Any], model: EPSANet
) -> dict[str, Any]:
    """Returns the momentum buffers as a tree like the model's parameters.

    PyTorch numbers parameters in the order of the state dict. Buffers that do not exist yet are zeros, which
    makes the next update the same.

    Args:
        optimizer: `torch.optim.SGD(...).state_dict()` with one group of all parameters.
        state_dict: of the network, for the order of the names.
        model: the network.

    Raises:
        InputError: it is the state of another optimiser, or of other parameters.
    """
    sgd = parse_sgd(optimizer)
    table = {name: leaf for name, leaf in name_table(model).items() if leaf[0][0] == 'params'}
    names = [name for name in strip_prefix(state_dict) if name in table]
    if len(sgd.numbers) != len(names):
        raise InputError(f'the optimizer has {len(sgd.numbers)} parameters, expected one of all {len(names)}')
    flat, problems = {}, []
    for number, name in zip(sgd.numbers, names, strict=True):
        path, leaf = table[name]
        array = np.zeros(leaf.shape, leaf.dtype)
        if number in sgd.buffers:
            read, problem = read_values(name, sgd.buffers[number], leaf.dtype)
            if read is None:
                problems.append(f'{problem} in the buffer of {name}')
                continue
            array = to_jax_layout(read)
        if array.shape != leaf.shape:
            problems.append(f'a buffer of shape {array.shape} for {name}')
        flat[path[1:]] = array
    if problems:
        raise InputError(f'the momentum does not fit the model: {"; ".join(problems)}')
    return traverse_util.unflatten_dict(flat)


def momentum_to_torch(
    momentum: Mapping[str, Any], model: EPSANet, group: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns a state dict that `torch.optim.SGD` over all parameters of the network loads.

    Args:
        momentum: a tree like the model's parameters.
        model: the network.
        group: 'lr', 'momentum', 'weight_decay' and 'nesterov'.
    """
    flat = traverse_util.flatten_dict(dict(momentum))
    table = {name: leaf for name, leaf in name_table(model).items() if leaf[0][0] == 'params'}
    buffers = [to_torch_layout(np.asarray(flat[table[name][0][1:]])) for name in torch_order(table)]
    constants = {'dampening': 0, 'maximize': False, 'foreach': None, 'differentiable': False}
    return {
        'state': {i: {'momentum_buffer': buffer} for i, buffer in enumerate(buffers)},
        'param_groups': [{**group, **constants, 'params': list(range(len(buffers)))}],
    }
