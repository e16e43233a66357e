"""Messages of libraries that say nothing about the run, and are left out: each with its reason, and what ends it."""

import logging
import re
import warnings

HARMLESS = (
    # DeepSpeed 0.19.8 calls what torch 2.13 has renamed, some hundred times a step; goes with DeepSpeed's next release
    r"`torch\.distributed\.\w+` is deprecated",
    # DeepSpeed, of a machine without a GPU, which `device = cpu` has said
    r"Setting accelerator to CPU",
    # transformers 5.23, of Hunyuan's own keys in rope_scaling, which its class reads
    r"Unrecognized keys in `rope_parameters`",
    # transformers 5.23, of a tied head, which a checkpoint does not hold twice
    r"missing keys in the checkpoint model loaded: \['lm_head\.weight'\]",
    # the Trainer, of a checkpoint's intervals and batch, where plan.py has compared what decides
    r"The following arguments do not match the ones in the `trainer_state\.json`",
    # transformers 5.23, of its own attributes
    r"`(?:rope_scaling|is_gradient_checkpointing)` is deprecated",
    r"The attention mask API under `transformers\.modeling_attn_mask_utils`",
    # torch 2.13, of the Trainer's schedule after a skipped step, and of a resumed one
    r"Detected call of `lr_scheduler\.step\(\)` before `optimizer\.step\(\)`",
)
PATTERN = re.compile("|".join(HARMLESS))


def leave_out_harmless_messages() -> None:
    """Filter what warnings and the libraries' loggers print. transformers' progress bars are off, too: ours is one."""
    import transformers

    show = warnings.showwarning

    def show_others(message, category, filename, lineno, file=None, line=None):
        if not PATTERN.search(str(message)):
            show(message, category, filename, lineno, file, line)

    warnings.showwarning = show_others
    transformers.utils.logging.disable_progress_bar()
    for name in ("transformers", "DeepSpeed", "accelerate"):
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(lambda record: not PATTERN.search(record.getMessage()))
