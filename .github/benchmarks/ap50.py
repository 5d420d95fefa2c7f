"""What cutting AP at rank 50 takes from mAP: as in BFE's evaluator, a match beyond it counts as 0.

From the repository's folder:

    PYTHONPATH=. python .github/benchmarks/ap50.py RUN [DATA_DIR]
"""

import sys

import numpy as np

from data import load_dataset
from evaluate import evaluate_ranking, extract_splits, load_run


def main(run: str, data_dir: str | None = None) -> None:
    network, settings = load_run(run)
    splits = load_dataset(settings["dataset"], data_dir or settings["data_dir"])
    _, query, gallery = splits.values()
    size = settings["height"], settings["width"]
    queries, images = extract_splits(network, query, gallery, *size)
    cut = []
    for q, identity, camera in zip(queries, query.ids, query.cams, strict=True):
        valid = (gallery.ids != identity) | (gallery.cams != camera)
        order = np.argsort(np.linalg.norm(images - q, axis=1)[valid])
        ranks = np.flatnonzero(gallery.ids[valid][order] == identity) + 1  # of the true matches
        precisions = np.arange(1, len(ranks) + 1) / ranks
        cut.append(np.where(ranks <= 50, precisions, 0).mean())
    whole = evaluate_ranking(queries, images, query.ids, gallery.ids, query.cams, gallery.cams)
    print(f"{run}: mAP {whole.mean_ap:.2%}, cut at rank 50 {np.nanmean(cut):.2%}")


if __name__ == "__main__":
    main(*sys.argv[1:])
