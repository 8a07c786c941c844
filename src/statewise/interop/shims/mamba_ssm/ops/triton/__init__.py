"""Where mamba_ssm has its Triton kernels; here they run on any device."""

from ...._missing import missing

__getattr__ = missing(__name__)
