"""Checks that tensors fit together. Settings are checked natively."""

import operator
from typing import Any, Dict, List, Optional, Tuple

import torch
from torch import Tensor

from . import _atkd, _settings
from ._teacher import SparseTeacher, Teacher

DTYPES = {
    torch.float32: _atkd.Dtype.F32,
    torch.float16: _atkd.Dtype.F16,
    torch.bfloat16: _atkd.Dtype.BF16,
}
LABEL_DTYPES = {torch.int64: _atkd.LabelDtype.I64, torch.int32: _atkd.LabelDtype.I32}


def are_apart(one: Tensor, other: Tensor) -> bool:
    """True if their devices differ, which it does not ask for on the CPU: that is slow."""
    return not (one.is_cpu and other.is_cpu) and one.device != other.device


def check_device(name: str, tensor: Tensor) -> None:
    if not (tensor.is_cpu or tensor.is_cuda):
        raise ValueError(f"{name} are on {tensor.device}, but must be on the CPU or a CUDA device")


def _check_logits(name: str, logits: Tensor, may_be_empty: bool = False) -> None:
    if logits.dtype not in DTYPES:
        raise TypeError(f"{name} are {logits.dtype}, but must be float32, float16 or bfloat16")
    if len(logits.shape) < 2 or (logits.shape[-1] == 0 and not may_be_empty):
        raise ValueError(f"{name} are {list(logits.shape)}, but must be [N, V] or [B, T, V]")


def _check_labels(labels: Optional[Tensor], name: str, states: Tensor, target: str) -> None:
    """`states`, which are called `name`, are logits or hidden states, to which the labels belong."""
    if labels is None:
        if target == "label":
            raise ValueError(
                'labels are None, but target="label" needs one a token; '
                'give labels, or target="teacher"'
            )
        return
    shape = states.shape
    if labels.dtype not in LABEL_DTYPES:
        raise TypeError(f"labels are {labels.dtype}, but must be int64 or int32")
    if labels.shape != shape[:-1]:
        raise ValueError(
            f"labels are {list(labels.shape)}, but for {name} {list(shape)} "
            f"must be {list(shape[:-1])}"
        )
    if are_apart(labels, states):
        raise ValueError(f"{name} are on {states.device}, but labels on {labels.device}")


def _check_vocab_size(vocab_size: Optional[int], name: str, logits: Tensor) -> None:
    columns = logits.shape[-1]
    if vocab_size is not None and not 1 <= vocab_size <= columns:
        raise ValueError(
            f"vocab_size is {vocab_size}, but must be from 1 to {columns}, the columns of {name}"
        )


def check_mask(
    name: str,
    mask: Tensor,
    beside: str,
    other: Tensor,
    shape: Any,
    dtype: torch.dtype = torch.bool,
) -> None:
    """`shape` is what it must have, on the device of `other`, which is called `beside`."""
    if mask.dtype != dtype:
        raise TypeError(f"{name} is {mask.dtype}, but must be {dtype}")
    if mask.shape != shape:
        raise ValueError(f"{name} is {list(mask.shape)}, but must be {list(shape)}")
    if are_apart(mask, other):
        raise ValueError(f"{beside} are on {other.device}, but {name} on {mask.device}")


def check_sparse(teacher: SparseTeacher, name: str, states: Tensor) -> None:
    """Raises unless a sparse teacher is of the tokens of `states`, which are called `name`. Its values are checked natively."""
    indices, log_probs, target, _ = teacher
    shape, like = states.shape[:-1], f"for {name} {list(states.shape)}"
    if indices.dtype not in LABEL_DTYPES:
        raise TypeError(f"indices are {indices.dtype}, but must be int64 or int32")
    if log_probs.dtype not in DTYPES:
        raise TypeError(f"log_probs are {log_probs.dtype}, but must be float32, float16 or bfloat16")
    if len(indices.shape) < 2 or indices.shape[:-1] != shape:
        expected = f"{[*shape, 'K']}".replace("'", "")
        raise ValueError(f"indices are {list(indices.shape)}, but {like} must be {expected}")
    if log_probs.shape != indices.shape:
        raise ValueError(
            f"log_probs are {list(log_probs.shape)}, but indices are {list(indices.shape)}: there must be one for each"
        )
    for of, tensor in [("indices", indices), ("log_probs", log_probs)]:
        if are_apart(tensor, states):
            raise ValueError(f"{name} are on {states.device}, but {of} on {tensor.device}")
    if target is not None:
        if target.dtype not in DTYPES:
            raise TypeError(
                f"target_log_prob is {target.dtype}, but must be float32, float16 or bfloat16"
            )
        check_mask("target_log_prob", target, name, states, shape, target.dtype)


def refuse_sparse(what: str, name: str, states: Tensor, instead: str) -> None:
    """Says that no kernel does `what`. `states` are called `name`."""
    raise NotImplementedError(
        f"{name} are on {states.device}, but {what} on the CPU alone, since there is no kernel for it yet: move all tensors "
        f"there, or {instead}"
    )


