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
def image(rng):
    """Noise without black: black pixels are filled ones."""
    return Image.fromarray(rng.integers(1, 256, (24, 32, 3), dtype=np.uint8))


def applied(image, name, magnitude):
    result = apply_op(image, name, magnitude)
    assert (result.mode, result.size) == ('RGB', image.size)
    return np.asarray(result)


def nearest(pixels, matrix):
    """An affine map by its definition: pixel centre (x, y) from (a x + b y + c, d x + e y + f)."""
    a, b, c, d, e, f = matrix
    result = np.zeros_like(pixels)
    height, width = pixels.shape[:2]
    for y in range(height):
        for x in range(width):
            u = math.floor(a * (x + 0.5) + b * (y + 0.5) + c)
            v = math.floor(d * (x + 0.5) + e * (y + 0.5) + f)
            if 0 <= u < width and 0 <= v < height:
                result[y, x] = pixels[v, u]
    return result


def gray(pixels):
    """Gray values as in Pillow: ITU-R 601-2, rounded."""
    return np.floor(pixels @ np.array([0.299, 0.587, 0.114]) + 0.5)


def blended(degenerate, pixels, factor):
    return np.clip(degenerate + factor * (pixels - degenerate), 0, 255)


def test_operations_are_those_of_torchvision():
    space = augmentation_space(31, 224, 224)
    assert sorted(space) == sorted(SIGNED + UNSIGNED)
    assert [name for name in space if space[name][1]] == SIGNED


@pytest.mark.parametrize('bins', [2, 10, 31])
@pytest.mark.parametrize(('width', 'height'), [(224, 224), (331, 64), (176, 600)])
def test_magnitudes_are_those_of_torchvision(bins, width, height):
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
        # torch fuses multiplications and additions on processors that can.
        np.testing.assert_allclose(magnitudes, expected[name].tolist(), rtol=2e-7, atol=0, err_msg=name)
        assert [int(m) for m in magnitudes] == expected[name].int().tolist()


def test_magnitude_9_of_31_has_known_values():
    magnitudes = {name: m[9] for name, (m, _) in augmentation_space(31, 224, 224).items()}
    assert magnitudes['ShearX'] == pytest.approx(0.09)
    assert magnitudes['TranslateX'] == pytest.approx(30.4532, abs=1e-4)
    assert magnitudes['Rotate'] == pytest.approx(9.0)
    assert magnitudes['Color'] == pytest.approx(0.27)
    assert magnitudes['Posterize'] == 7
    assert magnitudes['Solarize'] == 178.5


@pytest.mark.parametrize('sign', [1, -1])
@pytest.mark.parametrize('slope', [0.09, 0.3])
def test_shearing_is_about_the_upper_left_corner(image, slope, sign):
    pixels, m = np.asarray(image), sign * slope
    # torchvision's matrix, of the angle atan(m) about (0, 0).
    t = math.tan(math.radians(math.degrees(math.atan(m))))
    np.testing.assert_array_equal(applied(image, 'ShearX', m), nearest(pixels, (1, t, 0, 0, 1, 0)))
    np.testing.assert_array_equal(applied(image, 'ShearY', m), nearest(pixels, (1, 0, 0, t, 1, 0)))


def test_shear_moves_rows_by_known_distances(image):
    pixels = np.asarray(image)
    actual = applied(image, 'ShearX', 0.3)
    for y, move in [(0, 0), (1, 0), (2, 1), (10, 3), (23, 7)]:  # 0.3 (y + 0.5), rounded
        np.testing.assert_array_equal(actual[y, : 32 - move], pixels[y, move:])
        assert not actual[y, 32 - move :].any()


@pytest.mark.parametrize(('magnitude', 'move'), [(5.0, 5), (5.9, 5), (-5.9, -5), (0.9, 0), (-0.9, 0)])
def test_translations_are_by_whole_pixels_and_leave_black(image, magnitude, move):
    pixels = np.asarray(image)
    expected = np.zeros_like(pixels)
    new, old = slice(max(0, move), 32 + min(0, move)), slice(max(0, -move), 32 - max(0, move))
    expected[:, new] = pixels[:, old]
    np.testing.assert_array_equal(applied(image, 'TranslateX', magnitude), expected)
    expected = np.zeros_like(pixels)
    new, old = slice(max(0, move), 24 + min(0, move)), slice(max(0, -move), 24 - max(0, move))
    expected[new] = pixels[old]
    np.testing.assert_array_equal(applied(image, 'TranslateY', magnitude), expected)


@pytest.mark.parametrize('degrees', [9.0, -9.0, 30.0])
def test_rotation_is_anticlockwise_about_the_centre(image, degrees):
    pixels, a = np.asarray(image), math.radians(degrees)
    cos, sin, cx, cy = math.cos(a), math.sin(a), 16, 12
    matrix = (cos, -sin, cx - cos * cx + sin * cy, sin, cos, cy - sin * cx - cos * cy)
    actual, expected = applied(image, 'Rotate', degrees), nearest(pixels, matrix)
    assert (actual != expected).any(axis=-1).mean() < 0.005  # Pillow rounds the matrix
    assert not actual[0, 0].any()
    assert not actual[-1, -1].any()


def test_rotation_by_90_degrees_is_exact():
    pixels = np.arange(1, 49, dtype=np.uint8).reshape(4, 4, 3)
    np.testing.assert_array_equal(applied(Image.fromarray(pixels), 'Rotate', 90), np.rot90(pixels))


