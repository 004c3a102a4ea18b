"""Train a Vision Transformer (or a ResNet-50) without labels: an existing method (L_I) plus SERE's self-relations, Eq. 6.

    python train.py                                            the demo: drawn images, a few minutes on a CPU
    python train.py --data_path /path/to/imagenet              the paper's Sec. 4.1 (DINO + SERE)
    torchrun --standalone --nproc_per_node=8 train.py --data_path /path/to/imagenet

The same command again goes on where the last one stopped. From the top: the command line with its recipes, what is built
of it, and the loop.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from ablations import BatchRelationLoss, DINOPlusLoss
from augment import BOX, BlockMask, MultiCrop, Photometric, collate, normalize
from baselines import DINOHead, DINOLoss, IBOTHead, IBOTLoss, MoCoHead, MoCoLoss, NoLoss
from checkpoint import Log, find_checkpoint, save, stop_requests
from data import NAMES, Batches, Readable, ViewsOfImages, build_dataset, evaluation_crop, ignore_signals, labelled, on_device
from distributed import Processes, average_over_processes
from evaluate import knn_accuracy
from model import ARCHITECTURES, Network, build_encoder, update_teacher
from optim import clip_gradients, cosine_schedule, parameter_groups
from relations import RelationHead, SelfRelationLoss, spatial_relation
from sampler import overlap
from visualize import draw_attention, draw_views
from weights import load_encoder

# --- command line -----------------------------------------------------------------------------------------------------

# What a recipe changes of the defaults below, which are the paper's DINO + SERE.
IBOT = dict(
    baseline="ibot", alpha=0.2, beta=0.5, out_dim=8192, shared_head=True, norm_last_layer=False, teacher_temp=0.07, teacher_patch_temp=0.07,
    warmup_teacher_temp_epochs=30, global_crops_scale=(0.4, 1.0), local_crops_number=10, local_crops_scale=(0.05, 0.4), batch_size_per_gpu=128,
    clip_grad=0.3,
)
RECIPES = {
    "dino": {},
    "ibot": IBOT,
    "ibot-b": IBOT | dict(
        arch="vit_base", norm_last_layer=True, warmup_teacher_temp_epochs=50, freeze_last_layer=3,
        global_crops_scale=(0.32, 1.0), local_crops_scale=(0.05, 0.32), lr=0.00075, min_lr=2e-6,
    ),
    "mocov3": dict(
        baseline="mocov3", stop_grad_conv1=True, drop_path_rate=0.0, out_dim=256, momentum_teacher=0.99, global_crops_scale=(0.08, 1.0), local_crops_number=0,
        lr=0.00015, min_lr=0.0, warmup_epochs=40, weight_decay=0.1, weight_decay_end=0.1, clip_grad=0.0,
    ),
    "resnet50": dict(
        arch="resnet50", patch_size=32, drop_path_rate=0.0, relation_heads=8, overlap_global=7, overlap_local=3,
        global_crops_scale=(0.14, 1.0), local_crops_scale=(0.05, 0.14), optimizer="sgd", lr=0.03, weight_decay=1e-4, weight_decay_end=1e-4,
    ),
    "demo": dict(
        data_path="shapes", arch="vit_nano", patch_size=8, drop_path_rate=0.0, global_crops_size=48, local_crops_size=24,
        overlap_global=6, overlap_local=3, out_dim=1024, epochs=3, warmup_epochs=1, lr=0.008, min_lr=1e-5, momentum_teacher=0.99, knn_every=1,
        li_weight=0.1,    # little weight: in so few steps DINO's loss does not leave ln K
    ),
}

TERMS = ("loss", "L_I", "L_p", "L_c")

# A run may be resumed with other values of these.
NOT_TRAINING = {
    "output_dir", "overwrite", "num_workers", "max_steps", "checkpoint_steps", "knn_every", "log_every", "compile", "deterministic", "tensorboard",
}

USAGE = "%(prog)s [--recipe NAME] [--data_path PATH] [--flag value ...]; --help lists the flags"


def parse_args(argv=None, prog="train.py"):
    """The command line, checked; ends with one line and status 2 where it makes no sense. prog: whose command line it is, for that line."""
    first = argparse.ArgumentParser(prog=prog, usage=USAGE, add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", choices=RECIPES)
    first.add_argument("--baseline")
    first.add_argument("--data_path")
    known, _ = first.parse_known_args(argv)
    recipe = known.recipe or (known.baseline if known.baseline in RECIPES else "dino" if known.data_path else "demo")

    parser = argparse.ArgumentParser(
        prog=prog,
        usage=USAGE,
        allow_abbrev=False,
        description=f"Self-supervised training of a Vision Transformer, or a ResNet-50, with SERE: L = L_I + alpha L_p + beta L_c (Eq. 6). "
        f"Defaults shown are those of --recipe {recipe}; for another's, give it beside --help.",
    )
    g = parser.add_argument_group("run")
    flag(g, "recipe", None, "a set of defaults; if not given that of --baseline, or demo without --data_path and dino (the paper's Sec. 4.1) with one", choices=list(RECIPES))
    flag(g, "data_path", None, f"folder with train/ and val/, any folder of images (labels not needed), or a name: {', '.join(NAMES)}", type=str)
    flag(g, "output_dir", None, "where everything is written; runs/RECIPE if not given. A run found there goes on", type=str)
    switch(g, "overwrite", False, "start anew, every time it is given, deleting the run in output_dir")
    flag(g, "seed", 0, "weights, shuffling and views are a function of it")
    flag(g, "max_steps", 0, "stop after this step of the whole run, with schedules as if it went on; 0: don't")
    flag(g, "checkpoint_steps", 0, "save every so many steps, besides once an epoch; 0: don't")
    flag(g, "knn_every", 5, "epochs between kNN evaluations, where there are labels; also before the first and after the last; 0: never")
    flag(g, "log_every", 10, "steps between lines of log.jsonl")
    switch(g, "tensorboard", False, "write what log.jsonl holds, and the pictures, for TensorBoard too; needs `pip install tensorboard`")
    g = parser.add_argument_group("encoder")
    flag(g, "arch", "vit_small", "encoder", choices=list(ARCHITECTURES))
    flag(g, "patch_size", 16, "side of a patch in pixels; smaller is better and slower; resnet50's stride is 32")
    flag(g, "init_from", None, "start both networks' encoder from this file: as evaluate.py's --pretrained_weights; mind a lower --lr", type=str)
    flag(g, "heads", 0, "attention heads; 0: the architecture's, or those of --init_from (MoCo v3's ViT-S has 12)")
    flag(g, "drop_path_rate", 0.1, "ViT: stochastic depth of the student's last block, growing linearly with depth")
    switch(g, "stop_grad_conv1", False, "ViT: keep the patch projection as it was drawn, as MoCo v3 does for stability")
    g = parser.add_argument_group("self-relations (SERE)")
    flag(g, "alpha", 1.0, "weight of L_p, spatial self-relation (Eq. 3); 0 leaves it out (Tables 8 and 14)")
    flag(g, "beta", 1.0, "weight of L_c, channel self-relation (Eq. 5); 0 leaves it out (Tables 8 and 14)")
    flag(g, "temperature_spatial", 0.5, "t_p of Eq. 2, of the network that --sharpen names; the other's is 1 (Table 13)")
    flag(g, "temperature_channel", 0.1, "t_c of Eq. 4, likewise (Table 13)")
    flag(g, "sharpen", "teacher", "who gets the temperatures: teacher as in the authors' release, student as in the text", choices=["teacher", "student"])
    flag(g, "relation_heads", 6, "M, groups of channels with a spatial relation each; divides the encoder's dim (Table 12)")
    flag(g, "overlap_global", 13, "points a side sampled in the overlap of two global views; about the side of their feature map")
    flag(g, "overlap_local", 6, "the same where a local view takes part")
    switch(g, "symmetric", False, "leave out the student's prediction heads g (Table 15)")
    flag(g, "channel_relation", "image", "what L_c relates channels over: each image (Eq. 4), or the batch, as Barlow Twins does (Table 11)", choices=["image", "batch"])
    g = parser.add_argument_group("image embedding (L_I)")
    flag(g, "baseline", "dino", "the method SERE is added to (Table 7), with the defaults of --recipe; dino+ clusters patch embeddings too (Table 10)", choices=["dino", "ibot", "mocov3", "dino+"])
    flag(g, "li_weight", 1.0, "weight of L_I; 0 leaves it out (Table 8)")
    flag(g, "out_dim", 65536, "K, outputs of the head; fewer (4096) learn faster on small data")
    flag(g, "momentum_teacher", 0.996, "λ of the teacher's update at the start, to 1 by cosine; nearer 1 (0.9995) for batches of 256 and less")
    g = parser.add_argument_group("DINO, iBOT")
    switch(g, "norm_last_layer", True, "keep the last layer's rows at length 1; stabler, and better for small encoders")
    flag(g, "warmup_teacher_temp", 0.04, "teacher temperature at the start; lower it when the loss stays at ln(out_dim)")
    flag(g, "teacher_temp", 0.04, "teacher temperature after its warm-up; above 0.07 is unstable")
    flag(g, "warmup_teacher_temp_epochs", 0, "epochs of that warm-up, linear; also of the patch temperature's")
    flag(g, "freeze_last_layer", 1, "epochs in which the head's last layer stays as it is; more when the loss does not fall")
    g = parser.add_argument_group("iBOT, DINO+ (patch embeddings)")
    switch(g, "shared_head", False, "one last layer, of out_dim outputs, for class and patch tokens")
    flag(g, "patch_out_dim", 8192, "K of the patches' own last layer, without --shared_head")
    flag(g, "warmup_teacher_patch_temp", 0.04, "teacher temperature of patches at the start")
    flag(g, "teacher_patch_temp", 0.04, "teacher temperature of patches after the warm-up")
    flag(g, "pred_ratio", (0.0, 0.3), "iBOT: share of a global view's patches hidden from the student, one of these, drawn for each view", nargs="+", type=float, metavar="SHARE")
    flag(g, "pred_ratio_var", (0.0, 0.2), "iBOT: each share varies by up to so much", nargs="+", type=float, metavar="SHARE")
    g = parser.add_argument_group("MoCo v3")
    flag(g, "moco_t", 0.2, "temperature")
    g = parser.add_argument_group("views")
    flag(g, "global_crops_size", 224, "side of the two global views in pixels")
    flag(g, "global_crops_scale", (0.35, 1.0), "their range of the image's area", nargs=2, type=float, metavar=("LOW", "HIGH"))
    flag(g, "local_crops_number", 4, "local views an image, any number")
    flag(g, "local_crops_size", 96, "side of the local views in pixels")
    flag(g, "local_crops_scale", (0.05, 0.35), "their range of the image's area", nargs=2, type=float, metavar=("LOW", "HIGH"))
    g = parser.add_argument_group("optimization")
    flag(g, "optimizer", "adamw", "adamw for ViTs; sgd (momentum 0.9) for convnets", choices=["adamw", "sgd"])
    flag(g, "epochs", 100, "passes over the images")
    flag(g, "batch_size_per_gpu", 64, "images a process and forward pass")
    flag(g, "grad_accum_steps", 1, "forward passes an optimizer step")
    flag(g, "lr", 0.0005, "learning rate per 256 images of the effective batch, after warm-up")
    flag(g, "min_lr", 1e-6, "learning rate at the end, by cosine; not scaled")
    flag(g, "warmup_epochs", 10, "epochs of linear warm-up of the learning rate")
    flag(g, "weight_decay", 0.04, "at the start; none on biases and norms")
    flag(g, "weight_decay_end", 0.4, "at the end, by cosine")
    flag(g, "clip_grad", 3.0, "largest norm of each parameter's own gradient; 0: don't clip")
    g = parser.add_argument_group("machine (the device is found; torchrun makes it several)")
    flag(g, "num_workers", max(1, min(10, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))), "loader processes a training process; what is trained does not depend on it")
    flag(g, "precision", "auto", "auto: bf16 where the GPU has it, else fp16; fp32 on a CPU", choices=["auto", "bf16", "fp16", "fp32"])
    switch(g, "compile", None, "torch.compile; on for CUDA unless told otherwise")
    switch(g, "deterministic", False, "bit-for-bit repeatable on CUDA too, and slower")
    parser.set_defaults(**RECIPES[recipe] | {"recipe": recipe})
    args = parser.parse_args(argv)

    args.output_dir = args.output_dir or f"runs/{args.recipe}"
    for name in ("global_crops_scale", "local_crops_scale", "pred_ratio", "pred_ratio_var"):
        setattr(args, name, list(getattr(args, name)))
    if fault := find_fault(args):
        parser.error(fault)
    return args


def flag(group, name, default, help, type=None, **rest):
    """Add --name; the type is the default's unless told otherwise."""
    type = type or (None if "choices" in rest else default.__class__)
    group.add_argument(f"--{name}", default=default, help=help + ("" if default is None else " (default: %(default)s)"), type=type, **rest)


