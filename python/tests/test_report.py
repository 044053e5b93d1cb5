"""The page about a batch has the numbers of the call."""

import re

import atkd
import pytest
import torch


def call(device="cpu"):
    torch.manual_seed(1)
    student = torch.randn(3, 5, 40, requires_grad=True)
    teacher, labels = 3 * torch.randn(3, 5, 40), torch.randint(40, (3, 5))
    labels[0, :2] = -100
    loss, stats = atkd.atkd_loss(student, teacher, labels, return_stats=True)
    loss.backward()
    return student.grad, labels, stats


def rows(page, heading):
    """The cells of the table's rows in the section of that heading."""
    section = page.split(f"<h2>{heading}</h2>")[1].split("</section>")[0]
    return [re.findall("<td[^>]*>(.*?)</td>", row) for row in section.split("<tr>")[2:]]


def test_numbers(tmp_path):
    gradient, labels, stats = call()
    path = tmp_path / "page.html"
    atkd.report(path, stats, labels=labels, gradient=gradient, title="A <batch>", facts={"step": 7})
    page = path.read_text(encoding="utf-8")
    assert "<title>A &lt;batch&gt;</title>" in page and "<th>step</th><td>7</td>" in page
    assert "<th>tokens with a label</th><td>13</td>" in page and "<th>tokens ignored</th><td>2</td>" in page
    worst = rows(page, "Largest losses")
    order = stats.loss.flatten().argsort(descending=True)[:13].tolist()
    assert [int(row[0]) for row in worst] == order
    for token, label, group, *numbers in worst:
        of_token = [column.flatten()[int(token)] for column in stats]
        assert int(label) == labels.flatten()[int(token)]
        assert group == ("hard" if of_token[stats._fields.index("hard")] else "easy")
        norm = gradient.flatten(0, 1)[int(token)].double().norm()
        names = ["uncertainty", "tkd", "dkd", "loss"]
        expected = [float(of_token[stats._fields.index(name)]) for name in names] + [float(norm)]
        assert [float(number) for number in numbers] == pytest.approx(expected, rel=6e-4, abs=6e-5)
    [mean] = [row for row in rows(page, "In numbers") if row[:2] == ["loss", "all"]]
    assert float(mean[3]) == pytest.approx(float(stats.loss[labels != -100].mean()), rel=6e-4)


def test_without_a_gradient(tmp_path):
    _, _, stats = call()
    valid = torch.zeros(3, 5, dtype=torch.bool)
    valid[2] = True
    atkd.report(str(tmp_path / "page.html"), stats, valid=valid)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "gradient norm" not in page and "<th>tokens with a label</th><td>5</td>" in page


def test_odd_numbers(tmp_path):
    """A gradient of float64, none of a vocabulary of nothing, names that are no words, a teacher that is NaN."""
    gradient, _, stats = call()
    path = tmp_path / "page.html"
    atkd.report(path, stats, gradient=gradient.double(), facts={5: 1})
    assert "<th>5</th><td>1</td>" in path.read_text(encoding="utf-8")
    atkd.report(path, stats, gradient=gradient[..., :0])
    columns = {name: torch.full_like(getattr(stats, name), float("nan")) for name in ["margin", "uncertainty", "tkd", "dkd", "loss"]}
    atkd.report(path, stats._replace(**columns))
    assert "NaN" not in path.read_text(encoding="utf-8")


def test_shapes(tmp_path):
    gradient, labels, stats = call()
    path = tmp_path / "page.html"
    for name, value in [("labels", labels.flatten()), ("gradient", gradient[0]), ("valid", labels[0] > 0)]:
        with pytest.raises(ValueError, match=rf"{name} is \[.*must be \[3, 5\]"):
            atkd.report(path, stats, **{name: value})
    with pytest.raises(ValueError, match="gradient is"):
        atkd.report(path, stats, gradient=gradient.sum())
    with pytest.raises(ValueError, match="tkd is"):
        atkd.report(path, stats._replace(tkd=stats.tkd[0]))
    with pytest.raises(TypeError, match="valid is torch.float32, but must be bool"):
        atkd.report(path, stats, valid=stats.tkd)
    with pytest.raises(TypeError, match="labels are torch.float32, but must be integers"):
        atkd.report(path, stats, labels=stats.tkd)
    with pytest.raises(OSError):
        atkd.report(tmp_path / "none" / "page.html", stats)
