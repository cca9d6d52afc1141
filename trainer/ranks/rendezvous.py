"""How ranks meet, and leave: torch's process group, and a second connection to the store at which they met."""

from __future__ import annotations

import fcntl
import os
import re
import socket
import struct
import tempfile
import time
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

from ..errors import TrainerError, UserError
from ..files import remove_leftovers, whole_file
from .collectives import broadcast_object, raise_together
from .launchers import began, launch_name, launcher
from .meeting import Waiting, for_all, in_a_thread, join, raise_own
from .place import Ranks

# From linux/sockios.h: the address of an interface.
_SIOCGIFADDR = 0x8915

# The backend of a group of GPUs: torch takes gloo for tensors in the CPU's memory, and NCCL for a GPU's. Objects and
# barriers go over gloo, too (`_get_object_coll_device` and `barrier` in torch/distributed/distributed_c10d.py), so the
# device need not stop for them. NCCL starts with the first tensor. Given `device_id`, torch would start it at once, and
# every later group with a split of it (`eager_connect_single_device` and `split_from`, same file).
GLOO_AND_NCCL = "cpu:gloo,cuda:nccl"


def start(ranks: Ranks, backend: str, timeout_s: float, failed: BaseException | None = None) -> None:
    """Joins the process group. Collective: every rank, also one that has failed already.

    A rank that fails before the ranks have met comes here with its error. Otherwise the others would wait for it.

    Args:
        ranks: this rank, and how many.
        backend: of the process group.
        timeout_s: how long ranks wait for one another.
        failed: this rank's error.

    Raises:
        TrainerError: on every rank: one of them has failed.
        UserError: the rendezvous address is missing or taken, or the ranks do not come together.
        Exception: `failed`, if it is not for the user. The other ranks leave without a message.
    """
    import torch.distributed as dist

    if failed is not None and (ranks.world_size == 1 or _has_agent_store()):
        raise failed  # there is nobody to tell, or torchrun ends the others
    if dist.is_initialized():
        try:
            raise_together(for_all(failed, ranks))
        except TrainerError:
            raise_own(failed)
            raise
        return
    # DeepSpeed needs this variable. With plain python, nobody has set it.
    os.environ["LOCAL_RANK"] = str(ranks.local_rank)
    timeout = timedelta(seconds=timeout_s)
    if _on_one_machine(ranks):
        # No other machine needs to reach these ranks, so nothing listens on the network. NCCL listens even for one.
        if "nccl" in backend:
            os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        if ranks.world_size > 1:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if ranks.world_size == 1:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        return
    if ranks.local_world_size == ranks.world_size and not _has_own_address():
        _start_on_one_machine(ranks, backend, timeout, failed)
        return
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"{ranks.world_size} ranks on several machines, but {' and '.join(missing)} not set. Set them to the "
            "address of rank 0's machine and a free port there, or start the ranks with deepspeed or torchrun."
        )
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        # gloo looks up the address of this machine's name. On Debian this is a loopback address (127.0.1.1), which no
        # other machine can reach.
        interface = _interface_to(os.environ["MASTER_ADDR"])
        if interface is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = interface
    try:
        if _has_agent_store():
            in_a_thread(
                lambda: dist.init_process_group(
                    backend,
                    store=_agent_store(timeout),
                    rank=ranks.rank,
                    world_size=ranks.world_size,
                    timeout=timeout,
                )
            )
        else:
            join(_store_at_address(ranks, timeout), ranks, backend, timeout, failed)
    except dist.DistNetworkError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"The ranks cannot meet at {where}: {str(error).splitlines()[0]}\n"
            "If another run uses the port, choose one with deepspeed --master_port."
        ) from error


def _has_own_address() -> bool:
    """Whether ranks on one machine meet at MASTER_ADDR: under torchrun, and where they are started by hand."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return True
    given = os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT")
    return bool(given) and "TRAINER_LAUNCH" not in os.environ and launcher() is None


def _on_one_machine(ranks: Ranks) -> bool:
    """Whether all ranks are known to be on this machine.

    Launchers say how many ranks each machine has. If ranks are started by hand, the only sign is an address that no
    other machine can reach.
    """
    if ranks.local_world_size < ranks.world_size:
        return False
    if ranks.world_size == 1 or "TORCHELASTIC_RUN_ID" in os.environ or not _has_own_address():
        return True
    address = os.environ["MASTER_ADDR"]
    return address in ("localhost", "::1") or address.startswith("127.")


def _has_agent_store() -> bool:
    """Whether the ranks meet in the store of torchrun's agent. It may hold values of an earlier start."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _agent_store(timeout: timedelta) -> Any:
    """The store of torchrun's agent, with keys of its own for each restart.

    The agent may use one store for all restarts, which then holds the addresses of killed ranks. With env:// torch does
    not separate the restarts (`_create_c10d_store` in torch/distributed/rendezvous.py).
    """
    from torch._C._distributed_c10d import PrefixStore, TCPStore

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(host, port, None, False, timeout, wait_for_workers=False)
    return PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _store_at_address(ranks: Ranks, timeout: timedelta) -> Any:
    from torch._C._distributed_c10d import TCPStore

    global _server
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(host, port, None, ranks.first, timeout, wait_for_workers=False, multi_tenant=ranks.first)
    _server = store if ranks.first else None
    return store


