"""Several real hosts (hosts.py): the same training as on one, the documentation's own text, values that a shell would
not survive."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from conftest import losses, run_train
from hosts import SSH, SSH_PORT, TRAIN, Hosts, Job
from runs import as_saved

pytestmark = pytest.mark.needs_hosts
STAGES = {"zero2": "ds_zero2_no_offload.json", "zero3": "ds_zero3_no_offload.json"}
STEPS = ["--max_steps", 6, "--logging_steps", 1, "--max_seq_length", 256, "--save_strategy", "no"]


@pytest.fixture
def given(model_dir, example_tokenizer_dir, example_rows, tmp_path):
    """The variables of a run on the first two hosts."""
    return {
        "MODEL_PATH": model_dir("dense", example_tokenizer_dir),
        "TRAIN_DATA_FILE": example_rows,
        "OUTPUT_DIR": tmp_path / "out",
        "NODE_IP_LIST": "10.77.0.1:1,10.77.0.2:1",
        "DS_CONFIG": "none",
        "SSH_PORT": SSH_PORT,
    }


def train(host, *flags, **env):
    """train.sh there, to its end."""
    job = Job(host, ["bash", TRAIN / "train.sh", *flags], **env)
    assert job.end(400) == 0, job.output[-4000:]
    return job.output


@pytest.mark.needs_gxx
@pytest.mark.parametrize("stage", [pytest.param("zero2", marks=pytest.mark.campaign), "zero3"])
def test_losses_are_those_of_one_host(stage, two, given, tmp_path):
    output = train(two[0], *STEPS, **given | {"DS_CONFIG": STAGES[stage]})
    args = ["--model_name_or_path", given["MODEL_PATH"], "--train_data_file", given["TRAIN_DATA_FILE"], *STEPS]
    args += ["--output_dir", tmp_path / "one", "--deepspeed", STAGES[stage], "--gradient_checkpointing"]
    args += ["--learning_rate", 1e-5, "--min_lr", 1e-6, "--lr_scheduler_type", "cosine_with_min_lr"]
    args += ["--warmup_ratio", 0.01, "--per_device_train_batch_size", 1]
    run = run_train(args, launcher="torchrun", nproc=2)
    assert run.returncode == 0, run.stderr[-3000:]
    ours, one = losses(tmp_path / "out"), losses(tmp_path / "one")
    difference = max(abs(a - b) for a, b in zip(ours, one, strict=True))
    print(f"{stage}, two hosts against two ranks on one: largest difference {difference:.1e}")
    assert len(ours) == 6 and difference <= 1e-5
    assert "10.77.0.2: ready (1 ranks, interface eth0)" in output
    assert len(re.findall(r"[\r\n]10\.77\.0\.1: step \d/6  loss ", output)) == 6
    assert [path.name for path in (tmp_path / "out").glob("log_*_10.77.0.2.txt")]


@pytest.mark.campaign
def test_three_hosts_with_one_two_and_one_rank(tmp_path, given):
    """By name, the chief not the first of the list."""
    hosts = Hosts(tmp_path / "hosts", 3)
    try:
        nodes = {"NODE_IP_LIST": "", "IP_LIST": "node2:2,node1:1,node3", "LOCAL_IP": "node1", "HOST_GPU_NUM": 1}
        train(hosts[0], *STEPS, **given | nodes | {"NODES": 3, "NODE_NUM": 4})
    finally:
        hosts.close()
    results = json.loads((tmp_path / "out" / "train_results.json").read_text())
    assert results["world_size"] == 4 and results["global_step"] == 6


@pytest.mark.campaign
def test_addresses_of_ipv6(two, given, tmp_path):
    output = train(two[0], *STEPS, **given | {"NODE_IP_LIST": "[fd77::1]:1,[fd77::2]:1"})
    assert len(losses(tmp_path / "out")) == 6 and re.search(r"[\r\n]fd77::1: step 6/6  loss ", output)


@pytest.mark.needs_gxx
@pytest.mark.campaign
def test_lora_on_two_hosts_then_merge(two, given, tmp_path):
    train(two[0], *STEPS, "--use_lora", "--learning_rate", 0.01, **given | {"DS_CONFIG": STAGES["zero3"]})
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)
    places = {"ADAPTER_MODEL_PATH": tmp_path / "out", "OUTPUT_PATH": tmp_path / "merged"}
    merge = Job(two[0], ["bash", TRAIN / "merge_lora_weight.sh", "--verify", "logits"], **places)
    assert merge.end() == 0, merge.output
    base, merged = (load_file(path / "model.safetensors") for path in (given["MODEL_PATH"], tmp_path / "merged"))
    assert base.keys() == merged.keys() and any((base[name] != merged[name]).any() for name in base)


@pytest.mark.needs_gxx
@pytest.mark.parametrize(
    ("stage", "lora", "shared"),
    [
        ("zero3", False, False),
        *(
            pytest.param(*case, marks=pytest.mark.campaign)
            for case in (
                ("zero2", False, False),
                ("zero3", True, False),
                ("zero2", True, False),
                ("zero3", False, True),
                ("zero2", True, True),
            )
        ),
    ],
)
def test_goes_on_from_a_checkpoint(stage, lora, shared, given, tmp_path):
    """On disks of their own: whole checkpoints on both hosts, from which both go on. On a shared one: one checkpoint.
    Rows are tokenized once a disk."""
    weights = "adapter_model.safetensors" if lora else "model.safetensors"
    disk = tmp_path / "disk"
    disk.mkdir()
    hosts = Hosts(tmp_path / "hosts", 2, disks=() if shared else (disk,))
    disks = [disk] if shared else [disk, hosts[1].files / "disks" / str(disk).strip("/")]
    steps = ["--max_steps", 4, "--save_steps", 2, "--logging_steps", 1, "--max_seq_length", 256]
    steps += ["--use_lora"] if lora else []
    env = given | {"OUTPUT_DIR": disk / "out", "HF_DATASETS_CACHE": disk / "cache", "DS_CONFIG": STAGES[stage]}
    again = ["--resume_from_checkpoint", disk / "out/checkpoint-2"]
    try:
        output = train(hosts[0], *steps, **env)
        assert ("save_on_each_node = True (the nodes' output directories are separate)" in output) != shared
        first, last = (load_file(path / "out/checkpoint-2" / weights) for path in (disks[0], disks[-1]))
        assert first.keys() == last.keys() and all((first[name] == last[name]).all() for name in first)
        for path in disks:
            assert (path / "out/checkpoint-2/trainer_state.json").is_file()
            assert (path / "out" / weights).is_file()
            assert len(list((path / "cache").rglob("*.arrow"))) == 1, "one pass a disk"
        assert "going on from" in train(hosts[0], *steps, *again, **env | {"OUTPUT_DIR": disk / "on"})
        if not shared:
            shutil.rmtree(disks[1] / "out/checkpoint-2")
            job = Job(hosts[0], ["bash", TRAIN / "train.sh", *steps, *again], **env | {"OUTPUT_DIR": disk / "no"})
            assert job.end() == 2
            assert "10.77.0.2: --resume_from_checkpoint: there is no " in job.output
    finally:
        hosts.close()
    difference = max(abs(a - b) for a, b in zip(losses(disk / "out"), losses(disk / "on"), strict=True))
    what = f"{stage}{', LoRA' if lora else ''}, {'a shared disk' if shared else 'separate disks'}"
    print(f"{what}, resumed: largest difference {difference:.1e}")
    assert difference <= 1e-6


@pytest.mark.campaign
def test_goes_on_by_auto_resume_on_a_shared_disk_after_separate_ones(two, given, tmp_path):
    """The chief alone saves then, whatever the checkpoint's run did."""
    train(two[0], *STEPS[2:-1], "steps", "--max_steps", 2, "--save_steps", 2, **given)
    plan = tmp_path / "out/checkpoint-2/run.json"
    content = json.loads(plan.read_text())
    content["arguments"]["save_on_each_node"] = True
    plan.write_text(json.dumps(content))
    as_saved(plan.parent)
    train(two[0], *STEPS[2:-1], "steps", "--max_steps", 4, "--save_steps", 2, "--auto_resume", **given)
    saved = json.loads((tmp_path / "out/checkpoint-4/manifest.json").read_text())
    assert saved["save_on_each_node"] is False
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= saved["files"].keys()


