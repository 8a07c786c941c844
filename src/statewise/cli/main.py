"""`statewise COMMAND ...`: finds the command, and turns mistakes into one clear line and exit code 2."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from .._names import unknown
from .._version import __version__
from .errors import Interrupted, UserError

# Name -> (module, what it does); the module has `main(argv) -> exit code`.
COMMANDS = {
    "run": ("run", "train by a recipe (language.bytes if none is named), or go on with a run"),
    "compare": ("compare", "train several models under one recipe, with equal means, and compare them"),
    "generate": ("generate", "continue a text with a trained model"),
    "states": ("states", "list, show, trim, compare, fork and remove stored states"),
    "evaluate": ("evaluate", "how good a trained model is: bits per byte of a text, or accuracy on a split"),
    "matrix": ("matrix", "see what the mixers of a model do: matrices, responses, spectra, memory, as PNG"),
    "convert": ("convert", "write a checkpoint in another format: ours, of transformers, of mamba_ssm"),
    "export": ("export", "write a model for other programs: ONNX, PyTorch programs, GGUF for llama.cpp"),
    "data": ("data", "make and read classification data sets, see what is there, look at it"),
    "ptd": ("ptd", "find the diagonal form of HiPPO that s4ptd and s5ptd start from, and compare it with HiPPO"),
    "list": ("listing", "models, mixers and recipes"),
    "bench": ("bench", "how fast ops and models are here, side by side with other libraries"),
    "doctor": ("doctor", "what this machine offers, which kernels run on it, and whether they are right"),
}

USAGE = f"""usage: statewise COMMAND [options]

Every state space sequence model, one contract, on any machine.

commands:
{chr(10).join(f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items())}

`statewise COMMAND --help` shows the options of a command; `statewise --version` the version.
With no options at all, `statewise run` trains a small Mamba-2 language model in about three minutes."""


def _dispatch(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if argv[0] in ("-V", "--version", "version"):
        print(f"statewise {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        raise UserError(unknown("command", argv[0], COMMANDS))
    return import_module(f".{COMMANDS[argv[0]][0]}", __package__).main(list(argv[1:]))


def _as_typed(message: str, argv: Sequence[str]) -> str:
    """A message of the library names the argument, `batch_size: ...`; whoever typed it knows it as --batch-size."""
    name, colon, rest = message.partition(": ")
    options = (word.split("=", 1)[0] for word in argv if word.startswith("--"))
    typed = next((option for option in options if option[2:].replace("-", "_") == name.replace("-", "_")), None)
    return f"{typed}: {rest}" if colon and typed else message


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 a mistake in what was asked, 130 stopped by Ctrl-C.

    Set the environment variable STATEWISE_TRACEBACK to see where an error came from.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        return _dispatch(argv)
    except UserError as error:
        if os.environ.get("STATEWISE_TRACEBACK"):
            raise
        print(f"statewise: error: {_as_typed(str(error), argv)}", file=sys.stderr)
        return 2
    except Interrupted as error:
        print(f"\n{error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, say) has seen enough. Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def entry() -> NoReturn:
    """The program: `main`, then leave the process."""
    code = main()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # PyTorch's communication threads may still let go of Python objects. One that does so while the interpreter
        # takes itself apart is ended inside C++ code that may not be left, and the whole finished process aborts.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
