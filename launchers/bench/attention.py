"""`benchmark.py attention`: forward and backward passes of block-causal attention, each way beside the dense mask.

FLOPs are those of the pairs that a query may see, whatever else a way computes; bytes the least that any way must move:
operands and results of both passes, once each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from launchers.bench.config import BenchmarkConfig
from launchers.bench.machine_limits import synchronize
from launchers.bench.timing import Contestant, Row, time_in_turns
from models.attention import FLEX, MASKED, PER_SCALE, BlockCausalAttention
from models.scales import PATCH_NUMS_256, PATCH_NUMS_512, PATCH_NUMS_1024, Scales
from models.var import HEAD_DIM
from training.flops import attention_pairs

PRODUCTS = 6  # q k^T and the weighted sum of v, and two more of each in the backward pass
MOVED = 12  # q, k, v and the output; in the backward pass those, the output's gradient and the gradients of q, k, v
SCHEDULES = ((PATCH_NUMS_256, 4, 8), (PATCH_NUMS_512, 1, 8), (PATCH_NUMS_1024, 1, 2))  # sides, images, heads
LAYERS_ON_CUDA = 16
ON_CUDA = ((PATCH_NUMS_256, 64, 16), (PATCH_NUMS_512, 16, 16), (PATCH_NUMS_1024, 2, 16))


def benchmark_attention(config: BenchmarkConfig) -> list[Row]:
    """Images a second through one layer's attention, forward and backward, at 680, 2,240 and 9,451 tokens."""
    return [row for compared in attention_contestants() for row in time_in_turns(compared, config.repeats)]


def attention_contestants(
    schedules: tuple[tuple[tuple[int, ...], int, int], ...] | None = None,
) -> Iterator[list[Contestant]]:
    """For each schedule what is compared, the dense mask first.

    On the CPU in float32, where FlexAttention has no gradients; on CUDA in bfloat16, with it.
    """
    on_cuda = torch.cuda.is_available()
    device, dtype = (torch.device("cuda"), torch.bfloat16) if on_cuda else (torch.device("cpu"), torch.float32)
    ways = (MASKED, PER_SCALE, FLEX) if on_cuda else (MASKED, PER_SCALE)
    for patch_nums, batch, heads in schedules or (ON_CUDA if on_cuda else SCHEDULES):
        torch.compiler.reset()  # all compiled attention shares one cache, of eight entries
        scales = Scales(patch_nums)
        shape = (4, batch, heads, scales.num_tokens, HEAD_DIM)
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        yield [
            Contestant(
                f"{scales.num_tokens} tokens, {way}",
                forward_and_backward(BlockCausalAttention(scales, way).on(device), drawn),
                flops_per_image=PRODUCTS * 2 * attention_pairs(scales) * heads * HEAD_DIM,
                bytes_per_image=MOVED * scales.num_tokens * heads * HEAD_DIM * dtype.itemsize,
                precision="bf16" if on_cuda else "fp32",
            )
            for way in ways
        ]


def forward_and_backward(attend: Callable[..., Tensor], drawn: Tensor) -> Callable[[], int]:
    """A call that ends when the device has. drawn (4, B, H, L, D/H): q, k, v and the gradient of the output.

    A GPU computes what follows while Python is still busy with the next layer, and blocks are compiled there: so here
    it gets several layers at once, compiled.
    """
    on_cuda = drawn.device.type == "cuda"
    attended = torch.compile(attend, dynamic=False) if on_cuda else attend
    q, k, v = (part.clone().requires_grad_() for part in drawn[:3])
    layers = LAYERS_ON_CUDA if on_cuda else 1

    def call() -> int:
        for _ in range(layers):
            torch.autograd.grad(attended(q, k, v, softmax_scale=1.0), (q, k, v), drawn[3])
        synchronize()
        return layers * len(q)

    return call
