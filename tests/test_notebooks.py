"""The notebooks run as plain Python, without Jupyter, in an empty folder."""

import json
import os
import subprocess
import sys

import pytest
from runs import ROOT

NOTEBOOKS = sorted((ROOT / 'notebooks').glob('*.ipynb'))


def cells(path):
    content = json.loads(path.read_text())
    assert (content['nbformat'], content['metadata']['kernelspec']['name']) == (4, 'python3')
    return [cell for cell in content['cells'] if cell['cell_type'] == 'code']


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_with_its_outputs(path):
    found = cells(path)
    assert [cell['execution_count'] for cell in found] == list(range(1, len(found) + 1))
    outputs = [output for cell in found for output in cell['outputs']]
    assert outputs
    assert not [output for output in outputs if output['output_type'] == 'error']
    assert path.stat().st_size < 400_000
    assert '/home/' not in path.read_text()
    assert '/tmp/' not in path.read_text()


@pytest.mark.slow
@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path):
    script = tmp_path / 'notebook.py'
    script.write_text('\n'.join(''.join(cell['source']) for cell in cells(path)))
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'XLA_FLAGS': ''}
    command = [sys.executable, script.name]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    if path.stem == 'epsanet_in_ten_minutes':
        assert {'curves.png', 'explain.png', 'confusion.png'} <= {file.name for file in tmp_path.iterdir()}
        assert 'digit 3' in done.stdout


def test_there_are_two_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ['epsanet_in_ten_minutes', 'from_pytorch_and_back']
