"""What README says of GPUs, measured on one of them in at most ten minutes.

From the repository's folder, on an otherwise idle GPU:

    PYTHONPATH=. python .github/benchmarks/gpu.py                              # trains on the toy
    PYTHONPATH=. python .github/benchmarks/gpu.py --dataset cuhk03 --data-dir DIR

The parts, in this order. --only PART [PART ...] chooses among them.
    env        versions, and the precision that is the default here
    step       a training step's time and memory: precisions, --recompute, passes, memory formats
    time       a forward pass with SONA over one without (Sec. 3.5)
    recompute  gradients with --recompute and without, and of the same step twice
    sync       a training step waits for no value from the GPU
    ddp        one process under torchrun: start, gather, the same gradients, the cost of DDP
    resume     a run that is stopped and resumed, against one that is not
    loader     images per second that the DataLoader reads
    kernels    attention and global max pooling alone: kernel, time, error
    train      a run with SONA and one without, in three minutes; each evaluated in every precision,
               fp16 being the default; and attention.py's row of the first
    compile    --compile against eager

A part that fails is reported and the next one begins. One that no longer fits into --budget
seconds is skipped. --tiny tries the script itself, with a tiny network and tiny images: two
minutes on a CPU.
"""

import argparse
import contextlib
import gc
import io
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic algorithms

import attention
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import data
import evaluate
import losses
import model
import train

SECONDS = {  # that each part should take at most; it is skipped if fewer are left
    "env": 5,
    "step": 110,
    "time": 30,
    "recompute": 40,
    "sync": 25,
    "ddp": 40,
    "resume": 50,
    "loader": 25,
    "kernels": 30,
    "train": 180,
    "compile": 45,
}

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda:0" if GPU else "cpu")
HALF = "fp16" if GPU else "bf16"  # fp16 convolutions have no fast backward pass on a CPU
args = argparse.Namespace()  # of the command line, set by main


def show(case: str, **figures) -> None:
    print(f"  {case:<38}", *(f"{name} {figure}" for name, figure in figures.items()), flush=True)


def wait() -> None:
    if GPU:
        torch.cuda.synchronize()


def clean() -> None:
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def milliseconds(function, repetitions=10, warm=3) -> float:
    """The median time of a call, the GPU's work included."""
    times = []
    for _ in range(warm + repetitions):
        wait()
        start = time.perf_counter()
        function()
        wait()
        times.append(1000 * (time.perf_counter() - start))
    return round(statistics.median(times[warm:]), 3)


def autocast(precision: str) -> torch.autocast:
    return torch.autocast(DEVICE.type, train.PRECISIONS[precision], enabled=precision != "float32")


# ---------- A training step -----------------------------------------------------------------------


def build(
    precision=HALF,
    recompute=False,
    sona="2",
    drop="dropblock+",
    per_pass=None,
    channels_last=True,
):
    """A network with a gradient in every part of it, wrapped in Passes, and its optimizer."""
    torch.manual_seed(0)
    network = model.SONANet(743, sona, drop)
    for module in network.modules():
        if isinstance(module, model.SONA):
            nn.init.normal_(module.p.weight, std=0.05)
        if isinstance(module, model.Bottleneck):
            nn.init.constant_(module.bn3.weight, 0.5)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network.to(DEVICE, memory_format=layout).train()
    optimizer = torch.optim.Adam(network.parameters(), 1e-4, weight_decay=5e-4, fused=True)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=precision == "fp16")
    passes = train.Passes(network, per_pass or args.per_pass, 0, precision, recompute)
    return passes, optimizer, scaler


