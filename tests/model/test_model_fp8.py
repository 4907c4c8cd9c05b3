"""fp8 products: as exact as eight bits allow, never with old weights, and in training only.

The CPU has the same operation as the GPU, so all but its layouts and its speed is tested here.
"""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat.config import ModelConfig
from nanochat.errors import UsageError
from nanochat.model import fp8
from nanochat.model.gpt import GPT
from toolchain import needs_compiler

SMALL = ModelConfig(vocab_size=64, sequence_len=32, n_layer=2, n_head=2, n_kv_head=1, n_embd=32)
DTYPES = [torch.float8_e4m3fn, torch.float8_e5m2]
# Half the distance between neighbours: three bits of mantissa, or two.
RELATIVE_ERROR = {torch.float8_e4m3fn: 2.0**-4, torch.float8_e5m2: 2.0**-3}


def layer(rows: int = 64, seed: int = 0) -> tuple[fp8.Fp8Weight, nn.Parameter, Tensor, Tensor]:
    """A weight (48, 32) with its copies, an input, and a gradient of the output."""
    torch.manual_seed(seed)
    weight = nn.Parameter(torch.randn(48, 32))
    copies = fp8.Fp8Weight(weight, compiled=False)
    copies.refresh(weight)
    x = torch.randn(rows, 32, dtype=torch.bfloat16, requires_grad=True)
    return copies, weight, x, torch.randn(rows, 48, dtype=torch.bfloat16) * 1e-6


def small_model() -> GPT:
    """A model whose every matrix takes part, which the zeros of its start do not."""
    torch.manual_seed(0)
    model = GPT(SMALL, torch.bfloat16)
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.use_fp8(compiled=False)
    return model


def batch(seed: int = 1) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 64, (2, 33), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


