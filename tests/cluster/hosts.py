"""Hosts that are real to Ray, gloo and the launcher: network, process, mount and host-name namespaces on one machine.

A host is the processes of one PID namespace. Kill its first process and the kernel ends all the others, as a power cut
would; that process dies with this one, so nothing outlives the tests whatever ends them. Interfaces live in namespaces
without a name: they vanish with the last process. The hosts share this machine's files as their image; a home, a folder
for temporary files (Ray's too) and /dev/shm are their own, and shared storage is mounted.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

STORAGE = "/mnt/storage"
"""Where every host mounts the shared storage. The machine that the tests run on has nothing there."""
TMP, HOME = "/mnt/tmp", "/mnt/home"
DISK = "/mnt/disk"
"""A small disk that all hosts share too: tests change its size and fill it."""
BIN = str(Path(sys.executable).parent)


def why_not() -> str:
    """Why hosts cannot be made here; empty where they can."""
    if os.geteuid() != 0:
        return "hosts in namespaces need root"
    missing = [tool for tool in ("ip", "unshare", "nsenter", "setpriv", "mount") if shutil.which(tool) is None]
    if missing:
        return f"hosts in namespaces need {', '.join(missing)} (apt install iproute2 util-linux)"
    tried = subprocess.run(["unshare", "--net", "--pid", "--fork", "--uts", "--mount", "true"], capture_output=True, text=True, check=False)
    return "" if tried.returncode == 0 else f"no namespaces are allowed here: {tried.stderr.strip()}"


def has_open(pid: int, part: str) -> bool:
    """Whether a process has a file open whose path holds `part`."""
    links = [link for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()]
    return any(part in os.readlink(link) for link in links)


@dataclass
class Host:
    """One machine: its first process's pid as this machine sees it, its name, address and files."""

    name: str
    address: str
    files: Path
    keeper: subprocess.Popen[bytes]
    pid: int
    environment: dict[str, str] = field(default_factory=dict)

    def inside(self, *words: str) -> list[str]:
        """The command that runs `words` on this host."""
        return ["nsenter", "-t", str(self.pid), "--net", "--pid", "--mount", "--uts", "--", *words]

    def start(self, *words: str, **options: object) -> subprocess.Popen[str]:
        return subprocess.Popen(self.inside(*words), env=self.environment, text=True, start_new_session=True, **options)  # type: ignore[call-overload,no-any-return]

    def run(self, *words: str, check: bool = True, timeout_s: float = 120) -> str:
        done = subprocess.run(
            self.inside(*words),
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if check and done.returncode != 0:
            raise AssertionError(f"{self.name}: {' '.join(words)} ended with {done.returncode}:\n{done.stdout}")
        return done.stdout

    def processes(self, pattern: str) -> list[int]:
        """Pids, as this machine sees them, of the host's processes whose command line holds `pattern`."""
        namespace, found = os.readlink(f"/proc/{self.pid}/ns/pid"), []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                if os.readlink(entry / "ns/pid") == namespace and pattern in (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode():
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    def unplug(self) -> None:
        subprocess.run(self.inside("ip", "link", "set", "eth0", "down"), check=True)

    def plug(self) -> None:
        """Up, with a default route, as on any network: it leads to this machine, which forwards nothing."""
        subprocess.run(self.inside("ip", "link", "set", "eth0", "up"), check=True)
        gateway = self.address.rsplit(".", 1)[0] + ".254"
        subprocess.run(self.inside("ip", "route", "replace", "default", "via", gateway), check=True)

    def kill(self) -> None:
        """End every process of the host at once."""
        self.keeper.kill()
        self.keeper.wait()


def _start_keeper(*namespaces: str, then: str = "") -> tuple[subprocess.Popen[bytes], int]:
    """A process that holds namespaces open and dies with this one; its own pid, and that of the first one inside."""
    ready = "echo ready; while :; do sleep 1000 & wait; done"  # bash: the first process of a host reaps orphans
    keeper = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", "unshare", "--fork", "--kill-child", *namespaces, "bash", "-c", f"set -e; {then}\n{ready}"],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert keeper.stdout is not None
    if keeper.stdout.readline().strip() != b"ready":
        raise AssertionError("a namespace could not be set up")
    children = Path(f"/proc/{keeper.pid}/task/{keeper.pid}/children").read_text().split()
    return keeper, int(children[0])


class Network:
    """A switch with up to 8 hosts on it, and this machine at .254. `close` ends them all.

    No DNS answers there. With `names` the hosts' addresses have names all the same, though no host's own name leads to its address.
    """

    def __init__(self, files: Path, storage: Path, names: bool = False) -> None:
        self.files, self.storage, self.names, self.hosts = files, storage, names, list[Host]()
        self.disk = files / "disk"
        self.disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(self.disk)], check=True)
        self.prefix = _free_prefix()
        self.keeper, self.pid = _start_keeper("--net", then="ip link add br0 type bridge; ip link set br0 up; ip link set lo up")
        self.uplink = f"lp{self.prefix.rsplit('.', 1)[1]}-{os.getpid() % 100000}"
        self._cable("up0", self.uplink, os.getpid())
        for words in (["addr", "add", f"{self.prefix}.254/24", "dev", self.uplink], ["link", "set", self.uplink, "up"]):
            subprocess.run(["ip", *words], check=True)

    def _cable(self, port: str, name: str, pid: int) -> None:
        """A cable from a port of the switch to an interface of that name in the network of `pid`."""
        switch = ["nsenter", "-t", str(self.pid), "--net", "ip", "link"]
        subprocess.run([*switch, "add", port, "type", "veth", "peer", "name", name], check=True)
        subprocess.run([*switch, "set", name, "netns", str(pid)], check=True)
        subprocess.run([*switch, "set", port, "master", "br0", "up"], check=True)

    def add(self, number: int, **environment: str) -> Host:
        """Plug in a new host at address .number, or one that was killed, switched on again with its /tmp as it was."""
        name, files = f"node{number}", self.files / f"node{number}"
        for folder in ("tmp", "home"):
            (files / folder).mkdir(parents=True, exist_ok=True)
        addresses = [f"{self.prefix}.{other} node{other}.lan\n" for other in range(1, 9)] if self.names else []
        others = "".join(line for address in addresses for line in (address, f"::ffff:{address}"))  # torch asks in IPv6's clothes
        (files / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n{others}")
        own = [
            "mount --make-rprivate /",
            f"hostname {name}",
            "mount -t tmpfs tmpfs /mnt",
            f"mkdir {STORAGE} {DISK} {TMP} {HOME}",
            f"mount --bind {self.disk} {DISK}",
            f"mount --bind {self.storage} {STORAGE}",
            f"mount --bind {files}/tmp {TMP}",
            f"mount --bind {files}/home {HOME}",
            f"mount --bind {files}/hosts /etc/hosts",
            "mount -t tmpfs tmpfs /dev/shm",
            "ip link set lo up",
        ]
        keeper, pid = _start_keeper("--net", "--pid", "--mount-proc", "--uts", "--mount", then="; ".join(own))
        port = f"p{number}"
        subprocess.run(["nsenter", "-t", str(self.pid), "--net", "ip", "link", "del", port], capture_output=True, check=False)
        self._cable(port, "eth0", pid)
        address = f"{self.prefix}.{number}"
        host = Host(name, address, files, keeper, pid, {**_clean_environment(), **environment})
        host.run("ip", "addr", "add", f"{address}/24", "dev", "eth0")
        host.plug()
        self.hosts = [other for other in self.hosts if other.name != name] + [host]
        return host

    def close(self) -> None:
        for host in self.hosts:
            host.kill()
        self.keeper.kill()
        self.keeper.wait()
        subprocess.run(["umount", "-l", str(self.disk)], check=False)


def _free_prefix() -> str:
    """Three numbers of a /24 that no interface here uses yet."""
    taken = subprocess.run(["ip", "-o", "addr"], capture_output=True, text=True, check=True).stdout
    return next(prefix for prefix in (f"10.77.{(os.getpid() + i) % 250}" for i in range(250)) if f"{prefix}." not in taken)


def _clean_environment() -> dict[str, str]:
    """What a login shell there would have, with the environment of Python that the image brings."""
    keep = {name: os.environ[name] for name in ("LANG", "PYTHONPATH") if name in os.environ}
    return {"PATH": f"{BIN}:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": HOME, "TMPDIR": TMP, "TERM": "dumb", **keep}
