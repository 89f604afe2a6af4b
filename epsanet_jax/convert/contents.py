"""Finds the weights in the content of a file: containers, prefixes of wrappers, averages, other entries."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from epsanet_jax.errors import InputError, one_line, some

PACKAGE = 'epsanet_jax'  # key of the metadata in a file
ANCHOR = 'layer1.0.conv1.weight'  # a name in the state dict of every network of this package
_DEPTH = 4  # of nested containers
_AVERAGED = re.compile(r'(?:^|[._])(?:ema|avg|averaged?|shadow)\d*(?:[._]|$)', re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The content of a weight file.

    Attributes:
        state_dict: name -> tensor (PyTorch files) or array (safetensors), without the prefix of a wrapper.
        epoch: number of finished epochs, if known.
        optimizer: state dict of the optimizer, if the file has one.
        arch: name of the network in the training script, if known.
        best_prec1: best top-1 accuracy in percent, if known.
        metadata: metadata of the file, as strings.
        averaged: whether the weights are moving averages.
        class_names: names of the classes from the config.json of another library; empty if unknown.
        preprocessing: fields of `data.preprocessing.Preprocessing` from such a config.json.
        notes: what was taken from the file and what was not, a line each.
    """

    state_dict: Mapping[str, Any]
    epoch: float | None = None
    optimizer: Mapping[str, Any] | None = None
    arch: str | None = None
    best_prec1: float | None = None
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    averaged: bool = False
    class_names: tuple[str, ...] = ()
    preprocessing: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """A network in the content: the dict that holds it, the keys that lead there, the prefix of its names."""

    entries: Mapping[Any, Any]
    keys: str
    prefix: str

    @property
    def averaged(self) -> bool:
        names = (self.keys, self.prefix)
        return any(map(_AVERAGED.search, names)) or any(_is_counter(name) for name in self.entries)

    @property
    def label(self) -> str:
        label = '.'.join(filter(None, (self.keys, self.prefix.rstrip('.'))))
        return one_line(label, 60) or 'the names without a prefix'


def find_weights(content: Any, path: str, ema: bool = True, ignore: str = '') -> Checkpoint:
    """Returns the weights in the content of a file.

    Args:
        content: what the file holds: a state dict, or dicts that hold one in any depth.
        path: the file, for messages.
        ema: whether to take moving averages of weights, if there are any, instead of the weights.
        ignore: regular expression for names of entries to leave out; '' for none.

    Raises:
        InputError: there is no state dict, there are several networks, or `ema` does not apply.
    """
    if not isinstance(content, Mapping):
        raise InputError(f'{path} contains a {type(content).__name__} instead of a state dict')
    drop = _compiled(ignore)
    found = []
    for keys, entries in _dicts(content):
        kept = (name for name in entries if not (drop and drop.search(f'{keys}.{name}'.lstrip('.'))))
        found += [_Candidate(entries, keys, prefix) for prefix in prefixes(kept)]
    chosen, notes = _choose(found, path, ema) if found else (_largest(content, path), [])
    state_dict, more = _clean(chosen, drop, path)
    note = getattr(chosen.entries, PACKAGE, None)
    checkpoint = Checkpoint(
        state_dict,
        metadata={PACKAGE: note} if isinstance(note, str) else {},
        averaged=chosen.averaged,
        notes=(*notes, *more),
    )
    if chosen.entries is content:
        return checkpoint
    epoch, arch, optimizer, args = (content.get(key) for key in ('epoch', 'arch', 'optimizer', 'args'))
    arch = arch or getattr(args, 'model', None)  # timm's training script has the options as `args`
    return dataclasses.replace(
        checkpoint,
        epoch=epoch if isinstance(epoch, int) and not isinstance(epoch, bool) and epoch >= 0 else None,
        optimizer=optimizer if isinstance(optimizer, dict) else None,
        arch=arch if isinstance(arch, str) else None,
        best_prec1=_number(content.get('best_prec1')),
    )


def prefixes(names: Any) -> list[str]:
    """Returns what stands before `ANCHOR` in the names that end with it: a prefix for each network."""
    ends = (name for name in names if isinstance(name, str) and name.endswith(ANCHOR))
    return [p for p in (name.removesuffix(ANCHOR) for name in ends) if not p or p.endswith('.')]


