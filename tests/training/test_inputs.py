"""Batches of a data configuration, on the devices."""

import numpy as np

from epsanet_jax.data import pipeline
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
