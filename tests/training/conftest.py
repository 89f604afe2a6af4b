"""Runs and recipes that several test files use; tests must not change them."""

import numpy as np
import pytest
from PIL import Image
from runs import Killed, kill_after, recipe

from epsanet_jax.training import loop
from epsanet_jax.training.config import CheckpointConfig, DataConfig, ProfileConfig

IMPORTS = 'from epsanet_jax.training.config import *\n'
TINY = """
def get_config():
    model = ModelConfig(layers=(1,), planes=(8,), kernels=(3, 5), groups=(1, 2), reduction=2, bn_group=8)
    data = DataConfig(source='synthetic', image_size=32, resize_size=32, synthetic_examples=160)
    checkpoint = CheckpointConfig(every_steps=7, every_minutes=0)
    common = {"model": model, "data": data, "checkpoint": checkpoint, "tensorboard": False}
    return Config(batch_size=16, epochs=6, log_every_steps=5, **common)
"""
FLOAT64 = """
def get_config():
    model = ModelConfig(
        layers=(1,), planes=(8,), expansion=2, kernels=(3, 5), groups=(1, 2), reduction=2, bn_group=8,
        dtype='float64', param_dtype='float64',
    )
    data = DataConfig(source='synthetic', image_size=32, resize_size=32, synthetic_examples=75)
    return Config(
        batch_size=16, steps=20, log_every_steps=5, eval_every_epochs=2, model=model, data=data,
        optimizer=OptimizerConfig(lr=0.01), checkpoint=CheckpointConfig(every_minutes=0), tensorboard=False,
    )
"""


@pytest.fixture(scope='session')
def tiny(tmp_path_factory):
    """The file of a recipe of 60 steps for runs of train.py."""
    path = tmp_path_factory.mktemp('recipe') / 'tiny.py'
    path.write_text(IMPORTS + TINY)
    return path


@pytest.fixture(scope='session')
def float64_recipe(tmp_path_factory):
    """The file of a recipe in float64, in which the order of sums makes differences of rounding only."""
    path = tmp_path_factory.mktemp('recipe') / 'recipe.py'
    path.write_text(IMPORTS + FLOAT64)
    return path


@pytest.fixture(scope='session')
def uninterrupted(tmp_path_factory):
    """A run of 6 steps: its workdir and its result."""
    workdir = tmp_path_factory.mktemp('uninterrupted') / 'run'
    return workdir, loop.train(recipe(), str(workdir))


@pytest.fixture(scope='session')
def uninterrupted_8(tmp_path_factory):
    """The workdir of a run of 8 steps."""
    workdir = tmp_path_factory.mktemp('uninterrupted_8') / 'run'
    loop.train(recipe(steps=8), str(workdir))
    return workdir


@pytest.fixture(scope='session')
def watched(tmp_path_factory):
    """A run with averages and a profile that was killed after step 5 and continued at step 3."""
    workdir = tmp_path_factory.mktemp('watched') / 'run'
    config = recipe(
        log_every_steps=1,
        eval_every_epochs=0.0,
        ema_decay=0.9,
        checkpoint=CheckpointConfig(every_steps=3, every_minutes=0),
        profile=ProfileConfig(start=4, steps=2),
    )
    with pytest.MonkeyPatch.context() as patch:
        kill_after(patch, 5)
        with pytest.raises(Killed):
            loop.train(config, str(workdir))
    return workdir, loop.train(config, str(workdir))


@pytest.fixture
def bad_folder(tmp_path):
    """A configuration for image folders, and the folder of the data: val/b/3.png is not an image."""
    rng = np.random.default_rng(0)
    for split, count in (('train', 8), ('val', 5)):
        for i in range(count):
            folder = tmp_path / 'data' / split / 'ab'[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f'{i}.png')
    (tmp_path / 'data/val/b/3.png').write_bytes(b'no image')
    data = DataConfig(source='folder', dir=str(tmp_path / 'data'), image_size=32, resize_size=32)
    return recipe(data=data, batch_size=8, steps=2, eval_every_epochs=0.0), tmp_path
