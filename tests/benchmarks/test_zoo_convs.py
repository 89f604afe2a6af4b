"""`benchmarks/zoo_convs.py` compares the same convolution on all sides; its measurements are not tested."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROW = ('Small Net', 6, 4, 8, 3, 2, 1, 2)  # as the rows of the script's table
OTHER = ('Small Net', 5, 4, 4, 3, 1, 2, 4)


@pytest.fixture
def zoo_convs(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / 'benchmarks'))
    import zoo_convs

    convs = [zoo_convs.Conv(*ROW), zoo_convs.Conv(*OTHER)]
    monkeypatch.setattr(zoo_convs, 'CONVS', convs)
    monkeypatch.setattr(zoo_convs.time, 'sleep', lambda seconds: None)
    return zoo_convs


def run(zoo_convs, monkeypatch, capsys, *arguments):
    """Runs the script and returns the lines that it prints."""
    monkeypatch.setattr(sys, 'argv', ['zoo_convs.py', '--batch', '2', *map(str, arguments)])
    zoo_convs.main()
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def measured(factor=1.0, **ratios):
    """What `measure` returns."""
    ratios = {'torch_forward': 2 * factor, 'torch_forward_backward': 0.5 * factor, **ratios}
    return {'ms': {}, 'compile_s': {}, 'ratios': ratios}


def test_a_convolution_is_measured_on_all_sides(zoo_convs, monkeypatch, capsys, tmp_path):
    name = 'small-6x4-k3-g2-s2'
    image = tmp_path / 'ratios.png'
    line, summary = run(zoo_convs, monkeypatch, capsys, '--rounds', '1', '--only', name, '--plot', image)
    assert [line[key] for key in ('name', 'size', 'inputs', 'outputs', 'groups')] == [name, 6, 4, 8, 2]
    assert set(line['compile_s']) == {'ours', 'stock'}
    for direction, times in line['ms'].items():
        assert set(times) == set(zoo_convs.SIDES)
        best = min(times['torch-nchw'], times['torch-channels-last'])
        for other, took in (('torch', best), ('stock', times['stock'])):
            ratio = line['ratios'][f'{other}_{direction}']
            assert ratio == pytest.approx(took / times['ours'], rel=0.1)
            assert summary[f'{other}_{direction}'] == {
                'geometric_mean': ratio,
                'worst': ratio,
                'worst_name': name,
            }
    assert np.asarray(Image.open(image)).std() > 0


@pytest.mark.parametrize('row', [ROW, OTHER])
def test_results_are_compared_with_pytorch(zoo_convs, row, monkeypatch):
    conv = zoo_convs.Conv(*row)
    monkeypatch.setattr(sys, 'argv', ['zoo_convs.py', '--skip-stock', '--batch', '2'])
    args = zoo_convs._parse()
    zoo_convs.check(conv, dict(zoo_convs.prepare(conv, args)), 1e-4)

    def wrong(x, kernel, **options):
        return grouped_conv(x, 1.1 * kernel, **options)

    grouped_conv = zoo_convs.grouped_conv
    monkeypatch.setattr(zoo_convs, 'grouped_conv', wrong)
    with pytest.raises(SystemExit, match=f'the result of {conv.name} differs by 1.0e-01 from PyTorch'):
        zoo_convs.check(conv, dict(zoo_convs.prepare(conv, args)), 1e-4)


def test_finished_convolutions_are_not_repeated(zoo_convs, monkeypatch, capsys, tmp_path):
    out, seen = tmp_path / 'lines.jsonl', []

    def measure(conv, args):
        seen.append(conv.name)
        return measured() if args.skip_stock else measured(stock_forward=3, stock_forward_backward=4)

    monkeypatch.setattr(zoo_convs, 'measure', measure)
    first, second = (conv.name for conv in zoo_convs.CONVS)
    options = '--out', out
    run(zoo_convs, monkeypatch, capsys, *options, '--only', second, '--skip-stock')
    run(zoo_convs, monkeypatch, capsys, *options, '--only', 'small', '--skip-stock')
    assert seen == [second, first]
    lines = run(zoo_convs, monkeypatch, capsys, *options)  # with XLA's own, which was not measured
    assert seen == [second, first, first, second]
    assert len(lines) == 3
    (summary,) = run(zoo_convs, monkeypatch, capsys, *options)
    assert summary['stock_forward']['worst'] == 3
    assert len(seen) == 4
    for other in (('--batch', '3'), ('--dtype', 'bfloat16')):
        run(zoo_convs, monkeypatch, capsys, *options, *other)
    assert len(seen) == 8


def test_the_summary_has_mean_and_worst_case(zoo_convs):
    records = [{'name': str(factor), **measured(factor)} for factor in (1, 0.25)]
    assert zoo_convs.summary(records) == {
        'convolutions': 2,
        'torch_forward': {'geometric_mean': 1.0, 'worst': 0.5, 'worst_name': '0.25'},
        'torch_forward_backward': {'geometric_mean': 0.25, 'worst': 0.125, 'worst_name': '0.25'},
    }


def test_a_name_that_does_not_exist_is_refused(zoo_convs, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['zoo_convs.py', '--only', 'small', 'resnext'])
    with pytest.raises(SystemExit):
        zoo_convs.main()
    assert "no convolution is named 'resnext'; the names are small," in capsys.readouterr().err


@pytest.mark.usefixtures('zoo_convs')
def test_the_table_has_distinct_names_and_sizes_that_fit():
    import zoo_shapes

    convs = zoo_shapes.CONVS
    assert len({conv.name for conv in convs}) == len(convs) >= 26
    assert len({conv.family for conv in convs}) == 10
    assert all(conv.inputs % conv.groups == conv.outputs % conv.groups == 0 for conv in convs)