@pytest.mark.campaign
@pytest.mark.parametrize("scheduler", ["torchrun", "srun"])
def test_without_train_sh(scheduler, two, given, tmp_path):
    """What a scheduler does: the same train.py on each host, by torchrun, or with the variables that srun sets. Each
    saves in a directory of its own what is its rank's."""
    jobs = []
    for rank, host in enumerate(two):
        args = ["--model_name_or_path", given["MODEL_PATH"], "--train_data_file", given["TRAIN_DATA_FILE"]]
        args += [
            *STEPS[:-1],
            "steps",
            "--save_steps",
            6,
            "--output_dir",
            tmp_path / f"out{rank}",
            "--save_on_each_node",
        ]
        run, env = [], {"NCCL_SOCKET_IFNAME": "eth0"}
        if scheduler == "torchrun":
            run = ["-m", "torch.distributed.run", "--nnodes", 2, "--nproc_per_node", 1, "--node_rank", rank]
            run += ["--master_addr", "10.77.0.1"]
        else:
            env |= {"SLURM_STEP_NUM_TASKS": 2, "SLURM_STEP_NUM_NODES": 2, "MASTER_ADDR": "10.77.0.1"}
            env |= {"SLURM_PROCID": rank, "SLURM_LOCALID": 0}
        jobs.append(Job(host, [sys.executable, *run, TRAIN / "train.py", *args], **env))
    assert [job.end() for job in jobs] == [0, 0], [job.output[-2000:] for job in jobs]
    for rank in range(2):
        saved = json.loads((tmp_path / f"out{rank}/checkpoint-6/manifest.json").read_text())
        assert [name for name in saved["files"] if "rng_state" in name] == [f"rng_state_{rank}.pth"]
    assert len(losses(tmp_path / "out0")) == 6
    assert json.loads((tmp_path / "out0" / "train_results.json").read_text())["world_size"] == 2


