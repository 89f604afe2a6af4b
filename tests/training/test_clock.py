"""Times of activities."""

from epsanet_jax.training import clock
from epsanet_jax.training.clock import Clock


def test_all_time_is_attributed_once(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(clock.time, 'perf_counter', lambda: now[0])

    def pass_time(seconds):
        now[0] += seconds

    measured = Clock()
    pass_time(3)
    measured.enter('steps')
    pass_time(10)
    with measured.during('saving'):
        pass_time(1)
        with measured.during('evaluation'):
            pass_time(4)
        pass_time(2)
    measured.waited(2.5)
    assert measured.take() == {'starting': 3, 'steps': 7.5, 'saving': 3, 'evaluation': 4, 'waiting': 2.5}
    pass_time(1)
    assert measured.take() == {'steps': 1}
