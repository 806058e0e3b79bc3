"""The base of methods that learn from their own completions: it draws, scores, updates, logs and saves.

A method answers two questions: what is learnt from a rollout (`learn_from`), and which loss a pass has (`losses`). Its
class is one of `Managed` and, after it, `OnPolicyTrainer`.

A step of transformers' Trainer is one rollout and all updates made with it: what the trainer does after `training_step`
(clip, step, schedule, log, save) is done with the last mini-batch. A checkpoint therefore never stands in the middle of
a rollout, and learning rates follow rollouts.
"""

from __future__ import annotations

import json
import math
import time
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback

from alignctl.data.lengths import RowLengths
from alignctl.data.messages import is_messages
from alignctl.data.token_columns import PromptIds
from alignctl.engine.forward import bare, in_step, is_divided, takes_packed_rows
from alignctl.models.adapters import Adapters
from alignctl.models.dropout import disable_dropout
from alignctl.models.lora import make_lora_fast
from alignctl.models.sharding import gather_as_run
from alignctl.monitor.common import common_metrics
from alignctl.rollout.drawing import Drawn, draw_completions, why_cache_grows
from alignctl.rollout.episodes import Episodes, Segment, episodes_of, unlearnt
from alignctl.rollout.rewards import RewardModel, Score, of_scored
from alignctl.rollout.scoring import Scoring, build_sources
from alignctl.rollout.streams import seed_of
from alignctl.run.paths import StagePaths
from alignctl.trainers.base.columns import ROW
from alignctl.trainers.base.divided import divide_model
from alignctl.trainers.base.everywhere import from_all
from alignctl.trainers.base.fitting import try_pass
from alignctl.trainers.base.last_batch import own_rows, rows_of_last
from alignctl.trainers.base.on_engine import compile_as_wanted, pass_tokens, said_of_passes
from alignctl.trainers.on_policy.config import OnPolicyConfig
from alignctl.trainers.on_policy.experience import Experience
from alignctl.trainers.on_policy.failing import scores_explained
from alignctl.trainers.on_policy.log import RolloutLog
from alignctl.trainers.on_policy.models import Batch, Outputs, PolicyModel, lay_out, policy_logps
from alignctl.trainers.on_policy.outage import Outage
from alignctl.trainers.on_policy.setup import (
    PROMPT_IDS,
    EachSeveralTimes,
    check_length,
    check_rollout,
    collate,
    put_engine_under,
    tokenize_prompts,
)
from alignctl.trainers.on_policy.update import PassLogs, PassLoss, Update, as_many, mini_batches, passes_of

_TOLD = ("counted", "passes")
_STATE, _WEIGHTS = "on_policy.json", "trained"


