"""Edit a picture without further training: in-painting, out-painting, class-conditional editing (Sec. 6, Fig. 8).

`python launchers/edit.py --run runs/d16 --image photo.jpg --task inpaint --box 60 80 180 200`

A box, or the white part of a mask picture, is drawn anew (inpaint, edit) or stays (outpaint). Both are in pixels of
the image file, of which the model sees the middle square.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from launchers.setup.command_line import Command, refuse_several_ranks, run_launcher, say
from data_pipeline.files.atomic import atomic_file
from data_pipeline.files.strict_json import read_regular_file
from data_pipeline.images.decoding import ImageTransform, read_header
from data_pipeline.images.tensors import floats_of, pixels_of
from launchers.figures.plots import Cell, draw_table
from launchers.sampling.pictures import to_uint8
from launchers.setup.assembly import Models, load_models
from launchers.setup.loading import refuse_file
from launchers.setup.settings import refuse_below_zero, refuse_unknown
from models.editing import area_in_tokens, box_in_tokens, paste_kept_pixels, tokens_to_pixels
from models.generation import KnownTokens, generate_scales, known_part
from models.sampling import Sampling
from models.var import VARConfig
from training.engine.distributed import World
from training.engine.engine import PRECISIONS
from training.tracking.mlflow import log_picture

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MAX_PICTURE_BYTES = 64 * 2**20
MAX_SHOWN = 4  # results in the panel
WHITE = 128  # and brighter, of 255, in a mask
EDIT_TASKS = ("inpaint", "outpaint", "edit")


@dataclass(frozen=True, kw_only=True)
class EditConfig:
    """The settings of an edit; how tokens are drawn is by default as in the public notebook."""

    run: str  # a run folder, a checkpoint, an imported or exported model, or a public .pth file
    tokenizer: str = ""  # empty: the one the run was trained with
    patch_nums: tuple[int, ...] = ()  # for a public file with a schedule of its own
    image: str
    task: str  # inpaint: the box is drawn anew; outpaint: the box stays; edit: the box is drawn anew as class `label`
    box: tuple[float, ...] = ()  # Y0 X0 Y1 X1, pixels of the image file
    mask: str = ""  # instead of a box: a picture of the image's size, white where the box would be
    label: int | None = None  # the class to draw; without it none is asked for
    out: str = ""  # folder; empty: one in RUN/edits named after picture, task, place and class
    variants: int = 4  # results, each with a seed of its own
    cfg: float = 3.0
    top_k: int = 900  # 0: off
    top_p: float = 0.95  # 1: off
    smooth: bool = False  # Gumbel-softmax smoothing, which the public notebook has on
    keep_coarsest: bool = True  # the 1x1 scale, a mean of the whole picture, is the original's, as in the notebook
    keep_pixels: bool = False  # put the original's pixels back where the picture stays
    feather: int | None = None  # pixels over which they then fade out into what is drawn; null: half a token
    precision: str = "fp32"  # of the transformer, or bf16 or fp16
    batch: int = 8  # results at once; memory limits it
    seed: int = 0
    tracking_uri: str = ""  # of the tracker whose page of the run gets the panel; empty: none, whatever it names

    def __post_init__(self) -> None:
        refuse_unknown(EDIT_TASKS, task=self.task)
        refuse_unknown(PRECISIONS, precision=self.precision)
        if bool(self.box) == bool(self.mask):
            raise ValueError(f"{'both box and' if self.box else 'neither box nor'} mask given; give one of them")
        if self.box and len(self.box) != 4:
            raise ValueError(f"box has {len(self.box)} numbers; it is Y0 X0 Y1 X1, in pixels of the image")
        for name in ("variants", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        refuse_below_zero(feather=self.feather or 0, seed=self.seed)


@dataclass(frozen=True)
class Square:
    """The middle square of a picture, which is what a model sees of it; in pixels of the picture."""

    top: int
    left: int
    side: int

    @classmethod
    def of(cls, image: Image.Image) -> Square:
        """Find the middle square of a picture."""
        side = min(image.size)
        return cls((image.height - side) // 2, (image.width - side) // 2, side)

    def shares(self, box: tuple[float, ...]) -> tuple[float, float, float, float]:
        """Turn a box (y0, x0, y1, x1) in pixels of the picture into shares of the square's sides, cut to the square."""
        y0, x0, y1, x1 = box

        def share(edge: float) -> float:
            return min(max(edge / self.side, 0.0), 1.0)

        return share(y0 - self.top), share(x0 - self.left), share(y1 - self.top), share(x1 - self.left)

    def describe(self) -> str:
        """Say where the square is."""
        return f"rows {self.top} to {self.top + self.side}, columns {self.left} to {self.left + self.side}"


