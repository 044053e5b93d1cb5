"""The loss with a teacher of which a few log-probabilities per position are known."""

import math
import pickle

import atkd
import definitions
import pytest
import torch
from support import SETTINGS, assert_gradient, batch, weight
from torch._subclasses.fake_tensor import FakeTensorMode

V = 40
TAILS = ["zero", "uniform", "bucket"]
KERNEL_TAILS = ["zero", "bucket", "sampled"]
needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device: the kernels of sparse teachers were not tested"
)
on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
# The tails of each device.
on_places = pytest.mark.parametrize(
    "device, tail",
    [
        *[("cpu", tail) for tail in [*TAILS, "sampled"]],
        *[pytest.param("cuda", tail, marks=needs_cuda) for tail in KERNEL_TAILS],
    ],
)
DIVERGENCES = ["forward-kl", "reverse-kl", "jsd", "tvd", "skew-kl", "skew-reverse-kl"]


def sparse(*shape, k=5, dtype=torch.float32, inside=None, seed=0, log_dtype=torch.float32, own=True):
    """A student, a teacher of its K likeliest tokens in random order, and labels, a quarter ignored. `inside`: labels are
    among the K, or not; else as they come. Some rows have fewer indices.
    """
    student, teacher, labels = batch(*shape, V, dtype=dtype, seed=seed)
    random = torch.Generator().manual_seed(seed + 1)
    all_log_probs = teacher.float().log_softmax(-1)
    order = all_log_probs.argsort(-1, descending=True)
    if inside is not None:
        place = torch.randint(k, shape, generator=random) if inside else torch.randint(k, V, shape, generator=random)
        labels = order.gather(-1, place[..., None])[..., 0].where(labels != -100, -100)
    shuffled = torch.rand((*shape, k), generator=random).argsort(-1)
    indices = order[..., :k].gather(-1, shuffled)
    log_probs = all_log_probs.gather(-1, indices).to(log_dtype)
    if k > 2 and inside is None:
        indices[..., ::3, 1] = -1
        log_probs[..., ::3, 1] = math.nan
    target = all_log_probs.gather(-1, labels.clamp(min=0)[..., None])[..., 0] if own else None
    return student, atkd.SparseTeacher(indices, log_probs, target), labels


def classes(student, teacher, i, target, vocab):
    """log p and log q of the classes of a token that the tail makes, and the place of the target."""
    known = {
        int(j): float(p) for j, p in zip(teacher.indices[i], teacher.log_probs[i].double()) if j >= 0
    }
    if target is None:
        target = min(known, key=lambda j: (-known[j], j))
    elif teacher.target_log_prob is not None:
        known[target] = float(teacher.target_log_prob[i])
    log_q = student.log_softmax(-1)
    columns = sorted(known)
    rest = [j for j in range(vocab) if j not in known]
    log_p = torch.full((vocab,), -math.inf, dtype=torch.float64)
    log_p[columns] = torch.tensor([known[j] for j in columns], dtype=torch.float64)
    left = math.log(max(1 - log_p.exp().sum().item(), 1e-300))
    if teacher.tail == "sampled":
        others = [j for j in columns if j != target]
        log_p[others] += math.log1p(-math.exp(known[target])) - log_p[others].logsumexp(0)
    elif teacher.tail == "zero":
        log_p = log_p - log_p.logsumexp(0)
    elif teacher.tail == "uniform":
        log_p[rest] = left - math.log(len(rest))
    elif rest:
        log_p = torch.cat([log_p[columns], torch.tensor([left], dtype=torch.float64)])
        log_q = torch.cat([log_q[columns], log_q[rest].logsumexp(0)[None]])
        return log_p, log_q, columns.index(target)
    return log_p, log_q, target


def kl(a, b):
    terms = a.exp() * (a - b)
    return terms.where(a > -math.inf, torch.zeros_like(terms)).sum()


def diverge(name, beta, p, q):
    """The divergence, where p may be 0."""

    def mixed(a, b):
        return torch.logaddexp(a + math.log(beta), b + math.log(1 - beta))

    return {
        "forward-kl": lambda: kl(p, q),
        "reverse-kl": lambda: kl(q, p),
        "jsd": lambda: beta * kl(p, mixed(p, q)) + (1 - beta) * kl(q, mixed(p, q)),
        "tvd": lambda: (p.exp() - q.exp()).abs().sum() / 2,
        "skew-kl": lambda: kl(p, mixed(p, q)),
        "skew-reverse-kl": lambda: kl(q, mixed(q, p)),
    }[name]()


def halves(log_p, target):
    others = torch.cat([log_p[:target], log_p[target + 1 :]])
    rest = others.logsumexp(0)
    return torch.stack([log_p[target], rest]), others - rest


def oracle(student, teacher, labels, upstream=1.0, weights=None, vocab=V, **settings):
    """Loss, gradient and terms of each token in float64, class by class."""
    given = dict(
        lam=0.2, hard_ratio=0.5, temperature=1.0, temperature_squared=False, objective="atkd", target="label",
        reduction="mean", ce_weight=0.0, kd_weight=1.0, divergence="forward-kl", beta=0.5, selection_rule="top-k",
    )  # fmt: skip
    assert settings.keys() <= given.keys(), settings
    s = {**given, **settings}
    shape = student.shape[:-1]
    leaf = student.detach().double().reshape(-1, student.shape[-1]).requires_grad_()
    flat = teacher._replace(
        indices=teacher.indices.flatten(0, -2),
        log_probs=teacher.log_probs.flatten(0, -2),
        target_log_prob=None if teacher.target_log_prob is None else teacher.target_log_prob.flatten(),
    )
    valid = [i for i, label in enumerate(labels.flatten().tolist()) if label != -100]
    tkd, dkd, plain, ce, margin = [], [], [], [], []
    for i in valid:
        target = None if s["target"] == "teacher" else int(labels.flatten()[i])
        log_p, log_q, at = classes(leaf[i, :vocab] / s["temperature"], flat, i, target, vocab)
        (p, p_hat), (q, q_hat) = halves(log_p, at), halves(log_q, at)
        of = s["divergence"], s["beta"]
        tkd.append(diverge(*of, p, q))
        dkd.append(diverge(*of, p_hat, q_hat))
        plain.append(diverge(*of, log_p, log_q))
        _, log_q, at = classes(leaf[i, :vocab], flat, i, target, vocab)
        ce.append(-log_q[at])
        margin.append(p[1] - p[0])
    tkd, dkd, plain, ce, margin = (torch.stack(each) for each in (tkd, dkd, plain, ce, margin))
    by_rule = definitions.from_median if s["selection_rule"] == "median" else None
    hard = by_rule(margin) if by_rule else definitions.select(margin, s["hard_ratio"])
    kd = {
        "atkd": torch.where(hard, (1 - s["lam"]) * (tkd + dkd), s["lam"] * dkd),
        "plain": plain,
        "kl": plain,
        "tkd": tkd,
        "dkd": dkd,
    }[s["objective"]] * s["kd_weight"]
    if s["temperature_squared"]:
        kd = kd * s["temperature"] ** 2
    ce = s["ce_weight"] * ce
    if weights is not None:
        of_valid = weights.double().flatten()[valid]
        kd, ce = kd * of_valid, ce * of_valid
    loss = (kd + ce).sum()
    if s["reduction"] == "mean":
        loss = loss / len(valid)
    elif s["reduction"] == "group-mean":
        loss = sum(kd[group].sum() / max(int(group.sum()), 1) for group in (hard, ~hard)) + ce.mean()
    (gradient,) = torch.autograd.grad(upstream * loss, leaf)

    def put_back(values):
        return torch.zeros(shape, dtype=values.dtype).masked_scatter(labels != -100, values.detach())

    terms = {"uncertainty": put_back(margin.sigmoid()), "tkd": put_back(tkd), "dkd": put_back(dkd)}
    return loss.item(), gradient.view(student.shape), {**terms, "hard": put_back(hard)}


def moved(value, device):
    return value.to(device) if isinstance(value, torch.Tensor) else value


def teacher_on(device, teacher):
    return atkd.SparseTeacher(*[moved(each, device) for each in teacher])


