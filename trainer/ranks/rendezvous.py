"""How ranks meet, and leave: torch's process group, and a second connection to the store at which they met."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import tempfile
import time
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import whole_file
from .collectives import broadcast_object
from .place import Ranks

# From linux/sockios.h: the address of an interface.
_SIOCGIFADDR = 0x8915


def start(ranks: Ranks, backend: str, timeout_s: float) -> None:
    """Joins the process group. Collective: every rank.

    Raises:
        UserError: the rendezvous address is missing or taken.
    """
    import torch.distributed as dist

    if dist.is_initialized():
        return
    # DeepSpeed needs this variable. With plain python, nobody has set it.
    os.environ["LOCAL_RANK"] = str(ranks.local_rank)
    timeout = timedelta(seconds=timeout_s)
    if ranks.world_size == 1:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        return
    if ranks.local_world_size == ranks.world_size and "TORCHELASTIC_RUN_ID" not in os.environ:
        _start_on_one_machine(ranks, backend, timeout)
        return
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UserError(f"{ranks.world_size} ranks, but {' and '.join(missing)} not set. Start them with a launcher.")
    if backend == "gloo" and "GLOO_SOCKET_IFNAME" not in os.environ:
        # gloo looks up the address of this machine's name. On Debian this is a loopback address (127.0.1.1), which no
        # other machine can reach.
        interface = _interface_to(os.environ["MASTER_ADDR"])
        if interface is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = interface
    try:
        dist.init_process_group(
            backend, init_method="env://", rank=ranks.rank, world_size=ranks.world_size, timeout=timeout
        )
    except dist.DistNetworkError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"The ranks cannot meet at {where}: {str(error).splitlines()[0]}\n"
            "If another run uses the port, choose one with deepspeed --master_port."
        ) from error


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
_server: Any = None


def _start_on_one_machine(ranks: Ranks, backend: str, timeout: timedelta) -> None:
    """The ranks meet at a loopback port that rank 0 chooses, so a MASTER_PORT that is in use does not matter."""
    import torch.distributed as dist
    from torch._C._distributed_c10d import PrefixStore, TCPStore

    global _address, _server
    # No other machine needs to reach these ranks, so nothing listens on the network.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    notice = _notice_path()
    if ranks.first:
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        listener.listen(ranks.world_size + 16)
        port = listener.getsockname()[1]
        _server = TCPStore(
            "127.0.0.1", port, None, True, timeout, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        with whole_file(notice) as temporary:
            temporary.write_text(str(port))
        store = _server
    else:
        deadline_s = time.monotonic() + timeout.total_seconds()
        while not notice.exists():
            if time.monotonic() > deadline_s:
                raise UserError(f"Rank 0 did not start within {timeout.total_seconds():g} s.")
            time.sleep(0.01)
        port = int(notice.read_text())
        store = TCPStore("127.0.0.1", port, None, False, timeout, wait_for_workers=False)
    _address = ("127.0.0.1", port)
    dist.init_process_group(
        backend,
        store=PrefixStore("group", store),
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timeout,
    )
    dist.barrier()
    if ranks.first:
        notice.unlink(missing_ok=True)  # every rank has read it


def _notice_path() -> Path:
    """The file in which rank 0 leaves the port. Only the ranks of one launch share its name. The folder is private."""
    launcher = os.getppid()
    try:
        # Process numbers are reused. A number together with the start time is unique.
        began = Path(f"/proc/{launcher}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except OSError:
        began = ""
    folder = Path(tempfile.gettempdir()) / f"strong-scaling-trainer-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise UserError(f"The folder {folder} belongs to someone else. Set TMPDIR to a folder of your own.")
    launch = os.environ.get("TRAINER_LAUNCH", os.environ.get("MASTER_PORT", ""))
    return folder / f"ranks-{launcher}-{began}-{launch}"


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
