"""The VAR transformer: causality between scales, cached against full forward, initial weights."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from models.attention import MASKED, PER_SCALE
from models.var import FULL_CHECKPOINTING, NO_CHECKPOINTING, SELECTIVE_CHECKPOINTING, VAR, VARConfig

BATCH = 3
PLAIN = VARConfig(depth=2, patch_nums=(1, 2, 3), vocab_size=32, code_width=6, num_classes=5)
KINDS = {
    "adaln": PLAIN,
    "shared_adaln": replace(PLAIN, norm="shared_adaln"),
    "layer_norm": replace(PLAIN, norm="layer_norm"),
    "unconditional": replace(PLAIN, num_classes=0),
    "no_qk_norm": replace(PLAIN, qk_norm=False),
    "four_start_tokens": replace(PLAIN, patch_nums=(2, 3)),
}


@pytest.fixture(params=KINDS)
def config(request: pytest.FixtureRequest) -> VARConfig:
    return KINDS[request.param]


def make_var(config: VARConfig) -> VAR:
    """A model whose weights are large enough for every part to matter (initial gates are nearly 0)."""
    var, generator = VAR(config), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in var.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return var


def make_batch(config: VARConfig) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    num_inputs = config.scales.num_tokens - config.scales.first_tokens
    inputs = torch.randn(BATCH, num_inputs, config.code_width, generator=generator)
    return inputs, torch.tensor([0, max(0, config.num_classes - 1), config.null_class])


def test_logits_of_a_scale_depend_on_inputs_up_to_it_and_on_no_later_one(config: VARConfig) -> None:
    var, (inputs, labels) = make_var(config), make_batch(config)
    inputs.requires_grad_()
    scales = config.scales
    for tokens in scales.slices:
        (gradient,) = torch.autograd.grad(var(inputs, labels)[:, tokens].square().sum(), inputs)
        size_of_input = gradient.abs().sum(dim=(0, 2))  # one number per input token
        num_seen = tokens.stop - scales.first_tokens
        assert (size_of_input[:num_seen] > 0).all()
        assert (size_of_input[num_seen:] == 0).all()


def test_one_scale_at_a_time_with_a_cache_equals_all_scales_at_once(config: VARConfig) -> None:
    var, (inputs, labels) = make_var(config), make_batch(config)
    cache, scales = var.allocate_cache(BATCH), config.scales
    with torch.no_grad():
        classes = var.class_vectors(labels)
        parts = [var.forward_scale(None, classes, 0, cache)]
        for k, tokens in enumerate(scales.slices[1:], start=1):
            own = slice(tokens.start - scales.first_tokens, tokens.stop - scales.first_tokens)
            parts.append(var.forward_scale(inputs[:, own], classes, k, cache))
        torch.testing.assert_close(scales.join(parts), var(inputs, labels), rtol=1e-5, atol=1e-5)
    assert cache.position == scales.num_tokens


def test_the_label_changes_the_logits_of_a_conditional_model(config: VARConfig) -> None:
    var, (inputs, labels) = make_var(config), make_batch(config)
    difference = var(inputs, labels) - var(inputs, torch.full_like(labels, config.null_class))
    assert ((difference[:2].abs().amax(dim=(1, 2)) > 1e-3) == config.is_conditional).all()
    assert torch.equal(difference[2], torch.zeros_like(difference[2]))  # that one was the null class already


def test_the_initial_loss_is_that_of_a_uniform_guess(config: VARConfig) -> None:
    logits = VAR(config)(*make_batch(config))
    targets = torch.randint(32, (BATCH * config.scales.num_tokens,), generator=torch.Generator().manual_seed(5))
    assert abs(F.cross_entropy(logits.flatten(0, 1), targets).item() - math.log(32)) < 0.005


def test_initial_weights_are_a_function_of_the_seed_alone(config: VARConfig) -> None:
    torch.manual_seed(1)
    first = VAR(config, seed=7).state_dict()
    torch.manual_seed(2)
    second, other = VAR(config, seed=7).state_dict(), VAR(config, seed=8).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_initial_standard_deviations_are_the_public_ones() -> None:
    config = VARConfig(depth=4, patch_nums=(1, 2, 3), vocab_size=512, code_width=32, num_classes=100)
    var, w, std = VAR(config), config.width, math.sqrt(1 / (3 * config.width))
    adaln, block = var.blocks[1].modulation.linear.weight, var.blocks[2]
    wanted = [
        (var.class_embedding.weight, std),
        (var.position_embedding, std),
        (var.input_embedding.weight, std),
        (var.blocks[0].attention.qkv.weight, std),
        (var.blocks[3].feed_forward.fc1.weight, std),
        (var.head.weight, std * config.init_head),
        (var.final_norm.linear.weight, std * 0.5),
        (block.attention.proj.weight, std / math.sqrt(8)),
        (block.feed_forward.fc2.weight, std / math.sqrt(8)),
        (adaln[: 2 * w], std * config.init_gamma),
        (adaln[2 * w :], std * 0.5),
    ]
    for weight, wanted_std in wanted:  # 5 standard errors of an estimate from n numbers: 5 / sqrt(2n)
        assert abs(weight.std().item() / wanted_std - 1) < 5 / math.sqrt(2 * weight.numel())
    assert all((p == 0).all() for name, p in var.named_parameters() if name.endswith("bias"))
    assert all((p == math.log(4)).all() for name, p in var.named_parameters() if name.endswith("log_scale"))


def test_initial_offsets_of_shared_adaln_have_their_own_deviation() -> None:
    config = VARConfig(depth=6, patch_nums=(1, 2), norm="shared_adaln", init_gamma=0.01)
    offset = torch.stack([block.modulation.offset for block in VAR(config).blocks])
    assert abs(offset[:, 2:].std().item() * math.sqrt(config.width) / 0.5 - 1) < 0.05
    assert abs(offset[:, :2].std().item() * math.sqrt(config.width) / 0.01 - 1) < 0.07


def test_plain_layer_norms_begin_with_weight_1_and_know_the_class_from_the_start_token_alone() -> None:
    config = KINDS["layer_norm"]
    norms = [module for module in VAR(config).modules() if isinstance(module, torch.nn.LayerNorm)]
    assert len(norms) == 2 * config.depth + 1
    assert all((norm.weight == 1).all() and (norm.bias == 0).all() for norm in norms)
    var, (inputs, _) = make_var(config), make_batch(config)
    first, second = (var(inputs, torch.full((BATCH,), label)) for label in (0, 1))
    assert not torch.equal(first, second)
    row = var.class_embedding.weight.data
    row[1] = row[0]  # the same start token for both classes: now nothing tells them apart
    assert torch.equal(var(inputs, torch.zeros(BATCH, dtype=torch.int64)), var(inputs, torch.ones(BATCH).long()))


@pytest.mark.parametrize("checkpointing", [FULL_CHECKPOINTING, SELECTIVE_CHECKPOINTING])
def test_activation_checkpointing_changes_neither_loss_nor_gradients(config: VARConfig, checkpointing: str) -> None:
    inputs, labels = make_batch(config)
    plain, checkpointed = make_var(config), make_var(config)
    checkpointed.checkpointing = checkpointing
    residual_scale = torch.tensor([0.0, 1.0, 2.0]).expand(2, 2, BATCH)
    losses = [var(inputs, labels, residual_scale=residual_scale).square().mean() for var in (plain, checkpointed)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for one, other in zip(plain.parameters(), checkpointed.parameters()):
        assert torch.equal(one.grad, other.grad)


def cost_of_gradients(checkpointing: str) -> tuple[int, int]:
    """How many tensors autograd keeps of a forward pass, and the FLOPs of the backward pass."""
    var, kept = make_var(PLAIN), []
    var.checkpointing = checkpointing
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        loss = var(*make_batch(PLAIN)).sum()
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    return len(kept), counter.get_total_flops()


def test_checkpointing_keeps_less_and_computes_again_what_it_says() -> None:
    """Full checkpointing repeats a block's forward pass; selective keeps its products and repeats what is cheap."""
    ways = (NO_CHECKPOINTING, SELECTIVE_CHECKPOINTING, FULL_CHECKPOINTING)
    (tensors, flops), (selective_tensors, selective_flops), (full_tensors, full_flops) = map(cost_of_gradients, ways)
    assert selective_tensors < tensors / 2 and full_tensors < tensors / 2
    assert selective_flops == flops < 0.8 * full_flops


