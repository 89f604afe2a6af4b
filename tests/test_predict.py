"""The command `epsanet predict`, and `epsanet_jax.predict`."""

import csv
import dataclasses
import io
import itertools
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import small
import torch
from command import run
from PIL import Image

from epsanet_jax import InputError, load
from epsanet_jax.analysis.predict import predict
from epsanet_jax.analysis.predict import run as run_step
from epsanet_jax.commands import common
from epsanet_jax.convert import to_torch, torch_model
from epsanet_jax.data import image_files
from epsanet_jax.data.decode import BadImageError
from epsanet_jax.data.sources import ImageFolder
from epsanet_jax.data.transforms import CentreCrop
from epsanet_jax.training import inputs, sharding, steps
from epsanet_jax.training.config import DataConfig, ModelConfig
from epsanet_jax.weights import orbax
from epsanet_jax.weights.metadata import make_metadata

SETTINGS = {**small.SETTINGS, 'layers': (1,), 'planes': (8,)}
NET = small.model(**SETTINGS)
VARIABLES = small.random_variables(NET, dtype=np.float32)
NAMES = ('ant', 'bee', 'cat, or dog', '4', '$x$', 'ünï', 'g "g"')
DATA = DataConfig(image_size=32, resize_size=40, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp('weights') / 'orbax'
    settings = {**SETTINGS, 'name': 'epsanet50_small'}
    orbax.save_weights(
        str(path), VARIABLES, make_metadata(ModelConfig(**settings), NAMES, DATA.preprocessing)
    )
    return path


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    """Five pictures in a folder and a subfolder, some of odd sizes and names."""
    folder = tmp_path_factory.mktemp('pictures')
    rng = np.random.default_rng(0)
    (folder / 'sub.jpg').mkdir()  # a folder called as a picture
    for name, size in (
        ('a.png', (40, 60)),
        ('b, "c".png', (90, 50)),
        ('ü.JPG', (64, 64)),
        ('sub.jpg/d.webp', (33, 200)),
        ('sub.jpg/e.png', (32, 32)),
    ):
        pixels = rng.integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / 'notes.txt').write_text('no picture')
    return folder


def of_json(capsys, *arguments):
    status, out, err = run(capsys, 'predict', *arguments, '--json')
    assert (status, err) == (0, '')
    return json.loads(out)


def test_the_same_logits_as_the_evaluation_step_and_pytorch(weights, pictures, tmp_path):
    loaded = load(str(weights))
    predictions = list(predict(loaded, [str(pictures)], top=3))
    assert [os.path.basename(p.path) for p in predictions] == [
        'a.png',
        'b, "c".png',
        'ü.JPG',
        'd.webp',
        'e.png',
    ]
    first = predictions[0]
    assert (first.classes.shape, first.logits.shape) == ((3,), (7,))
    expected = np.exp(first.logits) / np.exp(first.logits).sum()
    np.testing.assert_array_equal(first.classes, np.argsort(-expected)[:3])
    np.testing.assert_allclose(first.probabilities, np.sort(expected)[:-4:-1], rtol=1e-5)

    (tmp_path / 'class').mkdir()
    (tmp_path / 'class/a.png').write_bytes((pictures / 'a.png').read_bytes())
    mesh = sharding.make_mesh(1, devices=jax.devices()[:1])
    eval_step = steps.make_eval_step(NET, mesh, smoothing=0.0, mean=DATA.mean, std=DATA.std)
    batch = next(inputs.eval_batches(DATA, ImageFolder(tmp_path), 1))
    losses = []
    for label in range(len(NAMES)):
        labelled = {'image': batch['image'], 'label': np.int32([label]), 'mask': batch['mask']}
        losses.append(float(eval_step(VARIABLES, sharding.to_devices(labelled, mesh))['loss']))
    np.testing.assert_allclose(-np.array(losses), np.log(expected), rtol=1e-4)

    twin = torch_model.EPSANet(NET).eval()
    twin.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in to_torch(VARIABLES, NET).items()})
    picture = Image.open(pictures / 'a.png').resize((60, 40), Image.Resampling.BILINEAR)
    pixels = np.asarray(picture.crop((14, 4, 46, 36))) / 255
    normalised = torch.from_numpy((pixels - DATA.mean) / DATA.std).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        theirs = twin(normalised).numpy()[0]
    assert np.abs(first.logits - theirs).max() < 1e-4 * np.abs(theirs).max()


