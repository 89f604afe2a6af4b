"""Sources and batches of a data configuration."""

import numpy as np
import pytest

from epsanet_jax import InputError
from epsanet_jax.data import pipeline, sources
from epsanet_jax.training import inputs, loop, sharding
from epsanet_jax.training.config import (
    DataConfig,
)


def test_splits_with_different_classes_are_refused(bad_folder):
    config, path = bad_folder
    (path / 'data/val/b').rename(path / 'data/val/c')
    with pytest.raises(InputError, match=r'have different classes \(2 and 2\); only in one of them: b, c'):
        loop.train(config, str(path / 'run'))


def test_labels_are_matched_by_class_name():
    source = sources.Synthetic(6, 2, 32, 0)
    matched = inputs.with_labels_of(source, ('class1', 'x', 'class0'), 3)
    assert (len(matched), matched.class_names) == (6, ('class1', 'x', 'class0'))
    assert {(source[i]['label'], matched[i]['label']) for i in range(6)} == {(0, 2), (1, 0)}
    assert inputs.with_labels_of(source, (), 2) is source
    with pytest.raises(InputError, match='classes that the model does not know: class0; the 2 classes'):
        inputs.with_labels_of(source, ('class1', 'x'), 2)
    with pytest.raises(InputError, match='the data has 2 classes, the model has 3 without names'):
        inputs.with_labels_of(source, (), 3)


def test_the_data_of_an_evaluation_are_those_of_the_run_or_of_the_option(tmp_path):
    run = DataConfig(source='tfds', name='digits', dir='datasets', eval_split='test', image_size=48)

    def chosen(data=None, split=None, data_dir=None, trained_on=run):
        found = inputs.evaluation_data(trained_on, data, split, data_dir, 'skip')
        assert (found.image_size, found.on_bad) == (trained_on.image_size, 'skip')
        return found.source, found.name or found.dir, found.eval_split

    assert chosen() == chosen('digits') == ('tfds', 'digits', 'test')
    assert chosen(split='train') == ('tfds', 'digits', 'train')
    assert chosen('flowers') == ('tfds', 'flowers', 'test')
    folder = DataConfig(dir='somewhere')
    assert chosen(str(tmp_path), trained_on=folder) == ('folder', str(tmp_path), '.')
    (tmp_path / 'val').mkdir()
    assert chosen(str(tmp_path), trained_on=folder) == ('folder', str(tmp_path), 'val')
    for arguments, message in (
        ((str(tmp_path), None, 'datasets'), '--data-dir is for TFDS datasets, but .* is a folder'),
        (('/no/such/folder',), 'no such data directory: /no/such/folder'),
        (('gs://bucket/data',), '--data=gs://bucket/data is not on a disk'),
        ((None, None, None, DataConfig()), '--data is missing'),
    ):
        with pytest.raises(InputError, match=message):
            chosen(*arguments)


def test_a_feed_counts_images_and_carries_requests():
    batch = {
        'image': np.zeros((8, 32, 32, 3), np.uint8),
        'label': np.arange(8, dtype=np.int32),
        'seconds': np.full(8, 0.5),
        'bad_index': np.where(np.arange(8) == 3, 17, pipeline.NOT_BAD),
    }
    feed = inputs.Feed(iter([batch]), sharding.make_mesh(8), lambda: (True, False))
    on_devices = next(feed)
    feed.close()
    assert (feed.images, feed.seconds, feed.bad) == (8, 4.0, [17])
    assert set(on_devices) == {'image', 'label', 'requests'}
    assert on_devices['requests'].sum(axis=0).tolist() == [8, 0]
    assert len(on_devices['label'].sharding.device_set) == 8
