"""Logits that are DTensors: the groups that they are split over, this rank's part of them, and the loss as a DTensor."""

from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import _loss
from ._groups import Ranks


class Parts(NamedTuple):
    """This rank's part of the arguments of `atkd_loss`, as plain tensors."""

    student: Tensor
    teacher: Tensor
    labels: Optional[Tensor]
    given: Dict[str, Any]


# The groups over more than one dimension of a mesh by their ranks, as long as the processes' group of all is this one.
_world: Any = None
_groups: Dict[Tuple[int, ...], Any] = {}


def group_of(mesh: Any, dimensions: List[int]) -> Any:
    """The process group over some dimensions of a device mesh, whose ranks are in the order of a DTensor's shards: the last
    dimension runs fastest. One over several dimensions is made once. (A mesh that is flattened for it would be used by
    DTensor's own collectives, which then mix up uneven shards.)
    """
    global _world, _groups
    if mesh.get_coordinate() is None:
        raise ValueError(f"rank {dist.get_rank()} is not in {mesh}, over which the logits are split")
    at = tuple(
        slice(None) if each in dimensions else here
        for each, here in enumerate(mesh.get_coordinate())
    )
    ranks = tuple(mesh.mesh[at].flatten().tolist())
    if list(ranks) != sorted(ranks):
        raise ValueError(
            f"the ranks {list(ranks)}, over which {mesh} splits the logits, are in no ascending order, which groups have"
        )
    if len(dimensions) == 1:
        return mesh.get_group(dimensions[0])
    if _world is not dist.group.WORLD:
        _world, _groups = dist.group.WORLD, {}
    if ranks not in _groups:
        _groups[ranks] = dist.new_group(list(ranks), use_local_synchronization=True)
    return _groups[ranks]


class Placed:
    """How a DTensor of the student's logits is split over its mesh."""

    def __init__(self, student: Any, vocab_group: Any, token_group: Any) -> None:
        """Raises for what leaves the groups unknown alone, since no other rank hears of it. `local` raises for the rest."""
        from torch.distributed import tensor

        dtensor: Any = tensor
        if not hasattr(dtensor, "DTensor"):
            raise TypeError(
                f"student_logits are a DTensor, which needs torch 2.5 or later, but this is {torch.__version__}: give "
                "student_logits.to_local() and the groups"
            )
        self.dtensor = dtensor
        self.mesh, self.shape = student.device_mesh, student.shape
        self.placements = self._normalised(student)
        last = len(self.shape) - 1
        self.of_tokens: List[int] = []
        of_vocabulary: List[int] = []
        for at, placement in enumerate(self.placements):
            if type(placement) is dtensor.Shard:
                (of_vocabulary if placement.dim == last else self.of_tokens).append(at)
            elif not placement.is_replicate():
                raise TypeError(
                    f"student_logits are placed as {self.placements}, but each of these must be Shard(dim) or Replicate(): "
                    "redistribute them"
                )
        # Groups that are given beside those that the placements tell.
        self.superfluous = [
            name
            for name, group in [("vocab_group", vocab_group), ("token_group", token_group)]
            if group is not None and (name == "vocab_group" or self.of_tokens)
        ]
        self.vocabulary = Ranks("vocab_group", self._group(of_vocabulary))
        if self.of_tokens:
            token_group = self._group(self.of_tokens)
        self.tokens = Ranks("token_group", token_group)

    def _check_arguments(self, given: Dict[str, Any]) -> None:
        """Raises for groups that the placements tell already, and for settings that they do not go with."""
        for name in self.superfluous:
            raise ValueError(
                f"student_logits are a DTensor, placed as {self.placements}, which tells their groups: leave out {name}"
            )
        last = len(self.shape) - 1
        split = {self.placements[at].dim for at in self.of_tokens}
        if given["selection"] == "sequence" and 1 in split and last == 2:
            raise ValueError(
                f'selection="sequence" needs whole sequences on a rank, but student_logits are placed as {self.placements}'
            )
        if given["shift_labels"] and last - 1 in split:
            raise ValueError(
                "shift_labels=True needs the next position's label on the rank, but student_logits are placed as "
                f"{self.placements}: shift the labels before they are split"
            )

    def _normalised(self, tensor: Any) -> Tuple[Any, ...]:
        """Its placements, with dimensions counted from the first."""
        shard = self.dtensor.Shard
        return tuple(
            shard(each.dim % tensor.dim()) if type(each) is shard else each
            for each in tensor.placements
        )

    def _group(self, dimensions: List[int]) -> Any:
        return group_of(self.mesh, dimensions) if dimensions else None

    def local(
        self, student: Any, teacher: Any, labels: Optional[Tensor], given: Dict[str, Any]
    ) -> Parts:
        """This rank's part. The gradient of the student's becomes a DTensor placed as the logits are."""
        _loss.check_shift_labels(given["shift_labels"])
        self._check_arguments(given)
        if not isinstance(teacher, self.dtensor.DTensor):
            raise TypeError(
                f"teacher_logits are a {type(teacher).__name__}, but must be a DTensor, as student_logits are"
            )
        parts = {
            name: self._of_tokens(name, given[name]) for name in ("hard", "token_weights")
        }
        settings = dict(given["settings"])
        if "temperature" in settings:
            settings["temperature"] = self._of_tokens("temperature", settings["temperature"])
        self._check("teacher_logits", teacher, self.placements)
        return Parts(
            student.to_local(),
            teacher.to_local(),
            self._of_tokens("labels", labels),
            {**given, **parts, "settings": settings},
        )

    def _token_placements(self) -> Tuple[Any, ...]:
        replicate = self.dtensor.Replicate()
        return tuple(
            placement if at in self.of_tokens else replicate
            for at, placement in enumerate(self.placements)
        )

    def _of_tokens(self, name: str, values: Any) -> Any:
        if not isinstance(values, self.dtensor.DTensor):
            return values
        self._check(name, values, self._token_placements())
        return values.to_local()

    def _check(self, name: str, tensor: Any, expected: Tuple[Any, ...]) -> None:
        if tensor.device_mesh != self.mesh:
            raise ValueError(
                f"student_logits are on {self.mesh}, but {name} on {tensor.device_mesh}"
            )
        placements = self._normalised(tensor)
        if placements != expected:
            raise ValueError(
                f"{name} are placed as {placements}, but beside student_logits placed as {self.placements} must be placed "
                f"as {expected}"
            )

    def distributed(self, loss: Tensor) -> Tensor:
        """The loss, or the losses of the tokens, as a DTensor on the mesh of the logits."""
        placements = self._token_placements()
        shape = self.shape[:-1]
        if loss.dim() == 0:
            partial = self.dtensor.Partial("sum")
            placements = tuple(
                partial if at in self.of_tokens else each for at, each in enumerate(placements)
            )
            shape = loss.shape
        strides = [shape[at + 1 :].numel() for at in range(len(shape))]
        made: Tensor = self.dtensor.DTensor.from_local(
            loss, self.mesh, placements, run_check=False, shape=shape, stride=tuple(strides)
        )
        return made