def test_table_csv_and_json_say_the_same(capsys, weights, pictures):
    content = of_json(capsys, weights, pictures, '--top', 2)
    assert [len(c['predictions']) for c in content] == [2] * 5
    for picture in content:
        assert all(NAMES[p['number']] == p['class'] for p in picture['predictions'])
    status, out, err = run(capsys, 'predict', weights, pictures, '--top', 2, '--csv')
    assert (status, err) == (0, '')
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [(r['image'], r['rank'], r['class'], int(r['number']), float(r['probability'])) for r in rows] == [
        (c['image'], str(rank), p['class'], p['number'], p['probability'])
        for c in content
        for rank, p in enumerate(c['predictions'], start=1)
    ]
    status, out, err = run(capsys, 'predict', weights, pictures, '--top', 2)
    assert (status, err, out.count('\n')) == (0, '', 15)
    name, share = content[0]['predictions'][0]['class'], content[0]['predictions'][0]['probability']
    assert out.splitlines()[:2] == [content[0]['image'], f'  {100 * share:6.2f} %  {name}']
    assert run(capsys, 'predict', weights, pictures, '--csv', '--json')[0] == 2


def test_any_number_of_pictures_is_one_shape(capsys, weights, pictures):
    loaded, shapes = load(str(weights)), []

    def step(variables, images):
        shapes.append(images.shape)
        return loaded.model.apply(variables, images), ()

    done = list(run_step(step, loaded, [str(pictures)], 2, image_files.stop_at_bad))
    assert (len(done), shapes) == (5, [(2, 32, 32, 3)])
    content = of_json(capsys, weights, pictures, '--top', 99)
    assert len(content[0]['predictions']) == len(NAMES)
    for (_, _, logits, _), picture in zip(done, content, strict=True):
        shares = np.exp(logits) / np.exp(logits).sum()
        for p in picture['predictions']:
            assert p['probability'] == pytest.approx(shares[p['number']], rel=1e-4, abs=1e-6)


def test_pictures_are_read_no_further_ahead_than_needed(pictures):
    endless = itertools.count()
    taken = (image_files.ImageFile(str(pictures / 'a.png'), 0, str(i)) for i in endless)
    batches = image_files.read_batches(taken, CentreCrop(32, 32), 4, threads=2)
    for number in range(1, 4):
        batch, images = next(batches)
        assert ([file.below for file in batch], images.shape) == (
            [str(i) for i in range(4 * number - 4, 4 * number)],
            (4, 32, 32, 3),
        )
    batches.close()
    assert next(endless) <= 12 + 4 + 2 + 2


def test_numbers_where_no_names_are_known(capsys, weights, pictures, tmp_path):
    assert run(capsys, 'convert', weights, tmp_path / 'x.pth')[0] == 0
    content = of_json(capsys, tmp_path / 'x.pth', pictures / 'a.png', '--top', 1)
    assert content[0]['predictions'][0]['class'] == str(content[0]['predictions'][0]['number'])
    assert run(capsys, 'convert', weights, tmp_path / 'x.safetensors')[0] == 0
    same = of_json(capsys, tmp_path / 'x.safetensors', pictures / 'a.png', '--top', 1)
    assert same[0]['predictions'][0]['class'] in NAMES


@pytest.fixture(scope='module')
def bad(tmp_path_factory, pictures):
    folder = tmp_path_factory.mktemp('bad')
    (folder / 'broken.jpg').write_bytes((pictures / 'ü.JPG').read_bytes()[:300])
    (folder / 'empty.png').write_bytes(b'')
    Image.new('1', (10_000, 10_000)).save(folder / 'huge.png')
    os.mkfifo(folder / 'pipe.png')
    (folder / 'gone.png').symlink_to('nowhere')
    (folder / 'again').symlink_to('.')  # a circle
    with open(folder / 'sparse.png', 'wb') as f:
        f.truncate(2**30 + 1)
    return folder


def test_bad_files_are_named_and_skipped(capsys, weights, pictures, bad):
    status, out, err = run(capsys, 'predict', weights, bad, pictures / 'a.png', '--json')
    assert status == 0
    assert [os.path.basename(c['image']) for c in json.loads(out)] == ['a.png']
    lines = err.splitlines()
    assert len(lines) == 6
    assert lines[0] == (
        f'skipped 3 entries in {bad}: again: link to a folder that contains it, '
        'gone.png: broken link: No such file or directory, pipe.png: not a regular file'
    )
    assert lines[-1] == 'skipped 4 of 5 pictures'
    for line, (name, part) in zip(
        lines[1:],
        (
            ('broken.jpg', 'cannot decode the image: '),
            ('empty.png', 'the file is empty'),
            ('huge.png', 'exceeds limit'),
            ('sparse.png', '1,073,741,825 bytes'),
        ),
        strict=False,
    ):
        assert line.startswith(f'skipped: {bad / name}: ')
        assert part in line
    status, out, err = run(capsys, 'predict', weights, bad, '--csv')
    assert (status, out) == (2, '')
    assert err.splitlines()[-1] == 'error: none of the 4 pictures can be decoded'
    with pytest.raises(BadImageError, match=r'broken\.jpg: cannot decode'):
        list(predict(load(str(weights)), [str(bad)]))


