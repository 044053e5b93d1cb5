"""What the ranks of test_shards.py do. Every function takes `Here` and returns something that pickles."""

import contextlib

import atkd
import torch
import torch.distributed as dist
from support import batch


def slices_of(case, group):
    """The rows and the columns that a rank has of a case."""
    rows = [sum(case.tokens[:at]) for at in (group.tokens_at, group.tokens_at + 1)]
    columns = [sum(case.columns[:at]) for at in (group.columns_at, group.columns_at + 1)]
    return slice(*rows), slice(*columns)


def per_case(here, kind, cases, run):
    """Per case what `run` returns for it and its groups; None where this rank has no part."""
    results = []
    for given in cases:
        case = kind(**given)
        group = here.groups.get(case.layout)
        results.append(None if group is None else run(case, group))
    return results


class Case:
    """A loss of random logits, and how it is split. `columns` and `tokens` are the parts of the ranks; for logits
    `[B, T, V]` the tokens are sequences.
    """

    def __init__(self, columns, tokens, length=None, dtype="float32", seed=0, spread=3.0, **others):
        self.columns, self.tokens, self.length = list(columns), list(tokens), length
        self.dtype, self.seed, self.spread = getattr(torch, dtype), seed, spread
        self.padding = others.pop("padding", 0)
        self.masks, self.ties = others.pop("masks", False), others.pop("ties", False)
        self.weights, self.temperatures = others.pop("weights", False), others.pop("temperatures", False)
        self.hard, self.told = others.pop("hard", False), others.pop("told", False)
        self.inplace, self.transposed = others.pop("inplace", False), others.pop("transposed", False)
        self.settings = others

    @property
    def layout(self):
        return len(self.columns), len(self.tokens)

    def whole(self):
        """All that a single process is given."""
        shape = (sum(self.tokens), *([self.length] if self.length else []), sum(self.columns))
        student, teacher, labels = batch(*shape, dtype=self.dtype, seed=self.seed, spread=self.spread)
        random = torch.Generator().manual_seed(self.seed + 1)
        if self.padding:
            labels = labels.clamp(max=shape[-1] - self.padding - 1)
            student[..., -self.padding :] = 50.0
            teacher[..., -self.padding :] = 60.0
        if self.ties:
            # Equal rows, and the largest logit of the teacher in several shards.
            student[2:], teacher[2:] = student[:1], teacher[:1]
            labels[2:] = labels[0] = 1
            teacher[..., [1, shape[-1] // 2, -1]] = 20.0
        if self.masks:
            allowed = torch.rand(shape, generator=random) < 0.7
            allowed.scatter_(-1, labels.clamp(min=0).unsqueeze(-1), True)
            allowed[..., :2] = True
            student, teacher = (x.masked_fill(~allowed, -torch.inf) for x in (student, teacher))
        given = dict(self.settings)
        tokens = labels.shape
        if self.weights:
            given["token_weights"] = torch.rand(tokens, generator=random) * 2
        if self.temperatures:
            given["temperature"] = torch.rand(tokens, generator=random) + 0.5
        if self.hard:
            given["hard"] = torch.rand(tokens, generator=random) < 0.4
        if self.padding:
            given["vocab_size"] = shape[-1] - self.padding
        return student, teacher, labels, given

    def part(self, group):
        """A rank's columns and tokens."""
        student, teacher, labels, given = self.whole()
        rows, columns = slices_of(self, group)
        given = {
            name: value[rows] if isinstance(value, torch.Tensor) and value.dim() else value
            for name, value in given.items()
        }
        given.update(vocab_group=group.vocabulary, token_group=group.tokens)
        if self.told:
            tokens = [each * (self.length or 1) for each in self.tokens]
            given.update(vocab_start=columns.start if group.vocabulary else None, token_counts=tokens if group.tokens else None)
            given.setdefault("vocab_size", sum(self.columns))
        student = student[rows, ..., columns].contiguous()
        if self.transposed:
            student, labels = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (student, labels))
        return student, teacher[rows, ..., columns], labels[rows], given


class Sparse(Case):
    """The same of a sparse teacher, of the K likeliest tokens of the case's logits."""

    def __init__(self, *arguments, tail="bucket", k=6, own=True, log_dtype="float32", **others):
        super().__init__(*arguments, **others)
        self.tail, self.k, self.own, self.log_dtype = tail, k, own, getattr(torch, log_dtype)

    def whole(self):
        student, logits, labels, given = super().whole()
        vocab = given.get("vocab_size", logits.shape[-1])
        log_probs = logits[..., :vocab].float().log_softmax(-1)
        values, indices = log_probs.topk(self.k)
        if not self.own:
            # The label is then among the K.
            labels = indices[..., 2].where(labels != -100, -100)
        if self.k > 3:
            indices[..., ::2, 1] = -1
        target = log_probs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        teacher = atkd.SparseTeacher(indices, values.to(self.log_dtype), target if self.own else None, self.tail)
        return student, teacher, labels, given

    def part(self, group):
        whole = self.whole
        student, teacher, labels, given = whole()
        rows, _ = slices_of(self, group)
        try:
            self.whole = lambda: (student, student, labels, given)
            student, _, labels, given = super().part(group)
        finally:
            self.whole = whole
        return student, teacher.at(rows), labels, given


def sparse_losses(here, cases):
    """Per case what `losses` returns, of sparse teachers."""

    def run(case, group):
        student, teacher, labels, settings = case.part(group)
        leaf = student.requires_grad_()
        logits = leaf * 1 if case.inplace else leaf
        indices, log_probs, target, tail = teacher
        loss, stats = atkd.sparse_atkd_loss(
            logits, indices, log_probs, labels, target_log_prob=target, tail=tail, inplace=case.inplace, return_stats=True,
            **settings,
        )  # fmt: skip
        loss.backward(upstream_of(labels) if loss.dim() else None)
        overwritten = case.inplace and torch.equal(logits.detach(), leaf.grad)
        return loss.detach(), leaf.grad, tuple(stats), overwritten

    return per_case(here, Sparse, cases, run)


def sparse_faults(here, layout, columns, tokens, at):
    """The error of each fault of a sparse teacher that rank `at` alone has, and a loss after them."""
    group = here.groups.get(layout)
    if group is None:
        return None

    def call(fault):
        student, teacher, labels, given = Sparse(columns, tokens).part(group)
        labels[labels == -100] = 3
        # The entry that the faults change is not the label's, whose value would not be looked at.
        labels[0] = teacher.indices[0, 0]
        given["tail"] = "bucket"
        if fault and here.rank == at:
            teacher = fault(teacher, given)
        indices, log_probs, target, _ = teacher
        return atkd.sparse_atkd_loss(student, indices, log_probs, labels, target_log_prob=target, **given)

    def changed(name, value):
        def fault(teacher, given):
            values = getattr(teacher, name).clone()
            other = next(j for j in range(50) if j not in teacher.indices[0])
            values[(0, 4) if values.dim() == 2 else 0] = other if value is None else value
            return teacher._replace(**{name: values})

        return fault

    def other_tail(teacher, given):
        given["tail"] = "zero"
        return teacher

    def without_mass(teacher, given):
        given["tail"] = "bucket"
        indices = torch.arange(50).repeat(len(teacher.indices), 1)
        log_probs = torch.full(indices.shape, 0.5 / 50).log()
        return teacher._replace(indices=indices, log_probs=log_probs, target_log_prob=log_probs[:, 0].clone())

    faults = [
        changed("indices", 500),
        changed("indices", None),
        changed("log_probs", 3.0),
        changed("log_probs", -30.0),
        changed("target_log_prob", -20.0),
        other_tail,
        lambda teacher, given: teacher._replace(target_log_prob=None),
        lambda teacher, given: teacher._replace(log_probs=teacher.log_probs.half()),
        lambda teacher, given: teacher._replace(log_probs=teacher.log_probs[1:]),
        lambda teacher, given: teacher._replace(indices=None),
        lambda teacher, given: teacher._replace(indices=teacher),
        without_mass,
    ]
    return [raised(call, fault) for fault in faults], call(None)


def upstream_of(labels):
    """What arrives in backward for the losses of tokens."""
    return torch.arange(labels.numel(), dtype=torch.float32).view(labels.shape) / 4


def losses(here, cases):
    """Per case the loss, the gradient of this rank's part, and the statistics; None where it has no part."""

    def run(case, group):
        student, teacher, labels, settings = case.part(group)
        leaf = student.requires_grad_()
        logits = leaf * 1 if case.inplace else leaf
        loss, stats = atkd.atkd_loss(logits, teacher, labels, inplace=case.inplace, return_stats=True, **settings)
        loss.backward(upstream_of(labels) if loss.dim() else None)
        overwritten = case.inplace and torch.equal(logits.detach(), leaf.grad)
        return loss.detach(), leaf.grad, tuple(stats), overwritten

    return per_case(here, Case, cases, run)


@contextlib.contextmanager
def collectives():
    """The bytes that each all-gather and all-reduce brings, in order."""
    found, kept = [], (dist.all_gather_into_tensor, dist.all_reduce)

    def gather(to, tensor, group=None, **others):
        found.append(("gather", dist.get_world_size(group), to.numel() * to.element_size()))
        return kept[0](to, tensor, group=group, **others)

    def reduce(tensor, *arguments, group=None, **others):
        found.append(("reduce", dist.get_world_size(group), tensor.numel() * tensor.element_size()))
        return kept[1](tensor, *arguments, group=group, **others)

    dist.all_gather_into_tensor, dist.all_reduce = gather, reduce
    try:
        yield found
    finally:
        dist.all_gather_into_tensor, dist.all_reduce = kept


def messages(here, cases):
    """Per case what is sent."""

    def run(case, group):
        student, teacher, labels, settings = case.part(group)
        student.requires_grad_()
        with collectives() as found:
            loss = atkd.atkd_loss(student, teacher, labels, **settings)
            loss.backward(upstream_of(labels) if loss.dim() else None)
        return found

    return per_case(here, Case, cases, run)


class Head:
    """A loss of hidden states, and how their last layers are split."""

    def __init__(self, columns, tokens, bias=False, dtype="float32", padding=0, known=None, **others):
        self.columns, self.tokens = list(columns), list(tokens)
        self.bias, self.padding, self.known = bias, padding, known
        self.dtype = getattr(torch, dtype)
        self.settings = others

    layout = Case.layout

    def whole(self):
        """The layers of student and teacher, the labels, and the settings."""
        random = torch.Generator().manual_seed(3)
        count, vocab = sum(self.tokens), sum(self.columns)
        layers = []
        for width in (6, 9):
            hidden = torch.randn(count, width, generator=random).to(self.dtype)
            weight = torch.randn(vocab, width, generator=random).to(self.dtype)
            bias = torch.randn(vocab, generator=random).to(self.dtype) if self.bias else None
            layers.append((hidden, weight, bias))
        labels = torch.randint(vocab - self.padding, (count,), generator=random)
        labels[torch.rand(count, generator=random) < 0.2] = -100
        given = dict(self.settings)
        if self.padding:
            given["vocab_size"] = vocab - self.padding
        return *layers, labels, given


def heads(here, cases):
    """Per case the loss, the gradients of hidden states, weight and bias, which tokens are hard, and what is sent."""

    def run(case, group):
        *layers, labels, settings = case.whole()
        rows, columns = slices_of(case, group)
        if case.known == "log_prob":
            hidden, weight, bias = (None if each is None else each.double() for each in layers[1])
            log_p = torch.nn.functional.linear(hidden, weight, bias).log_softmax(-1)
            log_p = log_p.gather(1, labels.clamp(min=0)[:, None]).squeeze(1).float()
            settings["teacher_log_prob"] = log_p[rows]
        parts = [
            [hidden[rows].clone(), weight[columns].clone(), None if bias is None else bias[columns].clone()]
            for hidden, weight, bias in layers
        ]
        leaves = [each.requires_grad_() for each in parts[0] if each is not None]
        with collectives() as found:
            loss, stats = atkd.linear_atkd_loss(
                *parts[0][:2],
                *parts[1][:2],
                labels[rows],
                student_bias=parts[0][2],
                teacher_bias=parts[1][2],
                vocab_group=group.vocabulary,
                token_group=group.tokens,
                return_stats=True,
                **settings,
            )
            loss.backward(upstream_of(loss) if loss.dim() else None)
        return loss.detach(), [each.grad for each in leaves], stats.hard, found

    return per_case(here, Head, cases, run)


def sparse_heads(here, cases):
    """Per case how far the loss and the gradients of hidden states and weight are from the logits' of one process, relative to
    their largest; and whether the hard tokens are the same.
    """

    def run(case, group):
        columns, tokens, settings = case["columns"], case["tokens"], dict(case["settings"])
        tail, k = settings.pop("tail", "bucket"), 5
        chunk = settings.pop("chunk_tokens", None)
        (hidden, weight, _), (of_teacher, teacher_weight, _), labels, _ = Head(columns, tokens).whole()
        log_p = (of_teacher @ teacher_weight.T).log_softmax(-1)
        values, indices = log_p.topk(k)
        target = log_p.gather(1, labels.clamp(min=0)[:, None])[:, 0]
        if settings.get("target") == "teacher":
            target = None
        teacher = atkd.SparseTeacher(indices, values, target, tail)

        def whole():
            leaves = [hidden.double().float().requires_grad_(), weight.clone().requires_grad_()]
            loss, stats = atkd.sparse_atkd_loss(
                leaves[0] @ leaves[1].T, indices, values, labels, target_log_prob=target, tail=tail, return_stats=True, **settings
            )
            loss.sum().backward()
            return loss.detach().sum(), [each.grad for each in leaves], stats.hard

        rows, part = slices_of(Head(columns, tokens), group)
        leaves = [hidden[rows].clone().requires_grad_(), weight[part].clone().requires_grad_()]
        loss, stats = atkd.linear_atkd_loss(
            *leaves, None, None, labels[rows], teacher=teacher.at(rows), vocab_group=group.vocabulary, token_group=group.tokens,
            chunk_tokens=chunk, return_stats=True, **settings,
        )  # fmt: skip
        loss.sum().backward()
        of_weight = leaves[1].grad
        total = loss.detach().sum()
        if group.tokens is not None:
            total, of_weight = (each.clone() for each in (total, of_weight))
            dist.all_reduce(total, group=group.tokens)
            dist.all_reduce(of_weight, group=group.tokens)
        exact, (of_hidden, of_whole), hard = whole()
        found = [(total, exact, exact), (leaves[0].grad, of_hidden[rows], of_hidden), (of_weight, of_whole[part], of_whole)]
        off = [((one - other).abs().max() / largest.abs().max()).item() for one, other, largest in found if one.numel()]
        return max(off), torch.equal(stats.hard, hard[rows])

    class Split:
        def __new__(cls, **given):
            split = Head(given["columns"], given["tokens"])
            split.given = given
            return split

    return per_case(here, Split, cases, lambda case, group: run(case.given, group))


def margins_and_selections(here):
    """Of a case over four ranks of columns and over four ranks of tokens: margins, and hard tokens."""
    by_columns = Case([20, 0, 7, 23], [12], masks=True)
    group = here.groups[4, 1]
    _, teacher, labels, settings = by_columns.part(group)
    margins = atkd.teacher_margins(teacher, labels, vocab_group=settings["vocab_group"], temperature=2.0)
    by_tokens = Case([50], [5, 0, 3, 4], masks=True)
    _, teacher, labels, settings = by_tokens.part(here.groups[1, 4])
    of_part = atkd.teacher_margins(teacher, labels, temperature=2.0)
    hard = atkd.select_hard(of_part, 0.3, valid=labels != -100, group=settings["token_group"])
    without = atkd.select_hard(of_part, 0.3, group=settings["token_group"])
    ends = torch.tensor([0, labels.numel()])
    alone = atkd.select_hard(of_part, 0.3, cu_seqlens=ends, group=settings["token_group"])
    return margins, hard, without, alone


def raised(function, *arguments, **given):
    """The error of a call that must raise, as its type's name and its message."""
    try:
        function(*arguments, **given)
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def change(group, case, fault):
    """The arguments of a rank that `fault` has changed."""
    student, teacher, labels, given = case.part(group)
    return fault(student, teacher, labels, given) if fault else (student, teacher, labels, given)


def _wrong_label(student, teacher, labels, given):
    labels[0] = 99
    return student, teacher, labels, given


def _negative_label(student, teacher, labels, given):
    labels[0] = -5
    return student, teacher, labels, given


def _fewer_tokens(student, teacher, labels, given):
    return student[1:], teacher[1:], labels[1:], given


def _other_settings(student, teacher, labels, given):
    return student, teacher, labels, {**given, "lam": 0.3}


def _other_dtype(student, teacher, labels, given):
    return student.bfloat16(), teacher, labels, given


def _bad_setting(student, teacher, labels, given):
    return student, teacher, labels, {**given, "hard_ratio": 2.0}


def _bad_shape(student, teacher, labels, given):
    return student, teacher, labels[1:], given


def _no_tensor(student, teacher, labels, given):
    return None, teacher, labels, given


def _unknown_keyword(student, teacher, labels, given):
    return student, teacher, labels, {**given, "lambda_": 1.0}


def _given_weights(student, teacher, labels, given):
    return student, teacher, labels, {**given, "token_weights": torch.ones(labels.shape)}


def _bad_temperature(student, teacher, labels, given):
    labels[0] = 7
    return student, teacher, labels, {**given, "temperature": torch.zeros(labels.shape)}


def _other_start(student, teacher, labels, given):
    return student, teacher[:, :-1], labels, given


def _other_items(student, teacher, labels, given):
    return student, teacher, labels, {**given, "num_items_in_batch": 5}


def _shifted(student, teacher, labels, given):
    return student, teacher, labels, {**given, "shift_labels": True}


def _shifted_by_text(student, teacher, labels, given):
    return student, teacher, labels, {**given, "shift_labels": "yes"}


def _packed(student, teacher, labels, given):
    return student, teacher, labels, {**given, "cu_seqlens": torch.tensor([0, labels.numel()])}


def _other_reduction(student, teacher, labels, given):
    return student, teacher, labels, {**given, "reduction": "none"}


def _other_labels(student, teacher, labels, given):
    # As those of a column's rank are, in another convention.
    return student, teacher, labels.where(labels < 10, -100), given


def _rolled_labels(student, teacher, labels, given):
    return student, teacher, labels.roll(1), given


def _one_count(student, teacher, labels, given):
    return student, teacher, labels, {**given, "token_counts": 6}


def _wrong_counts(student, teacher, labels, given):
    return student, teacher, labels, {**given, "token_counts": [1, 1]}


def _leaf_in_place(student, teacher, labels, given):
    return student.requires_grad_(), teacher, labels, {**given, "inplace": True}


def _wrong_vocab_start(student, teacher, labels, given):
    return student, teacher, labels, {**given, "vocab_start": 3}


def _huge_vocab_size(student, teacher, labels, given):
    return student, teacher, labels, {**given, "vocab_size": 2**70}


def _half_a_column(student, teacher, labels, given):
    return student, teacher, labels, {**given, "vocab_size": 49.5}


def _same_groups(student, teacher, labels, given):
    groups = [given.get("vocab_group"), given.get("token_group")]
    group = next(each for each in groups if each is not None)
    return student, teacher, labels, {**given, "vocab_group": group, "token_group": group}


def _too_large_vocabulary(student, teacher, labels, given):
    return student, teacher, labels, {**given, "vocab_size": 60}


def faults(here, layout, columns, tokens, names, at):
    """The error of each fault, which rank `at` has alone (all ranks if None)."""
    group = here.groups.get(layout)
    if group is None:
        return None
    found = []
    for name in names:
        fault = globals()["_" + name] if at in (here.rank, None) else None
        case = Case(columns, tokens)
        student, teacher, labels, given = change(group, case, fault)
        found.append(raised(atkd.atkd_loss, student, teacher, labels, **given))
    # The ranks have not lost each other.
    student, teacher, labels, given = change(group, Case(columns, tokens), None)
    return found, atkd.atkd_loss(student, teacher, labels, **given)


def of_one_group(here):
    """How far losses and gradients of calls where all tokens are hard, or none is, are from one process, without statistics."""
    results = {}
    for layout in [(2, 1), (1, 2), (2, 2)]:
        group = here.groups.get(layout)
        if group is None:
            continue
        case = Head([20, 30] if layout[0] == 2 else [50], [6, 5] if layout[1] == 2 else [11])
        student, teacher, labels, _ = case.whole()
        rows, columns = slices_of(case, group)
        of_groups = {"vocab_group": group.vocabulary, "token_group": group.tokens}
        for reduction in ("mean", "sum", "none", "group-mean"):
            for ratio in (0.0, 1.0):
                given = {"reduction": reduction, "hard_ratio": ratio}

                def whole_and_part(loss_of, tensors, parts):
                    """Losses and gradients by the first tensor, of all and of this rank's part."""
                    found = []
                    for arguments, of_ranks in [(tensors, {}), (parts, of_groups)]:
                        leaf, *others = (each.clone() for each in arguments)
                        loss = loss_of(leaf.requires_grad_(), *others, **given, **of_ranks)
                        loss.sum().backward()
                        found.append((loss.detach().sum(), leaf.grad))
                    (whole, gradient), (part, of_part) = found
                    if group.tokens is not None:
                        dist.all_reduce(part, group=group.tokens)
                    return whole, gradient, part, of_part

                logits = [hidden @ weight.T for hidden, weight, _ in (student, teacher)]
                parts = [each[rows, columns] for each in logits]
                whole, gradient, part, of_part = whole_and_part(
                    atkd.atkd_loss, (*logits, labels), (*parts, labels[rows])
                )
                difference = (of_part - gradient[rows, columns]).abs().max() / gradient.abs().max()
                results["logits", layout, reduction, ratio] = abs(part / whole - 1).item(), difference.item(), whole.item()
                layers = student[0], student[1], teacher[0], teacher[1], labels
                of_rank = student[0][rows], student[1][columns], teacher[0][rows], teacher[1][columns], labels[rows]
                whole, gradient, part, of_part = whole_and_part(atkd.linear_atkd_loss, layers, of_rank)
                difference = (of_part - gradient[rows]).abs().max() / gradient.abs().max()
                results["hidden states", layout, reduction, ratio] = abs(part / whole - 1).item(), difference.item(), whole.item()
    return results


def distributed_of_one_group(here):
    """The same of DTensors, of tokens on two ranks and columns on two."""
    from torch.distributed.tensor import distribute_tensor

    mesh = _mesh((2, 2))
    results = {}
    for reduction in ("mean", "sum", "none", "group-mean"):
        for ratio in (0.0, 1.0):
            given = {"reduction": reduction, "hard_ratio": ratio}
            logits = batch(7, 50)
            leaf = logits[0].clone().requires_grad_()
            whole = atkd.atkd_loss(leaf, *logits[1:], **given).sum()
            whole.backward()
            placed = [distribute_tensor(x, mesh, _placements("0V", 2)) for x in logits[:2]]
            labels = distribute_tensor(logits[2], mesh, _placements("0R", 2))
            loss = atkd.atkd_loss(placed[0].requires_grad_(), placed[1], labels, **given).sum()
            loss.backward()
            difference = (placed[0].grad.full_tensor() - leaf.grad).abs().max() / leaf.grad.abs().max()
            loss = loss.detach().full_tensor()
            results[reduction, ratio] = abs(loss / whole.detach() - 1).item(), difference.item(), whole.item()
    return results


def numbers_of_numpy(here):
    """The loss where one rank's settings are NumPy's, or tensors, and equal."""
    group = here.groups.get((1, 2))
    if group is None:
        return None
    import numpy

    student, teacher, labels, given = Case([50], [6, 5]).part(group)
    settings = {"temperature": 2.0, "ignore_index": -100, "lam": 0.25, "num_items_in_batch": 7, "divergence": "jsd"}
    if here.rank == 1:
        settings = {
            "temperature": numpy.float32(2.0), "ignore_index": numpy.int64(-100), "divergence": numpy.str_("jsd"),
            "lam": torch.tensor(0.25, dtype=torch.float64), "num_items_in_batch": numpy.int32(7),
            "shift_labels": numpy.bool_(False), "temperature_squared": numpy.bool_(False),
        }  # fmt: skip
    return atkd.atkd_loss(student, teacher, labels, **settings, **given)


def different_values(here, layout, columns, tokens):
    """The errors where rank 1 has one argument of its tokens with other values."""
    group = here.groups.get(layout)
    if group is None:
        return None
    student, teacher, labels, given = Case(columns, tokens, weights=True, temperatures=True, hard=True).part(group)
    labels[:2] = torch.tensor([3, 4])

    def swapped(values):
        """Two values the other way round, so that their sum is the same."""
        found = values.clone()
        if here.rank == 1:
            found[:2] = values[:2].flip(0)
        return found

    given["hard"][:2] = torch.tensor([True, False])
    random = torch.Generator().manual_seed(1)
    hidden = torch.randn(*labels.shape, 3, generator=random)
    weight = torch.ones(student.shape[-1], 3)
    log_p = -torch.rand(labels.shape, generator=random)
    groups = {name: given[name] for name in ("vocab_group", "token_group")}
    layers = hidden, weight, hidden, weight
    return [
        raised(atkd.atkd_loss, student, teacher, swapped(labels), **given),
        *[
            raised(atkd.atkd_loss, student, teacher, labels, **{**given, name: swapped(given[name])})
            for name in ("hard", "token_weights", "temperature")
        ],
        raised(atkd.linear_atkd_loss, *layers, swapped(labels), **groups),
        raised(atkd.linear_atkd_loss, *layers, labels, teacher_log_prob=swapped(log_p), **groups),
        raised(atkd.teacher_margins, teacher, swapped(labels), vocab_group=groups["vocab_group"]),
        # What is the same has the same digest, whatever its dtype and wherever it lies.
        raised(
            atkd.atkd_loss, student, teacher, labels.int() if here.rank == 1 else labels,
            **{**given, "token_weights": torch.stack([given["token_weights"]] * 2, -1)[:, 0]},
        ),
    ]  # fmt: skip


def accumulated(here):
    """The loss and the gradient of two calls on each of two ranks, averaged over the ranks as DDP does."""
    group = here.groups.get((1, 2))
    if group is None:
        return None
    (hidden, weight, _), (of_teacher, to_teacher, _), labels, _ = Head([50], [6, 5]).whole()
    weight.requires_grad_()
    first = 6 * group.tokens_at
    parts = [slice(first, first + 2), slice(first + 2, 6 + 5 * group.tokens_at)]
    teacher = [of_teacher[part] @ to_teacher.T for part in parts]
    margins = torch.cat([atkd.teacher_margins(logits, labels[part]) for logits, part in zip(teacher, parts)])
    valid = torch.cat([labels[part] != -100 for part in parts])
    hard = atkd.select_hard(margins, 0.5, valid=valid, group=group.tokens)
    items = valid.sum()
    dist.all_reduce(items, group=group.tokens)
    total = torch.zeros(())
    for logits, part, of_part in zip(teacher, parts, hard.split([2, len(hard) - 2])):
        loss = atkd.atkd_loss(hidden[part] @ weight.T, logits, labels[part], hard=of_part, num_items_in_batch=items)
        (loss * dist.get_world_size(group.tokens)).backward()
        total += loss.detach()
    dist.all_reduce(weight.grad, group=group.tokens)
    dist.all_reduce(total, group=group.tokens)
    return total, weight.grad / dist.get_world_size(group.tokens)


def backward_on_one_rank(here):
    """The losses of tokens, and the weight's gradient, where one rank alone calls `backward`."""
    group = here.groups.get((1, 2))
    if group is None:
        return None
    case = Head([50], [6, 5])
    (hidden, weight, _), (of_teacher, to_teacher, _), labels, _ = case.whole()
    rows, _ = slices_of(case, group)
    weight.requires_grad_()
    layers = hidden[rows], weight, of_teacher[rows], to_teacher
    losses = atkd.linear_atkd_loss(
        *layers, labels[rows], chunk_tokens=2, reduction="none", token_group=group.tokens
    )
    if here.rank == 1:
        losses.sum().backward()
    return losses.detach(), weight.grad


def other_faults(here):
    """Errors of the other functions, which one rank causes."""
    group = here.groups.get((2, 1))
    if group is None:
        return None
    vocabulary = group.vocabulary
    student, teacher, labels, _ = Case([20, 30], [5]).part(group)
    hidden, weight = torch.ones(5, 3), torch.ones([20, 30][here.rank], 3)
    is_wrong = here.rank == 1
    head = torch.nn.Linear(3, 50)
    return [
        raised(atkd.teacher_margins, teacher, labels, vocab_group=vocabulary, target="x" if is_wrong else "label"),
        raised(atkd.select_hard, labels if is_wrong else teacher[:, 0].contiguous(), 0.5, group=vocabulary),
        raised(
            atkd.linear_atkd_loss, hidden[is_wrong:], weight, hidden[is_wrong:], weight, labels[is_wrong:],
            vocab_group=vocabulary,
        ),
        raised(
            atkd.linear_atkd_loss, hidden, weight, hidden, weight, labels,
            vocab_group=vocabulary, chunk_tokens=2 + is_wrong,
        ),
        raised(
            atkd.linear_atkd_loss, hidden, None, hidden, weight, labels, vocab_group=vocabulary, student_head=head
        ),
        raised(torch.func.grad(lambda x: atkd.atkd_loss(x, teacher, labels, vocab_group=vocabulary)), student),
        raised(atkd.atkd_loss, student, teacher, labels, vocab_group=3),
        raised(atkd.atkd_loss, student, teacher, labels, vocab_group="tp"),
        raised(atkd.atkd_loss, student, teacher, labels, token_group=-100),
        raised(atkd.teacher_margins, teacher.double(), labels, vocab_group=vocabulary),
        raised(atkd.atkd_loss, student, teacher, labels, vocab_start=3, token_group=vocabulary),
        raised(atkd.atkd_loss, student[:, :0], teacher[:, :0], labels * 0 - 100, vocab_group=vocabulary),
    ]  # fmt: skip


def not_a_number(here):
    """Losses and gradients where one number on rank 1 is NaN, over ranks of tokens and of columns."""
    results = []
    for layout in [(1, 2), (2, 1)]:
        group = here.groups.get(layout)
        if group is None:
            results.append(None)
            continue
        case = Case([50], [6, 5]) if layout == (1, 2) else Case([20, 30], [11])
        student, teacher, labels, given = case.part(group)
        labels[labels == -100] = 7
        if here.rank == 1:
            student[2, 3] = torch.nan
        student.requires_grad_()
        loss = atkd.atkd_loss(student, teacher, labels, **given)
        loss.backward()
        results.append((loss.detach(), student.grad))
    return results


def compiled(here):
    """The loss of a call that torch.compile meets, which breaks the graph."""
    group = here.groups.get((2, 1))
    if group is None:
        return None
    student, teacher, labels, given = Case([20, 30], [5]).part(group)

    @torch.compile(backend="eager")
    def loss(scale):
        return 2 * atkd.atkd_loss(student * scale, teacher, labels, **given)

    module = atkd.ATKDLoss(vocab_group=given["vocab_group"])
    return loss(1.0), 2 * module(student, teacher, labels)


# Of DTensors by name: the mesh, the placements as letters (R, V: over the vocabulary, 0, 1), the shape of the logits, settings.
PLACED = {
    "columns": ((4,), "V", (7, 50), {}),
    "columns, none on one rank": ((4,), "V", (7, 9), {"divergence": "reverse-kl"}),
    "tokens": ((4,), "0", (11, 50), {}),
    "tokens, none on one rank": ((4,), "0", (5, 50), {"reduction": "group-mean"}),
    "both": ((2, 2), "0V", (7, 50), {"objective": "plain", "divergence": "jsd"}),
    "both, the other way": ((2, 2), "V1", (3, 5, 50), {}),
    "two of tokens": ((2, 2), "01", (3, 5, 50), {"reduction": "sum"}),
    "tokens twice": ((2, 2), "00", (7, 50), {}),
    "columns twice": ((2, 2), "VV", (7, 50), {}),
    "one replicated": ((2, 2), "RV", (7, 50), {"vocab_size": 44}),
    "all replicated": ((2, 2), "RR", (7, 50), {}),
    "sequences": ((2, 2), "0V", (5, 4, 50), {"selection": "sequence"}),
    "losses of tokens": ((2, 2), "0V", (7, 50), {"reduction": "none"}),
}


def _placements(letters, dimensions):
    from torch.distributed.tensor import Replicate, Shard

    places = {"R": Replicate(), "V": Shard(dimensions - 1), "0": Shard(0), "1": Shard(1)}
    return [places[letter] for letter in letters]


def _mesh(shape):
    return dist.init_device_mesh("cpu", shape, mesh_dim_names=("one", "other")[: len(shape)])


def distributed(here):
    """Per entry of PLACED the whole loss, the placements of loss and gradient, the whole gradient, and this rank's loss."""
    from torch.distributed.tensor import distribute_tensor

    results = {}
    for name, (shape, letters, of_logits, settings) in PLACED.items():
        mesh, placements = _mesh(shape), _placements(letters, len(of_logits))
        of_tokens = _placements(letters.replace("V", "R"), len(of_logits))
        student, teacher, labels = batch(*of_logits)
        labels = labels.clamp(max=43)
        student = distribute_tensor(student, mesh, placements).requires_grad_()
        teacher = distribute_tensor(teacher, mesh, placements)
        labels = distribute_tensor(labels, mesh, of_tokens)
        if "R" in letters:
            # A part as a plain tensor does too.
            labels = labels.to_local()
        loss, stats = atkd.atkd_loss(student, teacher, labels, return_stats=True, **settings)
        assert type(stats.hard) is torch.Tensor and stats.hard.shape == student.to_local().shape[:-1]
        (loss.sum() if loss.dim() else loss).backward()
        results[name] = (
            loss.detach().full_tensor(),
            [str(each) for each in loss.placements],
            student.grad.placements == student.placements,
            student.grad.full_tensor(),
            loss.detach().to_local(),
        )
    return results


def distributed_and_tokens(here):
    """DTensors of columns on two ranks, beside a group of tokens that they do not know."""
    from torch.distributed.tensor import distribute_tensor

    mesh = _mesh((2, 2))
    student, teacher, labels = (each.tensor_split(2)[mesh.get_local_rank("one")] for each in batch(7, 50))
    columns = mesh["other"]
    student, teacher = (distribute_tensor(x, columns, _placements("V", 2)) for x in (student, teacher))
    student.requires_grad_()
    loss = atkd.atkd_loss(student, teacher, labels, token_group=mesh["one"].get_group())
    loss.backward()
    return loss.detach().full_tensor(), student.grad.full_tensor()


def wrong_placements(here):
    """The errors of DTensors that do not go together."""
    from torch.distributed.tensor import DTensor, Partial, distribute_tensor

    mesh = _mesh((4,))
    student, teacher, labels = batch(4, 6, 50)

    def placed(tensor, letters):
        return distribute_tensor(tensor, mesh, _placements(letters, 3))

    partial = DTensor.from_local(student, mesh, [Partial()])
    columns = placed(student, "V"), placed(teacher, "V")
    tokens = placed(student, "1"), placed(teacher, "1")
    of_tokens = placed(labels, "1")
    return [
        raised(atkd.atkd_loss, partial, partial, labels),
        raised(atkd.atkd_loss, columns[0], teacher, labels),
        raised(atkd.atkd_loss, columns[0], tokens[1], labels),
        raised(atkd.atkd_loss, *columns, of_tokens),
        raised(atkd.atkd_loss, *columns, labels, vocab_group=dist.group.WORLD),
        raised(atkd.atkd_loss, *tokens, of_tokens, token_group=dist.group.WORLD),
        raised(atkd.atkd_loss, *tokens, of_tokens, selection="sequence"),
        raised(atkd.atkd_loss, *tokens, of_tokens, shift_labels=True),
        raised(atkd.atkd_loss, *tokens, labels),
        raised(atkd.atkd_loss, student, columns[1], labels),
    ]


def placed_faults(here):
    """The errors where one rank alone gives DTensors other arguments."""
    from torch.distributed.tensor import distribute_tensor

    mesh = _mesh((4,))
    found = []
    for letters, wrong in [
        ("1", {"selection": "sequence"}),
        ("1", {"shift_labels": True}),
        ("0", {"shift_labels": "yes"}),
        ("0", {"token_group": dist.group.WORLD}),
        ("V", {"vocab_group": dist.group.WORLD}),
        ("V", {"shift_labels": True}),
    ]:
        student, teacher, labels = batch(4, 8, 50)
        student, teacher = (distribute_tensor(x, mesh, _placements(letters, 3)) for x in (student, teacher))
        labels = distribute_tensor(labels, mesh, _placements(letters.replace("V", "R"), 3))
        found.append(raised(atkd.atkd_loss, student, teacher, labels, **(wrong if here.rank == 1 else {})))
    return found


def refused_dtensors(here):
    """The errors of arguments that must be no DTensors."""
    from torch.distributed.tensor import distribute_tensor

    mesh = _mesh((4,))
    student, teacher, labels = batch(8, 12)
    placed = [distribute_tensor(x, mesh, _placements(letter, 2)) for x, letter in [(student, "0"), (teacher, "0"), (labels, "0")]]
    hidden, weight = torch.ones(8, 3), torch.ones(12, 3)
    split = distribute_tensor(weight, mesh, _placements("0", 2))
    return [
        raised(atkd.teacher_margins, placed[1], labels),
        raised(atkd.linear_atkd_loss, hidden, split, hidden, weight, labels),
        raised(atkd.linear_atkd_loss, hidden, split, hidden, weight, labels, token_group=dist.group.WORLD),
        raised(atkd.linear_atkd_loss, hidden, weight, hidden, split, labels),
        raised(atkd.atkd_loss, *placed, num_items_in_batch=(placed[2] != -100).sum()),
        raised(atkd.atkd_loss, student, teacher, labels, token_group=mesh),
    ]


def fused_heads_of_fsdp(here, reshards):
    """How far the gradients of head and body are from one process, relative to their largest, by each way to the whole weight."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Partial

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embedding, self.body = torch.nn.Embedding(30, 6), torch.nn.Linear(6, 6)
            self.head = torch.nn.Linear(6, 30, bias=False)

        def forward(self, tokens, *of_loss):
            hidden = torch.tanh(self.body(self.embedding(tokens)))
            return loss_of(hidden, self.head.weight, *of_loss) if of_loss else hidden

    def loss_of(hidden, weight, of_teacher, labels, group):
        head = torch.randn(30, 4, generator=torch.Generator().manual_seed(2))
        return atkd.linear_atkd_loss(hidden, weight, of_teacher, head, labels, token_group=group)

    random = torch.Generator().manual_seed(1)
    tokens, labels = (torch.randint(30, (9, 5), generator=random) for _ in range(2))
    labels[:, -1] = -100
    of_teacher = torch.randn(9, 5, 4, generator=random)
    alone = Model()
    alone(tokens, of_teacher, labels, None).backward()
    own = slice(*[(0, 1, 1, 5, 9)[at] for at in (here.rank, here.rank + 1)])
    given = of_teacher[own], labels[own], dist.group.WORLD
    found = {}
    for way in ("in the forward", "after the root's", "by full_tensor"):
        if way == "after the root's" and reshards:
            continue
        model = fully_shard(Model(), mesh=_mesh((4,)), reshard_after_forward=reshards)
        if way == "in the forward":
            loss = model(tokens[own], *given)
        else:
            hidden = model(tokens[own])
            if way == "by full_tensor":
                model.reshard()
                weight = model.head.weight.full_tensor(grad_placements=[Partial("avg")])
            else:
                weight = model.head.weight
            loss = loss_of(hidden, weight, *given)
        (loss * dist.get_world_size()).backward()
        found[way] = [
            ((one.weight.grad.full_tensor() - other.weight.grad).abs().max() / other.weight.grad.abs().max()).item()
            for one, other in [(model.head, alone.head), (model.body, alone.body)]
        ]
    return found


def training(here, fsdp):
    """The losses of the example's steps by layout, on the ranks that have a part of it."""
    import shards

    results = {}
    mesh = _mesh((2, 2))
    for of_tokens, of_columns in [(1, 1), (2, 1), (1, 2), (2, 2)]:
        found = shards.train(
            mesh["one"] if of_tokens > 1 else None,
            mesh["other"].get_group() if of_columns > 1 else None,
            fsdp,
        )
        results[of_tokens, of_columns] = found
    return results