def launch(command: Command[EditConfig]) -> None:
    """Draw the results of an edit, and a panel of them beside the original."""
    config = command.config
    refuse_several_ranks("edit.py")
    picture = read_picture(config.image)
    models = load_models(config.run, config.tokenizer, config.patch_nums)
    label = wanted_label(config, models.var.config)
    keep_mask = read_keep_mask(config, picture, models.var.scales.side)
    out = Path(config.out or default_out(config))
    refuse_file(out)
    token = models.tokenizer.config.autoencoder.downsampling
    stays = f"{keep_mask.float().mean():.0%} of the picture stays, in tokens of {token} x {token} pixels"
    say(f"{config.task}: {stays}; {config.variants} results {'would go' if command.dry_run else 'go'} to {out}")
    if command.dry_run:
        return
    transform = ImageTransform(models.tokenizer.config.image_size, resize_ratio=1.0)
    original = floats_of(pixels_of(transform.center_crop(picture)))[None]
    reconstruction, results = draw_results(config, models, original, keep_mask, label)
    save_results(config, original, reconstruction, results, keep_mask, out)
    log_picture(config.run, out / "panel.png", config.tracking_uri, group=out.name)


def read_picture(path: str) -> Image.Image:
    """Read a picture file as RGB, upright; FileNotFoundError if it is not there, ValueError if it is no picture."""
    if not Path(path).is_file():
        problem = "is a folder" if Path(path).is_dir() else "no such picture"
        raise FileNotFoundError(f"{path}: {problem}; give a JPEG, PNG or WEBP file")
    try:
        content = read_regular_file(Path(path), max_bytes=MAX_PICTURE_BYTES)
        stored = read_header(content)
        if stored.scale > 1:  # a box is in the pixels of the file
            raise ValueError(f"{stored.width} x {stored.height} pixels are too many to edit; scale it down")
        return stored.decode()
    except ValueError as error:
        raise ValueError(f"{path}: {error}; give a JPEG, PNG or WEBP file") from None


def wanted_label(config: EditConfig, model: VARConfig) -> int:
    """Choose the class to draw: the one given, else none; ValueError for one that the model does not know."""
    if config.label is None:
        if config.task == "edit":
            if not model.is_conditional:
                raise ValueError("task edit draws a class, this model knows none; use inpaint")
            raise ValueError(f"task edit draws a class; add --label with one of 0 to {model.num_classes - 1}")
        return model.null_class
    if not 0 <= config.label < model.num_classes:
        known = f"0 to {model.num_classes - 1}" if model.is_conditional else "no classes: leave label out"
        raise ValueError(f"label is {config.label}; this model knows {known}")
    return config.label


def read_keep_mask(config: EditConfig, picture: Image.Image, side: int) -> Tensor:
    """Decide which tokens of the last scale stay, (side, side) bool.

    Raises:
        ValueError: the box or mask leaves nothing to draw, or nothing to continue in out-painting.
    """
    square = Square.of(picture)
    chosen = mask_tokens(config.mask, picture, square, side) if config.mask else box_tokens(config.box, square, side)
    kept = chosen if config.task == "outpaint" else ~chosen
    if kept.all() or (config.task == "outpaint" and not kept.any()):
        share = "all" if kept.all() else "none"
        raise ValueError(f"{share} of {config.image} would stay; change the box or mask, in {square.describe()}")
    return kept


def box_tokens(box: tuple[float, ...], square: Square, side: int) -> Tensor:
    """Mark the tokens inside a box, (side, side) bool; ValueError if there is none."""
    try:
        return box_in_tokens(square.shares(box), side)
    except ValueError:
        edges = " ".join(f"{edge:g}" for edge in box)
        raise ValueError(
            f"box {edges} holds no token of the picture; give Y0 X0 Y1 X1, upper left corner first, in pixels within "
            f"{square.describe()}, {square.side / side:.0f} or more to a side"
        ) from None


