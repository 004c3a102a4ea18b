"""What the paper compares SERE with, and no recipe uses: DINO+ (Table 10) and relations over the batch (Table 11).

Each takes the place of another loss and its interface: DINOPlusLoss is an L_I, BatchRelationLoss gives L_p and another L_c.

B batch, V views, G global views, N patches, C channels, K outputs
"""

from baselines import IBOTLoss
from distributed import average_over_processes
from relations import SelfRelationLoss, channel_relation, cross_entropy, mean_over_overlaps, mean_over_pairs, teacher_relation


class DINOPlusLoss(IBOTLoss):
    """DINO's clustering loss on class tokens and, equally weighted, on patch tokens matched through ⊙: where two views
    overlap, the student predicts the teacher's assignment of the same place. Nothing is masked.

    Its head is an IBOTHead that takes the patches of every resolution. overlap_global, overlap_local as in SelfRelationLoss.
    """

    def __init__(self, out_dim, patch_out_dim, overlap_global=13, overlap_local=6, **rest):
        super().__init__(out_dim, patch_out_dim, **rest)
        self.sizes = (overlap_global, overlap_local)

    def patch_loss(self, student, teacher, teacher_temp, boxes):
        self.patches.assign(teacher.patches[0], teacher_temp)

        def clustering(o1, o2):    # outputs at the same places, (B, K, S * S) -> (B,); ⊙ is linear, as is the head's last layer
            return cross_entropy(self.patches.targets(o1.mT, teacher_temp), self.patches.predict(o2.mT)).mean(dim=-1)

        student = [outputs.mT for outputs in student.patches]    # (V, B, K, N)
        return mean_over_overlaps(clustering, teacher.patches[0].mT, student, boxes, *self.sizes)


class BatchRelationLoss(SelfRelationLoss):
    """SelfRelationLoss whose L_c relates channels over all patches of all images of the batch, of all processes, as Barlow Twins
    correlates them over the batch: one C x C relation a view, instead of one for each image. All else is as in Eq. 5."""

    @staticmethod
    def channel_relation(features, temperature):
        """(B, C, N) -> (1, C, C)."""
        batch = features.transpose(0, 1).flatten(1)[None]    # (1, C, B * N)
        return average_over_processes(channel_relation(batch, temperature).float())

    def channel(self, teacher, student):
        """L_c over all pairs of views, each relation that of a batch."""
        t_teacher, t_student = self.teacher_temperatures[1], self.student_temperatures[1]
        targets = [teacher_relation(self.channel_relation(c1, t_teacher)) for c1 in teacher]
        return mean_over_pairs(targets, (self.channel_relation(c2, t_student) for views in student for c2 in views))
