"""What processes that meet compare, and by which way they reach each other. No torch, no training."""

from dataclasses import fields, replace
from types import SimpleNamespace

import psutil
import pytest
from records import some_record

from conversation.errors import UserError
from conversation.runs import machine
from conversation.runs.record import differences
from conversation.training import rendezvous
from conversation_config import TrainingConfig

ADDRESSES = {
    "lo": ["127.0.0.1", "::1", "00:00:00:00:00:00"],
    "eth0": ["10.99.0.1", "fe80::1%eth0", "ca:0e:5a:0b:f2:52"],
}


@pytest.mark.parametrize(
    ("own", "interface"),
    [
        (["127.0.0.1"], "lo"),
        (["::ffff:127.0.0.2"], "lo"),
        (["10.99.0.1"], "eth0"),
        (["::ffff:127.0.0.1", "::ffff:10.99.0.1"], "eth0"),  # of three processes, one on this machine
        (["fe80::1%eth0"], "eth0"),
        (["192.168.7.7"], None),
    ],
)
def test_gloo_takes_the_interface_by_which_the_processes_met(own, interface, monkeypatch):
    found = {name: [SimpleNamespace(address=each) for each in addresses] for name, addresses in ADDRESSES.items()}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)
    assert chosen(monkeypatch, 0, own) == interface
    assert chosen(monkeypatch, 0, own, {"GLOO_SOCKET_IFNAME": "wlan0"}) == "wlan0"  # what a user has set stays


def chosen(monkeypatch, rank, own, environment=None, store=None):
    """The interface that a process of a rank lets gloo use. `own`: its addresses."""
    monkeypatch.setattr(rendezvous.os, "environ", {**(environment or {})})
    rendezvous.choose_interface(rank, own, Store() if store is None else store)
    return rendezvous.os.environ.get("GLOO_SOCKET_IFNAME")


class Store(dict):
    """A store that all processes have, as torch.distributed's."""

    set, get = dict.__setitem__, dict.__getitem__


def test_a_process_beside_the_first_takes_the_interface_of_the_first(monkeypatch):
    """It reaches it over the loopback, which others could not: Debian's own host name means 127.0.1.1."""
    found = {name: [SimpleNamespace(address=each) for each in addresses] for name, addresses in ADDRESSES.items()}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)
    store = Store()
    assert chosen(monkeypatch, 0, ["127.0.1.1", "10.99.0.1"], store=store) == "eth0"
    assert chosen(monkeypatch, 1, ["127.0.1.1"], store=store) == "eth0"
    assert chosen(monkeypatch, 2, ["10.99.0.1"], store=Store()) == "eth0"  # elsewhere: as it is reached
    store = Store()
    assert chosen(monkeypatch, 0, ["127.0.0.1"], store=store) == chosen(monkeypatch, 1, ["::1"], store=store) == "lo"
    store = Store()
    assert chosen(monkeypatch, 0, ["192.168.7.7"], store=store) is None
    assert chosen(monkeypatch, 1, ["127.0.0.1"], store=store) is None


class StoreOfTwo:
    """A store in which the other process has said nothing."""

    def set(self, name, value):
        pass

    def check(self, names):
        return names == ["record 0"]


def test_a_process_that_is_lost_is_not_waited_for_any_longer():
    monitor = SimpleNamespace(reason="")
    names = ["process 0 of 2", "process 1 of 2"]
    group = rendezvous.Group(0, names, "127.0.0.1:1", StoreOfTwo(), monitor)
    with pytest.raises(UserError, match="the 2 processes of this training do not meet"):
        group.all_gather("record", {}, 0.2)
    monitor.reason = "process 1 of 2 has failed: no data"
    with pytest.raises(UserError, match="process 1 of 2 has failed: no data") as lost:
        group.all_gather("record", {}, 20)
    assert lost.value.exit_status == 1


def compare(*found):
    """Compare what processes said of themselves when they met."""
    rendezvous.check_same_program([f"process {rank}" for rank in range(len(found))], list(found))


def test_code_device_and_versions_are_compared_and_every_difference_is_listed():
    first = {"host": "a", "code": "1" * 64, "device": "cpu", "torch": "2.13.0", "trl": "1.0"}
    compare(first, {**first, "host": "b"}, first)
    with pytest.raises(UserError) as refused:
        compare(first, {**first, "device": "cuda"}, {**first, "code": "2" * 64, "torch": "2.12.0", "trl": None})
    assert str(refused.value).splitlines()[1:] == [
        "  the device: process 0 has cpu, process 1 has cuda",
        f"  the project's code: process 0 has {'1' * 12}, process 2 has {'2' * 12}",
        "  torch: process 0 has 2.13.0, process 2 has 2.12.0",
        "  trl: process 0 has 1.0, process 2 has None",
    ]
    nightly = [{**first, "torch": f"2.14.0.dev2026110{day}"} for day in (1, 2)]
    with pytest.raises(UserError, match=r"torch: process 0 has 2.14.0.dev20261101, process 1 has 2.14.0.dev20261102"):
        compare(*nightly)


def test_the_hash_of_the_code_is_of_names_and_contents_of_the_modules_only(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "PROJECT", tmp_path)
    (tmp_path / "conversation" / "data").mkdir(parents=True)
    for name in ("conversation_config.py", "conversation/data/trees.py"):
        (tmp_path / name).write_text(f"# {name}")
    before = machine.code_sha256()
    (tmp_path / "README.md").write_text("text")
    (tmp_path / "training-runs").mkdir()
    assert machine.code_sha256() == before
    (tmp_path / "conversation" / "data" / "trees.py").write_text("# changed")
    changed = machine.code_sha256()
    (tmp_path / "conversation" / "data" / "trees.py").rename(tmp_path / "conversation" / "trees.py")
    assert len({before, changed, machine.code_sha256()}) == 3


def test_every_setting_makes_a_difference_between_processes_but_where_data_and_base_are():
    record = some_record()
    for spec in fields(TrainingConfig):
        other = replace(TrainingConfig())
        object.__setattr__(other, spec.name, "another")
        found = differences(record, replace(record, config=other))
        if spec.name in ("training_data", "base_model"):
            assert found == []
        else:
            assert found == [f"--{spec.name}: the first has {getattr(record.config, spec.name)}, this one another"]
    elsewhere = replace(record, data=replace(record.data, source="x"), base_model=replace(record.base_model, name="y"))
    assert differences(record, elsewhere) == []
    other_data = replace(record, data=replace(record.data, held_out_sha256="0123456789abcdef"))
    assert differences(record, other_data) == ["the held-out data: the first has held out, this one 0123456789ab"]
    other_base = replace(record, base_model=replace(record.base_model, tokenizer_fingerprint="0123456789abcdef"))
    assert differences(record, other_base) == ["the tokenizer: the first has fingerprint, this one 0123456789ab"]
