"""RandAugment against torchvision's definition, in numpy and torch."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from epsanet_jax.data.randaugment import RandAugment, apply_op, augmentation_space

SIGNED = [
    'ShearX',
    'ShearY',
    'TranslateX',
    'TranslateY',
    'Rotate',
    'Brightness',
    'Color',
    'Contrast',
    'Sharpness',
]
UNSIGNED = ['Identity', 'Posterize', 'Solarize', 'AutoContrast', 'Equalize']


@pytest.fixture
def picture(rng):
    """Noise without black, so that what is filled can be told."""
    return Image.fromarray(rng.integers(1, 256, (24, 32, 3), dtype=np.uint8))


def applied(picture, name, magnitude):
    result = apply_op(picture, name, magnitude)
    assert (result.mode, result.size) == ('RGB', picture.size)
    return np.asarray(result)


def nearest(image, matrix):
    """The definition of an affine map: (x, y), centres of pixels, from (a x + b y + c, d x + e y + f)."""
    a, b, c, d, e, f = matrix
    result = np.zeros_like(image)
    height, width = image.shape[:2]
    for y in range(height):
        for x in range(width):
            u = math.floor(a * (x + 0.5) + b * (y + 0.5) + c)
            v = math.floor(d * (x + 0.5) + e * (y + 0.5) + f)
            if 0 <= u < width and 0 <= v < height:
                result[y, x] = image[v, u]
    return result


def gray(image):
    """Pillow's: ITU-R 601-2, rounded."""
    return np.floor(image @ np.array([0.299, 0.587, 0.114]) + 0.5)


def blended(degenerate, image, factor):
    return np.clip(degenerate + factor * (image - degenerate), 0, 255)


def test_the_operations_are_torchvision_s():
    space = augmentation_space(31, 224, 224)
    assert sorted(space) == sorted(SIGNED + UNSIGNED)
    assert [name for name in space if space[name][1]] == SIGNED


@pytest.mark.parametrize('bins', [2, 10, 31])
@pytest.mark.parametrize(('width', 'height'), [(224, 224), (331, 64), (176, 600)])
def test_the_magnitudes_are_torchvision_s(bins, width, height):
    expected = {
        'ShearX': torch.linspace(0.0, 0.3, bins),
        'ShearY': torch.linspace(0.0, 0.3, bins),
        'TranslateX': torch.linspace(0.0, 150.0 / 331.0 * width, bins),
        'TranslateY': torch.linspace(0.0, 150.0 / 331.0 * height, bins),
        'Rotate': torch.linspace(0.0, 30.0, bins),
        **dict.fromkeys(['Brightness', 'Color', 'Contrast', 'Sharpness'], torch.linspace(0.0, 0.9, bins)),
        'Posterize': 8 - (torch.arange(bins) / ((bins - 1) / 4)).round().int(),
        'Solarize': torch.linspace(255.0, 0.0, bins),
        **dict.fromkeys(['Identity', 'AutoContrast', 'Equalize'], torch.zeros(bins)),
    }
    for name, (magnitudes, _) in augmentation_space(bins, width, height).items():
        # torch fuses multiplications and additions where the processor does.
        np.testing.assert_allclose(magnitudes, expected[name].tolist(), rtol=2e-7, atol=0, err_msg=name)
        assert [int(m) for m in magnitudes] == expected[name].int().tolist()


def test_magnitude_9_of_31():
    magnitudes = {name: m[9] for name, (m, _) in augmentation_space(31, 224, 224).items()}
    assert magnitudes['ShearX'] == pytest.approx(0.09)
    assert magnitudes['TranslateX'] == pytest.approx(30.4532, abs=1e-4)
    assert magnitudes['Rotate'] == pytest.approx(9.0)
    assert magnitudes['Color'] == pytest.approx(0.27)
    assert magnitudes['Posterize'] == 7
    assert magnitudes['Solarize'] == 178.5


