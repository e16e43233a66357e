"""Fine-tune a Hunyuan model on a jsonl of conversations.

    bash train.sh                                                         # the embedded example, on any machine
    MODEL_PATH=… TRAIN_DATA_FILE=rows.jsonl bash train.sh                 # all weights, every GPU of this machine
    MODEL_PATH=… TRAIN_DATA_FILE=rows.jsonl bash train.sh --use_lora      # an adapter
    python train.py --model_name_or_path … --train_data_file rows.jsonl --output_dir out       # no launcher
    torchrun --nproc_per_node 8 train.py … --deepspeed ds_zero3_no_offload.json --bf16
    python train.py config.yaml                                           # the flags, in a file

Exit codes: 0 done, 2 refused before training (one message says what and where), 3 stopped itself at a non-finite loss,
anything else: failed.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from sft.messages import Refused, end_by_ctrl_c, note

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # the imports take seconds
    signal.signal(signal.SIGINT, lambda *_: end_by_ctrl_c("before the first step"))

import torch
from transformers import EarlyStoppingCallback, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from sft.arguments import note_without_effect, parse_arguments
from sft.data.batches import Bins, Collator
from sft.data.examples import Options, load_data
from sft.model.load import (
    accepts_loss_kwargs,
    check_directory,
    check_packing,
    check_same_tokenizer,
    fetch,
    load_model,
    load_tokenizer,
    number_of_parameters,
    takes_supervised_head,
)
from sft.model.weight_files import check_base, record_base
from sft.training.environment import let_all_come
from sft.training.probe import Probe
from sft.training.progress import Meter, ProgressLine, StopOnNonFinite
from sft.training.resume import GoOn, finish_from, keep_rows, steps_left, take_up
from sft.training.save import Companions, check_output_dir, lock_output_dir, set_aside
from sft.training.trainer import Trainer, mean_loss


def main(argv: list[str]) -> None:
    """The whole job. Raises Refused for wrong input, SystemExit at a non-finite loss."""
    # 1. Arguments. What can be refused is refused here and in 2, before a model is loaded.
    model_args, data_args, training_args = parse_arguments(argv)
    note_without_effect(model_args, data_args, training_args)
    fetch(model_args)
    resume = take_up(model_args, training_args)
    fetch(model_args)  # the base that a resumed adapter names
    check_directory(model_args, data_args.packing)
    adapter = Path(resume) if resume and model_args.use_lora else None
    adapter_code = check_base(adapter, Path(model_args.model_name_or_path), model_args.any_base) if adapter else "auto"
    if model_args.any_base and not adapter:
        note("--any_base has no effect: no adapter is resumed")
    model_args.model_code = adapter_code if model_args.model_code == "auto" else model_args.model_code
    lock_output_dir(training_args)
    earlier_run = check_output_dir(training_args, model_args.model_name_or_path, model_args.tokenizer_name_or_path)

    # 2. Data: rows → token sequences.
    tokenizer = load_tokenizer(model_args)
    if resume and "tokenizer_name_or_path" in model_args.given:
        check_same_tokenizer(tokenizer, model_args, resume)
    options = Options(data_args.max_seq_length, data_args.train_on, data_args.overlong)
    examples, evaluation = load_data(data_args, tokenizer, options)
    figures = examples.figures() | {"num_examples": len(examples), "num_eval_examples": len(evaluation or ())}
    keep_rows(training_args, examples, figures)
    if data_args.packing == "bin":
        examples = Bins(examples, data_args.max_seq_length, training_args.seed)
        figures |= {"num_bins": len(examples), "bin_fill": examples.fill}
        note(f"{figures['num_examples']} sequences in {len(examples)} bins, which are {examples.fill:.1%} full")
    tokenizer_path = model_args.tokenizer_name_or_path or model_args.model_name_or_path
    companions = Companions.read(model_args.model_name_or_path, tokenizer_path)
    if resume and not steps_left(resume, training_args, len(examples), model_args.given):
        note(f"{resume} is the end of a finished run: no step is left, its final files are written")
        lock_output_dir(training_args, begin=True)  # all ranks have looked at output_dir then
        if training_args.should_save:
            base = model_args.hub_id or os.path.realpath(model_args.model_name_or_path)
            named = None if model_args.any_base else base
            finish_from(Path(resume), training_args, companions, named, figures | dict.fromkeys(Meter.FIGURES))
        return
    probe = Probe(training_args.probe_file, tokenizer) if training_args.probe_file else None

    # 3. Model. Seeded before: what is drawn at random is drawn here.
    set_seed(training_args.seed)
    model = load_model(model_args, training_args, tokenizer, resume)
    check_packing(model, data_args.packing)
    if model_args.use_lora:
        companions.files["base.json"] = record_base(model, model_args, adapter_code)
    lock_output_dir(training_args, begin=True)
    positions = getattr(model.config, "max_position_embeddings", data_args.max_seq_length)
    if data_args.max_seq_length > positions:
        note(f"--max_seq_length {data_args.max_seq_length} is more than the model's {positions} positions")

    # 4. Trainer.
    meter = Meter()
    collator = Collator(
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        packing=data_args.packing,
        supervised_head=takes_supervised_head(model, training_args),
    )
    callbacks = [StopOnNonFinite()] + ([probe] if probe else [])
    if training_args.early_stopping_patience:
        callbacks.append(EarlyStoppingCallback(training_args.early_stopping_patience))
    # a class of a directory's own does not take the number of tokens of the whole step
    own_loss = accepts_loss_kwargs(model) or training_args.label_smoothing_factor
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=examples,
        eval_dataset=evaluation,
        data_collator=collator,
        callbacks=callbacks,
        compute_loss_func=None if own_loss else mean_loss,
        meter=meter,
        companions=companions,
        router_aux_loss_coef=model_args.router_aux_loss_coef,
    )
    for theirs in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(theirs)
    for ours in (ProgressLine(), GoOn(trainer, data_args.train_data_file)):
        trainer.add_callback(ours)

    # 5. Run.
    if earlier_run and training_args.should_save:
        set_aside(Path(training_args.output_dir))
    result = trainer.train(resume_from_checkpoint=resume)

    # 6. Save: the final model at the top of output_dir, the curve and the figures beside it.
    trainer.save_model()
    trainer.save_state()
    figures |= {
        "train_loss": result.metrics["train_loss"],
        "global_step": trainer.state.global_step,
        "global_batch_size": trainer.get_total_train_batch_size(training_args),
        "trainable_params": number_of_parameters(trainer.model, trained=True),
        "total_params": number_of_parameters(trainer.model),
        **meter.results(trainer),
        **(probe.results() if probe else {}),
    }
    if trainer.is_world_process_zero():
        Path(training_args.output_dir, "train_results.json").write_text(json.dumps(figures, indent=2) + "\n")
        if probe:
            probe.print_some()
    note(f"done: {training_args.output_dir}")


def leave(code: int) -> None:
    """End the process; of several ranks past the interpreter's own shutdown.

    There torch 2.13 sometimes aborts after a gloo job is done ("terminate called without an active exception"), which
    would turn any exit code into a failure. Goes with the release that does not.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        if code in (0, 3):  # all ranks come here, and the launcher ends the others with the first that fails
            torch.distributed.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    try:
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # what is under way is tidied up
        main(sys.argv[1:])
    except Refused as refusal:
        first = os.environ.get("RANK", "0") == "0"
        if first:
            print(f"refused: {refusal}", file=sys.stderr, flush=True)
        let_all_come()
        if not first:  # the first has found the same, and its end ends this one; if not, it is said here
            time.sleep(10)
            print(f"refused: {refusal}", file=sys.stderr, flush=True)
        leave(2)
    except SystemExit as stopped:
        leave(stopped.code or 0)
    except KeyboardInterrupt:
        end_by_ctrl_c("before the first step")
    leave(0)
