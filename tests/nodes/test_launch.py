"""Who takes part in a job, what is compared between the nodes, how their output is shown, how one node's job ends."""

import io
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hosts import TRAIN
from runs import free_port
from sft.messages import Refused
from sft.nodes import agent, examine, launch, preflight, ssh


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
    assert [(node.host, node.slots, node.first_rank) for node in preflight.read_nodes(env)] == expected


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"NODE_IP_LIST": "a:8,b:8", "NODES": "3"}, ("NODES=3", "NODE_IP_LIST=a:8,b:8 there are 2 machines")),
        ({"NODE_IP_LIST": "a:8,b:8", "NODE_NUM": "8"}, ("NODE_NUM=8", "NODE_IP_LIST=a:8,b:8 there are 16 processes")),
        ({"NODE_IP_LIST": "a:8,b:8", "HOST_GPU_NUM": "4"}, ("HOST_GPU_NUM=4", "a:8")),
        ({"NODE_IP_LIST": "a:8,b:8", "LOCAL_IP": "c"}, ("LOCAL_IP=c", "NODE_IP_LIST=a:8,b:8")),
        ({"NODE_IP_LIST": "a:8,b:8", "IP_LIST": "a:8"}, ("NODE_IP_LIST=a:8,b:8", "IP_LIST=a:8")),
        ({"NODE_IP_LIST": "a:8,a:8"}, ("a is listed twice",)),
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
        preflight.read_nodes(env)
    assert all(part in str(refusal.value) for part in says), refusal.value


def test_what_differs_is_named():
    assert (
        preflight.differing({"torch": "2.13.0", "peft": "1"}, {"torch": "2.12.0", "peft": "1"})
        == "torch 2.12.0, here 2.13.0"
    )
    hashes = {f"{i}.py": "a" * 64 for i in range(6)}
    assert preflight.differing(hashes, {}) == "0.py, 1.py, 2.py, 3.py and 2 more"
    assert preflight.differing(hashes, hashes) == ""


def test_sizes_of_files_globs_and_directories(tmp_path):
    (tmp_path / "a.jsonl").write_text("12")
    (tmp_path / "b.jsonl").write_text("123")
    (tmp_path / ".hidden").touch()
    assert examine.sizes(str(tmp_path)) == {"a.jsonl": 2, "b.jsonl": 3}
    assert list(examine.sizes(str(tmp_path / "*.jsonl")).values()) == [2, 3]
    assert examine.sizes(str(tmp_path / "a.jsonl")) == {str(tmp_path / "a.jsonl"): 2}
    assert examine.sizes(str(tmp_path / "c.jsonl")) is None


def test_a_line_begins_with_its_node(capsys):
    ssh.Node("a", 1, output=io.StringIO("\r 1%\r 2%\none\n", newline="")).show()
    assert capsys.readouterr().out == "a: \ra:  1%\ra:  2%\na: one\n"


# ---------------------------------------------------------------------------------------------- GPUs, variables

