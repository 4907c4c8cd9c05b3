"""The GPT, in one sitting.

A pre-norm decoder: rotary positions, QK-norm, squared ReLU, no biases, no norm gains, untied head, logits capped
at ±15, grouped key/value heads. The modern variant adds what earned its place in public speedruns
(nanochat's dev/LOG.md and modded-nanogpt's records):

- value embeddings: every other layer adds a second token embedding, gated per head, to its values;
- residual and x0 lambdas: each layer sees a learned mix of the residual stream and the first embedding;
- smear: each position takes a gated share of the previous token's embedding;
- backout: what the middle layer had already written is subtracted, by a learned amount, before the head;
- sliding windows: most layers see a quarter of the context.

The classic variant has none of these and is, weight for weight, what transformers loads as NanoChatForCausalLM.

Weights are float32 masters; each matmul casts its weight to the dtype of its input, which is the compute dtype from
the embedding on. Shapes: B batch, T time, C channels, H query heads, G key/value heads, D head dimension, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.config import SMEAR_GATE_CHANNELS, VALUE_GATE_CHANNELS, ModelConfig
from nanochat.model.attention import Attention, sdpa_attention
from nanochat.model.fp8 import Fp8Weight, check_fp8, fits
from nanochat.model.loss import softcap, softcapped_cross_entropy, softcapped_token_losses
from nanochat.model.size import check_fp8_sizes, flops_per_token, parameter_counts

ROPE_THETA = 100_000.0
# Given explicitly: F.rms_norm's default is the machine epsilon of the input's dtype, 0.0078 in bfloat16.
NORM_EPSILON = 1e-6
# Sharpens attention after QK-norm, split between queries and keys (nanochat, 2026-03). Not in the classic variant.
QK_SCALE = 1.2


def norm(x: Tensor) -> Tensor:
    """RMS norm over the last dimension, without a gain."""
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPSILON)


class Linear(nn.Linear):
    """A matmul without bias whose float32 weight is cast to the dtype of its input."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.fp8: Fp8Weight | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        if self.fp8 is not None and self.fp8.live:
            y: Tensor = self.fp8(x, self.weight)
            return y
        return F.linear(x, self.weight.to(x.dtype))


def rotary_tables(sequence_len: int, head_dim: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's rotation angles, float32 (T, D/2)."""
    channels = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device)
    angles = torch.outer(
        torch.arange(sequence_len, dtype=torch.float32, device=device), ROPE_THETA ** (-channels / head_dim)
    )
    return angles.cos(), angles.sin()


