"""Whatever is set, losses and gradients are the same packed as padded: every field of every method's settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from support.daily import of_today
from support.rewards import REWARDS
from support.small import Small

from alignctl.config.trl_fields import config_fields
from alignctl.methods.registry import methods

pytestmark = pytest.mark.train

Tries = Mapping[str, Mapping[str, Any]]
"""Settings to try together, by what they are about."""

_LENGTHS = {"max_length": 40, "truncation_mode": "keep_end", "pad_to_multiple_of": 16}
_NOISE = {"neftune_noise_alpha": 5.0}
_BATCHES = {"train_sampling_strategy": "group_by_length", "gradient_accumulation_steps": 2, "data_seed": 3}
_REFERENCE = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5}
_BEFOREHAND = {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 3}
_PAIRS = {"lengths": _LENGTHS, "noise": _NOISE, "batches": _BATCHES, "strength": {"beta": 0.7}}


def _dpo() -> Tries:
    losses = config_fields(methods()["dpo"].config_class)["loss_type"].choices
    every = {"loss_type": list(losses), "loss_weights": [1 / (1 + number) for number in range(len(losses))]}
    return _PAIRS | {
        "every loss": every | {"label_smoothing": 0.1, "discopop_tau": 0.1},
        "weighting": {"use_weighting": True, "ld_alpha": 0.3},
        "divergence": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
        "reference": _REFERENCE,
        "beforehand": _BEFOREHAND,
    }


TRIED: Mapping[str, Tries] = {
    "dpo": _dpo(),
    "ipo": _PAIRS | {"sums": {"normalize": "none"}, "reference": _REFERENCE, "beforehand": _BEFOREHAND},
    "kto": {
        "lengths": {key: value for key, value in _LENGTHS.items() if key != "truncation_mode"},
        "noise": _NOISE, "batches": {"gradient_accumulation_steps": 2, "data_seed": 3}, "strength": {"beta": 0.7},
        "weights": {"desirable_weight": 1.2, "undesirable_weight": 0.6}, "loss": {"loss_type": "apo_zero_unpaired"},
        "reference": _REFERENCE, "beforehand": _BEFOREHAND,
    },
    "orpo": _PAIRS | {"completion alone": {"prompt_loss": False}},
    "simpo": _PAIRS | {"parts": {"gamma_beta_ratio": 0.3, "label_smoothing": 0.1, "sft_weight": 0.5}},
    "reward": {
        "lengths": {"max_length": 60, "pad_to_multiple_of": 16}, "noise": _NOISE, "batches": _BATCHES,
        "centred": {"center_rewards_coefficient": 0.1},
    },
    "sft": {
        "lengths": _LENGTHS, "noise": _NOISE, "batches": _BATCHES, "smoothed": {"label_smoothing_factor": 0.1},
        "loss": {"loss_type": "dft"}, "all tokens": {"completion_only_loss": False, "shuffle_dataset": True},
        "packing": {"packing": True, "packing_strategy": "bfd", "eval_packing": False, "max_length": 96},
        "no padding": {"padding_free": True, "max_length": None},
    },
    "grpo": {
        "rewards": {
            "reward_funcs": [f"{REWARDS}:length", f"{REWARDS}:short"], "reward_weights": [1.0, 0.5],
            "multi_objective_aggregation": "normalize_then_sum", "num_generations": 4,
        },
        "scores": {
            "reward_funcs": [f"{REWARDS}:length"], "reward_weights": [0.5], "normalize_rewards": "running",
            "reward_clip": 2.0, "missing_eos_penalty": 0.5, "scale_rewards": "batch", "soft_overlong_tokens": 3,
            "zero_signal_groups": "redraw", "max_redraws": 1, "num_generations": 4, "mask_truncated_completions": False,
        },
        "objective": {
            "num_iterations": 2, "num_mini_batches": 2, "pass_tokens": 96, "epsilon": 0.1, "epsilon_high": 0.28,
            "delta": 4.0, "beta": 0.1, "use_bias_correction_kl": True, "num_generations": 2, "entropy_coef": 0.1,
            "off_policy_mask_threshold": 0.1, "top_entropy_quantile": 0.5, "max_prompt_length": 40,
            "response_length": 5, "temperature": 0.8,
        },
        "completions": {
            "loss_type": "vespo", "num_iterations": 2, "vespo_k_pos": 1.5, "vespo_lambda_pos": 2.5, "vespo_k_neg": 2.5,
            "vespo_lambda_neg": 1.5, "importance_sampling_level": "token", "num_generations": 4,
        },
        "sigmoid": {
            "loss_type": "sapo", "sapo_temperature_pos": 1.5, "sapo_temperature_neg": 2.0, "num_iterations": 2,
            "num_generations": 4,
        },
        "entropy": {
            "use_adaptive_entropy": True, "entropy_coef_min": 0.05, "entropy_coef_max": 0.3, "entropy_coef_delta": 0.1,
            "entropy_target": 9.0, "rollout_tokens": 128, "data_seed": 3, "num_generations": 4,
        },
        "reference": _REFERENCE | {"beta": 0.1, "num_generations": 4},
    },
    "rloo": {
        "rewards": {
            "reward_funcs": [f"{REWARDS}:length"], "reward_weights": [0.5], "normalize_rewards": "running",
            "reward_clip": 2.0, "missing_eos_penalty": 0.5, "reward_clip_range": [0.1, 1.0], "soft_overlong_tokens": 3,
            "normalize_advantages": True, "num_generations": 4,
        },
        "objective": {
            "num_iterations": 2, "num_mini_batches": 2, "pass_tokens": 96, "epsilon": 0.1, "epsilon_high": 0.28,
            "beta": 0.1, "num_generations": 2, "max_prompt_length": 40, "response_length": 5, "temperature": 0.8,
            "mask_truncated_completions": False, "rollout_tokens": 128, "data_seed": 3,
        },
        "reference": _REFERENCE,
    },
    "ppo": {
        "rewards": {
            "reward_funcs": [f"{REWARDS}:length"], "reward_weights": [0.5], "normalize_rewards": "running",
            "reward_clip": 2.0, "missing_eos_penalty": 0.5, "whiten_rewards": True, "bootstrap_truncated": True,
        },
        "objective": {
            "num_ppo_epochs": 2, "num_mini_batches": 2, "pass_tokens": 96, "cliprange": 0.1, "cliprange_value": None,
            "dual_clip": 3.0, "vf_coef": 0.5, "entropy_coef": 0.1, "gamma": 0.9, "lam": 0.8, "whiten_advantages": False,
        },
        "penalty": {"kl_coef": 0.3, "kl_estimator": "k3", "target_kl": 1.0, "kl_horizon": 50},
        "groups": {"num_generations": 2, "temperature": 0.8, "max_prompt_length": 40, "response_length": 5},
        "warm-up": {"value_warmup_steps": 1, "rollout_tokens": 128, "data_seed": 3},
    },
}  # fmt: skip

# Why a field cannot change a loss, or not by how rows are laid out. By reason, so that a new field is read about.
UNTRIED = {
    "it is what is compared": "engine",
    "it says how weights are moved once there are gradients": """
        adam_beta1 adam_beta2 adam_epsilon learning_rate lr_scheduler_kwargs lr_scheduler_type max_grad_norm optim
        optim_args optim_target_modules warmup_steps weight_decay""",
    "it says when training ends, or is measured, saved and told": """
        early_stopping_patience early_stopping_threshold eval_delay eval_on_start eval_steps eval_strategy
        greater_is_better load_best_model_at_end log_level log_level_replica log_on_each_node logging_first_step
        logging_nan_inf_filter logging_steps logging_strategy max_steps metric_for_best_model num_train_epochs project
        run_name save_on_each_node save_only_model save_steps save_strategy save_total_limit skip_memory_metrics
        include_for_metrics include_num_input_tokens_seen batch_eval_metrics eval_accumulation_steps
        eval_do_concat_batches eval_use_gather_object prediction_loss_only num_sample_completions
        restore_callback_states_from_checkpoint ignore_data_skip""",
    "it says how long scores are waited for": "reward_retries reward_timeout reward_workers",
    "it is about the Hub": """
        hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy trackio_bucket_id trackio_space_id
        trackio_static_space_id""",
    "it says how rows are read and prepared, before there is a batch": """
        dataloader_drop_last dataloader_in_order dataloader_multiprocessing_context dataloader_num_workers
        dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor dataset_kwargs dataset_num_proc
        length_column_name remove_unused_columns per_device_train_batch_size auto_find_batch_size
        assistant_only_loss""",
    "it says on what, in which precision or with which kernels is computed, whatever the rows": """
        accelerator_config activation_checkpointing activation_checkpointing_kwargs activation_offloading
        average_tokens_across_devices bf16 bf16_full_eval compile ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb
        ddp_find_unused_parameters ddp_static_graph ddp_timeout debug fp16 fp16_full_eval full_determinism
        gradient_checkpointing gradient_checkpointing_kwargs liger_kernel_config parallelism_config tf32 torch_compile
        torch_compile_backend torch_compile_mode torch_empty_cache_steps use_cache use_cpu use_liger_kernel""",
    "test_passes.py has it": "pass_tokens",
    "accumulation follows from it before there is a trainer": "global_batch_size",
    "it is told, and nothing is done with it": "batch_for",
    "a mixture's rows are padded": "router_aux_loss_coef",
    "each number is dropped by itself: other numbers than in padded rows, as likely": "disable_dropout",
    "trainers of text models do not look at it": "label_names label_smoothing_factor",
    "it says what draws, or what is held in memory": """
        generation sharing use_vllm vllm_enable_sleep_mode vllm_gpu_memory_utilization vllm_group_port vllm_mode
        vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_tensor_parallel_size
        vllm_importance_sampling_correction vllm_importance_sampling_mode vllm_importance_sampling_clip_min
        vllm_importance_sampling_clip_max""",
}  # fmt: skip
REASONS = {field: reason for reason, fields in UNTRIED.items() for field in fields.split()}


@pytest.mark.parametrize("name", methods())
def test_every_field_is_tried_or_cannot_matter(name):
    method = methods()[name]
    fields = set(config_fields(method.config_class)) - set(method.owned_fields)
    tried = {field for settings in TRIED[name].values() for field in settings}
    assert tried <= fields, "there is no such field"
    assert fields - tried - set(REASONS) == set(), "say in TRIED how it is tried, or in UNTRIED why it cannot matter"


def test_every_reason_is_of_a_field():
    there = {field for method in methods().values() for field in config_fields(method.config_class)}
    assert set(REASONS) <= there


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return Small(tmp_path_factory.mktemp("small"))


DAY = (
    "noise",
    "smoothed",
    "every loss",
    "weighting",
    "divergence",
    "parts",
    "centred",
    "weights",
    "objective",
    "groups",
)
"""What looks at more than one row or token, and what once was not the same."""
ALL = [(name, about) for name, tries in TRIED.items() for about in tries]
NIGHT = of_today([one for one in ALL if one[1] not in DAY], 3)
CASES = [
    pytest.param(*one, marks=[] if one[1] in DAY else [pytest.mark.night], id="-".join(one))
    for one in ALL
    if one[1] in DAY or one in NIGHT
]


@pytest.mark.parametrize(("name", "about"), CASES)
def test_losses_are_the_same_packed_as_padded(small, monkeypatch, tmp_path, name, about):
    monkeypatch.setenv("ALIGNCTL_CACHE", str(tmp_path / "cache"))
    on_policy = methods()[name].data_kind == "prompts"
    given: dict[str, Any] = {
        "max_steps": 3, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no",
        "gradient_checkpointing": False, "per_device_train_batch_size": 4,
    }  # fmt: skip
    if on_policy:
        given |= {"reward_funcs": [f"{REWARDS}:length"], "response_length": 6, "max_prompt_length": 100}
    logged = []
    for engine in ("auto", "padded"):
        trainer = small.trainer(name, engine=engine, **given | dict(TRIED[name][about]))
        padded = [notice for notice in trainer.notices if "padded rows" in notice]
        assert bool(padded) == (engine == "padded" or about in ("noise", "smoothed"))
        trainer.train()
        logged.append([[row["loss"], row["grad_norm"]] for row in trainer.state.log_history if "loss" in row])
    packed, padded = logged
    assert len(packed) == 3
    # Sums of float32 in another order: 1e-6 in a step, and three steps of moving weights from there.
    assert packed == [pytest.approx(row, rel=1e-4, abs=2e-6) for row in padded]
