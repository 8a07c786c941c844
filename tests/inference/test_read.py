"""Prompts in chunks: the result is that of one pass, and memory does not depend on the length."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from statewise import deterministic, state
from statewise.inference import generate, read
from statewise.inference._reading import prefill
from statewise.testing import assert_agree

from .conftest import V, make_model

TEXT = torch.randint(0, V, (53,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("mixer", ["mamba", "mamba2", "s4d", "s5", "hybrid"])
@pytest.mark.parametrize("chunk", [1, 7, 52, 1000])
def test_chunks_give_what_one_pass_gives(mixer, chunk):
    model = make_model(mixer)
    done = []
    got = read(model, TEXT, chunk=chunk, progress=lambda at, of: done.append((at, of)))
    with torch.no_grad():
        logits, end = model.extend(TEXT[None], model.init_state(1))
    assert_agree(got.logits, logits[0, -1], "logits", 53)
    for (name, x), (_, y) in zip(state.leaves(got.state), state.leaves(end)):
        if x.is_floating_point() or x.is_complex():
            assert_agree(x, y, name, 53)
        else:
            assert torch.equal(x, y), name
    assert done == [(min(at + chunk, 53), 53) for at in range(0, 53, chunk)]
    with deterministic(), torch.no_grad():
        assert torch.equal(
            read(model, TEXT, chunk=chunk).logits, model.extend(TEXT[None], model.init_state(1))[0][0, -1]
        )


def test_reading_is_resumed_anywhere():
    model = make_model("hybrid")
    with deterministic():
        whole = read(model, TEXT)
        part = read(model, TEXT[20:], read(model, TEXT[:20]), chunk=6)
    assert torch.equal(part.logits, whole.logits)
    assert torch.equal(part.tokens, whole.tokens)
    assert read(model, [], part) is part


def test_bad_text_is_named():
    model = make_model()
    for tokens, message in [([], "at least one"), ([V], f"0 to {V - 1}"), ([[1]], r"\(n,\)"), ([0.5], "integers")]:
        with pytest.raises(ValueError, match=f"tokens.*{message}"):
            read(model, tokens)
    with pytest.raises(ValueError, match="chunk"):
        read(model, TEXT, chunk=0)


def test_caches_hold_no_more_than_the_longest_row():
    """Padding that one row needs in a call is dropped as soon as no row has anything there."""
    model = make_model("attention")
    state_now = model.init_state(2)
    for new in ([3, 1], [1, 4], [0, 2], [6, 1]):
        rows = [torch.zeros(n, dtype=torch.int64) for n in new]
        _, state_now = prefill(model, rows, state_now)
    assert state_now.layers[0].k.shape[1] == 10
    assert state_now.layers[0].live.sum(1).tolist() == [10, 8]


class Largest(TorchDispatchMode):
    """The largest tensor that any operator makes, and the tokens themselves apart."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor) and t.dtype != torch.int64:
                self.bytes = max(self.bytes, t.numel() * t.element_size())
        return out


@pytest.mark.parametrize("mixer", ["mamba", "mamba2", "s4d"])
def test_no_tensor_grows_with_the_prompt(mixer):
    model = make_model(mixer)
    sizes = []
    for length in (256, 2048):
        prompts = [torch.zeros(length, dtype=torch.int64), torch.zeros(length - 100, dtype=torch.int64)]
        with Largest() as largest:
            list(generate(model, prompts, 2, temperature=0, chunk=64))
        sizes.append(largest.bytes)
    assert sizes[0] == sizes[1] > 0


MEASURE = """
    import sys, torch
    torch.set_num_threads(1)
    from statewise.benchmarks.machine import peak_memory
    from statewise.inference import read
    from statewise.models.language import LanguageModel
    torch.manual_seed(0)
    model = LanguageModel(256, 64, 2, mixer={"name": "mamba2", "head_dim": 32, "d_state": 32}).eval()
    read(model, torch.zeros(2048, dtype=torch.int64), chunk=1024)
    text = torch.zeros(int(sys.argv[1]), dtype=torch.int64)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the peak of imports and of compiling kernels
    before = peak_memory()
    read(model, text, chunk=int(sys.argv[2]))
    print(peak_memory() - before)
"""


def peak_growth(length, chunk):
    """Bytes by which a process's peak memory rises when it reads a text; two chunks of another were read before."""
    command = [sys.executable, "-c", textwrap.dedent(MEASURE), str(length), str(chunk)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout)


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="resets the peak memory in /proc")
def test_peak_memory_of_a_long_prompt():
    length = 1 << 18
    chunked, whole = peak_growth(length, 1024), peak_growth(length, length)
    residual = length * 64 * 4  # one layer's activations of the whole text, of which there are many
    assert chunked < residual / 8
    assert whole > residual
