"""One cluster for all tests, and for each test an account with nothing in it but a checkout."""

import os
from collections.abc import Iterator

import pytest
from cluster_account import Account, fresh_account
from local_slurm import SlurmCluster, missing, running_cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[SlurmCluster]:
    lacking = missing()
    assert lacking is None, lacking
    assert "NANOCHAT_TEST_USER" in os.environ, "run: nox -s cluster"
    with running_cluster(os.environ["NANOCHAT_TEST_USER"]) as running:
        yield running


@pytest.fixture
def account(cluster: SlurmCluster) -> Iterator[Account]:
    with fresh_account(cluster) as account:
        yield account
