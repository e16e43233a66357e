"""What each argument is to a run that goes on: it decides what is computed, it may change, or it has no effect.

Every field of the three dataclasses is in exactly one of the lists (tests/unit/test_fields.py).
"""


def names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Refused on resume if it differs from the run's. With --resume_anyway the first list is refused all the same: what the
# checkpoint holds would not fit, or would be used instead.
FIXED = names("""
    model_code use_cla cla_share_factor hidden_size num_layers num_attention_heads num_key_value_heads
    intermediate_size max_position_embeddings model_max_length vocab_size tie_word_embeddings use_qk_norm num_experts
    moe_topk num_shared_expert use_mixed_mlp_moe moe_intermediate_size moe_layer_num_skipped
    use_lora lora_rank lora_alpha lora_dropout lora_target_modules use_rslora use_dora
    trainable_params train_attention_params_only
    optim optim_args optim_target_modules bf16 fp16 deepspeed fsdp fsdp_config parallelism_config accelerator_config
    auto_find_batch_size
""")
DECIDES = names("""
    train_data_file model_name_or_path tokenizer_name_or_path
    max_seq_length eval_split train_on history overlong bad_rows packing
    use_flash_attn load_in_4bit router_aux_loss_coef
    per_device_train_batch_size gradient_accumulation_steps average_tokens_across_devices
    learning_rate min_lr lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio
    weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm label_smoothing_factor neftune_noise_alpha
    tf32 torch_compile torch_compile_backend torch_compile_mode use_liger_kernel liger_kernel_config use_cache
    full_determinism seed data_seed ignore_data_skip dataloader_drop_last dataloader_in_order
    train_sampling_strategy group_by_length
""")
DECIDES += FIXED
FIXED_BY_DEEPSPEED = ("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")  # the optimiser takes its state's

# Of zero_optimization in a DeepSpeed file what decides, without `stage3_`, beside stage and offload; and the defaults.
# By what is fixed the optimizer's shards are divided, or what they hold would be used.
ZERO_FIXED = {
    "round_robin_gradients": False, "parameter_alignment": False, "sub_group_size": 10**9, "elastic_checkpoint": False,
    "legacy_stage1": False, "zenflow": None, "super_offload": False, "cpu_offload": None, "cpu_offload_param": None,
}  # fmt: skip
ZERO_DECIDES = ZERO_FIXED | {
    "ratio": 1.0, "reduce_scatter": True, "use_multi_rank_bucket_allreduce": True, "compute_grad_norm": True,
    "load_from_fp32_weights": True, "zero_hpz_partition_size": 1, "zero_quantized_weights": False,
    "zero_quantized_nontrainable_weights": False, "zero_quantized_gradients": False, "memory_efficient_linear": True,
    "override_module_apply": True,
}  # fmt: skip
# The rest of that file decides, too, but for what may change.
DEEPSPEED_FIXED = names("optimizer scheduler fp16 bf16 amp data_types tensor_parallel compression_training")
DEEPSPEED_FIXED += tuple(f"zero_optimization.{key}" for key in ZERO_FIXED)
DEEPSPEED_MAY_CHANGE = names("""
    zero_optimization steps_per_print wall_clock_breakdown memory_breakdown dump_state flops_profiler comms_logger aio
    tensorboard wandb csv_monitor comet
""")
DEEPSPEED_DEFAULTS = {"zero_force_ds_cpu_optimizer": True}  # where that is not off
DEEPSPEED_AS_FLAGS = names("""
    gradient_accumulation_steps gradient_clipping train_batch_size train_micro_batch_size_per_gpu
    lr betas eps weight_decay warmup_max_lr warmup_num_steps total_num_steps
""")  # in whatever section: Hugging Face refuses another value than its flag's
BY_CONTENT = ("train_data_file", "model_name_or_path", "tokenizer_name_or_path")  # and not by their paths

# The checkpoint's unless given anew: how long, saving, logging, evaluating, reporting, memory.
MAY_CHANGE = names("""
    max_steps num_train_epochs trust_remote_code make_moe_param_leaf_module use_cpu
    activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
    activation_offload
    torch_empty_cache_steps
    save_strategy save_steps save_total_limit save_only_model save_on_each_node enable_jit_checkpoint
    load_best_model_at_end metric_for_best_model greater_is_better early_stopping_patience
    eval_data_file eval_strategy eval_steps eval_delay eval_on_start eval_do_concat_batches eval_use_gather_object
    eval_accumulation_steps per_device_eval_batch_size prediction_loss_only include_for_metrics batch_eval_metrics
    bf16_full_eval fp16_full_eval probe_file
    logging_strategy logging_steps logging_first_step logging_nan_inf_filter logging_dir log_level log_level_replica
    log_on_each_node include_num_input_tokens_seen disable_tqdm report_to run_name project trackio_space_id
    trackio_bucket_id trackio_static_space_id skip_memory_metrics debug
    push_to_hub hub_model_id hub_strategy hub_always_push hub_private_repo hub_revision
    dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend
    restore_callback_states_from_checkpoint
""")

# Said by each start anew.
NO_EFFECT_ON_RUN = names("""
    remove_unused_columns label_names length_column_name
    output_dir overwrite_output_dir resume_from_checkpoint auto_resume resume_anyway verify_checkpoints any_base
    cache_dir preprocessing_num_workers ddp_timeout local_rank hub_token do_train do_eval do_predict
""")
