# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors of SONA-Net in plain PyTorch
"""The paper's equations and this repository's promises, as tests: `pytest test_model.py`.

Part one is the paper, in the order of the files: the network, the losses, the data, the schedule
and the training step, the ranking. Part two is the programs, on a tiny network: what they write and
print, and a test for each promise of README.
"""

import inspect
import json
import math
import os
import pickle
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from copy import deepcopy
from itertools import product
from pathlib import Path
from unittest import mock

# Bit-exact promises hold on a CPU only. Some builds of OpenBLAS hang when a process with running
# threads forks.
os.environ.update(CUDA_VISIBLE_DEVICES="", OPENBLAS_NUM_THREADS="1")

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.models import ResNet50_Weights, resnet50

import data
import evaluate
import losses
import model
import train
from data import DATASETS, FOLDERS, IdentitySampler, ImageDataset, augment, cutout, normalize
from evaluate import evaluate_ranking, extract_features
from losses import batch_hard_triplet_loss, branch_losses
from model import DROPS, PLACEMENTS, SONA, BatchDropBlock, DropBlockPlus, SONANet
from train import Passes, learning_rate

HERE = Path(__file__).parent
torch.set_num_threads(1)  # another number of threads rounds sums differently


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ========== Part one: the paper ===================================================================


# ---------- SONA (Sec. 2.2) -----------------------------------------------------------------------


@pytest.fixture
def sona():
    """A SONA block whose parameters are all random."""
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


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_sona_and_its_gradients_match_equations_1_to_3(sona, layout):
    x = 3 * torch.randn(2, 16, 6, 4, dtype=torch.float64)
    x = x.to(memory_format=layout).requires_grad_()
    weights = torch.randn_like(x)
    results = []
    for y in (sona(x), sona_by_the_paper(sona, x)):
        gradients = torch.autograd.grad((y * weights).sum(), [x, *sona.parameters()])
        results.append([y, *gradients])
    torch.testing.assert_close(*results)
    assert (sona(x) - x).abs().max() > 0.1


def test_attention_is_the_softmax_of_equation_2(sona):
    x = 3 * torch.randn(2, 16, 6, 4, dtype=torch.float64)
    torch.testing.assert_close(sona.attention(x), attention_by_the_paper(sona, x))
    torch.testing.assert_close(sona.attention(x).sum(2), torch.ones(2, 24, dtype=torch.float64))


def test_sona_has_the_papers_layers():
    sona = SONA(32, reduction=4)
    convolution, norm, activation = sona.theta
    assert convolution.weight.shape == sona.g.weight.shape == (8, 32, 1, 1)
    assert sona.p.weight.shape == (32, 8, 1, 1)
    assert isinstance(norm, nn.BatchNorm2d)
    assert isinstance(activation, nn.LeakyReLU)
    assert activation.negative_slope == 0.01


def test_sona_starts_as_the_identity():
    x = torch.randn(2, 32, 6, 4)
    assert torch.equal(SONA(32)(x), x)


def test_sona_never_holds_the_attention_matrix():
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            results = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in tree_leaves(results) if isinstance(x, torch.Tensor))
            return results

    sona = SONA(16)
    x = torch.randn(1, 16, 48, 16, requires_grad=True)
    with Sizes():
        sona(x).sum().backward()
    assert x.numel() <= max(sizes) < 768 * 768  # the map was seen, and no (HW, HW)


# ---------- Drop layers (Sec. 2.1, 3.4) -----------------------------------------------------------


def test_dropblock_plus_drops_whole_blocks_of_an_image():
    y = DropBlockPlus()(torch.ones(500, 3, 48, 16))
    assert torch.equal(y[:, 0], y[:, 2])  # one mask for all channels
    dropped = y[:, 0] == 0  # (B, 48, 16)
    assert len({mask.numpy().tobytes() for mask in dropped}) > 250  # but not for all images
    # Every dropped position lies in a 5 x 8 block that is dropped whole.
    blocks = F.avg_pool2d(dropped.float()[:, None], (5, 8), stride=1) == 1
    covered = F.max_pool2d(F.pad(blocks.float(), (7, 7, 4, 4)), (5, 8), stride=1)[:, 0] > 0
    assert torch.equal(covered, dropped)


def test_dropblock_plus_drops_the_share_of_dropblocks_equation_1():
    y = DropBlockPlus()(torch.ones(2000, 1, 48, 16))
    corner_rate = 0.1 / (5 * 8) * (48 * 16) / (44 * 9)
    # How many corners have a block that covers a position, which is kept if none of them is drawn.
    corners = F.conv_transpose2d(torch.ones(1, 1, 44, 9), torch.ones(1, 1, 5, 8))[0, 0]
    expected = (1 - (1 - corner_rate) ** corners).mean().item()
    assert 0.09 < expected < 0.1
    assert (y == 0).float().mean().item() == pytest.approx(expected, abs=0.003)


def test_dropblock_plus_keeps_the_mean():
    y = DropBlockPlus()(torch.ones(200, 1, 48, 16))
    assert len(y.unique()) == 2  # 0, and one factor for all images
    assert y.mean().item() == pytest.approx(1)
    assert (DropBlockPlus(drop_rate=100)(torch.ones(2, 1, 8, 4)) == 0).all()  # all is dropped


def test_dropblock_plus_cuts_its_block_to_a_smaller_map():
    y = DropBlockPlus(drop_rate=0.5)(torch.ones(200, 1, 8, 4))
    assert ((y == 0).all(3) == (y == 0).any(3)).all()  # whole rows of 4, as 8 do not fit
    assert (y == 0).any() and (y > 0).any()


def test_batch_drop_block_drops_one_rectangle():
    corners = set()
    for _ in range(50):
        y = BatchDropBlock(height_ratio=0.2, width_ratio=0.5)(torch.ones(3, 2, 48, 16))
        assert torch.equal(y, y[:1, :1].expand_as(y))  # the same for all images
        rows, columns = torch.nonzero(y[0, 0] == 0, as_tuple=True)
        corners.add((rows[0].item(), columns[0].item()))
        expected = torch.ones(48, 16)
        expected[rows[0] : rows[0] + 9, columns[0] : columns[0] + 8] = 0  # 0.2 x 48 is 9.6
        assert torch.equal(y[0, 0], expected)
    assert len(corners) > 25


@pytest.mark.parametrize(
    ("drop", "kind", "settings"),
    [
        ("none", nn.Identity, {}),
        ("dropblock", DropBlockPlus, {"drop_rate": 0.1, "block_height": 7, "block_width": 7}),
        ("dropblock+", DropBlockPlus, {"drop_rate": 0.1, "block_height": 5, "block_width": 8}),
        ("bfe", BatchDropBlock, {"height_ratio": 0.2, "width_ratio": 1}),
    ],
)
def test_drop_layers_act_in_training_only(drop, kind, settings):
    layer = DROPS[drop]()
    x = torch.ones(20, 1, 48, 16)
    assert type(layer) is kind
    assert {name: getattr(layer, name) for name in settings} == settings
    assert torch.equal(layer(x), x) == (drop == "none")
    assert torch.equal(layer.eval()(x), x)


# ---------- The network (Sec. 2.1, 3.3, 3.4) ------------------------------------------------------


