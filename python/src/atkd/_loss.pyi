from typing import Any, Dict, Literal, NamedTuple, Optional, Tuple, Union, overload

import torch
from torch import Tensor

_Number = Union[float, Tensor]

class Stats(NamedTuple):
    uncertainty: Tensor
    tkd: Tensor
    dkd: Tensor
    hard: Tensor
    margin: Tensor

@overload
def atkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Optional[Tensor] = None,
    *,
    lam: _Number = 0.2,
    hard_ratio: _Number = 0.5,
    temperature: _Number = 1.0,
    temperature_squared: bool = False,
    objective: str = "atkd",
    target: str = "label",
    selection: str = "batch",
    reduction: str = "mean",
    ignore_index: int = -100,
    ce_weight: _Number = 0.0,
    kd_weight: _Number = 1.0,
    num_items_in_batch: Union[None, int, float, Tensor] = None,
    shift_labels: bool = False,
    hard: Optional[Tensor] = None,
    inplace: bool = False,
    return_stats: Literal[False] = False,
) -> Tensor: ...
@overload
def atkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Optional[Tensor] = None,
    *,
    lam: _Number = 0.2,
    hard_ratio: _Number = 0.5,
    temperature: _Number = 1.0,
    temperature_squared: bool = False,
    objective: str = "atkd",
    target: str = "label",
    selection: str = "batch",
    reduction: str = "mean",
    ignore_index: int = -100,
    ce_weight: _Number = 0.0,
    kd_weight: _Number = 1.0,
    num_items_in_batch: Union[None, int, float, Tensor] = None,
    shift_labels: bool = False,
    hard: Optional[Tensor] = None,
    inplace: bool = False,
    return_stats: Literal[True],
) -> Tuple[Tensor, Stats]: ...
@overload
def atkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Optional[Tensor] = None,
    *,
    lam: _Number = 0.2,
    hard_ratio: _Number = 0.5,
    temperature: _Number = 1.0,
    temperature_squared: bool = False,
    objective: str = "atkd",
    target: str = "label",
    selection: str = "batch",
    reduction: str = "mean",
    ignore_index: int = -100,
    ce_weight: _Number = 0.0,
    kd_weight: _Number = 1.0,
    num_items_in_batch: Union[None, int, float, Tensor] = None,
    shift_labels: bool = False,
    hard: Optional[Tensor] = None,
    inplace: bool = False,
    return_stats: bool,
) -> Union[Tensor, Tuple[Tensor, Stats]]: ...

def teacher_margins(
    teacher_logits: Tensor,
    labels: Optional[Tensor] = None,
    *,
    temperature: _Number = 1.0,
    target: str = "label",
    ignore_index: int = -100,
    shift_labels: bool = False,
) -> Tensor: ...
def select_hard(
    margins: Tensor,
    hard_ratio: _Number,
    *,
    valid: Optional[Tensor] = None,
    cu_seqlens: Optional[Tensor] = None,
) -> Tensor: ...

class ATKDLoss(torch.nn.Module):
    settings: Dict[str, Any]

    def __init__(
        self,
        lam: _Number = 0.2,
        hard_ratio: _Number = 0.5,
        temperature: _Number = 1.0,
        objective: str = "atkd",
        target: str = "label",
        reduction: str = "mean",
        ignore_index: int = -100,
        ce_weight: _Number = 0.0,
        kd_weight: _Number = 1.0,
        *,
        temperature_squared: bool = False,
        selection: str = "batch",
        shift_labels: bool = False,
        inplace: bool = False,
        return_stats: bool = False,
    ) -> None: ...
    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Optional[Tensor] = None,
        num_items_in_batch: Union[None, int, float, Tensor] = None,
        hard: Optional[Tensor] = None,
    ) -> Any: ...
    def extra_repr(self) -> str: ...
