"""Grad-CAM, attention, and the command `epsanet explain`."""

import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import torch
from command import run
from PIL import Image

from epsanet_jax import InputError, create_model
from epsanet_jax.analysis.explain import attention, grad_cam, kernel_labels
from epsanet_jax.convert import to_torch, torch_model
from epsanet_jax.data.augment import normalize
from epsanet_jax.training.config import DataConfig, ModelConfig
from epsanet_jax.weights import orbax
from epsanet_jax.weights.metadata import make_metadata

TWO_STAGES = {'layers': (2, 1), 'planes': (8, 16)}
NET = small.model(**TWO_STAGES, dtype=jnp.float64, param_dtype=jnp.float64)
ONE_STAGE = {'layers': (1,), 'planes': (8,)}
VARIABLES = small.random_variables(NET)
NAMES = ('ant', 'bee', 'cat', '4', '$x$', 'a very long name, longer than there is room for', 'ü')
DATA = DataConfig(image_size=32, resize_size=32)


@pytest.fixture(scope='module')
def images():
    return small.images(np.random.default_rng(1), n=2, size=48)


@pytest.fixture(scope='module')
def twin():
    net = torch_model.EPSANet(NET).double().eval()
    net.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in to_torch(VARIABLES, NET).items()})
    return net


def theirs_of(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2)


CLASSES = np.array([5, 2], np.int32)


@pytest.fixture(scope='module')
def ours(images):
    """Grad-CAM of every stage, attention and features, by one compiled function."""

    @jax.jit
    def explain(variables, images, classes):
        maps = {
            stage: tuple(grad_cam(NET, variables, images, classes, stage, up) for up in (False, True))
            for stage in ('stem', 'layer1', 'layer2')
        }
        features = NET.apply(variables, images, method='features')
        return maps, attention(NET, variables, images), features

    with jax.numpy_dtype_promotion('strict'):
        return explain(VARIABLES, images, CLASSES)


def gradients_of(twin, images, classes):
    """Returns PyTorch's activations at the stem and each stage, with the gradients of the classes' logits."""
    seen = {}

    def keep(name, activation):
        activation.retain_grad()
        seen[name] = activation

    handles = [
        twin.layer1.register_forward_pre_hook(lambda m, inputs: keep('stem', inputs[0])),
        *(
            twin.get_submodule(name).register_forward_hook(lambda m, i, out, name=name: keep(name, out))
            for name in ('layer1', 'layer2')
        ),
    ]
    logits = twin(theirs_of(images))
    for handle in handles:
        handle.remove()
    logits[range(len(classes)), classes].sum().backward()
    return seen


def test_grad_cam_is_that_of_pytorch_at_every_stage(images, twin, ours):
    maps, _, features = ours
    for stage, a in gradients_of(twin, images, CLASSES.tolist()).items():
        weights = a.grad.mean(dim=(2, 3), keepdim=True)
        expected = torch.relu((weights * a).sum(dim=1, keepdim=True)).detach()
        large = torch.nn.functional.interpolate(expected, (48, 48), mode='bilinear', align_corners=False)
        largest = float(expected.max())
        assert largest > 0
        for one, other in zip(maps[stage], (expected, large), strict=True):
            np.testing.assert_allclose(one, other[:, 0].numpy(), rtol=0, atol=1e-10 * largest)

    # At the last stage it is the map of the classifier (CAM, Zhou et al., 2016).
    a = np.asarray(features['layer2'])
    kernel = VARIABLES['params']['fc']['kernel'][:, CLASSES]  # [C, N]
    cam = np.maximum(np.einsum('nhwc,cn->nhw', a, kernel), 0) / (a.shape[1] * a.shape[2])
    np.testing.assert_allclose(maps['layer2'][0], cam, rtol=1e-9, atol=1e-12)


