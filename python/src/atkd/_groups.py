"""Groups of ranks: what a call gathers from them, and the header by which all of them raise where one does.

A rank is one process of a `torch.distributed` group. The ranks of a *vocabulary group* hold columns of the same tokens'
logits, those of a *token group* hold tokens of their own. Each call of theirs begins with an all-gather of a header over
the vocabulary group, and then one over the token group. A rank that has raised until then says so there; a rank that does
not fit the others is found by all who read its header. (Where that is by its settings, all who read it send theirs as text,
to name the first that differs.) What was found is a `Verdict`, which the second header carries to the ranks that have not
seen the first one. So everybody raises, and nobody waits for a message that never comes.
"""

import hashlib
from typing import Any, Callable, Dict, List, NamedTuple, NoReturn, Optional, Tuple, Type, Union

import torch
import torch.distributed as dist
from torch import Tensor

from ._checks import DTYPES

_DTYPES = [None, *DTYPES]

# The optional arguments of which the ranks must agree whether they are given, as bits of a header's `given`. Each has a field
# of the header by its name, for a digest of its values.
ARGUMENTS = (
    "labels",
    "hard",
    "token_weights",
    "temperature",
    "teacher_log_prob",
    "indices",
    "log_probs",
    "target_log_prob",
)


class Ranks:
    """The ranks of a group, or this process alone, which is a group of one that sends nothing."""

    def __init__(self, name: str, group: Optional[Any]) -> None:
        self.name, self.group = name, group
        self.rank, self.size = 0, 1
        if group is None:
            return
        if not isinstance(group, dist.ProcessGroup):
            what = group if isinstance(group, int) else f"a {type(group).__name__}"
            raise TypeError(
                f"{name} is {what}, but must be a torch.distributed.ProcessGroup{_instead_of(group)}"
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


def _instead_of(group: object) -> str:
    """What to give in the place of what is no group, where that is known."""
    if isinstance(group, int) and group == getattr(dist.GroupMember, "NON_GROUP_MEMBER", None):
        return ". (new_group returns it on ranks that are no members: give each rank the group that it is in)"
    if type(group).__name__ == "DeviceMesh":
        return ": give mesh.get_group(), with a dimension if there are several"
    if isinstance(group, str):
        return f": give the group itself, or mesh.get_group({group!r}) of a device mesh"
    return ""


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
    largest_index: int = 0
    """Of a sparse teacher, likewise."""
    most_short: int = 0
    """Of its rows whose probabilities add up to too little for a whole vocabulary, the most tokens that one knows."""
    labels: Union[int, Tensor] = 0
    """A digest of their values among vocabulary ranks, as a tensor where they are until it is sent; so are the others."""
    hard: Union[int, Tensor] = 0
    token_weights: Union[int, Tensor] = 0
    temperature: Union[int, Tensor] = 0
    teacher_log_prob: Union[int, Tensor] = 0
    indices: Union[int, Tensor] = 0
    log_probs: Union[int, Tensor] = 0
    target_log_prob: Union[int, Tensor] = 0

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
    error: Type[Exception] = ValueError


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
    "settings": _Rule("rank {rank} has other settings than rank {first}: {text}"),
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
    "no_columns": _Rule("the logits of the ranks of the vocab_group have no columns in all"),
    "vocab": _Rule(
        "rank {rank} has a vocabulary of {number} tokens, but rank {first} of {other}"
    ),
    "label": _Rule(
        "rank {rank} has the label {number}, but labels must be from 0 to {other}, or the ignore_index"
    ),
    "index": _Rule(
        "rank {rank} has the index {number} in its sparse teacher, but indices must be from 0 to {other}, or -1 for none"
    ),
    "mass": _Rule(
        "rank {rank} has a row in its sparse teacher that knows all {number} tokens of the vocabulary, but whose probabilities "
        'add up to less than 1, and no token is left to have the rest: normalise it, or take tail="zero"'
    ),
    **{
        name: _Rule(
            f"rank {{rank}} has other values of {name} than rank {{first}}: they must be the same on all ranks of a "
            "vocab_group"
        )
        for name in ARGUMENTS
    },
    "labels": _Rule(
        "rank {rank} has other labels than rank {first}: labels must be tokens of the whole vocabulary, the same on all "
        "ranks of a vocab_group"
    ),
}
_KINDS = list(_RULES)
_SETTINGS = _KINDS.index("settings")

# Of the settings as text, where they differ.
_TEXT_BYTES = 4096


def _judge(kind: str, rank: int, number: int, other: int, first: int = 0) -> Verdict:
    return Verdict(_KINDS.index(kind), rank, number, first, other)


def _tell(verdict: Verdict, text: str) -> NoReturn:
    rule = _RULES[_KINDS[verdict.kind]]
    raise rule.error(
        rule.message.format(
            rank=verdict.rank,
            number=rule.shown(verdict.number),
            first=verdict.first,
            other=rule.shown(verdict.other),
            text=text,
        )
    )


def shown(settings: Dict[str, Any]) -> str:
    """The settings by name, one a line, the same in every process."""
    return "\n".join(f"{name} is {value!r}" for name, value in settings.items())