def rotate(x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of each head by its position's angles, by −θ as nanochat checkpoints do.

    Cosine and sine are (T, D/2), or (B, T, D/2) where rows are at different positions.
    """
    first, second = x_BTHD.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)


class CausalSelfAttention(nn.Module):
    """Attention of one layer: project, rotate, normalise, attend within the window, project back."""

    def __init__(self, config: ModelConfig, layer: int, attention: Attention) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.window = config.windows[layer]
        self.qk_scale = QK_SCALE if config.variant == "modern" else 1.0
        self.attention = attention
        self.c_q = Linear(config.n_embd, config.n_head * config.head_dim)
        self.c_k = Linear(config.n_embd, config.n_kv_head * config.head_dim)
        self.c_v = Linear(config.n_embd, config.n_kv_head * config.head_dim)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.ve_gate = Linear(VALUE_GATE_CHANNELS, config.n_kv_head) if config.has_value_embedding(layer) else None

    def forward(
        self,
        x_BTC: Tensor,
        value_embedding_BTC: Tensor | None,
        cos: Tensor,
        sin: Tensor,
    ) -> Tensor:
        """(B, T, C) → (B, T, C)."""
        heads = (*x_BTC.shape[:2], -1, self.head_dim)
        q_BTHD, k_BTGD, v_BTGD = (c(x_BTC).view(heads) for c in (self.c_q, self.c_k, self.c_v))
        if self.ve_gate is not None and value_embedding_BTC is not None:
            gate_BTG1 = 3 * torch.sigmoid(self.ve_gate(x_BTC[..., :VALUE_GATE_CHANNELS])).unsqueeze(-1)
            v_BTGD = v_BTGD + gate_BTG1 * value_embedding_BTC.view(heads)
        q_BTHD, k_BTGD = norm(rotate(q_BTHD, cos, sin)), norm(rotate(k_BTGD, cos, sin))
        if self.qk_scale != 1.0:
            q_BTHD, k_BTGD = q_BTHD * self.qk_scale, k_BTGD * self.qk_scale
        y_BTHD = self.attention(q_BTHD, k_BTGD, v_BTGD, self.window)
        y_BTC: Tensor = self.c_proj(y_BTHD.flatten(2))
        return y_BTC


class MLP(nn.Module):
    """Expand four times, square the ReLU (arXiv 2109.08668), project back."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """(B, T, C) → (B, T, C)."""
        y_BTC: Tensor = self.c_proj(F.relu(self.c_fc(x_BTC)).square())
        return y_BTC


class Block(nn.Module):
    """One layer: attention, then MLP, each on a normalised copy of the residual stream."""

    def __init__(self, config: ModelConfig, layer: int, attention: Attention) -> None:
        super().__init__()
        self.attn = CausalSelfAttention(config, layer, attention)
        self.mlp = MLP(config)

    def forward(
        self,
        x_BTC: Tensor,
        value_embedding_BTC: Tensor | None,
        cos: Tensor,
        sin: Tensor,
    ) -> Tensor:
        """(B, T, C) → (B, T, C)."""
        x_BTC = x_BTC + self.attn(norm(x_BTC), value_embedding_BTC, cos, sin)
        y_BTC: Tensor = x_BTC + self.mlp(norm(x_BTC))
        return y_BTC


class GPT(nn.Module):
    """The whole network.

    Args:
        config: its shape.
        compute_dtype: dtype of activations and matmuls; the weights are float32 in any case.
        attention: the backend, see `nanochat.model.attention`.

    Calling it with tokens and targets gives the summed loss, with tokens alone the logits.
    """

    def __init__(
        self,
        config: ModelConfig,
        compute_dtype: torch.dtype = torch.float32,
        attention: Attention = sdpa_attention,
    ) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "h": nn.ModuleList(Block(config, layer, attention) for layer in range(config.n_layer)),
            }
        )
        self.lm_head = Linear(config.n_embd, config.vocab_size)
        if config.variant == "modern":
            self.value_embeds = nn.ModuleDict(
                {
                    str(layer): nn.Embedding(config.vocab_size, config.n_kv_head * config.head_dim)
                    for layer in range(config.n_layer)
                    if config.has_value_embedding(layer)
                }
            )
            self.resid_lambdas = nn.Parameter(torch.empty(config.n_layer))
            self.x0_lambdas = nn.Parameter(torch.empty(config.n_layer))
            self.smear_gate = Linear(SMEAR_GATE_CHANNELS, 1)
            self.smear_lambda = nn.Parameter(torch.empty(1))
            self.backout_lambda = nn.Parameter(torch.empty(1))
        cos, sin = rotary_tables(config.sequence_len, config.head_dim)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.cos: Tensor
        self.sin: Tensor

    @torch.no_grad()
    def init_weights(self) -> None:
        """Give every weight its start (constants: nanochat's gpt.py, 2026-07).

        =====================  ==========================================================
        wte                    normal, 0.8
        lm_head                normal, 0.001: the first loss is ln V
        c_q, c_k, c_v          uniform with standard deviation 1/√C
        mlp.c_fc               the same × 0.4
        both c_proj            zero: every block starts as the identity
        value embeddings       as c_v
        gates                  uniform in (0, 0.02): slightly open
        resid / x0 lambdas     1.15 → 1.05 and 0.20 → 0.05 over the layers
        smear / backout        0 and 0.2
        =====================  ==========================================================
        """
        bound = (3 / self.config.n_embd) ** 0.5
        nn.init.normal_(self.get_parameter("transformer.wte.weight"), std=0.8)
        nn.init.normal_(self.lm_head.weight, std=0.001)
        for block in self.blocks:
            for projection in (block.attn.c_q, block.attn.c_k, block.attn.c_v):
                nn.init.uniform_(projection.weight, -bound, bound)
            nn.init.uniform_(block.mlp.c_fc.weight, -0.4 * bound, 0.4 * bound)
            nn.init.zeros_(block.attn.c_proj.weight)
            nn.init.zeros_(block.mlp.c_proj.weight)
            if block.attn.ve_gate is not None:
                nn.init.uniform_(block.attn.ve_gate.weight, 0.0, 0.02)
        if self.config.variant == "modern":
            for embedding in self.value_embeds.values():
                nn.init.uniform_(embedding.get_parameter("weight"), -bound, bound)
            depth = torch.linspace(0, 1, self.config.n_layer)
            self.resid_lambdas.copy_(1.15 - 0.10 * depth)
            self.x0_lambdas.copy_(0.20 - 0.15 * depth)
            nn.init.uniform_(self.smear_gate.weight, 0.0, 0.02)
            nn.init.zeros_(self.smear_lambda)
            nn.init.constant_(self.backout_lambda, 0.2)

    @property
    def blocks(self) -> list[Block]:
        """The layers, first to last."""
        return [block for block in self.transformer["h"].children() if isinstance(block, Block)]

    def use_fp8(self, *, compiled: bool) -> None:
        """Make room, on the weights' device, for fp8 copies of all block matrices that fp8 can multiply; not the gates.

        Args:
            compiled: compile the cast.

        Raises:
            UsageError: fp8 cannot multiply by any of them, or not on this device.
        """
        check_fp8_sizes(self.config)
        check_fp8(self.lm_head.weight.device)
        for linear in self.transformer["h"].modules():
            if isinstance(linear, Linear) and fits(linear.weight):
                linear.fp8 = Fp8Weight(linear.weight, compiled=compiled)

    @contextmanager
    def quantised(self) -> Iterator[None]:
        """Multiply in fp8 inside, by the block matrices as they are on entry; nothing changes without `use_fp8`.

        For the micro-batches between two updates. The copies end with it, so no update, loaded checkpoint or
        evaluation ever meets a stale one, and everything but training sees the exact weights.
        """
        linears = [linear for linear in self.transformer["h"].modules() if isinstance(linear, Linear)]
        copies = [(linear.fp8, linear.weight) for linear in linears if linear.fp8 is not None]
        try:
            for copy, weight in copies:
                copy.refresh(weight)
            yield
        finally:
            for copy, _ in copies:
                copy.live = False

    def hidden_states(self, tokens_BT: Tensor) -> Tensor:
        """Run all layers: token ids (B, T) → normalised hidden states (B, T, C) in the compute dtype."""
        time = tokens_BT.size(1)
        if time > self.config.sequence_len:
            raise ValueError(f"{time} tokens do not fit a context of {self.config.sequence_len}")
        cos, sin = self.cos[:time].to(self.compute_dtype), self.sin[:time].to(self.compute_dtype)
        x_BTC = norm(self.transformer["wte"](tokens_BT).to(self.compute_dtype))
        if self.config.variant == "classic":
            for block in self.blocks:
                x_BTC = block(x_BTC, None, cos, sin)
            return norm(x_BTC)

        x_BTC = self._smear(x_BTC)
        x0_BTC = x_BTC
        middle_BTC = x_BTC
        resid_lambdas, x0_lambdas = self.resid_lambdas.to(x_BTC.dtype), self.x0_lambdas.to(x_BTC.dtype)
        for layer, block in enumerate(self.blocks):
            x_BTC = resid_lambdas[layer] * x_BTC + x0_lambdas[layer] * x0_BTC
            value_embedding_BTC = None
            if self.config.has_value_embedding(layer):
                value_embedding_BTC = self.value_embeds[str(layer)](tokens_BT).to(self.compute_dtype)
            x_BTC = block(x_BTC, value_embedding_BTC, cos, sin)
            if layer == self.config.n_layer // 2:
                middle_BTC = x_BTC
        return norm(x_BTC - self.backout_lambda.to(x_BTC.dtype) * middle_BTC)

    def _smear(self, x_BTC: Tensor) -> Tensor:
        """Add to each position but the first a gated share of the one before."""
        gate_BT1 = torch.sigmoid(self.smear_gate(x_BTC[:, 1:, :SMEAR_GATE_CHANNELS]))
        smeared_BTC = x_BTC[:, 1:] + self.smear_lambda.to(x_BTC.dtype) * gate_BT1 * x_BTC[:, :-1]
        return torch.cat((x_BTC[:, :1], smeared_BTC), dim=1)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """Summed loss in nats of the targets that are not −1; without targets the logits, float32 (B, T, V)."""
        hidden_BTC = self.hidden_states(tokens_BT)
        if targets_BT is None:
            return softcap(self.lm_head(hidden_BTC))
        return softcapped_cross_entropy(hidden_BTC, self.lm_head.weight, targets_BT)

    @torch.no_grad()
    def token_losses(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """The loss of every token in nats, float32 (B, T), zero where the target is −1."""
        return softcapped_token_losses(self.hidden_states(tokens_BT), self.lm_head.weight, targets_BT)

    def parameter_counts(self) -> dict[str, int]:
        """Parameters by part, see `nanochat.model.size`."""
        return parameter_counts(self.config)

    def flops_per_token(self) -> int:
        """Training FLOPs per token, forward and backward, see `nanochat.model.size`."""
        return flops_per_token(self.config)


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to, by its name: what it is counted and optimised with."""
    if name.startswith("transformer.wte"):
        return "wte"
    if name.startswith("transformer.h."):
        return "matrices"
    if name.startswith(("value_embeds", "lm_head")):
        return name.split(".")[0]
    return "scalars"
