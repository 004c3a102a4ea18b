"""Detect and segment objects on COCO (Table 2): `evaluate.py detect`.

Cascade Mask R-CNN of torchvision's parts on the feature pyramid of an encoder, in iBOT's settings:
three stages of heads, each trained on the boxes that the one before it made. Crowds are left out of
training, as are images without objects; both count in the evaluation, which is pycocotools'.

B images of a process's batch, n boxes of all of them (x0, y0, x1, y1), K classes and 0, no object,
D channels of the pyramid and the heads
"""

from collections import OrderedDict

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision import ops
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference, maskrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.transforms import v2

from augment import MEAN, STD
from extras.coco import CocoImages, average_precision, draw_pictures
from extras.pyramid import FeaturePyramid, four_maps
from extras.resnet import BatchNorm2d
from support.distributed import world
from support.errors import UserError
from support.fit import Augmented, TrainingBatches, fit, resumable, seed_everything
from support.inputs import autocast
from support.optim import layer_groups
from support.progress import progress

# --- network --------------------------------------------------------------------------------------

GIOU = 10.0      # weight of the box loss beside the others

# Of each stage: from which IoU on a box is an object's, the coder's weights, the loss's weight.
STAGES = [(0.5, (10, 10, 5, 5), 1.0), (0.6, (20, 20, 10, 10), 0.5), (0.7, (30, 30, 15, 15), 0.25)]


class Backbone(nn.Module):
    """Images (B, 3, H, W), normalized -> five maps (B, D, ., .), each half the one before."""

    def __init__(self, encoder, width):
        super().__init__()
        self.encoder, self.pyramid = encoder, FeaturePyramid(encoder)
        self.fpn = ops.FeaturePyramidNetwork(self.pyramid.dims, width, LastLevelMaxPool())

    def forward(self, images):
        with autocast(images.device):
            maps = self.pyramid(four_maps(self.encoder, images, norm=False))
            maps = self.fpn(OrderedDict((str(i), x) for i, x in enumerate(maps)))
        # What boxes are computed from is float32: in bf16 they would be wrong by pixels.
        return OrderedDict((name, x.float()) for name, x in maps.items())


