"""The trace of some steps."""

import gzip
import json


def test_the_trace_can_be_read(watched):
    *_, trace = sorted((watched[0] / 'profile').rglob('perfetto_trace.json.gz'))
    content = json.loads(gzip.decompress(trace.read_bytes()))
    assert len(content['traceEvents']) > 10
    assert list((watched[0] / 'profile').rglob('*.xplane.pb'))
