"""Starting a network from the weights of another one: what is taken, from which networks, and the report."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from epsanet_jax import InputError, create_model
from epsanet_jax.convert.state_dict import flatten, name_table, to_torch
from epsanet_jax.models.block import EPSABlock
from epsanet_jax.models.pyconv import PyConvBlock
from epsanet_jax.models.settings import Settings
from epsanet_jax.weights import Network, start_from
from epsanet_jax.weights.start import adapt_stem, fitting

MODEL = small.model(**small.ONE_BLOCK)


def resnet(**changes):
    settings = {k: small.ONE_BLOCK[k] for k in ('layers', 'planes', 'expansion', 'num_classes')}
    model = create_model('resnet50', **{**settings, **changes})
    return Network(model, small.random_variables(model, dtype=np.float32))


def test_a_resnet_starts_all_but_the_attention():
    network = resnet()
    variables, report = start_from(network, MODEL, jax.random.key(0))
    theirs = flatten(network.variables)
    for path, value in flatten(variables).items():
        if path[0] == 'batch_stats' and 'bn2' in path:
            assert set(np.unique(value)) <= {0.0, 1.0}
        elif 'conv2' not in path:
            np.testing.assert_array_equal(value, theirs[path])
    kernels = [f'layer*.*.conv2.conv_{i}.weight (1)' for i in (1, 2, 3, 4)]
    attention = [f'layer*.*.conv2.se.fc{i}.{leaf} (1)' for i in (1, 2) for leaf in ('weight', 'bias')]
    made = [p for p in theirs if 'conv2' in p or (p[0] == 'batch_stats' and 'bn2' in p)]
    taken = len(theirs) - len(made)
    assert report[0].startswith(f'{taken} of {len(name_table(MODEL))} tensors taken, ')
    assert report[1:] == (
        f'3x3 kernels in the middle of: {", ".join(kernels)}',
        f'drawn: {", ".join(attention)}',
        'statistics reset: layer*.*.bn2.running_mean (1), layer*.*.bn2.running_var (1)',
    )


def test_a_pyramid_computes_at_first_what_the_3x3_convolution_does_within_its_groups(rng):
    network = resnet()
    kernel = network.variables['params']['layer1_0']['conv2']['kernel']  # [3, 3, 8, 8]
    tensors = to_torch(start_from(network, MODEL, jax.random.key(0))[0], MODEL)
    x = rng.standard_normal((2, 8, 8, 11)).astype(np.float32)
    first = 0  # output channel; an EPSANet concatenates the largest kernel first
    for branch, groups in zip((4, 3, 2, 1), reversed(MODEL.groups), strict=True):
        weight = np.asarray(tensors[f'layer1.0.conv2.conv_{branch}.weight'])
        outputs, inputs, size, _ = weight.shape
        y = jax.lax.conv_general_dilated(
            x, weight, (1, 1), [(size // 2,) * 2] * 2, feature_group_count=groups, precision='highest',
            dimension_numbers=('NCHW', 'OIHW', 'NCHW'),
        )  # fmt: skip
        for row in range(outputs):
            low = row // (outputs // groups) * inputs
            theirs = kernel[:, :, low : low + inputs, first + row].transpose(2, 0, 1)[None]
            expected = jax.lax.conv_general_dilated(
                x[:, low : low + inputs], theirs, (1, 1), [(1, 1)] * 2, precision='highest'
            )
            np.testing.assert_allclose(y[:, row : row + 1], expected, rtol=1e-4, atol=1e-4)
        first += outputs


def test_kernels_of_other_widths_are_not_cut():
    wider = small.model(**{**small.ONE_BLOCK, 'planes': (16,)})
    _, report = fitting(resnet(), wider, with_classifier=False)
    assert not any('3x3 kernels' in line for line in report)
    assert any('not used: ' in line and 'layer*.*.conv2.weight (1)' in line for line in report)


@pytest.mark.parametrize(
    ('name', 'tensors'),
    # Of ResNet-50's 161 parameters and 106 statistics, all but the 16 kernels of 3x3, which start the 64
    # branches, and the statistics of bn2. The wide network shares the stem, the shortcuts and what has the
    # width of their outputs.
    [
        ('epsanet50_small', 161 + 106 - 16 - 2 * 16),
        pytest.param('epsanet50_large', None, marks=pytest.mark.slow),
    ],
)
def test_resnet50_starts_the_published_networks(name, tensors):
    source, model = create_model('resnet50'), create_model(name)
    ones = {k: np.ones(_torch(leaf), np.float32) for k, (_, leaf) in name_table(source).items()}
    theirs = _Shapes(source, ones)
    taken, report = fitting(theirs, model)
    names = {n for n, (path, _) in name_table(model).items() if path in taken}
    expected = {
        n
        for n, (_, leaf) in name_table(model).items()
        if n in ones and ones[n].shape == _torch(leaf) and 'bn2.running' not in n
    }
    if tensors is None:
        assert names <= expected
        assert {'conv1.weight', 'bn1.running_var', 'fc.weight', 'layer4.0.downsample.0.weight'} <= names
    else:
        branches = {n for n in names if '.conv2.conv_' in n}
        assert names - branches == expected
        assert (len(expected), len(branches)) == (tensors, 64)
        names = expected
    assert report[0].startswith(f'{len(names)} of {len(name_table(model))} tensors taken, ')


def _torch(leaf):
    return (leaf.shape[3], leaf.shape[2], *leaf.shape[:2]) if leaf.ndim == 4 else leaf.shape[::-1]


class _Shapes(Network):
    """A network that is given by its state dict alone."""

    def __init__(self, model, state_dict):
        super().__init__(model, {})
        object.__setattr__(self, '_given', state_dict)

    @property
    def state_dict(self):
        return self._given


def test_pyramids_of_a_pyconvresnet_are_reordered(rng):
    """A block that starts from a PyConv block computes the same, if its attention is uniform."""
    settings = Settings(kernels=(3, 5), groups=(1, 2), expansion=2, reduction=2, dtype='float64')
    theirs, ours = (
        kind(8, stride=1, settings=settings, middle=middle)
        for kind, middle in ((PyConvBlock, 'pyconv'), (EPSABlock, 'psa'))
    )
    net = {'layers': (1,), 'planes': (8,), 'kernels': (3, 5), 'groups': (1, 2), 'expansion': 2}
    source, model = create_model('pyconvresnet50', **net), create_model('epsanet50_small', **net, reduction=2)
    network = Network(source, small.random_variables(source, dtype=np.float32))
    variables, report = start_from(network, model, jax.random.key(0))
    assert 'channels reordered behind the pyramids of 1 blocks: layer1.0' in report
    assert 'not used' not in ' '.join(report)
    x = rng.standard_normal((4, 9, 9, 8))

    def after_pyramid(block, tree):
        params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), tree['params']['layer1_0'])
        if 'se' in params['conv2']:
            params['conv2']['se'] = jax.tree.map(jnp.zeros_like, params['conv2']['se'])

        def run(module):
            y = module.conv2.weighted(x) if module.middle == 'psa' else module.conv2(x)
            return module.conv3(jax.nn.relu(module.bn2(y, True)))

        stored = {'params': params, 'batch_stats': tree['batch_stats']['layer1_0']}
        return block.apply(stored, method=run, mutable=['batch_stats'])[0]

    expected = after_pyramid(theirs, network.variables)
    np.testing.assert_allclose(after_pyramid(ours, variables), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize('channels', [1, 2, 4, 13])
def test_the_stem_is_adapted_to_other_channels(channels):
    model = small.model(in_channels=channels)
    given = {'conv1.weight': np.random.default_rng(0).standard_normal((64, 3, 7, 7)).astype(np.float32)}
    adapted, report = adapt_stem(given, model)
    kernel = adapted['conv1.weight']
    assert kernel.shape == (64, channels, 7, 7)
    assert kernel.dtype == np.float32
    how = 'their sum' if channels == 1 else f'repeated, times 3/{channels}'
    assert report == [f'conv1.weight: 3 input channels became {channels}: {how}']
    if channels in (1,):  # a gray image gives the same features
        np.testing.assert_allclose(kernel.sum(1), given['conv1.weight'].sum(1), rtol=1e-5, atol=1e-6)
    else:
        np.testing.assert_allclose(kernel[:, 1], given['conv1.weight'][:, 1] * 3 / channels, rtol=1e-6)
    assert adapt_stem(given, small.model()) == (given, [])


def test_other_classes_sizes_and_channels_of_the_same_network():
    model = small.model(num_classes=3, in_channels=4, layers=(2,), planes=(8,))
    network = Network(MODEL, small.random_variables(MODEL, dtype=np.float32))
    variables, report = start_from(network, model, jax.random.key(0), with_classifier=False)
    assert report[0] == 'conv1.weight: 3 input channels became 4: repeated, times 3/4'
    np.testing.assert_array_equal(
        variables['params']['layer1_0']['conv1']['kernel'],
        network.variables['params']['layer1_0']['conv1']['kernel'],
    )
    assert any('fc.weight, fc.bias' in line for line in report if line.startswith('drawn'))


def test_networks_with_too_little_in_common_are_refused():
    message = r'tensors taken, 0.\d% of the parameters, less than 10%: start without'
    with pytest.raises(InputError, match=message):
        fitting(resnet(planes=(6,), num_classes=5), create_model('epsanet50_small'))


def test_damaged_values_are_refused():
    network = resnet()
    network.variables['params']['conv1']['kernel'][0, 0, 0, 0] = np.nan
    with pytest.raises(InputError, match='values that are not finite as float32 in conv1.weight'):
        start_from(network, MODEL, jax.random.key(0))


def test_state_dict_of_the_start_can_be_written():
    variables, _ = start_from(resnet(), MODEL, jax.random.key(0))
    assert to_torch(variables, MODEL).keys() >= name_table(MODEL).keys()
