"""Processes notice that another one is lost."""

import signal

import pytest
from runs import (
    start_all,
    wait_for,
)


@pytest.mark.slow
@pytest.mark.parametrize('killed', [0, 1])
def test_if_a_process_is_killed_the_others_end_with_a_message(float64_recipe, tmp_path, killed):
    two = start_all(float64_recipe, tmp_path, 2, 2, '--config.steps=100000')
    wait_for(two[0], 'step 5/')
    two[killed].kill()
    outputs = [p.communicate(timeout=600) for p in two]
    err = outputs[1 - killed][1]
    # What notices first: the heartbeats, the running collective, or JAX, which aborts.
    assert two[1 - killed].returncode in (1, -signal.SIGABRT), err
    assert 'of this run failed or was lost' in err or 'Terminating process because' in err
