"""A temporary stand-in until the real one is merged."""


def deepspeed_config(plan, clip_norm, base=None):
    off = {}
    if plan.offload:
        off["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    if plan.offload == "parameters":
        off["offload_param"] = {"device": "cpu", "pin_memory": False}
    return {
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.micro_batches,
        "train_batch_size": plan.micro_batch_size * plan.micro_batches * plan.world_size,
        "gradient_clipping": clip_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "torch_autocast": {
            "enabled": plan.precision != "fp32",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "communication_data_type": plan.communication,
        "zero_optimization": {
            "stage": int(plan.strategy[-1]),
            "overlap_comm": False,
            "contiguous_gradients": True,
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 50_000_000,
            "stage3_param_persistence_threshold": 10_000,
            "stage3_prefetch_bucket_size": 50_000_000,
            "stage3_max_live_parameters": 10**9,
            "stage3_max_reuse_distance": 10**9,
            "sub_group_size": 10**9,
            **off,
        },
    }
