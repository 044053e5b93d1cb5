"""Sparse teachers on disk: what a run of the teacher leaves for students."""

import importlib
import os
from operator import index
from types import TracebackType
from typing import Any, Callable, NamedTuple, Optional, Tuple, Type, Union

import torch
from torch import Tensor
from torch.utils.data import Dataset

from . import _atkd
from ._checks import DTYPES
from ._teacher import MASS_TOLERANCES

_Path = Union[str, "os.PathLike[str]"]

# Logits whose softmaxes are computed at a time, in float64.
_CHUNK = 2**22


class TeacherRows(NamedTuple):
    """What a cache says of n tokens, or of one, whose tensors then have no first dimension."""

    indices: Tensor
    """int32 [n, K], the most probable first; -1 for entries that are not there, which come last."""
    log_probs: Tensor
    """float32 [n, K], at the cache's temperature; -inf where the index is -1."""
    target_log_prob: Tensor
    """float32 [n]: log p(label), be the label among the K or not; -inf for tokens to be ignored."""
    tail_mass: Tensor
    """float32 [n]: the probability of all tokens that are neither among the K nor the label."""
    labels: Tensor
    """int64 [n], below 0 for tokens to be ignored: training should find its own labels here."""


class TeacherCache(Dataset[TeacherRows]):
    """A folder that :class:`TeacherCacheWriter` or `atkd teacher pack` has written, mapped into memory.

        cache = atkd.TeacherCache("cache")
        rows = cache[1000:3048]

    `len(cache)` are its tokens. `cache[i]` and `cache[a:b]` are :class:`TeacherRows`. It is a dataset for a
    `DataLoader` with any number of workers: it is pickled as its path. A cache whose writer has not finished
    can be read, and says `complete == False`.
    """

    def __init__(self, path: _Path) -> None:
        self.path = os.path.abspath(os.fspath(path))
        self._native = _atkd.TeacherCache(self.path)
        facts = self._native.facts
        self.vocab_size, self.top_k, self.temperature, self.encoding, self.fingerprint = facts

    @property
    def complete(self) -> bool:
        """False if the writer has not finished, or the last files are lost."""
        return self._native.complete

    @property
    def bytes_per_token(self) -> int:
        """What a token takes on disk."""
        return self._native.bytes_per_token

    @property
    def largest_error(self) -> float:
        """The most, in nats, by which an entry of `log_probs` differs from what was written."""
        return self._native.largest_error

    def mean_tail_mass(self) -> float:
        """The mean of all tokens' `tail_mass`, which are read for it."""
        return self._native.mean_tail_mass()

    def __len__(self) -> int:
        return self._native.tokens

    def __getitem__(self, item: Union[int, slice]) -> TeacherRows:
        if isinstance(item, slice):
            start, stop, step = item.indices(len(self))
            if step != 1:
                raise ValueError(f"the slice has step {step}, but must have 1: index the rows read")
            return self._read(start, max(start, stop))
        at = index(item)
        token = at + len(self) if at < 0 else at
        if not 0 <= token < len(self):
            raise IndexError(f"token {at} was asked for, but the cache has {len(self)}")
        return TeacherRows(*(column[0] for column in self._read(token, token + 1)))

    def _read(self, start: int, stop: int) -> TeacherRows:
        tokens = stop - start
        indices = torch.empty((tokens, self.top_k), dtype=torch.int32)
        log_probs = torch.empty((tokens, self.top_k), dtype=torch.float32)
        target_log_prob, tail_mass = torch.empty((2, tokens), dtype=torch.float32)
        labels = torch.empty(tokens, dtype=torch.int32)
        columns = (indices, log_probs, target_log_prob, tail_mass, labels)
        self._native.read(start, stop, [column.data_ptr() for column in columns])
        return TeacherRows(indices, log_probs, target_log_prob, tail_mass, labels.long())

    def __reduce__(self) -> Tuple[Type["TeacherCache"], Tuple[str]]:
        return TeacherCache, (self.path,)

    def __repr__(self) -> str:
        return (
            f"TeacherCache({self.path!r}: {len(self)} tokens{'' if self.complete else ', not complete'}, "
            f"vocab_size={self.vocab_size}, top_k={self.top_k}, temperature={self.temperature}, "
            f"encoding={self.encoding!r}, fingerprint={self.fingerprint!r})"
        )


