"""`generate` with all its options, `--state`, and `states`, on a small byte model."""

import re

import pytest
import torch

from statewise.cli import main
from statewise.models.language import LanguageModel

PROMPT = "abc abc abc abc "


def _save(path, seed=0, vocab=256):
    torch.manual_seed(seed)
    model = LanguageModel(vocab, 16, 1, mixer={"name": "mamba2", "head_dim": 16, "d_state": 8}, tie_embeddings=False)
    with torch.no_grad():
        model.embedding.weight.mul_(40)
    model.save_pretrained(path)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _save("model")
    return tmp_path


@pytest.fixture
def run(capsys):
    def _run(*arguments):
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return _run


@pytest.fixture
def fail(capsys):
    def _fail(*arguments):
        capsys.readouterr()
        assert main([str(a) for a in arguments]) == 2
        err = capsys.readouterr().err
        assert err.startswith("statewise: error: ")
        assert err.count("\n") == 1
        return err

    return _fail


def _generate(run, *more):
    return run("generate", "model", "--seed", "1", "--tokens", "12", *more)


# ---- generate ----------------------------------------------------------------------------------------------------


def test_several_prompts_are_what_each_is_alone(here, run):
    (here / "p.txt").write_text("line one\nline two\n")
    out = run("generate", "model", "--tokens", 8, "--temperature", 0, "--prompt", "one", "--prompt=two",
              "--prompts-file", "p.txt")  # fmt: skip
    parts = re.split(r"--- \d\n", out)[1:]
    assert len(parts) == 4
    for prompt, part in zip(["one", "two", "line one", "line two"], parts):
        assert run("generate", "model", "--tokens", 8, "--temperature", 0, "--prompt", prompt) == part


def test_streaming_or_not_is_the_same_text(run, here):
    assert _generate(run, "--prompt", PROMPT) == _generate(run, "--prompt", PROMPT, "--stream", "false")


def test_stop_strings_end_the_text_with_them(run, here):
    text = _generate(run, "--prompt", "a", "--top-k", 20)
    letter = text[6]
    out = _generate(run, "--prompt", "a", "--top-k", 20, "--stop", "never seen", "--stop", letter)
    assert out == text[: text.index(letter, 1) + 1] + "\n"
    assert _generate(run, "--prompt", "a", "--top-k", 20, "--stop", "never seen") == text


def test_drafts_do_not_change_the_text(run, here):
    _save("small", seed=5)
    plain = run("generate", "model", "--tokens", 30, "--temperature", 0, "--prompt", PROMPT)
    for draft in (["--ngram", 2], ["--ngram", 2, "--guesses", 3], ["--draft", "small"], ["--draft", "model"]):
        assert run("generate", "model", "--tokens", 30, "--temperature", 0, "--prompt", PROMPT, *draft) == plain


def test_a_file_keeps_one_text(run, here, fail):
    whole = run("generate", "model", "--tokens", 12, "--temperature", 0, "--prompt", PROMPT)
    options = ["--tokens", 6, "--temperature", 0, "--state", "chat.safetensors"]
    first = run("generate", "model", "--prompt", PROMPT, *options)
    second = run("generate", "model", *options)
    assert first[:-1] + second == whole
    third = run("generate", "model", "--prompt", "more", *options)
    assert third == run("generate", "model", "--prompt", whole[:-1] + "more", *options[:-2])[len(whole) - 1 :]
    _save("other", seed=1)
    assert "is a state of another model" in fail("generate", "other", *options)
    (here / "chat.safetensors").write_bytes((here / "chat.safetensors").read_bytes()[:-9])
    assert "cut short" in fail("generate", "model", *options)
    assert "no such" not in fail("generate", "model", "--state", "new.safetensors")


