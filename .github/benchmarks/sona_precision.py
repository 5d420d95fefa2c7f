"""What half precision leaves of SONA's pattern: p(z) less its mean over positions.

From the repository's folder, for a run whose data set is in --data-dir:

    PYTHONPATH=. python .github/benchmarks/sona_precision.py RUN [DATA_DIR]

On 16 queries at 384 x 128, on a CPU, it prints how much p(z) differs between positions, relative to
its mean, and how wrong this difference is under autocast: root mean squares, against float64.
"""

import sys

import torch

from data import ImageDataset, load_dataset, normalize
from evaluate import load_run, sona_input

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@torch.inference_mode()
def main(run, data_dir=None):
    network, settings = load_run(run)
    paths = load_dataset(settings["dataset"], data_dir or settings["data_dir"])["query"].paths[:16]
    images = torch.stack([image for image, _ in ImageDataset(paths, paths, 384, 128)])
    sona, x = sona_input(network, normalize(images))
    outputs = []
    sona.p.register_forward_hook(lambda _module, _inputs, output: outputs.append(output.double()))
    for dtype in PRECISIONS.values():
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            sona(x)
    sona.double()(x.double())
    means = [output.mean((2, 3), keepdim=True) for output in outputs]
    *patterns, exact = (output - mean for output, mean in zip(outputs, means, strict=True))
    spread = exact.norm() / means[-1].expand_as(exact).norm()
    print(f"p(z) differs between positions by {spread:.2%} of its mean")
    for precision, pattern in zip(PRECISIONS, patterns, strict=True):
        print(f"{precision}: wrong by {(pattern - exact).norm() / exact.norm():.2%} of that")


if __name__ == "__main__":
    main(*sys.argv[1:])
