"""How the processes of one training meet before they work, and whether they are the same program."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import json
import math
import os
import socket
import sys
import time
from dataclasses import dataclass
from typing import Any

from conversation.errors import TRIED_AND_FAILED, UserError, list_problems
from conversation.runs.machine import code_sha256, number_of_processes, versions
from conversation.training.peer_monitor import HINT, PeerMonitor, accept, connect, end_this_process, listen

RENDEZVOUS_SECONDS = 45  # all processes import the same libraries before they meet, and do nothing else
TOGETHER = "start accelerate launch on every machine, with the same config file but for machine_rank, within a minute"
OPEN_PORTS = "let the machines reach each other at all TCP ports: the libraries choose free ones"


@dataclass
class Group:
    """All processes of a training. `names`: of each, for a sentence, by rank. `store`: a torch.distributed.Store."""

    rank: int
    names: list[str]
    place: str
    store: Any
    monitor: PeerMonitor

    def all_gather(self, name: str, mine: Any, seconds: float = math.inf) -> list[Any]:
        """What every process says under a name, by rank.

        Raises UserError when one has said nothing so many seconds after the call, or is lost. Without a limit this
        waits as long as the others are there: one may have to download the base.
        """
        self.store.set(f"{name} {self.rank}", json.dumps(mine))
        until = time.monotonic() + seconds
        for rank, process in enumerate(self.names):
            while not self.store.check([f"{name} {rank}"]):
                if time.monotonic() > until:
                    raise self.not_met(f"{process} has not come in {RENDEZVOUS_SECONDS} seconds")
                self._pause()
        found = [json.loads(self.store.get(f"{name} {rank}")) for rank in range(len(self.names))]
        self.store.add(f"{name}: read by", 1)
        while self.rank == 0 and self.store.add(f"{name}: read by", 0) < len(self.names) and time.monotonic() < until:
            self._pause()  # what is stored goes with the first process or its launcher
        return found

    def _pause(self) -> None:
        """Wait a moment and heed signals. Raises UserError when a process is lost."""
        time.sleep(0.05)
        if self.monitor.reason:
            raise UserError(self.monitor.reason, HINT, TRIED_AND_FAILED)

    def not_met(self, reason: str) -> UserError:
        return UserError(
            f"the {len(self.names)} processes of this training do not meet at {self.place}: {reason}",
            f"{TOGETHER}, or see there why one failed; for one process, unset WORLD_SIZE",
        )


def rendezvous() -> Group:
    """Meet the other processes, compare programs, and connect to them.

    Raises UserError when not all come within RENDEZVOUS_SECONDS, and when they are not the same program.
    """
    from torch import distributed

    from conversation.models.device import decided_device

    rank, size = int(os.environ["RANK"]), number_of_processes()
    names = [f"process {rank} of {size}" for rank in range(size)]
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    until = time.monotonic() + RENDEZVOUS_SECONDS
    print(f"Process {rank} of {size} meets the others at {place} ...", file=sys.stderr, flush=True)
    group = Group(rank, names, place, None, PeerMonitor({}, end_this_process))  # nobody is connected yet
    device = decided_device()
    seconds = RENDEZVOUS_SECONDS / (2 if rank else 1)  # torch then sleeps, and tries once more for as long
    try:
        group.store, _, _ = next(distributed.rendezvous("env://", timeout=datetime.timedelta(seconds=seconds)))
        mine = {"host": socket.gethostname(), "device": device.kind, "code": code_sha256()}
        mine |= {name: version.split("+")[0] for name, version in versions().items()}  # without +cu130
        found = group.all_gather("process", mine, RENDEZVOUS_SECONDS)
        group.names = [f"{name} (host {each.get('host')})" for name, each in zip(names, found, strict=True)]
        check_same_program(group.names, found)
        seconds = max(10.0, until - time.monotonic())
        connections = _connect_to_first(group, seconds) if rank else _connect_to_others(group, seconds)
        if device.kind == "cpu":
            own = [connection.getsockname()[0] for connection in connections.values()]
            choose_interface(rank, own, group.store)
    except distributed.DistError as error:
        raise group.not_met(str(error).splitlines()[0]) from None
    group.monitor = PeerMonitor(connections, end_this_process)
    return group


def _connect_to_others(group: Group, seconds: float) -> dict[str, socket.socket]:
    server, port, token = listen()
    group.store.set("peer monitor", json.dumps([port, token]))
    others = set(range(1, len(group.names)))
    found = accept(server, token, others, seconds)
    if missing := others - set(found):
        names = ", ".join(group.names[rank] for rank in sorted(missing))
        raise UserError(f"{names} cannot connect to port {port} of {group.names[0]}", OPEN_PORTS)
    return {group.names[rank]: found[rank] for rank in found}


def _connect_to_first(group: Group, seconds: float) -> dict[str, socket.socket]:
    port, token = json.loads(group.store.get("peer monitor"))
    address = os.environ["MASTER_ADDR"]
    try:
        connection = connect(address, port, token, group.rank, seconds)
    except OSError as error:
        reason = f"{group.names[group.rank]} cannot connect to port {port} of {address}: {error.strerror or error}"
        raise UserError(reason, OPEN_PORTS) from None
    return {group.names[0]: connection}


def check_same_program(names: list[str], found: list[dict[str, str]]) -> None:
    """Raises UserError that lists how what processes say of themselves differs. `names`: of the processes, by rank."""
    problems = []
    words = {"code": "the project's code", "device": "the device"}
    for name, each in zip(names, found, strict=True):
        for key in sorted({*found[0], *each} - {"host"}):
            first, other = (str(one.get(key, "none")) for one in (found[0], each))
            if first != other:
                shown = slice(12 if key == "code" else None)  # a hash
                problems.append(f"{words.get(key, key)}: {names[0]} has {first[shown]}, {name} has {other[shown]}")
    if problems:
        raise UserError(
            f"the machines do not train with the same program:\n{list_problems(problems)}",
            "bring every machine to the same commit and the same requirements.txt; --device cpu uses no card",
        )


def choose_interface(rank: int, own_addresses: list[str], store: Any) -> None:
    """Let gloo use the network interface by which the processes have met; what the user has set is left.

    By itself gloo takes the one of the host's name, which is often the loopback. `own_addresses`: of this process's
    connections. One that reaches the first process over the loopback does not see how other machines reach this one:
    it takes the interface of the first. `store`: a torch.distributed.Store.
    """
    found = [_address(address) for address in own_addresses]
    own = min(found, key=lambda address: address.is_loopback)  # another machine's way to here, if there is one
    interface = json.loads(store.get("interface")) if rank and own.is_loopback else _interface_with(own)
    if interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    if rank == 0:
        store.set("interface", json.dumps(os.environ.get("GLOO_SOCKET_IFNAME")))


def _interface_with(own: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str | None:
    """The network interface with an address, or with any of the loopback."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        for each in addresses:
            with contextlib.suppress(ValueError):  # a hardware address
                address = _address(each.address)
                if address == own or (address.is_loopback and own.is_loopback):
                    return name
    return None


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    address = ipaddress.ip_address(text.split("%")[0])
    return getattr(address, "ipv4_mapped", None) or address
