"""Where processes find each other, and who else can reach them."""

import os
import pickle
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from support.processes import HANG_S
from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import RendezvousParameters, rendezvous_handler_registry

from alignctl.rendezvous import interface_towards, listening, offer

pytestmark = pytest.mark.train  # it imports torch

AGENT = """
import sys
from torch.distributed.run import parse_args, run
from alignctl.rendezvous import offer
offer()
args = parse_args(["--rdzv-backend=alignctl", *sys.argv[1:]])
args.rdzv_conf = f"rank={args.node_rank}"
run(args)
"""
# Prints once all have met: its number, their sum, and at which addresses it and the agent listen.
WORKER = """
import os
import torch, torch.distributed as dist
from test_rendezvous import addresses_of
dist.init_process_group("gloo")
total = torch.tensor([1.0 + dist.get_rank()])
dist.all_reduce(total)
print(dist.get_rank(), total.item(), addresses_of(os.getpid()), addresses_of(os.getppid()), flush=True)
dist.barrier()
os._exit(0)
"""


def addresses_of(pid):
    """Where a process listens for TCP, as /proc has it."""
    links = set()
    for file in Path(f"/proc/{pid}/fd").iterdir():
        try:
            links.add(os.readlink(file))
        except OSError:  # closed meanwhile
            continue
    found = set()
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in links:
                word = bytes.fromhex(fields[1].partition(":")[0])
                words = (word[at : at + 4][::-1] for at in range(0, len(word), 4))
                found.add(socket.inet_ntop(family, b"".join(words)))
    return sorted(found)


def test_processes_of_one_machine_listen_on_loopback_alone(tmp_path):
    (tmp_path / "agent.py").write_text(AGENT)
    (tmp_path / "meet.py").write_text(WORKER)
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "agent.py", "--rdzv-endpoint=127.0.0.1:0", "--nproc-per-node=2", "meet.py"],
        cwd=tmp_path, text=True, capture_output=True, timeout=HANG_S,
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
    )  # fmt: skip
    loopback = "['127.0.0.1']"
    assert sorted(done.stdout.splitlines()) == [f"{rank} 3.0 {loopback} {loopback}" for rank in range(2)], done.stderr


def test_machines_have_their_numbers_the_first_listens_at_one_address_and_nothing_is_unpickled(monkeypatch):
    """What another process puts into the store is text."""
    offer()
    monkeypatch.setattr(pickle, "loads", None)
    before = addresses_of(os.getpid())
    with listening("127.0.0.2", 0) as listener:
        endpoint = f"127.0.0.2:{listener.getsockname()[1]}"
    make = rendezvous_handler_registry.create_handler
    machines = [make(RendezvousParameters("alignctl", endpoint, "x", 2, 2, rank=rank)) for rank in (1, 0)]
    with ThreadPoolExecutor(2) as both:
        second, first = both.map(lambda machine: machine.next_rendezvous(), machines)
    assert sorted({*addresses_of(os.getpid())} - {*before}) == ["127.0.0.2"]
    assert [(one.rank, one.world_size) for one in (first, second)] == [(0, 2), (1, 2)]
    assert all(machine.use_agent_store for machine in machines)
    place = second.bootstrap_store_info
    assert f"{place.master_addr}:{place.master_port}" == endpoint
    other = TCPStore(place.master_addr, place.master_port, is_master=False, timeout=timedelta(seconds=60))
    other.set("x/key", b"\x80\x04N.")
    assert second.store.get("key") == b"\x80\x04N."


def test_it_listens_at_the_address_that_is_named():
    with listening("127.0.0.3", 0) as listener:
        assert listener.getsockname()[0] == "127.0.0.3"
        with pytest.raises(OSError, match="in use"):
            listening("127.0.0.3", listener.getsockname()[1])
    with listening("192.0.2.1", 0) as listener:  # which no machine has
        assert listener.getsockname()[0] == "0.0.0.0"


def test_no_other_machine_is_told_to_look_for_the_first_on_loopback(monkeypatch):
    """Where /etc/hosts has the name of the first as 127.0.1.1."""
    assert interface_towards("127.0.0.1") == interface_towards("localhost") == "lo"
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    assert interface_towards("first") == interface_towards("192.0.2.1") != "lo"
