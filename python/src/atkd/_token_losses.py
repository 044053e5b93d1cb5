"""The losses of the tokens, whose gradient is computed when it is known what multiplies them."""

from typing import Any, Optional, Tuple

import torch
from torch import Tensor

from . import _native, _operator, _teacher
from ._autograd import NO_SECOND_DERIVATIVE, for_student
from ._transforms import NotTwiceDifferentiable, Transformed


class TokenLosses(torch.autograd.Function):
    """The loss of each token; their terms; which are hard. The gradient that arrives is a weight of the tokens, so that
    `backward` computes theirs from the logits, with the hard tokens that are known by then. `settings` are as the operator
    takes them, of a sum; the teacher's parts come last.
    """

    @staticmethod
    def forward(
        student: Tensor,
        labels: Optional[Tensor],
        hard: Optional[Tensor],
        token_weights: Optional[Tensor],
        temperatures: Optional[Tensor],
        per_sequence: bool,
        vocab_size: Optional[int],
        settings: Tuple[Any, ...],
        *parts: Any,
    ) -> Tuple[Tensor, Tensor, Tensor]:
        tensors = student, _teacher.of_parts(parts), labels, None, hard, token_weights, temperatures
        with_gradient = False
        _, _, terms, chosen = _operator.loss_by(
            *tensors, with_gradient, per_sequence, vocab_size, *settings
        )
        return terms[-1].clone(), terms, chosen

    @staticmethod
    def setup_context(
        ctx: Any, inputs: Tuple[Any, ...], output: Tuple[Tensor, Tensor, Tensor]
    ) -> None:
        student, labels, _hard, token_weights, temperatures, *others = inputs
        # The tail of a sparse teacher, after three tensors, is none.
        ctx.flags, of_teacher, ctx.tail = others[:3], others[3:6], others[6:]
        _, terms, chosen = output
        ctx.mark_non_differentiable(terms, chosen)
        ctx.set_materialize_grads(False)
        saved = student, labels, chosen, token_weights, temperatures, *of_teacher
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.others = len(inputs) - 1

    @staticmethod
    def backward(ctx: Any, upstream: Optional[Tensor], *_: Any) -> Tuple[Optional[Tensor], ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(NO_SECOND_DERIVATIVE)
        if upstream is None:
            return for_student(None, ctx.others)
        return for_student(_gradient(ctx, upstream), ctx.others)


class TransformedTokenLosses(TokenLosses):
    """The same for the transforms of torch.func and for forward mode, of which torch.compile does not know."""

    @staticmethod
    def vmap(
        info: Any, in_dims: Tuple[Any, ...], *arguments: Any
    ) -> Tuple[Tuple[Tensor, ...], Tuple[int, ...]]:
        result: Tuple[Tuple[Tensor, ...], Tuple[int, ...]] = _operator.one_by_one(
            TransformedTokenLosses.apply, info, in_dims, arguments
        )
        return result

    @staticmethod
    def backward(ctx: Any, upstream: Optional[Tensor], *_: Any) -> Tuple[Optional[Tensor], ...]:
        if upstream is None:
            return for_student(None, ctx.others)
        gradient = _gradient(ctx, upstream, transformed=True)
        once = NotTwiceDifferentiable.apply(gradient, ctx.saved_tensors[0], upstream)
        return for_student(once, ctx.others)

    @staticmethod
    def jvp(
        ctx: Any, tangent: Optional[Tensor], *_: Any
    ) -> Tuple[Optional[Tensor], None, None]:
        # The loss takes all else that has a tangent as constant.
        student = ctx.saved_tensors[0]
        if tangent is None:
            tangent = torch.zeros_like(student)
        gradient = _gradient(ctx, None, transformed=True)
        once = NotTwiceDifferentiable.apply(gradient, student)
        return (once.float() * tangent).sum(-1), None, None


def _gradient(ctx: Any, upstream: Optional[Tensor], *, transformed: bool = False) -> Tensor:
    """The gradient of each token's loss, times `upstream` of the token."""
    student, labels, chosen, token_weights, temperatures, *of_teacher = ctx.saved_tensors
    parts = *of_teacher, *ctx.tail
    per_sequence, vocab_size, settings = ctx.flags
    weights = _native.product(upstream, token_weights)
    of_tokens = labels, None, chosen, weights, temperatures
    with_gradient = True
    gradient: Tensor
    if transformed:
        # The operator's own derivative is not made for torch.func.
        with torch.no_grad():
            _, gradient, *_ = Transformed.apply(student, *of_tokens, *ctx.flags, *parts)
    else:
        _, gradient, *_ = _operator.loss_by(
            student, _teacher.of_parts(parts), *of_tokens, with_gradient, per_sequence, vocab_size, *settings
        )
    return gradient
