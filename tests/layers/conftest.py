import pytest

from epsanet_jax.layers import conv_general


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls of `grouped_conv`."""
    counted = []

    def watched(*args, **kwargs):
        counted.append(args)
        return grouped_conv(*args, **kwargs)

    grouped_conv = conv_general.grouped_conv
    monkeypatch.setattr(conv_general, 'grouped_conv', watched)
    return counted
