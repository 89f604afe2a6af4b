"""The command `epsanet predict`."""

import csv
import io
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
from labelled_files import class_folders, write_all, write_tar
from labelled_files import image as jpeg
from PIL import Image


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    return small.save(tmp_path_factory.mktemp('weights') / 'orbax')


def of_json(capsys, *arguments):
    status, out, err = run(capsys, 'predict', *arguments, '--json')
    assert (status, err) == (0, '')
    return json.loads(out)


def test_table_csv_and_json_hold_the_same_predictions(capsys, weights, image_folder):
    content = of_json(capsys, weights, image_folder, '--top', 2)
    assert [len(c['predictions']) for c in content] == [2] * 5
    for image in content:
        assert all(small.NAMES[p['number']] == p['class'] for p in image['predictions'])
    status, out, err = run(capsys, 'predict', weights, image_folder, '--top', 2, '--csv')
    assert (status, err) == (0, '')
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [(r['image'], r['rank'], r['class'], int(r['number']), float(r['probability'])) for r in rows] == [
        (c['image'], str(rank), p['class'], p['number'], p['probability'])
        for c in content
        for rank, p in enumerate(c['predictions'], start=1)
    ]
    status, out, err = run(capsys, 'predict', weights, image_folder, '--top', 2)
    assert (status, err, out.count('\n')) == (0, '', 15)
    name, share = content[0]['predictions'][0]['class'], content[0]['predictions'][0]['probability']
    assert out.splitlines()[:2] == [content[0]['image'], f'  {100 * share:6.2f} %  {name}']
    assert run(capsys, 'predict', weights, image_folder, '--csv', '--json')[0] == 2


def test_classes_without_names_are_printed_as_numbers(capsys, weights, image_folder, tmp_path):
    assert run(capsys, 'convert', weights, tmp_path / 'x.pth')[0] == 0
    named = of_json(capsys, tmp_path / 'x.pth', image_folder / 'a.png', '--top', 1)[0]['predictions'][0]
    assert named['class'] == small.NAMES[named['number']]
    torch.save(dict(torch.load(tmp_path / 'x.pth')), tmp_path / 'plain.pth')  # a dict has no attributes
    plain = of_json(capsys, tmp_path / 'plain.pth', image_folder / 'a.png', '--top', 1)[0]['predictions'][0]
    assert plain['class'] == str(plain['number'])
    assert run(capsys, 'convert', weights, tmp_path / 'x.safetensors')[0] == 0
    tensors = of_json(capsys, tmp_path / 'x.safetensors', image_folder / 'a.png', '--top', 1)[0]
    assert_same_predictions(tensors['predictions'], [named])


@pytest.fixture(scope='module')
def bad(tmp_path_factory, image_folder):
    folder = tmp_path_factory.mktemp('bad')
    (folder / 'broken.jpg').write_bytes((image_folder / 'ü.JPG').read_bytes()[:300])
    (folder / 'empty.png').write_bytes(b'')
    Image.new('1', (10_000, 10_000)).save(folder / 'huge.png')
    os.mkfifo(folder / 'pipe.png')
    (folder / 'gone.png').symlink_to('nowhere')
    (folder / 'again').symlink_to('.')  # a loop of links
    with open(folder / 'sparse.png', 'wb') as f:
        f.truncate(2**30 + 1)
    return folder


def test_files_that_cannot_be_decoded_are_reported_and_skipped(capsys, weights, image_folder, bad):
    status, out, err = run(capsys, 'predict', weights, bad, image_folder / 'a.png', '--json')
    assert status == 0
    assert [os.path.basename(c['image']) for c in json.loads(out)] == ['a.png']
    lines = err.splitlines()
    assert len(lines) == 6
    assert lines[0] == (
        f'skipped 3 entries in {bad}: again: link to a folder that contains it, '
        'gone.png: broken link: No such file or directory, pipe.png: not a regular file'
    )
    assert lines[-1] == 'skipped 4 of 5 images'
    for line, (name, part) in zip(
        lines[1:],
        (
            ('broken.jpg', 'cannot decode the image: '),
            ('empty.png', 'the file is empty'),
            ('huge.png', 'pixels, more than'),
            ('sparse.png', '1,073,741,825 bytes'),
        ),
        strict=False,
    ):
        assert line.startswith(f'skipped: {bad / name}: ')
        assert part in line
    status, out, err = run(capsys, 'predict', weights, bad, '--csv')
    assert (status, out) == (2, '')
    assert err.splitlines()[-1] == 'error: none of the 4 images can be decoded'


@pytest.mark.parametrize(
    ('image', 'part'),
    [
        ('missing.jpg', 'no such image or folder: '),
        ('hollow', ' holds no image '),
        ('hollow/x.jpg', ' holds no image '),
        ('text.jpg', 'text.jpg: cannot decode the image: not a known image format'),
    ],
)
def test_paths_without_an_image_are_errors_of_one_line(capsys, weights, tmp_path, image, part):
    (tmp_path / 'hollow/x.jpg').mkdir(parents=True)
    (tmp_path / 'text.jpg').write_text('not an image')
    status, out, err = run(capsys, 'predict', weights, tmp_path / image)
    assert (status, out, err.count('\n')) == (2, '', 1)
    assert err.startswith('error: ')
    assert part in err


