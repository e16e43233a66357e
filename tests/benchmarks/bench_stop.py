"""What it costs at each step that two ranks ask one another whether one is to stop (training/stop_on_request.py).

    python tests/benchmarks/bench_stop.py [ROUNDS [HIDDEN_SIZE]]

One run in two processes, whose steps have the same number of tokens; blocks of 25 steps with and without the question
alternate. Prints the medians: at most 1 % apart.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent / "train")]
BLOCK = 25


def run_as_rank() -> None:
    """train.py, with every other block's question left out."""
    import train
    from sft.training.stop_on_request import StopOnRequest

    ask, seconds, mark, inside = StopOnRequest.on_step_end, {True: [], False: []}, [0.0], []

    def on_step_end(self, args, state, control, **kwargs):
        asks, began = state.global_step // BLOCK % 4 in (0, 3), time.perf_counter()  # with, without, without, with
        if asks:
            ask(self, args, state, control)
        elif self.answers:
            self.greatest()
        if asks:
            inside.append(time.perf_counter() - began)
        if state.global_step % BLOCK:  # the first of a block is neither
            seconds[asks].append(time.perf_counter() - mark[0])
        mark[0] = time.perf_counter()

    StopOnRequest.on_step_end = on_step_end
    train.main(sys.argv[1:])
    if os.environ["RANK"] == "0":
        with_it, without = (statistics.median(seconds[asks]) * 1000 for asks in (True, False))
        steps = len(seconds[True])
        own = statistics.median(inside) * 1000
        print(f"{steps} steps each: {with_it:.2f} ms with, {without:.2f} ms without: {with_it / without - 1:+.2%}")
        print(f"of that in the question itself {own:.3f} ms: {own / without:.2%}")


def main(rounds: int = 20, hidden_size: int = 0) -> None:
    from runs import run_script
    from tiny import EXAMPLE_TOKENIZER, make_model_dir

    with tempfile.TemporaryDirectory() as folder:
        larger = {"hidden_size": hidden_size, "intermediate_size": 4 * hidden_size} if hidden_size else {}
        model = make_model_dir("dense", EXAMPLE_TOKENIZER, Path(folder, "model"), **larger)
        flags = ["--model_name_or_path", model, "--train_data_file", TESTS.parent / "train/example/rows.jsonl"]
        flags += ["--output_dir", Path(folder, "out"), "--max_steps", 2 * BLOCK * rounds, "--save_strategy", "no"]
        flags += ["--max_seq_length", 128, "--packing", "bin", "--logging_steps", 1000, "--disable_tqdm", "True"]
        done = run_script(Path(__file__), flags, "torchrun", 2)
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        print(done.stdout[done.stdout.index("done: ") :])


if __name__ == "__main__":
    if "RANK" in os.environ:
        run_as_rank()
    else:
        main(*map(int, sys.argv[1:]))
