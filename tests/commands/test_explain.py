"""The command `epsanet explain`."""

import csv

import jax
import numpy as np
import pytest
import small
from command import run
from PIL import Image
from small import PREPROCESSING

from epsanet_jax import create_model, load
from epsanet_jax.analysis.explain import attention
from epsanet_jax.data.augment import normalize


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    return small.save(tmp_path_factory.mktemp('weights') / 'orbax')


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for name in ('cat/1.png', 'cat/deep/1.png', 'dog/1.png', 'own.png'):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / name)
    return folder


def written(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file())


def test_folder_gives_drawings_and_a_table_for_each_class(capsys, weights, images, tmp_path):
    path, variables = weights, load(str(weights)).variables
    (images / 'dog/broken.png').write_bytes(b'')
    out = images / 'out/b'  # drawings are not read as images
    out.mkdir(parents=True)
    (out / 'earlier.png').write_bytes((images / 'own.png').read_bytes())
    status, printed, err = run(capsys, 'explain', path, images, '--out', out)
    (images / 'dog/broken.png').unlink()
    (out / 'earlier.png').unlink()
    assert (status, err.count('\n'), 'skipped 1 of 5 images' in err) == (0, 2, True)
    assert written(out) == [
        'attention.csv',
        'cat/1.png.png',
        'cat/deep/1.png.png',
        'dog/1.png.png',
        'own.png.png',
    ]
    with Image.open(out / 'cat/deep/1.png.png') as drawing:
        drawing.load()
        assert drawing.format == 'PNG'
        assert min(drawing.size) > 300
    net = small.model(**small.ONE_BLOCK)
    classes = {'cat': ['cat/1.png', 'cat/deep/1.png'], 'dog': ['dog/1.png'], images.name: ['own.png']}
    with open(out / 'attention.csv', newline='') as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 3 * 4
    order = [file for files in classes.values() for file in files]
    pixels = np.stack([np.asarray(Image.open(images / file)) for file in order])
    every = jax.jit(lambda x: attention(net, variables, normalize(x, PREPROCESSING.mean, PREPROCESSING.std)))(
        pixels
    )
    every = np.asarray(every['layer1'].mean(axis=-1))  # [N, blocks, S]
    for name, files in classes.items():
        assert f'{name}, {len(files)} image{"s" if len(files) > 1 else ""}:' in printed
        found = every[[order.index(file) for file in files], 0].mean(axis=0)  # [S]
        table = [r for r in rows if r['class'] == name]
        assert [(r['images'], r['stage'], r['block'], r['branch'], r['kernel']) for r in table] == [
            (str(len(files)), 'layer1', '0', str(i), str(k)) for i, k in enumerate((3, 5, 7, 9), start=1)
        ]
        np.testing.assert_allclose([float(r['attention']) for r in table], found, rtol=1e-4)
        assert f'{found[3]:.4f}' in printed
    shares = [float(r['attention']) for r in rows]
    np.testing.assert_allclose(np.reshape(shares, (-1, 4)).sum(axis=1), 1, rtol=1e-5)


@pytest.mark.slow
def test_chosen_classes_and_stages_and_images_of_equal_names(capsys, weights, images, tmp_path):
    chosen = ('--classes', '4', '1', 'bee', '$x$', '--stages', 'layer1', 'stem')
    one, two = images / 'cat/1.png', images / 'dog/1.png'
    status, printed, err = run(capsys, 'explain', weights, one, two, '--out', tmp_path, *chosen)
    assert (status, err) == (0, '')
    assert written(tmp_path) == ['1-2.png.png', '1.png.png']
    assert printed.count('\n') == 2  # single images have no table
    assert printed.startswith(f'{tmp_path / "1.png.png"}: ')
    with Image.open(tmp_path / '1.png.png') as drawing:  # '4' is a name, 1 and bee are the same class: 3 rows
        assert drawing.height > 1000


def test_resnet_has_no_table_of_attention(capsys, images, tmp_path):
    settings = {'layers': (1,), 'planes': (8,), 'expansion': 2, 'num_classes': 7}
    small.save(tmp_path / 'x', name='resnet50', **settings)
    status, printed, err = run(capsys, 'explain', tmp_path / 'x', images / 'cat', '--out', tmp_path / 'out')
    assert (status, err, 'attention' in printed) == (0, '', False)
    assert written(tmp_path / 'out') == ['1.png.png', 'deep/1.png.png']


