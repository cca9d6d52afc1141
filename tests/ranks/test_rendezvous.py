"""How ranks meet: alone, on one machine at a port of their own, on several at a given one; and how they leave."""

from __future__ import annotations

import os
import socket
import time
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from trainer.errors import UserError
from trainer.ranks import launchers, meeting, rendezvous
from trainer.ranks.collectives import gather_objects
from trainer.ranks.place import Ranks
from trainer.ranks.rendezvous import close, side_store, start
from trainer.ranks.workers import run_ranks

ALONE = Ranks(0, 1, 0, 1)
NAMES = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TRAINER_LAUNCH", "LOCAL_RANK")
NAMES += ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    assert not dist.is_initialized()
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is put back after the test
        monkeypatch.delenv(name)
    monkeypatch.setattr(rendezvous, "_address", None)
    monkeypatch.setattr(rendezvous.tempfile, "gettempdir", lambda: str(tmp_path))
    yield
    close()


@pytest.fixture
def taken() -> Iterator[str]:
    """A port at which something else listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield str(listener.getsockname()[1])


# One rank


def test_alone_a_group_needs_no_address_and_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous.socket, "socket", None)
    start(ALONE, "gloo", 10.0)
    assert (dist.get_rank(), dist.get_world_size(), os.environ["LOCAL_RANK"]) == (0, 1, "0")
    assert side_store(1.0) is None
    group = dist.group.WORLD
    start(ALONE, "gloo", 10.0)  # one that is there is kept
    assert dist.group.WORLD is group


def test_leaving_twice_is_no_error() -> None:
    start(ALONE, "gloo", 10.0)
    close()
    assert not dist.is_initialized()
    close()
    assert side_store(1.0) is None
    start(ALONE, "gloo", 10.0)  # and one may meet again
    assert dist.is_initialized()


def test_barriers_and_objects_leave_the_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """With NCCL only, torch takes the GPU for them, and warns that nobody has said which (an error in these tests)."""
    monkeypatch.setattr(torch._C, "_get_accelerator", lambda: torch.device("cuda"))  # as where there is one
    start(ALONE, rendezvous.GLOO_AND_NCCL.replace("nccl", "gloo"), 10.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dist.barrier()
        found: list[Any] = [None]
        dist.all_gather_object(found, "here")
        dist.broadcast_object_list(found, src=0)
    assert found == ["here"]


# Several on one machine


def meet(ranks: Ranks) -> dict[str, Any]:
    start(ranks, "gloo", 60.0)
    found: dict[str, Any] = {"group": gather_objects(ranks.rank), "interface": os.environ["GLOO_SOCKET_IFNAME"]}
    # Two runs that follow one another in the same processes.
    for run in ("first", "second"):
        store = side_store(30.0)
        if ranks.first:
            if run == "first":
                store.set("failed", "rank 0")
            store.set("ready", run)
        store.wait(["ready"])
        found[run] = (store.get("ready").decode(), store.check(["failed"]))
        gather_objects(None)
    found["notice"] = rendezvous._notice_path().exists()
    close()
    return found


def test_a_meeting_on_one_machine(taken: str, tmp_path: Path) -> None:
    """A taken MASTER_PORT harms nobody: rank 0 chooses a port of its own."""
    found = run_ranks(meet, 3, environment={"MASTER_PORT": taken, "TMPDIR": str(tmp_path)}, timeout_s=120.0)
    for own in found:
        assert own["group"] == [0, 1, 2]
        assert own["interface"] == "lo"  # nothing listens beyond this machine
        assert own["first"] == ("first", True)
        assert own["second"] == ("second", False)  # what was said in the first run is not heard in the second
        assert not own["notice"]


def meet_by_hand(ranks: Ranks, port: str) -> list[int]:
    """Each rank in a session of its own: no parent, shell or name in common but the address."""
    os.setsid()
    launchers.launcher = lambda: None
    os.environ.pop("TRAINER_LAUNCH")
    os.environ["MASTER_PORT"] = port
    start(ranks, "gloo", 60.0)
    assert side_store(30.0) is not None
    return gather_objects(ranks.rank)


def test_ranks_that_are_started_by_hand_meet_at_their_address(tmp_path: Path) -> None:
    """As from two terminals, or with a program such as timeout before each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    found = run_ranks(meet_by_hand, 2, port, environment={"TMPDIR": str(tmp_path)}, timeout_s=30.0)
    assert found == [[0, 1], [0, 1]]


def meet_later(ranks: Ranks, port: str) -> list[int]:
    """Rank 1 finds what a start has left that was killed; rank 0 comes a second later."""
    if ranks.first:
        time.sleep(1.0)
    else:
        rendezvous._notice_path().write_text(f"{port} {2**22 + 1} 12345")
    start(ranks, "gloo", 60.0)
    return gather_objects(ranks.rank)


def test_what_a_killed_start_has_left_is_passed_over(taken: str, tmp_path: Path) -> None:
    """As of ranks that are started by hand, again and again, from one shell with one MASTER_PORT."""
    found = run_ranks(meet_later, 2, taken, environment={"TMPDIR": str(tmp_path)}, timeout_s=30.0)
    assert found == [[0, 1], [0, 1]]