def test_residual_scales_of_zero_leave_embeddings_and_head(config: VARConfig) -> None:
    var, (inputs, labels) = make_var(config), make_batch(config)
    no_branches = torch.zeros(config.depth, 2, BATCH)
    logits = var(inputs, labels, residual_scale=no_branches)
    later = inputs + torch.zeros_like(inputs)
    later[:, 0] += 1  # without attention, a token sees itself only
    changed = (var(later, labels, residual_scale=no_branches) != logits).any(dim=2).any(dim=0)
    assert changed.nonzero().tolist() == [[config.scales.first_tokens]]


def test_bfloat16_weights_and_bfloat16_autocast_come_near_float32(config: VARConfig) -> None:
    var, (inputs, labels) = make_var(config), make_batch(config)
    with torch.no_grad():
        wanted = var(inputs, labels)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            autocast = var(inputs, labels)
            cached = var.forward_scale(None, var.class_vectors(labels), 0, var.allocate_cache(BATCH))
        low = var.bfloat16()(inputs, labels)
    for logits in (autocast, low):  # bfloat16 keeps 8 bits, about 0.4 % per operation
        assert logits.dtype == torch.bfloat16
        assert (logits - wanted).norm() < 0.05 * wanted.norm()
    assert cached.dtype == torch.float32


