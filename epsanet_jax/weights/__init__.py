"""Reads weights of any file type as a `Network`, and writes them."""

from epsanet_jax.weights.files import from_pretrained, load
from epsanet_jax.weights.network import Network, Source, save_pretrained
from epsanet_jax.weights.start import start_from

__all__ = ['Network', 'Source', 'from_pretrained', 'load', 'save_pretrained', 'start_from']
