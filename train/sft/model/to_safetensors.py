"""A model in pytorch_model*.bin files, as safetensors, by whatever code it is computed: no code of the model runs.

    cd train && python -m sft.model.to_safetensors MODEL_DIR NEW_DIR

Refused (exit code 2): a directory without such files, a new one that is there already, files that hold more than
tensors.
"""

import pickle
import shutil
import sys
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict

from sft.messages import Refused, in_one_line, run_script
from sft.model.weight_files import BIN_INDEX


def main(argv: list[str]) -> None:
    """Write the new directory; config.json comes last, so that one that is cut short has none."""
    if len(argv) != 2:
        raise Refused("give two directories: the model's, and a new one for the safetensors files")
    old, new = map(Path, argv)
    weights = sorted(old.glob("pytorch_model*.bin"))
    if not weights or new.exists():
        raise Refused(f"{new}: is there already" if weights else f"{old}: holds no pytorch_model*.bin")
    shutil.copytree(old, new, ignore=shutil.ignore_patterns("*.bin", "config.json", BIN_INDEX))
    state: dict[str, torch.Tensor] = {}
    for file in weights:
        try:
            state |= torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:
            raise Refused(f"{file}: cannot be read: {in_one_line(error)}") from error
    save_torch_state_dict(state, new, shared_tensors_to_discard=["lm_head.weight"])  # of a tied head
    shutil.copyfile(old / "config.json", new / "config.json")
    print(f"written: {new}")


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]))
