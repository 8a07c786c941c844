"""What all classification recipes share: from a data set, a model's name and a profile to a `Recipe`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from .._names import unknown
from ..training.options import Training, shares
from . import _long_range as tables
from .models import ModelChoice
from .recipe import Phase, Recipe

Profile = Literal["small", "full"]
Pretrain = Literal["none", "masked", "causal"]


@dataclass(frozen=True)
class SetOptions:
    """Data.

    Args:
        source: folder or file with the published data; not needed where the set is made here or comes with a package
        seed: of the set itself, where it is generated or split
        workers: threads that make the set, 0 for one on each core
    """

    source: str | None = None
    seed: int = 0
    workers: int = 1


@dataclass(frozen=True)
class Task:
    """A row of the list of recipes.

    Args:
        recipe: name, as in `statewise run`. data: name of the set. table: row of the tables in `_long_range`.
    """

    recipe: str
    data: str
    table: str


_ARGUMENTS = """

Args:
    model: s4, s4d, s5, transformer, mamba, mamba2, lstm, any other mixer (see `statewise list`), or several with
        commas between them
    profile: small is sized for two CPU cores, full is what the papers publish. With other --steps, warm-up and the
        distances of validations and checkpoints keep their share of the steps where they are not given
    d_model: width; from the table of the profile if not given
    n_layer: number of layers; from the table of the profile if not given
    pretrain: learn to restore hidden elements of the training rows (masked), or to tell the next one (causal), before
        learning labels
    pretrain_steps: steps of that; as many as `steps` if not given
    pretrain_lr: its learning rate; from the table of the profile if not given
    pretrain_from: directory of a run that did the same pre-training, whose result is taken
    limit_train: use only so many training rows
