"""One node's share of a job: examine the machine, start its ranks, watch them, end them.

launch.py starts this on the chief and, over ssh, on every other node; nobody runs it by hand. The other nodes get this
very text through the connection, so that what examines a node is never the node's own, perhaps older, copy. Standard
library, and psutil where it is there.

Both sides write one JSON object a line. From the launcher: examine, look, start, signal, end, beat; to it: examined,
seen, output, ended, late, done, beat. No value is ever part of a command line that a shell reads. When the launcher is
silent for SILENCE_SECONDS, or its end of the connection closes, the ranks end. A refused job leaves no file and no
directory that was made here.
"""

import codecs
import collections
import contextlib
import ctypes
import glob
import hashlib
import importlib.metadata
import json
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

BEAT_SECONDS = 2
SILENCE_SECONDS = 30  # without a beat: the other side, or the network to it, is gone
KILL_SECONDS = 10  # from SIGTERM to SIGKILL
GPU_SECONDS = 60  # for nvidia-smi: eight GPUs without persistence mode take more than 11
GPU_DEVICES = "/dev/nvidia[0-9]*"
PACKAGES = ("torch", "transformers", "deepspeed", "accelerate", "peft", "datasets", "psutil")
LIBC = ctypes.CDLL(None)
STATES = {"T": "stopped (SIGSTOP)", "t": "stopped by a debugger", "D": "waiting for a disk", "Z": "a zombie"}


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Ask Linux to send this process a signal when the one that started it is gone, however it went."""
    LIBC.prctl(1, number)  # PR_SET_PDEATHSIG


# ---------------------------------------------------------------------------------------------------- examine


def number_of_gpus(env: dict[str, str]) -> int | None:
    """The NVIDIA GPUs that processes with this environment see. None where that is unknown: nvidia-smi takes too long,
    or it fails or is missing although there are devices."""
    chosen, lines = env.get("CUDA_VISIBLE_DEVICES"), ""
    named = [name for name in (chosen or "").split(",") if name.strip() and name.strip() != "-1"]
    if chosen is not None and not named:
        return 0
    try:
        with contextlib.suppress(OSError):  # there is none
            lines = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=GPU_SECONDS).stdout
    except subprocess.TimeoutExpired:
        return None
    number = sum(line.startswith("GPU") for line in lines.splitlines())
    if number == 0 and glob.glob(GPU_DEVICES):
        return None
    return number if chosen is None else min(number, len(named))


def sizes(path: str) -> dict[str, int] | None:
    """{file: bytes} of a file, of a glob's files or of a directory's top; None where there is nothing."""
    if os.path.isdir(path):
        files = [entry.path for entry in os.scandir(path) if entry.is_file() and not entry.name.startswith(".")]
        return {os.path.basename(file): os.path.getsize(file) for file in files}
    return {file: os.path.getsize(file) for file in sorted(glob.glob(path) or [path]) if os.path.exists(file)} or None


def code(directory: str) -> dict[str, str]:
    """{file: hash} of the scripts and DeepSpeed files of a directory, its packages included."""
    found = {}
    for folder, folders, files in os.walk(directory):
        folders[:] = sorted(name for name in folders if name not in ("output", "example", "__pycache__"))
        for file in sorted(file for file in files if file.endswith((".py", ".json"))):
            with open(os.path.join(folder, file), "rb") as content:
                name = os.path.relpath(content.name, directory)
                found[name] = hashlib.sha256(content.read()).hexdigest()
    return found


def versions() -> dict[str, str | None]:
    """Of Python and the packages that have to agree, without importing them."""
    found: dict[str, str | None] = {"python": ".".join(map(str, sys.version_info[:2]))}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def interface_towards(host: str, port: int) -> str | None:
    """The network interface from which this machine reaches a host. Nothing is sent."""
    with contextlib.suppress(OSError, ImportError):
        import psutil  # a node without it is still examined

        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as s:
            s.connect(address)
            own = s.getsockname()[0].partition("%")[0]
        for name, addresses in psutil.net_if_addrs().items():
            if any(address.address.partition("%")[0] == own for address in addresses):
                return name
    return None


def reach(host: str, port: int) -> str | None:
    """What stands in the way of a connection, or None."""
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError as error:
        return error.strerror or str(error)
    return None


def writable(directory: str, marker: str, made: list[str]) -> str | None:
    """Make a directory and put a file there; what stands in the way, or None. `made` gets the new directories, the
    innermost first."""
    try:
        path = Path(directory).absolute()
        made += [str(new) for new in (path, *path.parents) if not os.path.lexists(new)]
        path.mkdir(parents=True, exist_ok=True)
        with open(os.path.join(directory, marker), "w") as file:
            file.write("x" * 4096)
    except OSError as error:
        return error.strerror
    return None


def examine(wanted: dict, made: list[str]) -> dict:
    """What the launcher compares between the nodes, seen with the variables of the ranks; `made` as in writable."""
    os.environ.update(wanted["env"])
    sys.path += wanted["env"].get("PYTHONPATH", "").split(":")
    there = os.path.isdir(wanted["cwd"])
    if there:
        os.chdir(wanted["cwd"])
    shm = shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0
    return {
        "cwd": there,
        "output": writable(wanted["output"], wanted["marker"], made) if there and wanted["output"] else None,
        "code": code(wanted["code"]),
        "versions": versions(),
        "paths": {path: sizes(path) for path in wanted["paths"]},
        "lacks": [file for file in wanted["resumed"] if not os.path.isfile(file)],
        "gpus": number_of_gpus(dict(os.environ)),
        "shm": shm,
        "interface": wanted["interface"] or interface_towards(*wanted["towards"]),
        "interfaces": [name for _, name in socket.if_nameindex()],
        "reach": reach(*wanted["reach"]) if wanted["reach"] else None,
    }


# ------------------------------------------------------------------------------------------------------- run


class Rank:
    """One process of the training, in a session of its own: a signal reaches it once, through us, and its workers end
    with it."""

    def __init__(self, number: int, command: list[str], env: dict[str, str], output):
        self.number, self.ended, self.last_words = number, False, collections.deque(maxlen=200)
        self.process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        self.relay = threading.Thread(target=self.read, args=(output,), daemon=True)
        self.relay.start()

    def read(self, output) -> None:
        """Relay what it prints: rank 0's at once, its progress bar too, the others' in whole lines."""
        decoder, line = codecs.getincrementaldecoder("utf-8")("replace"), ""
        while chunk := os.read(self.process.stdout.fileno(), 1 << 16):
            text = decoder.decode(chunk)
            *whole, rest = re.split(r"(?<=[\r\n])", line + text)
            self.last_words.extend(part.strip() for part in whole)
            if self.number == 0 or whole:
                output(text if self.number == 0 else "".join(whole))
            line = rest
        if line:
            self.last_words.append(line)
            output("\n" if self.number == 0 else line + "\n")

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def poll(self) -> bool:
        """Whether it has just ended. What it started is killed before its number can be another process's."""
        if self.ended or os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return False
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.relay.join(timeout=2)
        self.ended = True
        return True

    def reason(self) -> str:
        """The last line of its output that names an error, or nothing."""
        lines = [re.sub(r"^\[rank\d+\]: ", "", line) for line in self.last_words]  # torch puts it there
        errors = [line for line in lines if re.match(r"([\w.]+\.)?\w*(Error|Exception)\b", line)]
        return errors[-1][:300] if errors else ""

    def state(self) -> str:
        """What Linux says of a process that does not end."""
        with contextlib.suppress(OSError), open(f"/proc/{self.process.pid}/stat") as file:
            return STATES.get(file.read().rpartition(")")[2].split()[0], "running")
        return "gone"


