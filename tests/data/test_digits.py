"""The handwritten digits as a TFDS dataset."""

import pickle

import numpy as np

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
