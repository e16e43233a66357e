"""What is ours in the Trainer: the lowest learning rate, an evaluation's mean, the order of the rows, the loss; and
what each flag of Hugging Face's does in it."""

import pkgutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

import reference
from sft import parser
from sft.data.batches import Collator, GroupedByLength
from sft.data.examples import Options, load_examples
from sft.model.directory import ModelDirectory
from sft.training.loss import mean_loss
from sft.training.plan import parse_arguments
from sft.training.progress import Meter
from sft.training.trainer import Trainer

RATE, LOWEST, WARMUP, STEPS = 1e-3, 1e-4, 4, 20


@pytest.fixture
def make_trainer(model_dir, example_tokenizer_dir, example_rows, tmp_path):
    """`make_trainer(*flags)`: a Trainer of a tiny model, evaluated on 13 of the example's rows."""

    def make(*flags):
        base, rows = model_dir("dense", example_tokenizer_dir), tmp_path / "rows.jsonl"
        lines = example_rows.read_bytes().splitlines(keepends=True)
        rows.write_bytes(b"".join(lines[:13]))
        args = ["--model_name_or_path", base, "--train_data_file", rows, "--output_dir", tmp_path / "out", *flags]
        args += ["--use_cpu", "--report_to", "none", "--disable_tqdm", "true"]
        _, _, training = parse_arguments([str(arg) for arg in args])
        examples = load_examples([str(rows)], AutoTokenizer.from_pretrained(base), Options())
        return Trainer(
            model=AutoModelForCausalLM.from_pretrained(base),
            args=training,
            train_dataset=examples,
            eval_dataset=examples,
            data_collator=Collator(pad_token_id=0),
            meter=Meter(),
            companions=ModelDirectory(base),
        )

    return make


def rates(scheduler):
    """The learning rate of each step."""
    found = []
    for _ in range(STEPS):
        found.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup", "inverse_sqrt", "cosine_with_min_lr"])
def test_no_scheduler_goes_below_the_lowest_rate(kind, make_trainer):
    """Up in the warmup as transformers has it; after it the factor f becomes low + (1 - low) f."""
    flags = ["--learning_rate", RATE, "--min_lr", LOWEST, "--lr_scheduler_type", kind, "--warmup_steps", WARMUP]
    trainer = make_trainer(*flags, "--max_steps", STEPS)
    trainer.create_optimizer()
    ours = rates(trainer.create_scheduler(STEPS))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=RATE)
    own = {"scheduler_specific_kwargs": {"min_lr": LOWEST}} if kind == "cosine_with_min_lr" else {}
    theirs = rates(get_scheduler(kind, optimizer, WARMUP, STEPS, **own))
    assert ours[:WARMUP] == pytest.approx(theirs[:WARMUP]) and ours[0] < LOWEST
    assert min(ours[WARMUP:]) >= LOWEST and max(ours) == pytest.approx(RATE)
    expected = theirs if own else [LOWEST + (1 - LOWEST / RATE) * rate for rate in theirs]
    assert ours[WARMUP:] == pytest.approx(expected[WARMUP:])


@pytest.mark.parametrize("kind", ["reduce_lr_on_plateau", "greedy"])
def test_a_schedule_that_follows_the_loss_stays_between(kind, make_trainer, example_rows):
    """T5: however long the loss falls, and then rises."""
    flags = ["--lr_scheduler_type", kind, "--lr_scheduler_kwargs", '{"patience":0,"factor":0.5}', "--min_lr", LOWEST]
    trainer = make_trainer(*flags, "--learning_rate", RATE, "--eval_data_file", example_rows, "--max_steps", STEPS)
    trainer.create_optimizer()
    scheduler, seen = trainer.create_scheduler(STEPS), []
    for metric in (*range(STEPS, 0, -1), *range(STEPS)):
        scheduler.step(metric)
        seen.append(trainer.optimizer.param_groups[0]["lr"])
    assert max(seen) == RATE and seen[-1] == min(seen) == LOWEST


def test_without_a_lowest_rate_it_is_transformers_own(make_trainer):
    trainer = make_trainer("--learning_rate", RATE, "--lr_scheduler_type", "linear", "--max_steps", STEPS)
    trainer.create_optimizer()
    assert rates(trainer.create_scheduler(STEPS)) == pytest.approx([RATE * (1 - k / STEPS) for k in range(STEPS)])


