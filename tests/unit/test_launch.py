"""Who takes part in a job, what is compared between the nodes, how their output is shown, how one node's job ends."""

import io
import os
import signal
import subprocess
import sys
import time

import pytest

import launch
import node
import ssh
from console import Refused
from hosts import TRAIN


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"HOST_GPU_NUM": "2"}, [("localhost", 2, 0)]),
        ({"NODE_IP_LIST": "a:16,b:8"}, [("a", 16, 0), ("b", 8, 16)]),
        ({"NODE_IP_LIST": "a,b", "HOST_GPU_NUM": "4"}, [("a", 4, 0), ("b", 4, 4)]),
        ({"IP_LIST": "10.0.0.1:1, b:2,c.d:1,"}, [("10.0.0.1", 1, 0), ("b", 2, 1), ("c.d", 1, 3)]),
        ({"NODE_IP_LIST": "a:1,b:2", "LOCAL_IP": "b", "NODES": "2", "NODE_NUM": "3"}, [("b", 2, 0), ("a", 1, 2)]),
        ({"NODE_IP_LIST": "[fe80::1]:8,[fe80::2]:8"}, [("fe80::1", 8, 0), ("fe80::2", 8, 8)]),
        ({"NODE_IP_LIST": "a:8", "HOST_GPU_NUM": "8"}, [("a", 8, 0)]),
        ({"NODE_IP_LIST": "", "IP_LIST": "a:1"}, [("a", 1, 0)]),  # as train.sh exports them
        ({"NODES": "1", "NODE_NUM": "2", "HOST_GPU_NUM": "2"}, [("localhost", 2, 0)]),
    ],
)  # fmt: skip
def test_nodes_and_their_ranks(env, expected):
    assert [(node.host, node.slots, node.first_rank) for node in ssh.read_nodes(env)] == expected


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"NODE_IP_LIST": "a:8,b:8", "NODES": "3"}, ("NODES=3", "NODE_IP_LIST=a:8,b:8 there are 2 machines")),
        ({"NODE_IP_LIST": "a:8,b:8", "NODE_NUM": "8"}, ("NODE_NUM=8", "NODE_IP_LIST=a:8,b:8 there are 16 processes")),
        ({"NODE_IP_LIST": "a:8,b:8", "HOST_GPU_NUM": "4"}, ("HOST_GPU_NUM=4", "a:8")),
        ({"NODE_IP_LIST": "a:8,b:8", "LOCAL_IP": "c"}, ("LOCAL_IP=c", "NODE_IP_LIST=a:8,b:8")),
        ({"NODE_IP_LIST": "a:8,b:8", "IP_LIST": "a:8"}, ("NODE_IP_LIST=a:8,b:8", "IP_LIST=a:8")),
        ({"NODE_IP_LIST": "a:8,a:8"}, ("a stands there twice",)),
        ({"NODE_IP_LIST": "a:36005,b:36005"}, ("36005 slots", "SSH_PORT")),
        ({"NODE_IP_LIST": "a:22,b:22", "SSH_PORT": "22"}, ("22 slots", "SSH_PORT")),
        ({"NODE_IP_LIST": "a:36005:8,b:36005:8"}, ("'a:36005:8'", "SSH_PORT")),
        ({"NODE_IP_LIST": "root@a:8,b:8"}, ("'root@a:8'",)),
        ({"NODE_IP_LIST": "a:0,b:8"}, ("'a:0'",)),
        ({"NODE_IP_LIST": "a:8,,b:8"}, ("''",)),
        ({"NODES": "2", "HOST_GPU_NUM": "8"}, ("NODES=2", "without NODE_IP_LIST")),
        ({"NODE_NUM": "16", "HOST_GPU_NUM": "8"}, ("NODE_NUM=16", "HOST_GPU_NUM=8")),
        ({"NODE_IP_LIST": "a:1,b:1", "SSH_PORT": "99999"}, ("SSH_PORT=99999",)),
    ],
)
def test_what_contradicts_itself_is_refused_with_both_values(env, says):
    with pytest.raises(Refused) as refusal:
        ssh.read_nodes(env)
    assert all(part in str(refusal.value) for part in says), refusal.value


def test_the_values_of_a_flag():
    command = ["train.py", "--train_data_file", "a", "b c", "--x=1", "--output-dir", "o", "--x", "2", "--use_cpu"]
    assert ssh.flag(command, "train_data_file") == ["a", "b c"]
    assert ssh.flag(command, "output_dir") == ["o"] and ssh.flag(command, "x") == ["2"]
    assert ssh.flag(command, "use_cpu") == [] and ssh.flag(command, "none") is None
    assert ssh.is_on(command, "use_cpu") and ssh.is_on(command, "x") and not ssh.is_on(command, "none")
    assert not ssh.is_on(["--use-cpu=False"], "use_cpu") and not ssh.is_on(["--use_cpu", "no"], "use_cpu")


def test_what_differs_is_named():
    assert (
        ssh.differing({"torch": "2.13.0", "peft": "1"}, {"torch": "2.12.0", "peft": "1"})
        == "torch 2.12.0, here 2.13.0"
    )
    hashes = {f"{i}.py": "a" * 64 for i in range(6)}
    assert ssh.differing(hashes, {}) == "0.py, 1.py, 2.py, 3.py and 2 more"
    assert ssh.differing(hashes, hashes) == ""


