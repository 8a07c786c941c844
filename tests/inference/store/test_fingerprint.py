import pytest
import torch

import statewise
from statewise.inference.store import _fingerprint, fingerprint
from statewise.models.language import LanguageModel


def _model(**options):
    torch.manual_seed(0)
    return LanguageModel(40, 16, 1, mixer="mamba", **options).eval()


def test_it_is_that_of_the_content(tmp_path):
    model = _model()
    assert fingerprint(model) == fingerprint(_model())
    model.save_pretrained(tmp_path)
    assert fingerprint(statewise.load(tmp_path)) == fingerprint(model)
    assert len(fingerprint(model)) == 64


def _next_bit(model):
    with torch.no_grad():
        weight = model.layers[0].mixer.out_proj.weight
        weight[3, 3] = weight[3, 3].nextafter(torch.tensor(9.0))


def _replace(model):
    model.norm_f.weight = torch.nn.Parameter(2 * model.norm_f.weight.detach())


def _train(model):
    model.norm_f.weight.sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()


@pytest.mark.parametrize("change", [_next_bit, _replace, _train, lambda m: m.bfloat16(), lambda m: m.double()])
def test_it_notices_every_change(change):
    model = _model()
    before = fingerprint(model)
    change(model)
    assert fingerprint(model) != before
    assert fingerprint(model) == fingerprint(model)


def test_options_without_weights_count():
    assert fingerprint(_model()) != fingerprint(_model(norm_eps=1e-6))


def test_it_is_computed_once(monkeypatch):
    model, calls = _model(), []
    plain = _fingerprint.digests
    monkeypatch.setattr(_fingerprint, "digests", lambda tensors: calls.append(1) or plain(tensors))
    for _ in range(3):
        fingerprint(model)
    assert len(calls) == 1
    with torch.inference_mode():  # weights that count no writes are hashed each time
        other = _model()
    fingerprint(other)
    fingerprint(other)
    assert len(calls) == 3
