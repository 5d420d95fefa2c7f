# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors of SONA-Net in plain PyTorch
"""The paper's equations and this repository's guarantees, as tests: `pytest test_model.py`.

Part one is the paper, in the order of the files: the network, the losses, the data, the schedule, the ranking.
Part two is a run: in one process or several, killed and resumed, evaluated, drawn, told what is wrong.
"""

import contextlib
import gc
import inspect
import io
import json
import math
import os
import pickle
import random
import re
import runpy
import shutil
import socket
import subprocess
import sys
import time
from copy import deepcopy
from functools import partial
from itertools import product
from pathlib import Path
from unittest import mock

# Promises to the bit are a CPU's; some builds of OpenBLAS hang in a fork of a process in which they had threads.
os.environ.update(CUDA_VISIBLE_DEVICES="", OPENBLAS_NUM_THREADS="1")

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.models import ResNet50_Weights, resnet50

import data
import evaluate
import losses
import model
import train
from data import (
    DATASETS,
    FOLDERS,
    DataError,
    IdentitySampler,
    ImageDataset,
    augment,
    cutout,
    load_dataset,
    normalize,
)
from evaluate import evaluate_ranking, extract_features
from losses import batch_hard_triplet_loss, branch_losses
from model import DROPS, PLACEMENTS, SONA, BatchDropBlock, DropBlockPlus, SONANet
from train import Passes, learning_rate

HERE = Path(__file__).parent
torch.set_num_threads(1)  # sums of other numbers of threads round otherwise
forks = pytest.mark.skipif(
    sys.platform != "linux", reason="forks this process, which is safe on Linux alone"
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ========== Part one: the paper ==================================================================


# ---------- SONA (Sec. 2.2) -----------------------------------------------------------------------
@pytest.fixture
def sona():
    """A SONA block with no parameter left at its initial value."""
    sona = SONA(16)
    for parameter in sona.parameters():
        nn.init.normal_(parameter, std=0.5)
    return sona.double().eval()


def attention_by_the_paper(sona, x):
    """softmax(Sigma / sqrt(c/r)) of Eq. 1 and 2, with I_bar written out."""
    theta = sona.theta(x).flatten(2).transpose(1, 2)  # (B, hw, c/r)
    d = theta.shape[2]
    i_bar = (torch.eye(d, dtype=x.dtype) - torch.ones(d, d, dtype=x.dtype) / d) / d
    sigma = theta @ i_bar @ theta.transpose(1, 2)
    return torch.softmax(sigma / math.sqrt(d), dim=2)


def sona_by_the_paper(sona, x):
    z = attention_by_the_paper(sona, x) @ sona.g(x).flatten(2).transpose(1, 2)
    return x + sona.p(z.transpose(1, 2).reshape(len(x), -1, *x.shape[2:]))


def test_sona_its_gradients_and_its_attention_are_those_of_equations_1_to_3(sona):
    x = 3 * torch.randn(2, 16, 6, 4, dtype=torch.float64, requires_grad=True)
    papers, inputs, weights = (
        sona_by_the_paper(sona, x),
        [x, *sona.parameters()],
        torch.randn_like(x),
    )
    gradients = torch.autograd.grad((papers * weights).sum(), inputs)
    for ours in (sona(x), sona(x.contiguous(memory_format=torch.channels_last))):
        torch.testing.assert_close(ours, papers)
        torch.testing.assert_close(torch.autograd.grad((ours * weights).sum(), inputs), gradients)
    assert (papers - x).abs().max() > 0.1
    torch.testing.assert_close(sona.attention(x), attention_by_the_paper(sona, x))
    torch.testing.assert_close(sona.attention(x).sum(2), torch.ones(2, 24, dtype=torch.float64))


def test_sona_has_the_papers_layers_and_starts_as_the_identity():
    sona, x = SONA(32, reduction=4), torch.randn(2, 32, 6, 4)
    convolution, norm, activation = sona.theta
    assert convolution.weight.shape == sona.g.weight.shape == (8, 32, 1, 1)
    assert sona.p.weight.shape == (32, 8, 1, 1)
    assert isinstance(norm, nn.BatchNorm2d) and isinstance(activation, nn.LeakyReLU)
    assert torch.equal(sona(x), x)


def test_sona_never_holds_the_attention_matrix():
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            results = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in tree_leaves(results) if isinstance(x, torch.Tensor))
            return results

    block, x = SONA(16), torch.randn(1, 16, 48, 16, requires_grad=True)
    with Sizes():
        block(x).sum().backward()
    assert x.numel() <= max(sizes) < 768 * 768 / 4


# ---------- Drop layers (Sec. 2.1, 3.4) -----------------------------------------------------------
def test_dropblock_plus_drops_blocks_of_its_size_and_rescales_the_rest():
    x = torch.ones(2000, 3, 48, 16)
    y = DropBlockPlus()(x)
    assert torch.equal(DropBlockPlus().eval()(x), x)
    assert torch.equal(y[:, 0], y[:, 2])  # one mask for all channels
    kept = y[:, 0] > 0  # (B, 48, 16)
    assert len({mask.numpy().tobytes() for mask in kept}) > 1000  # but not for all images
    assert y.mean().item() == pytest.approx(1)  # the mean of the masks is 1,
    assert len(y.unique()) == 2  # with one factor for all images: 0 where dropped, it where kept
    # Every dropped position lies in a 5 x 8 block that is dropped whole.
    blocks = F.avg_pool2d((~kept).float()[:, None], (5, 8), stride=1) == 1
    covered = F.max_pool2d(F.pad(blocks.float(), (7, 7, 4, 4)), (5, 8), stride=1)[:, 0] > 0
    assert torch.equal(covered, ~kept)
    # Seeds by DropBlock's Eq. 1; a position is kept if no block covers it.
    seed_rate = 0.1 / 40 * (48 * 16) / (44 * 9)
    covering = torch.ones(1, 1, 44, 9)
    covering = F.avg_pool2d(F.pad(covering, (7, 7, 4, 4)), (5, 8), stride=1, divisor_override=1)[
        0, 0
    ]
    dropped_share = 1 - (1 - seed_rate) ** covering
    assert abs((~kept).float().mean() - dropped_share.mean()) < 0.005
    assert 0.08 < dropped_share.mean() < 0.1


def test_dropblock_plus_cuts_its_block_to_a_smaller_map():
    y = DropBlockPlus(drop_rate=0.5)(torch.ones(200, 1, 8, 4))
    assert (y == 0).any() and (y > 0).any() and y.isfinite().all()
    assert ((y == 0).all(3) == (y == 0).any(3)).all()  # whole rows of 4, as 8 do not fit


def test_batch_drop_block_drops_one_rectangle_of_the_whole_batch():
    starts = set()
    for _ in range(50):
        y = BatchDropBlock(height_ratio=1 / 3, width_ratio=0.5)(torch.ones(3, 2, 48, 16))
        assert torch.equal(y, y[:1, :1].expand_as(y))
        rows, columns = (
            (y[0, 0] == 0).any(1).nonzero().flatten(),
            (y[0, 0] == 0).any(0).nonzero().flatten(),
        )
        assert (
            (len(rows), len(columns))
            == (rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1)
            == (16, 8)
        )
        assert y.max() == 1 and (y == 0).sum() == 3 * 2 * 16 * 8
        starts.add((int(rows[0]), int(columns[0])))
    assert len(starts) > 25
    assert torch.equal(BatchDropBlock(1 / 3, 1).eval()(y), y)


# ---------- The network (Sec. 2.1, 3.3, 3.4) ------------------------------------------------------
SONAS = ["none", "2", "3", "2+3", "4-global", "4-local", "4-both"]


def seen(network, images, *names):
    """The inputs and outputs of a network's modules in a forward pass."""
    found, modules = {}, dict(network.named_modules())
    for name in names:
        modules[name].register_forward_hook(
            lambda _, x, y, name=name: found.update({name: (x[0], y)})
        )
    with torch.no_grad():
        network(images)
    return [found[name] for name in names]


