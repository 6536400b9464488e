"""Image shards to code shards, with a trained tokenizer: stage 2 then never sees an image.

`python launchers/encode_codes.py tokenizer=runs/tokenizer images=data/imagenet256/images out=data/imagenet256/codes`
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from data_pipeline.codes import write_codes  # noqa: E402
from launchers.assembly import image_transform, load_tokenizer  # noqa: E402
from launchers.command_line import Command, run_launcher, say  # noqa: E402
from launchers.config import EncodeConfig  # noqa: E402


def launch(command: Command[EncodeConfig]) -> None:
    config = command.config
    tokenizer, sha256 = load_tokenizer(config.tokenizer)
    if command.dry_run:
        say(f"would encode {config.images} into {config.out} with tokenizer {sha256[:12]}")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer.to(device)
    for split, views in (("train", config.views), ("val", 1)):
        index = write_codes(
            Path(config.images) / split,
            Path(config.out) / split,
            encode=lambda images: tokenizer.encode(images.to(device)).cpu(),
            transform=image_transform(tokenizer.config, config.view),
            views=views,
            seed=config.seed,
            patch_nums=tokenizer.config.patch_nums,
            vocab_size=tokenizer.config.quantizer.vocab_size,
            tokenizer_sha256=sha256,
            batch_size=config.batch,
            report=say,
        )
        say(f"encoded {index.num_samples} images x {views} views into {config.out}/{split}")


def main() -> None:
    run_launcher(EncodeConfig, launch, __doc__)


if __name__ == "__main__":
    main()
