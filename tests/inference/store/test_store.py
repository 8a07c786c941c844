import os
import subprocess
import sys
import textwrap
import time
import warnings

import pytest
import torch

from statewise import deterministic, state
from statewise.inference import Context, generate, read
from statewise.inference.store import StateDirectory, StateError, StateStore, difference, load_context, save_context
from statewise.testing import assert_agree

from ..conftest import V, make_model

TEXT = torch.randint(0, V, (60,), generator=torch.Generator().manual_seed(0))
MIXERS = ["mamba", "mamba2", "attention", "s4d", "s5", "hybrid"]


def _equal(a: Context, b: Context):
    assert torch.equal(a.tokens, b.tokens)
    assert torch.equal(a.logits, b.logits)
    for (name, x), (_, y) in zip(state.leaves(a.state), state.leaves(b.state)):
        assert x.dtype == y.dtype
        assert torch.equal(x, y), name


@pytest.fixture
def counted(monkeypatch):
    """A model that counts the tokens it reads."""
    model = make_model()
    model.count = 0
    plain = model.prefill

    def prefill(tokens, *rest):
        model.count += tokens.shape[1]
        return plain(tokens, *rest)

    model.prefill = prefill
    return model


# ---- round trips -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mixer", "dtype"),
    [
        *((m, torch.float32) for m in MIXERS),
        ("attention", torch.bfloat16),
        ("s5", torch.float64),
        ("hybrid", torch.float64),
    ],
)
def test_what_is_saved_is_loaded_to_the_bit(tmp_path, mixer, dtype):
    model = make_model(mixer).to(dtype)
    context = read(model, TEXT)
    header = save_context(model, context, tmp_path / "a" / "s.safetensors")
    loaded = load_context(model, tmp_path / "a" / "s.safetensors")
    _equal(loaded, context)
    assert header.length == 60
    assert type(loaded.state) is type(context.state)


@pytest.mark.parametrize("mixer", MIXERS)
def test_going_on_from_a_file_is_going_on(tmp_path, mixer):
    model = make_model(mixer)
    with deterministic():
        whole = torch.stack(list(generate(model, [TEXT], 12, temperature=0)), 1)
        context = read(model, TEXT)
        save_context(model, context, tmp_path / "s.safetensors")
        loaded = load_context(model, tmp_path / "s.safetensors")
        for _ in range(2):  # what is written to a loaded state does not reach the file, nor the context
            assert torch.equal(torch.stack(list(generate(model, [loaded], 12, temperature=0)), 1), whole)
            loaded = load_context(model, tmp_path / "s.safetensors")
        for _, leaf in state.leaves(loaded.state):
            leaf.zero_()
        _equal(load_context(model, tmp_path / "s.safetensors"), context)


def test_rows_of_a_batch_are_stored_without_each_others_padding(tmp_path):
    model = make_model("attention")
    run = generate(model, [[1, 2], TEXT], 4, temperature=0)
    list(run)
    save_context(model, run.context(0), tmp_path / "s.safetensors")
    loaded = load_context(model, tmp_path / "s.safetensors")
    assert loaded.state.layers[0].k.shape[1] == 6
    _equal(loaded, run.context(0))


# ---- the store ---------------------------------------------------------------------------------------------------


def test_a_text_is_read_once(tmp_path, counted):
    store = StateStore(tmp_path, counted)
    first = store.read(TEXT)
    assert counted.count == 60
    _equal(store.read(TEXT), first)
    assert counted.count == 60
    store.read(torch.cat([TEXT, TEXT[:5]]))
    assert counted.count == 65
    assert [e.length for e in store.entries()] == [60, 65]


def test_checkpoints_serve_texts_that_part_later(tmp_path, counted):
    store = StateStore(tmp_path, counted)
    store.read(TEXT, every=16)
    assert [e.length for e in store.entries()] == [16, 32, 48, 60]
    other = TEXT.clone()
    other[40] = (other[40] + 1) % V
    counted.count = 0
    got = store.read(other)
    assert counted.count == 60 - 32
    assert_agree(got.logits, read(counted, other).logits, "logits", 60)


def test_progress_and_chunks(tmp_path):
    store, seen = StateStore(tmp_path, make_model()), []
    store.read(TEXT[:20])
    store.read(TEXT, every=25, chunk=10, progress=lambda at, of: seen.append((at, of)))
    assert seen == [(5, 40), (15, 40), (25, 40), (30, 40), (40, 40)]


