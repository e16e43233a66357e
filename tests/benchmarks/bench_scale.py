"""What a step costs against row length, rows and vocabulary: seconds and memory, with fitted exponents.

    python tests/benchmarks/bench_scale.py [--most 16384] [--repeats 3]
    python tests/benchmarks/bench_scale.py --profile            # where one step of 16 rows of 256 goes, both ways

Each point is a process of its own: a small model (hidden 256, 2 layers) is built, and a packed batch goes forward and
backward, once as the collator, attention and loss of training have it and once the plain way (transformers' mask of
all tokens, logits at all supervised positions at once). A quarter of the tokens are supervised. Seconds are the median
of `--repeats` steps after a first one; memory is what the peak resident size grows by from before the first step. An
exponent is the slope of the logarithms over the largest three points: 1 is a cost in proportion, 2 the square.
"""

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "train"))
VOCABULARY = 32_768
PLAIN_POSITIONS = 4096  # the plain way beyond this takes more memory than many machines have


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def make_step(length: int, rows: int, vocabulary: int, plain: bool) -> tuple[Callable[[], None], int]:
    """A forward and backward pass of one point, and the bytes of its gradients."""
    from contextlib import nullcontext
    from types import SimpleNamespace

    import numpy as np
    import torch
    from transformers import HunYuanDenseV1Config, HunYuanDenseV1ForCausalLM

    from sft.data.batches import Collator
    from sft.training.attention import keep_rows_apart
    from sft.training.loss import choose_loss

    torch.manual_seed(0)
    config = HunYuanDenseV1Config(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, vocab_size=vocabulary, max_position_embeddings=32_768, tie_word_embeddings=False,
    )  # fmt: skip
    model, head = HunYuanDenseV1ForCausalLM(config).train(), None
    if not plain:
        flags = {"bf16": False, "fp16": False, "label_smoothing_factor": 0.0, "use_liger_kernel": False}
        keep_rows_apart(model, SimpleNamespace(device=torch.device("cpu"), **flags))
        head = choose_loss(model, SimpleNamespace(**flags)).head
    ids = np.arange(length) % vocabulary
    labels = np.where(np.arange(length) % 4 == 0, ids, -100)
    batch = Collator(0, "batch")([{"input_ids": ids, "labels": labels} for _ in range(rows)])
    del batch["numbers"]

    def run() -> None:
        with head.knows(batch["shift_labels"]) if head else nullcontext():
            model(**batch, use_cache=False).loss.backward()
        model.zero_grad()

    return run, sum(p.numel() * p.element_size() for p in model.parameters())


def measure(point: list, repeats: int) -> dict[str, float]:
    """Seconds and bytes of one point, in this process."""
    run, gradients = make_step(*point)
    before, seconds = peak(), []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds[1:]), "bytes": max(1, peak() - before - gradients)}


def profile(point: list, most: int = 10) -> None:
    """Print the operators that one step spends its time in, itself and not in others that it calls."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    run, _ = make_step(*point)
    run()
    with profiler(activities=[ProfilerActivity.CPU]) as found:
        run()
    events = sorted(found.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    print(f"{'plain' if point[-1] else 'ours'}: {total / 1e3:.0f} ms")
    for event in events[:most]:
        time_of = event.self_cpu_time_total
        print(f"  {time_of / total:>5.1%} {time_of / 1e3:>8.1f} ms {event.count:>5} calls  {event.key}")


def exponent(sizes: list[int], costs: list[float]) -> float:
    """The least-squares slope of log cost over log size, of the largest three points."""
    xs, ys = ([math.log(value) for value in values[-3:]] for values in (sizes, costs))
    middle, level = statistics.mean(xs), statistics.mean(ys)
    return sum((x - middle) * (y - level) for x, y in zip(xs, ys)) / sum((x - middle) ** 2 for x in xs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=16_384, help="tokens of the longest row (default 16384)")
    parser.add_argument("--repeats", type=int, default=3, help="steps that are timed (default 3)")
    parser.add_argument("--profile", action="store_true", help="print where a step's time goes, and nothing else")
    parser.add_argument("--point", type=json.loads, help="one point alone: [length, rows, vocabulary, plain]")
    args = parser.parse_args()
    if args.point:
        return print(json.dumps(measure(args.point, args.repeats)))
    if args.profile:
        for plain in (True, False):
            profile([256, 16, VOCABULARY, plain])
        return None
    doubled = [256 * 2**i for i in range(20) if 256 * 2**i <= args.most]
    sweeps = {
        "row length": [(size, (size, 1, VOCABULARY)) for size in doubled],
        "rows of 256": [(size, (256, size, VOCABULARY)) for size in (4, 8, 16, 32, 64) if 256 * size <= args.most],
        "vocabulary": [(size, (1024, 4, size)) for size in (16_384, 32_768, 65_536, 131_072)],
    }
    print(f"{'of':<12} {'size':>7} {'way':<6} {'seconds':>8} {'MB':>7}")
    for name, points in sweeps.items():
        for plain in (False, True):
            sizes, found = [], []
            for size, point in points:
                if plain and point[0] * point[1] > PLAIN_POSITIONS:
                    continue
                command = [sys.executable, __file__, "--point", json.dumps([*point, plain])]
                done = subprocess.run([*command, "--repeats", str(args.repeats)], capture_output=True, text=True)
                if done.returncode:
                    sys.exit(done.stderr)
                sizes.append(size)
                found.append(json.loads(done.stdout.splitlines()[-1]))
                cost = found[-1]
                print(f"{name:<12} {size:>7} {'plain' if plain else 'ours':<6} {cost['seconds']:>8.3f} "
                      f"{cost['bytes'] / 1e6:>7.0f}", flush=True)  # fmt: skip
            slopes = [exponent(sizes, [cost[kind] for cost in found]) for kind in ("seconds", "bytes")]
            print(f"{name:<12} {'':>7} {'plain' if plain else 'ours':<6} exponents: seconds {slopes[0]:.2f}, "
                  f"memory {slopes[1]:.2f}")  # fmt: skip
    return None


if __name__ == "__main__":
    main()