def test_an_evaluation_is_the_mean_of_its_supervised_tokens(make_trainer):
    """Of 13 rows in batches of 4: neither the mean of the batches' means nor of the rows'."""
    trainer = make_trainer("--per_device_eval_batch_size", 4)
    rows = [trainer.train_dataset[i] for i in range(13)]
    rows = [{key: row[key].tolist() for key in ("input_ids", "labels")} for row in rows]
    counts = {sum(label != reference.IGNORED for label in row["labels"]) for row in rows}
    assert len(counts) > 3, "rows that are equally long would prove nothing"
    expected = reference.mean_loss(trainer.model, rows, 0)
    by_row = sum(reference.mean_loss(trainer.model, [row], 0) for row in rows) / len(rows)
    found = trainer.evaluate()["eval_loss"]
    assert found == pytest.approx(expected, abs=1e-6) and abs(found - by_row) > 1e-5


def test_rows_of_similar_length_are_found_for_a_whole_step(make_trainer):
    flags = ["--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 3]
    sampler = make_trainer(*flags, "--group_by_length")._get_train_sampler()
    assert isinstance(sampler, GroupedByLength) and sampler.batch_size == 6 and sorted(sampler) == list(range(13))
    assert not isinstance(make_trainer(*flags)._get_train_sampler(), GroupedByLength)


def test_mean_loss_is_over_the_step_or_the_batch():
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[-100, 1, 2, 3, -100], [-100, -100, -100, 4, 5]])
    each = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    outputs = type("Outputs", (), {"logits": logits})
    assert mean_loss(outputs, labels).item() == pytest.approx(each.sum().item() / 5)
    assert mean_loss(outputs, labels, 20).item() == pytest.approx(each.sum().item() / 20)


# ------------------------------------------------------------------------------------- each flag, by what shows it


def logged(trainer, key="loss"):
    """The steps whose log has a key."""
    return [entry["step"] for entry in trainer.state.log_history if key in entry]


def saved(trainer, pattern="checkpoint-*"):
    return sorted(path.name for path in Path(trainer.args.output_dir).glob(pattern))


def called(name, value=lambda call: call.args):
    """Shows what a function is called with while a run trains."""

    def show(trainer):
        with mock.patch(name, wraps=pkgutil.resolve_name(name)) as function:
            trainer.train()
        return value(function.call_args)

    return show


def rows_in_order(trainer):
    return [int(i) for i in trainer._get_train_sampler()]


def loss(trainer):
    """Of the first step."""
    return round(trainer.state.log_history[0]["loss"], 4)


def optimizer(trainer):
    return trainer.create_optimizer().defaults


def loader(trainer):
    return trainer.get_train_dataloader()


def batches_that_fit(trainer):
    """What --auto_find_batch_size comes to where more than 2 rows are too many."""
    step, sizes = trainer.training_step, []

    def training_step(model, inputs, *args):
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 2:
            raise RuntimeError("CUDA out of memory.")
        return step(model, inputs, *args)

    trainer.training_step = training_step
    trainer.train()
    return sizes


