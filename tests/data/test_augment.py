"""Normalisation, mixup and cutmix on the device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from epsanet_jax.data.augment import mix, normalize, row_keys

MIXES = {'mixup': (0.2, 0.0), 'cutmix': (0.0, 1.0), 'both': (0.2, 1.0)}
mixed = jax.jit(mix, static_argnames=('mixup_alpha', 'cutmix_alpha'))


def keys_of(rows, seed=3, step=7):
    return row_keys(seed, step, jnp.arange(rows) if isinstance(rows, int) else rows)


def random_batch(rng, rows=32, height=12, width=16, dtype=np.float32):
    images = rng.standard_normal((rows, height, width, 3)).astype(dtype)
    targets = rng.dirichlet(np.ones(10), rows).astype(dtype)
    return images, targets


def swap(a):
    """The partner of every row."""
    return a[np.arange(len(a)) ^ 1]


def shares(rows, alphas, **key):
    """The weight of each row's own target [rows], and of its own pixels [rows, 12, 16]."""
    own = jnp.arange(rows) % 2 == 0
    images = jnp.broadcast_to(own[:, None, None, None], (rows, 12, 16, 3)).astype(jnp.float32)
    targets = jax.nn.one_hot(jnp.arange(rows) % 2, 10, dtype=jnp.float32)
    pixels, targets = mixed(images, targets, keys_of(rows, **key), *alphas)
    own = np.asarray(own)
    pixels = np.where(own[:, None, None], pixels[..., 0], 1 - pixels[..., 0])
    return np.where(own, targets[:, 0], targets[:, 1]), pixels


def test_normalize_subtracts_the_mean_and_divides_by_std():
    images = np.array([[[[0, 128, 255]]]], np.uint8)
    y = normalize(images, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), jnp.float64)
    expected = (images / 255 - np.array([0.5, 0.4, 0.3])) / np.array([0.2, 0.25, 0.3])
    np.testing.assert_allclose(y, expected, rtol=1e-14)
    assert normalize(images, (0.5,) * 3, (0.2,) * 3, jnp.bfloat16).dtype == jnp.bfloat16


def test_alphas_of_0_change_nothing(rng):
    images, targets = random_batch(rng, 3)
    actual = mix(images, targets, keys_of(3), 0.0, 0.0)
    assert actual[0] is images
    assert actual[1] is targets


def test_odd_number_of_rows_is_an_error(rng):
    with pytest.raises(ValueError, match='3 rows do not divide into pairs'):
        mix(*random_batch(rng, 3), keys_of(3), 0.2, 0.0)


@pytest.mark.parametrize('alphas', MIXES.values(), ids=MIXES)
def test_targets_keep_their_sum_and_are_mixed_like_the_pixels(rng, alphas):
    images, targets = random_batch(rng)
    actual_images, actual = mixed(images, targets, keys_of(32), *alphas)
    np.testing.assert_allclose(actual.sum(axis=1), 1, rtol=1e-6)
    assert (actual >= 0).all()
    share, of_pixels = shares(32, alphas)
    share = share[:, None]
    np.testing.assert_allclose(actual, share * targets + (1 - share) * swap(targets), rtol=1e-5)
    np.testing.assert_allclose(of_pixels.mean(axis=(1, 2)), share[:, 0], rtol=1e-5, atol=1e-6)
    assert not np.array_equal(actual_images, images)


def test_mixup_is_the_weighted_sum_of_two_images(rng):
    images, targets = random_batch(rng, dtype=np.float64)
    actual, actual_targets = mixed(images, targets, keys_of(32), *MIXES['mixup'])
    share = shares(32, MIXES['mixup'])[0].astype(np.float64)[:, None]
    expected = share * targets + (1 - share) * swap(targets)
    np.testing.assert_allclose(actual_targets, expected, rtol=0, atol=1e-15)
    share = share[:, :, None, None]
    np.testing.assert_allclose(actual, share * images + (1 - share) * swap(images), rtol=0, atol=1e-14)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_cutmix_replaces_a_box_by_the_same_box_of_the_partner(rng, dtype):
    images, targets = random_batch(rng)
    images = jnp.asarray(images, dtype)
    actual, actual_targets = mixed(images, targets, keys_of(32), *MIXES['cutmix'])
    assert actual.dtype == dtype
    assert actual_targets.dtype == jnp.float32
    images, actual = np.asarray(images), np.asarray(actual)
    own = (actual == images).all(axis=-1)  # [N, H, W]
    np.testing.assert_array_equal(actual, np.where(own[..., None], images, swap(images)))
    inside = ~own
    box = inside.any(axis=2)[:, :, None] & inside.any(axis=1)[:, None, :]
    np.testing.assert_array_equal(inside, box)
    for side in (inside.any(axis=2), inside.any(axis=1)):  # without gaps
        assert (np.abs(np.diff(np.pad(side.astype(int), ((0, 0), (1, 1))))).sum(axis=1) <= 2).all()
    assert len({b.tobytes() for b in inside}) > 20


