"""A row as it will be trained, or the lengths of a file's rows.

    python show_rows.py --model DIR --file rows.jsonl            # lengths, and what share of the tokens is supervised
    python show_rows.py --model DIR --file rows.jsonl --row 12   # line 12 as it will be trained, token by token
    python show_rows.py --model DIR --file rows.jsonl --warnings # every line that something is to be said of

Runs the code that a tokenizer's directory brings with it, unless --trust_remote_code false is given. Refused (exit
code 2): a directory without a tokenizer or a chat template, and the files and rows that train.py refuses.
"""

import math
import sys
from pathlib import Path

import sft  # noqa: F401  first: it says what is missing

# isort: split
import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from sft.data.chat_format import ChatFormat
from sft.data.examples import Examples, Options, encode_rows, load_examples
from sft.data.lines import data_files, read_lines
from sft.data.shapes import shape_in
from sft.messages import Parser, Refused, run_script
from sft.model.directory import ModelDirectory
from sft.model.generations import report_code
from sft.model.pretrained import load_tokenizer

GREEN, DIM, PLAIN = "\033[32m", "\033[2m", "\033[0m"
WIDTH = 50  # characters of the longest bar


def main(argv: list[str]) -> None:
    """Print what the arguments ask for. Raises Refused."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="directory of the model or tokenizer")
    parser.add_argument("--file", required=True, nargs="+", help="files or globs, plain or gzip")
    parser.add_argument("--row", type=int, help="print this line (from 1) of the first file, token by token")
    parser.add_argument("--warnings", action="store_true", help="print each line that is bad or warned of, and why")
    parser.add_argument("--max_seq_length", type=int, default=4096, help="tokens a sequence at most; default 4096")
    parser.add_argument("--train_on", choices=("all", "last"), default="all")
    parser.add_argument("--history", choices=("as_written", "answers"), default="as_written")
    parser.add_argument("--overlong", choices=("truncate", "drop", "error"), default="truncate")
    parser.add_argument("--bad_rows", choices=("error", "skip"), default="error")
    parser.add_trust()
    args = parser.parse_args(argv)
    if args.max_seq_length < 2:
        raise Refused(f"--max_seq_length {args.max_seq_length}: must be at least 2")
    logging.set_verbosity_error()
    if not Path(args.model).is_dir():
        raise Refused(f"--model {args.model}: no such directory")
    report_code(ModelDirectory(None, args.model, tokenizer_trusted=args.trust_remote_code))
    tokenizer = load_tokenizer(Path(args.model), args.trust_remote_code)
    options = Options(args.max_seq_length, args.train_on, args.overlong, args.history)
    if args.warnings:
        show_warnings(args.file, tokenizer, options)
    elif args.row is None:
        show_file(load_examples(args.file, tokenizer, options, args.bad_rows, flag="--file"))
    else:
        show_row(args.file, args.row, tokenizer, options)


def show_row(patterns: list[str], number: int, tokenizer: PreTrainedTokenizerBase, options: Options) -> None:
    """Each sequence that the row becomes: place, id, a mark where supervised, text."""
    file = data_files(patterns, "--file")[0]
    line = next((line for at, line, _ in read_lines(file, []) if at == number), b"")
    if line == b"":
        raise Refused(f"--row {number}: {file} has no row in that line")
    table, found = encode_rows([(number, line)], ChatFormat(tokenizer), options)
    if found.counts["bad"]:
        raise Refused(f"{file}:{number}: {found.lines['bad'][0][1]}")
    print(*found.remarks(file), sep="\n", end="\n" if found.lines else "")
    colour = sys.stdout.isatty()
    sequences = zip(table["input_ids"].to_pylist(), table["spans"].to_pylist())
    for sequence, (ids, spans) in enumerate(sequences, 1):
        supervised = {i for start, end in zip(spans[::2], spans[1::2]) for i in range(start, end)}
        print(f"sequence {sequence} of {table.num_rows}: {len(ids)} tokens, {len(supervised)} supervised")
        for i, token in enumerate(ids):
            text = repr(tokenizer.decode([token], skip_special_tokens=False))[1:-1]
            if colour:
                text = (GREEN if i in supervised else DIM) + text + PLAIN
            print(f"{i:>7} {token:>7} {'*' if i in supervised else ' '} {text}")


def show_warnings(patterns: list[str], tokenizer: PreTrainedTokenizerBase, options: Options) -> None:
    """Each row that is bad or warned of, with the reasons."""
    chat, number = ChatFormat(tokenizer), 0
    for file in data_files(patterns, "--file"):
        shape = None
        for at, line, _ in read_lines(file, []):
            shape = shape or (shape_in(line) if line else None)
            for remark in encode_rows([(at, line)], chat, options, shape)[1].remarks(file):
                number += 1
                print(remark)
    print(f"{number} remarks")


def show_file(examples: Examples) -> None:
    """Number and lengths of all sequences, and the share of supervised tokens."""
    lengths = examples.lengths
    all_spans = examples.rows.with_format("numpy", columns=["spans"])["spans"]
    supervised = sum(int((spans[1::2] - spans[::2]).sum()) for spans in all_spans)
    figures = examples.figures()
    print(f"{figures['num_rows']} rows, {len(examples)} sequences, {lengths.sum()} tokens")
    print(f"supervised: {supervised} tokens, {supervised / lengths.sum():.1%}")
    marks = ", ".join(f"{share}% ≤ {int(np.percentile(lengths, share))}" for share in (50, 90, 99))
    print(f"length: {marks}, longest {lengths.max()}")
    edges = [0] + [2**i for i in range(4, 31) if 2 ** (i - 1) < lengths.max()]
    numbers = np.histogram(lengths - 1, edges)[0]
    for low, high, number in zip(edges, edges[1:], numbers):
        bar = "█" * math.ceil(WIDTH * number / numbers.max())
        print(f"{low + 1:>9} – {high:<9} {number:>9} {bar}")


def run() -> None:
    """Run main; a reader that has read enough (`| head`) ends it."""
    try:
        main(sys.argv[1:])
    except BrokenPipeError:
        sys.stdout = None  # type: ignore[assignment]


if __name__ == "__main__":
    run_script(run)