def test_wrong_usage_is_an_error_of_one_line(capsys, weights, image_folder, tmp_path):
    for arguments, part in (
        ((weights,), 'IMAGE'),
        (('/no/such/run', image_folder), 'no such checkpoint: /no/such/run'),
        ((weights, image_folder, '--top', '0'), "got '0'"),
        ((weights, image_folder, '--step', 'newest'), "got 'newest'"),
        ((weights / '0', image_folder, '--step', 'newest'), "got 'newest'"),
        ((weights / '0', image_folder, '--step', '5'), 'is the checkpoint of step 0, not 5'),
        ((weights / '0', image_folder, '--step', 'best'), 'is the checkpoint of step 0, not best'),
    ):
        status, out, err = run(capsys, 'predict', *arguments)
        assert (status, out, err.count('\n'), part in err) == (2, '', 1, True)


def test_float64_weights_are_refused_if_float64_is_disabled(capsys, image_folder, tmp_path):
    variables = small.random_variables(small.model(**small.ONE_BLOCK), dtype=np.float64)
    small.save(tmp_path / 'x', variables, **small.ONE_BLOCK, dtype='float64', param_dtype='float64')
    jax.config.update('jax_enable_x64', False)
    try:
        status, out, err = run(capsys, 'predict', tmp_path / 'x', image_folder)
    finally:
        jax.config.update('jax_enable_x64', True)
    assert (status, out) == (2, '')
    expected = 'a network with dtype=float64 needs the environment variable JAX_ENABLE_X64=1'
    assert err == f'error: {expected}\n'
    assert run(capsys, 'predict', tmp_path / 'x', image_folder)[0] == 0


def test_file_names_that_cannot_be_printed_are_escaped(capsys, weights, image_folder, tmp_path):
    names = [b'line\nbreak.png', b'\xff.png', b'bad\xff.png']
    for name in names:
        content = b'' if name.startswith(b'bad') else (image_folder / 'a.png').read_bytes()
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


def test_closed_pipe_is_not_an_error(weights, image_folder):
    process = subprocess.run(
        f'{sys.executable} -m epsanet_jax predict {weights} {image_folder} --csv | head -n 1; '
        'exit ${PIPESTATUS[0]}',
        shell=True,
        executable='/bin/bash',
        capture_output=True,
        text=True,
    )
    assert (process.returncode, process.stderr) == (0, '')
    assert process.stdout == 'image,rank,class,number,probability\n'


def test_ctrl_c_prints_no_traceback(capsys, monkeypatch, weights, image_folder):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr('epsanet_jax.analysis.predict.predict', interrupted)
    assert run(capsys, 'predict', weights, image_folder) == (130, '', '')


def test_damaged_metadata_of_an_image_gives_no_warning(weights, tmp_path, image_folder):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, 'x' * 50
    Image.open(image_folder / 'a.png').save(tmp_path / 'x.jpg', exif=exif.tobytes()[:40])
    done = subprocess.run(
        [sys.executable, '-m', 'epsanet_jax', 'predict', weights, tmp_path / 'x.jpg'],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stderr, done.stdout.count('\n')) == ('', 6)


def assert_same_predictions(actual, expected):
    """The last digits may differ: they depend on how XLA shares out its work among threads."""
    assert [a['class'] for a in actual] == [e['class'] for e in expected]
    probabilities = [e['probability'] for e in expected]
    assert [a['probability'] for a in actual] == pytest.approx(probabilities, rel=1e-4)


def test_images_in_files_and_tables_have_the_predictions_of_the_files(capsys, weights, tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    folder = class_folders(tmp_path / 'train', 6)
    write_all(tmp_path, tmp_path, 'train')
    expected = [c['predictions'] for c in of_json(capsys, weights, tmp_path / 'train')]
    for paths in (
        [f'parquet/data/train-0000{i}-of-00002.parquet' for i in range(2)],
        [f'shards/train-000{i}.tar' for i in range(3)],
        ['csv/train.csv'],
        ['metadata/train/metadata.jsonl'],
    ):
        content = of_json(capsys, weights, *(tmp_path / path for path in paths))
        for actual, predictions in zip(content, expected, strict=True):
            assert_same_predictions(actual['predictions'], predictions)
        assert len({c['image'] for c in content}) == len(folder)
    assert content[3]['image'] == f'{tmp_path}/metadata/train/metadata.jsonl line 4: 00003.jpg'
    (tmp_path / 'no.parquet').write_bytes(b'')
    status, out, err = run(capsys, 'predict', weights, tmp_path / 'no.parquet')
    assert (status, out, err.count('\n')) == (2, '', 1)
    assert 'no.parquet is not a parquet file, or is truncated' in err


def test_images_without_labels_are_predicted(capsys, weights, tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    write_tar(tmp_path / 'x.tar', [('1.jpg', jpeg(1)), ('2.jpg', jpeg(2)), ('2.json', b'{"text": "x"}')])
    (tmp_path / '1.jpg').write_bytes(jpeg(1))
    (tmp_path / 'x.csv').write_text('file_name\n1.jpg\n')
    first, second = (of_json(capsys, weights, tmp_path / name) for name in ('x.tar', 'x.csv'))
    assert len(first) == 2
    assert_same_predictions(first[0]['predictions'], second[0]['predictions'])
