import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epsanet_jax.models import create_model, list_models
from epsanet_jax.models.settings import pyconv_widths, pyramid_of
from epsanet_jax.ops import choice
from epsanet_jax.ops.algorithms import DIRECT, NAMES, Algorithm
from epsanet_jax.ops.choice import Choice, Problem, choose
from epsanet_jax.ops.direct import MOST_TERMS
from epsanet_jax.ops.plain import Window

STOCK = Choice(*(Algorithm('stock'),) * 3)
SMALL = Problem(9, 1, 16, 64, 16, 56, 8, 'float32')
LARGE = Problem(9, 1, 16, 512, 128, 7, 8, 'float32')
POINT = Problem(1, 2, 1, 64, 256, 56, 8, 'float32')
TILED = Choice(Algorithm('tiled', 2, (2, 4)), Algorithm('folded', 1, (4, 4)), Algorithm('merged', 16))
MATMUL = Choice(*(Algorithm('matmul'),) * 3)


@pytest.fixture
def table(monkeypatch):
    rows = [(SMALL, TILED), (LARGE, STOCK), (POINT, MATMUL)]
    monkeypatch.setattr(choice, '_table', lambda: {'cpu': rows})
    choose.cache_clear()
    yield
    choose.cache_clear()


@pytest.mark.usefixtures('table')
def test_each_direction_has_its_own_algorithm():
    assert choose('cpu', SMALL) == TILED
    assert choose('cpu', LARGE) == STOCK


@pytest.mark.usefixtures('table')
def test_a_platform_without_measurements_uses_stock():
    assert choose('cuda', SMALL) == STOCK


def test_on_a_gpu_16_bits_and_32_bits_have_rows_of_their_own(monkeypatch):
    half = SMALL._replace(dtype='bfloat16')
    monkeypatch.setattr(choice, '_table', lambda: {'cuda': [(half, TILED)]})
    choose.cache_clear()
    assert choose('cuda', half) == choose('cuda', half._replace(dtype='float16', batch=16)) == TILED
    assert choose('cuda', SMALL) == STOCK
    choose.cache_clear()


def test_on_a_gpu_1x1_kernels_without_groups_and_strides_are_a_matrix_product_in_32_bits():
    product = Choice(*(Algorithm('matmul'),) * 3)
    squeeze = Problem(1, 1, 1, 64, 8, 4, 256, 'float32')
    assert choose('cuda', squeeze) == product
    assert choose('cuda', squeeze._replace(stride=2)) == choose('cuda', squeeze._replace(groups=8)) == STOCK


def test_a_product_does_not_use_the_algorithms_of_a_convolution(monkeypatch):
    monkeypatch.setattr(choice, '_table', lambda: {'cpu': [(SMALL, TILED)]})
    choose.cache_clear()
    assert choose('cpu', POINT._replace(stride=1)) == STOCK
    choose.cache_clear()


@pytest.mark.usefixtures('table')
@pytest.mark.parametrize(
    ('changes', 'expected'),
    [
        ({'batch': 32}, TILED),
        ({'size': 48}, TILED),
        ({'dtype': 'float64'}, TILED),
        ({'groups': 32, 'channels': 128, 'features': 32}, TILED),
        ({'channels': 512, 'features': 128, 'size': 14}, STOCK),
    ],
)
def test_the_most_similar_measured_convolution_decides(changes, expected):
    chosen = choose('cpu', SMALL._replace(**changes))
    assert [a.name for a in chosen] == [a.name for a in expected]


@pytest.mark.usefixtures('table')
def test_merges_are_reduced_to_divisors_of_the_groups():
    chosen = choose('cpu', SMALL._replace(groups=6, channels=24, features=6))
    assert [a.merge for a in chosen] == [2, 1, 6]
    chosen = choose('cpu', SMALL._replace(groups=9, channels=36, features=9))
    assert [a.merge for a in chosen] == [1, 1, 9]


