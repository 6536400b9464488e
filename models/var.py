"""The VAR transformer: from the scales so far to logits of the next scale (Sec. 3.2, Fig. 4 right).

It does not own the tokenizer: it maps inputs of code width C and class labels to logits. `forward` is teacher-forced
training, all scales at once; `forward_scale` is one scale of generation. Dropping labels for guidance and drawing
stochastic depth are the caller's, so that the model is a function of its arguments. In bf16 and fp16 the embeddings are
added in that precision, where the public code adds them in float32; the logits are float32 always.

Shapes: B batch, K scales, L tokens, p_k side of token map k, C code width, D model width, V vocabulary.
"""

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from models.attention import PER_SCALE, BlockCausalAttention
from models.scales import PATCH_NUMS_256, Scales
from models.transformer import (
    INITIAL_LOG_SCALE,
    NUM_MODULATIONS,
    AdaLNBlock,
    Attend,
    ClassVectors,
    FinalNorm,
    KVCache,
    LayerNormBlock,
    PlainFinalNorm,
    cached_step,
)

Block = AdaLNBlock | LayerNormBlock
HEAD_DIM = 64
ADALN, SHARED_ADALN, LAYER_NORM = "adaln", "shared_adaln", "layer_norm"
NORMS = (ADALN, SHARED_ADALN, LAYER_NORM)
# what a block keeps for the backward pass: all; its input alone; its input and what matrix products and attention gave
NO_CHECKPOINTING, FULL_CHECKPOINTING, SELECTIVE_CHECKPOINTING = "none", "full", "selective"
CHECKPOINTINGS = (NO_CHECKPOINTING, FULL_CHECKPOINTING, SELECTIVE_CHECKPOINTING)
KEPT_OPERATIONS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)


@dataclass(frozen=True)
class VARConfig:
    """A VAR transformer. `depth` is the dial; width, heads and stochastic depth follow from it (eq. 7)."""

    depth: int
    patch_nums: tuple[int, ...] = PATCH_NUMS_256
    vocab_size: int = 4096  # V, the tokenizer's
    code_width: int = 32  # C, the tokenizer's
    num_classes: int = 1000  # 0: unconditional; every label is then 0, the null class
    norm: str = ADALN  # shared_adaln: one map for all blocks (512 px); layer_norm: none (Table 3, row 2)
    qk_norm: bool = True  # unit-norm queries and keys
    mlp_ratio: float = 4.0  # hidden width of the feed-forward, in units of width
    init_gamma: float = 1e-3  # factor on the initial weights of the gates
    init_head: float = 0.02  # factor on the initial weights of the head

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_nums", Scales(self.patch_nums).patch_nums)
        for name, least in (("depth", 1), ("vocab_size", 1), ("code_width", 1), ("num_classes", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)} must be {least} or more")
        if self.norm not in NORMS:
            raise ValueError(f"norm '{self.norm}' is not one of {', '.join(NORMS)}")
        for name in ("mlp_ratio", "init_gamma", "init_head"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} {getattr(self, name)} must be positive")

    @property
    def width(self) -> int:
        """Width D of the model."""
        return HEAD_DIM * self.depth  # w = 64 d, eq. 7

    @property
    def num_heads(self) -> int:
        """Attention heads of each block."""
        return self.depth  # h = d, eq. 7

    @property
    def drop_path_rate(self) -> float:
        """Stochastic depth of the last block; it grows linearly from 0 at the first. eq. 7 calls it the drop rate."""
        return 0.1 * self.depth / 24  # dr = 0.1 d / 24, eq. 7

    @property
    def hidden_width(self) -> int:
        """Width of the feed-forward's hidden layer."""
        return round(self.mlp_ratio * self.width)

    @property
    def null_class(self) -> int:
        """The label that stands for "no class"."""
        return self.num_classes

    @property
    def is_conditional(self) -> bool:
        """Tell whether there are classes besides the null class."""
        return self.num_classes > 0

    @property
    def scales(self) -> Scales:
        """The schedule of token maps."""
        return Scales(self.patch_nums)

    @property
    def num_parameters(self) -> int:
        """The number of all parameters, in closed form; eq. 8 counts only 18 d w^2, the matrices of the blocks."""
        w, d, scales = self.width, self.depth, self.scales
        attention = 4 * w**2 + 3 * w + (self.num_heads if self.qk_norm else 0)
        feed_forward = 2 * w * self.hidden_width + self.hidden_width + w
        adaln_map = NUM_MODULATIONS * (w**2 + w)
        norms = {
            ADALN: d * adaln_map + 2 * (w**2 + w),
            LAYER_NORM: d * 4 * w + 2 * w,
            SHARED_ADALN: adaln_map + d * NUM_MODULATIONS * w + 2 * (w**2 + w),
        }[self.norm]
        num_positions = scales.first_tokens + scales.num_tokens + scales.num_scales
        embeddings = (self.code_width + 1) + (self.num_classes + 1) + num_positions
        head = w * self.vocab_size + self.vocab_size
        return d * (attention + feed_forward) + norms + embeddings * w + head


