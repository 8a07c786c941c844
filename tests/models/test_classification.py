import pytest
import torch

from statewise import create_model, load
from statewise.models.classification import SequenceClassifier
from statewise.models.classification.sequence import adopt_encoder, pooled, sinusoids
from statewise.segments import Segments
from statewise.testing import assert_agree

S4D = {"name": "s4d", "d_state": 4}
VARIANTS = {
    "pre-norm": {"mixer": S4D},
    "post-norm, batch": {"mixer": S4D, "norm": "batch", "prenorm": False},
    "pre-norm, batch": {"mixer": {"name": "bidirectional_s5", "d_state": 4}, "norm": "batch", "final_norm": False},
    "transformer": {
        "mixer": {"name": "bidirectional_attention", "n_heads": 2, "rope": False},
        "mlp": {"name": "mlp", "hidden": 8, "bias": True, "activation": "gelu"},
        "positions": True,
    },
    "bidirectional mamba": {
        "mixer": {"name": "bidirectional", "mixer": {"name": "mamba", "d_state": 4}}, "norm": "rms", "head": "mlp",
    },
    "lstm": {"mixer": "lstm", "token_bias": True},
    "pairs": {"mixer": S4D, "head": "pair"},
}  # fmt: skip


def _model(variant, **options):
    torch.manual_seed(0)
    return SequenceClassifier(3, 8, 2, vocab_size=11, **{**VARIANTS[variant], **options})


@pytest.mark.parametrize("pool", ["mean", "max", "last"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("train", [False, True])
def test_padding_changes_no_logit(variant, pool, train):
    model = _model(variant, pool=pool).double().train(train)
    lengths = [5, 9, 1, 9]
    tokens = torch.randint(0, 11, (4, 9))
    want = model(tokens, Segments.from_lengths(lengths, 9))
    # What stands in padding, and how much of it there is, makes no difference.
    wider = torch.cat([tokens, torch.randint(0, 11, (4, 6))], 1)
    for i, n in enumerate(lengths):
        wider[i, n:] = torch.randint(0, 11, (15 - n,))
    assert_agree(model(wider, Segments.from_lengths(lengths, 15)), want, f"{variant}: more padding", 15)
    if not train and model.config["head"] != "pair":
        for i, n in enumerate(lengths):
            assert_agree(model(tokens[i : i + 1, :n]), want[i : i + 1], f"{variant}: row {i} alone", n)


def test_padding_that_is_not_finite_reaches_nothing():
    model = SequenceClassifier(3, 8, 2, channels=2, mixer=S4D, norm="batch", prenorm=False)
    x = torch.randn(2, 6, 2)
    want = model(x[:, :4])
    model.load_state_dict(SequenceClassifier(3, 8, 2, channels=2, mixer=S4D, norm="batch").state_dict(), strict=False)
    x[:, 4:] = torch.nan
    out = model(x, Segments.from_lengths([4, 4], 6))
    assert bool(torch.isfinite(out).all())
    assert all(bool(torch.isfinite(b).all()) for b in model.buffers())
    assert want.shape == out.shape


def test_pools():
    y = torch.tensor([[[1.0], [5.0], [-9.0]], [[-2.0], [7.0], [7.0]]])
    seg = Segments.from_lengths([2, 1], 3)
    assert pooled("mean", y, seg).tolist() == [[3.0], [-2.0]]
    assert pooled("max", y, seg).tolist() == [[5.0], [-2.0]]
    assert pooled("last", y, seg).tolist() == [[5.0], [-2.0]]
    nothing = Segments.from_lengths([0, 0], 3)
    for how in ("mean", "max", "last"):
        assert pooled(how, y, nothing).tolist() == [[0.0], [0.0]]
        assert_agree(pooled(how, y, Segments.from_lengths([3, 3], 3)), pooled(how, y, None), how, 3)


def test_batch_norm_agrees_with_pytorch_over_valid_positions():
    from statewise.blocks.norms import BatchNorm

    ours, theirs = BatchNorm(4), torch.nn.BatchNorm1d(4)
    x = torch.randn(3, 7, 4) * 3 + 1
    seg = Segments.from_lengths([7, 2, 4], 7)
    for _ in range(3):
        got, want = ours(x, seg), theirs(x[seg.valid])
    assert_agree(got[seg.valid], want, "valid positions")
    assert bool((got[~seg.valid] == 0).all())
    assert_agree(ours.running_var, theirs.running_var, "running variance")
    # What was there before the first batch has no part in evaluation; in PyTorch it fades.
    rows = x[seg.valid]
    want = (rows - rows.mean(0)) / (rows.var(0) + 1e-5).sqrt()
    assert_agree(ours.eval()(x, seg)[seg.valid], want, "in evaluation after three batches", 3)
    for _ in range(300):
        ours.train()(x, seg), theirs(rows)
    assert_agree(ours.eval()(x, seg)[seg.valid], theirs.eval()(rows), "in evaluation after many", 300)


def test_batch_norm_before_any_batch():
    from statewise.blocks.norms import BatchNorm

    x = torch.randn(3, 7, 4)
    assert_agree(BatchNorm(4).eval()(x), x / (1 + 1e-5) ** 0.5, "as it is")
    with pytest.raises(ValueError, match="momentum: want more than 0 and at most 1, got 0"):
        BatchNorm(4, momentum=0)


def test_a_pair_is_compared_by_its_features():
    model = _model("pairs").eval()
    tokens = torch.randint(0, 11, (4, 5))
    a, b = model.features(tokens).mean(1).view(2, 2, 8).unbind(1)
    want = model.head.fc2(torch.nn.functional.gelu(model.head.fc1(torch.cat([a, b, a - b, a * b], -1))))
    assert_agree(model(tokens), want, "pairs")
    with pytest.raises(ValueError, match="want an even number of rows, two for each pair, got 3"):
        model(tokens[:3])


def test_positions_tell_order():
    table = sinusoids(torch.arange(6)[None], 4)[0]
    assert table[0].tolist() == [0, 1, 0, 1]
    assert table[3, 0] == pytest.approx(torch.tensor(3.0).sin().item())
    tokens = torch.tensor([[1, 2, 3]])
    for positions in (True, False):
        model = _model("transformer", positions=positions).double().eval()
        changed = not torch.allclose(model(tokens), model(tokens.flip(1)))
        assert changed == positions


def test_dropout_is_one_mask_for_the_whole_sequence():
    from statewise.blocks.branch import Branch

    class Same(torch.nn.Module):
        def forward(self, x, seg=None):
            return x

    branch = Branch(torch.nn.Identity(), Same(), dropout=0.5)
    x = torch.ones(4, 5, 6)
    added = branch.train()(x) - x
    assert bool((added == added[:, :1]).all())
    assert set(added.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(branch.eval()(x), 2 * x)


@pytest.mark.parametrize("variant", VARIANTS)
def test_save_and_load(variant, tmp_path):
    model = _model(variant)
    model(torch.randint(0, 11, (4, 5)))  # moves the statistics of batch norms
    model.eval().save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.config == model.config
    tokens = torch.randint(0, 11, (4, 7))
    assert torch.equal(again(tokens), model(tokens))


def test_an_encoder_is_adopted_without_its_mask_channel_and_head():
    torch.manual_seed(0)
    before = SequenceClassifier(2, 8, 2, channels=2, mixer=S4D, pool="none")
    after = SequenceClassifier(3, 8, 2, channels=1, mixer=S4D)
    head = after.head.weight.clone()
    adopt_encoder(after, before.state_dict())
    assert torch.equal(after.head.weight, head)
    assert torch.equal(after.in_proj.weight, before.in_proj.weight[:, :1])
    shared = {n: t for n, t in after.encoder_state().items() if n != "in_proj.weight"}
    assert len(shared) > 10
    assert all(torch.equal(t, before.state_dict()[n]) for n, t in shared.items())
    x = torch.randn(2, 5, 1)
    # Where nothing is masked, the two encoders are one function.
    assert_agree(after.features(x), before.features(torch.cat([x, torch.zeros_like(x)], -1)), "features", 5)
    with pytest.raises(ValueError, match=r"adopt_encoder: layers\.2.*: want shape None, got"):
        adopt_encoder(after, SequenceClassifier(2, 8, 3, channels=1, mixer=S4D).state_dict())


def test_half_precision_trains():
    model = _model("post-norm, batch")
    tokens, seg = torch.randint(0, 11, (4, 9)), Segments.from_lengths([5, 9, 1, 9], 9)
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens, seg).float().square().sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())
    low = _model("post-norm, batch").bfloat16()
    low(tokens, seg).float().square().sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in low.parameters())


