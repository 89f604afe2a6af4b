"""A small network for the tests of exports, and its expected logits."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import small
from command import run

import epsanet_jax
from epsanet_jax.data.augment import normalize
from epsanet_jax.data.preprocessing import Preprocessing

NET = small.model(layers=(1, 1), planes=(8, 16))  # small, because it is compiled several times
VARIABLES = small.random_variables(NET, dtype=np.float32)
NAMES = ['cat', 'dog', 'château', 'd', 'e', 'f', 'g']
SETTINGS = Preprocessing(32, 40, std=(0.2, 0.25, 0.3))
CLOSE = 1e-4  # of the largest logit


def save(folder):
    """Saves the network as a Hub folder."""
    epsanet_jax.save_pretrained(folder, NET, VARIABLES, NAMES, SETTINGS)
    return folder


def pixels(n, size=32):
    return np.random.default_rng(n).integers(0, 256, (n, size, size, 3), np.uint8)


def images(n, size=32):
    return np.asarray(normalize(jnp.asarray(pixels(n, size)), SETTINGS.mean, SETTINGS.std))


def ours(x, net=NET):
    return np.asarray(jax.jit(net.apply)(VARIABLES, jnp.asarray(x)))


def assert_close(logits, expected, limit=CLOSE):
    assert logits.shape == expected.shape
    assert logits.dtype == expected.dtype == np.float32
    assert np.abs(logits - expected).max() <= limit * np.abs(expected).max()


def export(capsys, *arguments):
    status, out, err = run(capsys, 'export', *arguments)
    assert (status, err) == (0, '')
    return out


def source_paths(path):
    """Returns the paths of source files that a file contains."""
    return re.findall(rb'[\w/.-]+\.py\b|/[\w.-]+/epsanet_jax', pathlib.Path(path).read_bytes())
