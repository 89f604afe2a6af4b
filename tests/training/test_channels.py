"""A network of 13 channels: training on arrays, resume, evaluation, prediction, drawing and export."""

import json

import chex
import jax
import numpy as np
import pytest
from command import run
from runs import saved_state

import epsanet_jax
from epsanet_jax import InputError
from epsanet_jax.training import loop
from epsanet_jax.training.config import CheckpointConfig, Config, DataConfig, ModelConfig
from epsanet_jax.training.validation import validate

CHANNELS = 13


@pytest.fixture(scope='module')
def arrays(tmp_path_factory):
    """Two classes that differ in one channel; arrays of all three types."""
    root, generator = tmp_path_factory.mktemp('arrays'), np.random.default_rng(0)
    units = [(np.uint8, 1), (np.uint16, 257), (np.float32, 1 / 255)]
    for split, number in (('train', 12), ('val', 6)):
        for label, name in enumerate(('crop', 'forest')):
            (root / split / name).mkdir(parents=True)
            for i in range(number):
                values = generator.integers(0, 100, (40, 36, CHANNELS))
                values[:, :, 7] += 150 * label
                dtype, unit = units[i % 3]
                np.save(root / split / name / f'{i}.npy', (values * unit).astype(dtype))
    return root


def config(arrays, steps=4, **changes):
    return Config(
        batch_size=8,
        steps=steps,
        eval_every_epochs=0.0,
        model=ModelConfig(
            layers=(1,), planes=(8,), kernels=(3, 5), groups=(1, 2), reduction=2, in_channels=CHANNELS
        ),
        data=DataConfig(
            dir=str(arrays),
            image_size=32,
            resize_size=32,
            mean=(0.3,) * CHANNELS,
            std=(0.2,) * CHANNELS,
            random_erasing=0.5,
            **changes,
        ),
        checkpoint=CheckpointConfig(every_minutes=0, every_steps=2),
    )


@pytest.fixture(scope='module')
def trained(arrays, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('run') / 'whole'
    return workdir, loop.train(config(arrays), str(workdir))


def test_a_run_continues_bit_for_bit(arrays, trained, tmp_path):
    for steps in (2, 4):
        loop.train(config(arrays, steps), str(tmp_path))
    chex.assert_trees_all_equal(saved_state(tmp_path, 4), saved_state(trained[0], 4))


def test_the_run_can_be_evaluated_used_drawn_and_exported(arrays, trained, tmp_path, capsys):
    workdir, result = trained
    status, out, err = run(capsys, 'evaluate', workdir, '--json')
    assert (status, err) == (0, '')
    assert json.loads(out)['loss'] == pytest.approx(result.last['loss'], rel=1e-5)
    array = arrays / 'val/forest/1.npy'
    status, out, err = run(capsys, 'predict', workdir, arrays / 'val', '--json')
    assert (status, err, len(json.loads(out))) == (0, '', 12)
    status, _, err = run(capsys, 'explain', workdir, array, '--out', tmp_path / 'drawn')
    assert (status, err) == (0, '')
    assert len(list((tmp_path / 'drawn').glob('*.png'))) == 1
    for name in ('hub', 'x.stablehlo', 'x.onnx', 'x.pth', 'x.safetensors'):
        assert run(capsys, 'export', workdir, tmp_path / name)[0] == 0
    network = epsanet_jax.load(str(workdir))
    (expected,) = epsanet_jax.predict(network, [str(array)])
    for name in ('hub', 'x.pth', 'x.safetensors'):
        (same,) = epsanet_jax.predict(str(tmp_path / name), [str(array)])
        np.testing.assert_array_equal(same.logits, expected.logits)
    exported = jax.export.deserialize(bytearray((tmp_path / 'x.stablehlo').read_bytes()))
    assert exported.in_avals[0].shape[1:] == (32, 32, CHANNELS)
    status, out, _ = run(capsys, 'summary', '--checkpoint', workdir)


def test_images_of_other_channels_are_named(arrays, trained, tmp_path, capsys):
    np.save(tmp_path / 'rgb.npy', np.zeros((40, 40, 3), np.uint8))
    status, _, err = run(capsys, 'predict', trained[0], tmp_path / 'rgb.npy')
    assert (status, err.count('\n')) == (2, 1)
    assert 'rgb.npy: cannot decode the image: the array has the shape (40, 40, 3), expected [H, W, 13]' in err


@pytest.mark.parametrize(
    ('field', 'value'),
    [('color_jitter', (0.4, 0.0, 0.0, 0.0)), ('randaugment_ops', 2), ('reduced_decoding', True)],
)
def test_changes_of_colours_are_refused(arrays, field, value):
    with pytest.raises(
        InputError, match=f'config.data.{field} needs images of three channels.*is 13: set it'
    ):
        validate(config(arrays, **{field: value}))


@pytest.mark.slow
def test_one_channel_takes_gray_images(image_folder, tmp_path):
    from PIL import Image

    for split in ('train', 'val'):
        for name, level in (('dark', 40), ('light', 200)):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(4):
                Image.new('RGB' if i % 2 else 'L', (40, 40), (level,) * 3 if i % 2 else level).save(
                    tmp_path / split / name / f'{i}.png'
                )
    gray = config(tmp_path, steps=1)
    gray.model.in_channels, gray.data.mean, gray.data.std = 1, (0.5,), (0.25,)
    loop.train(gray, str(tmp_path / 'run'))
    network = epsanet_jax.load(str(tmp_path / 'run'))
    assert network.variables['params']['conv1']['kernel'].shape == (7, 7, 1, 64)
    assert len(list(epsanet_jax.predict(network, [str(tmp_path / 'val')]))) == 8