TWO = "echo 'GPU 0: NVIDIA X'; echo 'GPU 1: NVIDIA X'"
SLOW = "exec /bin/sleep 30"


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """`nvidia_smi(script, devices)`: what nvidia-smi is (None: there is none), and whether there are devices."""

    def make(script, devices=False):
        folder = tmp_path / "bin"
        folder.mkdir()
        if script is not None:
            (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
            (folder / "nvidia-smi").chmod(0o755)
        (tmp_path / "nvidia0").touch()
        monkeypatch.setattr(examine, "GPU_DEVICES", str(tmp_path / ("nvidia[0-9]*" if devices else "none*")))
        monkeypatch.setattr(examine, "GPU_SECONDS", 0.5)
        monkeypatch.setenv("PATH", str(folder))
        return folder

    return make


@pytest.mark.parametrize(
    ("script", "devices", "visible", "expected"),
    [
        (TWO, True, None, 2),
        (TWO, False, None, 2),  # WSL has no such devices
        (TWO, True, "1", 1),
        (TWO, True, "0,1,2", 2),
        (TWO, True, "", 0),
        (TWO, True, "-1", 0),
        (f"{TWO}; exit 14", True, None, 2),  # "infoROM is corrupted": they work
        (SLOW, True, None, None),
        (SLOW, False, None, None),
        (SLOW, True, "", 0),  # none is visible, whatever there is
        ("exit 9", True, None, None),
        ("exit 9", True, "0", None),
        ("exit 9", False, None, 0),
        ("echo 'No devices were found'", True, None, None),
        (None, True, None, None),
        (None, False, None, 0),
        (None, False, "0", 0),
    ],
)
def test_unknown_gpus_are_not_none(script, devices, visible, expected, nvidia_smi):
    nvidia_smi(script, devices)
    assert examine.number_of_gpus({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}) == expected


@pytest.mark.parametrize("env", [{}, {"NODE_IP_LIST": "a:8,b"}, {"NODE_IP_LIST": "a,b"}])
def test_unknown_gpus_are_refused_where_their_number_is_needed(env, nvidia_smi):
    nvidia_smi("exit 9", devices=True)
    with pytest.raises(Refused) as refusal:
        preflight.read_nodes(env)
    for part in ("nvidia-smi -L", "60 s", "nvidia-smi -pm 1", "HOST_GPU_NUM", "ip:slots"):
        assert part in str(refusal.value)
    assert sum(node.slots for node in preflight.read_nodes(env | {"HOST_GPU_NUM": "8"})) in (8, 16)


@pytest.mark.parametrize("env", [{"HOST_GPU_NUM": "2"}, {"NODE_IP_LIST": "a:8,b:8"}])
def test_nvidia_smi_is_asked_only_where_it_is_needed(env, monkeypatch):
    monkeypatch.setattr(preflight, "number_of_gpus", lambda env: pytest.fail("asked"))
    preflight.read_nodes(env)


def test_a_node_whose_gpus_are_unknown_is_named():
    facts = {"cwd": True, "code": {}, "versions": {}, "paths": {}, "lacks": [], "gpus": None, "shm": 1 << 40}
    facts |= {"interface": "eth0", "interfaces": ["eth0"], "reach": None, "output": None}
    chief, other = preflight.Node("a", 8, facts=facts | {"gpus": 8}), preflight.Node("b", 8, 1, facts=facts)
    said = preflight.problem_of(other, chief, 29500, "train", gpus=True)
    assert "nvidia-smi -L" in said and "run there: nvidia-smi -pm 1" in said
    assert preflight.problem_of(other, chief, 29500, "train", gpus=False) is None
    assert preflight.problem_of(chief, chief, 29500, "train", gpus=True) is None


def test_the_number_of_gpus_is_known_at_once():
    """Without a library being imported."""
    check = "import sys; sys.path.append('.'); from sft.nodes.examine import number_of_gpus; "
    check += "print(number_of_gpus({'CUDA_VISIBLE_DEVICES': ''}))"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-Ic", check], cwd=TRAIN, text=True, capture_output=True)
    assert done.stdout == "0\n" and time.monotonic() - began < 5, done.stderr


def test_which_variables_reach_the_nodes():
    env = {"https_proxy": "1", "NO_PROXY": "2", "SWANLAB_API_KEY": "3", "FI_PROVIDER": "4", "HOME": "/root", "MY": "5",
           "PROXY_X": "6", "PATH": "/bin", "ANOTHER": "$(x)"}  # fmt: skip
    sent = {"https_proxy", "NO_PROXY", "SWANLAB_API_KEY", "FI_PROVIDER", "PATH"}
    assert launch.forwarded(env).keys() == sent
    further = launch.forwarded(env | {"FORWARD": " MY, ANOTHER,"})
    assert further.keys() == sent | {"MY", "ANOTHER"} and further["ANOTHER"] == "$(x)"


@pytest.mark.parametrize("value", ["GONE", "MY,GONE", "MY=secret", "MY GONE", "1MY", "$(MY)"])
def test_forward_takes_names_of_variables_that_are_set(value):
    with pytest.raises(Refused) as refusal:
        launch.forwarded({"MY": "5", "1MY": "x", "FORWARD": value})
    said = str(refusal.value)
    assert "FORWARD: " in said and "export it" in said and "secret" not in said


# ------------------------------------------------------------------------------------------- one node's conversation


@pytest.fixture
def one():
    """A node on this machine, with its agent.py."""
    node = ssh.Node("localhost", 1)
    node.connect({})
    yield node
    node.process.kill()
    node.process.wait()


def wanted(output):
    """What the launcher asks a node that is to examine itself."""
    return {"cwd": str(TRAIN), "code": str(TRAIN), "paths": [], "resumed": [], "interface": "lo",
            "marker": str(output / ".node-0"), "towards": ["localhost", 1], "reach": None}  # fmt: skip


def test_a_slow_nvidia_smi_is_waited_for(nvidia_smi, tmp_path):
    folder = nvidia_smi(f"/bin/sleep 5; {TWO}")
    node = ssh.Node("localhost", 1)
    node.connect({"PATH": str(folder)})
    facts = node.ask({"examine": wanted(tmp_path / "out")})
    assert facts.get("gpus") == 2 and facts["output"] is None
    node.hang_up()
    assert node.process.wait(timeout=20) == 0 and not (tmp_path / "out").exists()


def test_a_node_that_is_silent_is_not_waited_for(one, monkeypatch, tmp_path):
    assert one.ask({"look": [str(tmp_path)]}) == {"seen": 1}
    for module in (ssh, preflight):
        monkeypatch.setattr(module, "LONGEST_SECONDS", 2.5)
    one.process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    assert one.ask({"examine": wanted(tmp_path)}) == {}
    assert time.monotonic() - began < 5 and "no answer within 2.5 s" in preflight.why_no_answer(one)


def test_what_cannot_be_examined_is_told(one):
    assert one.ask({"examine": {"marker": None}})["error"].startswith("KeyError")


def test_an_agent_ends_its_rank_when_the_launcher_is_silent(tmp_path, monkeypatch):
    """Of a network that is gone nothing but that is seen."""
    text = Path(agent.__file__).read_text().replace("SILENCE_SECONDS = 30", "SILENCE_SECONDS = 5")
    (tmp_path / "agent.py").write_text(text)
    monkeypatch.setitem(ssh.SENT, "__main__", tmp_path / "agent.py")
    (node := ssh.Node("localhost", 1)).connect({})
    node.send({"start": job("time.sleep(60)", None)})
    hello = threading.Thread(target=wait_for_hello, args=(node,))
    hello.start()
    while hello.is_alive():
        node.send({})
        hello.join(timeout=1)
    assert node.process.wait(timeout=20) == 128 + signal.SIGTERM


def job(script, log):
    """The order to start one rank that runs a script."""
    command = ["-c", f"import sys, time; print('hello', flush=True); {script}"]
    of_all = {"command": command, "world_size": 1, "nodes": 1, "master": ["localhost", free_port()], "output": None}
    return of_all | {"env": {}, "slots": 1, "first_rank": 0, "number": 0, "host": "b", "log": log}


def wait_for_hello(node):
    assert any("hello" in line for line in node.output)


ENDS = {  # how it ends: (the rank's script, whether another node is refused, exit code, whether all goes)
    "no rank": (None, False, 0, True),
    "refused": ("sys.exit(2)", False, 2, True),
    "refused on another node": ("time.sleep(60)", True, 143, True),
    "done": ("pass", False, 0, False),
    "failed": ("sys.exit(1)", False, 1, False),
    "stopped": ("time.sleep(60)", False, 143, False),
    "failed, refused on another node": ("time.sleep(1); sys.exit(1)", True, 1, False),
}


@pytest.mark.parametrize("name", ENDS)
def test_what_a_node_leaves(name, one, tmp_path):
    script, refused, code, goes = ENDS[name]
    (tmp_path / "before").mkdir()
    output = tmp_path / "before" / "a" / "out"
    assert one.ask({"examine": wanted(output)})["output"] is None
    assert [path.name for path in output.iterdir()] == [".node-0"]
    if script:
        one.send({"start": job(script, str(output / "log_1.txt"))})
        wait_for_hello(one)
        assert (output / "log_1.txt").is_file() and not (output / ".node-0").exists()
    if refused:
        one.send({"refused": True})
    if script in (None, "time.sleep(60)"):  # the others end by themselves
        one.hang_up()
    assert one.process.wait(timeout=30) == code
    assert list((tmp_path / "before").iterdir()) == ([] if goes else [tmp_path / "before" / "a"])
    assert goes or (output / "log_1.txt").read_text() == "hello\n"
    assert not (output / ".node-0").exists()


def test_a_refusal_leaves_what_it_did_not_make(one, tmp_path):
    output = tmp_path / "a" / "out"
    one.ask({"examine": wanted(output)})
    (output / "mine.txt").touch()
    one.hang_up()
    one.process.wait(timeout=20)
    assert [path.name for path in output.iterdir()] == ["mine.txt"]


def test_a_link_to_nowhere_stays(one, tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "gone")
    assert one.ask({"examine": wanted(tmp_path / "a" / "out")})["output"]
    one.hang_up()
    one.process.wait(timeout=20)
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").is_symlink()


# ----------------------------------------------------------------------------------------------------- started again

LOST, NOT_READY = launch.Failure(1, "node b: lost", weight=2), Refused("1 of 2 nodes are not ready:\nb: ssh: no")


@pytest.fixture
def attempts(monkeypatch, capsys, tmp_path):
    """`attempts(outcomes, most)`: (exit code, outcomes that are left, what is printed, pauses) of a job whose attempts
    end so: a step that is made and what failed, a refusal before it, or None."""

    def run(outcomes, most):
        made, pauses, left = {}, [], list(outcomes)

        def run_once(*args):
            outcome = left.pop(0)
            if isinstance(outcome, Refused):
                raise outcome
            made["step"], failure = outcome or (0, None)
            return failure, False

        monkeypatch.setenv("MAX_RESTARTS", str(most))
        monkeypatch.setattr(launch, "run_once", run_once)
        monkeypatch.setattr(launch, "step_made", lambda output: made.get("step"))
        monkeypatch.setattr(launch, "end_at_signals", lambda words: None)
        monkeypatch.setattr(launch.time, "sleep", pauses.append)
        code = launch.launch(["train.py"], {"output_dir": str(tmp_path)}, None)
        return code, len(left), capsys.readouterr().out, pauses

    return run


def test_a_restart_waits_for_a_node_that_is_not_ready(attempts):
    code, left, said, pauses = attempts([(5, LOST), NOT_READY, NOT_READY, None], 3)
    assert (code, left) == (0, 0)
    assert "restart 3 of 3: restart 2 was refused: 1 of 2 nodes are not ready: b: ssh: no; going on" in said
    assert pauses == [launch.LOST_NODE_SECONDS, *2 * [launch.NOT_READY_SECONDS]]


def test_a_node_that_is_never_ready_again(attempts):
    code, left, said, _ = attempts([(5, LOST), NOT_READY, NOT_READY, None], 2)
    assert (code, left) == (1, 1) and said.endswith(
        "failed: restart 2 was refused: 1 of 2 nodes are not ready: b: ssh: no\n"
    )


def test_a_refusal_does_not_hide_that_no_step_is_made(attempts):
    code, left, said, _ = attempts([(5, LOST), NOT_READY, (5, LOST), None], 9)
    assert (code, left) == (1, 1) and said.endswith("failed: restart 2 made no new step; node b: lost\n")


def test_the_first_start_is_refused_at_once(attempts):
    with pytest.raises(Refused, match="not ready"):
        attempts([NOT_READY, None], 3)


@pytest.mark.parametrize("goes_on", [{}, {"auto_resume": True}, {"resume_from_checkpoint": "true"}])
@pytest.mark.parametrize("shared", [True, False])
def test_how_the_disks_are_is_said_where_a_run_goes_on(shared, goes_on, monkeypatch):
    """It may have begun on other disks, and a checkpoint's own value would hold."""
    monkeypatch.setattr(launch, "examine", lambda *args: shared)
    words = launch.prepare([], ["train.py"], 1, dict(goes_on))[1:]
    expected = ["--save_on_each_node", str(not shared)]
    assert words == (expected if goes_on or not shared else [])


def test_a_node_that_comes_back_without_its_mount_is_not_ready(monkeypatch):
    """Else the run would go on as on separate disks, and there is nothing to go on from on one of them."""
    given, shared = {}, iter([True, False, True])
    monkeypatch.setattr(launch, "examine", lambda *args: next(shared))
    launch.prepare([], ["train.py"], 1, given)
    again = given | {"auto_resume": True}
    with pytest.raises(Refused, match="is it mounted on all of them"):
        launch.prepare([], ["train.py"], 1, again)
    launch.prepare([], ["train.py"], 1, again)
