"""Uses that mypy must understand: checked, not run."""

from typing import Any, Dict, Optional, Tuple, Union

import atkd
import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from typing_extensions import assert_type


def uses(student: Tensor, teacher: Tensor, labels: Tensor, flag: bool, name: str) -> None:
    assert_type(atkd.atkd_loss(student, teacher, labels), Tensor)
    assert_type(
        atkd.atkd_loss(student, teacher, labels, return_stats=True), Tuple[Tensor, atkd.Stats]
    )
    assert_type(
        atkd.atkd_loss(student, teacher, labels, return_stats=flag),
        Union[Tensor, Tuple[Tensor, atkd.Stats]],
    )
    assert_type(
        atkd.atkd_loss(
            student, teacher, labels, objective=name, target=name, selection=name, reduction=name
        ),
        Tensor,
    )
    margins = atkd.teacher_margins(teacher, labels, temperature=torch.tensor(2.0))
    assert_type(margins, Tensor)
    assert_type(atkd.token_entropies(student, temperature=torch.tensor(2.0)), Tensor)
    hard = atkd.select_hard(margins, 0.5, valid=labels != -100)
    assert_type(atkd.atkd_loss(student, teacher, labels, hard=hard), Tensor)
    atkd.atkd_loss(student, teacher, labels, temperature=torch.tensor(2.0), num_items_in_batch=0.25)
    layers = student, student, teacher, teacher, labels
    assert_type(atkd.linear_atkd_loss(*layers, chunk_tokens=128, ce_weight=0.5), Tensor)
    assert_type(
        atkd.linear_atkd_loss(*layers, logits_dtype=torch.float32, return_stats=True),
        Tuple[Tensor, atkd.Stats],
    )
    head = torch.nn.Linear(4, 5)
    assert_type(atkd.linear_atkd_loss(student, None, teacher, teacher, student_head=head), Tensor)
    settings: Dict[str, Any] = {"lam": 0.3}
    atkd.LinearATKDLoss(**settings, chunk_tokens=128)
    atkd.atkd_loss(student, teacher, labels, **settings)
    atkd.ATKDLoss(**settings)
    atkd.ATKDLoss(objective=name, return_stats=flag)
    assert_type(atkd.__version__, str)


def of_some_log_probabilities(student: Tensor, weight: Tensor, indices: Tensor, log_probs: Tensor) -> None:
    loss = atkd.sparse_atkd_loss(student, indices, log_probs, target_log_prob=log_probs, tail="zero", lam=0.3)
    assert_type(loss, Tensor)
    assert_type(
        atkd.sparse_atkd_loss(student, indices, log_probs, inplace=True, return_stats=True),
        Tuple[Tensor, atkd.Stats],
    )
    teacher = atkd.SparseTeacher(indices, log_probs)
    assert_type(atkd.linear_atkd_loss(student, weight, None, None, teacher=teacher), Tensor)
    assert_type(atkd.teacher_margins(teacher, target="teacher"), Tensor)
    atkd.SparseATKDLoss(0.3, tail="uniform")
    rows = atkd.from_vllm([[None, {5: {"logprob": -0.5}}]], [[3, 5]])
    assert_type(rows.labels, Tensor)
    assert_type(atkd.from_sglang([[None]], [[(None, 3, None)]], [[3]], top_k=4), atkd.ServedRows)


def over_ranks(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    columns: Optional[ProcessGroup] = None,
    tokens: Optional[ProcessGroup] = None,
) -> None:
    loss = atkd.atkd_loss(student, teacher, labels, vocab_group=columns, token_group=tokens)
    assert_type(loss, Tensor)
    told = atkd.atkd_loss(
        student, teacher, vocab_group=columns, vocab_start=0, vocab_size=8, token_counts=[2, 3]
    )
    assert_type(told, Tensor)
    margins = atkd.teacher_margins(teacher, labels, vocab_group=columns, vocab_start=0)
    assert_type(atkd.select_hard(margins, 0.5, group=tokens), Tensor)
    layers = student, student, teacher, teacher, labels
    assert_type(atkd.linear_atkd_loss(*layers, vocab_group=columns, token_group=tokens), Tensor)
    atkd.ATKDLoss(vocab_group=columns, token_group=tokens, vocab_start=0)
    atkd.LinearATKDLoss(vocab_group=columns, token_group=tokens)


def a_teacher_on_disk(logits: Tensor, labels: Tensor) -> None:
    with atkd.TeacherCacheWriter("cache", vocab_size=10, progress=100) as writer:
        assert_type(writer.tokens, int)
        writer.write(logits, labels)
        writer.write_rows(labels, logits, logits, labels, tail_mass=logits)
    cache = atkd.TeacherCache("cache")
    assert_type(cache[0], atkd.TeacherRows)
    assert_type(cache[1:3].labels, Tensor)
    assert_type(cache.temperature, float)
    assert_type(len(cache), int)
    torch.utils.data.DataLoader(cache, batch_size=4)
