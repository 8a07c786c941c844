"""ONNX graphs in ONNX Runtime: within 1e-4 of the model, for any length, with a state in and out."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from statewise.interop.export import _check, _folder, _graphs, _onnx, start_state, to_onnx

from .conftest import LENGTHS, build, greedy, tokens

LIMIT = 1e-4
GRAPHS = ("extend", "step")


@pytest.fixture(autouse=True, scope="module")
def _libraries():
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library, reason=f"{library} is not installed: pip install statewise[onnx]")


@pytest.fixture(scope="module")
def folder(mixed, traced, tmp_path_factory):
    out, said = tmp_path_factory.mktemp("onnx") / "out", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_onnx, "build", traced)
        errors = to_onnx(mixed, out, graphs=GRAPHS, say=said.append)
    assert set(errors) == set(GRAPHS)
    assert max(errors.values()) <= LIMIT
    assert said[0] == "tracing extend"
    assert said[-1] == "checking in ONNX Runtime"
    return out


def test_every_length(mixed, folder):
    run = _onnx.runner(folder, ["extend"])
    for length in (*LENGTHS, 700):
        x, start = tokens(2, length), start_state(mixed, 2)
        logits, _ = run("extend", x, _graphs.flat(start))
        assert _check.relative_error(logits, mixed(x)) <= LIMIT


def test_a_text_is_continued_from_the_files_alone(mixed, folder):
    import onnxruntime

    about = json.loads((folder / "export.json").read_text())
    extend, step = (onnxruntime.InferenceSession(folder / f"{kind}.onnx") for kind in ("extend", "step"))
    sizes = {"batch": 1, "cache": 1}
    state = {
        port["name"]: np.zeros([sizes.get(s, s) for s in port["shape"]], port["dtype"])
        for port in about["graphs"]["extend"]["inputs"][1:]
    }
    prompt, made, session = tokens(1, 37), [], extend
    given = prompt.numpy()
    for _ in range(12):
        names = [o.name for o in session.get_outputs()]
        results = dict(zip(names, session.run(None, {"tokens": given, **state})))
        logits = results.pop("logits").reshape(-1, mixed.vocab_size)
        state = {name.replace("new_state.", "state."): value for name, value in results.items()}
        made.append(int(logits[-1].argmax()))
        session, given = step, np.array(made[-1:])
    assert made == greedy(mixed, prompt, 12)


def test_what_the_files_say(mixed, folder):
    import onnx

    for kind in GRAPHS:
        file = folder / f"{kind}.onnx"
        onnx.checker.check_model(file)
        graph = onnx.load(file, load_external_data=False)
        properties = {p.key: p.value for p in graph.metadata_props}
        assert json.loads(properties["statewise.config"])["mixer"] == mixed.config["mixer"]
        assert properties["statewise.graph"] == kind
        (first,) = [i for i in graph.graph.input if i.name == "tokens"]
        named = [d.dim_param for d in first.type.tensor_type.shape.dim]
        assert named == (["batch"] if kind == "step" else ["batch", "length"])
        assert {n.domain for n in graph.graph.node} <= {""}  # operators of ONNX only
        assert str(_folder.__file__).encode() not in file.read_bytes()
        assert b"/site-packages/" not in file.read_bytes()


def test_graphs_share_their_weights(mixed, folder):
    data = (folder / _onnx.WEIGHTS).read_bytes()
    assert all((folder / f"{kind}.onnx").stat().st_size < 100_000 for kind in GRAPHS)
    weight = mixed.embedding.weight.detach().numpy().tobytes()
    assert data.count(weight) == 1
    assert weight not in b"".join((folder / f"{kind}.onnx").read_bytes() for kind in GRAPHS)


def test_a_missing_library_is_named_with_its_extra(monkeypatch, tmp_path):
    monkeypatch.setattr(_folder, "find_spec", lambda name: None if name == "onnxscript" else True)
    with pytest.raises(ImportError, match=r"onnxscript is not installed: pip install statewise\[onnx\]"):
        to_onnx(build("mamba"), tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("layers", [["s5"], ["mamba2", "attention"], ["mamba", "s4d"]], ids="-".join)
def test_the_other_layers(layers, tmp_path):
    model = build(*layers, d_intermediate=16, tie_embeddings=False).to(torch.bfloat16)
    assert max(to_onnx(model, tmp_path, graphs=["forward", "step"]).values()) <= LIMIT


@pytest.mark.slow
def test_a_capacity(tmp_path):
    assert max(to_onnx(build("attention"), tmp_path, graphs=["extend"], capacity=60).values()) <= LIMIT
