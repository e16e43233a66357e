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


# Keys of zero_optimization that change sizes, times and reports, and those that are compared as stage and offload.
ZERO_MAY_CHANGE = fields.names("""
    stage offload_optimizer offload_param cpu_offload_use_pin_memory
    contiguous_gradients overlap_comm reduce_bucket_size allgather_bucket_size allgather_partitions
    prefetch_bucket_size param_persistence_threshold model_persistence_threshold max_live_parameters
    max_reuse_distance module_granularity_threshold use_all_reduce_for_fetch_params allgather_sequential
    gather_16bit_weights_on_model_save gather_fp16_weights_on_model_save ignore_unused_parameters leaf_module
    pipeline_loading_checkpoint save_muon_momentum_buffer_in_memory log_trace_cache_warnings enable_sanity_checks
""")


def test_each_key_of_zero_decides_or_not():
    """A release of DeepSpeed with a new key or default fails here. A key that is left out is not a difference."""
    config = pytest.importorskip("deepspeed.runtime.zero.config").DeepSpeedZeroConfig
    offload = pytest.importorskip("deepspeed.runtime.zero.offload_config").DeepSpeedZeroOffloadOptimizerConfig
    theirs = {name.removeprefix("stage3_"): field.default for name, field in config.model_fields.items()}
    theirs |= {name: offload.model_fields[name].default for name in ("ratio", "super_offload")}
    assert Counter(theirs.keys()) == Counter([*fields.ZERO_DECIDES, *ZERO_MAY_CHANGE])
    assert {name: theirs[name] for name in fields.ZERO_DECIDES} == fields.ZERO_DECIDES
