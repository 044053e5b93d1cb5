"""Losses over groups of ranks, in real processes, against float64 of the whole."""

import re
import subprocess
import sys
from pathlib import Path

import atkd
import definitions
import pytest
import ranks as processes
import torch
import torch.distributed.fsdp
from shard_tasks import PLACED, Case, Head, Sparse, upstream_of
from support import EPS, TINY, assert_gradient, batch, weight
from test_sparse import oracle

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this torch has no gloo: groups of ranks were not tested", allow_module_level=True)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    pool = processes.Ranks(tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.stop()


def definition(case):
    """Loss, gradient and hard tokens of the whole in float64, token by token where these have settings of their own."""
    student, teacher, labels, given = case.whole()
    vocab = given.pop("vocab_size", student.shape[-1])
    weights, hard = given.pop("token_weights", None), given.pop("hard", None)
    wide = student.double().requires_grad_()
    if case.masks:
        # The limit, which float64 has no NaN for.
        wide = student.double().clamp(min=-300.0).requires_grad_()
        teacher = teacher.clamp(min=-300.0)
    logits = wide[..., :vocab], teacher.double()[..., :vocab], labels
    per_token = given.get("reduction") == "none" or weights is not None or hard is not None
    temperatures = given.get("temperature")
    if not per_token and not isinstance(temperatures, torch.Tensor):
        loss, stats = definitions.atkd_loss(*logits, **given)
        return loss.detach(), torch.autograd.grad(loss, wide)[0], stats[3]
    flat = [each.flatten(0, labels.dim() - 1) for each in logits]
    valid = labels.flatten() != -100
    own = (torch.ones(labels.shape) * (1.0 if temperatures is None else temperatures)).flatten()
    chosen = torch.zeros_like(valid)
    if hard is None:
        margins = []
        for i in valid.nonzero().flatten():
            p, rest, _ = definitions.split(flat[1][i, None] / own[i], flat[2][i, None])
            margins.append(rest - p)
        chosen[valid] = definitions.select(torch.cat(margins), given.get("hard_ratio", 0.5))
    else:
        chosen = hard.flatten() & valid
    found = []
    for i in range(len(valid)):
        if valid[i]:
            token = [each[i, None] for each in flat]
            settings = {**given, "temperature": own[i].item(), "reduction": "sum", "hard_ratio": float(chosen[i])}
            found.append(definitions.atkd_loss(*token, **settings)[0])
        else:
            found.append(0 * flat[0][i].sum())
    losses = torch.stack(found)
    losses = losses * (1.0 if weights is None else weights.flatten().double())
    if given.get("reduction") == "none":
        loss = losses.view(labels.shape)
        (gradient,) = torch.autograd.grad(loss, wide, upstream_of_parts(case, labels).double())
    else:
        loss = losses.sum() / (1 if given.get("reduction") == "sum" else valid.sum().clamp(min=1))
        (gradient,) = torch.autograd.grad(loss, wide)
    return loss.detach(), gradient, chosen.view(labels.shape)


def upstream_of_parts(case, labels):
    return torch.cat([upstream_of(each) for each in labels.split(case.tokens)])


def put_together(case, results):
    """The loss, the gradient and the hard tokens of all ranks; the columns' ranks must have the same bits."""
    tp, dp = case.layout
    losses, gradients, hard = [], [], []
    for d in range(dp):
        of_columns = [results[d * tp + t] for t in range(tp)]
        first = of_columns[0]
        for loss, _, stats, _ in of_columns:
            assert torch.equal(loss.view(torch.int32), first[0].view(torch.int32))
            for one, other in zip(stats, first[2]):
                assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
        losses.append(first[0])
        gradients.append(torch.cat([gradient for _, gradient, _, _ in of_columns], -1))
        hard.append(first[2][3])
    loss = torch.cat(losses) if losses[0].dim() else torch.stack(losses).double().sum()
    return loss, torch.cat(gradients), torch.cat(hard)


def check(given, results):
    case = Case(**given)
    loss, gradient, hard = put_together(case, results)
    exact_loss, exact, exact_hard = definition(case)
    assert torch.equal(hard, exact_hard), given
    error = (loss.double() - exact_loss).abs()
    assert (error <= 3e-6 * exact_loss.abs() + 6e-7).all(), (given, loss, exact_loss)
    largest = exact.abs().amax(-1, keepdim=True)
    rounding = (exact.abs() * EPS[gradient.dtype]).clamp(min=TINY[gradient.dtype])
    upstream = case.settings.get("ce_weight", 0.0) + 1
    if case.settings.get("reduction") == "none":
        upstream = upstream * upstream_of_parts(case, hard)[..., None]
    if case.weights:
        upstream = upstream * 2
    elif case.settings.get("reduction", "mean") == "mean" and "num_items_in_batch" not in case.settings:
        upstream = upstream / max(int(hard.numel()), 1)
    worst = ((gradient.double() - exact).abs() / (3e-6 * largest + 1.5e-6 * upstream + rounding + 1e-30)).max()
    assert worst <= 1, (given, worst)
    assert exact.abs().max() > 0
    if case.inplace:
        assert all(overwritten for *_, overwritten in filter(None, results)), given