@pytest.mark.parametrize('sign', [1, -1])
@pytest.mark.parametrize('slope', [0.09, 0.3])
def test_shearing_is_about_the_upper_left_corner(picture, slope, sign):
    image, m = np.asarray(picture), sign * slope
    # torchvision's matrix, of the angle atan(m) about (0, 0).
    t = math.tan(math.radians(math.degrees(math.atan(m))))
    np.testing.assert_array_equal(applied(picture, 'ShearX', m), nearest(image, (1, t, 0, 0, 1, 0)))
    np.testing.assert_array_equal(applied(picture, 'ShearY', m), nearest(image, (1, 0, 0, t, 1, 0)))


def test_a_shear_whose_moves_are_known(picture):
    image = np.asarray(picture)
    actual = applied(picture, 'ShearX', 0.3)
    for y, move in [(0, 0), (1, 0), (2, 1), (10, 3), (23, 7)]:  # 0.3 (y + 0.5), rounded
        np.testing.assert_array_equal(actual[y, : 32 - move], image[y, move:])
        assert not actual[y, 32 - move :].any()


@pytest.mark.parametrize(('magnitude', 'move'), [(5.0, 5), (5.9, 5), (-5.9, -5), (0.9, 0), (-0.9, 0)])
def test_translations_are_by_whole_pixels_and_leave_black(picture, magnitude, move):
    image = np.asarray(picture)
    expected = np.zeros_like(image)
    new, old = slice(max(0, move), 32 + min(0, move)), slice(max(0, -move), 32 - max(0, move))
    expected[:, new] = image[:, old]
    np.testing.assert_array_equal(applied(picture, 'TranslateX', magnitude), expected)
    expected = np.zeros_like(image)
    new, old = slice(max(0, move), 24 + min(0, move)), slice(max(0, -move), 24 - max(0, move))
    expected[new] = image[old]
    np.testing.assert_array_equal(applied(picture, 'TranslateY', magnitude), expected)


@pytest.mark.parametrize('degrees', [9.0, -9.0, 30.0])
def test_rotation_is_anticlockwise_about_the_centre(picture, degrees):
    image, a = np.asarray(picture), math.radians(degrees)
    cos, sin, cx, cy = math.cos(a), math.sin(a), 16, 12
    matrix = (cos, -sin, cx - cos * cx + sin * cy, sin, cos, cy - sin * cx - cos * cy)
    actual, expected = applied(picture, 'Rotate', degrees), nearest(image, matrix)
    assert (actual != expected).any(axis=-1).mean() < 0.005  # Pillow rounds the matrix
    assert not actual[0, 0].any()
    assert not actual[-1, -1].any()


def test_a_quarter_turn():
    image = np.arange(1, 49, dtype=np.uint8).reshape(4, 4, 3)
    np.testing.assert_array_equal(applied(Image.fromarray(image), 'Rotate', 90), np.rot90(image))


@pytest.mark.parametrize('magnitude', [0.27, -0.27, 0.9, -0.9])
def test_enhancements_move_away_from_black_gray_and_the_mean(picture, magnitude):
    image, factor = np.asarray(picture).astype(float), 1 + magnitude
    degenerate = {
        'Brightness': np.zeros_like(image),
        'Color': np.repeat(gray(image)[..., None], 3, -1),
        'Contrast': np.full_like(image, np.floor(gray(image).mean() + 0.5)),
    }
    for name, d in degenerate.items():  # Pillow cuts off fractions; its gray is of fixed point
        np.testing.assert_allclose(
            applied(picture, name, magnitude), blended(d, image, factor), atol=2, err_msg=name
        )


@pytest.mark.parametrize('magnitude', [0.27, -0.9])
def test_sharpening_moves_away_from_a_blur(picture, magnitude):
    image = np.asarray(picture).astype(float)
    kernel = torch.full((1, 1, 3, 3), 1 / 13, dtype=torch.float64)
    kernel[..., 1, 1] = 5 / 13
    blur = torch.nn.functional.conv2d(torch.from_numpy(image).permute(2, 0, 1)[:, None], kernel)
    degenerate = image.copy()
    degenerate[1:-1, 1:-1] = blur[:, 0].permute(1, 2, 0).numpy().round()
    actual = applied(picture, 'Sharpness', magnitude)
    np.testing.assert_allclose(actual, blended(degenerate, image, 1 + magnitude), atol=2)


