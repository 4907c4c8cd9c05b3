import json
import os
import subprocess
import sys

import pytest

from nanochat.tracking.environment import describe_environment

DESCRIBE = "import json; from nanochat.tracking.environment import describe_environment as d; print(json.dumps(d()))"


def describe(program=DESCRIBE, **variables):
    """`describe_environment()` in a new process with exactly these Slurm, container and commit variables."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "APPTAINER_", "SINGULARITY_", "NANOCHAT_"))
    }
    done = subprocess.run(
        [sys.executable, "-c", program], env={**kept, **variables}, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_an_environment_is_json_and_says_what_a_reader_must_know():
    found = describe_environment()
    assert json.loads(json.dumps(found)) == found
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["cpu"]["cores"] >= 1
    assert found["memory_bytes"] > 2**20
    assert {"torch", "numpy"} <= found["packages"].keys()


def test_the_commit_and_the_image_are_recorded(tmp_path):
    told = {"variant": "cpu", "revision": "abc123", "fingerprint": "0123"}
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps({**told, "python": ["torch==2.13.0"]}))
    assert describe_environment(manifest)["image"] == told
    assert "image" not in describe_environment(tmp_path / "missing.json")
    assert describe(NANOCHAT_GIT_COMMIT="abc123-dirty")["git"] == {"commit": "abc123", "dirty": True}


def test_a_slurm_job_and_a_container_are_named():
    found = describe(SLURM_JOB_ID="7", SLURM_JOB_NUM_NODES="2", APPTAINER_CONTAINER="/images/nanochat.sif")
    assert found["slurm"] == {"job_id": "7", "num_nodes": "2"}
    assert found["container"] == "/images/nanochat.sif"
    outside = describe()
    assert "slurm" not in outside
    assert "container" not in outside


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_cores_are_those_this_process_may_use():
    one_core = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); "
    assert describe(program=one_core + DESCRIBE)["cpu"]["cores"] == 1


def test_describing_a_machine_does_not_import_torch():
    program = f"{DESCRIBE}; import sys; assert 'torch' not in sys.modules"
    assert describe(program=program)["python"]


def test_gpus_are_listed_by_the_driver_where_torch_is_not_loaded(tmp_path):
    # A stand-in for the driver's own tool, which answers like this on a node with two GPUs.
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf 'NVIDIA H200, 143771\\nNVIDIA H200, 143771\\n'\n")
    tool.chmod(0o755)
    found = describe(PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert found["gpus"] == [{"name": "NVIDIA H200", "memory_bytes": 143771 * 2**20}] * 2


def test_a_broken_driver_is_no_gpu_and_no_error(tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    tool.chmod(0o755)
    assert "gpus" not in describe(PATH=f"{tmp_path}:{os.environ['PATH']}")