def seen(network, images, *names):
    """The inputs and outputs of a network's modules in a forward pass."""
    found = {}
    hooks = []
    for name in names:

        def remember(_, inputs, output, name=name):
            found[name] = inputs[0], output

        hooks.append(network.get_submodule(name).register_forward_hook(remember))
    with torch.no_grad():
        network(images)
    for hook in hooks:
        hook.remove()
    return [found[name] for name in names]


SONAS = {  # --sona: the channels of the modules after each place
    "none": {},
    "2": {"stage2": 512},
    "3": {"stage3": 1024},
    "2+3": {"stage2": 512, "stage3": 1024},
    "4-global": {"global": 2048},
    "4-local": {"local": 2048},
    "4-both": {"global": 2048, "local": 2048},
}


@pytest.mark.parametrize("sona", SONAS)
def test_the_network_has_the_papers_layers(sona):
    network = SONANet(10, sona)
    images = torch.randn(2, 3, 64, 32)
    outputs = network(images)
    shapes = {branch: [tuple(x.shape) for x in pair] for branch, pair in outputs.items()}
    assert shapes == {"global": [(2, 512), (2, 10)], "local": [(2, 1024), (2, 10)]}
    assert all((embedding >= 0).all() for embedding, _ in outputs.values())  # after a ReLU
    assert network.eval()(images).shape == (2, 1536)
    parameters = 23_508_032  # ResNet-50 without its classifier
    parameters += 2 * 2048 * 512 + 9 * 512 * 512 + 2 * (512 + 512 + 2048)  # bottleneck
    parameters += 2048 * 512 + 2 * 512 + 2048 * 1024 + 2 * 1024  # reductions, without bias
    parameters += 10 * (512 + 1) + 10 * (1024 + 1)  # classifiers
    for c in SONAS[sona].values():
        d = c // 2
        parameters += c * d + 2 * d + (c * d + d) + (d * c + c)  # theta with batch norm, g, p
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


@pytest.mark.parametrize("sona", SONAS)
def test_sona_stands_where_the_paper_puts_it(sona):
    network = SONANet(10, sona).eval()
    for module in network.modules():
        if isinstance(module, SONA):
            nn.init.normal_(module.p.weight)
    for place in ("stage2", "stage3", "global", "local"):
        ((x, y),) = seen(network, torch.randn(2, 3, 64, 32), f"{place}_sona")
        assert torch.equal(x, y) == (place not in SONAS[sona])


def test_modules_follow_each_other_as_in_figure_2():
    network = SONANet(10, "4-both").eval()
    for module in (network.global_sona, network.local_sona):
        nn.init.normal_(module.p.weight)
    trunk = ["stem", "stage1", "stage2", "stage2_sona", "stage3", "stage3_sona", "stage4"]
    chains = [
        trunk + ["global_sona", "global_reduction"],
        trunk + ["local_sona", "local_bottleneck", "drop", "local_reduction"],
    ]
    images = torch.randn(2, 3, 64, 32)
    embeddings = []
    for chain, pool in zip(chains, [torch.mean, torch.amax], strict=True):
        *modules, (pooled, embedding) = seen(network, images, *chain)
        outputs = [images, *(y for _, y in modules)]
        assert all(torch.equal(x, y) for (x, _), y in zip(modules, outputs, strict=False))
        torch.testing.assert_close(pooled, pool(outputs[-1], (2, 3), keepdim=True))
        embeddings.append(embedding)
    assert torch.equal(network(images), torch.cat(embeddings, 1))


def test_stages_3_and_4_keep_the_map_by_dilation():
    network = SONANet(10)
    for stage, dilations in ((network.stage3, [1] + 5 * [2]), (network.stage4, [2, 4, 4])):
        assert [block.conv2.dilation[0] for block in stage] == dilations
    stages = ("stage2", "stage3", "stage4", "local_bottleneck")
    outputs = seen(network.eval(), torch.randn(1, 3, 384, 128), *stages)
    maps = [tuple(y.shape) for _, y in outputs]
    assert maps == [(1, channels, 48, 16) for channels in (512, 1024, 2048, 2048)]
    assert network.local_bottleneck.conv2.dilation == (1, 1)


def test_classifiers_start_undecided():
    network = SONANet(767)
    for _, logits in network(torch.randn(4, 3, 64, 32)).values():
        assert abs(F.cross_entropy(logits, torch.arange(4)) - math.log(767)) < 0.05
    for classifier in (network.global_classifier, network.local_classifier):
        assert classifier.weight.std().item() == pytest.approx(0.001, rel=0.02)
        assert not classifier.bias.any()


def test_residual_branches_start_at_zero_without_weights():
    assert all(block.bn3.weight.abs().max() == 0 for block in SONANet(10).stage3)


@pytest.mark.parametrize("weights", ["imagenet", "resnet50.pth", "headless.pth"])
def test_training_starts_from_resnet_weights(tmp_path, monkeypatch, weights):
    torch.manual_seed(1)
    state = resnet50().state_dict()
    asked = []

    def get_state_dict(self, **options):
        asked.append((self.name, options))
        return state

    monkeypatch.setattr(ResNet50_Weights, "get_state_dict", get_state_dict)
    if weights != "imagenet":
        weights = tmp_path / weights
        headless = weights.name == "headless.pth"
        torch.save({k: x for k, x in state.items() if not (headless and k[:3] == "fc.")}, weights)
    ours = SONANet(10, weights=weights).state_dict()
    assert torch.equal(ours["stem.0.weight"], state["conv1.weight"])
    for name in ("1.0.bn1.running_mean", "2.1.conv2.weight", "3.5.bn3.bias", "4.2.bn3.running_var"):
        assert torch.equal(ours[f"stage{name}"], state[f"layer{name}"])
    if weights == "imagenet":
        assert asked == [("IMAGENET1K_V1", {"check_hash": True, "weights_only": True})]


def test_fine_tuning_takes_a_run_without_its_classifiers(tmp_path):
    trained = SONANet(5, "3")
    nn.init.normal_(trained.stage3_sona.p.weight)
    torch.save({"network": trained.state_dict()}, tmp_path / "last.pt")
    ours = SONANet(7, "3", weights=tmp_path / "last.pt")
    assert len(ours.global_classifier.weight) == 7
    for name, tensor in trained.state_dict().items():
        assert "classifier" in name or torch.equal(ours.state_dict()[name], tensor)
    with pytest.raises(RuntimeError, match="Missing.*stage2_sona"):
        SONANet(7, "2", weights=tmp_path / "last.pt")


# ---------- Losses (Sec. 2.1) ---------------------------------------------------------------------


def triplet_by_brute_force(embeddings, labels, margin):
    terms = []
    for anchor, label in zip(embeddings, labels, strict=True):
        distances = [(anchor - other).square().sum().add(1e-30).sqrt() for other in embeddings]
        positive = max(d for d, other in zip(distances, labels, strict=True) if other == label)
        negative = min(d for d, other in zip(distances, labels, strict=True) if other != label)
        gap = positive - negative
        terms.append(torch.log(1 + gap.exp()) if margin is None else (gap + margin).clamp(min=0))
    return torch.stack(terms).mean()


