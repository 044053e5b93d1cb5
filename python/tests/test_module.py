"""The modules: settings as attributes, what they print and document; and the means of the tokens' terms."""

import copy
import inspect
import math
import pickle

import atkd
import pytest
import torch
from support import batch, exactly

MODULES = [atkd.ATKDLoss, atkd.LinearATKDLoss, atkd.SparseATKDLoss]


@pytest.mark.parametrize("module", MODULES)
def test_settings_are_attributes(module):
    criterion = module(lam=0.3)
    for name, value in criterion.settings.items():
        assert getattr(criterion, name) is value
        setattr(criterion, name, value)
        assert f"{name}={value!r}" in repr(criterion)
    criterion.lam, criterion.divergence = 0.4, "jsd"
    assert criterion.settings["lam"] == 0.4 and "lam=0.4" in str(criterion) and "divergence='jsd'" in str(criterion)
    assert module().lam == 0.2
    for other in [copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))]:
        assert other.settings == criterion.settings and other.lam == 0.4


def test_a_setting_counts_from_the_next_call_on():
    data = batch(6, 40)
    criterion = atkd.ATKDLoss()
    for lam in [0.1, 0.9, torch.tensor(0.5)]:
        criterion.lam = lam
        assert criterion(*data) == atkd.atkd_loss(*data, lam=lam)


@pytest.mark.parametrize(
    "name, value, error, message",
    [
        ("lam", 1.5, ValueError, "lam"),
        ("hard_ratio", "half", TypeError, "hard_ratio is 'half', but must be of type float"),
        ("temperature", -1.0, ValueError, "temperature"),
        ("shift_labels", "yes", TypeError, "shift_labels is 'yes', but must be True or False"),
        ("selection", "rank", ValueError, 'selection is "rank"'),
        ("divergence", "reverse_kl", ValueError, "reverse"),
        ("vocab_size", "all", TypeError, "vocab_size is 'all', but must be an integer"),
        ("vocab_size", -1, ValueError, "vocab_size is -1, but must be from 0"),
        ("vocab_start", 1.5, TypeError, "vocab_start is 1.5, but must be an integer"),
        ("vocab_group", "world", TypeError, "vocab_group is a str, but must be a torch.distributed.ProcessGroup"),
        ("token_group", [0, 1], TypeError, "token_group is a list, but must be a torch.distributed.ProcessGroup"),
        ("return_stats", "yes", TypeError, "return_stats is 'yes', but must be True or False"),
        ("lam", torch.nn.Parameter(torch.tensor(0.3)), TypeError, "lam is a Parameter that requires a gradient"),
    ],
)
@pytest.mark.parametrize("module", MODULES)
def test_wrong_settings_raise_when_they_are_set(module, name, value, error, message):
    criterion = module()
    before = getattr(criterion, name)
    with pytest.raises(error, match=message):
        setattr(criterion, name, value)
    assert getattr(criterion, name) == before


def test_settings_of_one_module_alone():
    with pytest.raises(ValueError, match='tail is "?\'?rest'):
        atkd.SparseATKDLoss().tail = "rest"
    with pytest.raises(ValueError, match="chunk_tokens"):
        atkd.LinearATKDLoss().chunk_tokens = 0
    criterion = atkd.ATKDLoss(reduction="none")
    with pytest.raises(ValueError, match='inplace=True overwrites the logits, which reduction="none" reads'):
        criterion.inplace = True
    with pytest.raises(TypeError, match="inplace is 1, but must be True or False"):
        criterion.inplace = 1
    for module, name in [(atkd.LinearATKDLoss, "inplace"), (atkd.ATKDLoss, "tail"), (atkd.SparseATKDLoss, "memory_budget")]:
        criterion = module()
        assert not hasattr(criterion, name)
        with pytest.raises(AttributeError, match=f"{module.__name__} has no setting {name}"):
            setattr(criterion, name, "zero")
        assert not hasattr(criterion, name)
    criterion.note = "of the caller"
    assert criterion.note == "of the caller"


def test_every_argument_is_documented():
    # What indents all lines is not in the docstrings of Python 3.13, nor in those of inspect.
    documents = lambda name, function: f"\n    {name}: " in inspect.getdoc(function)
    for name in inspect.signature(atkd.ATKDLoss).parameters:
        assert documents(name, atkd.ATKDLoss) or f"{name}" in "vocab_group, token_group, vocab_start", name
    for module in MODULES:
        for name in list(inspect.signature(module.forward).parameters)[1:]:
            assert documents(name, module.forward), (module, name)
    for name in list(inspect.signature(atkd.LinearATKDLoss).parameters)[1:-1]:
        assert documents(name, atkd.LinearATKDLoss), name


