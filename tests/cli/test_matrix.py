"""`statewise matrix`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from statewise.cli import main
from statewise.cli.looking import _ids, look_at
from statewise.data.labelled import Labelled, Ragged, Split
from statewise.models.classification import SequenceClassifier
from statewise.models.language import LanguageModel
from statewise.training.directory import RunDirectory

MIXER = '{"name": "mamba2", "d_state": 4, "head_dim": 8}'
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    parts = [{"name": "mamba2", "d_state": 4, "head_dim": 8}, {"name": "attention", "n_heads": 2}]
    LanguageModel(256, 16, 2, mixer=parts).save_pretrained("model")
    SequenceClassifier(3, 8, 2, vocab_size=11, mixer={"name": "bidirectional_s4d", "d_state": 4}).save_pretrained(
        "labels"
    )
    SequenceClassifier(3, 8, 1, channels=2, mixer={"name": "s4", "d_state": 4}).save_pretrained("values")
    LanguageModel(50, 16, 1, mixer=parts[0]).save_pretrained("other")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model"], ["Mamba2, layer 0 of 2", "mean lag", "4 of 4 heads, 20 tokens of a sample text"]),
        (
            ["model", "--layer", "1", "--head", "1", "--text", "to be, or"],
            ["Attention, layer 1 of 2", "1 of 2 heads, 9"],
        ),
        (["model", "--documents", "8,5"], ["effective rank"]),
        (["model", "--what", "memory"], ["LanguageModel, 2 layers", "50%", "99%"]),
        (["model", "--what", "memory", "--layer", "1", "--documents", "8"], ["Attention, layer 1"]),
        (["model", "--what", "state"], ["layers.0.conv", "layers.1.k", "20 tokens"]),
        (["model", "--what", "influence", "--tokens", "1,2,3,255"], ["lies within so many tokens"]),
        (["model", "--what", "spectrum", "--layer", "1"], ["normaliser quotients over 20 tokens of a sample text, "]),
        (["other"], ["Mamba2, layer 0 of 1"]),
        # Classifiers: their layers see what they see in the model, and the whole is looked at up to its pooling.
        (["labels"], ["BidirectionalS4D, layer 0 of 2", "6 of 8 heads, 20 tokens"]),
        (["labels", "--what", "memory"], ["SequenceClassifier, 2 layers", "looks ahead as well"]),
        (["labels", "--what", "influence", "--tokens", "1,2,3,4"], ["SequenceClassifier, 2 layers"]),
        (["values", "--what", "memory"], ["SequenceClassifier, 1 layer", "99%"]),
        (["values", "--what", "spectrum"], ["S4, layer 0 of 1", "time-invariant, 32 values, 0.0 % above one"]),
        (["labels", "--what", "spectrum"], ["BidirectionalS4D, layer 0 of 2", "time-invariant, 16 values"]),
        (["values", "--what", "transfer"], ["gain at 0"]),
        (["values", "--what", "state"], ["S4, layer 0 of 1", "20 tokens"]),
        ([MIXER, "--d-model", "8", "--what", "spectrum"], ["input-dependent", "forgets to 1/e"]),
        (["s4d", "--what", "impulse"], ["half of the energy", "energies in tokens"]),
        (["s5", "--what", "transfer", "--d-model", "8"], ["gain at 0"]),
        (["bidirectional", "--what", "influence", "--d-model", "32"], ["looks ahead as well"]),
    ],
)
def test_views(saved, capsys, words, said):
    assert main(["matrix", *words, "--length", "20", "--out", "m.png"]) == 0
    out = capsys.readouterr().out
    for word in [*said, "wrote m.png"]:
        assert word in out
    assert (saved / "m.png").read_bytes()[:8] == PNG


def test_without_a_picture_there_is_the_table(saved, capsys):
    assert main(["matrix", "model", "--length", "8"]) == 0
    first = capsys.readouterr().out
    assert "wrote" not in first
    assert main(["matrix", "model", "--length", "8"]) == 0
    assert capsys.readouterr().out == first


@pytest.mark.parametrize(("kind", "width"), [("tokens", None), ("pairs", None), ("values", 2)])
def test_a_run_of_a_classifier_reads_a_row_of_its_data(tmp_path, monkeypatch, capsys, kind, width):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STATEWISE_DATA", str(tmp_path / "data"))
    rows = Ragged.of([np.arange(1, 11), np.arange(1, 4)])
    values = np.random.default_rng(0).normal(size=(2, 1100, 2))
    split = Split({"tokens": rows, "pairs": (rows, rows), "values": values}[kind], np.array([0, 1]))
    more = {"length": 1100} if width else {"length": 10, "vocab_size": 11}
    data = Labelled("toys", split, split, split, n_classes=2, **more)
    inputs = {"channels": width} if width else {"vocab_size": 11}
    SequenceClassifier(2, 8, 1, **inputs, mixer={"name": "s4d", "d_state": 4}).save_pretrained("run")
    run = RunDirectory("run")
    run.write_config("toys", {"profile": "small", "data": {"seed": 3}}, "A run")
    run.results.write_text('{"data": "toys"}')
    random = "random values" if width else "random tokens"
    assert main(["matrix", "run"]) == 0
    assert f"128 tokens of {random}" in capsys.readouterr().out  # the data has not been made here
    data.save(tmp_path / "data" / "toys-small-3")
    assert main(["matrix", "run"]) == 0
    row = "row 0 of the validation split of toys-small-3"
    assert (f"1024 tokens of {row} (1,100 long)" if width else f"10 tokens of {row}\n") in capsys.readouterr().out
    look = look_at("run", "memory", None, 4, None, None, None, 8, 0)
    want = values[:1, :4].astype(np.float32) if width else [[1, 2, 3, 4]]
    assert look.x.tolist() == torch.as_tensor(want).tolist()
    assert look.read == f"4 tokens of {row} ({1100 if width else 10:,} long)"
    if not width:
        assert main(["matrix", "run", "--tokens", "1,2,3"]) == 0
        assert "3 tokens\n" in capsys.readouterr().out


def test_random_tokens_of_classifiers_have_no_padding():
    assert _ids(None, 3, 200, first=1).unique().tolist() == [1, 2]
    assert _ids(None, 3, 200).unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mambo"], "unknown model 'mambo'; did you mean"),
        (["some/where"], "there is no run directory some/where"),
        (["falcon-mamba-7b"], "falcon-mamba-7b has 7.3 B parameters"),
        (["{"], "MODEL: is not JSON"),
        (['{"d_state": 3}'], "MODEL: want a 'name' of a mixer"),
        (['{"name": "s4d", "d_sate": 3}'], "did you mean 'd_state'"),
        (["model", "--layer", "2"], "--layer: model has mixers 0 to 1, got 2"),
        (["model", "--head", "4"], "heads: want 0 to 3, got 4"),
        (["model", "--head", "a"], "--head: want whole numbers with commas between, got 'a'"),
        (["model", "--length", "1"], "--length: want at least 2 tokens, got 1"),
        (["model", "--text", "x"], "--text: want at least 2 tokens, got 1"),
        (["model", "--tokens", "1,256"], "--tokens: want 0 to 255, got 256"),
        (["model", "--tokens", "1,2", "--text", "xy"], "want either a text or tokens, got both"),
        (["other", "--text", "hello"], "or a tokenizer.json beside it; got 50 tokens"),
        (["model", "--documents", "100,100"], "--documents: want lengths of at least 1 with a sum of at most 128"),
        (["values", "--tokens", "1,2"], "--tokens: values does not read tokens"),
        (["labels", "--tokens", "1,11"], "--tokens: want 0 to 10, got 11"),
        (["labels", "--text", "hello"], "--text: labels does not read text"),
        (["model", "--documents", "10", "--what", "memory"], "give one with --layer to see its memory"),
        (["s4d", "--text", "hello"], "--text: s4d does not read text"),
        (["bidirectional"], "Bidirectional is not one matrix times one value; --what influence shows it by gradients"),
        (
            ["model", "--what", "impulse"],
            "Mamba2, layer 0 of 2 has no response that is the same for all inputs; --what matrix shows one input",
        ),
        (["lstm", "--what", "transfer"], "the same for all inputs; --what influence shows one input"),
        (["bidirectional_s4d", "--what", "impulse"], "BidirectionalS4D looks ahead, which a response to one input"),
        (["bidirectional", "--what", "state"], "looks ahead, so it has no state; --what influence"),
        (
            ["bidirectional", "--what", "spectrum"],
            "want a causal mixer, which has a state, got Bidirectional; its parts may have; --what memory works",
        ),
        (["liquid_s4", "--what", "spectrum"], "--what memory works for all; or a smaller --d-model"),
        (["model", "--what", "memory", "--head", "1"], "--head: outputs are looked at as a whole"),
        (["model", "--what", "art"], "--what: want matrix|influence|impulse|transfer|spectrum|memory|state, got 'art'"),
        (["model", "--out", "m.jpg"], "--out: want a file name that ends in .png, got m.jpg"),
        (["model", "--out", "no/m.png"], "--out: there is no directory no"),
    ],
)
def test_mistakes_get_one_line(saved, capsys, words, message):
    assert main(["matrix", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
