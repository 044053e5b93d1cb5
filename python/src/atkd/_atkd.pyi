from typing import Optional, Tuple, final

from typing_extensions import Self

__version__: str
__all__ = [
    "Objective",
    "__version__",
    "run_on_device",
    "run_on_host",
    "scale_on_device",
    "select_hard_on_device",
    "select_hard_on_host",
    "teacher_margins_on_device",
    "teacher_margins_on_host",
    "workspace_bytes",
]

@final
class Objective:
    def __new__(
        cls,
        objective: str,
        lam: float,
        hard_ratio: float,
        temperature: float,
        temperature_squared: bool,
        target: str,
        reduction: str,
        ignore_index: int,
        ce_weight: float,
        kd_weight: float,
    ) -> Self: ...

def workspace_bytes(tokens: int) -> int: ...
def run_on_host(
    threads: int,
    objective: Objective,
    shape: Tuple[int, int],
    student: Tuple[int, str, int, int, int],
    teacher: Tuple[int, str, int, int, int],
    labels: Optional[Tuple[int, str]],
    hard: Optional[int],
    sequences: Optional[Tuple[int, int]],
    scale: Optional[int],
    gradient: Optional[Tuple[int, str, int, int, int]],
    loss: int,
    stats: Optional[Tuple[int, int]],
) -> None: ...
def run_on_device(
    queue: Tuple[int, int],
    workspace: int,
    objective: Objective,
    shape: Tuple[int, int],
    student: Tuple[int, str, int, int, int],
    teacher: Tuple[int, str, int, int, int],
    labels: Optional[Tuple[int, str]],
    hard: Optional[int],
    sequences: Optional[Tuple[int, int]],
    scale: Optional[int],
    gradient: Optional[Tuple[int, str, int, int, int]],
    loss: int,
    stats: Optional[Tuple[int, int]],
) -> None: ...
def scale_on_device(
    queue: Tuple[int, int],
    shape: Tuple[int, int],
    gradient: Tuple[int, str, int, int, int],
    factor: int,
) -> None: ...
def teacher_margins_on_host(
    threads: int,
    objective: Objective,
    shape: Tuple[int, int],
    teacher: Tuple[int, str, int, int, int],
    labels: Optional[Tuple[int, str]],
    to: int,
) -> None: ...
def teacher_margins_on_device(
    queue: Tuple[int, int],
    workspace: int,
    objective: Objective,
    shape: Tuple[int, int],
    teacher: Tuple[int, str, int, int, int],
    labels: Optional[Tuple[int, str]],
    to: int,
) -> None: ...
def select_hard_on_host(
    tokens: int,
    margins: int,
    valid: Optional[int],
    sequences: Optional[Tuple[int, int]],
    hard_ratio: float,
    hard: int,
) -> None: ...
def select_hard_on_device(
    queue: Tuple[int, int],
    workspace: int,
    tokens: int,
    margins: int,
    valid: Optional[int],
    sequences: Optional[Tuple[int, int]],
    hard_ratio: float,
    hard: int,
) -> None: ...
