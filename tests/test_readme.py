"""The code of the README runs as it stands there."""

import pathlib
import re
import runpy

import pytest

README = pathlib.Path(__file__).parents[1] / 'README.md'
BLOCKS = re.findall(r'```python\n(.*?)```', README.read_text(), re.DOTALL)


@pytest.mark.parametrize('code', [code for code in BLOCKS if 'torch.save' in code])
def test_the_example_from_and_to_pytorch(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(README), 'exec'), {})
    assert (tmp_path / 'checkpoint.pth.tar').exists()
    assert 'assert np.abs(ours - theirs)' in code


@pytest.mark.slow
@pytest.mark.parametrize('code', [code for code in BLOCKS if 'torch.save' not in code])
def test_the_example_of_the_networks(code):
    names = {}
    exec(compile(code, str(README), 'exec'), names)
    assert names['logits'].shape == (2, 1000)
    assert [v.shape[1] for k, v in sorted(names['features'].items())] == [56, 28, 14, 7, 56]


def test_the_table_of_variants_is_true():
    from epsanet_jax.analysis.summary import summarize
    from epsanet_jax.models import create_model, get_variant

    lines = [line for line in README.read_text().splitlines() if re.match(r'\| `\w+` \|', line)]
    assert len(lines) == 8
    for line in lines:
        name, params, multiply_adds, published, accuracy = (c.strip(' `') for c in line.split('|')[1:-1])
        summary = summarize(create_model(name))
        assert sum(row.params for row in summary) == int(params.replace(',', ''))
        assert f'{sum(row.multiply_adds for row in summary) / 1e9:.3f} G' == multiply_adds
        variant = get_variant(name)
        if variant.published_flops:
            assert published == f'{variant.published_flops} G'
            assert accuracy == f'{variant.published_top1} / {variant.published_top5}'


@pytest.mark.slow
def test_the_page_of_the_variants_is_what_its_script_writes():
    path = README.parent / 'benchmarks' / 'variants.py'
    written = '\n'.join(runpy.run_path(str(path))['lines']()) + '\n'
    assert (README.parent / 'docs' / 'variants.md').read_text() == written


def test_links_and_pictures_are_there():
    pages = [README, *(README.parent / 'docs').glob('*.md')]
    links = [
        (page.name, page.parent / target.partition('#')[0])
        for page in pages
        for target in re.findall(r'\]\(([^)]+)\)', page.read_text())
        if '://' not in target and not target.startswith('#')
    ]
    assert len(links) > 20
    assert [link for link in links if not link[1].exists()] == []
    recipes = re.findall(r'configs/\w+\.py', ''.join(page.read_text() for page in pages))
    assert [name for name in recipes if not (README.parent / name).exists()] == []