def run(ranks, cases):
    results = ranks("losses", cases=cases)
    for i, given in enumerate(cases):
        check(given, [result[i] for result in results])


SPLITS = {
    "TP 2": {"columns": [17, 33], "tokens": [12]},
    "TP 4": {"columns": [20, 0, 7, 23], "tokens": [12]},
    "DP 2": {"columns": [50], "tokens": [9, 4]},
    "DP 4, one empty": {"columns": [50], "tokens": [5, 0, 3, 6]},
    "TP 2 x DP 2": {"columns": [31, 19], "tokens": [3, 8]},
    "TP 2 x DP 2, one row empty": {"columns": [31, 19], "tokens": [9, 0]},
}

OBJECTIVES = {
    "atkd": {},
    "jsd": {"objective": "plain", "divergence": "jsd", "beta": 0.3},
    "tvd": {"objective": "plain", "divergence": "tvd"},
    "reverse kl": {"divergence": "reverse-kl"},
    "cross entropy": {"temperature": 2.0, "ce_weight": 0.7, "temperature_squared": True},
    "teacher's target": {"target": "teacher"},
    "median": {"selection_rule": "median"},
}


@pytest.mark.parametrize("split", SPLITS)
def test_losses_and_gradients(ranks, split):
    run(ranks, [{**SPLITS[split], **settings, "seed": i} for i, settings in enumerate(OBJECTIVES.values())])


def test_a_world_of_one(ranks):
    numbers = [{"columns": [50], "tokens": [tokens]} for tokens in range(2, 9)]
    run(ranks, [{**each, **settings} for each in numbers for settings in ({}, {"told": True, "reduction": "group-mean"})])


@pytest.mark.parametrize("tokens", [[0], [0, 0], [0, 0, 0, 0]])
def test_ranks_without_tokens(ranks, tokens):
    cases = [{"columns": [50], "tokens": tokens, **settings} for settings in OBJECTIVES.values()]
    for of_rank in filter(None, ranks("losses", cases=cases)):
        for loss, gradient, stats, _ in filter(None, of_rank):
            assert loss == 0 and gradient.shape == (0, 50) and stats[3].shape == (0,)


@pytest.mark.parametrize("split", SPLITS)
def test_reductions(ranks, split):
    reductions = [
        {"reduction": "sum"},
        {"reduction": "group-mean", "ce_weight": 0.5},
        {"reduction": "none"},
        {"reduction": "none", "ce_weight": 0.5, "weights": True},
        {"num_items_in_batch": 7},
        {"hard": True},
    ]
    run(ranks, [{**SPLITS[split], **settings} for settings in reductions])


@pytest.mark.parametrize("split", SPLITS)
def test_inputs(ranks, split):
    inputs = [
        {"masks": True},
        {"dtype": "bfloat16"},
        {"dtype": "float16"},
        {"padding": 5},
        {"weights": True, "reduction": "sum"},
        {"temperatures": True},
        {"ties": True},
        {"ties": True, "target": "teacher"},
        {"inplace": True},
        {"inplace": True, "padding": 25, "dtype": "bfloat16"},
        {"told": True},
        {"told": True, "reduction": "sum", "padding": 5},
        {"length": 3, "transposed": True},
        {"length": 3, "transposed": True, "inplace": True, "selection": "sequence"},
        {"length": 3, "selection": "sequence", "hard_ratio": 0.3},
        {"length": 4, "selection": "sequence", "selection_rule": "median", "reduction": "group-mean"},
    ]
    run(ranks, [{**SPLITS[split], **settings} for settings in inputs])


