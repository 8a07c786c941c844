"""What steps keep of their parameters follows the parameters, however those change."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from statewise import mixers, ops
from statewise.mixers.kept import kept

KEEPERS = ["s4", "s4d", "s4ptd", "dss", "dlr", "gss", "lru", "s5", "liquid_s4"]


def step(mixer):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, generator=generator)
    with torch.no_grad():
        state = mixer.extend(torch.randn(2, 3, 8, generator=generator), mixer.init_state(2))[1]
        return mixer.step(x, state)[0]


def through_data(mixer):
    for p in mixer.parameters():
        p.data.mul_(1.1)


def through_numpy(mixer):
    for p in mixer.parameters():
        p.detach().numpy()[...] *= 1.1


def new_parameters(mixer):
    for module in mixer.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                setattr(module, name, nn.Parameter(1.1 * p.detach()))


def loaded(mixer):
    mixer.load_state_dict({name: 1.1 * t for name, t in mixer.state_dict().items()})


def converted(mixer):
    mixer.double()
    mixer.float()
    through_data(mixer)


@pytest.mark.parametrize("change", [through_data, through_numpy, new_parameters, loaded, converted])
@pytest.mark.parametrize("name", KEEPERS)
def test_steps_follow_their_parameters(name, change):
    mixer = mixers.create(name, 8, d_state=4)
    before = step(mixer)
    change(mixer)
    after = step(mixer)
    assert not torch.equal(after, before)
    assert torch.equal(after, step(copy.deepcopy(mixer)))


@pytest.mark.parametrize("name", ["s4", "s4d", "s5"])
def test_and_their_settings(name):
    mixer = mixers.create(name, 8, d_state=4)
    before = step(mixer)
    mixers.scale_rate(mixer, 2.0)
    after = step(mixer)
    assert not torch.equal(after, before)
    assert torch.equal(after, step(copy.deepcopy(mixer)))


def test_parametrised_parameters_are_not_kept():
    class Scaled(nn.Module):
        factor = 1.0

        def forward(self, p):
            return p * self.factor

    mixer, scaled = mixers.create("s4d", 8, d_state=4), Scaled()
    torch.nn.utils.parametrize.register_parametrization(mixer, "C", scaled)
    before = step(mixer)
    scaled.factor = 1.1
    assert not torch.equal(step(mixer), before)


def test_it_is_made_once_and_again_with_gradients():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.p, self.made = nn.Parameter(torch.ones(2)), []

        @kept()
        def twice(self):
            self.made.append(1)
            return 2 * self.p

    m = Counts()
    with torch.no_grad():
        assert m.twice() is m.twice()
        assert copy.deepcopy(m).twice() is not m.twice()
        assert len(m.made) == 1
        with torch.autocast("cpu", torch.bfloat16):
            m.twice()
        assert len(m.made) == 2
    assert m.twice().requires_grad
    assert len(m.made) == 3
    with torch.inference_mode():
        assert not m.twice().requires_grad
    assert len(m.made) == 3


@pytest.mark.parametrize("name", ["s4", "s4d", "dss", "dlr"])
def test_a_state_of_another_batch_is_refused(name):
    mixer = mixers.create(name, 8, d_state=4)
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        with pytest.raises(ValueError, match="state: want shape"):
            mixer.step(x[:, 0], mixer.init_state(1))
        with pytest.raises(ValueError, match="state: want shape"):
            mixer.extend(x, mixer.init_state(3))


@pytest.mark.parametrize("name", KEEPERS)
def test_views_of_parameters_are_not_kept(name):
    """A tensor that stood in the place of a parameter for a while, and was written to later."""
    mixer = mixers.create(name, 8, d_state=4)
    want = step(copy.deepcopy(mixer))
    once = {n: p.detach().clone() for n, p in mixer.named_parameters()}
    with torch.nn.utils.stateless._reparametrize_module(mixer, once):
        step(mixer)
    for t in once.values():
        t.mul_(3)
    assert torch.equal(step(mixer), want)


def test_tensors_that_hooks_leave_are_compared():
    mixer = mixers.create("s4d", 8, d_state=4)
    prune.random_unstructured(mixer, "C", 0.5)
    step(mixer)
    with torch.no_grad():
        mixer.C_orig.mul_(2)
        mixer(torch.zeros(1, 1, 8))  # the hook makes C anew
    assert torch.equal(step(mixer), step(copy.deepcopy(mixer)))


def test_forward_differentiation_is_not_lost():
    mixer = mixers.create("s4d", 8, d_state=4)
    step(mixer)
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = {"D": torch.autograd.forward_ad.make_dual(mixer.D.detach(), torch.ones(8))}
        with torch.nn.utils.stateless._reparametrize_module(mixer, dual):
            y = mixer.step(torch.ones(1, 8), mixer.init_state(1))[0]
        assert (torch.autograd.forward_ad.unpack_dual(y).tangent != 0).all()


@pytest.mark.parametrize("name", ["s4", "s4d", "dss"])
def test_dtypes_of_a_token_are_checked_as_those_of_a_row(name):
    mixer = mixers.create(name, 8, d_state=4, activation="none", glu=False)
    state, x = mixer.init_state(2), torch.randn(2, 8)
    with torch.no_grad():
        for state_, x_ in ((state.to(torch.complex128), x), (state.real.long(), x), (state, x.double())):
            with pytest.raises(TypeError):
                mixer.step(x_, state_)
        with ops.use_backend("triton"), pytest.raises(ops.BackendError):
            mixer.step(x, state)
