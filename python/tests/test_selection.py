"""Margins, the selection of hard tokens, and the loss that is told of it: the same apart as in one call."""

import importlib.util
import math
from pathlib import Path

import atkd
import definitions
import pytest
import torch
import torch.distributed as dist
from support import SETTINGS, batch
from torch.fx.experimental import symbolic_shapes

EXAMPLE = Path(__file__).parents[1] / "examples" / "accumulate.py"
NAN, INF = float("nan"), float("inf")


def bits_equal(one, other):
    return torch.equal(one, other) and one.dtype == other.dtype


def exact_margins(teacher, labels, temperature=1.0):
    log_p, log_rest, _ = definitions.split(teacher.double() / temperature, labels)
    return log_rest - log_p


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("label_dtype", [torch.int64, torch.int32], ids=str)
def test_margins(dtype, label_dtype):
    _, teacher, labels = batch(6, 7, 40, dtype=dtype)
    margins = atkd.teacher_margins(teacher, labels.to(label_dtype), temperature=2.0)
    assert margins.shape == labels.shape and margins.dtype == torch.float32
    valid = labels != -100
    exact = exact_margins(teacher[valid], labels[valid], 2.0)
    assert (margins[valid].double() - exact).abs().max() < 2e-6 * (1 + exact.abs().max())
    assert (margins[~valid] == -INF).all()
    flat = atkd.teacher_margins(teacher.flatten(0, 1), labels.flatten(), temperature=2.0)
    assert bits_equal(flat, margins.flatten())
    by_tensor = atkd.teacher_margins(teacher, labels, temperature=torch.tensor(2.0))
    assert bits_equal(by_tensor, margins)


def test_margins_of_the_teachers_own_target():
    _, teacher, labels = batch(6, 7, 40, ignored=False)
    target = teacher.argmax(-1)
    margins = atkd.teacher_margins(teacher, target="teacher")
    assert bits_equal(margins, atkd.teacher_margins(teacher, target))
    shifted = atkd.teacher_margins(teacher, target="teacher", shift_labels=True)
    assert (shifted[:, -1] == -INF).all() and bits_equal(shifted[:, :-1], margins[:, :-1])
    shifted = atkd.teacher_margins(teacher, labels, shift_labels=True, ignore_index=3)
    by_hand = torch.cat([labels[:, 1:], torch.full((6, 1), 3)], 1)
    assert bits_equal(shifted, atkd.teacher_margins(teacher, by_hand, ignore_index=3))


@pytest.mark.parametrize("shape", [(50,), (6, 7), (1,), (0,)], ids=str)
@pytest.mark.parametrize("ratio", [0.0, 1e-9, 0.3, 0.5, 1.0])
def test_selection(shape, ratio):
    numbers = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0, 1e-30])
    random = torch.Generator().manual_seed(len(shape))
    for margins in (
        torch.randn(shape, generator=random),
        numbers[torch.randint(8, shape, generator=random)],
        torch.full(shape, 2.0),
    ):
        valid = torch.rand(shape, generator=random) < 0.7
        hard = atkd.select_hard(margins, ratio, valid=valid)
        assert hard.shape == margins.shape and hard.dtype == torch.bool and not hard[~valid].any()
        # NaN below every number, for a sort.
        key = torch.where(margins.isnan(), -INF, margins)[valid]
        order = sorted(range(len(key)), key=lambda i: (-key[i].item(), margins[valid][i].isnan().item(), i))
        expected = torch.zeros(len(key), dtype=torch.bool)
        expected[order[: math.ceil(ratio * len(key))]] = True
        assert torch.equal(hard[valid], expected)
        everything = torch.ones(shape, dtype=torch.bool)
        assert torch.equal(atkd.select_hard(margins, ratio), atkd.select_hard(margins, ratio, valid=everything))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_selection_within_sequences(dtype):
    margins = torch.randn(4, 10, generator=torch.Generator().manual_seed(1))
    valid = torch.rand(4, 10, generator=torch.Generator().manual_seed(2)) < 0.7
    offsets = torch.tensor([0, 3, 3, 28, 40], dtype=dtype)
    hard = atkd.select_hard(margins, 0.5, valid=valid, cu_seqlens=offsets).flatten()
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist()):
        part = slice(start, end)
        expected = atkd.select_hard(margins.flatten()[part], 0.5, valid=valid.flatten()[part])
        assert torch.equal(hard[part], expected)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 2.0, "hard_ratio": 0.3},
        {"target": "teacher", "ce_weight": 0.1},
        {"shift_labels": True, "num_items_in_batch": 12},
        {"selection": "sequence"},
        {"objective": "kl"},
        {"inplace": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mask_is_the_calls_own_selection(settings, dtype):
    student, teacher, labels = batch(5, 9, 300, dtype=dtype)

    def run(**more):
        logits = student.clone().requires_grad_()
        given = {**settings, **more}
        loss, stats = atkd.atkd_loss(logits * 1, teacher, labels, return_stats=True, **given)
        loss.backward()
        return loss.detach(), logits.grad, stats

    loss, gradient, stats = run()
    shape_of_margins = {
        name: settings[name] for name in ("temperature", "target", "shift_labels") if name in settings
    }
    assert bits_equal(atkd.teacher_margins(teacher, labels, **shape_of_margins), stats.margin)
    # Whatever the ratio, which is not used.
    again, same, masked = run(hard=stats.hard, hard_ratio=0.9)
    assert bits_equal(again, loss) and bits_equal(same, gradient)
    assert all(bits_equal(one, other) for one, other in zip(masked, stats))
    strided = stats.hard.new_zeros(9, 5).t()
    strided.copy_(stats.hard)
    assert bits_equal(run(hard=strided)[1], gradient)
    if "selection" not in settings:
        by = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:] if "shift_labels" in settings else labels
        hard = atkd.select_hard(stats.margin, settings.get("hard_ratio", 0.5), valid=by != -100)
        assert torch.equal(hard, stats.hard)


