"""A folder that some node does not see is refused before the first trial."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from small import small_spec

from orchestrator.errors import UserError
from orchestrator.sweep.nodes import check_nodes, storage_findings

pytestmark = pytest.mark.ray
MOUNTS = (
    subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0
    if os.path.exists("/usr/bin/unshare")
    else False
)


@pytest.fixture
def two_nodes(tmp_path: Path) -> Iterator[Path]:
    """A folder that one node sees and the other, under a mount of its own, does not."""
    import ray
    from ray.cluster_utils import Cluster

    folder = tmp_path / "runs"
    folder.mkdir()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    other: subprocess.Popen[bytes] | None = None
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        join = [str(Path(sys.executable).parent / "ray"), "start", f"--address={cluster.address}", "--num-cpus=1"]
        hidden = f"mount -t tmpfs none {shlex.quote(str(folder))} && exec {shlex.join([*join, '--block'])}"
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        other = subprocess.Popen(["unshare", "-m", "sh", "-c", hidden], start_new_session=True, **quiet)
        deadline = time.monotonic() + 60
        while sum(node["Alive"] for node in ray.nodes()) < 2:
            assert other.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield folder
    finally:
        if other is not None:
            other.terminate()  # `ray start --block` ends what it started
            other.wait(60)
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.skipif(not MOUNTS, reason="no mount namespace of our own is permitted here (unshare -m)")
def test_a_folder_that_a_node_does_not_see_is_refused_naming_the_node(
    colours: Path, two_nodes: Path, tmp_path: Path
) -> None:
    hidden = small_spec(colours, two_nodes)
    (finding,) = storage_findings(hidden)
    assert "cannot read or write there what the driver wrote (No such file or directory)" in finding.reason
    with pytest.raises(UserError, match=rf"storage: .* does not serve the node {finding.node}: it cannot read"):
        check_nodes(hidden)
    assert list(two_nodes.iterdir()) == []
    shared = small_spec(colours, tmp_path / "shared")
    assert storage_findings(shared) == []
    check_nodes(shared)
    assert list((tmp_path / "shared").iterdir()) == []
