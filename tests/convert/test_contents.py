"""The weights in files as other people have them: containers, prefixes, averages, other entries."""

import argparse
import collections

import chex
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_files import NET, STATE_DICT, VARIABLES

from epsanet_jax import InputError
from epsanet_jax.convert import Checkpoint, from_torch
from epsanet_jax.convert.contents import ANCHOR, find_weights

OTHER = {k: v + 1 if v.is_floating_point() else v for k, v in STATE_DICT.items()}
PREFIXES = [
    'module.',
    '_orig_mod.',
    'model.',
    'net.',
    'backbone.',
    'module._orig_mod.model.',
    'encoder.body.',
]
CONTAINERS = [
    'state_dict',
    'model',
    'state_dict_ema',
    'model_ema',
    'ema',
    'model_state_dict',
    'net',
    'weights',
    'model.state_dict',
    'ema.module',
]


def with_prefix(prefix, state_dict=STATE_DICT):
    return {prefix + name: value for name, value in state_dict.items()}


def inside(keys, entries):
    for key in reversed(keys.split('.')):
        entries = {key: entries}
    return entries


def assert_is(content, expected=VARIABLES, **options):
    found = find_weights(content, 'x.pth', **options)
    chex.assert_trees_all_equal(from_torch(found.state_dict, NET), expected)
    return found


@pytest.mark.parametrize('prefix', PREFIXES)
def test_any_prefix_is_removed_and_reported_once(prefix):
    found = assert_is(with_prefix(prefix))
    assert found.notes == (f'the prefix {prefix!r} of the names removed',)
    assert list(found.state_dict) == list(STATE_DICT)


@pytest.mark.parametrize('keys', CONTAINERS)
def test_weights_are_found_in_any_container(keys):
    found = assert_is({**inside(keys, STATE_DICT), 'epoch': 3, 'optimizer': {'state': {}}})
    assert (found.epoch, found.optimizer) == (3, {'state': {}})
    averaged = 'ema' in keys
    assert found.averaged == averaged
    expected = (f'moving averages taken ({keys}): the file holds no other weights',) if averaged else ()
    assert found.notes == expected


@pytest.mark.parametrize(
    ('average', 'weights'),
    [('state_dict_ema', 'state_dict'), ('model_ema', 'model'), ('ema', 'net'), ('average', 'weights')],
)
def test_average_is_taken_before_the_weights_in_other_containers(average, weights):
    content = {weights: OTHER, average: with_prefix('module.')}
    found = assert_is(content)
    assert found.averaged
    taken = f'moving averages taken ({average}.module); --no-ema takes the weights ({weights})'
    assert found.notes == (taken, "the prefix 'module.' of the names removed")
    found = assert_is({weights: STATE_DICT, average: OTHER}, ema=False)
    assert not found.averaged
    assert found.notes == (f'weights taken ({weights}), not the moving averages ({average})',)


def test_average_in_the_same_dict_has_another_prefix():
    both = {**with_prefix('model.', OTHER), **with_prefix('ema_model.module.')}
    found = find_weights({'state_dict': both}, 'x.ckpt', ignore='^state_dict.model')
    assert found.averaged
    chex.assert_trees_all_equal(from_torch(found.state_dict, NET), VARIABLES)


def test_averaged_model_of_torch_is_an_average():
    twin = torch.nn.Module()
    twin.layer1 = torch.nn.ModuleList([torch.nn.ModuleDict({'conv1': torch.nn.Conv2d(2, 2, 1)})])
    names = list(torch.optim.swa_utils.AveragedModel(twin).state_dict())
    assert names == ['n_averaged', 'module.layer1.0.conv1.weight', 'module.layer1.0.conv1.bias']
    found = assert_is({'n_averaged': torch.tensor(5), **with_prefix('module.')})
    assert found.averaged
    assert found.notes[0] == 'moving averages taken (module): the file holds no other weights'


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (STATE_DICT, 'x.pth has one set of weights: remove the choice of no moving averages'),
        ({'model_ema': STATE_DICT}, 'x.pth holds only moving averages: remove --no-ema'),
    ],
)
def test_choice_of_the_weights_is_refused_if_there_is_none(content, message):
    with pytest.raises(InputError) as error:
        find_weights(content, 'x.pth', ema=False)
    assert str(error.value) == message


def test_several_networks_are_refused_until_one_is_left():
    content = {'student': with_prefix('module.'), 'teacher': with_prefix('module.', OTHER)}
    with pytest.raises(InputError) as error:
        find_weights(content, 'x.pth')
    message = 'x.pth holds 2 networks: student.module, teacher.module; --ignore REGEX leaves others out'
    assert str(error.value) == message
    assert_is(content, ignore='^teacher')


