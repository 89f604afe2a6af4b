"""Starts a network from the weights of another one, as far as they fit.

ResNets share every tensor with EPSANets but those of the pyramids, which start from the 3x3 kernels.
PyConvResNets share the pyramids of the first stage too, and concatenate their branches in the opposite order.
"""

import collections
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from epsanet_jax.convert.state_dict import (
    Path,
    Table,
    as_numpy,
    flatten,
    name_table,
    read_tensors,
    torch_shape,
)
from epsanet_jax.errors import InputError, some
from epsanet_jax.models.epsanet import EPSANet, abstract_images
from epsanet_jax.weights.network import Network

LEAST_SHARE = 0.1  # of the parameters; with less, the weights are those of another kind of network
_STEM = 'conv1.weight'
_STATISTICS = ('running_mean', 'running_var')
_SOURCE_STEM = 3  # channels of the stem that can be adapted to another number


def start_from(
    network: Network, model: EPSANet, key: jax.Array, *, with_classifier: bool = True
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Returns variables for a model: what fits of the weights of a network, and the rest drawn.

    Every tensor of the same name and shape is taken. A stem for three channels is adapted to other numbers
    (`adapt_stem`), and the branches of a pyramid start with the 3x3 kernel of a ResNet in their middle. The
    statistics of BatchNorms behind convolutions that are not taken keep their initial values.

    Args:
        network: the network to start from, see `weights.load`.
        model: the network to start.
        key: random key for the rest.
        with_classifier: whether the classifier may be taken.

    Returns:
        {'params', 'batch_stats'}, and lines that say what was taken and what was not.

    Raises:
        InputError: less than `LEAST_SHARE` of the parameters can be taken, or values are damaged.
    """
    taken, report = fitting(network, model, with_classifier=with_classifier)
    drawn = jax.jit(model.init)(key, jnp.zeros(abstract_images(model).shape, model.dtype))
    return replaced(dict(drawn), taken), report


def replaced(variables: Mapping[str, Any], taken: Mapping[Path, jax.Array]) -> dict[str, Any]:
    """Returns variables in which the given leaves replace others."""
    return traverse_util.unflatten_dict({**flatten(variables), **taken})


def fitting(
    network: Network, model: EPSANet, *, with_classifier: bool = True
) -> tuple[dict[Path, jax.Array], tuple[str, ...]]:
    """Returns the leaves that `start_from` takes, by their paths in the variables, and its report."""
    given, lines = adapt_stem(network.state_dict, model)
    table = name_table(model)
    if network.model.middle == 'pyconv' and model.middle == 'psa':
        given, line = _of_pyconv(given, table)
        lines = [*lines, *line]
    given, made = _of_resnet(given, table)
    if not with_classifier:
        given = {name: value for name, value in given.items() if not name.startswith('fc.')}
    same = {
        name: table[name]
        for name, value in given.items()
        if name in table and torch_shape(table[name][1].shape) == tuple(value.shape)
    }
    reset = _behind_drawn(table, same)
    taken, problems = read_tensors(given, {name: row for name, row in same.items() if name not in reset})
    if problems:
        raise InputError(f'{network.source.path}: {some(problems, 3)}')
    return taken, (*lines, *_report(network, table, same, reset, given, made))


def adapt_stem(given: Mapping[str, Any], model: EPSANet) -> tuple[dict[str, Any], list[str]]:
    """Adapts the first convolution of a state dict for three channels to the channels of a model.

    For one channel the sum over the three is taken, for others they are repeated and scaled by 3 / channels,
    so that an image whose channels are equal gives the same features. Returns the state dict and a report.
    """
    stem, channels = given.get(_STEM), model.in_channels
    if stem is None or stem.shape[1] == channels or stem.shape[1] != _SOURCE_STEM:
        return dict(given), []
    kernel = as_numpy(stem)
    if channels == 1:
        kernel, how = kernel.sum(axis=1, keepdims=True), 'their sum'
    else:
        repeated = np.concatenate([kernel] * -(-channels // _SOURCE_STEM), axis=1)[:, :channels]
        kernel = repeated * np.asarray(_SOURCE_STEM / channels, kernel.dtype)
        how = f'repeated, times {_SOURCE_STEM}/{channels}'
    line = f'{_STEM}: {_SOURCE_STEM} input channels became {channels}: {how}'
    return {**given, _STEM: kernel}, [line]


def _of_pyconv(given: Mapping[str, Any], table: Table) -> tuple[dict[str, Any], list[str]]:
    """Returns a PyConvResNet's tensors under an EPSANet's names, in the order of its channels.

    An EPSANet concatenates the largest kernel first. So where all branches of a pyramid fit, the channels of
    bn2 and the inputs of conv3 are reordered.
    """
    renamed, blocks = {}, []
    for name, value in given.items():
        new = re.sub(r'\.downsample\.(\d)\.', lambda m: f'.downsample.{int(m[1]) - 1}.', name)
        renamed[re.sub(r'\.conv2\.conv2_(\d+)\.', r'.conv2.conv_\1.', new)] = value
    for block, branches in _pyramids(table).items():
        if all(n in renamed and torch_shape(table[n][1].shape) == tuple(renamed[n].shape) for n in branches):
            blocks.append(block)
            widths = [renamed[n].shape[0] for n in branches]
            ends = np.cumsum(widths)
            order = np.concatenate([np.arange(e - w, e) for w, e in zip(widths, ends, strict=True)][::-1])
            for name in (n for n in given if n.startswith(f'{block}.bn2.') and given[n].ndim):
                renamed[name] = as_numpy(given[name])[order]
            renamed[f'{block}.conv3.weight'] = as_numpy(given[f'{block}.conv3.weight'])[:, order]
    if not blocks:
        return renamed, []
    return renamed, [
        f'channels reordered behind the pyramids of {len(blocks)} blocks: {some(sorted(blocks))}'
    ]


def _pyramids(table: Table) -> dict[str, list[str]]:
    """Returns the names of the branches of an EPSANet's pyramids by block, the smallest kernel first."""
    found: dict[str, list[str]] = {}
    for name in sorted(table):
        if match := re.fullmatch(r'(layer\d+\.\d+)\.conv2\.conv_\d+\.weight', name):
            found.setdefault(match[1], []).append(name)
    return found


def _of_resnet(given: Mapping[str, Any], table: Table) -> tuple[dict[str, Any], list[str]]:
    """Puts branches of pyramids in place of 3x3 kernels; returns the tensors and the names of the branches.

    A branch computes what the 3x3 kernel does within its groups: it has the rows of its outputs in the middle
    of its larger kernel and, for each output, the inputs of its group. An EPSANet concatenates the largest
    kernel first.
    """
    changed, made = dict(given), []
    for block, branches in _pyramids(table).items():
        source = f'{block}.conv2.weight'
        shapes = [torch_shape(table[name][1].shape) for name in branches][::-1]
        total = sum(outputs for outputs, *_ in shapes)
        if source not in given or (given[source].shape[0], *given[source].shape[2:]) != (total, 3, 3):
            continue
        rows = np.split(as_numpy(given[source]), np.cumsum([outputs for outputs, *_ in shapes])[:-1])
        for name, (outputs, inputs, size, _), kernel in zip(branches[::-1], shapes, rows, strict=True):
            groups, rest = divmod(kernel.shape[1], inputs)
            if size >= 3 and not rest and outputs % groups == 0:
                within = kernel.reshape(groups, outputs // groups, groups, inputs, 3, 3)
                within = within[np.arange(groups), :, np.arange(groups)].reshape(outputs, inputs, 3, 3)
                changed[name] = np.pad(within, ((0, 0), (0, 0), *(((size - 3) // 2,) * 2,) * 2))
                changed.pop(source, None)
                made.append(name)
    return changed, sorted(made)


def _behind_drawn(table: Table, same: Mapping[str, Any]) -> set[str]:
    """Returns the names of the statistics of BatchNorms behind convolutions that are not all taken."""
    reset = set()
    for name in table:
        if name.endswith(_STATISTICS):
            norm = name.rpartition('.')[0]
            place, _, last = norm.rpartition('.')
            conv = re.sub(r'^bn', 'conv', last) if last.startswith('bn') else str(int(last) - 1)
            conv = f'{place}.{conv}.' if place else f'{conv}.'
            if any(n.startswith(conv) and n not in same for n in table):
                reset.add(name)
    return reset & same.keys()


def _report(
    network: Network,
    table: Table,
    same: Mapping[str, Any],
    reset: set[str],
    given: Mapping[str, Any],
    made: list[str],
) -> list[str]:
    def parameters(names: Any) -> int:
        return sum(int(np.prod(table[n][1].shape)) for n in names if not n.endswith(_STATISTICS))

    taken = [name for name in table if name in same and name not in reset and name not in made]
    share = parameters(taken) / parameters(table)
    line = f'{len(taken)} of {len(table)} tensors taken, {share:.1%} of the parameters'
    if share < LEAST_SHARE:
        raise InputError(
            f'{network.source.path}: {line}, less than {LEAST_SHARE:.0%}: start without init_from, or give '
            'weights of a more similar network'
        )
    lines = [line]
    for what, names in (
        ('3x3 kernels in the middle of', made),
        ('drawn', [n for n in table if n not in same]),
        ('statistics reset', sorted(reset)),
        ('not used', [n for n in given if n not in table and not n.endswith('num_batches_tracked')]),
    ):
        if names:
            lines.append(f'{what}: {some(_kinds(names), 40)}')
    return lines


def _kinds(names: list[str]) -> list[str]:
    """Returns names without the numbers of stages and blocks, each with the number of its tensors."""
    kinds = collections.Counter(re.sub(r'^layer\d+\.\d+\.', 'layer*.*.', name) for name in names)
    return [f'{kind} ({count})' if '*' in kind else kind for kind, count in kinds.items()]
