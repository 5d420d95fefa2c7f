"""Time and memory of evaluate_ranking, beside the matrix product of its features alone.

From the repository's folder, with the numbers of queries, gallery images, identities and cameras:

    PYTHONPATH=. python .github/benchmarks/ranking.py 3368 15913 751 6       # Market-1501
    PYTHONPATH=. python .github/benchmarks/ranking.py 11659 82161 3060 15    # MSMT17
"""

import sys
import time
from pathlib import Path

import numpy as np

from evaluate import evaluate_ranking


def peak():
    """This process's peak memory in MB (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


queries, images, people, cameras = map(int, sys.argv[1:])
rng = np.random.default_rng(0)
query = rng.standard_normal((queries, 1536), np.float32)
gallery = rng.standard_normal((images, 1536), np.float32)
labels = [rng.integers(most, size=n) for most in (people, cameras) for n in (queries, images)]
features = (query.nbytes + gallery.nbytes) / 2**20
for _ in range(3):
    before = peak()
    start = time.perf_counter()
    evaluate_ranking(query, gallery, *labels)
    whole = time.perf_counter() - start
    memory = peak() - before

    start = time.perf_counter()
    for slab in np.array_split(query, max(1, queries // 1000)):
        slab @ gallery.T
    product = time.perf_counter() - start
    print(f"{whole:.2f} s, {whole / product:.2f} x the product; ", end="")
    print(f"{memory:.0f} MB, the features have {features:.0f}")