@pytest.mark.parametrize("sona", SONAS)
def test_every_placement_of_sona_has_its_shapes_parameters_and_place(sona):
    network, images = SONANet(10, sona), torch.randn(2, 3, 64, 32)
    outputs = network(images)
    shapes = {branch: [tuple(tensor.shape) for tensor in pair] for branch, pair in outputs.items()}
    assert shapes == {"global": [(2, 512), (2, 10)], "local": [(2, 1024), (2, 10)]}
    assert all(
        (embedding >= 0).all() for embedding, _ in outputs.values()
    )  # reduced by conv, BN and ReLU
    # theta: conv without bias, BN; g and p: conv with bias
    channels = {"none": [], "2": [512], "3": [1024], "2+3": [512, 1024]}.get(
        sona, [2048] * (1 + (sona == "4-both"))
    )
    expected = 23_508_032 + sum(
        3 * c * c // 2 + 2 * c + c // 2 for c in channels
    )  # ResNet-50 without fc, SONA
    expected += 2 * 2048 * 512 + 9 * 512 * 512 + 2 * (512 + 512 + 2048)  # bottleneck
    expected += (
        2048 * 512 + 2 * 512 + 2048 * 1024 + 2 * 1024 + 10 * (512 + 1 + 1024 + 1)
    )  # reductions, classifiers
    assert sum(parameter.numel() for parameter in network.parameters()) == expected
    with torch.no_grad():
        before = network.eval()(images)
        for module in network.modules():
            if isinstance(module, SONA):
                nn.init.normal_(module.p.weight)
        changed = (network(images) != before).any(0)
    assert changed.shape == (1536,)
    in_trunk = sona in ("2", "3", "2+3")
    assert changed[:512].any() == (in_trunk or sona in ("4-global", "4-both"))
    assert changed[512:].any() == (in_trunk or sona in ("4-local", "4-both"))
    for stage, shape in (("2", (2, 512, 8, 4)), ("3", (2, 1024, 8, 4))):
        ((x, y),) = seen(network, images, f"stage{stage}_sona")
        assert x.shape == y.shape == shape
        assert torch.equal(x, y) == (stage not in sona.split("+"))


def test_the_global_branch_averages_and_the_local_branch_takes_the_maximum():
    network, names = (
        SONANet(10, "4-both").eval(),
        ("global_sona", "global_reduction", "drop", "local_reduction"),
    )
    for module in (network.global_sona, network.local_sona):
        nn.init.normal_(module.p.weight)
    images = torch.randn(2, 3, 64, 32)
    (_, x), (average, first), (_, y), (maximum, second) = seen(network, images, *names)
    torch.testing.assert_close(average, x.mean((2, 3), keepdim=True))
    assert torch.equal(maximum, y.amax((2, 3), keepdim=True))
    assert torch.equal(network(images), torch.cat([first, second], 1))
    chain = seen(network, images, "stage4", "local_sona", "local_bottleneck", "drop")
    assert all(torch.equal(x, y) for (_, y), (x, _) in zip(chain, chain[1:], strict=False))
    outputs = seen(
        network, torch.randn(1, 3, 384, 128), "stage2", "stage3", "stage4", "local_bottleneck"
    )
    assert [tuple(y.shape) for _, y in outputs] == [
        (1, c, 48, 16) for c in (512, 1024, 2048, 2048)
    ]  # stride 8


def test_drop_layers_act_on_the_local_branch_in_training_only():
    images, dropblock = torch.randn(2, 3, 64, 32), ("drop_rate", "block_height", "block_width")
    for drop, kind, names, numbers in (
        ("none", nn.Identity, (), ()),
        ("dropblock", DropBlockPlus, dropblock, (0.1, 7, 7)),
        ("dropblock+", DropBlockPlus, dropblock, (0.1, 5, 8)),
        ("bfe", BatchDropBlock, ("height_ratio", "width_ratio"), (1 / 3, 1)),
    ):
        network = SONANet(10, "none", drop)
        assert type(network.drop) is kind
        assert tuple(getattr(network.drop, name) for name in names) == numbers
        network.drop.drop_rate = 0.9
        for training in (False, True):
            ((x, y),) = seen(network.train(training), images, "drop")
            assert torch.equal(x, y) == (drop == "none" or not training)


def test_new_layers_start_undecided_residual_branches_at_zero_and_unknown_variants_not_at_all():
    network = SONANet(767)
    for _, logits in network(torch.randn(4, 3, 64, 32)).values():
        assert abs(F.cross_entropy(logits, torch.arange(4)) - math.log(767)) < 0.05
    assert all(block.bn3.weight.abs().max() == 0 for block in network.stage3)
    for variant in ({"sona": "mine"}, {"drop": "mine"}):
        with pytest.raises(KeyError, match="mine"):
            SONANet(10, **variant)


def test_weights_are_of_a_file_or_torchvisions_first(tmp_path, monkeypatch):
    torch.manual_seed(1)
    state, asked = resnet50().state_dict(), []
    torch.save(state, tmp_path / "resnet50.pth")
    torch.save(
        {name: x for name, x in state.items() if not name.startswith("fc.")},
        tmp_path / "headless.pth",
    )

    def get_state_dict(self, **options):
        asked.append((self.name, options))
        return state

    monkeypatch.setattr(ResNet50_Weights, "get_state_dict", get_state_dict)
    for weights in ("imagenet", str(tmp_path / "resnet50.pth"), str(tmp_path / "headless.pth")):
        ours = SONANet(10, weights=weights).state_dict()
        assert torch.equal(ours["stem.0.weight"], state["conv1.weight"])
        for name in (
            "1.0.bn1.running_mean",
            "2.1.conv2.weight",
            "3.5.bn3.bias",
            "4.2.bn3.running_var",
        ):
            assert torch.equal(ours[f"stage{name}"], state[f"layer{name}"])
    assert asked == [("IMAGENET1K_V1", {"check_hash": True, "weights_only": True})]


def test_weights_and_checkpoints_are_not_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"conv1.weight": Evil()}, tmp_path / "last.pt")
    resume = partial(launch, train, "--output", tmp_path, "--resume")
    for load in (
        lambda: SONANet(10, weights=str(tmp_path / "last.pt")),
        lambda: evaluate.load_run(tmp_path),
        resume,
    ):
        with pytest.raises(pickle.UnpicklingError, match="(?i)weights.only"):
            load()
    assert not (tmp_path / "executed").exists()


# ---------- Losses (Sec. 2.1) ---------------------------------------------------------------------
def triplet_by_brute_force(embeddings, labels, margin):
    terms = []
    for a, anchor in enumerate(embeddings):
        distances = [
            (anchor - other).square().sum().sqrt() if i != a else None
            for i, other in enumerate(embeddings)
        ]
        positive = max(d for i, d in enumerate(distances) if labels[i] == labels[a] and i != a)
        negative = min(d for i, d in enumerate(distances) if labels[i] != labels[a])
        gap = positive - negative
        terms.append(torch.log(1 + gap.exp()) if margin is None else (gap + margin).clamp(min=0))
    return torch.stack(terms).mean()


@pytest.mark.parametrize("margin", [None, 0.3, 2.0])
def test_triplet_loss_and_its_gradient_are_those_of_brute_force(margin):
    labels = torch.tensor([0, 1, 2, 3] * 3)
    apart = torch.tensor([0, 0, 9, 18])[
        labels, None
    ]  # two identities that lie among each other, two that do not
    embeddings = (torch.randn(12, 5, dtype=torch.float64) + apart).requires_grad_()
    ours, theirs = (
        f(embeddings, labels, margin) for f in (batch_hard_triplet_loss, triplet_by_brute_force)
    )
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, embeddings)[0] for loss in (ours, theirs))
    )


def test_triplet_loss_without_distances_positives_or_negatives():
    four_of_two, alone = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1])
    for embeddings, labels, margin, expected in (
        (torch.ones(4, 5), four_of_two, None, math.log(2)),
        (torch.ones(4, 5), four_of_two, 0.3, 0.3),
        (torch.tensor([[0.0], [3.0]]), alone, None, math.log(1 + math.exp(-3))),  # its own positive
        (torch.tensor([[0.0], [3.0]]), alone * 0, None, 0),
    ):
        loss = batch_hard_triplet_loss(embeddings.requires_grad_(), labels, margin)
        loss.backward()
        assert loss.item() == pytest.approx(expected)
        assert embeddings.grad.isfinite().all()
    with pytest.raises(
        ValueError, match=r"expected \(B, D\) and \(B,\), not .*\[4, 5\].* and .*\[2\]"
    ):
        batch_hard_triplet_loss(torch.ones(4, 5), alone)