@pytest.mark.parametrize('magnitude', [0.27, -0.27, 0.9, -0.9])
def test_enhancements_blend_with_black_gray_and_the_mean(image, magnitude):
    pixels, factor = np.asarray(image).astype(float), 1 + magnitude
    degenerate = {
        'Brightness': np.zeros_like(pixels),
        'Color': np.repeat(gray(pixels)[..., None], 3, -1),
        'Contrast': np.full_like(pixels, np.floor(gray(pixels).mean() + 0.5)),
    }
    for name, d in degenerate.items():  # Pillow cuts off fractions; its gray is of fixed point
        np.testing.assert_allclose(
            applied(image, name, magnitude), blended(d, pixels, factor), atol=2, err_msg=name
        )


@pytest.mark.parametrize('magnitude', [0.27, -0.9])
def test_sharpness_blends_with_a_blurred_image(image, magnitude):
    pixels = np.asarray(image).astype(float)
    kernel = torch.full((1, 1, 3, 3), 1 / 13, dtype=torch.float64)
    kernel[..., 1, 1] = 5 / 13
    blur = torch.nn.functional.conv2d(torch.from_numpy(pixels).permute(2, 0, 1)[:, None], kernel)
    degenerate = pixels.copy()
    degenerate[1:-1, 1:-1] = blur[:, 0].permute(1, 2, 0).numpy().round()
    actual = applied(image, 'Sharpness', magnitude)
    np.testing.assert_allclose(actual, blended(degenerate, pixels, 1 + magnitude), atol=2)


@pytest.mark.parametrize('bits', [8, 7, 4])
def test_posterize_keeps_the_upper_bits(image, bits):
    expected = np.asarray(image) & (256 - 2 ** (8 - bits))
    np.testing.assert_array_equal(applied(image, 'Posterize', float(bits)), expected)


@pytest.mark.parametrize('threshold', [255.0, 178.5, 128.0, 0.0])
def test_solarize_inverts_bright_pixels(image, threshold):
    pixels = np.asarray(image)
    expected = np.where(pixels < threshold, pixels, 255 - pixels)
    np.testing.assert_array_equal(applied(image, 'Solarize', threshold), expected)


def test_autocontrast_stretches_each_channel(rng):
    pixels = rng.integers(60, 120, (24, 32, 3)).astype(np.uint8)
    pixels[..., 1] = 77  # nothing to stretch
    low, high = pixels.min(axis=(0, 1)).astype(float), pixels.max(axis=(0, 1))
    expected = (pixels - low) * 255 / np.maximum(1, high - low)
    expected[..., 1] = 77
    np.testing.assert_allclose(applied(Image.fromarray(pixels), 'AutoContrast', 0.0), expected, atol=1)


def test_equalize_makes_values_equally_frequent():
    x = np.arange(64 * 64) / (64 * 64)
    pixels = np.repeat((255 * x**3).astype(np.uint8).reshape(64, 64, 1), 3, -1)
    actual = applied(Image.fromarray(pixels), 'Equalize', 0.0)
    quantiles = np.quantile(actual[pixels > 8], [0.25, 0.5, 0.75]) - actual[pixels > 8].min()
    np.testing.assert_allclose(quantiles / (255 - actual[pixels > 8].min()), [0.25, 0.5, 0.75], atol=0.03)


def test_identity_and_magnitude_0_change_nothing(image):
    pixels = np.asarray(image)
    np.testing.assert_array_equal(applied(image, 'Identity', 0.0), pixels)
    for name in SIGNED:
        np.testing.assert_array_equal(applied(image, name, 0.0), pixels, err_msg=name)


def test_unknown_operation_is_an_error(image):
    with pytest.raises(ValueError, match="no such operation: 'Invert'"):
        apply_op(image, 'Invert', 0.0)


def test_operations_and_signs_are_drawn_uniformly(monkeypatch):
    calls = []

    def record(image, name, magnitude):
        calls.append((name, magnitude))
        return image

    monkeypatch.setattr('epsanet_jax.data.randaugment.apply_op', record)
    rng, image = np.random.default_rng(0), Image.new('RGB', (224, 224))
    for _ in range(1400):
        RandAugment(num_ops=2, magnitude=9)(image, rng)
    assert len(calls) == 2800
    names = [name for name, _ in calls]
    assert all(150 < names.count(name) < 250 for name in SIGNED + UNSIGNED)
    space = augmentation_space(31, 224, 224)
    for name in SIGNED:
        drawn = [m for n, m in calls if n == name]
        assert {abs(m) for m in drawn} == {space[name][0][9]}
        assert 0.35 < np.mean(np.array(drawn) > 0) < 0.65
    assert {m for n, m in calls if n == 'Solarize'} == {178.5}


def test_generator_determines_the_result(image):
    augment = RandAugment(3, 30)
    results = [np.asarray(augment(image, np.random.default_rng(seed))) for seed in range(20)]
    again = [np.asarray(augment(image, np.random.default_rng(seed))) for seed in range(20)]
    np.testing.assert_array_equal(results, again)
    assert len({r.tobytes() for r in results}) > 15
    assert {r.shape for r in results} == {(24, 32, 3)}


def test_zero_operations_draw_no_random_number(image):
    rng = np.random.default_rng(0)
    assert RandAugment(num_ops=0)(image, rng) is image
    assert rng.random() == np.random.default_rng(0).random()
