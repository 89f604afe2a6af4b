"""PyConvResNet and PyConvHGResNet: counts, names of the authors' files, and the ways a port goes wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import torch
from torch.nn import functional

from epsanet_jax import create_model
from epsanet_jax.analysis.summary import summarize
from epsanet_jax.convert import from_torch, to_torch
from epsanet_jax.convert.state_dict import name_table
from epsanet_jax.models.epsanet import abstract_variables
from epsanet_jax.models.pyconv import PyConvBlock
from epsanet_jax.models.settings import Settings, pyconv_widths

MULTIPLY_ADDS = {  # of convolutions and the classifier at 224 px, in G
    'pyconvresnet50': 3.820,
    'pyconvresnet101': 7.232,
    'pyconvresnet152': 10.606,
    'pyconvhgresnet50': 4.534,
    'pyconvhgresnet101': 8.321,
    'pyconvhgresnet152': 12.153,
}
# Groups of the branches of each stage; their shares of the planes.
GROUPS = {
    'pyconvresnet50': ((1, 4, 8, 16), (1, 4, 8), (1, 4), (1,)),
    'pyconvhgresnet50': ((32, 32, 32, 32), (32, 64, 64), (32, 64), (32,)),
}
SHARES = ((1 / 4,) * 4, (1 / 4, 1 / 4, 1 / 2), (1 / 2, 1 / 2), (1,))


@pytest.mark.parametrize('name', list(MULTIPLY_ADDS))
def test_multiply_adds_at_224_pixels(name):
    assert (
        round(sum(row.multiply_adds for row in summarize(create_model(name))) / 1e9, 3) == MULTIPLY_ADDS[name]
    )


def torch_shape(leaf):
    return (leaf.shape[3], leaf.shape[2], *leaf.shape[:2]) if leaf.ndim == 4 else leaf.shape[::-1]


@pytest.mark.parametrize('name', list(GROUPS))
def test_names_and_shapes_are_those_of_the_authors_files(name):
    model = create_model(name)
    shapes = {name: torch_shape(leaf) for name, (_, leaf) in name_table(model).items()}
    for stage in range(4):
        planes, prefix = model.planes[stage], f'layer{stage + 1}.0'
        for i, (groups, share) in enumerate(zip(GROUPS[name][stage], SHARES[stage], strict=True), start=1):
            branch = f'{prefix}.conv2.weight' if stage == 3 else f'{prefix}.conv2.conv2_{i}.weight'
            kernel = 2 * i + 1
            assert shapes[branch] == (int(planes * share), planes // groups, kernel, kernel)
        inputs = 64 if stage == 0 else model.planes[stage - 1] * model.expansion
        assert shapes[f'{prefix}.downsample.1.weight'] == (planes * model.expansion, inputs, 1, 1)
        assert shapes[f'{prefix}.downsample.2.running_var'] == (planes * model.expansion,)
    assert not any('downsample.0' in name or name.endswith('conv2.bias') for name in shapes)
    assert shapes['fc.weight'] == (1000, 2048)


def test_widths_of_the_branches():
    assert [pyconv_widths(64, count) for count in (1, 2, 3, 4)] == [[64], [32, 32], [16, 16, 32], [16] * 4]
    assert pyconv_widths(64, 5) == [8, 8, 8, 8, 32]


def test_state_dict_goes_in_and_comes_back_bit_for_bit():
    net = small.pyconv()
    rng = np.random.default_rng(0)
    state_dict = {}
    for name, (_, leaf) in name_table(net).items():
        values = rng.uniform(0.5, 1.5, torch_shape(leaf)).astype(np.float32)
        state_dict[name] = torch.from_numpy(values)
        if name.endswith('running_var'):
            state_dict[name.replace('running_var', 'num_batches_tracked')] = torch.tensor(0)
    back = to_torch(from_torch(state_dict, net), net)
    assert back.keys() == state_dict.keys()
    for name, value in state_dict.items():
        np.testing.assert_array_equal(back[name], value.numpy(), err_msg=name)


def test_block_pools_its_shortcut_and_concatenates_the_smallest_kernel_first(rng):
    settings = Settings(
        expansion=2, kernels=(3, 5, 7), groups=(1, 2, 4), dtype='float64', param_dtype='float64'
    )
    block = PyConvBlock(16, 2, True, settings=settings)
    x = rng.standard_normal((2, 9, 8, 6))
    shapes = jax.eval_shape(block.init, jax.random.key(0), x)
    variables = jax.tree.map(lambda leaf: rng.uniform(0.5, 1.5, leaf.shape) - 0.9, dict(shapes))
    variables['batch_stats'] = jax.tree.map(lambda leaf: leaf + 1, variables['batch_stats'])
    params, stats = variables['params'], variables['batch_stats']

    def conv(y, kernel, **options):
        weight = torch.from_numpy(kernel).permute(3, 2, 0, 1)
        return functional.conv2d(y, weight, padding=kernel.shape[0] // 2, **options)

    def norm(y, name):
        arrays = (stats[name]['mean'], stats[name]['var'], params[name]['scale'], params[name]['bias'])
        return functional.batch_norm(y, *map(torch.from_numpy, arrays))

    inputs = torch.from_numpy(x).permute(0, 3, 1, 2)
    y = torch.relu(norm(conv(inputs, params['conv1']['kernel']), 'bn1'))
    kernels = [params['conv2'][f'conv2_{i}']['kernel'] for i in (1, 2, 3)]
    assert [k.shape for k in kernels] == [(3, 3, 16, 4), (5, 5, 8, 4), (7, 7, 4, 8)]
    y = torch.cat([conv(y, k, stride=2, groups=g) for k, g in zip(kernels, (1, 2, 4), strict=True)], dim=1)
    y = norm(conv(torch.relu(norm(y, 'bn2')), params['conv3']['kernel']), 'bn3')
    shortcut = conv(functional.max_pool2d(inputs, 3, 2, padding=1), params['downsample_1']['kernel'])
    expected = torch.relu(y + norm(shortcut, 'downsample_2')).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(jax.jit(block.apply)(variables, x), expected, rtol=1e-10, atol=1e-10)


def test_stem_keeps_half_the_size_and_every_stage_halves_it():
    net = small.pyconv()
    features = jax.eval_shape(
        lambda v: net.apply(v, jnp.zeros((1, 64, 64, 3)), method='features'), abstract_variables(net)
    )
    sizes = {stage: x.shape[1] for stage, x in features.items()}
    assert sizes == {'stem': 32, 'layer1': 16, 'layer2': 8, 'layer3': 4, 'layer4': 2}


def test_kernels_are_drawn_by_the_output_channels_of_their_branch():
    block = PyConvBlock(256, settings=Settings(kernels=(3, 5), groups=(1, 4)))
    kernel = jax.jit(block.init)(jax.random.key(0), jnp.zeros((1, 4, 4, 1024)))['params']['conv2']['conv2_2'][
        'kernel'
    ]
    assert kernel.shape == (5, 5, 64, 128)
    assert abs(float(kernel.std()) / np.sqrt(2 / (5 * 5 * 128)) - 1) < 0.01
