# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors of SONA-Net in plain PyTorch
"""Train SONA-Net (Xia et al., ICCV 2019).

Usage:
    python train.py                                                       # the toy, on any machine
    torchrun --nproc_per_node=4 train.py --dataset cuhk03                 # the paper's run (Sec. 3.2)
    python train.py --dataset cuhk03 --recompute                          # the same run on one GPU
    python train.py --dataset market1501 --sona 2+3 --output runs/m23     # a variant
    python train.py --output runs/m23 --resume                            # go on where it stopped
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterable
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from data import DATASETS, DataError, IdentitySampler, ImageDataset, augment, describe, load_dataset
from evaluate import differences, evaluate, one_line, summary, usable_cores
from losses import branch_losses
from model import DROPS, PLACEMENTS, SONANet, WeightsError

# What the bare `python train.py` runs instead of the paper's settings: minutes on a CPU.
TOY = dict(height=64, width=32, ids_per_batch=8, epochs=40, eval_every=10, weights="none", workers=0)

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def learning_rate(epoch: int, epochs: int = 400, peak: float = 1e-3) -> float:
    """The warm-up and decay of Sec. 3.2 for an epoch, counted from 0.

    Of 400 epochs: a tenth of the peak, and a tenth more every 5 epochs of the first 50; the peak until
    200, a tenth of it until 300 and a hundredth to the end. Other numbers of epochs run the same course.
    """
    of_400 = epoch * 400 // epochs
    if of_400 < 50:
        return peak * (1 + of_400 // 5) / 10
    if of_400 < 200:
        return peak
    return peak / 10 if of_400 < 300 else peak / 100


def parse_args() -> argparse.Namespace:
    """The settings: flags, a resumed run's own, the toy's or the paper's, in this order."""
    toy = ", ".join(f"--{key.replace('_', '-')} {value}" for key, value in TOY.items())
    parser = argparse.ArgumentParser(
        usage="%(prog)s [flags; --help lists them]",
        description="Train SONA-Net. Defaults, in brackets, are the paper's where it gives them (Sec. 3.2); "
        f"the toy has its own: {toy}.",
    )
    workers = max(1, min(4, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", choices=DATASETS, help="what to train on [the toy, drawn on first use]")
    data.add_argument("--data-dir", default="datasets", help="where the data sets' folders lie [%(default)s]")
    data.add_argument("--height", type=int, default=384, help="pixels; fewer are faster [%(default)s]")
    data.add_argument("--width", type=int, default=128, help="pixels [%(default)s]")
    data.add_argument("--workers", type=int, default=workers, help="processes to read images, per GPU [%(default)s]")

    network = parser.add_argument_group("network")
    network.add_argument("--sona", choices=PLACEMENTS, default="2", help="the stages that SONA follows [%(default)s]")
    network.add_argument("--drop", choices=DROPS, default="dropblock+", help="the drop layer [%(default)s]")
    weights = "first weights of the backbone; none: random, PATH: a ResNet-50 state dict [%(default)s]"
    network.add_argument("--weights", default="imagenet", metavar="{imagenet,none,PATH}", help=weights)

    training = parser.add_argument_group("training")
    training.add_argument("--ids-per-batch", type=int, default=32, help="over all processes [%(default)s]")
    training.add_argument("--images-per-id", type=int, default=4, help="images of each identity [%(default)s]")
    training.add_argument("--epochs", type=int, default=400, help="the schedule stretches to it [%(default)s]")
    training.add_argument("--lr", type=float, default=1e-3, help="peak; lower for smaller batches [%(default)s]")
    training.add_argument("--margin", type=float, help="hard triplet margin, as 0.3 [the soft margin]")
    training.add_argument("--seed", type=int, default=0, help="the paper averages over four runs [%(default)s]")

    device = parser.add_argument_group("device")
    passes = "images that batch norm sees at a time, on one GPU or four [%(default)s]"
    device.add_argument("--images-per-pass", type=int, default=32, help=passes)
    recompute = "keep one pass in memory at a time: a third of the memory, a quarter more work"
    device.add_argument("--recompute", action="store_true", help=recompute)
    device.add_argument("--precision", choices=PRECISIONS, help="of training [what the device is fast in]")
    device.add_argument("--compile", action="store_true", help="compile the network: a slow start, then faster steps")

    run = parser.add_argument_group("run")
    run.add_argument("--output", help="the run's folder [runs/DATASET]")
    run.add_argument("--resume", action="store_true", help="go on with the folder's run; begin if there is none")
    evaluations = "epochs between evaluations, the first before training; 0: one, at the end [%(default)s]"
    run.add_argument("--eval-every", type=int, default=50, help=evaluations)

    asked = parser.parse_known_args()[0]  # as far as typed: whose defaults hold depends on it
    dataset = asked.dataset or "toy"
    output = Path(asked.output or f"runs/{dataset}")
    parser.set_defaults(**TOY if dataset == "toy" else {}, dataset=dataset, output=str(output))
    begun = {}
    if asked.resume and (output / "args.json").exists():
        try:
            begun = json.loads((output / "args.json").read_text())
            parser.set_defaults(**begun | {"output": str(output), "resume": True})
        except (ValueError, TypeError):
            sys.exit(f"error: {output / 'args.json'} is damaged; restore it, or choose another folder by --output")
    elif asked.resume and asked.output and not asked.dataset:
        sys.exit(f"error: {output} holds no run to go on with; --dataset begins one")
    args = parser.parse_args()
    binding = begun and (output / "last.pt").exists()  # from the first checkpoint on
    if binding and (differing := differences(begun, vars(args))):
        sys.exit(f"error: {output} holds a run with other settings, then and now: {differing}")
    return args


def start_process() -> tuple[torch.device, int, int]:
    """This process's device, its rank and the number of processes; under torchrun, joins the others.

    Only the first process prints.
    """
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        if local_rank >= torch.cuda.device_count():
            sys.exit(f"error: no GPU {local_rank}: here are {torch.cuda.device_count()}; lower --nproc_per_node")
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if "RANK" in os.environ:
        gpu = device.type == "cuda"
        dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
    elif hasattr(sys.stdout, "reconfigure"):  # in a file, too, each epoch is to be seen when it ends
        sys.stdout.reconfigure(line_buffering=True)
    return device, rank, dist.get_world_size() if dist.is_initialized() else 1


def fast_precision(device: torch.device) -> str:
    """The precision in which a device trains fastest. Not in the paper, whose GPUs were fast in float32 alone."""
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):  # from sm_80
            return "bf16"
        return "fp16" if torch.cuda.get_device_capability(device) >= (7, 0) else "float32"  # most with tensor cores
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else "float32"


def read_inputs(device: torch.device, processes: int) -> tuple[argparse.Namespace, dict, dict | None]:
    """Settings, data and checkpoint, checked before anything is written; in the first process alone."""
    args = parse_args()
    output = Path(args.output)
    args.precision = args.precision or fast_precision(device)
    files = ["args.json", "last.pt", "model.pt"]  # a run's, in the order in which they come
    held = [name for name in files if (output / name).exists()]
    if held and not args.resume:
        sys.exit(f"error: {output} holds a run; go on with it by --resume, or choose another folder by --output")
    if held != files[: len(held)]:
        sys.exit(f"error: {output} has {held[-1]}, but not all before it; choose another folder by --output")
    share = args.ids_per_batch * args.images_per_id // processes
    if min(args.images_per_pass, share) < 2 or share > args.images_per_pass and share % args.images_per_pass:
        sys.exit(
            f"error: --images-per-pass {args.images_per_pass} does not divide the {share} images of a process "
            f"({args.ids_per_batch} x {args.images_per_id} over {processes})"
        )
    splits = load_dataset(args.dataset, args.data_dir)
    labels = splits["train"].labels
    IdentitySampler(labels, args.ids_per_batch, args.images_per_id, world_size=processes)  # refuses what cannot be
    state = load_checkpoint(output / "last.pt", int(labels.max()) + 1) if "last.pt" in held else None
    if device.type == "cpu" and args.dataset != "toy":
        try:
            torch.cuda.init()
        except (AssertionError, RuntimeError) as error:  # no GPU, no driver or an old one, or PyTorch without CUDA
            print(f"note: no GPU can be used, the CPU will take long: {str(error).splitlines()[0]}")
    return args, splits, state


class Passes(nn.Module):
    """The network on a process's share of a batch, in passes of a few images as on each of the paper's GPUs.

    Not in the paper: each pass is normalised on its own, and the first of the whole batch updates batch norm's
    running statistics, as DataParallel keeps the first GPU's. A pass's flips, cutouts and drop masks are a function
    of seed, epoch, step and its number in the whole batch, so that a step is the same on any number of processes.
    With recompute only one pass's activations are in memory at a time; the others' are computed again in backward.

    forward: the share's (B, 3, H, W) uint8 images and (seed, epoch, step) -> the outputs of SONANet for all of it.
    """

    def __init__(self, network: nn.Module, images: int, rank: int = 0, precision: str = "float32", recompute=False):
        super().__init__()
        self.network, self.images, self.rank = network, images, rank
        self.precision, self.recompute = precision, recompute
        self.norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]

    def forward(self, images: Tensor, key: tuple[int, int, int]) -> dict[str, tuple[Tensor, Tensor]]:
        shares = images.split(self.images)
        outputs = [{}] * len(shares)
        recomputed = partial(checkpoint, self.run_pass, use_reentrant=False, preserve_rng_state=False)
        for i in reversed(range(len(shares))):  # the first pass runs last, so that backward finds it in memory
            run_pass = recomputed if self.recompute and i > 0 else self.run_pass
            outputs[i] = run_pass(shares[i], (*key, self.rank * len(shares) + i))
        return {
            branch: tuple(torch.cat(tensors) for tensors in zip(*(output[branch] for output in outputs), strict=True))
            for branch in outputs[0]
        }

    def run_pass(self, images: Tensor, key: tuple[int, ...]) -> dict[str, tuple[Tensor, Tensor]]:
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
        for norm in self.norms:
            norm.track_running_stats = key[-1] == 0
        # Autocast for each pass: around all of them it would sum the gradients of its bf16 weights in bf16.
        with torch.autocast(images.device.type, PRECISIONS[self.precision], enabled=self.precision != "float32"):
            return self.network(augment(images))


