"""The version of the package, which is stored with weights."""

__version__ = '0.1.0'
