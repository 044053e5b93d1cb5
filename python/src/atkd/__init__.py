"""The ATKD knowledge-distillation loss (Zhong et al., ACL 2024) and its gradient, fused.

    loss = atkd.atkd_loss(student_logits, teacher_logits, labels)
    loss.backward()
"""

from ._atkd import __version__
from ._linear import LinearATKDLoss, linear_atkd_loss
from ._loss import ATKDLoss, Stats, atkd_loss, select_hard, teacher_margins, token_entropies
from ._teacher_cache import TeacherCache, TeacherCacheWriter, TeacherRows

__all__ = [
    "ATKDLoss",
    "LinearATKDLoss",
    "Stats",
    "TeacherCache",
    "TeacherCacheWriter",
    "TeacherRows",
    "__version__",
    "atkd_loss",
    "linear_atkd_loss",
    "select_hard",
    "teacher_margins",
    "token_entropies",
]
