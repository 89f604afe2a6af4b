"""Curves of runs."""

import itertools
import json

import pytest
from PIL import Image

from epsanet_jax import InputError
from epsanet_jax.analysis import plot


def write_run(folder, ema=False):
    folder.mkdir(parents=True)
    lines = []
    for step in (100, 200, 300):
        lines.append({'split': 'train', 'step': step, 'loss': 3 / step, 'top1': step / 1000, 'lr': 0.1})
        lines.append(
            {'split': 'eval', 'step': step, 'loss': 4 / step, 'top1': (250 - abs(step - 200)) / 1000}
        )
        if ema:
            lines[-1]['ema_top1'] = step / 500
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return str(folder)


def test_curves_are_drawn_and_each_run_is_summarised(tmp_path):
    runs = [write_run(tmp_path / 'a'), write_run(tmp_path / 'b', ema=True)]
    lines = plot.plot(runs, str(tmp_path / 'curves.png'))
    assert lines == [
        'a: step 300, top-1 15.00%, best 25.00% at step 200',
        'b: step 300, top-1 60.00%, best 60.00% at step 300',
    ]
    with Image.open(tmp_path / 'curves.png') as image:
        assert image.width > 1000


def test_names_and_titles_lie_within_the_figure(tmp_path):
    names = ['_a', '$x$', 'x' * 60, 'y' * 200, 'b', 'c']
    lines = plot.read_metrics(plot.resolve(write_run(tmp_path / 'run', ema=True)))
    figure = plot.draw(dict.fromkeys(names, lines))
    figure.draw_without_rendering()
    width, height = figure.bbox.size
    assert [axes.get_title() for axes in figure.axes] == [
        'loss (thin: training)',
        'top-1 (thin: training, dashed: moving averages)',
        'learning rate',
    ]
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [*shown[:3], *shown[4:]] == ['_a', '$x$', 'x' * 60, 'b', 'c']
    boxes = [axes.get_tightbbox() for axes in figure.axes] + [figure.legends[0].get_window_extent()]
    for box in boxes:
        assert 0 <= box.x0 < box.x1 <= width
        assert 0 <= box.y0 < box.y1 <= height
    for left, right in itertools.pairwise(boxes[:3]):
        assert left.x1 <= right.x0


def test_runs_with_equal_names_are_shown_with_their_paths(tmp_path):
    runs = [write_run(tmp_path / 'a/run'), write_run(tmp_path / 'b/run')]
    lines = plot.plot(runs, str(tmp_path / 'curves.svg'))
    assert [line.split(':')[0] for line in lines] == runs
    assert all(f'>{run}<' in (tmp_path / 'curves.svg').read_text() for run in runs)


def test_missing_metrics_and_unknown_formats_are_errors(tmp_path):
    with pytest.raises(InputError, match=r'holds no metrics\.jsonl with metrics of a run'):
        plot.plot([str(tmp_path)], str(tmp_path / 'curves.png'))
    with pytest.raises(InputError, match=r'--out must end with \.png, \.svg, \.pdf, got curves\.gif'):
        plot.plot([str(tmp_path)], 'curves.gif')
