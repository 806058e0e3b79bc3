"""Where torchrun's machines find each other (agent.py takes it): a rendezvous at which nothing is negotiated.

Those of torchrun listen on all interfaces, and that of `--standalone` unpickles what the store holds, so that whoever
reaches the port runs code as the user. Here each machine knows its number beforehand, the first listens at one address
alone, loopback's where there is no other machine, and what the store holds is read as text and numbers.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from contextlib import suppress
from datetime import timedelta

from torch.distributed import PrefixStore, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

_NAME = "alignctl"
_JOIN_S = 15 * 60  # that the machines may start apart
_GET_ADDRESS = 0x8915  # SIOCGIFADDR
_ELSEWHERE = "192.0.2.1"  # an address of documentation, no machine's: the way there is that to all that is far


def offer() -> None:
    """Lets torchrun take it as `--rdzv-backend=alignctl --rdzv-conf=rank=NUMBER_OF_THIS_MACHINE`."""
    rendezvous_handler_registry.register(_NAME, _Rendezvous)


class _Rendezvous(RendezvousHandler):
    def __init__(self, asked: RendezvousParameters):
        self._host, self._port = parse_rendezvous_endpoint(asked.endpoint, default_port=-1)
        self._rank, self._machines, self._run = int(asked.config["rank"]), asked.max_nodes, asked.run_id
        self._store: TCPStore | None = None

    def get_backend(self) -> str:
        return _NAME

    @property
    def use_agent_store(self) -> bool:
        """The workers take it, too, so that none of them listens."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        if self._store is None:
            fd = listening(self._host, self._port).detach() if self._rank == 0 else None
            port = _port_of(fd) if fd is not None else self._port
            self._store = TCPStore(
                self._host, port, self._machines, fd is not None, timedelta(seconds=_JOIN_S), master_listen_fd=fd
            )
        info = RendezvousStoreInfo(self._host, self._store.port)
        return RendezvousInfo(PrefixStore(self._run, self._store), self._rank, self._machines, info)

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run

    def shutdown(self) -> bool:
        return True


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens where others find a host, and nowhere else; on all interfaces where this machine alone
    takes the host's name for itself, or does not have the address.

    Args:
        port: 0 for a free one.

    Raises:
        OSError: The port is taken.
    """
    places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    family, _, _, _, place = min(places, key=lambda one: one[0] != socket.AF_INET)
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    everywhere = ("" if family == socket.AF_INET else "::", port)
    try:
        listener.bind(everywhere if _is_for_itself(host, place[0]) else place)
    except OSError:
        listener.bind(everywhere)  # which raises again if the port is taken
    listener.listen()
    return listener


def interface_towards(host: str) -> str | None:
    """The network interface by which this machine reaches a host, or others where it alone takes the host's name for
    itself; None where it cannot be told."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        alone = _is_for_itself(host, socket.gethostbyname(host))
        probe.connect((_ELSEWHERE if alone else host, 9))  # sends nothing
        own = socket.inet_aton(probe.getsockname()[0])
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has no address
                if fcntl.ioctl(probe, _GET_ADDRESS, struct.pack("256s", name.encode()))[20:24] == own:
                    return name
    return None


def _is_for_itself(host: str, address: str) -> bool:
    """Whether a machine takes a name for itself that others know by another address, as Debian's /etc/hosts does."""
    return address.startswith("127.") and host not in (address, "localhost")


def _port_of(fd: int) -> int:
    with socket.socket(fileno=os.dup(fd)) as listener:
        return int(listener.getsockname()[1])
