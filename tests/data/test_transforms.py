"""Crops, jitter and erasing have the sizes and distributions of torchvision."""

import io
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from epsanet_jax.data.decode import BadImageError, decode
from epsanet_jax.data.randaugment import RandAugment
from epsanet_jax.data.transforms import (
    CentreCrop,
    ColorJitter,
    RandomCrop,
    RandomErasing,
    TrainTransform,
    adjust_hue,
)


def encode(image, kind='PNG', **options):
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def gradient(width, height):
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x % 256, y % 256, (x + y) % 256], -1).astype(np.uint8))


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK', 'I;16'])
def test_images_of_every_mode_become_rgb(mode):
    gray = Image.fromarray(np.full((3, 5), 200, np.uint8))
    if mode == 'I;16':
        data = encode(Image.fromarray(np.full((3, 5), 200 * 257, np.uint16)))
    elif mode == 'CMYK':
        data = encode(gray.convert('RGB').convert('CMYK'), 'TIFF')
    else:
        data = encode(gray.convert('RGB').convert(mode, dither=Image.Dither.NONE))
    image = decode(data)
    assert (image.mode, image.size) == ('RGB', (5, 3))
    expected = 255 if mode == '1' else 200
    np.testing.assert_allclose(np.asarray(image), expected, atol=8 if mode == 'P' else 0)


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
def test_files_that_are_not_images_are_refused(data):
    with pytest.raises(BadImageError, match=r'cannot decode the image: .'):
        decode(data)


def test_empty_file_is_reported_as_empty():
    with pytest.raises(BadImageError, match='the file is empty'):
        decode(b'')


def test_random_crops_stay_inside_the_image_and_within_area_and_ratio():
    rng = np.random.default_rng(0)
    crop = RandomCrop(8, (0.2, 0.5), (0.5, 2.0))
    boxes = np.array([crop.box(100, 60, rng) for _ in range(500)])
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
def test_images_too_thin_for_the_ratio_are_cropped_in_the_centre(size, box):
    crop = RandomCrop(8, (0.9, 1.0))
    assert crop.box(*size, np.random.default_rng(0)) == box
    assert crop(gradient(*size), np.random.default_rng(0)).shape == (8, 8, 3)


def test_crop_of_the_whole_image_is_pillow_s_bilinear_resize():
    image = gradient(40, 40)
    expected = np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR))
    crop = RandomCrop(16, (1.0, 1.0), (1.0, 1.0), flip=False)
    np.testing.assert_array_equal(crop(image, np.random.default_rng(0)), expected)


class Script:
    """A generator with given draws, which records the arguments of `integers`."""

    def __init__(self, uniform=(), order=(0, 1, 2, 3)):
        self._uniform, self._order, self.asked = iter(uniform), np.array(order), []

    def uniform(self, low, high):
        value = next(self._uniform)
        assert low <= value <= high
        return value

    def integers(self, high):
        self.asked.append(high)
        return high - 1

    def permutation(self, n):
        return self._order[:n]

    def random(self):
        return 0.0


@pytest.mark.parametrize(
    ('size', 'draws', 'box'),
    [
        # fraction of the area, width / height; computed by hand from torchvision's get_params
        ((500, 375), [0.08, 3 / 4], (394, 234, 106, 141)),  # sqrt(11250), sqrt(20000)
        ((500, 375), [0.5, 1.0], (194, 69, 306, 306)),  # sqrt(93750) = 306.19
        ((333, 500), [0.32, 4 / 3], (66, 300, 267, 200)),  # sqrt(71040) = 266.53, sqrt(39960) = 199.9
        ((500, 375), [1.0, 1.0, 0.02, 1.0], (439, 314, 61, 61)),  # 433 > 375: drawn again; sqrt(3750)
        ((333, 500), [1.0, 4 / 3] * 10, (0, 28, 333, 444)),  # 471 > 333, ten times
        ((2000, 20), [1.0, 1.0] * 10, (986, 0, 27, 20)),  # round(26.67); (2000 - 27) // 2
        ((20, 2000), [1.0, 1.0] * 10, (0, 986, 20, 27)),
        ((1, 500), [1.0, 1.0] * 10, (0, 249, 1, 1)),
        ((375, 500), [1.0, 4 / 3] * 10, (0, 0, 375, 500)),  # exactly 3 / 4 is allowed
        ((500, 375), [1.0, 3 / 4] * 10, (0, 0, 500, 375)),
    ],
)
def test_crop_boxes_are_those_of_random_resized_crop(size, draws, box):
    uniform = [d if i % 2 == 0 else math.log(d) for i, d in enumerate(draws)]
    rng = Script(uniform)
    assert RandomCrop(224, (0.01, 1.0)).box(*size, rng) == box
    left, top, width, height = box
    if rng.asked:  # any position where the box fits
        assert rng.asked == [size[0] - width + 1, size[1] - height + 1]
        assert (left, top) == (size[0] - width, size[1] - height)


