"""The commands in docs/train.md on a folder of images run as written, with a small network."""

import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from test_readme import README, ROOT

SMALL = [
    '--config.model.layers=(1,1)',
    '--config.model.planes=(8,16)',
    '--config.model.expansion=2',
    '--config.model.groups=(1,2,2,2)',
    '--config.model.reduction=2',
    '--config.data.image_size=32',
    '--config.data.resize_size=36',
    '--config.batch_size=8',
    '--config.steps=4',
    '--config.log_every_steps=2',
]


def commands():
    """Returns the commands of the sections on folders and fine-tuning, except the one that needs ImageNet."""
    page = (ROOT / 'docs' / 'train.md').read_text()
    sections = page.split('## Your own folder')[1].split('## Optimizers')[0]
    lines = [line.strip() for line in sections.replace('\\\n', ' ').splitlines() if line.startswith('    ')]
    lines = [line for line in lines if re.match(r'(python train\.py|epsanet (plot|evaluate)) ', line)]
    return [line for line in lines if 'imagenet.py' not in line]


def test_command_of_the_readme_is_in_the_page_on_training():
    (command,) = re.findall(r'^ {4}(python train\.py .*)', README.read_text(), re.MULTILINE)
    assert command == commands()[0]


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder with images of two classes, and PyTorch files of an EPSANet and a ResNet of three classes."""
    import torch

    import epsanet_jax
    from epsanet_jax.convert.torch_model import EPSANet

    folder, rng = tmp_path_factory.mktemp('place'), np.random.default_rng(0)
    for split in ('train', 'val'):
        for i in range(16):
            path = folder / 'images' / split / 'ab'[i % 2] / f'{i}.jpg'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (48, 40, 3), dtype=np.uint8)).save(path)
    model = epsanet_jax.create_model(
        'epsanet50_small', num_classes=3, layers=(1, 1), planes=(8, 16), expansion=2, groups=(1, 2, 2, 2),
        reduction=2,
    )  # fmt: skip
    torch.save({'state_dict': EPSANet(model).state_dict()}, folder / 'checkpoint.pth.tar')
    resnet = epsanet_jax.create_model('resnet50', num_classes=3, layers=(1, 1), planes=(8, 16), expansion=2)
    torch.save(EPSANet(resnet).state_dict(), folder / 'resnet50.pth')
    for name in ('train.py', 'configs'):
        os.symlink(ROOT / name, folder / name)
    return folder


@pytest.mark.slow
def test_each_command_does_what_the_page_says(place):
    printed = {}
    for command in commands():
        words = shlex.split(command, comments=True)
        if words[0] == 'python':
            words = [sys.executable, *words[1:], *SMALL]
        else:
            words = [sys.executable, '-m', 'epsanet_jax', *words[1:]]
        environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'XLA_FLAGS': ''}
        done = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stderr)
        printed[command] = done.stdout
    assert len(printed) == 7
    scratch, plot, evaluate, changed, tuned, head, started = printed.values()
    assert 'finished at step 4' in changed
    assert 'finished at step 4' in scratch
    assert re.search(r'best: top-1 [\d.]+% at step \d \(runs/pets/checkpoints/\d\)', scratch)
    assert 'evaluate it: epsanet evaluate runs/pets --step best' in scratch
    assert 'written: runs/pets/curves.png' in plot
    assert ' of 16 ' in evaluate
    for text in (tuned, head):
        assert 'checkpoint.pth.tar: classifier of 3 classes replaced by a new one of 2' in text
    assert re.search(r'resnet50.pth: \d+ of \d+ tensors taken, ', started)
    assert (place / 'runs/pets/curves.png').stat().st_size > 10_000
    assert any((place / 'runs/pets/tensorboard').iterdir())
