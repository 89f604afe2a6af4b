"""Transforms give the same pixels as torchvision, from a file written by `benchmarks/gpu_parts.py golden`."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from epsanet_jax.data.randaugment import apply_op, augmentation_space
from epsanet_jax.data.transforms import CentreCrop, adjust_hue

with np.load(Path(__file__).parent / 'golden/torchvision.npz') as file:
    ARRAYS = dict(file)
NAMES = [name for name in ARRAYS if 'pixels' not in name]
IMAGE = Image.fromarray(ARRAYS['pixels'])


@pytest.mark.parametrize('name', NAMES)
def test_the_pixels_are_torchvision_s(name):
    transform, argument = name.split()
    if transform == 'CentreCrop':
        result = CentreCrop(24, 32)(Image.fromarray(ARRAYS[f'{argument} pixels']))
    elif transform == 'hue':
        result = adjust_hue(IMAGE, float(argument))
    else:
        result = apply_op(IMAGE, transform, float(argument))
    np.testing.assert_array_equal(np.asarray(result), ARRAYS[name])


def test_every_operation_of_randaugment_is_compared():
    assert {name.split()[0] for name in NAMES} == {*augmentation_space(31, 24, 16), 'CentreCrop', 'hue'}
    changed = [
        name for name in NAMES if ARRAYS[name].shape != IMAGE.size[::-1] or (ARRAYS[name] != IMAGE).any()
    ]
    assert len(changed) > 35
