"""The launcher on one machine: exit codes, output, and that nothing is left."""

import os
import subprocess
import sys
import time

import psutil
import pytest

from hosts import TRAIN
from sft.messages import Refused
from sft.nodes import agent, preflight

SCRIPT = """
import os, signal, sys, time
rank = os.environ.get("RANK", "0")
os.write(1, f"rank {{rank}} {{sys.argv[1]}}\\n".encode())  # at once: the others write there, too
if rank == sys.argv[1]:
    {fails}
time.sleep(60 if sys.argv[1] == "none" else 3)
"""

LAUNCH = """
import os, sys
from sft.nodes.launch import launch
sys.stdout.reconfigure(errors="replace")
code = launch(sys.argv[1:], {}, None)
sys.stdout.flush()
os._exit(code)
"""


def run(tmp_path, fails, rank="1", slots=2, **env):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(fails=fails), encoding="utf-8")
    env = os.environ | {"HOST_GPU_NUM": str(slots), "PYTHONPATH": str(TRAIN)} | env
    command = [sys.executable, "-c", LAUNCH, script, rank]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize(
    ("fails", "code", "says"),
    [
        ("sys.exit(3)", 3, ""),
        ("sys.exit(7)", 7, "failed: rank {} on localhost: exit code 7\n"),
        ("raise ValueError('of this')", 1, "failed: rank {} on localhost: exit code 1\n"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "failed: rank {} on localhost: killed by SIGKILL"),
    ],
)
def test_the_exit_code_is_that_of_the_first_that_failed(fails, code, says, rank, tmp_path):
    job = run(tmp_path, f"print(' 3%', end='', flush=True); {fails}", rank)  # in the middle of a progress bar
    output = job.communicate(timeout=60)[0]
    lines = output.splitlines(keepends=True)
    assert job.returncode == code and any(line.startswith(says.format(rank)) for line in lines), output


def test_what_ranks_print_is_utf8_whatever_the_terminal_is(tmp_path):
    job = run(tmp_path, "print('中文 \U0001f600', flush=True); sys.exit(7)", PYTHONIOENCODING="ascii")
    output = job.communicate(timeout=60)[0]
    assert job.returncode == 7 and "中文 😀" in output and "failed: rank 1" in output, output


def test_output_that_is_read_late_is_whole(tmp_path):
    job = run(tmp_path, "print('x' * 300_000 + 'end', flush=True); sys.exit(7)")
    time.sleep(9)
    output = job.communicate(timeout=60)[0]
    assert job.returncode == 7 and output.count("x") == 300_001 and "end" in output and "failed: rank 1" in output


def test_an_ssh_session_is_ended_only_while_it_is_our_parent(monkeypatch):
    """In a container the process that takes over orphans may be the sshd that listens."""
    ended, parent = [], psutil.Process().parent()
    monkeypatch.setattr(psutil.Process, "terminate", lambda process: ended.append(process.pid))
    agent.hang_up(parent.pid)
    assert not ended
    monkeypatch.setattr(psutil.Process, "name", lambda process: "sshd-session")
    agent.hang_up(parent.pid + 1)
    assert not ended
    agent.hang_up(parent.pid)
    assert ended == [parent.pid]


def test_without_ssh_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(preflight.shutil, "which", lambda name: None)
    with pytest.raises(Refused, match="apt-get install openssh-client"):
        preflight.visit(preflight.read_nodes({"NODE_IP_LIST": "a:1,b:1"}))


def test_a_run_that_ends_well_ends_with_0(tmp_path):
    """And torch's agent, which fills ${…} in, leaves a flag's value as it is."""
    value = "$$ ${local_rank} $(x)"
    job = run(tmp_path, "pass", rank=value)
    assert sorted(job.communicate(timeout=60)[0].splitlines()) == [f"rank 0 {value}", f"rank 1 {value}"]
    assert job.returncode == 0


def test_a_launcher_that_is_killed_takes_its_ranks_along(tmp_path):
    job = run(tmp_path, "pass", rank="none")
    assert "rank" in job.stdout.readline() and "rank" in job.stdout.readline()
    ranks = [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path / "script.py") in (p.info["cmdline"] or ())]
    job.kill()
    assert len(ranks) == 3 and not psutil.wait_procs(ranks, timeout=20)[1]  # with the launcher itself