@pytest.mark.parametrize('bits', [8, 7, 4])
def test_posterizing_keeps_the_upper_bits(picture, bits):
    expected = np.asarray(picture) & (256 - 2 ** (8 - bits))
    np.testing.assert_array_equal(applied(picture, 'Posterize', float(bits)), expected)


@pytest.mark.parametrize('threshold', [255.0, 178.5, 128.0, 0.0])
def test_solarizing_inverts_what_is_bright(picture, threshold):
    image = np.asarray(picture)
    expected = np.where(image < threshold, image, 255 - image)
    np.testing.assert_array_equal(applied(picture, 'Solarize', threshold), expected)


def test_contrast_is_stretched_for_each_channel(rng):
    image = rng.integers(60, 120, (24, 32, 3)).astype(np.uint8)
    image[..., 1] = 77  # nothing to stretch
    low, high = image.min(axis=(0, 1)).astype(float), image.max(axis=(0, 1))
    expected = (image - low) * 255 / np.maximum(1, high - low)
    expected[..., 1] = 77
    np.testing.assert_allclose(applied(Image.fromarray(image), 'AutoContrast', 0.0), expected, atol=1)


def test_equalizing_makes_values_equally_frequent():
    x = np.arange(64 * 64) / (64 * 64)
    image = np.repeat((255 * x**3).astype(np.uint8).reshape(64, 64, 1), 3, -1)
    actual = applied(Image.fromarray(image), 'Equalize', 0.0)
    quantiles = np.quantile(actual[image > 8], [0.25, 0.5, 0.75]) - actual[image > 8].min()
    np.testing.assert_allclose(quantiles / (255 - actual[image > 8].min()), [0.25, 0.5, 0.75], atol=0.03)


def test_identity_and_magnitude_0_change_nothing(picture):
    image = np.asarray(picture)
    np.testing.assert_array_equal(applied(picture, 'Identity', 0.0), image)
    for name in SIGNED:
        np.testing.assert_array_equal(applied(picture, name, 0.0), image, err_msg=name)


def test_an_unknown_operation_is_an_error(picture):
    with pytest.raises(ValueError, match="no operation 'Invert'"):
        apply_op(picture, 'Invert', 0.0)


def test_operations_and_signs_are_drawn_evenly(monkeypatch):
    calls = []

    def record(picture, name, magnitude):
        calls.append((name, magnitude))
        return picture

    monkeypatch.setattr('epsanet_jax.data.randaugment.apply_op', record)
    rng, picture = np.random.default_rng(0), Image.new('RGB', (224, 224))
    for _ in range(1400):
        RandAugment(num_ops=2, magnitude=9)(picture, rng)
    assert len(calls) == 2800
    names = [name for name, _ in calls]
    assert all(150 < names.count(name) < 250 for name in SIGNED + UNSIGNED)
    space = augmentation_space(31, 224, 224)
    for name in SIGNED:
        drawn = [m for n, m in calls if n == name]
        assert {abs(m) for m in drawn} == {space[name][0][9]}
        assert 0.35 < np.mean(np.array(drawn) > 0) < 0.65
    assert {m for n, m in calls if n == 'Solarize'} == {178.5}


def test_the_generator_decides(picture):
    augment = RandAugment(3, 30)
    results = [np.asarray(augment(picture, np.random.default_rng(seed))) for seed in range(20)]
    again = [np.asarray(augment(picture, np.random.default_rng(seed))) for seed in range(20)]
    np.testing.assert_array_equal(results, again)
    assert len({r.tobytes() for r in results}) > 15
    assert {r.shape for r in results} == {(24, 32, 3)}


def test_no_operations_draw_nothing(picture):
    rng = np.random.default_rng(0)
    assert RandAugment(num_ops=0)(picture, rng) is picture
    assert rng.random() == np.random.default_rng(0).random()
