"""The derivative of the loss for autograd: that of the operator, and a function that avoids an operator's overhead."""

import functools
from typing import Any, Dict, Optional, Tuple

import torch
from torch import Tensor

from . import _checks, _native, _operator, _private
from ._native import Stats
from ._teacher import SparseTeacher, Teacher

_PLAIN = (Tensor, torch.nn.Parameter)

NO_SECOND_DERIVATIVE = (
    "the gradient of atkd_loss has no derivative (create_graph=True, or a transform of torch.func twice)"
)


def for_student(gradient: Optional[Tensor], others: int) -> Tuple[Optional[Tensor], ...]:
    """The gradients of a function's arguments, of which the student comes first and the others have none."""
    return (gradient, *[None] * others)


def scaled(gradient: Tensor, upstream: Tensor) -> Tensor:
    """`gradient * upstream`, over the gradient's own memory if nobody needs it again. Autograd converts it
    to the logits' dtype.
    """
    # While torch.compile traces, it is of another type.
    if type(upstream) is not Tensor or _private.is_traced_or_transformed():
        return gradient * upstream
    if gradient.numel() == 0:
        return gradient
    if _private.graph_is_kept():
        gradient = gradient.clone()
    if upstream.is_cpu:
        return gradient if upstream.item() == 1.0 else gradient.mul_(upstream)
    return _native.scale_on_device(gradient, upstream)


def first_derivative(ctx: Any, upstream: Tensor, others: int) -> Tuple[Optional[Tensor], ...]:
    """The saved gradient times `upstream`, for a function of the student and `others`."""
    if torch.is_grad_enabled():
        raise RuntimeError(NO_SECOND_DERIVATIVE)
    (gradient,) = ctx.saved_tensors
    return for_student(scaled(gradient, upstream), others)


def _setup_context(
    ctx: Any, inputs: Tuple[Any, ...], output: _operator.Results, *, of_teacher: int = 1
) -> None:
    """`of_teacher` is the number of the teacher's arguments."""
    with_gradient = inputs[6 + of_teacher]  # after the teacher and six tensors
    _, gradient, terms, chosen = output
    ctx.mark_non_differentiable(gradient, terms, chosen)
    # Else backward gets zeros as large as the gradient, for the outputs that have none.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gradient)
    ctx.with_gradient = with_gradient
    ctx.others = len(inputs) - 1


def _backward(ctx: Any, upstream: Tensor, *_: Any) -> Tuple[Optional[Tensor], ...]:
    if not ctx.with_gradient:
        raise RuntimeError("the operator was called with with_gradient=False, and has no gradient")
    return first_derivative(ctx, upstream, ctx.others)


_operator.loss.register_autograd(_backward, setup_context=_setup_context)
_operator.sparse_loss.register_autograd(
    _backward,
    setup_context=functools.partial(_setup_context, of_teacher=len(SparseTeacher._fields)),
)


class Loss(torch.autograd.Function):
    """The loss without an operator's overhead, and with the gradient in place if asked: the version counter
    of the student then tells autograd that its logits are gone, and backward raises if an operation
    before needs them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Teacher,
        labels: Optional[Tensor],
        scale: Optional[Tensor],
        hard: Optional[Tensor],
        token_weights: Optional[Tensor],
        temperatures: Optional[Tensor],
        with_gradient: bool,
        inplace: bool,
        per_sequence: bool,
        vocab_size: Optional[int],
        settings: Dict[str, Any],
        with_stats: bool,
    ) -> Tuple[Tensor, Optional[Stats]]:
        inputs = teacher, labels, scale, hard, token_weights, temperatures
        _checks.check_loss(student, *inputs, per_sequence, vocab_size, settings)
        place = _native.rows(student.detach()) if inplace else student
        gradient = None
        if with_gradient:
            gradient = place if inplace else _native.empty_gradient(student)
        value, stats = _native.run_loss(
            place, *inputs, gradient, per_sequence, vocab_size, settings, with_stats
        )
        if inplace:
            gradient = place
            if place.data_ptr() == student.data_ptr():
                torch.autograd.graph.increment_version(student)
        ctx.save_for_backward(gradient)
        # In a tuple, where autograd leaves them alone.
        return value, stats

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> Tuple[Optional[Tensor], ...]:
        return first_derivative(ctx, upstream, len(ctx.needs_input_grad) - 1)


class _Overwritten(torch.autograd.Function):
    """Stands in the graph for logits that their gradient has overwritten."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.mark_dirty(logits)
        ctx.set_materialize_grads(False)
        return logits

    @staticmethod
    def backward(ctx: Any, upstream: Optional[Tensor]) -> Optional[Tensor]:
        # Zeros come from uses of other rows of the same memory.
        if upstream is not None and upstream.any():
            raise RuntimeError(
                "the student's logits were used after atkd_loss(inplace=True) had overwritten them with "
                "their gradient: use them before, or leave inplace out"
            )
        return upstream


def may_be_overwritten(student: Tensor) -> bool:
    """True if autograd allows that. It is an error for a leaf."""
    base = _private.base(student)
    leaf = student if base is None else base
    if any(each.is_leaf and each.requires_grad for each in (student, leaf)):
        raise ValueError(
            "inplace=True would overwrite a leaf that requires a gradient (a parameter or an input) with "
            "that gradient: leave inplace out"
        )
    return base is None or _private.view_may_be_overwritten(student)


def run_directly(
    student: Tensor,
    teacher: Teacher,
    labels: Optional[Tensor],
    scale: Optional[Tensor],
    hard: Optional[Tensor],
    token_weights: Optional[Tensor],
    temperatures: Optional[Tensor],
    with_gradient: bool,
    inplace: bool,
    per_sequence: bool,
    vocab_size: Optional[int],
    settings: Dict[str, Any],
    with_stats: bool,
) -> Tuple[Tensor, Optional[Stats]]:
    """`Loss`, after which autograd knows of logits that are gone."""
    inplace = inplace and with_gradient and may_be_overwritten(student)
    before = _private.version(student) if inplace else 0
    tensors = student, teacher, labels, scale, hard, token_weights, temperatures
    flags = with_gradient, inplace, per_sequence, vocab_size
    result: Tuple[Tensor, Optional[Stats]] = Loss.apply(
        *tensors, *flags, {"numbers": None, **settings}, with_stats
    )
    if inplace:
        tell_overwritten(student, before)
    return result


def tell_overwritten(student: Tensor, before: int) -> None:
    """Lets autograd know if a function has written the gradient over the logits, whose version was `before`."""
    if _private.version(student) != before:
        # The gradient that the function has saved lies in the same memory, and must not seem modified.
        with _private.preserve_version(student):
            _Overwritten.apply(student)


def runs_directly(*tensors: Optional[Tensor]) -> bool:
    """True if no compiler, tracer, transform or tensor subclass wants to see an operator, and the tensors'
    memory holds their values.
    """
    return (
        not torch.compiler.is_compiling()
        and not _private.is_traced_or_transformed()
        and all(tensor is None or is_plain(tensor) for tensor in tensors)
    )


def is_plain(tensor: Tensor) -> bool:
    """True if its memory on the CPU or a CUDA device holds its values."""
    return (
        type(tensor) in _PLAIN
        and (tensor.is_cpu or tensor.is_cuda)
        and _private.holds_its_values(tensor)
    )
