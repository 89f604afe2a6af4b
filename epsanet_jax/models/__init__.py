"""The networks and their parts, as flax.linen Modules."""

from epsanet_jax.models.block import EPSABlock
from epsanet_jax.models.epsanet import EPSANet
from epsanet_jax.models.folding import fold_batch_norm
from epsanet_jax.models.norm import BatchNorm
from epsanet_jax.models.psa import PSAModule, SEWeightModule
from epsanet_jax.models.pyconv import PyConv, PyConvResNet
from epsanet_jax.models.settings import ModelConfig, Settings
from epsanet_jax.models.zoo import create_model, get_variant, list_models

__all__ = [
    'BatchNorm',
    'EPSABlock',
    'EPSANet',
    'ModelConfig',
    'PSAModule',
    'PyConv',
    'PyConvResNet',
    'SEWeightModule',
    'Settings',
    'create_model',
    'fold_batch_norm',
    'get_variant',
    'list_models',
]
