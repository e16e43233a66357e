"""What each argument is to a run that goes on: one of three, for Hugging Face's as well."""

from collections import Counter

from sft.arguments import settable
from sft.training import fields


def test_each_argument_is_in_exactly_one_list():
    """A release of transformers with a new argument fails here: it must be decided what it is."""
    listed = Counter((*fields.DECIDES, *fields.MAY_CHANGE, *fields.NO_EFFECT_ON_RUN))
    assert [name for name, times in listed.items() if times > 1] == []
    assert {f.name for f in settable()} == listed.keys()


def test_what_is_looked_at_otherwise_decides():
    assert {*fields.FIXED, *fields.FIXED_BY_DEEPSPEED, *fields.BY_CONTENT} <= set(fields.DECIDES)
