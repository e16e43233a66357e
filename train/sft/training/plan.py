"""The plan of a run: its arguments, from the flags or of the checkpoint that it goes on from.

Refused (exit code 2), where a run goes on: flags that make it another run.
"""

import json
import os
from pathlib import Path
from typing import Any

from sft import checks
from sft.arguments import DataArguments, ModelArguments, TrainingArguments, defaults
from sft.messages import MASK, Refused, choice, note
from sft.parser import IGNORED, NO_EFFECT, parse_flags
from sft.training import environment, fields
from sft.training.choose import choose_checkpoint
from sft.training.deepspeed_file import check_deepspeed, read_deepspeed_file
from sft.training.from_adapter import split_adapter
from sft.training.rates import set_lowest_rate
from sft.training.record import new_record, read_record
from sft.training.reshard import steps_for_ranks
from sft.training.resume import read_trainer_state
from sft.training.try_out import refusing, try_out

# What checkpoints of earlier releases, and of other programs, do not say.
MUST_BE_KNOWN = ("max_seq_length", "packing", "train_on", "overlong")
NOT_KNOWN = ("eval_split", "model_code", "trainable_params", "train_attention_params_only", "router_aux_loss_coef")


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """The arguments of a run, from its command line and, where it goes on, from the checkpoint. The process group has
    started. All ranks must call.

    Refuses what parser.py, checks.py, deepspeed_file.py, try_out.py and choose.py refuse, and flags that differ from
    the checkpoint's run.
    """
    given = parse_flags(argv)
    for name, why in (NO_EFFECT | IGNORED).items():
        if name in given:
            note(f"--{name}: no effect: {why}")
            del given[name]
    if "deepspeed" in given:
        given["deepspeed"] = read_deepspeed_file(given["deepspeed"])
    environment.set_rendezvous_variables(deepspeed=False)
    checkpoint, earlier = choose_checkpoint(given), {}
    given.pop("resume_from_checkpoint", None)
    adapter, own = split_adapter(given)
    values, steps = defaults() | own | given, None
    if checkpoint:
        given["resume_from_checkpoint"], adapter = str(checkpoint), None
        read_trainer_state(checkpoint)
        earlier = read_record(checkpoint)
        with refusing():
            values = go_on_with(earlier, given)
        steps = steps_for_ranks(earlier, values, environment.number_of_processes())
    chosen = values | ({"gradient_accumulation_steps": steps} if steps else {})
    checks.check_values(chosen)
    checks.choose_evaluation(chosen)
    checks.use_todays_names(chosen)
    with refusing():
        set_lowest_rate(chosen)
        environment.prepare(chosen)
        if chosen["deepspeed"]:
            check_deepspeed(chosen["deepspeed"], given, chosen["use_lora"])
            export_keys(chosen["deepspeed"])
        model, data, training = checks.build(chosen)
        environment.use_built_arguments(training)
    try_out(training)
    model.given, model.adapter = frozenset(given), adapter
    training.record = earlier | new_record(values, training)
    if steps:  # the run's stay: it may go on with other numbers again
        training.record["processes"] = earlier["processes"]
    return model, data, training


def export_keys(config: dict[str, Any]) -> None:
    """Move a service's key (comet.api_key) to the environment: DeepSpeed would save it with each checkpoint."""
    for name, section in config.items():
        if isinstance(section, dict) and section.get("api_key"):
            os.environ[f"{name.upper()}_API_KEY"] = str(section.pop("api_key"))


# ------------------------------------------------------------------------------------------------ the same run