def test_a_directory_keeps_beginnings(run, here):
    options = ["--tokens", 6, "--temperature", 0, "--state", "states", "--checkpoint-every", 5]
    plain = run("generate", "model", "--prompt", PROMPT, *options[:4])
    assert run("generate", "model", "--prompt", PROMPT, *options) == plain
    listed = run("states", "list", "states")
    assert [int(n) for n in re.findall(r"^[0-9a-f]{12} +(\d+)", listed, re.M)] == [5, 10, 15, 16, 22]
    assert "5 states" in listed
    assert "language, " in listed
    assert run("generate", "model", "--prompt", PROMPT, *options) == plain
    assert run("states", "list", "states").count("\n") == listed.count("\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "--prompt: want at least one character"),
        (["--prompts-file", "none.txt"], "none.txt"),
        (["--prompts-file", "gap.txt"], "--prompts-file: want a text on each line"),
        (["--temperature", "-1"], "temperature: want at least 0, got -1.0"),
        (["--top-p", "0"], "--top-p: want more than 0 and at most 1, got 0.0"),
        (["--min-p", "2"], "--min-p: want 0 to 1, got 2.0"),
        (["--repetition-penalty", "0"], "--repetition-penalty: want more than 0"),
        (["--tokens", "-1"], "max_tokens: want at least 0"),
        (["--stop", ""], "stop: want strings of at least one character"),
        (["--chunk", "0"], "chunk: want at least 1, got 0"),
        (["--ngram", "-1"], "--ngram: want at least 0, got -1"),
        (["--ngram", "2", "--guesses", "0"], "--guesses: want at least 1, got 0"),
        (["--draft", "model", "--ngram", "2"], "--draft: want either"),
        (["--draft", "words"], "draft: want a model with the same vocabulary of 256 tokens, got 300"),
        (["--state", "s.safetensors", "--prompt", "a", "--prompt", "b"], "a file holds one text, got 2 prompts"),
        (["--state", "s.safetensors"], "--prompt: want a text to begin s.safetensors with"),
        (["--state", "states"], "--prompt: want the whole text"),
        (["--state", "gap.txt", "--prompt", "a"], "want a directory of states, got a file"),
        (["--checkpoint-every", "3"], "--checkpoint-every: wants --state with a directory"),
        (["--state", "states", "--prompt", "a", "--checkpoint-every", "0"], "every: want at least 1"),
    ],
)
def test_mistakes_are_named(here, fail, arguments, message):
    (here / "gap.txt").write_text("a\n\nb\n")
    _save("words", vocab=300)
    assert message in fail("generate", "model", *arguments)


def test_a_model_without_a_tokenizer_says_so(here, fail):
    _save("words", vocab=300)
    assert "want a byte model (256 tokens), or a tokenizer.json beside it" in fail("generate", "words")


# ---- states ------------------------------------------------------------------------------------------------------


@pytest.fixture
def states(here, run):
    for prompt in (PROMPT, "abc abd"):
        run("generate", "model", "--prompt", prompt, "--tokens", 3, "--temperature", 0,
            "--state", "states", "--checkpoint-every", 5)  # fmt: skip
    return {int(n): key for key, n in re.findall(r"^([0-9a-f]{12}) +(\d+)", run("states", "list", "states"), re.M)}


def test_show_diff_trim(states, run):
    assert sorted(states) == [5, 7, 10, 15, 16, 19]  # 10 twice: two texts
    text = run("states", "show", "states", states[16][:9])
    assert "can be trimmed to  5, 10, 15, 16" in text
    assert "state.layers.0.ssm" in text
    text = run("states", "diff", "states", states[16], states[7])
    assert "texts of 16 and 7 tokens; the first 6 are the same" in text
    assert "state.layers.0.conv" in text
    assert run("states", "trim", "states", states[16]).split()[1] == "15"
    assert run("states", "trim", "states", states[16], "--to", 11).split()[1] == "10"


def test_fork_goes_on_alone(states, run, fail, here):
    assert "16 tokens" in run("states", "fork", "states", states[16], "mine.safetensors")
    out = run("generate", "model", "--state", "mine.safetensors", "--tokens", 4, "--temperature", 0)
    assert out == run("generate", "model", "--prompt", PROMPT, "--tokens", 4, "--temperature", 0)[len(PROMPT) :]
    assert "not written over" in fail("states", "fork", "states", states[16], "mine.safetensors")
    assert "ends in .safetensors" in fail("states", "fork", "states", states[16], "mine")


def test_remove(states, run, fail):
    assert "19 tokens" in run("states", "remove", "states", states[19])
    assert "holds no state" in fail("states", "remove", "states", states[19])


def test_a_damaged_file_is_listed_as_such(states, run, here, fail):
    path = next((here / "states").glob(f"*{states[16]}*"))
    path.write_bytes(path.read_bytes()[:-1])
    assert "damaged: " in run("states", "list", "states")
    assert "cut short" in fail("states", "show", "states", states[16])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lits", "states"], "unknown action of states 'lits'; did you mean 'list'?"),
        (["list"], "DIRECTORY is missing"),
        (["list", "nowhere"], "there is no directory nowhere"),
        (["show", "model"], "KEY is missing"),
        (["show", "model", "abc"], "holds no state with a key that begins with 'abc'"),
        (["trim", "model", "abc", "--to", "x"], "--to: want INT, got 'x'"),
        (["list", "model", "more"], "unexpected argument 'more'"),
    ],
)
def test_mistakes_of_states_are_named(here, fail, arguments, message):
    assert message in fail("states", *arguments)


def test_help_shows_every_action(run):
    text = run("states", "--help")
    assert all(f"usage: statewise states {name}" in text for name in ("list", "show", "diff", "trim", "fork", "remove"))
    assert "usage: statewise states list DIRECTORY\n" in text
    assert run("states") == text