def run(student, teacher, labels, device="cpu", **keywords):
    """The loss, the gradient and the terms, which are computed on the device and moved to the CPU."""
    leaf = student.detach().to(device, copy=True).requires_grad_()
    teacher = teacher_on(device, teacher)
    loss, stats = atkd.sparse_atkd_loss(
        leaf,
        teacher.indices,
        teacher.log_probs,
        labels.to(device),
        target_log_prob=teacher.target_log_prob,
        tail=teacher.tail,
        return_stats=True,
        **{name: moved(value, device) for name, value in keywords.items()},
    )
    loss.backward()
    return loss.detach().cpu(), leaf.grad.cpu(), type(stats)(*[each.cpu() for each in stats])


def assert_equal_to_oracle(student, teacher, labels, device="cpu", **settings):
    exact, exact_gradient, terms = oracle(student, teacher, labels, **settings)
    loss, gradient, stats = run(student, teacher, labels, device, **settings)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert abs(loss.item() - exact) <= 1e-6 * abs(exact) + 2e-7, (loss.item(), exact)
    assert gradient.dtype == student.dtype
    assert_gradient(gradient, exact_gradient, weight(student, labels, **settings))
    assert torch.equal(stats.hard, terms.pop("hard"))
    unknown = settings.get("objective") == "plain" and settings["divergence"] not in ("forward-kl", "reverse-kl")
    for name, values in terms.items():
        actual = getattr(stats, name).double()
        if unknown and name != "uncertainty":
            assert actual[labels != -100].isnan().all()
        else:
            near = (actual - values).abs() <= 2e-6 * (1 + values.abs())
            # DKD by reverse KL and tail zero is infinite.
            assert (near | (actual == values)).all(), name


@on_places
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("objective", ["atkd", "plain", "tkd", "dkd"])
def test_every_divergence(device, tail, divergence, objective):
    if tail == "zero" and divergence == "reverse-kl" and objective != "tkd":
        pytest.skip("infinite")
    if tail == "sampled" and divergence != "forward-kl":
        pytest.skip("an error, but for tkd")
    student, teacher, labels = sparse(13, k=6)
    settings = {"divergence": divergence, "objective": objective, "beta": 0.3}
    assert_equal_to_oracle(student, teacher._replace(tail=tail), labels, device, **settings)


@on_places
@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 2.5, "temperature_squared": True},
        {"temperature": 0.5, "ce_weight": 0.7, "kd_weight": 0.4},
        {"reduction": "sum", "lam": 0.6, "hard_ratio": 0.3},
        {"reduction": "group-mean", "selection_rule": "median", "ce_weight": 0.5},
        {"target": "teacher", "ce_weight": 0.5},
        {"objective": "kl"},
    ],
    ids=str,
)
def test_every_setting(device, tail, settings):
    if tail == "sampled" and "target" in settings:
        pytest.skip("an error: draws have the label's probability")
    student, teacher, labels = sparse(2, 7, k=6)
    assert_equal_to_oracle(student, teacher._replace(tail=tail), labels, device, **settings)


@on_places
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("k", [1, 4])
def test_targets_inside_and_outside_of_the_k(device, tail, inside, k):
    student, teacher, labels = sparse(11, k=k, inside=inside)
    teacher = teacher._replace(tail=tail)
    if tail == "sampled" and inside and k == 1:
        pytest.skip("an error: there is no draw but the target")
    if not (tail == "zero" and inside and k == 1):
        assert_equal_to_oracle(student, teacher, labels, device)
    if inside and tail != "sampled":
        # Among the K it needs no log-probability of its own.
        alone = teacher._replace(target_log_prob=None)
        for one, other in zip(run(student, teacher, labels, device), run(student, alone, labels, device)):
            assert all(torch.equal(a, b) for a, b in zip(one, other)) if isinstance(one, tuple) else torch.equal(one, other)


@on_devices
def test_the_log_probability_of_a_target_counts_instead_of_its_own_among_the_k(device):
    student, teacher, labels = sparse(9, inside=True)
    teacher = teacher._replace(target_log_prob=teacher.target_log_prob - 0.5)
    assert_equal_to_oracle(student, teacher, labels, device)


@on_places
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("log_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(device, tail, dtype, log_dtype):
    student, teacher, labels = sparse(11, k=3, dtype=dtype, log_dtype=log_dtype)
    teacher = teacher._replace(tail=tail, indices=teacher.indices.int())
    if tail != "zero":
        known = teacher.log_probs.double().exp().where(teacher.indices >= 0, 0).sum(-1)
        labels[known > 0.97] = -100
    assert (labels != -100).sum() > 4
    assert_equal_to_oracle(student, teacher, labels, device)


@on_devices
def test_target_log_prob_of_other_dtypes(device):
    student, teacher, labels = sparse(9)
    for dtype in [torch.float64, torch.bfloat16]:
        converted = teacher._replace(target_log_prob=teacher.target_log_prob.to(dtype))
        same = teacher._replace(target_log_prob=converted.target_log_prob.float())
        assert torch.equal(run(student, converted, labels, device)[1], run(student, same, labels, device)[1])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, "0.01"), (torch.bfloat16, "0.03")])
def test_the_mass_may_be_off_by_the_wider_rounding(dtype, tolerance):
    """That of the target, too, though the others are in float32."""
    student, teacher, labels = sparse(9, k=V)
    labels[:] = 3
    target = torch.full((9,), -0.25)
    others = torch.arange(V)[torch.arange(V) != 3].expand(9, -1)
    rest = (1 - target.exp()) * 1.002
    log_probs = (rest / (V - 1)).log()[:, None].expand(9, V - 1).contiguous()
    given = atkd.SparseTeacher(others, log_probs, target.to(dtype))
    for tail in TAILS:
        assert run(student, given._replace(tail=tail), labels)[0].isfinite()
    with pytest.raises(ValueError, match="more than the 0.0001 that rounding to f32|more than the 0.0001 that rounding to F32"):
        run(student, given._replace(target_log_prob=target), labels)
    with pytest.raises(ValueError, match=f"token 0 add up to 1.1.*more than the {tolerance} that rounding to"):
        run(student, given._replace(log_probs=log_probs + 0.5), labels)
    assert atkd.teacher_margins(given, labels).isfinite().all()


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("settings", [{}, {"objective": "plain", "divergence": "jsd"}, {"divergence": "tvd"}], ids=str)
def test_all_log_probabilities_are_the_logits(tail, settings):
    student, logits, labels = batch(2, 6, V)
    log_probs = logits.double().log_softmax(-1).float()
    indices = torch.arange(V).expand(2, 6, V).flip(-1)
    teacher = atkd.SparseTeacher(indices, log_probs.flip(-1), tail=tail)
    loss, gradient, stats = run(student, teacher, labels, **settings)
    leaf = student.clone().requires_grad_()
    dense, dense_stats = atkd.atkd_loss(leaf, logits, labels, return_stats=True, **settings)
    dense.backward()
    torch.testing.assert_close(loss, dense.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-4, atol=1e-6)
    assert torch.equal(stats.hard, dense_stats.hard)


def test_gradcheck():
    """The gradient against differences of the loss."""
    student, teacher, labels = sparse(5, k=4, seed=3)
    for tail in TAILS:
        _, gradient, stats = run(student, teacher._replace(tail=tail), labels, reduction="sum")
        direction = torch.randn(student.shape, generator=torch.Generator().manual_seed(1))
        step = 1e-2 * direction
        hard = {"hard": stats.hard, "reduction": "sum"}
        ends = [run(student + sign * step, teacher._replace(tail=tail), labels, **hard)[0] for sign in (1, -1)]
        slope = (gradient * direction).sum().item()
        assert ends[0] - ends[1] == pytest.approx(2e-2 * slope, rel=2e-3, abs=2e-5)


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_upstream_gradient(dtype, device):
    student, teacher, labels = sparse(9, dtype=dtype)
    _, exact, _ = oracle(student, teacher, labels, upstream=4.0)
    leaf, given = student.to(device, copy=True).requires_grad_(), teacher_on(device, teacher)
    parts = given.indices, given.log_probs, labels.to(device)
    (4 * atkd.sparse_atkd_loss(leaf, *parts, target_log_prob=given.target_log_prob)).backward()
    assert_gradient(leaf.grad, exact, 4 * weight(student, labels))


