"""Feature self-relations and their losses, Sec. 3.2 to 3.4. Read this file first.

How the patches of one image resemble each other, and which of its channels fire together, is a
representation of the image in its own right. Two views of an image must agree on both:

    A_p(p) = Softmax( O(p)ᵀ O(p) / (√C t_p) )           spatial self-relation             Eq. 2
    L_p    = Re( 𝒢(A_p(p₁)), A_p(g_p(p₂)) )                                               Eq. 3
    A_c(c) = Softmax( cᵀ c / (H W t_c) )                channel self-relation             Eq. 4
    L_c    = Re( 𝒢(A_c(c₁)), A_c(g_c(c₂)) )                                               Eq. 5

The paper prints t outside the Softmax, where rows would no longer sum to 1; its released code has
it inside. Subscript 1 is the teacher's view, 2 the student's. p = h_p(r) and c = h_c(r) are
projected features r of the encoder, g a prediction head, O or ⊙ region-aligned sampling
(sampler.py), 𝒢 stop-gradient and Re the cross-entropy. The paper's C x HW matrices are (N, C)
tokens here, and relations stay logits until `relation_cross_entropy` applies their Softmax.

B batch, N = H * W patches (or S * S sampled points) of a view, C channels, M relation heads,
q a view of the teacher's, v a view of the student's; global views come first in both
"""

import math

import torch
from torch import Tensor, nn

from sampler import overlap, region_align
from support.distributed import BatchNorm, average_over_processes


class RelationHead(nn.Module):
    """Projection h (`project`) and, for the student, prediction g (`predict`).

    Tokens (..., N, C) -> (..., N, C). The teacher, and a symmetric student (Table 15), has h alone.
    """

    def __init__(self, dim: int, predictor: bool = True):
        super().__init__()
        self.project = nn.Sequential(BatchNorm(dim), nn.ReLU())
        self.predict = nn.Identity()
        if predictor:
            linear = nn.Linear(dim, dim, bias=False)
            self.predict = nn.Sequential(linear, BatchNorm(dim), nn.ReLU())

    def forward(self, r: Tensor) -> Tensor:
        return self.predict(self.project(r))


def spatial_relation(p: Tensor, heads: int, temperature: float = 1.0) -> Tensor:
    """Relate patches by their features: Eq. 2 before its Softmax.

    p: (B, N, C), after ⊙. Returns (B, M, N, N): M groups of channels have a relation each, and C of
    Eq. 2 is the number of channels in a group, C / M.
    """
    p = p.unflatten(2, (heads, -1)).transpose(1, 2)                # (B, M, N, C / M)
    return p @ p.mT / (math.sqrt(p.shape[-1]) * temperature)       # (B, M, N, N)


def channel_relation(c: Tensor, temperature: float = 1.0) -> Tensor:
    """Relate channels by where they fire: Eq. 4 before its Softmax.

    c: (B, N, C). Returns (B, C, C).
    """
    N = c.shape[1]
    return c.mT @ c / (N * temperature)


def relation_cross_entropy(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """Compute Re(𝒢(A), A') of Eq. 3 and 5: the mean cross-entropy of their rows.

    Both (B, ..., rows, columns), before the Softmax. Returns (B,). No gradient reaches the teacher.
    """
    A = teacher_logits.detach().softmax(dim=-1)
    return -(A * student_logits.log_softmax(dim=-1)).sum(dim=-1).flatten(1).mean(dim=1)


class SelfRelationLoss(nn.Module):
    """L_p (Eq. 3) and L_c (Eq. 5), means over pairs of different views.

    heads: M. temperature_spatial, temperature_channel: t_p and t_c of the network that `sharpen`
    names, "teacher" (the released code) or "student" (the text); the other's are 1. overlap_global,
    overlap_local: S, points a side that ⊙ takes from two global views, and from a pair with a local
    one.
    """

    def __init__(
        self, heads=6, temperature_spatial=0.5, temperature_channel=0.1, sharpen="teacher",
        overlap_global=13, overlap_local=6,
    ):
        super().__init__()
        self.heads, self.overlap_global, self.overlap_local = heads, overlap_global, overlap_local
        sharp, plain = (temperature_spatial, temperature_channel), (1.0, 1.0)
        self.t_p1, self.t_c1 = sharp if sharpen == "teacher" else plain    # the teacher's
        self.t_p2, self.t_c2 = sharp if sharpen == "student" else plain    # the student's

    def channel_relation(self, c, temperature):    # Table 11 relates over the batch instead
        return channel_relation(c, temperature)

    def forward(self, p1, c1, g_p2, g_c2, boxes):
        """Return (L_p, L_c), scalars.

        p1, c1: p₁ = h_p(r₁) and c₁ = h_c(r₁) of each global view, lists of (B, N, C), or empty to
        leave a loss out. g_p2, g_c2: g_p(p₂) and g_c(c₂) of every view. boxes: (views, B, 5), see
        sampler.py. L_p, averaged over processes, is a mean over all pairs that overlap.
        """
        logits_c1 = [self.channel_relation(c, self.t_c1) for c in c1]    # once a view, not a pair
        logits_c2 = [self.channel_relation(c, self.t_c2) for c in g_c2]
        L_p, overlaps = boxes.new_zeros(()), boxes.new_zeros(())
        L_c, pairs = boxes.new_zeros(()), 0
        for q in range(len(p1 or c1)):
            for v in range(len(boxes)):
                if v == q:
                    continue
                if p1:
                    region, valid = overlap(boxes[q], boxes[v])
                    size = self.overlap_global if v < len(p1) else self.overlap_local
                    o1 = region_align(p1[q], boxes[q], region, size)      # (B, S * S, C)
                    o2 = region_align(g_p2[v], boxes[v], region, size)
                    logits_p1 = spatial_relation(o1, self.heads, self.t_p1)
                    logits_p2 = spatial_relation(o2, self.heads, self.t_p2)
                    Re = relation_cross_entropy(logits_p1, logits_p2)                       # Eq. 3
                    L_p = L_p + torch.where(valid, Re, 0).sum()
                    overlaps = overlaps + valid.sum()
                if c1:
                    L_c = L_c + relation_cross_entropy(logits_c1[q], logits_c2[v]).mean()   # Eq. 5
                    pairs += 1
        # DDP averages gradients over processes: dividing by the mean count gives the global mean.
        return L_p / average_over_processes(overlaps).clamp(min=1e-6), L_c / max(pairs, 1)
