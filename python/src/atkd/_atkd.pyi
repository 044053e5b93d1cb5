import os
from typing import Any, ClassVar, Dict, List, Optional, Tuple, Union, final

from typing_extensions import Self

from ._native import Call, Labels, Matrix, Shard, Sparse

__version__: str
__all__ = [
    "HARD",
    "Dtype",
    "ROW_REST_BYTES",
    "ROW_STATE_BYTES",
    "SWEEP_TERMS_BYTES",
    "LabelDtype",
    "Objective",
    "TeacherCache",
    "TeacherCacheWriter",
    "__version__",
    "default_settings",
    "report",
    "run",
    "scale_on_device",
    "select_hard",
    "shard_gradient",
    "shard_loss",
    "shard_margins",
    "shard_rests",
    "shard_states",
    "shard_teacher_logits",
    "shard_terms",
    "teacher_margins",
    "token_entropies",
    "workspace_bytes",
]

HARD: int
# The bytes of a token that ranks exchange for rows split over them, and those of a second time.
ROW_STATE_BYTES: int
SWEEP_TERMS_BYTES: int
# Those of a sparse teacher, before.
ROW_REST_BYTES: int

_Path = Union[str, "os.PathLike[str]"]
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

@final
class TeacherCache:
    def __new__(cls, path: _Path) -> Self: ...
    @property
    def tokens(self) -> int: ...
    @property
    def complete(self) -> bool: ...
    @property
    def bytes_per_token(self) -> int: ...
    @property
    def largest_error(self) -> float: ...
    # The vocabulary's size, the entries per token, the temperature, the encoding, the fingerprint.
    @property
    def facts(self) -> Tuple[int, int, float, str, str]: ...
    def mean_tail_mass(self) -> float: ...
    # To the addresses of indices, log-probabilities, the targets', tail masses, labels.
    def read(self, start: int, end: int, to: List[int]) -> None: ...

@final
class TeacherCacheWriter:
    def __new__(
        cls,
        path: _Path,
        vocab_size: int,
        top_k: int,
        temperature: float,
        encoding: str,
        fingerprint: str,
        shard_tokens: Optional[int],
    ) -> Self: ...
    def tokens(self) -> int: ...
    def complete(self) -> bool: ...
    def push(
        self,
        tokens: int,
        top_k: int,
        rounding: Dtype,
        indices: int,
        log_probs: int,
        target_log_prob: int,
        tail_mass: Optional[int],
        labels: int,
    ) -> None: ...
    def flush(self) -> None: ...
    def finish(self) -> None: ...
    def close(self) -> None: ...

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
    teacher: Union[Matrix, Sparse],
    labels: Optional[Labels],
    temperatures: Optional[int],
    to: int,
) -> None: ...
def token_entropies(
    place: _Place, shape: Tuple[int, int], logits: Matrix, temperature: float, to: int
) -> None: ...
def report(title: str, facts: List[Tuple[str, str]], columns: Dict[str, Any]) -> str: ...
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
def shard_rests(
    place: _Place, objective: Objective, shard: Shard, teacher: Sparse, to: int
) -> None: ...
def shard_teacher_logits(
    place: _Place,
    objective: Objective,
    shard: Shard,
    teacher: Sparse,
    rests: Optional[_OfRanks],
    to: int,
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
