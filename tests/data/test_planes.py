"""Images of any number of channels, and arrays in .npy files."""

import io

import numpy as np
import pytest
from PIL import Image

from epsanet_jax.data.decode import BadImageError, decode
from epsanet_jax.data.planes import Planes, pixel_dtype
from epsanet_jax.data.transforms import CentreCrop, RandomCrop


def npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def encoded(image, kind='PNG', **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def pixels(rng):
    coarse = rng.integers(0, 256, (4, 5, 13), np.uint8)
    return coarse.repeat(12, axis=0).repeat(12, axis=1)


@pytest.mark.parametrize('channels', [1, 2, 4, 13])
@pytest.mark.parametrize(
    ('dtype', 'unit'), [('uint8', 1), ('uint16', 257), ('float32', 1 / 255), ('>u2', 257), ('>f4', 1 / 255)]
)
def test_arrays_of_all_types_give_the_values_of_8_bits(pixels, channels, dtype, unit):
    array = (pixels[:, :, :channels].astype(float) * unit).astype(dtype)
    found = np.asarray(decode(npy(array), channels=channels))
    assert (found.dtype, found.shape) == (np.float32, (48, 60, channels))
    np.testing.assert_allclose(found, pixels[:, :, :channels], rtol=1e-6)


def test_arrays_of_16_bits_keep_all_of_them_and_floats_any_range():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    np.testing.assert_allclose(np.asarray(decode(npy(values), channels=1))[:, :, 0], values / 257, rtol=1e-6)
    kelvin = np.full((4, 4, 1), 301.25, np.float32)
    np.testing.assert_allclose(decode(npy(kelvin), channels=1), kelvin * 255, rtol=1e-6)


@pytest.mark.parametrize(('dtype', 'unit'), [('uint8', 1), ('uint16', 257), ('float32', 1 / 255)])
def test_arrays_of_three_channels_are_images_of_8_bits(pixels, dtype, unit):
    array = (pixels[:, :, :3].astype(float) * unit).astype(dtype)
    found = decode(npy(array))
    assert isinstance(found, Image.Image)
    np.testing.assert_array_equal(found, pixels[:, :, :3])


@pytest.mark.parametrize(
    ('file', 'channels', 'reason'),
    [
        (
            npy(np.zeros((4, 4, 3), np.uint8)),
            13,
            r'the array has the shape \(4, 4, 3\), expected \[H, W, 13\]',
        ),
        (npy(np.zeros((13, 4, 4), np.uint8)), 13, r'expected \[H, W, 13\]'),
        (npy(np.zeros((4, 4), np.uint8)), 3, r'the array has the shape \(4, 4, 1\), expected \[H, W, 3\]'),
        (npy(np.zeros((0, 4, 3), np.uint8)), 3, r'the array has the shape \(0, 4, 3\)'),
        (npy(np.zeros((4, 4, 3))), 3, 'the array has the type float64, expected uint8, uint16, float32'),
        (npy(np.full((4, 4, 3), 2.5, np.float32)), 3, 'values from 2.5 to 2.5: scale to 0..1'),
        (npy(np.full((4, 4, 2), np.nan, np.float32)), 2, 'values that are not finite'),
        (npy(np.array([[print]]), allow_pickle=True), 1, 'cannot decode the image: .*allow_pickle=False'),
        (npy(np.zeros((99, 99, 2), np.uint8))[:-9], 2, 'cannot decode the image: .'),
        (b'\x93NUMPY\x01', 2, 'cannot decode the image: .'),
        (encoded(Image.new('RGB', (4, 4))), 13, r'the image has 3 channels \(RGB\), the network takes 13'),
        (encoded(Image.new('CMYK', (4, 4)), 'JPEG'), 4, r'the image has 4 channels \(CMYK\), the network'),
        (encoded(Image.new('F', (4, 4)), 'TIFF'), 1, 'floating-point values have no known range'),
    ],
)
def test_arrays_and_images_that_do_not_fit_are_refused(file, channels, reason):
    with pytest.raises(BadImageError, match=reason):
        decode(file, channels=channels)


def test_images_as_one_channel_and_with_alpha(rng):
    rgb = Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8))
    gray = np.asarray(rgb.convert('L'), np.float32)[:, :, None]
    np.testing.assert_array_equal(decode(encoded(rgb), channels=1), gray)
    np.testing.assert_array_equal(decode(encoded(rgb.convert('L')), channels=1), gray)
    deep = Image.fromarray(rng.integers(0, 65536, (20, 30), np.uint16))
    np.testing.assert_allclose(
        np.asarray(decode(encoded(deep), channels=1))[:, :, 0], np.asarray(deep) / 257, rtol=1e-6
    )
    rgba = rgb.convert('RGBA')
    rgba.putalpha(77)
    np.testing.assert_array_equal(decode(encoded(rgba), channels=4), np.asarray(rgba, np.float32))


def test_orientation_applies_to_planes():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6) * 10)
    turned = decode(encoded(image, exif=exif), channels=1)
    np.testing.assert_array_equal(np.asarray(turned)[:, :, 0], np.rot90(np.asarray(image), -1))


def test_crops_and_flips_of_planes_are_those_of_images(pixels):
    """Up to the rounding of 8 bits, each channel is what Pillow makes of it as a gray image."""
    planes = decode(npy(pixels), channels=13)
    assert isinstance(planes, Planes)
    for transform in (CentreCrop(24, 32), CentreCrop(40, 80)):
        whole = transform(planes)
        assert (whole.dtype, whole.shape) == (np.float32, (transform.size, transform.size, 13))
        for c in (0, 7, 12):
            expected = transform(Image.fromarray(pixels[:, :, c])).astype(np.float32)
            assert np.abs(whole[:, :, c] - expected).max() <= 1.01
    crop = RandomCrop(24, (0.3, 0.8))
    whole = crop(planes, np.random.default_rng(5))
    expected = crop(Image.fromarray(pixels[:, :, 4]), np.random.default_rng(5)).astype(np.float32)
    assert np.abs(whole[:, :, 4] - expected).max() <= 1.01


def test_type_of_the_batches():
    assert [pixel_dtype(channels) for channels in (1, 3, 4)] == [np.float32, np.uint8, np.float32]
