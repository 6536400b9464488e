"""Image shards to code shards, with a trained tokenizer: stage 2 then never sees an image.

`python launchers/encode_codes.py tokenizer=runs/tokenizer images=data/imagenet256/images out=data/imagenet256/codes`
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from data_pipeline.encoding import write_codes  # noqa: E402
from data_pipeline.index import Index, is_complete  # noqa: E402
from launchers.assembly import image_transform, load_tokenizer  # noqa: E402
from launchers.command_line import Command, run_launcher, say  # noqa: E402
from launchers.config import EncodeConfig  # noqa: E402
from models.vqvae import VQVAE  # noqa: E402
from training.distributed import World  # noqa: E402


def launch(command: Command[EncodeConfig]) -> None:
    config = command.config
    if World.from_environment().world_size > 1:
        raise ValueError("encode_codes.py runs on one process so far; start it with `python launchers/encode_codes.py`")
    tokenizer, sha256 = load_tokenizer(config.tokenizer)
    tokenizer.to("cuda" if torch.cuda.is_available() else "cpu")
    for split, views in (("train", config.views), ("val", 1)):
        images, out = Path(config.images) / split, Path(config.out) / split
        if is_encoded(images, out, config, sha256=sha256, views=views):
            say(f"{out} holds these images in codes of this tokenizer already; nothing to do")
        elif command.dry_run:
            say(f"would encode {Index.read(images).num_samples} images x {views} views into {out}")
        else:
            encode_split(images, out, tokenizer, config, sha256=sha256, views=views)


def is_encoded(images: Path, out: Path, config: EncodeConfig, *, sha256: str, views: int) -> bool:
    """Whether `out` is complete and what this command would write.

    Raises:
        ValueError: it is complete, but made with other settings; they are named.
    """
    if not is_complete(out):
        return False
    found = Index.read(out, kind="codes").meta
    wanted = {"tokenizer_sha256": sha256, "views": views, "images_fingerprint": Index.read(images).fingerprint}
    wanted |= {"seed": config.seed, "resize_ratio": config.view.resize_ratio}
    wanted |= {"flip": config.view.flip and views > 1}
    for name, value in wanted.items():
        if found.get(name) != value:
            raise ValueError(f"{out}: holds codes with {name} {found.get(name)}, now it is {value}; delete it first")
    return True


def encode_split(
    images: Path, out: Path, tokenizer: VQVAE, config: EncodeConfig, *, sha256: str, views: int
) -> None:
    device = tokenizer.quantizer.codebook.device
    index = write_codes(
        images,
        out,
        encode=lambda batch: tokenizer.encode(batch.to(device)),
        transform=image_transform(tokenizer.config, config.view),
        views=views,
        seed=config.seed,
        patch_nums=tokenizer.config.patch_nums,
        vocab_size=tokenizer.config.quantizer.vocab_size,
        tokenizer_sha256=sha256,
        batch_size=config.batch,
        report=say,
    )
    say(f"encoded {index.num_samples} images x {views} views into {out}")


def main() -> None:
    run_launcher(EncodeConfig, launch, __doc__)


if __name__ == "__main__":
    main()