def build_stage(outputs, width, rois, iou, coder_weights):
    """Build the box and mask heads of a stage for 1 + K outputs; see STAGES."""
    box_head = FastRCNNConvFCHead((width, 7, 7), [width] * 4, [1024], norm_layer=BatchNorm2d)
    predictor = FastRCNNPredictor(1024, outputs)
    for layer, std in ((predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)
    levels = ["0", "1", "2", "3"]
    return RoIHeads(
        ops.MultiScaleRoIAlign(levels, 7, sampling_ratio=2), box_head, predictor,
        fg_iou_thresh=iou, bg_iou_thresh=iou, batch_size_per_image=rois, positive_fraction=0.25,
        bbox_reg_weights=coder_weights, score_thresh=0.05, nms_thresh=0.5, detections_per_img=100,
        mask_roi_pool=ops.MultiScaleRoIAlign(levels, 14, sampling_ratio=2),
        mask_head=MaskRCNNHeads(width, [width] * 4, 1),
        mask_predictor=MaskRCNNPredictor(width, width, outputs),
    )


class Cascade(nn.Module):
    """STAGES of torchvision's RoIHeads, each on the boxes of the one before.

    stride: of the finest map in pixels. rois: boxes of an image that a stage is trained on.
    """

    def __init__(self, classes, stride, width, rois):
        super().__init__()
        self.stride = stride
        self.stages = nn.ModuleList(
            [build_stage(1 + classes, width, rois, iou, weights) for iou, weights, _ in STAGES])

    def forward(self, features, proposals, sizes, targets=None):
        """Return (detections, losses) as RoIHeads does; one of them is empty.

        features: of Backbone. proposals: B times (., 4). sizes: B times (height, width), before
        padding.
        """
        h, w = features["0"].shape[-2:]
        grid = [(h * self.stride, w * self.stride)]    # what the maps' scales are found from
        if self.training:
            return [], self.losses(features, proposals, sizes, targets, grid)
        return self.detect(features, proposals, sizes, grid), {}

    def losses(self, features, proposals, sizes, targets, grid):
        """Train each stage on a sample of its proposals: {name: weighted loss}."""
        losses, masks, classes = {}, [t["masks"] for t in targets], [t["labels"] for t in targets]
        for number, (stage, (_, _, weight)) in enumerate(zip(self.stages, STAGES), start=1):
            # The sample's truth: its index in the image, its class or 0, its box.
            proposals, matched, labels, _ = stage.select_training_samples(proposals, targets)
            truth = [t["boxes"][index] for t, index in zip(targets, matched)]
            label, there = torch.cat(labels), torch.cat(labels) > 0    # (n,)

            logits, deltas = predict_boxes(stage, features, proposals, grid)
            losses[f"class_{number}"] = weight * F.cross_entropy(logits, label)
            boxes = own_boxes(stage, deltas, proposals, label)[there]
            giou = ops.generalized_box_iou_loss(boxes, torch.cat(truth)[there], reduction="sum")
            losses[f"box_{number}"] = weight * GIOU * giou / len(label)

            objects = [p[of > 0] for p, of in zip(proposals, labels)]
            matched = [index[of > 0] for index, of in zip(matched, labels)]
            mask_logits = predict_masks(stage, features, objects, grid)
            mask_loss = maskrcnn_loss(mask_logits, objects, masks, classes, matched)
            losses[f"mask_{number}"] = weight * mask_loss

            found = [(p != t).any(dim=1) for p, t in zip(proposals, truth)]    # not truths
            proposals = refine(stage, logits, deltas, proposals, sizes, label)
            proposals = [p[keep] for p, keep in zip(proposals, found)]
        return losses

    def detect(self, features, proposals, sizes, grid):
        """Detect with the last stage's boxes, and classes and masks of all stages' mean."""
        votes, refined = [], proposals
        for stage in self.stages:
            proposals = refined
            logits, deltas = predict_boxes(stage, features, proposals, grid)
            votes.append(logits)
            refined = refine(stage, logits, deltas, proposals, sizes)
        logits = torch.stack(votes).mean(dim=0)
        boxes, scores, labels = stage.postprocess_detections(logits, deltas, proposals, sizes)
        masks = [maskrcnn_inference(predict_masks(stage, features, boxes, grid), labels)
                 for stage in self.stages]    # 3 x B x (., 1, 28, 28)
        return [{"boxes": b, "scores": s, "labels": y, "masks": torch.stack(m).mean(dim=0)}
                for b, s, y, m in zip(boxes, scores, labels, zip(*masks))]


def predict_boxes(stage, features, proposals, grid):
    """Return logits (n, 1 + K) and box deltas (n, 4 (1 + K))."""
    pooled = stage.box_roi_pool(features, proposals, grid)    # (n, D, 7, 7)
    with autocast(pooled.device):
        logits, deltas = stage.box_predictor(stage.box_head(pooled))
    return logits.float(), deltas.float()


def predict_masks(stage, features, boxes, grid):
    """Return mask logits (n, 1 + K, 28, 28)."""
    pooled = stage.mask_roi_pool(features, boxes, grid)    # (n, D, 14, 14)
    with autocast(pooled.device):
        return stage.mask_predictor(stage.mask_head(pooled)).float()


def own_boxes(stage, deltas, proposals, label):
    """Return the boxes (n, 4) of each proposal's own class."""
    boxes = stage.box_coder.decode(deltas, proposals)    # (n, 1 + K, 4)
    return boxes[torch.arange(len(label), device=label.device), label]


@torch.no_grad()
def refine(stage, logits, deltas, proposals, sizes, label=None):
    """Return a stage's boxes, as proposals, of the true class or else the likeliest."""
    best = 1 + logits[:, 1:].argmax(dim=1)
    label = best if label is None else torch.where(label > 0, label, best)
    boxes = own_boxes(stage, deltas, proposals, label).split([len(p) for p in proposals])
    return [ops.clip_boxes_to_image(b, size) for b, size in zip(boxes, sizes)]


def build_detector(encoder, classes, side, width=256, rois=512):
    """Build the network: images and targets -> losses.

    Images are float (3, H, W) in [0, 1], of any sizes. In eval mode: images -> detections, in their
    pixels. side: an image's short side when tested. In training it is drawn from 0.6 to 1 of that.
    The long side is at most 5/3 of it.
    width: D. rois: boxes of an image that a stage is trained on.
    """
    encoder.norm.requires_grad_(False)    # it is not used, and DDP would wait for its gradient
    stride = encoder.patch_size // (4 if encoder.heads else 8)
    anchors = AnchorGenerator([(8 * stride * 2**i,) for i in range(5)], [(0.5, 1.0, 2.0)] * 5)
    kept = {"training": 2000, "testing": 1000}
    rpn = RegionProposalNetwork(
        anchors, RPNHead(width, 3), fg_iou_thresh=0.7, bg_iou_thresh=0.3, batch_size_per_image=256,
        positive_fraction=0.5, pre_nms_top_n=kept, post_nms_top_n=kept, nms_thresh=0.7)
    sides = [round(side * share / 25) for share in range(15, 26)]    # 480, 512, ... 800
    transform = GeneralizedRCNNTransform(
        sides, round(side * 5 / 3), MEAN, STD, size_divisible=max(32, 2 * encoder.patch_size))
    heads = Cascade(classes, stride, width, rois)
    return GeneralizedRCNN(Backbone(encoder, width), rpn, heads, transform)


# --- training and measuring -----------------------------------------------------------------------


def as_lists(batch):
    """Collate [(image, target)], whose sizes differ, as (images, targets)."""
    return [image for image, _ in batch], [target for _, target in batch]


def learning_rate(step, base, warmup, steps):
    """Return a step's learning rate: warm-up, then a tenth twice."""
    falls = sum(step >= round(steps * share) for share in (8 / 12, 11 / 12))
    return base * min(1, (step + 1) / max(1, warmup)) * 0.1**falls


def train_detector(model, batches, args, device, path, arguments):
    """Train by AdamW with layer-wise decay for the sum of all losses."""
    top_lr = args.lr * batches.batch_size * world()[1] / 256
    backbone, encoder = model.backbone, model.backbone.encoder
    head = nn.ModuleList([backbone.pyramid, backbone.fpn, model.rpn, model.roi_heads])
    groups = layer_groups(encoder, head, args.layer_decay, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=top_lr)
    network = DistributedDataParallel(model) if world()[1] > 1 else model
    model.train()
    if not encoder.heads:
        encoder.eval()    # ResNet: the statistics of BatchNorm stay

    def step(number, batch):
        seed_everything(args.seed, number, world()[0])    # sizes, samples, stochastic depth
        images = [image.to(device, non_blocking=True).float() / 255 for image in batch[0]]
        targets = [{name: x.to(device) for name, x in t.items()} for t in batch[1]]
        rate = learning_rate(number, top_lr, args.warmup_steps, args.epochs * batches.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        loss = sum(network(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    fit(step, {"model": model, "optimizer": optimizer}, batches, args.epochs, path, arguments)
    model.eval()


@torch.no_grad()
def detect(model, image, device):
    """Return the detections in a uint8 image (3, H, W), in its pixels."""
    return model([image.to(device).float() / 255])[0]


def detect_all(model, images, processes):
    """Return the results on a CocoImages in the first process, [] elsewhere."""
    mine, results = range(processes.rank, len(images), processes.size), []
    for i in progress(mine, "detecting", processes.rank == 0):
        results += images.results(i, detect(model, images[i][0], processes.device))
    if processes.distributed:
        shares = [None] * processes.size if processes.rank == 0 else None
        dist.gather_object(results, shares)
        results = [entry for share in shares or [] for entry in share]
    return results


def run(args, encoder, size, processes):
    """Train a detector and measure it, for evaluate.py."""
    patch, side, device = encoder.patch_size, args.image_size or 800, processes.device
    if patch not in (4, 8, 16, 32):
        raise UserError(f"detect needs patches of 4, 8, 16 or 32 pixels, not {patch}")
    train, val = (CocoImages(args.data_path, split) for split in ("train", "val"))
    if train.names != val.names:
        raise UserError(f"{args.data_path}: the two JSON files differ in their categories")
    if not (train.with_objects and val.with_objects):
        raise UserError(f"{args.data_path}: train or val has no image with an object")
    args.batch_size_per_gpu = args.batch_size_per_gpu or max(1, 16 // processes.size)
    torch.manual_seed(args.seed)
    model = build_detector(encoder, len(train.names), side, args.width, args.rois).to(device)
    flip = v2.Compose([v2.RandomHorizontalFlip(), v2.ToPureTensor()])
    images = Augmented(train, train.with_objects, flip, args.seed)
    batches = TrainingBatches(
        images, args.batch_size_per_gpu, args.num_workers, device, collate=as_lists)
    path, arguments = resumable(args, encoder, side, [train.ids[i] for i in train.with_objects])
    processes.working, batch = True, batches.batch_size * processes.size
    processes.say(
        f"detect, the {len(images)} of {len(train)} training images of {args.data_path} that have "
        f"objects, short side {side}, {args.epochs} epochs, batch {batch}, lr "
        f"{args.lr * batch / 256:g}, layer decay {args.layer_decay}")
    train_detector(model, batches, args, device, path, arguments)
    results = detect_all(model, val, processes)
    if processes.rank > 0:
        return {}
    if args.pictures:
        file = path.with_name("detections.png")
        draw_pictures(file, lambda image: detect(model, image, device), val, args.pictures)
        processes.say(f"{file}: truth and detections")
    scores = average_precision(val.coco, results)
    processes.say(f"{len(val)} validation images, {len(results)} detections, final epoch")
    for name, values in scores.items():
        processes.say(f"{name:4}  " + "  ".join(f"{k} {v:.1f} %" for k, v in values.items()))
    return {"images": len(images), "classes": len(train.names), "short_side": side, "batch": batch,
            "detections": len(results)} | scores