class VAR(nn.Module):
    """Predicts every token of scale k from all scales before k, in parallel (eq. 6)."""

    def __init__(self, config: VARConfig, *, seed: int = 0) -> None:
        """Initial weights are a function of config and `seed` alone; on the meta device there are none."""
        super().__init__()
        self.config = config
        self.scales = config.scales
        self.checkpointing = NO_CHECKPOINTING  # set from outside: one of CHECKPOINTINGS
        self.attention = PER_SCALE  # set from outside: one of models.attention.ATTENTIONS
        self._cached_step = cached_step  # what `compile_generation` replaces
        width = config.width
        self.class_embedding = nn.Embedding(config.num_classes + 1, width)  # the last row is the null class
        self.start_position = nn.Parameter(torch.empty(self.scales.first_tokens, width))
        self.position_embedding = nn.Parameter(torch.empty(self.scales.num_tokens, width))
        self.scale_embedding = nn.Embedding(self.scales.num_scales, width)
        self.input_embedding = nn.Linear(config.code_width, width)
        is_shared = config.norm == SHARED_ADALN
        self.shared_modulation = nn.Linear(width, NUM_MODULATIONS * width) if is_shared else None
        self.blocks = nn.ModuleList(make_block(config) for _ in range(config.depth))
        self.final_norm = PlainFinalNorm(width) if config.norm == LAYER_NORM else FinalNorm(width)
        self.head = nn.Linear(width, config.vocab_size)
        self.init_weights(torch.Generator("cpu").manual_seed(seed))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Draw all weights anew with the public code's deviations, from a CPU generator: the same on every device."""
        if self.position_embedding.is_meta:
            return
        width, depth, config = self.config.width, self.config.depth, self.config
        std = math.sqrt(1 / (3 * width))
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif name.endswith("log_scale"):
                parameter.fill_(INITIAL_LOG_SCALE)
            elif name.endswith("norm.weight"):  # of plain layer norms
                parameter.fill_(1)
            else:
                is_offset = name.endswith("modulation.offset")  # shared AdaLN: the one table with its own std
                draw_(parameter, std=width**-0.5 if is_offset else std, generator=generator)
        self.head.weight.mul_(config.init_head)  # logits near 0, so the first loss is ln V
        for name, parameter in self.named_parameters():
            if name.endswith(("attention.proj.weight", "feed_forward.fc2.weight")):
                parameter.div_(math.sqrt(2 * depth))  # 2d branches add up to unit variance
            elif name.endswith(("modulation.linear.weight", "modulation.offset")):
                # the rows are the two gates, then scales and shifts: gates near 0 make a block start as the identity
                rows = parameter.view(NUM_MODULATIONS, -1)
                rows[:2].mul_(config.init_gamma)
                rows[2:].mul_(0.5)
            elif name == "final_norm.linear.weight":
                parameter.mul_(0.5)

    def names_without_weight_decay(self) -> frozenset[str]:
        """Name the parameters that do not decay: vectors, positions, scale embedding, AdaLN offsets (public code)."""
        exempt = ("start_position", "position_embedding", "scale_embedding.weight", "modulation.offset")
        return frozenset(name for name, p in self.named_parameters() if p.ndim < 2 or name.endswith(exempt))

    def compile_blocks(self) -> None:
        """Compile each block for training, which fuses what lies between its matrix products.

        All blocks share the compiled code. Hooks around a block, which gather partitioned weights, stay outside of it.
        """
        for block in self.blocks:
            block.forward = torch.compile(block.forward, dynamic=False)

    def compile_generation(self) -> None:
        """Compile the block that `forward_scale` runs, once for all layers and with shapes as variables.

        The first images wait for the compiler, and results differ from the plain ones by rounding. CUDA graphs are not
        used: they need memory that does not move, and every call of generation allocates its own cache.
        """
        self._cached_step = torch.compile(cached_step)

    def forward(self, inputs: Tensor, labels: Tensor, *, residual_scale: Tensor | None = None) -> Tensor:
        """Predict all scales from the true codes: -> logits (B, L, V), in the precision of the weights.

        inputs: (B, L - p_1^2, C), the quantiser's teacher-forcing inputs. labels: (B,) int64, null_class where dropped.
        residual_scale: (depth, 2, B), see AdaLNBlock; None keeps every branch.
        """
        wanted = (labels.shape[0], self.scales.num_tokens - self.scales.first_tokens, self.config.code_width)
        if tuple(inputs.shape) != wanted:
            raise ValueError(f"inputs have shape {tuple(inputs.shape)}, expected {wanted}")
        condition = self.class_embedding(labels)  # (B, D)
        x = torch.cat([self._start_tokens(condition), self._embed_inputs(inputs)], dim=1)  # (B, L, D)
        x = x + self.position_embedding + self.scale_embedding(self.scales.scale_ids(x.device))
        block_condition = self._block_condition(condition)  # (B, D) or (B, 6, D)
        attend = BlockCausalAttention(self.scales, self.attention).on(x.device)
        for layer, block in enumerate(self.blocks):
            branch_scale = None if residual_scale is None else residual_scale[layer]  # (2, B)
            x = self._run_block(block, x, block_condition, attend=attend, residual_scale=branch_scale)
        return self.head(self.final_norm(x, condition))  # (B, L, V)

    def class_vectors(self, labels: Tensor) -> ClassVectors:
        """Compute what `forward_scale` takes of the classes: labels (B,) int64."""
        condition = self.class_embedding(labels)  # (B, D)
        block_condition = self._block_condition(condition)  # (B, D) or (B, 6, D)
        blocks = tuple(cast(Block, block).vectors(block_condition) for block in self.blocks)
        return ClassVectors(condition, blocks, self.final_norm.vectors(condition))

    def forward_scale(
        self, inputs: Tensor | None, classes: ClassVectors, k: int, cache: KVCache, *, wanted: slice = slice(None)
    ) -> Tensor:
        """Predict scale k from the scales in `cache`: -> logits (B, p_k^2, V) float32. Adds scale k to the cache.

        inputs: (B, p_k^2, C), the quantiser's next_input; None at the first scale, whose start tokens are the class.
        wanted: the images whose logits are returned; keys and values are stored of all. Raises
        ValueError if scales come out of order, or inputs are given at scale 0 or missing at a later one.
        """
        tokens = self.scales.slices[k]
        if cache.position != tokens.start:
            raise ValueError(f"cache holds {cache.position} tokens, scale {k} needs {tokens.start}: go scale by scale")
        if (inputs is None) != (k == 0):
            raise ValueError(f"inputs must be None at scale 0 only, got {type(inputs).__name__} at scale {k}")
        x = self._start_tokens(classes.embedding) if inputs is None else self._embed_inputs(inputs)  # (B, p_k^2, D)
        x = x + self.position_embedding[tokens] + self.scale_embedding(torch.full((1,), k, device=x.device))
        for block, vectors, layer in zip(self.blocks, classes.blocks, cache.layers(), strict=True):
            x = self._cached_step(block, x, vectors, layer.keys, layer.values, layer.position)
        cache.advance(x.shape[1])
        return self.head(self.final_norm(x[wanted], classes.final[wanted])).float()  # (B, p_k^2, V)

    def allocate_cache(self, batch: int) -> KVCache:
        """Allocate an empty cache for `forward_scale`, in the dtype in which attention runs here."""
        weight, config = self.position_embedding, self.config
        device_type = weight.device.type
        autocast = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if autocast else weight.dtype
        return KVCache.allocate(
            config.depth, batch, config.num_heads, self.scales.num_tokens, HEAD_DIM, dtype, weight.device
        )

    def _start_tokens(self, condition: Tensor) -> Tensor:
        """Make the start tokens [s] of the class: (B, D) -> (B, p_1^2, D)."""
        return condition[:, None] + self.start_position

    def _embed_inputs(self, inputs: Tensor) -> Tensor:
        return self.input_embedding(inputs.to(self.position_embedding.dtype))

    def _block_condition(self, condition: Tensor) -> Tensor:
        """Return what the blocks' modulation takes: the condition (B, D), or the shared map of it (B, 6, D)."""
        if self.shared_modulation is None:
            return condition
        return self.shared_modulation(nn.functional.silu(condition)).unflatten(1, (NUM_MODULATIONS, -1))

    def _run_block(
        self, block: nn.Module, x: Tensor, condition: Tensor, *, attend: Attend, residual_scale: Tensor | None
    ) -> Tensor:
        if self.checkpointing == NO_CHECKPOINTING or not torch.is_grad_enabled():
            return block(x, condition, attend=attend, residual_scale=residual_scale)
        return checkpoint(
            block,
            x,
            condition,
            attend=attend,
            residual_scale=residual_scale,
            use_reentrant=False,
            preserve_rng_state=False,  # the blocks draw no random numbers
            context_fn=keep_products if self.checkpointing == SELECTIVE_CHECKPOINTING else noop_context_fn,
        )


def keep_products() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Let `checkpoint` keep results of matrix products and attention, and recompute all others."""
    return create_selective_checkpoint_contexts(list(KEPT_OPERATIONS))


def make_block(config: VARConfig) -> Block:
    """Make a block of the kind that config.norm names."""
    width, heads, hidden_width = config.width, config.num_heads, config.hidden_width
    if config.norm == LAYER_NORM:
        return LayerNormBlock(width, heads, hidden_width=hidden_width, qk_norm=config.qk_norm)
    is_shared = config.norm == SHARED_ADALN
    return AdaLNBlock(width, heads, hidden_width=hidden_width, qk_norm=config.qk_norm, shared_adaln=is_shared)


def draw_(parameter: Tensor, *, std: float, generator: torch.Generator) -> None:
    """Fill with a normal distribution cut off at +-2 (not +-2 std), drawn on the CPU in float32."""
    values = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
    parameter.copy_(nn.init.trunc_normal_(values, std=std, generator=generator))
