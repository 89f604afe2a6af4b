"""The ladder: JAX equals PyTorch at every level, from one module to five updates, with random values.

Errors are measured as max |difference| / max |reference| of each tensor: float64 to 1e-10, float32 to 1e-5.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import torch

from epsanet_jax import create_model, list_models
from epsanet_jax.convert import to_torch, torch_model
from epsanet_jax.convert.state_dict import to_jax_layout
from epsanet_jax.models import EPSABlock, PSAModule, Settings, SEWeightModule
from epsanet_jax.training import sharding, steps
from epsanet_jax.training.config import OptimizerConfig, ScheduleConfig
from epsanet_jax.training.optimizer import make_optimizer, make_schedule
from epsanet_jax.training.state import TrainState
from epsanet_jax.training.steps import smoothed_targets

F64 = {'dtype': jnp.float64, 'param_dtype': jnp.float64}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PYRAMID = {'kernels': (3, 5, 7, 9), 'groups': (1, 2, 4, 2), 'reduction': 2}


def assert_close(actual, expected, tolerance=1e-10):
    """Compares trees or arrays by the largest difference relative to the largest value of each tensor."""

    def compare(a, e):
        a, e = np.asarray(a), np.asarray(e)
        return a.shape == e.shape and np.abs(a - e).max() <= tolerance * np.abs(e).max()

    chex.assert_trees_all_equal_comparator(
        compare, lambda a, e: f'differs by {np.abs(np.asarray(a) - np.asarray(e)).max()}', actual, expected
    )


def to_nchw(x):
    return torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)


def to_nhwc(x):
    return x.detach().permute(0, 2, 3, 1).numpy()


def randomise(module, rng):
    """Draws every parameter and statistic: the defaults 1, 0, 0, 1 would hide swapped entries."""
    for name, value in module.state_dict().items():
        draw = rng.uniform(0.5, 1.5, value.shape) if 'var' in name else rng.standard_normal(value.shape) / 3
        if value.is_floating_point():
            value.copy_(torch.from_numpy(np.asarray(draw)))
    return module.double()


def twins(net, seed=0, dtype=np.float64, damping=1.0):
    """Random variables for a JAX model, and the PyTorch model with the same.

    `damping` multiplies the gates' last kernels and the scale of each block's last BatchNorm.
    """
    variables = small.random_variables(net, seed, dtype)

    def damp(path, leaf):
        ends = [key.key for key in path[-2:]]
        return leaf * dtype(damping) if ends in (['fc2', 'kernel'], ['bn3', 'scale']) else leaf

    variables = jax.tree_util.tree_map_with_path(damp, variables)
    twin = torch_model.EPSANet(net)
    twin = twin.double() if dtype == np.float64 else twin
    twin.load_state_dict({k: torch.from_numpy(v) for k, v in to_torch(variables, net).items()}, strict=True)
    return variables, twin


def params_of(module):
    """Returns the parameters of a module as a tree with the names of flax."""
    tree = {}
    for name, value in module.state_dict().items():
        *path, leaf = name.replace('downsample.', 'downsample_').split('.')
        if leaf != 'num_batches_tracked':
            collection = 'batch_stats' if leaf.startswith('running') else 'params'
            node = tree.setdefault(collection, {})
            for part in path:
                node = node.setdefault(part, {})
            weight = 'kernel' if value.ndim > 1 else 'scale'
            leaf = {'weight': weight, 'running_mean': 'mean', 'running_var': 'var'}.get(leaf, leaf)
            node[leaf] = to_jax_layout(value.numpy()).copy()
    return tree


def test_rung_1_squeeze_and_excitation(rng):
    module = randomise(torch_model.SEWeightModule(8, 2), rng)
    x = rng.standard_normal((3, 5, 4, 8))
    actual = SEWeightModule(8, 2, **F64).apply(params_of(module), x)
    assert_close(actual, to_nhwc(module(to_nchw(x))))


@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('bias', [False, True])
def test_rung_2_pyramid(rng, stride, bias):
    module = randomise(torch_model.PSAModule(16, stride, **PYRAMID, bias=bias), rng)
    x = rng.standard_normal((2, 7, 6, 16))
    actual = PSAModule(16, stride, **PYRAMID, use_bias=bias, **F64).apply(params_of(module), x)
    assert_close(actual, to_nhwc(module(to_nchw(x))))


@pytest.mark.parametrize(('inputs', 'stride'), [(32, 1), (16, 1), (32, 2)])
@pytest.mark.parametrize('train', [False, True])
def test_rung_3_block(rng, inputs, stride, train):
    pyramid = torch_model.PSAModule(16, stride, **PYRAMID)
    downsample = inputs != 32 or stride == 2
    module = randomise(torch_model.EPSABlock(inputs, 16, 32, stride, downsample, pyramid), rng)
    variables = params_of(module)
    x = rng.standard_normal((3, 7, 6, inputs))
    expected = to_nhwc(module.train(train)(to_nchw(x)))
    settings = Settings(expansion=2, **PYRAMID, dtype='float64', param_dtype='float64')
    block = EPSABlock(16, stride, downsample, settings=settings)
    actual, new = block.apply(variables, x, train, mutable=['batch_stats'])
    assert_close(actual, expected)
    assert_close(new['batch_stats'], params_of(module)['batch_stats'])


@pytest.mark.parametrize('branches', [1, 2, 3])
def test_rung_3_block_with_any_number_of_branches(rng, branches):
    pyramid = {'kernels': (3, 5, 7)[:branches], 'groups': (1, 2, 4)[:branches], 'reduction': 2}
    module = randomise(
        torch_model.EPSABlock(48, 24, 48, 1, False, torch_model.PSAModule(24, 1, **pyramid)), rng
    )
    variables, x = params_of(module), rng.standard_normal((3, 7, 6, 48))
    expected = to_nhwc(module.train()(to_nchw(x)))
    block = EPSABlock(24, settings=Settings(expansion=2, **pyramid, dtype='float64', param_dtype='float64'))
    actual, new = block.apply(variables, x, True, mutable=['batch_stats'])
    assert_close(actual, expected)
    assert_close(new['batch_stats'], params_of(module)['batch_stats'])


@pytest.mark.parametrize(
    'changes',
    [
        {'psa_bias': True},
        {'middle': 'conv3x3', 'use_se': True},
        *(
            pytest.param(changes, marks=pytest.mark.slow)
            for changes in (
                {},
                {'middle': 'conv3x3'},
                {'use_se': True},
                {'output_stride': 16},
                {'output_stride': 8},
            )
        ),
    ],
)
def test_rungs_4_and_5_every_stage_and_the_logits(rng, changes):
    assert_features_and_logits_agree(rng, small.model(**F64).clone(**changes))


@pytest.mark.parametrize(
    'net',
    [
        small.pyconv(**F64),
        pytest.param(
            small.pyconv(groups=((2, 2, 2, 2), (2, 4, 4), (2, 4), (2,)), output_stride=8, **F64),
            marks=pytest.mark.slow,
        ),
        small.model(**small.PER_STAGE, planes=(8, 12, 16, 32), **F64),
    ],
    ids=['pyconvresnet', 'pyconvhgresnet', 'epsanet'],
)
def test_rungs_4_and_5_with_another_pyramid_in_each_stage(rng, net):
    assert_features_and_logits_agree(rng, net)


def assert_features_and_logits_agree(rng, net):
    variables, twin = twins(net)
    images = small.images(rng, 2, 45)
    twin.eval()
    expected = {k: to_nhwc(v) for k, v in twin.features(to_nchw(images)).items()}
    actual = jax.jit(functools.partial(net.apply, method='features'))(variables, images)
    assert sorted(actual) == ['layer1', 'layer2', 'layer3', 'layer4', 'stem']
    assert_close(actual, expected)
    assert_close(jax.jit(net.apply)(variables, images), twin(to_nchw(images)).detach())


@pytest.mark.parametrize('psa_bias', [pytest.param(False, marks=pytest.mark.slow), True])
def test_rungs_6_and_7_the_smoothed_loss_and_every_gradient(rng, psa_bias):
    net = small.model(psa_bias=psa_bias, **F64)
    variables, twin = twins(net, seed=4)
    images, labels = small.images(rng, 6, 64), rng.integers(0, 7, 6)
    twin.train()
    loss = torch.nn.CrossEntropyLoss(label_smoothing=0.1)(twin(to_nchw(images)), torch.from_numpy(labels))
    loss.backward()
    expected = {name: p.grad.numpy() for name, p in twin.named_parameters()}

    targets = smoothed_targets(labels, 7, 0.1, np.float64)

    def ours(params):
        return steps.loss_and_updates(net, params, variables['batch_stats'], images, targets)

    (value, (stats, _, _)), gradients = jax.jit(jax.value_and_grad(ours, has_aux=True))(variables['params'])
    assert_close(value, loss.detach())
    state_dict = to_torch({'params': gradients, 'batch_stats': stats}, net)
    assert_close({k: state_dict[k] for k in expected}, expected)
    after = {k: v.numpy() for k, v in twin.state_dict().items() if 'running' in k}
    assert_close({k: state_dict[k] for k in after}, after)


def five_steps(net, variables, twin, images, labels, dtype=np.float64):
    """Trains both on the same uint8 batches; returns state dicts and losses, ours first."""
    lr, momentum, decay, smoothing = 0.05, 0.9, 1e-2, 0.1
    twin.train()
    sgd = torch.optim.SGD(twin.parameters(), lr=lr, momentum=momentum, weight_decay=decay)
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=smoothing)
    losses, expected_losses = [], []
    for x, y in zip(images, labels, strict=True):
        normal = to_nchw(((x / 255.0 - np.array(MEAN)) / np.array(STD)).astype(dtype))
        loss = criterion(twin(normal), torch.from_numpy(y).long())
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        expected_losses.append(loss.item())

    schedule = make_schedule(ScheduleConfig(name='constant'), lr, 5, 1)
    optimizer = make_optimizer(OptimizerConfig(lr, momentum, False, decay), schedule)
    mesh = sharding.make_mesh(len(labels[0]))
    step = steps.make_train_step(net, optimizer, mesh, smoothing=smoothing, mean=MEAN, std=STD)
    state = TrainState(jnp.zeros((), jnp.int32), **variables, opt_state=optimizer.init(variables['params']))
    state = jax.device_put(state, sharding.replicated(mesh))
    for x, y in zip(images, labels, strict=True):
        state, sums = step(state, sharding.to_devices({'image': x, 'label': y}, mesh))
        losses.append(float(sums['loss']) / len(y))
    expected = {k: v.numpy() for k, v in twin.state_dict().items() if not k.endswith('num_batches_tracked')}
    ours = to_torch(state.variables, net)
    return {k: ours[k] for k in expected}, expected, losses, expected_losses


def assert_five_steps_agree(rng, net, rows, size):
    """Same weights, batches, smoothing and SGD: parameters, statistics and losses after five steps."""
    variables, twin = twins(net)
    images = rng.integers(0, 256, (5, rows, size, size, 3), dtype=np.uint8)
    labels = rng.integers(0, 7, (5, rows)).astype(np.int32)
    ours, expected, losses, expected_losses = five_steps(net, variables, twin, images, labels)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-10)
    assert_close(ours, expected)
    before = to_torch(variables, net)
    assert all(not np.array_equal(ours[k], before[k]) for k in ours)


@pytest.mark.slow
def test_rung_8_five_updates_on_eight_devices(rng):
    assert_five_steps_agree(rng, small.model(**F64), rows=16, size=64)


@pytest.mark.slow
def test_rung_8_of_a_pyconvresnet(rng):
    net = small.pyconv(layers=(1, 1), planes=(8, 16), kernels=((3, 5), (3,)), groups=((1, 2), (2,)), **F64)
    assert_five_steps_agree(rng, net, rows=8, size=32)


def forward_float32(name, size):
    """Returns features and logits of a whole variant from JAX and PyTorch, float32 at highest precision."""
    net = create_model(name)
    # Where no softmax follows them, random gates between 0 and 1 on growing activations make a deep network
    # ill-conditioned: PyTorch's own float32 was up to 0.1 from its float64.
    variables, twin = twins(net, dtype=np.float32, damping=0.1 if net.use_se else 1.0)
    images = small.images(np.random.default_rng(1), 1, size, np.float32)
    twin.eval()
    with torch.no_grad():
        expected = {k: to_nhwc(v) for k, v in twin.features(to_nchw(images)).items()}
        logits = twin(to_nchw(images)).numpy()

    @jax.jit
    def both(variables, images):
        features = net.apply(variables, images, method='features')
        return features, net.apply(variables, images)

    with jax.default_matmul_precision('highest'):
        actual = both(variables, images)
    assert np.isfinite(logits).all()
    return actual, (expected, logits)


@pytest.mark.slow
@pytest.mark.parametrize(
    'name',
    ['epsanet50_small', 'epsanet50_large', 'epsanet101_small', 'epsanet101_large', 'pyconvresnet50'],
)
def test_every_variant_in_float32_at_64_pixels(name):
    assert_close(*forward_float32(name, 64), tolerance=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('name', list_models())
def test_every_variant_in_float32_at_224_pixels(name):
    assert_close(*forward_float32(name, 224), tolerance=1e-5)
