"""Estimates and collectives in the text of a compiled module."""

import pytest

from epsanet_jax.analysis import hlo

HLO = """HloModule jit_step

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %fusion.1 = f32[8]{0} fusion(%p), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"10"}
  %all-reduce.1 = f32[8]{0} all-reduce(%fusion.1), to_apply=%add
  ROOT %t = (s32[], f32[8]{0}) tuple(%p, %all-reduce.1)
}

%helper (q: f32[8]) -> f32[8] {
  ROOT %copy.1 = f32[8]{0} copy(%q), backend_config={"estimated_cycles":"5"}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %while.1 = (s32[], f32[8]{0}) while(%x), condition=%c, body=%body, backend_config={TRIPS}
  %while.2 = (s32[], f32[8]{0}) while(%x), condition=%c, body=%body
  %call.1 = f32[8]{0} call(%x), to_apply=%helper
  %kernel = f32[8]{0} custom-call(), custom_call_target="tpu_kernel", backend_config={"estimated_cycles":"3"}
  ROOT %add.1 = f32[8]{0} fusion(%x), kind=kLoop, calls=%f, backend_config={"estimated_cycles":"1"}
}
"""


def test_loop_bodies_count_once_per_iteration_and_custom_calls_are_listed():
    found = hlo.analyze(HLO.replace('TRIPS', '"known_trip_count":{"n":"7"}'))
    assert found['cycles'] == 7 * 10 + 10 + 5 + 1
    assert (found['loops'], found['unknown_loops']) == (2, 1)
    assert found['collectives'] == {'all-reduce': {'count': 8, 'bytes': 8 * 8 * 4}}
    assert found['custom_calls'] == {'tpu_kernel': 1}
    assert found['custom_call_cycles'] == 3


@pytest.mark.parametrize(
    ('shape', 'expected'),
    [
        ('f32[4096,1024]{1,0:T(8,128)S(1)}', 4096 * 1024 * 4),
        ('(bf16[3,5]{1,0}, f32[], u8[7], pred[2], f8e4m3fn[2])', 30 + 4 + 7 + 2 + 2),
        ('f32[]{:T(128)}', 4),
    ],
)
def test_bytes_of_a_shape(shape, expected):
    assert hlo.shape_bytes(shape) == expected
