"""What a run spends between its steps: 40 epochs of 23 steps of 32 images, as on one of the paper's four GPUs.

A stub takes the network's place, with all its parameters, and 0.15 s for a forward pass. Prints the mean time between
two forward passes over the median one. From the repository's folder: PYTHONPATH=. python .github/benchmarks/pauses.py
"""

import sys
import tempfile
import time

import numpy as np
import torch

import data
import train
from model import SONANet

times = []


class Stub(SONANet):
    def forward(self, images):
        if not self.training:
            return torch.zeros(len(images), 1536)
        times.append(time.perf_counter())
        time.sleep(0.15)
        zero = (
            sum(parameter.sum() for parameter in self.parameters()) * 0
        )  # all have gradients, and Adam its state
        embedding = zero + torch.rand(len(images), 512)
        return {
            branch: (embedding, self.global_classifier(embedding)) for branch in ("global", "local")
        }


def load_dataset(*_):
    splits = data.load_dataset("toy", "datasets")
    people = np.arange(23 * 8).repeat(
        4
    )  # the toy's images under other labels, as it has too few people
    return splits | {"train": data.Split(splits["train"].paths[: len(people)], people, people * 0)}


if __name__ == "__main__":
    train.SONANet, train.load_dataset = Stub, load_dataset
    with tempfile.TemporaryDirectory() as output:
        flags = "--height 384 --width 128 --ids-per-batch 8 --epochs 40 --eval-every 0 --workers 1 --precision float32"
        sys.argv = ["train.py", *flags.split(), "--output", f"{output}/run"]
        train.main()
    between = np.diff(times)
    print(
        f"median {np.median(between):.3f} s, mean {between.mean():.3f} s: {between.mean() / np.median(between):.3f} x"
    )
