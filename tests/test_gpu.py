"""What must hold on a CUDA device too: the same logits and codes as on the CPU, and training through DeepSpeed."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import repeat
from pathlib import Path

import pytest
import torch
from distributed_worker import TOKENIZER, TRANSFORMER
from repository import ROOT, SUPPORT
from tiny import PlainEngine
from workers import importing

from launchers.bench.models import code_batch
from launchers.sampling.sampler import speed_up
from models.attention import FLEX, MASKED, PER_SCALE, BlockCausalAttention
from models.generation import generate, generate_scales, known_part
from models.sampling import Sampling, filter_logits, gumbel_noise
from models.scales import PATCH_NUMS_256, Scales
from models.var import VAR
from training.engine.distributed import World
from training.stage import StepContext
from training.tokenizer_loop import build_tokenizer
from training.var_loop import VARStage

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
WORKER = SUPPORT / "distributed_worker.py"


@torch.no_grad()
def test_logits_on_a_gpu_equal_those_on_the_cpu() -> None:
    var, tokenizer = VAR(TRANSFORMER, seed=0).eval(), build_tokenizer(TOKENIZER, seed=0).eval()
    codes = torch.randint(16, (4, TRANSFORMER.scales.num_tokens), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(4)
    inputs = tokenizer.teacher_forcing_inputs(codes)
    on_cpu = var(inputs, labels)
    on_gpu = var.cuda()(inputs.cuda(), labels.cuda()).cpu()
    assert torch.allclose(on_cpu, on_gpu, atol=1e-4)  # float32 sums in another order


@pytest.mark.parametrize("way", [PER_SCALE, FLEX])
@pytest.mark.parametrize("patch_nums", [(1, 2, 3), PATCH_NUMS_256])
def test_attention_on_a_gpu_is_that_of_the_dense_mask(way: str, patch_nums: tuple[int, ...]) -> None:
    scales, found = Scales(patch_nums), {}
    for each in (MASKED, way):
        drawn = torch.randn(3, 2, 3, scales.num_tokens, 64, generator=torch.Generator().manual_seed(0)).cuda()
        drawn.requires_grad_()
        out = BlockCausalAttention(scales, each)(*drawn.unbind(0), softmax_scale=0.3)
        found[each] = (out, *torch.autograd.grad(out.square().sum(), drawn))
    for ours, plain in zip(found[way], found[MASKED], strict=True):
        assert (ours - plain).norm() < 1e-2 * plain.norm()  # products may be in TF32


def test_no_forward_or_backward_pass_of_a_step_waits_for_the_gpu() -> None:
    """Nor do the copies that bring it batch and draws. Waiting is an error in this mode of torch.

    The engine is a plain one: DeepSpeed's waits in its update.
    """
    device = torch.device("cuda")
    var, tokenizer = VAR(TRANSFORMER, seed=0).to(device), build_tokenizer(TOKENIZER, seed=0).to(device)
    stage = VARStage(
        PlainEngine(var, accumulation=2, global_batch=8, world=World(device=device)),
        tokenizer,
        label_drop=0.1,
        seed=0,
        validation=lambda: (),
    )
    batch = code_batch(TRANSFORMER, 4).pinned()
    context = StepContext(samples_seen=0, progress=0.5, learning_rate=1e-3, weight_decay=0.05)
    stage.train_step(repeat(batch), context)  # the first one may build what it needs
    torch.cuda.set_sync_debug_mode("error")
    try:
        stage.train_step(repeat(batch), context)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_sampling_runs_on_a_gpu() -> None:
    var, tokenizer = VAR(TRANSFORMER, seed=0).cuda().eval(), build_tokenizer(TOKENIZER, seed=0).cuda().eval()
    codes = generate(var, tokenizer, torch.arange(4).cuda(), cfg=1.5, top_k=0, top_p=0.9, seeds=[0, 1, 2, 3])
    assert codes.is_cuda and codes.shape == (4, TRANSFORMER.scales.num_tokens)
    assert tokenizer.decode(codes).isfinite().all()


@pytest.mark.parametrize("top_k, top_p", [(0, 0.0), (9, 0.0), (0, 0.9), (9, 0.9)])
def test_filters_on_a_gpu_keep_what_they_keep_on_the_cpu(top_k: int, top_p: float) -> None:
    logits = torch.randn(4, 30, 64, generator=torch.Generator().manual_seed(0)).mul(3).round()  # with many ties
    on_cpu, on_gpu = (filter_logits(logits.to(device), top_k, top_p).cpu() for device in ("cpu", "cuda"))
    assert (on_cpu == on_gpu).float().mean() > 0.999  # a sum at the edge may be rounded otherwise


def test_compiled_models_on_a_gpu_draw_what_plain_ones_draw() -> None:
    """With filters off, so that rounding matters to codes that tie alone."""
    var, tokenizer = VAR(TRANSFORMER, seed=0).cuda().eval(), build_tokenizer(TOKENIZER, seed=0).cuda().eval()
    labels, sampling = torch.arange(4).cuda(), Sampling(top_k=0, top_p=0)
    plain = generate_scales(var, tokenizer, labels, sampling, seeds=range(4))
    images = tokenizer.decode_features(plain.f_hat)
    speed_up(var, tokenizer, "fp32", compiles=True)
    assert (generate_scales(var, tokenizer, labels, sampling, seeds=range(4)).codes == plain.codes).float().mean() > 0.9
    assert (tokenizer.decode_features(plain.f_hat) - images).abs().mean() < 1e-2  # products may be in TF32


def test_noise_is_the_same_on_both_devices() -> None:
    seeds = torch.tensor([0, 7, 2**62])
    on_cpu, on_gpu = (gumbel_noise(seeds.to(device), slice(5, 9), 64).cpu() for device in ("cpu", "cuda"))
    torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-6, atol=1e-6)  # the bits are equal, the logarithms nearly


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("smooth", [False, True])
def test_editing_on_a_gpu_keeps_what_is_known_in_every_precision(dtype: torch.dtype, smooth: bool) -> None:
    var, tokenizer = VAR(TRANSFORMER, seed=0).cuda().eval().to(dtype), build_tokenizer(TOKENIZER, seed=0).cuda().eval()
    side = tokenizer.config.image_size
    images = torch.rand(4, 3, side, side, generator=torch.Generator().manual_seed(0)).cuda() * 2 - 1
    keep_mask = torch.arange(tokenizer.scales.side).expand(tokenizer.scales.side, -1) < tokenizer.scales.side / 2
    known = known_part(tokenizer, images, keep_mask, keep_coarsest=True)
    labels, sampling = torch.arange(4).cuda(), Sampling(cfg=3.0, smooth=smooth)
    drawn = generate_scales(var, tokenizer, labels, sampling, seeds=range(4), known=known)
    assert torch.equal(drawn.codes[known.mask], known.codes[known.mask])
    assert tokenizer.decode_features(drawn.f_hat).isfinite().all()


def test_every_stage_and_precision_of_the_two_rank_test_trains_on_one_gpu(tmp_path: Path) -> None:
    command = [sys.executable, str(WORKER), str(tmp_path)]
    done = subprocess.run(command, env=importing(ROOT), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads((tmp_path / "rank0.json").read_text())
    for name in ("stage0", "stage1", "stage2", "stage3", "bf16_stage1", "bf16_stage3"):
        losses = [record["loss_avg"] for record in results[name] if record["kind"] == "train"]
        assert losses[-1] < losses[0], name
