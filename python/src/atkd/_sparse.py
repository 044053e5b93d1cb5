"""The loss with a teacher of which a few log-probabilities per token are known, as a function and as a module."""

from typing import (
    TYPE_CHECKING,
    Any,
    Dict,
    Literal,
    Optional,
    Sequence,
    Tuple,
    Union,
    overload,
)

from torch import Tensor

from . import _loss
from ._loss import ATKDLoss, Keywords, Stats
from ._teacher import SparseTeacher

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack


class SparseKeywords(Keywords, total=False):
    """The keywords of `sparse_atkd_loss` beside `return_stats`, for type checkers."""

    target_log_prob: Optional[Tensor]
    tail: str


@overload
def sparse_atkd_loss(
    student_logits: Tensor,
    indices: Tensor,
    log_probs: Tensor,
    labels: Optional[Tensor] = None,
    *,
    return_stats: Literal[False] = False,
    **keywords: "Unpack[SparseKeywords]",
) -> Tensor: ...


@overload
def sparse_atkd_loss(
    student_logits: Tensor,
    indices: Tensor,
    log_probs: Tensor,
    labels: Optional[Tensor] = None,
    *,
    return_stats: Literal[True],
    **keywords: "Unpack[SparseKeywords]",
) -> Tuple[Tensor, Stats]: ...


@overload
def sparse_atkd_loss(
    student_logits: Tensor,
    indices: Tensor,
    log_probs: Tensor,
    labels: Optional[Tensor] = None,
    *,
    return_stats: bool,
    **keywords: "Unpack[SparseKeywords]",
) -> Union[Tensor, Tuple[Tensor, Stats]]: ...