EVALUATE = "--eval_data_file rows --eval_strategy steps --eval_steps 1 --save_strategy no --max_steps 3 "
WORKERS = "--dataloader_num_workers 2 --dataloader_"
# Flags (13 rows, 4 a batch, 4 batches an epoch); whether it trains; what is shown; the value.
TABLE = [
    ("--learning_rate 1e-2", False, lambda t: optimizer(t)["lr"], 1e-2),
    ("--optim sgd --optim_args momentum=0.5", False, lambda t: optimizer(t)["momentum"], 0.5),
    ("--adam_beta1 0.8 --adam_beta2 0.95", False, lambda t: optimizer(t)["betas"], (0.8, 0.95)),
    ("--adam_epsilon 1e-6", False, lambda t: optimizer(t)["eps"], 1e-6),
    ("--weight_decay 0.3", False, lambda t: [g["weight_decay"] for g in t.create_optimizer().param_groups], [0.3, 0]),
    ("--train_sampling_strategy sequential", False, rows_in_order, [*range(13)]),
    ("--train_sampling_strategy batch_rebalance", False, lambda t: type(t._get_train_sampler()).__name__[:5], "Batch"),
    ("--dataloader_drop_last", False, lambda t: len(loader(t)), 3),
    ("--per_device_train_batch_size 2", False, lambda t: len(loader(t)), 7),
    (
        '--accelerator_config {"dispatch_batches":true}',
        False,
        lambda t: type(loader(t)).__name__,
        "DataLoaderDispatcher",
    ),
    ("--dataloader_num_workers 2", False, lambda t: loader(t).num_workers, 2),
    (WORKERS + "prefetch_factor 3", False, lambda t: loader(t).prefetch_factor, 3),
    (WORKERS + "persistent_workers", False, lambda t: loader(t).persistent_workers, True),
    (WORKERS + "multiprocessing_context spawn", False, lambda t: loader(t).multiprocessing_context._name, "spawn"),
    (WORKERS + "in_order false", False, lambda t: loader(t).in_order, False),
    ("--use_cache", False, lambda t: t.model.config.use_cache, True),
    ("--label_smoothing_factor 0.1", False, lambda t: t.label_smoother.epsilon, 0.1),
    ("--torch_compile_backend eager", False, lambda t: t.accelerator.state.dynamo_plugin.backend.value, "EAGER"),
    ("--ddp_bucket_cap_mb 7", False, lambda t: t.accelerator.ddp_handler.bucket_cap_mb, 7),
    ("--ddp_broadcast_buffers false", False, lambda t: t.accelerator.ddp_handler.broadcast_buffers, False),
    ("--ddp_static_graph true", False, lambda t: t.accelerator.ddp_handler.static_graph, True),
    ("--ddp_find_unused_parameters true", False, lambda t: t.accelerator.ddp_handler.find_unused_parameters, True),
    ("--max_steps 2", True, lambda t: t.state.global_step, 2),
    ("--num_train_epochs 2", True, lambda t: t.state.global_step, 8),
    ("--gradient_accumulation_steps 2", True, lambda t: t.state.global_step, 2),
    ("--max_steps 1 --gradient_checkpointing", True, lambda t: t.model.is_gradient_checkpointing, True),
    ("--logging_steps 2", True, logged, [2, 4]),
    ("--logging_steps 3 --logging_first_step", True, logged, [1, 3]),
    ("--logging_strategy epoch", True, logged, [4]),
    ("--save_steps 2", True, saved, ["checkpoint-2", "checkpoint-4"]),
    ("--save_steps 2 --save_total_limit 1", True, saved, ["checkpoint-4"]),
    ("--save_strategy epoch", True, saved, ["checkpoint-4"]),
    ("--save_strategy no", True, saved, []),
    ("--save_steps 2 --save_only_model", True, lambda t: saved(t, "checkpoint-2/optimizer.pt"), []),
    (EVALUATE, True, lambda t: logged(t, "eval_loss"), [1, 2, 3]),
    (EVALUATE + "--eval_delay 3", True, lambda t: logged(t, "eval_loss"), [3]),
    (EVALUATE + "--eval_on_start", True, lambda t: logged(t, "eval_loss"), [0, 1, 2, 3]),
    ("--include_num_input_tokens_seen", True, lambda t: t.state.log_history[0]["num_input_tokens_seen"] > 0, True),
    ("--skip_memory_metrics false", True, lambda t: "train_mem_cpu_alloc_delta" in t.state.log_history[-1], True),
    (
        "--max_steps 1 --debug underflow_overflow",
        False,
        called("transformers.trainer.DebugUnderflowOverflow", bool),
        True,
    ),
    ("--max_steps 1 --max_grad_norm 0.1", False, called("torch.nn.utils.clip_grad_norm_", lambda c: c.args[1]), 0.1),
]
# Those that change the first step's loss or the order, by another value of theirs than the default run's.
CHANGE = [
    ("--seed 7", rows_in_order),
    ("--data_seed 7", lambda t: [batch["labels"].tolist() for batch in loader(t)]),
    ("--neftune_noise_alpha 500", lambda t: (t.train(), loss(t))[1]),
]


@pytest.mark.parametrize(("flags", "trains", "show", "value"), TABLE, ids=[flags for flags, *_ in TABLE])
def test_what_a_flag_of_hugging_faces_does(flags, trains, show, value, make_trainer):
    basis = ["--per_device_train_batch_size", 4, "--num_train_epochs", 1, "--logging_steps", 1]
    trainer = make_trainer(*basis, *flags.split())
    if trains:
        trainer.train()
    assert show(trainer) == value


@pytest.mark.parametrize(("flags", "show"), CHANGE, ids=[flags for flags, _ in CHANGE])
def test_a_flag_that_changes_what_is_drawn(flags, show, make_trainer):
    basis = ["--max_steps", 1, "--logging_steps", 1]
    assert show(make_trainer(*basis, *flags.split())) != show(make_trainer(*basis))


@pytest.mark.parametrize("flag", sorted(parser.IGNORED))
def test_a_flag_without_effect_is_said(flag, capsys):
    value = "true" if flag.startswith(("remove", "batch", "pred", "do_", "eval_do", "eval_use", "rest")) else "3"
    parse_arguments(["--output_dir", "out", "--use_cpu", f"--{flag}", value])
    assert f"--{flag}: no effect: " in capsys.readouterr().out
