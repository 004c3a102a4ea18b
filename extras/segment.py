"""Segment images by a 1 x 1 convolution or UperNet: `evaluate.py segment`.

The convolution, fine-tuned, is the paper's ImageNet-S protocol (Tables 1, 7 to 16) on any data set;
frozen, it is a dense probe. UperNet (Tables 2, 7 to 16) is in extras/upernet.py, data sets and
their masks are in extras/masks.py.

B batch, C channels of the encoder, K classes, (H, W) pixels, (h, w) patches
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode, v2

from augment import normalize
from extras.masks import IGNORED, build_segmentation, count_classes, draw_masks
from extras.upernet import ScaleAndCrop, UperNet, linear_schedule, upsample
from model import ARCHITECTURES
from support.distributed import sum_over_processes, world
from support.errors import UserError
from support.fit import Augmented, TrainingBatches, fit_adamw, resumable
from support.inputs import autocast
from support.optim import cosine_schedule, layer_groups
from support.progress import progress
from support.workers import ignore_signals

# --- network and loss -----------------------------------------------------------------------------


class LinearHead(nn.Module):
    """A new norm and a 1 x 1 convolution: (B, C, h, w) -> [logits (B, K, 2h, 2w)]."""

    def __init__(self, encoder, classes):
        super().__init__()
        encoder.norm.requires_grad_(False)    # the new one is in its place
        self.norm = nn.LayerNorm(encoder.dim, eps=1e-6) if encoder.heads else nn.Identity()
        self.linear = nn.Linear(encoder.dim, classes)
        nn.init.trunc_normal_(self.linear.weight, std=2e-5)
        nn.init.zeros_(self.linear.bias)

    def features(self, encoder, images):
        h, w = (side // encoder.patch_size for side in images.shape[-2:])
        return encoder(images)[:, 1:].mT.unflatten(-1, (h, w))

    def forward(self, features, size):
        logits = self.linear(self.norm(features.movedim(1, -1))).movedim(-1, 1).float()
        return [upsample(logits, [2 * side for side in features.shape[-2:]])]


class Segmenter(nn.Module):
    """Images (B, 3, H, W), normalized -> logits, and those of auxiliary heads.

    frozen: train the head alone.
    """

    def __init__(self, encoder, head, classes, frozen):
        super().__init__()
        self.encoder = encoder.requires_grad_(not frozen)
        self.frozen, self.classes = frozen, classes
        self.head = {"linear": LinearHead, "upernet": UperNet}[head](encoder, classes)

    def train(self, mode=True):
        super().train(mode)
        if self.frozen:
            self.encoder.eval()    # no stochastic depth, no batch statistics
        return self

    def forward(self, images):
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = self.head.features(self.encoder, images)
        return self.head(features, images.shape[-2:])


def segmentation_loss(model, images, masks, weights=(1.0, 0.4)):
    """Compute cross-entropy per pixel: images (B, 3, H, W) in [0, 1], masks (B, H, W).

    Masks are brought to the size of the logits. weights: of the logits that count and of auxiliary
    ones.
    """
    total = 0
    for weight, logits in zip(weights, model(normalize(images))):
        targets = F.interpolate(masks[:, None].float(), logits.shape[-2:], mode="nearest-exact")
        targets = targets[:, 0].long()
        losses = F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")
        total = total + weight * losses / (targets != IGNORED).sum().clamp(min=1)
    return total


class CropBoth:
    """Cut, resize and flip an image and its mask alike, to size x size.

    colors: change the image's colors too, as the authors do in fine-tuning.
    """

    def __init__(self, size, scale, colors):
        self.crop = v2.RandomResizedCrop(size, scale)
        self.colors = v2.Compose([
            v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8),
            v2.RandomGrayscale(p=0.2),
            v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], p=0.5),
        ]) if colors else nn.Identity()

    def __call__(self, image, mask):
        place = self.crop.make_params([image]).values()
        image = v2.functional.resized_crop(image, *place, self.crop.size, antialias=True)
        mask = v2.functional.resized_crop(
            mask[None], *place, self.crop.size, InterpolationMode.NEAREST_EXACT)[0]
        if torch.rand(1) < 0.5:
            image, mask = image.flip(-1), mask.flip(-1)
        return self.colors(image), mask


# --- prediction -----------------------------------------------------------------------------------


@torch.no_grad()
def predict(model, image, size, window=None):
    """Return the classes (H, W) of a uint8 image (3, H, W).

    Its short side is resized to `size`. window: None, the image at once, its sides cut down to
    whole patches; else square windows of that side, at most `size`, slide over it by 2/3 of it, and
    their logits are averaged.
    """
    H, W = image.shape[-2:]
    patch, short = model.encoder.patch_size, min(H, W)
    if window is None:
        sides = [max(patch, side * size // short // patch * patch) for side in (H, W)]
        return classes_of(model(resized(image, sides))[0], (H, W))
    sides = [max(window, round(side * size / short)) for side in (H, W)]
    x = resized(image, sides)
    total, times = x.new_zeros(1, model.classes, *sides), x.new_zeros(sides)
    for top in starts(sides[0], window):
        for left in starts(sides[1], window):
            inside = (..., slice(top, top + window), slice(left, left + window))
            total[inside] += upsample(model(x[inside])[0].float(), (window, window))
            times[inside] += 1
    return classes_of(total / times, (H, W))


def resized(image, sides):
    """Resize a uint8 image (3, H, W) and make it a batch for the encoder."""
    x = v2.functional.resize(image, sides, InterpolationMode.BILINEAR, antialias=True)
    return normalize(x.float()[None] / 255)


def starts(length, window):
    """Return where windows begin that cover `length`.

    Each begins 2/3 of a window after the one before.
    """
    return sorted({min(i, length - window) for i in range(0, length, max(1, window * 2 // 3))})


def classes_of(logits, size, most=1000):
    """Return the class of each pixel: logits (1, K, h, w), bilinear, -> (H, W).

    An image of more than most x most pixels is decided at a long side of `most`, and enlarged.
    """
    shrink = most / max(size) if size[0] * size[1] > most**2 else 1.0
    sides = [max(1, round(side * shrink)) for side in size]
    classes = upsample(logits.float(), sides).argmax(dim=1, keepdim=True)
    return F.interpolate(classes.float(), size, mode="nearest-exact")[0, 0].long()


# --- measures -------------------------------------------------------------------------------------


def count_pixels(prediction, mask, classes):
    """Count the pixels of each class, but IGNORED ones: right, true, predicted (3, K) int64."""
    true, predicted = (x[mask != IGNORED].long() for x in (mask, prediction))
    return torch.stack([torch.bincount(x, minlength=classes)
                        for x in (true[true == predicted], true, predicted)])


def foreground_f(counts):
    """Return F of what is not class 0, whichever class, with β² = 0.3 (Table 9).

    counts: of one image. nan where its mask has no such pixel.
    """
    everything, ground = counts[1].sum().double(), counts[:, 0].double()
    true, predicted = everything - ground[1], everything - ground[2]
    both = true + predicted - (everything - ground[0])    # neither is ground in right ground
    precision, recall = both / predicted.clamp(min=1), both / true
    return 1.3 * precision * recall / (0.3 * precision + recall).clamp(min=1e-12)


def scores(counts, absent_count):
    """Return the scores of counts (3, K), in %, and the IoU of each class.

    absent_count: as ImageNet-S, mIoU is over all classes, and one without a pixel has IoU 0; else
    over those in a mask or a prediction. mAcc is over those in a mask.
    """
    hits, true, predicted = counts.double()
    iou = 100 * hits / (true + predicted - hits)    # nan for a class without a pixel
    miou = iou.nan_to_num(0).mean() if absent_count else iou.nanmean()
    values = {"mIoU": miou, "mAcc": 100 * (hits / true).nanmean(),
              "pixel_accuracy": 100 * hits.sum() / true.sum()}
    values = {name: value.item() for name, value in values.items()}
    return values | {"IoU": [None if x != x else x for x in iou.tolist()]}


def evaluate_segmentation(model, images, size, window, device, num_workers=0, folder=None):
    """Return the scores on a data set of (image, mask), {} without masks.

    Each process predicts its share. folder: write predictions there.
    """
    rank, processes = world()
    mine = range(rank, len(images), processes)
    loader = DataLoader(images, batch_size=None, sampler=mine, num_workers=num_workers,
                        worker_init_fn=ignore_signals)
    total = torch.zeros(3, model.classes, dtype=torch.long, device=device)
    f = torch.zeros(2, dtype=torch.double, device=device)    # their sum and number
    for i, (image, mask) in zip(mine, progress(loader, "segmenting", rank == 0)):
        with autocast(device):
            prediction = predict(model, image.to(device), size, window)
        if folder:
            images.write(i, prediction, folder)
        counts = count_pixels(prediction, mask.to(device), model.classes)
        total += counts
        of_image = foreground_f(counts)
        f += torch.stack([of_image.nan_to_num(0), (~of_image.isnan()).double()])
    total, f = sum_over_processes(total), sum_over_processes(f)
    if not images.has_masks:
        return {}
    found = total[1].nonzero().flatten().tolist()
    if len(found) < 2:
        hold = f"hold class {found[0]} alone" if found else "hold no pixel that counts"
        raise UserError(f"the masks of the {len(images)} images to measure on {hold}; see "
                        "--ignore_index")
    values = scores(total, images.layout == "imagenet-s")
    return values | {"foreground_F": 100 * (f[0] / f[1]).item() if f[1] else None}


def draw_predictions(model, images, number, size, window, device, path):
    """Draw some images, evenly taken, beside truth and prediction."""
    rows = []
    for i in torch.linspace(0, len(images) - 1, min(number, len(images))).long().tolist():
        image, mask = images[i]
        with autocast(device):
            rows.append((image, mask, predict(model, image.to(device), size, window).cpu()))
    draw_masks(rows, images.class_names, path)


# --- the task -------------------------------------------------------------------------------------


def settle(args, encoder, size, layout, processes):
    """Fill in defaults that depend on the head, the encoder and the data set.

    Returns the sides of training crops and of the short side to test at. Raises UserError.
    """
    large = encoder.heads and encoder.dim >= ARCHITECTURES["vit_base"]["dim"]
    patch = encoder.patch_size
    if args.ignore_index is not None and layout != "folder":
        raise UserError(f"--ignore_index is for folders of images/ and masks/: {args.data_path} "
                        "says itself which pixels do not count")
    if args.head == "upernet":
        size = args.image_size or round(512 / patch) * patch
        args.steps = args.steps or (160_000 if layout == "ade20k" else 20_000)
        if args.warmup_steps is None:
            args.warmup_steps = min(1500, args.steps // 10)
        if args.warmup_steps >= args.steps:
            raise UserError(f"--warmup_steps {args.warmup_steps} must be less than --steps "
                            f"{args.steps}")
        defaults = (16, 8e-5, 0.65) if large else (16, 3e-5, 0.9)
    else:
        defaults = (256, 0.01 if args.frozen else 5e-4, 0.5)
    batch, lr, layer_decay = defaults
    args.batch_size_per_gpu = args.batch_size_per_gpu or max(1, batch // processes.size)
    args.lr = args.lr or lr
    args.layer_decay = args.layer_decay or layer_decay
    if args.sliding is None:
        args.sliding = args.head == "upernet"
    test_size = args.test_size or (size if args.head == "upernet" else size * 256 / 224)
    test_size = max(1, round(test_size / patch)) * patch
    if args.sliding and test_size < size:
        raise UserError(f"windows of {size} do not fit into --test_size {test_size}: give a larger "
                        "one, or --no-sliding")
    return size, test_size


def train(args, model, images, size, encoder, processes):
    """Train a Segmenter.

    Returns the folder of its checkpoint, and its protocol in words.
    """
    upernet, indices = args.head == "upernet", list(range(len(images)))
    transform = (ScaleAndCrop(size) if upernet
                 else CropBoth(size, args.scale, colors=not args.frozen))
    samples = Augmented(images, indices, transform, args.seed)
    batches = TrainingBatches(samples, args.batch_size_per_gpu, args.num_workers, processes.device,
                              keep_last=not upernet)
    batch = batches.batch_size * processes.size
    if upernet and batch == 1:
        raise UserError("--head upernet normalizes over a batch: 1 image is none")
    path, arguments = resumable(args, encoder, size, list(map(str, images.names)))
    processes.working = True
    if upernet:
        rates = linear_schedule(args.lr, args.steps, args.warmup_steps)
        how = f"{args.steps} steps, batch {batch}, lr {args.lr:g}"
    else:
        top_lr, warmup = args.lr * batch / 256, args.warmup_epochs * batches.steps
        rates = cosine_schedule(top_lr, min(args.min_lr, top_lr), args.epochs * batches.steps,
                                warmup)
        how = f"{args.epochs} epochs, batch {batch}, lr {args.lr:g} per 256"
    groups = layer_groups(model.encoder, model.head, args.layer_decay, args.weight_decay)
    fit_adamw(model, segmentation_loss, batches, groups, rates.tolist(), args.seed, path, arguments,
              save_every=args.checkpoint_steps if upernet else None)
    tuned = "frozen" if args.frozen else f"fine-tuned, layer decay {args.layer_decay}"
    return path.parent, f"{args.head} head, {tuned}, {len(images)} training images of " \
                        f"{args.data_path} at {size} px, {how}"


def run(args, encoder, size, processes):
    """Train a segmentation and measure it, for evaluate.py."""
    images = build_segmentation(args.data_path, "train", args.ignore_index)
    val = build_segmentation(args.data_path, args.val_split, args.ignore_index)
    if not (val.has_masks or args.predictions):
        raise UserError(f"the masks of {args.val_split} are withheld: give --predictions DIR")
    size, test_size = settle(args, encoder, size, images.layout, processes)
    classes = count_classes(images, args.classes)
    count_classes(val, classes)
    images.classes = val.classes = classes
    if args.predictions:
        try:
            Path(args.predictions).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--predictions: {error}") from error
    torch.manual_seed(args.seed)
    model = Segmenter(encoder, args.head, classes, args.frozen).to(processes.device)
    folder, protocol = train(args, model, images, size, encoder, processes)
    window, device = size if args.sliding else None, processes.device
    result = evaluate_segmentation(model, val, test_size, window, device, args.num_workers,
                                   args.predictions)
    say = processes.say
    say(protocol)
    windows = f", windows of {size}" if args.sliding else ""
    over = ", mIoU over all, absent ones 0" if val.layout == "imagenet-s" else ""
    say(f"{len(val)} images of {args.val_split}, short side {test_size}{windows}, {classes} "
        f"classes{over}, at the end of training")
    say("  ".join(f"{name} {value:.1f} %" for name, value in result.items()
                  if isinstance(value, float)))
    if args.pictures and processes.rank == 0:
        picture = folder / "segmentation.png"
        draw_predictions(model, val, args.pictures, test_size, window, device, picture)
        say(f"{picture}: {args.pictures} predictions")
    if args.predictions:
        server = "; zipped with a method.txt they go to the server" * (val.layout == "imagenet-s")
        say(f"{args.predictions}: predictions, coded as the masks are{server}")
    return {"images": len(images), "classes": classes, "image_size": size,
            "test_size": test_size} | result
