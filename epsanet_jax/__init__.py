"""EPSANet for JAX: the published networks, a trainer, and a bridge to PyTorch."""

from epsanet_jax.errors import InputError
from epsanet_jax.hub import from_pretrained, save_pretrained
from epsanet_jax.models import create_model, list_models

__version__ = '0.1.0'
__all__ = [
    'InputError',
    '__version__',
    'create_model',
    'from_pretrained',
    'list_models',
    'save_pretrained',
]