def test_triplet_loss_does_not_cancel_far_from_the_origin_and_is_float32_inside_autocast():
    near, labels = torch.randint(-8, 8, (12, 5)) / 4, torch.tensor([0, 1, 2, 3] * 3)
    expected = batch_hard_triplet_loss(near, labels)
    torch.testing.assert_close(batch_hard_triplet_loss(near + 4096, labels), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(batch_hard_triplet_loss(near.bfloat16(), labels), expected)


def test_the_loss_is_the_sum_of_both_losses_of_both_branches():
    labels = torch.tensor([0, 1, 2] * 2)
    outputs = {
        branch: (torch.randn(6, d), torch.randn(6, 3))
        for branch, d in (("global", 512), ("local", 1024))
    }
    for margin in (None, 0.3):
        triplet = partial(triplet_by_brute_force, labels=labels, margin=margin)
        total, parts = branch_losses(outputs, labels, margin)
        for branch, (embedding, logits) in outputs.items():
            target = 0.9 * F.one_hot(labels) + 0.1 / 3  # label smoothing of 0.1 [36]
            cross_entropy = -(target * logits.log_softmax(1)).sum(1).mean()
            torch.testing.assert_close(parts[f"{branch}_cross_entropy"], cross_entropy)
            torch.testing.assert_close(
                parts[f"{branch}_triplet"], triplet(embedding), rtol=1e-4, atol=0
            )
            torch.testing.assert_close(
                parts[f"{branch}_accuracy"], (logits.argmax(1) == labels).float().mean()
            )
        four = [
            parts[f"{branch}_{loss}"]
            for branch in ("global", "local")
            for loss in ("triplet", "cross_entropy")
        ]
        torch.testing.assert_close(total, sum(four))
        torch.testing.assert_close(parts["loss"], sum(four))


# ---------- Data (Sec. 3.1, 3.2) ------------------------------------------------------------------
def touch(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def test_the_counts_are_those_of_table_1():
    table_1 = {
        "market1501": {"train": (12936, 751), "query": (3368, 750), "gallery": (19732 - 3819, 750)},
        "cuhk03": {"train": (7368, 767), "query": (1400, 700), "gallery": (5328, 700)},
        "cuhk03-detected": {"train": (7365, 767), "query": (1400, 700), "gallery": (5332, 700)},
        "dukemtmc": {"train": (16522, 702), "query": (2228, 702), "gallery": (17661, 1110)},
    }
    assert {name: DATASETS[name].counts for name in table_1} == table_1


LAYOUTS = {  # where people have them
    "toy": ["toy"],
    "market1501": [
        "market1501", "Market-1501-v15.09.15", "market1501/Market-1501-v15.09.15", "Market-1501", "Market1501",
        "market_1501", "Market-1501/Market-1501-v15.09.15", "reid/market1501/Market-1501-v15.09.15",
    ],
    "dukemtmc": [
        "dukemtmc-reid", "DukeMTMC-reID", "dukemtmc-reid/DukeMTMC-reID", "dukemtmcreid",
        "DukeMTMC-reID/DukeMTMC-reID", "DukeMTMC", "duke_mtmc_reid",
    ],
    "cuhk03": [
        "cuhk03-np/labeled", "CUHK03-NP/labeled", "cuhk03/labeled", "CUHK03-NP/cuhk03-np/labeled",
        "cuhk03_np_labeled", "CUHK03_np/Labeled", "cuhk03-np-labeled", "cuhk03/cuhk03-np/labeled",
    ],
}  # fmt: skip
LAYOUTS["cuhk03-detected"] = [
    x.replace("label", "detect").replace("Label", "Detect") for x in LAYOUTS["cuhk03"]
]
LAYOUTS = [(name, layout) for name, layouts in LAYOUTS.items() for layout in layouts]


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_a_set_is_found_wherever_people_have_it_and_none_for_another(
    tmp_path, monkeypatch, name, layout
):
    folder = tmp_path / layout
    for split in FOLDERS.values():
        touch(folder / split)
    touch(tmp_path / "__MACOSX" / layout)
    touch(tmp_path / "other")
    touch(folder.parent, "a file")
    above = [path for path in folder.parents if tmp_path in (path, *path.parents)]
    for data_dir in (folder, *above):  # the folder itself, or what holds it
        assert data.find_folder(name, data_dir).samefile(folder)
    monkeypatch.chdir(folder)
    assert data.find_folder(name, ".").samefile(folder)
    for other in DATASETS.keys() - {name}:
        for data_dir in (".", folder, *above):
            with pytest.raises(DataError, match=f"^{other}: found no folder named like"):
                data.find_folder(other, data_dir)


def test_what_is_not_the_set_is_not_taken_and_it_is_said_what_was_looked_for(tmp_path):
    for i, (name, layout, data_dir) in enumerate((
        ("market1501", "market1501/dukemtmc-reid", "market1501"),  # data_dir is named like the set that is asked for
        ("cuhk03", "cuhk03-labeled/detected", "."),
        ("cuhk03", "cuhk03-labeled/detected", "cuhk03-labeled"),
        ("dukemtmc", "Occluded-DukeMTMC-reID", "."),
        ("market1501", "__MACOSX/Market-1501-v15.09.15", "."),
        ("market1501", ".trash/market1501", "."),
        ("market1501", "market1501-masks/other", "."),
        ("market1501", "one/two/three/market1501", "."),  # too deep
        ("cuhk03-detected", "cuhk03-np/detected/bounding_box_train", "."),  # not whole
    )):  # fmt: skip
        for split in FOLDERS.values():
            touch(tmp_path / f"{i}" / layout / split)
        with pytest.raises(DataError, match=f"^{name}: found no folder") as error:
            data.find_folder(name, tmp_path / f"{i}" / data_dir)
        told = (
            f"named like '{DATASETS[name].words}'",
            *FOLDERS.values(),
            str(tmp_path / f"{i}" / data_dir),
        )
        assert all(words in str(error.value) for words in told)
        assert ("cuhk-03.mat is the raw release" in str(error.value)) == name.startswith("cuhk03")


def test_file_names_say_identity_and_camera_and_one_that_does_not_parse_is_named(tmp_path):
    names = {
        "0002_c1s1_000451_03.jpg": (2, 1),  # Market-1501
        "0000_c6s4_002202_01.jpg": (0, 6),  # a distractor stays
        "-1_c3s2_000112_02.jpg": None,  # junk
        "0005_c8_f0046182.JPG": (5, 8),  # DukeMTMC-reID
        "1467_c2_10.png": (1467, 2),  # CUHK03-NP
        "0003_c12.bmp": (3, 12),
        "Thumbs.db": None,
        "._0002_c1s1_000451_03.jpg": None,
        "readme.txt": None,
    }
    touch(tmp_path, *names)
    split = data.read_split(tmp_path)
    found = {
        Path(p).name: (i, c) for p, i, c in zip(split.paths, split.ids, split.cams, strict=True)
    }
    assert found == {name: who for name, who in names.items() if who}
    assert split.labels.tolist() == np.searchsorted([0, 2, 3, 5, 1467], split.ids).tolist()
    for name in (
        "person.jpg",
        "0001.jpg",
        "0001_1.jpg",
        "_c1s1_0.jpg",
        "-2_c1_0.jpg",
        "0001_c1x.png",
    ):
        with pytest.raises(DataError, match=f"{name}: the name must be <identity>_c<camera>_"):
            data.read_split(touch(tmp_path / name, name))


def test_identity_0_is_a_person_but_in_a_gallery_that_is_not_searched_for_it(tmp_path):
    touch(tmp_path / "market1501/bounding_box_train", "0000_c1s1_1.jpg", "0001_c1s1_1.jpg")
    touch(
        tmp_path / "market1501/bounding_box_test",
        *(f"000{i}_c{c}s1_1.jpg" for i in (0, 1, 2) for c in (1, 2)),
    )
    for query, counts in (("0001_c1s1_1.jpg", "212"), ("0000_c1s1_1.jpg", "223")):
        touch(tmp_path / "market1501/query", query)
        splits = load_dataset("market1501", tmp_path)
        lines = data.describe("market1501", splits).splitlines()
        assert [line.split()[2] for line in lines[1:4]] == [*counts]
    assert splits["train"].labels.tolist() == [0, 1]
    assert lines[1].split() == "train 2 2 1 published: 12,936 and 751".split()
    assert lines[4] == f"from {tmp_path / 'market1501'}"


def test_images_of_any_mode_load_as_rgb(tmp_path):
    grey = (np.arange(64, dtype=np.uint8) * 4).reshape(8, 8)
    picture = Image.fromarray(np.stack([grey, grey.T, 255 - grey], 2))
    for name in ("RGB.bmp", "RGBA.webp", "CMYK.jpg", "L.png", "LA.png", "P.png"):
        mode = name.split(".")[0]
        picture.convert(mode).save(tmp_path / name, quality=95)
        loaded = data.read_image(tmp_path / name).permute(1, 2, 0).numpy().astype(int)
        expected = picture.convert("L").convert("RGB") if mode[0] == "L" else picture
        assert np.abs(loaded - np.asarray(expected)).mean() < (40 if mode == "P" else 12), (
            name
        )  # 256 colours
    exif = Image.Exif()
    exif[0x0112] = 6  # a phone's photo lies on its side, to be turned clockwise
    Image.fromarray(np.uint8([[0] * 8 + [255] * 8] * 8)).save(tmp_path / "phone.jpg", exif=exif)
    image = data.read_image(tmp_path / "phone.jpg")
    assert image.shape == (3, 16, 8) and (image[:, :7] < 50).all() and (image[:, 9:] > 200).all()


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    data.draw_pedestrian(1, 1, 1).save(tmp_path / "whole.jpg")
    (tmp_path / "torn.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:900])
    (touch(tmp_path, "empty.bmp") / "text.png").write_text("not an image")
    for name in ("torn.jpg", "text.png", "empty.bmp", "missing.jpg"):
        with pytest.raises(
            DataError, match=f"^cannot read the image {tmp_path / name}: .*; replace or remove it$"
        ):
            ImageDataset([str(tmp_path / name)], [0], 64, 32)[0]


def test_images_are_resized_and_normalised(tmp_path):
    Image.new("RGB", (50, 90), (255, 0, 128)).save(tmp_path / "plain.png")
    image, label = ImageDataset([str(tmp_path / "plain.png")], [7], 384, 128)[0]
    assert (image.shape, image.dtype, label) == ((3, 384, 128), torch.uint8, 7)
    expected = torch.tensor([1 - 0.485, 0 - 0.456, 128 / 255 - 0.406]) / torch.tensor(
        [0.229, 0.224, 0.225]
    )
    normalised = normalize(image[None])
    torch.testing.assert_close(normalised[0], expected[:, None, None].expand(3, 384, 128))


@pytest.mark.parametrize(("height", "width", "side"), [(384, 128, 64), (96, 32, 16)])
def test_cutout_fills_one_square_of_half_the_images_with_0(height, width, side):
    images = cutout(torch.ones(400, 3, height, width))
    assert torch.equal(images[:, 0], images[:, 2])
    corners = set()
    for zero in images[:, 0] == 0:
        if zero.any():
            rows, columns = (
                zero.any(1).nonzero().flatten().tolist(),
                zero.any(0).nonzero().flatten().tolist(),
            )
            assert zero.sum() == side**2
            assert (
                len(rows)
                == len(columns)
                == rows[-1] - rows[0] + 1
                == columns[-1] - columns[0] + 1
                == side
            )
            corners.add((rows[0], columns[0]))
    assert 150 < (images == 0).flatten(1).any(1).sum() < 250
    assert len(corners) > 100 and {0, width - side} <= {column for _, column in corners}


def test_augmentation_flips_half_the_images_and_normalises():
    images = torch.randint(0, 256, (400, 3, 24, 8), dtype=torch.uint8)
    augmented = augment(images)
    kept = augmented != 0
    straight, mirrored = (
        ((augmented == normalize(x)) | ~kept).flatten(1).all(1) for x in (images, images.flip(3))
    )
    assert (straight | mirrored).all()
    assert kept.float().mean((1, 2, 3)).min() > 0.9
    assert 150 < mirrored.sum() < 250


LABELS = [label for label in range(10) for _ in range(2 + label % 4)]  # identities of 2 to 5 images


def test_sampler_takes_each_identity_once_an_epoch():
    sampler = IdentitySampler(LABELS, ids_per_batch=3, images_per_id=4)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 10 // 3
    people = []
    for batch in batches:
        groups = np.array(LABELS)[batch].reshape(3, 4)
        assert (groups == groups[:, :1]).all()
        people += groups[:, 0].tolist()
        for images in np.reshape(batch, (3, 4)):  # none twice where there are enough
            assert len(set(images)) == 4 or LABELS.count(LABELS[images[0]]) < 4
    assert len(set(people)) == 9


def test_sampler_is_a_function_of_seed_and_epoch_and_processes_share_its_batches():
    def batches(seed, epoch, **share):
        sampler = IdentitySampler(LABELS, 4, 2, seed=seed, **share)
        sampler.set_epoch(epoch)
        return list(sampler)

    whole = batches(1, 2)
    assert whole == batches(1, 2)
    assert whole not in (batches(1, 3), batches(2, 2))
    shares = zip(*(batches(1, 2, rank=rank, world_size=2) for rank in (0, 1)), strict=True)
    assert [first + second for first, second in shares] == whole
    with pytest.raises(DataError, match="4 identities are not divisible by 3 processes"):
        batches(1, 2, world_size=3)
    with pytest.raises(DataError, match="10 identities, but a batch needs 11"):
        IdentitySampler(LABELS, ids_per_batch=11)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """A folder with the toy and a small market1501, of 2 cameras x 2 images a person; the same as cuhk03."""
    folder = tmp_path_factory.mktemp("datasets")
    for split, people, images in (
        ("train", range(1, 5), 2),
        ("query", (50, 51, 52), 1),
        ("gallery", (50, 51, 52), 2),
    ):
        for person, camera, image in product(people, (1, 2), range(images)):
            picture = data.draw_pedestrian(person, camera, image + 2 * (split == "query"))
            picture.save(
                touch(folder / "market1501" / FOLDERS[split])
                / f"{person:04d}_c{camera}s1_{image:06d}_00.jpg"
            )
    shutil.copytree(folder / "market1501", folder / "cuhk03-np/labeled")
    load_dataset("toy", folder)
    return folder


def test_the_toy_is_drawn_whole_and_the_same_each_time(datasets, tmp_path):
    toy = load_dataset("toy", datasets)
    assert "published" not in data.describe("toy", toy)
    assert not set(toy["train"].ids) & set(toy["query"].ids)
    assert sorted(path.name for path in datasets.iterdir()) == [
        "cuhk03-np",
        "market1501",
        "toy",
    ]  # no scratch
    for path, person, camera in list(zip(*toy["query"], strict=True))[::40]:
        data.draw_pedestrian(person, camera, 0).save(tmp_path / "again.png")
        assert (tmp_path / "again.png").read_bytes() == Path(path).read_bytes()


# ---------- The schedule and the training step (Sec. 3.2) -----------------------------------------
def test_the_learning_rate_is_the_papers_in_every_epoch_and_other_numbers_of_epochs_run_the_same_course():
    warm_up = [1e-4 * step for step in range(1, 11) for _ in range(5)]
    papers = warm_up + 150 * [1e-3] + 100 * [1e-4] + 100 * [1e-5]
    assert [learning_rate(epoch) for epoch in range(400)] == pytest.approx(papers, rel=1e-12)
    papers = [0.1, 0.3, 0.5, 0.7, 0.9] + 15 * [1] + 10 * [0.1] + 10 * [0.01]
    assert [learning_rate(epoch, 40, 2) for epoch in range(40)] == pytest.approx(
        [2 * rate for rate in papers]
    )
    assert [learning_rate(epoch, 800) for epoch in range(0, 800, 2)] == [
        learning_rate(e) for e in range(400)
    ]
    assert learning_rate(0, 1) == pytest.approx(1e-4)


def test_a_pass_is_random_by_seed_epoch_step_and_its_number():
    network = nn.Sequential()  # returns the images as they come out of augmentation
    network.forward = lambda images: {"global": (images, torch.rand(1))}
    images = torch.randint(256, (8, 3, 24, 8), dtype=torch.uint8)

    def augmented(*moment, images=images, rank=0):
        return Passes(network, 2, rank)(images, moment)["global"]

    first = augmented(1, 2, 3)
    torch.rand(5)
    assert all(map(torch.equal, augmented(1, 2, 3), first))
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (2, 1, 3)):
        assert not any(map(torch.equal, augmented(*other), first))
    assert len(set(first[1].tolist())) == 4  # each pass of a step has its own numbers
    # Two processes of two passes each make the four passes of one process.
    halves = [augmented(1, 2, 3, images=images[4 * rank :][:4], rank=rank) for rank in (0, 1)]
    assert all(map(torch.equal, map(torch.cat, zip(*halves, strict=True)), first))
    with pytest.raises(ValueError, match="--images-per-pass 3 must divide a process's 8"):
        Passes(network, 3)(images, (1, 2, 3))


def test_passes_are_normalised_apart_and_the_first_one_is_remembered():
    network, alone = SONANet(4, drop="none"), SONANet(4, drop="none")
    images = torch.randint(256, (8, 3, 32, 16), dtype=torch.uint8)
    alone.load_state_dict(network.state_dict())
    outputs = Passes(network, 4)(images, (0, 0, 0))
    for i in (1, 0):
        expected = Passes(alone, 4, rank=i)(images[4 * i :][:4], (0, 0, 0))
        for branch in ("global", "local"):
            torch.testing.assert_close(outputs[branch][0][4 * i :][:4], expected[branch][0])
    assert all(map(torch.equal, network.buffers(), alone.buffers()))
    assert network.stem[1].num_batches_tracked == 1
    Passes(alone, 4, rank=1)(images, (0, 0, 1))  # another process's passes change no statistics
    assert all(map(torch.equal, network.buffers(), alone.buffers()))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_recomputed_gradients_are_the_same_bit_for_bit(precision):
    network, images = SONANet(4), torch.randint(256, (8, 3, 32, 16), dtype=torch.uint8)
    nn.init.normal_(network.stage2_sona.p.weight, std=0.1)
    results = []
    for recompute in (False, True):
        ours = deepcopy(network)
        outputs = Passes(ours, 2, precision=precision, recompute=recompute)(images, (0, 0, 0))
        assert {tensor.dtype for pair in outputs.values() for tensor in pair} == {torch.float32}
        loss = branch_losses(outputs, torch.arange(4).repeat_interleave(2))[0]
        loss.backward()
        results.append(
            [loss.detach(), *(parameter.grad for parameter in ours.parameters()), *ours.buffers()]
        )
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(
    ("sona", "drop"), [("2+3", "dropblock+"), ("4-both", "bfe"), ("none", "none")]
)
def test_a_step_on_a_gpu_waits_for_no_value(sona, drop):
    """Shapes and devices alone: fails where a tensor lies on the wrong device, or a value would have to be known."""
    with FakeTensorMode():
        try:
            torch.zeros(1, device="cuda").uniform_()
        except RuntimeError as error:
            pytest.skip(
                f"this PyTorch needs a GPU's driver even for a device of shapes alone: {error}"
            )
        with torch.device("cuda"):
            network = SONANet(10, sona, drop)
        images = torch.zeros(8, 3, 64, 32, dtype=torch.uint8, device="cuda")
        labels = torch.zeros(8, dtype=torch.int64, device="cuda")
        with mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False):
            outputs = Passes(network, 4, precision="fp16")(images, (0, 0, 0))
        loss, parts = branch_losses(outputs, labels)
        assert {part.device.type for part in (loss, *parts.values())} == {"cuda"}


def test_the_precision_is_what_the_device_is_fast_in(monkeypatch):
    for capability, precision in {
        (9, 0): "fp16",
        (8, 0): "fp16",
        (7, 0): "fp16",
        (6, 1): "float32",
    }.items():
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda _, capability=capability: capability
        )
        assert train.default_precision(torch.device("cuda")) == precision
    assert train.default_precision(torch.device("cpu")) == "float32"