def check_loss(
    student: Tensor,
    teacher: Teacher,
    labels: Optional[Tensor],
    scale: Optional[Tensor],
    hard: Optional[Tensor],
    token_weights: Optional[Tensor],
    temperatures: Optional[Tensor],
    per_sequence: bool,
    vocab_size: Optional[int],
    settings: Dict[str, Any],
) -> None:
    """Raises unless these are what a loss follows from."""
    shape = student.shape
    _check_logits("student_logits", student)
    if isinstance(teacher, SparseTeacher):
        _check_vocab_size(vocab_size, "student_logits", student)
        check_sparse(teacher, "student_logits", student)
        if teacher.tail == "uniform" and student.is_cuda:
            what, instead = 'tail "uniform" is', 'take tail "bucket", "zero" or "sampled"'
            refuse_sparse(what, "student_logits", student, instead)
        _check_rows(student, labels, scale, hard, token_weights, temperatures, per_sequence, settings)
        return
    _check_logits("teacher_logits", teacher)
    _check_vocab_size(vocab_size, "student_logits", student)
    _check_vocab_size(vocab_size, "teacher_logits", teacher)
    if teacher.shape[:-1] != shape[:-1] or (vocab_size is None and teacher.shape != shape):
        message = f"student_logits are {list(shape)}, but teacher_logits are {list(teacher.shape)}"
        vocab = min(shape[-1], teacher.shape[-1])
        if shape[:-1] == teacher.shape[:-1]:
            message += (
                "; if the tokens that both have come first, give their number as vocab_size, "
                f"{vocab} or fewer"
            )
        raise ValueError(message)
    _check_apart(student, teacher)
    _check_rows(student, labels, scale, hard, token_weights, temperatures, per_sequence, settings)


def check_shard(
    student: Tensor,
    teacher: Teacher,
    labels: Optional[Tensor],
    scale: Optional[Tensor],
    hard: Optional[Tensor],
    token_weights: Optional[Tensor],
    temperatures: Optional[Tensor],
    per_sequence: bool,
    settings: Dict[str, Any],
    name: str = "student_logits",
) -> None:
    """Raises unless these are a rank's part of what a loss follows from: some columns of each row, maybe none. The student's
    logits are called `name`.
    """
    _check_logits(name, student, may_be_empty=True)
    if isinstance(teacher, SparseTeacher):
        check_sparse(teacher, name, student)
        of_tokens = labels, scale, hard, token_weights, temperatures
        _check_rows(student, *of_tokens, per_sequence, settings, name)
        return
    _check_logits("teacher_logits", teacher, may_be_empty=True)
    if teacher.shape[:-1] != student.shape[:-1]:
        raise ValueError(
            f"student_logits are {list(student.shape)}, but teacher_logits are {list(teacher.shape)}: they must be of the "
            "same tokens"
        )
    _check_apart(student, teacher)
    of_tokens = labels, scale, hard, token_weights, temperatures
    _check_rows(student, *of_tokens, per_sequence, settings, name)


def _check_apart(student: Tensor, teacher: Tensor) -> None:
    if are_apart(teacher, student):
        raise ValueError(
            f"student_logits are on {student.device}, but teacher_logits on {teacher.device}"
        )


def _check_rows(
    student: Tensor,
    labels: Optional[Tensor],
    scale: Optional[Tensor],
    hard: Optional[Tensor],
    token_weights: Optional[Tensor],
    temperatures: Optional[Tensor],
    per_sequence: bool,
    settings: Dict[str, Any],
    name: str = "student_logits",
) -> None:
    """Raises unless what is of tokens fits the student's logits, which are called `name`."""
    if per_sequence and len(student.shape) != 3:
        raise ValueError(
            f'selection="sequence" needs logits [B, T, V], but they are {list(student.shape)}'
        )
    check_tokens(name, student, labels, scale, hard, token_weights, temperatures, settings)


def check_tokens(
    name: str,
    states: Tensor,
    labels: Optional[Tensor],
    scale: Optional[Tensor],
    hard: Optional[Tensor],
    token_weights: Optional[Tensor],
    temperatures: Optional[Tensor],
    settings: Dict[str, Any],
) -> None:
    """Raises unless these fit the tokens of `states`, which are called `name`."""
    if scale is not None:
        # Only the operator is given one; the function makes its own.
        if scale.dtype != torch.float32:
            raise TypeError(f"scale is {scale.dtype}, but must be float32")
        if scale.dim() != 0 or are_apart(scale, states):
            raise ValueError(
                f"scale is {list(scale.shape)} on {scale.device}, "
                f"but must be a scalar on {states.device}"
            )
    _settings.check_numbers(settings)
    shape = states.shape[:-1]
    if hard is not None:
        check_mask("hard", hard, name, states, shape)
    for values_name, values in [("token_weights", token_weights), ("temperature", temperatures)]:
        if values is not None:
            check_mask(values_name, values, name, states, shape, torch.float32)
    _check_labels(labels, name, states, settings["target"])