def go_on_with(earlier: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Every flag's value of a run that goes on: what is given anew, else the earlier run's, else the default.

    Refuses, in one message with both values, what is given and would make it another run; with --resume_anyway a line
    says what differs, and only what the checkpoint does not fit is refused.
    """
    checkpoint, values = Path(given["resume_from_checkpoint"]), defaults()
    plan = {name: value for name, value in earlier["arguments"].items() if MASK not in str(value)}
    secret = earlier["arguments"].keys() - plan.keys()
    names = dict.fromkeys((*MUST_BE_KNOWN, *NOT_KNOWN, *sorted(secret & values.keys())))
    unknown = [f"--{name}" for name in names if name not in plan and name not in given]
    needed = [flag for flag in unknown if flag[2:] in {*MUST_BE_KNOWN, *secret.intersection(fields.DECIDES)}]
    if needed:
        why = "it had a secret in it" if secret else "an earlier release or another program saved it"
        raise Refused(
            f"--resume_from_checkpoint {checkpoint}: does not record {', '.join(needed)}, because {why}. Give the "
            "values that its run had"
        )
    if unknown:
        note(f"{checkpoint} does not record {', '.join(unknown)}: taken as not given")
    ranks, same = environment.number_of_processes(), "gradient_accumulation_steps"
    if given.get(same, 0) * ranks == plan.get(same, 1) * earlier.get("processes", ranks):  # the same rows a step
        given = {name: value for name, value in given.items() if name != same}
    refuse_another_run(checkpoint, plan, given)
    own = {*fields.NO_EFFECT_ON_RUN, *fields.BY_CONTENT}
    kept = {name: value for name, value in plan.items() if name in values and name not in own}
    for flag, winner in (("num_train_epochs", "max_steps"), ("gradient_checkpointing", "activation_checkpointing")):
        if flag in given:  # the run's would win over it
            kept.pop(winner, None)
    values |= kept | given
    if not values["train_data_file"]:
        values["train_data_file"] = earlier.get("rows", {}).get("files")
        if not values["train_data_file"] or MASK in str(values["train_data_file"]):
            raise Refused(f"--train_data_file is not given, and {checkpoint} does not record its run's rows")
        choice("train_data_file", " ".join(values["train_data_file"]), "the run's rows")
    if values["output_dir"] is None:
        values["output_dir"] = str(Path(os.path.realpath(checkpoint)).parent)
        choice("output_dir", values["output_dir"], "the folder of the checkpoint")
    return values


def refuse_another_run(checkpoint: Path, plan: dict[str, Any], given: dict[str, Any]) -> None:
    """Refuse flags that differ from the earlier run's and decide what is computed."""
    known = dict(plan)
    asked = {name: given[name] for name in given if name in fields.DECIDES and name not in fields.BY_CONTENT}
    fixed = set(fields.FIXED)
    if "deepspeed" in asked:
        now, then = zero_of(asked.pop("deepspeed"), plan), zero_of(known.get("deepspeed"), plan)
        for part in {"deepspeed"} if now["deepspeed"] != then["deepspeed"] else sorted(now.keys() | then.keys()):
            asked[part], known[part] = now.get(part, "off"), then.get(part, "off")
        fixed |= {f"deepspeed {part}" for part in fields.DEEPSPEED_FIXED}
    if known.get("deepspeed"):
        fixed |= {*fields.FIXED_BY_DEEPSPEED}
    flags, differ = defaults(), {}
    for name, value in asked.items():
        if name in known and spelled(value) != spelled(known[name]):
            flag = f"--{name}" if name in flags else name
            differ[name] = f"{flag} {spelled(value)} (the run: {spelled(known[name])})"
    anyway = given.get("resume_anyway")
    refused = [text for name, text in differ.items() if name in fixed or not anyway]
    if refused:
        advice = "Leave a flag out to keep the run's value"
        if not anyway and not fixed & differ.keys():
            advice += ", or go on although it is not exact (--resume_anyway)"
        raise Refused(
            f"--resume_from_checkpoint {checkpoint}: these differ from its run: {'; '.join(refused)}. {advice}. To "
            f"begin a new run from the weights: --model_name_or_path {checkpoint}"
        )
    if differ:
        note(f"--resume_anyway: not exact, these differ from the run: {'; '.join(differ.values())}")


def spelled(value: Any) -> str:
    """A flag's value as text: 0 and 0.0 are one, and the order in a list does not matter."""
    if isinstance(value, list):
        return " ".join(sorted(map(str, value)))
    if isinstance(value, dict):
        return json.dumps(value, sort_keys=True)
    return f"{value:.15g}" if isinstance(value, float) else str(value)


def zero_of(config: dict | None, flags: dict[str, Any]) -> dict[str, Any]:
    """What of a DeepSpeed configuration is a run's: its stage and offload as `deepspeed`, and each other part that can
    change what is computed and is not off. A key that is left out has its default."""
    if config is None:
        return {"deepspeed": "none"}
    zero = {k.removeprefix("stage3_"): v for k, v in config.get("zero_optimization", {}).items() if v != "auto"}
    offload = [zero.get(key) or {} for key in ("offload_optimizer", "offload_param")]
    places = [part.get("device", "none") for part in offload]
    stage = f"ZeRO-{zero.get('stage', 0)}" + f", offload to {' and '.join(places)}" * (set(places) != {"none"})
    zero |= offload[0]
    parts = fields.DEEPSPEED_DEFAULTS | {k: v for k, v in config.items() if k not in fields.DEEPSPEED_MAY_CHANGE}
    for kind in ("bf16", "fp16"):
        on = parts.get(kind) and parts[kind].get("enabled") and (flags.get(kind) or flags.get(f"{kind}_full_eval"))
        parts[kind] = parts[kind] | {"enabled": True} if on else None
    parts |= {f"zero_optimization.{key}": zero.get(key, default) for key, default in fields.ZERO_DECIDES.items()}
    return {"deepspeed": stage} | {f"deepspeed {key}": value for key, value in (essence(parts) or {}).items()}


def essence(part: Any) -> Any:
    """A part of a DeepSpeed configuration, written in one way: without what is off or empty, and with `auto` for what
    has to be as the flags say. None where nothing is left."""
    if not isinstance(part, dict):
        return None if part is False else part
    kept = {
        key: "auto" if key in fields.DEEPSPEED_AS_FLAGS and value is not None else essence(value)
        for key, value in part.items()
    }
    return {key: value for key, value in kept.items() if value is not None} or None