@on_devices
def test_weights_and_temperatures_of_tokens(device):
    student, teacher, labels = sparse(2, 6)
    weights = torch.rand(2, 6) + 0.1
    exact, exact_gradient, _ = oracle(student, teacher, labels, weights=weights)
    loss, gradient, _ = run(student, teacher, labels, device, token_weights=weights)
    assert loss.item() == pytest.approx(exact, rel=2e-6)
    assert_gradient(gradient, exact_gradient, weight(student, labels))
    same = run(student, teacher, labels, device, temperature=torch.full((2, 6), 2.0))
    assert torch.equal(same[1], run(student, teacher, labels, device, temperature=2.0)[1])


@on_devices
def test_losses_of_tokens(device):
    student, teacher, labels = sparse(2, 6)
    given, labels = teacher_on(device, teacher), labels.to(device)
    arguments = given.indices, given.log_probs, labels
    leaf = student.to(device, copy=True).requires_grad_()
    losses = atkd.sparse_atkd_loss(leaf, *arguments, target_log_prob=given.target_log_prob, reduction="none")
    assert losses.shape == labels.shape and not losses[labels == -100].any()
    upstream = torch.rand(2, 6).to(device)
    losses.backward(upstream)
    total, gradient, _ = run(student, teacher, labels, device, reduction="sum", token_weights=upstream)
    assert torch.equal(leaf.grad.cpu(), gradient)
    assert (losses * upstream).sum().item() == pytest.approx(total.item(), rel=1e-6)


def test_micro_batches():
    student, teacher, labels = sparse(12)
    whole, gradient, stats = run(student, teacher, labels)
    margins = atkd.teacher_margins(teacher, labels)
    assert torch.equal(margins, stats.margin)
    hard = atkd.select_hard(margins, 0.5, valid=labels != -100)
    assert torch.equal(hard, stats.hard)
    parts = [slice(0, 5), slice(5, 12)]
    items = {"num_items_in_batch": (labels != -100).sum()}
    of_parts = [run(student[at], teacher.at(at), labels[at], hard=hard[at], **items) for at in parts]
    assert torch.equal(torch.cat([each[1] for each in of_parts]), gradient)
    assert sum(each[0] for each in of_parts).item() == pytest.approx(whole.item(), rel=1e-6)


@pytest.mark.parametrize("tail", TAILS)
def test_margins(tail):
    student, teacher, labels = sparse(3, 4)
    teacher = teacher._replace(tail=tail)
    for settings in [{}, {"target": "teacher"}, {"shift_labels": True}]:
        given = shifted_back(labels) if "shift_labels" in settings else labels
        _, _, stats = run(student, teacher, given, **settings)
        assert torch.equal(atkd.teacher_margins(teacher, given, vocab_size=V, **settings), stats.margin)
    assert (stats.margin[labels == -100] == -math.inf).all()
    unlabelled = atkd.teacher_margins(teacher, target="teacher")
    assert unlabelled.shape == (3, 4) and unlabelled.isfinite().all()
    other = atkd.teacher_margins(teacher, labels, temperature=3.0)
    assert torch.equal(other, atkd.teacher_margins(teacher, labels))


def shifted_back(labels):
    """Labels as a causal model has them, whose shift gives these but for the last position."""
    return torch.nn.functional.pad(labels[..., :-1], (1, 0), value=-100)


@on_devices
def test_shifted_labels(device):
    student, teacher, labels = sparse(2, 7)
    labels[:, -1] = -100
    causal = shifted_back(labels)
    # What is at the last position is not looked at.
    teacher.indices[:, -1] = V + 7
    teacher.target_log_prob[:, -1] = math.nan
    expected = run(student, teacher, labels, device)
    loss, gradient, stats = run(student, teacher, causal, device, shift_labels=True)
    assert torch.equal(loss, expected[0]) and torch.equal(gradient, expected[1])
    assert torch.equal(stats.hard, expected[2].hard)
    assert not gradient[:, -1].any()


@on_devices
def test_sequences(device):
    student, teacher, labels = sparse(3, 6)
    _, _, stats = run(student, teacher, labels, device, selection="sequence")
    for i in range(3):
        valid = labels[i] != -100
        expected = atkd.select_hard(stats.margin[i], 0.5, valid=valid)
        assert torch.equal(stats.hard[i], expected)


@on_places
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_place(dtype, device, tail):
    student, teacher, labels = sparse(2, 6, dtype=dtype)
    teacher = teacher._replace(tail=tail)
    _, expected, _ = run(student, teacher, labels, device)
    leaf, teacher = student.to(device, copy=True).requires_grad_(), teacher_on(device, teacher)
    logits = leaf * 1
    parts = teacher.indices, teacher.log_probs, labels.to(device)
    loss = atkd.sparse_atkd_loss(logits, *parts, target_log_prob=teacher.target_log_prob, tail=tail, inplace=True)
    assert torch.equal(logits.detach().cpu(), expected)
    loss.backward()
    assert torch.equal(leaf.grad.cpu(), expected)
    with pytest.raises(ValueError, match="leaf"):
        atkd.sparse_atkd_loss(leaf, *parts, target_log_prob=teacher.target_log_prob, inplace=True)


@on_devices
def test_padded_columns(device):
    student, teacher, labels = sparse(9)
    expected = run(student, teacher, labels, device)
    padded = torch.nn.functional.pad(student, (0, 5), value=50.0)
    loss, gradient, _ = run(padded, teacher, labels, device, vocab_size=V)
    # On a device sums follow the alignment of the rows, which the padding changes.
    allowed = {"rtol": 0.0, "atol": 0.0} if device == "cpu" else {"rtol": 2e-6, "atol": 2e-7}
    torch.testing.assert_close(loss, expected[0], **allowed)
    torch.testing.assert_close(gradient[:, :V], expected[1], **allowed)
    assert not gradient[:, V:].any()
    with pytest.raises(ValueError, match=f"below the vocabulary size {V - 1}"):
        run(student, teacher._replace(indices=teacher.indices.clamp(min=V - 1)), labels, vocab_size=V - 1)


@on_devices
def test_strided_rows(device):
    student, teacher, labels = sparse(4, 6)
    turned = atkd.SparseTeacher(*[each.transpose(0, 1).contiguous().transpose(0, 1) for each in teacher[:3]])
    for one, other in zip(run(student, teacher, labels, device)[:2], run(student, turned, labels, device)[:2]):
        assert torch.equal(one, other)


@on_devices
def test_no_tokens(device):
    student, labels = torch.zeros(0, V), torch.zeros(0, dtype=torch.int64)
    teacher = atkd.SparseTeacher(torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 3))
    loss, gradient, _ = run(student, teacher, labels, device)
    assert loss == 0 and gradient.shape == (0, V)
    assert atkd.teacher_margins(teacher, labels).shape == (0,)


def drawn_gradients(student, logits, labels, draws, runs, tail="sampled", **settings):
    """The gradients of so many batches of draws, `[runs, tokens, V]`, in one call."""
    random = torch.Generator().manual_seed(7)
    many = [each.repeat(runs, *[1] * (each.dim() - 1)) for each in (student, logits, labels)]
    teacher = atkd.SparseTeacher.sample(many[1], many[2], draws, temperature=settings.get("temperature", 1.0), generator=random)
    settings = {"reduction": "sum", **settings}
    if "hard" in settings:
        settings["hard"] = settings["hard"].repeat(runs)
    _, gradient, _ = run(many[0], teacher._replace(tail=tail), many[2], **settings)
    return gradient.view(runs, *student.shape).double()