# ---------- Ranking (Sec. 3.3) --------------------------------------------------------------------
def rank_by_brute_force(
    query, gallery, query_ids, gallery_ids, query_cams, gallery_cams, max_rank=50
):
    """The protocol in float64, with a full and stable sort."""
    cmc, aps = [], []
    for q, i, c in zip(query.astype(float), query_ids, query_cams, strict=True):
        keep = (gallery_ids != -1) & ~((gallery_ids == i) & (gallery_cams == c))
        order = np.argsort(((gallery.astype(float) - q) ** 2).sum(1)[keep], kind="stable")
        hits = gallery_ids[keep][order] == i
        if not hits.any():
            aps.append(np.nan)
            continue
        aps.append(np.mean(np.arange(1, hits.sum() + 1) / (np.flatnonzero(hits) + 1)))
        cmc.append([hits[:k].any() for k in range(1, max_rank + 1)])
    return np.mean(cmc, 0), np.array(aps)


def random_ranking(queries, gallery, ids, dimensions=6, levels=4):
    """Features of few levels, so that many distances are equal; some junk (-1), distractors (0), unmatched queries."""
    rng = np.random.default_rng(0)
    features = [
        rng.integers(0, levels, (n, dimensions)).astype(np.float32) for n in (queries, gallery)
    ]
    people = [rng.integers(1, ids + 1, queries), rng.integers(-1, ids - 1, gallery)]
    return [*features, *people, *(rng.integers(1, 4, n) for n in (queries, gallery))]