@pytest.mark.parametrize("split", SPLITS)
def test_heads(ranks, split):
    cases = [
        {"chunk_tokens": 3},
        {"chunk_tokens": 3, "reduction": "group-mean", "ce_weight": 0.5, "bias": True},
        {"chunk_tokens": 5, "reduction": "sum", "selection_rule": "median", "padding": 4},
        {"chunk_tokens": 4, "reduction": "none", "bias": True},
        {"chunk_tokens": 4, "objective": "plain", "divergence": "jsd"},
        {"chunk_tokens": 2, "known": "log_prob", "num_items_in_batch": 9},
        {"dtype": "bfloat16"},
        {},
    ]
    cases = [{**SPLITS[split], **each} for each in cases]
    for given, results in zip(cases, zip(*ranks("heads", cases=cases))):
        case = Head(**given)
        tp, dp = case.layout
        student, teacher, labels, settings = case.whole()
        settings.pop("chunk_tokens", None)
        vocab = settings.pop("vocab_size", sum(case.columns))
        leaves = [None if each is None else each.double().requires_grad_() for each in student]
        logits = torch.nn.functional.linear(*leaves)[:, :vocab]
        of_teacher = torch.nn.functional.linear(*[None if each is None else each.double() for each in teacher])[:, :vocab]
        if case.settings.get("reduction") == "none":
            upstream = torch.cat([upstream_of(each) for each in labels.split(case.tokens)]).double()
            _, stats = definitions.atkd_loss(logits, of_teacher, labels, **{**settings, "reduction": "sum"})
            exact = 0.0
            for row in (labels != -100).nonzero().flatten():
                token = logits[row, None], of_teacher[row, None], labels[row, None]
                ratio = float(stats[3][row])
                exact += upstream[row] * definitions.atkd_loss(*token, **{**settings, "reduction": "sum", "hard_ratio": ratio})[0]
            parts = [(result[0] * upstream_of(result[0])).double().sum() for result in results[: tp * dp : tp]]
        else:
            exact, stats = definitions.atkd_loss(logits, of_teacher, labels, **settings)
            parts = [result[0].double() for result in results[: tp * dp : tp]]
        assert torch.equal(torch.cat([result[2] for result in results[: tp * dp : tp]]), stats[3]), given
        assert abs(sum(parts) - exact.item()) <= 1e-5 * abs(exact.item()), given
        leaves = [each for each in leaves if each is not None]
        found = []
        for d in range(dp):
            of_columns = results[d * tp : d * tp + tp]
            for each in of_columns[1:]:
                assert torch.equal(each[0], of_columns[0][0])
                assert torch.equal(each[1][0], of_columns[0][1][0])
            found.append([of_columns[0][1][0], *[torch.cat(each) for each in list(zip(*[each[1] for each in of_columns]))[1:]]])
        found = [torch.cat([each[0] for each in found]), *[sum(each) for each in list(zip(*found))[1:]]]
        for leaf, gradient in zip(torch.autograd.grad(exact, leaves), found):
            allowed = 2e-5 if case.dtype == torch.float32 else 2.0**-8
            assert (gradient.double() - leaf).abs().max() <= allowed * leaf.abs().max() * (dp if allowed > 1e-3 else 1), given


def check_of_one_group(results):
    for found in filter(None, results):
        for call, (of_loss, of_gradient, loss) in found.items():
            assert of_loss <= 2e-6 and of_gradient <= 1e-5, (call, of_loss, of_gradient)
            if call[-1] == 1.0:
                # So that one cannot be taken for the other.
                assert loss >= 1.5 * found[(*call[:-1], 0.0)][2], call


SPARSE = [
    {},
    {"tail": "uniform", "divergence": "jsd", "ce_weight": 0.4},
    {"tail": "zero", "reduction": "sum", "temperature": 2.0, "ce_weight": 0.3},
    {"tail": "sampled", "reduction": "group-mean"},
    {"divergence": "tvd", "objective": "plain", "log_dtype": "float16"},
    {"divergence": "reverse-kl", "temperature": 0.5, "k": 1},
    {"divergence": "skew-kl", "beta": 0.2, "selection_rule": "median", "reduction": "group-mean", "own": False},
    {"target": "teacher", "own": False, "divergence": "jsd"},
    {"inplace": True, "dtype": "bfloat16", "tail": "uniform"},
    {"k": 50, "own": False, "hard_ratio": 0.3},
    {"objective": "kl", "told": True, "padding": 4},
]  # fmt: skip


@pytest.mark.parametrize("split", SPLITS)
def test_sparse_teachers(ranks, split):
    """Loss, gradient and hard tokens are those of one process, class by class in float64."""
    given = [{**SPLITS[split], "seed": i, **each} for i, each in enumerate(SPARSE)]
    found = ranks("sparse_losses", cases=given)
    for i, each in enumerate(given):
        case = Sparse(**each)
        student, teacher, labels, settings = case.whole()
        vocab = settings.pop("vocab_size", student.shape[-1])
        exact, exact_gradient, terms = oracle(student[..., :vocab], sampled_of(teacher, labels), labels, vocab=vocab, **settings)
        results = [of_rank[i] for of_rank in found]
        loss, gradient, hard = put_together(case, results)
        assert abs(loss.item() - exact) <= 1e-6 * abs(exact) + 2e-7, (each, loss, exact)
        assert not gradient[..., vocab:].any()
        assert_gradient(gradient[..., :vocab], exact_gradient, 2 * weight(student, labels, **settings))
        assert torch.equal(hard, terms["hard"]), each
        assert all(result is None or result[3] or not case.inplace for result in results)


