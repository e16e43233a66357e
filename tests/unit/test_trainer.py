"""What is ours in the Trainer: the lowest learning rate, an evaluation's mean, the order of the rows, the loss."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

import reference
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