def test_ranking_is_that_of_brute_force_with_junk_distractors_ties_and_unmatched_queries():
    arguments = random_ranking(queries=60, gallery=300, ids=15)
    arguments[2][:2] = -1, 0  # a query of junk has no match, one of identity 0 has
    ranking = evaluate_ranking(*arguments)
    cmc, aps = rank_by_brute_force(*arguments)
    assert np.isnan(aps).sum() > 3
    np.testing.assert_allclose(ranking.average_precisions, aps, rtol=1e-12)
    np.testing.assert_allclose(ranking.cmc, cmc, rtol=1e-12)
    assert ranking.mean_ap == pytest.approx(np.nanmean(aps))
    assert ranking.metrics() == {
        "mean_ap": ranking.mean_ap,
        "rank1": cmc[0],
        "rank5": cmc[4],
        "rank10": cmc[9],
    }


def test_ranking_in_several_slabs_is_the_same_ranking():
    query, gallery, query_ids, gallery_ids, query_cams, gallery_cams = random_ranking(
        1000, 10_000, 3000, 3, 1000
    )
    whole, *parts = (  # the whole takes more than one slab of 8 million distances
        evaluate_ranking(
            query[i], gallery, query_ids[i], gallery_ids, query_cams[i], gallery_cams
        ).average_precisions
        for i in (np.arange(1000), *np.array_split(np.arange(1000), 3))
    )
    np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_ranking_refuses_what_it_cannot_rank():
    def refused(match, **changed):
        good = dict(
            zip(
                inspect.signature(evaluate_ranking).parameters,
                random_ranking(4, 20, 5),
                strict=False,
            )
        )
        with pytest.raises(ValueError, match=match):
            evaluate_ranking(**good | changed)

    refused("no query has a true match", query_ids=np.full(4, 99))
    refused("nan, inf or numbers too large", query_features=np.full((4, 6), np.nan))
    refused("nan, inf or numbers too large", gallery_features=np.full((20, 6), np.inf))
    refused(r"shapes .*\(7,\).* for \(4, 20\) features", gallery_ids=np.ones(7))


def test_features_average_the_image_and_its_mirror_image(tmp_path):
    paths = [str(tmp_path / name) for name in ("a.png", "b.png")]
    for person, path in enumerate(paths):
        data.draw_pedestrian(person, 1, 0).save(path)
    network = SONANet(4)
    features = extract_features(network, paths, 64, 32)
    assert not network.training
    images = normalize(torch.stack([ImageDataset(paths, [0, 1], 64, 32)[i][0] for i in range(2)]))
    with torch.no_grad():
        apart = network(images), network(images.flip(3))
    np.testing.assert_allclose(features, (apart[0] + apart[1]) / 2, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(*apart, rtol=1e-3)


def test_a_querys_nearest_images_are_not_of_its_own_camera():
    gallery = np.array([[0, 2], [0, 1], [0, 0], [0, 3]])
    assert evaluate.nearest(np.zeros(2), gallery) == [(2, 0), (1, 1), (0, 2), (3, 3)]
    skip = np.array([False, False, True, False])
    assert evaluate.nearest(np.zeros(2), gallery, skip) == [(1, 1), (0, 2), (3, 3)]


def test_curves_are_of_all_runs_and_compare_their_average_losses(tmp_path, capsys, monkeypatch):
    for name, values in (("bl", [4, 2]), ("sona", [4, 2.03]), ("one", [3])):
        records = [{"epoch": epoch, "loss": loss} for epoch, loss in enumerate(values)]
        records[-1]["mean_ap"] = 0.5
        touch(tmp_path / name)
        (tmp_path / name / "log.jsonl").write_text(
            "".join(json.dumps(record) + "\n" for record in records)
        )
    launch(evaluate, tmp_path / "bl", tmp_path / "sona", "--curves", tmp_path / "curves.png")
    averages = f"   3.0000   +0.00%  {tmp_path / 'bl'}\n   3.0150   +0.50%  {tmp_path / 'sona'}\n"
    assert averages in capsys.readouterr().out
    assert Image.open(tmp_path / "curves.png").size == (840, 370)
    written = []  # (which chart, which axis, text)

    def text(_, at, text, *a, anchor=None, **k):
        written.append((at[0] > 440, anchor, text))

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    launch(evaluate, tmp_path / "one", "--curves", tmp_path / "curves.png")
    assert {(False, "mt", "0"), (True, "mt", "0"), (False, "rm", "3"), (True, "rm", "50")} <= set(
        written
    )
    assert len(set(written)) == len(written)  # no label twice


# ========== Part two: a run =======================================================================
class Tiny(nn.Module):
    """Stands in SONANet's place: the same interface, and steps of milliseconds."""

    def __init__(self, num_classes, sona="2", drop="dropblock+", weights=None):
        super().__init__()
        attention = next(iter(PLACEMENTS[sona].values()), nn.Identity)(8)
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8), nn.LeakyReLU(), attention
        )
        self.drop = DROPS[drop]()
        self.global_classifier, self.local_classifier = (
            nn.Linear(8, num_classes),
            nn.Linear(8, num_classes),
        )

    def forward(self, images):
        x = self.trunk(images)
        first, second = x.mean((2, 3)), self.drop(x).amax((2, 3))
        if not self.training:
            return torch.cat([first, second], 1)
        return {
            "global": (first, self.global_classifier(first)),
            "local": (second, self.local_classifier(second)),
        }