def dense_gradient(student, logits, labels, **settings):
    """In float64, from the definitions."""
    leaf = student.double().requires_grad_()
    t = settings.get("temperature", 1.0)
    log_p, log_q = ((x / t).log_softmax(-1) for x in (logits.double(), leaf))
    loss = 0.0
    for i, label in enumerate(labels.tolist()):
        if label == -100:
            continue
        (p, p_hat), (q, q_hat) = (halves(x[i], label) for x in (log_p, log_q))
        tkd, dkd = kl(p, q), kl(p_hat, q_hat)
        if settings.get("objective") == "kl":
            loss = loss + kl(log_p[i], log_q[i])
        else:
            loss = loss + (0.8 * (tkd + dkd) if settings["hard"][i] else 0.2 * dkd)
        loss = loss - settings.get("ce_weight", 0.0) * leaf[i].log_softmax(-1)[label]
    return torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize(
    "settings",
    [{"objective": "kl"}, {"hard": torch.tensor([True, False, True, False, True])}, {"objective": "kl", "temperature": 2.0, "ce_weight": 0.5}],
    ids=str,
)
def test_draws_are_unbiased(settings):
    """The mean of many gradients is the dense one, within 4.5 of its own standard deviations (1 of 200 elements is farther in
    one of 700 tests); that of the renormalised likeliest tokens is not.
    """
    student, logits, labels = batch(5, V, spread=2.0)
    labels[0] = logits[0].argmax()
    runs, draws = 4000, 6
    found = drawn_gradients(student, logits, labels, draws, runs, **settings)
    exact = dense_gradient(student, logits, labels, **settings)

    def distance(mean, deviation):
        return ((mean - exact).abs() / (deviation + 1e-6 * exact.abs().max())).max()

    deviation = found.std(0) / math.sqrt(runs)
    assert deviation.max() > 1e-4
    assert distance(found.mean(0), deviation) < 4.5
    log_p = (logits.double() / settings.get("temperature", 1.0)).log_softmax(-1)
    values, indices = log_p.topk(draws)
    own = log_p.gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    likeliest = atkd.SparseTeacher(indices, values.float(), own, "zero")
    _, gradient, _ = run(student, likeliest, labels, reduction="sum", **settings)
    assert distance(gradient, deviation) > 45


def test_draws_have_the_exact_target_and_less_variance_than_independent_ones():
    student, logits, labels = batch(3, 4, V)
    teacher = atkd.SparseTeacher.sample(logits, labels, 12)
    assert teacher.tail == "sampled" and teacher.indices.shape == (3, 4, 12) and teacher.indices.dtype == torch.int32
    log_p = logits.double().log_softmax(-1)
    valid = labels != -100
    own = log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    assert torch.allclose(teacher.target_log_prob[valid].double(), own[valid], atol=1e-6)
    assert (teacher.indices[~valid] == -1).all()
    assert not (teacher.indices == labels[..., None]).any()
    there = teacher.indices >= 0
    mass = teacher.log_probs.double().exp().where(there, 0).sum(-1) + own.exp()
    assert torch.allclose(mass[valid], torch.ones_like(mass[valid]), atol=1e-6)
    # Each token is drawn as often as its probability says, rounded.
    others = log_p.exp() / (1 - own.exp())[..., None]
    expected = 12 * others.gather(-1, teacher.indices.clamp(min=0).long())
    counts = 12 * teacher.log_probs.double().exp() / (1 - own.exp())[..., None]
    assert ((counts - expected).abs() < 1 + 1e-5)[there].all()
    # What the writer of a cache takes.
    assert torch.equal(atkd.teacher_margins(teacher, labels), atkd.teacher_margins(teacher._replace(tail="bucket"), labels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draws_at_the_edges(dtype):
    logits = torch.full((4, 5), -math.inf, dtype=dtype)
    logits[0, 2] = 1.0
    logits[1, [2, 4]] = 80.0
    logits[2, [0, 1]] = torch.tensor([100.0, -100.0], dtype=dtype)
    logits[3] = math.nan
    labels = torch.tensor([2, 2, 0, -100])
    for seed in range(20):
        teacher = atkd.SparseTeacher.sample(logits, labels, 7, generator=torch.Generator().manual_seed(seed))
        assert teacher.indices[:, 0].tolist() == [-1, 4, 1, -1] and (teacher.indices[:, 1:] == -1).all()
        assert teacher.target_log_prob[0] == 0 and teacher.target_log_prob[2] == 0
        assert teacher.log_probs[2, 0].item() == pytest.approx(-200, rel=1e-6)
        loss, gradient, _ = run(torch.zeros(4, 5), teacher, labels)
        assert loss.isfinite() and gradient.isfinite().all()
    padded = torch.nn.functional.pad(logits, (0, 3), value=90.0)
    again = atkd.SparseTeacher.sample(padded, labels, 7, vocab_size=5)
    assert torch.equal(again.indices, teacher.indices)
    empty = atkd.SparseTeacher.sample(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), 3)
    assert empty.indices.shape == (0, 3)


def test_draws_in_other_ways(tmp_path):
    """Counts as weights, a cache, the fused head, and what raises."""
    student, logits, labels = batch(9, V)
    teacher = atkd.SparseTeacher.sample(logits, labels, 20)
    expected = run(student, teacher, labels)
    shifted = teacher._replace(log_probs=teacher.log_probs + 4.0)
    for one, other in zip(expected[:2], run(student, shifted, labels)[:2]):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    with atkd.TeacherCacheWriter(tmp_path / "cache", vocab_size=V, top_k=20) as writer:
        writer.write_rows(*teacher[:3], labels)
    rows = atkd.TeacherCache(tmp_path / "cache")[:]
    kept = atkd.SparseTeacher(rows.indices, rows.log_probs, rows.target_log_prob, "sampled")
    loss, gradient, stats = run(student, kept, rows.labels)
    assert torch.equal(stats.hard, expected[2].hard) and torch.equal(stats.margin, expected[2].margin)
    torch.testing.assert_close(gradient, expected[1], rtol=1e-2, atol=1e-4)
    with pytest.raises(ValueError, match="by forward KL alone"):
        run(student, teacher, labels, divergence="jsd")
    with pytest.raises(ValueError, match="give the targets' log-probabilities"):
        run(student, teacher, labels, target="teacher")
    with pytest.raises(ValueError, match="give the targets' log-probabilities"):
        run(student, teacher._replace(target_log_prob=None), labels)
    none = teacher._replace(indices=torch.full_like(teacher.indices, -1))
    with pytest.raises(ValueError, match="token . has no draw but its target, whose log-probability is -"):
        run(student, none, labels)
    sample = atkd.SparseTeacher.sample
    for error, message, arguments in [
        (TypeError, "teacher_logits are torch.int64", (logits.long(), labels, 3)),
        (TypeError, "labels are torch.float32", (logits, labels.float(), 3)),
        (ValueError, r"labels \[8\]", (logits, labels[1:], 3)),
        (ValueError, "draws is 1025, but must be from 1 to 1024", (logits, labels, 1025)),
        (ValueError, f"label of token 8 is {V}", (logits, torch.tensor([*[0] * 8, V]), 3)),
        (ValueError, "teacher_logits of token 0 are NaN", (logits * math.nan, labels.clamp(min=0), 3)),
    ]:
        with pytest.raises(error, match=message):
            sample(*arguments)
    for error, message, keywords in [
        (TypeError, "draws is 2.5, but must be an integer", {"draws": 2.5}),
        (TypeError, "draws is '4', but must be an integer", {"draws": "4"}),
        (TypeError, "vocab_size is 10.5, but must be an integer", {"vocab_size": 10.5}),
        (TypeError, "ignore_index is 2.5, but must be an integer", {"ignore_index": 2.5}),
        (ValueError, r"temperature is \[9\], but must be one number", {"temperature": torch.ones(9)}),
        (TypeError, "temperature is '2', but must be a number", {"temperature": "2"}),
        (ValueError, "temperature is inf, but must be positive and finite", {"temperature": math.inf}),
        (ValueError, "temperature is 0.0, but must be positive and finite", {"temperature": torch.zeros(())}),
        (TypeError, "generator is 5, but must be a torch.Generator", {"generator": 5}),
    ]:
        with pytest.raises(error, match=message):
            sample(logits, labels, **{"draws": 3, **keywords})


def test_margins_of_draws_end_where_float32_does():
    gaps = torch.tensor([50.0, 87.0, 103.0, 106.0])
    logits, labels = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
    logits[:, 0] = gaps
    teacher = atkd.SparseTeacher.sample(logits, labels, 2)
    margins, exact = atkd.teacher_margins(teacher, labels), math.log(2) - gaps
    torch.testing.assert_close(margins[:2], exact[:2], rtol=1e-6, atol=0)
    # A process may flush what is subnormal there to 0.
    assert abs(margins[2] - exact[2]) < 0.2 or margins[2] == -math.inf
    assert margins[3] == -math.inf


def test_autocast_and_checkpointing():
    student, teacher, labels = sparse(9)
    head = torch.nn.Linear(V, V)

    def loss(x):
        parts = teacher.indices, teacher.log_probs, labels
        return atkd.sparse_atkd_loss(head(x), *parts, target_log_prob=teacher.target_log_prob)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        direct = loss(student)
        direct.backward()
        gradient, head.weight.grad = head.weight.grad, None
        kept = torch.utils.checkpoint.checkpoint(loss, student, use_reentrant=False)
        kept.backward()
    assert torch.equal(direct, kept) and torch.equal(gradient, head.weight.grad)
    with torch.no_grad():
        assert torch.equal(loss(student), loss(student)) and not loss(student).requires_grad


@pytest.mark.parametrize("keywords", [{}, {"inplace": True}, {"reduction": "none"}, {"shift_labels": True}], ids=str)
def test_compile(keywords):
    torch._dynamo.reset()
    student, teacher, labels = sparse(2, 6)

    def step(function):
        leaf = student.clone().requires_grad_()
        loss = function(leaf * 1, teacher.indices, teacher.log_probs, labels, teacher.target_log_prob)
        loss.sum().backward()
        return loss.detach(), leaf.grad

    module = atkd.SparseATKDLoss(tail="uniform", **keywords)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(step(compiled), step(module)):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("target", [True, False])
def test_opcheck(target):
    student, teacher, labels = sparse(6, inside=True, own=target)
    for with_gradient in [False, True]:
        of_tokens = labels, None, None, None, None
        arguments = (student.clone().requires_grad_(with_gradient), *teacher, *of_tokens)
        arguments = (*arguments, with_gradient, False, None, *SETTINGS)
        torch.library.opcheck(torch.ops.atkd.sparse_loss.default, arguments)
    torch.library.opcheck(torch.ops.atkd.sparse_margins.default, (*teacher, labels, None, None, *SETTINGS))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_torch_func(reduction):
    student, teacher, labels = sparse(2, 3, 5)

    def loss(student, indices, log_probs, labels, target):
        return atkd.sparse_atkd_loss(
            student, indices, log_probs, labels, target_log_prob=target, reduction=reduction
        ).sum()

    parts = teacher.indices, teacher.log_probs, labels, teacher.target_log_prob
    stacked = torch.func.vmap(torch.func.grad(loss))(student, *parts)
    for i in range(2):
        alone = student[i].clone().requires_grad_()
        loss(alone, *[part[i] for part in parts]).backward()
        assert torch.equal(stacked[i], alone.grad)
    tangent = torch.randn(student[0].shape)
    of_one = [part[0] for part in parts]
    _, slope = torch.func.jvp(lambda x: loss(x, *of_one), (student[0],), (tangent,))
    torch.testing.assert_close(slope, (stacked[0] * tangent).sum(), rtol=1e-4, atol=1e-6)


def test_teacher_gets_no_gradient():
    student, teacher, labels = sparse(9)
    log_probs = teacher.log_probs.nan_to_num().requires_grad_()
    target = teacher.target_log_prob.requires_grad_()
    run(student, teacher._replace(log_probs=log_probs, target_log_prob=target), labels)
    assert log_probs.grad is None and target.grad is None


def test_module():
    student, teacher, labels = sparse(2, 6)
    module = atkd.SparseATKDLoss(0.3, 0.4, tail="uniform", divergence="jsd", return_stats=True)
    assert "tail='uniform'" in repr(module) and "lam=0.3" in repr(module)
    copy = pickle.loads(pickle.dumps(module))
    assert copy.settings == module.settings and not module.state_dict()
    parts = teacher.indices, teacher.log_probs, labels, teacher.target_log_prob
    loss, stats = copy(student, *parts)
    expected = atkd.sparse_atkd_loss(
        student, *parts[:3], target_log_prob=parts[3], lam=0.3, hard_ratio=0.4, tail="uniform", divergence="jsd"
    )
    assert torch.equal(loss, expected) and isinstance(stats, atkd.Stats)
    warm = copy(student, *parts, temperature=torch.tensor(2.0), hard=stats.hard)[0]
    assert not torch.equal(warm, loss)


def linear(student_shape=(3, 8), h=10, dtype=torch.float32, **keywords):
    _, teacher, labels = sparse(*student_shape, **keywords)
    random = torch.Generator().manual_seed(5)
    hidden = torch.randn((*student_shape, h), generator=random).to(dtype)
    weight = torch.randn((V, h), generator=random).to(dtype)
    bias = torch.randn(V, generator=random).to(dtype)
    return hidden, weight, bias, teacher, labels


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("chunk", [None, 1, 7])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"reduction": "group-mean", "ce_weight": 0.3},
        {"selection": "sequence"},
        {"reduction": "none"},
        {"selection_rule": "median"},
        {"shift_labels": True, "reduction": "sum", "temperature": 2.0},
    ],
    ids=str,
)
def test_linear(tail, chunk, settings):
    *layer, teacher, labels = linear()
    teacher = teacher._replace(tail=tail)
    if settings.get("shift_labels"):
        labels = shifted_back(labels)

    def gradients(function):
        leaves = [each.clone().requires_grad_() for each in layer]
        loss, stats = function(*leaves)
        loss.sum().backward()
        return [loss.detach(), *[leaf.grad for leaf in leaves]], stats

    def fused(x, w, b):
        return atkd.linear_atkd_loss(
            x, w, None, None, labels, student_bias=b, teacher=teacher, chunk_tokens=chunk, return_stats=True, **settings
        )

    def unfused(x, w, b):
        logits = torch.nn.functional.linear(x, w, b)
        parts = teacher.indices, teacher.log_probs, labels
        of = {"target_log_prob": teacher.target_log_prob, "tail": tail, "return_stats": True}
        return atkd.sparse_atkd_loss(logits, *parts, **of, **settings)

    (actual, stats), (expected, expected_stats) = gradients(fused), gradients(unfused)
    assert torch.equal(stats.hard, expected_stats.hard)
    for one, other in zip(actual, expected):
        assert (one - other).abs().max() <= 2e-5 * other.abs().max()
    for one, other in zip(stats, expected_stats):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_linear_guesses_nothing(monkeypatch):
    from atkd import _head

    def fail(*_):
        raise AssertionError

    hidden, weight, _, teacher, labels = linear()
    monkeypatch.setattr(_head.Call, "_repair", fail)
    atkd.linear_atkd_loss(hidden, weight, None, None, labels, teacher=teacher, chunk_tokens=5)