def sampled_of(teacher, labels):
    """Draws as what they are taken for: probabilities that share what the label leaves, and none elsewhere."""
    if teacher.tail != "sampled":
        return teacher
    own = (teacher.indices < 0) | (teacher.indices == labels.unsqueeze(-1))
    weights = teacher.log_probs.double().masked_fill(own, -torch.inf)
    left = torch.log1p(-teacher.target_log_prob.double().exp()).unsqueeze(-1)
    log_probs = weights - weights.logsumexp(-1, keepdim=True) + left
    return teacher._replace(log_probs=log_probs, tail="zero")


@pytest.mark.parametrize("layout, columns, tokens, at", [((2, 1), [20, 30], [6], 1), ((1, 2), [50], [3, 3], 1), ((2, 2), [20, 30], [3, 3], 3)])
def test_all_ranks_raise_where_a_sparse_teacher_is_wrong_on_one(ranks, layout, columns, tokens, at):
    found = [each for each in ranks("sparse_faults", layout=layout, columns=columns, tokens=tokens, at=at) if each]
    assert len(found) == layout[0] * layout[1]
    after = [loss for _, loss in found]
    assert all(loss.isfinite() for loss in after)
    same_rows = layout[0] > 1
    words = [
        f"rank {at} has the index 500 in its sparse teacher, but indices must be from 0 to 49" if same_rows else "vocabulary size 50",
        "other values of indices" if same_rows else None,
        "add up to",
        "other values of log_probs" if same_rows else None,
        "other values of target_log_prob" if same_rows else None,
        "tail is 'zero', but there 'bucket'|tail is 'bucket', but there 'zero'",
        "target|optional arguments",
        "a teacher of torch.float16",
        "log_probs are",
        "indices are a NoneType",
        "give teacher.indices",
        "and no token is left|add up to|other values of indices",
    ]
    for i, word in enumerate(words):
        errors = [of_rank[i] for of_rank, _ in found]
        if word is None:
            # Each rank's rows are its own.
            assert errors == [None] * len(found) or all(errors), (i, errors)
            continue
        assert all(error is not None for error in errors), (i, errors)
        assert any(re.search(word, message) for _, message in errors), (i, errors)
        for kind, message in errors:
            assert kind in ("ValueError", "TypeError", "RuntimeError"), (i, errors)
            assert re.search(word, message) or f"rank {at} has raised" in message, (i, errors)


@pytest.mark.parametrize("split", SPLITS)
def test_fused_heads_with_sparse_teachers(ranks, split):
    settings = [
        {},
        {"chunk_tokens": 2, "tail": "uniform", "divergence": "jsd", "ce_weight": 0.3},
        {"chunk_tokens": 3, "tail": "sampled", "reduction": "group-mean"},
        {"chunk_tokens": 2, "target": "teacher", "selection_rule": "median"},
        {"objective": "kl", "reduction": "none", "tail": "zero", "chunk_tokens": 2},
    ]
    cases = [{**SPLITS[split], "settings": each} for each in settings]
    for of_rank in ranks("sparse_heads", cases=cases):
        for result, each in zip(of_rank, settings):
            if result is not None:
                off, same_hard = result
                assert off <= 2e-5 and same_hard, (each, off)


def test_all_tokens_hard_or_none(ranks):
    check_of_one_group(ranks("of_one_group"))


def test_gradient_accumulation(ranks):
    (hidden, weight, _), (of_teacher, to_teacher, _), labels, _ = Head([50], [6, 5]).whole()
    exact = atkd.linear_atkd_loss(hidden, weight.requires_grad_(), of_teacher, to_teacher, labels)
    exact.backward()
    for loss, gradient in filter(None, ranks("accumulated")):
        assert torch.allclose(loss, exact, rtol=1e-5)
        assert torch.allclose(gradient, weight.grad, rtol=1e-4, atol=1e-6)


def test_one_rank_alone_calls_backward(ranks):
    results = list(filter(None, ranks("backward_on_one_rank")))
    (hidden, weight, _), (of_teacher, to_teacher, _), labels, _ = Head([50], [6, 5]).whole()
    weight.requires_grad_()
    losses = atkd.linear_atkd_loss(hidden, weight, of_teacher, to_teacher, labels, reduction="none")
    losses[6:].sum().backward()
    assert torch.allclose(torch.cat([found for found, _ in results]), losses.detach(), rtol=1e-5, atol=1e-6)
    assert results[0][1] is None
    assert torch.allclose(results[1][1], weight.grad, rtol=1e-4, atol=1e-5)


