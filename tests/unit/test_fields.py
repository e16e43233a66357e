"""What each argument is to a run that goes on: one of three, for Hugging Face's as well."""

from collections import Counter

import pytest

from sft.arguments import settable
from sft.training import fields


def test_each_argument_is_in_exactly_one_list():
    """A release of transformers with a new argument fails here: it must be decided what it is."""
    listed = Counter((*fields.DECIDES, *fields.MAY_CHANGE, *fields.NO_EFFECT_ON_RUN))
    assert [name for name, times in listed.items() if times > 1] == []
    assert {f.name for f in settable()} == listed.keys()


def test_what_is_looked_at_otherwise_decides():
    assert {*fields.FIXED, *fields.FIXED_BY_DEEPSPEED, *fields.BY_CONTENT} <= set(fields.DECIDES)


def test_each_key_of_zero_is_in_exactly_one_list():
    """With DeepSpeed's own defaults: a key that is left out is not a difference."""
    config = pytest.importorskip("deepspeed.runtime.zero.config").DeepSpeedZeroConfig
    offload = pytest.importorskip("deepspeed.runtime.zero.offload_config").DeepSpeedZeroOffloadOptimizerConfig
    theirs = {name.removeprefix("stage3_"): field.default for name, field in config.model_fields.items()}
    theirs |= {name: offload.model_fields[name].default for name in ("ratio", "super_offload")}
    assert theirs.keys() == {*fields.ZERO_DECIDES, *fields.ZERO_MAY_CHANGE}
    assert len(theirs) == len(fields.ZERO_DECIDES) + len(fields.ZERO_MAY_CHANGE)
    assert {name: theirs[name] for name in fields.ZERO_DECIDES} == fields.ZERO_DECIDES
    fixed = {name.partition(".")[2] for name in fields.DEEPSPEED_FIXED if "." in name}
    assert fixed < fields.ZERO_DECIDES.keys()
