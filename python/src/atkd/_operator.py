"""The operators `torch.ops.atkd.loss`, `teacher_margins`, both of them again for sparse teachers, `select_hard` and
`token_entropies`: what they compute, the shapes that they return, and their rule for vmap. The derivative of the loss is in
`_autograd.py`.
"""

from typing import Any, Callable, Optional, Tuple

import torch
from torch import Tensor

from . import _checks, _native, _settings
from ._teacher import SparseTeacher, Teacher, parts

# The loss, the gradient, the terms, which tokens are hard.
Results = Tuple[Tensor, Tensor, Tensor, Tensor]


def one_by_one(
    function: Any, info: Any, in_dims: Tuple[Any, ...], arguments: Tuple[Any, ...]
) -> Any:
    """A rule for vmap: which tokens are hard is known a batch at a time."""
    if info.batch_size == 0:
        raise ValueError("vmap needs at least one batch, but there are 0")
    results = [
        function(
            *[
                x.select(dim, i) if isinstance(x, Tensor) and dim is not None else x
                for x, dim in zip(arguments, in_dims)
            ]
        )
        for i in range(info.batch_size)
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    stacked = tuple(torch.stack(each) for each in zip(*results))
    return stacked, (0,) * len(stacked)


def as_operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Makes a function an operator of its name. `fake` checks the arguments, and returns tensors like the results."""

    def define(function: Callable[..., Any]) -> Any:
        operator: Any = torch.library.custom_op(
            f"atkd::{function.__name__}", function, mutates_args=(), schema=schema
        )
        operator.register_fake(fake)
        if hasattr(operator, "register_vmap"):  # not before torch 2.5
            operator.register_vmap(
                lambda info, in_dims, *arguments: one_by_one(operator, info, in_dims, arguments)
            )
        return operator

    return define


_SPARSE = "Tensor indices, Tensor log_probs, Tensor? target_log_prob, str tail"


def _gathered(arguments: Tuple[Any, ...]) -> Tuple[Any, ...]:
    """The arguments with a sparse teacher in the place of its parts, which come first."""
    count = len(SparseTeacher._fields)
    return (SparseTeacher(*arguments[:count]), *arguments[count:])


def _fake_loss(
    student: Tensor,
    teacher: Teacher,
    labels: Optional[Tensor],
    scale: Optional[Tensor],
    hard: Optional[Tensor],
    token_weights: Optional[Tensor],
    temperatures: Optional[Tensor],
    with_gradient: bool,
    per_sequence: bool,
    vocab_size: Optional[int],
    *settings: Any,
) -> Results:
    named = _settings.named(settings)
    tensors = student, teacher, labels, scale, hard, token_weights, temperatures
    _checks.check_loss(*tensors, per_sequence, vocab_size, named)
    value = student.new_empty((), dtype=torch.float32)
    gradient = _native.empty_gradient(student, with_gradient)
    return value, gradient, *_native.empty_stats(student)


def _loss(
    student: Tensor,
    teacher: Teacher,
    labels: Optional[Tensor],
    scale: Optional[Tensor],
    hard: Optional[Tensor],
    token_weights: Optional[Tensor],
    temperatures: Optional[Tensor],
    with_gradient: bool,
    per_sequence: bool,
    vocab_size: Optional[int],
    *settings: Any,
) -> Results:
    named = _settings.named(settings)
    tensors = student, teacher, labels, scale, hard, token_weights, temperatures
    _checks.check_loss(*tensors, per_sequence, vocab_size, named)
    gradient = _native.empty_gradient(student, with_gradient)
    to = gradient if with_gradient else None
    value, stats = _native.run_loss(
        *tensors, to, per_sequence, vocab_size, named, with_stats=True
    )
    assert stats is not None
    return value, gradient, *stats


_OF_LOSS = (
    "Tensor? labels, Tensor? scale, Tensor? hard, Tensor? token_weights, Tensor? temperatures, bool with_gradient, "
    f"bool per_sequence, SymInt? vocab_size, {_settings.SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)"
)


@as_operator(f"(Tensor student, Tensor teacher, {_OF_LOSS}", _fake_loss)
def loss(*arguments: Any) -> Results:
    """The loss; the gradient (float32 for float16 logits; empty unless `with_gradient`); uncertainty, TKD, DKD, margin,
    loss as `[5, *tokens]`; which tokens are hard: `hard`, if that is given, or selected. Loss and gradient are multiplied
    by `scale`, a float32 scalar on the logits' device.
    """
    return _loss(*arguments)


def _fake_sparse_loss(student: Tensor, *arguments: Any) -> Results:
    return _fake_loss(student, *_gathered(arguments))


@as_operator(f"(Tensor student, {_SPARSE}, {_OF_LOSS}", _fake_sparse_loss)
def sparse_loss(student: Tensor, *arguments: Any) -> Results:
    """The same with a sparse teacher."""
    return _loss(student, *_gathered(arguments))


def loss_by(student: Tensor, teacher: Teacher, *others: Any) -> Results:
    """The operator of the loss for the kind of teacher."""
    operator = sparse_loss if isinstance(teacher, SparseTeacher) else loss
    results: Results = operator(student, *parts(teacher), *others)
    return results


def _fake_margins(
    teacher: Teacher,
    labels: Optional[Tensor],
    temperatures: Optional[Tensor],
    vocab_size: Optional[int],
    *settings: Any,
) -> Tensor:
    _checks.check_margins(teacher, labels, temperatures, vocab_size, _settings.named(settings))
    rows = parts(teacher)[0]
    margins: Tensor = rows.new_empty(rows.shape[:-1], dtype=torch.float32)
    return margins


def _margins(
    teacher: Teacher,
    labels: Optional[Tensor],
    temperatures: Optional[Tensor],
    vocab_size: Optional[int],
    *settings: Any,
) -> Tensor:
    margins = _fake_margins(teacher, labels, temperatures, vocab_size, *settings)
    named = _settings.named(settings)
    _native.run_margins(teacher, labels, temperatures, vocab_size, named, margins)
    return margins


_OF_MARGINS = f"Tensor? labels, Tensor? temperatures, SymInt? vocab_size, {_settings.SCHEMA}) -> Tensor"


@as_operator(f"(Tensor teacher, {_OF_MARGINS}", _fake_margins)
def teacher_margins(*arguments: Any) -> Tensor:
    """The teacher's margins, float32, shaped as the labels. Of the settings only temperature, target and ignore_index
    are used.
    """
    return _margins(*arguments)


def _fake_sparse_margins(*arguments: Any) -> Tensor:
    return _fake_margins(*_gathered(arguments))


@as_operator(f"({_SPARSE}, {_OF_MARGINS}", _fake_sparse_margins)
def sparse_margins(*arguments: Any) -> Tensor:
    """The same of a sparse teacher, at whose temperature they are."""
    return _margins(*_gathered(arguments))


def margins_by(teacher: Teacher, *others: Any) -> Tensor:
    """The operator of the margins for the kind of teacher."""
    operator = sparse_margins if isinstance(teacher, SparseTeacher) else teacher_margins
    margins: Tensor = operator(*parts(teacher), *others)
    return margins


def _fake_entropies(
    logits: Tensor,
    temperature: float,
    vocab_size: Optional[int],
    number: Optional[Tensor] = None,
) -> Tensor:
    _checks.check_entropies(logits, vocab_size, number)
    return logits.new_empty(logits.shape[:-1], dtype=torch.float32)


@as_operator(
    "(Tensor logits, float temperature, SymInt? vocab_size, Tensor? number=None) -> Tensor",
    _fake_entropies,
)
def token_entropies(
    logits: Tensor,
    temperature: float,
    vocab_size: Optional[int],
    number: Optional[Tensor] = None,
) -> Tensor:
    """The entropies of one model's distributions, float32, shaped as its tokens. `number` replaces the temperature, as it
    does the ratio of `select_hard`.
    """
    entropies = _fake_entropies(logits, temperature, vocab_size, number)
    used = temperature if number is None else number.item()
    _native.run_entropies(logits, used, vocab_size, entropies)
    return entropies


def _fake_selection(
    margins: Tensor,
    valid: Optional[Tensor],
    cu_seqlens: Optional[Tensor],
    hard_ratio: float,
    number: Optional[Tensor] = None,
) -> Tensor:
    _checks.check_selection(margins, valid, cu_seqlens, number)
    return torch.empty_like(margins, dtype=torch.bool, memory_format=torch.contiguous_format)


@as_operator(
    "(Tensor margins, Tensor? valid, Tensor? cu_seqlens, float hard_ratio, Tensor? number=None) -> Tensor",
    _fake_selection,
)
def select_hard(
    margins: Tensor,
    valid: Optional[Tensor],
    cu_seqlens: Optional[Tensor],
    hard_ratio: float,
    number: Optional[Tensor] = None,
) -> Tensor:
    """The hard tokens, bool, shaped as the margins. `number`, a scalar on the CPU, replaces the ratio: it may change
    without torch.compile compiling again.
    """
    hard = _fake_selection(margins, valid, cu_seqlens, hard_ratio, number)
    ratio = hard_ratio if number is None else number.item()
    _native.run_selection(margins, valid, cu_seqlens, ratio, hard)
    return hard
