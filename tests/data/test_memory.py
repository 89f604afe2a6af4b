"""The memory of the pipeline does not grow with the number of epochs."""

import itertools
import os

import numpy as np
from PIL import Image

from epsanet_jax.data.image_folder import ImageFolder
from epsanet_jax.data.pipeline import Rows, train_batches
from epsanet_jax.data.transforms import RandomCrop, TrainTransform

PAGE = os.sysconf('SC_PAGE_SIZE')


def resident():
    """Returns the memory of this process in MiB."""
    with open('/proc/self/statm') as f:
        return int(f.read().split()[1]) * PAGE / 2**20


def test_twenty_epochs_need_no_more_memory_than_a_few(tmp_path, rng):
    (tmp_path / 'a').mkdir()
    for i in range(64):
        Image.fromarray(rng.integers(0, 256, (200, 200, 3), dtype=np.uint8)).save(tmp_path / f'a/{i}.jpg')
    batches = train_batches(ImageFolder(tmp_path), TrainTransform(RandomCrop(128)), Rows(16), 0)
    used = []
    for _ in range(20):
        for batch in itertools.islice(batches, 4):
            assert batch['image'].shape == (16, 128, 128, 3)
        used.append(resident())
    batches.close()
    print(f'MiB after each of 20 epochs: {[round(u) for u in used]}')
    # Keeping the decoded images of every epoch would add 7 MiB per epoch. The extremes of several epochs are
    # compared, because a busy machine shifts single values.
    assert min(used[15:]) - max(used[:5]) < 40
