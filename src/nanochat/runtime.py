"""Device, dtype, threads, seeds and torch.distributed: what must be set once, before anything is computed."""

import os
import platform
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from nanochat.compiled_code import keep_compiled_code
from nanochat.errors import LostRankError, NanochatError, PreflightError, StoppedWithMainError, UsageError
from nanochat.identity import usable_cores

# A rank may wait this long for another before the job is declared dead. A checkpoint of a large model to a slow
# file system takes minutes, a hang should not cost an hour.
COLLECTIVE_TIMEOUT = timedelta(minutes=20)

# Nodes start an image from a busy file system at different times, but not this different.
RENDEZVOUS_TIMEOUT = timedelta(minutes=5)

# How often ranks that wait for rank 0 hear from it.
SECONDS_BETWEEN_SIGNS = 5.0

# Between the first and the last rank that a launcher signals.
SECONDS_TO_HEAR = 2.0

# A line that sets PyTorch's newer switch for TF32; a comparison does not match.
TF32_WRITE = re.compile(r"\bfp32_precision[\"']?\s*(=(?!=)|,)")

# Who is told of each piece of work that is done: the watchdog and the heartbeat of a stage, while there is one.
on_progress: list[Callable[[], None]] = []

Result = TypeVar("Result")


@dataclass(frozen=True)
class Nodes:
    """Several nodes of equally many ranks, numbered node by node.

    Attributes:
        within: the ranks of this rank's node.
        across: the ranks of this rank's place on their nodes, one of each node.
        ranks_per_node: how many each node has.
    """

    within: dist.ProcessGroup
    across: dist.ProcessGroup
    ranks_per_node: int


@dataclass(frozen=True)
class Runtime:
    """Where this process computes and which of how many it is."""

    device: torch.device
    compute_dtype: torch.dtype
    rank: int = 0
    world_size: int = 1
    nodes: Nodes | None = None

    @property
    def is_main(self) -> bool:
        """Whether this rank speaks, logs and writes."""
        return self.rank == 0

    @property
    def num_gpus(self) -> int:
        """GPUs that all ranks hold together."""
        return self.world_size if self.device.type == "cuda" else 0


def cpu_has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; elsewhere it is emulated and slower than float32."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def choose_compute_dtype(device: torch.device, dtype: Literal["auto", "float32", "bfloat16"]) -> torch.dtype:
    """The dtype of activations and matmuls. Weights and optimizer state are always float32."""
    if dtype != "auto":
        return torch.bfloat16 if dtype == "bfloat16" else torch.float32
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else cpu_has_fast_bfloat16()
    return torch.bfloat16 if fast else torch.float32


def allow_tf32() -> None:
    """Let float32 matmuls on the GPU use TF32.

    PyTorch has an old and a new way to say this, and a process that has used the new one crashes where Inductor
    still reads the old one (torch 2.13: `_inductor/select_algorithm.py`). So this project uses the old one only,
    here only, until the last such reader is gone.
    """
    torch.set_float32_matmul_precision("high")


def tf32_conflict() -> str | None:
    """What is set about TF32 that PyTorch cannot read back in the old way, and by whom; None if all is well.

    The new way is to set `fp32_precision` of one of torch's backends. Where it says something else than the old way
    said last, the next reader of the old way raises, and Inductor is one; so the readers are asked here first. Who set
    it is recorded nowhere, so then the sources of all that is imported are searched for it.
    """
    cublas, mkldnn = torch.backends.cuda.matmul, torch.backends.mkldnn
    try:
        _ = torch.get_float32_matmul_precision(), cublas.allow_tf32
    except RuntimeError:
        pass
    else:
        return None
    switches = {"": torch.backends, "cuda.matmul.": cublas, "mkldnn.matmul.": mkldnn.matmul}  # type: ignore[attr-defined]
    values = {name: switch.fp32_precision for name, switch in switches.items()}
    found = [f"torch.backends.{name}fp32_precision={value!r}" for name, value in values.items() if value != "none"]
    override = os.environ.get("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")
    found += [f"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE={override}"] if override else []
    writers = _lines_that_set_tf32()
    return ", ".join(found) + (f", set by {' or '.join(writers)}" if writers else "")


def check_tf32() -> None:
    """Refuse to start where somebody else's choice of TF32 would crash torch.compile, maybe an hour from now.

    Setting it again would hide this one write, but not the next one from the same place.

    Raises:
        PreflightError: PyTorch's two ways to set TF32 are mixed.
    """
    conflict = tf32_conflict()
    if conflict:
        raise PreflightError(
            f"PyTorch's two ways to set TF32 are mixed, on which torch.compile fails: {conflict}",
            "remove that setting, or use torch.set_float32_matmul_precision in its place",
        )


