"""Real hosts on one machine: a network namespace each, joined by a bridge in a namespace of its own, with a mount
namespace (its own /etc, /run and ~/.ssh) and an sshd on port 36005 in each. All traffic stays inside."""

import contextlib
import functools
import os
import pty
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

TRAIN = Path(__file__).resolve().parent.parent / "train"
SSH_PORT = 36005
os.environ["PATH"] += ":/usr/sbin:/sbin"  # where sshd and ip are
SSH = Path.home() / ".ssh"


def sh(*command: str | Path, **options) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout


class Host:
    """One host. `address` is that of its eth0; `files` holds what its mount namespace puts over the machine's own."""

    def __init__(self, net: str, number: int, files: Path, disks: dict[Path, Path]):
        self.name, self.address, self.files = f"node{number}", f"10.77.0.{number}", files
        self.address6, self.namespace = f"fd77::{number}", f"{net}-{number}"
        sh("ip", "netns", "add", self.namespace)
        sh(
            "ip",
            "link",
            "add",
            f"p{number}",
            "netns",
            net,
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            self.namespace,
        )
        sh("ip", "-n", net, "link", "set", f"p{number}", "master", "br0", "up")
        sh("ip", "-n", self.namespace, "address", "add", f"{self.address}/24", "dev", "eth0")
        sh("ip", "-n", self.namespace, "address", "add", f"{self.address6}/64", "dev", "eth0", "nodad")
        for interface in ("lo", "eth0"):
            sh("ip", "-n", self.namespace, "link", "set", interface, "up")
        for name in ("run/sshd", "ssh"):
            (files / name).mkdir(parents=True, mode=0o700)
        (files / "run/sshd").chmod(0o755)
        (files / "run").chmod(0o755)
        shutil.copytree("/etc", files / "etc", symlinks=True)
        for key in (files / "etc/ssh").glob("ssh_host_*"):
            key.unlink()
        (files / "etc/hostname").write_text(self.name + "\n")
        greeting = files / "etc/bash.bashrc"  # bash reads it for every command over ssh
        greeting.write_text("printf 'Welcome to this host. '\n" + greeting.read_text())
        SSH.mkdir(mode=0o700, exist_ok=True)
        over = {"/etc": files / "etc", "/run": files / "run", str(SSH): files / "ssh"} | disks
        mounts = " && ".join(f"mount --bind '{own}' '{path}'" for path, own in over.items())
        script = f"mount --make-rprivate / && {mounts} && hostname {self.name} && echo ready && exec sleep infinity"
        self.holder = subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, "unshare", "--mount", "--uts", "sh", "-c", script],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.holder.stdout.readline() == "ready\n"
        self.inode = os.readlink(f"/proc/{self.holder.pid}/ns/net")

    def command(self, *command: str | Path) -> list[str]:
        """The command line that runs a command there."""
        enter = ["nsenter", "-t", str(self.holder.pid), "-n", "-m", "-u", "--"]
        return [*enter, *(str(word) for word in command)]

    def run(self, *command: str | Path, timeout: float = 300, **options) -> subprocess.CompletedProcess:
        return subprocess.run(self.command(*command), capture_output=True, text=True, timeout=timeout, **options)

    def sh(self, script: str, **options) -> str:
        done = self.run("bash", "-c", script, **options)
        assert done.returncode == 0, (script, done.stdout, done.stderr)
        return done.stdout

    def sshd(self) -> None:
        """As the documentation has it."""
        self.sh("ssh-keygen -A && /usr/sbin/sshd -p 36005 -o ListenAddress=0.0.0.0 -o ListenAddress=::")

    def processes(self, *words: str) -> dict[int, str]:
        """{pid: command line} of the processes of this host whose command line holds all the words."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                if os.readlink(entry / "ns/net") == self.inode and line and all(word in line for word in words):
                    found[int(entry.name)] = line
        return found

    def link(self, state: str) -> None:
        """Plug the network in ("up") or out ("down")."""
        sh("ip", "-n", self.namespace, "link", "set", "eth0", state)

    def close(self) -> None:
        for _ in range(3):
            for pid in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        self.holder.wait()


class Hosts:
    """Several hosts that trust one another, joined by a bridge. ssh's configuration does not say the port: SSH_PORT
    has to.

    Args:
        folder: for their files.
        number: how many.
        disks: directories of which each host has a copy of its own, at the same path (empty at first but on the
            first host, whose own is the directory itself).
        keys: make a key on each, trusted by all, and the host keys known.
        sshd: start one on each.
    """

    def __init__(
        self, folder: Path, number: int = 2, disks: tuple[Path, ...] = (), keys: bool = True, sshd: bool = True
    ):
        self.net, self.hosts = f"hy{secrets.token_hex(3)}", []
        sh("ip", "netns", "add", self.net)
        try:
            sh("ip", "-n", self.net, "link", "add", "br0", "type", "bridge")
            sh("ip", "-n", self.net, "link", "set", "br0", "up")
            for i in range(1, number + 1):
                own = {path: folder / f"host{i}" / "disks" / str(path).strip("/") for path in disks if i > 1}
                for copy in own.values():
                    copy.mkdir(parents=True)
                self.hosts.append(Host(self.net, i, folder / f"host{i}", own))
            names = "".join(f"{host.address} {host.name}\n" for host in self.hosts)
            for host in self.hosts:
                table = host.files / "etc/hosts"
                table.write_text(table.read_text() + names)
                if sshd:
                    host.sshd()
            if keys:
                self.trust()
        except BaseException:
            self.close()
            raise

    def trust(self) -> None:
        """The ssh set-up of the documentation, done without its questions."""
        public = []
        for host in self.hosts:
            host.sh(f"ssh-keygen -q -t ed25519 -N '' -f {SSH}/id_ed25519")
            public.append((host.files / "ssh/id_ed25519.pub").read_text())
        known = ""
        for host in self.hosts:
            key = " ".join((host.files / "etc/ssh/ssh_host_ed25519_key.pub").read_text().split()[:2])
            known += (
                ",".join(f"[{name}]:{SSH_PORT}" for name in (host.address, host.name, host.address6)) + f" {key}\n"
            )
        for host in self.hosts:
            (host.files / "ssh/authorized_keys").write_text("".join(public))
            (host.files / "ssh/known_hosts").write_text(known)

    def __getitem__(self, index: int) -> Host:
        return self.hosts[index]

    def __iter__(self):
        return iter(self.hosts)

    def close(self) -> None:
        for host in self.hosts:
            host.close()
        for name in sh("ip", "netns", "list").split():
            if name.startswith(self.net):
                subprocess.run(["ip", "netns", "del", name], capture_output=True)


@functools.cache
def why_not() -> str | None:
    """What keeps hosts from being made here."""
    missing = [
        tool for tool in ("ip", "sshd", "ssh", "ssh-keygen", "unshare", "nsenter") if shutil.which(tool) is None
    ]
    if missing:
        return f"needs {', '.join(missing)}: apt-get install -y openssh-server openssh-client iproute2"
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    try:
        with tempfile.TemporaryDirectory() as folder:
            Hosts(Path(folder)).close()
    except (AssertionError, OSError) as error:
        return f"network namespaces are not permitted here: {error}"
    return None


class Job:
    """A command on a host, mostly train.sh, with its output as it comes.

    Args:
        host: where it is started.
        env: variables added; the interpreter of these tests is the first on the PATH, one thread a rank.
        terminal: give it a pseudo-terminal of its own, on which it is the session leader.
    """

    def __init__(self, host: Host, command: list, cwd: Path = TRAIN, terminal: bool = False, **env: str | Path):
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        own = {"PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        words = [f"{name}={value}" for name, value in (own | env).items()]
        full = host.command("env", "-C", cwd, *words, *command)
        self.output, self.began, self.terminal = "", time.monotonic(), None
        if terminal:
            pid, self.terminal = pty.fork()
            if pid == 0:
                os.execvp(full[0], full)
            self.pid, self.process, source = pid, None, self.terminal
        else:
            self.process = subprocess.Popen(
                full,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self.pid, source = self.process.pid, self.process.stdout.fileno()
        self.reader = threading.Thread(target=self.read, args=(source,), daemon=True)
        self.reader.start()

    def read(self, source: int) -> None:
        with contextlib.suppress(OSError):
            while chunk := os.read(source, 1 << 16):
                self.output += chunk.decode(errors="replace")

    def wait_for(self, pattern: str, seconds: float = 120) -> None:
        """Until the output has a match."""
        deadline = time.monotonic() + seconds
        while not re.search(pattern, self.output):
            assert time.monotonic() < deadline and self.code() is None, (pattern, self.output[-3000:])
            time.sleep(0.1)

    def code(self) -> int | None:
        """The exit code; None while it runs."""
        if self.process is not None:
            return self.process.poll()
        if not hasattr(self, "ended"):
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid == 0:
                return None
            self.ended = os.waitstatus_to_exitcode(status)
        return self.ended

    def end(self, seconds: float = 150) -> int:
        """Wait for it, and return its exit code."""
        deadline = time.monotonic() + seconds
        while self.code() is None:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                raise AssertionError(f"still running after {seconds} s: {self.output[-3000:]}")
            time.sleep(0.05)
        self.reader.join(timeout=3)
        return self.code()

    def type(self, text: str) -> None:
        """On its terminal."""
        os.write(self.terminal, text.encode())
