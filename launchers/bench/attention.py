"""`benchmark.py attention`: forward and backward passes of block-causal attention, each kind beside the dense mask.

FLOPs are those of the pairs that a query may see, whatever else a kind computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from launchers.bench.config import BenchmarkConfig
from launchers.bench.timing import Contestant, Row, device_type, synchronize, time_in_turns
from models.attention import FLEX, MASKED, PER_SCALE, BlockCausalAttention
from models.scales import PATCH_NUMS_256, PATCH_NUMS_512, PATCH_NUMS_1024, Scales
from models.var import HEAD_DIM
from training.flops import attention_pairs

import torch
from torch import Tensor

PRODUCTS = 6  # q k^T and the weighted sum of v, and two more of each in the backward pass
LAYERS = {"cpu": 1, "cuda": 16}  # one after the other in a call: a GPU computes one while Python is at the next
SCHEDULES = {  # patch_nums, images, heads
    "cpu": ((PATCH_NUMS_256, 4, 8), (PATCH_NUMS_512, 1, 8), (PATCH_NUMS_1024, 1, 2)),
    "cuda": ((PATCH_NUMS_256, 64, 16), (PATCH_NUMS_512, 16, 16), (PATCH_NUMS_1024, 2, 16)),
}


def benchmark_attention(config: BenchmarkConfig) -> list[Row]:
    """Time one layer's attention at 680, 2,240 and 9,451 tokens."""
    return [row for compared in attention_contestants() for row in time_in_turns(compared, config.repeats)]


def attention_contestants() -> Iterator[list[Contestant]]:
    """Yield what is compared at each schedule, the dense mask first.

    On the CPU it is float32, where FlexAttention has no gradients; on CUDA bfloat16, with FlexAttention.
    """
    device = device_type()
    dtype, precision = (torch.bfloat16, "bf16") if device == "cuda" else (torch.float32, "fp32")
    for patch_nums, batch, heads in SCHEDULES[device]:
        torch.compiler.reset()  # all compiled attention shares one cache, of eight entries
        scales = Scales(patch_nums)
        shape = (4, batch, heads, scales.num_tokens, HEAD_DIM)
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        flops = PRODUCTS * 2 * attention_pairs(scales) * heads * HEAD_DIM
        yield [
            Contestant(
                f"{scales.num_tokens} tokens, {way}",
                forward_and_backward(BlockCausalAttention(scales, way).on(drawn.device), drawn),
                flops,
                precision,
            )
            for way in ((MASKED, PER_SCALE, FLEX) if device == "cuda" else (MASKED, PER_SCALE))
        ]


def forward_and_backward(attend: Callable[..., Tensor], drawn: Tensor) -> Callable[[], int]:
    """Return a call that ends when the device has done LAYERS passes, which a GPU gets compiled.

    drawn: (4, B, H, L, D/H), that is q, k, v and the gradient of the output.
    """
    attended = torch.compile(attend, dynamic=False) if drawn.is_cuda else attend
    q, k, v = (part.clone().requires_grad_() for part in drawn[:3])
    layers = LAYERS[drawn.device.type]

    def call() -> int:
        for _ in range(layers):
            torch.autograd.grad(attended(q, k, v, softmax_scale=1.0), (q, k, v), drawn[3])
        synchronize()
        return layers * len(q)

    return call
