"""State dicts to variables and back."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from epsanet_jax import InputError, create_model, list_models
from epsanet_jax.convert import from_torch, to_torch, torch_model
from epsanet_jax.convert.state_dict import name_table

NET = small.model()
VARIABLES = small.random_variables(NET, dtype=np.float32)
STATE_DICT = to_torch(VARIABLES, NET)


@pytest.mark.parametrize(
    ('name', 'psa_bias'),
    [
        ('epsanet50_small', True),
        *(
            pytest.param(name, False, marks=() if name.endswith('50') else pytest.mark.slow)
            for name in list_models()
        ),
    ],
)
def test_names_shapes_and_order_are_the_reference_state_dict(name, psa_bias):
    net = create_model(name, psa_bias=psa_bias)
    with torch.device('meta'):
        twin = torch_model.EPSANet(net)
    expected = {k: tuple(v.shape) for k, v in twin.state_dict().items()}
    shapes = jax.eval_shape(net.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))
    empty = jax.tree.map(lambda a: np.empty(a.shape, bool), dict(shapes))
    assert [(k, v.shape) for k, v in to_torch(empty, net).items()] == list(expected.items())
    table = name_table(net)
    parameters = [name for name, (path, _) in table.items() if path[0] == 'params']
    assert parameters == [name for name, _ in twin.named_parameters()]


def test_conversion_and_back_keeps_every_bit():
    chex.assert_trees_all_equal(from_torch(STATE_DICT, NET), VARIABLES)
    again = to_torch(from_torch(STATE_DICT, NET), NET)
    assert again.keys() == STATE_DICT.keys()
    for name, array in STATE_DICT.items():
        np.testing.assert_array_equal(again[name], array)
        assert again[name].dtype == array.dtype


def test_state_dict_loads_strictly_with_counters_of_zero():
    twin = torch_model.EPSANet(NET)
    twin.load_state_dict({k: torch.from_numpy(v) for k, v in STATE_DICT.items()}, strict=True)
    assert twin.bn1.num_batches_tracked == 0


def test_variables_do_not_share_memory_with_the_tensors():
    tensors = {k: torch.from_numpy(v.copy()) for k, v in STATE_DICT.items()}
    variables = from_torch(tensors, NET)
    for tensor in tensors.values():
        tensor.fill_(0)
    chex.assert_trees_all_equal(variables, VARIABLES)


@pytest.mark.parametrize('prefix', ['module.', '_orig_mod.', 'module._orig_mod.'])
def test_prefixes_of_wrappers_are_removed(prefix):
    wrapped = {prefix + name: torch.from_numpy(value) for name, value in STATE_DICT.items()}
    chex.assert_trees_all_equal(from_torch(wrapped, NET), VARIABLES)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
def test_tensors_of_other_float_types_are_converted(dtype):
    tensors = {k: torch.from_numpy(v) for k, v in STATE_DICT.items()}
    tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
    variables = from_torch(tensors, NET)
    chex.assert_trees_all_equal_dtypes(variables, VARIABLES)
    expected = tensors['layer1.0.conv2.conv_3.weight'].float().permute(2, 3, 1, 0)
    np.testing.assert_array_equal(variables['params']['layer1_0']['conv2']['conv_3']['kernel'], expected)


def test_parameters_that_require_gradients_are_read():
    twin = torch_model.EPSANet(NET)
    assert from_torch(dict(twin.named_parameters()) | dict(twin.named_buffers()), NET)


def test_one_error_names_what_does_not_fit_of_each_kind():
    broken = dict(STATE_DICT)
    del broken['bn1.weight'], broken['layer3.0.conv2.conv_2.weight']
    broken['fc.weight'] = broken['fc.weight'][:3]
    broken['layer9.weight'] = np.zeros(3)
    broken['bn1.bias'] = broken['bn1.bias'] * np.nan
    broken['layer1.0.bn1.running_var'] = -broken['layer1.0.bn1.running_var']
    broken['layer1.0.conv1.weight'] = broken['layer1.0.conv1.weight'].astype(np.int32)
    broken['foo.num_batches_tracked'] = np.zeros(())
    with pytest.raises(InputError) as e:
        from_torch(broken, NET)
    for problem in (
        '8 places',
        ' and 2 more',
        'missing bn1.weight',
        'missing layer3.0.conv2.conv_2.weight',
        'unexpected layer9.weight',
        'unexpected foo.num_batches_tracked',
        'values of type int32 in layer1.0.conv1.weight',
        'values that are not finite as float32 in bn1.bias',
    ):
        assert problem in str(e.value)
    assert len(str(e.value)) <= 420


def test_new_head_replaces_a_classifier_of_another_size():
    net = small.model(num_classes=3)
    with pytest.raises(InputError, match=r'shape \(7, 64\) instead of \(3, 64\) in fc.weight.*num_classes=7'):
        from_torch(STATE_DICT, net)
    variables = from_torch(STATE_DICT, net, new_head=jax.random.key(1))
    assert variables['params']['fc']['kernel'].shape == (64, 3)
    kernels = [v['params']['conv1']['kernel'] for v in (variables, VARIABLES)]
    np.testing.assert_array_equal(*kernels)
    headless = {k: v for k, v in STATE_DICT.items() if not k.startswith('fc.')}
    chex.assert_trees_all_equal(from_torch(headless, net, new_head=jax.random.key(1)), variables)


def test_variables_of_another_model_are_refused():
    with pytest.raises(InputError, match='fc/kernel'):
        to_torch(small.random_variables(small.model(num_classes=3)), NET)


def test_table_names_every_leaf_once():
    table = name_table(small.model(psa_bias=True))
    assert len({path for path, _ in table.values()}) == len(table)


NAMES = sorted(k for k in STATE_DICT if not k.endswith('tracked'))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.tuples(
            st.sampled_from(['drop', 'rename', 'transpose', 'extra', 'nan', 'cut', 'swap', 'type']),
            st.sampled_from(NAMES),
            st.sampled_from(NAMES),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_damaged_state_dict_is_refused_or_unchanged(damages):
    """No other exception is raised, and no other values are returned."""
    broken = dict(STATE_DICT)
    for kind, name, other in damages:
        if name not in broken or other not in broken:
            continue
        value = broken[name]
        if kind == 'drop':
            del broken[name]
        elif kind == 'rename':
            broken[name + 'x'] = broken.pop(name)
        elif kind == 'transpose':
            broken[name] = value.T
        elif kind == 'extra':
            broken['layer1.7.conv1.weight'] = value
        elif kind == 'nan' and value.dtype.kind == 'f':
            broken[name] = np.where(
                np.arange(value.size).reshape(value.shape) == value.size // 2, np.nan, value
            )
        elif kind == 'cut':
            broken[name] = value[:-1]
        elif kind == 'swap':
            broken[name], broken[other] = broken[other], broken[name]
        elif kind == 'type':
            broken[name] = value.astype(bool) if name < other else np.array([b'x'] * 3)
    try:
        variables = from_torch(broken, NET)
    except InputError as e:
        assert '\n' not in str(e)  # noqa: PT017
        return
    back = to_torch(variables, NET)
    for name in NAMES:
        np.testing.assert_array_equal(back[name], broken[name])
