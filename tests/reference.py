"""An independent reference for the losses of train.py: a plain loop that shares no code with `train/`.

No Trainer, no packing, no selected positions: rows are padded, the model computes full logits and its own loss from
ordinary `labels`, AdamW runs over fp32 weights. What is supervised is found by searching tokens, which is right only
for rows whose text holds no special token: the real rows and those of the tests.
"""

import importlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

IGNORED = -100
Batch = dict[str, torch.Tensor]
# Rows of one optimizer step: micro-batches (all ranks', accumulation outermost), each a list of row indices.
Step = list[list[int]]


# --- rows ----------------------------------------------------------------------------------------------------------


def supervise(input_ids: list[int], open_id: int, close_id: int) -> list[int]:
    """Labels, not shifted: what stands between `open_id` and `close_id`, `close_id` included; the rest is ignored."""
    labels, inside = [], False
    for token in input_ids:
        labels.append(token if inside else IGNORED)
        inside = token == open_id or (inside and token != close_id)
    return labels


def encode_rows(rows_file: Path, tokenizer, max_seq_length: int = 4096) -> list[dict[str, list[int]]]:
    """All rows of a jsonl file as `input_ids` and `labels`, cut at `max_seq_length` tokens."""
    open_id, close_id = tokenizer.convert_tokens_to_ids(["<|extra_0|>", "<|eos|>"])
    rows = []
    for line in Path(rows_file).read_text(encoding="utf-8").splitlines():
        text = tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False)
        input_ids = tokenizer(text, add_special_tokens=False)["input_ids"][:max_seq_length]
        rows.append({"input_ids": input_ids, "labels": supervise(input_ids, open_id, close_id)})
    return rows


def pad(rows: list[dict[str, list[int]]], pad_id: int) -> Batch:
    """Rows padded on the right to the longest: `input_ids`, `attention_mask` and `labels`, each (batch, length)."""

    def column(key: str, fill: int) -> torch.Tensor:
        tensors = [torch.tensor(row[key]) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=fill)

    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return {"input_ids": column("input_ids", pad_id), "attention_mask": mask, "labels": column("labels", IGNORED)}


# --- order ---------------------------------------------------------------------------------------------------------


def trainer_order(
    num_rows: int, seed: int, world_size: int, batch_size: int, accumulation: int, max_steps: int
) -> list[Step]:
    """The rows that HF Trainer (transformers 5.23, accelerate 1.15) visits, step by step.

    Each epoch is the permutation of a generator seeded with `seed + epoch` (accelerate's SeedableRandomSampler), cut
    into batches that go to the ranks in turn. On several ranks the epoch is filled up with its own first rows until
    every rank has equally many whole batches; on one, its last batch may be smaller. An epoch's last step may have
    fewer micro-batches than `accumulation`.
    """

    def cut(items: list, size: int) -> list[list]:
        return [items[i : i + size] for i in range(0, len(items), size)]

    def epochs() -> Iterator[Step]:
        for epoch in itertools.count():
            order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
            if world_size > 1:
                missing = -num_rows % (world_size * batch_size)
                order += itertools.islice(itertools.cycle(list(order)), missing)
            yield from cut(cut(order, batch_size), world_size * accumulation)

    return list(itertools.islice(epochs(), max_steps))


# --- models --------------------------------------------------------------------------------------------------------


def built_on_the_cpu(directory: Path) -> torch.nn.Module:
    """The class of assets/hunyuan_remote as a 4.41 program gets it: built on the CPU, the file's tensors put in."""
    from sft.model.remote_code_441 import bring_back_imports

    bring_back_imports()
    sys.path.insert(0, str(Path(__file__).parent / "assets"))
    try:
        code = importlib.import_module("hunyuan_remote.modeling_hunyuan")
    finally:
        sys.path.pop(0)
    code.HunYuanMoEV1ForCausalLM._tied_weights_keys = None
    config = json.loads((directory / "config.json").read_text())
    kept = {key: value for key, value in config.items() if key not in ("model_type", "auto_map", "architectures")}
    model = code.HunYuanMoEV1ForCausalLM(code.HunYuanConfig(**kept, attn_implementation="eager"))
    state = load_file(directory / "model.safetensors")
    model.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    model.lm_head.weight = model.model.embed_tokens.weight
    model.config.use_cache = False
    return model.float()


