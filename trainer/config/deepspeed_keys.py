"""DeepSpeed's own config keys: what it accepts, and which of them would have no effect here.

DeepSpeed ignores misspelt keys almost everywhere. So the names are listed here, and a test compares them
with the installed DeepSpeed. They are not imported from it, because `plan` and config errors must come before
torch and DeepSpeed are loaded.
"""

from __future__ import annotations

# Keys that DeepSpeed reads and this trainer refuses, with the reason or the remedy. A setting without effect is an
# error, because a user would believe that it works.
_OWN_LOOP = "DeepSpeed uses it in its own forward and backward, which the exact path does not use"
REFUSED: dict[str, str] = {
    "fp16": "half-precision weights and loss scaling are not supported; use torch_autocast with dtype bfloat16",
    "bf16": "bfloat16 weights are not supported; use torch_autocast with dtype bfloat16 (weights stay float32)",
    "bfloat16": "bfloat16 weights are not supported; use torch_autocast with dtype bfloat16",
    "amp": "DeepSpeed has removed it; use torch_autocast",
    "data_types": "gradients are always accumulated in float32",
    "managed_gradient_accumulation": "the trainer sets it",
    "disable_allgather": _OWN_LOOP,
    "sparse_gradients": "DeepSpeed has removed it",
    "sparse_attention": "DeepSpeed has removed it",
    "wall_clock_breakdown": "the trainer logs throughput/{data,compute,reduce,optimizer,eval}_ms to TensorBoard itself",
    "flops_profiler": _OWN_LOOP,
    "autotuning": "the bits depend on the micro-batch, so you have to choose it",
    "activation_checkpointing": _OWN_LOOP,
    "pipeline": "only data parallelism is supported",
    "tensor_parallel": "only data parallelism is supported",
    "expert_parallel": "only data parallelism is supported",
    "sequence_parallel_size": "only data parallelism is supported",
    "seq_parallel_communication_data_type": "only data parallelism is supported",
    "data_parallel_size": "it is the number of ranks that the launcher starts",
    "use_data_before_expert_parallelism": "only data parallelism is supported",
    "hybrid_engine": "it is for reinforcement learning from human feedback",
    "data_efficiency": "the sample order is a function of trainer.seed and the epoch",
    "curriculum_learning": "the sample order is a function of trainer.seed and the epoch",
    "progressive_layer_drop": _OWN_LOOP,
    "eigenvalue": "DeepSpeed has removed it",
    "quantize_training": "DeepSpeed has removed it",
    "compression_training": "DeepSpeed has removed it",
    "weight_quantization": _OWN_LOOP,
    "elasticity": "every world size up to the number of micro-batches works, and gives the same model",
    "checkpoint": "the trainer writes its own output folder",
    "nebula": "the trainer writes its own output folder",
    "datastates_ckpt": "the trainer writes its own output folder",
    "aio": "nothing is offloaded to disk",
    "comms_logger": "the trainer logs throughput/reduce_ms to TensorBoard itself",
    "compile": "DeepSpeed's compile passes are not supported",
    "timers": "the trainer logs throughput/* to TensorBoard itself",
    "dataloader_drop_last": "use trainer.drop_last",
    "max_grad_norm": "use gradient_clipping",
    "vocabulary_size": "it only warns in DeepSpeed",
    "graph_harvesting": "DeepSpeed has removed it",
    "log_level": "DeepSpeed's messages go to <output_dir>/logs/deepspeed.log",
}

# Names inside "zero_optimization" (DeepSpeed 0.19.8), each with the JSON types it takes.
Types = tuple[type, ...]
_INT: Types = (int,)
_BOOL: Types = (bool,)
_DICT: Types = (dict,)
ZERO: dict[str, Types] = {
    "stage": _INT,
    "contiguous_gradients": _BOOL,
    "reduce_scatter": _BOOL,
    "reduce_bucket_size": (int, float),
    "use_multi_rank_bucket_allreduce": _BOOL,
    "allgather_partitions": _BOOL,
    "allgather_bucket_size": (int, float),
    "overlap_comm": _BOOL,
    "compute_grad_norm": _BOOL,
    "load_from_fp32_weights": _BOOL,
    "elastic_checkpoint": _BOOL,
    "offload_param": _DICT,
    "offload_optimizer": _DICT,
    "zenflow": _DICT,
    "sub_group_size": (int, float),
    "cpu_offload_param": _BOOL,
    "cpu_offload_use_pin_memory": _BOOL,
    "cpu_offload": _BOOL,
    "stage3_prefetch_bucket_size": (int, float),
    "stage3_param_persistence_threshold": (int, float),
    "stage3_model_persistence_threshold": (int, float),
    "stage3_max_live_parameters": (int, float),
    "stage3_max_reuse_distance": (int, float),
    "stage3_gather_16bit_weights_on_model_save": _BOOL,
    "stage3_module_granularity_threshold": (int, float),
    "stage3_use_all_reduce_for_fetch_params": _BOOL,
    "stage3_allgather_sequential": _BOOL,
    "stage3_gather_fp16_weights_on_model_save": _BOOL,
    "ignore_unused_parameters": _BOOL,
    "legacy_stage1": _BOOL,
    "round_robin_gradients": _BOOL,
    "parameter_alignment": _BOOL,
    "zero_hpz_partition_size": _INT,
    "zero_quantized_weights": _BOOL,
    "zero_quantized_nontrainable_weights": _BOOL,
    "zero_quantized_gradients": _BOOL,
    "memory_efficient_linear": _BOOL,
    "pipeline_loading_checkpoint": _BOOL,
    "override_module_apply": _BOOL,
    "log_trace_cache_warnings": _BOOL,
    "enable_sanity_checks": _BOOL,
    "save_muon_momentum_buffer_in_memory": _BOOL,
    "leaf_module": _DICT,
}

