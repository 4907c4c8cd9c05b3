"""Run a function on several ranks of a real gloo process group, on CPU, from a test.

    def sum_of_ranks(start: int) -> int: ...            # at the top level of the test module

    def test_...():
        assert run_distributed(sum_of_ranks, 3, 10) == [13, 13, 13]

Ranks are forked from a server process that has imported torch and run nothing, so a rank starts in
milliseconds where a new interpreter takes seconds, without the deadlocks of forking a process that has
threads.
"""

import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

# What nearly every test module imports, so that ranks need not.
PRELOADED = ["torch", "torch.distributed", "pytest", "hypothesis"]
LAST_WORDS_SECONDS = 3.0


class RankFailedError(AssertionError):
    """A rank raised, died or did not answer; the message holds its traceback."""


def run_distributed(function: Callable[..., Any], world_size: int, *arguments: Any, timeout_s: float = 60) -> list[Any]:
    """Call `function(*arguments)` on each of `world_size` ranks and return what they returned, in rank order.

    The ranks have `torch.distributed` initialised and RANK, LOCAL_RANK and WORLD_SIZE set as by torchrun.
    What they print is shown line by line with the rank's number, when all have ended.

    Args:
        function: importable by name, so at the top level of a module. Arguments and result must pickle.
        world_size: number of ranks.
        timeout_s: after this long the ranks' stacks are shown and they are killed.

    Raises:
        RankFailedError: a rank raised an exception, died, or was too slow. The other ranks are then ended.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        receivers, processes = [], []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main, args=(function, arguments, rank, world_size, folder, timeout_s, sender)
            )
            process.start()
            sender.close()
            receivers.append(receiver)
            processes.append(process)
        try:
            return _collect(receivers, processes, timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.join()
            for rank in range(world_size):
                _show_output(folder, rank)


def _collect(receivers: list[Any], processes: list[Any], timeout_s: float) -> list[Any]:
    """Wait for every rank's result, or raise with what the failed ranks say."""
    # The ranks show their stacks at timeout_s; a moment later they have written them.
    deadline = time.monotonic() + timeout_s + 1
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    while waiting := [rank for rank in range(len(receivers)) if rank not in results.keys() | failures.keys()]:
        patience_s = max(0, deadline - time.monotonic())
        ready = multiprocessing.connection.wait([receivers[rank] for rank in waiting], patience_s)
        if not ready:
            break
        for rank in waiting:
            if receivers[rank] in ready:
                try:
                    succeeded, value = pickle.loads(receivers[rank].recv_bytes())
                except EOFError:
                    processes[rank].join()
                    succeeded, value = False, f"died with exit code {processes[rank].exitcode}"
                (results if succeeded else failures)[rank] = value
        if failures:
            # The others may wait for ever, or fail because this one did: hear them out, then stop.
            deadline = min(deadline, time.monotonic() + LAST_WORDS_SECONDS)
    if failures:
        raise RankFailedError("\n".join(f"rank {rank}: {failures[rank]}" for rank in sorted(failures)))
    if waiting:
        raise RankFailedError(f"ranks {waiting} gave no result in {timeout_s:g} s")
    return [results[rank] for rank in range(len(receivers))]


def _rank_main(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    rank: int,
    world_size: int,
    folder: Path,
    timeout_s: float,
    sender: Any,
) -> None:
    # File descriptors rather than sys.stdout, so that what C++ prints is there too.
    output = os.open(folder / f"output-{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.enable()
    faulthandler.dump_traceback_later(timeout_s)

    import torch
    import torch.distributed as dist

    # Several ranks share the cores, and the loopback is the one interface that every machine has.
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    try:
        # A file as meeting point: no port that another process could take meanwhile.
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=world_size,
            # Longer than the harness waits, since the harness tells more.
            timeout=timedelta(seconds=2 * timeout_s),
        )
        answer = (True, function(*arguments))
        # Nobody leaves while another rank may still be talking to it.
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        answer = (False, traceback.format_exc())
    # Whoever has the answer kills this process, and what it has not written out is lost.
    sys.stdout.flush()
    # Plain pickle copies tensors; that of multiprocessing would share memory that ends with this process.
    sender.send_bytes(pickle.dumps(answer))


def _show_output(folder: Path, rank: int) -> None:
    path = folder / f"output-{rank}"
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            print(f"[rank {rank}] {line}")
