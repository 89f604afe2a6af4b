"""A small EPSANet with all parts of the large ones: four stages, both kinds of block, four branches."""

import jax
import numpy as np

import epsanet_jax
from epsanet_jax.data.preprocessing import Preprocessing
from epsanet_jax.models.settings import ModelConfig
from epsanet_jax.weights import orbax
from epsanet_jax.weights.metadata import make_metadata

SETTINGS = {
    'layers': (2, 1, 1, 1),
    'planes': (8, 16, 16, 32),
    'expansion': 2,
    'groups': (1, 2, 2, 2),
    'reduction': 2,
    'num_classes': 7,
}
PREPROCESSING = Preprocessing(32, 32)
ONE_BLOCK = {**SETTINGS, 'layers': (1,), 'planes': (8,)}
NAMES = (
    'ant',
    'bee',
    'cat, or dog',
    '4',
    '$x$',
    'ünï',
    'a very long name with "quotes", for the seventh class',
)


def model(**changes):
    return epsanet_jax.create_model('epsanet50_small', **{**SETTINGS, **changes})


# Another pyramid in each stage, of four branches to one.
PER_STAGE = {
    'kernels': ((3, 5, 7, 9), (3, 5, 7), (3, 5), (3,)),
    'groups': ((1, 2, 2, 2), (1, 2, 2), (1, 2), (1,)),
}


def pyconv(**changes):
    settings = {k: v for k, v in SETTINGS.items() if k not in ('groups', 'reduction')}
    settings |= {'groups': PER_STAGE['groups']}
    return epsanet_jax.create_model('pyconvresnet50', **{**settings, **changes})


def images(rng, n=2, size=32, dtype=np.float64):
    return rng.standard_normal((n, size, size, 3)).astype(dtype)


def random_variables(net, seed=0, dtype=np.float64):
    """Returns random variables: the initial values 1, 0, 0, 1 of BatchNorm would hide swapped entries."""
    rng = np.random.default_rng(seed)
    images = jax.ShapeDtypeStruct((1, 32, 32, net.in_channels), dtype)
    shapes = jax.eval_shape(net.init, jax.random.key(0), images)

    def draw(path, leaf):
        values = rng.standard_normal(leaf.shape)
        name = path[-1].key
        if name == 'kernel':
            values *= np.sqrt(2 / np.prod(leaf.shape[:-1]))
        elif name in ('var', 'scale'):
            values = rng.uniform(0.5, 1.5, leaf.shape)
        else:
            values *= 0.1
        return values.astype(dtype)

    return jax.tree_util.tree_map_with_path(draw, dict(shapes))


def save(path, variables=None, names=NAMES, preprocessing=PREPROCESSING, **settings):
    """Writes weights as a checkpoint, by default random ones of a network of one block; returns the path."""
    settings = {'name': 'epsanet50_small', **(settings or ONE_BLOCK)}
    if variables is None:
        variables = random_variables(epsanet_jax.create_model(**settings), dtype=np.float32)
    orbax.save_weights(str(path), variables, make_metadata(ModelConfig(**settings), names, preprocessing))
    return path