def test_what_a_call_sends(ranks):
    from atkd._groups import HEADER_BYTES

    # As the README and docs/scale.md say.
    assert HEADER_BYTES == 224

    splits = {
        (4, 1): {"columns": [20, 0, 7, 23], "tokens": [12]},
        (1, 4): {"columns": [50], "tokens": [5, 0, 3, 6]},
        (2, 2): {"columns": [31, 19], "tokens": [3, 8]},
    }
    settings = [
        {},
        {"objective": "plain", "divergence": "jsd", "weights": True},
        {"told": True},
        {"reduction": "none", "divergence": "tvd"},
    ]
    for (tp, dp), split in splits.items():
        cases = [{**split, **each} for each in settings]
        for rank, results in enumerate(ranks("messages", cases=cases)):
            for given, found in zip(cases, results):
                expected = []
                headers = not given.get("told")
                count = split["tokens"][rank // tp]
                if tp > 1:
                    expected += [("gather", tp, HEADER_BYTES * tp)] if headers else []
                if dp > 1:
                    expected += [("gather", dp, HEADER_BYTES * dp)] if headers else []
                if tp > 1:
                    expected.append(("gather", tp, 40 * count * tp))
                    if given.get("divergence") in ("jsd", "tvd"):
                        expected.append(("gather", tp, 12 * count * tp))
                if dp > 1 and given.get("objective") == "plain":
                    # The tokens that count, for the mean.
                    expected.append(("gather", dp, 8 * dp))
                elif dp > 1:
                    expected.append(("gather", dp, 5 * max(split["tokens"]) * dp))
                assert found == expected, (given, rank)


def test_margins_and_selections(ranks):
    results = ranks("margins_and_selections")
    case = Case([50], [12], masks=True)
    _, teacher, labels, _ = case.whole()
    margins = atkd.teacher_margins(teacher, labels, temperature=2.0)
    for of_rank, *_ in results:
        assert torch.equal(of_rank, results[0][0])
        assert ((of_rank - margins).abs() <= 2e-6 * (1 + margins.abs())).logical_or(of_rank == margins).all()
    hard, without, alone = (torch.cat(each) for each in list(zip(*results))[1:])
    assert torch.equal(hard, atkd.select_hard(margins, 0.3, valid=labels != -100))
    assert torch.equal(without, atkd.select_hard(margins, 0.3))
    assert torch.equal(alone, atkd.select_hard(margins, 0.3, cu_seqlens=torch.tensor([0, 5, 5, 8, 12])))


# By fault: what the rank at fault says, and what the others do.
GIVEN_UP = "RuntimeError", "rank 1 has raised an error in this call"
FAULTS = {
    "wrong_label": [("ValueError", "rank 1 has the label 99, but labels must be from 0 to 49")] * 2,
    "negative_label": [("ValueError", "rank 1 has the label -5, but labels must be from 0 to 49")] * 2,
    "other_settings": [("ValueError", "rank 1 has other settings than rank 0: lam is 0.3, but there 0.2")] * 2,
    "packed": [("ValueError", "atkd_loss takes no cu_seqlens beside groups of ranks or DTensors"), GIVEN_UP],
    "other_reduction": [("ValueError", "other settings than rank 0: reduction is 'none', but there 'mean'")] * 2,
    "shifted": [("ValueError", "other settings than rank 0: shift_labels is True, but there False")] * 2,
    "shifted_by_text": [("TypeError", "shift_labels is 'yes', but must be True or False"), GIVEN_UP],
    "other_dtype": [("TypeError", "rank 1 has a student of torch.bfloat16, but rank 0 of torch.float32")] * 2,
    "given_weights": [("ValueError", "rank 1 was given labels, token_weights, but rank 0 was given labels")] * 2,
    "other_items": [("ValueError", "other settings than rank 0: num_items_in_batch is 5.0, but there None")] * 2,
    "bad_setting": [("ValueError", "2"), GIVEN_UP],
    "bad_shape": [("ValueError", "labels are"), GIVEN_UP],
    "no_tensor": [("TypeError", "student_logits are a NoneType"), GIVEN_UP],
    "unknown_keyword": [("TypeError", "unexpected keyword argument 'lambda_'"), GIVEN_UP],
    "bad_temperature": [("ValueError", "temperature[0] is 0.0"), GIVEN_UP],
    "leaf_in_place": [("ValueError", "inplace=True would overwrite a leaf"), GIVEN_UP],
    "huge_vocab_size": [("ValueError", "vocab_size is 1180591620717411303424, but must be from 0"), GIVEN_UP],
    "half_a_column": [("TypeError", "vocab_size is 49.5, but must be an integer"), GIVEN_UP],
}
LABELS = "rank 1 has other labels than rank 0: labels must be tokens of the whole vocabulary, the same on all ranks"
DIFFERENT_LABELS = {"other_labels": [("ValueError", LABELS)] * 2, "rolled_labels": [("ValueError", LABELS)] * 2}
OF_COLUMNS = {
    **DIFFERENT_LABELS,
    "fewer_tokens": [("ValueError", "rank 1 has 5 tokens, but rank 0 has 6")] * 2,
    "other_start": [("ValueError", "the ranks have 50 columns of the student in all, but 49 of the teacher")] * 2,
    "wrong_vocab_start": [("ValueError", "rank 1 was given vocab_start 3, but the ranks before it have 20 columns")] * 2,
}
OF_BOTH = {
    **DIFFERENT_LABELS,
    "wrong_counts": [("ValueError", "token_counts[0] is 1, but this rank has 6 tokens"), GIVEN_UP],
    "one_count": [("TypeError", "token_counts is 6, but must be a sequence of integers"), GIVEN_UP],
}


@pytest.mark.parametrize(
    "layout, columns, tokens, others",
    [((2, 1), [20, 30], [6], OF_COLUMNS), ((1, 2), [50], [6, 5], {}), ((2, 2), [20, 30], [6, 5], OF_BOTH)],
)
def test_all_ranks_raise_where_one_does(ranks, layout, columns, tokens, others):
    expected = {**FAULTS, **others}
    given = {"layout": layout, "columns": columns, "tokens": tokens, "names": list(expected), "at": 1}
    for rank, (found, loss) in enumerate(filter(None, ranks("faults", **given))):
        for (name, messages), (kind, message) in zip(expected.items(), found):
            of_kind, beginning = messages[0 if rank == 1 else 1]
            assert kind == of_kind and beginning in message, (rank, name, kind, message)
        assert loss.isfinite()


@pytest.mark.parametrize("layout, columns, tokens", [((2, 1), [20, 30], [6]), ((2, 2), [20, 30], [6, 5])])
def test_values_that_differ_over_columns(ranks, layout, columns, tokens):
    everyone = ranks("different_values", layout=layout, columns=columns, tokens=tokens)
    of_labels = "rank 1 has other labels than rank 0"
    others = [f"rank 1 has other values of {name} than rank 0" for name in ("hard", "token_weights", "temperature")]
    others += [of_labels, "rank 1 has other values of teacher_log_prob than rank 0", of_labels]
    for rank, found in enumerate(everyone):
        if found is None:
            continue
        *found, same = found
        assert same is None
        # `teacher_margins` knows no token_group, whose other ranks go on.
        expected = [of_labels, *others] if rank < 2 else [of_labels, *others[:-1], None]
        for error, beginning in zip(found, expected):
            assert error is None if beginning is None else error[0] == "ValueError" and error[1].startswith(beginning)


def test_digests_of_small_values_differ():
    from atkd._groups import digest_of

    count = 7
    factors = torch.stack([digest_of(row) for row in torch.eye(count, dtype=torch.int64)])
    values = torch.cartesian_prod(*[torch.arange(6)] * count)
    digests = (values * factors).sum(1)
    assert digest_of(values[12345]) == digests[12345]
    assert digests.unique().numel() == len(values)
    weights = torch.rand(3, 4)
    assert digest_of(weights) == digest_of(weights.t().contiguous().t())
    assert digest_of(torch.arange(5)) == digest_of(torch.arange(5, dtype=torch.int32))
    assert digest_of(torch.tensor([0.0, -0.0])) == digest_of(torch.tensor([-0.0, 0.0]))


def test_numbers_of_numpy(ranks):
    pytest.importorskip("numpy")
    results = list(filter(None, ranks("numbers_of_numpy")))
    student, teacher, labels, _ = Case([50], [6, 5]).whole()
    settings = {"temperature": 2.0, "lam": 0.25, "num_items_in_batch": 7, "divergence": "jsd"}
    exact = atkd.atkd_loss(student, teacher, labels, **settings)
    assert torch.allclose(sum(results), exact, rtol=1e-5)


def test_what_no_rank_can_have(ranks):
    names = ["too_large_vocabulary", "same_groups"]
    given = {"layout": (2, 1), "columns": [20, 30], "tokens": [6], "names": names, "at": None}
    for (too_large, same_groups), _ in filter(None, ranks("faults", **given)):
        assert too_large == (
            "ValueError", "vocab_size is 60, but must be from 1 to 50, the columns that the ranks have in all of one model"
        )  # fmt: skip
        kind, message = same_groups
        assert kind == "ValueError" and "the ranks [0, 1] are both in the vocab_group and in the token_group" in message


def test_all_ranks_raise_in_other_functions(ranks):
    results = list(filter(None, ranks("other_faults")))
    of_first = [
        GIVEN_UP,
        GIVEN_UP,
        ("ValueError", "rank 1 has 4 tokens, but rank 0 has 5"),
        ("ValueError", "rank 1 has other settings than rank 0: chunk_tokens is 3, but there 2"),
        ("ValueError", "student_head makes logits of the whole vocabulary"),
        ("RuntimeError", "atkd_loss over groups of ranks has no rule for torch.func"),
        ("TypeError", "vocab_group is 3, but must be a torch.distributed.ProcessGroup"),
        ("TypeError", "ProcessGroup: give the group itself, or mesh.get_group('tp') of a device mesh"),
        ("TypeError", "token_group is -100, but must be a torch.distributed.ProcessGroup. (new_group returns it on ranks"),
        ("TypeError", "teacher_logits are torch.float64"),
        ("ValueError", "vocab_start is 3, but tells of a vocab_group, and none is given"),
        ("ValueError", "the logits of the ranks of the vocab_group have no columns in all"),
    ]
    of_second = [("ValueError", "target is"), ("TypeError", "margins are torch.int64"), *of_first[2:]]
    for found, expected in zip(results, [of_first, of_second]):
        for (kind, message), (of_kind, part) in zip(found, expected):
            assert kind == of_kind and part in message, (kind, message)


def test_a_nan_stays_where_it_is(ranks):
    results = ranks("not_a_number")
    whole = Case([50], [6, 5])
    student, teacher, labels, _ = whole.whole()
    labels[labels == -100] = 7
    student[8, 3] = torch.nan
    leaf = student.requires_grad_()
    atkd.atkd_loss(leaf, teacher, labels).backward()
    (first, of_first), (second, of_second) = [result[0] for result in results[:2]]
    assert first.isfinite() and second.isnan()
    found = torch.cat([of_first, of_second])
    others = torch.arange(11) != 8
    assert found[8].isnan().any() and found[others].isfinite().all()
    assert torch.allclose(found[others], leaf.grad[others], rtol=1e-5, atol=1e-7)
    # The vocabulary's ranks have all tokens.
    columns = [result[1] for result in results[:2]]
    assert all(loss.isnan() for loss, _ in columns)
    found = torch.cat([gradient for _, gradient in columns], -1)
    wrong = found.isnan().any(-1)
    assert wrong.sum() == 1 and wrong.nonzero().item() == 2


def test_compiled(ranks):
    results = [result for result in ranks("compiled") if result is not None]
    for loss, expected in results:
        assert torch.equal(loss, expected) and torch.equal(loss, results[0][0])


@pytest.fixture
def with_dtensors():
    try:
        from torch.distributed.tensor import DTensor  # noqa: F401
    except ImportError:
        pytest.skip(f"torch {torch.__version__} has no public DTensor: DTensors were not tested")


def test_dtensors(ranks, with_dtensors):
    everyone = ranks("distributed")
    for name, (_, letters, shape, settings) in PLACED.items():
        student, teacher, labels = batch(*shape)
        labels = labels.clamp(max=43)
        leaf = student.requires_grad_()
        exact = atkd.atkd_loss(leaf, teacher, labels, **settings)
        if settings.get("reduction") == "none":
            # That of all tokens; each rank selects among all.
            assert exact.dim() == 1
        exact.sum().backward()
        for whole, placements, is_placed_alike, gradient, local in (results[name] for results in everyone):
            assert torch.allclose(whole, exact, rtol=3e-6, atol=1e-7), name
            assert torch.allclose(gradient, leaf.grad, rtol=1e-5, atol=1e-7), name
            assert is_placed_alike
            tokens = "S" if whole.dim() else "P"
            assert [each[0] for each in placements] == [tokens if x in "01" else "R" for x in letters], placements
            assert torch.equal(whole, everyone[0][name][0])
            if not set(letters) & set("01"):
                assert torch.equal(local, everyone[0][name][4])


def test_dtensors_beside_a_group_of_tokens(ranks, with_dtensors):
    results = ranks("distributed_and_tokens")
    student, teacher, labels = batch(7, 50)
    leaf = student.requires_grad_()
    exact = atkd.atkd_loss(leaf, teacher, labels)
    exact.backward()
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[2][0], results[3][0])
    assert abs(results[0][0] + results[2][0] - exact) <= 3e-6 * exact
    assert torch.allclose(torch.cat([results[0][1], results[2][1]]), leaf.grad, rtol=1e-5, atol=1e-7)