def switch(group, name, default, help):
    """Add --name and --no-name."""
    group.add_argument(f"--{name}", default=default, help=help + ("" if default is None else " (default: %(default)s)"), action=argparse.BooleanOptionalAction)


def find_fault(args):
    """What in these arguments can't be, in one line; None if nothing."""
    if not args.data_path:
        return f"--recipe {args.recipe} needs --data_path"
    for name in """epochs batch_size_per_gpu grad_accum_steps log_every patch_size out_dim patch_out_dim relation_heads overlap_global overlap_local""".split():
        if getattr(args, name) < 1:
            return f"--{name} must be at least 1"
    for name in """seed max_steps checkpoint_steps knn_every num_workers local_crops_number alpha beta li_weight lr min_lr weight_decay
            weight_decay_end clip_grad drop_path_rate heads warmup_epochs warmup_teacher_temp_epochs freeze_last_layer""".split():
        if not getattr(args, name) >= 0:
            return f"--{name} can't be negative"
    if not (args.alpha or args.beta or args.li_weight):
        return "--alpha, --beta and --li_weight are all 0: nothing to learn from"
    for name in """temperature_spatial temperature_channel teacher_temp warmup_teacher_temp teacher_patch_temp warmup_teacher_patch_temp moco_t""".split():
        if not getattr(args, name) > 0:
            return f"--{name} must be above 0"
    if not 0 <= args.momentum_teacher <= 1:
        return "--momentum_teacher must lie in [0, 1]"
    if not 0 <= args.drop_path_rate < 1:
        return "--drop_path_rate must lie in [0, 1)"
    if not (math.isfinite(args.lr) and args.seed < 2**63):
        return "--lr and --seed must be finite, --seed below 2^63"
    for kind in ("global", "local"):
        low, high = getattr(args, f"{kind}_crops_scale")
        if not 0 < low <= high <= 1:
            return f"--{kind}_crops_scale must be two rising numbers in (0, 1], not {low:g} {high:g}"
        size = getattr(args, f"{kind}_crops_size")
        if kind == "local" and args.local_crops_number == 0:
            continue
        if size < args.patch_size or size % args.patch_size:
            return f"--{kind}_crops_size {size} is not a multiple of --patch_size {args.patch_size}"
    if len(args.pred_ratio) != len(args.pred_ratio_var):
        return f"--pred_ratio and --pred_ratio_var must be equally many, not {len(args.pred_ratio)} and {len(args.pred_ratio_var)}"
    for share, variance in zip(args.pred_ratio, args.pred_ratio_var):
        if not variance >= 0:
            return "--pred_ratio_var can't be negative"
        if not 0 <= share - variance <= share + variance < 1:
            return f"--pred_ratio {share:g} plus or minus --pred_ratio_var {variance:g} must lie in [0, 1)"
    if args.arch == "resnet50":
        for unfit, remedy in (
            (args.baseline == "ibot" and args.li_weight, "another --baseline: it has no patches to mask"),
            (args.patch_size != 32, "--patch_size 32, its stride"), (args.drop_path_rate, "--drop_path_rate 0"), (args.stop_grad_conv1, "--no-stop_grad_conv1"),
        ):
            if unfit:
                return f"--arch resnet50 needs {remedy}; --recipe resnet50 has what it needs"
    if args.baseline == "mocov3" and args.li_weight and args.batch_size_per_gpu * int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return "--baseline mocov3 tells the images of a batch apart: --batch_size_per_gpu must be above 1"
    faults = []
    if args.warmup_epochs >= args.epochs:
        faults.append(f"--warmup_epochs {args.warmup_epochs} leaves nothing of --epochs {args.epochs}: give 0 to {args.epochs - 1}")
    if args.warmup_teacher_temp_epochs > args.epochs:
        faults.append(f"--warmup_teacher_temp_epochs {args.warmup_teacher_temp_epochs} is more than --epochs {args.epochs}: give 0 to {args.epochs}")
    if faults:
        return "; ".join(faults)
    if args.heads and args.arch != "resnet50" and ARCHITECTURES[args.arch]["dim"] % args.heads:
        return f"--heads {args.heads} does not divide the {ARCHITECTURES[args.arch]['dim']} channels of --arch {args.arch}"
    if args.alpha:
        try:
            spatial_relation(torch.empty(1, ARCHITECTURES[args.arch]["dim"], 1), args.relation_heads)
        except ValueError as error:
            return f"--relation_heads {args.relation_heads}, --arch {args.arch}: {error}"
    return None


