"""One optimizer for one rank or many: reduce-scatter the gradients, update what this rank owns, all-gather.

Parameters live in *banks*: one flat fp32 tensor holds parameters of an AdamW group, or matrices of one shape of
a Muon group, and another one their gradients. Each `Parameter` and its `.grad` are views into them. So a backward
pass writes gradients where the collectives and the update kernels read them, with no flattening, stacking or
copying, and one rank alone pays for none of the machinery. A bank is padded to a multiple of the world size, which
is why any world size and any shapes will do.

Ranks cut a group or a shape into several banks by depth, so that the gradients of the last layers travel while those
of the first are still being computed, and the parameters of one bank while the next is being updated.

Each rank keeps the optimizer state of its own shard only, as ZeRO stage 2 does (arXiv 1910.02054). Of AdamW a
shard is any slice; of Muon it is whole matrices, since orthogonalising needs them whole. Sharding stops short
of the weights: at these sizes they fit everywhere, and gathering them in each forward would cost more than it
saves.
"""

import functools
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanochat.errors import DataError
from nanochat.optim.adamw import adamw_update
from nanochat.optim.muon import Scalar, muon_update, second_moment_shape
from nanochat.optim.ranks import Ranks
from nanochat.optim.schedules import StepSchedule
from nanochat.runtime import Nodes

# Views start at multiples of this many fp32 elements (128 bytes, a GPU's memory transaction): compiled
# kernels copy inputs that are not aligned to 16 bytes, and matrix products slow down.
ALIGNMENT = 32

