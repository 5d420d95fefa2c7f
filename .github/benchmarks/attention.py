"""What SONA attends to in trained runs, and what that contributes: the study in README.md.

From the repository's folder: PYTHONPATH=. python .github/benchmarks/attention.py RUN [RUN ...]
"""

import sys

import study  # noqa: F401, names the placements of its rows
import torch

from data import ImageDataset, load_dataset, normalize
from evaluate import evaluate, load_run, sona_input
from model import SONA

for run in sys.argv[1:]:
    network, settings = load_run(run)
    splits = load_dataset(settings["dataset"], settings["data_dir"])
    test = splits["query"], splits["gallery"], settings["height"], settings["width"]
    print(f"{run}: mAP {evaluate(network, *test)[1].mean_ap:.2%}", flush=True)
    if not any(isinstance(module, SONA) for module in network.modules()):
        continue
    paths = splits["query"].paths[:200]
    images = torch.stack(
        [image for image, _ in ImageDataset(paths, settings["height"], settings["width"])]
    )
    sona, x = sona_input(network, normalize(images))
    with torch.inference_mode():
        weights = sona.attention(x) * x[0, 0].numel()  # (B, HW, HW), 1 where uniform
        change = (sona(x) - x).flatten(2)  # p(z): (B, C, HW)
    gains, strongest = sona.theta[1].weight, weights.amax(2)  # (d,); (B, HW)
    mean = change.mean(2, keepdim=True).expand_as(change)  # over positions
    sona.forward = lambda x, sona=sona: x + sona.p(sona.g(x).mean((2, 3), keepdim=True))
    averaged = evaluate(network, *test)[1].mean_ap
    sona.forward = lambda x: x
    without = evaluate(network, *test)[1].mean_ap
    print(
        f"  with every row the average {averaged:.2%}, with SONA taken out {without:.2%}\n"
        f"  gains {gains.min():.2f} to {gains.max():.2f}; weights x HW {weights.min():.2f} to {weights.max():.2f}, "
        f"strongest of a position {strongest.median():.3f}\n"
        f"  p(z) {change.norm() / x.norm():.2f} of x, spread {(change - mean).norm() / mean.norm():.2%}",
        flush=True,
    )