def launch(program, *arguments, processes=1, wait=True):
    """train or evaluate with Tiny, in this process or in several as torchrun starts them; returns those not waited for.
    What is patched here is so in the processes too, as they are forks.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def work(rank):
        torch.set_num_threads(1)
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        of_torchrun = {name: str(number) for name, number in numbers.items()} | {
            "MASTER_ADDR": "127.0.0.1"
        }
        with (
            mock.patch.object(sys, "argv", [f"{program.__name__}.py", *map(str, arguments)]),
            mock.patch.object(train, "SONANet", Tiny),
            mock.patch.object(evaluate, "SONANet", Tiny),
            mock.patch.dict(os.environ, of_torchrun if processes > 1 else {}),
        ):
            program.main()

    if processes == 1 and wait:
        return work(0)
    return mp.start_processes(work, nprocs=processes, join=wait, start_method="fork")


def python(*arguments, folder=HERE):
    """What `python ...` prints as errors, and its exit status."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    return done.stderr, done.returncode


@pytest.fixture(scope="module")
def market(datasets):
    """The arguments to train on the small market1501."""
    small = [
        "--height",
        32,
        "--width",
        16,
        "--ids-per-batch",
        4,
        "--images-per-id",
        2,
        "--images-per-pass",
        4,
    ]
    return [
        "--dataset",
        "market1501",
        "--data-dir",
        datasets,
        *small,
        "--weights",
        "none",
        "--workers",
        0,
    ]


@pytest.fixture(scope="module")
def run(market, tmp_path_factory):
    """A finished run of 4 epochs, and what it printed."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        launch(train, *market, "--epochs", 4, "--eval-every", 2, "--output", output)
    return output, printed.getvalue()


@contextlib.contextmanager
def cut_off_before(epoch):
    """Training within has a checkpoint of each epoch, and ends before one."""

    def rate(now, *rest):
        if now == epoch:
            raise KeyboardInterrupt
        return learning_rate(now, *rest)

    with (
        mock.patch.multiple(train, learning_rate=rate, CHECKPOINT_SECONDS=0),
        pytest.raises(KeyboardInterrupt),
    ):
        yield


def records_of(output):
    """A run's log, without the speed."""
    records = map(json.loads, (output / "log.jsonl").read_text().splitlines())
    return [
        {key: value for key, value in record.items() if key != "images_per_second"}
        for record in records
    ]


def checkpoint_of(output):
    return torch.load(output / "last.pt", weights_only=True)


def assert_same_run(output, other, rtol=0.0):
    """The same log, weights and gradients, to the bit unless told."""
    records, others = records_of(output), records_of(other)
    assert len(records) == len(others)
    for record, expected in zip(records, others, strict=True):
        assert record == (pytest.approx(expected, rel=rtol) if rtol else expected)
    ours, others = checkpoint_of(output), checkpoint_of(other)
    torch.testing.assert_close(ours["network"], others["network"], rtol=10 * rtol, atol=rtol)
    moments = (
        [adam["exp_avg"] for adam in run["optimizer"]["state"].values()] for run in (ours, others)
    )
    for ours, others in zip(*moments, strict=True):  # Adam's mean gradients
        torch.testing.assert_close(ours, others, rtol=10 * rtol, atol=rtol / 100)


# ---------- Training ------------------------------------------------------------------------------
def test_a_run_trains_logs_and_evaluates(run):
    output, printed = run
    records = records_of(output)
    assert [record["epoch"] for record in records] == [0, 1, 2, 3]
    assert [record["lr"] for record in records] == [learning_rate(epoch, 4) for epoch in range(4)]
    for record in records:
        parts = [
            record[f"{b}_{part}"]
            for b in ("global", "local")
            for part in ("triplet", "cross_entropy")
        ]
        assert record["loss"] == pytest.approx(sum(parts))
        assert {"global_accuracy", "local_accuracy"} < set(record)
        assert ("mean_ap" in record) == ("rank1" in record) == (record["epoch"] in (1, 3))
    assert sorted(path.name for path in output.iterdir()) == ["args.json", "last.pt", "log.jsonl"]
    state = checkpoint_of(output)
    assert [record["loss"] for record in state["history"]] == [record["loss"] for record in records]
    assert state["settings"] == json.loads((output / "args.json").read_text())
    assert "untrained    mAP" in printed
    assert f"trained      mAP{100 * records[3]['mean_ap']:7.2f}" in printed
    (group,) = state["optimizer"]["param_groups"]  # one rate and one decay for all parameters
    assert (group["lr"], group["betas"]) == (learning_rate(3, 4), (0.9, 0.999))
    assert group["weight_decay"] == 5e-4
    assert len(group["params"]) == len([*Tiny(4).parameters()])


@forks
def test_one_process_two_and_four_are_the_same_run(market, tmp_path):
    command = [*market, "--epochs", 2, "--eval-every", 1, "--images-per-pass", 2]
    for name, processes, *flags in (
        ("one", 1),
        ("recomputed", 1, "--recompute"),
        ("two", 2),
        ("four", 4),
        ("bfe", 1, "--drop", "bfe", "--margin", 5),
        ("bfe-two", 2, "--drop", "bfe", "--margin", 5),
        ("larger", 1, "--images-per-pass", 4),
    ):
        launch(train, *command, *flags, "--output", tmp_path / name, processes=processes)
    assert_same_run(tmp_path / "recomputed", tmp_path / "one")
    for name, first in (("two", "one"), ("four", "one"), ("bfe-two", "bfe")):
        assert_same_run(tmp_path / name, tmp_path / first, rtol=1e-4)
    assert (
        records_of(tmp_path / "bfe")[0]["global_triplet"] > 3
    )  # of the margin 5; about ln 2 of the soft one
    larger, one = (records_of(tmp_path / name)[0]["loss"] for name in ("larger", "one"))
    assert abs(larger - one) > 1e-3


@forks
def test_evaluation_takes_the_first_processs_statistics_and_steps_leave_no_tensors(
    market, tmp_path, monkeypatch
):
    tensors = []

    def evaluated(network, *arguments, evaluate=train.evaluate):
        gc.collect()
        tensors.append(sum(type(thing) is torch.Tensor for thing in gc.get_objects()))
        assert len(tensors) < 4 or tensors[2] == tensors[3]  # untrained, and after each epoch
        ranking = evaluate(network, *arguments)
        aps = torch.from_numpy(ranking.average_precisions)
        torch.save([*network.buffers(), aps], tmp_path / f"{dist.get_rank()}.pt")
        return ranking

    monkeypatch.setattr(train, "evaluate", evaluated)
    launch(
        train, *market, "--epochs", 3, "--eval-every", 1, "--output", tmp_path / "run", processes=2
    )
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(map(torch.equal, first, second))
    assert first[0].abs().min() > 0  # running means that were updated
    assert len(first[-1]) == 6


@forks
def test_a_compiled_run_of_two_processes_is_the_run_without(monkeypatch, market, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of processes in a fork
    monkeypatch.setattr(
        torch, "compile", partial(torch.compile, backend="aot_eager")
    )  # needs no compiler
    for name, flags in {"plain": [], "compiled": ["--compile", "--recompute"]}.items():
        flags += [
            "--images-per-pass",
            2,
            "--epochs",
            1,
            "--eval-every",
            0,
            "--output",
            tmp_path / name,
        ]
        launch(train, *market, *flags, processes=2)
    plain, compiled = (records_of(tmp_path / name)[0]["loss"] for name in ("plain", "compiled"))
    assert compiled == pytest.approx(plain, rel=1e-4)


def test_a_loss_that_is_not_finite_stops_the_run(market, tmp_path):
    with pytest.raises(FloatingPointError, match="the loss of epoch [12] is (nan|inf); lower --lr"):
        launch(train, *market, "--lr", 1e39, "--epochs", 9, "--eval-every", 0, "--output", tmp_path)
    assert all(math.isfinite(record["loss"]) for record in records_of(tmp_path))
    assert not (tmp_path / "last.pt").exists()


@pytest.mark.parametrize("method", sorted({*mp.get_all_start_methods()} - {"fork"}))
def test_training_with_workers_under_another_start_method(market, tmp_path, monkeypatch, method):
    monkeypatch.setattr(
        train, "evaluate", lambda *_: evaluate.Ranking(np.ones(10), 1.0, np.ones(1))
    )
    mp.set_start_method(method, force=True)
    try:
        launch(
            train, *market, "--workers", 2, "--epochs", 1, "--eval-every", 0, "--output", tmp_path
        )
    finally:
        mp.set_start_method(None, force=True)
    assert len(records_of(tmp_path)) == 1


# ---------- Stopping and going on -----------------------------------------------------------------
@forks
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_is_killed_and_resumed_is_the_same_run(market, tmp_path, monkeypatch, processes):
    """SIGKILL, at a random moment of an epoch, of its end or of its checkpoint; with and without workers."""
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", 0)
    command = [*market, "--epochs", 60, "--eval-every", 25]
    whole, output = tmp_path / "whole", tmp_path / "killed"
    launch(train, *command, "--output", whole, processes=processes)
    moments, log = random.Random(processes), output / "log.jsonl"
    for epochs in (0, 5, 15, 30):
        flags = ["--workers", int(epochs == 15), "--output", output, "--resume"]
        running = launch(train, *command, *flags, processes=processes, wait=False).processes
        while (
            running[0].is_alive()
            and epochs
            and not (log.exists() and len(log.read_text().splitlines()) >= epochs)
        ):
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.1))
        for end in ("kill", "join"):
            for process in running:
                getattr(process, end)()
    launch(train, "--output", output, "--resume", processes=processes)
    assert [record["epoch"] for record in records_of(output)] == [*range(60)]
    assert_same_run(output, whole)


