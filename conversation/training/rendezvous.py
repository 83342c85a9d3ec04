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
from typing import Any

from conversation.errors import UserError, list_problems
from conversation.runs.machine import code_sha256, number_of_processes, versions
from conversation.training.contact import Contact, accept, connect, end_this_process, listen

MEETING = 45  # seconds; all processes import the same libraries before they meet, and do nothing else
TOGETHER = "start accelerate launch on every machine, with the same config file but for machine_rank, within a minute"
OPEN_PORTS = "let the machines reach each other at all TCP ports: the libraries choose free ones"


class Group:
    """All processes of a training. They have met when this exists. `names`: of each, for a sentence, by rank."""

    def __init__(self) -> None:
        """Raises UserError when not all come within MEETING, and when they are not the same program."""
        from torch.distributed import DistError, rendezvous

        from conversation.models.device import decided_device

        self.rank, self.size = int(os.environ["RANK"]), number_of_processes()
        self.place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        self._until = time.monotonic() + MEETING
        print(f"Process {self.rank} of {self.size} meets the others at {self.place} ...", file=sys.stderr, flush=True)
        self.names = [f"process {rank} of {self.size}" for rank in range(self.size)]
        device = decided_device()
        seconds = MEETING if self.rank == 0 else MEETING / 2  # torch then sleeps, and tries once more for as long
        try:
            self._store, _, _ = next(rendezvous("env://", timeout=datetime.timedelta(seconds=seconds)))
            mine = {"host": socket.gethostname(), "device": device.kind, "code": code_sha256()}
            mine |= {name: version.split("+")[0] for name, version in versions().items()}  # without +cu130
            found = self.said_by_all("process", mine, MEETING)
        except DistError as error:
            raise self._not_met(str(error).splitlines()[0]) from None
        for rank, each in enumerate(found):
            self.names[rank] += f" (host {each.get('host')})"
        self._check_same_program(found)
        connections = self._connect_to_first() if self.rank else self._connect_to_others()
        if device.kind == "cpu":
            _choose_interface([connection.getsockname()[0] for connection in connections.values()])
        self.contact = Contact(connections, end_this_process)

    def said_by_all(self, name: str, mine: Any, seconds: float | None = None) -> list[Any]:
        """What every process says under a name, by rank. Raises UserError when one says nothing for so many seconds.

        Without a limit this waits as long as the others are there: one may have to download the base.
        """
        self._store.set(f"{name} {self.rank}", json.dumps(mine))
        until = time.monotonic() + (seconds or math.inf)
        for rank in range(self.size):
            while not self._store.check([f"{name} {rank}"]):
                if time.monotonic() > until:
                    raise self._not_met(f"{self.names[rank]} has not come in {MEETING} seconds")
                time.sleep(0.05)  # and heed signals
        found = [json.loads(self._store.get(f"{name} {rank}")) for rank in range(self.size)]
        self._store.add(f"{name}: read by", 1)
        while self.rank == 0 and self._store.add(f"{name}: read by", 0) < self.size and time.monotonic() < until:
            time.sleep(0.05)  # what is stored goes with the first process or its launcher
        return found

    def _not_met(self, reason: str) -> UserError:
        return UserError(
            f"the {self.size} processes of this training do not meet at {self.place}: {reason}",
            f"{TOGETHER}, or see there why one failed; for one process, unset WORLD_SIZE",
        )

    def _check_same_program(self, found: list[dict[str, str]]) -> None:
        problems = []
        words = {"code": "the project's code", "device": "the device"}
        for name, each in zip(self.names, found, strict=True):
            for key in sorted({*found[0], *each} - {"host"}):
                first, other = (str(one.get(key, "none"))[:12] for one in (found[0], each))
                if first != other:
                    problems.append(f"{words.get(key, key)}: {self.names[0]} has {first}, {name} has {other}")
        if problems:
            raise UserError(
                f"the machines do not train with the same program:\n{list_problems(problems)}",
                "bring every machine to the same commit and the same requirements.txt; --device cpu uses no card",
            )

    def _connect_to_others(self) -> dict[str, socket.socket]:
        server, port, word = listen()
        self._store.set("contact", json.dumps([port, word]))
        others = set(range(1, self.size))
        found = accept(server, word, others, max(10.0, self._until - time.monotonic()))
        if missing := others - set(found):
            names = ", ".join(self.names[rank] for rank in sorted(missing))
            raise UserError(f"{names} cannot connect to port {port} of {self.names[0]}", OPEN_PORTS)
        return {self.names[rank]: found[rank] for rank in found}

    def _connect_to_first(self) -> dict[str, socket.socket]:
        port, word = json.loads(self._store.get("contact"))
        address = os.environ["MASTER_ADDR"]
        try:
            connection = connect(address, port, word, self.rank, max(10.0, self._until - time.monotonic()))
        except OSError as error:
            reason = f"{self.names[self.rank]} cannot connect to port {port} of {address}: {error.strerror or error}"
            raise UserError(reason, OPEN_PORTS) from None
        return {self.names[0]: connection}


def _choose_interface(own_addresses: list[str]) -> None:
    """Let gloo use the network interface by which the processes have met.

    By itself it takes the one that the host's name stands for, which is often the loopback.
    """
    import psutil

    found = [ipaddress.ip_address(address.split("%")[0]) for address in own_addresses]
    found = [getattr(address, "ipv4_mapped", None) or address for address in found]
    own = min(found, key=lambda address: address.is_loopback)  # another machine's way to here, if there is one
    for name, addresses in psutil.net_if_addrs().items():
        for each in addresses:
            with contextlib.suppress(ValueError):  # a hardware address
                address = ipaddress.ip_address(each.address.split("%")[0])
                if address == own or (address.is_loopback and own.is_loopback):
                    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
