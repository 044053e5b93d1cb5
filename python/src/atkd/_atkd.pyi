from typing import Any, ClassVar, Dict, Optional, Tuple, Union, final

from typing_extensions import Self

from ._native import Call, Labels, Matrix

__version__: str
__all__ = [
    "HARD",
    "Dtype",
    "LabelDtype",
    "Objective",
    "__version__",
    "default_settings",
    "run",
    "scale_on_device",
    "select_hard",
    "teacher_margins",
    "token_entropies",
    "workspace_bytes",
]

HARD: int

# A device's ordinal, and a stream.
_Queue = Tuple[int, int]
# Threads of the CPU; or a queue, and the address of `workspace_bytes`.
_Place = Union[int, Tuple[_Queue, int]]

@final
class Dtype:
    F32: ClassVar[Dtype]
    F16: ClassVar[Dtype]
    BF16: ClassVar[Dtype]

@final
class LabelDtype:
    I64: ClassVar[LabelDtype]
    I32: ClassVar[LabelDtype]

@final
class Objective:
    # The settings are those of default_settings().
    def __new__(cls, **settings: Any) -> Self: ...
    @staticmethod
    def default() -> Objective: ...

def default_settings() -> Dict[str, Any]: ...
def workspace_bytes(tokens: int) -> int: ...
def run(place: _Place, objective: Objective, call: Call) -> None: ...
def scale_on_device(
    queue: _Queue, shape: Tuple[int, int], gradient: Matrix, factor: int
) -> None: ...
def teacher_margins(
    place: _Place,
    objective: Objective,
    tokens: int,
    vocab: int,
    teacher: Matrix,
    labels: Optional[Labels],
    temperatures: Optional[int],
    to: int,
) -> None: ...
def token_entropies(
    place: _Place, shape: Tuple[int, int], logits: Matrix, temperature: float, to: int
) -> None: ...
def select_hard(
    place: _Place,
    tokens: int,
    margins: int,
    valid: Optional[int],
    sequences: Optional[Tuple[int, int]],
    hard_ratio: float,
    hard: int,
) -> None: ...
