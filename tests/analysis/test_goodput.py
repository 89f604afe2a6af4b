"""Where the wall time of a run went."""

import pytest

from epsanet_jax.analysis.goodput import describe, goodput


def line(step, at, **spent):
    return {'split': 'time', 'step': step, 'at': at, **spent}


RUN = [
    line(0, 1012.0, began=1000.0, starting=12.0),
    {'split': 'train', 'step': 10, 'loss': 1.0},
    line(10, 1100.0, compiling=30.0, steps=50.0, waiting=8.0),
    line(10, 1110.0, evaluation=7.0, saving=3.0),
    line(20, 1160.0, steps=45.0, waiting=5.0),
]
CONTINUED = [
    line(10, 1265.0, began=1260.0, starting=5.0),
    line(20, 1320.0, compiling=5.0, steps=44.0, waiting=6.0),
    line(20, 1330.0, evaluation=7.0, saving=3.0),
]


def test_times_of_a_run_that_was_not_interrupted_add_up_to_its_wall_time():
    times = goodput(RUN)
    assert times == {
        'starting': 12, 'compiling': 30, 'steps': 95, 'waiting': 13, 'evaluation': 7, 'saving': 3, 'lost': 0,
        'stopped': 0,
    }  # fmt: skip
    assert sum(times.values()) == RUN[-1]['at'] - RUN[0]['began']


def test_steps_after_the_checkpoint_of_a_restart_are_lost():
    times = goodput(RUN + CONTINUED)
    assert (times['lost'], times['stopped']) == (50, 100)
    assert (times['steps'], times['starting'], times['compiling']) == (94, 17, 35)
    assert sum(times.values()) == CONTINUED[-1]['at'] - RUN[0]['began']


def test_lost_time_stays_lost_after_a_second_restart():
    times = goodput([*RUN, *CONTINUED, line(20, 1400.0, began=1395.0, starting=5.0)])
    assert (times['lost'], times['stopped'], times['steps']) == (50, 165, 94)


def test_the_text_names_shares_of_the_time_that_the_run_was_running():
    text = describe(goodput(RUN + CONTINUED))
    assert text.startswith('0:03:50: steps 40.9%, waiting for data 6.1%, compiling 15.2%, starting 7.4%')
    assert text.endswith('lost to interruptions 21.7%; not running: 0:01:40')
    assert 'lost' not in describe(goodput(RUN))


def test_a_run_of_an_older_version_has_no_times():
    assert goodput([RUN[1]]) == {}


def test_a_clock_that_is_set_back_makes_no_negative_time():
    assert goodput([*RUN, line(20, 1100.0, began=1090.0)])['stopped'] == pytest.approx(0)
