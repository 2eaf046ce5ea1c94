"""Two machines, as far as the network goes: namespaces of their own, joined by a virtual cable."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from lightning_module.run_files import CHECKPOINTS, LAST, METRICS, read_metrics
from tests.lightning_module.conftest import TINY

# Everything in here is gone when the outer namespace's last process is.
HOSTS = """
set -e
mount -t tmpfs tmpfs /run
mkdir -p /run/netns
ip netns add one
ip netns add two
ip link add cable netns one type veth peer name cable netns two
ip -n one addr add 10.77.0.1/24 dev cable
ip -n two addr add 10.77.0.2/24 dev cable
for host in one two; do ip -n $host link set lo up; ip -n $host link set cable up; done
nsenter --net=/run/netns/one sh -c "$ONE" & one=$!
nsenter --net=/run/netns/two sh -c "$TWO" & two=$!
wait $one || { status=$?; kill $two; exit $status; }
wait $two
"""


def on_two_hosts(one, two, seconds, **environment):
    """Runs a shell command on each of two hosts, 10.77.0.1 and 10.77.0.2."""
    outer = "unshare --map-root-user --net --mount --pid --fork --kill-child sh -c"
    return subprocess.run(
        [*outer.split(), HOSTS],
        env={**os.environ, "ONE": one, "TWO": two, **environment},
        capture_output=True,
        text=True,
        timeout=seconds,
    )


@pytest.fixture(scope="module")
def hosts():
    """`on_two_hosts`, where this machine lets a test make namespaces."""
    for tool in ("unshare", "nsenter", "ip"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs the command {tool} (util-linux, iproute2)")
    tried = on_two_hosts("true", "true", 30)
    if tried.returncode != 0:
        pytest.skip(f"no network namespaces here: {tried.stderr.strip()}")
    return on_two_hosts


LISTEN = "import socket as s; l = s.create_server(('', 7700)); l.settimeout(20); l.accept()"
KNOCK = """
import socket, time
for _ in range(200):
    try: socket.create_connection(('10.77.0.1', 7700), 1); break
    except OSError: time.sleep(0.1)
else: raise SystemExit('no answer')
"""


def test_hosts_have_networks_of_their_own(hosts):
    """They reach each other over the cable; a server on one's loopback is not on the other's."""
    python = sys.executable
    done = hosts(f'{python} -c "{LISTEN}"', f'{python} -c "{KNOCK}"', 60)
    assert done.returncode == 0, done.stderr
    local = LISTEN.replace("''", "'127.0.0.1'").replace("20", "3")
    done = hosts(f'{python} -c "{local}"', f'{python} -c "{KNOCK.replace("200", "10")}"', 60)
    assert done.returncode != 0


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_two_machines_train_as_one_with_two_ranks(hosts, command, text_file, tmp_path):
    steps = ["trainer.max_steps=30", "trainer.val_check_interval=15", "trainer.log_every_n_steps=1"]
    arguments = [*TINY, *steps, f"data.paths=[{text_file}]", "strategy=ddp"]
    alone = command(
        "train", *arguments, "trainer.devices=2", f"run_dir={tmp_path / 'one'}", OMP_NUM_THREADS="1"
    )
    assert alone.returncode == 0, alone.stderr

    def torchrun(rank):
        return (
            # a cache each: the second machine has to prepare the text for itself
            f"TRITON_GRU_CACHE={tmp_path / f'cache{rank}'} "
            f"exec {sys.executable} -m torch.distributed.run --nnodes=2 --nproc-per-node=1 "
            f"--node-rank={rank} --master-addr=10.77.0.1 --master-port=29500 "
            f"-m lightning_module.train {' '.join(arguments)} trainer.devices=1 "
            f"trainer.num_nodes=2 run_dir={tmp_path / 'two'}"
        )

    done = hosts(
        torchrun(0), torchrun(1), 500, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="cable",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert all((tmp_path / f"cache{rank}" / "tokens").is_dir() for rank in (0, 1))

    curves = [read_metrics(tmp_path / name / METRICS) for name in ("one", "two")]
    for rows in curves:
        for row in rows:
            row.pop("tokens_per_second", None)
    assert len([row for row in curves[0] if "train_loss" in row]) == 30
    assert curves[0] == curves[1]
    weights = [
        torch.load(tmp_path / name / CHECKPOINTS / LAST, weights_only=True)["state_dict"]
        for name in ("one", "two")
    ]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
