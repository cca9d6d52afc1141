"""Hosts with an sshd each, as a hostfile run needs them, all on this machine. Needs root; see `install.sh`."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

from tests.machines import hosts as networks

_SSHD = shutil.which("sshd") or "/usr/sbin/sshd"

# In mount and host-name namespaces of its own, which all that is started through this sshd inherits.
_START = """
set -e
hostname "$1"
mount --make-rprivate /
mount --bind "$2/hosts.$1" /etc/hosts
mount --bind "$2/ssh_config" /etc/ssh/ssh_config
mkdir -p /run/sshd
exec "$3" -D -e -f "$2/sshd_config" 2> "$2/sshd.$1.log"
"""


def why_not() -> str | None:
    """Why there can be no such hosts here; None if there can."""
    reason = networks.why_not()
    if reason is not None:
        return reason
    missing = [name for name in ("ssh", "ssh-keygen", "pdsh", "nsenter", "unshare") if shutil.which(name) is None]
    missing += [] if Path(_SSHD).exists() else ["sshd"]
    return f"{', '.join(missing)} not there: tests/machines/install.sh installs them" if missing else None


class Cluster:
    """Hosts that one can run commands on.

    Attributes:
        names: of the hosts.
        addresses: theirs.
        network: to cut links.
    """

    def __init__(self, network: networks.Hosts) -> None:
        self.network, self.names, self.addresses = network, network.names, network.addresses
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def command(self, host: str, *command: str) -> list[str]:
        """The command line that runs a command on a host."""
        return ["nsenter", "-t", str(self.daemons[host].pid), "-m", "-u", "-n", "--", *command]

    def start(
        self, host: str, *command: str, cwd: Path, environment: dict[str, str], output: Path
    ) -> subprocess.Popen[bytes]:
        """Starts a command on a host, in a session of its own; all that it prints goes to a file."""
        scripts = sysconfig.get_path("scripts")
        with output.open("wb") as file:
            return subprocess.Popen(
                # nsenter leaves the working folder, so it is entered again.
                self.command(host, "sh", "-c", 'cd "$0" && exec "$@"', str(cwd), *command),
                env={**os.environ, "PATH": f"{scripts}:{os.environ['PATH']}", **environment},
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )


@contextlib.contextmanager
def cluster(count: int, folder: Path) -> Iterator[Cluster]:
    """So many hosts, with an sshd and a login without a password, for a while.

    Args:
        folder: for their keys and settings.
    """
    for name in ("host_key", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/key.pub\nPidFile none\nUsePAM no\nStrictModes no\n"
        "PasswordAuthentication no\nPermitRootLogin prohibit-password\n"
    )
    (folder / "ssh_config").write_text(
        f"Host *\n  IdentityFile {folder}/key\n  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n"
        "  LogLevel ERROR\n"
    )
    with networks.hosts(count) as network:
        found = Cluster(network)
        try:
            for name in network.names:
                # As Debian has it: a host's own name is a loopback address to itself.
                lines = ["127.0.0.1 localhost", f"127.0.1.1 {name}"]
                lines += [f"{a} {n}" for n, a in zip(network.names, network.addresses) if n != name]
                (folder / f"hosts.{name}").write_text("\n".join(lines) + "\n")
                enter = ["ip", "netns", "exec", name, "unshare", "-m", "-u"]
                start = ["bash", "-c", _START, "start", name, str(folder), _SSHD]
                found.daemons[name] = subprocess.Popen([*enter, *start])
            for name in network.names:
                _wait_for(found, name, folder)
            yield found
        finally:
            for daemon in found.daemons.values():
                daemon.kill()
                daemon.wait()


def _wait_for(found: Cluster, name: str, folder: Path) -> None:
    deadline_s = time.monotonic() + 20.0
    while time.monotonic() < deadline_s:
        log = folder / f"sshd.{name}.log"
        if log.exists() and "listening" in log.read_text():
            return
        if found.daemons[name].poll() is not None:
            break
        time.sleep(0.05)
    raise RuntimeError(f"sshd did not start on {name}")