def relative_error(found: Tensor, exact: Tensor) -> float:
    return ((found.float() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES)
@given(exponent=st.integers(-30, 30), seed=st.integers(0, 2**32))
def test_values_keep_their_digits_whatever_their_size(dtype: torch.dtype, exponent: int, seed: int) -> None:
    x = torch.randn(16, 16, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    values, scale = fp8.quantise(x, dtype)
    # Below the smallest normal number the distance is the same for all, and counts against the largest value.
    smallest = x.abs().max() * torch.finfo(dtype).tiny / torch.finfo(dtype).max
    error = (values.float() * scale - x).abs()
    assert (error <= RELATIVE_ERROR[dtype] * x.abs().clamp(min=smallest) * 1.001).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_stay_zeros(dtype: torch.dtype) -> None:
    values, scale = fp8.quantise(torch.zeros(16, 16), dtype)
    assert torch.equal(values.float() * scale, torch.zeros(16, 16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_value_is_exact_and_the_others_do_not_overflow(dtype: torch.dtype) -> None:
    x = torch.full((16, 16), 1e-3)
    x[3, 5] = -3e4
    values, scale = fp8.quantise(x, dtype)
    assert values.float().isfinite().all()
    assert_close((values.float() * scale)[3, 5].item(), -3e4)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_makes_no_finite_product(dtype: torch.dtype, value: float) -> None:
    x = torch.ones(16, 16)
    x[3, 5] = value
    product = fp8.multiply(fp8.quantise(x, dtype), fp8.quantise(torch.ones(16, 16), torch.float8_e4m3fn), torch.float32)
    assert not product[3].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_those_of_the_quantised_values(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    first = fp8.quantise(torch.randn(32, 64), dtype)
    second = fp8.quantise(torch.randn(48, 64) * 100, torch.float8_e4m3fn)
    exact = (first[0].float() * first[1]) @ (second[0].float() * second[1]).t()
    assert_close(fp8.multiply(first, second, torch.float32), exact, rtol=1e-5, atol=1e-4 * float(exact.abs().max()))


def test_output_and_both_gradients_are_close_to_the_exact_ones() -> None:
    copies, weight, x, gradient = layer()
    y = copies(x, weight)
    y.backward(gradient)
    assert weight.grad is not None
    assert x.grad is not None
    assert (y.dtype, x.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert relative_error(y, x.float() @ weight.t()) < 0.05
    assert relative_error(x.grad, gradient.float() @ weight) < 0.08
    assert relative_error(weight.grad, gradient.float().t() @ x.float()) < 0.08


@needs_compiler
def test_compiled_it_is_one_graph_with_the_same_results() -> None:
    eager, compiled = layer(), layer()
    function = torch.compile(compiled[0], fullgraph=True, dynamic=False)
    outputs = []
    for forward, (_, weight, x, gradient) in ((eager[0], eager), (function, compiled)):
        y = forward(x, weight)
        y.backward(gradient)
        outputs.append((y, x.grad, weight.grad))
    for one, other in zip(*outputs, strict=True):
        assert_close(one, other)


@needs_compiler
def test_the_compiled_cast_writes_the_same_copies() -> None:
    copies, weight, _, _ = layer()
    compiled = fp8.Fp8Weight(weight, compiled=True)
    compiled.refresh(weight)
    for (name, one), (_, other) in zip(copies.named_buffers(), compiled.named_buffers(), strict=True):
        assert torch.equal(one.float(), other.float()), name


class Products(TorchDispatchMode):
    """Records the operands of all fp8 products."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._scaled_mm.default:
            self.seen.append((args[0], args[1]))
        return func(*args, **(kwargs or {}))


def test_every_operand_has_the_layout_and_type_that_a_gpu_asks_for() -> None:
    copies, weight, x, gradient = layer()
    with Products() as products:
        copies(x, weight).backward(gradient)
    types = []
    for first, second in products.seen:
        assert first.stride() == (first.size(1), 1), "rows first"
        assert second.stride() == (1, second.size(0)), "columns first"
        assert all(size % 16 == 0 for size in (*first.shape, *second.shape))
        types.append((first.dtype, second.dtype))
    e4m3, e5m2 = DTYPES
    assert types == [(e4m3, e4m3), (e5m2, e4m3), (e5m2, e4m3)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_computes_what_the_cpu_does() -> None:
    outputs = []
    for device in ("cpu", "cuda"):
        copies, weight, x, gradient = layer()
        weight = nn.Parameter(weight.detach().to(device))
        x = x.detach().to(device).requires_grad_()
        y = copies.to(device)(x, weight)
        y.backward(gradient.to(device))
        outputs.append((y, x.grad, weight.grad))
    for one, other in zip(*outputs, strict=True):
        assert relative_error(other.cpu(), one.float()) < 0.01


def test_a_training_step_is_close_to_that_in_bf16_and_all_matrices_take_part() -> None:
    model = small_model()
    exact = copy.deepcopy(model)
    with model.quantised():
        loss = model(*batch())
        loss.backward()
    reference = exact(*batch())
    reference.backward()
    assert loss != reference
    assert_close(loss, reference, rtol=0.01, atol=0)
    for (name, parameter), other in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert parameter.grad is not None, name
        assert other.grad is not None, name
        if name.startswith("transformer.h.") and "gate" not in name:
            assert 0 < relative_error(parameter.grad, other.grad) < 0.25, name


def test_gates_and_matrices_of_odd_sizes_stay_as_they_are() -> None:
    model = GPT(ModelConfig(vocab_size=64, sequence_len=32, n_layer=1, n_head=4, n_kv_head=1, n_embd=32))
    model.use_fp8(compiled=False)
    names = {name.removesuffix(".fp8") for name, part in model.named_modules() if isinstance(part, fp8.Fp8Weight)}
    assert names == {f"transformer.h.0.{name}" for name in ("attn.c_q", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}, (
        "c_k and c_v have eight rows"
    )


def test_copies_follow_every_change_of_the_weights() -> None:
    model = small_model()
    with model.quantised():
        before = model(*batch()).item()
    changed = {name: value + torch.randn_like(value) * 0.1 for name, value in model.state_dict().items()}
    with model.quantised():
        assert model(*batch()).item() == before
    model.load_state_dict(changed)
    with model.quantised():
        after = model(*batch()).item()
    fresh = small_model()
    fresh.load_state_dict(changed)
    with fresh.quantised():
        assert fresh(*batch()).item() == after != before


def test_between_the_steps_the_model_computes_with_its_exact_weights() -> None:
    model = small_model()
    exact = GPT(SMALL, torch.bfloat16)
    exact.load_state_dict(model.state_dict())
    with model.quantised():
        assert not torch.equal(model.token_losses(*batch()), exact.token_losses(*batch()))
    with pytest.raises(RuntimeError), model.quantised():
        raise RuntimeError
    assert torch.equal(model.token_losses(*batch()), exact.token_losses(*batch()))
    assert torch.equal(model(*batch()), exact(*batch()))


def test_copies_are_no_part_of_a_checkpoint() -> None:
    assert small_model().state_dict().keys() == GPT(SMALL).state_dict().keys()


def test_a_toy_training_learns_as_in_bf16() -> None:
    losses = {}
    for uses_fp8 in (True, False):
        model = small_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for step in range(60):
            with model.quantised() if uses_fp8 else torch.enable_grad():
                loss = model(*batch(step % 4)) / 64
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
        losses[uses_fp8] = sum(model.token_losses(*batch(index)).mean().item() for index in range(4)) / 4
    assert losses[False] < 3.5, "it learns at all; a guess is 4.2"
    assert abs(losses[True] - losses[False]) < 0.1


def test_a_compiled_model_is_one_graph_and_compiled_once_for_all_steps() -> None:
    model = small_model()
    forward = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with model.quantised():
        forward(*batch()).backward()
    optimizer.step()
    with torch.compiler.set_stance("fail_on_recompile"), model.quantised():
        compiled = forward(*batch()).item()
        assert_close(compiled, model(*batch()).item(), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("n_embd", "sequence_len", "what"), [(24, 32, "width"), (32, 20, "context")])
def test_shapes_that_fp8_cannot_multiply_are_refused(n_embd: int, sequence_len: int, what: str) -> None:
    model = GPT(ModelConfig(64, sequence_len, n_layer=1, n_head=2, n_kv_head=2, n_embd=n_embd))
    with pytest.raises(UsageError, match=f"a {what} that is a multiple of 16"):
        model.use_fp8(compiled=False)


@pytest.mark.parametrize(
    ("capability", "refused"), [((8, 0), True), ((8, 9), False), ((9, 0), False), ((10, 0), False)]
)
def test_gpus_without_fp8_are_refused(
    capability: tuple[int, int], refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    if not refused:
        fp8.check_fp8(torch.device("cuda"))
        return
    with pytest.raises(UsageError, match="NVIDIA A100 — leave out --fp8"):
        fp8.check_fp8(torch.device("cuda"))