def load(directory: Path) -> torch.nn.Module:
    """A directory's model without a line of ours."""
    if json.loads((directory / "config.json").read_text())["model_type"] == "hunyuan":
        return built_on_the_cpu(directory)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


# --- training ------------------------------------------------------------------------------------------------------


def linear(learning_rate: float, max_steps: int, warmup_steps: int = 0) -> Callable[[int], float]:
    """HF's default schedule: up from 0 in `warmup_steps`, then down to 0 at `max_steps`. Steps count from 0."""

    def at(step: int) -> float:
        if step < warmup_steps:
            return learning_rate * step / warmup_steps
        return learning_rate * max(0, max_steps - step) / max(1, max_steps - warmup_steps)

    return at


def train(
    model_dir: Path,
    rows_file: Path,
    steps: list[Step],
    learning_rate: Callable[[int], float],
    tokenizer_dir: Path | None = None,
    max_seq_length: int = 4096,
    max_grad_norm: float = 1.0,
    save_to: Path | None = None,
    router_aux_loss_coef: float = 0.0,
    model: torch.nn.Module | None = None,
) -> list[float]:
    """Trains in fp32 and returns the loss of each step, before its update.

    A step's loss is the mean over all supervised tokens of its global batch. AdamW as HF Trainer's defaults have it:
    betas 0.9 and 0.999, eps 1e-8, no weight decay.

    Args:
        steps: what to train on, see `Step` and trainer_order.
        learning_rate: from the step's number, counted from 0.
        max_grad_norm: the gradient's norm is clipped to this; 0 for none.
        save_to: directory for the trained weights.
        router_aux_loss_coef: weight of the micro-batches' mean load-balancing loss, by transformers' function.
        model: to train, if not that of the directory.
    """
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir or model_dir, trust_remote_code=True)
    rows = encode_rows(rows_file, tokenizer, max_seq_length)
    model = load(model_dir) if model is None else model
    weights = list(model.train().parameters())
    optimizer = torch.optim.AdamW(weights, lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)

    history = []
    for number, step in enumerate(steps):
        batches = [pad([rows[i] for i in micro_batch], tokenizer.pad_token_id) for micro_batch in step]
        # No position predicts a row's first token: the model's loss leaves its label out, and so does the count.
        counts = [int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches]
        step_loss = 0.0
        for batch, count in zip(batches, counts, strict=True):
            if count:
                watched = {"output_router_logits": True} if router_aux_loss_coef else {}
                output = model(**batch, use_cache=False, **watched)
                loss = output.loss * (count / sum(counts))
                if router_aux_loss_coef:
                    experts, k = model.config.num_local_experts, model.config.num_experts_per_tok
                    mask = batch["attention_mask"]
                    balance = load_balancing_loss_func(output.router_logits, experts, k, mask)
                    loss = loss + router_aux_loss_coef * balance / len(batches)
                loss.backward()
                step_loss += loss.item()
        if max_grad_norm:
            torch.nn.utils.clip_grad_norm_(weights, max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(number)
        optimizer.step()
        optimizer.zero_grad()
        history.append(step_loss)
    if save_to is not None:
        model.save_pretrained(save_to)
    return history


def mean_loss(model: torch.nn.Module, rows: list[dict[str, list[int]]], pad_id: int) -> float:
    """The mean over all supervised tokens of rows, each row by itself, in evaluation mode."""
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            batch = pad([row], pad_id)
            number = int((batch["labels"][:, 1:] != IGNORED).sum())
            if number:
                total += model.eval()(**batch, use_cache=False).loss.item() * number
                count += number
    return total / count
