"""What the numbers of a stage advise: a line each, with what to type. Torch-free, pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from alignctl.config.schema import EvalSettings
from alignctl.config.stages import StageConfig

_FEW = 30  # held-out rows: below, a share's 95 % interval is more than 30 points wide
_NEAR = 0.01  # nats an answer
_ALL = 0.99  # of rows
_FASTER, _LONGER = 5, 3  # times the learning rate, and the epochs
_LOSS = 0.002  # of the loss, that a held-out loss falls by at least where something is learnt
_ACCURACY, _ALIKE = ("rewards/accuracies", "accuracy"), "frac_reward_zero_std"  # as trainers log them


def advice(
    stage: StageConfig, result: Mapping[str, Any], rows: Mapping[str, Any], logged: Sequence[Mapping[str, Any]]
) -> list[str]:
    """What to try next.

    Args:
        result: What the stage measured, as result.json has it; empty where it is not done.
        rows: What became of its rows, as data.json has it.
        logged: What its trainer logged, as metrics.jsonl has it.
    """
    if "after" not in result:
        return []
    # Where nothing is left to learn, what would move the model further is no advice.
    movement = [*_saturated(stage, result, logged)] or _still(stage, result)
    return [*_few(stage, result, rows), *_shared(stage, rows), *movement]


def _few(stage: StageConfig, result: Mapping[str, Any], rows: Mapping[str, Any]) -> Iterator[str]:
    """Where numbers are of so few rows that they say little."""
    sure, held, data = result.get("certainty", {}), (rows.get("eval") or {}).get("kept", 0), stage.data
    if held and held < _FEW:
        if data.eval_limit is not None and data.eval_limit < _FEW:
            instead = "`data.eval_limit=null`"
        elif data.eval_path or data.eval_split or data.eval:
            instead = "put more rows into the held-out ones"
        else:
            instead = "`data.eval_rows=100`" if 1 <= data.eval_rows < _FEW else "`data.eval_path=FILE` with others"
        yield f"{held} held-out rows say little: {instead}"
    elif 0 < sure.get("answer_tokens", {}).get("n", 0) == stage.eval.prompts < _FEW:
        yield f"{stage.eval.prompts} sampled answers say little: `eval.prompts={EvalSettings.prompts}`"


def _shared(stage: StageConfig, rows: Mapping[str, Any]) -> Iterator[str]:
    """Where held-out rows stand among the training rows, too."""
    held, data = rows.get("eval") or {}, stage.data
    given = next((key for key in ("eval_split", "eval") if getattr(data, key)), "eval_path")
    if shared := held.get("shared_prompts"):
        yield (
            f"{shared:,} of {held['kept']:,} held-out rows have a prompt that training rows have, too, so their "
            f"numbers are too good: take these out, or hold out others, `data.{given}=null data.eval_rows=256`"
        )


def _still(stage: StageConfig, result: Mapping[str, Any]) -> Iterator[str]:
    """Where the model did not move: it is as near its reference as it was, or nothing on held-out rows has changed."""
    before, after, sure = result.get("before"), result["after"], result.get("certainty", {})
    if not before:
        return
    accuracies = [one for name, one in sure.items() if name in before and one["after"] and name != "kl"]
    if not all(one["within_noise"] for one in accuracies):
        return
    if "kl" in after:
        still, seen = after["kl"] < _NEAR, [f"KL {after['kl']:.2g} nats an answer"]
    elif "loss" in before and "loss" in after:
        still, seen = abs(before["loss"] - after["loss"]) < _LOSS * abs(before["loss"]), ["held-out loss unchanged"]
    else:
        still, seen = bool(accuracies) and all(one["n"] >= _FEW for one in accuracies), []
    if still:
        seen += ["accuracy unchanged"] if accuracies else []
        yield f"the model hardly moved ({', '.join(seen)}): {_more(stage)}"


def _more(stage: StageConfig) -> str:
    """What has a stage move its model further."""
    given, options = stage.trainer, []
    if rate := given.get("learning_rate"):
        options.append(f"`{stage.name}.learning_rate={_FASTER * rate:.2g}`")
    if given.get("max_steps", -1) > 0:
        options.append(f"`{stage.name}.max_steps={_LONGER * given['max_steps']}`")
    else:
        options.append(f"`{stage.name}.num_train_epochs={_LONGER * given.get('num_train_epochs', 3):g}`")
    return " or ".join(options)


def _less(stage: StageConfig) -> str:
    """What has a stage learn less of the same rows."""
    given = stage.trainer
    if given.get("max_steps", -1) <= 0 and given.get("num_train_epochs", 3) > 1:
        return f"`{stage.name}.num_train_epochs=1`"
    rate = given.get("learning_rate")
    return f"`{stage.name}.learning_rate={rate / _FASTER:.2g}`" if rate else f"a lower `{stage.name}.learning_rate`"


def _saturated(stage: StageConfig, result: Mapping[str, Any], logged: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Where there is nothing left to learn, or to see."""
    before, name = result.get("before") or {}, stage.name
    key = next((one for one in ("preference_accuracy", "accuracy") if before.get(one, 0) >= _ALL), None)
    if key:
        yield f"{before[key]:.1%} of the pairs were told apart before training: `data.path=FILE` with harder ones"
        return
    steps = [row for row in logged if "loss" in row]
    found = next((one for one in _ACCURACY if steps and one in steps[-1]), None)
    known = [row for row in steps if found and row.get(found) is not None]
    told = next((i for i in range(len(known)) if all(row[found] >= _ALL for row in known[i:])), len(known))
    if known and len(known) >= _FEW // 3 and told < len(known) / 4:
        yield (
            f"all training pairs are told apart from step {known[told]['step']:,} of {steps[-1]['step']:,} on, the "
            f"rest only widens margins: {_less(stage)}, or harder pairs"
        )
    spread = [value for key, value in result["after"].items() if key.startswith("rewards/") and key.endswith("_std")]
    if spread and not any(spread):
        yield "all answers to held-out prompts score the same: another `reward_funcs`, or harder prompts in `data.path`"
    alike = [row[_ALIKE] for row in steps[len(steps) // 2 :] if row.get(_ALIKE) is not None]
    if alike and sum(alike) / len(alike) >= 0.9:
        yield (
            f"{sum(alike) / len(alike):.0%} of the prompts have completions that all score the same, so nothing is "
            f"learnt from them: prompts that are neither too easy nor too hard, or `{name}.num_generations=16`"
        )