def test_wrong_placements(ranks, with_dtensors):
    expected = [
        ("TypeError", r"placed as \(Partial\(.*\),\), but each of these must be Shard\(dim\) or Replicate\(\)"),
        ("TypeError", "teacher_logits are a Tensor, but must be a DTensor"),
        ("ValueError", r"teacher_logits are placed as \(Shard\(dim=1\),\), but .* must be placed as \(Shard\(dim=2\),\)"),
        ("ValueError", r"labels are placed as \(Shard\(dim=1\),\), but .* must be placed as \(Replicate\(\),\)"),
        ("ValueError", "which tells their groups: leave out vocab_group"),
        ("ValueError", "which tells their groups: leave out token_group"),
        ("ValueError", 'selection="sequence" needs whole sequences on a rank'),
        ("ValueError", "shift_labels=True needs the next position's label on the rank"),
        ("ValueError", r"labels are \[4, 6\], but for student_logits \[4, 2, 50\] must be \[4, 2\]"),
        ("TypeError", "teacher_logits are a DTensor, which is taken only beside student_logits that are one"),
    ]
    for rank, found in enumerate(ranks("wrong_placements")):
        assert len(found) == len(expected)
        for (kind, message), (of_kind, pattern) in zip(found, expected):
            if "but for student_logits" in pattern:
                # Each rank has another part of the logits, for which the labels are wrong, or others have said so first.
                pattern = r"labels are \[4, 6\], but for student_logits|has raised an error"
                of_kind = kind
            assert kind == of_kind and re.search(pattern, message), (rank, kind, message)


