"""The preprocessing that travels with a network: its checks, other sizes, and its form in JSON."""

import dataclasses
import json

import pytest

from epsanet_jax import InputError
from epsanet_jax.data.preprocessing import Preprocessing, check_pixels, preprocessing_from_json

OTHER = Preprocessing(192, 200, (0.5, 0.4, 0.3), (0.2, 0.2, 0.1), exif_orientation=False)


@pytest.mark.parametrize('values', [Preprocessing(), OTHER, Preprocessing(32, 8192)])
def test_valid_preprocessing_passes_the_check(values):
    assert values.check() is values


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'image_size': 31}, r'image_size must be from 32 to resize_size \(at most 8192\), got 31 and 256'),
        ({'image_size': 257}, 'got 257 and 256'),
        ({'resize_size': 8193}, 'got 224 and 8193'),
        ({'image_size': '224'}, "preprocessing.image_size must be .*got '224'"),
        ({'exif_orientation': 1}, 'preprocessing.exif_orientation must be .*got 1'),
        ({'mean': (0.5, 0.5)}, r'preprocessing.std must be 2 numbers, one per channel above 0, got \(0.229'),
        ({'mean': (5.0,)}, 'preprocessing.std must be one number above 0'),
        ({'mean': (0.5, 0.5, 124.0)}, 'preprocessing.mean must be three numbers from 0 to 1'),
        ({'std': (0.2, 0.2, 0.0)}, 'preprocessing.std must be three numbers above 0, at most 1'),
        ({'std': (float('nan'), 0.2, 0.2)}, 'preprocessing.std must hold numbers'),
    ],
)
def test_invalid_value_is_named(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(Preprocessing(), **change).check()


def test_message_about_pixels_starts_with_the_prefix():
    with pytest.raises(InputError, match=r'^config\.data\.std must be'):
        check_pixels((0.5, 0.5, 0.5), (0.2, 0.2, 2.0), 'config.data', 3)


def test_other_image_size_keeps_the_share_of_the_crop():
    assert Preprocessing().scaled_to(224) == Preprocessing()
    assert Preprocessing().scaled_to(288) == Preprocessing(288, 329)
    assert OTHER.scaled_to(96) == dataclasses.replace(OTHER, image_size=96, resize_size=100)


@pytest.mark.parametrize('values', [Preprocessing(), OTHER])
def test_json_keeps_every_field(values):
    assert preprocessing_from_json(json.loads(json.dumps(values.to_json()))) == values


def test_json_with_an_invalid_or_unknown_field_is_an_error():
    with pytest.raises(InputError, match=r'preprocessing\.image_size'):
        preprocessing_from_json({'image_size': 10**6, 'resize_size': 10**6})
    with pytest.raises(TypeError, match='crop_size'):
        preprocessing_from_json({'crop_size': 224})
