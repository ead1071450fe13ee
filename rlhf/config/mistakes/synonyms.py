"""Map the settings of TRL, verl and OpenRLHF to the keys of this schema.

Error messages suggest these keys. `python -m rlhf.config.mistakes.synonyms` prints the table of docs/coming_from.md.
This module holds names only, no values.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Synonym:
    """One setting in four vocabularies. Names are separated by spaces; a name with dots is a path."""

    keys: str
    """The keys here; several where algorithms differ. Empty: no key sets this."""
    trl: str = ""
    verl: str = ""
    """`actor.`, `rollout.`, `ref.` and `model.` stand for those sections of `actor_rollout_ref`."""
    openrlhf: str = ""
    """The names of the options, those with dots and the older ones without."""
    note: str = field(default="", kw_only=True)
    """What differs, as a sentence."""
    other: str = field(default="", kw_only=True)
    """Words that people write, which no framework of the three has."""

    @property
    def names(self) -> tuple[str, ...]:
        """Return every name except the keys of this schema."""
        return tuple(f"{self.trl} {self.verl} {self.openrlhf} {self.other}".split())


S = Synonym
SYNONYMS = (
    # The run and its models
    S("run.name", "run_name", "trainer.experiment_name", "logger.wandb.run_name wandb_run_name"),
    S("run.dir", "output_dir", "trainer.default_local_dir", "ckpt.output_dir ckpt.path save_path ckpt_path"),
    S("run.mirror", verl="trainer.default_hdfs_dir"),
    S("run.push_to_hub", "push_to_hub hub_model_id", note="It names the repository, OWNER/NAME."),
    S("run.seed", "data_seed", "data.seed", "train.seed"),
    S(
        "policy.model",
        "model_name_or_path sft_model_path",
        "model.path",
        "actor.model_name_or_path model.model_name_or_path pretrain",
        other="policy.path policy.name",
    ),
    S(
        "policy.dtype",
        "dtype bf16 fp16",
        "rollout.dtype",
        "ds.param_dtype param_dtype",
        note="There is no float16.",
        other="torch_dtype",
    ),
    S("policy.revision", "model_revision", other="revision"),
    S("policy.tokenizer", "", "model.tokenizer_path data.tokenizer", other="tokenizer tokenizer_name_or_path"),
    S("policy.trust_remote_code", "trust_remote_code", "model.trust_remote_code data.trust_remote_code"),
    S(
        "policy.gradient_checkpointing",
        "gradient_checkpointing",
        "model.enable_gradient_checkpointing",
        "actor.gradient_checkpointing_enable gradient_checkpointing",
    ),
    S("policy.lora", "use_peft peft_config", note="`lora: {}` trains an adapter with the default values."),
    S("policy.lora.rank", "lora_r", "model.lora_rank", "ds.lora.rank lora_rank", other="r"),
    S("policy.lora.alpha", "lora_alpha", "model.lora_alpha", "ds.lora.alpha lora_alpha"),
    S("policy.lora.dropout", "lora_dropout", "", "ds.lora.dropout lora_dropout"),
    S(
        "policy.lora.target_modules",
        "lora_target_modules",
        "model.target_modules",
        "ds.lora.target_modules target_modules",
    ),
    S("policy.lora.modules_to_save", "lora_modules_to_save"),
    S("policy.lora.rslora", "use_rslora"),
    S("policy.lora.dora", "use_dora"),
    S("policy.lora.quantize", "load_in_4bit", "", "ds.load_in_4bit load_in_4bit"),
    S("policy.adapter", "", "model.lora_adapter_path", note="It needs `policy.lora` too."),
    S("reference.model", "ref_model", "ref.model.path", "ref.model_name_or_path ref_pretrain"),
    S("teacher.model", "teacher_model_name_or_path", "", "teacher_model"),
    S("critic.model", "value_model", "critic.model.path", "critic.model_name_or_path critic_pretrain"),
    S("reward.model", "reward_model_path", "reward_model.model.path", "reward.model_name_or_path reward_pretrain"),
    # Data
    S(
        "data.train",
        "dataset_name train_dataset",
        "data.train_files",
        "data.prompt_dataset data.dataset prompt_data dataset",
        other="data.path data.name dataset_path",
    ),
    S("data.eval", "eval_dataset", "data.val_files", "eval.dataset eval_dataset"),
    S(
        "data.columns",
        "dataset_text_field",
        "data.prompt_key",
        "data.input_key data.output_key data.label_key input_key output_key label_key",
        note="It maps a column name of ours to the name in the data.",
    ),
    S("data.apply_chat_template", "", "", "data.apply_chat_template apply_chat_template"),
    S("data.chat_template", "chat_template_path", "model.custom_chat_template", "data.tokenizer_chat_template"),
    S("data.chat_template_kwargs", "chat_template_kwargs", "data.apply_chat_template_kwargs"),
    S("data.max_prompt_tokens", "max_prompt_length", "data.max_prompt_length rollout.prompt_length", "prompt_max_len"),
    S("data.max_sequence_tokens", "max_length", "", "data.max_len max_len", other="max_seq_length"),
    S("data.too_long", "truncation_mode", "data.truncation data.filter_overlong_prompts"),
    S("data.shuffle", "shuffle_dataset", "data.shuffle"),
    # Rollouts
    S(
        "rollouts.prompts_per_step",
        "generation_batch_size",
        "data.train_batch_size",
        "rollout.batch_size rollout_batch_size",
        note="It counts prompts; TRL counts responses.",
    ),
    S(
        "rollouts.samples_per_prompt",
        "num_generations",
        "rollout.n",
        "rollout.n_samples_per_prompt n_samples_per_prompt",
        other="rollouts.n",
    ),
    S(
        "rollouts.max_new_tokens",
        "max_completion_length response_length",
        "data.max_response_length rollout.response_length",
        "rollout.max_new_tokens generate_max_len",
        other="max_tokens max_new_token",
    ),
    S("rollouts.temperature", "temperature", "rollout.temperature", "rollout.temperature temperature"),
    S("rollouts.top_p", "top_p", "rollout.top_p", "rollout.top_p top_p"),
    S("rollouts.top_k", "top_k", "rollout.top_k"),
    S("rollouts.min_p", "min_p"),
    S("rollouts.repetition_penalty", "repetition_penalty"),
    S("rollouts.stop", "stop_token", other="stop_sequences stop_strings"),
    S("rollouts.stop_token_ids", "stop_token_id"),
    S(
        "rollouts.dynamic_sampling",
        "",
        "algorithm.filter_groups.enable",
        "algo.dynamic_filtering_enable dynamic_filtering",
        note="`dynamic_sampling: {}` takes the default values.",
    ),
    S(
        "rollouts.dynamic_sampling.max_filtered_fraction",
        "",
        "algorithm.filter_groups.max_num_gen_batches",
        note="It is a share of prompts_per_step.",
    ),
    S(
        "rollouts.dynamic_sampling.min_mean",
        "",
        "",
        "algo.dynamic_filtering_range dynamic_filtering_reward_range",
        note="The upper end is rollouts.dynamic_sampling.max_mean.",
    ),
    S(
        "rollouts.environment",
        "environment_factory",
        "rollout.multi_turn.enable",
        "train.agent_func_path agent_func_path",
    ),
    S("rollouts.environment.max_turns", "", "rollout.multi_turn.max_assistant_turns"),
    S("rollouts.max_staleness", "", "async_training.staleness_threshold", "train.async_enable async_train"),
    # The algorithm
    S(
        "algorithm.name",
        "loss_type importance_sampling_level",
        "algorithm.adv_estimator actor.policy_loss.loss_mode",
        "algo.advantage.estimator actor.policy_loss_type advantage_estimator",
    ),
    S("algorithm.aggregation", "", "actor.loss_agg_mode"),
    S(
        "algorithm.kl.coef algorithm.beta",
        "beta kl_coef",
        "actor.kl_loss_coef algorithm.kl_ctrl.kl_coef",
        "algo.kl.init_coef model.beta init_kl_coef",
    ),
    S(
        "algorithm.kl.estimator",
        "kl_estimator",
        "actor.kl_loss_type algorithm.kl_penalty",
        "algo.kl.estimator kl_estimator",
    ),
    S("algorithm.kl.place", "", "actor.use_kl_loss algorithm.use_kl_in_reward", "algo.kl.use_loss use_kl_loss"),
    S("algorithm.kl.adaptive", "", "algorithm.kl_ctrl.type"),
    S("algorithm.kl.adaptive.target", "", "algorithm.kl_ctrl.target_kl", "algo.kl.target kl_target"),
    S("algorithm.kl.adaptive.horizon", "", "algorithm.kl_ctrl.horizon", "algo.kl.horizon kl_horizon"),
    S("algorithm.reference_every", "sync_ref_model ref_model_sync_steps"),
    S(
        "algorithm.clip_low",
        "epsilon cliprange",
        "actor.clip_ratio actor.clip_ratio_low",
        "actor.eps_clip actor.eps_clip_low_high eps_clip eps_clip_low_high",
        note="The upper bound has its own key, algorithm.clip_high.",
    ),
    S("algorithm.clip_high", "epsilon_high", "actor.clip_ratio_high"),
    S("algorithm.dual_clip", "delta", "actor.clip_ratio_c", "actor.dual_clip dual_clip"),
    S("algorithm.value_clip", "cliprange_value", "critic.cliprange_value", "critic.value_clip value_clip"),
    S("algorithm.gamma", "gamma", "algorithm.gamma", "algo.advantage.gamma gamma"),
    S("algorithm.lam", "lam", "algorithm.lam", "algo.advantage.lambd lambd", other="gae_lambda"),
    S("algorithm.entropy.coef", "", "actor.entropy_coeff", "actor.entropy_coef entropy_loss_coef"),
    S("algorithm.top_entropy_fraction", "top_entropy_quantile", note="TRL's quantile is 1 minus this share."),
    S(
        "algorithm.std_normalize",
        "scale_rewards",
        "algorithm.norm_adv_by_std_in_grpo",
        "algo.advantage.no_std_norm no_advantage_std_norm",
    ),
    S(
        "algorithm.correction",
        "vllm_importance_sampling_correction",
        "algorithm.rollout_correction",
        "algo.advantage.is_correction_enable enable_vllm_is_correction",
    ),
    S(
        "algorithm.correction.max_ratio",
        "vllm_importance_sampling_cap",
        "algorithm.rollout_correction.rollout_is_threshold",
        "algo.advantage.is_correction_threshold vllm_is_truncated_threshold",
    ),
    S(
        "algorithm.overlong.buffer",
        "",
        "reward_model.overlong_buffer.len",
        "reward.overlong_buffer_len overlong_buffer_len",
    ),
    S(
        "algorithm.overlong.factor",
        "",
        "reward_model.overlong_buffer.penalty_factor",
        "reward.overlong_penalty_factor overlong_penalty_factor",
    ),
    S("algorithm.mask_truncated", "mask_truncated_completions"),
    S("algorithm.critic_lr", "", "critic.optim.lr", "critic_learning_rate"),
    S("algorithm.critic_warmup_steps", "", "trainer.critic_warmup", "critic.freezing_steps freezing_actor_steps"),
    S("algorithm.sft_coef", "", "", "model.nll_loss_coef nll_loss_coef", other="rpo_alpha"),
    S("algorithm.length_alpha", "ld_alpha"),
    S("algorithm.divergence", "f_divergence_type"),
    S("algorithm.neftune_alpha", "neftune_noise_alpha"),
    # Rewards
    S(
        "rewards.*.function",
        "reward_funcs",
        "custom_reward_function.path custom_reward_function.name",
        note="A function of yours is `FILE.py:NAME`.",
    ),
    S("rewards.*.url", "", "", "reward.remote_url remote_rm_url"),
    S("rewards.*.role", "", "reward_model.enable", note="`role: reward` uses the model of the section `reward`."),
    S("rewards.*.weight", "reward_weights"),
    S("rewards.*.truncated_score", "missing_eos_penalty", note="It is the score itself."),
    S("reward_policy.processes", "", "reward_model.num_workers"),
    # Optimisation
    S("train.optimizer", "", "actor.optim.optimizer", note="TRL's name is `optim`."),
    S("train.lr", "learning_rate", "actor.optim.lr", "adam.lr actor_learning_rate"),
    S(
        "train.lr_schedule",
        "lr_scheduler_type",
        "actor.optim.lr_scheduler_type actor.optim.warmup_style",
        "lr_scheduler",
    ),
    S("train.warmup_ratio", "warmup_ratio", "actor.optim.lr_warmup_steps_ratio", "lr_warmup_ratio"),
    S("train.warmup_steps", "warmup_steps", "actor.optim.lr_warmup_steps", other="num_warmup_steps"),
    S("train.min_lr_ratio", "lr_scheduler_kwargs", "actor.optim.min_lr_ratio", "min_lr_ratio"),
    S("train.betas", "adam_beta1 adam_beta2", "actor.optim.betas", "adam.betas adam_betas"),
    S("train.eps", "adam_epsilon", "", "adam.eps"),
    S("train.weight_decay", "weight_decay", "actor.optim.weight_decay", "adam.weight_decay l2"),
    S(
        "train.grad_clip",
        "max_grad_norm",
        "actor.grad_clip actor.optim.clip_grad",
        "max_norm",
        other="gradient_clipping clip_grad_norm",
    ),
    S(
        "train.epochs",
        "num_train_epochs",
        "trainer.total_epochs",
        "train.num_episodes num_episodes",
        other="num_epochs",
    ),
    S("train.steps", "max_steps", "trainer.total_training_steps", other="num_steps total_steps"),
    S("train.epochs_per_batch", "num_iterations num_ppo_epochs", "actor.ppo_epochs", "train.max_epochs max_epochs"),
    S(
        "train.sequences_per_update",
        "per_device_train_batch_size",
        "actor.ppo_mini_batch_size",
        "train.batch_size train_batch_size",
        note="It counts the responses of one optimizer step. TRL counts those of one device, verl counts prompts.",
        other="batch_size minibatch_size mini_batch_size global_batch_size",
    ),
    S(
        "train.max_tokens_per_microbatch",
        "",
        "actor.ppo_max_token_len_per_gpu actor.ppo_micro_batch_size_per_gpu",
        "train.max_tokens_per_gpu train.micro_batch_size micro_train_batch_size",
        note="It counts tokens.",
        other="micro_batch_size",
    ),
    S("train.checkpoint_every", "save_steps", "trainer.save_freq", "ckpt.save_steps save_steps"),
    S("train.keep_checkpoints", "save_total_limit", "trainer.max_actor_ckpt_to_keep", "ckpt.max_num max_ckpt_num"),
    S("train.best_metric", "metric_for_best_model load_best_model_at_end", "", "ckpt.best_metric_key"),
    S("train.early_stopping.patience", other="early_stopping_patience"),
    # Evaluation and tracking
    S("eval.every", "eval_steps", "trainer.test_freq", "eval.steps eval_steps"),
    S("eval.at_start", "eval_on_start", "trainer.val_before_train"),
    S("eval.temperature", "", "rollout.val_kwargs.temperature", "eval.temperature eval_temperature"),
    S(
        "eval.samples_per_prompt",
        "num_generations_eval",
        "rollout.val_kwargs.n",
        "eval.n_samples_per_prompt eval_n_samples_per_prompt",
        other="eval.num_generations",
    ),
    S("tracking.wandb", "report_to", "trainer.logger", "logger.wandb.key use_wandb"),
    S("tracking.wandb_project", "project", "trainer.project_name", "logger.wandb.project wandb_project"),
    S("tracking.wandb_entity", "", "", "logger.wandb.org wandb_org"),
    S("tracking.wandb_group", "", "", "logger.wandb.group wandb_group"),
    S("tracking.tensorboard", "", "", "logger.tensorboard_dir use_tensorboard"),
    S("tracking.samples_per_step", "log_completions", "trainer.rollout_data_dir trainer.log_val_generations"),
    # The cluster
    S("cluster.device", "use_cpu", "trainer.device"),
    S("cluster.call_timeout_s", "ddp_timeout", "nccl_timeout"),
    S(
        "cluster.roles.policy.workers",
        "",
        "trainer.n_gpus_per_node trainer.nnodes",
        "actor.num_gpus_per_node actor.num_nodes actor_num_gpus_per_node actor_num_nodes",
        note="It counts the ranks on all nodes.",
        other="num_processes num_gpus gpus n_gpus",
    ),
    S(
        "cluster.roles.policy.zero_stage",
        "deepspeed fsdp",
        "actor.strategy",
        "ds.zero_stage zero_stage",
        note="DeepSpeed is the only training engine.",
    ),
    S(
        "cluster.roles.policy.offload",
        "",
        "actor.fsdp_config.optimizer_offload actor.fsdp_config.param_offload",
        "ds.adam_offload adam_offload",
    ),
    S(
        "cluster.roles.policy.sequence_parallel",
        "",
        "actor.ulysses_sequence_parallel_size",
        "ds.ring_attn_size ring_attn_size",
    ),
    S("cluster.roles.critic.workers", "", "", "critic.num_gpus_per_node critic.num_nodes critic_num_gpus_per_node"),
    S("cluster.roles.reference.workers", "", "", "ref.num_gpus_per_node ref.num_nodes ref_num_gpus_per_node"),
    S("cluster.roles.reward.workers", "", "", "reward.num_gpus_per_node reward.num_nodes reward_num_gpus_per_node"),
    S("cluster.roles.rollout.engines", "", "", "vllm.num_engines vllm_num_engines"),
    S(
        "cluster.roles.rollout.tensor_parallel",
        "vllm_tensor_parallel_size",
        "rollout.tensor_model_parallel_size",
        "vllm.tensor_parallel_size vllm_tensor_parallel_size",
        other="tensor_parallel_size",
    ),
    S(
        "cluster.roles.rollout.gpu_memory_utilization",
        "vllm_gpu_memory_utilization",
        "rollout.gpu_memory_utilization",
        "vllm.gpu_memory_utilization vllm_gpu_memory_utilization",
    ),
    S("cluster.roles.rollout.max_num_seqs", "", "rollout.max_num_seqs"),
    S("cluster.roles.rollout.enforce_eager", "", "rollout.enforce_eager", "vllm.enforce_eager enforce_eager"),
    S("cluster.roles.rollout.colocate_with", "vllm_mode", "hybrid_engine", "train.colocate_all colocate_all_models"),
    # Settings without a key
    S(
        "",
        "gradient_accumulation_steps steps_per_generation per_device_eval_batch_size",
        "rollout.log_prob_micro_batch_size_per_gpu ref.log_prob_micro_batch_size_per_gpu",
        "rollout.micro_batch_size micro_rollout_batch_size",
        note="Micro-batches follow from train.sequences_per_update and train.max_tokens_per_microbatch.",
    ),
    S(
        "",
        "packing padding_free",
        "model.use_remove_padding actor.use_dynamic_bsz",
        "ds.packing_samples train.dynamic_batch_enable packing_samples",
        note="Sequences are always packed, up to train.max_tokens_per_microbatch tokens.",
    ),
    S("", "use_vllm", "rollout.name", note="Rollouts always come from vLLM."),
    S(
        "",
        "resume_from_checkpoint",
        "trainer.resume_mode trainer.resume_from_path",
        "ckpt.load_enable load_checkpoint",
        note="`rlhf train CONFIG --resume auto` continues a run.",
    ),
    S("", "logging_steps", "", "logger.logging_steps logging_steps", note="Metrics are written at every step."),
)

# Values of other frameworks for keys with a fixed set of values.
VALUES = {
    "algorithm.name": {
        "gae": "ppo",
        "group_norm": "grpo",
        "bnpo": "grpo",
        "grpo_passk": "pass_at_k",
        "reinforce++": "reinforce_plus_plus",
        "gkd": "on_policy_distillation",
        "ipo": "dpo",
        "bco": "kto",
        "rm": "reward_model",
        "prm": "process_reward_model",
    },
    "aggregation": {
        "seq-mean-token-sum": "sequence_mean_token_sum",
        "seq-mean-token-mean": "sequence_mean_token_mean",
        "seq-mean-token-sum-norm": "token_sum_norm",
    },
    "estimator": {"kl": "k1", "mse": "k2", "low_var_kl": "k3"},
    "lr_schedule": {
        "constant_with_warmup": "constant",
        "cosine_with_min_lr": "cosine",
        "warmup_stable_decay": "wsd",
    },
    "optimizer": {"adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_bnb_8bit": "adamw_8bit"},
    "dtype": {"bf16": "bfloat16", "fp32": "float32"},
    "device": {"gpu": "cuda"},
    "wandb": {"wandb": "online", "disabled": "off"},
}


def table() -> str:
    """Return the settings as a Markdown table."""
    lines = ["| here | TRL | verl | OpenRLHF | |", "|---|---|---|---|---|"]
    for synonym in SYNONYMS:
        keys = ", ".join(f"`{key.replace('*', 'NAME')}`" for key in synonym.keys.split()) or "none"
        columns = (synonym.trl, synonym.verl, synonym.openrlhf)
        theirs = (", ".join(f"`{name}`" for name in names.split()) for names in columns)
        lines.append(f"| {keys} | {' | '.join(theirs)} | {synonym.note} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(table())