def test_linear_in_other_ways():
    hidden, weight, bias, teacher, labels = linear()
    head = torch.nn.Linear(10, V)
    head.weight.data, head.bias.data = weight.clone(), bias.clone()
    expected = atkd.linear_atkd_loss(hidden, weight, None, None, labels, student_bias=bias, teacher=teacher)
    by_module = atkd.linear_atkd_loss(
        hidden, None, None, None, labels, student_head=head, teacher=teacher, vocab_size=V, chunk_tokens=4
    )
    torch.testing.assert_close(by_module.detach(), expected, rtol=1e-5, atol=1e-6)
    by_module.backward()
    assert head.weight.grad.abs().sum() > 0
    module = atkd.LinearATKDLoss(chunk_tokens=4)
    torch.testing.assert_close(
        module(hidden, weight, None, None, labels, student_bias=bias, teacher=teacher), expected, rtol=1e-5, atol=1e-6
    )
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(
        compiled(hidden, weight, None, None, labels, student_bias=bias, teacher=teacher),
        module(hidden, weight, None, None, labels, student_bias=bias, teacher=teacher),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        atkd.linear_atkd_loss(hidden, weight, None, None, labels, teacher=teacher)


@pytest.mark.parametrize("chunk", [None, 1, 5])
@pytest.mark.parametrize("settings", [{}, {"hard": torch.ones(3, 8, dtype=torch.bool)}, {"objective": "kl"}], ids=str)
@pytest.mark.parametrize("by_module", [False, True])
def test_linear_errors_have_the_batchs_token(chunk, settings, by_module):
    hidden, weight, _, teacher, labels = linear()
    labels[2, 1] = 4
    given = dict(labels=labels, chunk_tokens=chunk, **settings)
    layers = hidden, weight, None, None
    if by_module:
        head = torch.nn.Linear(10, V)
        layers, given = (hidden, None, None, None), {**given, "student_head": head, "vocab_size": V}
    for name, value, message in [
        ("indices", V, f"index 2 of the teacher's token 17 is {V},.*vocabulary size {V}"),
        ("log_probs", math.nan, "log-probability 2 of the teacher's token 17 is NaN"),
        ("target_log_prob", 0.5, "log-probability of token 17 is 0.5"),
    ]:
        changed = getattr(teacher, name).clone()
        changed[(2, 1, 2) if changed.dim() == 3 else (2, 1)] = value
        with pytest.raises(ValueError, match=message):
            atkd.linear_atkd_loss(*layers, teacher=teacher._replace(**{name: changed}), **given)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"teacher_hidden": torch.zeros(3, 8, 4)}, ValueError, "teacher_hidden is given beside a sparse teacher"),
        ({"teacher_bias": torch.zeros(V)}, ValueError, "teacher_bias is given beside"),
        ({"teacher_log_prob": torch.zeros(3, 8)}, ValueError, "teacher_log_prob.*target_log_prob"),
        ({"teacher": torch.zeros(3)}, TypeError, "teacher is a Tensor, but must be an atkd.SparseTeacher"),
        ({"teacher": None}, TypeError, "teacher_hidden are a NoneType"),
        ({"student_weight": None, "student_head": torch.nn.Linear(10, V)}, ValueError, "give vocab_size"),
        ({"vocab_group": 1}, TypeError, "vocab_group is 1, but must be"),
        ({"student_hidden": torch.zeros(3, 7, 10)}, ValueError, r"indices are \[3, 8, 5\].*\[3, 7, 10\].*\[3, 7, K\]"),
    ],
    ids=str,
)
def test_linear_errors(changes, error, message):
    hidden, weight, _, teacher, labels = linear()
    given = dict(student_hidden=hidden, student_weight=weight, teacher_hidden=None, teacher_weight=None, labels=labels)
    with pytest.raises(error, match=message):
        atkd.linear_atkd_loss(**{**given, "teacher": teacher, **changes})