def sparse_atkd_loss(
    student_logits: Tensor,
    indices: Tensor,
    # A SparseTeacher in the place of the indices must reach the error that says what to give.
    log_probs: Tensor = None,  # type: ignore[assignment]
    labels: Optional[Tensor] = None,
    *,
    target_log_prob: Optional[Tensor] = None,
    tail: str = "bucket",
    selection: str = "batch",
    vocab_size: Optional[int] = None,
    token_weights: Optional[Tensor] = None,
    num_items_in_batch: Union[None, int, float, Tensor] = None,
    shift_labels: Union[bool, Tensor] = False,
    cu_seqlens: Optional[Tensor] = None,
    hard: Optional[Tensor] = None,
    inplace: bool = False,
    return_stats: bool = False,
    vocab_group: "Optional[ProcessGroup]" = None,
    token_group: "Optional[ProcessGroup]" = None,
    vocab_start: Optional[int] = None,
    token_counts: Optional[Sequence[int]] = None,
    **settings: Any,
) -> Union[Tensor, Tuple[Tensor, Stats]]:
    """`atkd_loss` with a teacher of which K log-probabilities per position are known, from disk or from a server
    (`from_vllm`, `from_sglang`). On the CPU and, but for tail `"uniform"` and groups, on CUDA devices.

    The student's distribution is over the whole vocabulary, and the gradient is that of all of its logits. Hard tokens are
    those of the largest margin log((1 - p) / p) of the teacher's p(target).

    Log-probabilities are natural logarithms *at the temperature of the call*: a temperature divides the student's logits
    alone. (A server's are mostly at temperature 1.) Rows of ignored tokens are not looked at.

    Args:
        student_logits: `[N, V]` or `[B, T, V]`, float32, float16 or bfloat16.
        indices: `[N, K]` or `[B, T, K]`, int64 or int32, K from 1 to 1024: tokens of the vocabulary, each once in a row, in
            any order. -1 says that a row has fewer; its log-probability is not used.
        log_probs: of the same shape, float32, float16 or bfloat16: those of the indices. -inf is a probability of 0. The
            probabilities of a row, the target's among them, add up to 1 or less: to 1.0001 for float32, 1.01 for float16,
            1.03 for bfloat16, whichever of `log_probs` and `target_log_prob` is the less exact. To as little less than 1
            where they are those of the whole vocabulary, so that nothing is left to have the rest, but for tail `"zero"`.
        labels: as `atkd_loss` takes them, and so are all keywords that are not described here.
        target_log_prob: `[N]` or `[B, T]`, of a floating dtype: that of each position's label, which then
            need not be among the K, and counts instead of that one if it is. Without it the label of each token that is not
            ignored must be among the K. Not used with `target="teacher"`, whose target is the likeliest of the K.
        tail: what the teacher is taken for outside of its K tokens and the target: `"bucket"`, one more class, of what is
            left of the mass, against the student's mass on the same tokens, so that nothing is assumed; `"uniform"`, what is
            left spread evenly over those tokens; `"zero"`, nothing: the known probabilities are renormalised, for the
            margins too, and a row without any is an error. Reverse KL is infinite by `"zero"`, and an error, unless only the
            target's probability counts (`objective="tkd"`); by the others it is where the teacher has nothing
            left, but the student has. By `"sampled"` the K tokens but the label are draws (`SparseTeacher.sample`), and their
            log_probs the logarithms of weights in any unit, such as how often each was drawn, which share what the label
            leaves, whose `target_log_prob` is needed. The gradient by forward KL then has the expectation of the whole teacher's;
            other divergences are an error, unless only the target's probability counts.
        shift_labels: rows of the teacher belong to the same positions as the student's logits, and are not shifted: those at
            position t are about label t + 1, `target_log_prob[t]` is log p(label t + 1), and those at the last position
            are not looked at.
        vocab_size: indices are below it.
        return_stats: the terms of `Stats` are those of the modelled teacher. By `"bucket"` DKD has the tail as one class.
        vocab_group: the student's logits are this rank's columns; the teacher is the same on all ranks of the group, and its
            indices, as the labels, are tokens of the whole vocabulary. Each rank makes the teacher's logits of its columns, as
            large as the student's in float32.

    Raises:
        NotImplementedError: on a CUDA device for tail `"uniform"`, for a group, and for selection within `cu_seqlens`; for a
            DTensor of logits.
        TypeError: for a dtype that is none of these, a setting that requires a gradient.
        ValueError: for shapes or devices that do not go together, a setting outside its domain, a label that names no token
            of the vocabulary; for an index that does not, or is there twice; for probabilities that add up to more than 1, as
            those of logits would; for a target without a log-probability. The message has the token, counted over all
            positions, and the numbers. On a CUDA device values are not waited for: wrong ones make the loss NaN.
    """
    labels, shift_labels = _loss.shifted_already(labels, shift_labels)
    teacher = SparseTeacher(indices, log_probs, target_log_prob, tail)
    # Its module is not imported, for that takes time.
    if any(each is not None for each in (vocab_group, token_group, vocab_start, token_counts)):
        from . import _shards

        if cu_seqlens is not None:
            # There all ranks raise.
            settings["cu_seqlens"] = cu_seqlens
        return _shards.sparse_atkd_loss(
            student_logits,
            teacher,
            labels,
            selection=selection,
            vocab_size=vocab_size,
            token_weights=token_weights,
            num_items_in_batch=num_items_in_batch,
            shift_labels=shift_labels,
            hard=hard,
            inplace=inplace,
            return_stats=return_stats,
            vocab_group=vocab_group,
            token_group=token_group,
            vocab_start=vocab_start,
            token_counts=token_counts,
            settings=settings,
        )
    check_kinds(student_logits, teacher)
    _loss.check_tensor("student_logits", student_logits)
    return _loss.from_teacher(
        "sparse_atkd_loss",
        student_logits,
        _loss.checked_sparse(teacher),
        labels,
        selection,
        vocab_size,
        token_weights,
        num_items_in_batch,
        shift_labels,
        cu_seqlens,
        hard,
        inplace,
        return_stats,
        settings,
    )


