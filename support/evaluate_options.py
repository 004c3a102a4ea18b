"""Parse the command line of evaluate.py: the flags of each task."""

import os

from model import ARCHITECTURES
from support.options import (
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    SIZE,
    Parser,
    add_label_flags,
    flag,
    switch,
)

LEARNING_RATES = [m * 10.0**e for e in (-4, -3, -2, -1) for m in (1, 2, 5)] + [1.0]    # per 256


def add_weights_flags(parser, task):
    one = task == "export"    # of two flags
    group = parser.add_mutually_exclusive_group(required=True) if one else parser
    flag(group, "pretrained_weights", None, None, "backbone.pth or checkpoint.pth of train.py, or "
         "a released file of DINO, DINOv2, iBOT, SERE, MoCo v3, MAE, timm or torchvision",
         required=not one)
    if one:
        flag(group, "untrained", None, COUNT, "in place of a file, the encoder --arch as train.py "
             "starts from it with this seed, 0 if none is given (Table 8's first row)", kind=int,
             nargs="?", const=0, metavar="SEED")
        flag(parser, "patch_size", None, SIZE, "of an untrained encoder; 16 if not given", kind=int)
    flag(parser, "arch", None, None, "what the weights must be; read off them if not given",
         choices=list(ARCHITECTURES))
    flag(parser, "checkpoint_key", None, None, "network of a training checkpoint; if not given the "
         "one its authors evaluate", choices=["teacher", "student"])
    flag(parser, "heads", None, SIZE, "attention heads, where they are other than the "
         "architecture's: 12 for a ViT-S from MoCo v3", kind=int)
    flag(parser, "image_size", None, SIZE, "side in pixels, after resizing the short side to 256 / "
         "224 of it; if not given the size trained at (a ResNet's is not known: 224). detect: the "
         "short side; if not given 800", kind=int)
    flag(parser, "json", None, None, "write the result there too", metavar="FILE")


def add_data_flags(parser, batch_size=128, batch="images of a process and forward pass"):
    flag(parser, "data_path", None, None, "folder with train/ and val/, or a name as for train.py",
         required=True)
    flag(parser, "batch_size_per_gpu", batch_size, SIZE, batch, kind=int)
    flag(parser, "num_workers", min(10, os.cpu_count() or 1), COUNT, "loader processes")
    flag(parser, "seed", 0, COUNT, "of what is random")


def add_epochs_flags(parser):
    flag(parser, "epochs", 100, SIZE, "passes over the training images")
    flag(parser, "output_dir", None, None, "where checkpoint.pth is written every epoch, from "
         "which the same command resumes; if not given a folder beside the weights")


def add_knn_flags(parser):
    add_data_flags(parser)
    add_label_flags(parser)
    flag(parser, "nb_knn", [10, 20, 100, 200], SIZE, "k", nargs="+")
    flag(parser, "temperature", 0.07, POSITIVE, "votes weigh exp(similarity / temperature)")


def add_linear_flags(parser):
    add_data_flags(parser)
    add_label_flags(parser)
    add_epochs_flags(parser)
    flag(parser, "lr", LEARNING_RATES, POSITIVE, "learning rates per 256 images, trained side by "
         "side", nargs="+")
    flag(parser, "holdout", 0.1, "[0, 1)", "share of the training images kept to choose the rate "
         "on; 0: choose on val, as iBOT does")
    flag(parser, "n_last_blocks", None, SIZE, "blocks whose class tokens are taken; 4, from "
         "vit_base on and for resnet50 1, if not given", kind=int)
    switch(parser, "avgpool_patchtokens", None, "the mean patch too; from vit_base on if not given")


def add_finetune_flags(parser):
    add_data_flags(parser)
    add_label_flags(parser)
    add_fit_flags(parser)
    flag(parser, "lr", 0.0005, POSITIVE, "learning rate per 256 images, of the head (1e-3 at batch "
         "512)")
    parser.epilog = ("The fine-tuned model is checkpoint.pth in --output_dir. extras.finetune."
                     "load_classifier reads it, and --pretrained_weights its encoder.")
    flag(parser, "layer_decay", 0.65, "(0, 1]", "of the learning rate, a layer down")
    switch(parser, "avgpool_patchtokens", False, "the last block's mean patch, through a new norm, "
           "in place of the class token, as MAE")
    flag(parser, "smoothing", 0.1, "[0, 1)", "of labels")
    flag(parser, "erasing", 0.25, "[0, 1]", "probability that a part of an image becomes noise")
    flag(parser, "mixup", 0.8, NOT_NEGATIVE, "alpha; 0: without")
    flag(parser, "cutmix", 1.0, NOT_NEGATIVE, "alpha; 0: without")
    flag(parser, "train_fraction", 1.0, "(0, 1]", "of each class's training images, drawn with the "
         "seed")
    flag(parser, "train_list", None, None, "file of training images, a name a line, as the "
         "published 1 %% and 10 %% lists; in place of --train_fraction", metavar="FILE")


