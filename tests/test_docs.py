"""The Python code in docs/ runs as written, with a small network; the tests that the pages name exist."""

import pathlib
import re

import jax
import numpy as np
import pytest
import small
from PIL import Image

import epsanet_jax
from epsanet_jax.commands.main import main

DOCS = pathlib.Path(__file__).parents[1] / 'docs'
PAGES = sorted(DOCS.rglob('*.md'))
BLOCKS = [
    pytest.param(path.name, code, id=f'{path.relative_to(DOCS)}-{i}')
    for path in PAGES
    for i, code in enumerate(re.findall(r'```python\n(.*?)```', path.read_text(), re.DOTALL))
]
NET = small.model(layers=(1, 1, 1, 1))
NAMES = list('abcdefg')


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder with what the pages use: a checkpoint, exported files, a folder of images."""
    import torch

    from epsanet_jax.convert.torch_model import EPSANet

    folder, rng = tmp_path_factory.mktemp('place'), np.random.default_rng(0)
    variables = small.random_variables(NET, dtype=np.float32)
    settings = epsanet_jax.data.preprocessing.Preprocessing(32, 36)
    epsanet_jax.save_pretrained(folder / 'net', NET, variables, NAMES, settings)
    (folder / 'runs').mkdir()
    (folder / 'holiday').mkdir()
    for i in range(3):
        pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / 'holiday' / f'{i}.jpg')
    assert main(['convert', str(folder / 'net'), str(folder / 'runs' / 'pets')]) == 0
    for suffix in ('stablehlo', 'onnx'):
        assert main(['export', str(folder / 'net'), str(folder / f'pets.{suffix}')]) == 0
    pets = epsanet_jax.create_model('epsanet50_small', num_classes=37)
    torch.save(EPSANet(pets).state_dict(), folder / 'pets.pth')
    return folder


@pytest.mark.parametrize('page', PAGES, ids=lambda path: str(path.relative_to(DOCS)))
def test_tests_that_a_page_names_exist(page):
    tests = {path.name: path.read_text() for path in pathlib.Path(__file__).parent.rglob('test_*.py')}
    assert set(re.findall(r'\btest_\w+\.py', page.read_text())) <= tests.keys()
    for file, name in re.findall(r'(?:(test_\w+\.py)::|`)(test_\w+)(?![\w.])', page.read_text()):
        assert f'def {name}' in (tests[file] if file else ''.join(tests.values())), (file, name)


@pytest.mark.slow
@pytest.mark.parametrize(('page', 'code'), BLOCKS)
def test_code_of_a_page_runs(page, code, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    variables = small.random_variables(NET, dtype=np.float32)
    images = np.random.default_rng(1).standard_normal((2, 32, 32, 3)).astype(np.float32)
    names = {
        'model': NET,
        'variables': variables,
        'images': images.transpose(0, 3, 1, 2) if 'onnxruntime' in code else images,
        'class_names': NAMES,
        'classes': np.array([0, 1]),
        'features': jax.jit(lambda v, x: NET.apply(v, x, method='features'))(variables, images),
    }
    exec(compile(code, page, 'exec'), names)
    if 'logits' in names:
        assert names['logits'].shape == (2, names['model'].num_classes)
    if 'shares' in names:
        assert names['maps'].shape == (2, 32, 32)
        np.testing.assert_allclose(names['shares'].sum(axis=2), 1, rtol=1e-5)
    if "method='features'" in code:
        assert [v.shape[1] for k, v in sorted(names['features'].items())] == [56, 28, 14, 7, 56]
    if 'predict(' in code:
        assert capsys.readouterr().out.count('holiday/') == 3
