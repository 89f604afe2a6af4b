"""The published networks and `create_model`."""

import pathlib

import jax
import jax.numpy as jnp
import pytest
import small

from epsanet_jax import InputError, create_model, list_models
from epsanet_jax.analysis.summary import summarize
from epsanet_jax.models import get_variant

GOLDEN = pathlib.Path(__file__).parent / 'golden'
EPSANETS = ['epsanet50_small', 'epsanet50_large', 'epsanet101_small', 'epsanet101_large']
PARAMS = {
    'epsanet50_small': 22_561_715,
    'epsanet50_large': 27_899_518,
    'epsanet101_small': 38_900_279,
    'epsanet101_large': 49_592_198,
    'resnet50': 25_557_032,
    'resnet101': 44_549_160,
    'seresnet50': 28_088_024,
    'seresnet101': 49_326_872,
    'pyconvresnet50': 24_847_720,
    'pyconvresnet101': 42_307_944,
    'pyconvresnet152': 56_640_872,
    'pyconvhgresnet50': 25_234_728,
    'pyconvhgresnet101': 44_627_240,
    'pyconvhgresnet152': 60_657_960,
}


def tree(name):
    """Returns one line per leaf: its path and its shape."""
    net = create_model(name)
    shapes = jax.eval_shape(net.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))
    leaves = jax.tree_util.tree_leaves_with_path(dict(shapes))
    return ''.join(f'{"/".join(k.key for k in path)} {leaf.shape}\n' for path, leaf in leaves)


def test_names_of_the_models():
    assert list_models() == list(PARAMS)


@pytest.mark.parametrize('name', list(PARAMS))
def test_exact_parameter_counts(name):
    assert sum(row.params for row in summarize(create_model(name))) == PARAMS[name]


@pytest.mark.parametrize('name', EPSANETS)
def test_published_figures_are_met_to_the_last_digit(name):
    rows, variant = summarize(create_model(name)), get_variant(name)
    assert round(sum(row.params for row in rows) / 1e6, 2) == variant.published_params
    assert round(sum(row.published_count for row in rows) / 1e9, 2) == variant.published_flops


@pytest.mark.parametrize('name', [name for name in PARAMS if not name.startswith('pyconv')])
def test_parameter_trees_equal_the_stored_ones(name):
    assert tree(name) == (GOLDEN / f'{name}.txt').read_text()


def test_kernels_3_5_7_9_do_not_give_the_published_large_network():
    rows = summarize(create_model('epsanet50_large', kernels=(3, 5, 7, 9)))
    assert sum(row.params for row in rows) == 30_100_094


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'groups': (1, 4, 8, 24)}, '24 groups do not divide'),
        ({'groups': (1, 4, 8)}, 'one number per branch'),
        (
            {'groups': ((1, 4, 8, 16), (1, 4))},
            r'one tuple for each of 4 stages, got \(\(1, 4, 8, 16\), \(1, 4\)\)',
        ),
        ({'groups': ((1, 4, 8, 16), 1, 4, 8)}, 'groups must be numbers, or one tuple for each of 4 stages'),
        ({'groups': ((1, 4, 8, 16), (), (), ())}, 'groups must hold numbers of at least 1'),
        (small.PER_STAGE, 'planes must be multiples of 3, the number of branches, got 128'),
        ({'kernels': (3, 5, 7, 8)}, 'kernels must be odd'),
        ({'planes': (64, 128, 256)}, 'one number per stage'),
        ({'planes': (66, 128, 256, 512)}, 'multiples of 4, the number of branches, got 66'),
        (
            {'planes': (32, 64, 128, 256), 'groups': (1, 1, 1, 1)},
            'reduction must be at most planes / 4 = 8, got 16',
        ),
        ({'layers': (1, 0, 1, 1)}, r'layers must hold numbers of at least 1, got \(1, 0, 1, 1\)'),
        ({'num_classes': -1}, 'num_classes must be at least 0, got -1'),
        ({'expansion': -1}, 'expansion must be at least 1, got -1'),
        ({'bn_group': -1}, 'bn_group must be at least 0, got -1'),
        ({'in_channels': 0}, 'in_channels must be at least 1, got 0'),
        ({'dtype': jnp.int32}, 'dtype must be one of float32, .*, got .*int32'),
        ({'output_stride': 4}, 'output_stride must be 8, 16 or 32, got 4'),
        ({'frozen_bn': '('}, 'frozen_bn must be a regular expression'),
        ({'conv': 'fast'}, "unknown convolution algorithm 'fast'"),
    ],
)
def test_invalid_settings_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        create_model('epsanet50_small', **changes)


def test_resnet_refuses_settings_of_a_pyramid():
    with pytest.raises(InputError, match='resnet50 has no pyramid'):
        create_model('resnet50', kernels=(3, 3, 3, 3))


def test_pyconvresnet_refuses_settings_of_the_attention_and_groups_that_do_not_divide():
    with pytest.raises(InputError, match='pyconvresnet50 has no attention: psa_bias cannot be set'):
        create_model('pyconvresnet50', psa_bias=True)
    with pytest.raises(InputError, match='12 groups do not divide 64 planes and their branch of 16'):
        create_model('pyconvresnet50', groups=((1, 4, 8, 12), (1, 4, 8), (1, 4), (1,)))


def test_unknown_model_is_refused_with_a_suggestion():
    with pytest.raises(InputError, match=r"'epsanet50small'.*did you mean 'epsanet50_small'"):
        create_model('epsanet50small')


def test_overrides_reach_the_network():
    net = create_model(
        'epsanet101_large',
        num_classes=3,
        layers=(1, 1),
        planes=(8, 16),
        expansion=3,
        kernels=(1, 3),
        groups=(2, 4),
        reduction=2,
        psa_bias=True,
    )
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3), jnp.float32))['params']
    assert shapes['layer2_0']['conv2']['conv_2']['kernel'].shape == (3, 3, 4, 8)
    assert shapes['layer2_0']['conv2']['conv_1']['bias'].shape == (8,)
    assert shapes['layer2_0']['conv2']['se']['fc1']['kernel'].shape == (1, 1, 8, 4)
    assert shapes['fc']['kernel'].shape == (48, 3)
    assert 'layer3_0' not in shapes