# Flags of segment that belong to one head, with their defaults; None: it depends on the data set.
OF_HEAD = {
    "linear": dict(epochs=100, warmup_epochs=5, min_lr=1e-6, scale=[0.14, 1.0]),
    "upernet": dict(steps=None, warmup_steps=None, checkpoint_steps=500),
}


def add_segment_flags(parser):
    add_data_flags(parser, None, "images of a process and forward pass; if not given all processes "
                   "together have the paper's: linear 256, upernet 16")
    flag(parser, "head", "linear", None, "a 1 x 1 convolution on the patches, or UperNet",
         choices=list(OF_HEAD))
    switch(parser, "frozen", False, "train the head only: with the convolution a dense probe")
    flag(parser, "lr", None, POSITIVE, "learning rate; of linear per 256 images, 5e-4, frozen "
         "0.01; of upernet as it is, 3e-5, from vit_base on 8e-5", kind=float)
    flag(parser, "layer_decay", None, "(0, 1]", "of the learning rate, a layer down; linear 0.5, "
         "upernet 0.9, from vit_base on 0.65", kind=float)
    flag(parser, "weight_decay", 0.05, NOT_NEGATIVE, "none on biases and norms")
    flag(parser, "drop_path_rate", None, "[0, 1)", "stochastic depth; 0.1, frozen 0, if not "
         "given", kind=float)
    flag(parser, "classes", None, "[2, 9e18]", "their number; if not given the data set's, or 1 + "
         "the largest in the training masks", kind=int)
    flag(parser, "ignore_index", None, "[-1, 9e18]", "what masks in a folder of images/ and masks/ "
         "call a pixel that does not count, -1: none; 255 if not given", kind=int)
    flag(parser, "val_split", "val", None, "folder of the images to measure on")
    flag(parser, "test_size", None, SIZE, "short side of an image when it is segmented, in whole "
         "patches; linear 256 / 224 of the training size, upernet as that", kind=int)
    switch(parser, "sliding", None, "slide windows of the training size over an image instead of "
           "taking it at once; upernet only if not given")
    flag(parser, "predictions", None, None, "write predictions there, coded as the masks are",
         metavar="DIR")
    flag(parser, "pictures", 0, COUNT, "draw so many predictions beside image and truth, into the "
         "output folder")
    flag(parser, "output_dir", None, None, "where checkpoint.pth is written, from which the same "
         "command resumes; if not given a folder beside the weights")
    g = parser.add_argument_group("--head linear")
    flag(g, "epochs", None, SIZE, "passes over the training images; 100 if not given", kind=int)
    flag(g, "warmup_epochs", None, COUNT, "epochs of linear warm-up; 5 if not given", kind=int)
    flag(g, "min_lr", None, NOT_NEGATIVE, "learning rate at the end, by cosine, not scaled; 1e-6 "
         "if not given", kind=float)
    flag(g, "scale", None, "(0, 1]", "range of a training crop's share of the image; 0.14 1 if not "
         "given", nargs=2, kind=float)
    g = parser.add_argument_group("--head upernet")
    flag(g, "steps", None, SIZE, "of training; 160000 for ADE20K, else 20000, if not given",
         kind=int)
    flag(g, "warmup_steps", None, COUNT, "steps of linear warm-up; 1500, or a tenth of fewer than "
         "15000 steps, if not given", kind=int)
    flag(g, "checkpoint_steps", None, SIZE, "steps between checkpoints; 500 if not given", kind=int)


def settle_head(args):
    """Set the flags of segment's --head to their defaults.

    Returns an error message, or None.
    """
    for head, defaults in OF_HEAD.items():
        for name, default in defaults.items():
            given = getattr(args, name) is not None
            if given and head != args.head:
                return f"--{name} is a flag of --head {head}, not of {args.head}"
            if not given and head == args.head:
                setattr(args, name, default)
    return None


