"""A model of the time of one optimiser step on a cluster: arithmetic from the architecture and a few rates.

Nothing here is measured on a cluster. FLOPs and bytes are exact; the rates are settings, and where their defaults come
from is said beside them. Left out: the host's own time, which DeepSpeed's hooks under ZeRO-3 add to, stragglers,
checkpoints, validation.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2

from models.var import FULL_CHECKPOINTING, SELECTIVE_CHECKPOINTING, VARConfig
from training.engine.engine import EngineConfig
from training.flops import forward_macs, training_flops
from training.planning.activations import FLOAT32, number_bytes, recomputed_by_block
from training.planning.communication import BACKWARD, FORWARD, Transfer, transfers

TRAFFIC_OF_RECOMPUTED = 3  # what is computed again is written once and read about twice
ADAMW_BYTES = 28  # a parameter: weight, gradient and moments read, all but the gradient written, float32
AVERAGE_BYTES = 12  # a parameter: the average read and written, the weight read
CLIP_BYTES = 12  # a gradient: read for the norm, read and written to be clipped
ACCUMULATE_BYTES = 10  # stage 1 in bf16, a gradient and micro-batch: bf16 and float32 read, float32 written
REDUCE_BYTES = 12  # the same once a step, where ranks add theirs up: to bf16 for the reduction, and back
CLEAR_BYTES = 4  # the same once a step: set to zero


@dataclass(frozen=True)
class ClusterConfig:
    """Nodes of 8 H100 SXM, unless told otherwise. An H200 has gpu_memory_gib 139 and memory_tb_per_second 4.8.

    Sources: NVIDIA's data sheets of H100 and H200 for memory and its speed; the best matrix products that Stas
    Bekman's ml-engineering measured (of 989 on the data sheet); 8 ports of 400 Gb/s a node, of which NCCL's bus
    bandwidth takes 350 of 400 GB/s, and about as much inside a node over NVLink 4.
    """

    gpu_memory_gib: float = 79.6
    usable_memory_share: float = 0.9  # the rest: CUDA context, NCCL, fragments. An assumption
    matmul_tflops: float = 794.5  # of bf16 and fp16; what MFU is a share of
    float32_tflops: float = 67.0  # of the data sheet, without TF32
    attainable_share: float = 0.6  # of it in forward and backward pass; this project's goal, and not measured here
    memory_tb_per_second: float = 3.35
    gpus_per_node: int = 8
    link_gb_per_second: float = 350.0  # per GPU inside a node
    node_gb_per_second: float = 350.0  # of a node as a whole, all ports together
    latency_microseconds: float = 15.0  # of a collective, for each doubling of the ranks. An assumption
    overlap_share: float = 0.8  # of the computation, that ZeRO-3's communication can hide behind. An assumption
    loaded_per_second: float = 100_000.0  # code samples, a worker. An assumption; a thread here: 224,000 and more

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"cluster.{name} is {value}; it must be positive")
        for name in ("usable_memory_share", "attainable_share", "overlap_share"):
            if getattr(self, name) > 1:
                raise ValueError(f"cluster.{name} is {getattr(self, name)}; it is a share, above 0 and up to 1")

    @property
    def usable_bytes(self) -> float:
        """Memory of one GPU that tensors may take."""
        return self.usable_memory_share * self.gpu_memory_gib * 2**30

    def matmul_flops(self, precision: str) -> float:
        """Floating point operations a second of matrix products alone."""
        return 1e12 * (self.float32_tflops if precision == "fp32" else self.matmul_tflops)

    def bytes_per_second(self, ranks: int) -> float:
        """What one GPU sends in a ring: inside a node NVLink's; between nodes a ring enters and leaves each node once
        for every port, so that all ports of a node work for it, and the slower of the two counts."""
        inside = 1e9 * self.link_gb_per_second
        return inside if ranks <= self.gpus_per_node else min(inside, 1e9 * self.node_gb_per_second)


@dataclass(frozen=True)
class StepTime:
    """Modelled seconds of one optimiser step on one of `ranks` GPUs; communication is also hidden behind compute."""

    compute: float
    recomputation: float
    communication: float  # all of it
    exposed: float  # what of it nothing hides
    optimizer: float
    data_wait: float
    images: int  # of all ranks
    flops_per_image: int
    peak_flops: float  # of all ranks' matrix products

    @property
    def total(self) -> float:
        return self.compute + self.recomputation + self.exposed + self.optimizer + self.data_wait

    @property
    def images_per_second(self) -> float:
        return self.images / self.total

    @property
    def mfu(self) -> float:
        """Exact training FLOPs over what matrix products alone would do in the time."""
        return self.images_per_second * self.flops_per_image / self.peak_flops


def step_time(
    model: VARConfig,
    engine: EngineConfig,
    cluster: ClusterConfig,
    ranks: int,
    *,
    accumulation: int = 1,
    averages: bool = False,
    workers: int = 1,
) -> StepTime:
    """compute = F B / (r s): F exact training FLOPs of an image, B images a rank, r matmul rate, s attainable share.

    The step is compute + recomputation + exposed communication + optimiser + what it waits for data: B / (samples a
    second and worker) beyond the rest.
    """
    images = engine.micro_batch * accumulation
    rate = cluster.matmul_flops(engine.precision) * cluster.attainable_share
    compute = training_flops(model) * images / rate
    again = images * recomputation_seconds(model, engine, cluster)
    sent = transfers(model, engine, accumulation=accumulation) if ranks > 1 else []
    hidden = hidden_seconds(sent, compute, cluster, ranks)
    communication = sum(seconds_of(transfer, cluster, ranks) for transfer in sent)
    moved = optimizer_bytes(model, engine, ranks, accumulation=accumulation, averages=averages)
    optimizer = moved / (1e12 * cluster.memory_tb_per_second)
    busy = compute + again + communication - hidden + optimizer
    loading = images / (cluster.loaded_per_second * workers)
    return StepTime(
        compute=compute,
        recomputation=again,
        communication=communication,
        exposed=communication - hidden,
        optimizer=optimizer,
        data_wait=max(0.0, loading - busy),
        images=images * ranks,
        flops_per_image=training_flops(model),
        peak_flops=ranks * cluster.matmul_flops(engine.precision),
    )


def recomputation_seconds(model: VARConfig, engine: EngineConfig, cluster: ClusterConfig) -> float:
    """Of one image. Full: the blocks' forward pass again. Selective: the bytes that come back, at memory speed.

    Compiled blocks make no difference between the two, see training/planning/activations.py.
    """
    ways = {FULL_CHECKPOINTING, SELECTIVE_CHECKPOINTING} if engine.compile else {FULL_CHECKPOINTING}
    if engine.activation_checkpointing in ways:
        tokens, width = model.scales.num_tokens, model.width
        ends = (tokens - model.scales.first_tokens) * model.code_width * width + tokens * width * model.vocab_size
        rate = cluster.matmul_flops(engine.precision) * cluster.attainable_share
        return 2 * (forward_macs(model) - ends) / rate
    if engine.activation_checkpointing == SELECTIVE_CHECKPOINTING:
        traffic = TRAFFIC_OF_RECOMPUTED * model.depth * recomputed_by_block(model, engine)
        return traffic / (1e12 * cluster.memory_tb_per_second)
    return 0.0


def seconds_of(transfer: Transfer, cluster: ClusterConfig, ranks: int) -> float:
    """Bytes of a ring over its speed, and for each call the latency times log2 of the ranks."""
    latency = 1e-6 * cluster.latency_microseconds * max(1.0, log2(ranks))
    return transfer.sent_bytes(ranks) / cluster.bytes_per_second(ranks) + transfer.calls * latency


def hidden_seconds(sent: list[Transfer], compute: float, cluster: ClusterConfig, ranks: int) -> float:
    """Communication behind the pass it belongs to: a third of compute is forward, two thirds are backward."""
    shares = {FORWARD: 1 / 3, BACKWARD: 2 / 3}
    return sum(
        min(
            sum(seconds_of(transfer, cluster, ranks) for transfer in sent if transfer.when == when),
            cluster.overlap_share * share * compute,
        )
        for when, share in shares.items()
    )


def optimizer_bytes(model: VARConfig, engine: EngineConfig, ranks: int, *, accumulation: int, averages: bool) -> float:
    """Memory traffic of AdamW, of clipping and of casting weights back, on this rank's share.

    Under stage 1 in bf16 every rank also clips and accumulates the gradients of all parameters, and casts them if there
    are several to add up, see training/planning/zero_memory.py.
    """
    number = model.num_parameters
    share = ceil(number / ranks) if engine.zero_stage else number
    casts = FLOAT32 + number_bytes(engine) if engine.zero_stage else 0
    own = share * (ADAMW_BYTES + casts + (AVERAGE_BYTES if averages else 0))
    if engine.zero_stage and engine.is_reduced_by_the_engine:
        reduced = REDUCE_BYTES if ranks > 1 else 0
        return own + number * (CLIP_BYTES + reduced + CLEAR_BYTES + ACCUMULATE_BYTES * accumulation)
    return own + CLIP_BYTES * share
