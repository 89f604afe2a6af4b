"""Schedules of the TPU compiler, and the roofline of a program."""

import os
from pathlib import Path

import pytest

from epsanet_jax.analysis import schedule
from epsanet_jax.analysis.schedule import Kernel
from epsanet_jax.errors import InputError

# Of a kernel with a grid of 128 steps, in each of which a loop negates 16 rows of 8 registers.
STORED = Path(__file__).parents[1] / 'fixtures' / 'schedule'

HLO = """HloModule jit_step

%one (p: bf16[128,128]) -> bf16[128,128] {
  ROOT %n = bf16[128,128]{1,0} negate(%p), metadata={op_name="a"}
}

%two (q: bf16[128,128]) -> bf16[128,128] {
  ROOT %m = bf16[128,128]{1,0} negate(%q), metadata={op_name="b"}
}

%body (t: bf16[128,128]) -> bf16[128,128] {
  %t = bf16[128,128]{1,0} parameter(0)
  ROOT %loop_fusion = bf16[128,128]{1,0} fusion(%t), kind=kLoop, calls=%three
}

ENTRY %main (x: bf16[128,128]) -> bf16[128,128] {
  %x = bf16[128,128]{1,0} parameter(0)
  %copy-start = (bf16[128,128]{1,0:S(1)}, bf16[128,128]{1,0}, u32[]{:S(2)}) \
copy-start(%x)
  %copy-done = bf16[128,128]{1,0:S(1)} copy-done(%copy-start)
  %fusion.1 = bf16[128,128]{1,0} fusion(%x), kind=kLoop, calls=%one, metadata={op_name="jit(f)/c"}
  %fusion.2 = bf16[128,128]{1,0} fusion(%copy-done), kind=kLoop, calls=%two
  %while.1 = bf16[128,128]{1,0} while(%fusion.2), condition=%c, body=%body, backend_config={TRIPS}
  ROOT %sine = bf16[128,128]{1,0} sine(%while.1)
}
"""
ARRAY = 128 * 128 * 2  # bytes
KERNELS = {'fusion.1': Kernel(10, 200, 100, 0), 'loop_fusion': Kernel(5, 5, 0, 1)}


def test_bundles_count_as_often_as_the_loops_around_them_with_those_after_the_branch():
    inner, outer, around = 15, 44, 5  # bundles; the pipeline takes two trips more than the grid has steps
    expected = around + 130 * (outer + 16 * inner)
    assert schedule.read_kernels(STORED) == {'negate.1': Kernel(64, expected, 0, 0)}


def test_a_loop_may_count_in_steps(tmp_path):
    bundles = [
        ' LB: > { %s5_s1 = sadd.s32 256, %s4_s1 /* copy for cssa */ }',
        '    : > { %p1 = scmp.ge.s32.totalorder %s5_s1, 1000 /* loop exit test */ }',
        '    : > { %2 = sbr.rel (!%p1) target = $region3 }',
        *['    : > { }'] * 6,
    ]
    path = tmp_path / '1-pad-01-final_bundles.txt'
    path.write_text('header\n' + '\n'.join(f'   0x{i:x}{text}' for i, text in enumerate(bundles)))
    assert schedule.read_kernel(path) == Kernel(9, 4 * 7 + 2, 0, 0)


def test_the_test_of_a_loop_may_come_before_the_loops_inside(tmp_path):
    bundles = [
        '    LB: > { }',
        '       : > { %p1 = scmp.ge.s32.totalorder %s1, 3 /* loop exit test */ }',
        '    LB: >> { %p2 = scmp.ge.s32.totalorder (%p1), %s2, 5 /* region 7 :: loop exit test */ }',
        '       : >> { %3 = sbr.rel (!%p2) target = $region4 }',
        *['       : >> { }'] * 4,
        '       : > { %4 = sbr.rel (!%p1) target = $region3 }',
        *['       : > { }'] * 4,
    ]
    path = tmp_path / '1-loops-01-final_bundles.txt'
    path.write_text('header\n' + '\n'.join(f'   0x{i:x}{text}' for i, text in enumerate(bundles)))
    assert schedule.read_kernel(path) == Kernel(13, 3 * (7 + 5 * 6), 0, 0)


