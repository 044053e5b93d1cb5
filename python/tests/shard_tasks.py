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
