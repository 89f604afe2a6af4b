"""A small network as PyTorch saves it, and the check of a command that fails."""

import numpy as np
import small
import torch
from command import run

from epsanet_jax.convert import to_torch

NET = small.model()
VARIABLES = small.random_variables(NET, dtype=np.float32)
STATE_DICT = {k: torch.from_numpy(v) for k, v in to_torch(VARIABLES, NET).items()}
REFERENCE = {
    'epoch': 31,
    'arch': 'epsanet50',
    'best_prec1': torch.tensor(12.5),
    'state_dict': {f'module.{k}': v for k, v in STATE_DICT.items()},
}


def assert_refused(capsys, *arguments, part='', notes=0):
    """Runs a command that ends with one line, after `notes` lines on what was taken from a file."""
    status, _, err = run(capsys, *arguments)
    assert status == 2, err
    lines = err.splitlines()
    assert len(lines) == 1 + notes
    assert lines[-1].startswith('error: ')
    assert part in lines[-1]
