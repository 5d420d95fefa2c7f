"""Train SONA-Net (Xia et al., ICCV 2019).

Usage:
    python train.py                                                       # the toy, on any machine
    torchrun --nproc_per_node=4 train.py --dataset cuhk03                 # the paper's run (Sec. 3.2)
    python train.py --dataset market1501 --sona 2+3 --output runs/m23     # a variant, on one GPU
    python train.py --dataset cuhk03 --resume                             # go on where it stopped
"""

import argparse
import io
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from data import DATASETS, DataError, IdentitySampler, ImageDataset, augment, describe, load_dataset
from evaluate import WORKERS, Parser, bf16_pays, differences, evaluate, number, run_program, start_process, summary
from losses import branch_losses, gather
from model import DROPS, PLACEMENTS, SONANet

# What the bare `python train.py` runs instead of the paper's settings: minutes on a CPU.
TOY = dict(height=64, width=32, ids_per_batch=8, epochs=40, eval_every=10, weights="none", workers=0)


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
    toy = ", ".join(f"--{key.replace('_', '-')} {value}" for key, value in TOY.items())
    parser = Parser(
        description="Train SONA-Net. Defaults, in brackets, are the paper's where it gives them (Sec. 3.2); "
        f"the toy has its own: {toy}."
    )
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=DATASETS, default="toy", help="what to train on; the toy is drawn on first use")
    add("--data-dir", default="datasets", help="where the data sets' folders lie [%(default)s]")
    add("--height", type=number(int, 16, 4096), default=384, help="pixels; fewer are faster [%(default)s]")
    add("--width", type=number(int, 16, 4096), default=128, help="pixels [%(default)s]")
    add("--workers", type=number(int, 0, 256), default=WORKERS, help="processes to read images, per GPU [%(default)s]")

    add = parser.add_argument_group("network").add_argument
    add("--sona", choices=PLACEMENTS, default="2", help="which stage SONA follows, 4 on a branch [%(default)s]")
    add("--drop", choices=DROPS, default="dropblock+", help="the local branch's drop layer [%(default)s]")
    weights = "first weights of the backbone; none: random, PATH: a ResNet-50 state dict [%(default)s]"
    add("--weights", default="imagenet", metavar="{imagenet,none,PATH}", help=weights)

    add = parser.add_argument_group("training").add_argument
    add("--ids-per-batch", type=number(int, 2), default=32, help="over all processes; fewer save memory [%(default)s]")
    add("--images-per-id", type=number(int, 1), default=4, help="images of each identity [%(default)s]")
    add("--epochs", type=number(int, 1), default=400, help="the schedule stretches to it [%(default)s]")
    add("--lr", type=number(float, 1e-12, 10**12), default=1e-3, help="peak; lower for smaller batches [%(default)s]")
    add("--margin", type=number(float, 0, 10**12), help="hard triplet margin, as 0.3 [the soft margin]")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="the paper averages over four runs [%(default)s]")
    add("--amp", action=argparse.BooleanOptionalAction, help="bf16 autocast [where the device gains by it]")
    add("--compile", action="store_true", help="compile the network: a slow start, then faster steps")
    add("--sync-bn", action="store_true", help="batch norm over the batch of all GPUs, not over each GPU's own")

    add = parser.add_argument_group("run").add_argument
    add("--output", help="the run's folder [runs/DATASET]")
    add("--resume", action="store_true", help="go on from the folder's last.pt; afresh where there is none")
    evaluations = "epochs between evaluations, the first before training; 0: one, at the end [%(default)s]"
    add("--eval-every", type=number(int, 0), default=50, help=evaluations)

    if parser.parse_known_args()[0].dataset == "toy":
        parser.set_defaults(**TOY)
    args = parser.parse_args()
    args.output = args.output or f"runs/{args.dataset}"
    if args.ids_per_batch * args.images_per_id < 2 * int(os.environ.get("WORLD_SIZE", 1)):
        parser.error("one image per process cannot be normalised; raise --ids-per-batch or --images-per-id")
    if args.sync_bn and not torch.cuda.is_available():
        parser.error("--sync-bn needs GPUs")
    return args


