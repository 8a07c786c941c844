"""Models as programs of torch.export: right for any length, and read without Statewise."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from statewise.interop.export import (
    ExportError,
    _check,
    _folder,
    _graphs,
    _portable,
    _pt2,
    start_state,
    to_torch_export,
)
from statewise.ops import use_backend

from .conftest import LENGTHS, build, greedy, tokens

GRAPHS = ("extend", "step")


@pytest.fixture(scope="module")
def folder(mixed, traced, tmp_path_factory):
    out = tmp_path_factory.mktemp("programs") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_pt2, "build", traced)
        errors = to_torch_export(mixed, out, graphs=GRAPHS)
    assert set(errors) == set(GRAPHS)
    assert max(errors.values()) <= 1e-4
    return out


def test_every_length(mixed, folder):
    run = _pt2.runner(folder, ["extend"])
    for length in LENGTHS:
        x, start = tokens(2, length), start_state(mixed, 2)
        logits, _ = run("extend", x, _graphs.flat(start))
        assert _check.relative_error(logits, mixed(x)) <= 1e-4


def test_a_process_without_statewise_continues_a_text(mixed, folder):
    prompt, count = tokens(1, 37), 12
    script = f"""
        import json, sys, torch
        about = json.load(open("export.json"))
        extend, step = (torch.export.load(f"{{kind}}.pt2").module() for kind in ("extend", "step"))
        sizes = {{"batch": 1, "cache": 1}}
        state = {{
            port["name"]: torch.zeros([sizes.get(s, s) for s in port["shape"]], dtype=getattr(torch, port["dtype"]))
            for port in about["graphs"]["extend"]["inputs"][1:]
        }}
        logits, state = extend(torch.tensor({prompt.tolist()}), state)
        made = [int(logits[0, -1].argmax())]
        while len(made) < {count}:
            logits, state = step(torch.tensor(made[-1:]), state)
            made.append(int(logits[0].argmax()))
        assert "statewise" not in sys.modules
        print(json.dumps(made))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == greedy(mixed, prompt, count)


def test_the_description(mixed, folder):
    about = json.loads((folder / "export.json").read_text())
    assert about["format"] == "torch-export"
    assert about["config"].items() >= mixed.config.items()
    ports = {p["name"]: p for p in about["graphs"]["extend"]["inputs"]}
    assert ports["tokens"] == {"name": "tokens", "dtype": "int64", "shape": ["batch", "length"]}
    assert ports["layers.0"]["shape"] == ["batch", 16, 4, 2]  # complex: pairs
    assert ports["layers.1.k"]["shape"] == ["batch", "cache", 1, 8]
    new = {p["name"]: p["shape"] for p in about["graphs"]["extend"]["outputs"]}
    assert sorted(new["layers.1.k"][1].split(" + ")) == ["cache", "length"]
    for file in folder.glob("*.pt2"):
        assert str(_folder.__file__).encode() not in file.read_bytes()


def test_kernels_and_a_capacity(tmp_path):
    model = build("mamba2", "attention", tie_embeddings=False).to(torch.bfloat16)
    errors = to_torch_export(model, tmp_path, graphs=["extend"], form="kernels", capacity=50)
    assert max(errors.values()) <= 1e-4
    about = json.loads((tmp_path / "export.json").read_text())
    assert {p["name"]: p["shape"] for p in about["graphs"]["extend"]["inputs"]}["layers.1.k"] == ["batch", 50, 1, 8]
    program = torch.export.load(tmp_path / "extend.pt2")
    assert any("statewise.ssd" in str(n.target) for n in program.graph.nodes)


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def test_nothing_is_replaced_unless_asked(tmp_path):
    model, out = build("mamba"), tmp_path / "out"
    to_torch_export(model, out, graphs=["step"], form="kernels", check=False)
    before = (out / "step.pt2").read_bytes()
    with pytest.raises(FileExistsError, match="--force"):
        to_torch_export(model, out, graphs=["step"], form="kernels", check=False)
    assert (out / "step.pt2").read_bytes() == before
    (out / "notes.txt").write_text("mine")
    assert to_torch_export(model, out, graphs=["step"], form="kernels", check=False, force=True) == {}
    assert (out / "notes.txt").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_wrong_program_is_found_and_not_left_behind(tmp_path, monkeypatch):
    right = _portable.rms_norm
    monkeypatch.setattr(_portable, "rms_norm", lambda x, z, w, eps, groups: right(x, z, w, eps, groups) * 1.001)
    with pytest.raises(ExportError, match=r"forward: .*; nothing was written"):
        to_torch_export(build("mamba2"), tmp_path / "out", graphs=["forward"])
    assert not list(tmp_path.iterdir())


def test_an_operator_without_a_plain_form_is_named(tmp_path, monkeypatch):
    table = _portable.table()
    table = {op: form for op, form in table.items() if "rms_norm" not in str(op)}
    monkeypatch.setattr(_portable, "table", lambda: table)
    with pytest.raises(NotImplementedError, match=r"statewise\.rms_norm.*form='kernels'"):
        to_torch_export(build("mamba"), tmp_path / "out", graphs=["forward"])


def test_what_cannot_be_asked(tmp_path):
    model = build("mamba")
    for kwargs, message in [
        ({"graphs": ["backward"]}, "unknown graph 'backward'"),
        ({"graphs": []}, "want at least one of forward"),
        ({"capacity": 0}, "capacity: want at least 1"),
        ({"form": "fast"}, "form: want 'portable' or 'kernels'"),
    ]:
        with pytest.raises(ValueError, match=message):
            to_torch_export(model, tmp_path / "out", **kwargs)
    with pytest.raises(TypeError, match="want a causal language model, got Linear"):
        to_torch_export(nn.Linear(2, 2), tmp_path / "out")
    with use_backend("reference"), pytest.raises(ValueError, match="automatic choice"):
        to_torch_export(model, tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="want a folder"):
        to_torch_export(model, tmp_path / "file", force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_check_sees_shapes_infinities_and_integers():
    one = torch.ones(3)
    assert _check.relative_error(one, one) == 0
    assert _check.relative_error(one[:2], one) == float("inf")
    assert _check.relative_error(one * float("nan"), one) == float("inf")
    assert _check._leaf(torch.tensor([1, 2]), torch.tensor([1, 3])) == float("inf")
    with pytest.raises(ExportError, match="step"):
        _check.demand({"forward": 0.0, "step": float("nan")}, 1e-4, "out")


@pytest.mark.slow
def test_the_other_layers(tmp_path):
    model = build("mamba", "mamba2", "window")
    assert max(to_torch_export(model, tmp_path, graphs=["forward", "step"]).values()) <= 1e-4
