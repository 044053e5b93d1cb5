"""A page about a batch."""

import os
from typing import Any, Mapping, Optional, Union

import torch
from torch import Tensor

from . import _atkd
from ._loss import Stats


def report(
    path: Union[str, "os.PathLike[str]"],
    stats: Stats,
    *,
    labels: Optional[Tensor] = None,
    gradient: Optional[Tensor] = None,
    valid: Optional[Tensor] = None,
    title: str = "Distillation loss of a batch",
    facts: Optional[Mapping[str, Any]] = None,
) -> None:
    """Writes an HTML page, which loads nothing and has no scripts, about the tokens of a call: the teacher's uncertainty and
    where it parts easy tokens from hard ones, TKD beside DKD, both groups' shares, norms of the gradient, the tokens of the
    largest loss, means and percentiles. On a GPU it waits for the numbers.

        loss, stats = atkd.atkd_loss(student_logits, teacher_logits, labels, return_stats=True)
        student_logits.retain_grad()
        loss.backward()
        atkd.report("report.html", stats, labels=labels, gradient=student_logits.grad, facts={"step": step})

    Args:
        path: the file, which is replaced.
        stats: of any of the losses.
        labels: shaped as the columns of `stats`; each is beside its token among those of the largest loss.
        gradient: the columns' shape and V, as the student's logits have; of each row the norm is shown.
        valid: bool, shaped as the columns: which tokens count. Without it all whose margin is above -inf do.
        title: the page's.
        facts: names and values for the table at the top, such as the step and `criterion.settings`.

    Raises:
        TypeError: if a column or `valid` is no bool where it must be one, or labels are no integers.
        ValueError: if a shape does not go with that of the columns.
        OSError: if the file cannot be written.
    """
    shape = stats.margin.shape
    for name, tensor in [*stats._asdict().items(), ("labels", labels), ("valid", valid)]:
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} is {list(tensor.shape)}, but must be {list(shape)}, as the margins are")
    if gradient is not None and (gradient.dim() == 0 or gradient.shape[:-1] != shape):
        raise ValueError(
            f"gradient is {list(gradient.shape)}, but must be {list(shape)} and V, as the margins are and the logits"
        )
    for name, tensor in [("hard", stats.hard), ("valid", valid)]:
        if tensor is not None and tensor.dtype != torch.bool:
            raise TypeError(f"{name} is {tensor.dtype}, but must be bool")
    if labels is not None and (labels.is_floating_point() or labels.is_complex()):
        raise TypeError(f"labels are {labels.dtype}, but must be integers")
    counts = stats.margin != float("-inf") if valid is None else valid
    norms = None if gradient is None else torch.linalg.vector_norm(gradient, dim=-1, dtype=torch.float64)
    columns = {**stats._asdict(), "valid": counts, "labels": labels, "gradient_norms": norms}
    flat = {name: None if column is None else column.flatten().tolist() for name, column in columns.items()}
    page = _atkd.report(title, [(str(name), str(value)) for name, value in (facts or {}).items()], flat)
    with open(path, "w", encoding="utf-8") as file:
        file.write(page)
