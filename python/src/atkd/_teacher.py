"""The teacher of a call: its logits, or a few log-probabilities per token."""

from typing import Any, List, NamedTuple, Optional, Sequence, Tuple, Union

from torch import Tensor


class SparseTeacher(NamedTuple):
    """The teacher's log-probabilities of K tokens of the vocabulary at each position, and of the target: all that is known
    where its logits are not in memory. `sparse_atkd_loss` says what each is.
    """

    indices: Tensor
    """`[N, K]` or `[B, T, K]`, int64 or int32: tokens of the vocabulary, or -1 for none."""
    log_probs: Tensor
    """Of the same shape, float32, float16 or bfloat16: natural logarithms, at the temperature of the call."""
    target_log_prob: Optional[Tensor] = None
    """`[N]` or `[B, T]`, of a floating dtype: that of each position's target."""
    tail: str = "bucket"
    """What the teacher is taken for outside of the known tokens: `"zero"`, `"uniform"` or `"bucket"`."""

    def at(self, at: Any) -> "SparseTeacher":
        """The rows at these positions of the first dimension."""
        target = self.target_log_prob
        return SparseTeacher(
            self.indices[at], self.log_probs[at], None if target is None else target[at], self.tail
        )


# Logits `[.., V]`, or a sparse teacher, of which operators and autograd's functions take the parts.
Teacher = Union[Tensor, SparseTeacher]


def parts(teacher: Teacher) -> Tuple[Any, ...]:
    return tuple(teacher) if isinstance(teacher, SparseTeacher) else (teacher,)


def of_parts(given: Sequence[Any]) -> Teacher:
    return SparseTeacher(*given) if len(given) > 1 else given[0]


def tensors(teacher: Teacher) -> List[Optional[Tensor]]:
    return [*teacher[:3]] if isinstance(teacher, SparseTeacher) else [teacher]
