"""softplus, which mamba_ssm has as a Triton function."""

from torch.nn.functional import softplus

from ...._missing import missing

__all__ = ["softplus"]

__getattr__ = missing(__name__)