def test_longest_prefix(tmp_path):
    model = make_model()
    store = StateStore(tmp_path, model)
    assert store.longest_prefix(TEXT) is None
    for n in (10, 30, 50):
        store.save(read(model, TEXT[:n]))
    for n, want in [(9, None), (10, 10), (29, 10), (30, 30), (49, 30), (60, 50)]:
        found = store.longest_prefix(TEXT[:n])
        assert (None if found is None else len(found.tokens)) == want
    swapped = TEXT.flip(0)
    assert store.longest_prefix(swapped) is None
    # Another model of the same shape finds nothing; nor does the same model after a change.
    assert StateStore(tmp_path, make_model(seed=1)).longest_prefix(TEXT) is None
    with torch.no_grad():
        model.norm_f.weight[0] += 1
    assert store.longest_prefix(TEXT) is None


def test_trim_goes_back_to_where_it_was_stored(tmp_path):
    model = make_model()
    store = StateStore(tmp_path, model)
    store.read(TEXT, every=20)
    store.read(TEXT.flip(0), every=10)  # not beginnings of this text
    whole = next(e for e in store.entries() if e.length == 60 and torch.equal(store.load(e).tokens, TEXT))
    assert [e.length for e in store.prefixes(whole)] == [20, 40, 60]
    assert [store.trim(whole, n).length for n in (20, 39, 40, 59, 60, 99)] == [20, 20, 40, 40, 60, 60]
    with pytest.raises(StateError, match="at most 19 tokens is stored; there are states at 20, 40, 60"):
        store.trim(whole, 19)
    back = store.load(store.trim(whole, 40))
    assert_agree(back.logits, read(model, TEXT[:40]).logits, "logits", 40)


def test_fork(tmp_path):
    model = make_model()
    store = StateStore(tmp_path / "store", model)
    entry = store.save(read(model, TEXT))
    store.fork(entry, tmp_path / "mine.safetensors")
    _equal(load_context(model, tmp_path / "mine.safetensors"), store.load(entry))
    with pytest.raises(FileExistsError, match="not written over"):
        store.fork(entry, tmp_path / "mine.safetensors")
    ends = set()
    for seed in range(3):
        run = generate(model, [store.load(entry)], 5, seed=seed)
        list(run)
        ends.add(store.save(run.context()).key)
    assert len(ends) == 3


def test_difference(tmp_path):
    model = make_model("hybrid")
    store = StateStore(tmp_path, model)
    a, b = store.save(read(model, TEXT[:30])), store.save(read(model, torch.cat([TEXT[:25], TEXT[:5]])))
    common, leaves = difference(a.path, b.path)
    assert common == 25 + int((TEXT[25:30] != TEXT[:5]).nonzero()[0])
    assert {leaf.name for leaf in leaves} >= {"logits", "state.layers.0.ssm", "state.layers.1.k"}
    ssm = next(leaf for leaf in leaves if leaf.name == "state.layers.0.ssm")
    x, y = (store.load(e).state.layers[0].ssm.double() for e in (a, b))
    assert ssm.largest == float((x - y).abs().max())
    assert ssm.relative == ssm.largest / float(x.abs().max())
    assert all(leaf.largest == 0 == leaf.relative for leaf in difference(a.path, a.path)[1])
    c = store.save(read(model, TEXT[:3]))
    keys = next(leaf for leaf in difference(a.path, c.path)[1] if leaf.name == "state.layers.1.k")
    assert keys.largest is None
    assert keys.shapes[0] != keys.shapes[1]


def test_find_by_the_first_digits(tmp_path):
    model = make_model()
    store = StateStore(tmp_path, model)
    a, b = (store.save(read(model, TEXT[:n])) for n in (5, 6))
    common = next(i for i, (x, y) in enumerate(zip(a.key, b.key)) if x != y)
    assert store.find(a.key[: common + 1]) == a
    assert len(store.load(b.key.upper()).tokens) == 6
    with pytest.raises(StateError, match="2 states have keys that begin with"):
        store.find(a.key[:common])
    with pytest.raises(StateError, match="no state with a key that begins with 'xyz'"):
        store.find("xyz")


