from typing import Any, Dict, Literal, NamedTuple, Optional, Tuple, Union, overload

import torch
from torch import Tensor

class Stats(NamedTuple):
    uncertainty: Tensor
    tkd: Tensor
    dkd: Tensor
    hard: Tensor

@overload
def atkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Optional[Tensor] = None,
    *,
    lam: float = 0.2,
    hard_ratio: float = 0.5,
    temperature: float = 1.0,
    temperature_squared: bool = False,
    objective: Literal["atkd", "kl", "tkd", "dkd"] = "atkd",
    target: Literal["label", "teacher"] = "label",
    selection: Literal["batch", "sequence"] = "batch",
    reduction: Literal["mean", "sum"] = "mean",
    ignore_index: int = -100,
    ce_weight: float = 0.0,
    kd_weight: float = 1.0,
    num_items_in_batch: Union[None, int, float, Tensor] = None,
    shift_labels: bool = False,
    inplace: bool = False,
    return_stats: Literal[False] = False,
) -> Tensor: ...
@overload
def atkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Optional[Tensor] = None,
    *,
    lam: float = 0.2,
    hard_ratio: float = 0.5,
    temperature: float = 1.0,
    temperature_squared: bool = False,
    objective: Literal["atkd", "kl", "tkd", "dkd"] = "atkd",
    target: Literal["label", "teacher"] = "label",
    selection: Literal["batch", "sequence"] = "batch",
    reduction: Literal["mean", "sum"] = "mean",
    ignore_index: int = -100,
    ce_weight: float = 0.0,
    kd_weight: float = 1.0,
    num_items_in_batch: Union[None, int, float, Tensor] = None,
    shift_labels: bool = False,
    inplace: bool = False,
    return_stats: Literal[True],
) -> Tuple[Tensor, Stats]: ...

class ATKDLoss(torch.nn.Module):
    settings: Dict[str, Any]

    def __init__(
        self,
        lam: float = 0.2,
        hard_ratio: float = 0.5,
        temperature: float = 1.0,
        objective: Literal["atkd", "kl", "tkd", "dkd"] = "atkd",
        target: Literal["label", "teacher"] = "label",
        reduction: Literal["mean", "sum"] = "mean",
        ignore_index: int = -100,
        ce_weight: float = 0.0,
        kd_weight: float = 1.0,
        *,
        temperature_squared: bool = False,
        selection: Literal["batch", "sequence"] = "batch",
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
    ) -> Any: ...
    def extra_repr(self) -> str: ...
