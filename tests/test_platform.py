"""Commands when JAX cannot use the platform of JAX_PLATFORMS."""

import sys

import pytest
import small
from command import shell
from PIL import Image


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp('place')
    small.save(folder / 'net')
    Image.new('RGB', (32, 32)).save(folder / 'x.png')
    return folder


@pytest.mark.parametrize(
    'arguments',
    [
        'evaluate {0}/net --data digits',
        'predict {0}/net {0}/x.png',
        'explain {0}/net {0}/x.png --out {0}/out',
        'convert {0}/net {0}/x.safetensors',
        'export {0}/net {0}/hub',
        'summary resnet50',
        'plan --config=configs/digits.py --topology=cpu:8',
    ],
)
def test_a_missing_platform_is_named_and_the_checkpoint_is_not_blamed(place, arguments):
    command = f'{sys.executable} -m epsanet_jax {arguments.format(place)}'
    done = shell(command, JAX_PLATFORMS='cuda')
    assert (done.returncode, done.stdout, done.stderr.count('\n')) == (2, '', 1)
    assert done.stderr.startswith('error: JAX cannot use the platform JAX_PLATFORMS=cuda: ')


def test_a_command_that_needs_no_device_works_without_one(tmp_path):
    (tmp_path / 'metrics.jsonl').write_text('{"split": "train", "step": 1, "loss": 2.0, "lr": 1}\n')
    done = shell(f'{sys.executable} -m epsanet_jax plot {tmp_path}', JAX_PLATFORMS='cuda')
    assert (done.returncode, done.stderr) == (0, '')
