"""Command lines: flags with ranges, and those of train.py with its recipes.

A flag's default, range and help stand together. A range is an interval as in mathematics: "[0,
inf)" takes 0 but not inf, "(0, 1]" takes 1 but not 0. nan lies in none.
"""

import argparse
import difflib
import os
import re
import sys

from model import ARCHITECTURES
from support.named_sets import NAMES

ANY, NOT_NEGATIVE, POSITIVE = "(-inf, inf)", "[0, inf)", "(0, inf)"
COUNT, SIZE = "[0, 9e18]", "[1, 9e18]"    # whole numbers

# What people bring from DINO, iBOT, MAE and timm.
ALIASES = {
    "drop_path": "drop_path_rate", "accum_iter": "grad_accum_steps", "workers": "num_workers",
    "batch_size": "batch_size_per_gpu", "saveckp_freq": "checkpoint_steps", "use_fp16": "precision",
    "model": "arch", "pretrained": "init_from", "blr": "lr", "resume": "output_dir",
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and suggest the nearest flag."""

    def __init__(self, prog, usage, strict=True, **rest):
        """strict: an unknown flag is an error in parse_known_args, too, as tasks are parsed by."""
        super().__init__(prog=prog, usage=usage, allow_abbrev=False, **rest)
        self.strict = strict

    def error(self, message):
        sys.stderr.write(f"{self.prog}: error: {message}\n")
        sys.exit(2)

    def parse_known_args(self, argv=None, namespace=None):
        args, unknown = super().parse_known_args(argv, namespace)
        if unknown and self.strict:
            words = sys.argv[1:] if argv is None else list(argv)
            before = words[words.index(unknown[0]) - 1] if unknown[0] in words[1:] else ""
            self.error(f"unknown argument {unknown[0]}{self.suggest(unknown[0], before)}")
        return args, unknown

    def suggest(self, word, before):
        """Return "; did you mean --flag?", or "" where nothing is near.

        before: the word before.
        """
        switch = before.removeprefix("--no-").removeprefix("--")
        if word.lower() in ("true", "false", "1", "0") and f"--no-{switch}" in self.format_help():
            return f"; a switch takes no value: give --{switch} or --no-{switch}"
        name = word.split("=")[0].lstrip("-").replace("-", "_")
        listed = re.findall(r"^  --.*", self.format_help(), re.MULTILINE)
        flags = re.findall(r"--([\w-]+)", " ".join(listed))
        if ALIASES.get(name) in flags:
            return f"; did you mean --{ALIASES[name]}?"
        near = difflib.get_close_matches(name, flags, 1)
        return f"; did you mean --{near[0]}?" if near else ""


def number(kind, interval):
    """Return a type for argparse: text to an int or float in the interval."""
    low, high = (float(bound) for bound in interval[1:-1].split(","))

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            noun = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {noun}") from None
        above = value > low or (value == low and interval[0] == "[")
        below = value < high or (value == high and interval[-1] == "]")
        if not (above and below):
            least = kind is int and value < high
            what = f"must be at least {low:g}" if least else f"must lie in {interval}"
            raise argparse.ArgumentTypeError(f"{what}, not {text}")
        return value

    return parse


def flag(group, name, default, interval, help, **rest):
    """Add --name. interval: of a number, whose kind is the default's; None for text."""
    if interval:
        kind = rest.pop("kind", None) or type(default[0] if isinstance(default, list) else default)
        rest["type"] = number(kind, interval)
    shown = "" if default is None else " (default: %(default)s)"
    group.add_argument(f"--{name}", default=default, help=help + shown, **rest)


def switch(group, name, default, help):
    """Add --name and --no-name."""
    shown = "" if default is None else " (default: %(default)s)"
    action = argparse.BooleanOptionalAction
    group.add_argument(f"--{name}", default=default, help=help + shown, action=action)


# --- train.py -------------------------------------------------------------------------------------

# What a recipe changes of the defaults below, which are the paper's DINO + SERE.
IBOT = dict(
    baseline="ibot", alpha=0.2, beta=0.5, out_dim=8192, shared_head=True, norm_last_layer=False,
    teacher_temp=0.07, teacher_patch_temp=0.07, warmup_teacher_temp_epochs=30,
    global_crops_scale=[0.4, 1.0], local_crops_number=10, local_crops_scale=[0.05, 0.4],
    batch_size_per_gpu=128, clip_grad=0.3,
    li_weight=1.65,    # the release's (4 - alpha - beta) / 2, which made the published numbers
)
RECIPES = {
    "dino": {},
    "ibot": IBOT,
    "ibot-b": IBOT | dict(
        arch="vit_base", relation_heads=12, norm_last_layer=True, warmup_teacher_temp_epochs=50,
        freeze_last_layer=3, global_crops_scale=[0.32, 1.0], local_crops_scale=[0.05, 0.32],
        lr=0.00075, min_lr=2e-6,
    ),
    "mocov3": dict(
        baseline="mocov3", stop_grad_conv1=True, drop_path_rate=0.0, out_dim=256, hidden_dim=4096,
        momentum_teacher=0.99, global_crops_scale=[0.08, 1.0], local_crops_number=0, lr=0.00015,
        min_lr=0.0, warmup_epochs=13, weight_decay=0.1, weight_decay_end=0.1, clip_grad=0.0,
    ),
    "resnet50": dict(
        arch="resnet50", patch_size=32, drop_path_rate=0.0, relation_heads=8, overlap_global=7,
        overlap_local=3, global_crops_scale=[0.14, 1.0], local_crops_scale=[0.05, 0.14],
        optimizer="sgd", lr=0.03, weight_decay=1e-4, weight_decay_end=1e-4,
    ),
    "demo": dict(    # small batches, a small K and a narrow head: many steps in a few minutes
        data_path="shapes", arch="vit_nano", patch_size=8, drop_path_rate=0.0,
        global_crops_size=40, local_crops_number=2, local_crops_size=24, out_dim=256,
        hidden_dim=512, batch_size_per_gpu=16, epochs=3, warmup_epochs=1, lr=0.008, min_lr=1e-5,
        momentum_teacher=0.99, knn_every=3, log_every=50,
        relation_heads=1, temperature_spatial=0.1,    # with 6 and 0.5, A_p stays near uniform
    ),
}

USAGE = "%(prog)s [--recipe NAME] [--data_path PATH] [--flag value ...]; --help lists the flags"


def parse_train_args(argv=None, prog="train.py", add_more_flags=None):
    """Parse and check the command line of train.py; exit with one line for an error.

    prog: the program whose command line it is, for that line; add_more_flags: its own, (parser).
    """
    first = Parser(prog, USAGE, strict=False, add_help=False)
    first.add_argument("--recipe", choices=RECIPES)
    first.add_argument("--baseline")
    first.add_argument("--data_path")
    known, _ = first.parse_known_args(argv)
    named = known.recipe or (known.baseline if known.baseline in RECIPES else None)
    recipe = named or ("dino" if known.data_path else "demo")

    parser = Parser(prog, USAGE, description=(
        "Train a Vision Transformer, or a ResNet-50, without labels and with SERE: L = L_I + alpha "
        f"L_p + beta L_c (Eq. 6). Defaults shown are those of --recipe {recipe}; for another's, "
        "give it beside --help."
    ))
    for add_flags in (add_run_flags, add_encoder_flags, add_relation_flags, add_embedding_flags,
                      add_view_flags, add_optimizer_flags):
        add_flags(parser)
    if add_more_flags:
        add_more_flags(parser)
    parser.set_defaults(**RECIPES[recipe] | {"recipe": recipe})
    args = parser.parse_args(argv)
    args.output_dir = args.output_dir or f"runs/{args.recipe}"
    set_overlap(args)
    if fault := find_fault(args):
        parser.error(fault)
    return args


def add_label_flags(parser):
    flag(parser, "label_depth", None, SIZE, "level of the class folders below train/ and val/: 1 "
         "for train/class/, 2 for train/group/class/; asked for where it is not clear", kind=int)
    flag(parser, "classes", None, None, "use only the class folders in this file, a name a line: "
         "ImageNet-S-300 in a folder of ImageNet-1K", metavar="FILE")


def add_run_flags(parser):
    g = parser.add_argument_group("run")
    flag(g, "recipe", None, None, "a set of defaults; if not given that of --baseline, or dino "
         "(the paper's Sec. 4.1), or demo without --data_path", choices=list(RECIPES))
    flag(g, "data_path", None, None, "folder with train/ and val/, any folder of images (labels "
         f"not needed), or a name: {', '.join(NAMES)}")
    add_label_flags(g)
    flag(g, "output_dir", None, None, "where everything is written, runs/RECIPE if not given; "
         "rerun the same command to resume the run there")
    switch(g, "overwrite", False, "delete any existing run in output_dir")
    flag(g, "seed", 0, COUNT, "weights, shuffling and views are a function of it")
    flag(g, "max_steps", 0, COUNT, "stop after this step of the whole run, with schedules as if it "
         "went on; 0: don't")
    flag(g, "checkpoint_steps", 0, COUNT, "save every so many steps, besides each epoch; 0: don't")
    flag(g, "knn_every", 5, COUNT, "epochs between kNN evaluations, where there are labels; also "
         "before the first and after the last; 0: never")
    flag(g, "log_every", 10, SIZE, "steps between lines of log.jsonl")
    switch(g, "tensorboard", False, "write the log and the pictures for TensorBoard too; needs "
           "`pip install tensorboard`")
    g = parser.add_argument_group("machine (the device is found; torchrun makes it several)")
    cores = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    flag(g, "num_workers", max(1, min(10, cores)), COUNT, "loader processes of a training process; "
         "what is trained does not depend on it")
    flag(g, "precision", "auto", None, "auto: bf16 where the GPU has it, else fp16; fp32 on a CPU",
         choices=["auto", "bf16", "fp16", "fp32"])
    switch(g, "compile", None, "torch.compile; on for CUDA unless told otherwise")
    switch(g, "deterministic", False, "bit-for-bit repeatable on CUDA too, and slower")


def add_encoder_flags(parser):
    g = parser.add_argument_group("encoder")
    flag(g, "arch", "vit_small", None, "encoder", choices=list(ARCHITECTURES))
    flag(g, "patch_size", 16, SIZE, "side of a patch in pixels; smaller is better and slower; "
         "resnet50 has a stride of 32")
    flag(g, "init_from", None, None, "start the encoder of both networks from this file, as for "
         "evaluate.py --pretrained_weights; mind a lower --lr")
    flag(g, "heads", 0, COUNT, "attention heads; 0: the architecture's, or what --init_from is "
         "known to have (MoCo v3's ViT-S has 12)")
    flag(g, "drop_path_rate", 0.1, "[0, 1)", "ViT: stochastic depth of the student's last block, "
         "growing linearly with depth")
    switch(g, "stop_grad_conv1", False, "ViT: keep the patch projection as it was drawn, as MoCo "
           "v3 does for stability")


def add_relation_flags(parser):
    g = parser.add_argument_group("self-relations (SERE)")
    flag(g, "alpha", 1.0, NOT_NEGATIVE, "weight of L_p, spatial self-relation (Eq. 3); 0 leaves it "
         "out (Tables 8 and 14)")
    flag(g, "beta", 1.0, NOT_NEGATIVE, "weight of L_c, channel self-relation (Eq. 5); 0 leaves it "
         "out (Tables 8 and 14)")
    flag(g, "temperature_spatial", 0.5, POSITIVE, "t_p of Eq. 2, of the network that --sharpen "
         "names; the other's is 1 (Table 13)")
    flag(g, "temperature_channel", 0.1, POSITIVE, "t_c of Eq. 4, likewise (Table 13)")
    flag(g, "sharpen", "teacher", None, "who gets t_p and t_c: the teacher as in the authors' "
         "release, or the student as in the text", choices=["teacher", "student"])
    flag(g, "relation_heads", 6, SIZE, "M, groups of channels with a spatial relation each; "
         "divides the encoder's dim (Table 12)")
    flag(g, "overlap_global", None, SIZE, "points a side sampled in the overlap of two global "
         "views; if not given 13/14 of the side of their feature map, which is the paper's 13",
         kind=int)
    flag(g, "overlap_local", None, SIZE, "the same where a local view takes part; if not given the "
         "side of its feature map, which is the paper's 6", kind=int)
    switch(g, "symmetric", False, "leave out the student's prediction heads g (Table 15)")
    flag(g, "channel_relation", "image", None, "what L_c relates channels over: each image (Eq. "
         "4), or the batch, as Barlow Twins does (Table 11)", choices=["image", "batch"])


def add_embedding_flags(parser):
    g = parser.add_argument_group("image embedding (L_I)")
    flag(g, "baseline", "dino", None, "the method SERE is added to (Table 7), with the defaults of "
         "--recipe; dino+ clusters patch embeddings too (Table 10)",
         choices=["dino", "ibot", "mocov3", "dino+"])
    flag(g, "li_weight", 1.0, NOT_NEGATIVE, "weight of L_I; 0 leaves it out (Table 8)")
    flag(g, "out_dim", 65536, SIZE, "K, outputs of the head; fewer (4096) learn faster on small "
         "data")
    flag(g, "hidden_dim", 2048, SIZE, "width of the head's MLP")
    flag(g, "momentum_teacher", 0.996, "[0, 1]", "lambda of the teacher's update at the start, to "
         "1 by cosine; nearer 1 (0.9995) for batches of 256 and less")
    g = parser.add_argument_group("DINO, iBOT")
    switch(g, "norm_last_layer", True, "keep the last layer's rows at length 1; stabler, and "
           "better for small encoders")
    flag(g, "teacher_temp", 0.04, POSITIVE, "teacher temperature after its warm-up; lower it when "
         "the loss stays at ln(out_dim); above 0.07 is unstable")
    flag(g, "warmup_teacher_temp_epochs", 0, COUNT, "epochs of that warm-up, linear; also of the "
         "patch temperature's")
    flag(g, "warmup_teacher_temp", 0.04, POSITIVE, "teacher temperature at the start of its "
         "warm-up, where it has one; at most --teacher_temp is taken")
    flag(g, "freeze_last_layer", 1, COUNT, "epochs in which the head's last layer stays as it is; "
         "more when the loss does not fall")
    g = parser.add_argument_group("iBOT, DINO+ (patch embeddings)")
    switch(g, "shared_head", False, "one last layer, of out_dim outputs, for class and patch "
           "tokens")
    flag(g, "patch_out_dim", 8192, SIZE, "K of the patches' own last layer, without --shared_head")
    flag(g, "teacher_patch_temp", 0.04, POSITIVE, "teacher temperature of patches after the "
         "warm-up")
    flag(g, "warmup_teacher_patch_temp", 0.04, POSITIVE, "the same at the start of the warm-up")
    flag(g, "pred_ratio", [0.0, 0.3], "[0, 1)", "iBOT: share of a global view's patches hidden "
         "from the student: one of these, drawn for each view", nargs="+", metavar="SHARE")
    flag(g, "pred_ratio_var", [0.0, 0.2], "[0, 1)", "iBOT: each share varies by up to so much",
         nargs="+", metavar="SHARE")
    g = parser.add_argument_group("MoCo v3")
    flag(g, "moco_t", 0.2, POSITIVE, "temperature")


def add_view_flags(parser):
    g = parser.add_argument_group("views")
    share = dict(nargs=2, metavar=("LOW", "HIGH"))
    flag(g, "global_crops_size", 224, SIZE, "side of the two global views in pixels")
    flag(g, "global_crops_scale", [0.35, 1.0], "(0, 1]", "their range of the image's area", **share)
    flag(g, "local_crops_number", 4, COUNT, "local views of an image, any number")
    flag(g, "local_crops_size", 96, SIZE, "side of the local views in pixels")
    flag(g, "local_crops_scale", [0.05, 0.35], "(0, 1]", "their range of the image's area", **share)


def add_optimizer_flags(parser):
    g = parser.add_argument_group("optimization")
    flag(g, "optimizer", "adamw", None, "adamw for ViTs; sgd (momentum 0.9) for convnets",
         choices=["adamw", "sgd"])
    flag(g, "epochs", 100, SIZE, "passes over the images")
    flag(g, "batch_size_per_gpu", 64, SIZE, "images of a process and forward pass")
    flag(g, "grad_accum_steps", 1, SIZE, "forward passes of an optimizer step")
    flag(g, "lr", 0.0005, NOT_NEGATIVE, "learning rate per 256 images of the effective batch, "
         "after warm-up")
    flag(g, "min_lr", 1e-6, NOT_NEGATIVE, "learning rate at the end, by cosine; not scaled")
    flag(g, "warmup_epochs", 10, COUNT, "epochs of linear warm-up of the learning rate")
    flag(g, "weight_decay", 0.04, NOT_NEGATIVE, "at the start; none on biases and norms")
    flag(g, "weight_decay_end", 0.4, NOT_NEGATIVE, "at the end, by cosine")
    flag(g, "clip_grad", 3.0, NOT_NEGATIVE, "largest norm of each parameter's own gradient; 0: "
         "don't clip")


def set_overlap(args):
    """Choose the points of ⊙ that are not given by the side of the feature maps."""
    if args.overlap_global is None:
        args.overlap_global = max(1, round(args.global_crops_size / args.patch_size * 13 / 14))
    if args.overlap_local is None:
        args.overlap_local = max(1, args.local_crops_size // args.patch_size)


def find_fault(args):
    """Return an error message for an invalid combination of flags, else None."""
    dim, processes = ARCHITECTURES[args.arch]["dim"], int(os.environ.get("WORLD_SIZE", 1))
    if not args.data_path:
        return f"--recipe {args.recipe} needs --data_path"
    if not (args.alpha or args.beta or args.li_weight):
        return "--alpha, --beta and --li_weight are all 0: nothing to learn from"
    for kind in ("global", "local"):
        low, high = getattr(args, f"{kind}_crops_scale")
        if low > high:
            return f"--{kind}_crops_scale must rise, not {low:g} {high:g}"
        size = getattr(args, f"{kind}_crops_size")
        if size % args.patch_size and (kind == "global" or args.local_crops_number):
            return f"--{kind}_crops_size {size} is not a multiple of --patch_size {args.patch_size}"
    if len(args.pred_ratio) != len(args.pred_ratio_var):
        return "--pred_ratio and --pred_ratio_var must be equally many"
    for share, variance in zip(args.pred_ratio, args.pred_ratio_var):
        if not 0 <= share - variance <= share + variance < 1:
            return f"--pred_ratio {share:g} +- --pred_ratio_var {variance:g} must lie in [0, 1)"
    if args.warmup_epochs >= args.epochs:
        return f"--warmup_epochs {args.warmup_epochs} must be less than --epochs {args.epochs}"
    if args.warmup_teacher_temp_epochs > args.epochs:
        return (f"--warmup_teacher_temp_epochs {args.warmup_teacher_temp_epochs} must be at most "
                f"--epochs {args.epochs}")
    if args.baseline == "mocov3" and args.li_weight and args.batch_size_per_gpu * processes == 1:
        return "--baseline mocov3 tells the images of a batch apart: --batch_size_per_gpu 1 is none"
    if args.alpha and dim % args.relation_heads:
        possible = ", ".join(str(m) for m in range(1, dim + 1) if dim % m == 0)
        return (f"--relation_heads {args.relation_heads} does not divide the {dim} channels of "
                f"--arch {args.arch}; possible: {possible}")
    if ARCHITECTURES[args.arch]["heads"]:
        if args.heads and dim % args.heads:
            return f"--heads {args.heads} does not divide the {dim} channels of --arch {args.arch}"
    else:
        for unfit, remedy in (
            (args.baseline == "ibot" and args.li_weight, "another --baseline: it hides no patches"),
            (args.patch_size != 32, "--patch_size 32, its stride"),
            (args.drop_path_rate, "--drop_path_rate 0"),
            (args.stop_grad_conv1, "--no-stop_grad_conv1"),
        ):
            if unfit:
                return f"--arch {args.arch} needs {remedy}; --recipe resnet50 has what it needs"
    return None
