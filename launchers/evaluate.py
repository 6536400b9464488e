"""Evaluate generated images. `evaluate.py VERB --config FILE`, or `evaluate.py VERB a=b ...`

verbs
  reference  make the reference of a set of real images: its moments and features, in one file
  samples    compare generated images with a reference: FD, sFD, IS, precision, recall, density, coverage, MIND
  tokenizer  reconstruct held-out images: PSNR, SSIM, rFD, bits a pixel, use and perplexity of codes at each scale

`python launchers/evaluate.py reference images=data/imagenet/val side=256 out=references/val.npz`
`deepspeed launchers/evaluate.py samples images=samples/d16 reference=references/val.npz`

All run on any number of ranks and give the same numbers. `evaluate.py VERB --help` lists the settings of a verb.
"""

from __future__ import annotations

from launchers.setup.verbs import run_verb

VERBS = {
    "reference": "launchers.evaluation.reference:ReferenceConfig",
    "samples": "launchers.evaluation.samples:SamplesConfig",
    "tokenizer": "launchers.evaluation.tokenizer:EvaluateTokenizerConfig",
}


def main() -> None:
    """Run the verb that the command line names."""
    run_verb(VERBS, __doc__)


if __name__ == "__main__":
    main()