def hash_of(text: str) -> int:
    """63 bits that differ where texts do, the same in every process."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def digest_of(values: Tensor) -> Tensor:
    """An int64 scalar that differs where values do, the same on every device, and wherever they lie in memory."""
    if values.is_floating_point():
        # The sum is 0.0 for -0.0, which is the same value.
        values = (values.float() + 0.0).contiguous().view(torch.int32)
    flat = values.reshape(-1).to(torch.int64)
    # Factors without a pattern, so that small differences do not make up for each other; odd, so that none is lost. Products
    # and sums wrap around.
    factors = torch.arange(1, flat.numel() + 1, device=flat.device)
    for mixing in (0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9, 0x14D049BB133111EB):
        factors = factors * mixing
        factors = factors ^ (factors >> 29)
    factors = factors | 1
    return (flat * factors).sum()


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
    if sum(student) == sum(teacher) == 0:
        return _judge("no_columns", 0, 0, 0)
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
        if header.largest_index >= vocab:
            return _judge("index", header.rank, header.largest_index, vocab - 1)
        if header.most_short == vocab:
            return _judge("mass", header.rank, vocab, vocab)
    return Verdict()


_SHARED = "student_dtype", "teacher_dtype", "settings", "given"


def meet(
    vocabulary: Ranks,
    tokens: Ranks,
    own: Optional[Header],
    device: Optional[torch.device],
    settings: str = "",
) -> Part:
    """What this rank has of the whole, from the headers of all ranks; or the error that all of them raise. `own` is
    None on a rank that has raised an error, which it shows itself. The device is that of the tensors, if they are known.
    The settings are those that the header has a hash of.
    """
    text = ""
    rank = dist.get_rank()
    header = own or Header(*_judge("raised", rank, 0, 0), rank=rank)
    columns = [header.student_columns]
    widest, vocab = header.student_columns, header.vocab or header.student_columns
    found: Verdict
    # A group of one is checked likewise: its columns must fit.
    headers = _exchange(vocabulary, header, device)
    found = _failed(headers)
    if not found.kind:
        found = _differs(headers, "tokens", *_SHARED, "length")
    if not found.kind:
        found = _of_columns(headers)
    if not found.kind:
        columns = [each.student_columns for each in headers]
        vocab = headers[0].vocab or sum(columns)
        widest = max(columns)
        found = _of_labels(headers, vocab)
    if not found.kind and vocabulary.group is not None:
        found = _differs(headers, *ARGUMENTS)
    if found.kind == _SETTINGS:
        text = _difference(headers, found, _exchange_texts(vocabulary, settings, device))
    of_tokens = dict.fromkeys(ARGUMENTS, 0)
    header = header._replace(vocab=vocab, **of_tokens, **dict(zip(Header._fields, found)))
    headers = _exchange(tokens, header, device)
    second = _failed(headers)
    if not second.kind:
        second = _differs(headers, *_SHARED, "vocab")
    # By the headers alone, so that all ranks of the group do.
    if _SETTINGS in (second.kind, *[each.kind for each in headers]):
        texts = _exchange_texts(tokens, text or settings, device)
        if not found.kind:
            if any(each.kind for each in headers):
                text = next(said for said, each in zip(texts, headers) if each.kind)
            else:
                text = _difference(headers, second, texts)
    if not found.kind:
        found = second
    if found.kind and own is not None:
        _tell(found, text)
    first, counting = counting_columns(columns, vocab)[vocabulary.rank if len(columns) > 1 else 0]
    return Part(first, counting, vocab, widest, [each.tokens for each in headers])


def _difference(headers: List[Header], verdict: Verdict, texts: List[str]) -> str:
    """The first setting that differs on the two ranks of the verdict."""
    by_rank = {header.rank: text.split("\n") for header, text in zip(headers, texts)}
    for one, other in zip(by_rank[verdict.rank], by_rank[verdict.first]):
        if one != other:
            # A name and a value; only the first ones may have other names.
            return f"{one}, but there {other.partition(' is ')[2]}"
    return "their lengths differ"


def _exchange_texts(ranks: Ranks, text: str, device: Optional[torch.device]) -> List[str]:
    """The texts of all ranks, as far as there is room for them."""
    data = text.encode()[:_TEXT_BYTES]
    message = torch.zeros(_TEXT_BYTES, dtype=torch.uint8)
    message[: len(data)] = torch.tensor(list(data), dtype=torch.uint8)
    everyone = ranks.gather(message.to(_place(ranks, device))).tolist()
    return [bytes(each).rstrip(b"\0").decode(errors="replace") for each in everyone]


def _exchange(ranks: Ranks, header: Header, device: Optional[torch.device]) -> List[Header]:
    """The headers of all ranks. The host waits for them."""
    if ranks.group is None:
        return [header]
    own = torch.tensor([0 if isinstance(each, Tensor) else each for each in header])
    own = own.to(_place(ranks, device))
    for at, each in enumerate(header):
        if isinstance(each, Tensor):
            own[at] = each
    return [Header(*each) for each in ranks.gather(own).tolist()]


def _place(ranks: Ranks, device: Optional[torch.device]) -> torch.device:
    """Where a message to the ranks is, whose tensors are on the device, if they are known."""
    # The same on all ranks, also on one whose tensors are elsewhere; a group with a backend for each kind has one for the CPU.
    where = torch.device("cpu")
    if ranks.device == "cuda":
        here = torch.device("cuda", torch.cuda.current_device())
        where = here if device is None or device.type != "cuda" else device
    return where


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
