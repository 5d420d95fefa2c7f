"""What a run spends between its steps: the mean time from step to step over the median one.

The run has 40 epochs of 23 steps of 32 images, as on one of the paper's four GPUs. A stand-in takes
the network's place: it has all its parameters, so that Adam has its full work, but its forward pass
only sleeps for 0.15 s. It takes about four minutes. From the repository's folder:

    PYTHONPATH=. python .github/benchmarks/pauses.py [more flags of train.py]
"""

import sys
import tempfile
import time

import numpy as np
import torch

import data
import train
from model import SONANet

FLAGS = """
    --height 384 --width 128 --ids-per-batch 8 --epochs 40 --eval-every 0 --workers 1
    --precision float32
"""
times = []


class StandIn(SONANet):
    def forward(self, images):
        if not self.training:
            return torch.zeros(len(images), 1536)
        times.append(time.perf_counter())
        time.sleep(0.15)
        # All parameters have gradients, of 0, and Adam its state.
        zero = 0 * sum(parameter.sum() for parameter in self.parameters())
        embedding = zero + torch.rand(len(images), 512)
        logits = self.global_classifier(embedding)
        return {"global": (embedding, logits), "local": (embedding, logits)}


def load_dataset(name, data_dir):
    """The toy, its training images under other labels because it has too few people."""
    splits = data.load_dataset(name, data_dir)
    people = np.arange(23 * 8).repeat(4)
    cameras = np.zeros_like(people)
    train_split = data.Split(splits["train"].paths[: len(people)], people, cameras)
    return splits | {"train": train_split}


if __name__ == "__main__":
    train.SONANet = StandIn
    train.load_dataset = load_dataset
    with tempfile.TemporaryDirectory() as output:
        sys.argv = ["train.py", *FLAGS.split(), "--output", f"{output}/run", *sys.argv[1:]]
        train.main()
    between = np.diff(times)
    median = np.median(between)
    mean = between.mean()
    print(f"median {median:.3f} s, mean {mean:.3f} s: {mean / median:.3f} x")