# Where ranks exchange banks, one has at most this many elements (64 MB) if it can: enough to keep a link busy, and
# d12 to d26 are cut into twenty to forty banks.
BANK_ELEMENTS = 2**24

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

    A step of the training loop is: backward passes, which add to `.grad`, with `reduce_during_backward` before the
    last of them; `reduce_gradients`; `step`, which the device skips by itself if told to, and which leaves gradients
    of zero for the next backward. Nothing in it waits for a GPU, but for the first step among several ranks.

    From construction on, the parameters' storage belongs to the optimizer. Do not move the model to another
    device or dtype afterwards, and do not set `.grad` to None; `reduce_gradients` notices both. Ranks start
    from the weights of rank 0.

    Args:
        groups: what to train and how; the same on every rank.
        work_dtype: dtype of Muon's matrix products; by default bf16 on CUDA and fp32 on CPU.
        compile_muon: compile Muon's update, once per matrix shape, of which torch allows eight. Worth it on a
            GPU; on a CPU the matrix products leave nothing to gain.
        reduce_dtype: dtype in which gradients travel and are summed over ranks. Each rank sums its own micro-batches
            in fp32 all the same. bf16 halves the bytes for a second copy of the gradients that are under way, and
            rounds each sum of two ranks to 8 bits. Parameters travel in fp32: only so do all ranks have the same.
        nodes: the ranks by node, to exchange within nodes first.
        bank_elements: about the largest size of a bank where there are several ranks.

    Raises:
        ValueError: a parameter is in two groups, not fp32, frozen, or a Muon parameter that is not a matrix.
    """

    def __init__(
        self,
        groups: list[ParameterGroup],
        work_dtype: torch.dtype | None = None,
        compile_muon: bool = False,
        *,
        reduce_dtype: torch.dtype = torch.float32,
        nodes: Nodes | None = None,
        bank_elements: int = BANK_ELEMENTS,
    ) -> None:
        _check_groups(groups)
        self._groups = groups
        device = next(iter(groups[0].parameters.values())).device
        self._ranks = ranks = Ranks(device, nodes)
        if ranks.world_size == 1:
            # Nothing travels.
            reduce_dtype = torch.float32
        if work_dtype is None:
            work_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        update = torch.compile(muon_update, dynamic=False, fullgraph=True) if compile_muon else muon_update
        update = functools.partial(update, work_dtype=work_dtype)
        adamw_banks: list[_Bank] = []
        muon_banks: list[_Bank] = []
        for group in groups:
            match group:
                case AdamWGroup():
                    adamw_banks += [
                        _AdamWBank(group, parameters, ranks, reduce_dtype)
                        for parameters in cut_adamw(group.parameters, ranks.world_size, bank_elements)
                    ]
                case MuonGroup():
                    muon_banks += [
                        _MuonBank(group, parameters, ranks, reduce_dtype, update, compile_muon)
                        for parameters in cut_muon(group.parameters, ranks.world_size, bank_elements)
                    ]
                case _:
                    raise ValueError(f"group {group.name} is neither a MuonGroup nor an AdamWGroup")
        # In order of update. AdamW takes no time and has the most to send, which Muon's work then hides; of Muon's
        # banks the smallest come last, as nothing hides those.
        self._banks = adamw_banks + sorted(muon_banks, key=lambda bank: -bank.parameter.numel())
        # The order of launch, learnt in the first step. Ranks that had different ones would wait for ever.
        self._order: list[int] | None = None
        self._complete: list[int] = []
        self._num_started = 0
        self._is_last_backward = False
        if ranks.world_size > 1:
            self._watch_gradients()
        # Of steps that were taken. Only the device knows which were, so it counts; fp32 does, up to 16 million.
        self._step_count = torch.zeros((), device=device)
        self._always = torch.ones((), dtype=torch.bool, device=device)
        self._is_reduced = False

    def learning_rates(self, schedule: StepSchedule) -> dict[str, float]:
        """The learning rate of each group at a step, by the group's name."""
        return {group.name: group.lr * schedule.lr_multiplier for group in self._groups}

    @torch.no_grad()
    def zero_gradients(self) -> None:
        """Set every gradient to zero, ready for the next backward pass. Only needed to discard gradients."""
        self._is_reduced = False
        self._is_last_backward = False
        for bank in self._banks:
            # Of a backward pass that failed.
            bank.finish_reduce()
            bank.gradient.zero_()

    def reduce_during_backward(self) -> None:
        """Send each bank as soon as the next backward pass, the last one of this step, has its last gradient.

        The result has the same bits with this call as without. A model that is compiled as one graph hands over all
        gradients at the end of its backward, which leaves nothing to overlap; compiled block by block it does not.
        Where the next pass comes in pieces, each of which gives some parameter a gradient, a RuntimeError says so.
        """
        self._is_last_backward = self._ranks.world_size > 1
        self._num_started = 0
        self._complete.clear()
        for bank in self._banks:
            bank.num_gradients = 0

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
        for bank in self._banks:
            bank.check_views()
        if self._is_last_backward and self._order is None:
            self._order = self._agree_on_order()
        order = self._order or range(len(self._banks))
        for index in order[self._num_started if self._is_last_backward else 0 :]:
            self._banks[index].start_reduce()
        self._is_last_backward = False
        for index in order:
            self._banks[index].finish_reduce()
        self._is_reduced = True
        total = torch.stack([torch.linalg.vector_norm(bank.gradient_shard).square() for bank in self._banks]).sum()
        if self._ranks.world_size > 1:
            dist.all_reduce(total)
        return total.sqrt()

    @torch.no_grad()
    def step(self, schedule: StepSchedule, is_finite: Tensor | None = None) -> None:
        """Update the parameters from the reduced gradients; afterwards they are the same bits on all ranks.

        Collective. The gradients are zero afterwards.

        Args:
            schedule: what changes from step to step.
            is_finite: whether to take this step, the same on all ranks: a 0-d bool tensor on the parameters' device.
                If it is false there, no parameter and no state changes. By default the step is taken.

        Raises:
            RuntimeError: `reduce_gradients` was not called for these gradients.
        """
        if not self._is_reduced:
            raise RuntimeError("step() needs gradients that reduce_gradients() has reduced")
        self._is_reduced = False
        if is_finite is None:
            is_finite = self._always
        works = []
        for bank in self._banks:
            bank.update(schedule, self._step_count, is_finite)
            # Travels while the next bank is being updated.
            works.append(self._ranks.start_all_gather(bank.parameter))
            bank.gradient.zero_()
        self._step_count.add_(is_finite)
        # On a GPU it is the next forward that waits. Bank by bank, just before each is read, it would have to wait
        # inside of what is compiled.
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
                gathered = self._ranks.gather_to_main(shard)
                if gathered is not None:
                    for name, value in bank.split(slot, gathered):
                        state[f"{name}.{slot}"] = value.to("cpu", copy=True)
        if self._ranks.rank == 0:
            state[STEP_KEY] = self._step_count.to("cpu", torch.int64)
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
        self._step_count.copy_(state[STEP_KEY])

    def _watch_gradients(self) -> None:
        # The parameters outlive the optimizer, which their hooks must not keep alive.
        reference = weakref.ref(self)

        def arrived(index: int, parameter: Tensor) -> None:
            optimizer = reference()
            if optimizer is not None and optimizer._is_last_backward:
                optimizer._gradient_arrived(index)

        for index, bank in enumerate(self._banks):
            for parameter in bank.parameters.values():
                hook = functools.partial(arrived, index)
                parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]  # As in torch.

    def _gradient_arrived(self, index: int) -> None:
        """Start, in the order that all ranks keep to, what is complete."""
        bank = self._banks[index]
        bank.num_gradients += 1
        if bank.num_gradients > len(bank.parameters):
            raise RuntimeError(
                f"a gradient of {', '.join(bank.parameters)} came after all of them were complete, and maybe sent: "
                "one backward pass must give a parameter its gradient once"
            )
        if bank.num_gradients < len(bank.parameters):
            return
        self._complete.append(index)
        if self._order is None:
            return
        while self._num_started < len(self._order) and self._order[self._num_started] in self._complete:
            self._banks[self._order[self._num_started]].start_reduce()
            self._num_started += 1

    def _agree_on_order(self) -> list[int]:
        """The order in which banks were complete on rank 0, then those that never were."""
        order = self._complete + [index for index in range(len(self._banks)) if index not in self._complete]
        shared = torch.tensor(order, device=self._banks[0].parameter.device)
        dist.broadcast(shared, src=0)
        agreed: list[int] = shared.tolist()
        return agreed


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


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def cut_adamw(
    parameters: Mapping[str, nn.Parameter], world_size: int, bank_elements: int
) -> list[dict[str, nn.Parameter]]:
    """Consecutive parameters, as many together as fit a bank. A bank is shared out by the element: none is wasted."""
    banks: list[dict[str, nn.Parameter]] = []
    room = 0
    for name, parameter in parameters.items():
        if not banks or (world_size > 1 and parameter.numel() > room):
            banks.append({})
            room = bank_elements
        banks[-1][name] = parameter
        room -= parameter.numel()
    return banks


