"""What is compared with what, and where each run of a comparison has its directory."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from ..._files import write_atomically
from ...training.directory import read_config

TUNING_SEED = 1000  # far from the seeds that people choose, so that no reported run was tuned on
SPEED_MINUTES = 0.25  # of training, to learn how long a step takes
_NO_LR = 1e-12
# What every model gets alike, whatever a recipe takes as the best for it.
BUDGET = ("steps", "batch_size", "eval_every", "checkpoint_every", "log_every", "precision")
CLOSE = 0.05  # parameter counts that differ by less count as equal
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


# ---- the words after --models, --seeds and --lrs -------------------------------------------------------------------


def _pieces(text: str) -> list[str]:
    """Split at commas that stand outside brackets."""
    pieces, depth = [""], 0
    for c in text:
        depth += (c in "[{") - (c in "]}")
        if c == "," and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += c
    return [p.strip() for p in pieces if p.strip()]


def _label(spec: Any) -> str:
    """A name for a model that was given without one: "mamba2-mamba2-attention", "mamba2-d_state16"."""
    entries = spec if isinstance(spec, list) else [spec]
    words = []
    for entry in entries:
        if isinstance(entry, Mapping):
            words += [str(entry.get("name", "model")), *(f"{k}{v}" for k, v in entry.items() if k != "name")]
        else:
            words.append(str(entry))
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", "-".join(words)).strip("-.+_") or "model"


def parse_models(text: str) -> dict[str, Any]:
    """Label -> what a recipe takes as `model`.

    Entries have commas between them. An entry is a word; a hybrid in brackets, [mamba2,mamba2,attention]; or a mixer
    with options in braces, {name: mamba2, d_state: 16}. `label=` in front names it in tables and directories.

    Raises:
        ValueError: no entry, an entry that is not valid YAML, a label that cannot be a directory, or one used twice.
    """
    found: dict[str, Any] = {}
    for piece in _pieces(text):
        label, equals, rest = piece.partition("=")
        if not equals or not re.fullmatch(r"[\w.+-]+", label.strip()):
            label, rest = "", piece
        spec: Any = rest.strip()
        if spec[:1] in ("[", "{"):
            try:
                spec = yaml.safe_load(spec)
            except yaml.YAMLError as error:
                raise ValueError(f"--models: cannot read {rest!r}: {' '.join(str(error).split())}") from error
        elif not spec:
            raise ValueError(f"--models: {piece!r} names no model")
        label = label.strip() or _label(spec)
        if not _LABEL.fullmatch(label):
            raise ValueError(f"--models: want a label of letters, digits and . _ + -, got {label!r}")
        if label in found:
            raise ValueError(f"--models: {label} is there twice; give one a name of its own: other={rest.strip()}")
        found[label] = spec
    if not found:
        raise ValueError("--models: want names with commas between, e.g. s4d,mamba2,attention")
    return found


def parse_seeds(text: str) -> tuple[int, ...]:
    """ "3" means the seeds 0, 1 and 2; "0,7" (or "7,") just these."""
    try:
        seeds = tuple(int(p) for p in _pieces(text))
    except ValueError:
        seeds = ()
    if "," not in text and len(seeds) == 1:
        seeds = tuple(range(seeds[0]))
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds: want a number of seeds, or different seeds with commas between; got {text!r}")
    return seeds


def parse_rates(text: str) -> tuple[float, ...]:
    """Learning rates in ascending order."""
    try:
        rates = tuple(sorted(float(p) for p in _pieces(text)))
    except ValueError:
        rates = ()
    if not rates or not all(0 < r < float("inf") for r in rates) or len(set(rates)) < len(rates):
        raise ValueError(f"--lrs: want different positive numbers with commas between, got {text!r}")
    return rates


# ---- the plan ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One run: `kind` is "speed", "tuning" or "final"; `config` is its config.yaml, recipe included."""

    kind: str
    model: str
    seed: int
    lr: float
    path: Path
    config: Mapping[str, Any]

    @property
    def name(self) -> str:
        """For people."""
        told = {"speed": "speed", "tuning": f"lr {self.lr:g}", "final": f"seed {self.seed}"}
        return f"{self.model}, {told[self.kind]}"


