"""In which order one run and one merge enter our modules.

    python tests/benchmarks/module_order.py                     # of this checkout
    python tests/benchmarks/module_order.py --train DIR         # of another one's train/

A module is entered when the script's own code calls a function of it; calls in a row to the same module count once.
Printed for one LoRA run of the embedded example's architecture and for the merge of its adapter: the order, and the
modules that are entered more than twice.
"""

import argparse
import io
import os
import runpy
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

TRAIN = Path(__file__).resolve().parents[2] / "train"
MODEL = ["--num_layers", "2", "--hidden_size", "64", "--intermediate_size", "32", "--num_attention_heads", "4"]
RUN = ["--max_steps", "2", "--report_to", "none", "--max_seq_length", "64", "--per_device_train_batch_size", "2"]


def entered(script: Path, args: list[str]) -> list[str]:
    """The modules below the script's folder in the order in which its own functions enter them."""
    found, folder = [], str(script.parent)

    def on_call(frame, event, _argument) -> None:
        if event != "call" or frame.f_back is None or frame.f_back.f_code.co_filename != str(script):
            return
        file = frame.f_globals.get("__file__") or ""
        if not file.startswith(folder) or file == str(script) or frame.f_code.co_name == "<module>":
            return
        name = Path(file).relative_to(folder).with_suffix("").as_posix().removeprefix("sft/")
        if name not in ("messages", "console") and found[-1:] != [name]:
            found.append(name)

    sys.argv = [str(script), *args]
    sys.path.insert(0, folder)
    shown = io.StringIO()
    sys.setprofile(on_call)
    try:
        with redirect_stdout(shown), redirect_stderr(shown):
            runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        if end.code:
            sys.setprofile(None)
            sys.exit(shown.getvalue())
    finally:
        sys.setprofile(None)
    return found


def in_a_process(script: Path, args: list) -> list[str]:
    """The same, in a process of its own: what one script imports does not count for the other."""
    command = [sys.executable, __file__, "--script", str(script), *map(str, args)]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.split()


def show(title: str, modules: list[str]) -> None:
    often = {name: times for name, times in Counter(modules).items() if times > 2}
    print(f"{title}: {len(modules)} times a module is entered\n  {' → '.join(modules)}")
    print(f"  more than twice: {often or 'none'}\n")


def main() -> None:
    if sys.argv[1:2] == ["--script"]:
        print("\n".join(entered(Path(sys.argv[2]), sys.argv[3:])))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=Path, default=TRAIN, help="the train/ of a checkout (default: this one's)")
    train = parser.parse_args().train.resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = folder
        rows, base, adapter = train / "example" / "rows.jsonl", Path(folder, "base"), Path(folder, "adapter")
        data = ["--train_data_file", rows, *RUN]
        tokenizer = ["--tokenizer_name_or_path", train / "example" / "tokenizer"]
        in_a_process(train / "train.py", [*tokenizer, *MODEL, *data, "--output_dir", base])
        lora = ["--model_name_or_path", base, "--use_lora", "--lora_rank", 4, *data, "--output_dir", adapter]
        show("train.py", in_a_process(train / "train.py", lora))
        show("merge_lora_weight.py", in_a_process(train / "merge_lora_weight.py", ["--adapter_model_path", adapter]))


if __name__ == "__main__":
    main()
