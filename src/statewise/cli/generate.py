"""`statewise generate RUN_DIR --prompt TEXT`: streams text."""

from __future__ import annotations

import codecs
import sys
import time
from typing import Any

from .errors import UserError, user_errors
from .options import Options


def load_byte_model(path: str) -> Any:
    from ..inference import load_run

    model = load_run(path)
    size = model.config.get("vocab_size")
    if size != 256:
        raise ValueError(f"{path}: want a byte model (256 tokens), got one with {size} tokens")
    return model


def generate_text(
    run_dir: str,
    prompt: str = "\n",
    tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 0.95,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop: str | None = None,
) -> int:
    """Continue a text with the model of a run directory (or of one of its checkpoints).

    Args:
        run_dir: run directory
        prompt: text to continue
        tokens: how many bytes to make
        temperature: below 1 safer, above 1 wilder; 0 always takes the likeliest
        top_k: draw from the k likeliest only; 0 for all
        top_p: draw from the likeliest that make up this probability; 1 for all
        min_p: draw from those at least this share as likely as the likeliest; 0 for all
        repetition_penalty: above 1 makes what has occurred less likely
        seed: same seed, same text; another text each time if not given
        stop: end after this text
    """
    with user_errors():
        model = load_byte_model(run_dir)
    if not prompt:
        raise UserError("--prompt: want at least one character")
    from ..inference import generate

    ending = stop.encode() if stop else None
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    _show(prompt.lstrip("\n"))
    made = bytearray()
    began = time.monotonic()
    stream = generate(
        model,
        [list(prompt.encode())],
        tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    with user_errors():
        # Options are checked on the first token: a wrong one must not look like a bug.
        token = next(stream, None)
    while token is not None:
        made.append(int(token[0]))
        _show(decoder.decode(bytes(made[-1:])))
        if ending and made.endswith(ending):
            break
        token = next(stream, None)
    _show(decoder.decode(b"", True) + "\n")
    if sys.stderr.isatty() and made:
        seconds = time.monotonic() - began
        print(f"[{len(made)} bytes, {len(made) / max(seconds, 1e-9):,.0f} per second]", file=sys.stderr)
    return 0


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def main(argv: list[str]) -> int:
    options = Options("generate", generate_text, positional=["run_dir"])
    if "--help" in argv or "-h" in argv:
        print(options.help())
        return 0
    return generate_text(**options.parse(argv))
