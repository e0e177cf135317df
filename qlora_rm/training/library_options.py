"""Rules for every option of TRL's `RewardConfig` and transformers' `TrainingArguments` in this project.

A rule names the code that obeys an option: this project's, or code of TRL or transformers that nothing here overrides.
For an option that would do nothing or something else, it names a replacement. For a meaningless one, it gives the
reason. If a new version of a library adds an option, the tests fail until the option has a rule.
"""

from qlora_rm.training.option_conditions import (
    best_needs_a_metric,
    best_needs_evaluations,
    checkpoints_activations,
    chooses_best,
    evaluates,
    fp16_needs_a_gpu,
    has_workers,
    known_loggers,
    known_metric,
    no_rebalancing,
    no_tpu,
    on_gpu,
    one_set_of_kwargs,
    only_harmless_keys,
    pushes,
    reports_to,
    several_ranks,
    timeout_is_handed_on,
    to_trackio,
    under_ddp,
    warm_up_is_obeyed,
    word_of,
)
from qlora_rm.training.option_rules import Rule, meaningless, obeyed, obeyed_if, obeyed_unless, refused

HUB = "it needs --push_to_hub true"
TRACKIO = "Add --report_to trackio, or leave it out."
WORKERS = "Give --dataloader_num_workers above 0, or leave it out."
EVALUATION_IS_OWN = "evaluation here sums over comparisons, exactly for any batch size and number of ranks"