def strip_prefix(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """Removes the prefix of a wrapper from the names that have it, if the prefix is clear.

    Raises:
        InputError: a name occurs with and without the prefix.
    """
    found = prefixes(state_dict)
    if len(found) != 1 or not found[0]:
        return state_dict
    stripped = {name.removeprefix(found[0]): value for name, value in state_dict.items()}
    if len(stripped) < len(state_dict):
        twice = next(name for name in state_dict if f'{found[0]}{name}' in state_dict)
        raise InputError(f'two entries {twice}, with and without the prefix {found[0]!r}')
    return stripped


def _compiled(ignore: str) -> re.Pattern[str] | None:
    try:
        return re.compile(ignore) if ignore else None
    except re.error as e:
        raise InputError(f'--ignore must be a regular expression, got {ignore!r}: {e}') from e


def _dicts(content: Mapping[Any, Any]) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Yields the content and the dicts in it, but for states of optimizers, with the keys that lead there."""
    seen, level = {id(content)}, [('', content)]
    for _ in range(_DEPTH):
        yield from level
        below = []
        for keys, entries in level:
            for key, value in entries.items():
                if isinstance(key, str) and isinstance(value, Mapping) and 'optim' not in key.lower():
                    if id(value) not in seen:
                        below.append((f'{keys}.{key}'.lstrip('.'), value))
                    seen.add(id(value))
        level = below


def _choose(found: list[_Candidate], path: str, ema: bool) -> tuple[_Candidate, list[str]]:
    """Returns the network to read, and a line if there are moving averages."""
    averages, weights = ([c for c in found if c.averaged == kind] for kind in (True, False))
    if not ema and not averages:
        raise InputError(f'{path} has one set of weights: remove the choice of no moving averages')
    if not ema and not weights:
        raise InputError(f'{path} holds only moving averages: remove --no-ema')
    wanted = averages if averages and ema else weights
    if len(wanted) > 1:
        labels = some([c.label for c in wanted], 4)
        raise InputError(f'{path} holds {len(wanted)} networks: {labels}; --ignore REGEX leaves others out')
    chosen = wanted[0]
    if not averages:
        return chosen, []
    if not weights:
        return chosen, [f'moving averages taken ({chosen.label}): the file holds no other weights']
    other = some([c.label for c in (weights if ema else averages)], 2)
    if ema:
        return chosen, [f'moving averages taken ({chosen.label}); --no-ema takes the weights ({other})']
    return chosen, [f'weights taken ({chosen.label}), not the moving averages ({other})']


def _largest(content: Mapping[Any, Any], path: str) -> _Candidate:
    """Returns the dict with the most tensors, for the message on why they are no network of this package."""

    def tensors(entries: Mapping[Any, Any]) -> int:
        return sum(isinstance(k, str) and hasattr(v, 'shape') for k, v in entries.items())

    keys, entries = max(_dicts(content), key=lambda item: tensors(item[1]))
    if not tensors(entries):
        names = one_line(', '.join(map(str, content)), 200)
        raise InputError(f'{path} contains no state dict; its entries: {names}')
    return _Candidate(entries, keys, '')


def _clean(chosen: _Candidate, drop: re.Pattern[str] | None, path: str) -> tuple[dict[str, Any], list[str]]:
    """Returns the entries under the names of the reference, and lines on what was changed."""
    prefix, kept, ignored, notes = chosen.prefix, {}, [], []
    for full, value in chosen.entries.items():
        name = str(full).removeprefix(prefix)
        if drop and (drop.search(name) or drop.search(f'{chosen.keys}.{full}'.lstrip('.'))):
            ignored.append(name)
        elif not _is_counter(full):
            if name in kept:
                twice = f'two entries {one_line(name, 100)}, with and without the prefix'
                raise InputError(f'{path}: {twice} {one_line(prefix, 100)!r}')
            kept[name] = value
    if prefix:
        notes.append(f'the prefix {one_line(prefix, 100)!r} of the names removed')
    if drop:
        shown = some([one_line(name, 80) for name in ignored], 3) or 'no name matches'
        notes.append(f'--ignore left out {len(ignored)} entries: {shown}')
    if 'fc.weight' not in kept and 'last_linear.weight' in kept:
        kept = {re.sub(r'^last_linear\.', 'fc.', name): value for name, value in kept.items()}
        notes.append("the classifier 'last_linear' read as 'fc'")
    return kept, notes


def _is_counter(name: Any) -> bool:
    """Returns whether an entry is the number of updates of torch's AveragedModel."""
    return isinstance(name, str) and name.rpartition('.')[2] == 'n_averaged'


def _number(value: Any) -> float | None:
    """Returns a number or a scalar tensor as a float, and None for other values."""
    value = value.item() if getattr(value, 'ndim', None) == 0 else value
    return float(value) if isinstance(value, int | float) else None
