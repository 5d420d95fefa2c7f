"""Evaluate trained runs of SONA-Net (Xia et al., ICCV 2019): CMC and mAP, single query, no re-ranking (Sec. 3.3).

Usage:
    python evaluate.py runs/toy                          # mAP and Rank-1, 5, 10 of a run, on its own data set
    python evaluate.py runs/market --dataset dukemtmc    # on another one
    python evaluate.py runs/a runs/b runs/c runs/d       # the paper's mean and standard deviation over four runs
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

from data import DATASETS, DataError, ImageDataset, Split, describe, load_dataset, normalize
from losses import gather
from model import SONANet, WeightsError

WORKERS = min(4, os.cpu_count() or 1)


class Ranking(NamedTuple):
    """How well queries find their identity, as fractions."""

    cmc: np.ndarray  # (max_rank,): [k - 1] is the share of queries with a true match among the first k
    mean_ap: float
    average_precisions: np.ndarray  # (queries,), nan where a query was left out

    def figures(self) -> dict[str, float]:
        """The four figures of the paper's tables, as fractions; max_rank must be 10 or more."""
        return {"mean_ap": self.mean_ap} | {f"rank{k}": float(self.cmc[k - 1]) for k in (1, 5, 10)}


def evaluate_ranking(
    query_features: np.ndarray,
    gallery_features: np.ndarray,
    query_ids: np.ndarray,
    gallery_ids: np.ndarray,
    query_cams: np.ndarray,
    gallery_cams: np.ndarray,
    max_rank: int = 50,
) -> Ranking:
    """CMC and average precision of single queries under Euclidean distance (Market-1501 protocol, Zheng et al. 2015).

    features (N, D), ids and cams (N,). For each query, gallery images of its own identity under its own
    camera do not count, nor does junk (identity -1). A query without a true match under another camera is
    left out. AP is the mean of the precisions at each true match. Distances are in the features' precision, at
    least float32; equal ones rank in gallery order.

    Raises ValueError where shapes do not fit, features are not finite, or no query has a true match.

    Nothing is sorted: a match's rank is a count of the images nearer than it. Memory is that of the features
    once more and a slab of distances, whatever the size of the gallery.
    """
    dtype = np.result_type(query_features, gallery_features, np.float32)
    query_features, gallery_features = (np.asarray(x, dtype) for x in (query_features, gallery_features))
    query_ids, gallery_ids, query_cams, gallery_cams = map(
        np.asarray, (query_ids, gallery_ids, query_cams, gallery_cams)
    )
    if query_features.ndim != 2 or query_features.shape[1:] != gallery_features.shape[1:]:
        raise ValueError(
            "query_features and gallery_features must be (N, D) with one D, not "
            f"{query_features.shape} and {gallery_features.shape}"
        )
    for side, features, ids, cams in (
        ("query", query_features, query_ids, query_cams),
        ("gallery", gallery_features, gallery_ids, gallery_cams),
    ):
        if not ids.shape == cams.shape == features.shape[:1]:
            raise ValueError(f"{side}: {len(features)} features, but ids {ids.shape} and cams {cams.shape}")

    # Distances are the same from any origin; far from 0, where products cancel, one of the images is a good one.
    query_features, gallery_features = query_features - gallery_features[0], gallery_features - gallery_features[0]
    query_norms, half_norms = (np.einsum("nd,nd->n", x, x) / 2 for x in (query_features, gallery_features))
    if not (np.isfinite(query_norms).all() and np.isfinite(half_norms).all()):
        raise ValueError("the features hold nan, inf or numbers too large to square; did the training go wrong?")
    half_norms[gallery_ids == -1] = np.inf  # junk comes last, behind every match

    by_id = np.argsort(gallery_ids, kind="stable")
    first = np.searchsorted(gallery_ids[by_id], query_ids, "left")
    last = np.searchsorted(gallery_ids[by_id], query_ids, "right")
    average_precisions = np.full(len(query_ids), np.nan)
    hits = np.zeros(max_rank)
    slab = max(1, 2**23 // max(1, len(gallery_ids)))  # rows of 8M distances in all, 32 MB in float32
    for start in range(0, len(query_ids), slab):
        # |q - g|^2 / 2 without |q|^2 / 2, which is the same for all g, is |g|^2 / 2 - qg: one matrix product.
        distances = query_features[start : start + slab] @ gallery_features.T  # (slab, gallery)
        np.subtract(half_norms, distances, out=distances)
        for query, row in enumerate(distances, start):
            same_id = by_id[first[query] : last[query]]
            same_cam = gallery_cams[same_id] == query_cams[query]
            row[same_id[same_cam]] = np.inf
            matches = same_id[~same_cam]
            if len(matches) == 0 or query_ids[query] == -1:
                continue
            # A match's rank, from 0: how many are nearer, or as near and earlier in the gallery.
            ranks = [np.count_nonzero(row[:i] <= row[i]) + np.count_nonzero(row[i:] < row[i]) for i in matches]
            ranks = np.sort(ranks)
            average_precisions[query] = np.mean(np.arange(1, len(ranks) + 1) / (ranks + 1))
            hits[ranks[0] :] += 1

    counted = np.count_nonzero(~np.isnan(average_precisions))
    if counted == 0:
        raise ValueError("no query has a true match under another camera; are the identities and cameras right?")
    return Ranking(hits / counted, float(np.nanmean(average_precisions)), average_precisions)


def summary(figures: dict[str, float]) -> str:
    """The four figures in the paper's form, in per cent."""
    names = {"mean_ap": "mAP", "rank1": "Rank-1", "rank5": "Rank-5", "rank10": "Rank-10"}
    return "  ".join(f"{name}{100 * figures[key]:7.2f}" for key, name in names.items())


def bf16_pays(device: torch.device) -> bool:
    """Whether bf16 autocast is a gain on the device: on GPUs that have it, on CPUs with matrix units for it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(torch.cpu.get_capabilities().get("amx_bf16"))


@torch.inference_mode()
def extract_features(
    network: nn.Module, paths: list[str], height: int, width: int, workers: int = 0, amp: bool = False
) -> np.ndarray:
    """(N, 1536) float32 test embeddings of image files: the mean over an image and its mirror image (Sec. 3.2).

    Under torch.distributed the processes share the images, and each returns all features. Leaves the
    network in eval mode.
    """
    device = next(network.parameters()).device
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    share = math.ceil(len(paths) / processes)  # the same for all: the last ones begin again with the first image
    own = [paths[i % len(paths)] for i in range(rank * share, (rank + 1) * share)]
    images = ImageDataset(own, height, width)
    loader = DataLoader(images, batch_size=64, num_workers=workers, pin_memory=device.type == "cuda")
    network.eval()
    features = []
    for batch, _ in loader:
        batch = normalize(batch.to(device, non_blocking=True))
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            both = network(torch.cat([batch, batch.flip(3)]))  # (2B, 1536)
        features.append(both.float().unflatten(0, (2, -1)).mean(0))
    return gather(torch.cat(features))[: len(paths)].cpu().numpy()


def evaluate(network: nn.Module, splits: dict[str, Split], **options) -> Ranking:
    """Rank a data set's gallery for its queries; options as of extract_features. Raises DataError."""
    query, gallery = splits["query"], splits["gallery"]
    features = [extract_features(network, split.paths, **options) for split in (query, gallery)]
    try:
        ranking = evaluate_ranking(*features, query.ids, gallery.ids, query.cams, gallery.cams)
    except ValueError as error:
        raise DataError(str(error)) from error
    if left_out := np.count_nonzero(np.isnan(ranking.average_precisions)):
        print(f"  {left_out} of {len(query.ids)} queries left out: no true match under another camera")
    return ranking


def load_run(run: str | Path, device: torch.device | str = "cpu") -> tuple[SONANet, dict]:
    """The trained network of a run's folder, in eval mode, and the settings it was trained with.

    Raises DataError where the folder holds no finished run or a damaged one.
    """
    path = Path(run, "model.pt")
    if not path.is_file():
        unfinished = Path(run, "last.pt").is_file()
        hint = "its training has not ended; finish it with train.py --resume" if unfinished else "train.py makes one"
        raise DataError(f"{run} is not the folder of a finished run: no {path.name} in it; {hint}")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        settings = saved["settings"]
        network = SONANet(saved["num_classes"], settings["sona"], settings["drop"])
        network.load_state_dict(saved["model"])
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        raise DataError(f"{path} is damaged or not a model of train.py; copy or train it again") from error
    return network.to(device, memory_format=torch.channels_last).eval(), settings


# ---------------------------------------------------------------------------------------------------
# Command line; train.py uses these too


def number(kind: type, minimum: float) -> Callable[[str], float]:
    """A type for argparse: an int or a finite float of at least minimum."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not minimum <= value < math.inf:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} of at least {minimum:g}")
        return value

    return parse


def start_process() -> tuple[torch.device, int, int]:
    """This process's device, its rank and the number of processes; under torchrun, joins the others.

    Only the first process prints.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if "RANK" not in os.environ:
        return device, 0, 1
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")
    return device, dist.get_rank(), dist.get_world_size()


def run_program(main: Callable[[], None]) -> None:
    """Run a program's main; bad input ends it with one line on standard error."""
    try:
        main()
    except Exception as error:
        if int(os.environ.get("RANK", 0)) > 0:
            time.sleep(5)  # the first process may be telling the cause; torchrun then ends this one
        if not isinstance(error, DataError | WeightsError):
            raise
        message = str(error).splitlines()[-1]  # from a worker process its traceback comes first
        sys.exit(f"{Path(sys.argv[0]).name}: error: {message.removeprefix('data.DataError: ')}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


class Parser(argparse.ArgumentParser):
    """An argparse parser that tells an error in one line."""

    def error(self, message: str) -> NoReturn:
        raise DataError(f"{message} (--help lists the flags)")


def parse_args() -> argparse.Namespace:
    parser = Parser(description="Evaluate trained runs: mAP and CMC, single query, no re-ranking.")
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="a run's folder; of several, mean and standard deviation follow")
    add("--dataset", choices=DATASETS, help="rank another set than the run's own")
    add("--data-dir", default="datasets", help="where the data sets' folders lie [%(default)s]")
    add("--workers", type=number(int, 0), default=WORKERS, help="processes that read images [%(default)s]")
    add("--amp", action=argparse.BooleanOptionalAction, help="bf16 autocast [where the device gains by it]")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    device, _, _ = start_process()
    amp = bf16_pays(device) if args.amp is None else args.amp
    results = []
    for run in args.runs:
        network, settings = load_run(run, device)
        name = args.dataset or settings["dataset"]
        splits = load_dataset(name, args.data_dir)
        if not results:
            print(describe(name, splits), "\n")
        size = {key: settings[key] for key in ("height", "width")}
        ranking = evaluate(network, splits, **size, workers=args.workers, amp=amp)
        results.append(ranking.figures())
        print(f"{run:<22}  {summary(results[-1])}")
    if len(results) > 1:
        for title, function in (("mean", np.mean), ("standard deviation", np.std)):
            print(f"{title:<22}  {summary({key: function([r[key] for r in results]) for key in results[0]})}")


if __name__ == "__main__":
    run_program(main)
