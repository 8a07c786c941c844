"""Pure functions of tensors: recurrences, convolutions and attention, each with all of its views.

`op(value, *coefficients, state=None, seg=None, algorithm=None, backend=None) -> (y, state)`, and beside it `op_step`,
`op_matrix` and, for linear recurrences, `op_summary` and `op_carry`.
"""

from ._backend import BackendError, use_backend
from ._memory import empty_cache
from ._spec import OPS, OpSpec, Summary, combine
from .attention import (
    KVBuffer,
    KVState,
    attention,
    attention_apply,
    attention_cache,
    attention_matrix,
    attention_positions,
    attention_step,
)
from .dplr import cauchy, dplr_kernel, dplr_ssm, dplr_ssm_apply, dplr_ssm_matrix, dplr_ssm_step
from .linear_scan import (
    linear_scan,
    linear_scan_apply,
    linear_scan_carry,
    linear_scan_matrix,
    linear_scan_step,
    linear_scan_summary,
)
from .lti import (
    diagonal_kernel,
    diagonal_ssm,
    diagonal_ssm_apply,
    diagonal_ssm_carry,
    diagonal_ssm_matrix,
    diagonal_ssm_step,
    diagonal_ssm_summary,
    lti_conv,
)
from .norm import gated_rms_norm, rms_norm
from .selective_scan import (
    selective_scan,
    selective_scan_carry,
    selective_scan_matrix,
    selective_scan_step,
    selective_scan_summary,
)
from .short_conv import (
    ConvSummary,
    short_conv,
    short_conv_apply,
    short_conv_combine,
    short_conv_matrix,
    short_conv_step,
    short_conv_summary,
)
from .ssd import (
    ssd,
    ssd_carry,
    ssd_matrix,
    ssd_step,
    ssd_summary,
)

__all__ = [
    "OPS",
    "BackendError",
    "ConvSummary",
    "KVBuffer",
    "KVState",
    "OpSpec",
    "Summary",
    "attention",
    "attention_apply",
    "attention_cache",
    "attention_matrix",
    "attention_positions",
    "attention_step",
    "cauchy",
    "combine",
    "diagonal_kernel",
    "diagonal_ssm",
    "diagonal_ssm_apply",
    "diagonal_ssm_carry",
    "diagonal_ssm_matrix",
    "diagonal_ssm_step",
    "diagonal_ssm_summary",
    "dplr_kernel",
    "dplr_ssm",
    "dplr_ssm_apply",
    "dplr_ssm_matrix",
    "dplr_ssm_step",
    "empty_cache",
    "gated_rms_norm",
    "linear_scan",
    "linear_scan_apply",
    "linear_scan_carry",
    "linear_scan_matrix",
    "linear_scan_step",
    "linear_scan_summary",
    "lti_conv",
    "rms_norm",
    "selective_scan",
    "selective_scan_carry",
    "selective_scan_matrix",
    "selective_scan_step",
    "selective_scan_summary",
    "short_conv",
    "short_conv_apply",
    "short_conv_combine",
    "short_conv_matrix",
    "short_conv_step",
    "short_conv_summary",
    "ssd",
    "ssd_carry",
    "ssd_matrix",
    "ssd_step",
    "ssd_summary",
    "use_backend",
]
