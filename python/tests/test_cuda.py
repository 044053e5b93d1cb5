"""CUDA tensors: against the same definitions, and what only a device has: streams, graphs, no waiting for it."""

import atkd
import pytest
import torch
from support import (
    SETTINGS,
    assert_equal_to_definitions,
    assert_gradient,
    batch,
    exactly,
    weight,
)

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device: nothing of this file was tested"
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def on_device(*shape, **arguments):
    return tuple(tensor.cuda() for tensor in batch(*shape, **arguments))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("teacher_dtype", DTYPES)
def test_every_dtype(dtype, teacher_dtype):
    assert_equal_to_definitions(*on_device(37, 1001, dtype=dtype, teacher_dtype=teacher_dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [2, 3, 4096, 32000, 50257, 128256, 262144])
def test_every_vocabulary(dtype, vocab):
    assert_equal_to_definitions(*on_device(5, vocab, dtype=dtype))


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "kl"},
        {"objective": "tkd"},
        {"hard_ratio": 0.3},
        {"temperature": 4.0, "temperature_squared": True},
        {"target": "teacher"},
        {"reduction": "sum"},
        {"num_items_in_batch": 100},
        {"ce_weight": 0.5, "kd_weight": 0.25, "temperature": 2.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("vocab", [500, 20000])
def test_every_setting(settings, vocab):
    assert_equal_to_definitions(*on_device(24, vocab), **settings)


def test_sequences_and_shifted_labels():
    data = on_device(4, 6, 300)
    assert_equal_to_definitions(*data, selection="sequence")
    assert_equal_to_definitions(*data, shift_labels=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("vocab", [101, 20001])
def test_upstream_gradient_and_strides(dtype, inplace, vocab):
    student, teacher, labels = on_device(2, 8, vocab + 3, dtype=dtype)
    student, teacher, labels = student[..., :vocab], teacher[..., :vocab], labels % vocab
    _, gradient, _ = exactly(student, teacher, labels, upstream=3.0)
    leaf = student.detach().requires_grad_()
    (3.0 * atkd.atkd_loss(leaf * 1 if inplace else leaf, teacher, labels, inplace=inplace)).backward()
    # Rounded to bfloat16 before and after the multiplication.
    error, exact = (leaf.grad.cpu().double() - gradient).abs(), gradient.abs()
    rounding = 2.0**-7 * exact if dtype == torch.bfloat16 else 0
    assert (error <= rounding + 2e-6 * exact.amax(-1, True)).all()
    assert leaf.grad.any()


def test_the_same_bits_as_again():
    data = on_device(4096, 1000, dtype=torch.bfloat16)
    results = [atkd.atkd_loss(data[0].requires_grad_(), *data[1:], return_stats=True) for _ in range(3)]
    for loss, stats in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert all(torch.equal(one, other) for one, other in zip(stats, results[0][1]))


def test_nothing_waits_for_the_device():
    student, teacher, labels = on_device(64, 1000)
    items = torch.tensor(50, device="cuda")
    module = atkd.ATKDLoss()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        leaf = student.requires_grad_()
        module(leaf, teacher, labels, num_items_in_batch=items).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    _, gradient, _ = exactly(student, teacher, labels, num_items_in_batch=50)
    assert_gradient(leaf.grad, gradient, weight(student, labels, num_items_in_batch=50))


def test_a_stream_of_the_callers():
    student, teacher, labels = on_device(256, 32000, dtype=torch.bfloat16)
    expected = atkd.atkd_loss(student, teacher, labels)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        late = torch.empty_like(student)
        torch.cuda._sleep(50_000_000)
        late.copy_(student)
        actual = atkd.atkd_loss(late, teacher, labels)
    stream.synchronize()
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("vocab", [1000, 20000])
def test_graphs(vocab):
    data = [on_device(64, vocab, dtype=torch.bfloat16, seed=seed) for seed in range(3)]
    student, teacher, labels = (tensor.clone() for tensor in data[0])
    student.requires_grad_()

    def step():
        student.grad = None
        loss = atkd.atkd_loss(student, teacher, labels)
        loss.backward()
        return loss

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    for other in data:
        with torch.no_grad():
            for to, tensor in zip((student, teacher, labels), other):
                to.copy_(tensor)
        graph.replay()
        exact, gradient, _ = exactly(*other)
        assert abs(loss.item() - exact) <= 1e-6 * abs(exact) + 2e-7
        assert_gradient(student.grad, gradient, weight(*other[::2]))


@pytest.mark.parametrize("inplace", [False, True])
def test_compile_gives_the_same_bits(inplace):
    torch._dynamo.reset()
    student, teacher, labels = on_device(2, 8, 100)
    module = atkd.ATKDLoss(shift_labels=True, inplace=inplace)

    def step(function):
        leaf = student.clone().requires_grad_()
        loss = function(leaf * 1, teacher, labels)
        loss.backward()
        return loss.detach(), leaf.grad

    compiled = torch.compile(module, fullgraph=True)
    for actual, expected in zip(step(compiled), step(module)):
        assert torch.equal(actual, expected)


def test_opcheck():
    student, teacher, labels = on_device(6, 40)
    arguments = (student.requires_grad_(), teacher, labels % 40, None, None, None, None, True, False, None, *SETTINGS)
    torch.library.opcheck(torch.ops.atkd.loss.default, arguments)


def test_autocast():
    student, teacher, labels = on_device(9, 60)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        head = student.requires_grad_() @ torch.eye(60, device="cuda")
        loss = atkd.atkd_loss(head, teacher, labels)
    assert head.dtype == torch.bfloat16 and loss.dtype == torch.float32
    loss.backward()
    assert abs(loss.item() - exactly(head, teacher, labels)[0]) <= 1e-6 * loss.item() + 2e-7


def test_peak_memory_is_the_gradient():
    student, teacher, labels = on_device(512, 32000, dtype=torch.bfloat16)
    leaf = student.clone().requires_grad_()
    for inplace, gradients in [(False, 1), (True, 0)]:
        logits = leaf * 1
        # In place the tensor becomes another node, whose gradient nobody may ask for.
        edge = torch.autograd.graph.get_gradient_edge(logits)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = atkd.atkd_loss(logits, teacher, labels, inplace=inplace)
        extra = torch.cuda.max_memory_allocated() - before
        volume = student.numel() * student.element_size()
        assert extra <= gradients * volume + 33 * 512 + 60_000 + (2 << 20)
        for upstream in (1.0, 0.5):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            (gradient,) = torch.autograd.grad(loss * upstream, edge, retain_graph=upstream == 1.0)
            kept = volume if upstream == 1.0 else 0
            assert torch.cuda.max_memory_allocated() - before <= kept + (1 << 20)
            del gradient
        del loss, logits, edge


@pytest.mark.parametrize("vocab", [1, 1001, 32000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_with_and_without_a_graph_that_is_kept(vocab, dtype):
    student, teacher, labels = on_device(6, vocab, dtype=dtype)
    loss = atkd.atkd_loss(student.requires_grad_(), teacher, labels)
    (gradient,) = torch.autograd.grad(loss, student, retain_graph=True)
    for factor, kept in [(0.25, True), (1.0, True), (0.37, True), (0.37, False)]:
        (actual,) = torch.autograd.grad(factor * loss, student, retain_graph=kept)
        factor = torch.tensor(factor, device="cuda")
        assert torch.equal(actual, (gradient.float() * factor).to(dtype))


def test_autograd_knows_that_a_gradient_was_scaled():
    student, teacher, labels = on_device(6, 1001)
    arguments = (student.requires_grad_(), teacher, labels, None, None, None, None, True, False, None, *SETTINGS)
    loss, gradient, *_ = torch.ops.atkd.loss(*arguments)
    other = torch.ones_like(gradient, requires_grad=True)
    penalty = (gradient * other).sum()
    (0.5 * loss).backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        penalty.backward()


def test_a_label_out_of_range_gives_nan():
    student, teacher, labels = on_device(8, 50)
    labels[3] = 50
    assert atkd.atkd_loss(student, teacher, labels).isnan()
    assert atkd.atkd_loss(student, teacher, labels % 50).isfinite()


def test_errors_name_the_devices():
    student, teacher, labels = on_device(8, 50)
    with pytest.raises(ValueError, match="cuda:0.*cpu"):
        atkd.atkd_loss(student, teacher.cpu(), labels)
    with pytest.raises(ValueError, match="cuda:0.*cpu"):
        atkd.atkd_loss(student, teacher, labels.cpu())


@pytest.fixture(scope="module")
def world():
    """NCCL's group of this process alone, in the place of both groups."""
    dist = torch.distributed
    if not dist.is_available() or not dist.is_nccl_available():
        pytest.skip("needs NCCL: no collective was tested on a device")
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("groups", [["vocab_group"], ["token_group"], ["vocab_group", "token_group"]], ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"divergence": "jsd", "ce_weight": 0.5, "temperature": 2.0},
        {"divergence": "reverse-kl", "target": "teacher"},
        {"reduction": "group-mean", "selection_rule": "median"},
    ],
    ids=str,
)
def test_a_world_of_one(world, groups, settings):
    student, teacher, labels = on_device(24, 5001, dtype=torch.bfloat16)
    loss, gradient, _ = exactly(student, teacher, labels, **settings)
    given = dict.fromkeys(groups, world)
    told = {}
    if "vocab_group" in groups:
        told.update(vocab_start=0, vocab_size=5001)
    if "token_group" in groups:
        told.update(token_counts=[24])
    for more in ({}, told):
        logits = student.clone().requires_grad_()
        if more:
            # Without a header nothing is waited for.
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            actual = atkd.atkd_loss(logits, teacher, labels, **given, **more, **settings)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        actual.backward()
        assert abs(actual.item() - loss) <= 1e-6 * abs(loss) + 2e-7
        assert_gradient(logits.grad, gradient, weight(student, labels, **settings))


def test_a_sharded_head_in_a_world_of_one(world):
    random = torch.Generator(device="cuda").manual_seed(0)
    hidden, weights = (torch.randn(shape, device="cuda", generator=random) for shape in [(24, 32), (701, 32)])
    labels = torch.randint(701, (24,), device="cuda", generator=random)
    results = []
    for given in ({}, {"vocab_group": world, "token_group": world}):
        leaves = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
        loss = atkd.linear_atkd_loss(*leaves, hidden.flip(0), weights, labels, chunk_tokens=8, **given)
        loss.backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-6)
