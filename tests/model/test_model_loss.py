"""The chunked loss is the plain one: same value, same gradients, whatever the chunks."""

import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from nanochat.model.loss import less_one_at, softcap, softcapped_cross_entropy, softcapped_token_losses


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 9),
    time=st.integers(1, 5),
    vocab=st.integers(1, 40),
    chunk=st.integers(1, 50),
    ignored=st.floats(0, 1),
    scale=st.sampled_from([0.1, 5.0, 200.0]),
    seed=st.integers(0, 1000),
)
@example(rows=1, time=4, vocab=5, chunk=1, ignored=0.0, scale=200.0, seed=2)
def test_loss_and_gradients_equal_the_plain_composition(
    rows: int, time: int, vocab: int, chunk: int, ignored: float, scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, time, 6, generator=generator, dtype=torch.float32).requires_grad_()
    head = (torch.randn(vocab, 6, generator=generator) * scale).requires_grad_()
    targets = torch.randint(0, vocab, (rows, time), generator=generator)
    targets[torch.rand(rows, time, generator=generator) < ignored] = -1

    plain = F.cross_entropy(
        softcap(F.linear(hidden, head)).flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum"
    )
    plain_gradients = torch.autograd.grad(plain, (hidden, head))
    loss = softcapped_cross_entropy(hidden, head, targets, chunk_rows=chunk)
    gradients = torch.autograd.grad(3 * loss, (hidden, head))

    assert_close(loss, plain, rtol=1e-4, atol=1e-5)
    # Where the cap is reached its slope is the rounding of 1 − 1, and that of a hidden state is multiplied by the head.
    for gradient, expected in zip(gradients, plain_gradients, strict=True):
        assert_close(gradient, 3 * expected, rtol=1e-3, atol=1e-4 * max(1, scale / 20))
    token_losses = softcapped_token_losses(hidden, head, targets)
    assert_close(token_losses.sum(), plain.detach(), rtol=1e-4, atol=1e-5)


def test_extreme_logits_stay_finite() -> None:
    hidden = torch.full((1, 4, 2), 1e4, requires_grad=True)
    head = torch.tensor([[1e4, 1e4], [-1e4, -1e4]], requires_grad=True)
    loss = softcapped_cross_entropy(hidden, head, torch.tensor([[0, 1, 0, 1]]))
    loss.backward()
    assert loss.isfinite()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


def test_the_way_of_a_gpu_to_subtract_the_target_gives_the_same() -> None:
    torch.manual_seed(0)
    probability_NV, targets_N1 = torch.rand(7, 11), torch.randint(0, 11, (7, 1))
    fused = less_one_at(probability_NV.clone(), targets_N1, is_fused=True)
    assert torch.equal(fused, less_one_at(probability_NV.clone(), targets_N1, is_fused=False))
    assert torch.equal(fused.argmin(dim=1, keepdim=True), targets_N1)
