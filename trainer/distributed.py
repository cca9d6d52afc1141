"""Who this process is among the ranks, and what ranks say to one another outside of the step.

Everything works undistributed too: with one rank no message is sent.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import BY_EXIT_CODE, LostRankError, Stopped, TrainerError, UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")

# From linux/sockios.h: the address of an interface.
_SIOCGIFADDR = 0x8915


@dataclass(frozen=True)
class Ranks:
    """This process's place: global rank and world size, and the same within its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone prints and writes files."""
        return self.rank == 0

    @staticmethod
    def from_environment(local_rank: int | None = None) -> Ranks:
        """From what the deepspeed launcher or torchrun set; one rank where neither did.

        Args:
            local_rank: the launcher's --local_rank flag, which only fills in for a missing LOCAL_RANK.

        Raises:
            UserError: the variables contradict one another.
        """

        def read(name: str, default: int) -> int:
            text = os.environ.get(name, "")
            if text and not text.isdigit():
                raise UserError(f"The environment variable {name} is {text!r}. It must be a whole number.")
            return int(text) if text else default

        world_size, rank = read("WORLD_SIZE", 1), read("RANK", 0)
        local = read("LOCAL_RANK", local_rank if local_rank is not None and local_rank >= 0 else 0)
        # torchrun says LOCAL_WORLD_SIZE, DeepSpeed's launcher LOCAL_SIZE.
        local_size = read("LOCAL_WORLD_SIZE", read("LOCAL_SIZE", world_size))
        if world_size < 1 or rank >= world_size or local >= local_size:
            raise UserError(
                f"The launcher's variables contradict one another: RANK={rank}, WORLD_SIZE={world_size}, "
                f"LOCAL_RANK={local}, ranks on this machine={local_size}. Start the run with one launcher."
            )
        return Ranks(rank, world_size, local, local_size)


def start(ranks: Ranks, backend: str, timeout_s: float) -> None:
    """Joins the process group. Collective: every rank.

    Raises:
        UserError: the rendezvous address is missing or taken.
    """
    import torch.distributed as dist

    if dist.is_initialized():
        return
    # DeepSpeed insists on this variable, which plain python does not set.
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
        raise UserError(f"{ranks.world_size} ranks, but {' and '.join(missing)} not set: start them with a launcher.")
    if backend == "gloo" and "GLOO_SOCKET_IFNAME" not in os.environ:
        # gloo asks for the address of this machine's name, which on Debian is one that no other machine can reach.
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
    """The network interface over which a host is reached; None if that cannot be told. Sends nothing."""
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
    """The ranks meet at a port of the loopback interface that rank 0 chooses, so a taken MASTER_PORT harms nobody."""
    import torch.distributed as dist
    from torch._C._distributed_c10d import PrefixStore, TCPStore

    global _address, _server
    # Nothing has to listen beyond this machine.
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
        temporary = notice.with_name(f"{notice.name}.{os.getpid()}")
        temporary.write_text(str(port))
        os.replace(temporary, notice)
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
        notice.unlink(missing_ok=True)  # everyone is here