LIBRARY: dict[str, Rule] = {
    # length of training, learning rate, optimizer
    "output_dir": obeyed("training/run.py"),
    "per_device_train_batch_size": obeyed("training/sampling.py"),
    "gradient_accumulation_steps": obeyed("training/sampling.py"),
    "num_train_epochs": obeyed_unless(
        lambda o: int(o["max_steps"]) > 0, "--max_steps decides", "transformers: Trainer.set_initial_training_values"
    ),
    "max_steps": obeyed("transformers: Trainer.set_initial_training_values"),
    "learning_rate": obeyed("transformers: Trainer.create_optimizer"),
    "lr_scheduler_type": obeyed("transformers: Trainer.create_scheduler"),
    "lr_scheduler_kwargs": obeyed_if(
        lambda o: not word_of(o, "lr_scheduler_type").startswith("constant"),
        "A constant schedule takes no arguments: choose another --lr_scheduler_type, or leave it out.",
        "transformers: Trainer.create_scheduler",
    ),
    "warmup_steps": obeyed_unless(
        lambda o: not warm_up_is_obeyed(o),
        "this --lr_scheduler_type has no warm-up; constant_with_warmup has",
        "transformers: Trainer.create_scheduler",
    ),
    "optim": obeyed("transformers: Trainer.create_optimizer; training/optimizer_options.py checks it"),
    "optim_args": obeyed("transformers: Trainer.create_optimizer; training/optimizer_options.py checks it"),
    "optim_target_modules": obeyed_if(
        lambda o: word_of(o, "optim").startswith(("galore", "apollo")),
        "Only the galore and apollo optimizers read it; --lora_target_modules names the layers to adapt.",
        "transformers: Trainer.create_optimizer",
    ),
    "weight_decay": obeyed("transformers: Trainer.create_optimizer"),
    "adam_beta1": obeyed("transformers: Trainer.create_optimizer; training/optimizer_options.py checks it"),
    "adam_beta2": obeyed("transformers: Trainer.create_optimizer; training/optimizer_options.py checks it"),
    "adam_epsilon": obeyed("transformers: Trainer.create_optimizer; training/optimizer_options.py checks it"),
    "max_grad_norm": obeyed("transformers: Trainer._clip_grad_norm; training/engine.py checks DeepSpeed's"),
    "average_tokens_across_devices": meaningless("the loss is the mean over the comparisons of all ranks"),
    "label_smoothing_factor": refused(
        "smooths class labels, which comparisons do not have",
        "Use --label_smoothing, the probability that a preference is wrong.",
    ),
    # arithmetic and memory
    "bf16": obeyed("training/arguments.py"),
    "fp16": obeyed("training/arguments.py", check=fp16_needs_a_gpu),
    "bf16_full_eval": refused(
        "would cast the trained weights, and save them so", "Leave it out: evaluation computes as training does."
    ),
    "fp16_full_eval": refused(
        "would cast the trained weights, and save them so", "Leave it out: evaluation computes as training does."
    ),
    "tf32": obeyed("transformers: TrainingArguments.__post_init__"),
    "activation_checkpointing": obeyed("transformers: Trainer.train"),
    "activation_checkpointing_kwargs": obeyed_if(
        checkpoints_activations,
        "Add --activation_checkpointing true.",
        "transformers: Trainer.train",
        check=one_set_of_kwargs,
    ),
    "gradient_checkpointing": obeyed_unless(
        lambda o: o["activation_checkpointing"] is not None,
        "--activation_checkpointing, its new name, decides",
        "training/arguments.py",
    ),
    "gradient_checkpointing_kwargs": obeyed_if(
        checkpoints_activations, "Add --activation_checkpointing true.", "transformers: Trainer.train"
    ),
    "activation_offloading": obeyed_if(
        on_gpu,
        "Activations of a run on a CPU are in the host's memory already. Leave it out.",
        "TRL: RewardTrainer.training_step",
    ),
    "torch_compile": refused(
        "is not supported: batches change their shape at every step, and 4-bit layers are not compiled", "Leave it out."
    ),
    "torch_compile_backend": refused("turns on torch_compile, which is not supported", "Leave it out."),
    "torch_compile_mode": refused("turns on torch_compile, which is not supported", "Leave it out."),
    "use_liger_kernel": refused(
        "is not supported: it replaces layers after their scores have been checked", "Leave it out."
    ),
    "liger_kernel_config": refused("belongs to use_liger_kernel, which is not supported", "Leave it out."),
    "use_cache": refused("would keep keys and values that no later pass reads", "Leave it out."),
    "neftune_noise_alpha": obeyed_if(
        lambda o: str(o["share_prefix"]).lower() == "false",
        "Its noise depends on the length of a sequence, and a forest joins several: add --share_prefix false.",
        "transformers: Trainer.train",
    ),
    "torch_empty_cache_steps": obeyed("transformers: Trainer.training_step"),
    "auto_find_batch_size": refused(
        "would halve the batch in the middle of a run, and with it the size of an optimizer step",
        "`qlora-rm plan` names a --per_device_train_batch_size that fits.",
    ),
    # logging
    "logging_strategy": obeyed("transformers: DefaultFlowCallback"),
    "logging_steps": obeyed_unless(
        lambda o: word_of(o, "logging_strategy") != "steps",
        "--logging_strategy decides",
        "transformers: DefaultFlowCallback",
    ),
    "logging_first_step": obeyed("transformers: DefaultFlowCallback"),
    "log_on_each_node": obeyed("transformers: TrainingArguments.should_log"),
    "logging_nan_inf_filter": meaningless("a run stops at the first loss that is not finite"),
    "include_num_input_tokens_seen": obeyed("transformers: Trainer._track_num_input_tokens"),
    "log_level": obeyed("transformers: TrainingArguments.get_process_log_level"),
    "log_level_replica": obeyed("transformers: TrainingArguments.get_process_log_level"),
    "disable_tqdm": obeyed("transformers: Trainer.__init__"),
    "report_to": obeyed("transformers: get_reporting_integration_callbacks", check=known_loggers),
    "run_name": obeyed_unless(
        lambda o: not reports_to(o),
        "it names the run for --report_to, which names no logger",
        "transformers: its callbacks",
    ),
    "project": obeyed_if(to_trackio, TRACKIO, "transformers: TrackioCallback"),
    "trackio_space_id": obeyed_if(to_trackio, TRACKIO, "transformers: TrackioCallback"),
    "trackio_bucket_id": obeyed_if(to_trackio, TRACKIO, "transformers: TrackioCallback"),
    "trackio_static_space_id": obeyed_if(to_trackio, TRACKIO, "transformers: TrackioCallback"),
    "debug": obeyed("transformers: Trainer.train", check=no_tpu),
    "skip_memory_metrics": obeyed("transformers: TrainerMemoryTracker"),
    # evaluation
    "eval_strategy": obeyed("transformers: DefaultFlowCallback"),
    "eval_steps": obeyed_unless(
        lambda o: word_of(o, "eval_strategy") != "steps", "--eval_strategy decides", "transformers: DefaultFlowCallback"
    ),
    "eval_delay": obeyed_unless(
        lambda o: not evaluates(o), "--eval_strategy no decides", "transformers: DefaultFlowCallback"
    ),
    "eval_on_start": obeyed("transformers: Trainer._inner_training_loop"),
    "per_device_eval_batch_size": obeyed("transformers: Trainer.get_eval_dataloader"),
    "eval_accumulation_steps": obeyed("transformers: Trainer.evaluation_loop"),
    "prediction_loss_only": meaningless(EVALUATION_IS_OWN),
    "eval_do_concat_batches": refused("is not supported: " + EVALUATION_IS_OWN, "Leave it out."),
    "eval_use_gather_object": refused("is not supported: " + EVALUATION_IS_OWN, "Leave it out."),
    "include_for_metrics": refused("names nothing that the metrics read", "Leave it out."),
    "batch_eval_metrics": refused(
        "is not supported: " + EVALUATION_IS_OWN, "Leave it out; seven numbers a comparison are kept."
    ),
    # checkpoints
    "save_strategy": obeyed("transformers: DefaultFlowCallback", check=best_needs_a_metric),
    "save_steps": obeyed_unless(
        lambda o: word_of(o, "save_strategy") != "steps", "--save_strategy decides", "transformers: DefaultFlowCallback"
    ),
    "save_only_model": obeyed("transformers: Trainer._save_checkpoint; training/resume_terms.py refuses to resume it"),
    "save_on_each_node": obeyed("transformers: TrainingArguments.should_save; training/preflight.py"),
    "save_total_limit": obeyed("training/checkpoints.py"),
    "enable_jit_checkpoint": refused(
        "would save at SIGTERM a second time, in its own way", "Leave it out: SIGTERM saves a checkpoint anyway."
    ),
    "load_best_model_at_end": obeyed("transformers: Trainer._finalize_training", check=best_needs_evaluations),
    "metric_for_best_model": obeyed_if(
        evaluates,
        "--eval_strategy no measures nothing: give steps or epoch, or leave it out.",
        "transformers: Trainer._determine_best_metric",
        check=known_metric,
    ),
    "greater_is_better": obeyed_if(
        chooses_best,
        "Nothing is compared: add --metric_for_best_model, or leave it out.",
        "transformers: Trainer._determine_best_metric",
    ),
    "resume_from_checkpoint": obeyed("training/checkpoints.py"),
    "ignore_data_skip": refused(
        "would train on some comparisons twice and on others never",
        "Leave it out: --resume goes on where the run stopped.",
    ),
    "restore_callback_states_from_checkpoint": refused(
        "would take up decisions of the step that was saved, which --resume makes anew", "Leave it out."
    ),
    # pushing to the hub
    "push_to_hub": obeyed("training/hub.py"),
    "hub_token": obeyed_unless(lambda o: not pushes(o), HUB, "training/hub.py"),
    "hub_private_repo": obeyed_unless(lambda o: not pushes(o) and not to_trackio(o), HUB, "training/hub.py"),
    "hub_model_id": obeyed_unless(lambda o: not pushes(o), HUB, "training/hub.py"),
    "hub_strategy": obeyed_unless(lambda o: not pushes(o), HUB, "training/hub.py, which takes end alone"),
    "hub_always_push": refused(
        "would push while an earlier push goes on; here a run is pushed once, when it is complete", "Leave it out."
    ),
    "hub_revision": obeyed_unless(lambda o: not pushes(o), HUB, "training/hub.py"),
    # seeds
    "seed": obeyed("training/run.py"),
    "data_seed": obeyed("training/trainer.py"),
    "full_determinism": obeyed("transformers: Trainer.__init__"),
    # reading the data
    "dataloader_drop_last": obeyed("training/sampling.py"),
    "dataloader_num_workers": obeyed("transformers: Trainer._get_dataloader"),
    "dataloader_pin_memory": obeyed("transformers: Trainer._get_dataloader, on a GPU"),
    "dataloader_persistent_workers": obeyed_if(has_workers, WORKERS, "transformers: Trainer._get_dataloader"),
    "dataloader_prefetch_factor": obeyed_if(has_workers, WORKERS, "transformers: Trainer._get_dataloader"),
    "dataloader_multiprocessing_context": obeyed_if(has_workers, WORKERS, "transformers: Trainer._get_dataloader"),
    "dataloader_in_order": refused(
        "would let the speed of workers decide which comparisons a step holds", "Leave it out."
    ),
    "train_sampling_strategy": obeyed("training/trainer.py", check=no_rebalancing),
    "length_column_name": refused("names a column of lengths, which are counted here", "Leave it out."),
    "remove_unused_columns": meaningless("only columns that training reads are kept in any case"),
    "label_names": meaningless("a batch of comparisons holds no labels"),
    "dataset_num_proc": meaningless("rows are tokenized in batches by one process"),
    "pad_to_multiple_of": refused(
        "is not supported: the attention kernel decides what a batch is padded to", "Leave it out."
    ),
    # several processes
    "use_cpu": obeyed("training/arguments.py"),
    "accelerator_config": obeyed("transformers: Trainer.create_accelerator_and_postprocess", check=only_harmless_keys),
    "parallelism_config": refused("is not supported", "Use ZeRO-3: accelerate_configs/zero3.yaml."),
    "ddp_find_unused_parameters": obeyed_unless(
        lambda o: not under_ddp(o), "it is an option of DDP", "transformers: Trainer._build_accelerator_args"
    ),
    "ddp_bucket_cap_mb": obeyed_unless(
        lambda o: not under_ddp(o), "it is an option of DDP", "transformers: Trainer._build_accelerator_args"
    ),
    "ddp_broadcast_buffers": obeyed_unless(
        lambda o: not under_ddp(o), "it is an option of DDP", "transformers: Trainer._build_accelerator_args"
    ),
    "ddp_static_graph": obeyed_unless(
        lambda o: not under_ddp(o), "it is an option of DDP", "transformers: Trainer._build_accelerator_args"
    ),
    "ddp_backend": obeyed_unless(
        lambda o: not several_ranks(o), "there is one process", "transformers: TrainingArguments._setup_devices"
    ),
    "ddp_timeout": obeyed("transformers: TrainingArguments._setup_devices", check=timeout_is_handed_on),
    "fsdp": refused("is not supported", "Use ZeRO-3, which shards 4-bit weights: accelerate_configs/zero3.yaml."),
    "fsdp_config": refused(
        "is not supported", "Use ZeRO-3, which shards 4-bit weights: accelerate_configs/zero3.yaml."
    ),
    "deepspeed": obeyed("training/engine.py"),
    "local_rank": meaningless("launchers set the environment variable LOCAL_RANK"),
    # actions of transformers' example scripts
    "do_train": meaningless("the command trains"),
    "do_eval": meaningless("--eval_strategy decides when to evaluate"),
    "do_predict": meaningless("`qlora-rm score` predicts"),
    # TRL's own
    "model_init_kwargs": refused(
        "is not read", "Use --model_revision, --attn_implementation, --quantization and --bf16."
    ),
    "trust_remote_code": obeyed("backbone/load.py"),
    "chat_template_path": obeyed("backbone/tokenizer.py"),
    "disable_dropout": obeyed("training/run.py"),
    "eos_token": obeyed("backbone/tokenizer.py"),
    "pad_token": obeyed("backbone/tokenizer.py"),
    "max_length": obeyed("preferences/tokenization.py"),
    "center_rewards_coefficient": obeyed("training/objective.py"),
}
"""Option -> rule, by topic."""
