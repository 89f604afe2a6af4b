"""The README: its code runs, its table is true, its links lead somewhere."""

import contextlib
import io
import pathlib
import re
import runpy

import numpy as np
import pytest
import small

import epsanet_jax
from epsanet_jax.commands.main import main
from epsanet_jax.data.preprocessing import Preprocessing

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / 'README.md'
PAGES = [README, *(ROOT / 'docs').rglob('*.md')]


def test_code_of_the_readme_runs_and_predicts(tmp_path, monkeypatch):
    model = small.model(layers=(1, 1, 1, 1), num_classes=10)
    network = epsanet_jax.Network(
        model,
        small.random_variables(model, dtype=np.float32),
        tuple(map(str, range(10))),
        Preprocessing(32, 32),
    )
    monkeypatch.chdir(tmp_path)
    epsanet_jax.save_pretrained('network', network)
    (tmp_path / 'runs').mkdir()
    assert main(['convert', 'network', 'runs/digits']) == 0
    printed, names = io.StringIO(), {}
    for code in re.findall(r'```python\n(.*?)```', README.read_text(), re.DOTALL):
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(README), 'exec'), names)
    lines = printed.getvalue().splitlines()
    assert len(lines) == 3
    assert all(re.fullmatch(r'image\.png: \d \d+\.\d%', line) for line in lines)
    assert names['conv'].feature_group_count == 16


@pytest.mark.slow
def test_table_of_models_is_true():
    from epsanet_jax.analysis.summary import summarize
    from epsanet_jax.models import create_model, get_variant, list_models

    lines = [line for line in README.read_text().splitlines() if re.match(r'\| `\w+` \|', line)]
    assert len(lines) == len(list_models())
    for line in lines:
        name, params, multiply_adds, published, accuracy = (c.strip(' `') for c in line.split('|')[1:-1])
        summary = summarize(create_model(name))
        assert sum(row.params for row in summary) == int(params.replace(',', ''))
        assert f'{sum(row.multiply_adds for row in summary) / 1e9:.3f} G' == multiply_adds
        variant = get_variant(name)
        if variant.published_flops:
            assert published == f'{variant.published_flops} G'
            assert accuracy == f'{variant.published_top1} / {variant.published_top5}'
        elif variant.published_top1:
            assert accuracy == str(variant.published_top1)


def test_every_folder_and_module_of_the_file_map_exists():
    section = README.read_text().split('## Where things are\n')[1].split('\n## ')[0]
    folder = ROOT
    for indent, name, rest in re.findall(r'^( {4,8})(\S+) +(.*(?:\n {12,}.*)*)', section, re.MULTILINE):
        folder = ROOT / 'epsanet_jax' if len(indent) == 8 else ROOT
        assert (folder / name).exists(), name
        for module in re.findall(r'\b\w+\.(?:py|md)\b|\bprepare/', rest):
            assert (folder / name / module).exists(), module
    packages = {path.parent.name for path in (ROOT / 'epsanet_jax').glob('*/__init__.py')}
    assert packages == set(re.findall(r'^ {8}(\w+)/', section, re.MULTILINE))


def test_readme_fits_on_a_few_screens():
    lines = README.read_text().splitlines()
    assert len(lines) <= 140
    assert [line for line in lines[:30] if re.match(r' {4}(pip install|make train|make test)', line)]


@pytest.mark.slow
def test_page_of_the_models_is_the_output_of_its_script():
    written = '\n'.join(runpy.run_path(str(ROOT / 'benchmarks' / 'variants.py'))['lines']()) + '\n'
    assert (ROOT / 'docs' / 'variants.md').read_text() == written


def test_links_images_and_recipes_exist():
    links = [
        (page.name, page.parent / target.partition('#')[0])
        for page in PAGES
        for target in re.findall(r'\]\(([^)]+)\)', page.read_text())
        if '://' not in target and not target.startswith('#')
    ]
    assert len(links) > 20
    assert [link for link in links if not link[1].exists()] == []
    recipes = re.findall(r'configs/\w+\.py', ''.join(page.read_text() for page in PAGES))
    assert [name for name in recipes if not (ROOT / name).exists()] == []


def test_anchors_of_links_exist():
    for page in PAGES:
        for target in re.findall(r'\]\(([^):]*#[^)]+)\)', page.read_text()):
            file, _, anchor = target.partition('#')
            text = (page.parent / file if file else page).read_text()
            titles = re.findall(r'^#+ (.*)', text, re.MULTILINE)
            slugs = [re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-') for title in titles]
            assert anchor in slugs, (page.name, target)