def _interface_to(host: str) -> str | None:
    """The network interface over which a host is reached; None if that is unknown. Sends nothing."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            own = probe.getsockname()[0]
        if family == socket.AF_INET:
            for _, name in socket.if_nameindex():
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                    try:
                        found = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
                    except OSError:  # it has no address
                        continue
                if socket.inet_ntoa(found[20:24]) == own:
                    return name
        for line in Path("/proc/net/if_inet6").read_text().splitlines() if family == socket.AF_INET6 else ():
            digits, _, _, _, _, name = line.split()
            if socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits)) == own.partition("%")[0]:
                return name
    except OSError:
        pass
    return None


_address: tuple[str, int] | None = None
# Keeps rank 0's store alive: when the object is deleted, the server ends.
_server: Any = None


def _start_on_one_machine(ranks: Ranks, backend: str, timeout: timedelta, failed: BaseException | None) -> None:
    """The ranks meet at a loopback port that rank 0 chooses. So it does not matter if MASTER_PORT is in use."""
    from torch._C._distributed_c10d import TCPStore

    global _address, _server
    notice = _notice_path()
    if ranks.first:
        other = _read_notice(notice)
        if other is not None:
            raise UserError(
                f"Another run from this shell is still waiting for its ranks, with the same MASTER_PORT (process "
                f"{other[1]}).\nEnd it, or choose another MASTER_PORT."
            )
        remove_leftovers(notice.parent, re.compile(r"ranks-.+|\.ranks-.+\.\d+"))
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        listener.listen(ranks.world_size + 16)
        port = listener.getsockname()[1]
        _server = store = TCPStore(
            "127.0.0.1", port, None, True, timeout, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        with whole_file(notice) as temporary:
            temporary.write_text(f"{port} {os.getpid()} {began(os.getpid())}")
    else:
        waiting = Waiting(timeout)
        while (found := _read_notice(notice)) is None:
            if waiting.over:
                raise UserError(f"Rank 0 did not start within {timeout.total_seconds():g} s.")
            if ranks.rank == 1 and waiting.due:
                waiting.tell("rank 0")
            time.sleep(0.01)
        port = found[0]
        store = TCPStore("127.0.0.1", port, None, False, timeout, wait_for_workers=False)
    _address = ("127.0.0.1", port)
    try:
        join(store, ranks, backend, timeout, failed)
    finally:
        if ranks.first:
            notice.unlink(missing_ok=True)  # every rank has read it


def _read_notice(notice: Path) -> tuple[int, int] | None:
    """(port, process) that rank 0 has written; None if there is no such file yet, or if that process is gone."""
    try:
        port, process, began_then = notice.read_text().split(" ")
        return (int(port), int(process)) if began(int(process)) == began_then else None
    except (OSError, ValueError):
        return None


def _notice_path() -> Path:
    """The file in which rank 0 leaves the port. Only the ranks of one launch share its name. The folder is private."""
    folder = Path(tempfile.gettempdir()) / f"strong-scaling-trainer-{os.getuid()}"
    # The temporary folder is open to everybody. In it, another user could write the file and name any port.
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise UserError(f"The folder {folder} belongs to someone else. Set TMPDIR to a folder of your own.")
    return folder / f"ranks-{launch_name()}"


def side_store(timeout_s: float) -> Any:
    """A second connection to the store at which the ranks met, for another thread; None with one rank.

    Collective: every rank.
    """
    import torch.distributed as dist
    from torch._C._distributed_c10d import PrefixStore, TCPStore

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    host, port = _address or (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    store = TCPStore(host, port, None, False, timedelta(seconds=timeout_s), wait_for_workers=False)
    # torchrun's store may survive a restart of the ranks, and its restart count may stay the same. So each start uses
    # a prefix of its own, and cannot read old messages.
    return PrefixStore(f"watch-{broadcast_object(uuid.uuid4().hex)}", store)


def close() -> None:
    """Leaves the process group, if there is one."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
