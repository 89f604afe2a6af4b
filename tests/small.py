"""A small EPSANet with all that the large ones have: four stages, two kinds of block, full pyramids."""

import jax
import numpy as np

import epsanet_jax

SETTINGS = {
    'layers': (2, 1, 1, 1),
    'planes': (8, 16, 16, 32),
    'expansion': 2,
    'groups': (1, 2, 2, 2),
    'reduction': 2,
    'num_classes': 7,
}


def model(**changes):
    return epsanet_jax.create_model('epsanet50_small', **{**SETTINGS, **changes})


def images(rng, n=2, size=32, dtype=np.float64):
    return rng.standard_normal((n, size, size, 3)).astype(dtype)


def random_variables(net, seed=0, dtype=np.float64):
    """Variables that are all random: the defaults 1, 0, 0, 1 of BatchNorm would hide swapped entries."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(net.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), dtype))

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
