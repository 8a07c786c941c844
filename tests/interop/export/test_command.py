"""`statewise export`."""

from __future__ import annotations

import pytest

from statewise.cli import main

from .conftest import build


@pytest.fixture
def saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build("mamba2").save_pretrained("model")
    return tmp_path


def test_torch_export(saved, capsys):
    words = ["export", "model", "--format", "torch-export", "--out", "out", "--graphs", "step", "--form", "kernels"]
    assert main(words) == 0
    said = capsys.readouterr()
    assert "step: relative error" in said.out
    assert "wrote out" in said.out
    assert "tracing step ..." in said.err
    assert main(words) == 2
    assert "out exists" in capsys.readouterr().err
    assert main([*words, "--force", "--no-check"]) == 0
    assert "not checked" in capsys.readouterr().out


def test_gguf(saved, capsys):
    pytest.importorskip("gguf", reason="gguf is not installed: pip install statewise[gguf]")
    words = ["export", "model", "--format", "gguf", "--out", "model.gguf", "--dtype", "f16", "--no-check"]
    assert main(words) == 0
    assert (saved / "model.gguf").read_bytes()[:4] == b"GGUF"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model", "--out", "out"], "--format is missing"),
        (["model", "--format", "onnx"], "--out is missing"),
        (["model", "--format", "tflite", "--out", "out"], "got 'tflite'"),
        (["model", "--format", "torch-export", "--out", "out", "--dtype", "f16"], "--dtype: is an option of gguf"),
        (["model", "--format", "gguf", "--out", "out", "--capacity", "9"], "--capacity: is an option of onnx"),
        (["model", "--format", "torch-export", "--out", "out", "--graphs", "back"], "unknown graph 'back'"),
        (["nowhere", "--format", "onnx", "--out", "out"], "no such directory"),
    ],
)
def test_mistakes(saved, capsys, words, message):
    assert main(["export", *words]) == 2
    assert message in capsys.readouterr().err
    assert not (saved / "out").exists()