class TeacherCacheWriter:
    """Writes a cache, or goes on with the one at `path`, whose settings must be the same.

        with atkd.TeacherCacheWriter("cache", vocab_size=151936, progress=total) as writer:
            for input_ids, labels in batches_from(writer.tokens):
                with torch.no_grad():
                    writer.write(teacher(input_ids).logits, labels)

    `tokens` are those that are there already, ignored ones included: a run that was killed goes on with the
    next. `top_k`, at most 1024, is how many entries a token keeps. `temperature` divides the logits; training
    must be at the same. The encoding `"f16"` keeps log-probabilities to 1/2048 of their size, `"u8"` takes
    half of that space and keeps them to 1/510 of the row's range. `fingerprint` is any text that tells the
    tokenizer apart from others. Files have `shard_tokens`, by default 256 MB of them, which is what a killed
    process loses at most; an exception in the `with` block loses nothing, and its end without one says that
    the cache is complete. With `progress`, the number of tokens in all, a bar is shown if tqdm is installed.
    """

    def __init__(
        self,
        path: _Path,
        *,
        vocab_size: int,
        top_k: int = 64,
        temperature: float = 1.0,
        encoding: str = "f16",
        fingerprint: str = "",
        shard_tokens: Optional[int] = None,
        progress: Optional[int] = None,
    ) -> None:
        self.path = os.path.abspath(os.fspath(path))
        self.vocab_size, self.top_k, self.temperature = vocab_size, top_k, float(temperature)
        self._native = _atkd.TeacherCacheWriter(
            self.path, vocab_size, top_k, self.temperature, encoding, fingerprint, shard_tokens
        )
        self._closed = False
        self._bar = None if progress is None else _bar(progress, self.tokens)

    @property
    def tokens(self) -> int:
        """The tokens that are there: the number of the next."""
        return self._native.tokens()

    @property
    def complete(self) -> bool:
        """True if an earlier run has finished the cache, which then takes no more."""
        return self._native.complete()

    @torch.no_grad()
    def write(self, logits: Tensor, labels: Tensor) -> None:
        """Appends tokens: the teacher's logits [N, V] or [B, T, V] for the labels [N] or [B, T], which are
        below 0 for tokens to be ignored. Columns beyond `vocab_size` are padding. Softmaxes are in float64,
        on the device of the logits. After an error `tokens` tells which rows are there.
        """
        if not isinstance(logits, Tensor):
            raise TypeError(f"logits are a {type(logits).__name__}, but must be a torch.Tensor")
        if not logits.is_floating_point() or logits.dim() < 2 or logits.shape[-1] < self.vocab_size:
            raise ValueError(
                f"logits are {logits.dtype} {list(logits.shape)}, but must be of a floating point dtype and "
                f"[N, V] or [B, T, V], with V = {self.vocab_size} or more"
            )
        _check_labels(labels, list(logits.shape[:-1]))
        flat = logits[..., : self.vocab_size].reshape(-1, self.vocab_size)
        of_rows = labels.reshape(-1).to(flat.device, torch.int64)
        tokens = max(1, _CHUNK // self.vocab_size)
        for start in range(0, len(flat), tokens):
            chunk = slice(start, start + tokens)
            rows = _top(flat[chunk], of_rows[chunk], self.top_k, self.temperature)
            self._push(*rows, of_rows[chunk])

    def write_rows(
        self,
        indices: Tensor,
        log_probs: Tensor,
        target_log_prob: Optional[Tensor],
        labels: Tensor,
        tail_mass: Optional[Tensor] = None,
    ) -> None:
        """Appends tokens of which somebody else, such as an inference server, has told the most probable: up
        to K `indices` and `log_probs` [N, K] or [B, T, K] in any order, -1 for none; the labels'
        log-probabilities, be they among those or not, and the labels, [N] or [B, T]. `target_log_prob` may be
        None if each label that is not below 0 is among its token's indices. `tail_mass` is what the others
        leave of 1 unless it is given. All but the integers are float32, float64, float16 or bfloat16; what
        rounding to half precision has moved a row's probabilities from 1, up to 1% and 3%, is divided out.
        Where the indices and the label are the whole vocabulary, nothing is left for the others: what
        float32 has moved, up to 0.01%, is divided out too, and a mass that is farther from 1 raises.
        """
        if not isinstance(indices, Tensor):
            raise TypeError(
                f"indices are a {type(indices).__name__}, but must be a torch.Tensor of int32 or int64"
            )
        given = indices.shape[-1] if indices.dim() else 0
        if indices.dim() < 2 or not 1 <= given <= self.top_k:
            raise ValueError(
                f"indices are {list(indices.shape)}, but must be [N, K] or [B, T, K], with K from 1 to {self.top_k}"
            )
        if indices.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"indices are {indices.dtype}, but must be int32 or int64")
        shape = list(indices.shape[:-1])
        rounding = torch.float32
        for name, column, expected in [
            ("log_probs", log_probs, list(indices.shape)),
            ("target_log_prob", target_log_prob, shape),
            ("tail_mass", tail_mass, shape),
        ]:
            if column is None and name != "log_probs":
                continue
            if not isinstance(column, Tensor) or column.dtype not in MASS_TOLERANCES:
                kind = column.dtype if isinstance(column, Tensor) else type(column).__name__
                raise TypeError(
                    f"{name} is {kind}, but must be a tensor of float32, float64, float16 or bfloat16"
                )
            if list(column.shape) != expected:
                raise ValueError(f"{name} is {list(column.shape)}, but must be {expected}")
            if MASS_TOLERANCES[column.dtype] > MASS_TOLERANCES[rounding]:
                rounding = column.dtype
        _check_labels(labels, shape)
        # What int32 cannot hold is outside of every vocabulary.
        narrow = indices.detach().clamp(-2, 2**31 - 1).to(torch.int32).reshape(-1, given)
        flat, of_rows = log_probs.detach().reshape(-1, given), labels.reshape(-1).to(indices.device)
        if target_log_prob is None:
            target = self._among(narrow, flat, of_rows)
        else:
            target = target_log_prob.detach().reshape(-1)
        tail = None if tail_mass is None else tail_mass.detach().reshape(-1)
        self._push(narrow, flat, target, tail, of_rows, rounding)

    def _among(self, indices: Tensor, log_probs: Tensor, labels: Tensor) -> Tensor:
        """The labels' log-probabilities from the entries `[n, K]`; -inf for tokens to be ignored."""
        own = (indices == labels.unsqueeze(-1)) & (labels >= 0).unsqueeze(-1)
        missing = (~own.any(-1) & (labels >= 0)).nonzero()
        if len(missing):
            at = int(missing[0])
            raise ValueError(
                f"target_log_prob is None, but the label of token {self.tokens + at}, {int(labels[at])}, is not among its "
                f"{indices.shape[-1]} indices: give the labels' log-probabilities"
            )
        return log_probs.masked_fill(~own, -torch.inf).amax(-1)

    def _push(
        self,
        indices: Tensor,
        log_probs: Tensor,
        target_log_prob: Tensor,
        tail_mass: Optional[Tensor],
        labels: Tensor,
        rounding: torch.dtype = torch.float32,
    ) -> None:
        """Of tensors of any dtype. `rounding` is what the values were rounded to."""
        padding = (0, self.top_k - indices.shape[-1])
        if padding[1]:
            indices = torch.nn.functional.pad(indices, padding, value=-1)
            log_probs = torch.nn.functional.pad(log_probs, padding)
        # They are held until the call is over.
        columns = [
            None if column is None else column.to("cpu", dtype).contiguous()
            for column, dtype in (
                (indices, torch.int32),
                (log_probs, torch.float32),
                (target_log_prob, torch.float32),
                (tail_mass, torch.float32),
                (labels, torch.int64),
            )
        ]
        addresses: Any = [None if column is None else column.data_ptr() for column in columns]
        self._native.push(len(labels), self.top_k, DTYPES[rounding], *addresses)
        if self._bar is not None:
            self._bar.update(len(labels))

    def flush(self) -> None:
        """Makes a file of the tokens since the last one, so that they stay, whatever happens."""
        self._native.flush()

    def finish(self) -> None:
        """Says that there are no more tokens: the cache is complete, and the writer closed."""
        self._native.finish()
        self._close()

    def _close(self) -> None:
        self._closed = True
        self._native.close()
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> "TeacherCacheWriter":
        return self

    def __exit__(
        self,
        error: Optional[Type[BaseException]],
        value: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        if self._closed:
            return
        if error is None:
            self.finish()
            return
        try:
            self.flush()
        finally:
            self._close()


def _check_labels(labels: Any, shape: Any) -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(
            f"labels are a {type(labels).__name__}, but must be a torch.Tensor of int64 or int32, with a number "
            "below 0 for tokens to be ignored"
        )
    if labels.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"labels are {labels.dtype}, but must be int64 or int32")
    if list(labels.shape) != shape:
        raise ValueError(f"labels are {list(labels.shape)}, but must be {shape}")