def _lines_that_set_tf32() -> list[str]:
    """Where the modules that are imported, PyTorch's own aside, set the new switch: `file:line`, for a message."""
    lines = []
    for name, module in sorted(sys.modules.items()):
        path = Path(getattr(module, "__file__", None) or "")
        if name.partition(".")[0] == "torch" or path.suffix != ".py" or not path.is_file() or path.samefile(__file__):
            continue
        source = path.read_text(encoding="utf-8", errors="replace")
        lines += [f"{path}:{n}" for n, line in enumerate(source.splitlines(), 1) if TF32_WRITE.search(line)]
    return lines


def set_cpu_threads(local_world_size: int) -> None:
    """Share the usable cores between the ranks of this host, unless OMP_NUM_THREADS already says how.

    Under torchrun a value of 1 says nothing: torchrun sets it where nothing is set, which leaves most of a CPU host
    idle.
    """
    asked = os.environ.get("OMP_NUM_THREADS")
    if asked is None or (asked == "1" and "TORCHELASTIC_RUN_ID" in os.environ):
        torch.set_num_threads(max(1, usable_cores() // local_world_size))


def grow_memory_in_place() -> None:
    """Have the GPU's allocator grow its segments instead of adding ever new ones, unless its variables say otherwise.

    Evaluations, samples and training want blocks of other sizes, and what is left between them fits nobody: a batch
    that fits before an evaluation may not fit after it. PyTorch reads this when it first allocates on a GPU.
    """
    if not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"}:
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


@contextmanager
def start_runtime(
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    *,
    cache: Path | None = None,
) -> Iterator[Runtime]:
    """Set this process up, joining the others if a launcher (torchrun) started several.

    The process group exists on CPU (gloo) as on GPU (NCCL), so that the same code runs everywhere and ranks can
    never train apart unnoticed.

    Args:
        device: where to compute.
        dtype: of activations and matmuls.
        cache: the folder for what is compiled; without one it is PyTorch's own.

    Raises:
        UsageError: a GPU is asked for and there is none, or the launcher's variables make no sense.
        PreflightError: TF32 is set in a way on which torch.compile fails, or the ranks did not meet.
        LostRankError: another rank ended while this one waited for it.
    """
    if cache is not None:
        keep_compiled_code(cache)
    check_tf32()
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda, but this process sees no GPU", "use --device cpu, or check nvidia-smi")
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    rank, world_size, local_rank, local_world_size = _place_among_ranks()
    set_cpu_threads(local_world_size)
    torch_device = torch.device("cpu")
    if on_gpu:
        grow_memory_in_place()
        # Slurm may show each task its own GPU only, which is then number 0 whatever the local rank.
        visible = torch.cuda.device_count()
        if 1 < visible <= local_rank:
            raise UsageError(
                f"local rank {local_rank} has no GPU: this node shows {visible}", "start as many ranks as GPUs"
            )
        torch_device = torch.device("cuda", local_rank % visible)
        torch.cuda.set_device(torch_device)
        allow_tf32()
    if world_size > 1:
        _meet_ranks(rank, world_size, torch_device)
    try:
        nodes = form_nodes(local_world_size) if _are_nodes_alike(local_rank, local_world_size) else None
        yield Runtime(torch_device, choose_compute_dtype(torch_device, dtype), rank, world_size, nodes)
    except RuntimeError as error:
        if world_size > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            # Where a signal stopped the other rank, it is on its way here too, and says more than this error.
            time.sleep(SECONDS_TO_HEAR)
            raise _lost_rank(rank, error) from error
        raise
    # Only after success: with the others still inside a collective, NCCL may wait for them for ever.
    if dist.is_initialized():
        dist.destroy_process_group()


def _place_among_ranks() -> tuple[int, int, int, int]:
    """RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, as a launcher sets them; one process without."""
    given = {
        "RANK": os.environ.get("RANK", "0"),
        "WORLD_SIZE": os.environ.get("WORLD_SIZE", "1"),
        "LOCAL_RANK": os.environ.get("LOCAL_RANK", "0"),
        "LOCAL_WORLD_SIZE": os.environ.get("LOCAL_WORLD_SIZE", "1"),
    }
    shown = " ".join(f"{name}={value}" for name, value in given.items())
    fix = f"start all ranks with torchrun or slurm/submit; or, for one process: unset {' '.join(given)}"
    if not all(value.isdecimal() for value in given.values()):
        raise UsageError(f"{shown}: not whole numbers", fix)
    rank, world_size, local_rank, local_world_size = map(int, given.values())
    if rank >= world_size or not 1 <= local_world_size <= world_size:
        raise UsageError(f"{shown}: there is no such rank", fix)
    return rank, world_size, local_rank, local_world_size


def _meet_ranks(rank: int, world_size: int, device: torch.device) -> None:
    """Join the process group, or say in one line why that failed."""
    address = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
    try:
        store, _, _ = next(rendezvous("env://", rank, world_size, timeout=RENDEZVOUS_TIMEOUT))
        store.set_timeout(COLLECTIVE_TIMEOUT)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=COLLECTIVE_TIMEOUT,
            device_id=device if device.type == "cuda" else None,
        )
    except (RuntimeError, ValueError) as error:
        if "Duplicate GPU" in str(error):
            raise _shared_gpu(rank) from error
        taken = "EADDRINUSE" in str(error)
        raise PreflightError(
            f"rank {rank} of {world_size} did not meet the others at {address}: {_first_line(error)}",
            "another program has this port: choose another MASTER_PORT, the same for all ranks"
            if taken
            else f"start all {world_size} ranks; MASTER_ADDR and MASTER_PORT: the host of rank 0 and a free port there",
        ) from error


def _are_nodes_alike(local_rank: int, local_world_size: int) -> bool:
    """Whether there are several nodes of equally many ranks, more than one, numbered node by node."""
    places = gather_from_ranks((platform.node(), local_rank, local_world_size))
    return 1 < local_world_size < len(places) and all(
        place == (places[rank - rank % local_world_size][0], rank % local_world_size, local_world_size)
        for rank, place in enumerate(places)
    )


def form_nodes(ranks_per_node: int) -> Nodes:
    """Form the groups of ranks within and across nodes. Collective."""
    ranks = range(dist.get_world_size())
    nodes = [list(ranks[start : start + ranks_per_node]) for start in ranks[::ranks_per_node]]
    within, across = (
        dist.new_subgroups_by_enumeration(groups, timeout=COLLECTIVE_TIMEOUT)[0]  # type: ignore[no-untyped-call]
        for groups in (nodes, [list(group) for group in zip(*nodes, strict=True)])
    )
    return Nodes(within, across, ranks_per_node)


def _lost_rank(rank: int, error: RuntimeError) -> NanochatError:
    if "Duplicate GPU" in str(error):
        return _shared_gpu(rank)
    return LostRankError(
        f"rank {rank} lost another rank: {_first_line(error)}",
        "the message of the rank that ended first says why; the same command carries on",
    )


def _shared_gpu(rank: int) -> UsageError:
    return UsageError(f"rank {rank} shares its GPU with another rank", "start as many ranks on a node as it has GPUs")


def _first_line(error: Exception) -> str:
    # NCCL's own cause comes last, after where in PyTorch it was noticed.
    cause = str(error).rpartition("Last error:")[2].strip() or str(error).strip()
    return cause.partition("\n")[0][:200]


def seed_everything(seed: int) -> None:
    """Seed Python's and torch's generators. NumPy's global one is not used anywhere."""
    random.seed(seed)
    torch.manual_seed(seed)


def random_state(device: torch.device) -> dict[str, str]:
    """The generators' states as text, for a checkpoint."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {name: bytes(state.tolist()).hex() for name, state in states.items()}


def restore_random_state(states: dict[str, str], device: torch.device) -> None:
    """Undo what has been drawn since `random_state`. A generator this machine does not have is left out."""
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(states["cpu"]), dtype=torch.uint8))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(torch.frombuffer(bytearray.fromhex(states["cuda"]), dtype=torch.uint8), device)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process held: what the GPU's allocator reserved, or resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    import resource

    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all ranks, in place, and return it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather_from_ranks(value: Any) -> list[Any]:
    """Collect one picklable value per rank, in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_main(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def run_on_main(work: Callable[[], Result]) -> Result | None:
    """Do work on rank 0 while the others wait for it, however long it takes.

    A barrier would give up after COLLECTIVE_TIMEOUT. Here the ranks hear every few seconds that the work goes on. If it
    fails, rank 0 raises its error and the others end too, instead of waiting for ever.

    Returns:
        What `work` returned, on rank 0; None elsewhere.
    """
    if not dist.is_initialized():
        return work()
    results: list[Result] = []
    errors: list[BaseException] = []

    def keep_outcome() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = Thread(target=keep_outcome, name="work of rank 0", daemon=True)
    if dist.get_rank() == 0:
        thread.start()
    while True:
        if dist.get_rank() == 0:
            thread.join(SECONDS_BETWEEN_SIGNS)
        working, failed = from_main((thread.is_alive(), bool(errors)))
        if dist.get_rank() != 0:
            made_progress()
        if failed:
            raise errors[0] if errors else StoppedWithMainError()
        if not working:
            return results[0] if results else None


def made_progress() -> None:
    """Say that a piece of work is done, such as an evaluation's batch, so that nobody takes this process for stuck."""
    for tell in on_progress:
        tell()


def barrier() -> None:
    """Wait until every rank is here."""
    if dist.is_initialized():
        dist.barrier()
