"""Completions put in where a trainer would draw them, and what the trainer makes of them in each optimizer step.

Trainers that are given the same completions, and whose weights are moved alike between steps, can be compared step by
step: those of TRL and alignctl's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.trainer import grpo_trainer, rloo_trainer

from alignctl.methods.registry import methods, resolve
from alignctl.rollout.drawing import Drawn
from alignctl.rollout.episodes import Episodes

GROUP, LONGEST = 4, 24
"""Completions of a prompt, and tokens of the longest."""
PROMPTS = ("Once upon a time", "One day a little girl and her dog", "Tom was sad", "The big bird saw a red ball and")
TRL = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}
_FIRST_TOKEN, _END, _VOCABULARY = 259, 2, 512  # what is before are bytes, of which text may be none
_APART, _MOVED = 0.02, 0.002  # of weights: the policy's from the reference's, and from one step to the next


class Step(NamedTuple):
    """An optimizer step, of all processes."""

    loss: float
    gradient: Tensor
    """Of all weights, one after another, before anything is clipped."""
    prompts: Sequence[str] = ()
    """That this process had a part in it with; alignctl's trainers tell."""


def completions() -> dict[str, list[list[int]]]:
    """What is put in: for each prompt completions of random tokens and of many lengths, the longest of them cut off,
    the others with an end."""
    generator, found = torch.Generator().manual_seed(1), {}
    for prompt in PROMPTS:
        lengths = [*torch.randint(2, LONGEST, (GROUP - 1,), generator=generator).tolist(), LONGEST]
        drawn = [torch.randint(_FIRST_TOKEN, _VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
        found[prompt] = [one if len(one) == LONGEST else [*one[:-1], _END] for one in drawn]
    return found


def put_in(prompts: Sequence[str]) -> list[list[int]]:
    """For each of some prompts, those of a group side by side."""
    given = completions()
    return [given[prompt][place % GROUP] for place, prompt in enumerate(prompts)]


@torch.no_grad()
def sampled_logps(model: PreTrainedModel, prompts: Sequence[Sequence[int]], ids: Sequence[Sequence[int]]) -> list[Any]:
    """What a program that computes otherwise might say that completions had when it drew them; of some tokens it says
    nothing. The same of a completion wherever it stands."""
    found = []
    for prompt, completion in zip(prompts, ids, strict=True):
        logits = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
        logps = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
        generator = torch.Generator().manual_seed(sum(completion))
        said = logps + 0.3 * torch.randn(len(completion), generator=generator)
        said[torch.rand(len(completion), generator=generator) < 0.05] = torch.nan
        found.append(said.tolist())
    return found


class Moves(torch.optim.Optimizer):
    """In place of learning: keeps the gradient of each step, and moves the weights by noise that is the same for all
    trainers. A learner would carry the rounding of one step over into the next."""

    def __init__(self, model: torch.nn.Module):
        super().__init__([one for one in model.parameters() if one.requires_grad], {"lr": 0.0})
        self.gradients: list[Tensor] = []

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        weights = self.param_groups[0]["params"]
        self.gradients.append(torch.cat([weight.grad.flatten() for weight in weights]))
        _add_noise(weights, _MOVED, len(self.gradients))


def policy(reference: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The reference with noise, so that nothing cancels."""
    model = AutoModelForCausalLM.from_pretrained(reference, dtype=dtype)
    _add_noise(list(model.parameters()), _APART, 0)
    return model


@torch.no_grad()
def _add_noise(weights: Sequence[Tensor], size: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in weights:
        weight += size * torch.randn(weight.shape, generator=generator).to(weight.dtype)


def _settings(folder: Path) -> dict[str, Any]:
    """Without which numbers could not be the same."""
    return {
        "output_dir": str(folder / "out"), "bf16": False, "use_cpu": True, "max_grad_norm": 0.0, "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True, "num_generations": GROUP, "num_iterations": 2,
    }  # fmt: skip


def steps_of_trl(
    method: str, reference: Path, folder: Path, batch: int, accumulation: int, reward_funcs: Sequence[Any],
    dtype: torch.dtype = torch.float64, sampled: bool = False, prompts: Sequence[str] = PROMPTS, **settings: Any,
) -> list[Step]:  # fmt: skip
    """Optimizer steps of TRL's trainer.

    Args:
        batch: Completions of a micro-batch of each process.
        accumulation: Micro-batches of a step.
        sampled: Whether what drew the completions said their log-probabilities, as vLLM does.
        prompts: In the order in which a rollout is gone through where it is more than a step.
    """
    trainer_class, config_class = TRL[method]

    class PutIn(trainer_class):
        said: list[Tensor]

        def _generate(self, prompts: list[str]) -> tuple[Any, ...]:
            prompt_ids, ids = self.processing_class(text=prompts)["input_ids"], put_in(prompts)
            texts = self.processing_class.batch_decode(ids, skip_special_tokens=True)
            if method == "rloo":
                return prompt_ids, ids, texts
            logps = sampled_logps(policy(reference, dtype), prompt_ids, ids) if sampled else None
            return prompt_ids, ids, None, texts, logps, {}, None, []

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            loss = super().training_step(*args, **kwargs)
            self.said.append(loss)
            return loss

    args = config_class(
        per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, max_completion_length=LONGEST,
        max_steps=2, shuffle_dataset=False, gradient_checkpointing=False, **_settings(folder) | settings,
    )  # fmt: skip
    model = policy(reference, dtype)
    moves = Moves(model)
    trainer = PutIn(
        model=model, args=args, train_dataset=_rows(prompts), reward_funcs=list(reward_funcs),
        processing_class=AutoTokenizer.from_pretrained(reference), optimizers=(moves, None),
    )  # fmt: skip
    trainer.said, trainer.use_vllm = [], sampled
    trainer.train()
    losses = torch.stack(trainer.said).view(len(moves.gradients), accumulation).sum(1)
    everyone = trainer.accelerator.gather(losses).view(-1, len(losses)).mean(0).tolist()
    return [Step(*one) for one in zip(everyone, moves.gradients, strict=True)]


def steps_of_ours(
    method: str, reference: Path, folder: Path, batch: int, reward_funcs: Sequence[str],
    dtype: torch.dtype = torch.float64, sampled: bool = False, rollouts: int = 1, **settings: Any,
) -> list[Step]:  # fmt: skip
    """Optimizer steps of alignctl's trainer.

    Args:
        batch: Completions of a rollout of each process.
        reward_funcs: As `reward_funcs` names them.
        sampled: As above.
    """
    trainer_class, config_class = resolve(methods()[method].trainer), resolve(methods()[method].config_class)

    class PutIn(trainer_class):
        said: list[Tensor]
        prompts: list[list[str]]

        def _roll_out(self, inputs: dict[str, Any], drawn: Drawn | None = None) -> Episodes:
            ids = put_in(inputs["prompt"])
            drawn = Drawn(ids, [one[-1] == _END for one in ids])
            if sampled:
                drawn = drawn._replace(logps=sampled_logps(policy(reference, dtype), inputs["prompt_ids"], ids))
            return super()._roll_out(inputs, drawn)

        def _backward(self, model: Any, episodes: Episodes, experience: Any, update: Any, tokens: int) -> Any:
            found = super()._backward(model, episodes, experience, update, tokens)
            self.said.append(found.sums["loss"] / update.counted)
            self.prompts.append([episodes.prompts[episodes.groups[group][0]] for group in update.groups])
            return found

    args = config_class(
        per_device_train_batch_size=batch, response_length=LONGEST, max_prompt_length=64, max_steps=rollouts,
        reward_funcs=list(reward_funcs),        generation="transformers", **_settings(folder) | settings,
    )  # fmt: skip
    model = policy(reference, dtype)
    moves = Moves(model)
    trainer = PutIn(
        model=model, args=args, train_dataset=_rows(PROMPTS),
        processing_class=AutoTokenizer.from_pretrained(reference),
        ref_model=AutoModelForCausalLM.from_pretrained(reference, dtype=dtype) if args.beta else None,
    )  # fmt: skip
    trainer.said, trainer.prompts, trainer.optimizer = [], [], moves
    trainer.train()
    everyone = trainer.accelerator.reduce(torch.stack(trainer.said), "sum").tolist()
    return [Step(*one) for one in zip(everyone, moves.gradients, trainer.prompts, strict=True)]


def whole_windows(monkeypatch: Any) -> None:
    """Has TRL go through a rollout in the order of its prompts: it tears groups apart, alignctl does not."""
    for module in (grpo_trainer, rloo_trainer):
        monkeypatch.setattr(module, "shuffle_sequence_dict", lambda batch: batch)


def _rows(prompts: Sequence[str]) -> Dataset:
    return Dataset.from_list([{"prompt": prompt} for prompt in prompts])