def test_dtensors_all_hard_or_none(ranks, with_dtensors):
    check_of_one_group(ranks("distributed_of_one_group"))


def test_all_ranks_raise_where_one_does_with_dtensors(ranks, with_dtensors):
    settings = ("ValueError", "rank 1 has other settings than rank 0: shift_labels is True, but there False")
    expected = [
        ("ValueError", 'selection="sequence" needs whole sequences on a rank'),
        ("ValueError", "shift_labels=True needs the next position's label on the rank"),
        ("TypeError", "shift_labels is 'yes', but must be True or False"),
        ("ValueError", "which tells their groups: leave out token_group"),
        ("ValueError", "which tells their groups: leave out vocab_group"),
        settings,
    ]
    for rank, found in enumerate(ranks("placed_faults")):
        for (kind, message), of_rank in zip(found, expected):
            of_kind, part = of_rank if rank == 1 or of_rank is settings else GIVEN_UP
            assert kind == of_kind and part in message, (rank, kind, message)


def test_arguments_that_must_be_no_dtensors(ranks, with_dtensors):
    of_weight = (
        "student_weight is a DTensor, which linear_atkd_loss does not take: where rows are split by tensor parallelism, give "
        "student_weight.to_local() and the vocab_group; where FSDP2 has split it, "
        'student_weight.full_tensor(grad_placements=[Partial("avg")])'
    )
    expected = [
        "teacher_logits are a DTensor, which teacher_margins does not take: give teacher_logits.full_tensor()",
        of_weight,
        of_weight,
        "teacher_weight is a DTensor, which linear_atkd_loss does not take: give teacher_weight.full_tensor()",
        "num_items_in_batch is a DTensor, but must be a number: give num_items_in_batch.full_tensor()",
        "token_group is a DeviceMesh, but must be a torch.distributed.ProcessGroup: give mesh.get_group()",
    ]
    for found in ranks("refused_dtensors"):
        for (kind, message), beginning in zip(found, expected):
            assert kind == "TypeError" and message.startswith(beginning), message


