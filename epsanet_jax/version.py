"""The version of the package, stored with weights."""

__version__ = '0.1.0'
