from typing import Optional, Tuple, final

from typing_extensions import Self

__all__ = ["Objective", "host"]

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

def host(
    threads: int,
    objective: Objective,
    shape: Tuple[int, int],
    student: Tuple[int, str, int],
    teacher: Tuple[int, str, int],
    labels: Optional[Tuple[int, str]],
    sequence_length: Optional[int],
    scale: int,
    gradient: Optional[Tuple[int, str, int]],
    loss: int,
    stats: int,
    hard: int,
) -> None: ...
