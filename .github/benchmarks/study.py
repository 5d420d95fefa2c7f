"""Train the rows of the study of attention in README.md: `train.py` with one thing changed, on the toy.

From the repository's folder: PYTHONPATH=. python .github/benchmarks/study.py ROW SEED [more flags of train.py]
with ROW one of paper, decay (weight decay on theta, too), d1 and d05 (scale d^-1, d^-0.5), none (no SONA: BL+DB+) and
bl (no DropBlock+ either: BL).
"""

import sys

import torch

import train
from model import PLACEMENTS, SONA


class Scaled(SONA):
    def __init__(self, channels, reduction=2, power=-1.0):
        super().__init__(channels, reduction)
        self.scale = (channels // reduction) ** power


PLACEMENTS["d1"] = {"stage2": Scaled}
PLACEMENTS["d05"] = {"stage2": lambda channels: Scaled(channels, power=-0.5)}

if __name__ == "__main__":
    torch.set_num_threads(1)
    row, seed, *more = sys.argv[1:]
    if row == "decay":
        train.adam = lambda network, lr: torch.optim.Adam(
            network.parameters(), lr, weight_decay=5e-4, fused=True
        )
    sona = {"bl": "none --drop none"}.get(row, row if row in PLACEMENTS else "2")
    flags = f"--sona {sona} --seed {seed} --output runs/{row}-{seed} --resume"
    sys.argv = [
        "train.py",
        *"--ids-per-batch 4 --epochs 60 --eval-every 0".split(),
        *flags.split(),
        *more,
    ]
    train.main()
