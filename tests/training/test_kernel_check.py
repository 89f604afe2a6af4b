"""The check of the Pallas kernels at the start of a run, with simulated outcomes: no TPU is available."""

import json
import types

import jax
import jax.numpy as jnp
import pytest
from etils import epath
from runs import recipe

from epsanet_jax.errors import InputError
from epsanet_jax.models import create_model
from epsanet_jax.ops.bilinear import Spec
from epsanet_jax.ops.plain import Window
from epsanet_jax.training import kernel_check, loop
from epsanet_jax.training.kernel_check import Outcome
from epsanet_jax.training.loop import train

IMAGES = (2, 64, 64, 3)
FASTER, SLOWER, WRONG = Outcome(0.004, 3e-3, 2e-3), Outcome(0.004, 2e-3, 3e-3), Outcome(0.5, 3e-3, 2e-3)
NEITHER = FASTER._replace(error=float('nan'))


@pytest.fixture
def model():
    return create_model('epsanet50_small', num_classes=4, layers=(2, 1, 1, 1), dtype=jnp.bfloat16)


@pytest.fixture
def tpu():
    return types.SimpleNamespace(platform='tpu', device_kind='TPU v0')


@pytest.fixture
def check(model, tpu, tmp_path, monkeypatch):
    """Returns a function that runs the check with an outcome for each call; it returns conv and the lines."""

    def run(outcome, images=IMAGES, model=model, device=tpu):
        lines, compared = [], []

        def compare(call, device):
            compared.append(call)
            result = outcome(len(compared)) if callable(outcome) else outcome
            if isinstance(result, Exception):
                raise result
            return result

        monkeypatch.setattr(kernel_check, 'compare', compare)
        chosen = kernel_check.choose_conv(model, images, device, epath.Path(tmp_path), lines.append)
        assert chosen.clone(conv=model.conv) == model
        return chosen.conv, lines, compared

    return run


@pytest.mark.parametrize(
    ('outcome', 'conv', 'said'),
    [
        (FASTER, 'pallas', 'Pallas kernels are used'),
        (SLOWER, 'auto', 'XLA is used'),
        (WRONG, 'auto', 'the Pallas kernels failed or differ in 4 of 4 kinds'),
        (NEITHER, 'auto', 'failed or differ in 4 of 4'),
        (lambda i: NEITHER if i == 2 else FASTER, 'auto', 'failed or differ in 1 of 4'),
        (lambda i: WRONG if i == 2 else FASTER, 'auto', 'failed or differ in 1 of 4'),
    ],
)
def test_the_kernels_are_used_if_all_are_right_and_together_faster(check, tmp_path, outcome, conv, said):
    chosen, lines, compared = check(outcome)
    assert chosen == conv
    assert len(lines) == 2
    assert 'checking the Pallas kernels of 4 kinds' in lines[0]
    assert said in lines[1]
    assert len(compared) == 4
    assert json.loads((tmp_path / 'convolutions.json').read_text())['conv'] == conv


def test_a_kernel_that_fails_costs_a_warning(check):
    chosen, lines, _ = check(lambda i: RuntimeError('Mosaic failed:\n  no such layout') if i == 1 else FASTER)
    assert chosen == 'auto'
    assert lines[1].startswith('warning: the Pallas kernels for 3x3+5x5+7x7+9x9 on 16x16x64, stride 1 failed')
    assert lines[1].endswith('Mosaic failed: no such layout')
    assert 'failed or differ in 1 of 4' in lines[2]


def test_a_long_check_says_how_long_it_takes(check, monkeypatch):
    monkeypatch.setattr(kernel_check, 'EVERY', 0.0)
    _, lines, _ = check(FASTER)
    assert [line.split(',')[0] for line in lines[1:-1]] == [f'checked {i} of 4 kinds' for i in (1, 2, 3)]
    assert lines[1].endswith('about 0 min left')


