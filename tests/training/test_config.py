"""The configuration: which fields identify a run, and its form in JSON."""

import dataclasses
import json

from runs import (
    changed_config,
)

from epsanet_jax.training import config as configs


def test_some_fields_identify_a_run_and_others_may_change():
    base = configs.identity(changed_config(), 'abc', 10)
    for free in (
        {'epochs': 3.0},
        {'steps': 5},
        {'log_every_steps': 1},
        {'eval_every_epochs': 9.0},
        {'data__dir': 'moved'},
        {'data__workers': 3},
        {'checkpoint__keep': 9},
        {'checkpoint__every_minutes': 1.0},
    ):
        assert configs.identity(changed_config(**free), 'abc', 10) == base, free
    for fixed in (
        {'seed': 1},
        {'batch_size': 8},
        {'label_smoothing': 0.0},
        {'model__psa_bias': True},
        {'optimizer__lr': 0.2},
        {'schedule__name': 'cosine'},
        {'data__flip': False},
    ):
        assert configs.identity(changed_config(**fixed), 'abc', 10) != base, fixed
    assert configs.identity(changed_config(), 'other data', 10) != base


def test_a_configuration_is_the_same_after_json():
    flat = json.loads(json.dumps(configs.flatten(changed_config(model__planes=(8, 16)))))
    assert flat['model.planes'] == [8, 16]
    assert set(flat) == set(configs.flatten(json.loads(json.dumps(dataclasses.asdict(changed_config())))))