def test_a_preset_can_be_smaller():
    model = create_model("s5-listops", n_layer=1, vocab_size=5)
    assert model(torch.randint(0, 5, (2, 9))).shape == (2, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "vocab_size: want it for tokens, or channels for values, and not both"),
        ({"vocab_size": 3, "channels": 1}, "and not both; got vocab_size = 3 and channels = 1"),
        ({"channels": 1, "pool": "sum"}, "pool: want one of mean, last, max, none, got 'sum'"),
        ({"channels": 1, "head": "big"}, "head: want one of linear, mlp, pair, got 'big'"),
        ({"channels": 1, "head": "pair", "pool": "none"}, "head: 'pair' compares whole rows"),
        ({"channels": 1, "norm": "bach"}, "unknown norm 'bach'; did you mean 'batch'"),
        ({"channels": 1, "mixer": None}, "mixer: a block has neither a mixer nor a feed-forward part"),
        ({"channels": 1, "dropout": 1.0}, "dropout: want 0 <= dropout < 1, got 1.0"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        SequenceClassifier(2, 8, 2, **options)


def test_wrong_inputs():
    with pytest.raises(ValueError, match=r"want integer tokens \(B, L\), got torch.float32 \(1, 2\)"):
        _model("lstm")(torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"want floating values \(B, L, 2\), got torch.float32 \(1, 3, 1\)"):
        SequenceClassifier(2, 8, 1, channels=2)(torch.zeros(1, 3, 1))
