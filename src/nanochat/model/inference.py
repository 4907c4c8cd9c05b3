"""The network once more, for generation: the same function of the same weights, in fewer and cheaper operations.

A step of one token is a chain of tiny operations, whose number decides its time on a CPU as on a GPU. So, other than in
`nanochat.model.gpt`, which is for training and reads like the architecture, here

- weights are cast once, and on a CPU laid out once as its matmuls want them;
- queries, keys, values and the gate of the value embedding are one matmul; queries and keys are rotated and normalised
  as one tensor;
- learned scalars are numbers, and the sharpening of attention is the gain of a norm;
- the tokens before are in a cache.

Shapes: B batch, T time, C channels, H query heads, G key/value heads, D head dimension, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.config import SMEAR_GATE_CHANNELS, VALUE_GATE_CHANNELS, ModelConfig
from nanochat.model.attention import varlen_attention
from nanochat.model.gpt import GPT, NORM_EPSILON, norm
from nanochat.model.kv_cache import Chunk, KVCache, Token, has_flash_attention

# On a CPU, smaller float32 weights are multiplied faster as they are.
PACKED_FLOAT32_ELEMENTS = 2**20
# Tensor cores want rows of the result to begin at multiples of this many elements.
ALIGNMENT = 8


class Matmul:
    """x → x Wᵀ, with the weight (out, in) of a dtype and in the layout that is fastest on its device."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.weight = weight.detach().to(dtype)
        self.nbytes = self.weight.nbytes
        self.is_packed = self.weight.device.type == "cpu" and bool(torch._C._has_mkldnn)
        if dtype == torch.bfloat16:
            self.is_packed = self.is_packed and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        else:
            self.is_packed = self.is_packed and weight.numel() >= PACKED_FLOAT32_ELEMENTS
        if self.is_packed:
            # Otherwise oneDNN reorders the weight at every call, half of the time of one row (benchmarks/LOG.md).
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight)

    def __call__(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        if not self.is_packed:
            return F.linear(x, self.weight)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")
        return y


@dataclass(frozen=True)
class _Layer:
    """One layer's weights; what the modern variant alone has is None or a number that changes nothing elsewhere."""

    qkv_and_gate: Matmul
    attention_out: Matmul
    mlp_in: Matmul
    mlp_out: Matmul
    value_embedding: Tensor | None
    resid_lambda: float
    x0_lambda: float


class InferenceModel:
    """A model to generate with.

    Args:
        model: the network, which is not changed. Weights that are neither cast nor laid out anew are shared with it, so
            once it is trained on this one is neither the old nor the new one.
    """

    @torch.no_grad()
    def __init__(self, model: GPT) -> None:
        self.config: ModelConfig = model.config
        self.dtype, self.device = model.compute_dtype, model.lm_head.weight.device
        self.windows = [block.attn.window for block in model.blocks]
        self.attention = model.blocks[0].attn.attention
        if has_flash_attention(self.device, self.dtype, self.config.head_dim):
            # What is fastest for training, with its one length, may compile or plan anew for each length of a prompt.
            self.attention = varlen_attention
        self.wte = self._cast(model.get_parameter("transformer.wte.weight"))
        self.lm_head = Matmul(model.lm_head.weight, self.dtype)
        self.layers = [self._layer(model, layer) for layer in range(model.config.n_layer)]
        cos, sin = model.cos.to(self.dtype), model.sin.to(self.dtype)
        # Per position what the channels are multiplied by, and what their other halves are.
        self.rotation_T2D = torch.stack((torch.cat((cos, cos), dim=1), torch.cat((sin, -sin), dim=1)), dim=1)
        self.qk_gain_D = torch.full(
            (self.config.head_dim,), model.blocks[0].attn.qk_scale, dtype=self.dtype, device=self.device
        )
        self.backout_lambda = 0.0
        if self.config.variant == "modern":
            self.smear_gate = self._cast(model.smear_gate.weight)
            self.smear_lambda = float(self._cast(model.smear_lambda))
            self.backout_lambda = float(self._cast(model.backout_lambda))

    @property
    def bytes_per_step(self) -> int:
        """Weights that a step of one token reads, whatever the rows; of embeddings it reads a row each."""
        matmuls = [m for layer in self.layers for m in vars(layer).values() if isinstance(m, Matmul)]
        return sum(m.nbytes for m in (self.lm_head, *matmuls))

    def new_cache(self, batch_size: int, capacity: int | None = None) -> KVCache:
        """An empty cache for this model."""
        return KVCache(self.config, batch_size, capacity, windows=self.windows, device=self.device, dtype=self.dtype)

    @torch.inference_mode()
    def next_logits(self, step: Chunk | Token) -> Tensor:
        """The logits after the last token of each row of a step, without the cap, in the compute dtype (B, V)."""
        config, positions_BT = self.config, step.positions.clamp(max=self.config.sequence_len - 1)
        rotation_BT2D = self.rotation_T2D[positions_BT]
        cos_BT1D, sin_BT1D = rotation_BT2D[..., :1, :], rotation_BT2D[..., 1:, :]
        if config.variant == "classic":
            x_BTC = norm(F.embedding(step.tokens, self.wte))
        else:
            x_BTC = self._smeared(step, positions_BT)
        x0_BTC = middle_BTC = x_BTC
        for number, layer in enumerate(self.layers):
            if config.variant == "modern":
                x_BTC = torch.add(x_BTC * layer.resid_lambda, x0_BTC, alpha=layer.x0_lambda)
            x_BTC = x_BTC + self._attention(number, norm(x_BTC), step, cos_BT1D, sin_BT1D)
            x_BTC = x_BTC + layer.mlp_out(F.relu(layer.mlp_in(norm(x_BTC))).square_())
            if number == config.n_layer // 2:
                middle_BTC = x_BTC
        x_BC = step.last(x_BTC)
        if config.variant == "modern":
            x_BC = torch.sub(x_BC, step.last(middle_BTC), alpha=self.backout_lambda)
        logits_BV = self.lm_head(norm(x_BC))
        step.finish()
        return logits_BV

    def _smeared(self, step: Chunk | Token, positions_BT: Tensor) -> Tensor:
        """Embeddings, each with a gated share of the one before."""
        tokens_Bt = torch.cat((step.cache.previous_B[:, None], step.tokens), dim=1)
        x_BtC = norm(F.embedding(tokens_Bt, self.wte))
        # At a start there is none before.
        share_BT1 = torch.sigmoid(F.linear(x_BtC[:, 1:, :SMEAR_GATE_CHANNELS], self.smear_gate)) * self.smear_lambda
        return torch.addcmul(x_BtC[:, 1:], share_BT1 * (positions_BT > 0).unsqueeze(-1), x_BtC[:, :-1])

    def _attention(self, number: int, x_BTC: Tensor, step: Chunk | Token, cos: Tensor, sin: Tensor) -> Tensor:
        layer, config = self.layers[number], self.config
        heads, groups, head_dim = config.n_head, config.n_kv_head, config.head_dim
        all_BTX = layer.qkv_and_gate(x_BTC)
        each_head = (*x_BTC.shape[:2], -1, head_dim)
        qkv_BTND = all_BTX[..., : (heads + 2 * groups) * head_dim].view(each_head)
        qk_BTND, v_BTGD = qkv_BTND[:, :, : heads + groups], qkv_BTND[:, :, heads + groups :]
        if layer.value_embedding is not None:
            gate_BTG1 = torch.sigmoid(all_BTX[..., -_aligned(groups) :][..., :groups]).unsqueeze(-1)
            value_BTGD = F.embedding(step.tokens, layer.value_embedding).view(each_head)
            v_BTGD = torch.addcmul(v_BTGD, gate_BTG1, value_BTGD, value=3)
        qk_BTND = torch.addcmul(qk_BTND * cos, qk_BTND.roll(head_dim // 2, dims=-1), sin)
        qk_BTND = F.rms_norm(qk_BTND, (head_dim,), weight=self.qk_gain_D, eps=NORM_EPSILON)
        q_BTHD, k_BTGD = qk_BTND[:, :, :heads], qk_BTND[:, :, heads:]
        y_BTHD = step.attend(number, q_BTHD, k_BTGD, v_BTGD, self.windows[number], self.attention)
        return layer.attention_out(y_BTHD.flatten(2))

    def _layer(self, model: GPT, number: int) -> _Layer:
        block, config = model.blocks[number], model.config
        attn, is_modern = block.attn, config.variant == "modern"
        weights = [attn.c_q.weight, attn.c_k.weight, attn.c_v.weight]
        value_embedding = None
        if attn.ve_gate is not None:
            # It reads the first channels only, and is filled up to whole ones and to alignment.
            padding = (0, config.n_embd - VALUE_GATE_CHANNELS, 0, _aligned(config.n_kv_head) - config.n_kv_head)
            weights.append(F.pad(attn.ve_gate.weight, padding))
            value_embedding = self._cast(model.get_parameter(f"value_embeds.{number}.weight"))
        return _Layer(
            Matmul(torch.cat(weights), self.dtype),
            Matmul(attn.c_proj.weight, self.dtype),
            Matmul(block.mlp.c_fc.weight, self.dtype),
            Matmul(block.mlp.c_proj.weight, self.dtype),
            value_embedding,
            float(self._cast(model.resid_lambdas)[number]) if is_modern else 1.0,
            float(self._cast(model.x0_lambdas)[number]) if is_modern else 0.0,
        )

    def _cast(self, weight: Tensor) -> Tensor:
        return weight.detach().to(self.dtype)


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT
