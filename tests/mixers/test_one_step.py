"""One position of a layer in one call: equal to the composition, and taken only where it means the same."""

import copy
import threading

import pytest
import torch
from torch import nn

import statewise
from statewise.blocks import ResidualBlock
from statewise.mixers import Mamba, Mamba2
from statewise.mixers import one_step as module
from statewise.mixers.layers import RMSNorm
from statewise.mixers.one_step import OneStep
from statewise.models.language.stack import LanguageModel
from statewise.ops import decode, use_backend
from statewise.state import clone
from statewise.testing import assert_agree, assert_no_worse

CASES = {
    "mamba": lambda: Mamba(32),
    "mamba, odd sizes": lambda: Mamba(20, d_state=5, d_conv=3, expand=1.5, dt_rank=3, bias=True, conv_bias=False),
    "mamba, many states": lambda: Mamba(16, d_state=40, d_conv=1),
    "mamba2": lambda: Mamba2(32, d_state=16, head_dim=16),
    "mamba2, odd sizes": lambda: Mamba2(30, d_state=20, head_dim=10, n_groups=3, d_conv=2, bias=True),
    "mamba2, limits": lambda: Mamba2(16, d_state=8, head_dim=8, skip_per_channel=True, dt_limit=(0.01, 0.05)),
}


@pytest.fixture
def taken(monkeypatch):
    """How often the kernel gave a result."""
    found, plain = [], decode.step

    def step(*args):
        result = plain(*args)
        if result is not None:
            found.append(result)
        return result

    monkeypatch.setattr(module.decode, "step", step)
    return found


