import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from statewise import mixers, ops, recipes
from statewise.recipes.compare.cost import FlopCounter, match_width, parameters, step_flops
from statewise.training.options import Training


def _counted(work):
    with FlopCounter() as counter:
        work()
    return counter.total, counter.uncounted


def test_products_of_a_linear_layer_and_its_gradients():
    layer, x = nn.Linear(16, 32), torch.randn(5, 16, requires_grad=True)
    assert _counted(lambda: layer(x)) == (2 * 5 * 16 * 32, set())
    assert _counted(lambda: layer(x).sum().backward()) == (3 * 2 * 5 * 16 * 32, set())


def test_complex_products_are_four_real_ones():
    a = torch.randn(3, 4, dtype=torch.complex64)
    assert _counted(lambda: a @ a.mT) == (4 * 2 * 3 * 4 * 3, set())


@pytest.mark.parametrize("name", ["ssd", "short_conv"])
def test_an_op_counts_by_its_formula_and_twice_that_backward(name):
    spec = ops.OPS[name]
    cases = spec.load_cases()
    generator = torch.Generator().manual_seed(0)
    inputs = cases.sample(cases.VARIANTS[0], 2, 40, dtype=torch.float32, decay="mixed", generator=generator)
    for value in inputs.values():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            value.requires_grad_()
    total, uncounted = _counted(lambda: spec.run(**inputs)[0].sum().backward())
    assert not uncounted
    # Around the op may be products of the step sizes with their weights, and no more than that.
    assert 3 * cases.flops(inputs) <= total < 3.1 * cases.flops(inputs)


def test_kernels_of_time_invariant_systems():
    D, N, L = 3, 5, 40
    modes = [torch.randn(D, N, dtype=torch.complex64, requires_grad=True) for _ in range(2)]
    log_a = torch.complex(-torch.rand(D, N), torch.randn(D, N))
    forward = 4 * D * N * L  # the real part of a complex product, for each mode and position
    assert _counted(lambda: ops.diagonal_kernel(log_a, modes[0], L).sum().backward()) == (3 * forward, set())
    assert _counted(lambda: ops.diagonal_kernel(-torch.rand(D, N), torch.randn(D, N), L)) == (forward // 2, set())
    forward = 8 * D * N * (L // 2 + 1)  # four real products, for each mode and frequency
    assert _counted(lambda: ops.cauchy(modes[1], log_a, L).abs().sum().backward()) == (3 * forward, set())


def test_a_causal_mask_halves_attention():
    q = torch.randn(2, 3, 8, 4)
    full, _ = _counted(lambda: F.scaled_dot_product_attention(q, q, q))
    half, _ = _counted(lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True))
    assert (full, half) == (4 * 2 * 3 * 8 * 8 * 4, 2 * 2 * 3 * 8 * 8 * 4)


def test_fourier_transforms():
    x = torch.randn(3, 64)
    assert _counted(lambda: torch.fft.rfft(x))[0] == int(2.5 * 3 * 64 * math.log2(64))
    assert _counted(lambda: torch.fft.irfft(torch.fft.rfft(x), 64))[0] == pytest.approx(
        2.5 * (3 * 64 + 3 * 64) * math.log2(64), rel=0.05
    )


def test_a_step_of_a_recipe_is_counted_from_two_rows():
    def flops(rows):
        training = Training(steps=1, batch_size=rows)
        made = recipes.get("probes.mqar")(model="attention", d_model=32, n_layer=1, length=24, training=training)
        return step_flops(made)[0], made

    one, made = flops(1)
    four, _ = flops(4)
    assert four == 4 * one  # all of an attention model depends on the rows
    weights = sum(p.numel() for n, p in made.model.named_parameters() if p.ndim == 2 and "embed" not in n)
    head = made.model.config["vocab_size"] * 32  # tied with the embedding
    products = 3 * 2 * 24 * (weights + head)
    scores = 3.5 * 2 * 24 * 24 * 32  # forward two products, backward five
    assert one == pytest.approx(products + scores, rel=0.02)


def test_the_width_found_is_the_best_of_all_widths():
    for target in (1_000, 20_000, 55_553, 430_000, 3_000_000):
        width, count = match_width(lambda w: 12 * w * w + 100 * w, 64, target)
        best = min(range(4, 1000, 4), key=lambda w: abs(12 * w * w + 100 * w - target))
        assert (width, count) == (best, 12 * best * best + 100 * best)


def test_widths_that_a_model_refuses_are_passed_over():
    def count(width):
        if width % 48:
            raise ValueError("heads")
        return width * width

    assert match_width(count, 96, 140 * 140) == (144, 144 * 144)


def test_parameters():
    assert parameters(nn.Linear(3, 4)) == 16


def test_a_recurrence_of_pytorch_counts():
    """A product with each matrix at each position, twice as much backward."""
    mixer, x = mixers.create("lstm", 8), torch.randn(3, 5, 8, requires_grad=True)
    forward = 2 * 15 * (2 * 32 * 8)
    assert _counted(lambda: mixer(x)) == (forward, set())
    assert _counted(lambda: mixer(x).sum().backward()) == (3 * forward, set())
