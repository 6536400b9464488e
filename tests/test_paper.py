"""The paper's numbers, with their place in it. Models live on the meta device: shapes without memory."""

import pytest
import torch
from torch import nn

from models.scales import PATCH_NUMS_256, PATCH_NUMS_512, PATCH_NUMS_1024, Scales
from models.var import VAR, VARConfig
from models.vqvae import VQVAE, VQVAEConfig

# Depth to parameters. Those of depths 16 to 30 are of the released models; the paper prints 18.5M (d6, Sec. 5.2), and
# 310M, 600M, 1.0B, 2.0B (Table 1).
PARAMETERS = {
    6: 18_492_580,
    8: 41_315_904,
    10: 78_367_716,
    12: 133_186_960,
    14: 209_312_580,
    16: 310_283_520,
    18: 439_638_724,
    20: 600_917_136,
    22: 797_657_700,
    24: 1_033_399_360,
    26: 1_311_681_060,
    28: 1_636_041_744,
    30: 2_010_020_356,
}
VAR_512 = VARConfig(depth=36, patch_nums=PATCH_NUMS_512, norm="shared_adaln")


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def num_var_parameters(config: VARConfig) -> int:
    with torch.device("meta"):
        return num_parameters(VAR(config))


@pytest.mark.parametrize(
    "patch_nums, num_scales, num_tokens, side",
    [
        (PATCH_NUMS_256, 10, 680, 16),
        (PATCH_NUMS_512, 10, 2240, 32),
        (PATCH_NUMS_1024, 14, 9451, 64),
    ],
)
def test_schedules(patch_nums: tuple[int, ...], num_scales: int, num_tokens: int, side: int) -> None:
    scales = Scales(patch_nums)
    assert (scales.num_scales, scales.num_tokens, scales.side) == (num_scales, num_tokens, side)


@pytest.mark.parametrize("depth", PARAMETERS)
def test_width_heads_and_drop_rate_follow_from_depth(depth: int) -> None:  # eq. 7
    config = VARConfig(depth=depth)
    assert (config.width, config.num_heads) == (64 * depth, depth)
    assert config.drop_path_rate == pytest.approx(0.1 * depth / 24)


@pytest.mark.parametrize("depth", PARAMETERS)
def test_parameters_of_every_size(depth: int) -> None:
    config = VARConfig(depth=depth)
    assert num_var_parameters(config) == config.num_parameters == PARAMETERS[depth]


def test_parameters_of_the_512_model_with_shared_adaln() -> None:  # Table 2, VAR-d36-s: 2.3B
    assert num_var_parameters(VAR_512) == VAR_512.num_parameters == 2_353_893_904


def test_parameters_of_the_ablations() -> None:  # Table 3: rows 2 and 3, d16 before and after AdaLN: 207M and 310M
    plain = VARConfig(depth=16, norm="layer_norm", qk_norm=False)
    adaln = VARConfig(depth=16, qk_norm=False)
    assert num_var_parameters(plain) == plain.num_parameters == pytest.approx(207e6, rel=0.01)
    assert num_var_parameters(adaln) == adaln.num_parameters == pytest.approx(310e6, rel=0.01)


def test_the_1024_model_fits_its_schedule() -> None:
    config = VARConfig(depth=30, patch_nums=PATCH_NUMS_1024, norm="shared_adaln")
    assert num_var_parameters(config) == config.num_parameters
    assert VQVAEConfig(patch_nums=PATCH_NUMS_1024).image_size == 1024


@pytest.mark.parametrize("depth", [6, 16, 30])
def test_block_matrices_hold_73728_depth_cubed_parameters(depth: int) -> None:  # eq. 8: 18 d w^2 = 73728 d^3
    with torch.device("meta"):
        blocks = VAR(VARConfig(depth=depth)).blocks
    assert sum(p.numel() for p in blocks.parameters() if p.ndim == 2) == 73_728 * depth**3


def test_shared_adaln_blocks_hold_49152_depth_cubed_parameters() -> None:  # footnote 3: 12 d w^2 = 49152 d^3
    with torch.device("meta"):
        blocks = VAR(VAR_512).blocks
    linears = [module for module in blocks.modules() if isinstance(module, nn.Linear)]
    assert sum(linear.weight.numel() for linear in linears) == 49_152 * 36**3


def test_parameters_of_the_tokenizer() -> None:  # of the released tokenizer; Sec. 4 gives V = 4096 and 16x
    config = VQVAEConfig()
    with torch.device("meta"):
        tokenizer = VQVAE(config)
    assert (config.image_size, config.autoencoder.downsampling, config.quantizer.vocab_size) == (256, 16, 4096)
    assert num_parameters(tokenizer) == 108_948_355
    assert num_parameters(tokenizer.encoder) == 44_107_872
    assert num_parameters(tokenizer.decoder) == 64_653_923
    assert num_parameters(tokenizer.quantizer) == 168_064
    assert num_parameters(tokenizer.quant_conv) == num_parameters(tokenizer.post_quant_conv) == 9_248


def test_phi_adds_003m_parameters() -> None:  # Sec. 4: "K extra convolutions (0.03M extra parameters)"
    with torch.device("meta"):
        phi = VQVAE(VQVAEConfig()).quantizer.phi
    assert num_parameters(phi) == 36_992  # four shared convolutions; ten would be 92,480
