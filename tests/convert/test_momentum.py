"""Momentum buffers of PyTorch's SGD to a tree of parameters and back."""

import chex
import jax
import numpy as np
import pytest
import small
import torch

from epsanet_jax import InputError
from epsanet_jax.convert import to_torch, torch_model
from epsanet_jax.convert.momentum import momentum_from_torch, momentum_to_torch, parse_sgd

NET = small.model(layers=(1, 1), planes=(8, 16))
VARIABLES = small.random_variables(NET, dtype=np.float32)
STATE_DICT = to_torch(VARIABLES, NET)
MOMENTUM = small.random_variables(NET, seed=1, dtype=np.float32)['params']
GROUP = {'lr': 0.1, 'momentum': 0.9, 'weight_decay': 1e-4, 'nesterov': True}


def test_pytorch_loads_the_momentum_and_it_comes_back_unchanged():
    optimizer = momentum_to_torch(MOMENTUM, NET, GROUP)
    parsed = parse_sgd(optimizer)
    assert (parsed.lr, parsed.momentum, parsed.weight_decay, parsed.nesterov) == tuple(GROUP.values())
    twin = torch_model.EPSANet(NET)
    sgd = torch.optim.SGD(twin.parameters(), lr=1.0, momentum=0.5)
    for entry in optimizer['state'].values():
        entry['momentum_buffer'] = torch.from_numpy(entry['momentum_buffer'])
    sgd.load_state_dict(optimizer)
    shapes = {id(p): p.shape for p in twin.parameters()}
    assert all(sgd.state[p]['momentum_buffer'].shape == shapes[id(p)] for p in twin.parameters())
    back = momentum_from_torch(sgd.state_dict(), STATE_DICT, NET)
    chex.assert_trees_all_equal(back, MOMENTUM)


def test_missing_buffers_become_zeros():
    sgd = torch.optim.SGD(torch_model.EPSANet(NET).parameters(), lr=1.0, momentum=0.5)
    momentum = momentum_from_torch(sgd.state_dict(), STATE_DICT, NET)
    chex.assert_trees_all_equal(momentum, jax.tree.map(np.zeros_like, VARIABLES['params']))


@pytest.mark.parametrize(
    ('change', 'part'),
    [
        (lambda o: o['param_groups'].append(o['param_groups'][0]), 'has 2 groups of parameters'),
        (lambda o: o['param_groups'][0].update(dampening=0.5), 'dampening 0.5, which is not supported'),
        (lambda o: o['param_groups'][0].update(lr=-1.0), 'must be finite and >= 0, got .-1.0'),
        (lambda o: o['param_groups'][0]['params'].pop(), 'but the network has'),
        (lambda o: o['param_groups'][0].pop('lr'), 'is not that of SGD: KeyError'),
        (lambda o: o['state'][0].update(exp_avg=np.zeros(1)), 'not SGD: its state keeps exp_avg'),
        (lambda o: o['state'][0].update(momentum_buffer=np.ones(3)), r'shape \(3,\) instead of .* in conv1'),
        (lambda o: o['state'][0]['momentum_buffer'].fill(np.nan), 'not finite as float32 in conv1.weight'),
    ],
)
def test_unsupported_optimizer_states_are_refused(change, part):
    optimizer = momentum_to_torch(MOMENTUM, NET, GROUP)
    change(optimizer)
    with pytest.raises(InputError, match=part):
        momentum_from_torch(optimizer, STATE_DICT, NET)
