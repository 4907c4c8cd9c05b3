"""One optimizer for one rank or many: reduce-scatter the gradients, update what this rank owns, all-gather.

Parameters live in *banks*: one flat fp32 tensor holds all parameters of an AdamW group, or all matrices of
one shape of a Muon group, and another one their gradients. Each `Parameter` and its `.grad` are views into
them. So a backward pass writes gradients where the collectives and the update kernels read them, with no
flattening, stacking or copying, and one rank alone pays for none of the machinery. A bank is padded to a
multiple of the world size, which is why any world size and any shapes will do.

Each rank keeps the optimizer state of its own shard only, as ZeRO stage 2 does (arXiv 1910.02054). Of AdamW a
shard is any slice; of Muon it is whole matrices, since orthogonalising needs them whole. Sharding stops short
of the weights: at these sizes they fit everywhere, and gathering them in each forward would cost more than it
saves.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanochat.errors import DataError
from nanochat.optim.adamw import adamw_update
from nanochat.optim.muon import Scalar, muon_update, second_moment_shape
from nanochat.optim.schedules import StepSchedule

# Views start at multiples of this many fp32 elements (128 bytes, a GPU's memory transaction): compiled
# kernels copy inputs that are not aligned to 16 bytes, and matrix products slow down.
ALIGNMENT = 32

STEP_KEY = "step"


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share their hyperparameters: what `AdamWGroup` and `MuonGroup` have in common.

    Args:
        name: what error messages and logs call it.
        parameters: fp32 parameters by their name in the model; these names key the saved state.
        lr: peak learning rate; the schedule multiplies it.
        weight_decay: decoupled weight decay.
    """

    name: str
    parameters: Mapping[str, nn.Parameter]
    lr: float
    weight_decay: float = 0.0


@dataclass(frozen=True)
class AdamWGroup(ParameterGroup):
    """A group updated by AdamW: embeddings, the head, scalars."""

    betas: tuple[float, float] = (0.8, 0.95)
    eps: float = 1e-10


@dataclass(frozen=True)
class MuonGroup(ParameterGroup):
    """A group of matrices, of whatever shapes, updated by Muon; its momentum comes from the schedule."""

    beta2: float = 0.9


def check_coverage(module: nn.Module, groups: list[ParameterGroup]) -> None:
    """Check that every trainable parameter of `module` is in exactly one group, under its name in the module.

    Raises:
        ValueError: names the parameters that no group trains, that two groups train, or that the module has
            not.
    """
    grouped = [(name, parameter) for group in groups for name, parameter in group.parameters.items()]
    trainable = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    names = [name for name, _ in grouped]
    problems = {
        "in no group": sorted(trainable.keys() - set(names)),
        "in more than one group": sorted({name for name in names if names.count(name) > 1}),
        "not a trainable parameter of the model": sorted(
            {name for name, parameter in grouped if trainable.get(name) is not parameter}
        ),
    }
    found = [f"{', '.join(where)}: {what}" for what, where in problems.items() if where]
    if found:
        raise ValueError("; ".join(found))


