"""How another node is reached: ssh, and the conversation with agent.py, which it starts there.

ssh's own configuration decides what is not said here, and nothing here switches host key checking off. No value is
ever part of a command line that a shell reads: variables and files go through the connection.
"""

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft.processes import die_with_parent

KEEP_ALIVE = ("-oServerAliveInterval=5", "-oServerAliveCountMax=4")  # a node that is gone is noticed after 20 s
LONGEST_SECONDS = 75  # for an answer: nvidia-smi may take a minute
ERROR = re.compile(r"(?:\[rank\d+\]: )?((?:[\w.]+\.)?\w*(?:Error|Exception)\b.*)")  # torch puts the rank there
HERE = Path(__file__).parent
SENT = {"sft.nodes.examine": HERE / "examine.py", "__main__": HERE / "agent.py"}

# ssh starts the first of these. Each reads one line: variables for a new interpreter; then the modules that it runs.
READ_LINE = "json.loads(open(0, 'rb', 0, closefd=False).readline())"
RUN_MODULES = f"""
import json, sys, types
for name, text in {READ_LINE}.items():
    exec(text, sys.modules.setdefault(name, types.ModuleType(name)).__dict__)
"""
SET_VARIABLES = f"""
import json, os, sys
os.environ.update({READ_LINE})
os.execv(sys.executable, [sys.executable, "-Pc", {RUN_MODULES!r}, "agent.py"])
"""


@dataclass(eq=False)
class Node:
    """A machine of the job, and the connection to it."""

    host: str
    slots: int
    number: int = 0  # 0 is the chief
    first_rank: int = 0
    facts: dict = field(default_factory=dict)
    process: Any = None  # these three once it is connected
    output: Any = None
    stderr: Any = None
    error: str = ""  # the last line of the ranks that names an error
    go_on: str = ""  # and the last one with the command that goes on

    def connect(self, env: dict[str, str]) -> None:
        """Start agent.py there, with these variables."""
        command = [sys.executable, "-Pc", SET_VARIABLES]
        if self.number > 0:
            options = (*KEEP_ALIVE, "-oBatchMode=yes", "-oControlMaster=no", "-oControlPath=none", "-T")
            command = [*ssh_command(self.host, *options), f"exec {shlex.join(command)}"]
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            start_new_session=True,
            preexec_fn=die_with_parent if self.number > 0 else None,  # the chief's own sees our end by its pipe
        )
        self.output = io.TextIOWrapper(self.process.stdout, encoding="utf-8", errors="replace", newline="")
        self.send(env)
        self.send({name: file.read_text(encoding="utf-8") for name, file in SENT.items()})

    def send(self, message: dict) -> None:
        """Send a message to agent.py; in vain where the connection is gone."""
        with contextlib.suppress(OSError, ValueError):
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()

    def ask(self, question: dict) -> dict:
        """The answer of agent.py, {} where there is none. What a login shell prints is passed over."""
        self.send(question)
        timer = threading.Timer(LONGEST_SECONDS, self.process.kill)
        timer.daemon = True
        timer.start()
        answer: dict = next((json.loads(line) for line in self.output if line.startswith("{")), {})
        timer.cancel()
        return answer

    def show(self) -> None:
        """Print what the ranks print, with the node's address in front of each line, until they have ended."""
        for line in self.output:
            if error := ERROR.match(line):
                self.error = error[1].strip()[:300]
            if "--resume_from_checkpoint" in line:
                self.go_on = line
            with contextlib.suppress(OSError, ValueError):  # a terminal that is gone
                sys.stdout.write(f"{self.host}: {line}")
                sys.stdout.flush()

    def hang_up(self) -> None:
        """Close our end of the connection: the ranks there end, then the agent."""
        with contextlib.suppress(OSError):
            self.process.stdin.close()

    def last_words(self) -> str:
        """The last line on stderr: the agent's, {"failure": …}, or what ssh had to say."""
        self.stderr.seek(0)
        lines = self.stderr.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


def ssh_command(host: str, *options: str) -> list[str]:
    """ssh to a host. Its own configuration says what these options do not; host keys are checked as it says."""
    port = ["-p", os.environ["SSH_PORT"]] if os.environ.get("SSH_PORT") else []
    return ["ssh", "-oPasswordAuthentication=no", "-oConnectTimeout=8", *options, *port, "--", host]


def by_hand(host: str) -> str:
    """The ssh command to type for a host."""
    port = f"-p {os.environ['SSH_PORT']} " if os.environ.get("SSH_PORT") else ""
    return f"ssh {port}{host}"


def address_of(host: str) -> str:
    """What ssh's configuration says of a host's address."""
    shown = subprocess.run(ssh_command(host, "-G"), capture_output=True, text=True).stdout
    return next((line.split()[1] for line in shown.splitlines() if line.startswith("hostname ")), host)