@pytest.mark.parametrize('name', [n for n in list_models() if n.startswith('pyconv') and n.endswith('50')])
def test_at_most_32_separate_convolutions_for_one(name):
    model = create_model(name)
    for stage, planes in enumerate(model.planes):
        kernels, groups = pyramid_of(model, stage)
        widths = pyconv_widths(planes, len(kernels))
        for stride, size in ((2, 112 >> stage), (1, 56 >> stage)):
            for kernel, g, width in zip(kernels, groups, widths, strict=True):
                problem = Problem(kernel, stride, g, planes, width, size, 8, 'float32')
                for algorithm in (a for platform in choice.PLATFORMS for a in choose(platform, problem)):
                    assert not algorithm.split or g // algorithm.merge <= 32


@pytest.mark.usefixtures('table')
def test_1x1_kernels_use_a_matrix_product_for_each_of_at_most_32_groups():
    assert choose('cpu', POINT._replace(size=7)) == MATMUL
    assert 'matmul' not in {a.name for a in choose('cpu', POINT._replace(kernel=3, stride=1))}
    assert choose('cpu', POINT._replace(groups=4)) == MATMUL
    assert 'matmul' not in {a.name for a in choose('cpu', POINT._replace(groups=64))}


def shapes():
    """Draws convolutions of any size with groups of up to 64 channels."""
    return st.builds(
        lambda kernel, stride, groups, inputs, outputs, size, batch, dtype: Problem(
            kernel, stride, groups, groups * inputs, groups * outputs, size, batch, dtype
        ),
        st.integers(1, 15),
        st.integers(1, 4),
        st.integers(2, 512),
        st.integers(1, 64),
        st.integers(1, 64),
        st.integers(1, 224),
        st.integers(1, 256),
        st.sampled_from(['float32', 'bfloat16', 'float16', 'float64']),
    )


@given(problem=shapes(), platform=st.sampled_from(choice.PLATFORMS))
@settings(max_examples=300, deadline=None)
def test_every_choice_is_bounded(problem, platform):
    for algorithm in choose(platform, problem):
        assert problem.groups % algorithm.merge == 0
        assert algorithm.name != 'matmul' or (problem.kernel == 1 and problem.groups <= choice.MOST_SPLIT)
        if algorithm.name in DIRECT:
            each = max(problem.channels, problem.features) // problem.groups
            assert problem.kernel**2 * each <= MOST_TERMS


@given(problem=shapes())
@settings(max_examples=100, deadline=None)
def test_by_the_rule_no_choice_is_slower_than_stock(problem):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, '_table', dict)
        choose.cache_clear()
        chosen = choose('cpu', problem)
    choose.cache_clear()
    for algorithm, direction in zip(chosen, choice.DIRECTIONS, strict=True):
        limit = choice.milliseconds(Algorithm('stock'), problem, direction)
        assert choice.milliseconds(algorithm, problem, direction) <= max(limit, choice.TRIVIAL)


@pytest.mark.parametrize('kernel', [3, 5, 7])
@pytest.mark.parametrize('channels', [96, 384, 960])
@pytest.mark.parametrize('stride', [1, 2])
def test_depthwise_convolutions_are_multiply_adds_on_a_cpu(kernel, channels, stride):
    chosen = choose('cpu', Problem(kernel, stride, channels, channels, channels, 28, 8, 'float32'))
    assert {algorithm.name for algorithm in chosen} <= set(DIRECT)


def test_a_convolution_that_takes_no_time_is_one_dense_convolution():
    dense = Choice(*(Algorithm('merged', 16, split=True),) * 3)
    assert choose('cpu', Problem(3, 1, 16, 16, 16, 8, 2, 'float32')) == dense


def test_one_image_is_not_convolved_in_vectors_of_images():
    assert 'by_image' not in {a.name for a in choose('cpu', Problem(3, 1, 32, 256, 256, 28, 1, 'float32'))}


