"""`benchmarks/zoo_nets.py` compares the same network on all sides; its measurements are not tested."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest


@pytest.fixture
def zoo_nets(monkeypatch):
    """The script, with small networks under the names of the large ones."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / 'benchmarks'))
    import zoo_nets

    small = {
        'resnext50': zoo_nets.ResNeXt(depths=(1, 1), planes=4, groups=4),
        'convnext_atto': zoo_nets.ConvNeXt(depths=(1, 1), widths=(4, 8)),
    }
    for name, net in small.items():
        monkeypatch.setitem(zoo_nets.MODELS, name, net)
    return zoo_nets


def measure(zoo_nets, monkeypatch, out, *arguments):
    command = ['zoo_nets.py', '--batch', '2', '--size', '16', '--rounds', '2', '--out', str(out), *arguments]
    monkeypatch.setattr(sys, 'argv', command)
    zoo_nets.main()
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize('model', ['resnext50', 'convnext_atto'])
def test_all_sides_train_the_same_network(zoo_nets, monkeypatch, tmp_path, model):
    lines = measure(zoo_nets, monkeypatch, tmp_path / 'lines.jsonl', '--model', model)
    assert [line['side'] for line in lines] == ['ours', 'flax', 'torch-nchw', 'torch-channels-last']
    np.testing.assert_allclose([line['loss'] for line in lines], lines[0]['loss'], rtol=1e-3)
    assert [line['compile_s'] is None for line in lines] == [False, False, True, True]
    _, flax, *torch = (line['s_per_step'] for line in lines)
    for line in lines:
        assert line['ratio'] == pytest.approx(min(torch) / line['s_per_step'], rel=0.01, abs=0.001)
        assert line['ratio_to_flax'] == pytest.approx(flax / line['s_per_step'], rel=0.01, abs=0.01)


@pytest.mark.parametrize(('net', 'number'), [('ResNeXt', 25_028_904), ('ConvNeXt', 28_589_128)])
def test_the_networks_have_as_many_parameters_as_published(zoo_nets, net, number):
    model, images = getattr(zoo_nets, net)(), np.zeros((1, 32, 32, 3), np.float32)
    parameters = jax.eval_shape(model.init, jax.random.key(0), images)['params']
    assert sum(leaf.size for leaf in jax.tree.leaves(parameters)) == number


def test_one_side_alone_has_no_ratio(zoo_nets, monkeypatch, tmp_path):
    (line,) = measure(zoo_nets, monkeypatch, tmp_path / 'lines.jsonl', '--sides', 'ours')
    assert line['ratio'] is line['ratio_to_flax'] is None
    assert line['steps_timed'] == 2


def test_a_slow_side_is_measured_once(zoo_nets, monkeypatch):
    clock, durations = [0.0], {'ours': 1, 'flax': 100, 'torch-nchw': 4}
    monkeypatch.setattr(zoo_nets.time, 'perf_counter', lambda: clock[0])
    monkeypatch.setattr(zoo_nets.time, 'sleep', lambda seconds: None)
    steps = dict.fromkeys(durations, 0)

    def step(name):
        def run():
            clock[0] += durations[name]
            steps[name] += 1
            return 10 * durations[name] + steps[name]

        return run

    times, losses = zoo_nets.in_turn({name: step(name) for name in durations}, rounds=3)
    assert times == {'ours': [1, 1, 1], 'flax': [100], 'torch-nchw': [4, 4, 4]}
    assert steps == {'ours': 7, 'flax': 2, 'torch-nchw': 7}
    assert losses == {'ours': 12, 'flax': 1002, 'torch-nchw': 42}


def test_networks_that_differ_are_refused(zoo_nets, monkeypatch):
    net = zoo_nets.MODELS['convnext_atto']
    monkeypatch.setattr(zoo_nets, 'with_conv', lambda net, side: net)
    twin = zoo_nets.zoo_models.to_torch

    def wrong(net, variables):
        model = twin(net, variables)
        model.head.bias.data += 1
        return model

    monkeypatch.setattr(zoo_nets.zoo_models, 'to_torch', wrong)
    with pytest.raises(SystemExit, match='the logits of torch differ by'):
        zoo_nets.check(net, ('flax', 'torch'), np.ones((1, 8, 8, 3), np.float32))
