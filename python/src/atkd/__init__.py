"""The ATKD knowledge-distillation loss (Zhong et al., ACL 2024) and its gradient, fused.

    loss = atkd.atkd_loss(student_logits, teacher_logits, labels)
    loss.backward()
"""

from ._atkd import __version__
from ._linear import LinearATKDLoss, linear_atkd_loss
from ._loss import ATKDLoss, Stats, atkd_loss, select_hard, teacher_margins, token_entropies
from ._report import report
from ._servers import ServedRows, from_sglang, from_vllm
from ._sparse import SparseATKDLoss, sparse_atkd_loss
from ._teacher import SparseTeacher
from ._teacher_cache import TeacherCache, TeacherCacheWriter, TeacherRows

__all__ = [
    "ATKDLoss",
    "LinearATKDLoss",
    "ServedRows",
    "SparseATKDLoss",
    "SparseTeacher",
    "Stats",
    "TeacherCache",
    "TeacherCacheWriter",
    "TeacherRows",
    "__version__",
    "atkd_loss",
    "from_sglang",
    "from_vllm",
    "linear_atkd_loss",
    "report",
    "select_hard",
    "sparse_atkd_loss",
    "teacher_margins",
    "token_entropies",
]