@forks
def test_a_resumed_run_takes_its_settings_from_the_checkpoint_and_a_typed_flag_wins(
    market, tmp_path
):
    command = [*market, "--epochs", 4, "--eval-every", 0, "--margin", 0.3, "--output"]
    launch(train, *command, tmp_path / "whole", "--resume")  # there is none to resume: it begins
    for name in ("same", "typed", "two"):
        with cut_off_before(2):
            launch(train, *command, tmp_path / name)
    launch(train, "--output", tmp_path / "same", "--resume")
    assert_same_run(tmp_path / "same", tmp_path / "whole")
    launch(train, "--output", tmp_path / "typed", "--resume", "--lr", 0.5, "--epochs", 5)
    rates = [record["lr"] for record in records_of(tmp_path / "typed")]
    assert rates[2:] == [learning_rate(epoch, 5, 0.5) for epoch in (2, 3, 4)]
    first, typed = (
        checkpoint_of(tmp_path / name)["settings"].items() for name in ("whole", "typed")
    )
    assert {key for key, _ in first ^ typed} == {"output", "lr", "epochs"}
    launch(
        train, "--output", tmp_path / "two", "--resume", processes=2
    )  # on other machines it goes on as well
    assert_same_run(tmp_path / "two", tmp_path / "whole", rtol=1e-4)


def test_a_run_resumed_with_another_seed_goes_on_with_that(market, tmp_path, monkeypatch):
    moments, batches = [], []
    forward = Passes.forward
    monkeypatch.setattr(Passes, "forward", lambda *a: moments.append(a[2]) or forward(*a))
    monkeypatch.setattr(
        train, "branch_losses", lambda *a: batches.append(a[1].tolist()) or branch_losses(*a)
    )
    with cut_off_before(1):
        launch(
            train,
            *market,
            "--ids-per-batch",
            2,
            "--epochs",
            4,
            "--eval-every",
            0,
            "--output",
            tmp_path,
        )
    with cut_off_before(2):
        launch(train, "--output", tmp_path, "--resume", "--seed", 7)
    launch(train, "--output", tmp_path, "--resume")
    assert moments == [(7 * (epoch > 0), epoch, step) for epoch in range(4) for step in (0, 1)]
    labels = load_dataset("market1501", market[3])["train"].labels
    for (seed, epoch, step), batch in zip(moments, batches, strict=True):
        sampler = IdentitySampler(labels, 2, 2, seed)
        sampler.set_epoch(epoch)
        assert batch == labels[list(sampler)[step]].tolist()


def test_a_folder_that_holds_a_run_or_not_the_same_for_all_is_refused(
    market, run, tmp_path, capsys, monkeypatch
):
    output = shutil.copytree(run[0], tmp_path / "run")
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    with pytest.raises(SystemExit, match="2"):
        launch(train, *market, "--output", output)
    assert f"error: {output} holds a run; --resume resumes it" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    monkeypatch.setattr(
        train, "gather", lambda x: torch.cat([x, x + 1])
    )  # another process sees one epoch more
    with pytest.raises(AssertionError, match="is not the same folder for all processes"):
        launch(train, *market, "--output", tmp_path / "other")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_run_in_half_precision_trains_alike_and_resumes(market, run, tmp_path, precision):
    command = [*market, "--precision", precision, "--epochs", 4, "--eval-every", 0, "--output"]
    launch(train, *command, tmp_path / "whole")
    full, half = (
        [record["loss"] for record in records_of(output)] for output in (run[0], tmp_path / "whole")
    )
    assert full == pytest.approx(half, rel=0.05)
    assert full != half
    with cut_off_before(2):
        launch(train, *command, tmp_path / "cut")
    launch(train, "--output", tmp_path / "cut", "--resume")
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    scaler = checkpoint_of(tmp_path / "cut")["scaler"]
    assert scaler == checkpoint_of(tmp_path / "whole")["scaler"]
    assert ("scale" in scaler) == (precision == "fp16")
    assert (
        precision == "bf16" or scaler["scale"] < 2**16 or scaler["_growth_tracker"] == 4
    )  # steps, in both parts


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    def half(state, path):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    train.save({"epoch": 1}, tmp_path / "last.pt")
    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="No space left"):
        train.save({"epoch": 2}, tmp_path / "last.pt")
    assert checkpoint_of(tmp_path) == {"epoch": 1}


@forks
def test_two_writers_on_one_folder_never_leave_a_damaged_checkpoint(tmp_path):
    train.save({"rank": -1, "x": torch.zeros(50_000)}, tmp_path / "last.pt")

    def write(rank):
        for _ in range(150):
            train.save({"rank": rank, "x": torch.full((50_000,), rank)}, tmp_path / "last.pt")

    writers = mp.start_processes(write, nprocs=2, join=False, start_method="fork")
    ranks = set()
    while any(process.is_alive() for process in writers.processes) or not ranks:
        state = checkpoint_of(tmp_path)
        assert (state["x"] == max(state["rank"], 0)).all()
        ranks.add(state["rank"])
    writers.join()
    assert ranks & {0, 1}
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


# ---------- What is wrong is told in one line -----------------------------------------------------
def move(folder):
    """Images into folders by identity."""
    for path in list(folder.iterdir()):
        path.rename(touch(folder / path.name[:4]) / path.name)


def remove(market, pattern):
    for path in market.glob(pattern):
        path.unlink()


IMAGE = "bounding_box_train/0001_c1s1_000000_00.jpg"
ERRORS = {  # what is done to the folder of market1501, flags, the line
    "missing": (
        shutil.rmtree,
        [],
        "market1501: found no folder named like 'market 1501' with bounding_box_train, ",
    ),
    "empty": (lambda m: remove(m, "query/*"), [], r"/query holds no images \(.jpg, .*\)$"),
    "nested": (
        lambda m: move(m / "query"),
        [],
        "/query holds no images .*; move them up out of subfolders",
    ),
    "name": (
        lambda m: touch(m / "query", "me.jpg"),
        [],
        "/query/me.jpg: the name must be <identity>_c<camera>_",
    ),
    "no match": (
        lambda m: remove(m, "[bq][ou]*/005*_c2*"),
        [],
        "market1501: no query has a match from another cam",
    ),
    "few": (lambda m: None, ["--ids-per-batch", 8], "4 identities, but a batch needs 8"),
    "unreadable": (
        lambda m: (m / IMAGE).write_text(""),
        [],
        f"cannot read the image .*{IMAGE}: .*; replace or remove",
    ),
    "in a worker": (
        lambda m: (m / IMAGE).write_text(""),
        ["--workers", 1],
        f"cannot read the image .*{IMAGE}: .*; re",
    ),
}


def error_of(program, *arguments):
    """The one line with which train.py or evaluate.py ends."""
    with (
        mock.patch.object(sys, "argv", [program, *map(str, arguments)]),
        mock.patch.object(model, "SONANet", Tiny),
        mock.patch.object(evaluate, "SONANet", Tiny),
        pytest.raises(SystemExit) as exit,
    ):
        runpy.run_path(str(HERE / program), run_name="__main__")
    assert isinstance(exit.value.code, str) and "\n" not in exit.value.code
    return exit.value.code


@pytest.mark.parametrize("damage", ERRORS)
def test_data_that_cannot_be_used_end_training_in_one_line(market, tmp_path, damage):
    shutil.copytree(market[3] / "market1501", tmp_path / "market1501")
    do, flags, message = ERRORS[damage]
    do(tmp_path / "market1501")
    every = [
        "--images-per-id",
        4,
        "--eval-every",
        0,
        "--epochs",
        1,
    ]  # so that each image is in the batch
    line = error_of(
        "train.py", *market, "--data-dir", tmp_path, *every, *flags, "--output", tmp_path / "run"
    )
    assert re.match(f"error: .*{message}", line), line
    assert not (tmp_path / "run/last.pt").exists()


