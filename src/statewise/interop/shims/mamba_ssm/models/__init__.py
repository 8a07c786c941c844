"""The language model of mamba_ssm."""

from ..._missing import missing

__getattr__ = missing(__name__)