def test_attention_is_the_papers_formula_on_the_twin(images, twin, ours):
    _, found, _ = ours
    assert {k: v.shape for k, v in found.items()} == {
        'layer1': (2, 2, 4, 2),
        'layer2': (2, 1, 4, 4),
    }
    for stage, weights in found.items():
        for number, block in enumerate(twin.get_submodule(stage)):
            seen = []
            handle = block.conv2.register_forward_pre_hook(lambda m, inputs, seen=seen: seen.extend(inputs))
            with torch.no_grad():
                twin(theirs_of(images))
                handle.remove()
                gates = []
                for i in range(4):
                    z = block.conv2.get_submodule(f'conv_{i + 1}')(seen[0]).mean(dim=(2, 3), keepdim=True)
                    gates.append(torch.sigmoid(block.conv2.se.fc2(torch.relu(block.conv2.se.fc1(z)))))
                gates = torch.stack(gates, dim=1)[..., 0, 0]  # [N, S, C]
                expected = gates.exp() / gates.exp().sum(dim=1, keepdim=True)
            np.testing.assert_allclose(weights[:, number], expected.numpy(), rtol=1e-10)


def test_half_precision(images):
    def found(dtype):
        net = small.model(**ONE_STAGE, dtype=dtype)
        variables = small.random_variables(net, dtype=np.float32)
        return jax.jit(lambda x: grad_cam(net, variables, x, 4, 'layer1'))(images)

    expected, half = found(jnp.float32), found(jnp.bfloat16)
    assert half.dtype == jnp.float32
    assert np.abs(half - expected).max() < 0.1 * expected.max()


def test_what_is_not_there_is_said(images):
    with pytest.raises(InputError, match="no stage 'layer5' .*; there are stem, layer1"):
        grad_cam(NET, VARIABLES, images, 0, 'layer5')
    with pytest.raises(InputError, match="no stage 'layer3'.*; there are stem, layer1, layer2"):
        NET.apply(VARIABLES, images, 'layer3', method='logits_from')
    resnet = create_model('resnet50')
    with pytest.raises(InputError, match='no attention'):
        attention(resnet, {}, images)
    assert kernel_labels(create_model('epsanet50_large')) == ['3x3', '5x5', '5x5 (2nd)', '7x7']


def save_weights(path, settings, net):
    variables = small.random_variables(net, dtype=np.float32)
    orbax.save_weights(
        str(path), variables, make_metadata(ModelConfig(**settings), NAMES, DATA.preprocessing)
    )
    return variables


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp('weights') / 'orbax'
    settings = {**small.SETTINGS, **ONE_STAGE}
    variables = save_weights(path, {**settings, 'name': 'epsanet50_small'}, small.model(**ONE_STAGE))
    return path, variables


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp('pictures')
    rng = np.random.default_rng(0)
    for name in ('cat/1.png', 'cat/deep/1.png', 'dog/1.png', 'own.png'):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / name)
    return folder


def written(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file())


def test_a_folder_gives_drawings_and_a_table_for_each_class(capsys, weights, pictures, tmp_path):
    path, variables = weights
    (pictures / 'dog/broken.png').write_bytes(b'')
    out = pictures / 'out/b'  # drawings are not taken for pictures
    out.mkdir(parents=True)
    (out / 'earlier.png').write_bytes((pictures / 'own.png').read_bytes())
    status, printed, err = run(capsys, 'explain', path, pictures, '--out', out)
    (pictures / 'dog/broken.png').unlink()
    (out / 'earlier.png').unlink()
    assert (status, err.count('\n'), 'skipped 1 of 5 pictures' in err) == (0, 2, True)
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
    net = small.model(**ONE_STAGE)
    classes = {'cat': ['cat/1.png', 'cat/deep/1.png'], 'dog': ['dog/1.png'], pictures.name: ['own.png']}
    with open(out / 'attention.csv', newline='') as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 3 * 4
    order = [file for files in classes.values() for file in files]
    pixels = np.stack([np.asarray(Image.open(pictures / file)) for file in order])
    every = jax.jit(lambda x: attention(net, variables, normalize(x, DATA.mean, DATA.std)))(pixels)
    every = np.asarray(every['layer1'].mean(axis=-1))  # [N, blocks, S]
    for name, files in classes.items():
        assert f'{name}, {len(files)} picture{"s" if len(files) > 1 else ""}:' in printed
        found = every[[order.index(file) for file in files], 0].mean(axis=0)  # [S]
        table = [r for r in rows if r['class'] == name]
        assert [(r['pictures'], r['stage'], r['block'], r['branch'], r['kernel']) for r in table] == [
            (str(len(files)), 'layer1', '0', str(i), str(k)) for i, k in enumerate((3, 5, 7, 9), start=1)
        ]
        np.testing.assert_allclose([float(r['attention']) for r in table], found, rtol=1e-4)
        assert f'{found[3]:.4f}' in printed
    shares = [float(r['attention']) for r in rows]
    np.testing.assert_allclose(np.reshape(shares, (-1, 4)).sum(axis=1), 1, rtol=1e-5)


