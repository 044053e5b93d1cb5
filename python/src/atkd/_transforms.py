"""The derivative of the loss for the transforms of torch.func and for forward mode, which the operator's own is not
made for.
"""

from typing import Any, Optional, Tuple

import torch
from torch import Tensor

from . import _operator, _teacher
from ._autograd import NO_SECOND_DERIVATIVE, for_student


class NotTwiceDifferentiable(torch.autograd.Function):
    """`gradient`, whose derivatives in any direction raise: it would depend on the student, and on the weights of the
    tokens if it has any.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, student: Tensor, weights: Optional[Tensor] = None) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tuple[Optional[Tensor], ...]:
        raise RuntimeError(NO_SECOND_DERIVATIVE)

    @staticmethod
    def jvp(ctx: Any, *tangents: Optional[Tensor]) -> Tensor:
        raise RuntimeError(NO_SECOND_DERIVATIVE)


class Transformed(torch.autograd.Function):
    """The operator of the loss, with its gradient. `settings` are as the operator takes them; the teacher's parts come last."""

    @staticmethod
    def vmap(
        info: Any, in_dims: Tuple[Any, ...], *arguments: Any
    ) -> Tuple[Tuple[Tensor, ...], Tuple[int, ...]]:
        result: Tuple[Tuple[Tensor, ...], Tuple[int, ...]] = _operator.one_by_one(
            Transformed.apply, info, in_dims, arguments
        )
        return result

    @staticmethod
    def forward(
        student: Tensor,
        labels: Optional[Tensor],
        scale: Optional[Tensor],
        hard: Optional[Tensor],
        token_weights: Optional[Tensor],
        temperatures: Optional[Tensor],
        per_sequence: bool,
        vocab_size: Optional[int],
        settings: Tuple[Any, ...],
        *parts: Any,
    ) -> _operator.Results:
        tensors = student, _teacher.of_parts(parts), labels, scale, hard, token_weights, temperatures
        with_gradient = True
        return _operator.loss_by(*tensors, with_gradient, per_sequence, vocab_size, *settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: Tuple[Any, ...], output: _operator.Results) -> None:
        student, (_, gradient, terms, chosen) = inputs[0], output
        ctx.mark_non_differentiable(gradient, terms, chosen)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gradient, student)
        ctx.save_for_forward(gradient, student)
        ctx.others = len(inputs) - 1

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> Tuple[Optional[Tensor], ...]:
        gradient, student = ctx.saved_tensors
        once = NotTwiceDifferentiable.apply(gradient, student)
        return for_student(once * upstream, ctx.others)

    @staticmethod
    def jvp(ctx: Any, tangent: Optional[Tensor], *_: Any) -> Tuple[Optional[Tensor], ...]:
        # The loss takes all else that has a tangent as constant.
        gradient, student = ctx.saved_tensors
        if tangent is None:
            tangent = torch.zeros_like(student)
        once = NotTwiceDifferentiable.apply(gradient, student)
        return (once.float() * tangent).sum(), None, None, None