@pytest.mark.parametrize("inplace", [False, True])
def test_any_mask(inplace):
    """Hard tokens by one call in which all are, easy ones by another."""
    student, teacher, labels = batch(40, 60, seed=3)
    mask = torch.rand(40, generator=torch.Generator().manual_seed(4)) < 0.5

    def gradient(labels, **settings):
        logits = student.clone().requires_grad_()
        loss = atkd.atkd_loss(logits * 1, teacher, labels, reduction="sum", **settings)
        loss.backward()
        return loss.detach(), logits.grad

    loss, whole = gradient(labels, hard=mask, inplace=inplace)
    hard_loss, hard = gradient(labels.where(mask, -100), hard_ratio=1.0)
    easy_loss, easy = gradient(labels.where(~mask, -100), hard_ratio=0.0)
    assert torch.allclose(loss, hard_loss + easy_loss, rtol=1e-6)
    assert bits_equal(whole, hard + easy)
    criterion = atkd.ATKDLoss(reduction="sum")
    assert bits_equal(criterion(student, teacher, labels, hard=mask), loss)


def test_uncertainty_saturates_and_margins_do_not():
    """Of improbable labels the uncertainties are one number, the margins are not."""
    teacher = torch.zeros(6, 50)
    teacher[:, 0] = -torch.tensor([12.0, 16.0, 14.0, 13.0, 15.0, 11.0])
    labels = torch.zeros(6, dtype=torch.int64)
    _, stats = atkd.atkd_loss(torch.zeros(6, 50), teacher, labels, hard_ratio=0.3, return_stats=True)
    assert stats._fields[4] == "margin"
    assert torch.equal(stats.uncertainty[1:3] == 1, torch.tensor([True, True]))
    assert stats.hard.tolist() == [False, True, False, False, True, False]
    assert torch.equal(atkd.select_hard(stats.margin, 0.3), stats.hard)
    assert not torch.equal(atkd.select_hard(stats.uncertainty, 0.3), stats.hard)
    exact = torch.tensor([17.2, 17.45])
    assert (1 / (1 + torch.exp(-exact.double()))).float().tolist()[1] == 1.0
    assert (1 / (1 + torch.exp(-exact.double()))).float().tolist()[0] < 1.0


def test_compiled():
    student, teacher, labels = batch(4, 8, 30)
    valid = labels != -100

    def step(student, teacher, labels, ratio):
        margins = atkd.teacher_margins(teacher, labels)
        hard = atkd.select_hard(margins, ratio, valid=labels != -100)
        loss, stats = atkd.atkd_loss(student, teacher, labels, hard=hard, return_stats=True)
        return loss, stats.margin, hard

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    # An old PyTorch compiles each float anew, of which there may be eight.
    floats = 12 if hasattr(symbolic_shapes, "has_static_value") else 3
    for i in range(12):
        ratio = 0.1 + 0.05 * i
        for arguments in ((ratio,), (torch.tensor(ratio),))[0 if i < floats else 1 :]:
            logits = student.clone().requires_grad_()
            loss, margins, hard = compiled(logits, teacher, labels, *arguments)
            loss.backward()
            direct = student.clone().requires_grad_()
            expected = atkd.atkd_loss(direct, teacher, labels, hard_ratio=float(arguments[0]))
            expected.backward()
            assert bits_equal(loss, expected) and bits_equal(logits.grad, direct.grad)
            assert torch.equal(hard, atkd.select_hard(margins, float(arguments[0]), valid=valid))


def test_operators():
    student, teacher, labels = batch(4, 8, 30)
    hard = labels % 2 == 0
    margins, valid, offsets = torch.randn(4, 8), labels != -100, torch.tensor([0, 9, 32])
    for arguments in ((margins, None, None, 0.5), (margins, valid, offsets, 0.5)):
        torch.library.opcheck(torch.ops.atkd.select_hard.default, arguments)
    torch.library.opcheck(torch.ops.atkd.teacher_margins.default, (teacher, labels, None, None, *SETTINGS))
    arguments = (student.requires_grad_(), teacher, labels, None, hard, None, None, True, False, None, *SETTINGS)
    torch.library.opcheck(torch.ops.atkd.loss.default, arguments)


