"""What `statewise matrix` looks at: a mixer or a model by whatever name it has, and what it reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from .._names import unknown
from .._words import counted

if TYPE_CHECKING:
    from torch import Tensor

    from ..segments import Segments

What = Literal["matrix", "influence", "impulse", "transfer", "spectrum", "memory", "state"]
SAMPLE = "The river ran low that summer, and the boats that used to carry grain to the coast lay still in the mud. "
LENGTH = 128  # tokens that are read where nothing says how many
LONGEST = 1024  # of a row of the data of a run; matrices grow with its square
MAX_RANDOM = 1_500_000_000  # parameters of a preset that is built with random weights, only to be looked at


class Look(NamedTuple):
    """What is looked at."""

    subject: Any  # a mixer or a whole model
    x: Tensor
    seg: Segments | None
    name: str
    source: str = ""  # of x, where it was not given

    @property
    def read(self) -> str:
        """How much of what was read, for people."""
        return f"{self.x.shape[1]} tokens" + (f" of {self.source}" if self.source else "")


def numbers(option: str, given: str | None) -> list[int] | None:
    """Of an option with commas between."""
    if given is None:
        return None
    try:
        return [int(part) for part in given.split(",")]
    except ValueError:
        raise ValueError(f"--{option}: want whole numbers with commas between, got {given!r}") from None


def look_at(
    name: str, what: What, layer: int | None, length: int | None, text: str | None, tokens: str | None,
    documents: str | None, d_model: int, seed: int,
) -> Look:  # fmt: skip
    """Build what `name` stands for, and let it read something; the options are those of `statewise matrix`."""
    import torch

    from ..analysis import mixer_input, sequence_mixers

    torch.manual_seed(seed)
    model = _build(name, d_model).eval()
    mixers = sequence_mixers(model)
    if not mixers:
        raise ValueError(f"{name}: {type(model).__name__} has no mixer to look at")
    if layer is not None and not 0 <= layer < len(mixers):
        raise ValueError(f"--layer: {name} has mixers 0 to {len(mixers) - 1}, got {layer}")
    lengths = numbers("documents", documents)
    given, source = _given(model, name, length, text, tokens)
    if given is None:
        mixer, long = mixers[layer or 0][1], length or LENGTH
        x = torch.randn(1, long, getattr(mixer, "d_model", d_model), dtype=next(mixer.parameters()).dtype)
        return Look(mixer, x, _segments(lengths, long), _title(model, mixers, layer or 0), source)
    seg = _segments(lengths, given.shape[1])
    if layer is None and (whole := _whole(model, what)) is not None:
        if seg is not None:
            raise ValueError(f"--documents: is for a layer; give one with --layer to see its {what}")
        return Look(whole, given, None, f"{type(model).__name__}, {counted(len(mixers), 'layer')}", source)
    seen = mixer_input(model, mixers[layer or 0][1], given, seg)
    return Look(mixers[layer or 0][1], seen.x, seen.seg, _title(model, mixers, layer or 0), source)


def _title(model: Any, mixers: list, at: int) -> str:
    mixer = mixers[at][1]
    return type(mixer).__name__ if mixer is model else f"{type(mixer).__name__}, layer {at} of {len(mixers)}"


def _given(
    model: Any, name: str, length: int | None, text: str | None, tokens: str | None
) -> tuple[Tensor | None, str]:
    """What a model reads: tokens (1, L), or values (1, L, C), and what that is of unless it was given. None for a mixer
    by name, which is no model."""
    import torch

    from ..models.classification import SequenceClassifier
    from ..models.language._causal_lm import CausalLM

    long = length or LENGTH
    if isinstance(model, CausalLM):
        source = "" if text or tokens else "a sample text" if model.vocab_size == 256 else "random tokens"
        return _tokens(model, name, long, text, tokens), source
    if text is not None:
        raise ValueError(f"--text: {name} does not read text")
    size = model.config["vocab_size"] if isinstance(model, SequenceClassifier) else None
    if tokens is not None:
        if size is None:
            raise ValueError(f"--tokens: {name} does not read tokens")
        return _ids(numbers("tokens", tokens), size, long), ""
    if not isinstance(model, SequenceClassifier):
        return None, "random values"
    if (row := _row(model, name, length or LONGEST)) is not None:
        return row
    if size is not None:
        return _ids(None, size, long, first=1), "random tokens"  # 0 is padding
    return torch.randn(1, long, model.config["channels"]), "random values"


def _row(model: Any, name: str, length: int) -> tuple[Tensor, str] | None:
    """The first validation row of the data that a run was trained on, where that is here, and what it is."""
    import numpy as np

    from ..data import sets
    from ..data.classify import ClassifyData
    from ..data.labelled import Labelled
    from ..training.directory import RunDirectory
    from .evaluate import home

    run = RunDirectory(home(name))
    if not (run.config.is_file() and run.results.is_file()):
        return None
    config, told = run.read_config(), json.loads(run.results.read_text(encoding="utf-8")).get("data")
    seed = (config.get("data") or {}).get("seed", 0)
    folder = sets.folder_of(str(told), str(config.get("profile")), seed)
    if not (folder / sets.CARD).is_file():
        return None
    data = Labelled.load(folder)
    if not len(data.validation) or data.vocab_size != model.config["vocab_size"]:
        return None
    batch = ClassifyData(data).gather(data.validation, np.array([0]))
    valid = None if batch.seg is None else batch.seg.valid
    whole = batch.tokens.shape[1] if valid is None else int(valid[0].sum())
    long = f" ({whole:,} long)" if whole > length else ""
    return batch.tokens[:1, : min(whole, length)], f"row 0 of the validation split of {folder.name}{long}"


def _whole(model: Any, what: What) -> Any:
    """What is looked at where no layer is asked for: the model, for views that go through all of it."""
    from ..mixers.base import Causal

    if what == "state":
        return model if isinstance(model, Causal) else None
    if what not in ("memory", "influence"):
        return None
    return _before_pooling(model) if hasattr(model, "features") else model


def _before_pooling(model: Any) -> Any:
    """A classifier up to its features, which it has for each position."""
    from torch import nn

    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model.features(x)

    return Features()


def _build(name: str, d_model: int) -> Any:
    from .. import mixers
    from ..inference import load_run
    from ..models import create_model, list_models, parameter_count

    if Path(name).exists():
        return load_run(name)
    if name in list_models():
        count = parameter_count(name)
        if count > MAX_RANDOM:
            raise ValueError(
                f"{name} has {count / 1e9:.1f} B parameters, too many to draw at random only to look at; give the "
                "directory of a checkpoint, or a mixer"
            )
        return create_model(name)
    if name.lstrip().startswith("{"):
        try:
            options = json.loads(name)
        except json.JSONDecodeError as error:
            raise ValueError(f"MODEL: is not JSON: {error}") from error
        if not isinstance(options.get("name"), str):
            raise ValueError(f"MODEL: want a 'name' of a mixer in {name}")
        return mixers.create(options.pop("name"), d_model, **options)
    if name in mixers.names():
        return mixers.create(name, d_model)
    if "/" in name or Path(name).suffix:
        raise ValueError(f"there is no run directory {name}")
    raise ValueError(unknown("model", name, [*list_models(), *mixers.names()]))


def _tokens(model: Any, name: str, length: int, text: str | None, tokens: str | None) -> Tensor:
    from ..inference import tokenizer_for

    if text is not None and tokens is not None:
        raise ValueError("--tokens: want either a text or tokens, got both")
    given = numbers("tokens", tokens)
    if text is not None:
        given = tokenizer_for(model, name).encode(text)
    elif given is None and model.vocab_size == 256:
        given = list((SAMPLE * -(-length // len(SAMPLE))).encode())
    return _ids(given, model.vocab_size, length, "text" if text is not None else "tokens")


def _ids(given: list[int] | None, size: int, length: int, option: str = "tokens", first: int = 0) -> Tensor:
    """(1, L), checked; random ones, from `first` on, if none are given."""
    import torch

    if given is None:
        return torch.randint(min(first, size - 1), size, (1, length))
    bad = [i for i in given if not 0 <= i < size]
    if bad:
        raise ValueError(f"--{option}: want 0 to {size - 1}, got {bad[0]}")
    if len(given) < 2:
        raise ValueError(f"--{option}: want at least 2 tokens, got {len(given)}")
    return torch.tensor([given[:length]])


def _segments(lengths: list[int] | None, total: int) -> Segments | None:
    from ..segments import Segments

    if lengths is None:
        return None
    if min(lengths) < 1 or sum(lengths) > total:
        raise ValueError(f"--documents: want lengths of at least 1 with a sum of at most {total}, got {lengths}")
    rest = total - sum(lengths)
    return Segments.pack([lengths + [rest] * (rest > 0)])