def test_the_budget_takes_what_was_not_used_for_longest(tmp_path):
    model = make_model()
    size = StateStore(tmp_path / "probe", model).save(read(model, TEXT[:8])).bytes
    store = StateStore(tmp_path / "store", model, budget=3 * size + size // 2)
    entries = []
    for n in (8, 9, 10):
        entries.append(store.save(read(model, TEXT[:n])))
        time.sleep(0.01)
    store.load(entries[0])
    (store.path / ".half.1.tmp").write_bytes(b"x")
    os.utime(store.path / ".half.1.tmp", (0, 0))
    time.sleep(0.01)
    store.save(read(model, TEXT[:11]))
    assert [e.length for e in store.entries()] == [8, 10, 11]
    assert not (store.path / ".half.1.tmp").exists()
    with pytest.raises(ValueError, match=r"budget: this state alone takes"):
        StateStore(tmp_path / "small", model, budget=100).save(read(model, TEXT))
    with pytest.raises(ValueError, match="budget"):
        StateStore(tmp_path, model, budget=0)


def test_a_removed_state_stays_with_who_has_it(tmp_path):
    model = make_model()
    store = StateStore(tmp_path, model)
    entry = store.save(read(model, TEXT))
    context = store.load(entry)
    assert store.remove(entry)
    assert not store.remove(entry)
    _equal(context, read(model, TEXT))
    with pytest.raises(StateError, match="no such state file"):
        store.load(entry)


# ---- what goes wrong -----------------------------------------------------------------------------------------------


def test_a_damaged_state_is_passed_over_with_a_warning_and_healed(tmp_path):
    model = make_model()
    store = StateStore(tmp_path, model)
    store.save(read(model, TEXT[:10]))
    entry = store.save(read(model, TEXT[:20]))
    entry.path.write_bytes(entry.path.read_bytes()[:-5])
    with pytest.warns(UserWarning, match="passed over: .*cut short"):
        assert len(store.longest_prefix(TEXT).tokens) == 10
    store.save(read(model, TEXT[:20]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(store.longest_prefix(TEXT).tokens) == 20


def test_a_renamed_file_is_found_out(tmp_path):
    model = make_model()
    store = StateStore(tmp_path, model)
    a, b = (store.save(read(model, TEXT[:n])) for n in (10, 11))
    a.path.write_bytes(b.path.read_bytes())
    with pytest.raises(StateError, match="the name is not that of its content"):
        store.load(a)


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "f").touch()
    with pytest.raises(ValueError, match="want a directory"):
        StateDirectory(tmp_path / "f")


# ---- several processes, and speed ----------------------------------------------------------------------------------

WORKER = """
    import sys, warnings, torch
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    from statewise.inference import read
    from statewise.inference.store import StateStore
    from statewise.models.language import LanguageModel
    torch.manual_seed(0)
    model = LanguageModel(40, 16, 1, mixer="s5").eval()
    store = StateStore(sys.argv[1], model, budget=int(sys.argv[2]))
    generator = torch.Generator().manual_seed(int(sys.argv[3]))
    for _ in range(40):
        n = int(torch.randint(1, 12, (1,), generator=generator))
        context = store.read(torch.arange(n), every=3)
        assert context.tokens.tolist() == list(range(n))
    print("fine")
"""


def test_processes_share_a_store_and_its_budget(tmp_path):
    small = _tiny()
    budget = 4 * StateStore(tmp_path / "probe", small).save(read(small, [0])).bytes
    command = [sys.executable, "-c", textwrap.dedent(WORKER), str(tmp_path / "store"), str(budget)]
    workers = [
        subprocess.Popen([*command, str(seed)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for seed in range(2)
    ]
    for worker in workers:
        out, err = worker.communicate(timeout=240)
        assert out == "fine\n", err
    store = StateStore(tmp_path / "store", small)
    assert 1 <= len(store.entries()) <= 6
    for entry in store.entries():
        store.load(entry)
    assert all(p.name.endswith(".safetensors") for p in store.path.iterdir())


def _tiny():
    from statewise.models.language import LanguageModel

    torch.manual_seed(0)
    return LanguageModel(40, 16, 1, mixer="s5").eval()


def test_the_size_of_a_recurrent_state_does_not_depend_on_the_text(tmp_path):
    model = make_model()
    store = StateStore(tmp_path, model)
    sizes = [store.save(read(model, torch.zeros(n, dtype=torch.int64))).bytes - 4 * n for n in (64, 4096)]
    assert abs(sizes[0] - sizes[1]) < 64  # digits of numbers in the header


@pytest.mark.speed
def test_resuming_a_long_text_takes_milliseconds(tmp_path):
    """250,000 tokens: found, checked and loaded in a hundredth of the time it takes to read them, and in little more
    than a text of 1,000 takes."""
    model = make_model()
    store = StateStore(tmp_path, model)
    text = torch.randint(0, V, (250_000,), generator=torch.Generator().manual_seed(0))
    began = time.perf_counter()
    store.read(text)
    reading = time.perf_counter() - began
    store.read(text[:1000])

    def best(n):
        times = []
        for _ in range(7):
            start = time.perf_counter()
            assert len(store.longest_prefix(text[:n]).tokens) == n
            times.append(time.perf_counter() - start)
        return min(times)

    short, long = best(1000), best(250_000)
    # Hashing 1 MB of tokens twice is what the long one pays: at most 1 / (100 MB/s) each.
    assert long < short + 0.02
    assert long < reading / 100
