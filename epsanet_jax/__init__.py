"""EPSANet for JAX: the published networks, a trainer, and a bridge to PyTorch."""

from typing import TYPE_CHECKING, Any

from epsanet_jax.errors import InputError
from epsanet_jax.models import create_model, list_models
from epsanet_jax.version import __version__
from epsanet_jax.weights import Network, from_pretrained, load, save_pretrained

if TYPE_CHECKING:
    from epsanet_jax.analysis.predict import predict

__all__ = [
    'InputError',
    'Network',
    '__version__',
    'create_model',
    'from_pretrained',
    'list_models',
    'load',
    'predict',
    'save_pretrained',
]


def __getattr__(name: str) -> Any:
    if name == 'predict':  # imports what reads images, which the models do not need
        from epsanet_jax.analysis.predict import predict

        return predict
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