def test_chosen_classes_and_stages_and_pictures_of_equal_names(capsys, weights, pictures, tmp_path):
    chosen = ('--classes', '4', '1', 'bee', '$x$', '--stages', 'layer1', 'stem')
    one, two = pictures / 'cat/1.png', pictures / 'dog/1.png'
    status, printed, err = run(capsys, 'explain', weights[0], one, two, '--out', tmp_path, *chosen)
    assert (status, err) == (0, '')
    assert written(tmp_path) == ['1-2.png.png', '1.png.png']
    assert printed.count('\n') == 2  # single pictures have no table
    assert printed.startswith(f'{tmp_path / "1.png.png"}: ')
    with Image.open(tmp_path / '1.png.png') as drawing:  # '4' is a name; 1 and bee are the same: 3 rows
        assert drawing.height > 1000


def test_a_resnet_has_grad_cam_alone(capsys, pictures, tmp_path):
    settings = {'layers': (1,), 'planes': (8,), 'expansion': 2, 'num_classes': 7}
    save_weights(tmp_path / 'x', {**settings, 'name': 'resnet50'}, create_model('resnet50', **settings))
    status, printed, err = run(capsys, 'explain', tmp_path / 'x', pictures / 'cat', '--out', tmp_path / 'out')
    assert (status, err, 'attention' in printed) == (0, '', False)
    assert written(tmp_path / 'out') == ['1.png.png', 'deep/1.png.png']


@pytest.mark.parametrize(
    ('arguments', 'part'),
    [
        (('--stages', 'layer7'), "no stage 'layer7'"),
        (('--classes', 'be'), "no class 'be' (did you mean 'bee'?); a name or a number from 0 to 6"),
        (('--classes', '7'), "no class '7'"),
        (('--out', __file__), 'cannot make the folder'),
        (('--step', 'newest'), "got 'newest'"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(capsys, weights, pictures, tmp_path, arguments, part):
    status, out, err = run(capsys, 'explain', weights[0], pictures, '--out', tmp_path / 'out', *arguments)
    assert (status, out, err.count('\n')) == (2, '', 1)
    assert err.startswith('error: ')
    assert part in err


@pytest.mark.parametrize('name', ['epsanet50_small', 'resnet50'])
def test_damaged_weights_are_noticed(capsys, pictures, tmp_path, name):
    settings = {'name': name, 'layers': (1,), 'planes': (8,), 'num_classes': 7}
    if name != 'resnet50':
        settings = {**small.SETTINGS, **settings}
    net = create_model(**settings)
    variables = small.random_variables(net, dtype=np.float32)
    variables['params']['fc']['bias'] = np.full(7, np.nan, np.float32)
    settings = ModelConfig(**settings)
    orbax.save_weights(str(tmp_path / 'x'), variables, make_metadata(settings, NAMES, DATA.preprocessing))
    status, out, err = run(capsys, 'explain', tmp_path / 'x', pictures, '--out', tmp_path / 'out')
    assert (status, out, err.count('\n'), 'the logits are not finite' in err) == (2, '', 1, True)


def test_out_is_asked_for_and_unreadable_pictures_are_an_error(capsys, weights, pictures, tmp_path):
    assert '--out' in run(capsys, 'explain', weights[0], pictures)[2]
    (tmp_path / 'x.jpg').write_text('no picture')
    status, out, err = run(capsys, 'explain', weights[0], tmp_path / 'x.jpg', '--out', tmp_path / 'out')
    assert (status, out, err.count('\n'), 'not a known image format' in err) == (2, '', 1, True)