def test_a_start_that_still_waits_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ranks and those of this start would mix."""
    notice = rendezvous._notice_path()
    notice.write_text(f"29500 {os.getpid()} {launchers.began(os.getpid())}")
    with pytest.raises(UserError, match=rf"with the same MASTER_PORT \(process {os.getpid()}\)"):
        start(Ranks(0, 2, 0, 2), "gloo", 1.0)
    assert notice.exists()


def fail_early(ranks: Ranks, victims: list[int], kind: str, on_machines: bool) -> tuple[str, str, bool | None, float]:
    """What a rank raises if these have failed before the meeting: (type, message, whether it speaks, seconds)."""
    failed: Exception | None = None
    if ranks.rank in victims:
        failed = UserError("the folder is in use") if kind == "user" else KeyError("a slip")
    began_s = time.monotonic()
    place = Ranks(ranks.rank, ranks.world_size, 0, 1) if on_machines else ranks
    try:
        start(place, "gloo", 600.0, failed)
    except Exception as error:
        # Whoever has read of it may end; rank 0, which holds the store, is the last.
        return type(error).__name__, str(error), getattr(error, "speaks", None), time.monotonic() - began_s
    return "met", "", None, 0.0


@pytest.mark.parametrize("on_machines", [False, True], ids=["one machine", "several"])
@pytest.mark.parametrize("victims", [[0], [1], [0, 1, 2]])
def test_a_rank_that_fails_before_the_meeting_is_heard_by_all(
    tmp_path: Path, victims: list[int], on_machines: bool
) -> None:
    found = run_ranks(
        fail_early, 3, victims, "user", on_machines, environment={"TMPDIR": str(tmp_path)}, timeout_s=60.0
    )
    for kind, message, speaks, seconds in found:
        assert (kind, message, speaks) == ("UserError", "the folder is in use", None)
        assert seconds < 20.0


def test_a_traceback_before_the_meeting_is_that_ranks_alone(tmp_path: Path) -> None:
    found = run_ranks(fail_early, 3, [1], "slip", False, environment={"TMPDIR": str(tmp_path)}, timeout_s=60.0)
    assert [(kind, speaks) for kind, _, speaks, _ in found] == [
        ("TrainerError", False),
        ("KeyError", None),
        ("TrainerError", False),
    ]


def test_rank_0_that_never_comes_is_named() -> None:
    with pytest.raises(UserError, match=r"Rank 0 did not start within 0\.2 s\."):
        start(Ranks(1, 2, 1, 2), "gloo", 0.2)


def test_a_rank_that_is_long_in_coming_is_told_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As one that hangs where its task is imported. Only one rank says it, at longer and longer intervals."""
    monkeypatch.setattr(meeting, "_TELL_S", 0.1)
    for place in (Ranks(0, 12, 0, 1), Ranks(1, 12, 0, 1)):
        with pytest.raises(UserError):
            meeting._meet(dist.HashStore(), place, timedelta(seconds=1.0), None)  # type: ignore[attr-defined]
    lines = capsys.readouterr().err.split()
    said = " ".join(lines)
    assert said.count("note:") in (3, 4)
    assert "the other ranks have been waiting for ranks 1, 2, 3, 4, 5, 6, 7, 8, ...: still starting, or hanging" in said
    for place in (Ranks(1, 3, 1, 3), Ranks(2, 3, 2, 3)):
        with pytest.raises(UserError):
            start(place, "gloo", 0.5)
    assert capsys.readouterr().err.count("have been waiting for rank 0: still starting") in (2, 3)


def test_launches_do_not_meet_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two launchers; of two launches of one launcher, by port or by name."""
    monkeypatch.setattr(launchers, "launcher", lambda: None)
    paths = [rendezvous._notice_path()]
    monkeypatch.setenv("MASTER_PORT", "29500")
    paths.append(rendezvous._notice_path())
    monkeypatch.setattr(launchers, "launcher", os.getpid)
    paths.append(rendezvous._notice_path())
    monkeypatch.setenv("TRAINER_LAUNCH", "mine")
    paths.append(rendezvous._notice_path())
    assert len(set(paths)) == 4
    monkeypatch.setattr(launchers, "launcher", lambda: None)
    assert rendezvous._notice_path() == paths[3]  # all ranks of one launch do, in whatever session each is


def test_the_folder_of_notices_is_ones_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Else another user of the machine could choose the port at which ranks meet."""
    folder = rendezvous._notice_path().parent
    assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700
    mine = os.getuid()
    monkeypatch.setattr(rendezvous.os, "getuid", lambda: mine + 1)
    with pytest.raises(UserError, match=r"belongs to someone else\. Set TMPDIR to a folder of your own"):
        rendezvous._notice_path()