class Node:
    """The conversation with the launcher, and the ranks."""

    def __init__(self):
        self.inbox, self.outbox = queue.Queue(), queue.Queue()
        self.ranks, self.log, self.marker = [], None, None
        self.made, self.refused = [], False  # what goes after a refusal; whether the launcher says that it is one
        self.heard = time.monotonic()
        self.deadlines = []  # (when, signal) still to come for the ranks that are left

    def receive(self) -> None:
        for line in sys.stdin.buffer:
            self.inbox.put(json.loads(line))
        self.inbox.put(None)

    def transmit(self) -> None:
        """Until a None. A login shell may have printed something: the first message begins a line."""
        with contextlib.suppress(OSError):
            sys.stdout.buffer.write(b"\n")
            while (message := self.outbox.get()) is not None:
                sys.stdout.buffer.write(json.dumps(message).encode() + b"\n")
                sys.stdout.buffer.flush()

    def output(self, text: str) -> None:
        """A rank's text: to this node's log, and to the launcher. Waits where that does not keep up."""
        while self.outbox.qsize() > 1000:
            time.sleep(0.05)
        log = self.log
        if log is not None:
            try:
                log.write(text)
                log.flush()
            except (OSError, ValueError):  # a full disk, or closed: the output must not be lost with it
                self.log = None
        self.outbox.put({"output": text})

    def start(self, job: dict) -> None:
        """Start this node's ranks.

        Args:
            job: log (a file, or None), slots, first_rank, world_size, node (its number), master [host, port], command
                (without the interpreter), env (variables added to this process's own).
        """
        if job["log"]:
            log = os.path.abspath(job["log"])
            self.made[:0] = [] if os.path.lexists(log) else [log]
            with contextlib.suppress(OSError):
                self.log = open(log, "a", encoding="utf-8")  # noqa: SIM115
        slots = job["slots"]
        env = {"PYTHONUNBUFFERED": "1", **os.environ, **job["env"], "PYTHONIOENCODING": "utf-8"}
        for local in range(slots):
            own, rank = {}, job["first_rank"] + local
            if job["world_size"] > 1:
                own = {"RANK": rank, "LOCAL_RANK": local, "WORLD_SIZE": job["world_size"], "LOCAL_WORLD_SIZE": slots}
                own |= {"GROUP_RANK": job["node"], "MASTER_ADDR": job["master"][0], "MASTER_PORT": job["master"][1]}
                env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // slots)))
            own = {name: str(value) for name, value in own.items()}
            self.ranks.append(Rank(rank, [sys.executable, *job["command"]], env | own, self.output))

    def end(self, grace: float) -> None:
        """Let the ranks end by themselves for `grace` seconds, then ask them, then make them."""
        asked = time.monotonic() + grace
        self.deadlines = self.deadlines or [(asked, signal.SIGTERM), (asked + KILL_SECONDS, signal.SIGKILL)]

    def handle(self, message: dict) -> None:
        """One message of the launcher."""
        if "examine" in message:
            self.marker = (message["examine"]["output"], message["examine"]["marker"])
            threading.Thread(target=self.examine, args=(message["examine"],), daemon=True).start()
        elif "look" in message:
            output = self.marker[0]
            seen = [name for name in message["look"] if os.path.exists(os.path.join(output, name))]
            self.outbox.put({"seen": {"seen": seen}})
        elif "start" in message:
            self.tidy()
            self.start(message["start"])
        elif "signal" in message:
            for rank in self.left():
                rank.send(message["signal"])
        elif "end" in message:
            self.refused = message["refused"]
            self.end(message["end"])

    def examine(self, wanted: dict) -> None:
        """Answer the launcher, from a thread: nvidia-smi may take a minute, and the beat goes on. What cannot be
        examined becomes the answer {"error": …}."""
        try:
            self.outbox.put({"examined": examine(wanted, self.made)})
        except Exception as error:  # told by the launcher, whatever it is
            self.outbox.put({"examined": {"error": f"{type(error).__name__}: {error}"}})

    def tidy(self) -> None:
        """Take the marker away that `examine` put down."""
        if self.marker and self.marker[0]:
            with contextlib.suppress(OSError):
                os.remove(os.path.join(*self.marker))

    def leave_nothing(self) -> None:
        """After a refusal take away what was made here. It is one where no rank was started, where all ranks say so,
        or where another node's do, which ended these."""
        codes = {rank.process.returncode for rank in self.ranks}
        if not codes <= ({2, -signal.SIGTERM, -signal.SIGKILL} if self.refused else {2}):
            return
        if self.log:
            self.log.close()  # NFS keeps an open file under another name
        for path in self.made:
            with contextlib.suppress(OSError):  # not empty: another's files
                (os.remove if self.log and path == self.log.name else os.rmdir)(path)

    def full_disk(self) -> str:
        """Words on an output directory without room: libraries have others for it."""
        with contextlib.suppress(OSError, TypeError):
            if shutil.disk_usage(self.marker[0]).free < 1 << 16:
                return f" (no space left in {self.marker[0]} there)"
        return ""

    def left(self) -> list[Rank]:
        return [rank for rank in self.ranks if not rank.ended]

    def run(self) -> bool:
        """Until the ranks have ended. Returns whether they were ended because the launcher is gone."""
        threading.Thread(target=self.receive, daemon=True).start()
        transmitter = threading.Thread(target=self.transmit, daemon=True)
        transmitter.start()
        gone, beat = False, 0.0
        while True:
            with contextlib.suppress(queue.Empty):
                message = self.inbox.get(timeout=0.1)
                self.heard = time.monotonic()
                if message is None:
                    gone = True
                else:
                    self.handle(message)
            now = time.monotonic()
            gone = gone or now - self.heard > SILENCE_SECONDS
            if gone:
                self.end(0)
            if now - beat > BEAT_SECONDS:
                beat = now
                self.outbox.put({"beat": True})
            for rank in self.left():
                if rank.poll():
                    self.outbox.put(
                        {"ended": [rank.number, rank.process.returncode, rank.reason() + self.full_disk()]}
                    )
            while self.deadlines and now > self.deadlines[0][0]:
                number = self.deadlines.pop(0)[1]
                for rank in self.left():
                    self.outbox.put({"late": [rank.number, rank.state()]})
                    rank.send(number)
            if (self.ranks or gone) and not self.left():
                break
        self.tidy()
        self.leave_nothing()
        self.outbox.put({"done": True})
        self.outbox.put(None)
        transmitter.join(timeout=1 if gone else SILENCE_SECONDS)
        return gone


def hang_up(session: int) -> None:
    """End the ssh session that this ran in: over a dead network it would stay for a quarter of an hour. Where it is
    gone already, our parent is another process, in a container the very sshd that listens."""
    with contextlib.suppress(OSError), open(f"/proc/{session}/comm") as file:
        if os.getppid() == session and file.read().startswith("sshd"):
            os.kill(session, signal.SIGTERM)


def main() -> None:
    node, session = Node(), os.getppid()
    for number in (signal.SIGINT, signal.SIGHUP):  # what is meant for the ranks comes from the launcher
        signal.signal(number, lambda number, frame: None)  # not SIG_IGN, which the ranks would inherit
    signal.signal(signal.SIGTERM, lambda number, frame: node.end(0))
    if node.run():
        hang_up(session)
    os._exit(0)  # past a transmitter that a dead network blocks


if __name__ == "__main__":
    main()
