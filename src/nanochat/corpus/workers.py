"""Independent pieces of work on several processes."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import TypeVar

from nanochat.errors import NanochatError, UsageError
from nanochat.identity import usable_cores

Task = TypeVar("Task")
Result = TypeVar("Result")


def run_tasks(
    work: Callable[[Task], Result], tasks: Sequence[Task], workers: int | None, what: str
) -> Iterator[tuple[Task, Result]]:
    """Yield tasks with their results as they finish. One worker is this process itself, ready at once.

    Args:
        work: a function of a module, which other processes can import.
        tasks: picklable, and safe to repeat.
        workers: processes; by default one per usable core.
        what: what a worker does, for the error.

    Raises:
        UsageError: `workers` is less than 1.
        NanochatError: a worker was killed; what is done is kept by whoever did it.

    Where the caller is stopped, by Ctrl-C, a signal or an error, workers end at once, in the midst of their tasks.
    """
    if workers is not None and workers < 1:
        raise UsageError(f"{workers} workers cannot do anything", "use --workers 1 or more")
    count = min(workers or usable_cores(), len(tasks))
    if count <= 1:
        for task in tasks:
            yield task, work(task)
        return
    # `spawn`, because the caller may have threads that a fork would copy in an undefined state.
    context = multiprocessing.get_context("spawn")
    working, held = context.Pipe(duplex=False)
    with working, held, ProcessPoolExecutor(count, context, initializer=_end_with, initargs=(working,)) as pool:
        try:
            with _ctrl_c_later():
                futures = {pool.submit(work, task): task for task in tasks}
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise NanochatError(
                f"a worker that {what} was killed, most often for lack of memory",
                "run the same command with fewer --workers; what is finished is kept",
            ) from None
        except BaseException:
            held.close()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _ctrl_c_later() -> Iterator[None]:
    """Start processes that Ctrl-C does not reach: it goes to the whole terminal, and each would show a traceback.

    They inherit what is blocked here. For this process the signal only waits.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with(working: Connection) -> None:
    """End this worker when the other end of `working` closes.

    Its parent has stopped, or was killed: a worker would otherwise wait for its next task for ever.
    """

    def watch() -> None:
        wait([working])
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()