def mask_tokens(path: str, picture: Image.Image, square: Square, side: int) -> Tensor:
    """Mark the tokens that a mask picture has white, (side, side) bool; ValueError if it is of another size."""
    mask = read_picture(path)
    if mask.size != picture.size:
        sizes = f"{mask.width} x {mask.height} pixels, the image {picture.width} x {picture.height}"
        raise ValueError(f"{path}: has {sizes}; make the mask as large as its image")
    is_white = torch.from_numpy(np.asarray(mask.convert("L")) >= WHITE)
    rows = slice(square.top, square.top + square.side)
    columns = slice(square.left, square.left + square.side)
    return area_in_tokens(is_white[rows, columns], side)


def default_out(config: EditConfig) -> Path:
    """Name RUN/edits/NAME, or edits/MODEL/NAME for a file MODEL.pth; NAME has picture, task, place and class."""
    run = Path(config.run)
    place = Path(config.mask).stem if config.mask else "-".join(f"{edge:g}" for edge in config.box)
    label = "" if config.label is None else f"-as-{config.label}"
    home = Path("edits") / run.stem if run.is_file() else run / "edits"
    return home / f"{Path(config.image).stem}-{config.task}-{place}{label}"


def draw_results(
    config: EditConfig, models: Models, original: Tensor, keep_mask: Tensor, label: int
) -> tuple[Tensor, Tensor]:
    """Draw `variants` results, (N, 3, H, W), each with its own seed; also what the codes keep of the picture."""
    device = World.from_environment().device
    var, tokenizer = models.var.to(device, PRECISIONS[config.precision]), models.tokenizer.to(device)
    tokenizer.prepare_decoder()
    known = known_part(tokenizer, original.to(device), keep_mask, keep_coarsest=config.keep_coarsest)
    sampling = Sampling(cfg=config.cfg, top_k=config.top_k, top_p=config.top_p, smooth=config.smooth)
    results = []
    for seeds in torch.arange(config.seed, config.seed + config.variants).split(config.batch):
        number = len(seeds)
        labels = torch.full((number,), label, device=device)
        repeated = KnownTokens(known.codes.expand(number, -1), known.mask.expand(number, -1))
        drawn = generate_scales(var, tokenizer, labels, sampling, seeds=seeds, known=repeated)
        results.append(tokenizer.decode_features(drawn.f_hat).cpu())
    reconstruction, drawn_images = tokenizer.decode(known.codes).cpu(), torch.cat(results)
    if not config.keep_pixels:
        return reconstruction, drawn_images
    kept = tokens_to_pixels(keep_mask, original.shape[-1])
    feather = tokenizer.config.autoencoder.downsampling // 2 if config.feather is None else config.feather
    return reconstruction, paste_kept_pixels(original, drawn_images, kept, feather=feather)


def save_results(
    config: EditConfig, original: Tensor, reconstruction: Tensor, results: Tensor, keep_mask: Tensor, out: Path
) -> None:
    """Write one PNG per result, edit.json with the settings, and panel.png.

    The panel shows the original, what stays, what the codes keep of it, and the first results.
    """
    out.mkdir(parents=True, exist_ok=True)
    for earlier in out.glob("seed-*.png"):
        earlier.unlink()
    pictures = to_uint8(results)
    for seed, picture in enumerate(pictures, start=config.seed):
        with atomic_file(out / f"seed-{seed:05d}.png") as file:
            Image.fromarray(picture).save(file, format="PNG")
    kept = tokens_to_pixels(keep_mask, original.shape[-1])
    stays = torch.where(kept, original, torch.zeros_like(original))
    shown = {"original": original, "what stays": stays, "reconstruction": reconstruction}
    cells = [Cell(to_uint8(image)[0], "") for image in shown.values()]
    cells += [Cell(picture, "") for picture in pictures[:MAX_SHOWN]]
    columns = [*shown, *(f"seed {config.seed + i}" for i in range(len(cells) - len(shown)))]
    row = config.task if config.label is None else f"{config.task}, class {config.label}"
    draw_table(out / "panel.png", [cells], rows=[row], columns=columns)
    with atomic_file(out / "edit.json") as file:
        file.write(json.dumps(asdict(config), indent=1).encode() + b"\n")
    say(f"wrote {len(pictures)} results to {out}; {min(len(pictures), MAX_SHOWN)} of them are in its panel.png")


def main() -> None:
    run_launcher(EditConfig, launch, __doc__)


if __name__ == "__main__":
    main()
