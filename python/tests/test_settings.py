"""The lists of settings are one: Rust's."""

import inspect

import atkd
import pytest
import torch
from atkd import _atkd
from atkd._loss import Keywords
from atkd._settings import DEFAULTS, NUMBERS, Settings
from support import batch

# Another value of each setting, and the fields of Rust's objective that it changes.
CHANGES = {
    "lam": (0.3, {"easy", "hard"}),
    "hard_ratio": (0.4, {"hard_ratio"}),
    "temperature": (2.0, {"temperature"}),
    "objective": ("plain", {"easy", "hard", "plain"}),
    "target": ("teacher", {"target"}),
    "reduction": ("sum", {"reduction"}),
    "ignore_index": (-1, {"ignore_index"}),
    "ce_weight": (0.5, {"ce_weight"}),
    "kd_weight": (0.5, {"kd_weight"}),
    "temperature_squared": (True, {"temperature_squared"}),
    "divergence": ("tvd", {"divergence"}),
    "beta": (0.1, set()),
    "selection_rule": ("median", {"selection_rule"}),
}

# The upstream gradient, which autograd brings.
NOT_SETTINGS = {"upstream"}


def fields(objective):
    """The fields of Rust's objective, as Rust prints them."""
    found, name = {}, None
    for line in repr(objective).splitlines()[1:-1]:
        if line[4] not in " })]":
            name, line = line.strip().split(": ", 1)
        found[name] = found.get(name, "") + line
    return found


def test_defaults_are_those_of_rust():
    assert repr(_atkd.Objective(**DEFAULTS)) == repr(_atkd.Objective.default())


def test_every_setting_of_rust_can_be_set():
    default, changed = fields(_atkd.Objective.default()), set(NOT_SETTINGS)
    for name, (value, expected) in CHANGES.items():
        actual = fields(_atkd.Objective(**{**DEFAULTS, name: value}))
        assert {field for field in default if default[field] != actual[field]} == expected, name
        changed |= expected
    assert changed == set(default)
    assert CHANGES.keys() == DEFAULTS.keys() == Settings.__annotations__.keys()
    assert NUMBERS == ("lam", "hard_ratio", "temperature", "ce_weight", "kd_weight", "beta")


def test_beta_is_of_the_divergence():
    def of(divergence, beta):
        return repr(_atkd.Objective(**{**DEFAULTS, "divergence": divergence, "beta": beta}))

    for divergence in ["jsd", "skew-kl", "skew-reverse-kl"]:
        assert of(divergence, 0.1) != of(divergence, 0.5)
        assert "0.1" in fields(_atkd.Objective(**{**DEFAULTS, "divergence": divergence, "beta": 0.1}))["divergence"]
    for divergence in ["forward-kl", "reverse-kl", "tvd"]:
        assert of(divergence, 0.1) == of(divergence, 0.5)


def test_functions_show_their_settings():
    function = inspect.signature(atkd.atkd_loss).parameters
    module = inspect.signature(atkd.ATKDLoss).parameters
    assert function.keys() >= module.keys() >= DEFAULTS.keys()
    for name, default in DEFAULTS.items():
        assert function[name].default == module[name].default == default
        assert f"\n    {name}: " in inspect.getdoc(atkd.atkd_loss)
    keywords = {name for name in function if function[name].kind == inspect.Parameter.KEYWORD_ONLY}
    assert keywords == {*Settings.__annotations__, *Keywords.__annotations__, "return_stats"}
    for name in keywords & module.keys():
        assert function[name].default == module[name].default
    assert list(atkd.ATKDLoss().settings) == list(module)


def test_other_keywords_raise():
    with pytest.raises(TypeError, match=r"atkd_loss\(\) got an unexpected keyword argument 'lambda_'"):
        atkd.atkd_loss(*batch(2, 3), lambda_=0.3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'lambda_'"):
        atkd.ATKDLoss(lambda_=0.3)


def test_settings_by_position():
    module = atkd.ATKDLoss(*[CHANGES[name][0] for name in list(DEFAULTS)[:9]])
    assert [module.settings[name] for name in DEFAULTS][:9] == [value for value, _ in CHANGES.values()][:9]
    data = batch(4, 30, ignored=False)
    given = {name: CHANGES[name][0] for name in list(DEFAULTS)[:9]}
    assert torch.equal(module(*data), atkd.atkd_loss(*data, **given))
