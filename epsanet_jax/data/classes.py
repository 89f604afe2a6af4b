"""One rule for the names of classes in training, evaluation, prediction and preparation."""

import collections
import unicodedata
from collections.abc import Sequence

from epsanet_jax.errors import InputError, some


def composed(name: str) -> str:
    """Returns a name in Unicode's composed form (NFC); file systems and archives keep either form."""
    return unicodedata.normalize('NFC', name)


def in_order(names: Sequence[str]) -> tuple[str, ...]:
    """Returns names in the order of their labels: the numbers 0 to N-1 by value, other names sorted."""
    if all(map(_is_number, names)) and sorted(map(int, names)) == list(range(len(names))):
        return tuple(sorted(names, key=int))
    return tuple(sorted(names))


def distinct(names: Sequence[str]) -> list[str]:
    """Returns names that are all different: a name that several classes have is followed by the number."""
    count = collections.Counter(map(composed, names))
    return [f'{name} ({i})' if count[composed(name)] > 1 else name for i, name in enumerate(names)]


def match(names: Sequence[str], model_names: Sequence[str], num_classes: int) -> tuple[list[int], str]:
    """Finds the outputs of a model that stand for the classes of a dataset.

    Args:
        names: names of the dataset's classes.
        model_names: names of the model's classes in the order of the logits; empty if unknown.
        num_classes: number of logits.

    Returns:
        The number of the output for each class, and what had to be assumed, or ''.

    Raises:
        InputError: the dataset has classes that the model does not have, or the outputs are ambiguous.
    """
    if not model_names:
        return _match_numbers(names, num_classes)
    ours, theirs = [composed(name) for name in names], [composed(name) for name in model_names]
    if ours == theirs:
        return list(range(len(theirs))), ''
    numbers = {name: i for i, name in enumerate(theirs)}
    numbers |= {composed(name): i for i, name in enumerate(distinct(model_names))}
    if missing := [name for name in ours if name not in numbers]:
        raise InputError(
            f'the data has classes that the model does not know: {some(missing)}; the {len(theirs)} classes '
            f'of the model: {some(theirs)}'
        )
    for name, count in collections.Counter(theirs).items():
        if count > 1 and name in ours:
            places = [shown for shown, other in zip(distinct(theirs), theirs, strict=True) if other == name]
            raise InputError(f'the model has {count} classes named {name!r}: name the class {some(places)}')
    return [numbers[name] for name in ours], ''


def _match_numbers(names: Sequence[str], num_classes: int) -> tuple[list[int], str]:
    if all(map(_is_number, names)) and all(int(name) < num_classes for name in names):
        return [int(name) for name in names], 'the model has no class names: class folder k is output k'
    if len(names) != num_classes:
        raise InputError(f'the data has {len(names)} classes, the model has {num_classes} without names')
    return list(range(num_classes)), (
        f'the model has no class names: its outputs are taken as {some(names)} in this order'
    )


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdecimal()


def single(names: Sequence[str], where: str) -> str:
    """Returns a warning if a dataset has one class only, otherwise ''."""
    if len(names) != 1:
        return ''
    return f'warning: {where} has one class only, {names[0]!r}: nothing can be learned'