def check_kinds(student_logits: Tensor, teacher: SparseTeacher) -> None:
    """Refuses a whole teacher in the place of its indices, and DTensors."""
    if isinstance(teacher.indices, SparseTeacher):
        raise TypeError(
            "indices are a SparseTeacher, of which sparse_atkd_loss takes the parts: give teacher.indices, teacher.log_probs and "
            "the labels, with target_log_prob=teacher.target_log_prob and tail=teacher.tail"
        )
    if _loss.is_dtensor(student_logits):
        raise NotImplementedError(
            "student_logits are a DTensor, which sparse_atkd_loss does not take yet: give student_logits.full_tensor(), or "
            "student_logits.to_local() where this rank has tokens of its own, with hard= and num_items_in_batch= of all ranks"
        )


_shown = _loss.shown_with_settings(sparse_atkd_loss)
sparse_atkd_loss.__signature__ = _shown.replace(  # type: ignore[attr-defined]
    parameters=[
        each.replace(default=each.empty) if each.name == "log_probs" else each
        for each in _shown.parameters.values()
    ]
)


class SparseATKDLoss(_loss.Criterion):
    """`sparse_atkd_loss` with its settings, which are checked here: those of `ATKDLoss` and `tail`.
    Each is an attribute, which a schedule may set.

    Args:
        tail: `"bucket"`, `"uniform"`, `"zero"` or `"sampled"`: what the teacher is taken for outside of its K tokens and the
            target.
    """

    inplace = _loss.setting("inplace")
    vocab_group = _loss.setting("vocab_group")
    token_group = _loss.setting("token_group")
    vocab_start = _loss.setting("vocab_start")
    tail = _loss.setting("tail")

    def __init__(self, *arguments: Any, tail: str = "bucket", **settings: Any) -> None:
        super().__init__()
        settings = ATKDLoss(*arguments, **settings).settings
        settings["tail"] = tail
        self.check(settings)
        self.settings = settings

    def check(self, settings: Dict[str, Any]) -> None:
        super().check(settings)
        tail = settings["tail"]
        if tail not in ("zero", "uniform", "bucket", "sampled"):
            raise ValueError(
                f'tail is {tail!r}, but must be "zero", "uniform", "bucket" or "sampled"'
            )

    def forward(
        self,
        student_logits: Tensor,
        indices: Tensor,
        log_probs: Optional[Tensor] = None,
        labels: Optional[Tensor] = None,
        target_log_prob: Optional[Tensor] = None,
        num_items_in_batch: Union[None, int, float, Tensor] = None,
        temperature: Union[None, float, Tensor] = None,
        shift_labels: Union[None, bool, Tensor] = None,
        **keywords: Any,
    ) -> Any:
        """The loss of `sparse_atkd_loss`, which says more, and what raises; with `return_stats` `(loss, Stats)`.

        Args:
            student_logits: `[N, V]` or `[B, T, V]`.
            indices: `[N, K]` or `[B, T, K]`, int64 or int32.
            log_probs: of the same shape.
            labels: `[N]` or `[B, T]`.
            target_log_prob: shaped as the labels: log p(label) of each position.
            num_items_in_batch: a positive number, or a tensor that holds one: the sum is divided by it.
            temperature: a number, or float32, shaped as the labels: in the place of the setting.
            shift_labels: labels that are shifted already, as `ATKDLoss.forward` takes them; or a bool, in the place of the
                setting.
            keywords: `hard`, `token_weights`, `cu_seqlens`; or settings.
        """
        settings = self.given(temperature=temperature, shift_labels=shift_labels)
        return sparse_atkd_loss(
            student_logits,
            indices,
            log_probs,  # type: ignore[arg-type]
            labels,
            target_log_prob=target_log_prob,
            num_items_in_batch=num_items_in_batch,
            **{**settings, **keywords},
        )
