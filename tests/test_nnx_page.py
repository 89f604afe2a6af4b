"""The code of docs/nnx.md: a network trained with flax.nnx equals the one trained with flax.linen."""

import pathlib
import re

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
import torch

import epsanet_jax
from epsanet_jax.commands.main import main
from epsanet_jax.convert.torch_model import EPSANet
from epsanet_jax.training.steps import loss_and_updates

pytestmark = pytest.mark.slow
PAGE = pathlib.Path(__file__).parents[1] / 'docs' / 'nnx.md'
NET = small.model(**small.ONE_BLOCK)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """The names after the code of the page has run, its folder, and the variables before."""
    (code,) = re.findall(r'```python\n(.*?)```', PAGE.read_text(), re.DOTALL)
    variables = small.random_variables(NET, dtype=np.float32)
    images = small.images(np.random.default_rng(1), 4, dtype=np.float32)
    names = {'model': NET, 'variables': variables, 'images': images, 'class_names': small.NAMES}
    folder = tmp_path_factory.mktemp('nnx')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(compile(code, PAGE, 'exec'), names)
    return names, folder, variables


def test_training_with_nnx_equals_training_with_linen(trained):
    names, _, variables = trained
    optimizer, images = optax.sgd(0.01, momentum=0.9), names['images']
    targets = jax.nn.one_hot(jnp.arange(len(images)), NET.num_classes)
    step = jax.jit(jax.value_and_grad(loss_and_updates, argnums=1, has_aux=True), static_argnums=0)
    state, losses = optimizer.init(variables['params']), []
    for _ in range(3):
        (loss, (stats, *_)), grads = step(NET, variables['params'], variables['batch_stats'], images, targets)
        updates, state = optimizer.update(grads, state)
        variables = {'params': optax.apply_updates(variables['params'], updates), 'batch_stats': stats}
        losses.append(loss)
    np.testing.assert_allclose(names['losses'], losses, rtol=1e-4)
    chex.assert_trees_all_close(names['to_linen'](names['net']), variables, rtol=1e-3, atol=1e-4)


def test_the_trained_network_is_used_converted_and_exported(trained):
    names, folder, _ = trained
    net, images = names['net'], names['images']
    logits = np.asarray(net(images, train=False))
    network = epsanet_jax.load(str(folder / 'trained'))
    np.testing.assert_allclose(jax.jit(NET.apply)(network.variables, images), logits, rtol=1e-4, atol=1e-4)
    assert network.class_names == small.NAMES
    features = jax.jit(lambda v, x: NET.apply(v, x, method='features'))(network.variables, images)
    chex.assert_trees_all_close(net.features(images), features, rtol=1e-3, atol=1e-3)
    twin = EPSANet(NET).eval()
    twin.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in names['state_dict'].items()})
    with torch.no_grad():
        theirs = twin(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
    np.testing.assert_allclose(theirs, logits, rtol=1e-3, atol=1e-3)
    assert main(['export', str(folder / 'trained'), str(folder / 'x.stablehlo')]) == 0
    exported = jax.export.deserialize(bytearray((folder / 'x.stablehlo').read_bytes()))
    np.testing.assert_allclose(jax.jit(exported.call)(images), logits, rtol=1e-3, atol=1e-3)
    assert main(['convert', str(folder / 'trained'), str(folder / 'x.pth'), '--verify']) == 0
