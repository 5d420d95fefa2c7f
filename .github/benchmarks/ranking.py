"""evaluate_ranking beside the bare matrix product of its features, in time and memory.

From the repository's folder: PYTHONPATH=. python .github/benchmarks/ranking.py 3368 15913 751 6       (Market-1501)
and 11659 82161 3060 15 (MSMT17): queries, gallery, identities and cameras.
"""

import sys
import time

import numpy as np

from evaluate import evaluate_ranking


def peak():  # MB
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024


queries, images, people, cameras = map(int, sys.argv[1:])
rng = np.random.default_rng(0)
query, gallery = (rng.standard_normal((n, 1536), np.float32) for n in (queries, images))
labels = [rng.integers(most, size=n) for most in (people, cameras) for n in (queries, images)]
for _ in range(3):
    before, start = peak(), time.perf_counter()
    evaluate_ranking(query, gallery, *labels)
    whole, memory = time.perf_counter() - start, peak() - before
    start = time.perf_counter()
    for slab in np.array_split(query, max(1, queries // 1000)):
        slab @ gallery.T
    product = time.perf_counter() - start
    features = (query.nbytes + gallery.nbytes) / 2**20
    print(
        f"{whole:.2f} s, {whole / product:.2f} x the product; {memory:.0f} MB, the features have {features:.0f}"
    )
