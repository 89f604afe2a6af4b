"""Names of splits in the spellings that people use."""

import pytest

from epsanet_jax import InputError
from epsanet_jax.data.splits import find_split, split_of


def test_spellings():
    for name, split in (('Train', 'train'), ('TRAINING', 'train'), ('valid', 'val'), ('Validation', 'val')):
        assert split_of(name) == split
    assert split_of('Test') == 'test'
    assert split_of('trains') is None


def test_the_wanted_name_comes_first_and_other_spellings_must_be_unique():
    assert find_split('val', ['val', 'valid'], 'here') == 'val'
    assert find_split('val', ['Train', 'Valid'], 'here') == 'Valid'
    assert find_split('val', ['train', 'test'], 'here') is None
    assert find_split('fold1', ['Fold1'], 'here') is None
    with pytest.raises(InputError, match='here holds Val and valid, which mean the same split: rename one'):
        find_split('val', ['valid', 'Val'], 'here')