def test_matrix_units_bound_the_cycles_and_unknown_loops_are_counted(tmp_path):
    bundle = '   0x{:x} LB: > {{ %1 = vmatmul.bf16.gmra.mxu0 %v1 ;; %2 = vmatmul.f32.gmra.mxu1 %v2 }}'
    path = tmp_path / '1-fusion-01-final_bundles.txt'
    path.write_text('header\n' + '\n'.join(bundle.format(i) for i in (1, 2)))
    assert schedule.read_kernel(path) == Kernel(2, 32, 32, 2)


def test_last_schedule_of_an_operation_counts(tmp_path):
    for stamp, bundles in ((99, 2), (100, 3)):
        text = ''.join(f'   0x{i:x}   :  {{}}\n' for i in range(1, bundles + 1))
        (tmp_path / f'{stamp}-fusion.2-01-final_bundles.txt').write_text(text)
        (tmp_path / f'{stamp}-fusion.2-00-schedule-analysis_final_bundles.txt').write_text('analysis')
    assert schedule.read_kernels(tmp_path) == {'fusion.2': Kernel(3, 3, 0, 0)}
    schedule.clear(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_roofline_is_the_larger_of_schedule_and_memory_of_each_operation():
    text = HLO.replace('TRIPS', '"known_trip_count":{"n":"7"}')
    found = schedule.roofline(text, KERNELS, bytes_per_cycle=500)
    # fusion.2 is equal to fusion.1, but one of its arrays is in VMEM; nothing is known of the sine.
    names = {op.name: (op.cycles, op.hbm_bytes, op.roofline) for op in found.ops}
    assert names['fusion.1'] == (200, 2 * ARRAY, 200)
    assert names['fusion.2'] == (200, ARRAY, 200)
    assert names['loop_fusion'] == (7 * 5, 7 * 2 * ARRAY, pytest.approx(7 * 2 * ARRAY / 500))
    assert names['copy-start'] == (None, ARRAY, 0)
    assert names['sine'] == (None, 2 * ARRAY, pytest.approx(2 * ARRAY / 500))
    assert found.schedule_cycles == 200 + 200 + 7 * 5
    assert found.hbm_bytes == (2 + 1 + 14 + 1 + 2) * ARRAY
    assert found.roofline_cycles == round(200 + 200 + 16 * ARRAY / 500)
    assert (found.unscheduled, found.unknown_loops) == ({'sine': 1}, 1)
    assert [op.roofline for op in found.ops] == sorted((op.roofline for op in found.ops), reverse=True)


def test_program_takes_at_least_the_time_of_all_its_bytes():
    found = schedule.roofline(HLO, {}, bytes_per_cycle=1)
    assert found.roofline_cycles == found.hbm_bytes
    assert found.unknown_loops == 1


def test_operations_of_one_origin_are_added_up():
    found = schedule.roofline(HLO, KERNELS, 500)
    lines = list(schedule.describe([*found.ops, *found.ops], 2, images=2))
    assert len(lines) == 3
    assert 'roofline  schedule  matrix units  MB in HBM  calls' in lines[0]
    (line,) = (line for line in schedule.describe([*found.ops] * 2, 9, 2) if line.endswith(' c'))
    assert line.split()[1:5] == ['0.2', '0.1', '0.07', '2']


@pytest.mark.parametrize(
    ('shape', 'expected'),
    [
        ('bf16[9,9,8,32]{3,2,1,0:T(8,128)(2,1)}', 81 * 8 * 128 * 2),  # lanes are padded
        ('bf16[128,3,64]{0,2,1:T(8,128)(2,1)}', 128 * 3 * 64 * 2),  # the first axis is innermost
        ('(f32[5]{0:T(128)}, bf16[128,128]{1,0:T(8,128)S(1)})', 128 * 4),  # the second is in VMEM
        ('f32[3,5]', 60),
        ('f32[]{:T(128)}', 4),
    ],
)
def test_bytes_that_a_shape_takes_in_hbm(shape, expected):
    assert schedule.stored_bytes(shape) == expected


def test_compiler_must_not_be_loaded_when_schedules_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv('LIBTPU_INIT_ARGS', '--other=1')
    schedule.write_schedules(tmp_path)
    assert os.environ['LIBTPU_INIT_ARGS'].startswith(f'--other=1 --xla_jf_dump_to={tmp_path} ')
    monkeypatch.setattr(Path, 'read_text', lambda path: '7f0000000000-7f0000001000 r-xp /x/libtpu.so')
    with pytest.raises(InputError, match='before the TPU compiler is loaded: start a new process'):
        schedule.write_schedules(tmp_path)
