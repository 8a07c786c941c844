import math

import pytest
import torch
from torch import nn

from statewise import mixers
from statewise.models.language.stack import LanguageModel
from statewise.training.groups import FLOOR, adamw, parameter_groups, warmup_cosine


class Dynamic(nn.Module):
    dynamics = frozenset({"A", "dt_proj"})

    def __init__(self):
        super().__init__()
        self.A = nn.Parameter(torch.ones(4, 4))
        self.dt_proj = nn.Linear(4, 4)
        self.proj = nn.Linear(4, 4)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(Dynamic(), nn.LayerNorm(4))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def _names(model, **options):
    names = {p: n for n, p in model.named_parameters()}
    return {g["name"]: {names[p] for p in g["params"]} for g in parameter_groups(model, lr=1.0, **options)}


def test_groups():
    assert _names(Model()) == {
        "weights": {"inner.0.proj.weight"},
        "vectors": {"inner.0.proj.bias", "inner.1.weight", "inner.1.bias"},
        "dynamics": {"inner.0.A", "inner.0.dt_proj.weight", "inner.0.dt_proj.bias"},
    }


def test_decay_and_rates():
    groups = {g["name"]: g for g in parameter_groups(Model(), lr=2.0, weight_decay=0.3, dynamics_lr=0.5)}
    assert [(g["lr"], g["weight_decay"]) for g in groups.values()] == [(2.0, 0.3), (2.0, 0.0), (1.0, 0.0)]


@pytest.mark.parametrize("name", ["mamba", "mamba2", "s4d", "s5"])
def test_what_each_mixer_declares_exists_and_does_not_decay(name):
    declared = mixers.mixer_class(name).dynamics
    assert declared
    model = LanguageModel(16, 64, 1, mixer=name)
    own = {n.split("mixer.", 1)[1] for n in _names(model)["dynamics"]}
    # A name may stand for something that this set of options keeps as a constant.
    constants = {n for n, _ in model.layers[0].mixer.named_buffers()}
    assert own | constants >= declared
    assert own
    every = {n for names in _names(model).values() for n in names}
    assert every == {n for n, _ in model.named_parameters()}


def test_named_parameters_have_settings_of_their_own():
    groups = {"A": {"lr": 0.1}, "dt_proj": {"lr": 3.0, "weight_decay": 0.2}}
    made = parameter_groups(Model(), lr=2.0, weight_decay=0.3, dynamics_lr=0.5, groups=groups)
    groups = {g["name"]: (g["lr"], g["weight_decay"], len(g["params"])) for g in made}
    assert groups == {
        "weights": (2.0, 0.3, 1),
        "vectors": (2.0, 0.0, 3),
        "dynamics: A": (pytest.approx(0.2), 0.0, 1),
        "dynamics: dt_proj": (6.0, 0.2, 2),
    }
    with pytest.raises(ValueError, match="groups: no parameter that is trained is called 'log_dt'"):
        parameter_groups(Model(), lr=1.0, groups={"log_dt": {"lr": 1.0}})


def test_schedule():
    values = [warmup_cosine(s, steps=100, warmup=10) for s in range(101)]
    assert values[0] == pytest.approx(0.1)
    assert max(values) == values[10] == pytest.approx(1)
    assert values[55] == pytest.approx(FLOOR + (1 - FLOOR) / 2)
    assert values[100] == pytest.approx(FLOOR)
    assert values[10:] == sorted(values[10:], reverse=True)
    assert warmup_cosine(0, steps=5, warmup=0) == 1
    assert warmup_cosine(5, steps=5, warmup=0, floor=0.0) == pytest.approx(0)
    assert {warmup_cosine(s, steps=5, warmup=2, floor=1.0) for s in range(2, 6)} == {1.0}  # constant after warm-up


def test_adamw_applies_both():
    model = nn.Linear(2, 2)
    made = adamw(steps=10, lr=0.5, weight_decay=0.1, warmup=4)(model)
    assert {g["name"]: g["weight_decay"] for g in made["optimizer"].param_groups} == {"weights": 0.1, "vectors": 0.0}
    assert all(math.isclose(g["lr"], 0.5 / 4) for g in made["optimizer"].param_groups)