@pytest.mark.parametrize('platform', choice.PLATFORMS)
def test_symbolic_sizes_use_algorithms_that_need_no_numbers(platform):
    batch, size = jax.export.symbolic_shape('b,h')
    for groups, kernel in ((1, 7), (16, 9), (64, 3)):
        x = jax.ShapeDtypeStruct((batch, size, size, 64), jnp.float32)
        window = Window((2, 2), ((kernel // 2,) * 2,) * 2)
        problem = Problem.of(x, (kernel, kernel, 64 // groups, 64), window, groups)
        assert problem.size == 0
        for algorithm in choose(platform, problem):
            assert algorithm.name in ('stock', 'merged')
            assert not algorithm.phases


@pytest.mark.parametrize(
    'problem',
    [
        Problem(5, 1, 16, 256, 64, 56, 128, 'bfloat16'),
        Problem(7, 1, 8, 96, 24, 56, 128, 'bfloat16'),
        Problem(5, 2, 4, 64, 16, 56, 128, 'bfloat16'),
        Problem(3, 2, 1, 32, 32, 28, 128, 'bfloat16'),
    ],
)
def test_bands_and_phases_need_the_channels_of_the_measurement(problem):
    for algorithm in choose('tpu', problem):
        assert algorithm.name != 'banded'
        assert not algorithm.phases


@pytest.mark.parametrize('size', [56, 14])
def test_on_a_tpu_only_strided_input_gradients_of_1x1_kernels_use_a_matrix_product(size):
    strided = Problem(1, 2, 1, 14336 // size, 28672 // size, size, 128, 'bfloat16')
    assert [a.name for a in choose('tpu', strided)] == ['stock', 'matmul', 'stock']
    assert choose('tpu', strided._replace(stride=1)) == STOCK
    assert choose('tpu', strided._replace(stride=1, size=size // 2)) == STOCK


@pytest.mark.parametrize('planes', [64, 128, 256, 512])
@pytest.mark.parametrize('stride', [1, 2])
def test_on_a_tpu_dense_3x3_convolutions_use_xlas_own(planes, stride):
    size = stride * 3584 // planes
    assert choose('tpu', Problem(3, stride, 1, planes, planes, size, 128, 'bfloat16')) == STOCK


@pytest.mark.parametrize('name', [n for n in list_models() if n.startswith('epsanet')])
@pytest.mark.parametrize('direction', choice.DIRECTIONS)
def test_branches_are_joined_only_if_they_were_measured_together(name, direction):
    model = create_model(name)
    together = 2 if name.endswith('small') else 4
    for stage, planes in enumerate(model.planes):
        for stride, size in ((1, 56 >> stage), (2, 112 >> stage)):
            left = []
            for kernel, groups in zip(model.kernels, model.groups, strict=True):
                problem = Problem(kernel, stride, groups, planes, planes // 4, size, 128, 'bfloat16')
                chosen = getattr(choose('tpu', problem), direction)
                if chosen.name == 'joint':
                    left.append(groups // chosen.merge)
            assert all(left.count(groups) == together for groups in left)
            assert not left or together == 4 or direction == 'input_gradient'


@pytest.mark.parametrize('platform', choice._table())
def test_the_table_of_the_package_names_known_algorithms(platform):
    rows = choice._table()[platform]
    assert len({problem for problem, _ in rows}) == len(rows) > (0 if ' ' in platform else 10)
    for problem, chosen in rows:
        for algorithm in chosen:
            assert algorithm.name in (*NAMES, 'joint')
            assert problem.groups % algorithm.merge == 0


@pytest.mark.parametrize(
    ('problem', 'written_out'),
    [
        (Problem(3, 1, 1, 64, 64, 56, 8, 'float32'), (True, True, True)),
        (Problem(3, 1, 1, 64, 64, 7, 8, 'float32'), (True, True, False)),
        (Problem(3, 1, 1, 64, 256, 28, 8, 'float32'), (False, True, True)),
        (Problem(3, 1, 1, 256, 64, 28, 8, 'float32'), (True, False, True)),
        (Problem(16, 16, 1, 3, 64, 224, 8, 'float32'), (True, False, False)),
        (Problem(3, 1, 1, 256, 256, 14, 8, 'float32'), (False, False, True)),
        (Problem(3, 2, 1, 256, 256, 14, 8, 'float32'), (False, True, False)),
        (Problem(1, 2, 1, 64, 64, 56, 256, 'float32'), (False, False, False)),
    ],
)
def test_convolutions_without_groups_are_written_out_where_faster(problem, written_out):
    plain = Algorithm('merged', split=True)
    assert tuple(algorithm == plain for algorithm in choose('cpu', problem)) == written_out
    assert plain not in choose('tpu', problem)
