"""Batches of a data configuration, on the devices."""

import itertools

import numpy as np
from runs import recipe

from epsanet_jax.data import pipeline
from epsanet_jax.data.sources import Synthetic
from epsanet_jax.training import inputs, sharding


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


def test_the_configuration_balances_classes_from_any_step_on():
    config, source = recipe(balance_classes=True), Synthetic(10, 4, 32)  # 3, 3, 2 and 2 images
    whole, later = (list(itertools.islice(inputs.train_batches(config, source, step), 3)) for step in (0, 2))
    assert all(np.bincount(batch['label']).tolist() == [4] * 4 for batch in whole)
    np.testing.assert_array_equal(later[0]['image'], whole[2]['image'])
    config.balance_classes = False
    assert np.bincount(next(inputs.train_batches(config, source, 0))['label']).tolist() != [4] * 4
