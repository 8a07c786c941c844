"""What is particular to Zamba2: which block runs where, what is shared, and what is refused."""

from __future__ import annotations

import pytest
import torch

from statewise.models.language import Zamba2
from statewise.models.language._causal_lm import run_layer
from statewise.testing import assert_agree

MAMBA2 = {"name": "mamba2", "d_state": 4, "head_dim": 4}


def build(**options) -> Zamba2:
    given = {"shared_at": [0, 2, 3], "n_shared": 2, "mixer": MAMBA2, "n_heads": 4, "d_intermediate": 6, "rank": 2}
    return Zamba2(11, 8, 4, **{**given, **options})


def test_blocks_take_turns():
    model = build()
    assert [model._shared(use) for use in range(3)] == [
        (model.shared[0], 0),
        (model.shared[1], 0),
        (model.shared[0], 1),
    ]
    assert [len(block.fc1.own) for block in model.shared] == [2, 1]
    assert [layer.from_shared is not None for layer in model.layers] == [True, False, True, True]


def test_a_use_adds_nothing_at_first_and_something_of_its_own_later():
    model, tokens = build(tie_embeddings=False).eval(), torch.randint(0, 11, (1, 5))
    before = model(tokens)
    bare = build(tie_embeddings=False, rank=0).eval()
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if ".own." not in k})
    assert_agree(bare(tokens), before, "without additions", 5)
    with torch.no_grad():
        model.shared[0].fc1.own[1].up.weight.normal_()
    assert not torch.allclose(model(tokens), before)


def test_what_a_block_gives_stays_off_the_stream():
    """With mixers that give nothing, the stream is the embedding, whatever the shared blocks say."""
    model, tokens = build().eval(), torch.randint(0, 11, (1, 5))
    with torch.no_grad():
        for layer in model.layers:
            layer.mixer.out_proj.weight.zero_()
        x = model.embedding(tokens)
        assert torch.equal(model._stream(x, None, None, run_layer)[0], x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shared_at": []}, r"shared_at: want layers in \[0, 4\)"),
        ({"shared_at": [2, 1]}, "in rising order"),
        ({"shared_at": [4]}, "shared_at: want layers"),
        ({"n_shared": 4}, "n_shared: want at most the 3 uses in shared_at, got 4"),
        ({"n_heads": 3}, "n_heads: want a divisor of 2 \\* d_model = 16, got 3"),
        ({"n_kv_heads": 3}, "n_kv_heads: want a divisor of n_heads = 4, got 3"),
        ({"n_heads": 16, "rope": True}, "want heads of even width"),
        ({"mixer": {"name": "bidirectional", "mixer": MAMBA2}}, "want a causal mixer"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)
