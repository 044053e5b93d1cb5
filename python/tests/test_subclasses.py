"""Tensors whose memory is not their values, and tensor subclasses, beside plain ones."""

import atkd
import pytest
import torch
import torch.distributed as dist
from support import assert_gradient, batch, exactly, weight

STUDENT, TEACHER, LABELS = batch(6, 50, ignored=False)


class Late(torch.Tensor):
    """A tensor without memory of its own: `made` makes its values when an operation wants them."""

    @staticmethod
    def __new__(cls, made):
        like = made()
        return torch.Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
        )

    def __init__(self, made):
        self.made = made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def value(x):
            return x.made() if isinstance(x, Late) else x

        args, kwargs = torch.utils._pytree.tree_map(value, (args, kwargs or {}))
        return function(*args, **kwargs)


class Named(torch.Tensor):
    """A subclass that changes nothing."""


def late(tensor):
    return Late(lambda: tensor)


def negated(tensor):
    tensor = torch._neg_view(-tensor)
    assert tensor.is_neg()
    return tensor


def named(tensor):
    return tensor.as_subclass(Named)


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("wrap", [late, negated, named])
@pytest.mark.parametrize("inplace", [False, True])
def test_wrapped_tensors(wrap, which, inplace):
    exact, gradient, _ = exactly(STUDENT, TEACHER, LABELS)
    leaf = STUDENT.clone().requires_grad_()
    tensors = [leaf * 1, TEACHER, LABELS]
    if wrap is late and which == 0:
        # Its operations have no derivatives.
        with torch.no_grad():
            assert abs(atkd.atkd_loss(late(STUDENT), *tensors[1:]).item() - exact) <= 1e-6 * exact
        return
    tensors[which] = wrap(tensors[which])
    loss = atkd.atkd_loss(*tensors, inplace=inplace)
    loss.backward()
    assert abs(loss.item() - exact) <= 1e-6 * exact + 2e-7
    assert_gradient(leaf.grad, gradient, weight(STUDENT, LABELS))


@pytest.mark.parametrize("items", [late, negated, named])
def test_a_wrapped_denominator(items):
    expected = atkd.atkd_loss(STUDENT, TEACHER, LABELS, num_items_in_batch=9)
    actual = atkd.atkd_loss(STUDENT, TEACHER, LABELS, num_items_in_batch=items(torch.tensor(9)))
    assert torch.equal(torch.Tensor(actual), expected)


@pytest.mark.parametrize("which", range(2))
def test_zeros_without_memory(which):
    logits = [STUDENT, TEACHER]
    logits[which] = torch.zeros(6, 50)
    expected = atkd.atkd_loss(*logits, LABELS)
    logits[which] = torch._efficientzerotensor(6, 50)
    assert torch.equal(atkd.atkd_loss(*logits, LABELS), expected)


@pytest.mark.parametrize("layout", ["sparse", "csr", "nested", "jagged"])
def test_other_layouts_are_refused(layout):
    other = {
        "sparse": lambda: TEACHER.to_sparse(),
        "csr": lambda: TEACHER.to_sparse_csr(),
        "nested": lambda: torch.nested.nested_tensor([TEACHER]),
        "jagged": lambda: torch.nested.nested_tensor([TEACHER], layout=torch.jagged),
    }[layout]()
    with pytest.raises(ValueError, match="teacher_logits are .*, but must be dense"):
        atkd.atkd_loss(STUDENT, other, LABELS)


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    if not dist.is_available():
        pytest.skip("this torch has no torch.distributed: no collective and no DTensor was tested")
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "file"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("which", range(3))
def test_results_of_collectives_are_waited_for(process_group, which):
    from torch.distributed import _functional_collectives as collectives

    expected = atkd.atkd_loss(STUDENT, TEACHER, LABELS)
    tensors = [STUDENT, TEACHER, LABELS]
    # A view of it is as late as itself.
    for view in [lambda x: x, lambda x: x[:]]:
        given = list(tensors)
        given[which] = view(collectives.all_reduce(tensors[which], "sum", process_group))
        assert isinstance(given[which], collectives.AsyncCollectiveTensor)
        assert torch.equal(atkd.atkd_loss(*given), expected)
    count = collectives.all_reduce(torch.tensor(6), "sum", process_group)
    loss = atkd.atkd_loss(*tensors, num_items_in_batch=count)
    assert abs(loss.item() - expected.item()) <= 1e-6 * expected.item()


@pytest.mark.parametrize(
    "name", ["teacher_logits", "labels", "temperature", "num_items_in_batch"]
)
def test_dtensors_beside_plain_logits_are_refused(process_group, name):
    try:
        from torch.distributed.tensor import DTensor, Replicate
    except ImportError:
        from torch.distributed._tensor import DTensor, Replicate
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (1,))
    arguments = {
        "student_logits": STUDENT,
        "teacher_logits": TEACHER,
        "labels": LABELS,
        "temperature": torch.tensor(1.0),
        "num_items_in_batch": torch.tensor(6),
    }
    arguments[name] = DTensor.from_local(arguments[name], mesh, [Replicate()])
    with pytest.raises(TypeError, match=f"{name} (is|are) a DTensor.*{name}.full_tensor"):
        atkd.atkd_loss(**arguments)
    arguments[name] = arguments[name].full_tensor()
    assert atkd.atkd_loss(**arguments).isfinite()