class OnPolicyTrainer(Trainer):
    """Draws, scores and updates; to be managed."""

    has_reference: bool
    """Whether the method needs log-probabilities of a reference."""
    rounds = 1
    """Times that a rollout is gone through."""
    policy_learns = True
    """Whether the policy is moved by this step."""
    entropy_learns = False
    """Whether the loss has the policy's entropy in it."""
    entropy_in_update = False
    """Whether passes of the update say the entropy, though the loss has it not."""
    stops_at_constant_scores = True
    """Whether training ends where all completions of some rollouts have the same score."""
    in_checkpoints: tuple[str, ...] = ()
    """Numbers of the method's own, by their attributes, that a checkpoint holds."""
    lengths_of: dict[str, RowLengths]
    """Of the prompts that it was given, by what they are for: `train` and `eval`."""
    asked: dict[str, list[Score]]
    """Scores of the present rollout by each source, by its name."""

    def __init__(
        self,
        *,
        model: PreTrainedModel | PolicyModel,
        args: OnPolicyConfig,
        train_dataset: Dataset,
        processing_class: PreTrainedTokenizerBase,
        ref_model: PreTrainedModel | None = None,
        reward_model: nn.Module | None = None,
        reward_processing_class: PreTrainedTokenizerBase | None = None,
        reward_statistics: dict[str, float] | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        eval_dataset: Dataset | None = None,
    ):
        """`model` is the policy, or has it with what learns beside it."""
        if not isinstance(model, PolicyModel):
            model = PolicyModel(model if peft_config is None else get_peft_model(model, peft_config))
        frozen = [one for one in (ref_model, reward_model) if one is not None]
        trained = list(model.models.values())
        whole = [bare(one) for one in [*trained, *frozen] if isinstance(one, PreTrainedModel | PeftModel)]
        self.notices.append(put_engine_under(whole, args))
        for one in trained:
            if isinstance(one, PeftModel):
                make_lora_fast(one)
            if args.disable_dropout:
                disable_dropout(one)
        for one in frozen:
            one.eval().requires_grad_(False)
        check_length(args, {**model.models, "reference": ref_model})
        self.ref_model, self.reward_model = ref_model, reward_model
        if self.row_columns.pop(PROMPT_IDS, None) is not None:
            self.notices.append(f"the column `{PROMPT_IDS}` of the rows is left out: its name is alignctl's own")
        prompts, lengths = tokenize_prompts(train_dataset, processing_class, self.token_columns(args))
        self.lengths_of["train"] = lengths
        if eval_dataset is not None:
            _, self.lengths_of["eval"] = tokenize_prompts(eval_dataset, processing_class, self.token_columns(args))
        super().__init__(
            model=model,
            args=args,
            train_dataset=prompts,
            processing_class=processing_class,
            data_collator=collate,
            callbacks=callbacks,
        )
        divide_model(self)
        for one in frozen:
            gather_as_run(one, self.accelerator)
            one.to(self.args.device)
        compiled = [compile_as_wanted(one, args) for one in whole]
        self.notices += compiled[:1] if compiled[0] else []
        sources = build_sources(
            args,
            processing_class,
            list(self.row_columns),
            reward_model,
            reward_processing_class,
            conversations=is_messages(train_dataset[0]["prompt"]),
            max_tokens=pass_tokens(args),
        )
        if any(isinstance(source, RewardModel) and source.same_tokens for source in sources):
            check_length(args, {"reward model": reward_model})
        self.scoring = Scoring(args, sources, reward_statistics)
        self.outage = Outage(self)
        self._longest = max(map(len, self.train_dataset[PROMPT_IDS]), default=0) + args.response_length
        self.notices.append(said_of_passes(args, self._longest))
        self._vllm = None
        if args.generation == "vllm":
            from alignctl.rollout.vllm import VLLM

            sequences = args.per_device_train_batch_size
            self._vllm = VLLM(model.policy, processing_class, self.accelerator, args, sequences)
        elif args.generation != "continuous" and (reason := why_cache_grows(model.policy)):
            self.notices.append(f"completions are drawn with a cache that grows, because {reason}")
        self.rollouts = RolloutLog()
        self._total_tokens = 0
        self._first_pass: tuple[list[int], Outputs] | None = None
        self._packed = all(takes_packed_rows(one) for one in (*trained, ref_model) if one is not None)

    @classmethod
    def token_columns(cls, args: OnPolicyConfig, *more: Any) -> PromptIds:
        """What rows are made into."""
        return PromptIds(args.max_prompt_length)

    # What a method says

    @abstractmethod
    def learn_from(self, episodes: Episodes, scores: list[Score]) -> Experience:
        """What the rollout is worth; `outputs_of` says what the models make of it."""

    @abstractmethod
    def losses(self, outputs: Outputs, experience: Experience) -> PassLoss:
        """The loss of the tokens of a pass, `[tokens]` each."""

    def counted(self, episodes: Episodes, members: list[int]) -> float:
        """What the loss of a mini-batch is divided by, once added up over the processes: its tokens that are learnt
        from. Long completions then count for what they hold."""
        return sum(sum(episodes.trained[member]) for member in members)

    def log_rollout(self, episodes: Episodes, experience: Experience, scores: list[Score]) -> None:
        """Notes what a rollout was like, under the method's names."""
        self.rollouts.add_rollout(episodes, experience, self.asked, scores)

    def add_up(self, value: Tensor) -> Tensor:
        """Over all processes."""
        return self.accelerator.reduce(value, "sum")

    # A step

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Draws completions, scores them, and updates what is trained; the gradient of the last mini-batch is left for
        the trainer to step with."""
        began = time.perf_counter()
        self.optimizer.train()  # of a schedule-free one: what draws is what learns
        own, _ = self._own_share(inputs, None)
        drawn = self.outage.drawn_before(own[PROMPT_IDS])
        if drawn is None and self._vllm is not None:
            own, drawn = self._own_share(inputs, self._vllm.draw(inputs[PROMPT_IDS]))
        episodes = self._roll_out(own, drawn)
        rolled_out = time.perf_counter()
        with scores_explained(self.args.output_dir):
            episodes, self.asked = self.ask(episodes)
        updates, experience = self._learn(episodes)
        updating = time.perf_counter()
        loss = self._update(model, episodes, experience, updates)
        ended, tokens = time.perf_counter(), sum(map(len, episodes.completion_ids))
        self.rollouts.add("tokens_per_s/rollout", tokens / (rolled_out - began))
        self.rollouts.add("tokens_per_s/update", tokens * self.rounds / (ended - updating))
        self.rollouts.add("step_time", ended - began)
        return loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, count = super().get_batch_samples(*args, **kwargs)
        self._left = rows_of_last(self, len(self.train_dataset) * self.args.num_generations)
        return batches, count

    def _own_share(self, inputs: dict[str, Any], drawn: Drawn | None) -> tuple[dict[str, Any], Drawn | None]:
        """The prompts that are this process's, and what was drawn to them; where there are none, a prompt that counts
        for nothing."""
        self._of_all, self.rollouts.counts = len(inputs["prompt"]) * self.accelerator.num_processes, True
        if self._left is None:
            return inputs, drawn
        self._of_all, own = self._left, own_rows(self, self._left)
        self.rollouts.counts = own > 0
        count = own or self.args.num_generations
        columns = {name: values[:count] for name, values in inputs.get(ROW, {}).items()}
        rows = {name: values[:count] for name, values in inputs.items() if name in ("prompt", PROMPT_IDS)}
        drawn = drawn.first(count) if drawn is not None else None
        return inputs | rows | ({ROW: columns} if columns else {}), drawn

    def _roll_out(self, inputs: dict[str, Any], drawn: Drawn | None = None) -> Episodes:
        if drawn is None:
            prompts = inputs[PROMPT_IDS]
            drawn = self.draw(prompts, range(len(prompts)))
        args, columns = self.args, inputs.get(ROW, {})
        episodes = episodes_of(
            inputs["prompt"], inputs[PROMPT_IDS], drawn, self.processing_class, columns, args.num_generations
        )
        numbers = [number for batch in self.row_numbers for number in batch.tolist()]
        episodes = replace(episodes, row_numbers=numbers[: len(episodes.prompts)])
        return episodes if self.rollouts.counts else unlearnt(episodes)

    def draw(self, prompts: list[list[int]], places: Sequence[int]) -> Drawn:
        """By transformers. Random numbers go by the places of completions among those of all processes: so the same are
        drawn however a rollout is divided.

        Args:
            places: Among the completions of this process.
        """
        first = self.accelerator.process_index * self.args.train_batch_size
        seeds = [seed_of(self.args.seed, self.state.global_step, first + place) for place in places]
        self.policy.eval()
        with self.accelerator.autocast():
            return draw_completions(self.policy, self.processing_class, prompts, self.args, seeds)

    @torch.no_grad()
    def ask(self, episodes: Episodes) -> tuple[Episodes, dict[str, list[Score]]]:
        """Scores of a rollout by each source, and the rollout that is learnt from."""
        self.model.eval()
        return episodes, self.outage.ask(episodes)

    @torch.no_grad()
    def _learn(self, episodes: Episodes) -> tuple[list[Update], Experience]:
        rewards, counts = self.asked, self.rollouts.counts
        updates = self._updates(episodes)
        numbers = {f"{number} {key}": one[key] for number, one in enumerate(map(asdict, updates)) for key in _TOLD}
        numbers |= self.scoring.numbers(rewards if counts else {name: [] for name in rewards})
        everyone = from_all(self.accelerator, numbers)
        updates = [
            replace(
                one, counted=float(everyone[f"{number} counted"].sum()), passes=int(everyone[f"{number} passes"].max())
            )
            for number, one in enumerate(updates)
        ]
        scores = self.scoring.combined(episodes, rewards, everyone)
        experience = self.learn_from(episodes, scores)
        self.log_rollout(episodes, experience, scores)
        for name, fraction in self.scoring.cut_fracs().items():
            self.rollouts.add_mean(name, [fraction])
        self.rollouts.sample(episodes, rewards, scores, self.args.num_sample_completions)
        self._scores = of_scored(scores) if counts else []
        self._tokens = sum(map(len, episodes.completion_ids)) if counts else 0
        return [one for one in updates if one.passes], experience

    def _updates(self, episodes: Episodes) -> list[Update]:
        """The optimizer steps that the rollout is gone through in, as far as this process knows."""
        args, there = self.args, len(episodes.groups) if self.rollouts.counts else 0
        generator = torch.Generator().manual_seed(args.seed + self.state.global_step)
        first = self.accelerator.process_index * args.train_batch_size // args.num_generations
        found = []
        for _ in range(self.rounds):
            for of_all in mini_batches(self._of_all // args.num_generations, args.num_mini_batches, generator):
                part = [group - first for group in of_all if first <= group < first + there]
                members = [member for group in part for member in episodes.groups[group]]
                passes = passes_of(episodes, part, self._pass_tokens(), self._packed)
                found.append(Update(part, self.counted(episodes, members), sum(1 for _ in passes)))
        return found

    def step_numbers(self) -> dict[str, float]:
        """See EndsStepsTogether."""
        scores, own = self._scores, self.rollouts.numbers()
        ends = {"least": min(scores, default=math.inf), "most": max(scores, default=-math.inf)}
        return own | ends | {"scores": len(scores), "tokens": self._tokens}

    def take_step_numbers(self, everyone: Mapping[str, Tensor]) -> None:
        """See EndsStepsTogether."""
        self.rollouts.take(everyone)
        self._total_tokens += int(everyone["tokens"].sum())
        count = int(everyone["scores"].sum())
        if not self.stops_at_constant_scores:
            return
        with scores_explained(self.args.output_dir):
            self.scoring.check_not_constant(float(everyone["least"].min()), float(everyone["most"].max()), count)

    def outputs_of(self, episodes: Episodes) -> Outputs:
        """What the trained models, and the reference where there is one, say of all completions, `pass_tokens` at a
        time: in the order of the completions.

        Where the first step of the update goes through the same completions at once, with the same weights, its forward
        pass is this one, and kept with what its gradient needs.
        """
        model, args = self.accelerator.unwrap_model(self.model), self.args
        parts: dict[int, tuple[Tensor | None, ...]] = {}
        kept = self._first_pass_is_scoring(episodes)
        passes = passes_of(episodes, range(len(episodes.groups)), self._pass_tokens(), self._packed)
        for members in in_step(model, list(passes)):
            batch = self._batch(episodes, members)
            counts = [len(episodes.completion_ids[member]) for member in members]
            with self.accelerator.autocast():
                ref_logps = self._reference_logps(model, batch)
                with torch.set_grad_enabled(kept):
                    outputs = model(
                        batch, args.temperature, self.policy_learns, kept and self.entropy_learns, entropy=True
                    )
            if kept:
                self._first_pass = members, outputs
                outputs = outputs.detach()
            tokens = (outputs.logps, outputs.entropy, outputs.values, ref_logps)
            split = [[None] * len(members) if one is None else one.split(counts) for one in tokens]
            split.append([None] * len(members) if outputs.last_values is None else outputs.last_values)
            parts |= {member: row for member, *row in zip(members, *split, strict=True)}
        *columns, last = zip(*(parts[member] for member in range(len(episodes.prompt_ids))), strict=True)
        logps, entropy, values, ref_logps = (None if one[0] is None else torch.cat(one) for one in columns)
        self.rollouts.add_mean("entropy", entropy)
        return Outputs(logps, entropy, values, None if last[0] is None else torch.stack(last), ref_logps)

    def ref_logps_of(self, episodes: Episodes) -> Tensor | None:
        """What the reference alone says of all completions, `[tokens]` in their order; None without one."""
        if not self.has_reference:
            return None
        model, parts = self.accelerator.unwrap_model(self.model), {}
        passes = passes_of(episodes, range(len(episodes.groups)), self._pass_tokens(), self._packed)
        for members in in_step(model, list(passes)):
            counts = [len(episodes.completion_ids[member]) for member in members]
            with self.accelerator.autocast():
                logps = self._reference_logps(model, self._batch(episodes, members))
            parts |= dict(zip(members, logps.split(counts), strict=True))
        return torch.cat([parts[member] for member in range(len(episodes.prompt_ids))])

    def _pass_tokens(self) -> int:
        return max(pass_tokens(self.args), self._longest)

    def _first_pass_is_scoring(self, episodes: Episodes) -> bool:
        """Not so with dropout. Several processes, and DeepSpeed, have to see each pass through their wrappers, and
        activations are checkpointed in training mode only."""
        args = self.args
        tokens = sum(episodes.tokens_of(group, self._packed) for group in episodes.groups)
        whole = args.num_mini_batches == 1 and tokens <= self._pass_tokens()
        by_itself = self.accelerator.distributed_type == DistributedType.NO
        return whole and by_itself and args.disable_dropout and not args.activation_checkpointing

    def _reference_logps(self, model: PolicyModel, batch: Batch) -> Tensor | None:
        if not self.has_reference:
            return None
        if self.ref_model is not None:
            return policy_logps(self.ref_model, batch, self.args.temperature)
        with Adapters(model.policy).under(None):
            return policy_logps(model.policy, batch, self.args.temperature)

    def _update(
        self, model: nn.Module, episodes: Episodes, experience: Experience, updates: Sequence[Update]
    ) -> Tensor:
        args, sums = self.args, []
        model.train()
        self._fit(episodes, experience, max((update.groups for update in updates), key=len))
        for number, update in enumerate(updates):
            with self.compute_loss_context_manager():
                sums.append(
                    self.halving.compute(
                        self,
                        f"{self.state.global_step + 1}.{number}",
                        self._pass_tokens(),
                        lambda tokens, update=update: self._backward(model, episodes, experience, update, tokens),
                    )
                )
            if not self.policy_learns:  # a gradient of 0 would still decay weights and count for the optimizer's means
                for parameter in self.accelerator.unwrap_model(self.model).policy_parameters:
                    parameter.grad = None
            if number < len(updates) - 1:  # the trainer steps with the last one
                if args.max_grad_norm > 0:
                    self._clip_grad_norm(model)
                self.optimizer.step()
                model.zero_grad()
        return self._log_update(sums, sum(update.counted for update in updates))

    def _fit(self, episodes: Episodes, experience: Experience, groups: list[int]) -> None:
        """Finds in a rehearsal what fits."""
        fitting, self.fitting = self.fitting, None
        if fitting is None:
            return
        self._first_pass = None

        def compute(tokens: int | None) -> None:
            passes = passes_of(episodes, groups, tokens, self._packed)
            largest = max(passes, key=lambda part: episodes.tokens_of(part, self._packed))
            batch = self._batch(episodes, largest)
            try_pass(
                self.accelerator.unwrap_model(self.model),
                lambda model: (
                    self.losses(
                        model(
                            batch,
                            self.args.temperature,
                            self.policy_learns,
                            self.entropy_learns,
                            self.entropy_in_update,
                        ),
                        experience.of(largest),
                    ).loss
                ),
            )

        of_groups = [episodes.groups[group] for group in groups]
        tokens = sum(episodes.tokens_of(group, self._packed) for group in of_groups)
        fitting.find(self, tokens, self._longest, compute)

    def _backward(
        self, model: nn.Module, episodes: Episodes, experience: Experience, update: Update, tokens: int
    ) -> PassLogs:
        """Adds the gradient of a mini-batch to the model's, in passes of at most so many tokens; returns what is
        logged."""
        accelerator, known = self.accelerator, None
        if self._first_pass is not None:
            (members, known), self._first_pass = self._first_pass, None
            passes = [members]
        else:
            passes = as_many(list(passes_of(episodes, update.groups, tokens, self._packed)), update.passes)
        everyone = [member for part in passes for member in part]
        sums: dict[str, Tensor] = {"tokens": experience.mask[everyone].sum().float()}
        completions: dict[str, list[Tensor]] = defaultdict(list)
        by_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        for number, part in enumerate(passes):
            # Gradients are added up over the processes once, with the last pass; DeepSpeed takes its step there, too.
            last = number == len(passes) - 1
            accelerator.sync_gradients = last
            members = part or [0]  # where there is nothing to do, a completion is computed for nothing
            with nullcontext() if last or by_deepspeed else accelerator.no_sync(model):
                outputs = known or model(
                    self._batch(episodes, members),
                    self.args.temperature,
                    self.policy_learns,
                    self.entropy_learns,
                    self.entropy_in_update,
                )
                found = self.losses(outputs, experience.of(members))
                share = accelerator.num_processes / max(update.counted, 1) if part else 0.0
                accelerator.backward(found.loss * share)
            for name, value in {"loss": found.loss, **found.sums}.items():
                sums[name] = sums.get(name, 0.0) + (value.detach() if part else 0.0 * value.detach())
            for name, values in found.completions.items():
                completions[name].append(values if part else values[:0])
        return PassLogs(sums, {name: torch.cat(parts) for name, parts in completions.items()})

    def tried_outputs(self, model: nn.Module, ids: Tensor) -> list[Tensor]:
        """See LooksForUnused."""
        prompt, completion = ids[0, :1].tolist(), ids[0, 1:].tolist()
        episodes = Episodes([prompt], [[Segment(completion)]], [True], [""], [""])
        outputs = model(self._batch(episodes, [0]), 1.0, entropy_gradient=True)
        return [one for one in outputs if one is not None]

    def _batch(self, episodes: Episodes, members: list[int]) -> Batch:
        return lay_out(episodes, members, self._packed, self.processing_class.pad_token_id, self.args.device)

    def get_train_dataloader(self) -> DataLoader:
        check_rollout(self.args, len(self.train_dataset))
        return super().get_train_dataloader()

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        times = self.args.num_generations
        if times == 1:
            return super()._get_train_sampler(train_dataset)
        rows = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return EachSeveralTimes(len(rows), times, seed, epoch=lambda: int(self.state.epoch or 0))

    # What is logged

    def _log_update(self, steps: list[PassLogs], counted: float) -> Tensor:
        """Logs means over the tokens or completions of all mini-batches; returns what this process has of the loss, so
        that its mean over the processes is that of the step."""
        total = {name: sum(step.sums[name] for step in steps) for name in steps[0].sums}
        for name in steps[0].completions:
            end = name.rpartition("_")[2]
            of = end if end in ("min", "max") else "mean"
            self.rollouts.add_of(of, name, torch.cat([step.completions[name] for step in steps]))
        for name in (name for name in total if name not in ("tokens", "loss")):
            self.rollouts.add_sums(name, total[name], total["tokens"])
        return total["loss"] * self.accelerator.num_processes / max(counted, 1)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.rollouts.means()
            logs["num_tokens"] = float(self._total_tokens)
            logs |= common_metrics(logs)
            if self.is_world_process_zero():
                path = StagePaths(Path(self.args.output_dir).parent).samples_while_training
                self.rollouts.write_samples(path, self.state.global_step, self.tell)
                if self.show_samples:
                    self.show_samples(self.rollouts.samples)
            self.rollouts.samples.clear()
        super().log(logs, start_time)

    # Checkpoints

    @property
    def policy(self) -> PreTrainedModel | PeftModel:
        return self.accelerator.unwrap_model(self.model).policy

    def weights_to_save(self) -> tuple[str, dict[str, Tensor]]:
        model = self.accelerator.unwrap_model(self.model)
        return _WEIGHTS, {name: weight for name, weight in model.named_parameters() if weight.requires_grad}

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        stem, weights = self.weights_to_save()
        if not is_divided(self.model):  # elsewhere they are written layer by layer, or in shares
            whole = weights if state_dict is None else state_dict  # given where they are divided
            content = {name: whole[name].detach().cpu().contiguous() for name in weights}
            save_file(content, folder / f"{stem}.safetensors")
        state = {
            "method": {name: getattr(self, name) for name in self.in_checkpoints},
            "scoring": self.scoring.state(),
            "total_tokens": self._total_tokens,
        }
        (folder / _STATE).write_text(json.dumps(state) + "\n", encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        trained = self.accelerator.unwrap_model(model or self.model)
        kept = load_file(Path(resume_from_checkpoint, f"{_WEIGHTS}.safetensors"))
        with torch.no_grad():
            for name, parameter in trained.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(kept[name])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        state = json.loads(Path(checkpoint, _STATE).read_text(encoding="utf-8"))
        for name, value in state["method"].items():
            setattr(self, name, value)
        self.scoring.take_over(state["scoring"])
        self._total_tokens = state["total_tokens"]