# --- the run ----------------------------------------------------------------------------------------------------------


class Baseline(NamedTuple):
    """The method that SERE is added to."""

    head: Callable                # (dim, student: bool) -> a network's head, or None
    loss: torch.nn.Module         # L_I, see baselines.py
    teacher_temp: torch.Tensor    # its temperature (epochs,), or temperatures (epochs, 2)
    mask: BlockMask = None        # what is hidden from the student


def build_baseline(args):
    """The Baseline that the arguments name; what follows does not tell one from another."""

    def warm_up(low, high):
        n = args.warmup_teacher_temp_epochs
        return torch.cat([torch.linspace(low, high, n), torch.full((args.epochs - n,), high)])

    def head_of_patches(dim, student):
        patch_out_dim = None if args.shared_head else args.patch_out_dim
        if args.baseline == "dino+":
            return IBOTHead(dim, args.out_dim, args.norm_last_layer, patch_out_dim, patches=2)
        return IBOTHead(dim, args.out_dim, args.norm_last_layer, patch_out_dim, most=mask.most, mean=not student)

    teacher_temp = warm_up(args.warmup_teacher_temp, args.teacher_temp)
    both_temps = torch.stack([teacher_temp, warm_up(args.warmup_teacher_patch_temp, args.teacher_patch_temp)], dim=1)
    out_dims = (args.out_dim, args.out_dim if args.shared_head else args.patch_out_dim)
    if args.li_weight == 0:
        return Baseline(lambda dim, student: None, NoLoss(), teacher_temp)
    if args.baseline == "dino":
        return Baseline(lambda dim, student: DINOHead(dim, args.out_dim, args.norm_last_layer), DINOLoss(args.out_dim), teacher_temp)
    if args.baseline == "ibot":
        mask = BlockMask(args.global_crops_size // args.patch_size, args.pred_ratio, args.pred_ratio_var)    # head_of_patches knows it
        return Baseline(head_of_patches, IBOTLoss(*out_dims), both_temps, mask)
    if args.baseline == "mocov3":
        return Baseline(lambda dim, student: MoCoHead(dim, args.out_dim, predictor=student), MoCoLoss(args.moco_t), teacher_temp)
    return Baseline(head_of_patches, DINOPlusLoss(*out_dims, args.overlap_global, args.overlap_local), both_temps)


def build_relation_loss(args):
    """L_p and L_c."""
    kind = {"image": SelfRelationLoss, "batch": BatchRelationLoss}[args.channel_relation]
    return kind(args.relation_heads, args.temperature_spatial, args.temperature_channel, args.sharpen, args.overlap_global, args.overlap_local)


def build_networks(args, baseline):
    """(student, teacher) with the same weights; the student with h and g for each resolution, the teacher with h for global views.

    Raises ValueError where --init_from does not fit, OSError where it can't be read.
    """
    initial = load_encoder(args.init_from, args.arch, heads=args.heads, image_size=args.global_crops_size) if args.init_from else None
    if initial and initial.patch_size != args.patch_size:
        raise ValueError(f"{args.init_from} has a patch size of {initial.patch_size}, not --patch_size {args.patch_size}")
    heads = args.heads or (initial and initial.heads)

    def network(student):
        backbone = build_encoder(
            args.arch, args.global_crops_size, args.patch_size, args.drop_path_rate if student else 0.0, student and baseline.mask is not None, heads
        )
        if initial:
            backbone.load_state_dict(backbone.state_dict() | initial.state_dict())
        if args.stop_grad_conv1:
            if not initial:
                torch.nn.init.xavier_uniform_(backbone.patch_embed.proj.weight.flatten(1))    # MoCo v3's: it stays, so its scale matters
            backbone.patch_embed.requires_grad_(False)
        head = baseline.head(backbone.dim, student)
        resolutions = 2 if student and args.local_crops_number else 1
        g = student and not args.symmetric
        spatial = [RelationHead(backbone.dim, g) for _ in range(resolutions if args.alpha else 0)]
        channel = [RelationHead(backbone.dim, g) for _ in range(resolutions if args.beta else 0)]
        return Network(backbone, head, spatial, channel)

    student, teacher = network(student=True), network(student=False)
    weights = student.state_dict()
    teacher.load_state_dict({name: weights[name] for name in teacher.state_dict()})
    return student, teacher.requires_grad_(False)


def colour(batch, photometric):
    """A batch (augment.Views) -> its views by resolution, global first, (V, B, 3, S, S) as networks take them."""
    rows = batch.rows.split([len(crops) for crops in batch.crops])
    return [photometric(x.flatten(0, 1), r.flatten(0, 1)).unflatten(0, x.shape[:2]) for x, r in zip(batch.crops, rows)]


class Outcome(NamedTuple):
    """What a step leaves to look at; all but the terms are of its last batch."""

    terms: torch.Tensor    # (TERMS,), means over its batches
    views: list            # by resolution, global first, (V, B, 3, S, S)
    boxes: torch.Tensor    # (views, B, 5)
    taught: object         # the teacher's model.Output


class Training:
    """What learns, and one step of it. The run around it is `train`'s."""

    def __init__(self, args, processes, images):
        """images: how many there are. Raises OSError where they are fewer than a batch, and where --init_from can't be used."""
        self.args, self.processes = args, processes
        self.effective_batch = args.batch_size_per_gpu * processes.size * args.grad_accum_steps
        self.steps_per_epoch = images // self.effective_batch
        if self.steps_per_epoch == 0:
            most = images // (processes.size * args.grad_accum_steps)
            remedy = f"lower --batch_size_per_gpu to at most {most}" if most else "take fewer processes or --grad_accum_steps"
            raise OSError(f"{args.data_path} has {images} images, fewer than a batch of {self.effective_batch}; {remedy}")
        torch.manual_seed(args.seed)
        baseline = build_baseline(args)
        try:
            self.student, self.teacher = (network.to(processes.device) for network in build_networks(args, baseline))
        except ValueError as error:
            raise OSError(f"--init_from {error}") from error
        self.network = self.student    # as what it is called
        self.embedding_loss, self.relation_loss = baseline.loss.to(processes.device), build_relation_loss(args)
        self.photometric, self.mask = Photometric(), baseline.mask
        self.last_layer = [parameter for name, parameter in self.student.named_parameters() if "last_layer" in name]
        if args.optimizer == "adamw":
            self.optimizer = torch.optim.AdamW(parameter_groups(self.student), fused=True)
        else:
            self.optimizer = torch.optim.SGD(parameter_groups(self.student), momentum=0.9)
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[args.precision]
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=self.dtype == torch.float16)

        # schedules: a value a step, on the CPU, where asking for one waits for nothing; the teacher's temperature a value an epoch
        steps = args.epochs * self.steps_per_epoch
        self.top_lr = args.lr * self.effective_batch / 256
        self.lr = cosine_schedule(self.top_lr, args.min_lr, steps, args.warmup_epochs * self.steps_per_epoch)
        self.weight_decay = cosine_schedule(args.weight_decay, args.weight_decay_end, steps)
        self.momentum = cosine_schedule(args.momentum_teacher, 1.0, steps)
        self.teacher_temp = baseline.teacher_temp.to(processes.device)    # tensors: a number would be a new graph for torch.compile each time it changes

    def parts(self):
        """What has a state, by the name it has in a checkpoint."""
        return {"student": self.student, "teacher": self.teacher, "optimizer": self.optimizer, "scaler": self.scaler, "baseline": self.embedding_loss}

    def make_ready(self):
        """Compile and distribute; once, after any state is loaded."""
        if self.args.compile:
            for module in (self.student, self.teacher, self.photometric, self.embedding_loss, self.relation_loss):
                module.compile(dynamic=False)
        if self.processes.distributed:
            self.network = DistributedDataParallel(self.student, gradient_as_bucket_view=True)

    def step(self, step, batches):
        """The step after `step` others, on the next batches (data.on_device) of an iterator, as many as are accumulated. Returns an Outcome."""
        args, epoch = self.args, step // self.steps_per_epoch
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr[step].item()
        self.optimizer.param_groups[0]["weight_decay"] = self.weight_decay[step].item()    # the other group has none
        torch.manual_seed(int(np.random.SeedSequence((args.seed, step, self.processes.rank)).generate_state(1)[0]))    # stochastic depth

        terms = 0.0
        for micro_step in range(args.grad_accum_steps):
            batch = next(batches)
            views, boxes, mask = colour(batch, self.photometric), batch.rows[:, :, BOX], batch.mask
            # gradients are averaged over processes once a step, in its last backward pass
            synchronized = micro_step == args.grad_accum_steps - 1 or not self.processes.distributed
            with contextlib.nullcontext() if synchronized else self.network.no_sync():
                with torch.autocast(boxes.device.type, self.dtype, enabled=self.dtype != torch.float32):
                    with torch.no_grad():
                        taught = self.teacher(views[:1], mask)
                    learned = self.network(views, mask)
                    l_p, l_c = self.relation_loss(taught, learned, boxes)
                l_i = self.embedding_loss(learned.embedding, taught.embedding, self.teacher_temp[epoch], boxes)
                loss = args.li_weight * l_i + args.alpha * l_p + args.beta * l_c    # Eq. 6
                self.scaler.scale(loss / args.grad_accum_steps).backward()
            terms = terms + torch.stack([loss, l_i, l_p, l_c]).detach() / args.grad_accum_steps

        self.scaler.unscale_(self.optimizer)
        if epoch < args.freeze_last_layer:
            for parameter in self.last_layer:
                parameter.grad = None
        if args.clip_grad:
            clip_gradients(self.student.parameters(), args.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        update_teacher(self.student, self.teacher, self.momentum[step].item())
        self.embedding_loss.update_center()
        return Outcome(terms, views, boxes, taught)


def build_loader(args, images, mask, processes, start=0):
    """Endless batches (Views, complaints) of this process, from the one after `start` steps on. mask: a BlockMask, or None."""
    multicrop = MultiCrop(args.global_crops_size, args.global_crops_scale, args.local_crops_number, args.local_crops_size, args.local_crops_scale, mask)
    return DataLoader(
        ViewsOfImages(images, multicrop, args.seed), num_workers=args.num_workers, collate_fn=collate, worker_init_fn=ignore_signals,
        batch_sampler=Batches(len(images), args.batch_size_per_gpu, args.grad_accum_steps, processes.rank, processes.size, args.seed, start),
        pin_memory=processes.device.type == "cuda",
    )


@torch.no_grad()
def diagnostics(teacher, boxes, sere):
    """What shows a collapse, and relations that say nothing. Entropies are in nats, at most ln N and ln C."""

    def entropy(logits):
        return torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1).mean().item()

    G, C = len(teacher.summary), teacher.summary.shape[-1]
    valid = [overlap(boxes[q], boxes[v])[1] for v in range(len(boxes)) for q in range(G) if q != v]
    values = {
        "feature_std": F.normalize(teacher.summary.float(), dim=-1).std(dim=1, correction=0).mean().item() * C**0.5,    # 1 spread out, 0 collapsed
        "overlap": torch.stack(valid).float().mean().item(),
    }
    if teacher.spatial:
        values["spatial_entropy"] = entropy(spatial_relation(teacher.spatial[0][0], sere.heads, sere.teacher_temperatures[0]))
    if teacher.channel:
        values["channel_entropy"] = entropy(sere.channel_relation(teacher.channel[0][0], sere.teacher_temperatures[1]))
    return values