def of_row(values, *shape):
    return torch.tensor(values).expand(*shape, -1).clone()


ERRORS = {
    "indices' dtype": ({"indices": torch.zeros(3, 2)}, TypeError, "indices are torch.float32"),
    "log_probs' dtype": ({"log_probs": torch.zeros(3, 2).double()}, TypeError, "log_probs are torch.float64"),
    "no tensor": ({"indices": [[1]]}, TypeError, "indices are a list"),
    "no log_probs": ({"log_probs": None}, TypeError, "log_probs are a NoneType"),
    "no mass": (
        {"log_probs": torch.full((3, 2), -math.inf), "tail": "zero"},
        ValueError,
        "of token 0, its target's among them, are all 0.*bucket or uniform",
    ),
    "nothing has the rest": (
        {"indices": of_row([*range(5)], 3), "log_probs": torch.full((3, 5), -2.0)},
        ValueError,
        "token 0 add up to 0.6766.*vocabulary of 5: nothing is left",
    ),
    "target's dtype": ({"target_log_prob": torch.zeros(3).long()}, TypeError, "target_log_prob is torch.int64"),
    "target's shape": ({"target_log_prob": torch.zeros(2)}, ValueError, r"target_log_prob is \[2\].*\[3\]"),
    "tokens": ({"indices": torch.zeros(4, 2).long()}, ValueError, r"indices are \[4, 2\].*\[3, 5\] must be \[3, K\]"),
    "dimensions": ({"indices": torch.zeros(3).long()}, ValueError, r"indices are \[3\].*\[3, K\]"),
    "K of both": ({"log_probs": torch.zeros(3, 4)}, ValueError, r"log_probs are \[3, 4\], but indices are \[3, 2\]"),
    "no K": ({"indices": torch.zeros(3, 0).long(), "log_probs": torch.zeros(3, 0)}, ValueError, "1024"),
    "large K": (
        {"indices": torch.full((3, 1025), -1), "log_probs": torch.zeros(3, 1025)},
        ValueError,
        "1025.*1024",
    ),
    "index": ({"indices": of_row([1, 5], 3)}, ValueError, "index 1 of the teacher's token 0 is 5.*vocabulary size 5"),
    "negative index": ({"indices": of_row([-2, 1], 3)}, ValueError, "token 0 is -2"),
    "twice": ({"indices": of_row([1, 1], 3)}, ValueError, "token 0 has index 1 twice, at 0 and at 1"),
    "mass": ({"log_probs": of_row([-0.1, -0.2], 3)}, ValueError, "add up to 1.72.*not logits"),
    "NaN": ({"log_probs": of_row([math.nan, -2.0], 3)}, ValueError, "log-probability 0 of the teacher's token 0 is NaN"),
    "no target": ({"indices": of_row([3, 4], 3)}, ValueError, "no probability for its target 1.*give the target's"),
    "positive target": ({"target_log_prob": torch.full((3,), 0.5)}, ValueError, "0.5"),
    "tail": ({"tail": "clamp"}, ValueError, 'tail is "clamp".*"bucket"'),
    "tail's type": ({"tail": None}, TypeError, "tail is None"),
    "reverse KL of nothing": ({"tail": "zero", "divergence": "reverse-kl"}, ValueError, "tail bucket or uniform"),
    "labels": ({"labels": torch.tensor([1, 2, 7])}, ValueError, "7"),
    "no labels": ({"labels": None}, ValueError, "labels are None"),
    "vocab_size": ({"vocab_size": 6}, ValueError, "vocab_size is 6.*1 to 5"),
    "keyword": ({"lamda": 1}, TypeError, r"sparse_atkd_loss\(\) got an unexpected keyword argument 'lamda'"),
    "tokens' group": ({"token_group": 1}, TypeError, "token_group is 1, but must be a torch.distributed.ProcessGroup"),
    "vocabulary's group": ({"vocab_group": 1}, TypeError, "vocab_group is 1, but must be"),
    "start": ({"vocab_start": 0}, ValueError, "tells of a vocab_group, and none is given"),
    "another device": ({"indices": torch.zeros(3, 2, device="meta").long()}, ValueError, "indices on meta"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    changes, error, message = ERRORS[case]
    given = dict(
        student_logits=torch.zeros(3, 5),
        indices=of_row([1, 2], 3),
        log_probs=of_row([-1.0, -2.0], 3),
        labels=torch.tensor([1, 2, 1]),
    )
    with pytest.raises(error, match=message):
        atkd.sparse_atkd_loss(**{**given, **changes})


def test_a_sparse_teacher_as_one_argument():
    student, teacher, labels = sparse(6)
    for module in [atkd.sparse_atkd_loss, atkd.SparseATKDLoss()]:
        for arguments, keywords in [((teacher,), {}), ((teacher, labels), {}), ((teacher,), {"labels": labels})]:
            with pytest.raises(TypeError, match=r"give teacher.indices, teacher.log_probs and the labels, with target_log_prob="):
                module(student, *arguments, **keywords)
    with pytest.raises(TypeError, match="log_probs are a NoneType"):
        atkd.sparse_atkd_loss(student, teacher.indices)


def test_errors_of_batches_count_all_positions():
    student, teacher, labels = sparse(2, 6)
    labels[1, 2] = 0
    teacher.indices[1, 2, 0] = V
    with pytest.raises(ValueError, match=f"teacher's token 8 is {V}"):
        run(student, teacher, labels)


def test_other_errors():
    student, teacher, labels = sparse(6)
    with pytest.raises(ValueError, match="leave vocab_group"):
        atkd.teacher_margins(teacher, labels, vocab_group=1)
    with pytest.raises(ValueError, match=r"labels are \[5\]"):
        atkd.teacher_margins(teacher, labels[:5])
    with pytest.raises(ValueError, match="vocabulary size 3"):
        atkd.teacher_margins(teacher, labels.clamp(max=2), vocab_size=3)
    with pytest.raises(TypeError, match="token_group is 1"):
        atkd.SparseATKDLoss(token_group=1)(student, *teacher[:2], labels)
    with pytest.raises(ValueError, match="tail is 'clamp'"):
        atkd.SparseATKDLoss(tail="clamp")
    with pytest.raises(RuntimeError, match="no derivative"):
        parts = teacher.indices, teacher.log_probs, labels
        leaf = student.clone().requires_grad_()
        loss = atkd.sparse_atkd_loss(leaf, *parts, target_log_prob=teacher.target_log_prob)
        torch.autograd.grad(loss, leaf, create_graph=True)


def losses_of_fakes():
    """What is called with tensors of a device that need not be there, whose values nobody reads."""
    mode = FakeTensorMode()
    with mode:
        logits = torch.empty(2, 6, V, device="cuda")
        teacher = atkd.SparseTeacher(
            torch.empty(2, 6, 5, device="cuda", dtype=torch.int64), torch.empty(2, 6, 5, device="cuda")
        )
        labels = torch.empty(2, 6, device="cuda", dtype=torch.int64)
        offsets = torch.empty(3, device="cuda", dtype=torch.int64)
        hidden, layer = torch.empty(2, 6, 8, device="cuda"), torch.empty(V, 8, device="cuda")
        return {
            "loss": lambda **keywords: atkd.sparse_atkd_loss(logits, *teacher[:2], labels, **keywords),
            "packed": lambda: atkd.sparse_atkd_loss(logits, *teacher[:2], labels, selection="sequence", cu_seqlens=offsets),
            "margins": lambda: atkd.teacher_margins(teacher, labels),
            "head": lambda: atkd.linear_atkd_loss(hidden, layer, None, None, labels, teacher=teacher),
        }, mode


@pytest.mark.parametrize("tail", KERNEL_TAILS)
def test_shapes_on_a_device(tail):
    calls, mode = losses_of_fakes()
    with mode:
        loss, stats = calls["loss"](tail=tail, return_stats=True)
    assert loss.is_cuda and loss.shape == () and loss.dtype == torch.float32
    assert all(each.is_cuda and each.shape == (2, 6) for each in stats)


@pytest.mark.parametrize(
    "call, keywords, message",
    [
        ("loss", {"tail": "uniform"}, 'student_logits are on cuda:0, but tail "uniform" is.*CPU alone.*or take tail "bucket"'),
        ("packed", {}, "margins of a sparse teacher.*CPU alone.*move all tensors there, or take.*Stats.margin"),
        ("margins", {}, "indices are on cuda:0, but the margins of a sparse teacher.*move all tensors there"),
        ("head", {}, "student_hidden are on cuda:0, but linear_atkd_loss.*move all tensors there, or give.*sparse_atkd_loss"),
    ],
)
def test_what_has_no_kernel(call, keywords, message):
    calls, mode = losses_of_fakes()
    with mode, pytest.raises(NotImplementedError, match=message):
        calls[call](**keywords)


def large(vocab, k, dtype, tokens=24):
    """A student and the K likeliest of a teacher, with every tenth token ignored, all on the CPU."""
    student, logits, labels = batch(tokens, vocab, dtype=dtype, ignored=False)
    labels[::10] = -100
    all_log_probs = logits.double().log_softmax(-1)
    log_probs, indices = all_log_probs.topk(k)
    target = all_log_probs.gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    return student, atkd.SparseTeacher(indices, log_probs.float(), target.float()), labels


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tail", KERNEL_TAILS)
@pytest.mark.parametrize("vocab, k", [(40, 40), (1001, 1), (32000, 64), (128256, 1024), (262144, 7)])
def test_every_vocabulary_is_as_on_the_cpu(dtype, tail, vocab, k):
    student, teacher, labels = large(vocab, k, dtype)
    teacher = teacher._replace(tail=tail)
    loss, gradient, stats = run(student, teacher, labels, "cuda")
    expected, exact, expected_stats = run(student, teacher, labels)
    assert loss.item() == pytest.approx(expected.item(), rel=2e-6, abs=4e-7)
    assert torch.equal(stats.hard, expected_stats.hard)
    exact = exact.double()
    # Both may be off by what the tests against the oracle allow, and by one rounding.
    rounding = 2.0**-7 * exact.abs() if dtype == torch.bfloat16 else 0
    allowed = 2e-6 * exact.abs().amax(-1, True) + 1e-6 * weight(student, labels) + rounding
    assert ((gradient.double() - exact).abs() <= allowed).all()


@needs_cuda
def test_nothing_waits_for_a_device():
    student, teacher, labels = sparse(12)
    expected = run(student, teacher, labels, "cuda")
    leaf, labels = student.cuda().requires_grad_(), labels.cuda()
    indices, log_probs, target, _ = teacher_on("cuda", teacher)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = atkd.SparseATKDLoss()(leaf, indices, log_probs, labels, target)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(loss.cpu(), expected[0]) and torch.equal(leaf.grad.cpu(), expected[1])


@needs_cuda
def test_a_stream_of_the_callers():
    student, teacher, labels = large(32000, 64, torch.bfloat16, tokens=256)
    expected, _, _ = run(student, teacher, labels, "cuda")
    student, labels, given = student.cuda(), labels.cuda(), teacher_on("cuda", teacher)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        late = torch.empty_like(student)
        torch.cuda._sleep(50_000_000)
        late.copy_(student)
        loss = atkd.sparse_atkd_loss(late, given.indices, given.log_probs, labels, target_log_prob=given.target_log_prob)
    stream.synchronize()
    assert torch.equal(loss.cpu(), expected)


@needs_cuda
def test_graphs():
    batches = [sparse(12, seed=seed) for seed in range(3)]
    student = batches[0][0].cuda().requires_grad_()
    given, labels = teacher_on("cuda", batches[0][1]), batches[0][2].cuda()

    def step():
        student.grad = None
        loss = atkd.sparse_atkd_loss(student, *given[:2], labels, target_log_prob=given.target_log_prob)
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
    for other_student, other, other_labels in batches:
        with torch.no_grad():
            for to, tensor in zip((student, labels, *given[:3]), (other_student, other_labels, *other[:3])):
                to.copy_(tensor)
        graph.replay()
        expected = run(other_student, other, other_labels, "cuda")
        assert torch.equal(loss.cpu(), expected[0]) and torch.equal(student.grad.cpu(), expected[1])


@needs_cuda
@pytest.mark.parametrize("wrong", ["index", "twice", "mass", "NaN", "label"])
def test_wrong_values_give_nan_on_a_device(wrong):
    student, teacher, labels = sparse(8, inside=True)
    expected = run(student, teacher, labels, "cuda")[0]
    indices, log_probs, changed = teacher.indices.clone(), teacher.log_probs.clone(), labels.clone()
    changed[3] = labels[labels != -100][0]
    {
        "index": lambda: indices[3].fill_(V),
        "twice": lambda: indices[3].fill_(7),
        "mass": lambda: log_probs[3].fill_(-0.1),
        "NaN": lambda: log_probs[3].fill_(math.nan),
        "label": lambda: changed[3].fill_(V),
    }[wrong]()
    given = teacher._replace(indices=indices, log_probs=log_probs)
    assert run(student, given, changed, "cuda")[0].isnan()
    assert expected.isfinite() and torch.equal(run(student, teacher, labels, "cuda")[0], expected)


@needs_cuda
def test_compile_and_opcheck_on_a_device():
    torch._dynamo.reset()
    student, teacher, labels = sparse(2, 6)
    expected = run(student, teacher, labels, "cuda")
    student, given, labels = student.cuda(), teacher_on("cuda", teacher), labels.cuda()
    compiled = torch.compile(atkd.SparseATKDLoss(), fullgraph=True, backend="aot_eager")
    leaf = student.clone().requires_grad_()
    loss = compiled(leaf, *given[:2], labels, given.target_log_prob)
    loss.backward()
    assert torch.equal(loss.detach().cpu(), expected[0]) and torch.equal(leaf.grad.cpu(), expected[1])
    arguments = (student.requires_grad_(), *given, labels, None, None, None, None, True, False, None, *SETTINGS)
    torch.library.opcheck(torch.ops.atkd.sparse_loss.default, arguments)


class Logprob:
    """What vLLM has for an entry."""

    def __init__(self, logprob, rank):
        self.logprob, self.rank, self.decoded_token = logprob, rank, f"<{rank}>"


def served(k=4, lengths=(7, 4), seed=0):
    """Sequences, a teacher's log-probabilities of each position's next token, and a student's logits."""
    random = torch.Generator().manual_seed(seed)
    token_ids = [torch.randint(V, (length,), generator=random).tolist() for length in lengths]
    log_probs = [(3 * torch.randn(length, V, generator=random)).log_softmax(-1) for length in lengths]
    student = 3 * torch.randn(len(lengths), max(lengths), V, generator=random)
    return token_ids, log_probs, student


def vllm_rows(tokens, log_probs, k):
    rows = [None]
    for s in range(1, len(tokens)):
        of_token = log_probs[s - 1]
        values, ids = of_token.topk(k)
        row = {} if s % 2 else {tokens[s]: Logprob(of_token[tokens[s]].item(), 99)}
        row.update({int(j): Logprob(p.item(), rank + 1) for rank, (p, j) in enumerate(zip(values, ids))})
        row.setdefault(tokens[s], Logprob(of_token[tokens[s]].item(), 99))
        rows.append(row)
    return rows


def sglang_rows(tokens, log_probs, k, start=0):
    tops, owns = [None], [(None, tokens[start], None)]
    for s in range(start + 1, len(tokens)):
        values, ids = log_probs[s - 1].topk(k)
        tops.append([(p.item(), int(j), None) for p, j in zip(values, ids)])
        # It replaces the last token's id, as it does those of images.
        owns.append((log_probs[s - 1][tokens[s]].item(), tokens[s] if tokens[s] < V - 1 else 0, None))
    return tops, owns


def expected_of_served(token_ids, log_probs, k, start=0):
    """By the definition: at position t what the teacher says of token t + 1, and that token."""
    found = []
    for tokens, of_sequence in zip(token_ids, log_probs):
        for t in range(start, len(tokens) - 1):
            values, ids = of_sequence[t].topk(k)
            known = {int(j): p.item() for j, p in zip(ids, values)}
            found.append((tokens[t + 1], known, of_sequence[t][tokens[t + 1]].item()))
    return found


def assert_served(rows, token_ids, expected, start=0, with_own=False):
    places = [(i, t) for i, tokens in enumerate(token_ids) for t in range(start, len(tokens) - 1)]
    longest = max(map(len, token_ids))
    assert rows.labels.shape == (len(token_ids), longest) and rows.labels.dtype == torch.int64
    assert (rows.labels != -100).nonzero().tolist() == [list(place) for place in places]
    for (i, t), (label, known, own) in zip(places, expected):
        assert rows.labels[i, t] == label
        assert rows.teacher.target_log_prob[i, t].item() == own
        pairs = zip(rows.teacher.indices[i, t].tolist(), rows.teacher.log_probs[i, t].tolist())
        actual = {j: p for j, p in pairs if j >= 0}
        assert actual == ({**known, label: own} if with_own else known)


@pytest.mark.parametrize("as_json", [False, True])
def test_from_vllm(as_json):
    token_ids, log_probs, student = served()
    given = [vllm_rows(tokens, of, 4) for tokens, of in zip(token_ids, log_probs)]
    if as_json:
        given = [
            [None if row is None else {str(j): {"logprob": p.logprob, "rank": p.rank} for j, p in row.items()} for row in of]
            for of in given
        ]
    rows = atkd.from_vllm(given, token_ids)
    assert rows.teacher.log_probs.dtype == torch.float32 and rows.teacher.tail == "bucket"
    assert_served(rows, token_ids, expected_of_served(token_ids, log_probs, 4), with_own=True)
    fewer = atkd.from_vllm(given, token_ids, top_k=2)
    assert fewer.teacher.indices.shape == (2, 7, 2)
    assert_served(fewer, token_ids, expected_of_served(token_ids, log_probs, 2))

    indices, of_k, target, _ = rows.teacher
    loss = atkd.sparse_atkd_loss(student, indices, of_k, rows.labels, target_log_prob=target)
    exact, _, _ = oracle(student, rows.teacher, rows.labels)
    assert loss.item() == pytest.approx(exact, rel=2e-6)


def test_from_vllm_with_what_was_generated():
    token_ids, log_probs, _ = served()
    given = [vllm_rows(tokens, of, 4) for tokens, of in zip(token_ids, log_probs)]
    whole = atkd.from_vllm(given, token_ids)
    # The last rows alone, without the prompt's.
    rows = atkd.from_vllm([of[3:] for of in given], token_ids)
    assert torch.equal(rows.labels[:, 2:], whole.labels[:, 2:]) and (rows.labels[:, :2] == -100).all()
    assert torch.equal(rows.teacher.target_log_prob[:, 2:], whole.teacher.target_log_prob[:, 2:])


@pytest.mark.parametrize("start", [0, 2])
def test_from_sglang(start):
    token_ids, log_probs, student = served(seed=2)
    token_ids[0][5] = V - 1
    tops, owns = zip(*[sglang_rows(tokens, of, 4, start) for tokens, of in zip(token_ids, log_probs)])
    rows = atkd.from_sglang(tops, owns, token_ids)
    assert rows.teacher.indices.shape == (2, 7, 4)
    assert_served(rows, token_ids, expected_of_served(token_ids, log_probs, 4, start), start)
    indices, of_k, target, _ = rows.teacher
    loss = atkd.sparse_atkd_loss(student, indices, of_k, rows.labels, target_log_prob=target)
    exact, _, _ = oracle(student, rows.teacher, rows.labels)
    assert loss.item() == pytest.approx(exact, rel=2e-6)


def test_servers_agree_and_their_rows_fit_causal_labels():
    token_ids, log_probs, student = served(lengths=(6, 6))
    vllm = atkd.from_vllm([vllm_rows(*each, 4) for each in zip(token_ids, log_probs)], token_ids, top_k=4)
    sglang = atkd.from_sglang(*zip(*[sglang_rows(*each, 4) for each in zip(token_ids, log_probs)]), token_ids)
    for one, other in zip([*vllm.teacher[:3], vllm.labels], [*sglang.teacher[:3], sglang.labels]):
        assert torch.equal(one, other)
    indices, of_k, target, _ = vllm.teacher
    ids = torch.tensor(token_ids)
    assert torch.equal(
        atkd.sparse_atkd_loss(student, indices, of_k, vllm.labels, target_log_prob=target),
        atkd.sparse_atkd_loss(student, indices, of_k, ids, target_log_prob=target, shift_labels=True),
    )


def test_errors_of_servers():
    token_ids, log_probs, _ = served()
    given = [vllm_rows(tokens, of, 4) for tokens, of in zip(token_ids, log_probs)]
    with pytest.raises(ValueError, match="of 2 sequences, but token_ids of 1"):
        atkd.from_vllm(given, token_ids[:1])
    with pytest.raises(ValueError, match=r"prompt_logprobs\[1\] has 7 rows.*only 4 tokens"):
        atkd.from_vllm([given[0], given[0]], token_ids)
    with pytest.raises(ValueError, match=r"prompt_logprobs\[0\] is None"):
        atkd.from_vllm([None, given[1]], token_ids)
    with pytest.raises(ValueError, match="top_k is 0"):
        atkd.from_vllm(given, token_ids, top_k=0)
    outside = next(j for j in range(V) if j not in given[0][2])
    other = [[*token_ids[0][:2], outside, *token_ids[0][3:]], token_ids[1]]
    with pytest.raises(ValueError, match=f"no entry for token 2, {outside}"):
        atkd.from_vllm(given, other)
    tops, owns = zip(*[sglang_rows(tokens, of, 4) for tokens, of in zip(token_ids, log_probs)])
    with pytest.raises(ValueError, match=f"token_ids.0. has {outside}, at 2"):
        atkd.from_sglang(tops, owns, other)
    with pytest.raises(ValueError, match=r"\[0\] has 6 rows.*\[0\] 7"):
        atkd.from_sglang([tops[0][1:], tops[1]], owns, token_ids)


def test_signature_and_settings():
    import inspect

    from atkd._sparse import SparseKeywords

    dense = inspect.signature(atkd.atkd_loss).parameters
    function = inspect.signature(atkd.sparse_atkd_loss).parameters
    assert function.keys() - dense.keys() == {"indices", "log_probs", "target_log_prob", "tail"}
    assert dense.keys() - function.keys() == {"teacher_logits"}
    keywords = {name for name in function if function[name].kind == inspect.Parameter.KEYWORD_ONLY}
    assert keywords == {*SparseKeywords.__annotations__, "return_stats"}


