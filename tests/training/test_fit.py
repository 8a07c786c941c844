import pytest
import torch
from torch import nn

from statewise.data.language import ByteData
from statewise.data.text import Corpus
from statewise.models.language.stack import LanguageModel
from statewise.tasks import CausalLM
from statewise.training.directory import RunDirectory, read_metrics
from statewise.training.fit import TrainingError, check, fit
from statewise.training.options import Training

TEXT = b"a stitch in time saves nine, and nine in time save stitches. " * 40


class Noisy(nn.Module):
    """Draws random numbers in training, from PyTorch's global generator."""

    def __init__(self):
        super().__init__()
        self.embedding, self.drop, self.head = nn.Embedding(256, 16), nn.Dropout(0.5), nn.Linear(16, 256)

    def forward(self, tokens, seg=None):
        return self.head(self.drop(self.embedding(tokens)))


def _model(kind):
    torch.manual_seed(0)
    if kind == "noisy":
        return Noisy()
    return LanguageModel(256, 32, 2, mixer=[{"name": "mamba2", "d_state": 8, "head_dim": 16}, "attention"])


def _fit(path, training, *, kind="model", packed=False, resume=False, held_out=TEXT[:200]):
    task = CausalLM(_model(kind))
    data = ByteData(Corpus("a test", [TEXT[:900], TEXT[900:]], [held_out]), 4, 32, packed=packed, seed=training.seed)
    run = RunDirectory(path)
    run.path.mkdir(exist_ok=True)
    outcome = fit(task, data, training, run, resume=resume)
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(run.metrics)]
    return outcome, rows, task.model.state_dict(), run


CASES = {
    "plain": {},
    "ema": {"ema": 0.9},
    "bf16": {"precision": "bf16-mixed"},
    "packed": {"packed": True},
    "noisy": {"kind": "noisy"},
    "uneven": {"eval_every": 3, "checkpoint_every": 4},
    "sparse log": {"log_every": 4},
}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_the_same_run(tmp_path, case):
    options = dict(CASES[case])
    how = {k: options.pop(k) for k in ("kind", "packed") if k in options}
    training = Training(
        **{"steps": 12, "batch_size": 4, "eval_every": 4, "checkpoint_every": 4, "warmup": 2, **options}
    )
    outcome, rows, weights, run = _fit(tmp_path / "a", training, **how)
    assert outcome.finished
    assert outcome.step == 12
    # As if it had been killed after the checkpoint of step 8 and a little further.
    run.checkpoint(12).unlink()
    assert run.saved_steps()[-1] == 8
    outcome, again, resumed, _ = _fit(tmp_path / "a", training, **how, resume=True)
    assert outcome.finished
    assert again == rows
    assert all(torch.equal(weights[n], resumed[n]) for n in weights)


def test_the_loss_goes_down_and_every_option_matters(tmp_path):
    base = {"steps": 30, "batch_size": 4, "warmup": 2, "lr": 1e-2}
    _, rows, weights, _ = _fit(tmp_path / "base", Training(**base))
    assert rows[29]["loss"] < 0.7 * rows[0]["loss"]
    changes = {"ema": 0.9, "seed": 1, "weight_decay": 5.0, "clip": 0.01, "dynamics_lr": 0.1}
    changes |= {"beta2": 0.5, "final_lr": 1.0, "groups": {"A_log": {"lr": 0.1}}}
    for name, value in changes.items():
        _, _, other, _ = _fit(tmp_path / name, Training(**base, **{name: value}))
        assert any(not torch.equal(weights[n], other[n]) for n in weights), name


def test_a_broken_checkpoint_is_passed_over(tmp_path):
    training = Training(steps=8, batch_size=4, eval_every=4, checkpoint_every=4, warmup=2)
    _, rows, weights, run = _fit(tmp_path / "a", training)
    run.checkpoint(8).write_bytes(run.checkpoint(8).read_bytes()[:-10])
    _, again, resumed, _ = _fit(tmp_path / "a", training, resume=True)
    assert again == rows
    assert all(torch.equal(weights[n], resumed[n]) for n in weights)


def test_the_best_checkpoint_is_kept(tmp_path):
    # Nothing that training teaches is right about this held-out text: the model is best early.
    training = Training(steps=40, batch_size=4, eval_every=5, checkpoint_every=5, warmup=2, lr=1e-2)
    _, rows, _, run = _fit(tmp_path / "a", training, held_out=bytes(range(128, 256)))
    validated = {r["step"]: r["val_bits_per_byte"] for r in rows if "val_bits_per_byte" in r}
    best = min(validated, key=validated.__getitem__)
    assert best < 35
    assert run.saved_steps() == [best, 35, 40]


def test_a_loss_that_is_not_finite(tmp_path):
    training = Training(steps=50, batch_size=4, checkpoint_every=1, warmup=0, lr=1e30, clip=0.0)
    with pytest.raises(TrainingError, match=r"parameter group '.*last good checkpoint: .*step-0000\d\d\.safetensors"):
        _fit(tmp_path / "a", training)


def test_options_that_do_not_go_together():
    with pytest.raises(ValueError, match="batch_size: 3 rows do not divide over 2 devices"):
        check(Training(batch_size=3, devices=2))
    with pytest.raises(ValueError, match="ema"):
        check(Training(ema=0.9, strategy="fsdp2"))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="accelerator"):
            check(Training(accelerator="gpu"))