def add_detect_flags(parser):
    add_data_flags(parser, None, "images of a process and step; if not given all processes "
                   "together have the paper's 16")
    add_epochs_flags(parser)
    parser.set_defaults(epochs=12)
    flag(parser, "lr", 0.0016, POSITIVE, "learning rate per 256 images (1e-4 at batch 16); a tenth "
         "after 2/3 of the epochs, a hundredth after 11/12")
    flag(parser, "warmup_steps", 500, COUNT, "steps of linear warm-up")
    flag(parser, "layer_decay", 0.8, "(0, 1]", "of the learning rate, a layer down")
    flag(parser, "weight_decay", 0.05, NOT_NEGATIVE, "none on biases and norms")
    flag(parser, "drop_path_rate", 0.1, "[0, 1)", "stochastic depth")
    flag(parser, "width", 256, SIZE, "channels of the pyramid and the heads; 32 on a CPU")
    flag(parser, "rois", 512, SIZE, "boxes of an image that each stage is trained on; 32 on a CPU")
    flag(parser, "pictures", 0, COUNT, "draw truth and detections in so many images to "
         "detections.png in the output folder")


def add_fit_flags(parser):
    add_epochs_flags(parser)
    flag(parser, "warmup_epochs", 5, COUNT, "epochs of linear warm-up")
    flag(parser, "min_lr", 1e-6, NOT_NEGATIVE, "learning rate at the end, by cosine; not scaled")
    flag(parser, "weight_decay", 0.05, NOT_NEGATIVE, "none on biases and norms")
    flag(parser, "drop_path_rate", 0.1, "[0, 1)", "stochastic depth")


def add_export_flags(parser):
    flag(parser, "output", None, None, "file to write; as safetensors where its name ends in "
         ".safetensors", required=True, metavar="FILE")


def add_features_flags(parser):
    add_data_flags(parser)
    add_label_flags(parser)
    flag(parser, "split", "train", None, "which images, where --data_path has train/ and val/ or "
         "is a name", choices=["train", "val"])
    flag(parser, "output", None, None, "file to write, for torch.load", required=True,
         metavar="FILE.pt")


EVALUATIONS = {
    "knn": (add_knn_flags, "weighted k-nearest neighbors"),
    "linear": (add_linear_flags, "linear classification of frozen features"),
    "finetune": (add_finetune_flags, "fine-tuning for classification, with all or few labels"),
    "segment": (add_segment_flags, "segmentation by a 1 x 1 convolution or UperNet; --data_path: "
                "shapes, voc, ImageNet-S, ADE20K, or a folder with train/ and val/, images/ and "
                "masks/ in each"),
    "features": (add_features_flags, "the class tokens of images, in a file; --data_path: any "
                 "folder of images, labels not needed, or a name"),
    "detect": (add_detect_flags, "detection and instance segmentation by Cascade Mask R-CNN; "
               "--data_path: a folder with train2017/, val2017/ and annotations/, as COCO's"),
    "export": (add_export_flags, "the encoder alone, as a plain state dict"),
}


def parse_evaluate_args(argv=None):
    """Parse and check the command line of evaluate.py; exit with one line if bad."""
    usage = "%(prog)s TASK --pretrained_weights FILE --data_path PATH [--flag value ...]"
    parser = Parser("evaluate.py", usage, description="Measure what a trained encoder is worth.")
    tasks = parser.add_subparsers(dest="task", required=True, parser_class=Parser)
    of_export = "%(prog)s export (--pretrained_weights FILE | --untrained SEED --arch NAME) " \
                "--output FILE"
    for name, (add_flags, help) in EVALUATIONS.items():
        own = of_export if name == "export" else usage.replace("TASK", name)
        task = tasks.add_parser(name, prog="evaluate.py", usage=own, help=help, description=help)
        add_weights_flags(task, name)
        add_flags(task)
    args = parser.parse_args(argv)
    if args.task == "segment":
        if fault := settle_head(args):
            parser.error(fault)
        for name in ("layer_decay", "drop_path_rate"):
            if args.frozen and getattr(args, name) is not None:
                parser.error(f"--{name} is for the encoder, which --frozen leaves as it is")
        if args.drop_path_rate is None:
            args.drop_path_rate = 0.0 if args.frozen else 0.1
    if args.task == "finetune" and args.train_list and args.train_fraction < 1:
        parser.error("--train_list is in place of --train_fraction: give one of them")
    untrained = getattr(args, "untrained", None) is not None
    if untrained and not args.arch:
        parser.error("--untrained needs --arch")
    if untrained and args.patch_size and args.arch == "resnet50":
        parser.error("--patch_size: a ResNet has no patches")
    if not untrained and getattr(args, "patch_size", None):
        parser.error("--patch_size is that of the weights; it goes with --untrained alone")
    warmup, epochs = getattr(args, "warmup_epochs", None), getattr(args, "epochs", None)
    if epochs and warmup is not None and warmup >= epochs:
        parser.error(f"--warmup_epochs {warmup} must be less than --epochs {epochs}")
    low, high = getattr(args, "scale", None) or (0, 1)
    if low > high:
        parser.error(f"--scale must rise, not {low:g} {high:g}")
    return args