@pytest.fixture
def with_fsdp():
    if not hasattr(torch.distributed.fsdp, "fully_shard"):
        pytest.skip(f"torch {torch.__version__} has no public fully_shard: FSDP2 was not tested")


@pytest.mark.parametrize("reshards", [False, True])
def test_fused_heads_of_fsdp(ranks, with_fsdp, reshards):
    for found in ranks("fused_heads_of_fsdp", reshards=reshards):
        assert len(found) == (2 if reshards else 3)
        for way, errors in found.items():
            assert max(errors) <= 1e-5, (way, errors)


@pytest.mark.parametrize("fsdp", [False, True], ids=["DDP", "FSDP2"])
def test_training_is_the_same_on_many_processes(ranks, fsdp):
    if fsdp and not hasattr(torch.distributed.fsdp, "fully_shard"):
        pytest.skip(f"torch {torch.__version__} has no public fully_shard: FSDP2 was not tested")
    for results in ranks("training", fsdp=fsdp):
        alone = results.pop((1, 1))
        assert len(alone) == 20 and alone[-1] < alone[1]
        for layout, losses in results.items():
            assert losses == pytest.approx(alone, rel=1e-5), layout


def test_the_example():
    example = Path(__file__).parents[1] / "examples" / "shards.py"
    shown = subprocess.run([sys.executable, str(example)], capture_output=True, text=True, timeout=300)
    assert shown.returncode == 0, shown.stderr
    lines = [line.split() for line in shown.stdout.splitlines()[2:]]
    assert len(lines) == 20
    for _, alone, *others in lines:
        assert [float(each) for each in others] == pytest.approx([float(alone)] * 3, rel=1e-5)