def test_wrong_arguments():
    student, teacher, labels = batch(4, 8, 30)
    mask, margins = torch.ones(4, 8, dtype=torch.bool), torch.randn(4, 8)
    offsets = torch.tensor([0, 9, 32])

    def loss(hard):
        return lambda: atkd.atkd_loss(student, teacher, labels, hard=hard)

    def select(ratio=0.5, margins=margins, **more):
        return lambda: atkd.select_hard(margins, ratio, **more)

    def margins_of(*arguments, **more):
        return lambda: atkd.teacher_margins(*arguments, **more)

    for call, kind, words in [
        (loss(mask[:3]), ValueError, r"hard is \[3, 8\], but must be \[4, 8\]"),
        (loss(mask.float()), TypeError, "hard is torch.float32, but must be torch.bool"),
        (loss(mask.to("meta")), ValueError, "student_logits are on cpu, but hard on meta"),
        (loss([True]), TypeError, "hard is a list"),
        (select(1.5), ValueError, "hard ratio is 1.5"),
        (select(NAN), ValueError, "hard ratio is NaN"),
        (select("a"), TypeError, "hard_ratio is 'a', but must be of type float"),
        (select(None), TypeError, "hard_ratio is None, but must be of type float"),
        (select(margins=margins.double()), TypeError, "margins are torch.float64, but must be torch.float32"),
        (select(margins=margins.tolist()), TypeError, "margins are a list"),
        (select(valid=mask[0]), ValueError, r"valid is \[8\], but must be \[4, 8\]"),
        (select(valid=mask.int()), TypeError, "valid is torch.int32"),
        (select(valid=mask.to("meta")), ValueError, "margins are on cpu, but valid on meta"),
        (select(cu_seqlens=offsets.float()), TypeError, "cu_seqlens are torch.float32"),
        (select(cu_seqlens=offsets[None]), ValueError, r"cu_seqlens are \[1, 3\]"),
        (select(cu_seqlens=offsets[:0]), ValueError, r"cu_seqlens are \[0\]"),
        (select(cu_seqlens=offsets[:2]), ValueError, "sequence offset 1 is 9"),
        (select(cu_seqlens=torch.tensor([0, -1, 32])), ValueError, "offset 1"),
        (margins_of(teacher), ValueError, "labels are None"),
        (margins_of(teacher, labels[0]), ValueError, r"labels are \[8\]"),
        (margins_of(teacher.long(), labels), TypeError, "teacher_logits are torch.int64"),
        (margins_of(teacher, labels, target="both"), ValueError, 'target is "both"'),
        (margins_of(teacher, labels, temperature=0.0), ValueError, "temperature is 0"),
        (margins_of(teacher, labels, temperature="2"), TypeError, "temperature is '2', but must be of type float"),
        (lambda: atkd.token_entropies(teacher, temperature="2"), TypeError, "temperature is '2', but must be of type"),
        (margins_of(teacher, labels.clamp(min=0) + 30), ValueError, "label of token 0 is"),
        (margins_of(teacher.to("meta"), labels), ValueError, "teacher_logits are on meta"),
    ]:
        with pytest.raises(kind, match=words):
            call()


def example():
    spec = importlib.util.spec_from_file_location("accumulate", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("micro_batches", [2, 5, 16])
def test_accumulation(micro_batches):
    within, over_all = example().distances(micro_batches)
    assert over_all < 1e-6 < 0.05 < within


def rank(index, ranks, file, results):
    """The gradients of a rank's part of a batch, added up over all: selected within each, and over all of them."""
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=index, world_size=ranks)
    torch.set_num_threads(1)
    accumulate = example()
    student, teacher, tokens, labels = accumulate.batch()
    ends = [0, 4, len(tokens)]
    if ranks == 3:
        # One without any valid token.
        ends = [0, 4, len(tokens) - 2, len(tokens)]
        labels[-2:] = -100
    num_items = (labels != -100).sum()
    own = slice(ends[index], ends[index + 1])
    # The largest in two parts.
    count = 2 if index == 1 else 1
    parts = list(zip(tokens[own].chunk(count), labels[own].chunk(count)))
    found = []
    for way in (accumulate.within_parts, accumulate.over_all_parts):
        gradient = accumulate.gradient(student, way(student, teacher, parts, num_items))
        dist.all_reduce(gradient)
        found.append(gradient)
    dist.destroy_process_group()
    if index == 0:
        losses = accumulate.within_parts(student, teacher, [(tokens, labels)], num_items)
        whole = accumulate.gradient(student, losses)
        results.put([float((gradient - whole).norm() / whole.norm()) for gradient in found])


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks(ranks, tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=rank, args=(index, ranks, tmp_path / "ranks", results))
        for index in range(ranks)
    ]
    for process in processes:
        process.start()
    within, over_all = results.get(timeout=120)
    for process in processes:
        process.join(timeout=60)
    assert over_all < 1e-6 < 0.05 < within