def test_evaluation_and_programs_tell_it_in_one_line_too(market, run, tmp_path):
    shutil.copytree(market[3] / "market1501", tmp_path / "market1501")
    (touch(tmp_path, "notes.txt") / "market1501/query/0050_c1s1_000000_00.jpg").write_text(
        "not an image"
    )
    of_image = "error: cannot read the image .*0050_c1s1_000000_00.jpg: "
    assert re.match(
        of_image, error_of("evaluate.py", run[0], "--data-dir", tmp_path, "--workers", 1)
    )
    assert re.match(
        "error: dukemtmc: found no folder", error_of("evaluate.py", run[0], "--dataset", "dukemtmc")
    )
    photos = ["--query", tmp_path / "notes.txt", "--gallery", tmp_path]
    assert re.match(r"error: no images \(.jpg, ", error_of("evaluate.py", run[0], *photos))
    told, status = python(__file__, "evaluate.py", run[0], "--data-dir", tmp_path, "--workers", 1)
    assert re.fullmatch(f"{of_image}.*\n", told), told
    assert status == 1


# ---------- Evaluation ----------------------------------------------------------------------------
def test_evaluate_prints_the_runs_own_figures(run, tmp_path, capsys):
    launch(evaluate, run[0], "--workers", 0)
    whole = capsys.readouterr().out
    assert run[1].split("\ntrained    ")[-1].splitlines()[0].strip() in whole.splitlines()[-1]
    state = checkpoint_of(run[0])
    train.save(
        state | {"history": state["history"][:3]}, tmp_path / "last.pt"
    )  # of a run that goes on
    launch(evaluate, tmp_path, "--workers", 0)
    note = f"note: {tmp_path} has trained for 3 of 4 epochs\n"
    assert capsys.readouterr().out.splitlines()[:-1] == (note + whole).splitlines()[:-1]


def test_several_runs_have_a_mean_and_a_standard_deviation(market, run, tmp_path, capsys):
    launch(
        train,
        *market,
        "--epochs",
        4,
        "--eval-every",
        0,
        "--seed",
        1,
        "--sona",
        "none",
        "--output",
        tmp_path,
    )
    capsys.readouterr()
    launch(evaluate, run[0], tmp_path, "--workers", 0)
    lines = capsys.readouterr().out.splitlines()[-4:]
    first, second, mean, deviation = ([float(x) for x in line.split()[-7::2]] for line in lines)
    assert first != second
    np.testing.assert_allclose(mean, np.mean([first, second], 0), atol=0.011)
    np.testing.assert_allclose(
        deviation, np.abs(np.subtract(first, second)) / 2, atol=0.011
    )  # population, of two
    with pytest.raises(AssertionError, match="no SONA module"):
        launch(evaluate, tmp_path, "--attention", tmp_path / "attention.png")


def size_of(picture):
    """Columns and rows of tiles."""
    width, height = Image.open(picture).size
    return (width - 4) / (evaluate.TILE[0] + 14), (height - 32) / (evaluate.TILE[1] + 52)


def test_a_data_set_is_ranked_and_drawn(run, datasets, tmp_path, capsys):
    pictures = [tmp_path / "ranking.png", tmp_path / "attention.png"]
    launch(evaluate, run[0], "--workers", 0, "--ranking", pictures[0])
    launch(evaluate, run[0], "--attention", pictures[1])
    assert [size_of(picture) for picture in pictures] == [(6, 6), (6, 6)]
    capsys.readouterr()
    launch(evaluate, run[0], "--workers", 0, "--dataset", "toy", "--data-dir", datasets)
    assert re.match("toy .*\n  train +768 +64 +4\n", capsys.readouterr().out)


def test_your_own_photos_are_ranked(run, tmp_path, capsys):
    album, query = tmp_path / "album", tmp_path / "album/1/a b.jpg"
    for person in range(3):
        touch(album / f"{person}", "notes.txt", "._a b.jpg")
        data.draw_pedestrian(person, 1, 0).save(album / f"{person}" / "a b.jpg")
    data.draw_pedestrian(1, 1, 0).save(album / "1/c.webp", lossless=True)
    flags = [
        "--query",
        query,
        "--gallery",
        album,
        "--workers",
        0,
        "--ranking",
        tmp_path / "ranking.png",
    ]
    launch(evaluate, run[0], *flags)
    asked, *found = capsys.readouterr().out.splitlines()
    assert [asked, *found[0].split(maxsplit=1)] == [str(query), "0.000", str(query)]
    distances = [float(line.split()[0]) for line in found]
    assert distances == sorted(distances) and len(distances) == 4
    assert size_of(tmp_path / "ranking.png") == (5, 1)
    launch(evaluate, run[0], "--attention", tmp_path / "attention.png", "--query", query, query)
    assert size_of(tmp_path / "attention.png") == (6, 2)
    for alone in (["--query", query], ["--gallery", album]):
        with pytest.raises(SystemExit):
            launch(evaluate, run[0], *alone)
        assert "--query and --gallery go together" in capsys.readouterr().err


# ---------- README, and copying -------------------------------------------------------------------
def msmt17(root):
    """A stand-in for MSMT17_V1: four images of each of four people to train on, and of three others."""
    for part, people, lists in (("train", 4, ("train", "val")), ("test", 3, ("query", "gallery"))):
        lines = []
        for person, frame, camera in product(range(people), (0, 1), (1, 2)):
            name = f"{person:04d}_{len(lines) % 4:03d}_{camera:02d}_0303morning_000{frame}_0.jpg"
            data.draw_pedestrian(person, camera, frame).save(
                touch(root / part / f"{person:04d}") / name
            )
            lines.append(f"{person:04d}/{name} {person}\n")
        for i, name in enumerate(lists):  # one camera in one list, the other in the other
            (root / f"list_{name}.txt").write_text("".join(lines[i::2]))


def test_readmes_python_runs_as_it_stands(run, datasets, tmp_path, monkeypatch):
    """Each block, where its runs and data are; what stands inside a file of ours finds that file's names."""
    for name in ("cuhk03", "toy"):
        shutil.copytree(run[0], tmp_path / "runs" / name)
    shutil.copytree(datasets, tmp_path / "datasets")
    data.draw_pedestrian(1, 1, 1).save(tmp_path / "a.jpg")
    msmt17(tmp_path / "MSMT17_V1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "SONANet", Tiny)
    within = {**vars(data), **vars(losses), **vars(model), "__name__": "__main__"}
    within |= {
        "losses": {},
        "branch": "global",
        "embedding": torch.ones(2, 4),
        "labels": torch.zeros(2),
    }
    blocks = re.findall(
        r"^```python\n(.*?)^```$", (HERE / "README.md").read_text(), re.DOTALL | re.MULTILINE
    )
    known = {*DATASETS}
    with mock.patch.dict(PLACEMENTS), mock.patch.dict(DROPS), mock.patch.dict(DATASETS):
        for block in blocks:
            exec(compile(block, "README.md", "exec"), dict(within))
        for name in PLACEMENTS.keys() - set(SONAS):
            assert SONANet(4, name).eval()(torch.rand(1, 3, 32, 16)).shape == (1, 1536)
        for name in DATASETS.keys() - known:
            assert len(load_dataset(name, tmp_path)["train"].paths) == 16
    for program in tmp_path.glob("*.pt2"):
        embedding = torch.export.load(program).module()(images := torch.rand(3, 3, 32, 16))
        torch.testing.assert_close(embedding, evaluate.load_run("runs/cuhk03")[0](images))


def test_files_work_when_copied_alone_and_the_ranking_with_numpy_alone(tmp_path):
    ranking = "evaluate_ranking(np.eye(2), np.eye(2), [1, 2], [1, 2], [1, 1], [2, 2])"
    code = "import sys\nimport numpy as np\nfrom typing import NamedTuple\n"
    code += "".join(map(inspect.getsource, (evaluate.Ranking, evaluate_ranking)))
    code += f"assert {ranking}.mean_ap == 1 and 'torch' not in sys.modules\nimport torch\n"
    for file, use in (
        ("model", "SONANet(5).eval()(torch.rand(1, 3, 64, 32)).shape == (1, 1536)"),
        ("losses", "batch_hard_triplet_loss(torch.eye(4), torch.tensor([0, 0, 1, 1])) > 0"),
        ("data", "len(list(IdentitySampler(torch.arange(99)))) == 3"),
    ):
        shutil.copy(HERE / f"{file}.py", touch(tmp_path / file))
        code += f"sys.path[0] = {file!r}\nfrom {file} import *\nassert {use}\n"
    assert python("-c", code, folder=tmp_path) == ("", 0)


if (
    __name__ == "__main__"
):  # python test_model.py train.py ...: the program with Tiny in SONANet's place
    model.SONANet = evaluate.SONANet = Tiny
    sys.argv = sys.argv[1:]
    runpy.run_path(str(HERE / sys.argv[0]), run_name="__main__")
