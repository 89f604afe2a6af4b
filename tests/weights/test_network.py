"""`Network`, and a new classifier for it."""

import chex
import jax
import numpy as np
import small

from epsanet_jax.convert import Checkpoint, from_torch, to_torch
from epsanet_jax.weights import Network, Source
from epsanet_jax.weights.network import with_new_classifier

NET = small.model(layers=(1, 1), planes=(8, 16), num_classes=3)
VARIABLES = small.random_variables(NET, dtype=np.float32)


def test_unknown_class_names_are_numbers():
    assert Network(NET, VARIABLES).labels == ['0', '1', '2']
    assert Network(NET, VARIABLES, ('a', 'b', 'c')).labels == ['a', 'b', 'c']


def test_state_dict_is_converted_or_the_original():
    converted = Network(NET, VARIABLES).state_dict
    chex.assert_trees_all_equal(from_torch(converted, NET), VARIABLES)
    original = Checkpoint(to_torch(VARIABLES, NET), epoch=3)
    network = Network(NET, VARIABLES, source=Source(checkpoint=original))
    assert network.state_dict is original.state_dict
    assert network.checkpoint.epoch == 3


def test_new_classifier_keeps_the_other_weights():
    original = Checkpoint(to_torch(VARIABLES, NET), epoch=3, optimizer={}, arch='epsanet50')
    source = Source('x.pth', metadata={'config': {'seed': 1}}, checkpoint=original)
    network = Network(NET, VARIABLES, ('a', 'b', 'c'), source=source)
    new = with_new_classifier(network, 5, jax.random.key(0))
    assert (new.model.num_classes, new.class_names, new.source.config) == (5, (), None)
    assert (new.checkpoint.epoch, new.checkpoint.optimizer, new.checkpoint.arch) == (None, None, 'epsanet50')
    fc = new.variables['params']['fc']
    assert (fc['kernel'].shape, fc['bias'].shape) == ((32, 5), (5,))
    chex.assert_trees_all_equal(from_torch(new.state_dict, new.model), new.variables)
    kept = {**new.variables['params'], 'fc': VARIABLES['params']['fc']}
    chex.assert_trees_all_equal({**new.variables, 'params': kept}, VARIABLES)
