"""The handwritten digits as a TFDS dataset."""

import pickle

import numpy as np
import pytest

from epsanet_jax import InputError
from epsanet_jax.data import digits
from epsanet_jax.data.decode import decode
from epsanet_jax.data.sources import Tfds


def test_digits_are_a_normal_tfds_dataset(digits_dir):
    train, test = (Tfds('digits', split, digits_dir) for split in ('train', 'test'))
    assert (len(train), len(test)) == (1437, 360)
    assert test.class_names == tuple('0123456789')
    assert train.fingerprint != test.fingerprint
    image = decode(test[0]['image'])
    assert image.size == (32, 32)
    labels = np.bincount([test[i]['label'] for i in range(360)], minlength=10)
    assert labels.min() >= 25
    pickle.loads(pickle.dumps(test))[5]  # worker processes get it this way


def test_no_image_is_in_both_splits(digits_dir):
    images = {
        split: [r['image'] for r in all_of(Tfds('digits', split, digits_dir))] for split in ('train', 'test')
    }
    assert not set(images['train']) & set(images['test'])


def all_of(source):
    return (source[i] for i in range(len(source)))


def test_preparing_the_digits_again_does_nothing(digits_dir, capsys):
    digits.prepare(digits_dir)
    assert capsys.readouterr().out == ''


def test_several_processes_may_prepare_the_digits_at_the_same_time(tmp_path, monkeypatch):
    """The other process ends while this one writes: its folder is there when this one renames its own."""
    generate = digits.Digits._generate_examples

    def slow(self, test):
        yield from generate(self, test)
        if test:
            monkeypatch.undo()
            digits.prepare(str(tmp_path))

    monkeypatch.setattr(digits.Digits, '_generate_examples', slow)
    digits.prepare(str(tmp_path))
    assert len(Tfds('digits', 'test', str(tmp_path))) == 360


def test_digits_that_cannot_be_written_are_an_error(tmp_path):
    (tmp_path / 'digits').write_text('a file')
    with pytest.raises(InputError, match='cannot prepare the digits in'):
        digits.prepare(str(tmp_path))