@pytest.mark.parametrize('size', [(333, 500), (40, 30), (700, 610)])
def test_resizing_is_bilinear_with_antialiasing_within_the_box(rng, size):
    image = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    crop = RandomCrop(96, flip=False)
    left, top, width, height = crop.box(*size, np.random.default_rng(5))
    cut = torch.from_numpy(image[top : top + height, left : left + width]).permute(2, 0, 1).double()
    expected = torch.nn.functional.interpolate(
        cut[None], (96, 96), mode='bilinear', align_corners=False, antialias=True
    )
    actual = crop(Image.fromarray(image), np.random.default_rng(5))
    assert (actual.dtype, actual.shape) == (np.uint8, (96, 96, 3))
    np.testing.assert_allclose(actual, expected[0].permute(1, 2, 0), atol=1.01)  # two roundings


def test_half_of_the_images_are_mirrored():
    crop = RandomCrop(16, (1.0, 1.0), (1.0, 1.0))
    image = gradient(16, 16)
    rng = np.random.default_rng(0)
    mirrored = [bool(np.array_equal(crop(image, rng), np.asarray(image)[:, ::-1])) for _ in range(400)]
    assert 0.4 < np.mean(mirrored) < 0.6


@pytest.mark.parametrize(
    ('size', 'resized'),
    [((100, 60), (106, 64)), ((60, 101), (64, 107)), ((64, 64), (64, 64)), ((3, 2), (96, 64))],
)
def test_evaluation_resizes_the_shorter_side_and_crops_the_centre(size, resized):
    image = gradient(*size)
    expected = np.asarray(image.resize(resized, Image.Resampling.BILINEAR))
    top, left = round((resized[1] - 56) / 2), round((resized[0] - 56) / 2)
    actual = CentreCrop(56, 64)(image)
    assert actual.shape == (56, 56, 3)
    np.testing.assert_array_equal(actual, expected[top : top + 56, left : left + 56])


@pytest.mark.parametrize(
    ('size', 'resized', 'corner'),
    [
        # computed by hand: int(256 * longer / shorter), and halves rounded to even
        ((500, 375), (341, 256), (58, 16)),  # 341.33; 58.5
        ((375, 500), (256, 341), (16, 58)),
        ((333, 500), (256, 384), (16, 80)),  # 384.38
        ((1340, 1000), (343, 256), (60, 16)),  # 59.5
        ((257, 256), (257, 256), (16, 16)),  # 16.5
        ((256, 256), (256, 256), (16, 16)),
        ((2000, 20), (25600, 256), (12688, 16)),
        ((1, 500), (256, 128000), (16, 63888)),
    ],
)
def test_evaluation_sizes_are_those_of_resize_and_center_crop(rng, size, resized, corner):
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    left, top = corner
    expected = image.resize(resized, Image.Resampling.BILINEAR).crop((left, top, left + 224, top + 224))
    actual = CentreCrop(224, 256)(image)
    assert (actual.dtype, actual.shape) == (np.uint8, (224, 224, 3))
    thin = max(size) > 16 * min(size)
    np.testing.assert_allclose(actual.astype(int), np.asarray(expected).astype(int), atol=1 if thin else 0)


def test_thin_image_needs_little_memory():
    assert (
        CentreCrop(224, 256)(Image.new('RGB', (1, 200_000), (1, 2, 3))).tolist() == [[[1, 2, 3]] * 224] * 224
    )


@pytest.fixture
def image(rng):
    return Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))


@pytest.mark.parametrize('order', list(itertools.permutations(range(4)))[::5])
def test_jitter_applies_its_changes_in_the_order_drawn(image, order):
    factors = (0.7, 1.3, 0.8, 0.07)
    expected = image
    for i in order:
        if i == 3:
            expected = adjust_hue(expected, 0.07)
        else:
            kind = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[i]
            expected = kind(expected).enhance(factors[i])
    actual = ColorJitter(0.4, 0.4, 0.4, 0.1)(image, Script(factors, order))
    assert (actual.mode, actual.size) == ('RGB', (32, 24))
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(('brightness', 'low', 'high'), [(0.4, 60, 140), (1.5, 0, 250)])
def test_jitter_factors_are_around_1_and_not_below_0(brightness, low, high):
    gray, rng = Image.new('RGB', (2, 2), (100, 100, 100)), np.random.default_rng(0)
    values = np.array([np.asarray(ColorJitter(brightness)(gray, rng))[0, 0, 0] for _ in range(2000)])
    assert low <= values.min() < low + 3
    assert high - 3 < values.max() <= high
    assert values.mean() == pytest.approx((low + high) / 2, abs=5)


def test_jitter_of_0_changes_nothing(image):
    assert ColorJitter()(image, np.random.default_rng(0)) is image


