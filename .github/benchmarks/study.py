"""Train a row of README.md's study of attention: `train.py` on the toy, with one thing changed.

From the repository's folder, for each row and seed:

    PYTHONPATH=. python .github/benchmarks/study.py ROW SEED [more flags of train.py]

ROW is one of
    default  the network as it is: SONA after stage 2, DropBlock+
    uniform  every attention weight 1 / HW, in training and evaluation: z is the mean of g
    d05      the scale of Eq. 2 is d^-0.5 instead of d^-1.5
    none     no SONA (BL+DB+)
    bl       neither SONA nor DropBlock+ (BL)

The run goes to runs/ROW-SEED and resumes if it was interrupted. It uses one thread.
"""

import sys
from functools import partial

import torch
from torch import Tensor

import train
from model import PLACEMENTS, SONA


class Uniform(SONA):
    """SONA with 1 / HW in place of the softmax."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.p(self.g(x).mean((2, 3), keepdim=True))

    def attention(self, x: Tensor) -> Tensor:
        positions = x[0, 0].numel()
        return x.new_full((len(x), positions, positions), 1 / positions)


class Scaled(SONA):
    """SONA whose scale is another power of d."""

    def __init__(self, channels: int, power: float) -> None:
        super().__init__(channels)
        self.scale = self.g.out_channels**power


PLACEMENTS["uniform"] = {"stage2": Uniform}
PLACEMENTS["d05"] = {"stage2": partial(Scaled, power=-0.5)}

ROWS = {
    "default": "--sona 2",
    "uniform": "--sona uniform",
    "d05": "--sona d05",
    "none": "--sona none",
    "bl": "--sona none --drop none",
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    row, seed, *more = sys.argv[1:]
    flags = f"--ids-per-batch 4 --epochs 60 --eval-every 0 --seed {seed} {ROWS[row]}"
    sys.argv = ["train.py", *flags.split(), "--output", f"runs/{row}-{seed}", "--resume", *more]
    train.main()
