"""Converts between PyTorch state dicts and JAX variables."""

from epsanet_jax.convert.files import Checkpoint, read_checkpoint
from epsanet_jax.convert.state_dict import from_torch, to_torch

__all__ = ['Checkpoint', 'from_torch', 'read_checkpoint', 'to_torch']