def test_calls_count_as_often_as_they_occur(check):
    # Only the first kind is faster, and it occurs twice.
    chosen, lines, _ = check(lambda i: Outcome(0, 2e-3, 1e-3) if i == 1 else Outcome(0, 2e-3, 2.5e-3))
    assert chosen == 'pallas'
    assert 'for 5 calls, with gradients, the kernels take 9.50 ms and XLA 10.00 ms' in lines[1]


def test_a_continued_run_uses_what_was_found_unless_the_machine_has_changed(check, tpu, tmp_path):
    check(FASTER)
    chosen, (line,), compared = check(SLOWER)
    assert (chosen, compared) == ('pallas', [])
    assert line == "convolutions: conv='pallas', as checked before (convolutions.json)"
    other = types.SimpleNamespace(platform='tpu', device_kind='TPU v1')
    assert check(SLOWER, device=other)[0] == 'auto'
    assert len(check(SLOWER, images=(4, *IMAGES[1:]), device=other)[2]) == 4
    (tmp_path / 'convolutions.json').write_text('{"conv": ')
    assert check(FASTER)[0] == 'pallas'


def test_other_platforms_and_other_algorithms_are_not_checked(check, model, tmp_path):
    assert check(FASTER, device=jax.devices()[0]) == ('auto', [], [])
    assert check(FASTER, model=model.clone(conv='stock')) == ('stock', [], [])
    assert check(FASTER, model=create_model('resnet50', num_classes=4)) == ('auto', [], [])  # no groups
    assert not list(tmp_path.iterdir())


def test_each_distinct_call_is_checked_once(model):
    calls = kernel_check.calls_with_kernels(model, IMAGES)
    found = {(call.x.shape, call.spec.windows[0].strides[0]): n for call, n in calls.items()}
    assert found == {
        ((2, 16, 16, 64), 1): 2,
        ((2, 16, 16, 128), 2): 1,
        ((2, 8, 8, 256), 2): 1,
        ((2, 4, 4, 512), 2): 1,
    }
    assert {call.spec.groups for call in calls} == {(1, 4, 8, 16)}


def test_kernels_in_interpretation_equal_xla(monkeypatch):
    monkeypatch.setattr(kernel_check, 'ROUNDS', 1)
    monkeypatch.setattr(kernel_check, 'CALLS', 1)
    spec = Spec((Window((1, 1), ((1, 1), (1, 1))),), (4,), 'auto')
    x, kernel = (
        jax.ShapeDtypeStruct((1, 14, 14, 32), 'float32'),
        jax.ShapeDtypeStruct((3, 3, 8, 32), 'float32'),
    )
    outcome = kernel_check.compare(kernel_check.Call(x, (kernel,), spec), jax.devices()[0])
    assert 0 < outcome.error < 1e-5
    assert min(outcome.auto, outcome.pallas) > 0


def test_a_run_is_checked_before_it_compiles(tmp_path, monkeypatch, capsys):
    seen = []

    def choose(model, images, device, workdir, log):
        seen.append((images, device, workdir))
        log('convolutions: as the test says')
        return model.clone(conv='dense')

    def trace(config, model, *rest):
        assert model.conv == 'dense'
        raise InputError('stop here')

    monkeypatch.setattr(kernel_check, 'choose_conv', choose)
    monkeypatch.setattr(loop, 'trace_train_step', trace)
    with pytest.raises(InputError, match='stop here'):
        train(recipe(gradient_accumulation_steps=2), str(tmp_path))
    rows = max(1, 8 // jax.device_count())
    assert seen == [((rows, 32, 32, 3), jax.local_devices()[0], epath.Path(tmp_path))]
    assert 'convolutions: as the test says' in capsys.readouterr().out
    monkeypatch.setattr(kernel_check, 'choose_conv', lambda *_: pytest.fail('it was to be left out'))
    monkeypatch.setattr(loop, 'trace_train_step', lambda *_: (_ for _ in ()).throw(InputError('stop here')))
    with pytest.raises(InputError, match='stop here'):
        train(recipe(check_kernels=False), str(tmp_path / 'other'))