def _disturb(mixer):
    """Weights for which every part shows."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return mixer.eval()


def _one(block, x, state):
    with torch.no_grad():
        return block.step(x, state)


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_equal_to_the_composition(name, dtype, rows, taken):
    torch.manual_seed(1)
    mixer = _disturb(CASES[name]())
    # In float32 the stream may be wider than the weights, see `LanguageModel.residual_in_fp32`.
    for subject in (mixer, ResidualBlock(mixer.d_model, mixer)):
        exact = copy.deepcopy(subject).double()
        subject = subject.to(dtype)
        if dtype is torch.bfloat16:
            with torch.no_grad():
                for p, q in zip(exact.parameters(), subject.parameters()):
                    p.copy_(q)
        x = torch.randn(rows, 4, mixer.d_model).to(dtype)
        with torch.no_grad():
            _, state = subject.extend(x[:, :3], subject.init_state(rows))
            results = [_one(subject, x[:, 3], state)]
            with use_backend("reference"):
                results.append(subject.step(x[:, 3], state))
            wide = type(state)(*(t.double() for t in state))
            results.append(exact.step(x[:, 3].double(), wide))
        for part, *found in zip(("y", "conv", "ssm"), *((y, *s) for y, s in results)):
            assert_no_worse(*found, 4.0, part)
    assert len(taken) == 2


def test_the_stream_may_be_wider_than_the_weights(taken):
    torch.manual_seed(0)
    block = ResidualBlock(32, Mamba(32)).bfloat16().eval()
    x = torch.randn(2, 32)
    with torch.no_grad():
        y, _ = block.step(x, block.init_state(2))
        with use_backend("reference"):
            z, _ = block.step(x, block.init_state(2))
    assert len(taken) == 1
    assert y.dtype is torch.float32
    assert (y - z).norm() < 2e-2 * (z - x).norm()  # two roundings of bfloat16 are 8e-3


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(threads, monkeypatch):
    from statewise.ops import _numba

    monkeypatch.setattr(_numba, "split_small", True)
    before = torch.get_num_threads()
    mixer = _disturb(Mamba2(32, d_state=16, head_dim=16))
    x, state = torch.randn(3, 32), mixer.init_state(3)
    alone, _ = _one(mixer, x, state)
    try:
        torch.set_num_threads(threads)
        y, _ = _one(mixer, x, state)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(y, alone)


def test_from_several_threads_at_once():
    mixer = _disturb(Mamba(64))
    xs, state = torch.randn(4, 1, 64), mixer.init_state(1)
    wanted = [_one(mixer, x, state)[0] for x in xs]
    wrong = []

    def work(k):
        for _ in range(50):
            if not torch.equal(_one(mixer, xs[k], state)[0], wanted[k]):
                wrong.append(k)

    workers = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_not_taken_where_somebody_would_notice(taken):
    mixer = Mamba(16).eval()
    x, state = torch.randn(1, 16), mixer.init_state(1)
    assert mixer.step(x, state)[0].requires_grad
    with torch.no_grad():
        with statewise.deterministic():
            mixer.step(x, state)
        with use_backend("reference"):
            mixer.step(x, state)
        mixer.step(torch.randn(17, 16), mixer.init_state(17))
        assert not taken
        mixer.step(x, state)
        assert len(taken) == 1


def test_hooks_and_replaced_parts_are_respected(taken):
    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return self.base(x) + 1

    mixer = Mamba2(16, head_dim=8).eval()
    x, state = torch.randn(1, 16), mixer.init_state(1)
    before, _ = _one(mixer, x, state)
    seen = []
    handle = mixer.out_proj.register_forward_hook(lambda *_: seen.append(1))
    _one(mixer, x, state)
    assert (len(seen), len(taken)) == (1, 1)
    handle.remove()
    _one(mixer, x, state)
    assert len(taken) == 2
    mixer.out_proj = Adapter(mixer.out_proj)
    after, _ = _one(mixer, x, state)
    assert len(taken) == 2
    assert_agree(after, before + 1, "with the adapter", 16)


def test_new_weights_are_seen(taken):
    mixer, other = Mamba(16).eval(), Mamba(16).eval()
    x, state = torch.randn(1, 16), mixer.init_state(1)
    wanted, _ = _one(other, x, state)
    _one(mixer, x, state)
    mixer.load_state_dict(other.state_dict())  # into the same memory
    assert torch.equal(_one(mixer, x, state)[0], wanted)
    with torch.no_grad():
        mixer.in_proj.weight.data = torch.zeros_like(mixer.in_proj.weight)  # other memory, same parameter
    assert not _one(mixer, x, state)[0].any()
    mixer.load_state_dict(other.state_dict(), assign=True)  # other parameters
    assert torch.equal(_one(mixer, x, state)[0], wanted)
    twin = copy.deepcopy(mixer)
    with torch.no_grad():
        mixer.out_proj.weight.zero_()
    assert torch.equal(_one(twin, x, state)[0], wanted)
    assert len(taken) == 5 + 1


def test_another_norm(taken):
    mixer, x = Mamba(16).eval(), torch.randn(2, 16)
    state = mixer.init_state(2)
    with torch.no_grad():
        for eps in (1e-5, 1.0):
            norm = RMSNorm(16, eps)
            found = module.one_step([(mixer, norm)], x[:, None], [state], None)
            assert found is not None
            y, _ = mixer.step(norm(x), state)
            assert_agree(found[0][:, 0], x + y, "x + mixer(norm(x))", 16)
        assert module.one_step([(mixer, nn.LayerNorm(16))], x[:, None], [state], None) is None


@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_layers_of_a_model_in_one_call(mixer, dtype, taken):
    torch.manual_seed(0)
    spec = {"name": mixer, "d_state": 8} | ({"head_dim": 8} if mixer == "mamba2" else {})
    model = LanguageModel(17, 16, 5, mixer=spec, residual_in_fp32=dtype is torch.float32).to(dtype).eval()
    tokens = torch.randint(17, (3, 6))
    with torch.no_grad():
        _, state = model.extend(tokens[:, :5], model.init_state(3))
        logits, after = model.step(tokens[:, 5], state)
        assert [len(new) for _, new in taken] == [5]
        x = model.embed(tokens[:, 5:])
        for block, old, new in zip(model.blocks, state.layers, after.layers):
            x, alone = block._run(x, old, None)
            assert all(torch.equal(a, b) for a, b in zip(alone, new))
        assert len(taken) == 6
        assert torch.equal(model.head(model.norm_f(x))[:, 0], logits)


def test_runs_of_like_layers_go_together(taken):
    mixers = ["mamba2", "mamba2", "attention", "mamba2", "mamba", "mamba", "mamba"]
    mixers = [{"name": m, **({"head_dim": 8} if m == "mamba2" else {})} for m in mixers]
    model = LanguageModel(17, 16, 7, mixer=mixers).eval()
    tokens = torch.randint(17, (2, 5))
    with torch.no_grad():
        _, state = model.extend(tokens[:, :4], model.init_state(2, capacity=5))
        y, _ = model.step(tokens[:, 4], clone(state))
        assert [len(new) for _, new in taken] == [2, 1, 3]
        # A hook on a part: that run of layers goes one by one, and the layer with the hook part by part.
        seen = []
        model.layers[5].mixer.x_proj.register_forward_hook(lambda *_: seen.append(1))
        taken.clear()
        z, _ = model.step(tokens[:, 4], clone(state))
    assert ([len(new) for _, new in taken], seen) == ([2, 1, 1, 1], [1])
    assert_agree(z, y, "with a hook that only listens", 64)


@pytest.mark.parametrize("part", ["conv", "ssm"])
def test_a_state_of_another_model(part):
    mixer = Mamba(16).eval()
    state = mixer.init_state(2)
    wrong = state._replace(**{part: getattr(state, part)[:1]})
    with torch.no_grad(), pytest.raises(ValueError, match=f"{part}: want"):
        mixer.step(torch.randn(2, 16), wrong)


def test_weights_that_do_not_fit():
    mixer = Mamba(16).eval()
    mixer.dt_proj.weight = nn.Parameter(torch.randn(32, 2))
    with torch.no_grad(), pytest.raises(ValueError, match="x_proj: want"):
        mixer.step(torch.randn(2, 16), mixer.init_state(2))


def test_a_state_for_each_layer():
    mixer = Mamba(16).eval()
    with torch.no_grad():
        layer, state = mixer.kernel(None), mixer.init_state(2)
        with pytest.raises(ValueError, match="states: want one for each"):
            decode.step([layer, layer], torch.randn(2, 16), [state])
        with pytest.raises(ValueError, match="states: want one for each"):
            decode.step([], torch.randn(2, 16), [])


def test_where_no_kernel_serves_each_layer_is_looked_up_a_few_times(monkeypatch):
    model = LanguageModel(17, 16, 9, mixer={"name": "mamba", "d_state": 4}).eval()
    asked, plain = [], OneStep.kernel
    monkeypatch.setattr(OneStep, "kernel", lambda self, norm: (asked.append(1), plain(self, norm))[1])
    with torch.no_grad():
        model.step(torch.zeros(17, dtype=torch.int64), model.init_state(17))
    assert len(asked) <= 3 * 9  # of the run of layers, of a block, of its mixer