@dataclass(frozen=True)
class Plan:
    """A comparison, as compare.yaml has it.

    Args:
        recipe: name of the recipe.
        models: label -> `model` of the recipe.
        seeds: one run for each model and seed.
        given: options of the recipe as they were typed, the same for all models.
        options: label -> every option of the recipe but model and seed, flat as in config.yaml. Recipes may have
            defaults that depend on the model; the budget is that of the first model for all, see `equal_budget`.
        lrs: learning rates tried for each model on `tuning_seed`; empty means the one in `options`, untuned.
        minutes: training time of a run, by which the number of steps is chosen; None means the steps in `options`.
        match: "parameters" if widths are chosen so that all models have as many as the first; or None.
    """

    recipe: str
    models: Mapping[str, Any]
    seeds: tuple[int, ...]
    given: tuple[str, ...]
    options: Mapping[str, Mapping[str, Any]]
    lrs: tuple[float, ...] = ()
    tuning_seed: int = TUNING_SEED
    minutes: float | None = None
    match: str | None = None

    def __post_init__(self) -> None:
        if self.lrs and self.tuning_seed in self.seeds:
            raise ValueError(
                f"--tuning-seed: {self.tuning_seed} is one of the seeds; a run that chose the learning rate "
                f"says too much in its favour, so want another"
            )
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"--minutes: want more than 0, got {self.minutes}")

    def config(self, model: str, seed: int, **changes: Any) -> dict[str, Any]:
        """config.yaml of a run."""
        config = {"recipe": self.recipe, **self.options[model], "model": self.models[model], "seed": seed, **changes}
        # A validation then stands right after the row of its own step, so that its time is known.
        return {**config, "log_every": math.gcd(config["log_every"], config["eval_every"])}

    def shared(self, name: str) -> Any:
        """An option that is the same for all models."""
        return next(iter(self.options.values()))[name]

    def differing(self) -> dict[str, dict[str, Any]]:
        """Options whose values depend on the model: name -> {label: value}."""
        names = dict.fromkeys(name for options in self.options.values() for name in options)
        found = {name: {label: o.get(name) for label, o in self.options.items()} for name in names}
        return {name: v for name, v in found.items() if any(x != next(iter(v.values())) for x in v.values())}

    # ---- directories -----------------------------------------------------------------------------------------------

    def final(self, out: Path, model: str, seed: int, lr: float, **changes: Any) -> Job:
        config = self.config(model, seed, lr=lr, **changes)
        return Job("final", model, seed, lr, out / "runs" / f"{model}-seed{seed}", config)

    def tuning(self, out: Path, model: str, **changes: Any) -> list[Job]:
        """The runs among which validation chooses the learning rate of a model."""
        seed = self.tuning_seed
        return [
            Job("tuning", model, seed, lr, out / "tuning" / f"{model}-lr{lr:g}",
                self.config(model, seed, lr=lr, **changes))
            for lr in self.lrs
        ]  # fmt: skip

    def speed(self, out: Path, model: str, **changes: Any) -> Job:
        """A short run for the time of a step. It has steps for ever and is ended by the clock, without validation.

        It learns next to nothing: the time of a step is the same at any learning rate, and so no rate is too high.
        """
        endless = {"steps": 10**9, "eval_every": 10**9, "checkpoint_every": 10**9, "log_every": 1, "lr": _NO_LR}
        if self.options[model].get("pretrain", "none") != "none":
            endless["pretrain_steps"] = 1
        config = self.config(model, self.tuning_seed, **changes, **endless, max_minutes=SPEED_MINUTES)
        return Job("speed", model, self.tuning_seed, _NO_LR, out / "speed" / model, config)

    # ---- the file --------------------------------------------------------------------------------------------------

    def write(self, path: Path) -> None:
        content = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        text = f"# A comparison. To go on with it: statewise compare --out {path.parent}\n"
        text += yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))

    @classmethod
    def read(cls, path: Path) -> Plan:
        """The plan of a comparison.

        Raises:
            ValueError: the file is not there, or not a plan.
        """
        if not path.is_file():
            raise ValueError(f"{path.parent} is not a comparison: it has no {path.name}")
        content = read_config(path)
        names = [f.name for f in fields(cls)]
        strange = [k for k in content if k not in names]
        if strange or not {"recipe", "models", "seeds", "given", "options"} <= set(content):
            raise ValueError(f"{path}: want recipe, models, seeds, given, options; got {', '.join(map(str, content))}")
        models, seeds, lrs = content["models"], content["seeds"], content.get("lrs") or []
        if not isinstance(models, dict) or not all(isinstance(m, str) and _LABEL.fullmatch(m) for m in models):
            raise ValueError(f"{path}: models: want a mapping of label: model")
        if not isinstance(seeds, list) or not all(isinstance(s, int) for s in seeds):
            raise ValueError(f"{path}: seeds: want a list of numbers, got {seeds!r}")
        if not isinstance(lrs, list) or not all(isinstance(r, (int, float)) for r in lrs):
            raise ValueError(f"{path}: lrs: want a list of numbers, got {lrs!r}")
        given, options = content["given"], content["options"]
        if not isinstance(given, list) or not all(isinstance(word, str) for word in given):
            raise ValueError(f"{path}: given: want a list of words, got {given!r}")
        if not isinstance(options, dict) or not all(set(BUDGET) < set(options.get(label) or ()) for label in models):
            raise ValueError(f"{path}: options: want all options of the recipe for each of {', '.join(models)}")
        return cls(**{**content, "seeds": tuple(seeds), "given": tuple(given), "lrs": tuple(map(float, lrs))})

    def extended(self, other: Plan, out: Path) -> Plan:
        """This plan with the models and seeds of `other` added; everything else must be the same.

        Raises:
            ValueError: naming the first difference.
        """
        for name in ("recipe", "lrs", "tuning_seed", "minutes", "match"):
            if (here := getattr(self, name)) != (asked := getattr(other, name)):
                raise ValueError(_another(out, name, here, asked))
        first = next(iter(self.models))
        together = equal_budget({**other.options, **self.options}, first, self.given)
        asked_for = equal_budget({**self.options, **other.options}, first, other.given)
        for label, spec in other.models.items():
            if self.models.get(label, spec) != spec:
                raise ValueError(_another(out, f"model {label}", self.models[label], spec))
            for name, here in self.options.get(label, {}).items():
                if here != (asked := asked_for[label].get(name)):
                    raise ValueError(_another(out, name, here, asked))
        if self.given != other.given and set(other.models) - set(self.models):
            # Options of a model that is not there yet cannot be compared one by one.
            raise ValueError(_another(out, "the options", " ".join(self.given), " ".join(other.given)))
        models = {**self.models, **other.models}
        seeds = (*self.seeds, *(s for s in other.seeds if s not in self.seeds))
        return replace(self, models=models, seeds=seeds, options={label: together[label] for label in models})


def equal_budget(
    options: Mapping[str, Mapping[str, Any]], first: str, given: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
    """Options of all models with the budget of the first; a warm-up keeps its share of the steps.

    Args:
        given: options as they were typed; a warm-up that is among them stays as it is.
    """
    budget = {name: options[first][name] for name in BUDGET}
    typed = any(word.partition("=")[0] == "--warmup" for word in given)

    def warmup(own: Mapping[str, Any]) -> int:
        return own["warmup"] if typed else round(own["warmup"] * budget["steps"] / own["steps"])

    return {label: {**own, **budget, "warmup": warmup(own)} for label, own in options.items()}


def _another(out: Path, name: str, here: Any, asked: Any) -> str:
    return f"{out} holds another comparison: {name} is {here!r} there, {asked!r} was asked for; want a new --out"