def test_other_entries_are_refused_with_their_number_until_they_are_ignored():
    profiled = dict(STATE_DICT)
    for name in STATE_DICT:
        if name.endswith('conv1.weight'):
            for counter in ('total_ops', 'total_params'):
                profiled[name.replace('weight', counter)] = torch.zeros(1)
    extra = len(profiled) - len(STATE_DICT)
    with pytest.raises(InputError) as error:
        assert_is(profiled)
    assert str(error.value) == (
        f'the state dict does not fit the model in {extra} places: unexpected conv1.total_ops, unexpected '
        f'conv1.total_params and {extra - 2} more; to leave entries out: epsanet convert SRC DST --ignore '
        "'(total_ops|total_params)$'"
    )
    found = assert_is(profiled, ignore='(total_ops|total_params)$')
    shown = 'conv1.total_ops, conv1.total_params, layer1.0.conv1.total_ops'
    assert found.notes == (f'--ignore left out {extra} entries: {shown} and {extra - 3} more',)
    assert assert_is(STATE_DICT, ignore='x').notes == ('--ignore left out 0 entries: no name matches',)


def test_advice_never_leaves_out_weights_of_the_network():
    with pytest.raises(InputError, match="--ignore 'REGEX'$"):
        assert_is({**STATE_DICT, 'criterion.weight': torch.zeros(3)})
    assert_is({**with_prefix('model.'), 'criterion.weight': torch.zeros(3)}, ignore='^criterion')


def test_entries_that_are_no_tensors_are_refused_by_name():
    with pytest.raises(InputError, match='in 1 places: unexpected epoch; to leave entries out'):
        assert_is({**STATE_DICT, 'epoch': 3})
    assert_is({**STATE_DICT, 'epoch': 3}, ignore='^epoch$')


def test_classifier_last_linear_is_read_as_fc():
    renamed = {name.replace('fc.weight', 'last_linear.weight'): value for name, value in STATE_DICT.items()}
    renamed = {
        k.replace('fc.bias', 'last_linear.bias') if k == 'fc.bias' else k: v for k, v in renamed.items()
    }
    assert assert_is(renamed).notes == ("the classifier 'last_linear' read as 'fc'",)


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ([], 'x.pth contains a list instead of a state dict'),
        ({}, 'x.pth contains no state dict; its entries: '),
        ({'a': 1, 'b': {'c': 2}}, 'x.pth contains no state dict; its entries: a, b'),
        (
            {**with_prefix('module.'), 'fc.bias': torch.zeros(7)},
            "x.pth: two entries fc.bias, with and without the prefix 'module.'",
        ),
    ],
)
def test_other_content_is_refused(content, message):
    with pytest.raises(InputError) as error:
        find_weights(content, 'x.pth')
    assert str(error.value) == message


def test_invalid_expression_is_refused():
    with pytest.raises(InputError, match=r"--ignore must be a regular expression, got '\('"):
        find_weights(STATE_DICT, 'x.pth', ignore='(')


def test_name_of_the_network_is_taken_from_the_options_of_timm():
    args = argparse.Namespace(model='resnetaa50')
    assert find_weights({'state_dict': STATE_DICT, 'args': args}, 'x').arch == 'resnetaa50'
    assert find_weights({'state_dict': STATE_DICT, 'args': args, 'arch': 'resnet50'}, 'x').arch == 'resnet50'


def test_content_that_contains_itself_is_read():
    content = collections.OrderedDict(weights=STATE_DICT)
    content['self'] = content
    assert_is(content)


KEYS = st.sampled_from(['model', 'ema', 'optimizer', 'x' * 500, 'n_averaged', 'fc.weight', 3, None, (1, 2)])
NETWORK = st.sampled_from(['', 'module.', 'ema.', 'y' * 500 + '.']).map(
    lambda prefix: {f'{prefix}{ANCHOR}': 1}
)
LEAVES = st.one_of(st.none(), st.integers(), st.text(), st.just(torch.zeros(1)), NETWORK)


@settings(max_examples=200, deadline=None)
@given(
    content=st.recursive(LEAVES, lambda below: st.dictionaries(KEYS, below, max_size=3), max_leaves=12),
    ema=st.booleans(),
    ignore=st.sampled_from(['', 'model', '(', '^module', '.']),
)
def test_any_content_is_read_or_refused_in_one_short_line(content, ema, ignore):
    try:
        found = find_weights(content, 'x.pth', ema=ema, ignore=ignore)
    except InputError as error:
        lines = [str(error)]
    else:
        assert isinstance(found, Checkpoint)
        lines = list(found.notes)
    assert all('\n' not in line and len(line) <= 420 for line in lines)
