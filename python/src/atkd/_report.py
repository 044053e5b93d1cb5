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
        ValueError: if a shape does not go with that of the columns.
        OSError: if the file cannot be written.
    """
    shape = stats.margin.shape
    for name, tensor, expected in [
        ("labels", labels, shape),
        ("valid", valid, shape),
        ("gradient", None if gradient is None else gradient[..., 0], shape),
    ]:
        if tensor is not None and tensor.shape != expected:
            given = list(gradient.shape if name == "gradient" and gradient is not None else tensor.shape)
            of_rows = " and V" if name == "gradient" else ""
            raise ValueError(f"{name} is {given}, but must be {list(expected)}{of_rows}, as the stats are")
    counts = stats.margin != float("-inf") if valid is None else valid
    norms = None if gradient is None else torch.linalg.vector_norm(gradient, dim=-1, dtype=torch.float32)
    columns = {**stats._asdict(), "valid": counts, "labels": labels, "gradient_norms": norms}
    flat = {name: None if column is None else column.flatten().tolist() for name, column in columns.items()}
    page = _atkd.report(title, [(name, str(value)) for name, value in (facts or {}).items()], flat)
    with open(path, "w", encoding="utf-8") as file:
        file.write(page)
