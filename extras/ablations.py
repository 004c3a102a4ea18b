"""What the paper compares SERE with, and no recipe uses.

DINO+ (Table 10), and relations over the batch (Table 11). And what colors alone tell.

B batch, V views, G global views, N patches, C channels, K outputs, S points a side
"""

import torch
from torch import nn

from augment import denormalize
from baselines import DINOLoss, IBOTHead, IBOTLoss, assign, cross_entropy, entropy
from relations import SelfRelationLoss, channel_relation
from sampler import overlap, region_align
from support.distributed import average_over_processes


class DINOPlusHead(IBOTHead):
    """An IBOTHead for all patches: (V, B, K), by resolution (V, B, N, K_patch)."""

    def forward(self, tokens, mask=None):
        patches = [self.patch_last_layer(self.bottleneck(t[:, :, 1:])) for t in tokens]
        return self.cls_outputs(tokens), patches


class DINOPlusLoss(IBOTLoss):
    """DINO's loss on class tokens and on patches at the same place of two views.

    Where views overlap, the student predicts the teacher's assignment at ⊙'s points; ⊙ is linear,
    as is the last layer of the head. overlap_global, overlap_local: as in SelfRelationLoss.
    """

    def __init__(self, out_dim, patch_out_dim, overlap_global=13, overlap_local=6):
        super().__init__(out_dim, patch_out_dim)
        self.overlap_global, self.overlap_local = overlap_global, overlap_local

    def forward(self, student, teacher, teacher_temp, boxes):
        """Add both terms. student, teacher: outputs of a DINOPlusHead; teacher_temp: (2,)."""
        cls_term = DINOLoss.forward(self, student[0], teacher[0], teacher_temp[0])
        patch_term = self.patch_loss(student[1], teacher[1][0].float(), teacher_temp[1], boxes)
        return self.note(cls_term, patch_term)

    def patch_loss(self, student, teacher, teacher_temp, boxes):
        self.patch_center.add(teacher.flatten(0, 2).mean(dim=0))
        student = [view.float() for views in student for view in views]        # V times (B, N, K)
        loss, overlaps = 0, 0
        for q in range(len(teacher)):
            for v in range(len(student)):
                if v == q:
                    continue
                region, valid = overlap(boxes[q], boxes[v])
                size = self.overlap_global if v < len(teacher) else self.overlap_local
                o1 = region_align(teacher[q], boxes[q], region, size)          # (B, S * S, K)
                o2 = region_align(student[v], boxes[v], region, size)
                assignment = assign(o1, self.patch_center, teacher_temp)
                losses = cross_entropy(assignment, o2 / self.student_temp).mean(dim=1)
                loss = loss + torch.where(valid, losses, 0).sum()
                overlaps = overlaps + valid.sum()
        return loss / average_over_processes(overlaps.float()).clamp(min=1e-6)

    def diagnostics(self, teacher, teacher_temp):
        patch_entropy = entropy(assign(teacher[1][0], self.patch_center, teacher_temp[1]))
        return self.describe(teacher[0], teacher_temp, patch_entropy)


class BatchRelationLoss(SelfRelationLoss):
    """SelfRelationLoss whose L_c relates channels over all patches of the batch.

    One C x C relation a view, over all processes, as Barlow Twins correlates them.
    """

    def channel_relation(self, c, temperature):
        """Relate channels over a batch: (B, N, C) -> (1, C, C)."""
        return average_over_processes(channel_relation(c.flatten(0, 1)[None], temperature))


class Colors(nn.Module):
    """Encode colors only, for the study: their mean, or a histogram of `bins` a channel."""

    def __init__(self, bins):
        super().__init__()
        self.bins, self.dim, self.norm = bins, bins**3 or 3, nn.Identity()

    def forward(self, images):
        if not self.bins:
            return images.mean(dim=(2, 3))[:, None]                                 # (B, 1, 3)
        level = (denormalize(images) * self.bins).long().clamp(0, self.bins - 1)
        color = (level[:, 0] * self.bins + level[:, 1]) * self.bins + level[:, 2]   # (B, H, W)
        counts = [torch.bincount(c.flatten(), minlength=self.dim) for c in color]
        return torch.stack(counts).sqrt()[:, None]                                  # (B, 1, C)
