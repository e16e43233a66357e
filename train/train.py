"""Fine-tune a Hunyuan model on a jsonl of conversations.

    bash train.sh                                                         # the embedded example, on any machine
    MODEL_PATH=… TRAIN_DATA_FILE=rows.jsonl bash train.sh                 # all weights, every GPU of this machine
    MODEL_PATH=… TRAIN_DATA_FILE=rows.jsonl bash train.sh --use_lora      # an adapter
    python train.py --model_name_or_path … --train_data_file rows.jsonl --output_dir out       # no launcher
    torchrun --nproc_per_node 8 train.py … --deepspeed ds_zero3_no_offload.json --bf16
    python train.py config.yaml                                           # the flags, in a file

Exit codes: 0 done, 2 refused before training (one message says what and where), 3 stopped itself at a loss or at
gradients that are not finite, 75 stopped on request (SIGTERM, SIGINT, a file `stop` in the output directory), anything
else: failed.
"""

import sys
from pathlib import Path

from sft import stopping

if __name__ == "__main__":
    stopping.listen()  # the imports take seconds

from transformers import EarlyStoppingCallback, PreTrainedModel, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from sft.arguments import DataArguments, ModelArguments, TrainingArguments
from sft.data.batches import Collator, Data, load_data
from sft.messages import guard, note, run_script
from sft.model.load import load_model
from sft.quiet import leave_out_harmless_messages
from sft.training.attention import keep_rows_apart
from sft.training.disk import check_space, saving
from sft.training.environment import exit_all_ranks, first_rank_refuses
from sft.training.go_on import GoOn
from sft.training.loss import choose_loss
from sft.training.output_dir import begin_output_dir, check_output_dir, lock_output_dir
from sft.training.plan import parse_arguments
from sft.training.probe import Probe
from sft.training.progress import Meter, ProgressLine, write_results
from sft.training.record import record_rows
from sft.training.resume import Start, find_start, steps_left, write_final_files
from sft.training.stop_on_request import StopOnRequest
from sft.training.trainer import Trainer


def main(argv: list[str]) -> None:
    """The whole job. Raises Refused for wrong input, SystemExit where the run stops before its end."""
    leave_out_harmless_messages()
    # 1. Arguments. What can be refused is refused here and in 2, before a model is loaded.
    model_args, data_args, training_args = parse_arguments(argv)
    start = find_start(model_args, data_args, training_args)
    model_path = model_args.adapter or model_args.model_name_or_path
    earlier_run = check_output_dir(training_args, model_path, model_args.tokenizer_name_or_path)
    output_dir = Path(training_args.output_dir)

    # 2. Data: rows → token sequences.
    data = load_data(data_args, start.tokenizer, training_args.seed)
    record_rows(training_args, data_args.train_data_file, data.examples, data.figures)
    if start.checkpoint and not steps_left(start.checkpoint, training_args, len(data.train), model_args.given):
        lock_output_dir(training_args, begin=True)  # all ranks have looked at it then
        with saving(output_dir):
            write_final_files(start, training_args, model_args.any_base, data.figures)
        return
    probe = Probe(training_args.probe_file, start.tokenizer) if training_args.probe_file else None

    # 3. Model. Seeded before: what is drawn at random is drawn here.
    set_seed(training_args.seed)
    model = load_model(model_args, training_args, start.tokenizer, start.directory, start.checkpoint)
    check_space(model, training_args, len(data.train))

    # 4. Trainer.
    trainer = make_trainer(model, model_args, data_args, training_args, start, data, probe)

    # 5. Run.
    begin_output_dir(training_args, earlier_run)
    result = trainer.train(resume_from_checkpoint=start.checkpoint and str(start.checkpoint))

    # 6. Save: the final model at the top of output_dir, the curve and the figures beside it.
    trainer.finish_save()
    with saving(output_dir):
        trainer.save_model()
        trainer.save_state()
        write_results(trainer, result.metrics, probe, data.figures)
    note(f"done: {training_args.output_dir}")


def make_trainer(
    model: PreTrainedModel,
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
    start: Start,
    data: Data,
    probe: Probe | None,
) -> Trainer:
    """The Trainer with its collator and callbacks."""
    positions = getattr(model.config, "max_position_embeddings", data_args.max_seq_length)
    if data_args.max_seq_length > positions:
        note(f"--max_seq_length {data_args.max_seq_length} is more than the model's {positions} positions")
    tokenizer, loss = start.tokenizer, choose_loss(model, training_args)
    collator = Collator(
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        packing=data_args.packing,
        supervised_head=loss.at_supervised,
    )
    if data_args.packing != "none":
        keep_rows_apart(model, training_args, model_args.use_flash_attn)
    callbacks = [probe] if probe else []
    if training_args.early_stopping_patience:
        callbacks.append(EarlyStoppingCallback(training_args.early_stopping_patience))
    training_args.restore_callback_states_from_checkpoint = False  # GoOn does; the Trainer would build callbacks anew
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        data_collator=collator,
        callbacks=callbacks,
        compute_loss_func=loss.function,
        head=loss.head,
        meter=Meter(),
        companions=start.directory,
        router_aux_loss_coef=model_args.router_aux_loss_coef,
    )
    for theirs in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(theirs)
    go_on = GoOn(trainer, start.best)
    for ours in (ProgressLine(trainer.meter), go_on, StopOnRequest(go_on)):
        trainer.add_callback(ours)
    return trainer


if __name__ == "__main__":
    guard(sys.stdout)
    run_script(
        lambda: main(sys.argv[1:]),
        failed=stopping.end_if_asked,
        first_refuses=first_rank_refuses,
        leave=exit_all_ranks,
    )
