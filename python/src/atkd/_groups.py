"""Groups of ranks: what a call gathers from them, and the header by which all of them raise where one does.

A rank is one process of a `torch.distributed` group. The ranks of a *vocabulary group* hold columns of the same tokens'
logits, those of a *token group* hold tokens of their own. Each call of theirs begins with an all-gather of a header over
the vocabulary group, and then one over the token group. A rank that has raised until then says so there; a rank that does
not fit the others is found by all who read its header. What was found is a `Verdict`, which the second header carries to
the ranks that have not seen the first one. So everybody raises, and nobody waits for a message that never comes.
"""

import hashlib
import operator
from typing import Any, Callable, Dict, List, NamedTuple, NoReturn, Optional, Tuple

import torch
import torch.distributed as dist
from torch import Tensor

from ._checks import DTYPES

_DTYPES = [None, *DTYPES]

# The optional arguments of which the ranks must agree whether they are given, as bits of a header's `given`.
ARGUMENTS = "labels", "hard", "token_weights", "temperature", "teacher_log_prob"


class Ranks:
    """The ranks of a group, or this process alone, which is a group of one that sends nothing."""

    def __init__(self, name: str, group: Optional[Any]) -> None:
        self.name, self.group = name, group
        self.rank, self.size = 0, 1
        if group is None:
            return
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"{name} is a {type(group).__name__}, but must be a torch.distributed.ProcessGroup"
            )
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError(f"rank {dist.get_rank()} has been given a {name} that it is no member of")

    @property
    def device(self) -> Optional[str]:
        """The type of the devices whose tensors the group's backend takes, if that is one alone."""
        if self.group is None:
            return None
        return {"nccl": "cuda", "gloo": "cpu"}.get(dist.get_backend(self.group))

    def check_device(self, name: str, tensor: Tensor) -> None:
        if self.device not in (None, tensor.device.type):
            backend = dist.get_backend(self.group)
            raise ValueError(
                f"{name} are on {tensor.device}, but the backend of {self.name} is {backend}, which takes tensors on "
                f"{self.device}"
            )

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks, which have one shape, in their order: `[ranks, *shape]`."""
        if self.group is None:
            return tensor.unsqueeze(0)
        tensor = tensor.contiguous()
        everyone = tensor.new_empty((self.size, *tensor.shape))
        dist.all_gather_into_tensor(everyone.view(-1), tensor.view(-1), group=self.group)
        return everyone

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of the tensors of all ranks, over the memory of this one."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor


class Verdict(NamedTuple):
    """What was found of a call before its first message, in numbers."""

    kind: int = 0
    """The index of a rule in `_RULES`, and 0 if nothing is wrong."""
    rank: int = 0
    number: int = 0
    first: int = 0
    """The rank that the other is compared with, if any."""
    other: int = 0


class Header(NamedTuple):
    """What a rank says of its part of a call: int64, of the same length for every call."""

    kind: int = 0
    found_rank: int = 0
    number: int = 0
    first: int = 0
    other: int = 0
    rank: int = 0
    """Its rank among all processes, by which messages name it."""
    tokens: int = 0
    length: int = 0
    """That of the sequences within which hard tokens are selected, or 0."""
    student_columns: int = 0
    teacher_columns: int = 0
    student_dtype: int = 0
    teacher_dtype: int = 0
    settings: int = 0
    """A hash of all settings and flags."""
    given: int = 0
    """Which optional arguments are given, a bit for each of `ARGUMENTS`."""
    vocab_start: int = -1
    """What the caller says, or -1."""
    vocab: int = 0
    """The `vocab_size` among vocabulary ranks, or 0; the whole vocabulary among token ranks."""
    least_label: int = 0
    """Of the tokens that count, on the CPU."""
    largest_label: int = 0

    @property
    def verdict(self) -> Verdict:
        return Verdict(*self[:5])


HEADER_BYTES = 8 * len(Header._fields)


def _dtype_name(code: int) -> str:
    return str(_DTYPES[code]) if 0 < code < len(_DTYPES) else "no float"


def _names(bits: int) -> str:
    given = [name for i, name in enumerate(ARGUMENTS) if bits >> i & 1]
    return ", ".join(given) or "none"


class _Rule(NamedTuple):
    """How a kind of verdict is told."""

    message: str
    shown: Callable[[int], Any] = int
    error: type = ValueError


# The first is no rule: a kind of 0 says that nothing is wrong.
_RULES: Dict[str, _Rule] = {
    "": _Rule(""),
    "raised": _Rule(
        "rank {rank} has raised an error in this call, which it shows itself; all ranks of its groups give the call up",
        error=RuntimeError,
    ),
    "tokens": _Rule(
        "rank {rank} has {number} tokens, but rank {first} has {other}: the ranks of a vocab_group share their tokens"
    ),
    "length": _Rule(
        "rank {rank} has sequences of {number} tokens, but rank {first} of {other}: the ranks of a vocab_group share their tokens"
    ),
    "student_dtype": _Rule(
        "rank {rank} has a student of {number}, but rank {first} of {other}", _dtype_name, TypeError
    ),
    "teacher_dtype": _Rule(
        "rank {rank} has a teacher of {number}, but rank {first} of {other}", _dtype_name, TypeError
    ),
    "settings": _Rule(
        "rank {rank} has other settings than rank {first}: objectives, numbers, selection, vocab_size, return_stats, "
        "num_items_in_batch and whether a gradient is wanted must be the same, but their hashes are {number} and {other}",
        "{:016x}".format,
    ),
    "given": _Rule(
        "of the optional arguments rank {rank} was given {number}, but rank {first} was given {other}",
        _names,
    ),
    "start": _Rule(
        "on rank {rank} the student's columns start at {number}, but the teacher's at {other}: they must start together on "
        "every rank, but for columns from vocab_size on"
    ),
    "columns": _Rule(
        "the ranks have {number} columns of the student in all, but {other} of the teacher; if the tokens that both have "
        "come first, give their number as vocab_size"
    ),
    "vocab_size": _Rule(
        "vocab_size is {number}, but must be from 1 to {other}, the columns that the ranks have in all of one model"
    ),
    "vocab_start": _Rule(
        "rank {rank} was given vocab_start {number}, but the ranks before it have {other} columns"
    ),
    "vocab": _Rule(
        "rank {rank} has a vocabulary of {number} tokens, but rank {first} of {other}"
    ),
    "label": _Rule(
        "rank {rank} has the label {number}, but labels must be from 0 to {other}, or the ignore_index"
    ),
}
_KINDS = list(_RULES)


def _judge(kind: str, rank: int, number: int, other: int, first: int = 0) -> Verdict:
    return Verdict(_KINDS.index(kind), rank, number, first, other)


def _tell(verdict: Verdict) -> NoReturn:
    rule = _RULES[_KINDS[verdict.kind]]
    raise rule.error(
        rule.message.format(
            rank=verdict.rank,
            number=rule.shown(verdict.number),
            first=verdict.first,
            other=rule.shown(verdict.other),
        )
    )


def hash_of(*settings: Any) -> int:
    """63 bits that differ where settings do, the same in every process."""
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def integer(name: str, number: object) -> int:
    """The number, which counts columns or tokens, or an error that names it."""
    try:
        found = operator.index(number)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} is {number!r}, but must be an integer") from None
    if not 0 <= found < 1 << 31:
        raise ValueError(f"{name} is {found}, but must be from 0 to {(1 << 31) - 1}")
    return found


def check_apart(vocabulary: Ranks, tokens: Ranks) -> None:
    """Raises for two groups that have more in common than this rank."""
    if vocabulary.group is None or tokens.group is None:
        return
    both = [set(dist.get_process_group_ranks(each.group)) for each in (vocabulary, tokens)]
    shared = sorted(both[0] & both[1])
    if len(shared) != 1:
        raise ValueError(
            f"the ranks {shared} are both in the vocab_group and in the token_group of rank {dist.get_rank()}, but no other rank "
            "can have other columns of the same tokens and tokens of its own"
        )


class Part(NamedTuple):
    """What this rank has of the whole."""

    first_column: int
    columns: int
    """The columns that count."""
    vocab: int
    """Those of all ranks."""
    widest: int
    """The most columns that one rank has."""
    token_counts: List[int]
    """The tokens of each rank of the token group."""


def counting_columns(columns: List[int], vocab: int) -> List[Tuple[int, int]]:
    """The first column of each rank, and how many of its columns count."""
    parts = []
    start = 0
    for each in columns:
        first = min(start, vocab)
        parts.append((first, min(start + each, vocab) - first))
        start = start + each
    return parts


def _differs(headers: List[Header], *fields: str) -> Verdict:
    first = headers[0]
    for field in fields:
        for header in headers:
            number, other = getattr(header, field), getattr(first, field)
            if number != other:
                return _judge(field, header.rank, number, other, first.rank)
    return Verdict()


def _failed(headers: List[Header]) -> Verdict:
    """What a rank says that it has found or raised."""
    return next((header.verdict for header in headers if header.kind), Verdict())


def _of_columns(headers: List[Header]) -> Verdict:
    student = [header.student_columns for header in headers]
    teacher = [header.teacher_columns for header in headers]
    vocab_size = headers[0].vocab
    columns = min(sum(student), sum(teacher))
    if vocab_size == 0 and sum(student) != sum(teacher):
        return _judge("columns", 0, sum(student), sum(teacher))
    if vocab_size > columns:
        return _judge("vocab_size", 0, vocab_size, columns)
    vocab = vocab_size or columns
    starts = (counting_columns(each, vocab) for each in (student, teacher))
    for header, (of_student, _), (of_teacher, _) in zip(headers, *starts):
        if of_student != of_teacher:
            return _judge("start", header.rank, of_student, of_teacher)
    before = 0
    for header in headers:
        if header.vocab_start not in (-1, before):
            return _judge("vocab_start", header.rank, header.vocab_start, before)
        before += header.student_columns
    return Verdict()


def _of_labels(headers: List[Header], vocab: int) -> Verdict:
    for header in headers:
        for label in (header.least_label, header.largest_label):
            if not 0 <= label < vocab:
                return _judge("label", header.rank, label, vocab - 1)
    return Verdict()


_SHARED = "student_dtype", "teacher_dtype", "settings", "given"


def meet(
    vocabulary: Ranks, tokens: Ranks, own: Optional[Header], device: Optional[torch.device]
) -> Part:
    """What this rank has of the whole, from the headers of all ranks; or the error that all of them raise. `own` is
    None on a rank that has raised an error, which it shows itself. The device is that of the tensors, if they are known.
    """
    rank = dist.get_rank()
    header = own or Header(*_judge("raised", rank, 0, 0), rank=rank)
    columns = [header.student_columns]
    widest, vocab = header.student_columns, header.vocab or header.student_columns
    found: Verdict
    # A group of one is checked likewise: its columns must fit.
    headers = _exchange(vocabulary, header, device)
    found = _failed(headers)
    if not found.kind:
        found = _differs(headers, "tokens", "length", *_SHARED)
    if not found.kind:
        found = _of_columns(headers)
    if not found.kind:
        columns = [each.student_columns for each in headers]
        vocab = headers[0].vocab or sum(columns)
        widest = max(columns)
        found = _of_labels(headers, vocab)
    header = header._replace(vocab=vocab)._replace(**dict(zip(Header._fields, found)))
    headers = _exchange(tokens, header, device)
    if not found.kind:
        found = _failed(headers)
    if not found.kind:
        found = _differs(headers, *_SHARED, "vocab")
    if found.kind and own is not None:
        _tell(found)
    first, counting = counting_columns(columns, vocab)[vocabulary.rank if len(columns) > 1 else 0]
    return Part(first, counting, vocab, widest, [each.tokens for each in headers])


def _exchange(ranks: Ranks, header: Header, device: Optional[torch.device]) -> List[Header]:
    """The headers of all ranks. The host waits for them."""
    if ranks.group is None:
        return [header]
    # The same on all ranks, also on one whose tensors are elsewhere; a group with a backend for each kind has one for the CPU.
    where = torch.device("cpu")
    if ranks.device == "cuda":
        here = torch.device("cuda", torch.cuda.current_device())
        where = here if device is None or device.type != "cuda" else device
    own = torch.tensor(header, dtype=torch.int64).to(where)
    return [Header(*each) for each in ranks.gather(own).tolist()]


def selection_of(
    tokens: Ranks, counts: List[int], margins: Tensor, valid: Tensor
) -> Tuple[Tensor, Tensor, slice]:
    """The margins of all ranks' tokens, which of them count, and where this rank's are among them. A rank's are padded to
    the largest count by tokens that do not count: 5 bytes for each.
    """
    most, count = max(counts), margins.numel()
    message = torch.zeros(5 * most, dtype=torch.uint8, device=margins.device)
    message[: 4 * count] = margins.reshape(-1).view(torch.uint8)
    message[4 * most : 4 * most + count] = valid.reshape(-1)
    everyone = tokens.gather(message)
    # Of one dimension, whose elements follow each other also where there is one rank, or none has tokens.
    all_margins = everyone[:, : 4 * most].reshape(-1).view(torch.float32)
    all_valid = everyone[:, 4 * most :].reshape(-1).view(torch.bool)
    start = tokens.rank * most
    return all_margins, all_valid, slice(start, start + count)