"""


def classification(task: Task, about: str) -> Callable[..., Recipe]:
    """The recipe function of a task; `about` is its line in `statewise list`.

    `training` None means: from the table of model and profile. `defaults_for` tells the command line which that is.
    """

    def recipe(
        *,
        model: ModelChoice = "s4d",
        profile: Profile = "small",
        d_model: int | None = None,
        n_layer: int | None = None,
        pretrain: Pretrain = "none",
        pretrain_steps: int | None = None,
        pretrain_lr: float | None = None,
        pretrain_from: str | None = None,
        limit_train: int | None = None,
        data: SetOptions = SetOptions(),
        training: Training | None = None,
    ) -> Recipe:
        if training is None:
            training = tables.training(task.table, _family(model), profile, pretrain)
        options = {
            "model": model, "profile": profile, "d_model": d_model, "n_layer": n_layer, "pretrain": pretrain,
            "pretrain_steps": pretrain_steps, "pretrain_lr": pretrain_lr, "pretrain_from": pretrain_from,
            "limit_train": limit_train, "data": asdict(data),
        }  # fmt: skip
        return _classify(task, training, data, options)

    def defaults_for(given: Mapping[str, Any]) -> dict[str, Training]:
        family, profile = _family(given.get("model", "s4d")), given.get("profile", "small")
        table = tables.training(task.table, family, profile, given.get("pretrain", "none"))
        return {"training": _paced(table, given)}

    recipe.__doc__ = about + _ARGUMENTS
    recipe.__name__ = recipe.__qualname__ = task.recipe.rsplit(".", 1)[1]
    recipe.defaults_for = defaults_for  # type: ignore[attr-defined]
    return recipe


def _paced(table: Training, given: Mapping[str, Any]) -> Training:
    """The training of the table where other steps, or other distances, were asked for.

    What was not given keeps its share of the steps, and fits to what was given: a validation counts where there is a
    checkpoint too.
    """
    wanted = {name: given.get(name, 0) for name in ("steps", "eval_every", "checkpoint_every")}
    if min(wanted.values()) < 0:
        return table  # what is wrong with them is said where all options are checked
    if wanted["steps"]:
        table = replace(table, **shares(asdict(table), wanted["steps"]))
    validated, saved = wanted["eval_every"], wanted["checkpoint_every"]
    if validated and not saved:
        return replace(table, checkpoint_every=validated)
    if saved and not validated:
        return replace(table, eval_every=max(round(table.eval_every / saved), 1) * saved)
    return table


def _family(model: ModelChoice) -> str:
    if isinstance(model, Mapping):
        model = str(model.get("name", ""))
    return model.removeprefix("bidirectional_") if isinstance(model, str) else "a list"


def _classify(task: Task, training: Training, data: SetOptions, options: dict[str, Any]) -> Recipe:
    from ..data.classify import ClassifyData
    from ..tasks import Classification
    from .labels import finish_classification
    from .pretraining import prepared, taken

    objective = options["pretrain"]
    _check_first(options)
    config = _config(task, options, causal=objective == "causal")
    labelled = _prepare(task.data, options["profile"], data)
    config["n_outputs"], config["vocab_size"] = labelled.n_classes, labelled.vocab_size
    config["channels"] = labelled.channels or None
    if labelled.paired:
        config["head"] = "pair"
    batches = ClassifyData(labelled, training.batch_size, seed=training.seed, limit=options["limit_train"])
    before: Phase | None = None
    if objective != "none":
        rate = tables.MASKED.get(task.table, tables.MASKED_PIXELS if labelled.channels else tables.MASKED_TOKENS)
        before = prepared(
            task.recipe, batches, objective, config, _first(task, training, options),
            rate=rate, levels=tables.LEVELS.get(task.table),
        )  # fmt: skip
        if options["pretrain_from"] is not None:
            before = taken(before, options["pretrain_from"])
    net = _model(config, training.seed)
    made = Classification(net, labelled.n_classes)
    return Recipe(task.recipe, net, batches, made, training, options, finish_classification, before)


def _check_first(options: Mapping[str, Any]) -> None:
    steps, lr, source = options["pretrain_steps"], options["pretrain_lr"], options["pretrain_from"]
    if options["pretrain"] == "none":
        for name, value in (("steps", steps), ("lr", lr), ("from", source)):
            if value is not None:
                raise ValueError(f"--pretrain-{name}: got {value} without --pretrain; want --pretrain masked or causal")
    if source is not None and (steps is not None or lr is not None):
        raise ValueError("--pretrain-from: nothing is trained before the labels then; want no --pretrain-steps and -lr")
    if steps is not None and steps < 1:
        raise ValueError(f"--pretrain-steps: want at least 1, got {steps}")
    if lr is not None and not 0 < lr < math.inf:
        raise ValueError(f"--pretrain-lr: want a positive number, got {lr}")


def _first(task: Task, training: Training, options: Mapping[str, Any]) -> Training:
    """The training before labels."""
    steps, lr = options["pretrain_steps"], options["pretrain_lr"]
    if steps is None:
        steps = training.steps
    if lr is None:
        lr = tables.pretrain_lr(task.table, _family(options["model"]), options["profile"])
    every = max(steps // 10, 1)
    return replace(
        training,
        steps=steps,
        lr=lr,
        dynamics_lr=min(training.dynamics_lr * training.lr / lr, 1.0),  # the dynamics keep their rate
        warmup=min(training.warmup, steps // 10),
        eval_every=every,
        checkpoint_every=every,
    )


def _model(config: dict[str, Any], seed: int) -> Any:
    import torch

    from ..models.classification import SequenceClassifier

    torch.manual_seed(seed)
    return SequenceClassifier(**config)


def _config(task: Task, options: Mapping[str, Any], *, causal: bool) -> dict[str, Any]:
    model, profile = options["model"], options["profile"]
    config = tables.config(task.table, _family(model), profile)
    if isinstance(model, Mapping):
        config["mixer"] = model
    else:
        entries = [part.strip() for part in model.split(",")] if isinstance(model, str) else model
        specs = [tables.config(task.table, _known(e), profile)["mixer"] if isinstance(e, str) else e for e in entries]
        config["mixer"] = specs if len(specs) > 1 else specs[0]
    if options["d_model"] is not None and config.get("mlp"):
        # The inner width of an MLP keeps its share of the width.
        hidden = config["mlp"]["hidden"] * options["d_model"] / config["d_model"]
        config["mlp"] = {**config["mlp"], "hidden": max(round(hidden), 1)}
    config |= {name: options[name] for name in ("d_model", "n_layer") if options[name] is not None}
    return {**config, "mixer": _causal(config["mixer"])} if causal else config


def _known(model: str) -> str:
    from .. import mixers

    if model not in tables.FAMILIES and model not in mixers.names():
        raise ValueError(unknown("model", model, {*tables.FAMILIES, *mixers.names()}))
    return model


def _causal(mixer: Any) -> Any:
    """The mixer that sees the past only, of the same family."""
    from ..mixers import CausalMixer, mixer_class

    if isinstance(mixer, list):
        return [_causal(entry) for entry in mixer]
    spec = {"name": mixer} if isinstance(mixer, str) else dict(mixer)
    name = str(spec["name"]).removeprefix("bidirectional_")
    if not issubclass(mixer_class(name), CausalMixer):
        raise ValueError(f"pretrain: 'causal' needs a causal mixer, and {name!r} is not; want --pretrain masked")
    if "block" in spec:
        # Local attention looks back only: as far as a token sees at most that has the block before its own in sight.
        spec["window"] = 2 * spec.pop("block")
    return {**spec, "name": name}


def _prepare(name: str, profile: str, options: SetOptions) -> Any:
    """The set, with a bar on the screen while it is made."""
    from pathlib import Path

    from rich.console import Console
    from rich.progress import Progress

    from ..data.sets import prepare
    from ..training.fit import is_first_process

    source = None if options.source is None else Path(options.source)
    with Progress(transient=True, console=Console(stderr=True, quiet=not is_first_process())) as bar:
        line = bar.add_task(f"Making {name}", total=None)
        return prepare(
            name, profile, seed=options.seed, source=source, workers=options.workers,
            progress=lambda done, total: bar.update(line, completed=done, total=total),
        )  # fmt: skip