def test_sizes_of_files_globs_and_directories(tmp_path):
    (tmp_path / "a.jsonl").write_text("12")
    (tmp_path / "b.jsonl").write_text("123")
    (tmp_path / ".hidden").touch()
    assert node.sizes(str(tmp_path)) == {"a.jsonl": 2, "b.jsonl": 3}
    assert list(node.sizes(str(tmp_path / "*.jsonl")).values()) == [2, 3]
    assert node.sizes(str(tmp_path / "a.jsonl")) == {str(tmp_path / "a.jsonl"): 2}
    assert node.sizes(str(tmp_path / "c.jsonl")) is None


def test_lines_of_several_nodes_do_not_run_into_one_another(monkeypatch):
    """A progress bar is written over itself, and ended before another node's line."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    printer = launch.Printer(prefixed=True)
    for host, text in (
        ("a", "\r 1%"),
        ("a", "\r 2%"),
        ("b", "one\ntwo\n"),
        ("a", "\r 3%"),
        (None, "failed\n"),
        ("a", "x\n"),
    ):
        printer.put(host, text)
    printer.close(given_up=lambda: False)
    assert sys.stdout.getvalue() == "\ra:  1%\ra:  2%\nb: one\nb: two\n\ra:  3%\nfailed\na: x\n"


# -------------------------------------------------------------------------------------------------- one machine

SCRIPT = """
import os, signal, sys, time
rank = os.environ.get("RANK", "0")
print("rank", rank, flush=True)
if rank == sys.argv[1]:
    {fails}
time.sleep(60 if sys.argv[1] == "none" else 3)
"""


def run(tmp_path, fails, rank="1", slots=2, **env):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(fails=fails), encoding="utf-8")
    env = os.environ | {"HOST_GPU_NUM": str(slots)} | env
    command = [sys.executable, TRAIN / "launch.py", script, rank]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize(
    ("fails", "code", "says"),
    [
        ("sys.exit(3)", 3, ""),
        ("sys.exit(7)", 7, "failed: rank {} on localhost: exit code 7\n"),
        ("raise ValueError('of this')", 1, "failed: rank {} on localhost: exit code 1: ValueError: of this\n"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "failed: rank {} on localhost: killed by SIGKILL"),
    ],
)
def test_the_exit_code_is_that_of_the_first_that_failed(fails, code, says, rank, tmp_path):
    job = run(tmp_path, f"print(' 3%', end='', flush=True); {fails}", rank)  # in the middle of a progress bar
    output = job.communicate(timeout=60)[0]
    lines = output.splitlines(keepends=True)
    assert job.returncode == code and any(line.startswith(says.format(rank)) for line in lines), output


def test_a_terminal_that_cannot_show_a_character_loses_that_alone(tmp_path):
    job = run(tmp_path, "print('中文 \U0001f600', flush=True); sys.exit(7)", PYTHONIOENCODING="ascii")
    output = job.communicate(timeout=60)[0]
    assert job.returncode == 7 and "?? ?" in output and "failed: rank 1" in output, output


def test_output_that_is_read_late_is_whole(tmp_path):
    job = run(tmp_path, "print('x' * 300_000 + 'end', flush=True); sys.exit(7)")
    time.sleep(9)
    output = job.communicate(timeout=60)[0]
    assert job.returncode == 7 and "x" * 300_000 + "end" in output and "failed: rank 1" in output


def test_an_ssh_session_is_ended_only_while_it_is_our_parent(monkeypatch):
    """In a container the process that takes over orphans may be the sshd that listens."""
    ended = []
    monkeypatch.setattr(os, "kill", lambda pid, number: ended.append(pid))
    monkeypatch.setattr("builtins.open", lambda path: io.StringIO("sshd-session\n"))
    node.hang_up(os.getppid() + 1)
    assert not ended
    node.hang_up(os.getppid())
    assert ended == [os.getppid()]


def test_without_ssh_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(ssh.shutil, "which", lambda name: None)
    with pytest.raises(Refused, match="apt-get install openssh-client"):
        ssh.visit(ssh.read_nodes({"NODE_IP_LIST": "a:1,b:1"}))


def test_the_command_that_mends_copies_what_differs(tmp_path, monkeypatch):
    monkeypatch.setenv("SSH_PORT", "36005")
    for name in ("a 1.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("12")
    here = node.sizes(str(tmp_path))
    everything = ssh.copy(str(tmp_path), here, None, "n2")
    assert everything == f"scp -rp -P 36005 {tmp_path} n2:{tmp_path.parent}/"
    assert (
        ssh.copy(str(tmp_path), here, {"b.jsonl": 2}, "n2") == f"scp -p -P 36005 '{tmp_path}/a 1.jsonl' n2:{tmp_path}/"
    )
    pattern = str(tmp_path / "*.jsonl")
    both = f"'{tmp_path}/a 1.jsonl' {tmp_path}/b.jsonl"
    assert ssh.copy(pattern, node.sizes(pattern), None, "fe80::1") == f"scp -p -P 36005 {both} [fe80::1]:{tmp_path}/"


def test_a_run_that_ends_well_ends_with_0(tmp_path):
    job = run(tmp_path, "pass")
    output = job.communicate(timeout=60)[0]
    assert job.returncode == 0 and sorted(output.split("\n")[:2]) == ["rank 0", "rank 1"]


def test_a_launcher_that_is_killed_takes_its_ranks_along(tmp_path):
    job = run(tmp_path, "pass", rank="none")
    assert "rank" in job.stdout.readline()
    job.send_signal(signal.SIGKILL)
    job.wait()
    deadline = time.monotonic() + 20
    ours = ["pgrep", "-f", str(tmp_path)]
    while subprocess.run(ours, capture_output=True).stdout and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not subprocess.run(ours, capture_output=True).stdout
