"""The files about the project agree with each other and with the package."""

import pathlib
import re
import subprocess
import sys
import tomllib

import pytest
import yaml

import epsanet_jax

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
YAML_FILES = sorted(
    [
        ROOT / 'CITATION.cff',
        ROOT / '.pre-commit-config.yaml',
        ROOT / 'mkdocs.yml',
        *(ROOT / '.github').rglob('*.yml'),
    ]
)


def test_versions_agree():
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    assert citation['version'] == PROJECT['version'] == epsanet_jax.__version__
    assert citation['license'] == PROJECT['license']
    changelog = (ROOT / 'CHANGELOG.md').read_text()
    assert re.findall(r'^## (\S+)', changelog, re.MULTILINE)[:2] == ['Unreleased', PROJECT['version']]


def test_citation_names_the_paper():
    paper = yaml.safe_load((ROOT / 'CITATION.cff').read_text())['preferred-citation']
    assert paper['url'] == 'https://arxiv.org/abs/2105.14447'
    assert [author['family-names'] for author in paper['authors']] == ['Zhang', 'Zu', 'Lu', 'Zou', 'Meng']


@pytest.mark.parametrize('path', YAML_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_yaml_file_is_valid(path):
    assert isinstance(yaml.safe_load(path.read_text()), dict)


def test_oldest_versions_tested_are_the_lower_bounds():
    lower = dict(
        re.fullmatch(r'([\w-]+)>=([\d.]+)', d).groups()
        for d in PROJECT['dependencies']
        if '>=' in d and '[' not in d
    )
    lines = (ROOT / '.github' / 'constraints-oldest.txt').read_text().splitlines()
    pinned = dict(line.split('==') for line in lines if not line.startswith('#'))
    assert pinned.pop('jaxlib') == pinned['jax']
    for name, version in pinned.items():
        assert version == lower[name] or version == f'{lower[name]}.0', name


@pytest.mark.slow
def test_documentation_builds_and_loads_nothing_from_other_hosts(tmp_path):
    command = [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--quiet', '--site-dir', str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    for page in [*(ROOT / 'docs').rglob('*.md')]:
        assert (tmp_path / page.relative_to(ROOT / 'docs').with_suffix('') / 'index.html').exists()
    html = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob('*.html')}
    assert 'make train' in html[pathlib.Path('index.html')]
    assert 'id="epsanet_jax.create_model"' in html[pathlib.Path('api', 'epsanet_jax', 'index.html')]
    tags = re.compile(r'<(?:script|link|img|iframe)[^>]+(?:src|href)=["\']?(?:https?:)?//')
    assert [path for path, text in html.items() if tags.search(text)] == []
    styles = ''.join(path.read_text() for path in tmp_path.rglob('*.css'))
    assert not re.search(r'url\(["\']?(?:https?:)?//', styles)