@pytest.mark.parametrize('factor', [-0.5, -0.1, 0.003, 0.1, 0.5])
def test_hue_wraps_around(image, factor):
    hsv = np.array(image.convert('HSV'))
    # As in torchvision: the bytes overflow.
    hsv[..., 0] += np.int32(factor * 255).astype(np.uint8)
    expected = Image.merge('HSV', [Image.fromarray(np.ascontiguousarray(c)) for c in np.moveaxis(hsv, -1, 0)])
    np.testing.assert_array_equal(adjust_hue(image, factor), expected.convert('RGB'))


def test_hue_rotated_by_a_third_turns_red_to_green():
    red = Image.new('RGB', (1, 1), (255, 0, 0))
    np.testing.assert_allclose(np.asarray(adjust_hue(red, 1 / 3))[0, 0], [0, 255, 0], atol=3)
    np.testing.assert_allclose(np.asarray(adjust_hue(red, -1 / 3))[0, 0], [0, 0, 255], atol=6)


def test_hue_is_rotated_in_both_directions():
    red, rng = Image.new('RGB', (1, 1), (255, 0, 0)), np.random.default_rng(0)
    jitter = ColorJitter(hue=0.1)
    hues = [jitter(red, rng).convert('HSV').getpixel((0, 0))[0] for _ in range(500)]
    turns = (np.array(hues) + 128) % 256 - 128
    assert -26 <= turns.min() < -22
    assert 22 < turns.max() <= 26
    assert abs(turns.mean()) < 2


def erased(erasing, height, width, count):
    """The rectangles erased from white images: top, left, height, width."""
    rng, found = np.random.default_rng(0), []
    white = np.full((height, width, 3), 255, np.uint8)
    for _ in range(count):
        image = erasing(white, rng)
        assert (image.dtype, image.shape) == (np.uint8, (height, width, 3))
        changed = (image != 255).any(axis=-1)
        if changed.any():
            rows, columns = changed.any(axis=1).nonzero()[0], changed.any(axis=0).nonzero()[0]
            box = rows[0], columns[0], rows[-1] + 1 - rows[0], columns[-1] + 1 - columns[0]
            np.testing.assert_array_equal(image[changed], np.broadcast_to(erasing.fill, (box[2] * box[3], 3)))
            found.append(box)
    assert (white == 255).all()
    return np.array(found)


def test_rectangles_are_erased_within_area_and_ratio():
    top, left, height, width = erased(RandomErasing(1.0, fill=(124, 116, 104)), 100, 150, 1500).T
    assert len(top) == 1500
    area, ratio = height * width / 15000, height / width
    assert 0.018 < area.min() < 0.03
    assert 0.3 < area.max() < 0.34
    assert 0.28 < ratio.min() < 0.35
    assert 2.8 < ratio.max() < 3.4
    assert np.log(ratio).mean() == pytest.approx(0, abs=0.1)
    assert (top.min(), left.min()) == (0, 0)
    assert (top + height).max() == 100
    assert (left + width).max() == 150


def test_erasing_has_its_probability():
    assert len(erased(RandomErasing(0.25), 32, 32, 1000)) == pytest.approx(250, abs=40)
    assert len(erased(RandomErasing(0.0), 32, 32, 100)) == 0


def test_rectangle_that_does_not_fit_is_not_erased():
    # As in torchvision, a rectangle must be smaller than the image in both directions.
    assert len(erased(RandomErasing(1.0, scale=(1.0, 1.0), ratio=(1.0, 1.0)), 32, 32, 10)) == 0
    assert len(erased(RandomErasing(1.0, scale=(0.9, 0.9), ratio=(1.0, 1.0)), 32, 32, 10)) == 10


def test_crop_alone_draws_no_other_random_number(image):
    crop = RandomCrop(16)
    ours, theirs = np.random.default_rng(1), np.random.default_rng(1)
    for _ in range(20):
        np.testing.assert_array_equal(TrainTransform(crop)(image, ours), crop(image, theirs))
    assert ours.bit_generator.state == theirs.bit_generator.state


def test_all_transforms_are_applied_in_torchvision_s_order(image):
    parts = (
        RandomCrop(16),
        ColorJitter(0.4, 0.4, 0.4, 0.1),
        RandAugment(2, 20),
        RandomErasing(1.0, fill=(1, 2, 3)),
    )
    crop, jitter, randaugment, erasing = parts
    transform = pickle.loads(pickle.dumps(TrainTransform(*parts)))
    seen = set()
    for seed in range(20):
        ours, theirs = np.random.default_rng(seed), np.random.default_rng(seed)
        actual = transform(image, ours)
        assert (actual.dtype, actual.shape) == (np.uint8, (16, 16, 3))
        expected = randaugment(jitter(Image.fromarray(crop(image, theirs)), theirs), theirs)
        np.testing.assert_array_equal(actual, erasing(np.asarray(expected), theirs))
        seen.add(actual.tobytes())
    assert len(seen) == 20
