"""The laws: what must hold of every op, mixer, block and model, written once and run by type.

`check_op(spec)`, `check_mixer(build, d_model)` and `check_model(build, vocab)` raise `LawError` with the law, the case
and the figures. `op_laws(spec)` and `module_laws(build, ...)` give the same laws as lists, for parametrised tests.
"""

from .modules import check_mixer, check_model, laws_for, module_laws
from .ops import Law, check_op, op_laws
from .poison import poisoned_empty
from .tolerance import LawError, assert_agree, assert_no_worse

__all__ = [
    "Law",
    "LawError",
    "assert_agree",
    "assert_no_worse",
    "check_mixer",
    "check_model",
    "check_op",
    "laws_for",
    "module_laws",
    "op_laws",
    "poisoned_empty",
]