def describe(args, processes, effective_batch, lr):
    """What args.json says: all arguments, and what they became here."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__}
    device = device_name(processes.device)
    return vars(args) | {"processes": processes.size, "effective_batch": effective_batch, "effective_lr": lr, "device": device, "versions": versions}


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"


def train(args, processes, requests):
    """One run, from images to backbone.pth; stops after a step in which `requests` is no longer empty.

    Raises OSError for data that can't be used and for a full disk, FloatingPointError for a loss that is not finite.
    """
    device, main_process = processes.device, processes.rank == 0
    say = tqdm.write if main_process else lambda *_: None
    output = Path(args.output_dir)

    # --- data
    images = build_dataset(args.data_path, "train")
    val = None
    if args.knn_every and len(labelled(images)):
        with contextlib.suppress(FileNotFoundError):    # a folder without val/ is trained on without kNN
            val = build_dataset(args.data_path, "val")
            val = val if len(labelled(val)) else None
    training = Training(args, processes, len(images))
    steps_per_epoch, effective_batch = training.steps_per_epoch, training.effective_batch
    steps = args.epochs * steps_per_epoch
    last_step = min(steps, args.max_steps or steps)

    # --- go on where the last run stopped
    step, epoch_sums = 0, [0.0] * len(TERMS)
    arguments = {name: value for name, value in vars(args).items() if name not in NOT_TRAINING} | {"processes": processes.size, "images": len(images)}
    if checkpoint := None if args.overwrite else find_checkpoint(output / "checkpoint.pth", arguments):
        for name, part in training.parts().items():
            part.load_state_dict(checkpoint[name])
        step, epoch_sums = checkpoint["step"], checkpoint["epoch_sums"]
        del checkpoint
    if processes.sum(step) != step * processes.size:
        raise OSError(f"the processes found different checkpoints in {output}/; it must be one folder for all machines")

    def save_checkpoint():
        check_weights(training.student, step)
        if main_process:
            save(training.teacher.backbone.state_dict(), output / "backbone.pth")
            states = {name: part.state_dict() for name, part in training.parts().items()}
            save(states | {"step": step, "epoch_sums": epoch_sums, "arguments": arguments}, output / "checkpoint.pth")

    # --- what is written
    output.mkdir(parents=True, exist_ok=True)
    if main_process:
        for name in ("checkpoint.pth", "backbone.pth", "views.png", "attention.png") if args.overwrite else ():
            (output / name).unlink(missing_ok=True)
        if args.overwrite:
            shutil.rmtree(output / "tensorboard", ignore_errors=True)
        (output / "args.json").write_text(json.dumps(describe(args, processes, effective_batch, training.top_lr), indent=2) + "\n")
    log = Log(output / "log.jsonl", step, args.tensorboard) if main_process else None
    kinds = f"{images.classes} classes; labels are for kNN only" if len(labelled(images)) else "no labels"
    summands = [(args.li_weight, f"L_I({args.baseline})"), (args.alpha, "L_p"), (args.beta, "L_c")]
    say(f"{args.recipe}: {args.arch}/{args.patch_size}, L = {' + '.join(f'{weight:g} {name}' for weight, name in summands if weight)}")
    say(f"{len(images)} images of {args.data_path} ({kinds})")
    say(f"{processes.size} process(es) on {device.type}, {args.precision}{', compiled' if args.compile else ''}")
    say(f"{args.epochs} epochs of {steps_per_epoch} steps; effective batch {effective_batch}, learning rate {training.top_lr:.2g}; results go to {output}/")
    if step:
        say(f"going on after step {step}" if step < steps else f"{output}/ holds a finished run; for another use another --output_dir, or --overwrite")

    def stop_asked():
        return processes.sum(len(requests)) > 0

    def evaluate_knn(epoch):
        """Accuracy in %, or None where the run is to stop."""
        if epoch == 0:
            say("kNN of the untrained encoder, to compare with; --knn_every 0 does without")
        accuracy = knn_accuracy(
            training.teacher.backbone.eval(), Readable(images), val, args.global_crops_size, device, most=20_000,
            batch_size=args.batch_size_per_gpu, num_workers=args.num_workers, stop_asked=stop_asked,
        )
        training.teacher.backbone.train()    # a ResNet's batch norms
        if accuracy is None:
            return None
        say(f"epoch {epoch}: kNN {accuracy[20]:.1f} %" + (" (untrained)" if epoch == 0 else ""))
        return accuracy[20]

    def end_epoch():
        """The epoch's line in the log. It follows the checkpoint: a kill during kNN costs the line alone, and resuming makes up for it."""
        done = step // steps_per_epoch
        line = {name: total / steps_per_epoch for name, total in zip(TERMS, epoch_sums)}
        if val is not None and (done % args.knn_every == 0 or step == steps):
            line["kNN"] = evaluate_knn(done)
            if line["kNN"] is None:
                return
        if main_process:
            log.write(kind="epoch", step=step, epoch=done, **line)

    if args.knn_every and val is None:
        say(f"no kNN while training: it needs a folder a class in {args.data_path}/train and {args.data_path}/val")
    if step == 0 and val is not None:
        accuracy = evaluate_knn(0)
        if main_process and accuracy is not None:
            log.write(kind="epoch", step=0, epoch=0, kNN=accuracy)
    if step and step % steps_per_epoch == 0:
        if processes.sum(int(main_process and step not in log.epochs)):
            end_epoch()
        epoch_sums = [0.0] * len(TERMS)

    # --- ready
    training.make_ready()
    stream = iter(build_loader(args, images, training.mask, processes, step)) if step < last_step else None
    history, complaints = [], []
    window_step, window_start, waited = step, time.perf_counter(), 0.0    # what images/s is measured over
    bar = tqdm(total=steps, initial=step, disable=None if main_process else True, unit="step", dynamic_ncols=True)

    def read():
        """The loader's batches; what it complains of is shown and counted, the time waited for it too."""
        nonlocal waited
        while True:
            asked = time.perf_counter()
            batch, new_complaints = next(stream)
            waited += time.perf_counter() - asked
            for complaint in new_complaints:
                tqdm.write(f"{complaint}; the next image stands in", file=sys.stderr)
            complaints.extend(new_complaints)
            yield batch

    # --- the loop
    batches = on_device(read(), device)
    processes.training = True
    stopping = stop_asked()
    while step < last_step and not stopping:
        views = boxes = taught = None    # of the step before: room for this one's
        terms, views, boxes, taught = training.step(step, batches)
        if step == 0 and main_process:
            draw_views(output / "views.png", [v[:, :4].cpu() for v in views], boxes[:, :4].cpu(), (args.overlap_global, args.overlap_local))
            log.picture(output / "views.png", step)
        history.append(terms)
        step += 1
        bar.update()

        # --- now and then: look, log, save
        logs, epoch_ends = step % args.log_every == 0 or step == last_step, step % steps_per_epoch == 0
        stopping = stop_asked()
        saves = epoch_ends or stopping or step == last_step or (args.checkpoint_steps and step % args.checkpoint_steps == 0)
        if not (logs or saves):
            continue
        values = average_over_processes(torch.stack(history)).double().cpu()    # (steps, TERMS); waits for the GPU, nothing above does
        check_finite(values, step)
        epoch_sums = [total + value for total, value in zip(epoch_sums, values.sum(dim=0).tolist())]
        history.clear()
        if logs:
            terms = dict(zip(TERMS, values[-1].tolist()))
            seconds = time.perf_counter() - window_start
            images_per_s = (step - window_step) * effective_batch / seconds
            unreadable = processes.sum(len(complaints))
            epoch = (step - 1) // steps_per_epoch
            looked = diagnostics(taught, boxes, training.relation_loss) | training.embedding_loss.diagnostics(taught.embedding, training.teacher_temp[epoch])
            if main_process:
                log.write(
                    kind="step", step=step, epoch=step / steps_per_epoch, **terms, lr=training.lr[step - 1].item(),
                    images_per_s=images_per_s, data_wait=waited / seconds, unreadable=unreadable,
                    peak_memory_gib=torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
                    **looked,
                )
            shown = {name: f"{value:.3f}" for name, value in terms.items()} | {"images/s": f"{images_per_s:.0f}"}
            bar.set_postfix(shown)
            if bar.disable:    # no terminal
                say(f"step {step}/{steps}: " + ", ".join(f"{name} {value}" for name, value in shown.items()))
            complaints.clear()
        if saves:
            save_checkpoint()
        if epoch_ends and not stopping:
            end_epoch()
            stopping = stop_asked()
            epoch_sums = [0.0] * len(TERMS)
        window_step, window_start, waited = step, time.perf_counter(), 0.0
    bar.close()

    # --- the end
    if stopping:
        say(f"stopped by {signal.Signals(requests[0]).name if requests else 'a signal'} after step {step} of {steps}; the same command goes on from there")
        return
    if main_process and hasattr(training.teacher.backbone, "get_last_selfattention"):    # a ResNet has none
        draw_attention_of(images if val is None else val, training.teacher.backbone, args.global_crops_size, device, output / "attention.png")
        log.picture(output / "attention.png", step)
    if step < steps:
        say(f"stopped at step {step} of {steps}, as --max_steps {args.max_steps} says; the same command with a larger one, or without, goes on")
    elif len(labelled(images)):
        say(f"done. What it is worth: python evaluate.py knn --pretrained_weights {output}/backbone.pth --data_path {args.data_path}")
    else:
        say(f"done: {output}/backbone.pth")