def _top(
    logits: Tensor, labels: Tensor, top_k: int, temperature: float
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of logits [n, V] the k likeliest tokens, their log-probabilities, the labels', and the mass of the
    others."""
    # MPS has no float64.
    scaled = logits.to(torch.float32 if logits.device.type == "mps" else torch.float64) / temperature
    vocab = scaled.shape[-1]
    values, indices = scaled.topk(min(top_k, vocab))
    ignored = labels < 0
    # A label outside the vocabulary is told when the row is pushed; gather must not meet it.
    target = torch.where(ignored, indices[:, 0], labels.clamp(max=vocab - 1)).unsqueeze(-1)
    of_target = scaled.gather(-1, target).squeeze(-1).masked_fill(ignored, -torch.inf)
    # All sums are without the target, so that one that the teacher is sure of loses nothing.
    tail = scaled.scatter_(-1, indices, -torch.inf).scatter_(-1, target, -torch.inf).logsumexp(-1)
    among = (indices == target) & ~ignored.unsqueeze(-1)
    entries = values.masked_fill(among, -torch.inf)
    others = torch.cat((entries, tail.unsqueeze(-1)), -1).logsumexp(-1)
    total = torch.logaddexp(others, of_target)
    target_log_prob = torch.nn.functional.logsigmoid(of_target - others)
    return indices, values - total.unsqueeze(-1), target_log_prob, (tail - total).exp()


def _bar(total: int, there: int) -> Any:
    """A progress bar, `None` without tqdm."""
    try:
        tqdm: Callable[..., Any] = importlib.import_module("tqdm").tqdm
    except ImportError:
        return None
    return tqdm(total=total, initial=there, unit="tokens", unit_scale=True)