@pytest.mark.parametrize(
    ('image', 'part'),
    [
        ('missing.jpg', 'no such image or folder: '),
        ('hollow', ' holds no image '),
        ('hollow/x.jpg', ' holds no image '),
        ('text.jpg', 'text.jpg: cannot decode the image: not a known image format'),
    ],
)
def test_nothing_to_predict_is_one_line_and_status_2(capsys, weights, tmp_path, image, part):
    (tmp_path / 'hollow/x.jpg').mkdir(parents=True)
    (tmp_path / 'text.jpg').write_text('no picture')
    status, out, err = run(capsys, 'predict', weights, tmp_path / image)
    assert (status, out, err.count('\n')) == (2, '', 1)
    assert err.startswith('error: ')
    assert part in err


def test_bad_usage_and_weights(capsys, weights, pictures, tmp_path):
    for arguments, part in (
        ((weights,), 'IMAGE'),
        (('/no/such/run', pictures), 'no such checkpoint: /no/such/run'),
        ((weights, pictures, '--top', '0'), "got '0'"),
        ((weights, pictures, '--step', 'newest'), "got 'newest'"),
        ((weights / '0', pictures, '--step', 'newest'), "got 'newest'"),
        ((weights / '0', pictures, '--step', '5'), 'is the checkpoint of step 0, not 5'),
        ((weights / '0', pictures, '--step', 'best'), 'is the checkpoint of step 0, not best'),
    ):
        status, out, err = run(capsys, 'predict', *arguments)
        assert (status, out, err.count('\n'), part in err) == (2, '', 1, True)
    loaded = load(str(weights))
    damaged = jax.tree.map(lambda a: a * np.nan, loaded.variables)
    with pytest.raises(InputError, match='the logits are not finite'):
        list(predict(dataclasses.replace(loaded, variables=damaged), [str(pictures)]))
    with pytest.raises(InputError, match="paths must be a list of paths, got 'a.jpg'"):
        list(predict(loaded, 'a.jpg'))
    for option in ('top', 'batch_size'):
        with pytest.raises(InputError, match=f'{option} must be at least 1, got 0'):
            list(predict(loaded, [str(pictures)], **{option: 0}))


def test_float64_is_not_cut_to_float32_without_a_word(capsys, pictures, tmp_path):
    settings = ModelConfig(**SETTINGS, dtype='float64', param_dtype='float64')
    variables = small.random_variables(NET, dtype=np.float64)
    orbax.save_weights(str(tmp_path / 'x'), variables, make_metadata(settings, NAMES, DATA.preprocessing))
    jax.config.update('jax_enable_x64', False)
    try:
        status, out, err = run(capsys, 'predict', tmp_path / 'x', pictures)
    finally:
        jax.config.update('jax_enable_x64', True)
    assert (status, out) == (2, '')
    expected = 'a network with dtype=float64 needs the environment variable JAX_ENABLE_X64=1'
    assert err == f'error: {expected}\n'
    assert run(capsys, 'predict', tmp_path / 'x', pictures)[0] == 0


def test_help_has_an_example(capsys):
    for name in ('predict', 'explain'):
        status, out, _ = run(capsys, name, '--help')
        assert (status, f'example: epsanet {name}' in out) == (0, True)


def test_names_that_cannot_be_shown(capsys, weights, pictures, tmp_path):
    names = [b'line\nbreak.png', b'\xff.png', b'bad\xff.png']
    for name in names:
        content = b'' if name.startswith(b'bad') else (pictures / 'a.png').read_bytes()
        with open(os.path.join(os.fsencode(tmp_path), name), 'wb') as f:
            f.write(content)
    for form in ('--csv', '--json'):
        status, out, err = run(capsys, 'predict', weights, tmp_path, form, '--top', 1)
        assert (status, len(err.splitlines())) == (0, 2)
        if form == '--json':
            found = [os.path.basename(os.fsencode(c['image'])) for c in json.loads(out)]
            assert found == names[:2]
        else:
            assert len(list(csv.reader(io.StringIO(out)))) == 3
    status, out, _ = run(capsys, 'predict', weights, tmp_path, '--top', 1)
    assert (status, len(out.splitlines())) == (0, 4)


def test_a_pipe_closed_early_is_no_error(weights, pictures):
    process = subprocess.run(
        f'{sys.executable} -m epsanet_jax predict {weights} {pictures} --csv | head -n 1; '
        'exit ${PIPESTATUS[0]}',
        shell=True,
        executable='/bin/bash',
        capture_output=True,
        text=True,
    )
    assert (process.returncode, process.stderr) == (0, '')
    assert process.stdout == 'image,rank,class,number,probability\n'


def test_ctrl_c_is_no_traceback(capsys, monkeypatch, weights, pictures):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr('epsanet_jax.analysis.predict.predict', interrupted)
    assert run(capsys, 'predict', weights, pictures) == (130, '', '')


def test_a_progress_bar_for_a_terminal_alone(monkeypatch, pictures):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for terminal, bar in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, 'stderr', terminal)
        assert list(common.progress(range(5), [str(pictures)])) == list(range(5))
        assert ('/5' in terminal.getvalue()) is bar
