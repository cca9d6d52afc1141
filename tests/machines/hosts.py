"""Hosts on one machine: network namespaces with addresses and links of their own, joined by a bridge. Needs root."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def why_not() -> str | None:
    """Why there can be no hosts here; None if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need `ip` (Debian: iproute2)"
    name = f"probe{uuid.uuid4().hex[:6]}"
    try:
        _ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        return f"network namespaces are not permitted here: {error.stderr.strip()}"
    try:
        _ip("-n", name, "link", "add", "bridge0", "type", "bridge")
    except subprocess.CalledProcessError as error:
        return f"this kernel has no bridges: {error.stderr.strip()}"
    finally:
        _ip("netns", "del", name)
    return None


class Hosts:
    """Namespaces node1, node2, ... of a unique prefix, each with eth0 at 10.77.0.<number>."""

    def __init__(self, prefix: str, count: int) -> None:
        self.switch = f"{prefix}switch"
        self.names = [f"{prefix}node{i + 1}" for i in range(count)]
        self.addresses = [f"10.77.0.{i + 1}" for i in range(count)]

    def link(self, host: str, *state: str) -> None:
        """`ip link set eth0 ...` on a host: "up", "down"."""
        _ip("-n", host, "link", "set", "eth0", *state)


@contextlib.contextmanager
def hosts(count: int) -> Iterator[Hosts]:
    """So many hosts for a while. Nothing of them reaches beyond: even their switch is in a namespace."""
    found = Hosts(f"t{uuid.uuid4().hex[:5]}", count)
    try:
        _ip("netns", "add", found.switch)
        _ip("-n", found.switch, "link", "add", "bridge0", "type", "bridge")
        _ip("-n", found.switch, "link", "set", "bridge0", "up")
        for number, (name, address) in enumerate(zip(found.names, found.addresses)):
            _ip("netns", "add", name)
            _ip(
                "-n",
                found.switch,
                "link",
                "add",
                f"port{number}",
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                name,
            )
            _ip("-n", found.switch, "link", "set", f"port{number}", "master", "bridge0", "up")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
        yield found
    finally:
        for name in [*found.names, found.switch]:
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "del", name)
