"""Which attention is chosen, and that one which computes something else never is.

FlashAttention has no kernels for a CPU, so here kernels of its signatures, in plain PyTorch, stand in for it. What lies
between them and the model is real: layouts, windows, gradients, and what torch.compile sees.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend
from torch.testing import assert_close

from distributed import run_distributed
from nanochat.config import AttentionName, model_from_depth
from nanochat.errors import UsageError
from nanochat.model import attention_choice, gpt
from nanochat.model.attention import (
    Attention,
    fa4_attention,
    masked_attention,
    sdpa_attention,
    varlen_attention,
    varlen_or_sdpa_attention,
)
from nanochat.model.attention_choice import (
    LADDER,
    TOLERANCES,
    Backend,
    ChosenAttention,
    choose_attention,
    largest_error,
    missing,
)
from nanochat.model.gpt import GPT
from nanochat.runtime import Runtime
from toolchain import needs_compiler

CPU = torch.device("cpu")
SHAPE = model_from_depth(2, 64, 64, head_dim=32)


def scores_of(q: Tensor, k: Tensor, causal: bool, left: int, right: int) -> Tensor:
    position = torch.arange(q.size(1))
    distance = position[:, None] - position[None, :]
    seen = (distance <= (left if left >= 0 else q.size(1))) & (distance >= -(0 if causal else right))
    return (torch.einsum("bthd,bshd->bhts", q, k) / q.size(-1) ** 0.5).masked_fill(~seen, -torch.inf)


def dense_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, left: int, right: int) -> tuple[Tensor, Tensor]:
    """Result (B, T, H, D) and logsumexp (B, H, T), with FlashAttention's parameters."""
    k, v = (x.repeat_interleave(q.size(2) // k.size(2), dim=2) for x in (k, v))
    scores = scores_of(q, k, causal, left, right)
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).contiguous(), scores.logsumexp(-1)


def dense_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool, left: int, right: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Written out, as a kernel runs where nothing is recorded for gradients."""
    groups = q.size(2) // k.size(2)
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    weights = scores_of(q, k, causal, left, right).softmax(-1)
    dweights = torch.einsum("bthd,bshd->bhts", dy, v)
    dscores = weights * (dweights - (weights * dweights).sum(-1, keepdim=True)) / q.size(-1) ** 0.5
    dq = torch.einsum("bhts,bshd->bthd", dscores, k)
    dk = torch.einsum("bhts,bthd->bshd", dscores, q).unflatten(2, (-1, groups)).sum(3)
    dv = torch.einsum("bhts,bthd->bshd", weights, dy).unflatten(2, (-1, groups)).sum(3)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@pytest.fixture
def flash_kernels() -> Iterator[None]:
    """PyTorch's FlashAttention operator, for a CPU."""

    def batched(ends: Tensor, time: int) -> Callable[[Tensor], Tensor]:
        assert ends.dtype == torch.int32
        assert ends.tolist() == list(range(0, len(ends) * time, time))
        return lambda x: x.view(len(ends) - 1, time, *x.shape[1:])

    def forward(q: Any, k: Any, v: Any, ends: Any, _: Any, time: int, *rest: Any, **options: Any) -> Any:
        split = batched(ends, time)
        window = options["window_size_left"], options["window_size_right"]
        y, logsumexp = dense_forward(split(q), split(k), split(v), rest[2], *window)
        unused = torch.empty(0)
        return y.flatten(0, 1), logsumexp.transpose(0, 1).flatten(1), unused, unused, unused

    def backward(
        dy: Any, q: Any, k: Any, v: Any, y: Any, lse: Any, ends: Any, _: Any, time: int, *rest: Any, **options: Any
    ) -> Any:
        split = batched(ends, time)
        window = options["window_size_left"], options["window_size_right"]
        grads = dense_backward(split(dy), split(q), split(k), split(v), rest[2], *window)
        return tuple(grad.flatten(0, 1) for grad in grads)

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    yield
    library._destroy()


@pytest.fixture(params=[2, 5], ids=["two results", "five results"])
def fa4_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention 4's module, of an old beta and of 4.0.0b36."""
    module = ModuleType("flash_attn.cute.interface")

    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        return_lse: bool,
        causal: bool,
        window_size_left: int | None = None,
        window_size_right: int | None = None,
    ) -> tuple[Tensor | None, ...]:
        assert return_lse
        y, logsumexp = dense_forward(
            q, k, v, causal, -1 if window_size_left is None else window_size_left, window_size_right or 0
        )
        return (y, logsumexp, None, None, None)[: request.param]

    def backward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        dout: Tensor,
        lse: Tensor,
        *,
        causal: bool,
        window_size_left: int | None = None,
        window_size_right: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, logsumexp = forward(
            *(q, k, v),
            return_lse=True,
            causal=causal,
            window_size_left=window_size_left,
            window_size_right=window_size_right,
        )[:2]
        assert_close((out, lse), (y, logsumexp))
        return dense_backward(
            dout, q, k, v, causal, -1 if window_size_left is None else window_size_left, window_size_right or 0
        )

    module._flash_attn_fwd, module._flash_attn_bwd = forward, backward  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", module)