class ShardedOptimizer:
    """Muon and AdamW over parameter groups, on the default process group if there is one.

    A step of the training loop is: backward passes, which add to `.grad`; `reduce_gradients`; then either
    `step`, or `zero_gradients` to skip an update whose norm is not finite; then `zero_gradients` before the
    next backward.

    From construction on, the parameters' storage belongs to the optimizer. Do not move the model to another
    device or dtype afterwards, and do not set `.grad` to None; `reduce_gradients` notices both. Ranks start
    from the weights of rank 0.

    Args:
        groups: what to train and how; the same on every rank.
        work_dtype: dtype of Muon's matrix products; by default bf16 on CUDA and fp32 on CPU.
        compile_muon: compile Muon's update, once per matrix shape, of which torch allows eight. Worth it on a
            GPU; on a CPU the matrix products leave nothing to gain.

    Raises:
        ValueError: a parameter is in two groups, not fp32, frozen, or a Muon parameter that is not a matrix.
    """

    def __init__(
        self, groups: list[ParameterGroup], work_dtype: torch.dtype | None = None, compile_muon: bool = False
    ) -> None:
        _check_groups(groups)
        self.step_count = 0
        self._groups = groups
        self._banks: list[_Bank] = []
        for group in groups:
            match group:
                case AdamWGroup():
                    self._banks.append(_AdamWBank(group))
                case MuonGroup():
                    for shape in dict.fromkeys(p.shape for p in group.parameters.values()):
                        self._banks.append(_MuonBank(group, shape, work_dtype, compile_muon))
                case _:
                    raise ValueError(f"group {group.name} is neither a MuonGroup nor an AdamWGroup")
        self._is_reduced = False

    def learning_rates(self, schedule: StepSchedule) -> dict[str, float]:
        """The learning rate of each group at a step, by the group's name."""
        return {group.name: group.lr * schedule.lr_multiplier for group in self._groups}

    @torch.no_grad()
    def zero_gradients(self) -> None:
        """Set every gradient to zero, ready for the next backward pass."""
        self._is_reduced = False
        for bank in self._banks:
            bank.gradient.zero_()

    @torch.no_grad()
    def reduce_gradients(self) -> Tensor:
        """Average the gradients over ranks, each rank keeping its shard, and return their global norm.

        Collective. The average is that of a global batch if each rank's loss is a mean over equally many
        tokens.

        Returns:
            The norm over all parameters, a 0-d fp32 tensor on their device, the same bits on all ranks.
            Nothing waits for the device until it is read.

        Raises:
            RuntimeError: a parameter or its gradient no longer lies in its bank.
        """
        works = []
        for bank in self._banks:
            bank.check_views()
            works.append(bank.start_reduce())
        squares = []
        for bank, work in zip(self._banks, works, strict=True):
            if work is not None:
                work.wait()
                bank.gradient_shard.mul_(1 / bank.world_size)
            squares.append(torch.linalg.vector_norm(bank.gradient_shard).square())
        self._is_reduced = True
        total = torch.stack(squares).sum()
        if _rank_and_world_size()[1] > 1:
            dist.all_reduce(total)
        return total.sqrt()

    @torch.no_grad()
    def step(self, schedule: StepSchedule) -> None:
        """Update the parameters from the reduced gradients; afterwards they are the same bits on all ranks.

        Collective. The gradients are consumed.

        Raises:
            RuntimeError: `reduce_gradients` was not called for these gradients.
        """
        if not self._is_reduced:
            raise RuntimeError("step() needs gradients that reduce_gradients() has reduced")
        self._is_reduced = False
        self.step_count += 1
        works = []
        for bank in self._banks:
            bank.update(schedule, self.step_count)
            # Travels while the next bank is being updated.
            works.append(bank.start_gather())
        for work in works:
            if work is not None:
                work.wait()

    def state_dict(self) -> dict[str, Tensor]:
        """The whole state, independent of the world size, on rank 0; empty on the other ranks.

        Collective.

        Returns:
            CPU copies: `step`, and per parameter `<name>.exp_avg` and `<name>.exp_avg_sq` (AdamW, of the
            parameter's shape), or `<name>.momentum` (of the matrix's shape) and `<name>.second_moment` ([m,
            1] or [1, n]) for Muon.
        """
        state: dict[str, Tensor] = {}
        for bank in self._banks:
            for slot, shard in bank.state.items():
                gathered = _gather_to_rank_0(shard)
                if gathered is not None:
                    for name, value in bank.split(slot, gathered):
                        state[f"{name}.{slot}"] = value.to("cpu", copy=True)
        if _rank_and_world_size()[0] == 0:
            state[STEP_KEY] = torch.tensor(self.step_count)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take this rank's shard out of a whole state, saved at any world size, or change nothing.

        Raises:
            DataError: a key is missing, unknown, or its tensor has another shape.
        """
        expected: dict[str, torch.Size] = {STEP_KEY: torch.Size(())}
        for bank in self._banks:
            expected.update(bank.state_shapes())
        for key, shape in expected.items():
            if key not in state:
                raise _misfit(f"{key} is missing")
            if state[key].shape != shape:
                raise _misfit(f"{key} has shape {list(state[key].shape)}, not {list(shape)}")
        for key in state:
            if key not in expected:
                raise _misfit(f"{key} is unknown")
        for bank in self._banks:
            bank.load(state)
        self.step_count = int(state[STEP_KEY])


def _misfit(what: str) -> DataError:
    return DataError(
        f"optimizer state does not fit the model: {what}",
        "resume from a checkpoint of the same model configuration",
    )


def _check_groups(groups: list[ParameterGroup]) -> None:
    seen: dict[int, str] = {}
    for group in groups:
        if not group.parameters:
            raise ValueError(f"group {group.name} has no parameters")
        for name, parameter in group.parameters.items():
            if id(parameter) in seen:
                raise ValueError(f"{name} is also in a group as {seen[id(parameter)]}")
            seen[id(parameter)] = name
            if parameter.dtype != torch.float32 or not parameter.requires_grad:
                raise ValueError(f"{name} in group {group.name} must be a trainable fp32 parameter")
            if isinstance(group, MuonGroup) and parameter.ndim != 2:
                raise ValueError(f"{name} in Muon group {group.name} is not a matrix: {list(parameter.shape)}")
    if len(set(seen.values())) < len(seen):
        raise ValueError("two parameters have the same name")


def _rank_and_world_size() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _gather_to_rank_0(shard: Tensor) -> Tensor | None:
    """Concatenate the ranks' shards along the first dimension, on rank 0."""
    rank, world_size = _rank_and_world_size()
    if world_size == 1:
        return shard
    if rank != 0:
        dist.gather(shard, dst=0)
        return None
    gathered = shard.new_empty(world_size, *shard.shape)
    dist.gather(shard, list(gathered.unbind()), dst=0)
    return gathered.flatten(0, 1)


