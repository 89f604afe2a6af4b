"""The metrics of a workdir: damaged and foreign lines, complete evaluations, the value of the best."""

import json

import pytest
from etils import epath

from epsanet_jax.workdir import METRICS_FILE, best_by, evaluations, read_metrics

TRAIN = {'split': 'train', 'step': 2, 'loss': 1.5, 'lr': 0.1, 'images_per_s': None}
EVALUATION = {'split': 'eval', 'step': 4, 'loss': 1.2, 'top1': 0.5, 'top5': 0.9, 'examples': 10}


def test_only_whole_lines_of_this_package_are_read(tmp_path):
    others = [b'', b'{"split": "train", "st', b'\xff', b'[]', b'{"event": "note"}']
    others += [
        json.dumps({**TRAIN, **change}).encode()
        for change in ({'step': '2'}, {'split': 'test'}, {'lr': True})
    ]
    lines = [json.dumps(TRAIN).encode(), *others, json.dumps(EVALUATION).encode()]
    (tmp_path / METRICS_FILE).write_bytes(b'\n'.join(lines))
    assert read_metrics(epath.Path(tmp_path)) == [TRAIN, EVALUATION]
    assert read_metrics(epath.Path(tmp_path / 'elsewhere')) == []


def test_evaluations_are_complete():
    partial = [{k: v for k, v in EVALUATION.items() if k != field} for field in ('top5', 'examples')]
    assert evaluations([TRAIN, EVALUATION, *partial]) == [EVALUATION]


@pytest.mark.parametrize(
    ('metrics', 'value'),
    [({'top1': 0.4, 'ema_top1': 0.3}, 0.3), ({'top1': 0.4}, 0.4), ({'top1': 0.0}, 0.0), ({}, -1.0)],
)
def test_the_best_is_chosen_by_the_averages_if_there_are_any(metrics, value):
    assert best_by(metrics) == value
