"""What a mixer inside a model sees: the mixers of a model, and their inputs while it reads something."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..mixers.base import Causal, SequenceMixer
from ..segments import Segments


class Seen(NamedTuple):
    """One call of a mixer."""

    x: Tensor  # (B, L, D)
    seg: Segments | None


def sequence_mixers(model: nn.Module) -> list[tuple[str, SequenceMixer]]:
    """(name, mixer) of the mixers of a model in order, one a layer. Mixers inside a mixer are not counted; a mixer
    that several layers share is there once. A mixer is its own only one."""
    found: list[tuple[str, SequenceMixer]] = []
    for name, module in model.named_modules():
        inside = any(not outer or name.startswith(f"{outer}.") for outer, _ in found)
        if isinstance(module, SequenceMixer) and not inside:
            found.append((name, module))
    return found


@contextmanager
def recording(mixer: SequenceMixer) -> Iterator[list[Seen]]:
    """A list that fills with what `mixer` is called with, while the block lasts."""
    calls: list[Seen] = []
    if isinstance(mixer, Causal):
        # Blocks call the one body of a causal mixer, past any hook on the module.
        run = mixer._run

        def heard(x: Tensor, state: object, seg: Segments | None) -> object:
            calls.append(Seen(x.detach(), seg))
            return run(x, state, seg)

        mixer._run = heard  # type: ignore[method-assign, assignment]
        # A mixer may have a way of its own to whole sequences; here it takes the body.
        mixer._whole = partial(Causal._whole, mixer)  # type: ignore[method-assign]
        try:
            yield calls
        finally:
            del mixer._run, mixer._whole
        return

    def hook(_module: nn.Module, arguments: tuple, options: dict) -> None:
        seg = options.get("seg", arguments[1] if len(arguments) > 1 else None)
        calls.append(Seen((arguments[0] if arguments else options["x"]).detach(), seg))

    handle = mixer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


@torch.no_grad()
def mixer_input(model: nn.Module, mixer: SequenceMixer, x: Tensor, seg: Segments | None = None) -> Seen:
    """What `mixer` is first called with while `model` reads `x` (tokens (B, L), or (B, L, D)).

    Raises:
        ValueError: the model does not call this mixer.
    """
    if mixer is model:
        return Seen(x, seg)
    with recording(mixer) as calls:
        model(x) if seg is None else model(x, seg)
    if not calls:
        raise ValueError(f"mixer: {type(model).__name__} does not call this {type(mixer).__name__}")
    return calls[0]
