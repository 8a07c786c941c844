"""The modules of mamba_ssm, with its parameter names."""

from ..._missing import missing

__getattr__ = missing(__name__)
