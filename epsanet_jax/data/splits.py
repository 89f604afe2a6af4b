"""The names of splits: train, val and test in the spellings that people use."""

from collections.abc import Iterable

from epsanet_jax.errors import InputError

_SPELLINGS = {
    'train': 'train',
    'training': 'train',
    'val': 'val',
    'valid': 'val',
    'validation': 'val',
    'test': 'test',
    'testing': 'test',
}


def split_of(name: str) -> str | None:
    """Returns 'train', 'val' or 'test' for a name of such a split in any case and spelling, else None."""
    return _SPELLINGS.get(name.lower())


def find_split(wanted: str, names: Iterable[str], where: str) -> str | None:
    """Returns the name that is the wanted split, or the only other spelling of it; None if there is none.

    Raises:
        InputError: several names are spellings of it.
    """
    names = sorted(names)
    if wanted in names:
        return wanted
    same = [name for name in names if split_of(wanted) and split_of(name) == split_of(wanted)]
    if len(same) > 1:
        raise InputError(f'{where} holds {" and ".join(same)}, which mean the same split: rename one')
    return same[0] if same else None