def error_of(attention: Attention, dtype: torch.dtype = torch.float32, num_kv_heads: int = 2) -> float:
    return largest_error(attention, num_heads=4, num_kv_heads=num_kv_heads, head_dim=16, device=CPU, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pytorchs_own_attention_is_well_within_the_tolerance(dtype: torch.dtype) -> None:
    assert error_of(sdpa_attention, dtype) < TOLERANCES[dtype] / 2


def window_too_short(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    return sdpa_attention(q, k, v, window - 1)


def sees_the_future(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    return masked_attention(q, k, v, torch.ones(q.size(1), q.size(1), dtype=torch.bool))


def forgets_gradients(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    return sdpa_attention(q, k.detach() + 0 * k, v, window)


def not_a_number(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    return sdpa_attention(q, k, v, window) * torch.nan


WRONG = [window_too_short, sees_the_future, forgets_gradients, not_a_number]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_kernel_is_outside_the_tolerance(wrong: Attention, dtype: torch.dtype) -> None:
    assert not error_of(wrong, dtype) <= TOLERANCES[dtype]


@pytest.mark.parametrize("attention", [varlen_attention, varlen_or_sdpa_attention])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.usefixtures("flash_kernels")
def test_varlen_gives_the_kernel_rows_windows_and_gradients(attention: Attention, num_kv_heads: int) -> None:
    assert error_of(attention, num_kv_heads=num_kv_heads) < 1e-5


@pytest.mark.parametrize("num_kv_heads", [1, 4])
@pytest.mark.usefixtures("fa4_kernels")
def test_fa4_gives_the_kernel_windows_and_gradients(num_kv_heads: int) -> None:
    assert error_of(fa4_attention, num_kv_heads=num_kv_heads) < 1e-5


@pytest.mark.usefixtures("flash_kernels", "fa4_kernels")
@pytest.mark.parametrize("attention", [varlen_attention, varlen_or_sdpa_attention, fa4_attention])
def test_torch_compile_takes_flash_attention_whole(attention: Attention) -> None:
    torch.compiler.reset()
    compiled = torch.compile(attention, fullgraph=True, dynamic=False, backend="aot_eager")
    assert error_of(compiled) < 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", LADDER)
def test_each_backend_that_this_gpu_can_run_is_exact_also_compiled(name: AttentionName) -> None:
    device = torch.device("cuda")
    reason = missing(LADDER[name], device, torch.bfloat16)
    if reason is not None:
        pytest.skip(reason)
    chosen = choose_attention(name, SHAPE, Runtime(device, torch.bfloat16))
    compiled = torch.compile(chosen.function, fullgraph=True, dynamic=False)
    for head_dim, num_kv_heads in ((64, 4), (128, 2)):
        sizes = {"num_heads": 4, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        for attention in (chosen.function, compiled):
            assert largest_error(attention, **sizes, device=device, dtype=torch.bfloat16) < TOLERANCES[torch.bfloat16]


def test_cudnn_is_preferred_by_the_training_step_and_by_nothing_else() -> None:
    def preferred(_: Tensor) -> Tensor:
        return torch.tensor(torch._C._get_sdp_priority_order()[0])

    usual = int(preferred(torch.empty(0)))
    varlen = ChosenAttention("varlen", varlen_or_sdpa_attention, {}, LADDER["varlen"].context)
    assert int(varlen.around(preferred)(torch.empty(0))) == SDPBackend.CUDNN_ATTENTION.value != usual
    assert int(preferred(torch.empty(0))) == usual
    chosen = choose_attention("auto", SHAPE, Runtime(CPU, torch.float32))
    assert int(chosen.around(preferred)(torch.empty(0))) == usual


@needs_compiler
@pytest.mark.parametrize("name", ["fa4", "varlen", "sdpa"])
@pytest.mark.parametrize("window", [16, 64])
@pytest.mark.usefixtures("flash_kernels", "fa4_kernels")
def test_the_trace_of_compiled_attention_is_kept_for_the_next_start(
    name: AttentionName, window: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    counters.clear()
    chosen = ChosenAttention(name, LADDER[name].load(), {}, LADDER[name].context)
    compiled = torch.compile(chosen.function, fullgraph=True, dynamic=False)
    queries, keys, values = (torch.randn(1, 64, 2, 16, requires_grad=True) for _ in range(3))
    chosen.around(compiled)(queries, keys, values, window).sum().backward()
    assert counters["aot_autograd"]["autograd_cache_bypass"] == 0
    assert counters["aot_autograd"]["autograd_cache_saved"] == 1


@pytest.mark.skipif(torch.version.cuda is None, reason="needs a PyTorch for CUDA, though no GPU")
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("name", ["fa4", "varlen", "sdpa"])
def test_on_a_gpu_the_model_is_one_graph(name: AttentionName, fp8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced with tensors that have a device and no memory, which shows what breaks the graph or is not there."""
    monkeypatch.setattr(gpt, "check_fp8", lambda device: None)
    torch.compiler.reset()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        model = GPT(model_from_depth(4, 512, 256), torch.bfloat16, LADDER[name].load())
        if fp8:
            model.use_fp8(compiled=False)
        with model.quantised():
            inputs, targets = torch.empty(2, 2, 256, dtype=torch.int64)
            graph = torch._dynamo.export(model)(inputs, targets).graph_module.graph
    called = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    expected = {"fa4": "nanochat.fa4.default", "varlen": "torch_attn._varlen_attn"}
    assert expected.get(name, "<built-in function scaled_dot_product_attention>") in called


def test_on_a_cpu_pytorchs_own_attention_is_chosen_and_the_line_says_why_no_other() -> None:
    chosen = choose_attention("auto", SHAPE, Runtime(CPU, torch.float32))
    assert chosen.function is sdpa_attention
    assert str(chosen) == "attention: sdpa; not fa3, fa4, varlen: needs a GPU"


def test_a_backend_asked_for_that_cannot_run_is_refused_in_one_line() -> None:
    refusal = r"^--attention fa3 does not work here \(fa3: needs a GPU\) .* --attention auto"
    with pytest.raises(UsageError, match=refusal) as caught:
        choose_attention("fa3", SHAPE, Runtime(CPU, torch.bfloat16))
    assert "\n" not in str(caught.value)


def raises(*_: object) -> Tensor:
    raise ImportError("libcudart.so.99: no such file\nand a second line")


@pytest.mark.parametrize("broken", [*WRONG, raises])
def test_a_backend_that_fails_or_is_wrong_is_passed_over_with_its_reason(
    broken: Attention, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_choice, "LADDER", {"fa4": Backend(lambda: broken), "sdpa": LADDER["sdpa"]})
    chosen = choose_attention("auto", SHAPE, Runtime(CPU, torch.float32))
    assert chosen.name == "sdpa"
    assert ("libcudart.so.99" if broken is raises else "is off by") in chosen.passed_over["fa4"]
    assert "\n" not in str(chosen)


def name_chosen_where_one_rank_cannot() -> str:
    runtime = Runtime(CPU, torch.float32, torch.distributed.get_rank(), torch.distributed.get_world_size())
    broken: Attention = window_too_short if runtime.rank == 1 else sdpa_attention
    ladder: dict[AttentionName, Backend] = {"fa4": Backend(lambda: broken), "sdpa": LADDER["sdpa"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_choice, "LADDER", ladder)
        return choose_attention("auto", SHAPE, runtime).name


def test_all_ranks_take_what_works_on_each_of_them() -> None:
    assert run_distributed(name_chosen_where_one_rank_cannot, 2) == ["sdpa", "sdpa"]


@pytest.mark.parametrize(
    ("name", "capability", "reason"),
    [
        ("fa3", (8, 0), "needs compute capability 9.0 only, this GPU has 8.0"),
        ("fa3", (10, 0), "needs compute capability 9.0 only, this GPU has 10.0"),
        ("fa4", (8, 9), "needs compute capability 9.0 or newer, this GPU has 8.9"),
        ("fa3", (9, 0), "flash_attn_interface is not installed"),
        ("varlen", (7, 5), "needs compute capability 8.0 or newer, this GPU has 7.5"),
        ("varlen", (9, 0), None),
        ("sdpa", (7, 0), None),
    ],
)
def test_what_a_gpu_lacks_is_said(
    name: AttentionName, capability: tuple[int, int], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert missing(LADDER[name], torch.device("cuda"), torch.bfloat16) == reason
