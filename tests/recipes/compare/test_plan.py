from dataclasses import replace
from pathlib import Path

import pytest

from statewise.recipes.compare.plan import Plan, equal_budget, parse_models, parse_rates, parse_seeds

OPTIONS = {
    "steps": 100,
    "batch_size": 8,
    "lr": 1e-2,
    "warmup": 10,
    "eval_every": 20,
    "checkpoint_every": 20,
    "log_every": 1,
    "precision": "32",
}
OUT = Path("there")


def plan(**changes):
    models = {"a": "s4d", "b": "mamba2"}
    return Plan("probes.mqar", models, (0, 1), (), {label: dict(OPTIONS) for label in models}, **changes)


def test_models_are_words_lists_or_mappings_with_a_label_or_without():
    found = parse_models("s4d, [mamba2,mamba2,attention], wide={name: mamba2, d_state: 128},{name: s5, d_state: 8}")
    assert found == {
        "s4d": "s4d",
        "mamba2-mamba2-attention": ["mamba2", "mamba2", "attention"],
        "wide": {"name": "mamba2", "d_state": 128},
        "s5-d_state8": {"name": "s5", "d_state": 8},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "want names with commas between"),
        ("s4d,s4d", "s4d is there twice"),
        ("a=", "names no model"),
        ("{name: s4d", "cannot read"),
        (".hidden=s4d", "want a label"),
    ],
)
def test_wrong_models(text, message):
    with pytest.raises(ValueError, match=message):
        parse_models(text)


def test_no_label_leaves_the_directory():
    labels = parse_models("../x,a/b,[../../y],{name: ../z}")
    assert all("/" not in label and not label.startswith(".") for label in labels)


def test_seeds_and_rates():
    assert parse_seeds("3") == (0, 1, 2)
    assert parse_seeds("4,0") == (4, 0)
    assert parse_seeds("7,") == (7,)
    assert parse_rates("1e-2,1e-3") == (1e-3, 1e-2)
    for wrong in ("0", "x", "1,1", "-1,2", ""):
        with pytest.raises(ValueError, match="--seeds"):
            parse_seeds(wrong)
    for wrong in ("0", "1,1", "-1", "x", "nan", "inf", ""):
        with pytest.raises(ValueError, match="--lrs"):
            parse_rates(wrong)


def test_the_file_holds_the_plan(tmp_path):
    made = plan(lrs=(1e-3, 1e-2), minutes=2.5, match="parameters")
    made.write(tmp_path / "compare.yaml")
    assert Plan.read(tmp_path / "compare.yaml") == made


@pytest.mark.parametrize(
    "content",
    [
        "a: 1",
        "[]",
        "recipe: r\nmodels: {../x: s4d}\nseeds: [0]\ngiven: []\noptions: {}",
        "recipe: r\nmodels: {a: s4d}\nseeds: [x]\ngiven: []\noptions: {}",
        "recipe: r\nmodels: {a: s4d}\nseeds: [0]\ngiven: []\noptions: {a: {lr: 1}}",
        "recipe: r\nmodels: {a: s4d}\nseeds: [0]\ngiven: [[]]\noptions: {}",
    ],
)
def test_damaged_files_are_refused(tmp_path, content):
    path = tmp_path / "compare.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"compare\.yaml"):
        Plan.read(path)


def test_models_and_seeds_can_be_added_and_nothing_else_changed():
    mine, more = plan(), plan()
    more = replace(
        more, seeds=(1, 5), models={"a": "s4d", "c": "s5"}, options={"a": dict(OPTIONS), "c": {**OPTIONS, "lr": 1e-3}}
    )
    grown = mine.extended(more, OUT)
    assert grown.seeds == (0, 1, 5)
    assert grown.models == {"a": "s4d", "b": "mamba2", "c": "s5"}
    assert grown.options["c"]["lr"] == 1e-3
    wrong = [
        (plan(lrs=(1e-3,)), "lrs is"),
        (plan(minutes=1.0), "minutes is"),
        (replace(plan(), models={"a": "s5"}), "model a is 's4d' there, 's5' was asked for"),
        (replace(plan(), options={k: {**OPTIONS, "lr": 1.0} for k in "ab"}), r"lr is 0\.01 there, 1\.0 was asked for"),
        (replace(plan(), options={k: {**OPTIONS, "steps": 1} for k in "ab"}), "steps is 100 there"),
    ]
    for other, message in wrong:
        with pytest.raises(ValueError, match=message):
            mine.extended(other, OUT)


def test_the_budget_is_that_of_the_first_model():
    own = {"a": dict(OPTIONS), "b": {**OPTIONS, "steps": 1000, "batch_size": 2, "warmup": 300, "lr": 0.5}}
    same = equal_budget(own, "a")
    assert same["a"] == OPTIONS
    assert same["b"] == {**OPTIONS, "warmup": 30, "lr": 0.5}
    assert equal_budget(own, "a", ("--warmup=300",))["b"] == {**OPTIONS, "warmup": 300, "lr": 0.5}


def test_a_run_logs_the_step_before_each_validation():
    made = replace(plan(), options={k: {**OPTIONS, "log_every": 10, "eval_every": 25} for k in "ab"})
    assert made.final(OUT, "a", 0, 1e-2).config["log_every"] == 5


def test_no_reported_seed_is_tuned_on():
    with pytest.raises(ValueError, match="--tuning-seed"):
        plan(lrs=(1e-3,), tuning_seed=1)
    assert all(job.seed not in (0, 1) for job in plan(lrs=(1e-3, 1e-2)).tuning(OUT, "a"))
