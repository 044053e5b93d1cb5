from typing import Any, ClassVar, Dict, Optional, Tuple, Union, final

from typing_extensions import Self

from ._native import Call, Labels, Matrix, Shard

__version__: str
__all__ = [
    "HARD",
    "Dtype",
    "ROW_STATE_BYTES",
    "SWEEP_TERMS_BYTES",
    "LabelDtype",
    "Objective",
    "__version__",
    "default_settings",
    "run",
    "scale_on_device",
    "select_hard",
    "shard_gradient",
    "shard_loss",
    "shard_margins",
    "shard_states",
    "shard_terms",
    "teacher_margins",
    "token_entropies",
    "workspace_bytes",
]

HARD: int
# The bytes of a token that ranks exchange for rows split over them, and those of a second time.
ROW_STATE_BYTES: int
SWEEP_TERMS_BYTES: int

# A device's ordinal, and a stream.
_Queue = Tuple[int, int]
# Threads of the CPU; or a queue, and the address of `workspace_bytes`.
_Place = Union[int, Tuple[_Queue, int]]
# The address of what the ranks have made, one after the other, and their number.
_OfRanks = Tuple[int, int]

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
    # The divergence's row sums need the log-sum-exps of the whole rows.
    @property
    def two_sweeps(self) -> bool: ...
    # The gradient of a token depends on which tokens are hard.
    @property
    def depends_on_selection(self) -> bool: ...

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
    selection_rule: str,
) -> None: ...
def shard_states(place: _Place, objective: Objective, shard: Shard, to: int) -> None: ...
def shard_margins(
    place: _Place, objective: Objective, shard: Shard, states: _OfRanks, to: int
) -> None: ...
def shard_terms(
    place: _Place, objective: Objective, shard: Shard, states: _OfRanks, to: int
) -> None: ...
def shard_gradient(
    place: _Place,
    objective: Objective,
    shard: Shard,
    states: _OfRanks,
    terms: Optional[int],
    gradient: Matrix,
    gradient_padding: int,
) -> None: ...
def shard_loss(
    place: _Place,
    objective: Objective,
    shard: Shard,
    states: _OfRanks,
    terms: Optional[int],
    loss: int,
    columns: Optional[int],
    groups: Optional[int],
) -> None: ...