def random_batch(images: int):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(
        256, (images, 3, args.height, args.width), dtype=torch.uint8, generator=generator
    )
    return pixels.to(DEVICE), (torch.arange(images) // 4).to(DEVICE)


def step(passes, optimizer, scaler, batch, number: int) -> None:
    images, labels = batch
    loss, _ = losses.branch_losses(passes(images, (0, 0, number)), labels)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()


def measure_step(case: str, images=None, tf32=True, wrap=None, **settings) -> float:
    """A training step's time, the time in which the CPU has issued it, and its memory."""
    images = images or args.batch
    clean()
    before = torch.cuda.memory_allocated() if GPU else 0
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = tf32
    passes, optimizer, scaler = build(**settings)
    if wrap:
        passes = wrap(passes)
    batch = random_batch(images)
    start = time.perf_counter()
    step(passes, optimizer, scaler, batch, 0)
    wait()
    first = time.perf_counter() - start
    for number in range(1, 4):
        step(passes, optimizer, scaler, batch, number)
    if GPU:
        torch.cuda.reset_peak_memory_stats()  # without what the search for algorithms needed
    times = []
    issued = []
    for number in range(4, 4 + args.repetitions):
        wait()
        start = time.perf_counter()
        step(passes, optimizer, scaler, batch, number)
        issued.append(1000 * (time.perf_counter() - start))
        wait()
        times.append(1000 * (time.perf_counter() - start))
    torch.backends.cudnn.allow_tf32 = True
    median = statistics.median(times)
    figures = {"ms": round(median, 1), "issued_ms": round(statistics.median(issued), 1)}
    figures["images_per_s"] = round(1000 * images / median)
    if GPU:
        peak = torch.cuda.max_memory_allocated() - before
        figures["GiB"] = round(peak / 2**30, 2)
        figures["reserved_GiB"] = round(torch.cuda.memory_reserved() / 2**30, 2)
    show(case, **figures, first_s=round(first, 1))
    return median


def gradients(precision: str, recompute: bool, wrap=None) -> list[torch.Tensor]:
    """The loss of two passes and all gradients."""
    passes, _, _ = build(precision, recompute)
    network = passes.network
    if wrap:
        passes = wrap(passes)
    images, labels = random_batch(2 * args.per_pass)
    loss, _ = losses.branch_losses(passes(images, (0, 0, 0)), labels)
    scale = 2**12 if precision == "fp16" else 1  # so that small ones do not vanish
    (loss * scale).backward()
    return [loss.detach(), *(parameter.grad / scale for parameter in network.parameters())]


def difference(a: list[torch.Tensor], b: list[torch.Tensor]) -> dict[str, str]:
    equal = sum(map(torch.equal, a, b))
    relative = [
        ((x - y).norm() / x.norm().clamp(min=1e-30)).item() for x, y in zip(a, b, strict=True)
    ]
    return {
        "equal": f"{equal} of {len(a)},",
        "relative_median": f"{statistics.median(relative):.1e}",
        "largest": f"{max(relative):.1e}",
    }


# ---------- Parts ---------------------------------------------------------------------------------


def part_env() -> None:
    show("versions", torch=torch.__version__, python=sys.version.split()[0], cpus=os.cpu_count())
    if GPU:
        capability = torch.cuda.get_device_capability()
        show(torch.cuda.get_device_name(), capability=capability)
    show("default", precision=train.default_precision(DEVICE))


def part_step() -> None:
    all_images = args.batch
    one_pass = args.per_pass
    measure_step(f"{HALF}, {all_images} images")
    measure_step(f"{HALF}, {all_images} images, recompute", recompute=True)
    measure_step(f"{HALF}, {one_pass} images", images=one_pass)  # each of four GPUs
    measure_step(f"float32, {all_images} images", precision="float32")
    measure_step(f"float32, {all_images} images, recompute", precision="float32", recompute=True)
    measure_step(f"bf16, {all_images} images", precision="bf16")
    measure_step(f"{HALF}, {all_images} images in one pass", per_pass=all_images)  # one batch norm
    measure_step(f"{HALF}, {all_images} images, no SONA", sona="none")
    measure_step(f"{HALF}, {all_images} images, SONA 2+3", sona="2+3")
    measure_step(f"{HALF}, {one_pass} images, NCHW", images=one_pass, channels_last=False)
    strict = dict(images=one_pass, precision="float32", tf32=False)
    measure_step(f"float32 without TF32, {one_pass} images", **strict)
    measure_step(f"float32 without TF32, {one_pass}, NCHW", **strict, channels_last=False)


def part_time() -> None:
    torch.backends.cudnn.benchmark = True
    variants = {sona: build(sona=sona)[0].network.eval() for sona in ("2", "none")}
    for images in (1, args.per_pass):
        x = torch.randn(images, 3, args.height, args.width, device=DEVICE)
        x = x.to(memory_format=torch.channels_last)
        for mode in ("strict float32", "float32", "fp16"):
            torch.backends.cudnn.allow_tf32 = mode != "strict float32"
            times = {sona: [] for sona in variants}
            for _ in range(4 * args.repetitions):
                for sona, network in variants.items():  # in turn
                    with torch.inference_mode(), autocast(mode.removeprefix("strict ")):
                        times[sona].append(milliseconds(partial(network, x), 1, warm=0))
            with_sona, without = (np.median(times[sona][args.repetitions :]) for sona in variants)
            show(
                f"{images} images, {mode}",
                ms_with=f"{with_sona:.2f}",
                ms_without=f"{without:.2f}",
                ratio=f"{with_sona / without:.3f}",
            )
    torch.backends.cudnn.allow_tf32 = True


def part_recompute() -> None:
    torch.backends.cudnn.benchmark = True
    reference = None
    for precision in train.PRECISIONS if GPU else ("float32", "bf16"):
        gradients(precision, False)  # the search for algorithms
        first = gradients(precision, False)
        show(f"{precision}, the same step twice", **difference(first, gradients(precision, False)))
        show(f"{precision}, recompute or not", **difference(first, gradients(precision, True)))
        reference = reference or first
        show(f"{precision} against float32", **difference(reference, first))
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    pair = gradients(HALF, False), gradients(HALF, True)
    torch.use_deterministic_algorithms(False)
    show(f"{HALF}, recompute, deterministic", **difference(*pair))


def part_sync() -> None:
    cases = ((HALF, "2+3", "dropblock+"), ("bf16", "4-both", "bfe"), ("float32", "2", "none"))
    for precision, sona, drop in cases:
        torch.backends.cudnn.benchmark = True
        stepped = build(precision, True, sona, drop)
        batch = random_batch(2 * args.per_pass)
        step(*stepped, batch, 0)
        wait()
        if GPU:
            torch.cuda.set_sync_debug_mode("error")  # an exception wherever PyTorch would wait
        try:
            step(*stepped, batch, 1)
            step(*stepped, batch, 2)
        finally:
            if GPU:
                torch.cuda.set_sync_debug_mode("default")
        show(f"{precision}, SONA {sona}, drop {drop}", waits="never")


def part_ddp() -> None:
    def wrap(passes):
        return DistributedDataParallel(passes, gradient_as_bucket_view=True)

    plain = gradients(HALF, True)
    alone = measure_step(f"{args.per_pass} images, without DDP", images=args.per_pass)
    start = time.perf_counter()
    dist.init_process_group(
        "nccl" if GPU else "gloo",
        init_method=f"file://{args.scratch}/rendezvous",
        rank=0,
        world_size=1,
        device_id=DEVICE if GPU else None,
    )
    try:
        gathered = losses.gather(torch.tensor([3], device=DEVICE))
        seconds = time.perf_counter() - start
        show("start and first gather", s=round(seconds, 2), gathered=gathered.tolist())
        show("gradients with DDP and without", **difference(plain, gradients(HALF, True, wrap)))
        wrapped = measure_step(f"{args.per_pass} images, with DDP", images=args.per_pass, wrap=wrap)
        show("cost of DDP, with one process", ratio=f"{wrapped / alone:.3f}")
        dist.barrier()
    finally:
        gc.collect()  # DDP holds the group, too
        dist.destroy_process_group()


def run_train(*flags) -> float:
    """train.main() without what it prints; the seconds it took."""
    start = time.perf_counter()
    sys.argv = ["train.py", *map(str, flags), "--weights", "none", "--eval-every", "0"]
    sys.argv += ["--dataset", args.dataset, "--data-dir", args.data_dir]
    with contextlib.redirect_stdout(io.StringIO()):
        train.main()
    return time.perf_counter() - start


def part_resume() -> None:
    small = "--height 96 --width 32 --ids-per-batch 16 --epochs 3".split()
    if args.tiny:
        small = "--height 32 --width 16 --ids-per-batch 16 --images-per-id 2 --epochs 3".split()
    folders = [Path(args.scratch, name) for name in ("whole", "again", "cut")]
    save = train.save
    seconds_between = train.CHECKPOINT_SECONDS
    train.CHECKPOINT_SECONDS = 0

    def save_and_stop(*arguments):
        save(*arguments)
        raise InterruptedError

    for folder in folders:
        train.save = save_and_stop if folder.name == "cut" else save
        with contextlib.suppress(InterruptedError):
            run_train(*small, "--output", folder)
    train.save = save
    seconds = run_train(*small, "--output", folders[-1], "--resume")
    train.CHECKPOINT_SECONDS = seconds_between
    checkpoints = [
        torch.load(folder / "last.pt", map_location="cpu", weights_only=True) for folder in folders
    ]
    whole, again, cut = (
        [tensor.float() for tensor in checkpoint["network"].values()] for checkpoint in checkpoints
    )
    show("the same run twice", **difference(whole, again))
    show("stopped and resumed", **difference(whole, cut), epochs=len(checkpoints[-1]["history"]))
    show("time of the resumed part", s=round(seconds, 1))


def part_loader() -> None:
    paths = data.load_dataset(args.dataset, args.data_dir)["train"].paths
    for workers in (1,) if args.tiny else (1, 2, 4, 8):
        dataset = data.ImageDataset(paths, range(len(paths)), args.height, args.width)
        loader = DataLoader(
            dataset, args.batch, num_workers=workers, pin_memory=GPU, persistent_workers=True
        )
        for _ in range(2):  # the second without the workers' start
            start = time.perf_counter()
            for images, _ in loader:
                images.to(DEVICE, non_blocking=True)
            wait()
        show(f"{workers} workers", images_per_s=round(len(paths) / (time.perf_counter() - start)))


def part_kernels() -> None:
    kernels = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}
    for d in (256, 512, 1024):
        for precision, dtype in train.PRECISIONS.items():
            shape = args.per_pass, 1, args.height * args.width // 64, d
            q = torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=True)
            g = torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=True)
            attend = partial(F.scaled_dot_product_attention, q, q, g, scale=d**-1.5)
            kernel = torch._fused_sdp_choice(q, q, g, scale=d**-1.5)
            with torch.no_grad():
                weights = (q.double() @ q.double().transpose(2, 3) * d**-1.5).softmax(3)
                exact = weights @ g.double()
                error = (attend().double() - exact).norm()
                spread = (exact - exact.mean(2, keepdim=True)).norm()
            show(
                f"attention, d = {d}, {precision}",
                kernel=kernels.get(int(kernel), kernel),
                **time_of_gradients(attend, (q, g)),
                error=f"{error / exact.norm():.1e}",
                error_over_spread=f"{error / spread:.1e}",
            )
            clean()
    for precision in ("float32", HALF):
        y = torch.randn(args.per_pass, 2048, args.height // 8, args.width // 8, device=DEVICE)
        y = y.to(train.PRECISIONS[precision], memory_format=torch.channels_last).relu()
        y.requires_grad_()
        pools = {
            "max_pool2d": partial(F.max_pool2d, y, y.shape[2:]),
            "amax": partial(y.amax, (2, 3), keepdim=True),
        }
        for name, pool in pools.items():
            show(f"{name}, {precision}", **time_of_gradients(pool, (y,)))


def time_of_gradients(function, inputs: tuple[torch.Tensor, ...]) -> dict[str, float]:
    """The time of a function's forward pass, and of forward and backward."""
    ones = torch.ones_like(function())
    return {
        "forward_ms": milliseconds(function),
        "both_ms": milliseconds(lambda: torch.autograd.grad(function(), inputs, ones)),
    }


def part_compile() -> None:
    def compiled(passes):
        backend = "aot_eager" if args.tiny else "inductor"
        passes.network = torch.compile(passes.network, backend=backend)
        return passes

    eager = measure_step(f"eager, {args.per_pass} images", images=args.per_pass)
    fast = measure_step(f"compiled, {args.per_pass} images", images=args.per_pass, wrap=compiled)
    show("compiled over eager", ratio=f"{fast / eager:.3f}")


def part_train() -> None:
    flags = "--height 384 --width 128 --ids-per-batch 32 --images-per-id 4 --workers 6".split()
    epochs = 1
    if args.tiny:
        flags = "--height 32 --width 16 --ids-per-batch 16 --images-per-id 2 --workers 0".split()
    else:  # as many epochs as fit, by the second one of a trial
        history = train_run("trial", *flags, "--epochs", 2)
        people = len(np.unique(data.load_dataset(args.dataset, args.data_dir)["train"].ids))
        seconds_per_epoch = people // 32 * 128 / history[-1]["images_per_second"]
        epochs = max(1, int((SECONDS["train"] - 80) / 2 / seconds_per_epoch))
    for sona in ("2", "none"):
        train_run(f"run-{sona}", *flags, "--epochs", epochs, "--sona", sona)
        measure_evaluation(Path(args.scratch, f"run-{sona}"))


def train_run(name: str, *flags) -> list[dict]:
    """Trains a run in the scratch folder and returns its log."""
    output = Path(args.scratch, name)
    seconds = run_train(*flags, "--output", output)
    history = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    show(
        f"{name}, {len(history)} epochs",
        s=round(seconds, 1),
        first_loss=round(history[0]["loss"], 3),
        last_loss=round(history[-1]["loss"], 3),
        images_per_s=round(statistics.median(record["images_per_second"] for record in history)),
    )
    return history


def measure_evaluation(run: Path) -> None:
    network, settings = evaluate.load_run(run, DEVICE)
    splits = data.load_dataset(args.dataset, args.data_dir)
    query = splits["query"]
    gallery = splits["gallery"]
    paths = [*query.paths, *gallery.paths]
    size = settings["height"], settings["width"]
    default_precision = evaluate.default_precision
    reference = None
    for mode in ("strict float32", "float32", "fp16", "bf16"):
        torch.backends.cudnn.allow_tf32 = mode != "strict float32"
        evaluate.default_precision = lambda _, mode=mode: mode.removeprefix("strict ")
        start = time.perf_counter()
        features = evaluate.extract_features(network, paths, *size, 0 if args.tiny else 8)
        seconds = time.perf_counter() - start
        query_features, gallery_features = np.split(features, [len(query.paths)])
        metrics = evaluate.evaluate_ranking(
            query_features, gallery_features, query.ids, gallery.ids, query.cams, gallery.cams
        ).metrics()
        reference = features if reference is None else reference
        change = np.linalg.norm(features - reference) / np.linalg.norm(reference)
        show(
            f"  evaluation in {mode}",
            s=round(seconds, 2),
            mAP=f"{100 * metrics['mean_ap']:.3f}",
            features_differ=f"{change:.1e}",
        )
    torch.backends.cudnn.allow_tf32 = True
    evaluate.default_precision = default_precision
    if settings["sona"] != "none":
        cells = attention.measure(network, splits, *size, 0 if args.tiny else 8)
        show("  attention.py", **{name.replace(" ", "_"): cell for name, cell in cells.items()})


def main() -> None:
    begin = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=SECONDS, metavar="PART", default=[*SECONDS])
    parser.add_argument("--dataset", choices=data.DATASETS, default="toy")
    parser.add_argument("--data-dir", default="datasets", help="[%(default)s]")
    parser.add_argument("--budget", type=float, default=570, help="seconds [%(default)s]")
    parser.add_argument("--tiny", action="store_true")
    parser.parse_args(namespace=args)
    args.batch, args.per_pass, args.height, args.width, args.repetitions = 128, 32, 384, 128, 8
    if args.tiny:
        args.batch, args.per_pass, args.height, args.width, args.repetitions = 8, 4, 32, 16, 1
        # Four blocks instead of sixteen.
        model.resnet50 = lambda **flags: model.ResNet(model.Bottleneck, [1, 1, 1, 1], **flags)

    with tempfile.TemporaryDirectory() as args.scratch:
        for part, seconds in SECONDS.items():
            if part not in args.only:
                continue
            if args.budget - (time.monotonic() - begin) < seconds:
                print(f"{part}: skipped, no time left")
                continue
            print(part)
            start = time.monotonic()
            try:
                globals()[f"part_{part}"]()
            except Exception:
                traceback.print_exc(file=sys.stdout)
            clean()
            print(f"  ({time.monotonic() - start:.0f} s)\n", flush=True)
    print(f"{time.monotonic() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