@pytest.mark.parametrize("margin", [None, 0.3, 2.0])
def test_triplet_loss_matches_brute_force(margin):
    labels = torch.tensor([0, 1, 2, 3] * 3)
    apart = torch.tensor([0, 0, 9, 18])[labels, None]  # two identities lie among each other
    embeddings = (torch.randn(12, 5, dtype=torch.float64) + apart).requires_grad_()
    results = []
    for triplet_loss in (batch_hard_triplet_loss, triplet_by_brute_force):
        loss = triplet_loss(embeddings, labels, margin)
        results.append([loss, *torch.autograd.grad(loss, embeddings)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("embeddings", "labels", "margin", "expected"),
    [
        (torch.ones(4, 5), [0, 0, 1, 1], None, math.log(2)),  # collapsed
        (torch.ones(4, 5), [0, 0, 1, 1], 0.3, 0.3),
        (torch.tensor([[0.0], [3.0]]), [0, 1], None, math.log(1 + math.exp(-3))),  # no positive
        (torch.tensor([[0.0], [3.0]]), [0, 0], None, 0),  # no negative
    ],
)
def test_triplet_loss_without_distances_positives_or_negatives(
    embeddings, labels, margin, expected
):
    embeddings = embeddings.clone().requires_grad_()
    loss = batch_hard_triplet_loss(embeddings, torch.tensor(labels), margin)
    loss.backward()
    assert loss.item() == pytest.approx(expected)
    assert embeddings.grad.isfinite().all()


def test_triplet_loss_refuses_labels_of_another_shape():
    with pytest.raises(ValueError, match=r"expected \(B, D\) and \(B,\)"):
        batch_hard_triplet_loss(torch.ones(4, 5), torch.zeros(1))


def test_triplet_loss_is_in_float32_and_exact_far_from_the_origin():
    labels = torch.tensor([0, 1, 2, 3] * 3)
    embeddings = torch.randint(-8, 8, (12, 5)) / 4  # bfloat16 and float32 hold them exactly
    expected = batch_hard_triplet_loss(embeddings, labels)
    torch.testing.assert_close(batch_hard_triplet_loss(embeddings + 4096, labels), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(batch_hard_triplet_loss(embeddings.bfloat16(), labels), expected)


@pytest.mark.parametrize("margin", [None, 0.3])
def test_the_loss_is_the_sum_of_four(margin):
    labels = torch.tensor([0, 1, 2] * 2)
    outputs = {
        "global": (torch.randn(6, 512), torch.randn(6, 3)),
        "local": (torch.randn(6, 1024), torch.randn(6, 3)),
    }
    expected = {}
    for branch, (embedding, logits) in outputs.items():
        target = 0.9 * F.one_hot(labels) + 0.1 / 3  # label smoothing of 0.1 [36]
        expected[f"{branch}_cross_entropy"] = -(target * logits.log_softmax(1)).sum(1).mean()
        expected[f"{branch}_triplet"] = triplet_by_brute_force(embedding, labels, margin)
    expected["loss"] = sum(expected.values())
    for branch, (_, logits) in outputs.items():
        expected[f"{branch}_accuracy"] = (logits.argmax(1) == labels).float().mean()
    loss, parts = branch_losses(outputs, labels, margin)
    torch.testing.assert_close(parts, expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(loss, parts["loss"])


# ---------- Data (Sec. 3.1, 3.2) ------------------------------------------------------------------


def touch(folder, *names):
    """Makes a folder and empty files in it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def test_the_counts_are_those_of_table_1():
    assert DATASETS["market1501"].counts == {
        "train": (12936, 751),
        "query": (3368, 750),
        "gallery": (19732 - 3819, 750),
    }
    assert DATASETS["cuhk03"].counts == {
        "train": (7368, 767),
        "query": (1400, 700),
        "gallery": (5328, 700),
    }
    assert DATASETS["cuhk03-detected"].counts == {
        "train": (7365, 767),
        "query": (1400, 700),
        "gallery": (5332, 700),
    }
    assert DATASETS["dukemtmc"].counts == {
        "train": (16522, 702),
        "query": (2228, 702),
        "gallery": (17661, 1110),
    }


def test_file_names_say_identity_and_camera(tmp_path):
    names = {
        "-1_c3s2_000112_02.jpg": None,  # junk
        "0000_c6s4_002202_01.jpg": (0, 6),  # a distractor stays
        "0002_c1s1_000451_03.jpg": (2, 1),  # Market-1501
        "0005_c8_f0046182.JPG": (5, 8),  # DukeMTMC-reID
        "1467_c2_10.png": (1467, 2),  # CUHK03-NP
        "Thumbs.db": None,
    }
    split = data.read_split(touch(tmp_path, *names))
    expected = {str(tmp_path / name): who for name, who in names.items() if who}
    who = zip(split.ids.tolist(), split.cams.tolist(), strict=True)
    assert dict(zip(split.paths, who, strict=True)) == expected
    assert split.labels.tolist() == [0, 1, 2, 3]


def test_what_is_found_is_described_beside_what_is_published(tmp_path):
    folder = tmp_path / DATASETS["market1501"].folder
    touch(folder / "bounding_box_train", "0000_c1s1_1.jpg", "0001_c1s1_1.jpg")
    touch(folder / "query", "0001_c1s1_1.jpg")
    touch(folder / "bounding_box_test", "0000_c1s1_1.jpg", "0001_c1s1_1.jpg", "0001_c2s1_1.jpg")
    splits = data.load_dataset("market1501", tmp_path)
    _, train_line, query_line, gallery_line, from_line = data.describe(
        "market1501", splits
    ).splitlines()
    assert train_line.split() == "train 2 2 1 published: 12,936 and 751".split()
    assert query_line.split() == "query 1 1 1 published: 3,368 and 750".split()
    assert gallery_line.split() == "gallery 3 1 2 published: 15,913 and 750".split()  # without 0
    assert from_line == f"from {folder}"


@pytest.mark.parametrize("size", [(96, 48), (384, 128)])
def test_images_are_resized_as_pillow_does(tmp_path, size):
    height, width = size
    picture = data.draw_pedestrian(1, 1, 1)
    picture.save(tmp_path / "a.png")
    image, label = ImageDataset([tmp_path / "a.png"], [7], height, width)[0]
    expected = picture.resize((width, height), Image.Resampling.BILINEAR)
    difference = image.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected)
    assert (image.shape, image.dtype, label) == ((3, height, width), torch.uint8, 7)
    assert np.abs(difference).max() <= 2


def test_grey_images_load_as_rgb(tmp_path):
    Image.new("L", (4, 8), 77).save(tmp_path / "grey.jpg")
    image = data.read_image(tmp_path / "grey.jpg")
    assert torch.equal(image, torch.full((3, 8, 4), 77, dtype=torch.uint8))


def test_normalisation_is_imagenets():
    image = torch.tensor([255, 0, 128], dtype=torch.uint8)[None, :, None, None]
    expected = (torch.tensor([1, 0, 128 / 255]) - torch.tensor([0.485, 0.456, 0.406])) / (
        torch.tensor([0.229, 0.224, 0.225])
    )
    torch.testing.assert_close(normalize(image).flatten(), expected)


@pytest.mark.parametrize(("height", "width", "side"), [(384, 128, 64), (96, 32, 16)])
def test_cutout_fills_one_square_of_half_the_images_with_0(height, width, side):
    images = cutout(torch.ones(400, 3, height, width))
    assert torch.equal(images[:, 0], images[:, 2])
    corners = []
    for image in images[:, 0]:
        rows, columns = torch.nonzero(image == 0, as_tuple=True)
        if len(rows):
            corners.append((rows[0].item(), columns[0].item()))
            expected = torch.ones(height, width)
            expected[rows[0] : rows[0] + side, columns[0] : columns[0] + side] = 0
            assert torch.equal(image, expected)
    assert 150 < len(corners) < 250
    assert len(set(corners)) > 100
    columns = {column for _, column in corners}
    assert (min(columns), max(columns)) == (0, width - side)  # inside, up to both edges


def test_augmentation_flips_half_the_images_and_normalises():
    images = torch.randint(256, (400, 3, 24, 8), dtype=torch.uint8)
    augmented = augment(images)
    cut = augmented == 0
    straight = ((augmented == normalize(images)) | cut).flatten(1).all(1)
    mirrored = ((augmented == normalize(images.flip(3))) | cut).flatten(1).all(1)
    assert (straight ^ mirrored).all()
    assert 150 < mirrored.sum() < 250
    assert cut.any() and cut.float().mean((1, 2, 3)).max() < 0.1


LABELS = [label for label in range(10) for _ in range(2 + label % 4)]  # identities of 2 to 5 images


def test_a_batch_is_p_identities_of_k_images_and_an_epoch_has_each_identity_once():
    sampler = IdentitySampler(LABELS, ids_per_batch=3, images_per_id=4)
    drawn = np.reshape(list(sampler), (-1, 4))  # a row for each identity: its K images
    assert len(drawn) == 3 * len(sampler) == 3 * (10 // 3)
    people = [{LABELS[image] for image in images} for images in drawn]
    assert all(len(identity) == 1 for identity in people)
    assert len(set.union(*people)) == 9
    for images in drawn:  # none twice where there are enough
        assert len(set(images)) == 4 or LABELS.count(LABELS[images[0]]) < 4


def batches_of(seed, epoch, **share):
    sampler = IdentitySampler(LABELS, 4, 2, seed=seed, **share)
    sampler.set_epoch(epoch)
    return list(sampler)


def test_batches_depend_on_seed_and_epoch():
    assert batches_of(1, 2) == batches_of(1, 2)
    assert batches_of(1, 2) not in (batches_of(1, 3), batches_of(2, 2))


def test_processes_share_a_batch():
    first, second = (batches_of(1, 2, rank=rank, world_size=2) for rank in (0, 1))
    assert [a + b for a, b in zip(first, second, strict=True)] == batches_of(1, 2)
    with pytest.raises(ValueError, match="4 identities are not divisible by 3 processes"):
        batches_of(1, 2, world_size=3)
    with pytest.raises(ValueError, match="10 identities, but a batch needs 11"):
        IdentitySampler(LABELS, ids_per_batch=11)


def test_the_toy_is_drawn_whole_and_the_same_each_time(tmp_path):
    toy = data.load_dataset("toy", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]  # no scratch
    assert "published" not in data.describe("toy", toy)
    assert not set(toy["train"].ids) & set(toy["query"].ids)
    for path, person, camera in list(zip(*toy["query"], strict=True))[::40]:
        again = data.draw_pedestrian(person, camera, 0)
        assert np.array_equal(np.asarray(again), np.asarray(Image.open(path)))


# ---------- The schedule and the training step (Sec. 3.2) -----------------------------------------


def settings_of(*flags):
    with mock.patch.object(sys, "argv", ["train.py", *flags]):
        args, _ = train.parse_args()
    return vars(args)


PAPERS = {
    "dataset": "cuhk03",
    "data_dir": "datasets",
    "height": 384,
    "width": 128,
    "workers": 2,
    "sona": "2",
    "drop": "dropblock+",
    "weights": "imagenet",
    "ids_per_batch": 32,
    "images_per_id": 4,
    "epochs": 400,
    "lr": 1e-3,
    "margin": None,
    "seed": 0,
    "images_per_pass": 32,
    "recompute": False,
    "fp16": False,
    "eval_every": 50,
    "output": "runs/cuhk03",
    "resume": False,
}


def test_the_settings_are_the_papers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert settings_of("--dataset", "cuhk03") == PAPERS


def test_the_toy_has_settings_of_its_own_below_typed_flags(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toy = {"height": 64, "width": 32, "ids_per_batch": 8, "epochs": 30, "eval_every": 10}
    toy |= {"dataset": "toy", "output": "runs/toy", "weights": "none", "workers": 0}
    assert settings_of() == PAPERS | toy
    assert settings_of("--epochs", "7") == PAPERS | toy | {"epochs": 7}


def test_the_learning_rate_is_the_papers():
    warm_up = [1e-4 * step for step in range(1, 11) for _ in range(5)]
    papers = warm_up + 150 * [1e-3] + 100 * [1e-4] + 100 * [1e-5]
    assert [learning_rate(epoch) for epoch in range(400)] == pytest.approx(papers, rel=1e-12)


def test_other_numbers_of_epochs_scale_the_schedule():
    scaled = [0.1, 0.3, 0.5, 0.7, 0.9] + 15 * [1] + 10 * [0.1] + 10 * [0.01]
    rates = [learning_rate(epoch, 40, 2) for epoch in range(40)]
    assert rates == pytest.approx([2 * rate for rate in scaled])


def random_images(number):
    return torch.randint(256, (number, 3, 32, 16), dtype=torch.uint8)


def augmented(images, *rng_key, rank=0):
    """The images as a network sees them in passes of two, and a random number for each pass."""
    network = nn.Module()
    network.forward = lambda images: {"global": (images, torch.rand(1))}
    return Passes(network, 2, rank)(images, rng_key)["global"]


def test_random_numbers_are_a_function_of_seed_epoch_step_and_pass():
    images = random_images(8)
    first = augmented(images, 1, 2, 3)
    torch.rand(5)
    assert all(map(torch.equal, augmented(images, 1, 2, 3), first))
    for other in [(2, 2, 3), (1, 3, 3), (1, 2, 4), (2, 1, 3)]:
        assert not any(map(torch.equal, augmented(images, *other), first))
    assert len(set(first[1].tolist())) == 4  # each pass of a step has its own numbers
    # Two processes of two passes each make the four passes of one process.
    halves = [augmented(images[4 * rank :][:4], 1, 2, 3, rank=rank) for rank in (0, 1)]
    assert all(map(torch.equal, map(torch.cat, zip(*halves, strict=True)), first))


def test_a_pass_must_divide_the_images():
    with pytest.raises(ValueError, match="--images-per-pass 3 must divide a process's 8"):
        Passes(nn.Identity(), 3)(random_images(8), (1, 2, 3))


def test_batch_norm_treats_passes_apart():
    network = SONANet(4, drop="none")
    alone = deepcopy(network)
    images = random_images(8)
    outputs = Passes(network, 4)(images, (0, 0, 0))
    for i in (0, 1):
        # One pass for each process, so that rank i makes it pass i.
        expected = Passes(alone, 4, rank=i)(images[4 * i :][:4], (0, 0, 0))
        for branch in ("global", "local"):
            torch.testing.assert_close(outputs[branch][0][4 * i :][:4], expected[branch][0])


def test_the_first_passs_statistics_are_kept():
    network = SONANet(4, drop="none")
    alone = deepcopy(network)
    images = random_images(8)
    Passes(network, 4)(images, (0, 0, 0))
    Passes(alone, 4)(images[:4], (0, 0, 0))
    assert all(map(torch.equal, network.buffers(), alone.buffers()))
    assert network.stem[1].num_batches_tracked == 1
    Passes(alone, 4, rank=1)(images, (0, 0, 1))  # another process's passes change no statistics
    assert all(map(torch.equal, network.buffers(), alone.buffers()))


def test_recompute_changes_no_bit():
    network = SONANet(4)
    nn.init.normal_(network.stage2_sona.p.weight, std=0.1)
    images = random_images(8)
    results = []
    for recompute in (False, True):
        ours = deepcopy(network)
        outputs = Passes(ours, 2, recompute=recompute)(images, (0, 0, 0))
        loss, _ = branch_losses(outputs, torch.arange(4).repeat_interleave(2))
        loss.backward()
        gradients = [parameter.grad for parameter in ours.parameters()]
        results.append([loss.detach(), *gradients, *ours.buffers()])
    assert all(map(torch.equal, *results))


def test_recompute_holds_one_pass_in_memory():
    model = Passes(Tiny(4), 2, recompute=True)
    numbers = []

    def run_pass(images, rng_key, number):
        numbers.append(number)
        return Passes.run_pass(model, images, rng_key, number)

    model.run_pass = run_pass
    outputs = model(random_images(8), (0, 0, 0))
    branch_losses(outputs, torch.arange(8) // 2)[0].backward()
    # Pass 0 keeps its activations, so it runs last and backward begins with it.
    assert numbers == [3, 2, 1, 0, 1, 2, 3]


# ---------- Ranking (Sec. 3.3) --------------------------------------------------------------------


def rank_by_brute_force(
    query, gallery, query_ids, gallery_ids, query_cams, gallery_cams, max_rank=50
):
    """The protocol in float64, with a full sort; true matches come last among equal distances."""
    cmc = []
    aps = []
    for q, i, c in zip(query.astype(float), query_ids, query_cams, strict=True):
        keep = (gallery_ids != -1) & ~((gallery_ids == i) & (gallery_cams == c))
        distances = ((gallery.astype(float) - q) ** 2).sum(1)[keep]
        hits = gallery_ids[keep] == i
        hits = hits[np.lexsort((hits, distances))]
        if hits.any():
            aps.append(np.mean(np.arange(1, hits.sum() + 1) / (np.flatnonzero(hits) + 1)))
            cmc.append([hits[:k].any() for k in range(1, max_rank + 1)])
        else:
            aps.append(np.nan)
    return np.mean(cmc, 0), np.array(aps)


def random_ranking(queries, gallery, ids):
    """Whole numbers as features, so that many distances tie; with junk (-1), distractors (0) and
    queries without a match."""
    rng = np.random.default_rng(0)
    return dict(
        query_features=rng.integers(0, 4, (queries, 6)).astype(np.float32),
        gallery_features=rng.integers(0, 4, (gallery, 6)).astype(np.float32),
        query_ids=np.r_[-1, 0, rng.integers(1, ids + 1, queries - 2)],
        gallery_ids=rng.integers(-1, ids - 1, gallery),
        query_cams=rng.integers(1, 4, queries),
        gallery_cams=rng.integers(1, 4, gallery),
    )


def test_ranking_matches_brute_force():
    arguments = random_ranking(queries=60, gallery=300, ids=15)
    ranking = evaluate_ranking(**arguments)
    cmc, aps = rank_by_brute_force(*arguments.values())
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


def test_a_collapsed_network_does_not_score():
    arguments = random_ranking(queries=60, gallery=300, ids=15)
    arguments["query_features"] = np.ones((60, 6), np.float32) / 3
    arguments["gallery_features"] = np.ones((300, 6), np.float32) / 3
    assert evaluate_ranking(**arguments).metrics()["rank10"] == 0


def test_ranking_in_several_slabs_is_the_same_ranking():
    arguments = random_ranking(queries=1000, gallery=10_000, ids=3000)
    whole = evaluate_ranking(**arguments).average_precisions  # in slabs of 838 queries
    tail = {name: x[600:] if "query" in name else x for name, x in arguments.items()}
    np.testing.assert_array_equal(whole[600:], evaluate_ranking(**tail).average_precisions)


@pytest.mark.parametrize(("middle", "spread"), [(1000, 1.8), (3000, 1.8), (0.3, 1e-5)])
def test_ranking_is_exact_far_from_the_origin(middle, spread):
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 40, n) for n in (100, 400)]
    faces = rng.normal(size=(40, 64))
    features = [middle + spread * (faces[i] + rng.normal(size=(len(i), 64))) for i in ids]
    features = [x.astype(np.float32) for x in features]
    cams = np.zeros(100, int), np.ones(400, int)
    ranking = evaluate_ranking(*features, *ids, *cams)
    _, aps = rank_by_brute_force(*features, *ids, *cams)
    assert ranking.mean_ap == pytest.approx(aps.mean(), abs=1e-4)


@pytest.mark.parametrize("kind", [np.ndarray.tolist, torch.from_numpy])
def test_ranking_takes_lists_and_tensors(kind):
    arguments = random_ranking(queries=20, gallery=60, ids=5)
    expected = evaluate_ranking(**arguments).average_precisions
    converted = {name: kind(x) for name, x in arguments.items()}
    np.testing.assert_array_equal(evaluate_ranking(**converted).average_precisions, expected)


WITH_INF = np.ones((60, 6))
WITH_INF[30] = np.inf


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"query_ids": np.full(20, 99)}, "no query has a true match"),
        ({"query_features": np.full((20, 6), np.nan)}, "nan, inf or numbers too large"),
        ({"gallery_features": WITH_INF}, "nan, inf or numbers too large"),
        ({"query_cams": np.zeros(7)}, "queries, their ids and their cams differ in length"),
        ({"gallery_ids": np.zeros(7)}, "gallery, its ids and its cams differ in length"),
    ],
)
def test_ranking_refuses_what_it_cannot_rank(changed, message):
    with pytest.raises(ValueError, match=message):
        evaluate_ranking(**random_ranking(queries=20, gallery=60, ids=5) | changed)


def test_features_average_the_image_and_its_mirror_image(tmp_path):
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for person, path in enumerate(paths):
        data.draw_pedestrian(person, 1, 0).save(path)
    network = SONANet(4)
    features = extract_features(network, paths, 64, 32)
    dataset = ImageDataset(paths, [0, 1], 64, 32)
    images = normalize(torch.stack([image for image, _ in dataset]))
    with torch.no_grad():
        straight = network.eval()(images)
        mirrored = network(images.flip(3))
    np.testing.assert_allclose(features, (straight + mirrored) / 2, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(straight, mirrored, rtol=1e-3)


# ========== Part two: the programs ================================================================


class Tiny(nn.Module):
    """A small stand-in for SONANet: the same interface, milliseconds a step."""

    def __init__(self, num_classes, sona="2", drop="dropblock+", weights=None):
        super().__init__()
        attention = next(iter(PLACEMENTS[sona].values()), nn.Identity)(8)  # the first, if any
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8), nn.LeakyReLU(), attention
        )
        self.drop = DROPS[drop]()
        self.global_classifier = nn.Linear(8, num_classes)
        self.local_classifier = nn.Linear(8, num_classes)

    def forward(self, images):
        x = self.trunk(images)
        average = x.mean((2, 3))
        maximum = self.drop(x).amax((2, 3))
        if not self.training:
            return torch.cat([average, maximum], 1)
        return {
            "global": (average, self.global_classifier(average)),
            "local": (maximum, self.local_classifier(maximum)),
        }


def start(program, arguments, processes):
    """Starts processes as torchrun does, but by fork, so that patches made here apply in them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def work(rank):
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        os.environ.update({name: str(number) for name, number in numbers.items()})
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        launch(program, *arguments)

    return mp.start_processes(work, nprocs=processes, join=False, start_method="fork")


def launch(program, *arguments, processes=1):
    """Runs train or evaluate with Tiny, here or in several processes."""
    if processes > 1:
        running = start(program, arguments, processes)
        while not running.join():
            pass
        return
    with (
        mock.patch.object(sys, "argv", [f"{program.__name__}.py", *map(str, arguments)]),
        mock.patch.object(train, "SONANet", Tiny),
        mock.patch.object(evaluate, "SONANet", Tiny),
    ):
        program.main()


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """A folder with a small market1501 of 2 cameras."""
    folder = tmp_path_factory.mktemp("datasets")
    market = folder / DATASETS["market1501"].folder
    for split, people, images in (
        ("train", range(1, 5), (0, 1)),
        ("query", (50, 51, 52), (2,)),
        ("gallery", (50, 51, 52), (0, 1)),
    ):
        touch(market / FOLDERS[split])
        for person, camera, image in product(people, (1, 2), images):
            name = f"{person:04d}_c{camera}s1_{image:06d}_00.jpg"
            data.draw_pedestrian(person, camera, image).save(market / FOLDERS[split] / name)
    return folder


@pytest.fixture(scope="module")
def small(datasets):
    """Flags to train on the small market1501."""
    flags = "--dataset market1501 --height 32 --width 16 --weights none --workers 0 "
    flags += "--ids-per-batch 4 --images-per-id 2 --images-per-pass 4"
    return [*flags.split(), "--data-dir", datasets]


@pytest.fixture(scope="module")
def run(small, tmp_path_factory):
    """The folder of a finished run of 4 epochs."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    launch(train, *small, "--epochs", 4, "--eval-every", 2, "--output", output)
    return output


@contextmanager
def cut_off_before(epoch):
    """In this context, training is interrupted before `epoch`."""

    def rate(now, *rest):
        if now == epoch:
            raise KeyboardInterrupt
        return learning_rate(now, *rest)

    with mock.patch.object(train, "learning_rate", rate), pytest.raises(KeyboardInterrupt):
        yield


def records_of(output):
    """A run's log, without the speed."""
    records = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    for record in records:
        del record["images_per_second"]
    return records


def losses_of(output):
    return [record["loss"] for record in records_of(output)]


def checkpoint_of(output):
    return torch.load(output / "last.pt", weights_only=True)


def assert_same_run(output, other):
    """Asserts the same log, weights and Adam state, bit for bit."""
    assert records_of(output) == records_of(other)
    ours, others = checkpoint_of(output), checkpoint_of(other)
    for part in ("network", "optimizer", "scaler"):
        torch.testing.assert_close(ours[part], others[part], rtol=0, atol=0)


# ---------- A run ---------------------------------------------------------------------------------


def test_a_run_trains_logs_and_evaluates(run):
    records = records_of(run)
    assert [record["epoch"] for record in records] == [0, 1, 2, 3]
    assert [record["lr"] for record in records] == [learning_rate(epoch, 4) for epoch in range(4)]
    metrics = {"mean_ap", "rank1", "rank5", "rank10"}
    for record in records:
        parts = [
            record[f"{branch}_{loss}"]
            for branch, loss in product(("global", "local"), ("triplet", "cross_entropy"))
        ]
        assert record["loss"] == pytest.approx(sum(parts))
        assert {"global_accuracy", "local_accuracy"} < set(record)
        assert metrics & set(record) == (metrics if record["epoch"] in (1, 3) else set())


def test_without_eval_every_only_the_last_epoch_is_evaluated(small, tmp_path):
    launch(train, *small, "--epochs", 3, "--eval-every", 0, "--output", tmp_path)
    assert ["mean_ap" in record for record in records_of(tmp_path)] == [False, False, True]


def test_a_runs_folder_holds_the_checkpoint_and_the_log(run):
    assert sorted(path.name for path in run.iterdir()) == ["last.pt", "log.jsonl"]
    state = checkpoint_of(run)
    assert [record["loss"] for record in state["history"]] == losses_of(run)
    assert state["identities"] == [1, 2, 3, 4]
    assert state["settings"]["output"] == str(run)


def test_each_epoch_draws_its_own_batches(small, datasets, tmp_path, monkeypatch):
    batches = []

    def remember(outputs, labels, margin):
        batches.append(labels.tolist())
        return branch_losses(outputs, labels, margin)

    monkeypatch.setattr(train, "branch_losses", remember)
    launch(train, *small, "--ids-per-batch", 2, "--epochs", 3, "--output", tmp_path)
    labels = data.load_dataset("market1501", datasets)["train"].labels
    sampler = IdentitySampler(labels, ids_per_batch=2, images_per_id=2)
    expected = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        expected += [labels[batch].tolist() for batch in sampler]
    assert batches == expected


def test_adam_has_one_rate_and_one_decay_for_all_parameters(run):
    (group,) = checkpoint_of(run)["optimizer"]["param_groups"]
    assert (group["lr"], group["betas"]) == (learning_rate(3, 4), (0.9, 0.999))
    assert group["weight_decay"] == 5e-4
    assert len(group["params"]) == len([*Tiny(4).parameters()])


@pytest.mark.parametrize(
    "flags",
    [
        ["--sona", "none"],
        ["--drop", "none"],
        ["--margin", 5],
        ["--lr", 0.1],
        ["--seed", 1],
        ["--images-per-pass", 2],
    ],
)
def test_flags_change_the_run(small, run, tmp_path, flags):
    launch(train, *small, "--epochs", 4, "--eval-every", 0, *flags, "--output", tmp_path)
    assert losses_of(tmp_path)[-1] != pytest.approx(losses_of(run)[-1], rel=1e-5)


def test_evaluate_prints_the_runs_own_metrics(run, capsys):
    launch(evaluate, run, "--workers", 0)
    assert capsys.readouterr().out.endswith(f"{evaluate.summary(records_of(run)[-1])}\n")


def test_several_runs_have_a_mean_and_a_standard_deviation(small, run, tmp_path, capsys):
    launch(train, *small, "--epochs", 4, "--seed", 1, "--output", tmp_path)
    capsys.readouterr()
    launch(evaluate, run, tmp_path, "--workers", 0)
    lines = capsys.readouterr().out.splitlines()[-4:]
    four_numbers = [re.findall(r"\d+\.\d+", line) for line in lines]
    first, second, mean, deviation = np.array(four_numbers, dtype=float)
    assert (first != second).any()
    np.testing.assert_allclose(mean, (first + second) / 2, atol=0.011)
    np.testing.assert_allclose(deviation, abs(first - second) / 2, atol=0.011)  # over two, not one


def test_a_run_in_half_precision_is_resumed(small, run, tmp_path):
    command = [*small, "--fp16", "--epochs", 4, "--eval-every", 2, "--output"]
    launch(train, *command, tmp_path / "whole")
    assert losses_of(tmp_path / "whole") == pytest.approx(losses_of(run), rel=0.05)
    assert losses_of(tmp_path / "whole") != losses_of(run)
    with cut_off_before(1):
        launch(train, *command, tmp_path / "cut")
    launch(train, "--output", tmp_path / "cut", "--resume")
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    assert checkpoint_of(tmp_path / "cut")["scaler"]["scale"] > 1


# ---------- Promise 1: the same step on any number of processes -----------------------------------


@pytest.mark.parametrize("variant", [[], ["--drop", "bfe", "--margin", 5]])
def test_one_process_two_and_four_are_the_same_run(small, tmp_path, variant):
    command = [*small, *variant, "--images-per-pass", 2, "--epochs", 2, "--eval-every", 1]
    for processes in (1, 2, 4):
        launch(train, *command, "--output", tmp_path / f"{processes}", processes=processes)
    for processes in (2, 4):
        for record, expected in zip(
            records_of(tmp_path / f"{processes}"), records_of(tmp_path / "1"), strict=True
        ):
            assert record == pytest.approx(expected, rel=1e-4)


# ---------- Promise 2: killed and resumed ---------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_is_killed_and_resumed_is_the_same_run(small, tmp_path, monkeypatch, processes):
    """SIGKILL at a random moment of an epoch, its end or its checkpoint, with workers or not."""
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", 0)
    command = [*small, "--epochs", 60, "--eval-every", 25, "--resume", "--output"]
    launch(train, *command, tmp_path / "whole", processes=processes)
    output = tmp_path / "killed"
    log = output / "log.jsonl"
    rng = random.Random(processes)
    for epochs, workers in ((1, 0), (5, 0), (15, 1), (30, 0)):
        running = start(train, [*command, output, "--workers", workers], processes).processes
        while running[0].is_alive() and not (log.exists() and log.read_text().count("\n") > epochs):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        for process in running:
            process.kill()
        for process in running:
            process.join()
    launch(train, "--output", output, "--resume", processes=processes)
    assert len(records_of(output)) == 60
    assert_same_run(output, tmp_path / "whole")


def test_a_checkpoint_that_is_not_written_whole_leaves_the_one_before(tmp_path, monkeypatch):
    def half(state, path):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    train.save({"epoch": 1}, tmp_path / "last.pt")
    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        train.save({"epoch": 2}, tmp_path / "last.pt")
    assert checkpoint_of(tmp_path) == {"epoch": 1}


def test_the_first_epoch_of_each_start_is_saved_then_some_and_the_last(small, tmp_path):
    command = [*small, "--epochs", 5, "--eval-every", 0, "--resume", "--output", tmp_path]
    for start_epoch, saved in ((0, 1), (1, 2)):
        with cut_off_before(start_epoch + 2):
            launch(train, *command)
        assert len(checkpoint_of(tmp_path)["history"]) == saved
        assert len(records_of(tmp_path)) == start_epoch + 2  # the log has every epoch
    launch(train, *command)
    assert len(checkpoint_of(tmp_path)["history"]) == 5


# ---------- Promise 3: no run is lost, or mistaken for another ------------------------------------


def test_a_folder_that_holds_a_run_is_refused(small, run, capsys):
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(SystemExit, match="2"):
        launch(train, *small, "--output", run)
    assert f"error: {run} holds a run; --resume resumes it" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_a_resumed_run_keeps_its_settings_but_for_typed_flags(small, tmp_path, capsys):
    with cut_off_before(1):
        launch(train, *small, "--epochs", 4, "--eval-every", 0, "--output", tmp_path)
    before = checkpoint_of(tmp_path)["settings"]
    typed = ["--lr", 0.5, "--epochs", 5, "--seed", 7, "--recompute"]
    launch(train, "--output", tmp_path, "--resume", *typed)
    assert "resuming after 1 epochs of 5" in capsys.readouterr().out
    changed = {"lr": 0.5, "epochs": 5, "seed": 7, "recompute": True, "resume": True}
    assert checkpoint_of(tmp_path)["settings"] == before | changed
    rates = [record["lr"] for record in records_of(tmp_path)]
    assert rates == [learning_rate(0, 4)] + [learning_rate(epoch, 5, 0.5) for epoch in (1, 2, 3, 4)]


def test_resuming_where_there_is_no_run_starts_one(small, run, tmp_path, capsys):
    command = [*small, "--epochs", 4, "--eval-every", 2]
    launch(train, *command, "--resume", "--output", tmp_path / "run")
    assert f"no run in {tmp_path / 'run'} yet: starting one" in capsys.readouterr().out
    assert_same_run(tmp_path / "run", run)


def test_a_resumed_run_refuses_other_identities(run, datasets, tmp_path):
    shutil.copytree(datasets, tmp_path / "datasets")
    folder = tmp_path / "datasets" / DATASETS["market1501"].folder / "bounding_box_train"
    for path in folder.glob("0002*"):
        path.rename(path.with_name(f"0009{path.name[4:]}"))
    with pytest.raises(ValueError, match=f"other identities than those in {folder}"):
        launch(train, "--output", run, "--resume", "--epochs", 9, "--data-dir", folder.parents[1])


# ---------- Promise 4: what is not finite is never saved ------------------------------------------


def test_a_loss_that_is_not_finite_ends_the_run(small, tmp_path, monkeypatch):
    def poisoned(*arguments):
        loss, parts = branch_losses(*arguments)
        return loss, parts | {"loss": parts["loss"] * math.nan}

    monkeypatch.setattr(train, "branch_losses", poisoned)
    with pytest.raises(FloatingPointError, match="epoch 0: the loss is nan, .*; lower --lr"):
        launch(train, *small, "--epochs", 2, "--output", tmp_path)
    assert not any(tmp_path.iterdir())


def test_weights_that_are_not_finite_end_the_run(small, tmp_path):
    with pytest.raises(FloatingPointError, match="weights are not finite; lower --lr"):
        launch(train, *small, "--lr", 1e39, "--epochs", 2, "--output", tmp_path)
    assert not any(tmp_path.iterdir())


# ---------- Promise 5: nothing in a file of weights is executed -----------------------------------


@pytest.mark.parametrize("user", ["weights", "evaluate", "resume"])
def test_weights_are_not_executed(tmp_path, user):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"conv1.weight": Evil()}, tmp_path / "last.pt")
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        if user == "weights":
            SONANet(10, weights=tmp_path / "last.pt")
        elif user == "evaluate":
            launch(evaluate, tmp_path)
        else:
            launch(train, "--output", tmp_path, "--resume")
    assert not (tmp_path / "executed").exists()


# ---------- Promise 6: what is missing or unreadable is named -------------------------------------


def test_a_data_set_that_is_missing_is_named(small, tmp_path):
    folder = tmp_path / "Market-1501-v15.09.15" / "bounding_box_train"
    with pytest.raises(FileNotFoundError, match=f"no folder {folder}: put or link the data set"):
        launch(train, *small, "--data-dir", tmp_path, "--output", tmp_path / "run")


def test_a_folder_without_images_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} holds no .jpg, .jpeg or .png"):
        data.read_split(touch(tmp_path, "readme.txt"))