def test_the_closed_form_counts_every_parameter(config: VARConfig) -> None:
    assert sum(p.numel() for p in VAR(config).parameters()) == config.num_parameters


def test_the_meta_device_allocates_nothing_and_gives_shapes(config: VARConfig) -> None:
    with torch.device("meta"):
        var = VAR(config)
    inputs, labels = make_batch(config)
    assert all(p.is_meta for p in var.parameters())
    assert var(inputs.to("meta"), labels.to("meta")).shape == (BATCH, config.scales.num_tokens, 32)


def test_weight_decay_spares_vectors_positions_and_offsets() -> None:
    var = VAR(KINDS["shared_adaln"])
    decayed = {name for name, _ in var.named_parameters()} - var.names_without_weight_decay()
    assert {"class_embedding.weight", "head.weight", "shared_modulation.weight"} <= decayed
    spared = ("bias", "log_scale", "position", "position_embedding", "scale_embedding.weight", "offset")
    assert not any(name.endswith(spared) for name in decayed)


def test_scales_must_come_in_order() -> None:
    var = VAR(KINDS["adaln"])
    inputs, labels = make_batch(KINDS["adaln"])
    classes = var.class_vectors(labels)
    with pytest.raises(ValueError, match="cache holds 0 tokens, scale 1 needs 1"):
        var.forward_scale(inputs[:, :4], classes, 1, var.allocate_cache(BATCH))
    with pytest.raises(ValueError, match="None at scale 0"):
        var.forward_scale(inputs[:, :1], classes, 0, var.allocate_cache(BATCH))


@pytest.mark.slow
def test_compiled_steps_give_the_plain_logits_from_few_compilations(config: VARConfig) -> None:
    """All layers share one piece of code, and from the third scale on it takes the lengths as variables."""
    var, (inputs, labels) = make_var(config), make_batch(config)
    plain = logits_scale_by_scale(var, inputs, labels)
    torch.compiler.reset()
    counters.clear()
    var.compile_generation()
    compiled = logits_scale_by_scale(var, inputs, labels)
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)
    assert 1 <= counters["stats"]["unique_graphs"] <= 3


@torch.no_grad()
def logits_scale_by_scale(var: VAR, inputs: Tensor, labels: Tensor) -> Tensor:
    """(B, L, V), with a cache."""
    cache, scales, classes = var.allocate_cache(BATCH), var.scales, var.class_vectors(labels)
    by_scale = [None, *inputs.split(scales.scale_sizes[1:], dim=1)]
    return scales.join([var.forward_scale(part, classes, k, cache) for k, part in enumerate(by_scale)])


def test_inputs_of_another_length_are_refused() -> None:
    inputs, labels = make_batch(KINDS["adaln"])
    with pytest.raises(ValueError, match=r"expected \(3, 13, 6\)"):
        VAR(KINDS["adaln"])(inputs[:, 1:], labels)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"depth": 0}, "depth 0"),
        ({"num_classes": -1}, "num_classes -1 must be 0 or more"),
        ({"mlp_ratio": 0.0}, "mlp_ratio 0.0"),
        ({"patch_nums": (2, 1)}, "increasing"),
        ({"norm": "rms"}, "norm 'rms' is not one of adaln, shared_adaln, layer_norm"),
    ],
)
def test_an_impossible_model_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VARConfig(**({"depth": 2} | change))


def twenty_losses(config: VARConfig, prepare: Callable[[VAR], None]) -> list[float]:
    """The losses of twenty steps of a model that is changed by `prepare`."""
    inputs, labels = make_batch(config)
    var = make_var(config)
    prepare(var)
    optimizer = torch.optim.SGD(var.parameters(), lr=0.05)
    losses = []
    for _ in range(20):
        loss = var(inputs, labels).logsumexp(dim=2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("name", "value"),
    [("attention", PER_SCALE), ("checkpointing", FULL_CHECKPOINTING), ("checkpointing", SELECTIVE_CHECKPOINTING)],
)
def test_twenty_steps_take_the_losses_of_the_plain_path(name: str, value: str) -> None:
    plain = twenty_losses(PLAIN, lambda var: setattr(var, "attention", MASKED))
    faster = twenty_losses(PLAIN, lambda var: setattr(var, name, value))
    assert faster == pytest.approx(plain, rel=1e-5, abs=1e-6) and faster[-1] < faster[0]  # one passes near zero


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adaln", "shared_adaln", "layer_norm"])
def test_twenty_steps_of_compiled_blocks_take_the_losses_of_the_plain_path(kind: str) -> None:
    plain = twenty_losses(KINDS[kind], lambda var: None)
    counters.clear()
    assert twenty_losses(KINDS[kind], VAR.compile_blocks) == pytest.approx(plain, rel=1e-5, abs=1e-6)
    assert counters["stats"]["unique_graphs"] == 1  # both blocks share it
