"""What the server forks is as good as a process that was started: the environment, the ends, what is left behind."""

import os
import signal
import subprocess
import time

import psutil
import pytest

from conftest import TESTS
from runs import ServerRun, environment, losses, run_script, run_train, start_server

SAY = """
import atexit, os, sys
atexit.register(print, "atexit")
print(os.environ.get("RANK"), os.environ["GIVEN"], os.getcwd(), sys.argv[1:], sys.stdin.read(), __name__)
print(os.getpid() == os.getsid(0), "to stderr", file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""
SLEEP = "import subprocess, time\nsubprocess.Popen(['sleep', '1000'])\nprint('begun', flush=True)\ntime.sleep(1000)\n"


@pytest.fixture
def script(tmp_path):
    """`script(code)`: a file of it."""

    def write(code):
        (tmp_path / "script.py").write_text(code)
        return tmp_path / "script.py"

    return write


def alive(session: int) -> list[int]:
    """The processes of a session."""
    found = []
    for pid in psutil.pids():
        try:
            if os.getsid(pid) == session and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
        except (ProcessLookupError, psutil.NoSuchProcess):
            pass
    return found


@pytest.mark.parametrize("cold", [False, True])
def test_a_script_sees_what_it_is_given(cold, script, tmp_path):
    run = run_script(script(SAY), [3, "x"], env={"GIVEN": "here"}, cwd=tmp_path, stdin="typed", cold=cold)
    assert run.returncode == 3
    assert run.stdout == f"None here {tmp_path} ['3', 'x'] typed __main__\natexit\n"
    assert run.stderr.endswith("to stderr\n") and run.args[-2:] == ["3", "x"]


def test_ranks_have_their_variables_and_the_first_failure_is_the_runs(script):
    code = "import os, sys, time\nrank = int(os.environ['RANK'])\nprint(rank, os.environ['WORLD_SIZE'], flush=True)\n"
    code += "time.sleep(100 * (1 - rank))\nsys.exit(5)\n"
    began = time.monotonic()
    run = run_script(script(code), [], launcher="torchrun", nproc=2)
    assert run.returncode == 5 and sorted(run.stdout.splitlines()) == ["0 2", "1 2"]
    assert time.monotonic() - began < 60, "the other rank was not ended"


def test_an_exception_is_a_traceback_and_exit_code_1(script):
    run = run_script(script("raise ValueError('this')\n"), [])
    assert run.returncode == 1 and run.stderr.startswith("Traceback") and "ValueError: this" in run.stderr


def test_after_the_timeout_nothing_is_left(script):
    with pytest.raises(subprocess.TimeoutExpired) as expired:
        run_script(script(SLEEP), [], timeout=3)
    assert expired.value.stdout == "begun\n"
    assert not [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "1000"]]


def test_a_signal_reaches_the_rank(script):
    code = "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(9))\n"
    code += "print('begun', flush=True)\ntime.sleep(1000)\n"
    run = ServerRun(script(code), [], 1, environment(), None, "")
    deadline = time.monotonic() + 60
    while not run.output(run.stdout) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(alive(run.session)) == 2  # the rank and the one that waits for it
    os.kill(run.pids[0], signal.SIGTERM)
    assert run.wait(60).returncode == 9
    while alive(run.session) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(run.session)


def test_training_is_the_same_cold_and_forked(model_dir, example_tokenizer_dir, example_rows, tmp_path):
    """Bit by bit; and what torch does in the ranks leaves no trace in the server, which has one thread."""
    args = ["--model_name_or_path", model_dir("dense", example_tokenizer_dir), "--train_data_file", example_rows]
    args += ["--max_steps", 3, "--logging_steps", 1, "--learning_rate", 1e-3, "--save_strategy", "no"]
    found = []
    for name, cold in (("cold", True), ("forked", False), ("again", False)):
        run = run_train([*args, "--output_dir", tmp_path / name], cold=cold)
        assert run.returncode == 0, run.stderr[-3000:]
        found.append((losses(tmp_path / name), (tmp_path / name / "model.safetensors").read_bytes()))
    assert found[0] == found[1] == found[2]
    servers = [p for p in psutil.Process().children() if str(TESTS / "server.py") in p.cmdline()]
    assert [p.num_threads() for p in servers] == [1]
    start_server()  # the same one
    assert [p for p in psutil.Process().children() if str(TESTS / "server.py") in p.cmdline()] == servers