ADVICE = "Nothing was saved since the last checkpoint, which is whole. Try a lower --lr, a longer --warmup_epochs, or --precision bf16 or fp32"


def check_finite(values, step):
    """values: (steps, TERMS), the last of step number `step`. Raises FloatingPointError naming the first step and its terms that are not finite."""
    for number, row in enumerate(values.tolist(), start=step - len(values) + 1):
        if not all(map(math.isfinite, row)):
            faults = [f"{name} is {value}" for name, value in zip(TERMS, row) if not math.isfinite(value)]
            raise FloatingPointError(f"{', '.join(faults)} in step {number}. {ADVICE}")


def check_weights(student, step):
    """Raises FloatingPointError naming the parameters that are not finite: a finite loss can have gradients that are not."""
    norms = torch.stack(torch._foreach_norm(list(student.parameters()))).tolist()
    faults = [name for (name, _), norm in zip(student.named_parameters(), norms) if not math.isfinite(norm)]
    if faults:
        raise FloatingPointError(f"{len(faults)} parameters are not finite after step {step}, {faults[0]} among them. {ADVICE}")


def draw_attention_of(images, encoder, size, device, path, number=6):
    """Fig. 4 for a few images of a data set."""
    chosen = [Readable(images)[i][0] for i in np.random.default_rng(0).permutation(len(images))[:number]]
    crops = torch.stack([evaluation_crop(size)(image) for image in chosen])
    draw_attention(path, encoder, normalize(crops.to(device).float() / 255))


