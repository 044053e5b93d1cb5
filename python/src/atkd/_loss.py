"""The loss as a function and as a module."""

from typing import NamedTuple, Optional, Tuple, Union

import torch
from torch import Tensor

from . import _atkd, _ops


class Stats(NamedTuple):
    """The terms of each token, shaped as the labels; 0 for ignored ones. No gradient flows through."""

    uncertainty: Tensor
    """1 - p(target) of the teacher, float32."""
    tkd: Tensor
    """The target part of the KL divergence, float32."""
    dkd: Tensor
    """The divergence of the renormalised rest, float32."""
    hard: Tensor
    """Whether the token was among the hard ones, bool."""


def _scale(num_items: Union[int, float, Tensor], device: torch.device) -> Tensor:
    """Its reciprocal as a float32 scalar on the device, computed there."""
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"num_items_in_batch is {list(num_items.shape)}, but must be one number")
        items = num_items.detach().reshape(()).to(device, torch.float32, non_blocking=True)
    elif num_items < 0:
        raise ValueError(f"num_items_in_batch is {num_items}, but must not be negative")
    else:
        items = torch.full((), num_items, dtype=torch.float32, device=device)
    return items.clamp(min=1).reciprocal()


def _check_type(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} are a {type(value).__name__}, but must be a torch.Tensor")


def _is_per_sequence(selection: str) -> bool:
    if selection not in ("batch", "sequence"):
        raise ValueError(f'selection is "{selection}", but must be "batch" or "sequence"')
    return selection == "sequence"


def atkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Optional[Tensor] = None,
    *,
    lam: float = 0.2,
    hard_ratio: float = 0.5,
    temperature: float = 1.0,
    temperature_squared: bool = False,
    objective: str = "atkd",
    target: str = "label",
    selection: str = "batch",
    reduction: str = "mean",
    ignore_index: int = -100,
    ce_weight: float = 0.0,
    kd_weight: float = 1.0,
    num_items_in_batch: Union[None, int, float, Tensor] = None,
    shift_labels: bool = False,
    inplace: bool = False,
    return_stats: bool = False,
) -> Union[Tensor, Tuple[Tensor, Stats]]:
    """The distillation loss of a batch of tokens, a float32 scalar that `backward` goes through.

    The gradient with respect to the student's logits is computed here, with the loss, if the student
    requires one and gradients are enabled; `backward` multiplies it by what arrives. Nothing flows back
    to the teacher.

    Args:
        student_logits: `[N, V]` or `[B, T, V]`, float32, float16 or bfloat16. Read where they lie if
            rows are contiguous and evenly spaced, else copied; so are the teacher's.
        teacher_logits: of the same shape, of any of these dtypes.
        labels: `[N]` or `[B, T]`, int64 or int32. May be left out if `target="teacher"`.
        lam: easy tokens learn `lam * DKD`, hard ones `(1 - lam) * (TKD + DKD)`; of `"atkd"` alone.
        hard_ratio: the share of the valid tokens, those of which the teacher is least certain, that is
            hard.
        temperature: divides both models' logits, but not for cross entropy.
        temperature_squared: multiplies the distillation terms by the temperature's square.
        objective: `"atkd"`, `"kl"` (the plain divergence), `"tkd"` or `"dkd"` (one part alone).
        target: `"label"`, or `"teacher"`: the teacher's arg max splits the distributions.
        selection: hard tokens are those of the `"batch"`, or of each `"sequence"` of `[B, T, V]`.
        reduction: `"mean"` over the valid tokens, or `"sum"`.
        ignore_index: tokens with this label are dropped.
        ce_weight: of the student's cross entropy, which is added.
        kd_weight: of the distillation terms.
        num_items_in_batch: for gradient accumulation, the valid tokens of the whole batch: the loss is
            the sum over the valid tokens here, divided by it. A tensor is not waited for. 0, a batch
            without valid tokens, counts as 1.
        shift_labels: logits at one position are about the label at the next, as in a causal model: the
            labels are shifted along their last dimension, and the last position is ignored.
        inplace: the gradient overwrites the student's logits, which nothing else may then need; autograd
            raises if something does. The gradient is of their dtype: float16 loses those below 6e-8. No
            effect without a gradient, in a transform of torch.func, or under torch.compile, which plans
            memory itself.
        return_stats: returns `(loss, Stats)`.

    Raises:
        TypeError: for a dtype that is none of these.
        ValueError: for shapes or devices that differ, a setting outside its domain, a label that names
            no token of the vocabulary.
    """
    _check_type("student_logits", student_logits)
    _check_type("teacher_logits", teacher_logits)
    if labels is not None:
        _check_type("labels", labels)
    if teacher_logits.requires_grad:
        teacher_logits = teacher_logits.detach()
    scale = None
    if num_items_in_batch is not None:
        reduction, scale = "sum", _scale(num_items_in_batch, student_logits.device)
    if shift_labels and labels is not None and labels.dim() > 0:
        labels = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    settings = (
        objective,
        lam,
        hard_ratio,
        temperature,
        temperature_squared,
        target,
        reduction,
        ignore_index,
        ce_weight,
        kd_weight,
    )
    per_sequence = _is_per_sequence(selection)
    with_gradient = student_logits.requires_grad and torch.is_grad_enabled()
    tensors = student_logits, teacher_logits, labels, scale
    if _ops.derivatives_are_transformed():
        loss, _, *stats = _ops.Transformed.apply(*tensors, per_sequence, settings)
    elif _ops.runs_directly(student_logits):
        loss, stats = _ops.Loss.apply(
            *tensors, with_gradient, inplace, per_sequence, settings, return_stats
        )
    else:
        loss, _, *stats = _ops.loss(*tensors, with_gradient, per_sequence, *settings)
    if not return_stats:
        return loss
    terms, hard = stats
    return loss, Stats(*terms.unbind(), hard)


class ATKDLoss(torch.nn.Module):
    """`atkd_loss` with its settings, which are checked here."""

    def __init__(
        self,
        lam: float = 0.2,
        hard_ratio: float = 0.5,
        temperature: float = 1.0,
        objective: str = "atkd",
        target: str = "label",
        reduction: str = "mean",
        ignore_index: int = -100,
        ce_weight: float = 0.0,
        kd_weight: float = 1.0,
        *,
        temperature_squared: bool = False,
        selection: str = "batch",
        shift_labels: bool = False,
        inplace: bool = False,
        return_stats: bool = False,
    ) -> None:
        super().__init__()
        _is_per_sequence(selection)
        _atkd.Objective(
            objective,
            lam,
            hard_ratio,
            temperature,
            temperature_squared,
            target,
            reduction,
            ignore_index,
            ce_weight,
            kd_weight,
        )
        self.settings = {
            "lam": lam,
            "hard_ratio": hard_ratio,
            "temperature": temperature,
            "objective": objective,
            "target": target,
            "reduction": reduction,
            "ignore_index": ignore_index,
            "ce_weight": ce_weight,
            "kd_weight": kd_weight,
            "temperature_squared": temperature_squared,
            "selection": selection,
            "shift_labels": shift_labels,
            "inplace": inplace,
            "return_stats": return_stats,
        }

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Optional[Tensor] = None,
        num_items_in_batch: Union[None, int, float, Tensor] = None,
    ) -> Union[Tensor, Tuple[Tensor, Stats]]:
        return atkd_loss(
            student_logits,
            teacher_logits,
            labels,
            num_items_in_batch=num_items_in_batch,
            **self.settings,
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
