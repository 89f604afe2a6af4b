"""The command `epsanet summary`."""

import json

import pytest
from command import run


@pytest.mark.parametrize('name', ['epsanet50_small', 'seresnet50'])
def test_table_and_json_hold_the_same_counts(capsys, name):
    status, out, err = run(capsys, 'summary', name)
    assert (status, err) == (0, '')
    content = json.loads(run(capsys, 'summary', name, '--json')[1])
    assert sum(stage['params'] for stage in content['stages']) == content['params']
    for stage in content['stages']:
        assert f'{stage["params"]:,}' in out
        assert f'{stage["multiply_adds"]:,}' in out
    assert f'{content["published_count"]:,}' in out
    assert ('published for 1000 classes at 224 px: 22.56 M, 3.62 G' in out) == (name == 'epsanet50_small')


def test_a_pyconvresnet_has_a_published_accuracy_alone(capsys):
    status, out, err = run(capsys, 'summary', 'pyconvresnet50')
    assert (status, err) == (0, '')
    assert out.endswith('published for 1000 classes at 224 px: top-1 77.88 % (not reproduced here)\n')


def test_counts_follow_image_size_and_number_of_classes(capsys):
    _, out, _ = run(capsys, 'summary', 'resnet50', '--num-classes', 10, '--image-size', 64, '--json')
    content = json.loads(out)
    assert content['params'] == 25_557_032 - 2049 * 990
    assert content['stages'][-2]['output'] == [2, 2, 2048]