def settle(args, device):
    """What --precision auto, and --compile if not given, are on this device; and PyTorch's global settings. Before anything is computed."""
    cuda = device.type == "cuda"
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")    # read with the first matrix product
        torch.use_deterministic_algorithms(True)
    if args.precision == "auto":
        args.precision = ("bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16") if cuda else "fp32"
    if args.compile is None:
        args.compile = cuda
    if cuda:
        # TF32, ten bits of mantissa, where autocast leaves float32: blur, ⊙, MoCo v3's similarities. --precision fp32 means what it says.
        torch.set_float32_matmul_precision("highest" if args.precision == "fp32" else "high")
        torch.backends.cudnn.benchmark = not args.deterministic    # a ResNet's convolutions; shapes stay the same


def main(argv=None):
    """Train as the command line (a list of str; sys.argv if None) says."""
    args = parse_args(argv)
    processes = Processes()
    settle(args, processes.device)
    try:
        with stop_requests() as requests:
            train(args, processes, requests)
    except (OSError, FloatingPointError) as error:
        if processes.rank == 0 or processes.training:    # before that, all processes fail alike
            sys.stderr.write(f"train.py: error: {str(error).strip().splitlines()[-1]}\n")    # a loader's worker puts its stack before it
        sys.exit(1)
    except torch.OutOfMemoryError as error:    # any process's own
        remedy = f"Lower --batch_size_per_gpu {args.batch_size_per_gpu}; --grad_accum_steps keeps the effective batch"
        sys.stderr.write(f"train.py: error: process {processes.rank}: {str(error).splitlines()[0]} {remedy}\n")
        sys.exit(1)
    finally:
        processes.close()
    if requests:
        sys.exit(128 + requests[0])    # as a shell reports a process that a signal ended


if __name__ == "__main__":
    main()