# ------------------------------------------------------------------------------------------ the documentation's text

SET_UP = """\
ssh-keygen
ssh-keygen -A
/usr/sbin/sshd -p 36005 -o ListenAddress=0.0.0.0
echo "Port 36005" > ~/.ssh/config
passwd root
"""
VARIABLES = """\
export HOST_GPU_NUM=1
export LOCAL_IP=${ip1}
export NODE_IP_LIST="${ip1}:1,${ip2}:1"
export NODES=2
export NODE_NUM=$((${NODES} * ${HOST_GPU_NUM}))
"""


def test_as_the_documentation_has_it(given, tmp_path):
    """The commands as they stand in both READMEs, the addresses filled in, the questions answered on a terminal."""
    for readme in ("README.md", "README_CN.md"):
        text = re.sub(r"\s+#.*", "", (TRAIN.parent / readme).read_text(encoding="utf-8"))
        assert SET_UP.strip() in text and VARIABLES.replace("NUM=1", "NUM=8").replace(":1", ":8").strip() in text
    hosts = Hosts(tmp_path / "hosts", keys=False, sshd=False)
    try:
        for host in hosts:
            shell = Job(host, ["bash", "--norc"], cwd=Path("/root"), terminal=True, PS1="# ")
            shell.wait_for("# $")
            answers = [r"which to save the key", r"passphrase", r"same passphrase again"]
            for line in SET_UP.splitlines():
                shell.type(line + "\n")
                if line == "ssh-keygen":
                    for question in answers:
                        shell.wait_for(question)
                        shell.type("\n")
                if line == "passwd root":
                    shell.wait_for("New password:")
                    shell.type("correct horse 1\n")
                    shell.wait_for("Retype new password:")
                    shell.type("correct horse 1\n")
                    shell.wait_for("updated successfully")
                shell.wait_for(re.escape(line) + r"[\s\S]*# $")  # what is typed ahead is lost at a password
            shell.type("exit\n")
            shell.end(30)
        public = "".join(next((host.files / "ssh").glob("id_*.pub")).read_text() for host in hosts)
        for host in hosts:
            (host.files / "ssh" / "authorized_keys").write_text(public)
        shutil.copytree(TRAIN, tmp_path / "train", ignore=shutil.ignore_patterns("output", "__pycache__"))
        script = tmp_path / "train" / "train.sh"
        first, *rest = script.read_text(encoding="utf-8").splitlines(keepends=True)
        filled = VARIABLES.replace("${ip1}", "10.77.0.1").replace("${ip2}", "10.77.0.2")
        places = "".join(
            f'export {name}="{given[name]}"\n' for name in ("MODEL_PATH", "TRAIN_DATA_FILE", "OUTPUT_DIR")
        )
        script.write_text(first + filled + places + "".join(rest), encoding="utf-8")
        command = ["bash", "train.sh", "--max_steps", 2, "--max_seq_length", 256]  # the port: ~/.ssh/config has it
        job = Job(hosts[0], command, cwd=tmp_path / "train", terminal=True)
        job.wait_for(r"authenticity of host '\[10\.77\.0\.2\]:36005.*can't be established", 30)
        job.wait_for(r"\(yes/no")
        job.type("yes\n")
        assert job.end(200) == 0, job.output[-3000:]
    finally:
        hosts.close()
    assert re.search(r"10\.77\.0\.1: step 2/2  loss ", job.output)
    assert json.loads((tmp_path / "out" / "train_results.json").read_text())["world_size"] == 2


# ------------------------------------------------------------------------------------------------- hostile values