def check_values(
    labels: Optional[Tensor],
    temperatures: Optional[Tensor],
    log_prob: Optional[Tensor],
    vocab: Optional[int],
    ignore_index: int,
) -> None:
    """Raises for values on the CPU that are wrong: there to find out is not to wait. Labels are looked at if the size of the
    vocabulary is known.
    """
    checks: List[Tuple[str, Tensor, Any, str]] = []
    valid: Any = True if labels is None else labels != ignore_index
    if labels is not None and vocab is not None:
        allowed = f"from 0 to {vocab - 1}, or the ignore_index {ignore_index}"
        checks.append(("labels", labels, (labels >= 0) & (labels < vocab), allowed))
    if log_prob is not None:
        checks.append(("teacher_log_prob", log_prob, log_prob <= 1e-4, "the logarithm of a probability"))
    if temperatures is not None:
        within = (temperatures >= 1e-30) & (temperatures <= 1e30)
        checks.append(("temperature", temperatures, within, "in [1e-30, 1e30]"))
    for name, values, right, allowed in checks:
        wrong = (~right & valid).flatten()
        if values.is_cpu and wrong.any():
            at = int(wrong.nonzero()[0])
            raise ValueError(f"{name}[{at}] is {values.flatten()[at]}, but must be {allowed}")


def check_margins(
    teacher: Teacher,
    labels: Optional[Tensor],
    temperatures: Optional[Tensor],
    vocab_size: Optional[int],
    settings: Dict[str, Any],
) -> None:
    """Raises unless these are what margins follow from."""
    if isinstance(teacher, SparseTeacher):
        name, rows = "indices", teacher.indices
        check_sparse(teacher, name, rows)
        if not rows.is_cpu:
            what = "the margins of a sparse teacher are computed"
            refuse_sparse(what, name, rows, "take those of sparse_atkd_loss(return_stats=True), Stats.margin")
    else:
        name, rows = "teacher_logits", teacher
        _check_logits(name, rows)
        _check_vocab_size(vocab_size, name, rows)
    if temperatures is not None:
        check_mask("temperature", temperatures, name, rows, rows.shape[:-1], torch.float32)
    _settings.check_numbers(settings)
    _check_labels(labels, name, rows, settings["target"])


def check_entropies(logits: Tensor, vocab_size: Optional[int], number: Optional[Tensor]) -> None:
    """Raises unless these are what entropies follow from."""
    _check_logits("logits", logits)
    _check_vocab_size(vocab_size, "logits", logits)
    _check_scalar(number)


def _check_scalar(number: Optional[Tensor]) -> None:
    """Raises unless it is what `_settings.number_or_tensor` makes of a number."""
    if number is not None and (number.dim() != 0 or not number.is_cpu):
        raise ValueError(
            f"number is {list(number.shape)} on {number.device}, but must be a scalar on cpu"
        )


def integer(name: str, number: object) -> int:
    """The number, which counts columns or tokens, or an error that names it."""
    try:
        found = operator.index(number)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} is {number!r}, but must be an integer") from None
    if not 0 <= found < 1 << 31:
        raise ValueError(f"{name} is {found}, but must be from 0 to {(1 << 31) - 1}")
    return found


def check_selection(
    margins: Tensor,
    valid: Optional[Tensor],
    cu_seqlens: Optional[Tensor],
    number: Optional[Tensor],
) -> None:
    """Raises unless these are what a selection follows from."""
    if margins.dtype != torch.float32:
        raise TypeError(f"margins are {margins.dtype}, but must be torch.float32")
    if valid is not None:
        check_mask("valid", valid, "margins", margins, margins.shape)
    if cu_seqlens is not None:
        check_offsets(cu_seqlens, "margins", margins)
    _check_scalar(number)


def check_offsets(cu_seqlens: Tensor, name: str, of_tokens: Tensor) -> None:
    """Raises unless these are offsets where the tokens lie. Their values are checked elsewhere."""
    if cu_seqlens.dtype not in LABEL_DTYPES:
        raise TypeError(f"cu_seqlens are {cu_seqlens.dtype}, but must be int64 or int32")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
        raise ValueError(f"cu_seqlens are {list(cu_seqlens.shape)}, but must be [sequences + 1]")
    if are_apart(cu_seqlens, of_tokens):
        raise ValueError(f"{name} are on {of_tokens.device}, but cu_seqlens on {cu_seqlens.device}")


def check_order(cu_seqlens: Tensor, tokens: int) -> None:
    """Raises for offsets on the CPU that do not go from 0 to the number of tokens."""
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != tokens:
        raise ValueError(f"cu_seqlens go from {offsets[0]} to {offsets[-1]}, but must from 0 to the {tokens} tokens")
    for i, (start, end) in enumerate(zip(offsets, offsets[1:])):
        if end < start:
            raise ValueError(f"sequence {i} of cu_seqlens goes from {start} to {end}, but must not end before it starts")