def _notice_path() -> Path:
    """Where rank 0 leaves the port: a name that only the ranks of one launch share, in a folder of this user's own."""
    launcher = os.getppid()
    try:
        # A process's number comes again; its number with its start time does not.
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
    """A connection of its own to the store at which the ranks met, for another thread; None with one rank.

    Collective: every rank.
    """
    import torch.distributed as dist
    from torch._C._distributed_c10d import PrefixStore, TCPStore

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    host, port = _address or (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    store = TCPStore(host, port, None, False, timedelta(seconds=timeout_s), wait_for_workers=False)
    # torchrun's store may outlive a restart of the ranks, which need not raise its count of restarts.
    return PrefixStore(f"watch-{broadcast_object(uuid.uuid4().hex)}", store)


def close() -> None:
    """Leaves the process group, if there is one."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


class _Meetings:
    """How many collectives this rank has come to, the same on every rank, and since when it waits in the present one.

    Attributes:
        count: of the outermost ones.
        since_s: time.monotonic(); None while the rank works on its own.
    """

    def __init__(self) -> None:
        self.count, self.since_s, self._depth = 0, None, 0  # type: tuple[int, float | None, int]

    def __enter__(self) -> None:
        self._depth += 1
        if self._depth == 1:
            self.count += 1
            self.since_s = time.monotonic()

    def __exit__(self, *exception: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.since_s = None


# The watching thread reads it: whoever has come to fewer than one that waits for long holds it up.
meetings = _Meetings()


def gather_objects(value: T) -> list[T]:
    """Every rank's value, by rank. Collective: every rank. For start-up and rare events, not for the step."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    with meetings:
        dist.all_gather_object(gathered, value)
    return gathered


def all_gather_flat(out: Tensor, piece: Tensor) -> None:
    """Every rank's `piece` (n,), one after the other, into `out` (W n,). Collective: every rank."""
    with meetings:
        _all_gather_flat(out, piece)


def _all_gather_flat(out: Tensor, piece: Tensor) -> None:
    import torch.distributed as dist

    if dist.get_backend() == "gloo":
        # gloo's own all-gather goes through two more copies and fresh memory: sending to each rank mostly
        # takes a quarter to two thirds of its time, less for large pieces (tests/benchmarks/exchange.py).
        rank, world_size = dist.get_rank(), dist.get_world_size()
        rows = out.view(world_size, -1)
        sources = [(rank - k) % world_size for k in range(1, world_size)]
        waits = [dist.irecv(rows[source], source) for source in sources]
        waits += [dist.isend(piece, (rank + k) % world_size) for k in range(1, world_size)]
        rows[rank].copy_(piece)
        for wait in waits:
            assert wait is not None
            wait.wait()
        return
    # torch 2.13 renames the collective and warns of the old name.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(out, piece)


def gather_int64(value: Tensor) -> list[int]:
    """Every rank's number, by rank: () int64. Collective: every rank. Waits for the device."""
    return gather_rows(value.reshape(1)).flatten().tolist()


def gather_rows(row: Tensor) -> Tensor:
    """Every rank's (n,), by rank: (W, n) on the CPU. Collective: every rank, with equal n. Waits for the device."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return row.cpu()[None]
    row = row.cpu() if dist.get_backend() == "gloo" else row.cuda()
    gathered = torch.empty(dist.get_world_size() * len(row), dtype=row.dtype, device=row.device)
    with meetings:
        all_gather_flat(gathered, row)
        return gathered.cpu().view(-1, len(row))  # device to host


def broadcast_object(value: T | None) -> T:
    """Rank 0's value, on every rank. Collective: every rank."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        assert value is not None
        return value
    box: list[Any] = [value]
    with meetings:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def broadcast_tensor(value: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Rank 0's tensor on every rank, on the CPU, bit for bit. Collective: every rank."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        assert value is not None
        return value
    result = torch.empty(shape, dtype=dtype) if value is None else value.contiguous()
    if result.numel() == 0:
        return result
    # As bytes: not every backend knows every type.
    message = result.view(-1).view(torch.uint8)
    if dist.get_backend() != "gloo":
        message = message.cuda()
    with meetings:
        dist.broadcast(message, src=0)
        return message.cpu().view(dtype).view(shape)


def raise_together(error: TrainerError | None) -> None:
    """Raises the first rank's error on every rank, so that none goes on or is left waiting.

    Collective: every rank, with its own error or None.
    """
    said = gather_objects((error.exit_code, str(error)) if error is not None else None)
    for exit_code, message in (s for s in said if s is not None):
        raise BY_EXIT_CODE.get(exit_code, TrainerError)(message, agreed=True)


_claim: socket.socket | None = None


def first_to_speak(ranks: Ranks) -> bool:
    """Whether this process is the first of its launch, on this machine, to report an error.

    For errors before there is a process group: every rank finds the same one, and one should say it.
    The claim is a name in Linux's abstract socket namespace: atomic, private, gone with the process.
    """
    global _claim
    if ranks.world_size == 1 or not sys.platform.startswith("linux"):
        return ranks.first
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        claim.bind(f"\0strong-scaling-trainer-{os.getppid()}-{os.environ.get('MASTER_PORT', '')}")
    except OSError:
        claim.close()
        return False
    _claim = claim
    return True


def report(error: TrainerError, ranks: Ranks) -> None:
    """Prints an error once over all ranks, and keeps the process that printed it alive for its peers.

    A launcher ends the other ranks as soon as one has ended, so the speaker waits until the others
    have come to the same end; they do within moments, and the launcher then ends the wait.
    """
    speaks = error.speaks
    if speaks is None:
        speaks = ranks.first if error.agreed else first_to_speak(ranks)
    if speaks:
        kind = "" if isinstance(error, Stopped) else "error: "
        print(f"\n{kind}{error}", file=sys.stderr, flush=True)
    if isinstance(error, LostRankError) and (speaks or ranks.first):
        # The others may notice some seconds later: by then this one still holds the claim to speak, and rank 0 the
        # store at which they learn of it.
        time.sleep(4.5)
    elif ranks.world_size > 1 and speaks != error.agreed:
        time.sleep(3.0 if speaks else 2.0)


def common_value(values: Sequence[Any]) -> Any:
    """The value most ranks have (the lowest rank's among equals): whoever differs from it is named."""
    keys = [repr(v) for v in values]
    return values[max(range(len(keys)), key=lambda i: (keys.count(keys[i]), -i))]