EVIL = "$(touch EVIL) `touch EVIL`; touch EVIL\n\"quotes\" 'and' \\ 中文"
REFUSED = {
    "host entry, option": {"NODE_IP_LIST": "10.77.0.1:1,-oProxyCommand=touch EVIL:1"},
    "host entry, $( )": {"NODE_IP_LIST": "10.77.0.1:1,$(touch EVIL):1"},
    "host entry, ;": {"NODE_IP_LIST": "10.77.0.1:1,10.77.0.2;touch EVIL:1"},
    "host entry, port": {"NODE_IP_LIST": "10.77.0.1:1,10.77.0.2:36005"},
    "LOCAL_IP": {"LOCAL_IP": "`touch EVIL`"},
    "SSH_PORT": {"SSH_PORT": "36005 -oProxyCommand=touch EVIL"},
    "MASTER_PORT": {"MASTER_PORT": "29500;touch EVIL"},
    "NET_IFNAME": {"NET_IFNAME": "eth0$(touch EVIL)"},
    "HOST_GPU_NUM": {"HOST_GPU_NUM": "a[$(touch EVIL)]"},
    "STALL_TIMEOUT": {"STALL_TIMEOUT": "a[$(touch EVIL)]"},
    "NODE_NUM": {"NODE_NUM": "$(touch EVIL)"},
}


@pytest.fixture
def no_evil(two, tmp_path):
    """No file of that name appears, wherever a command could have been run."""
    places = [TRAIN, tmp_path, Path.home(), Path("/"), *(host.files / "ssh" for host in two)]
    yield
    assert not [file for place in places for file in place.glob("*EVIL*") if "touch" not in file.name]


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_value_is_refused(name, two, given, no_evil):
    job = Job(two[0], ["bash", TRAIN / "train.sh", *STEPS], **given | REFUSED[name])
    assert job.end(30) == 2, job.output
    said = [line for line in job.output.splitlines() if line.startswith("refused: ")]
    print(f"| {name} | {next(iter(REFUSED[name].values()))} | {said[0][:150]} |")
    assert len(said) == 1 and "Traceback" not in job.output


def test_a_hostile_value_arrives_as_it_is(two, given, no_evil, tmp_path):
    """In variables, a flag and paths, on the last node; a token is in no log and no process list."""
    folder = tmp_path / EVIL.replace("\n", " ").replace("/", "")
    folder.mkdir()
    model = shutil.copytree(given["MODEL_PATH"], folder / "model")
    rows = shutil.copyfile(given["TRAIN_DATA_FILE"], folder / "rows $(touch EVIL).jsonl")
    env = given | {"MODEL_PATH": model, "TRAIN_DATA_FILE": rows, "OUTPUT_DIR": folder / "out"}
    env |= {"FORWARD": "MY_NOTES", "MY_NOTES": EVIL, "https_proxy": "http://10.77.0.9:1", "SWANLAB_TAG": EVIL}
    env |= {"WANDB_NOTES": EVIL, "NCCL_DEBUG_FILE": f"a=b {EVIL}", "HF_TOKEN": "hf_secret", "TORCH_X": "\t"}
    flags = ["--max_steps", 100000, "--max_seq_length", 64, "--run_name", EVIL, "--save_steps", 100000]
    job = Job(two[0], ["bash", TRAIN / "train.sh", *flags], **env)
    try:
        job.wait_for("step 2/")
        lines = {pid: line for host in two for pid, line in host.processes("train.py").items()}
        (rank,) = two[1].processes("train.py")
        there = Path(f"/proc/{rank}/environ").read_bytes().decode().split("\0")
        words = Path(f"/proc/{rank}/cmdline").read_bytes().decode().split("\0")
        everywhere = {line for host in two for line in host.processes().values()}
    finally:
        os.kill(job.pid, 15)
        job.end()
    for name in (
        "MY_NOTES",
        "https_proxy",
        "SWANLAB_TAG",
        "WANDB_NOTES",
        "NCCL_DEBUG_FILE",
        "HF_TOKEN",
        "TORCH_X",
        "OMP_NUM_THREADS",
    ):
        assert f"{name}={env.get(name, 1)}" in there, name
    assert words[words.index("--run_name") + 1] == EVIL
    assert words[words.index("--model_name_or_path") + 1] == str(model)
    assert words[words.index("--train_data_file") + 1] == str(rows)
    assert lines and not any("hf_secret" in line for line in everywhere)
    assert "hf_secret" not in job.output
    assert not any("hf_secret" in log.read_text(errors="replace") for log in (folder / "out").glob("log_*"))


def test_a_changed_host_key_is_refused(two, given):
    """Nothing switches the check off."""
    known = two[0].files / "ssh" / "known_hosts"
    before = known.read_text()
    wrong = (two[0].files / "etc/ssh/ssh_host_ed25519_key.pub").read_text().split()[:2]
    known.write_text(f"[10.77.0.2]:36005 {' '.join(wrong)}\n")
    try:
        job = Job(two[0], ["bash", TRAIN / "train.sh", *STEPS], **given)
        assert job.end(30) == 2 and "10.77.0.2: ssh: Host key verification failed" in job.output, job.output
        assert "its key has changed; run once: ssh -p 36005 10.77.0.2 true" in job.output
    finally:
        known.write_text(before)
    assert SSH.is_dir()
