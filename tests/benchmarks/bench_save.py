"""Seconds that a save holds training up: the plain Trainer, ours with the manifest, ours without.

    python tests/benchmarks/bench_save.py [--repeats 15] [--hidden_size 1024] [--layers 4] [--out FOLDER]

One process holds one model (fp32, AdamW) and saves it in turns by the plain Trainer's own method and by ours with and
without the manifest, each to a fresh directory of its own; the order changes with each repeat. Before a save all data
written is on the disk (sync), so that none pays for another's. After it come forward and backward passes until the
checkpoint is whole: what they lose to the hashing beside them counts as held up, too. The medians and their ratios
come last.
"""

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import EXAMPLE_TOKENIZER, TRAIN, make_model_dir

sys.path.insert(0, str(TRAIN))


def trainer_after_a_step(model_dir: Path, out: Path):
    """Our Trainer after one step, so that the optimizer has its state."""
    import train
    from sft.data.batches import load_data
    from sft.model.load import load_model
    from sft.training.output_dir import begin_output_dir
    from sft.training.plan import parse_arguments
    from sft.training.record import record_rows
    from sft.training.resume import find_start

    flags = ["--model_name_or_path", model_dir, "--train_data_file", TRAIN / "example" / "rows.jsonl"]
    flags += ["--output_dir", out, "--max_steps", 1, "--per_device_train_batch_size", 1, "--report_to", "none"]
    model_args, data_args, args = parse_arguments([str(flag) for flag in flags])
    start = find_start(model_args, data_args, args)
    data = load_data(data_args, start.tokenizer, args.seed)
    record_rows(args, data_args.train_data_file, data.examples, data.figures)
    model = load_model(model_args, args, start.tokenizer, start.directory, None)
    trainer = train.make_trainer(model, model_args, data_args, args, start, data, None)
    begin_output_dir(args, False)
    trainer.train()
    trainer.control.should_training_stop = False  # else a save waits until it is whole
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--hidden_size", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--out", help="folder on the disk to measure (default: a temporary one)")
    args = parser.parse_args()
    import torch
    import transformers

    from sft.training import trainer as ours
    from sft.training.manifest import checkpoints_in, remove

    def plain() -> None:
        with mock.patch.object(ours.Trainer, "save_model", own_save_model), \
                mock.patch.object(ours.Trainer, "_save", own_save):  # fmt: skip
            transformers.Trainer._save_checkpoint(trainer, trainer.model, None)

    def without() -> None:
        with mock.patch.object(trainer.rest_of_save, "begin"):
            trainer._save_checkpoint(trainer.model, None)

    def whole() -> None:
        trainer._save_checkpoint(trainer.model, None)

    def one_pass() -> float:
        """Seconds of a forward and backward pass."""
        begun = time.perf_counter()
        trainer.model(input_ids=batch, labels=batch).loss.backward()
        trainer.model.zero_grad()
        return time.perf_counter() - begun

    batch = torch.arange(256).reshape(1, 256)
    own_save_model, own_save = transformers.Trainer.save_model, transformers.Trainer._save
    ways = {"plain Trainer": plain, "ours, no manifest": without, "ours": whole}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    lost: list[float] = []
    until_whole: list[float] = []
    with tempfile.TemporaryDirectory(prefix="bench_save_", dir=args.out) as folder:
        size = {"hidden_size": args.hidden_size, "intermediate_size": 4 * args.hidden_size}
        model_dir = make_model_dir(
            "dense", EXAMPLE_TOKENIZER, Path(folder, "model"), num_hidden_layers=args.layers, **size
        )
        trainer = trainer_after_a_step(model_dir, Path(folder, "out"))
        orders = itertools.cycle(itertools.permutations(ways))
        for step, order in zip(range(args.repeats + 1), orders):
            for number, name in enumerate(order):
                trainer.state.global_step = 1000 + 10 * step + number
                os.sync()
                begun = time.perf_counter()
                ways[name]()
                taken = time.perf_counter() - begun
                if name == "ours":
                    beside = [one_pass()]
                    while not trainer.rest_of_save.work.done():
                        beside.append(one_pass())
                    whole_after = time.perf_counter() - begun
                    alone = [one_pass() for _ in beside]
                    trainer.finish_save()
                if step:  # the first round warms up
                    seconds[name].append(taken)
                    if name == "ours":
                        lost.append(sum(beside) - sum(alone))
                        until_whole.append(whole_after)
                last = checkpoints_in(Path(folder, "out"))[-1]
                total = sum(file.stat().st_size for file in last.rglob("*") if file.is_file())
                for path in checkpoints_in(Path(folder, "out")):
                    remove(path)
    base = statistics.median(seconds["plain Trainer"])
    print(f"a checkpoint of {total / 1e6:.0f} MB, {args.repeats} saves each")
    for name, times in seconds.items():
        middle = statistics.median(times)
        print(
            f"{name:<18} median {middle:.3f} s  min {min(times):.3f} s  max {max(times):.3f} s  {middle / base:.3f}×"
        )
    slower, whole_after = statistics.median(lost), statistics.median(until_whole)
    print(f"whole after        median {whole_after:.3f} s; passes meanwhile lose {slower:.3f} s of them")
    middle = statistics.median(a + b for a, b in zip(seconds["ours"], lost))
    print(f"ours, with that    median {middle:.3f} s  {middle / base:.3f}×")


if __name__ == "__main__":
    main()