def test_cutmix_weighs_targets_by_the_area_of_the_box():
    share, pixels = shares(4000, MIXES['cutmix'])
    assert set(np.unique(pixels)) == {0, 1}
    area = pixels.mean(axis=(1, 2), dtype=np.float64).astype(np.float32)
    np.testing.assert_array_max_ulp(share, area, 1)  # XLA multiplies by the reciprocal
    assert (share[area == 1] == 1).all()


@pytest.mark.parametrize('alpha', [0.2, 4.0])
def test_mixup_weights_are_beta_distributed(alpha):
    share, pixels = shares(4000, (alpha, 0.0))
    np.testing.assert_allclose(pixels, np.broadcast_to(share[:, None, None], pixels.shape), atol=1e-6)
    assert share.mean() == pytest.approx(0.5, abs=0.03)
    at = np.array([0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
    actual = (share[:, None] < at).mean(axis=0)
    np.testing.assert_allclose(actual, scipy.stats.beta(alpha, alpha).cdf(at), atol=0.03)


def test_cutmix_boxes_are_distributed_as_in_torchvision():
    _, pixels = shares(4000, MIXES['cutmix'])
    rng, boxes = np.random.default_rng(0), np.zeros((4000, 12, 16))
    for box in boxes:
        half = 0.5 * np.sqrt(1 - rng.beta(1, 1))
        (top, bottom), (left, right) = (
            (max(centre - int(half * size), 0), min(centre + int(half * size), size))
            for size, centre in ((12, rng.integers(12)), (16, rng.integers(16)))
        )
        box[top:bottom, left:right] = 1
    np.testing.assert_allclose((1 - pixels).mean(axis=0), boxes.mean(axis=0), atol=0.04)
    at = np.linspace(0.05, 0.95, 10)
    areas = [(b.mean(axis=(1, 2))[:, None] < at).mean(axis=0) for b in (1 - pixels, boxes)]
    np.testing.assert_allclose(*areas, atol=0.04)


def test_with_both_alphas_half_of_the_rows_use_cutmix():
    share, pixels = shares(4000, (1.0, 1.0))
    cut = ((pixels == 0) | (pixels == 1)).all(axis=(1, 2))
    assert 0.45 < cut.mean() < 0.55
    assert ((share[~cut] > 0) & (share[~cut] < 1)).all()


def test_draws_differ_between_rows_steps_and_seeds():
    draws = [shares(32, MIXES['mixup'], seed=s, step=t)[0] for s, t in [(3, 7), (3, 8), (4, 7)]]
    assert len(np.unique(np.concatenate(draws))) > 90
    np.testing.assert_array_equal(shares(32, MIXES['mixup'])[0], draws[0])
    large = [row_keys(seed, 2**20, jnp.arange(2)) for seed in (2**32 - 1, jnp.uint32(2**32 - 1))]
    np.testing.assert_array_equal(*map(jax.random.key_data, large))


@pytest.mark.parametrize('rows', [2, 16])
def test_rows_do_not_depend_on_the_microbatch_size(rng, strict, rows):
    images, targets = random_batch(rng)
    alphas = MIXES['both']
    expected = mixed(images, targets, keys_of(32), *alphas)
    for first in range(0, 32, rows):
        part = slice(first, first + rows)
        actual = mixed(images[part], targets[part], keys_of(jnp.arange(first, first + rows)), *alphas)
        for a, e in zip(actual, expected, strict=True):
            np.testing.assert_array_equal(a, e[part])


def test_rows_do_not_depend_on_devices_or_jax_s_default_generator(rng):
    images, targets = random_batch(rng)
    mesh = jax.make_mesh((8,), ('rows',), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec('rows')

    def local(images, targets, rows, step):
        return mix(images, targets, row_keys(3, step, rows), 0.2, 1.0)

    sharded = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(spec,) * 3 + (jax.sharding.PartitionSpec(),),
        out_specs=spec,
        check_vma=False,
    )
    with jax.default_prng_impl('rbg'):
        actual = jax.jit(sharded)(images, targets, jnp.arange(32), 7)
    expected = mixed(images, targets, keys_of(32), 0.2, 1.0)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, e)


def test_gradients_flow_through_the_pixels_only(rng):
    images, targets = random_batch(rng)
    grads = jax.jit(jax.grad(lambda x: mix(x, targets, keys_of(32), 0.2, 1.0)[0].sum()))(images)
    share, _ = shares(32, MIXES['both'])
    assert np.isfinite(grads).all()
    np.testing.assert_allclose(grads.mean(axis=(1, 2, 3)), share + 1 - swap(share), rtol=1e-5, atol=1e-6)


def test_extreme_alphas_stay_finite():
    share, _ = shares(4000, (1e-3, 0.0))
    assert ((share >= 0) & (share <= 1)).all()
    assert ((share < 0.01) | (share > 0.99)).mean() > 0.9
