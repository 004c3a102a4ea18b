"""Feature self-relations and their losses, Sec. 3.2 to 3.4 of SERE. The contribution; read this file first.

An image's patch features r (C x N) are turned into how they relate to each other: which patches resemble which
(A_p, Eq. 2), which channels fire together (A_c, Eq. 4). Two views must agree on these relations (Eq. 3 and 5).

    r  ->  h: BatchNorm, ReLU  ->  [g: linear, BatchNorm, ReLU; student only]  ->  ⊙ (A_p only)  ->  Gram matrix  ->  softmax

The temperatures divide inside the softmax; printed, Eq. 2 and 4 divide after it, and rows would not sum to 1. `spatial_relation`,
`channel_relation` and `relation_cross_entropy` are the equations; a student's relation and its loss are one step, `GramCrossEntropy`.

B batch, C channels, N = H * W patches (or sampled points), M relation heads (not the encoder's attention heads), G global views,
V views, of one resolution or all; q the teacher's view, v the student's. The paper's G(.), stop-gradient, is detach() here.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from distributed import BatchNorm, average_over_processes
from sampler import overlap, region_align


def spatial_relation(features, heads, temperature=1.0):
    """Eq. 2 before its softmax: pᵀp / √(C/M) / t_p within each of M groups of channels.

    features: (B, C, N). Returns logits (B, heads, N, N). Raises ValueError where heads does not divide C.
    """
    p = spatial_features(features, heads, temperature)
    return p.mT @ p


def channel_relation(features, temperature=1.0):
    """Eq. 4 before its softmax: cᵀc / (H·W) / t_c, with c = featuresᵀ.

    features: (B, C, N). Returns logits (B, C, C).
    """
    c = channel_features(features, temperature)
    return c.mT @ c


def spatial_features(features, heads, temperature):
    """p in M groups of channels, both factors of Eq. 2's pᵀp / √(C/M) / t_p scaled by the root: (B, C, N) -> (B, M, C / M, N)."""
    C = features.shape[1]
    if C % heads:
        possible = [m for m in range(1, C + 1) if C % m == 0]
        raise ValueError(f"{C} channels can't be split into {heads} relation heads; possible: {possible}")
    return _for_products(features.unflatten(1, (heads, -1)).contiguous() / math.sqrt(math.sqrt(C // heads) * temperature))


def channel_features(features, temperature):
    """c = featuresᵀ, both factors of Eq. 4's cᵀc / (H·W) / t_c scaled by the root: (B, C, N) -> (B, N, C)."""
    return _for_products(features.mT / math.sqrt(features.shape[-1] * temperature))


def _for_products(x):
    """x as autocast hands it to a matrix product; here once, and not anew for each product with x or xᵀ."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def cross_entropy(targets, logits):
    """-Σ_j targets_j log softmax(logits)_j: (..., N), twice -> (...)."""
    return -(targets * logits.log_softmax(dim=-1, dtype=torch.float32)).sum(dim=-1)


def teacher_relation(logits):
    """G(A) of Eq. 3 and 5: the softmax of the teacher's logits, through which no gradient passes. (..., N) -> (..., N)."""
    return logits.detach().softmax(dim=-1, dtype=torch.float32)


def relation_cross_entropy(teacher_logits, student_logits):
    """Re(G(A), A') of Eq. 3 and 5: cross-entropy of two relations, mean over rows (and heads).

    Both logits: (B, ..., N, N). Returns (B,). The plain form of what GramCrossEntropy computes.
    """
    return cross_entropy(teacher_relation(teacher_logits), student_logits).flatten(1).mean(dim=1)


class GramCrossEntropy(torch.autograd.Function):
    """relation_cross_entropy of a student's relation xᵀx that is dropped at once, as its gradient is made in the forward pass:

        ∂/∂x Σ_i CE(targets_i, (xᵀx)_i) = x (D + Dᵀ),    D = softmax(xᵀx) - targets

    apply(targets (B, ..., N, N), whose rows sum to 1, x (B, ..., K, N)) -> (B,). Autograd would keep two N x N matrices a view until
    the backward pass, go over them twice as often, and multiply once more. No gradient reaches the targets.
    """

    @staticmethod
    def forward(ctx, targets, x):
        logits = x.mT @ x
        log_A = logits.log_softmax(dim=-1, dtype=torch.float32)
        ctx.rows = log_A[0, ..., 0].numel()
        loss = -(targets * log_A).sum(dim=-1).flatten(1).sum(dim=1) / ctx.rows    # by rows, like the softmax: a compiler then joins the two
        D = log_A.exp_().sub_(targets).to(logits.dtype)
        ctx.save_for_backward(x @ (D + D.mT))    # divided by the rows in backward: here, half precision would underflow
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gradient, = ctx.saved_tensors
        return None, (grad / ctx.rows).view(-1, *[1] * (gradient.ndim - 1)) * gradient


def mean_over_pairs(targets, students, loss=cross_entropy):
    """A loss averaged over all pairs of views, in which every global view teaches every other view:

        for q in global views:          the teacher's
            for v in all views:         the student's, global ones first; views q and v < G of the same index are one view
                if v != q: the pair (q, v) counts

    loss: (target, student's) -> any shape; targets: G tensors, students: V of them, from any iterable. Cross-entropy is linear in its
    target, so that those of a student view are averaged first; their rows then still sum to 1.
    """
    total, pairs = 0.0, 0
    for v, student in enumerate(students):
        if v <= len(targets):    # the first local view, v = G, has all teachers, and those after it the same
            teachers = [target for q, target in enumerate(targets) if q != v]
            target = teachers[0] if len(teachers) == 1 else sum(teachers[1:], teachers[0]) / len(teachers)
        total = total + len(teachers) * loss(target, student).mean()    # Σ_q loss(targets_q, student)
        pairs += len(teachers)
    return total / pairs


def mean_over_overlaps(loss, teacher, student, boxes, size_global, size_local):
    """A loss of aligned features, averaged over the same pairs of views: of all images and processes, those that overlap; 0 if none does.

    loss: (teacher's (B, C, S * S), student's) -> (B,). teacher: feature maps of the global views (G, B, C, N); student: a list by
    resolution, global first, of (V, B, C, N); maps are square. boxes: (views, B, 5), in the order of the student's views.
    size_global, size_local: points a side that ⊙ takes, from two global views and from a pair with a local one.
    """
    G = len(teacher)
    groups = [(view[None], box[None], size_global) for view, box in zip(_apart(student[0]), boxes)]    # group v < G: global view v, which q = v does not teach
    groups += [(views, boxes[G:], size_local) for views in student[1:]]                         # and one of all local views, which every q teaches
    total, pairs = 0.0, 0.0
    for q, r1 in enumerate(teacher):
        for v, (views, its_boxes, size) in enumerate(groups):
            if v == q:
                continue
            region, valid = overlap(boxes[q].repeat(len(views), 1), its_boxes.flatten(0, 1))                    # (V * B, 4)
            o1 = region_align(_as_map(r1), boxes[q], region.unflatten(0, (len(views), -1)).transpose(0, 1), size)    # (B, V, C, S * S)
            o2 = region_align(_as_map(views.flatten(0, 1)), its_boxes.flatten(0, 1), region, size)              # (V * B, C, S * S)
            total = total + torch.where(valid, loss(o1.transpose(0, 1).flatten(0, 1), o2), 0).sum()
            pairs = pairs + valid.sum()
    # DDP averages gradients over processes; dividing by the mean number of pairs makes that average the global mean.
    return total / average_over_processes(pairs.float()).clamp(min=1e-6)


def _apart(views):
    """(V, B, C, N) -> V views (B, C, N). Taken apart as (V, B, N, C), their order in memory, so that autograd stacks their gradients in it."""
    return [view.mT for view in views.mT]


def _as_map(features):
    """(B, C, N) -> (B, C, √N, √N): views are square."""
    return features.unflatten(-1, (math.isqrt(features.shape[-1]), -1))


class RelationHead(nn.Module):
    """Projection h and, for the student, prediction g of Eq. 3 and 5.

    h is BatchNorm and ReLU, g is linear (no bias), BatchNorm and ReLU; features stay (B, dim, N). The teacher has h
    alone (predictor=False), and so has a symmetric student (Table 15). Heads are dropped after training, so that running
    statistics would have no reader.
    """

    def __init__(self, dim, predictor=True):
        super().__init__()
        self.norm = BatchNorm(dim, track_running_stats=False)
        self.predictor = None
        if predictor:
            self.predictor = nn.ModuleDict({"linear": nn.Linear(dim, dim, bias=False), "norm": BatchNorm(dim, track_running_stats=False)})

    def project(self, x):
        """h: patch features r (B, C, N) -> (B, C, N)."""
        return self._normalize(self.norm, x)

    def predict(self, z):
        """g: projected features (B, C, N) -> (B, C, N)."""
        return self._normalize(self.predictor["norm"], self.predictor["linear"](z.mT).mT)    # linear over channels

    def _normalize(self, norm, x):
        """ReLU(BatchNorm(x)), with the channels of a patch side by side as the encoder leaves them: half the time of (B, C, N)."""
        patches = x.mT.flatten(0, 1)                                                   # (B * N, C)
        return F.relu(norm(patches.float()), inplace=True).unflatten(0, (len(x), -1)).mT    # (B, C, N)

    def forward(self, x):
        z = self.project(x)
        return z if self.predictor is None else self.predict(z)


class SelfRelationLoss(nn.Module):
    """L_p (Eq. 3) and L_c (Eq. 5).

    heads: M. temperature_spatial, temperature_channel: t_p, t_c of the network that `sharpen` names ("teacher" or
    "student"); the other's are 1. overlap_global, overlap_local: points a side that ⊙ takes, from a pair of global
    views and from a pair with a local one.
    """

    channel_relation = staticmethod(channel_relation)    # of the teacher, as train.py logs it

    def __init__(self, heads=6, temperature_spatial=0.5, temperature_channel=0.1, sharpen="teacher", overlap_global=13, overlap_local=6):
        super().__init__()
        if sharpen not in ("teacher", "student"):
            raise ValueError(f"sharpen is 'teacher' or 'student', not {sharpen!r}")
        self.heads = heads
        self.overlap_global, self.overlap_local = overlap_global, overlap_local
        temperatures = (temperature_spatial, temperature_channel)
        self.teacher_temperatures = temperatures if sharpen == "teacher" else (1.0, 1.0)
        self.student_temperatures = temperatures if sharpen == "student" else (1.0, 1.0)

    def spatial(self, teacher, student, boxes):
        """L_p, see `mean_over_overlaps`; teacher: p of the global views, student: g_p(p) of all."""
        t_teacher, t_student = self.teacher_temperatures[0], self.student_temperatures[0]

        def eq3(p1, p2):    # (B, C, S * S), aligned -> (B,)
            target = teacher_relation(spatial_relation(p1, self.heads, t_teacher))
            return GramCrossEntropy.apply(target, spatial_features(p2, self.heads, t_student))

        return mean_over_overlaps(eq3, teacher, student, boxes, self.overlap_global, self.overlap_local)

    def channel(self, teacher, student):
        """L_c, mean over all pairs and images; teacher: cᵀ of the global views (G, B, C, N), student: a list by resolution
        of g_c(c)ᵀ (V, B, C, N). No alignment: A_c has no spatial axis."""
        t_teacher, t_student = self.teacher_temperatures[1], self.student_temperatures[1]
        targets = [teacher_relation(self.channel_relation(c1, t_teacher)) for c1 in teacher]    # G times (B, C, C)
        students = (channel_features(c2, t_student) for views in student for c2 in _apart(views))    # V times (B, N, C)
        return mean_over_pairs(targets, students, GramCrossEntropy.apply)    # Eq. 5

    def forward(self, teacher, student, boxes):
        """(L_p, L_c) from two networks' outputs, each with lists `.spatial` and `.channel` by resolution; 0 for an empty list."""
        zero = boxes.new_zeros(())
        l_p = self.spatial(teacher.spatial[0], student.spatial, boxes) if student.spatial else zero
        l_c = self.channel(teacher.channel[0], student.channel) if student.channel else zero
        return l_p, l_c