def main() -> None:
    args = parse_args()
    device, rank, processes = start_process()
    output, checkpoint_path = Path(args.output), Path(args.output, "last.pt")
    resumed = args.resume and checkpoint_path.exists()
    if not resumed and (checkpoint_path.exists() or (output / "model.pt").exists()):
        hint = "its last.pt is gone:" if args.resume else "go on with it by --resume, or"
        raise DataError(f"{output} holds a run; {hint} choose another folder by --output")
    splits = load_dataset(args.dataset, args.data_dir)
    train = splits["train"]
    labels = train.labels.to(device)
    num_classes = int(labels.max()) + 1
    sampler = IdentitySampler(train.labels, args.ids_per_batch, args.images_per_id, args.seed, rank, processes)
    torch.manual_seed(args.seed)
    # DDP copies the first process's network to the others, and a checkpoint has its own weights.
    needs_weights = args.weights != "none" and rank == 0 and not resumed
    network = SONANet(num_classes, args.sona, args.drop, args.weights if needs_weights else None)
    loader = DataLoader(
        ImageDataset(train.paths, args.height, args.width),
        batch_sampler=sampler,
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # else the loader draws its workers' seeds from the epoch's randomness
    )

    if args.sync_bn:
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    network.to(device, memory_format=torch.channels_last)
    # Sec. 3.2. Not in the paper: weight decay 5e-4, as Adam's L2 term.
    optimizer = torch.optim.Adam(network.parameters(), lr=args.lr, weight_decay=5e-4, fused=True)
    untrained, history = None, []  # evaluation of the untrained network; a record for each epoch
    if resumed:
        untrained, history = load_checkpoint(checkpoint_path, vars(args), num_classes, network, optimizer)
    if args.amp is None:
        args.amp = bf16_pays(device)
    found = gather(torch.tensor([[len(history), len(train.paths)]], device=device))  # (processes, 2)
    if (found != found[0]).any():
        raise DataError(f"the nodes do not find the same checkpoint or data; they must share {output} and the data")
    if args.compile:
        network.compile()
    model = DistributedDataParallel(network) if processes > 1 else network

    print(describe(args.dataset, splits))
    parameters = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    print(
        f"SONA {args.sona}, drop {args.drop}: {parameters:.1f} M parameters, {args.height} x {args.width}, "
        f"{processes} x {device.type}, {'bf16' if args.amp else 'float32'}\n"
    )
    if rank == 0:
        try:
            output.mkdir(parents=True, exist_ok=True)
            (output / "log.jsonl").touch()
            for scratch in output.glob("*.pt.*.tmp"):  # of a process that was killed
                scratch.unlink()
        except OSError as error:
            raise DataError(f"cannot write to {output}: {error.strerror}; choose another folder by --output") from error

    def measure() -> dict[str, float]:
        if processes > 1:  # not in the paper: each normalises its own images, and the first one's statistics are kept
            for buffer in network.buffers():
                dist.broadcast(buffer, 0)
        options = {"height": args.height, "width": args.width, "workers": args.workers, "amp": args.amp}
        return evaluate(network, splits["query"], splits["gallery"], **options)[1].figures()

    about = {"num_classes": num_classes, "settings": vars(args)}  # what rebuilds the network

    def save() -> None:
        if rank == 0:
            write_whole(output / "log.jsonl", "".join(json.dumps(record) + "\n" for record in history).encode())
            training = {"optimizer": optimizer.state_dict(), "untrained": untrained, "history": history}
            write_whole(checkpoint_path, serialized({"model": network.state_dict(), **about, **training}))

    if args.eval_every and not history:
        untrained = measure()
        print(f"untrained    {summary(untrained)}\n")
    print(f"{'global branch':>32}{'local branch':>22}")
    print(f"epoch    loss{' triplet  x-ent    acc' * 2}       lr  img/s  left")
    for epoch in range(len(history), args.epochs):
        seed_epoch(args.seed, epoch, rank)
        sampler.set_epoch(epoch)
        lr = learning_rate(epoch, args.epochs, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        start = time.perf_counter()
        parts = train_epoch(model, loader, labels, optimizer, args.margin, args.amp)
        seconds = time.perf_counter() - start
        if not math.isfinite(parts["loss"]):
            raise DataError(
                f"the loss of epoch {epoch} is {parts['loss']}; {output} keeps the epochs before it, if any. "
                "Start anew with a lower --lr, or with --no-amp"
            )
        images_per_second = len(loader) * args.ids_per_batch * args.images_per_id / seconds
        hours = seconds * (args.epochs - epoch - 1) / 3600
        left = f"{hours:.1f}h" if hours >= 1 else f"{60 * hours:.1f}m"
        cells = "".join(
            f"{parts[f'{branch}_triplet']:>8.3f}{parts[f'{branch}_cross_entropy']:>7.3f}"
            f"{parts[f'{branch}_accuracy']:>7.1%}"
            for branch in ("global", "local")
        )
        print(f"{epoch:>5}{parts['loss']:>8.3f}{cells}{lr:>9.1e}{images_per_second:>7.0f}{left:>6}")
        warm_up = args.epochs // 8
        already_told = epoch > warm_up and collapsed(history[-1], num_classes, args.margin)
        if epoch >= warm_up and not already_told and collapsed(parts, num_classes, args.margin):
            print("  note: collapsed to one embedding for all images; lower --lr or change --seed")
        record = {"epoch": epoch, "lr": lr, **parts, "images_per_second": images_per_second}
        if args.eval_every and (epoch + 1) % args.eval_every == 0 and epoch + 1 < args.epochs:
            record |= measure()
            print(f"             {summary(record)}")
        history.append(record)
        save()

    if "mean_ap" not in history[-1]:
        history[-1] |= measure()
        save()
    if rank == 0:
        write_whole(output / "model.pt", serialized({"model": network.state_dict(), **about}))
    print()
    if untrained:
        print(f"untrained    {summary(untrained)}")
    print(f"trained      {summary(history[-1])}\n\nthe run is in {output}")


def seed_epoch(seed: int, epoch: int, rank: int) -> None:
    """Make an epoch's flips, cutouts and drop masks a function of seed, epoch and process alone, resumed or not."""
    torch.manual_seed(int(np.random.SeedSequence([seed, epoch, rank]).generate_state(1)[0]))


def train_epoch(
    model: nn.Module,
    loader: DataLoader,
    labels: Tensor,
    optimizer: torch.optim.Optimizer,
    margin: float | None = None,
    amp: bool = False,
) -> dict[str, float]:
    """One epoch of steps; returns the means of branch_losses' parts, over the steps and the processes.

    labels (N,) are the classes of the loader's images, on the device to train on.
    """
    model.train()
    sums = {}
    for step, (images, indices) in enumerate(loader, 1):
        images = augment(images.to(labels.device, non_blocking=True))
        targets = labels[indices.to(labels.device, non_blocking=True)]
        with torch.autocast(labels.device.type, torch.bfloat16, enabled=amp):  # not in the paper; losses in float32
            outputs = model(images)
        loss, parts = branch_losses(outputs, targets, margin)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for name, value in parts.items():  # stays on the device: nothing waits for it until the epoch's end
            sums[name] = sums.get(name, 0) + value
        if sys.stdout.isatty():
            print(f"\r  step {step} of {len(loader)}", end="\r", flush=True)
    means = torch.stack(list(sums.values())) / len(loader)
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


def serialized(state: dict) -> memoryview:
    """What torch.save would write of a state."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getbuffer()


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file so that at any moment path holds a whole one, the former or this. Raises DataError."""
    scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(scratch, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise DataError(
            f"cannot write {path}: {error.strerror}; what it held before is kept. Make room, then go on by --resume"
        ) from error


def load_checkpoint(
    path: Path, settings: dict, num_classes: int, network: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict | None, list[dict]]:
    """Load a checkpoint into network and optimizer; returns the untrained network's figures and the epochs' records.

    A precision that settings leave open (amp None) becomes the run's. Raises DataError if the checkpoint is damaged
    or of another run.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if settings["amp"] is None:  # then as the run began, wherever that was
            settings["amp"] = checkpoint["settings"]["amp"]
        differing = differences(checkpoint["settings"], settings)
        if not differing and checkpoint["num_classes"] == num_classes:
            network.load_state_dict(checkpoint["model"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            return checkpoint["untrained"], list(checkpoint["history"])
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        raise DataError(f"{path} is damaged or no checkpoint of train.py; remove it to start afresh") from error
    if differing:
        raise DataError(f"{path} is of a run with other settings, then and now: {differing}")
    raise DataError(f"{path} knows {checkpoint['num_classes']} identities, the training set has {num_classes}")


if __name__ == "__main__":
    run_program(main, after_stop="; the same command with --resume goes on")