# Several machines


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({}, "but MASTER_ADDR and MASTER_PORT not set"),
        ({"MASTER_ADDR": "127.0.0.1"}, "but MASTER_PORT not set"),
        ({"MASTER_ADDR": "", "MASTER_PORT": "29500"}, "but MASTER_ADDR not set"),
    ],
)
def test_an_address_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], missing: str
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=rf"^4 ranks on several machines, {missing}\. Set them to the address"):
        start(Ranks(2, 4, 0, 2), "gloo", 1.0)


def test_under_torchrun_ranks_meet_where_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even on one machine: its store is there before them."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    with pytest.raises(UserError, match="but MASTER_ADDR and MASTER_PORT not set"):
        start(Ranks(0, 2, 0, 2), "gloo", 1.0)


def test_a_taken_port_of_several_machines_is_named(monkeypatch: pytest.MonkeyPatch, taken: str) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", taken)
    with pytest.raises(UserError) as caught:
        start(Ranks(0, 4, 0, 2), "gloo", 2.0)
    assert f"The ranks cannot meet at 127.0.0.1:{taken}: " in str(caught.value)
    assert "choose one with deepspeed --master_port" in str(caught.value)


def test_gloo_takes_the_interface_to_rank_0_unless_one_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str | None] = []
    monkeypatch.setattr(rendezvous, "_store_at_address", lambda *a: dist.HashStore())  # type: ignore[attr-defined]
    monkeypatch.setattr(rendezvous, "join", lambda *a: given.append(os.environ.get("GLOO_SOCKET_IFNAME")))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    start(Ranks(1, 4, 1, 2), "gloo", 1.0)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine0")
    start(Ranks(1, 4, 1, 2), "gloo", 1.0)
    assert given == ["lo", "mine0"]
    assert os.environ["LOCAL_RANK"] == "1"


@pytest.mark.parametrize(
    ("given", "place", "own", "interfaces"),
    [
        ({}, ALONE, False, (None, "lo")),
        ({}, Ranks(1, 4, 1, 4), False, ("lo", "lo")),  # deepspeed, mpirun, srun
        ({"TORCHELASTIC_RUN_ID": "7"}, Ranks(1, 4, 1, 4), True, ("lo", "lo")),
        ({"MASTER_ADDR": "localhost"}, Ranks(1, 4, 1, 4), True, ("lo", "lo")),  # by hand
        ({"MASTER_ADDR": "127.0.0.1"}, Ranks(1, 4, 1, 4), True, ("lo", "lo")),
        ({}, Ranks(1, 4, 1, 4), True, ("eth7", None)),  # by hand, on machines of which nothing is known
        ({}, Ranks(1, 4, 1, 2), False, ("eth7", None)),
        ({"TORCHELASTIC_RUN_ID": "7"}, Ranks(1, 4, 1, 2), True, ("eth7", None)),
        ({"NCCL_SOCKET_IFNAME": "mine", "GLOO_SOCKET_IFNAME": "own"}, Ranks(1, 4, 1, 4), False, ("own", "mine")),
    ],
)
def test_what_listens_beyond_this_machine(
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, str],
    place: Ranks,
    own: bool,
    interfaces: tuple[str | None, str | None],
) -> None:
    """Nothing, if all ranks are on it. Else gloo takes the interface to rank 0, and NCCL knows which to take itself."""
    for name, value in ({"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"} | given).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rendezvous, "_has_own_address", lambda: own)
    monkeypatch.setattr(rendezvous, "_interface_to", lambda host: "eth7")
    monkeypatch.setattr(rendezvous, "_store_at_address", lambda *a: dist.HashStore())  # type: ignore[attr-defined]
    monkeypatch.setattr(rendezvous, "_start_on_one_machine", lambda *a: None)
    backends: list[str] = []
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **k: backends.append(backend))
    monkeypatch.setattr(rendezvous, "join", lambda store, ranks, backend, *a: backends.append(backend))
    start(place, rendezvous.GLOO_AND_NCCL, 1.0)
    assert (os.environ.get("GLOO_SOCKET_IFNAME"), os.environ.get("NCCL_SOCKET_IFNAME")) == interfaces
    assert set(backends) <= {"cpu:gloo,cuda:nccl"}


def test_without_gpus_nccl_is_left_alone() -> None:
    start(ALONE, "gloo", 10.0)
    assert "NCCL_SOCKET_IFNAME" not in os.environ


def test_the_interface_to_a_host() -> None:
    assert rendezvous._interface_to("127.0.0.1") == "lo"
    assert rendezvous._interface_to("no.such.host.invalid") is None
    if Path("/proc/net/if_inet6").exists() and "lo" in Path("/proc/net/if_inet6").read_text():
        assert rendezvous._interface_to("::1") == "lo"


def test_a_restart_by_torchrun_does_not_meet_killed_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its agent may keep one store for all restarts, with the addresses of the ranks before."""
    server = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=5), wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    stores = []
    for attempt in ("0", "0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        stores.append(rendezvous._agent_store(timedelta(seconds=5)))
    stores[0].set("address", "of a killed rank")
    assert stores[1].check(["address"])
    assert not stores[2].check(["address"])