def cut_muon(
    parameters: Mapping[str, nn.Parameter], world_size: int, bank_elements: int
) -> list[dict[str, nn.Parameter]]:
    """Consecutive matrices of one shape, as many for each rank in each bank: so no more padding than in one bank.

    If each rank gets P matrices of a shape, it is a divisor of P that it gets per bank, also because Muon is compiled
    for a number of matrices. The last bank may have padding, and is the one of the last layers.
    """
    banks = []
    for shape in dict.fromkeys(parameter.shape for parameter in parameters.values()):
        names = [name for name, parameter in parameters.items() if parameter.shape == shape]
        all_per_rank = -(-len(names) // world_size)
        per_rank = all_per_rank
        if world_size > 1:
            fitting = bank_elements // (world_size * shape.numel())
            per_rank = max(n for n in range(1, all_per_rank + 1) if all_per_rank % n == 0 and n <= max(1, fitting))
        size = per_rank * world_size
        banks += [{name: parameters[name] for name in names[at : at + size]} for at in range(0, len(names), size)]
    return banks


class _Bank(ABC):
    """Parameters in one flat tensor, their gradients in another, and the state of this rank's shard.

    Args:
        parameters: what to hold, by name.
        strides: elements from each parameter's start to the next one's.
        size: elements in all, a multiple of the world size.
        ranks: who owns which shard.
        reduce_dtype: dtype in which gradients travel.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        strides: list[int],
        size: int,
        ranks: Ranks,
        reduce_dtype: torch.dtype,
    ) -> None:
        self.ranks = ranks
        self.reduce_dtype = reduce_dtype
        self.parameters = parameters
        self.starts = [sum(strides[:index]) for index in range(len(strides))]
        self.shard_size = size // ranks.world_size
        self.shard_start = ranks.shard * self.shard_size
        self.state: dict[str, Tensor] = {}
        self.num_gradients = 0
        self._under_way: tuple[dist.Work, Tensor] | None = None

        device = next(iter(parameters.values())).device
        self.parameter = torch.zeros(size, device=device)
        self.gradient = torch.zeros(size, device=device)
        self.parameter_shard = ranks.own_part(self.parameter)
        self.gradient_shard = ranks.own_part(self.gradient)

        # Kept to recognise them: a gradient that a caller replaced would silently not be trained on.
        self.gradient_views: list[Tensor] = []
        for parameter, start in zip(parameters.values(), self.starts, strict=True):
            view = self.parameter.narrow(0, start, parameter.numel()).view(parameter.shape)
            view.copy_(parameter.data)
            parameter.data = view
            gradient_view = self.gradient.narrow(0, start, parameter.numel()).view(parameter.shape)
            parameter.grad = gradient_view
            self.gradient_views.append(gradient_view)
        if ranks.world_size > 1:
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

    @torch.no_grad()
    def start_reduce(self) -> None:
        """Begin to average this rank's shard of the gradient over all ranks."""
        # Itself, if the type is the same. A copy lives until it has arrived; activations have made room for it.
        sent = self.gradient.to(self.reduce_dtype)
        work = self.ranks.start_reduce_scatter(sent)
        if work is not None:
            self._under_way = work, sent

    def finish_reduce(self) -> None:
        """Wait, on a GPU as its stream does, until the shard has arrived, if it is under way."""
        if self._under_way is None:
            return
        work, sent = self._under_way
        self._under_way = None
        work.wait()
        if sent is not self.gradient:
            self.gradient_shard.copy_(self.ranks.own_part(sent))
        self.gradient_shard.mul_(1 / self.ranks.world_size)

    @abstractmethod
    def update(self, schedule: StepSchedule, step_count: Tensor, is_finite: Tensor) -> None:
        """Update this rank's shard of the parameters, or leave all as it is: see `step`."""

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
    """Parameters of an AdamW group; a shard is a slice that may begin and end inside a parameter."""

    def __init__(
        self, group: AdamWGroup, parameters: dict[str, nn.Parameter], ranks: Ranks, reduce_dtype: torch.dtype
    ) -> None:
        strides = [_round_up(parameter.numel(), ALIGNMENT) for parameter in parameters.values()]
        size = _round_up(sum(strides), ALIGNMENT * ranks.world_size)
        super().__init__(parameters, strides, size, ranks, reduce_dtype)
        self.group = group
        for slot in ("exp_avg", "exp_avg_sq"):
            self.state[slot] = torch.zeros_like(self.parameter_shard)

    def update(self, schedule: StepSchedule, step_count: Tensor, is_finite: Tensor) -> None:
        # Padding has zero weight, gradient and moments, and AdamW keeps it so.
        adamw_update(
            self.parameter_shard,
            self.gradient_shard,
            self.state["exp_avg"],
            self.state["exp_avg_sq"],
            step_count=step_count,
            is_finite=is_finite,
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
    """Matrices of one shape of a Muon group; a shard is a number of whole matrices or padding."""

    def __init__(
        self,
        group: MuonGroup,
        parameters: dict[str, nn.Parameter],
        ranks: Ranks,
        reduce_dtype: torch.dtype,
        update: Callable[..., None],
        is_compiled: bool,
    ) -> None:
        shape = next(iter(parameters.values())).shape
        stride = _round_up(shape.numel(), ALIGNMENT)
        per_rank = -(-len(parameters) // ranks.world_size)
        super().__init__(
            parameters, [stride] * len(parameters), per_rank * ranks.world_size * stride, ranks, reduce_dtype
        )
        self.group = group
        self.first_owned = ranks.shard * per_rank
        self.muon_update = update
        self.is_compiled = is_compiled

        def matrices(shard: Tensor) -> Tensor:
            return shard.view(per_rank, stride)[:, : shape.numel()].view(per_rank, *shape)

        self.parameters_Kmn = matrices(self.parameter_shard)
        self.gradients_Kmn = matrices(self.gradient_shard)
        device = self.parameter.device
        self.state["momentum"] = torch.zeros(per_rank, *shape, device=device)
        self.state["second_moment"] = torch.zeros(per_rank, *second_moment_shape(*shape), device=device)

    def _scalar(self, value: float) -> Scalar:
        # Compiled code is specialised on a Python number and would be compiled anew when it changes.
        return torch.tensor(value) if self.is_compiled else value

    def update(self, schedule: StepSchedule, step_count: Tensor, is_finite: Tensor) -> None:
        if self.first_owned >= len(self.parameters):
            return
        # Padding with the rest: it stays zero, and compiled code is specialised on the number of matrices, too.
        self.muon_update(
            self.parameters_Kmn,
            self.gradients_Kmn,
            self.state["momentum"],
            self.state["second_moment"],
            is_finite=is_finite,
            lr=self._scalar(self.group.lr * schedule.lr_multiplier),
            momentum=self._scalar(schedule.muon_momentum),
            beta2=self._scalar(self.group.beta2),
            weight_decay=self._scalar(self.group.weight_decay * schedule.muon_weight_decay_multiplier),
        )

    def split(self, slot: str, gathered: Tensor) -> Iterator[tuple[str, Tensor]]:
        return zip(self.parameters, gathered, strict=False)

    def state_shapes(self) -> dict[str, torch.Size]:
        return {f"{name}.{slot}": shard.shape[1:] for name in self.parameters for slot, shard in self.state.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        names = list(self.parameters)[self.first_owned :]
        for slot, shard in self.state.items():
            for matrix, name in zip(shard, names, strict=False):
                matrix.copy_(state[f"{name}.{slot}"])