def main() -> None:
    device, rank, processes = start_process()
    inputs = [read_inputs(device, processes) if rank == 0 else None]
    if processes > 1:
        dist.broadcast_object_list(inputs)
    args, splits, state = inputs[0]
    output = Path(args.output)
    untrained = state["untrained"] if state else None  # evaluation of the untrained network
    history = state["history"] if state else []  # a record for each epoch

    # data
    train = splits["train"]
    labels = train.labels.to(device)
    num_classes = int(labels.max()) + 1
    sampler = IdentitySampler(train.labels, args.ids_per_batch, args.images_per_id, args.seed, rank, processes)

    def batches() -> Iterable[list[int]]:  # of all epochs to come, so that the loader reads ahead from one to the next
        for epoch in range(len(history), args.epochs):
            sampler.set_epoch(epoch)
            yield from sampler

    loader = DataLoader(
        ImageDataset(train.paths, args.height, args.width),
        batch_sampler=batches(),
        num_workers=args.workers,
        pin_memory=device.type == "cuda",
    )

    # network
    torch.manual_seed(args.seed)
    needs_weights = args.weights != "none" and rank == 0 and not state  # DDP copies them to the other processes
    network = SONANet(num_classes, args.sona, args.drop, args.weights if needs_weights else None)
    network.to(device, memory_format=torch.channels_last)
    # Sec. 3.2. Not in the paper: weight decay 5e-4, as Adam's L2 term; none on theta, whose gains it would shrink until
    # SONA attends to all positions alike.
    theta = [parameter for name, parameter in network.named_parameters() if ".theta." in name]
    others = [parameter for name, parameter in network.named_parameters() if ".theta." not in name]
    groups = [{"params": others}, {"params": theta, "weight_decay": 0}]
    optimizer = torch.optim.Adam(groups, lr=args.lr, weight_decay=5e-4, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    if state:
        network.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
    del inputs, state  # 0.4 GB
    compiled = torch.compile(network) if args.compile else network
    model = Passes(compiled, args.images_per_pass, rank, args.precision, args.recompute)
    if processes > 1:
        model = DistributedDataParallel(model, forward_sync_buffers=False, gradient_as_bucket_view=True)

    def measure() -> dict[str, float]:
        if processes > 1:  # the first process's batch-norm statistics are the run's
            for buffer in network.buffers():
                dist.broadcast(buffer, 0)
        return evaluate(network, splits["query"], splits["gallery"], args.height, args.width, args.workers)[1].figures()

    write = write_whole if rank == 0 else lambda *_: None
    about = {"num_classes": num_classes, "settings": vars(args)}  # what rebuilds the network
    saved, duration = -math.inf, 0.0  # when the last checkpoint was written, and how long it took

    def log() -> None:
        write(output / "log.jsonl", "".join(json.dumps(record) + "\n" for record in history))

    def save() -> None:
        nonlocal saved, duration
        start = time.perf_counter()
        training = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        records = {"untrained": untrained, "history": history}
        write(output / "last.pt", {"model": network.state_dict(), **about, **training, **records})
        saved = time.perf_counter()
        duration = saved - start

    print(describe(args.dataset, splits))
    parameters = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    share = min(args.images_per_pass, args.ids_per_batch * args.images_per_id // processes)
    print(
        f"SONA {args.sona}, drop {args.drop}: {parameters:.1f} M parameters, images of {args.height} x {args.width}\n"
        f"{processes} x {device.type}, {args.precision}, {share} images a pass\n"
    )
    if not history:  # from the first checkpoint on, its settings are the run's
        write(output / "args.json", json.dumps(vars(args), indent=2))

    # training loop
    if args.eval_every and not history:
        untrained = measure()
        print(f"untrained    {summary(untrained)}\n")
    print(f"{'global branch':>32}{'local branch':>22}")
    print(f"epoch    loss{' triplet  x-ent    acc' * 2}       lr  img/s  left")
    images = iter(loader)
    for epoch in range(len(history), args.epochs):
        lr = learning_rate(epoch, args.epochs, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        start = time.perf_counter()
        steps = islice(images, len(sampler))
        parts = train_epoch(model, steps, labels, optimizer, scaler, args.margin, (args.seed, epoch))
        seconds = time.perf_counter() - start
        weight = nn.utils.get_total_norm(network.parameters()).item()
        if not math.isfinite(parts["loss"] + weight):
            message = (
                f"error: epoch {epoch} ends with a loss of {parts['loss']} and weights of norm {weight}; {output} "
                "keeps the last checkpoint before it, if any. Start anew with a lower --lr or --precision float32"
            )
            sys.exit(message if rank == 0 else 1)
        images_per_second = len(sampler) * args.ids_per_batch * args.images_per_id / seconds
        hours = seconds * (args.epochs - epoch - 1) / 3600
        left = f"{hours:.1f}h" if hours >= 1 else f"{60 * hours:.1f}m"
        cells = "".join(
            f"{parts[f'{branch}_triplet']:>8.3f}{parts[f'{branch}_cross_entropy']:>7.3f}"
            f"{parts[f'{branch}_accuracy']:>7.1%}"
            for branch in ("global", "local")
        )
        print(f"{epoch:>5}{parts['loss']:>8.3f}{cells}{lr:>9.1e}{images_per_second:>7.0f}{left:>6}")
        warm_up = args.epochs // 8  # told once, in the first epoch that is like this
        already_told = epoch > warm_up and collapsed(history[-1], num_classes, args.margin)
        if epoch >= warm_up and not already_told and collapsed(parts, num_classes, args.margin):
            print("  note: collapsed to one embedding for all images; lower --lr or change --seed")
        record = {"epoch": epoch, "lr": lr, **parts, "images_per_second": images_per_second}
        if args.eval_every and (epoch + 1) % args.eval_every == 0 and epoch + 1 < args.epochs:
            record |= measure()
            print(f"             {summary(record)}")
        history.append(record)
        log()
        if epoch + 1 == args.epochs or time.perf_counter() - saved >= 50 * duration:  # 2 % of the time at most
            save()

    if "mean_ap" not in history[-1]:  # not in the paper: the last epoch is reported, not the best on the test set
        history[-1] |= measure()
        log()
        save()
    write(output / "model.pt", {"model": network.state_dict(), **about})
    print()
    if untrained:
        print(f"untrained    {summary(untrained)}")
    print(f"trained      {summary(history[-1])}\n\nthe run is in {output}")
    if dist.is_initialized():
        del model  # before the group: as its last owner DDP would end it holding the GIL, which gloo's thread may need
        dist.destroy_process_group()


def train_epoch(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    labels: Tensor,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    margin: float | None,
    key: tuple[int, int],
) -> dict[str, float]:
    """One epoch of steps; returns the means of branch_losses' parts, over the steps and the processes.

    batches are of ImageDataset's images and indices; labels (N,) are the classes of all its images, on the device
    to train on; key is (seed, epoch).
    """
    model.train()
    sums = {}
    for step, (images, indices) in enumerate(batches):
        outputs = model(images.to(labels.device, non_blocking=True), (*key, step))
        loss, parts = branch_losses(outputs, labels[indices.to(labels.device, non_blocking=True)], margin)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        for name, value in parts.items():  # stays on the device: nothing waits for it until the epoch's end
            sums[name] = sums.get(name, 0) + value
        if sys.stdout.isatty():
            print(f"\r  step {step + 1}", end="\r", flush=True)
    means = torch.stack(list(sums.values())) / (step + 1)
    if dist.is_initialized():
        dist.all_reduce(means)
        means /= dist.get_world_size()
    return dict(zip(sums, means.tolist(), strict=True))


def collapsed(parts: dict[str, float], num_classes: int, margin: float | None = None) -> bool:
    """Whether an epoch's losses are those of one embedding for all images, the trap that BFE's code has too.

    Each branch's cross-entropy is then ln(num_classes) and its triplet loss ln 2 (or the hard margin), their
    sum 14.63 for Market-1501's 751 identities, and stays there.
    """
    expected = {"triplet": math.log(2) if margin is None else margin, "cross_entropy": math.log(num_classes)}
    return all(
        abs(parts[f"{branch}_{name}"] - value) <= 0.01 * value + 1e-6  # also where the margin is 0
        for branch in ("global", "local")
        for name, value in expected.items()
    )


def load_checkpoint(path: Path, num_classes: int) -> dict:
    """What a run's save wrote. Ends the program where that is damaged or of other data."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        known = state["num_classes"]
        if not {"model", "optimizer", "scaler", "untrained", "history"} <= state.keys():
            raise KeyError
    except Exception:  # what a damaged file raises depends on where it is damaged
        sys.exit(f"error: {path} is damaged or no checkpoint of train.py; remove its folder to start afresh")
    if known != num_classes:
        sys.exit(f"error: {path} knows {known} identities, the training set has {num_classes}")
    return state


def write_whole(path: Path, content: str | dict) -> None:
    """Write a text, or a state by torch.save, so that at any moment path holds a whole file, the former or this one.

    Ends the program if it cannot.
    """
    scratch = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(scratch, "wb") as file:
            file.write(content.encode()) if isinstance(content, str) else torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save's own is a RuntimeError
        scratch.unlink(missing_ok=True)
        sys.exit(f"error: cannot write {path}: {error}; what it held is kept. Make room, then go on by --resume")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; the same command with --resume goes on")
    except (DataError, WeightsError, OSError) as error:
        sys.exit(f"error: {one_line(error)}")
    except torch.OutOfMemoryError as error:
        sys.exit(f"error: {error} Train with --recompute, or with a smaller --images-per-pass")
    except RuntimeError as error:
        if dist.is_initialized() and ("by peer" in str(error) or "Broken pipe" in str(error)):
            sys.exit(1)  # gloo's words where another process has ended; that one has told why
        raise
