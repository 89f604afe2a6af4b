import io

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from epsanet_jax.data.augment import normalize
from epsanet_jax.data.transforms import BadImageError, CentreCrop, RandomCrop, decode


def encode(picture, kind='PNG', **options):
    data = io.BytesIO()
    picture.save(data, kind, **options)
    return data.getvalue()


def gradient(width, height):
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x % 256, y % 256, (x + y) % 256], -1).astype(np.uint8))


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK', 'I;16'])
def test_pictures_of_every_mode_become_rgb(mode):
    gray = Image.fromarray(np.full((3, 5), 200, np.uint8))
    if mode == 'I;16':
        data = encode(Image.fromarray(np.full((3, 5), 200 * 257, np.uint16)))
    elif mode == 'CMYK':
        data = encode(gray.convert('RGB').convert('CMYK'), 'TIFF')
    else:
        data = encode(gray.convert('RGB').convert(mode, dither=Image.Dither.NONE))
    picture = decode(data)
    assert (picture.mode, picture.size) == ('RGB', (5, 3))
    expected = 255 if mode == '1' else 200
    np.testing.assert_allclose(np.asarray(picture), expected, atol=8 if mode == 'P' else 0)


JPEG = encode(gradient(64, 48), 'JPEG')
BAD = {
    'empty': b'',
    'text': b'not an image',
    'html': b'<!DOCTYPE html><html></html>',
    'header': JPEG[:100],
    'truncated jpeg': JPEG[: len(JPEG) // 2],
    'truncated png': encode(Image.effect_noise((64, 48), 50))[:1000],
}


@pytest.mark.parametrize('data', BAD.values(), ids=BAD)
def test_files_that_are_no_picture_are_refused(data):
    with pytest.raises(BadImageError, match=r'cannot decode the image: .'):
        decode(data)


def test_an_empty_file_is_called_one():
    with pytest.raises(BadImageError, match='the file is empty'):
        decode(b'')


def test_random_crops_stay_inside_and_within_area_and_ratio():
    rng = np.random.default_rng(0)
    crop = RandomCrop(8, (0.2, 0.5), (0.5, 2.0))
    boxes = np.array([crop._box(100, 60, rng) for _ in range(500)])
    left, top, width, height = boxes.T
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (left + width <= 100).all()
    assert (top + height <= 60).all()
    area, ratio = width * height / 6000, width / height
    assert 0.19 < area.min() < 0.23
    assert 0.47 < area.max() < 0.52
    assert 0.45 < ratio.min() < 0.6
    assert 1.7 < ratio.max() < 2.1
    assert len({tuple(b) for b in boxes}) > 490


@pytest.mark.parametrize(
    ('size', 'box'),
    [
        ((1, 500), (0, 249, 1, 1)),
        ((500, 1), (249, 0, 1, 1)),
        ((1, 1), (0, 0, 1, 1)),
        ((300, 10), (143, 0, 13, 10)),
    ],
)
def test_pictures_too_thin_for_the_ratio_are_cut_in_the_middle(size, box):
    crop = RandomCrop(8, (0.9, 1.0))
    assert crop._box(*size, np.random.default_rng(0)) == box
    assert crop(gradient(*size), np.random.default_rng(0)).shape == (8, 8, 3)


def test_a_crop_of_everything_is_a_resize_with_pillow_s_bilinear_filter():
    picture = gradient(40, 40)
    expected = np.asarray(picture.resize((16, 16), Image.Resampling.BILINEAR))
    crop = RandomCrop(16, (1.0, 1.0), (1.0, 1.0), flip=False)
    np.testing.assert_array_equal(crop(picture, np.random.default_rng(0)), expected)


def test_every_second_picture_is_mirrored():
    crop = RandomCrop(16, (1.0, 1.0), (1.0, 1.0))
    picture = gradient(16, 16)
    rng = np.random.default_rng(0)
    mirrored = [bool(np.array_equal(crop(picture, rng), np.asarray(picture)[:, ::-1])) for _ in range(400)]
    assert 0.4 < np.mean(mirrored) < 0.6


@pytest.mark.parametrize(
    ('size', 'resized'),
    [((100, 60), (106, 64)), ((60, 101), (64, 107)), ((64, 64), (64, 64)), ((3, 2), (96, 64))],
)
def test_evaluation_resizes_the_shorter_side_and_crops_the_centre(size, resized):
    picture = gradient(*size)
    expected = np.asarray(picture.resize(resized, Image.Resampling.BILINEAR))
    top, left = round((resized[1] - 56) / 2), round((resized[0] - 56) / 2)
    actual = CentreCrop(56, 64)(picture)
    assert actual.shape == (56, 56, 3)
    np.testing.assert_array_equal(actual, expected[top : top + 56, left : left + 56])


def test_normalisation():
    images = np.array([[[[0, 128, 255]]]], np.uint8)
    y = normalize(images, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), jnp.float64)
    expected = (images / 255 - np.array([0.5, 0.4, 0.3])) / np.array([0.2, 0.25, 0.3])
    np.testing.assert_allclose(y, expected, rtol=1e-14)
    assert normalize(images, (0.5,) * 3, (0.2,) * 3, jnp.bfloat16).dtype == jnp.bfloat16
