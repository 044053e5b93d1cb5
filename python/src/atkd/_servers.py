"""Log-probabilities as inference servers return them, as a sparse teacher.

A server's row about token s of a sequence is the distribution of token s given those before it: what a model's logits at
position s - 1 are about. Rows here go to the positions of the logits.
"""

from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ._teacher import SparseTeacher


class ServedRows(NamedTuple):
    """The teacher of a batch, by the positions of the student's logits of the same sequences."""

    teacher: SparseTeacher
    """Rows `[B, T, K]` and the log-probability of each label `[B, T]`, in float32, on the CPU. T is the length of the longest
    sequence; what a row has fewer of has the index -1.
    """
    labels: Tensor
    """int64 `[B, T]`: at position t token t + 1 of the sequence, which is what the logits there are about, so that
    `shift_labels` is left out. -100 at the last position of each sequence, in the padding behind it, and where the server has
    no row. To ignore prompts, set more of them to -100.
    """


# The log-probabilities of the tokens of a row, and of the sequence's own token.
_Row = Tuple[Dict[int, float], float]


def _served(
    rows: Sequence[Sequence[Optional[_Row]]],
    token_ids: Sequence[Sequence[int]],
    top_k: Optional[int],
) -> ServedRows:
    """`rows` of each sequence are those of its last tokens."""
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}, but must be at least 1")
    length = max((len(tokens) for tokens in token_ids), default=0)
    found = [len(row[0]) for of_sequence in rows for row in of_sequence if row is not None]
    width = max([1, *found] if top_k is None else [1, *(min(top_k, each) for each in found)])
    shape = len(token_ids), length
    indices = torch.full((*shape, width), -1, dtype=torch.int64)
    log_probs = torch.zeros((*shape, width))
    target = torch.zeros(shape)
    labels = torch.full(shape, -100, dtype=torch.int64)
    for i, (of_sequence, tokens) in enumerate(zip(rows, token_ids)):
        first = len(tokens) - len(of_sequence)
        for s, row in enumerate(of_sequence, first):
            if row is None or s == 0:
                continue
            known, own = row
            likeliest = sorted(known.items(), key=lambda entry: -entry[1])[:width]
            ids, values = zip(*likeliest) if likeliest else ((), ())
            indices[i, s - 1, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
            log_probs[i, s - 1, : len(ids)] = torch.tensor(values)
            target[i, s - 1], labels[i, s - 1] = own, tokens[s]
    return ServedRows(SparseTeacher(indices, log_probs, target), labels)


def _check_sequences(what: str, rows: Sequence[Any], token_ids: Sequence[Sequence[int]]) -> None:
    if len(rows) != len(token_ids):
        raise ValueError(f"{what} are of {len(rows)} sequences, but token_ids of {len(token_ids)}")
    for i, (of_sequence, tokens) in enumerate(zip(rows, token_ids)):
        if of_sequence is None:
            raise ValueError(f"{what}[{i}] is None: the request asked for no log-probabilities")
        if len(of_sequence) > len(tokens):
            raise ValueError(
                f"{what}[{i}] has {len(of_sequence)} rows, but token_ids[{i}] only {len(tokens)} tokens: where rows of a "
                "prompt and of what was generated are put together, so must be their tokens"
            )


def from_vllm(
    prompt_logprobs: Sequence[Sequence[Optional[Mapping[Any, Any]]]],
    token_ids: Sequence[Sequence[int]],
    *,
    top_k: Optional[int] = None,
) -> ServedRows:
    """The teacher of sequences that vLLM has scored, in the shape of its versions 0.9 to 0.20.

    With `SamplingParams(prompt_logprobs=K, max_tokens=1)` each `RequestOutput` has `prompt_logprobs`, one row per token of the
    prompt: `prompt_logprobs[s]` is a dict from token ids to `Logprob(logprob, rank, decoded_token)`, of the K likeliest tokens
    at s given those before it, and of the prompt's own token s in addition, so K or K + 1 entries in any order; the first
    is None. The JSON of its server has strings for ids, and dicts for `Logprob`; both are taken. So is what it has
    generated, if the rows are `prompt_logprobs + outputs[0].logprobs`, and the ids those of both.

        outputs = llm.generate(prompts, vllm.SamplingParams(prompt_logprobs=20, max_tokens=1))
        rows = atkd.from_vllm([each.prompt_logprobs for each in outputs], [each.prompt_token_ids for each in outputs])
        indices, log_probs, target_log_prob, _ = rows.teacher
        loss = atkd.sparse_atkd_loss(student_logits, indices, log_probs, rows.labels, target_log_prob=target_log_prob)

    where `student_logits` `[B, T, V]` are of the same ids, padded on the right. vLLM takes a prompt's log-probabilities of the
    raw logits, at temperature 1, whatever the sampling's; those of generated tokens too, unless the engine has another
    `logprobs_mode`. It gives 20 at most unless `max_logprobs` says more.

    Args:
        prompt_logprobs: the rows of each sequence, the last of which is about its last token. A sequence may have fewer rows
            than tokens: its first ones have none then.
        token_ids: of each sequence.
        top_k: the likeliest entries of a row that are kept, instead of all. The own token's log-probability is kept apart.

    Returns:
        The row about token s at position s - 1, where the student's logits are about token s: see `ServedRows`.

    Raises:
        ValueError: for more rows than tokens, and for a row without its own token.
    """
    _check_sequences("prompt_logprobs", prompt_logprobs, token_ids)

    def row(given: Optional[Mapping[Any, Any]], i: int, s: int) -> Optional[_Row]:
        if not given:
            return None
        known = {int(token): _number(entry) for token, entry in given.items()}
        own = int(token_ids[i][s])
        if own not in known:
            raise ValueError(
                f"prompt_logprobs[{i}] has no entry for token {s}, {own}, of its sequence: are token_ids those of the same "
                "request?"
            )
        return known, known[own]

    rows = [
        [row(each, i, s) for s, each in enumerate(given, len(token_ids[i]) - len(given))]
        for i, given in enumerate(prompt_logprobs)
    ]
    return _served(rows, token_ids, top_k)


def _number(entry: Any) -> float:
    """The log-probability of an entry of vLLM's."""
    value = entry["logprob"] if isinstance(entry, Mapping) else getattr(entry, "logprob", entry)
    return float(value)


# (log-probability, token id, text), a list in JSON.
_Entry = Sequence[Any]


def from_sglang(
    input_top_logprobs: Sequence[Sequence[Optional[Sequence[_Entry]]]],
    input_token_logprobs: Sequence[Sequence[_Entry]],
    token_ids: Sequence[Sequence[int]],
    *,
    top_k: Optional[int] = None,
) -> ServedRows:
    """The teacher of sequences that SGLang has scored, in the shape of its versions 0.4 and 0.5.

    With `return_logprob=True, logprob_start_len=0, top_logprobs_num=K` and `max_new_tokens` of 1 (or 0) the `meta_info` of a
    response has `input_top_logprobs`, for each token s of the input a list of K `(log-probability, token id, text or None)`,
    the distribution of token s given those before it, and None for the first; and `input_token_logprobs`, of each token
    itself such an entry, whose log-probability is None for the first. The token need not be among the K.

        infos = [each["meta_info"] for each in responses]
        tops, owns = ([info[f"input_{kind}_logprobs"] for info in infos] for kind in ("top", "token"))
        rows = atkd.from_sglang(tops, owns, token_ids)

    and then as in `from_vllm`. These are at temperature 1. With a `logprob_start_len` above 0 there are rows of the tokens from
    there on, the first of which is None. Rows of what was generated (`output_top_logprobs`, `output_token_logprobs`) may follow
    those of the input, but are at the temperature of the sampling, unless the server was told otherwise.

    Args:
        input_top_logprobs: the rows of each sequence, the last of which is about its last token.
        input_token_logprobs: as many entries.
        token_ids: of each sequence. (SGLang replaces some ids in its entries by 0.)
        top_k: the likeliest entries of a row that are kept, instead of all.

    Returns:
        The row about token s at position s - 1, where the student's logits are about token s: see `ServedRows`.

    Raises:
        ValueError: for more rows than tokens, and for entries that are of other tokens.
    """
    _check_sequences("input_top_logprobs", input_top_logprobs, token_ids)
    _check_sequences("input_token_logprobs", input_token_logprobs, token_ids)
    rows: List[List[Optional[_Row]]] = []
    for i, (tops, owns) in enumerate(zip(input_top_logprobs, input_token_logprobs)):
        if len(tops) != len(owns):
            raise ValueError(
                f"input_top_logprobs[{i}] has {len(tops)} rows, but input_token_logprobs[{i}] {len(owns)}"
            )
        of_sequence: List[Optional[_Row]] = []
        for s, (top, own) in enumerate(zip(tops, owns), len(token_ids[i]) - len(owns)):
            log_prob, token = own[0], int(own[1])
            if token not in (int(token_ids[i][s]), 0):
                raise ValueError(
                    f"input_token_logprobs[{i}] has token {token} where token_ids[{i}] has {token_ids[i][s]}, at {s}: they "
                    "must be of the same request"
                )
            if log_prob is None:
                of_sequence.append(None)
                continue
            known = {int(entry[1]): float(entry[0]) for entry in top or ()}
            of_sequence.append((known, float(log_prob)))
        rows.append(of_sequence)
    return _served(rows, token_ids, top_k)