class _Bank(ABC):
    """Parameters in one flat tensor, their gradients in another, and the state of this rank's shard.

    Args:
        parameters: what to hold, by name.
        strides: elements from each parameter's start to the next one's.
        size: elements in all, a multiple of the world size.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], strides: list[int], size: int) -> None:
        self.rank, self.world_size = _rank_and_world_size()
        self.parameters = parameters
        self.starts = [sum(strides[:index]) for index in range(len(strides))]
        self.shard_size = size // self.world_size
        self.shard_start = self.rank * self.shard_size
        self.state: dict[str, Tensor] = {}

        device = next(iter(parameters.values())).device
        self.parameter = torch.zeros(size, device=device)
        self.gradient = torch.zeros(size, device=device)
        self.parameter_shard = self.parameter.narrow(0, self.shard_start, self.shard_size)
        self.gradient_shard = self.gradient.narrow(0, self.shard_start, self.shard_size)

        # Kept to recognise them: a gradient that a caller replaced would silently not be trained on.
        self.gradient_views: list[Tensor] = []
        for parameter, start in zip(parameters.values(), self.starts, strict=True):
            view = self.parameter.narrow(0, start, parameter.numel()).view(parameter.shape)
            view.copy_(parameter.data)
            parameter.data = view
            gradient_view = self.gradient.narrow(0, start, parameter.numel()).view(parameter.shape)
            parameter.grad = gradient_view
            self.gradient_views.append(gradient_view)
        if self.world_size > 1:
            dist.broadcast(self.parameter, src=0)

    def check_views(self) -> None:
        """Raise RuntimeError if a parameter or gradient has left the bank."""
        base = self.parameter.data_ptr()
        for (name, parameter), start, view in zip(
            self.parameters.items(), self.starts, self.gradient_views, strict=True
        ):
            if parameter.grad is not view:
                raise RuntimeError(f"{name}.grad was replaced; use zero_gradients() of the optimizer to clear it")
            if parameter.data_ptr() != base + start * self.parameter.element_size():
                raise RuntimeError(f"{name} was moved; build the optimizer after moving the model")

    def start_reduce(self) -> dist.Work | None:
        """Begin to sum this rank's shard of the gradient over all ranks, in place."""
        if self.world_size == 1:
            return None
        # A sum, scaled later: not every backend can average. PyTorch 2.13 renamed this and the gather below,
        # and warns about the old names.
        name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
        work: dist.Work = getattr(dist, name)(self.gradient_shard, self.gradient, async_op=True)
        return work

    def start_gather(self) -> dist.Work | None:
        """Begin to collect every rank's shard of the parameters, in place."""
        if self.world_size == 1:
            return None
        name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
        work: dist.Work = getattr(dist, name)(self.parameter, self.parameter_shard, async_op=True)
        return work

    @abstractmethod
    def update(self, schedule: StepSchedule, step: int) -> None:
        """Update this rank's shard of the parameters; `step` counts from 1."""

    @abstractmethod
    def split(self, slot: str, gathered: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Names and values of one kind of state, out of all ranks' shards concatenated."""

    @abstractmethod
    def state_shapes(self) -> dict[str, torch.Size]:
        """Shapes of the whole state by key."""

    @abstractmethod
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy this rank's shard out of the whole state."""


class _AdamWBank(_Bank):
    """All parameters of an AdamW group; a shard is a slice that may begin and end inside a parameter."""

    def __init__(self, group: AdamWGroup) -> None:
        strides = [_round_up(parameter.numel(), ALIGNMENT) for parameter in group.parameters.values()]
        size = _round_up(sum(strides), ALIGNMENT * _rank_and_world_size()[1])
        super().__init__(dict(group.parameters), strides, size)
        self.group = group
        for slot in ("exp_avg", "exp_avg_sq"):
            self.state[slot] = torch.zeros_like(self.parameter_shard)

    def update(self, schedule: StepSchedule, step: int) -> None:
        # Padding has zero weight, gradient and moments, and AdamW keeps it so.
        adamw_update(
            self.parameter_shard,
            self.gradient_shard,
            self.state["exp_avg"],
            self.state["exp_avg_sq"],
            step=step,
            lr=self.group.lr * schedule.lr_multiplier,
            betas=self.group.betas,
            eps=self.group.eps,
            weight_decay=self.group.weight_decay,
        )

    def split(self, slot: str, gathered: Tensor) -> Iterator[tuple[str, Tensor]]:
        for (name, parameter), start in zip(self.parameters.items(), self.starts, strict=True):
            yield name, gathered.narrow(0, start, parameter.numel()).view(parameter.shape)

    def state_shapes(self) -> dict[str, torch.Size]:
        return {f"{name}.{slot}": value.shape for name, value in self.parameters.items() for slot in self.state}

    def load(self, state: Mapping[str, Tensor]) -> None:
        for (name, parameter), start in zip(self.parameters.items(), self.starts, strict=True):
            first = max(start, self.shard_start)
            end = min(start + parameter.numel(), self.shard_start + self.shard_size)
            if first < end:
                for slot, shard in self.state.items():
                    source = state[f"{name}.{slot}"].flatten()[first - start : end - start]
                    shard[first - self.shard_start : end - self.shard_start].copy_(source)


class _MuonBank(_Bank):
    """All matrices of one shape of a Muon group; a shard is a number of whole matrices or padding."""

    def __init__(
        self, group: MuonGroup, shape: torch.Size, work_dtype: torch.dtype | None, compile_update: bool
    ) -> None:
        parameters = {name: p for name, p in group.parameters.items() if p.shape == shape}
        rank, world_size = _rank_and_world_size()
        stride = _round_up(shape.numel(), ALIGNMENT)
        per_rank = -(-len(parameters) // world_size)
        super().__init__(parameters, [stride] * len(parameters), per_rank * world_size * stride)
        self.group = group
        self.shape = shape
        self.first_owned = rank * per_rank
        self.num_owned = min(max(len(parameters) - self.first_owned, 0), per_rank)
        self.parameters_Kmn = self._owned_matrices(self.parameter_shard, stride)
        self.gradients_Kmn = self._owned_matrices(self.gradient_shard, stride)

        device = self.parameter.device
        # As many on every rank, so that they can be gathered.
        self.state["momentum"] = torch.zeros(per_rank, *shape, device=device)
        self.state["second_moment"] = torch.zeros(per_rank, *second_moment_shape(*shape), device=device)

        if work_dtype is None:
            work_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.work_dtype = work_dtype
        self.is_compiled = compile_update
        self.muon_update = torch.compile(muon_update, dynamic=False, fullgraph=True) if compile_update else muon_update

    def _owned_matrices(self, shard: Tensor, stride: int) -> Tensor:
        matrices = shard.view(-1, stride)[: self.num_owned, : self.shape.numel()]
        return matrices.view(self.num_owned, *self.shape)

    def _scalar(self, value: float) -> Scalar:
        # Compiled code is specialised on a Python number and would be compiled anew when it changes.
        return torch.tensor(value) if self.is_compiled else value

    def update(self, schedule: StepSchedule, step: int) -> None:
        if self.num_owned == 0:
            return
        self.muon_update(
            self.parameters_Kmn,
            self.gradients_Kmn,
            self.state["momentum"][: self.num_owned],
            self.state["second_moment"][: self.num_owned],
            lr=self._scalar(self.group.lr * schedule.lr_multiplier),
            momentum=self._scalar(schedule.muon_momentum),
            beta2=self._scalar(self.group.beta2),
            weight_decay=self._scalar(self.group.weight_decay * schedule.muon_weight_decay_multiplier),
            work_dtype=self.work_dtype,
        )

    def split(self, slot: str, gathered: Tensor) -> Iterator[tuple[str, Tensor]]:
        return zip(self.parameters, gathered, strict=False)

    def state_shapes(self) -> dict[str, torch.Size]:
        return {f"{name}.{slot}": shard.shape[1:] for name in self.parameters for slot, shard in self.state.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        names = list(self.parameters)[self.first_owned : self.first_owned + self.num_owned]
        for slot, shard in self.state.items():
            for matrix, name in zip(shard, names, strict=False):
                matrix.copy_(state[f"{name}.{slot}"])
