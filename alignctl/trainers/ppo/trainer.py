"""PPO with a value model, arXiv:1707.06347, for language models as in arXiv:1909.08593 and InstructGPT.

A step of transformers' Trainer is one rollout and all updates made with it: what the trainer does after `training_step`
(clip, step, schedule, log, save) is done with the last mini-batch. A checkpoint therefore never stands in the middle of
a rollout, and learning rates follow rollouts.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from trl.trainer.utils import disable_dropout_in_model

from alignctl.data.tokenizing import tokenize_prompt
from alignctl.engine.forward import bare
from alignctl.engine.layout import bins
from alignctl.errors import AlignctlError, RequestError
from alignctl.models.adapters import Adapters, ScoreAdapter
from alignctl.models.attention import put_packed_attention_on
from alignctl.models.generation import Drawn, draw_completions
from alignctl.models.lora import make_lora_fast
from alignctl.models.sharding import whole_weights
from alignctl.run.checkpoints import newest_checkpoint
from alignctl.run.files import read_json_lines, write_json_lines
from alignctl.run.paths import StagePaths
from alignctl.trainers.base.columns import ROW
from alignctl.trainers.base.heads import why_not_scored_packed
from alignctl.trainers.base.managed import Managed
from alignctl.trainers.ppo.advantage import Experience, build_experience, moments
from alignctl.trainers.ppo.config import PPOConfig
from alignctl.trainers.ppo.models import ActorCritic, Batch, Scored, lay_out, policy_logps
from alignctl.trainers.ppo.objective import adapted_kl_coef, explained_variance, kl_estimates
from alignctl.trainers.ppo.scoring import (
    Episodes,
    Moments,
    NotANumber,
    RewardModel,
    RewardSource,
    as_said,
    combine,
    load_function,
    score,
)
from alignctl.trainers.ppo.shared_base import share_base
from alignctl.trainers.ppo.update import Sums, backward, mini_batches

_STATE, _WEIGHTS = "ppo_state.json", "actor_critic.safetensors"
_IDS = "prompt_ids"
_CONSTANT_STEPS = 5  # rollouts of equal scores until training is stopped


class ActorCriticTrainer(Trainer):
    """Draws, scores and updates; to be managed."""

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        args: PPOConfig,
        train_dataset: Dataset,
        processing_class: PreTrainedTokenizerBase,
        ref_model: PreTrainedModel | None = None,
        value_model: PreTrainedModel | None = None,
        reward_model: PreTrainedModel | None = None,
        reward_adapter: ScoreAdapter | None = None,
        reward_processing_class: PreTrainedTokenizerBase | None = None,
        reward_statistics: dict[str, float] | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        eval_dataset: Dataset | None = None,
    ):
        """`reward_adapter` is for `roles=shared_base`, `reward_model` for the others."""
        if peft_config is not None:
            model = get_peft_model(model, peft_config)
            if value_model is not None:  # which then is an adapter with a head, too
                value_model = get_peft_model(value_model, dataclasses.replace(peft_config, task_type="SEQ_CLS"))
        self._put_engine_under(
            [bare(one) for one in (model, value_model, ref_model, reward_model) if one is not None], args
        )
        if args.roles == "shared_base":
            value_model, reward_model = share_base(model, reward_adapter, processing_class.pad_token_id)
        for one in (model, value_model):
            if isinstance(one, PeftModel):
                make_lora_fast(one)
        frozen = [one for one in (ref_model, reward_model) if one is not None]
        for one in frozen:
            one.eval().requires_grad_(False)
        if args.disable_dropout:
            for one in (model, value_model):
                if one is not None:
                    disable_dropout_in_model(one)
        scaled = args.normalize_rewards == "statistics" and reward_statistics and not args.reward_funcs
        scale = (reward_statistics["mean"], reward_statistics["std"]) if scaled else (0.0, 1.0)
        actor_critic = ActorCritic(model, value_model, *scale)
        self._check_length(args, {"model": model, "value model": value_model, "reference": ref_model})
        self.ref_model, self.reward_model = ref_model, reward_model
        rows = self._tokenize(train_dataset, processing_class, args)
        self.row_columns.pop(_IDS, None)  # a column of this name gives way to ours
        super().__init__(
            model=actor_critic,
            args=args,
            train_dataset=rows,
            processing_class=processing_class,
            data_collator=_collate,
            callbacks=callbacks,
        )
        for one in frozen:
            one.to(self.args.device)
        self.sources: list[RewardSource] = []
        if reward_model is not None:
            theirs = reward_processing_class or processing_class
            self.sources.append(RewardModel(reward_model, theirs, processing_class, args.update_tokens))
            if self.sources[-1].same_tokens:
                self._check_length(args, {"reward model": reward_model})
        for target in args.reward_funcs:
            self.sources.append(load_function(target))
            self.sources[-1].check_columns(list(self.row_columns))
        self._weights = args.reward_weights or [1.0] * len(self.sources)
        self._reward_statistics = reward_statistics
        if args.normalize_rewards == "statistics" and reward_statistics is None:
            raise RequestError(
                "`normalize_rewards=statistics` needs a reward model with a file reward_statistics.json beside its "
                "weights",
                "set `normalize_rewards=running`",
            )
        if self.accelerator.num_processes > 1:  # else all of them would draw with the same random numbers
            torch.manual_seed(args.seed + 1_000_003 * self.accelerator.process_index)
        self._vllm = None
        if args.generation == "vllm":
            from alignctl.trainers.ppo.vllm import VLLM

            self._vllm = VLLM(actor_critic.policy, processing_class, self.accelerator, args)
        # What a checkpoint holds besides weights, optimizer and random states.
        self.kl_coef = args.kl_coef
        self.seen = {source.name: Moments() for source in self.sources}
        self._constant = self._total_tokens = 0
        self._last_kl = 0.0
        self._first_pass: tuple[list[int], Scored] | None = None
        self._metrics: dict[str, list[float]] = defaultdict(list)
        self._samples: list[dict[str, Any]] = []
        self._samples_written = False

    # Setting up

    def _put_engine_under(self, models: list[PreTrainedModel], args: PPOConfig) -> None:
        reasons = []
        for one in models if args.engine != "padded" else ():
            scored_otherwise = why_not_scored_packed(one) if one.get_output_embeddings() is None else None
            if reason := scored_otherwise or put_packed_attention_on(one, args.device):
                reasons.append(reason)
        if reasons and args.engine == "shared_prefix":
            raise RequestError(f"`engine=shared_prefix` cannot be: {reasons[0]}", "set `engine=auto`")
        padded = args.engine == "padded" or reasons
        why = f", because {reasons[0]}" if reasons else ""
        self.notices.append(f"engine: padded rows{why}" if padded else "engine: nothing padded")

    @staticmethod
    def _check_length(args: PPOConfig, models: dict[str, PreTrainedModel | None]) -> None:
        """Whether all models that are given the policy's tokens can see the longest text there may be."""
        wanted = args.max_prompt_length + args.response_length
        for name, model in models.items():
            config = bare(model).config.get_text_config() if model is not None else None
            limit = getattr(config, "max_position_embeddings", None)
            if limit and wanted > limit:
                raise RequestError(
                    f"`max_prompt_length` and `response_length` are {wanted} tokens together, more than the {name} can "
                    f"see: {limit} tokens",
                    "make one of them smaller",
                )

    def _tokenize(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, args: PPOConfig) -> Dataset:
        found = [tokenize_prompt(tokenizer, prompt) for prompt in rows["prompt"]]
        kept = [i for i, ids in enumerate(found) if 0 < len(ids) <= args.max_prompt_length]
        if not kept:
            raise RequestError(
                f"all {len(found):,} prompts are longer than {args.max_prompt_length} tokens",
                "raise `max_prompt_length`",
            )
        columns = [name for name in rows.column_names if name != _IDS]
        return rows.select(kept).select_columns(columns).add_column(_IDS, [found[i] for i in kept])

    # A step

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Draws completions, scores them, and updates policy and value model; the gradient of the last mini-batch is
        left for the trainer to step with."""
        began = time.perf_counter()
        # TRL's helper for vLLM gathers divided weights by itself, and they may not be gathered twice.
        drawn = self._vllm.draw(inputs[_IDS]) if self._vllm is not None else None
        # Divided weights are gathered once a rollout, not once a token; so processes need not run as often as others.
        with whole_weights(self.model_wrapped):
            episodes = self._roll_out(inputs, drawn)
            rolled_out = time.perf_counter()
            experience, scores = self._learn_from(episodes)
        updating = time.perf_counter()
        loss = self._update(model, episodes, experience)
        tokens = sum(map(len, episodes.completions))
        self._record("tokens_per_s/rollout", tokens / (rolled_out - began))
        self._record("tokens_per_s/update", tokens * self.args.num_ppo_epochs / (time.perf_counter() - updating))
        if self.args.target_kl is not None:
            count = len(scores) * self.accelerator.num_processes
            self.kl_coef = adapted_kl_coef(
                self.kl_coef, self._last_kl, self.args.target_kl, self.args.kl_horizon, count
            )
        return loss

    def _roll_out(self, inputs: dict[str, Any], drawn: Drawn | None = None) -> Episodes:
        if drawn is None:
            self.policy.eval()
            with self.accelerator.autocast():
                drawn = self._draw(inputs[_IDS])
        said = [
            as_said(asked, self._text(prompt if isinstance(asked, str) else [], completion))
            for asked, prompt, completion in zip(inputs["prompt"], inputs[_IDS], drawn.completions, strict=True)
        ]
        return Episodes(inputs[_IDS], drawn.completions, drawn.ended, inputs["prompt"], said, inputs.get(ROW, {}))

    def _draw(self, prompts: list[list[int]]) -> Drawn:
        args = self.args
        return draw_completions(
            self.policy, self.processing_class, prompts, args.response_length, args.temperature, args.rollout_tokens,
            continuous=args.generation == "continuous",
        )  # fmt: skip

    def _text(self, prompt: list[int], completion: list[int]) -> str:
        """A completion as it follows its prompt: decoded by itself it would lose a leading space."""
        before, whole = (
            self.processing_class.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for ids in (prompt, prompt + completion)
        )
        return whole.removeprefix(before)

    @torch.no_grad()
    def _learn_from(self, episodes: Episodes) -> tuple[Experience, list[float]]:
        lengths = [len(said) for said in episodes.completions]
        self.model.eval()
        with whole_weights(self.reward_model):
            rewards = self._score(episodes)
        with whole_weights(self.ref_model):  # last, for it may leave a pass with all that its gradient needs
            scored, ref_logps = self._score_tokens(episodes)
        scores = combine(rewards, self._weights, self._reward_moments(rewards), self.args.reward_clip)
        if self.args.missing_eos_penalty is not None:
            penalty = self.args.missing_eos_penalty
            scores = [s if ended else s - penalty for s, ended in zip(scores, episodes.ended, strict=True)]
        self._check_not_constant(scores)
        experience = build_experience(
            scored, ref_logps, scores, episodes.ended, lengths, self.kl_coef, self.args, self._add_up
        )
        self._record_rollout(episodes, experience, rewards, scores, scored)
        return experience, scores

    def _score_tokens(self, episodes: Episodes) -> tuple[Scored, Tensor]:
        """What policy and value model, and the reference, say of all completions, `update_tokens` at a time.

        Where the first step of the update goes through the same completions at once, with the same weights, its forward
        pass is this one, and kept with what its gradient needs.
        """
        model, args = self.accelerator.unwrap_model(self.model), self.args
        lengths = _lengths(episodes)
        parts: dict[int, tuple[Tensor, ...]] = {}
        kept = self._first_pass_is_scoring(lengths)
        for members in bins(lengths, args.update_tokens, padded=False):
            batch = self._batch(episodes, members)
            counts = [len(episodes.completions[index]) for index in members]
            with self.accelerator.autocast():
                ref_logps = self._reference_logps(model, batch)
                with torch.set_grad_enabled(kept):
                    scored = model(
                        batch, args.temperature, self._policy_weight > 0, kept and args.entropy_coef > 0, entropy=True
                    )
            if kept:
                self._first_pass = members, scored
                scored = scored.detach()
            tokens = [one.split(counts) for one in (scored.logps, scored.entropy, scored.values, ref_logps)]
            parts |= {index: row for index, *row in zip(members, *tokens, scored.last_values, strict=True)}
        ordered = [parts[index] for index in range(len(lengths))]
        logps, entropy, values, ref_logps, last_values = zip(*ordered, strict=True)
        return Scored(torch.cat(logps), torch.cat(entropy), torch.cat(values), torch.stack(last_values)), torch.cat(
            ref_logps
        )

    def _first_pass_is_scoring(self, lengths: list[int]) -> bool:
        """Not so with dropout. Several processes, and DeepSpeed, have to see each pass through their wrappers, and
        activations are checkpointed in training mode only."""
        args = self.args
        whole = args.num_mini_batches == 1 and sum(lengths) <= args.update_tokens
        by_itself = self.accelerator.distributed_type == DistributedType.NO
        return whole and by_itself and args.disable_dropout and not args.gradient_checkpointing

    @property
    def _policy_weight(self) -> float:
        return 0.0 if self.state.global_step < self.args.value_warmup_steps else 1.0

    def _reference_logps(self, model: ActorCritic, batch: Batch) -> Tensor:
        if self.ref_model is not None:
            return policy_logps(self.ref_model, batch, self.args.temperature)
        with Adapters(model.policy).under(None):
            return policy_logps(model.policy, batch, self.args.temperature)

    def _update(self, model: nn.Module, episodes: Episodes, experience: Experience) -> Tensor:
        args, steps, policy_weight = self.args, [], self._policy_weight
        lengths = _lengths(episodes)
        generator = torch.Generator().manual_seed(args.seed + self.state.global_step)
        parts = [
            part
            for _ in range(args.num_ppo_epochs)
            for part in mini_batches(len(lengths), args.num_mini_batches, generator)
        ]
        model.train()
        for number, part in enumerate(parts):
            known = None
            if self._first_pass:
                (part, known), self._first_pass = self._first_pass, None
            with self.compute_loss_context_manager():
                steps.append(
                    backward(
                        model, lambda some: self._batch(episodes, some), experience, lengths, part, policy_weight, args,
                        self.accelerator, known,
                    )
                )  # fmt: skip
            if not policy_weight:  # a gradient of 0 would still decay weights and count for the optimizer's means
                for parameter in self.accelerator.unwrap_model(self.model).policy_parameters:
                    parameter.grad = None
            if number < len(parts) - 1:  # the trainer steps with the last one
                if args.max_grad_norm > 0:
                    self._clip_grad_norm(model)
                self.optimizer.step()
                model.zero_grad()
        return self._record_update(steps, policy_weight)

    def _batch(self, episodes: Episodes, members: list[int]) -> Batch:
        models = [*self.accelerator.unwrap_model(self.model).models, *([self.ref_model] if self.ref_model else [])]
        prompts, completions = ([some[i] for i in members] for some in (episodes.prompts, episodes.completions))
        return lay_out(models, prompts, completions, self.processing_class.pad_token_id, self.args.device)

    # Rewards

    def _score(self, episodes: Episodes) -> dict[str, list[float]]:
        """Rewards of each source. A process that fails here does not ask the others: whoever started them ends them."""
        try:
            return score(self.sources, episodes)
        except NotANumber as error:
            raise AlignctlError(str(error), self._last_checkpoint()) from error

    def _reward_moments(self, rewards: dict[str, list[float]]) -> dict[str, tuple[float, float]]:
        kind = self.args.normalize_rewards
        if kind == "statistics":
            statistics = self._reward_statistics
            return {"reward_model": (statistics["mean"], statistics["std"])}
        if kind == "none":
            return {}
        for name, values in rewards.items():
            everywhere = self.accelerator.gather(torch.tensor(values, device=self.args.device, dtype=torch.float64))
            self.seen[name].add(everywhere.tolist())
        return {name: (seen.mean, seen.std) for name, seen in self.seen.items()}

    def _check_not_constant(self, scores: list[float]) -> None:
        everywhere = self.accelerator.gather(torch.tensor(scores, device=self.args.device))
        constant = len(everywhere) > 1 and bool(everywhere.max() == everywhere.min())
        self._constant = self._constant + 1 if constant else 0
        if self._constant >= _CONSTANT_STEPS:
            raise AlignctlError(
                f"all completions of the last {_CONSTANT_STEPS} rollouts had the same score, {scores[0]:.4g}: there is "
                "nothing to learn from",
                f"look at samples_while_training.jsonl; {self._last_checkpoint()}",
            )

    def _last_checkpoint(self) -> str:
        newest = newest_checkpoint(Path(self.args.output_dir))
        return f"the last checkpoint is {newest.path}" if newest else "there is no checkpoint yet"

    def _add_up(self, value: Tensor) -> Tensor:
        return self.accelerator.reduce(value, "sum")

    # What is logged

    def _record(self, name: str, value: float) -> None:
        self._metrics[name].append(value)

    def _mean(self, values: Tensor) -> float:
        """Over all processes."""
        return float(self.accelerator.gather(values.detach().float()).mean())

    def _record_rollout(
        self, episodes: Episodes, experience: Experience, rewards: dict[str, list[float]], scores: list[float],
        scored: Scored,
    ) -> None:  # fmt: skip
        device, mask = self.args.device, experience.mask
        for name, values in {**rewards, "score": scores}.items():
            everywhere = self.accelerator.gather(torch.tensor(values, device=device))
            self._record(f"rewards/{name}" if name != "score" else "score", float(everywhere.mean()))
            self._record(
                f"rewards/{name}_std" if name != "score" else "score_std", float(everywhere.std(unbiased=False))
            )
        for source in self.sources:
            if isinstance(source, RewardModel) and not source.same_tokens:
                self._record("reward_model_cut", self._mean(torch.tensor([source.cut_share], device=device)))
        for estimator in ("k1", "k2", "k3"):
            per_token = kl_estimates(experience.logps, experience.ref_logps, estimator) * mask
            self._record(f"kl/{estimator}", self._mean(per_token.sum(1)))
        self._last_kl = self._metrics["kl/k1"][-1]
        lengths = torch.tensor([float(len(said)) for said in episodes.completions], device=device)
        self._record("completion_length", self._mean(lengths))
        self._record("eos_share", self._mean(torch.tensor([float(end) for end in episodes.ended], device=device)))
        mean, var = moments(experience.advantages, mask, self._add_up)
        self._record("advantages/mean", float(mean))
        self._record("advantages/std", float(var.sqrt()))
        self._record("kl_coef", self.kl_coef)
        self._record("value/explained_variance", float(explained_variance(experience.values, experience.returns, mask)))
        self._record("entropy", self._mean(scored.entropy.mean()))
        self._total_tokens = self._total_tokens + int(self._add_up(lengths.sum()))
        self._samples = [
            {
                "prompt": episodes.asked[i],
                "completion": episodes.said[i],
                "score": scores[i],
                "rewards": {name: values[i] for name, values in rewards.items()},
            }
            for i in range(min(self.args.num_sample_completions, len(scores)))
        ]

    def _record_update(self, steps: list[Sums], policy_weight: float) -> Tensor:
        names = [name for name in vars(steps[0]) if name != "tokens"]
        totals = self._add_up(torch.stack([sum(getattr(step, name) for step in steps) for name in ("tokens", *names)]))
        means = dict(zip(names, (totals[1:] / totals[0]).tolist(), strict=True))
        shown = {
            "policy_loss": "loss/policy", "value_loss": "loss/value", "clipped": "clip_fraction",
            "values_clipped": "clip_fraction_value", "ratio": "ratio", "kl": "kl_to_rollout",
        }  # fmt: skip
        for name, key in shown.items():
            self._record(key, means[name])
        moving = means["policy_loss"] - self.args.entropy_coef * means["entropy"]
        return torch.tensor(policy_weight * moving + self.args.vf_coef * means["value_loss"], device=self.args.device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= {name: sum(values) / len(values) for name, values in self._metrics.items()}
            logs["num_tokens"] = float(self._total_tokens)
            self._metrics.clear()
            if self.is_world_process_zero():
                self._write_samples()
            self._samples.clear()
        super().log(logs, start_time)

    def _write_samples(self) -> None:
        """Adds the samples to their file. Before the first ones, what training that is continued wrote after its
        checkpoint is dropped: it is written again."""
        step, path = self.state.global_step, StagePaths(Path(self.args.output_dir).parent).samples_while_training
        if not self._samples_written:
            write_json_lines(path, [row for row in read_json_lines(path) if row["step"] < step])
            self._samples_written = True
        with path.open("a", encoding="utf-8") as file:
            for row in self._samples:
                file.write(json.dumps({"step": step} | row, ensure_ascii=False) + "\n")
        if self.show_samples:
            self.show_samples(self._samples)

    # Checkpoints

    @property
    def policy(self) -> PreTrainedModel | PeftModel:
        return self.accelerator.unwrap_model(self.model).policy

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model)
        whole = dict(model.named_parameters()) if state_dict is None else state_dict  # given where they are divided
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        trained = {name: whole[name].detach().cpu().contiguous() for name in names}
        save_file(trained, folder / _WEIGHTS)
        state = {
            "kl_coef": self.kl_coef,
            "seen": {name: seen.to_dict() for name, seen in self.seen.items()},
            "constant": self._constant,
            "total_tokens": self._total_tokens,
        }
        (folder / _STATE).write_text(json.dumps(state) + "\n", encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        actor_critic = self.accelerator.unwrap_model(model or self.model)
        kept = load_file(folder / _WEIGHTS)
        with torch.no_grad():
            for name, parameter in actor_critic.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(kept[name])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        state = json.loads(Path(checkpoint, _STATE).read_text(encoding="utf-8"))
        self.kl_coef, self._constant, self._total_tokens = state["kl_coef"], state["constant"], state["total_tokens"]
        self.seen = {name: Moments(**seen) for name, seen in state["seen"].items()}


class PPOTrainer(Managed, ActorCriticTrainer):
    """Proximal policy optimization on prompts."""

    @property
    def trained_model(self) -> PreTrainedModel | PeftModel:
        return self.policy


def _lengths(episodes: Episodes) -> list[int]:
    """Of prompts with their completions, in tokens."""
    return [len(p) + len(c) for p, c in zip(episodes.prompts, episodes.completions, strict=True)]


def _collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: [row[name] for row in rows] for name in ("prompt", _IDS)}