# Keys that only DeepSpeed's own reduction reads. It runs only at ZeRO stages 1 to 3.
ONLY_WITH_ZERO = (
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "gradient_allreduce_op",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
)

# Optimizers that DeepSpeed builds itself: parameter names and their JSON types. All other names, except those in
# LAYERWISE, are torch.optim's. Their arguments are checked later, when torch is loaded (optimizers.check_optimizer).
_NUMBER: Types = (int, float)
_PAIR: Types = (list,)
_ADAM: dict[str, Types] = {
    "lr": _NUMBER,
    "betas": _PAIR,
    "eps": _NUMBER,
    "weight_decay": _NUMBER,
    "amsgrad": _BOOL,
    "adam_w_mode": _BOOL,
    "torch_adam": _BOOL,
}
ADAM_TORCH_ONLY: dict[str, Types] = {
    "fused": _BOOL,
    "foreach": _BOOL,
    "maximize": _BOOL,
    "capturable": _BOOL,
    "differentiable": _BOOL,
}
ADAM_DEEPSPEED_ONLY: dict[str, Types] = {
    "bias_correction": _BOOL,
    "fp32_optimizer_states": _BOOL,
    "set_grad_none": _BOOL,
}
OPTIMIZERS: dict[str, dict[str, Types]] = {
    "adam": {**_ADAM, **ADAM_TORCH_ONLY, **ADAM_DEEPSPEED_ONLY},
    "adamw": {**_ADAM, **ADAM_TORCH_ONLY, **ADAM_DEEPSPEED_ONLY},
    "lion": {"lr": _NUMBER, "betas": _PAIR, "weight_decay": _NUMBER, "set_grad_none": _BOOL},
}
# These come from the package pytorch-optimizer (optimizers.py), because DeepSpeed's own FusedLamb runs only with fp16
# and dynamic loss scaling, and DeepSpeed has no LARS.
LAYERWISE = ("lars", "lamb")
REFUSED_OPTIMIZERS: dict[str, str] = {
    "muon": "under this name DeepSpeed builds its own, which needs parameters that carry its tags",
    "lbfgs": "it computes the loss several times in a step, but a step here computes each micro-batch once",
    "sparseadam": "it takes only sparse gradients, but gradients here are dense",
    "muadam": "it needs the mup package",
    "muadamw": "it needs the mup package",
    "musgd": "it needs the mup package",
    "onebitadam": "DeepSpeed has removed it",
    "onebitlamb": "DeepSpeed has removed it",
    "zerooneadam": "DeepSpeed has removed it",
}

# DeepSpeed's schedulers: parameter names and their JSON types.
_STEPS: Types = (int,)
_RATE: Types = (int, float, list)
_ONE_CYCLE: dict[str, Types] = {
    "cycle_min_lr": _RATE,
    "cycle_max_lr": _RATE,
    "decay_lr_rate": _NUMBER,
    "cycle_first_step_size": _STEPS,
    "cycle_second_step_size": _STEPS,
    "cycle_first_stair_count": _STEPS,
    "cycle_second_stair_count": _STEPS,
    "decay_step_size": _STEPS,
    "cycle_momentum": _BOOL,
    "cycle_min_mom": _NUMBER,
    "cycle_max_mom": _NUMBER,
    "decay_mom_rate": _NUMBER,
}
_WARMUP: dict[str, Types] = {
    "warmup_min_lr": _RATE,
    "warmup_max_lr": _RATE,
    "warmup_num_steps": _STEPS,
    "warmup_type": (str,),
}
SCHEDULERS: dict[str, dict[str, Types]] = {
    "LRRangeTest": {
        "lr_range_test_min_lr": _RATE,
        "lr_range_test_step_size": _STEPS,
        "lr_range_test_step_rate": _NUMBER,
        "lr_range_test_staircase": _BOOL,
    },
    "OneCycle": _ONE_CYCLE,
    "WarmupLR": _WARMUP,
    "WarmupDecayLR": {**_WARMUP, "total_num_steps": _STEPS},
    "WarmupCosineLR": {
        "total_num_steps": _STEPS,
        "warmup_min_ratio": _NUMBER,
        "warmup_num_steps": _STEPS,
        "cos_min_ratio": _NUMBER,
        "warmup_type": (str,),
    },
}
SCHEDULER_REQUIRED: dict[str, tuple[str, ...]] = {
    "OneCycle": ("cycle_min_lr", "cycle_max_lr"),
    "WarmupDecayLR": ("total_num_steps",),
    "WarmupCosineLR": ("total_num_steps",),
}
