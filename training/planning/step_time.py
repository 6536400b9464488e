"""A model of the time of one optimizer step on a cluster: arithmetic from the architecture and a few rates.

Nothing here is measured on a cluster. FLOPs and bytes follow from the architecture and the ZeRO stage; the rates are
settings, and the source of each default stands beside it. Left out: the host's own time, to which DeepSpeed's hooks
under stage 3 add, stragglers, checkpoints, validation.

Symbols: n parameters, W ranks, e bytes of a number in the engine's precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2

from models.var import FULL_CHECKPOINTING, NO_CHECKPOINTING, VARConfig
from training.engine.engine import LIVE_ELEMENTS, EngineConfig
from training.flops import forward_macs, training_flops
from training.planning.activations import FLOAT32, number_bytes, recomputed_by_block
from training.planning.zero_memory import PLAIN_BUCKET, persistent_sizes

ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER = "all-reduce", "all-gather", "reduce-scatter"
PASSES = {ALL_REDUCE: 2, ALL_GATHER: 1, REDUCE_SCATTER: 1}  # how often a ring sends (W - 1) / W of what is whole
FORWARD, BACKWARD, AFTER = "forward", "backward", "after"
DECAY_GROUPS = 2  # of the optimizer; stages 1 and 2 gather the weights of each by one call

# bytes of memory that are read or written for one parameter in one step
ADAMW_BYTES = 28  # weight, gradient and moments read, all but the gradient written, in float32
AVERAGE_BYTES = 12  # the moving average read and written, the weight read
CLIP_BYTES = 12  # the gradient read for its norm, then read and written to be scaled
CLEAR_BYTES = 4  # stage 1 in bf16: the float32 gradient set to zero
REDUCE_BYTES = 12  # stage 1 in bf16: the float32 gradient cast to bf16 to be reduced, and back
ACCUMULATE_BYTES = 10  # stage 1 in bf16, a micro-batch: bf16 and float32 gradient read, float32 written
RECOMPUTE_PASSES = 3  # selective checkpointing writes what it computes again once, and reads it about twice


@dataclass(frozen=True)
class ClusterConfig:
    """The machines that `--dry-run` models: nodes of 8 H100 SXM, unless told otherwise.

    Sources: NVIDIA's data sheets for memory and its speed; for `matmul_tflops` the best matrix products that Stas
    Bekman's ml-engineering measured (989 on the data sheet); for the links 8 ports of 400 Gb/s a node, of which NCCL's
    bus bandwidth takes 350 of 400 GB/s, and about as much inside a node over NVLink 4. An H200 has gpu_memory_gib 139
    and memory_tb_per_second 4.8.
    """

    gpu_memory_gib: float = 79.6
    usable_memory_share: float = 0.9  # the rest: CUDA context, NCCL, fragments. An assumption
    matmul_tflops: float = 794.5  # of bf16 and fp16; what MFU is a share of
    float32_tflops: float = 67.0  # of the data sheet, without TF32
    attainable_share: float = 0.6  # of these in forward and backward pass; a goal, not measured
    memory_tb_per_second: float = 3.35
    gpus_per_node: int = 8
    link_gb_per_second: float = 350.0  # per GPU inside a node
    node_gb_per_second: float = 350.0  # of a node as a whole, all ports together
    latency_microseconds: float = 15.0  # of a collective, for each doubling of the ranks. An assumption
    overlap_share: float = 0.8  # of the computation, that stage 3's communication can hide behind. An assumption
    loaded_per_second: float = 100_000.0  # code samples that a worker reads. An assumption, well below measured rates

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"cluster.{name} is {value}; it must be positive")
        for name in ("usable_memory_share", "attainable_share", "overlap_share"):
            if getattr(self, name) > 1:
                raise ValueError(f"cluster.{name} is {getattr(self, name)}; it is a share, above 0 and up to 1")

    @property
    def usable_bytes(self) -> float:
        """The memory of one GPU that tensors may take."""
        return self.usable_memory_share * self.gpu_memory_gib * 2**30

    def matmul_flops(self, precision: str) -> float:
        """Return the floating point operations per second of matrix products alone."""
        return 1e12 * (self.float32_tflops if precision == "fp32" else self.matmul_tflops)

    def bytes_per_second(self, ranks: int) -> float:
        """Return what one GPU sends per second in a ring.

        Inside a node that is NVLink's speed. Between nodes a ring passes each node once for every port, so that all
        ports of a node work for it, and the slower of the two counts.
        """
        inside = 1e9 * self.link_gb_per_second
        return inside if ranks <= self.gpus_per_node else min(inside, 1e9 * self.node_gb_per_second)


@dataclass(frozen=True)
class StepTime:
    """The modelled seconds of one optimizer step on each of the GPUs."""

    compute: float
    recomputation: float
    communication: float
    exposed: float  # the part of communication that nothing hides
    optimizer: float
    data_wait: float
    images: int  # of all ranks
    flops_per_image: int
    peak_flops: float  # per second, of all ranks' matrix products

    @property
    def total(self) -> float:
        return self.compute + self.recomputation + self.exposed + self.optimizer + self.data_wait

    @property
    def images_per_second(self) -> float:
        return self.images / self.total

    @property
    def mfu(self) -> float:
        """Exact training FLOPs over what matrix products alone would do in the same time."""
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
    """Model a step of `accumulation` micro-batches a rank.

    Compute is the exact training FLOPs over the attainable rate. Data is waited for where `workers` need longer to read
    the images of a step than all the rest takes.
    """
    images = engine.micro_batch * accumulation
    compute = training_flops(model) * images / (cluster.matmul_flops(engine.precision) * cluster.attainable_share)
    again = images * recomputation_seconds(model, engine, cluster)
    sent = transfers(model, engine, accumulation=accumulation) if ranks > 1 else []
    communication = sum(transfer.seconds(cluster, ranks) for transfer in sent)
    exposed = communication - hidden_seconds(sent, compute, cluster, ranks)
    moved = optimizer_bytes(model, engine, ranks, accumulation=accumulation, averages=averages)
    optimizer = moved / (1e12 * cluster.memory_tb_per_second)
    loading = images / (cluster.loaded_per_second * workers)
    return StepTime(
        compute=compute,
        recomputation=again,
        communication=communication,
        exposed=exposed,
        optimizer=optimizer,
        data_wait=max(0.0, loading - (compute + again + exposed + optimizer)),
        images=images * ranks,
        flops_per_image=training_flops(model),
        peak_flops=ranks * cluster.matmul_flops(engine.precision),
    )


def recomputation_seconds(model: VARConfig, engine: EngineConfig, cluster: ClusterConfig) -> float:
    """Return the seconds that activation checkpointing adds for one image.

    Full checkpointing repeats the forward pass of the blocks. Selective checkpointing brings tensors back at the speed
    of memory; under compilation it recomputes as much as full (training/planning/activations.py).
    """
    if engine.activation_checkpointing == NO_CHECKPOINTING:
        return 0.0
    if engine.activation_checkpointing == FULL_CHECKPOINTING or engine.compile:
        tokens, width = model.scales.num_tokens, model.width
        ends = (tokens - model.scales.first_tokens) * model.code_width * width + tokens * width * model.vocab_size
        return 2 * (forward_macs(model) - ends) / (cluster.matmul_flops(engine.precision) * cluster.attainable_share)
    moved = RECOMPUTE_PASSES * model.depth * recomputed_by_block(model, engine)
    return moved / (1e12 * cluster.memory_tb_per_second)


@dataclass(frozen=True)
class Transfer:
    """The collectives of one kind in one step."""

    kind: str
    when: str  # FORWARD or BACKWARD: beside the computation of that pass; AFTER: when both are over
    payload: int  # bytes of what is whole on every rank, gathered or to be reduced
    calls: int

    def seconds(self, cluster: ClusterConfig, ranks: int) -> float:
        """Return the bytes of a ring over its speed, and for each call the latency times log2 of the ranks."""
        sent = PASSES[self.kind] * self.payload * (ranks - 1) / ranks
        latency = 1e-6 * cluster.latency_microseconds * max(1.0, log2(ranks))
        return sent / cluster.bytes_per_second(ranks) + self.calls * latency


def transfers(model: VARConfig, engine: EngineConfig, *, accumulation: int) -> list[Transfer]:
    """Return what one step of `accumulation` micro-batches sends by ZeRO stage, on more than one rank.

    Stages 0 to 2 all-reduce e n bytes of gradients after the backward pass (DeepSpeed does not reduce-scatter them
    there), stage 2 for every micro-batch; stages 1 and 2 then gather the weights. Stage 3 gathers the weights for the
    forward pass, those beyond LIVE_ELEMENTS again for the backward pass, and reduce-scatters the gradients, for every
    micro-batch; small tensors, which stay whole, it gathers one by one after the update.
    """
    n, e, bucket = model.num_parameters, number_bytes(engine), engine.reduce_bucket_size
    if engine.zero_stage < 3:
        bucket = PLAIN_BUCKET if engine.is_reduced_by_the_engine else bucket
        times = accumulation if engine.zero_stage == 2 else 1
        reduced = Transfer(ALL_REDUCE, AFTER, times * e * n, times * ceil(n / bucket))
        return [reduced, Transfer(ALL_GATHER, AFTER, e * n, DECAY_GROUPS)] if engine.zero_stage else [reduced]
    small = persistent_sizes(model, engine)
    gathered = n - sum(small)
    again = max(0, gathered - LIVE_ELEMENTS)
    prefetch = engine.prefetch_bucket_size
    return [
        Transfer(ALL_GATHER, FORWARD, accumulation * e * gathered, accumulation * ceil(gathered / prefetch)),
        Transfer(ALL_GATHER, BACKWARD, accumulation * e * again, accumulation * ceil(again / prefetch)),
        Transfer(REDUCE_SCATTER, BACKWARD, accumulation * e * n, accumulation * ceil(n / bucket)),
        Transfer(ALL_GATHER, AFTER, e * sum(small), len(small)),
    ]


def hidden_seconds(sent: list[Transfer], compute: float, cluster: ClusterConfig, ranks: int) -> float:
    """Return the seconds of communication behind computation, of which a third is the forward pass."""
    hidden = 0.0
    for when, share in ((FORWARD, 1 / 3), (BACKWARD, 2 / 3)):
        taken = sum(transfer.seconds(cluster, ranks) for transfer in sent if transfer.when == when)
        hidden += min(taken, cluster.overlap_share * share * compute)
    return hidden


def optimizer_bytes(model: VARConfig, engine: EngineConfig, ranks: int, *, accumulation: int, averages: bool) -> float:
    """Return the bytes of memory that clipping, AdamW and the cast of its weights read and write on one rank.

    Stage 1 in bf16 clips and accumulates the gradients of all parameters on every rank; the others those of its share.
    """
    n = model.num_parameters
    share = ceil(n / ranks) if engine.zero_stage else n
    casts = FLOAT32 + number_bytes(engine) if engine.zero_stage else 0
    update = share * (ADAMW_BYTES + casts + (AVERAGE_BYTES if averages else 0))
    if engine.zero_stage and engine.is_reduced_by_the_engine:
        reduced = REDUCE_BYTES if ranks > 1 else 0
        return update + n * (CLIP_BYTES + CLEAR_BYTES + reduced + ACCUMULATE_BYTES * accumulation)
    return update + CLIP_BYTES * share