@pytest.mark.parametrize("name", ["me.jpg", "0001_1.png", "-2_c1_0.jpeg"])
def test_a_name_that_does_not_parse_is_named(tmp_path, name):
    with pytest.raises(ValueError, match=f"/{name}: the name says no identity and camera; 0002_c1"):
        data.read_split(touch(tmp_path, name))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_named(small, datasets, tmp_path, workers):
    shutil.copytree(datasets, tmp_path / "datasets")
    (image,) = (tmp_path / "datasets").rglob("0050_c1*_000002_00.jpg")
    image.write_bytes(image.read_bytes()[:900])
    flags = ["--epochs", 1, "--data-dir", tmp_path / "datasets", "--workers", workers]
    with pytest.raises(OSError, match=f"cannot read the image {image}: .*; replace or remove it"):
        launch(train, *small, *flags, "--output", tmp_path / "run")


@pytest.mark.parametrize("content", [b"", b"text", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"GIF89a"])
def test_what_is_no_jpeg_or_png_is_named(tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(OSError, match=f"cannot read the image {tmp_path / 'a.jpg'}: cannot ident"):
        data.read_image(tmp_path / "a.jpg")


# ---------- Pictures, README, copying -------------------------------------------------------------


def test_pictures_are_drawn(run, tmp_path):
    pictures = tmp_path / "ranking.png", tmp_path / "attention.png"
    launch(evaluate, run, "--workers", 0, "--ranking", pictures[0], "--attention", pictures[1])
    assert Image.open(pictures[0]).size == Image.open(pictures[1]).size  # six rows of six images


@pytest.fixture
def drawn(monkeypatch):
    """The rows of the pictures that are drawn: lists of (image, frame's colour, caption)."""
    rows = []
    monkeypatch.setattr(evaluate, "draw_rows", lambda new, title: rows.extend(new))
    return rows


def test_the_ranking_shows_ten_queries_from_the_best_to_the_worst(datasets, drawn):
    query = data.load_dataset("market1501", datasets)["query"]
    query = data.Split(query.paths * 2, np.tile(query.ids, 2), np.tile(query.cams, 2))
    aps = np.array([0.1, 0.9, 0.5, np.nan, 0.3, 0.2, 0.4, 0.6, 0.7, 0.8, 0.0, 1.0])
    evaluate.draw_ranking(query, query, np.zeros((12, 2)), np.zeros((12, 2)), aps)
    shown = [caption.split("AP ")[1] for (_, _, caption), *_ in drawn]
    kept = [100, 90, 80, 70, 60, 40, 30, 20, 10, 0]  # ten of the eleven
    assert shown == [f"{ap:.1f} %" for ap in kept]


def test_the_ranking_shows_the_nearest_images_that_count(datasets, drawn):
    path = data.load_dataset("market1501", datasets)["query"].paths[0]
    query = data.Split([path], np.array([50]), np.array([1]))
    ids = np.array([51, 50, 50, 52, 51, 50, 50])
    cams = np.array([1, 2, 1, 2, 2, 2, 2])  # the third is of the query's own camera
    gallery = data.Split([path] * 7, ids, cams)
    distances = np.array([[3.0], [1.0], [0.0], [2.0], [4.0], [5.0], [6.0]])
    evaluate.draw_ranking(query, gallery, np.zeros((1, 1)), distances, np.ones(1))
    ((_, *nearest),) = drawn
    green, red = evaluate.GREEN, evaluate.RED
    assert [colour for _, colour, _ in nearest] == [green, red, red, red, green]
    assert [caption.split()[2] for _, _, caption in nearest] == "1.00 2.00 3.00 4.00 5.00".split()


def test_attention_marks_the_point_and_where_it_looks(datasets, drawn):
    path = data.load_dataset("market1501", datasets)["query"].paths[0]
    network = Tiny(4).eval()
    evaluate.draw_attention(network, [path], 64, 32)  # a map of 16 x 8
    ((photo, *marked),) = drawn
    sona, features = evaluate.sona_input(
        network, normalize(ImageDataset([path], [0], 64, 32)[0][0][None])
    )
    attention = sona.attention(features)[0].unflatten(0, (16, 8))  # (16, 8, HW)
    cell = evaluate.TILE[0] // 8  # 14 x 14 pixels, whose centre is at 7
    for (image, _, caption), (name, (top, left)) in zip(
        marked, evaluate.POINTS.items(), strict=True
    ):
        row, column = int(16 * top), int(8 * left)
        assert caption.startswith(name)
        assert image.getpixel((column * cell + 7, row * cell + 7)) == (0x20, 0xE0, 0x40)
        for position in attention[row, column].topk(10).indices.tolist():
            if position != 8 * row + column:
                at = position % 8 * cell + 7, position // 8 * cell + 7
                assert image.getpixel(at) == (0xFF, 0x20, 0x20)


def test_attention_needs_sona():
    with pytest.raises(ValueError, match="the network has no SONA module"):
        evaluate.sona_input(Tiny(4, "none"), torch.zeros(1, 3, 32, 16))


@pytest.mark.parametrize("size", [(32, 16), (8, 8)])
def test_attention_is_drawn_on_any_map(datasets, size):
    paths = data.load_dataset("market1501", datasets)["query"].paths[:2]
    evaluate.draw_attention(Tiny(4).eval(), paths, *size)


def test_the_readmes_python_runs(run, tmp_path, monkeypatch, capsys):
    """Runs each block beside a run and photos; a block for one of our files gets its names."""
    shutil.copytree(run, tmp_path / "runs/cuhk03")
    data.draw_pedestrian(1, 1, 0).save(tmp_path / "query.jpg")
    for person in (1, 2):
        data.draw_pedestrian(person, 1, 0).save(touch(tmp_path / "photos") / f"{person}.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "SONANet", Tiny)
    names = {**vars(data), **vars(losses), **vars(model), "__name__": "__main__"}
    names |= {"terms": {}, "branch": "global", "embedding": torch.ones(2, 4)}  # of branch_losses
    blocks = re.findall(r"^```python\n(.*?)^```$", (HERE / "README.md").read_text(), re.S | re.M)
    assert len(blocks) == 5
    with mock.patch.dict(PLACEMENTS):
        for block in blocks:
            exec(compile(block, "README.md", "exec"), dict(names))
        assert SONANet(4, "scaled").eval()(torch.rand(1, 3, 32, 16)).shape == (1, 1536)
    assert re.match(r"0.000  photos/1.jpg\n\S+  photos/2.jpg\n", capsys.readouterr().out)
    images = torch.rand(3, 3, 32, 16)
    embeddings = torch.export.load("sona.pt2").module()(images)
    torch.testing.assert_close(embeddings, evaluate.load_run("runs/cuhk03")[0](images))


def test_files_work_when_copied_alone(tmp_path):
    ranking = "evaluate_ranking(np.eye(2), np.eye(2), [1, 2], [1, 2], [1, 1], [2, 2])"
    code = "import sys\nimport numpy as np\nfrom typing import NamedTuple\n"
    code += inspect.getsource(evaluate.Ranking) + inspect.getsource(evaluate_ranking)
    code += f"assert {ranking}.mean_ap == 1 and 'torch' not in sys.modules\nimport torch\n"
    for file, use in (
        ("model", "SONANet(5).eval()(torch.rand(1, 3, 64, 32)).shape == (1, 1536)"),
        ("losses", "batch_hard_triplet_loss(torch.eye(4), torch.tensor([0, 0, 1, 1])) > 0"),
        ("data", "len(list(IdentitySampler(torch.arange(99)))) == 3"),
    ):
        shutil.copy(HERE / f"{file}.py", touch(tmp_path / file))
        code += f"sys.path[0] = {file!r}\nfrom {file} import *\nassert {use}\n"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