@pytest.mark.parametrize(
    ('arguments', 'part'),
    [
        (('--stages', 'layer7'), "no stage 'layer7'"),
        (('--classes', 'be'), "no class 'be' (did you mean 'bee'?); give a name or a number from 0 to 6"),
        (('--classes', '7'), "no class '7'"),
        (('--out', __file__), 'cannot create the folder'),
        (('--step', 'newest'), "got 'newest'"),
    ],
)
def test_wrong_usage_is_an_error_of_one_line(capsys, weights, images, tmp_path, arguments, part):
    status, out, err = run(capsys, 'explain', weights, images, '--out', tmp_path / 'out', *arguments)
    assert (status, out, err.count('\n')) == (2, '', 1)
    assert err.startswith('error: ')
    assert part in err


@pytest.mark.parametrize('name', ['epsanet50_small', 'resnet50'])
def test_damaged_weights_are_an_error(capsys, images, tmp_path, name):
    settings = {'name': name, 'layers': (1,), 'planes': (8,), 'num_classes': 7}
    if name != 'resnet50':
        settings = {**small.SETTINGS, **settings}
    net = create_model(**settings)
    variables = small.random_variables(net, dtype=np.float32)
    variables['params']['fc']['bias'] = np.full(7, np.nan, np.float32)
    small.save(tmp_path / 'x', variables, **settings)
    status, out, err = run(capsys, 'explain', tmp_path / 'x', images, '--out', tmp_path / 'out')
    assert (status, out, err.count('\n'), 'the logits are not finite' in err) == (2, '', 1, True)


def test_out_is_required_and_an_unreadable_image_is_an_error(capsys, weights, images, tmp_path):
    assert '--out' in run(capsys, 'explain', weights, images)[2]
    (tmp_path / 'x.jpg').write_text('not an image')
    status, out, err = run(capsys, 'explain', weights, tmp_path / 'x.jpg', '--out', tmp_path / 'out')
    assert (status, out, err.count('\n'), 'not a known image format' in err) == (2, '', 1, True)


def test_long_names_are_cut_and_the_images_after_them_are_drawn(capsys, weights, images, tmp_path):
    names = ['a' * 251 + '.png', 'ü' * 120 + '.jpeg', 'ü' * 125 + 'x.jpg', 'z.png']
    (tmp_path / 'in').mkdir()
    for name in names:
        (tmp_path / 'in' / name).write_bytes((images / 'own.png').read_bytes())
    status, _, err = run(capsys, 'explain', weights, tmp_path / 'in', '--out', tmp_path / 'out')
    assert (status, err) == (0, '')
    drawings = [name for name in written(tmp_path / 'out') if name.endswith('.png')]
    assert len(drawings) == 4
    assert {'z.png.png', 'ü' * 120 + '.jpeg.png'} < set(drawings)
    assert all(len(name.encode()) <= 255 for name in drawings)


def test_existing_drawings_are_replaced_with_overwrite_only(capsys, weights, images, tmp_path):
    (tmp_path / '1.png.png').write_text('old')
    arguments = ('explain', weights, images / 'cat/1.png', '--out', tmp_path)
    status, printed, err = run(capsys, *arguments)
    assert (status, printed, '1.png.png exists; choose another --out' in err) == (2, '', True)
    assert (tmp_path / '1.png.png').read_text() == 'old'
    assert run(capsys, *arguments, '--overwrite')[0] == 0
    assert (tmp_path / '1.png.png').stat().st_size > 1000


def test_images_in_a_table_are_numbered(capsys, weights, images, tmp_path):
    (tmp_path / 'x.csv').write_text(f'path\n{images}/cat/1.png\n{images}/dog/1.png\n')
    status, _, err = run(capsys, 'explain', weights, tmp_path / 'x.csv', '--out', tmp_path / 'out')
    assert (status, err) == (0, '')
    assert written(tmp_path / 'out') == ['000000.png', '000001.png']
    status, _, err = run(
        capsys, 'explain', weights, tmp_path / 'x.csv', images / 'own.png', '--out', tmp_path / 'both'
    )
    assert (status, err) == (0, '')
    assert written(tmp_path / 'both') == ['own.png.png', 'x.csv/000000.png', 'x.csv/000001.png']
