"""`statewise generate MODEL --prompt TEXT`: streams text; with `--state`, from where a stored one ended."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from .errors import user_errors
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
    prompt: list[str] = [],  # noqa: B006 -- jsonargparse wants the type of what it makes
    prompts_file: str | None = None,
    tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 0.95,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop: list[str] = [],  # noqa: B006
    stream: bool = True,
    state: str | None = None,
    checkpoint_every: int | None = None,
    draft: str | None = None,
    ngram: int = 0,
    guesses: int = 8,
    chunk: int = 4096,
) -> int:
    """Continue texts with the model of a run directory (or of one of its checkpoints).

    Args:
        run_dir: run directory
        prompt: text to continue; give it several times for several texts, which are continued side by side
        prompts_file: a file with one text to continue on each line
        tokens: how many tokens to make (bytes, for a byte model)
        temperature: below 1 safer, above 1 wilder; 0 always takes the likeliest
        top_k: draw from the k likeliest only; 0 for all
        top_p: draw from the likeliest that make up this probability; 1 for all
        min_p: draw from those at least this share as likely as the likeliest; 0 for all
        repetition_penalty: above 1 makes what has occurred less likely
        seed: same seed, same text; another text each time if not given
        stop: end after this text; may be given several times
        stream: show the text of a single prompt as it is made, and not only at the end
        state: a file of one text: go on from there, with the prompt appended, and keep the new end there; or a
            directory of states: go on from the longest beginning of each prompt that is stored, and store the ends
        checkpoint_every: with a directory of states, also store the prompt's state after every so many tokens
        draft: run directory of a smaller model that guesses tokens, which the model checks several at a time
        ngram: guess tokens by looking up where the last so many tokens occurred before; 0 for no such guesses
        guesses: how many tokens to guess at a time
        chunk: tokens of a prompt that are read at a time; changes speed and memory, not the result
    """
    with user_errors():
        from ..inference import generate_text as start
        from ..inference import load_run, tokenizer_for
        from .keeping import keeper

        model = load_run(run_dir)
        tokenizer = tokenizer_for(model, run_dir)
        kept = keeper(state, model, tokenizer, chunk, checkpoint_every)
        texts = _texts(prompt, prompts_file, default=None if state else "\n")
        run = start(
            model, tokenizer, kept.begin(texts), tokens,
            stop=stop, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            repetition_penalty=repetition_penalty, seed=seed, chunk=chunk, draft=_draft(draft, ngram, guesses),
        )  # fmt: skip
    began = time.monotonic()
    _show(run, texts, stream=stream and len(texts) < 2)
    seconds = time.monotonic() - began
    with user_errors():
        kept.end(run)
    if sys.stderr.isatty():
        print(_summary(run, seconds), file=sys.stderr)
    return 0


def _texts(prompt: list[str], file: str | None, default: str | None) -> list[str]:
    texts = list(prompt)
    if file is not None:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
        if not all(lines) or not lines:
            raise ValueError(f"--prompts-file: want a text on each line of {file}, got an empty one")
        texts += lines
    if not all(texts):
        raise ValueError("--prompt: want at least one character")
    return texts if texts or default is None else [default]


def _draft(model: str | None, ngram: int, guesses: int) -> Any:
    from ..inference import DraftModel, NGram, load_run

    for name, value, least in (("ngram", ngram, 0), ("guesses", guesses, 1)):
        if value < least:
            raise ValueError(f"--{name}: want at least {least}, got {value}")
    if model is not None and ngram:
        raise ValueError("--draft: want either a draft model or --ngram, got both")
    if model is not None:
        return DraftModel(load_run(model), guesses)
    return NGram(ngram, guesses) if ngram else None


# ---- what is shown ---------------------------------------------------------------------------------------------------


def _show(run: Any, texts: list[str], *, stream: bool) -> None:
    if stream:
        _write("".join(texts).lstrip("\n"))
        for piece in run:
            _write(piece.text)
        _write("\n")
        return
    for _ in run:
        pass
    for i, (prompt, text) in enumerate(zip(texts or [""], run.texts)):
        if len(texts) > 1:
            _write(f"--- {i + 1}\n")
        _write(f"{prompt}{text}\n".lstrip("\n"))


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _summary(run: Any, seconds: float) -> str:
    made = sum(map(len, run.tokens.made))
    parts = [f"{made} tokens", f"{made / max(seconds, 1e-9):,.0f} per second"]
    if run.tokens.guessed:
        parts.append(f"{run.tokens.accepted} of {run.tokens.guessed} guesses right, {run.tokens.calls} calls")
    return f"[{', '.join(parts)}]"


def main(argv: list[str]) -> int:
    options = Options("generate", generate_text, positional=["run_dir"])
    if "--help" in argv or "-h" in argv:
        print(options.help())
        return 0
    return generate_text(**options.parse(argv))
