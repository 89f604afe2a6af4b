"""Runs every example for a few steps and checks the numbers that it prints.

Accuracy after so few steps means nothing, so the tests check what must hold from the first step.
"""

import pathlib
import re

import ablation
import dense_prediction
import digits
import ensemble
import jax
import numpy as np
import per_example_gradients
import psa_elsewhere
import pytest
import sharpness
from PIL import Image

EXAMPLES = pathlib.Path(digits.__file__).parent
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True, scope='module')
def _quick_compilation():
    """Compiles without optimization, because compilation takes nearly all of the time."""
    jax.config.update('jax_disable_most_optimizations', True)
    yield
    jax.config.update('jax_disable_most_optimizations', False)


@pytest.fixture
def printed(capsys):
    """Runs an example and returns the numbers that follow a phrase in what it prints."""

    def run(example, *arguments):
        example.main([str(a) for a in arguments])
        text = re.sub(r'(?<=\d),(?=\d{3})', '', capsys.readouterr().out)
        return lambda phrase: [float(n) for n in re.findall(rf'{phrase} ([\d.]+(?:e[+-]\d+)?)', text)]

    return run


def test_gradients_of_images_average_to_the_gradient_of_the_batch(printed):
    numbers = printed(per_example_gradients, '--steps', 1, '--images', 8)
    assert len(numbers('error')) == 2
    assert max(numbers('error')) < 1e-5
    assert min(numbers('noise scale')) > 0


def test_the_noise_scale_of_known_gradients():
    rng = np.random.default_rng(0)
    gradients = np.array([3.0, 4.0]) + rng.normal(0, [2.0, 1.0], (100_000, 2))  # trace 5, |mean|^2 25
    assert per_example_gradients.noise_scale(gradients) == pytest.approx(0.2, rel=0.02)


def test_members_of_the_ensemble_equal_networks_trained_alone(printed):
    numbers = printed(ensemble, '--steps', 2, '--seeds', 2)
    assert numbers('parameters differ by')[0] < 1e-6
    assert 0 <= numbers('ensemble: top-1')[0] <= 100


def test_hessian_vector_products_equal_differences_of_gradients(printed):
    numbers = printed(
        sharpness, '--steps', 1, '--images', 8, '--iterations', 2, '--lr', 0.5, '--dtype', 'float64'
    )
    assert numbers('gradients: error')[0] < 1e-5
    assert numbers('2 / lr:') == [4.0]
    assert len(numbers('loss')) == 2


def test_the_largest_eigenvalue_is_found_despite_a_negative_one_of_larger_magnitude():
    def loss(x):
        return (x**2 * np.array([-5.0, 1.0, 3.0])).sum() / 2

    def product(x, direction):
        return sharpness.hvp(loss, x, direction)

    start = np.ones(3) / np.sqrt(3)
    eigenvalue, direction = sharpness.largest_eigenvalue(product, np.zeros(3), start, 60)
    assert eigenvalue == pytest.approx(3.0, rel=1e-4)
    np.testing.assert_allclose(np.abs(direction), [0, 0, 1], atol=1e-2)


def test_the_ablation_counts_the_parameters_of_each_variant(printed):
    names = ('as published', 'separate SE, no softmax')
    numbers = printed(ablation, '--steps', 1, '--seeds', 1, '--only', *names)
    shared, separate = (int(numbers(rf'\| {name} \|')[0]) for name in names)
    assert separate - shared == 3 * (8 * 2 + 2 + 2 * 8 + 8)  # three more SE modules, 8 -> 2 -> 8 with biases


def test_separate_se_modules_with_equal_weights_equal_the_shared_one(rng):
    x = rng.standard_normal((2, 8, 8, 32)).astype(np.float32)
    shared, separate = ablation.Pyramid(32), ablation.Pyramid(32, se='separate')
    params = jax.jit(shared.init)(jax.random.key(0), x)['params']['PSAModule_0']
    copied = {f'Conv_{i}': params[f'conv_{i + 1}'] for i in range(4)}
    copied |= {f'SEWeightModule_{i}': params['se'] for i in range(4)}
    ours = jax.jit(separate.apply)({'params': copied}, x)
    published = jax.jit(shared.apply)({'params': {'PSAModule_0': params}}, x)
    np.testing.assert_allclose(ours, published, rtol=1e-5, atol=1e-6)


def test_psa_in_another_network_sows_its_attention(printed):
    numbers = printed(psa_elsewhere, '--steps', 1)
    assert all(0 <= top1 <= 100 for top1 in numbers('top-1'))
    first = numbers('kernels 3, 5, 7, 9:')
    assert len(first) == 3
    assert all(0 < share < 1 for share in first)


def test_the_dense_head_learns_while_the_running_statistics_stay_frozen(printed, monkeypatch, tmp_path):
    seen, train = [], dense_prediction.train

    def watched(model, variables, *rest):
        result = train(model, variables, *rest)
        seen.append((variables['batch_stats'], result[0]['batch_stats']))
        return result

    monkeypatch.setattr(dense_prediction, 'train', watched)
    numbers = printed(dense_prediction, '--steps', 4, '--out', tmp_path / 'out.png')
    (first,), (last,) = numbers('loss'), numbers('->')
    assert last < first
    assert 0 <= numbers('classes:')[0] <= 1
    jax.tree.map(np.testing.assert_array_equal, *seen[0])
    with Image.open(tmp_path / 'out.png') as image:
        assert image.size == (900, 460)


@pytest.mark.parametrize('path', sorted(EXAMPLES.glob('*.py')), ids=lambda path: path.stem)
def test_an_example_is_short(path):
    assert len(path.read_text().splitlines()) < 120
