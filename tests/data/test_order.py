"""The order of examples, and classes in equal shares."""

import collections
import itertools

import numpy as np
import pytest
from PIL import Image

from epsanet_jax.data import order
from epsanet_jax.data.image_folder import ImageFolder
from epsanet_jax.data.pipeline import Reading, Rows, train_batches
from epsanet_jax.data.sources import Synthetic
from epsanet_jax.data.transforms import RandomCrop, TrainTransform

FOUR_ROWS = Rows(4)
LABELS = np.array([3] * 20 + [0] * 5 + [7] * 2)  # 27 images of three classes


def drawn(count, seed=5):
    data = order.balanced(LABELS, seed)
    return [data[i] for i in range(count)]


def test_classes_have_equal_shares_and_their_images_are_used_equally_often():
    labels = LABELS[drawn(300)]
    assert all(set(labels[i : i + 3]) == {0, 3, 7} for i in range(0, 300, 3))
    counts = collections.Counter(drawn(300))
    assert counts.keys() == set(range(27))
    assert [counts[i] for i in range(27)] == [5] * 20 + [20] * 5 + [50] * 2


def test_classes_and_their_images_are_shuffled_again():
    indices = drawn(300)
    labels = LABELS[indices]
    assert len({tuple(labels[i : i + 3]) for i in range(0, 300, 3)}) == 6
    large = [i for i in indices if i < 20]
    epochs = [tuple(large[i : i + 20]) for i in range(0, 100, 20)]
    assert len(set(epochs)) == 5
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert drawn(300, seed=6) != indices


def folder(tmp_path):
    for label, count in (('a', 9), ('b', 2)):
        (tmp_path / label).mkdir()
        for i in range(count):
            Image.new('RGB', (32, 32), (20 * i, 9 * count, 0)).save(tmp_path / label / f'{i}.png')
    return ImageFolder(tmp_path)


def batches(source, count, rows=FOUR_ROWS, start=0, workers=0):
    labels, reading = order.read_labels(source), Reading(workers=workers, threads=1)
    made = train_batches(source, TrainTransform(RandomCrop(32)), rows, 5, start, reading, labels)
    taken = list(itertools.islice(made, count))
    made.close()
    return [{k: batch[k] for k in ('image', 'label')} for batch in taken]


@pytest.mark.parametrize('workers', [0, pytest.param(2, marks=pytest.mark.slow)])
def test_balanced_batches_are_the_same_after_a_restart_and_on_two_processes(tmp_path, workers):
    source = folder(tmp_path)
    whole = batches(source, 9)
    assert sorted(whole[0]['label']) == [0, 0, 1, 1]
    for expected, got in zip(whole[7:], batches(source, 2, start=7, workers=workers), strict=True):
        np.testing.assert_array_equal(got['image'], expected['image'])
        np.testing.assert_array_equal(got['label'], expected['label'])
    halves = [batches(source, 9, Rows(4, process, 2), workers=workers) for process in range(2)]
    for expected, *got in zip(whole, *halves, strict=True):
        for k in expected:
            np.testing.assert_array_equal(np.concatenate([half[k] for half in got]), expected[k])


def test_labels_are_read_from_records_of_sources_that_do_not_list_them(tmp_path):
    assert not isinstance(Synthetic(6, 4, 32), order.WithLabels)
    assert order.read_labels(Synthetic(6, 4, 32)).tolist() == [0, 1, 2, 3, 0, 1]
    assert order.read_labels(folder(tmp_path)).tolist() == [0] * 9 + [1] * 2
