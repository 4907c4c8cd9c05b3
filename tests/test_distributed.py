"""The harness that other tests rely on must itself never hide a failure."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from distributed import RankFailedError, run_distributed


def sum_over_ranks(start: int) -> tuple[int, torch.Tensor]:
    total = torch.tensor(start + dist.get_rank())
    dist.all_reduce(total)
    print(f"total {int(total)}")
    return dist.get_rank(), total


def fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("the reason")
    dist.barrier()


def die_on_rank_1() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier()


def hang_on_rank_1() -> None:
    if dist.get_rank() == 1:
        time.sleep(60)


def test_results_come_back_in_rank_order_and_output_is_tagged(capsys: pytest.CaptureFixture[str]) -> None:
    results = run_distributed(sum_over_ranks, 3, 10)
    assert [rank for rank, _ in results] == [0, 1, 2]
    assert [int(total) for _, total in results] == [33, 33, 33]
    assert {f"[rank {rank}] total 33" for rank in range(3)} <= set(capsys.readouterr().out.splitlines())


def test_a_failing_rank_fails_the_test_with_its_traceback() -> None:
    with pytest.raises(RankFailedError, match=r"(?s)rank 1: .*in fail_on_rank_1.*the reason"):
        run_distributed(fail_on_rank_1, 2)


def test_a_dying_rank_fails_the_test_with_its_exit_code() -> None:
    with pytest.raises(RankFailedError, match="rank 1: died with exit code 7"):
        run_distributed(die_on_rank_1, 2)


def test_a_hanging_rank_fails_the_test_with_its_stack(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RankFailedError, match=r"ranks \[0, 1\] gave no result in 2 s"):
        run_distributed(hang_on_rank_1, 2, timeout_s=2)
    assert "in hang_on_rank_1" in capsys.readouterr().out
