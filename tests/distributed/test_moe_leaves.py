"""ZeRO-3 does not hang when ranks use different experts, with --make_moe_param_leaf_module and without."""

import pytest
import torch
from transformers import AutoTokenizer

import reference
from sft.model.moe import moe_layers

KINDS = ("moe", "hy_v3", "hy_v4", "remote", "remote_cla")


@pytest.mark.needs_gxx
@pytest.mark.campaign
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_that_route_apart(kind, model_dir, example_tokenizer_dir, example_rows, run_train, losses, tmp_path):
    """One row of a few tokens a rank, one layer with 32 experts: in every step each rank uses some that the other does
    not, which is looked at first."""
    experts = {"n_routed_experts" if kind == "hy_v4" else "num_experts": 32}
    layers = {"num_hidden_layers": 2 if kind.startswith("hy") or kind == "remote_cla" else 1}
    directory = model_dir(kind, example_tokenizer_dir, initializer_range=0.2, **experts, **layers)
    flags = ["--model_code", "remote"] if kind.startswith("remote") else []
    tokenizer = AutoTokenizer.from_pretrained(example_tokenizer_dir)

    model, used = reference.load(directory).eval(), []
    for layer in moe_layers(model).values():
        router = layer.gate.wg if hasattr(layer.gate, "wg") else layer.gate
        router.register_forward_hook(
            lambda module, args, output: used.append(
                set((output if torch.is_tensor(output) else output[0]).topk(1).indices.flatten().tolist())
            )
        )
    rows = reference.encode_rows(example_rows, tokenizer, 12)
    for step in reference.trainer_order(len(rows), 42, 2, 1, 1, 2):
        one, two = ([], [])
        for chosen, (row,) in zip((one, two), step, strict=True):
            used.clear()
            with torch.no_grad():
                model(input_ids=torch.tensor([rows[row]["input_ids"]]), use_cache=False)
            chosen += used
        assert any(a - b and b - a for a, b in zip(one, two)), "the ranks' rows use the same experts"

    found = {}
    for leaves in (True, False):
        out = tmp_path / f"leaves-{leaves}"
        args = ["--model_name_or_path", directory, "--train_data_file", example_rows, "--output_dir", out, *flags]
        args += ["--per_device_train_batch_size", 1, "--max_seq_length", 12, "--max_steps", 6, "--logging_steps", 1]
        args += ["--deepspeed", "ds_zero3_no_offload.json", "--save_strategy", "no", "--overlong", "truncate"]
        args += ["--make_moe_param_leaf_module"] * leaves
        run = run_train(args, launcher="torchrun", nproc=2, timeout=120)
        assert run.returncode == 0, run.stderr[-3000:]
        assert ("ZeRO-3 leaf modules = " in run.stdout) == leaves
        found[leaves] = losses(out)
    assert found[True] == pytest.approx(found[False], abs=1e-6)


def test_without_zero3_it_says_that_it_has_no_effect(
    model_dir, example_tokenizer_dir, example_rows, run_train, tmp_path
):
    args = ["--model_name_or_path", model_dir("moe", example_tokenizer_dir), "--train_data_file", example_rows]
    run = run_train([*args, "--output_dir", tmp_path, "--max_steps", 1, "--make_moe_param_leaf_module"])
    assert run.returncode == 0 and "--make_moe_param_leaf_module has no effect: it is for ZeRO-3" in run.stdout