def test_version():
    numbers = atkd.__version__.split(".")
    assert len(numbers) == 3 and all(number.isdigit() for number in numbers[:2])


SETTINGS = [
    {},
    {"ce_weight": 0.7, "kd_weight": 0.4, "lam": 0.3, "temperature": 2.0, "temperature_squared": True},
    {"objective": "plain", "ce_weight": 0.5},
    {"objective": "kl", "ce_weight": torch.tensor(0.5)},
    {"objective": "tkd", "ce_weight": 0.5},
    {"objective": "dkd", "ce_weight": 0.5},
    {"objective": "plain", "divergence": "jsd", "kd_weight": 0.5},
    {"objective": "plain", "divergence": "jsd", "kd_weight": 0.0, "ce_weight": 2.0},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("weights", [False, True])
def test_summary(settings, weights):
    student, teacher, labels = batch(3, 9, 40)
    token_weights = torch.rand(3, 9, generator=torch.Generator().manual_seed(1)) if weights else None
    given = {**settings, **({"token_weights": token_weights} if weights else {})}
    _, stats = atkd.atkd_loss(student, teacher, labels, return_stats=True, **given)
    summary = stats.summary(settings, token_weights=token_weights)
    assert all(type(value) is float for value in summary.values())
    valid = labels != -100
    assert summary["tokens"] == valid.sum()

    def mean(**changed):
        """By the definitions in float64; those have no weights of tokens, so by the tokens' losses where there are some."""
        if not weights:
            return exactly(student, teacher, labels, **{**settings, **changed})[0]
        losses = atkd.atkd_loss(student, teacher, labels, reduction="none", **{**given, **changed})
        return losses.double().sum().item() / valid.sum().item()

    whole, kd = mean(), mean(ce_weight=0.0)
    assert summary["loss"] == pytest.approx(whole, rel=1e-6)
    assert summary["kd"] == pytest.approx(kd, rel=1e-5, abs=1e-9)
    assert summary["ce"] == pytest.approx(whole - kd, rel=1e-5, abs=1e-6)
    assert summary["kd"] + summary["ce"] == pytest.approx(summary["loss"], rel=1e-12)

    assert summary["hard"] == stats.hard.sum() / valid.sum()
    assert summary["threshold"] == stats.uncertainty[stats.hard].min()
    for name in ["uncertainty", "tkd", "dkd"]:
        expected = getattr(stats, name)[valid].double().mean().item()
        assert summary[name] == pytest.approx(expected, rel=1e-12, nan_ok=True)
    for name, terms, tokens in [
        ("easy_dkd", stats.dkd, valid & ~stats.hard),
        ("hard_tkd", stats.tkd, stats.hard),
        ("hard_dkd", stats.dkd, stats.hard),
    ]:
        assert summary[name] == pytest.approx(terms[tokens].double().mean().item(), rel=1e-12, nan_ok=True)


def test_summary_of_what_cannot_be_told():
    student, teacher, labels = batch(9, 40)
    settings = {"objective": "plain", "divergence": "jsd", "ce_weight": 0.5}
    _, stats = atkd.atkd_loss(student, teacher, labels, return_stats=True, **settings)
    assert math.isnan(stats.summary(settings)["kd"]) and math.isnan(stats.summary(settings)["ce"])
    assert not {"kd", "ce"} & stats.summary().keys()
    # No token, or none of a kind.
    _, stats = atkd.atkd_loss(student, teacher, labels.fill_(-100), return_stats=True)
    nothing = stats.summary(atkd.ATKDLoss().settings)
    assert math.isnan(nothing.pop("threshold")) and not any(nothing.values())
    _, stats = atkd.atkd_loss(student[:0], teacher[:0], labels[:0], return_stats=True)
    assert stats.summary()["tokens"] == 0


def test_summary_counts_what_it_is_told():
    student, teacher, _ = batch(4, 40)
    labels = torch.zeros(4, dtype=torch.int64)
    teacher[0, 1:] = -math.inf
    valid = torch.tensor([True, True, True, False])
    _, stats = atkd.atkd_loss(student, teacher, labels.where(valid, -100), return_stats=True)
    assert stats.summary()["tokens"] == 2 and stats.summary(valid=valid)["tokens"] == 3
