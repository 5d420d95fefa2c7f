"""What SONA attends to in trained runs: README's table 'What the attention does'.

From the repository's folder: PYTHONPATH=. python .github/benchmarks/attention.py RUN [RUN ...]
"""

import sys

import torch

from data import ImageDataset, load_dataset, normalize
from evaluate import load_run, sona_input

for run in sys.argv[1:]:
    network, settings = load_run(run)
    paths = load_dataset(settings["dataset"], settings["data_dir"])["query"].paths[:200]
    images = torch.stack([image for image, _ in ImageDataset(paths, settings["height"], settings["width"])])
    sona, x = sona_input(network, normalize(images))
    with torch.inference_mode():
        weights = sona.attention(x) * x[0, 0].numel()  # (B, HW, HW), 1 where uniform
        change = (sona(x) - x).flatten(2)  # p(z): (B, C, HW)
    gains, strongest = sona.theta[1].weight, weights.amax(2)  # (d,); (B, HW)
    mean = change.mean(2, keepdim=True)  # over positions
    print(
        f"{run}: gains {gains.min():.2f} to {gains.max():.2f}; weights x HW {weights.min():.3f} to "
        f"{weights.max():.3f}, strongest of a position {strongest.median():.3f}; "
        f"p(z) {change.norm() / x.norm():.2f} of x, spread {(change - mean).norm() / mean.expand_as(change).norm():.2%}"
    )
