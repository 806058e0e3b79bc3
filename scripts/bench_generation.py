"""How fast are the ways to draw PPO's completions? Draws the same number from one model with all, in turns.

    python scripts/bench_generation.py                           # a small model, one CPU core
    python scripts/bench_generation.py --peft lora               # with an adapter on all linear layers
    python scripts/bench_generation.py --ends 16                 # completions of many lengths
    python scripts/bench_generation.py --device cuda --model 8b --peft lora --prompts 32 --prompt-length 256 \\
        --length 256

Weights are random and made on the device, tokens are numbers: nothing is fetched. The first turn of each way is a
warm-up and stands in the table by itself. Seconds are CPU time on a CPU, so that other work on the machine counts
little. The limit is what reading all weights once for each token would take at the rate at which this device copies;
"ms" are those of the whole rollout, prompts included, for one token of all completions. A way that fails says so, and
the others go on.
"""

from __future__ import annotations

import argparse
import gc
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from bench_trainers import LLAMA_3
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from alignctl.engine.forward import bare
from alignctl.models.merging import merged_meanwhile
from alignctl.models.packing import put_packed_attention_on
from alignctl.rollout.decoding import Sampling, decode
from alignctl.rollout.drawing import draw_completions, why_cache_grows
from alignctl.rollout.settings import RolloutSettings

SHAPES = {
    "tiny": (5, 64, 172, 8, 4, 512, True),  # stories260K
    "small": (8, 768, 2048, 12, 12, 4096, True),
    **LLAMA_3,
}
OURS, CONTINUOUS = "transformers", "continuous"
ADAPTERS_ON, GENERATE, STATIC = "fixed cache, adapters on", "generate(), as it comes", "generate(), static, compiled"
WAYS = (OURS, ADAPTERS_ON, CONTINUOUS, GENERATE, STATIC)
_SPECIAL = 3  # the padding, a beginning and an end


@dataclass
class Way:
    """One way to draw, and what was measured of it."""

    draw: Callable[[], Sequence[Sequence[int]]]
    first_s: float = 0.0
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    """Tokens of the longest completion."""
    peak_gib: float = 0.0
    failure: str | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--peft", choices=("none", "lora"), default="none", help="LoRA, rank 16, all linear layers")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--prompt-length", type=int, help="tokens of each prompt; as it comes, of 20 to 119")
    parser.add_argument("--length", type=int, default=64, help="new tokens of a completion, at most")
    parser.add_argument("--ends", type=int, help="one in so many tokens of the vocabulary ends a completion")
    parser.add_argument("--turns", type=int, default=4, help="of each way, the warm-up included")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=None, help="all but what is compiled, on a CPU")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    model, tokenizer = load(arguments, device)
    if reason := why_cache_grows(model):
        print(f"no cache of a fixed size: {reason}")
    prompts = draw_prompts(arguments)
    all_ways = make_ways(arguments, model, tokenizer, prompts)
    chosen = arguments.ways or [name for name in WAYS if device.type == "cuda" or name != STATIC]
    ways = {name: all_ways[name] for name in chosen}
    for turn in range(arguments.turns):
        for name, way in ways.items():
            if way.failure is None:
                measure(name, way, turn, device)
    print(table(ways, weight_bytes(model) / copy_rate(device)))
    print(f"{describe(device)}; {arguments}")


def load(arguments: argparse.Namespace, device: torch.device) -> tuple[nn.Module, PreTrainedTokenizerFast]:
    """The policy as it is in training, in bfloat16 on a GPU, and a tokenizer whose tokens are numbers."""
    layers, width, inner, heads, key_heads, vocabulary, tied = SHAPES[arguments.model]
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=key_heads, tie_word_embeddings=tied, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32
        )
    put_packed_attention_on(model, device)
    # Otherwise none ends: one among so many would now and then.
    model.generation_config.eos_token_id = list(range(_SPECIAL, vocabulary, arguments.ends)) if arguments.ends else None
    if arguments.peft == "lora":
        lora = LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    words = WordLevel({str(number): number for number in range(vocabulary)}, unk_token="0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="0", bos_token="1")
    if arguments.ends:
        tokenizer.eos_token = str(_SPECIAL)
    return model.eval(), tokenizer


def draw_prompts(arguments: argparse.Namespace) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    vocabulary = SHAPES[arguments.model][5]
    lengths = torch.randint(20, 120, (arguments.prompts,), generator=generator).tolist()
    if arguments.prompt_length:
        lengths = [arguments.prompt_length] * arguments.prompts
    return [torch.randint(_SPECIAL, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def make_ways(
    arguments: argparse.Namespace, model: nn.Module, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]]
) -> dict[str, Way]:
    ends = model.generation_config.eos_token_id or []

    def ours(generation: str) -> Callable[[], Sequence[Sequence[int]]]:
        settings = RolloutSettings(response_length=arguments.length, generation=generation)
        return lambda: draw_completions(model, tokenizer, prompts, settings, range(len(prompts))).completions

    def adapters_on() -> Sequence[Sequence[int]]:
        sampling = Sampling(1.0, arguments.length, ends, [], 0, range(len(prompts)))
        return until_end(decode(bare(model), prompts, sampling), ends)

    def generate(**options: str) -> Sequence[Sequence[int]]:
        config = GenerationConfig(
            do_sample=True, top_k=0, top_p=1.0, max_new_tokens=arguments.length, eos_token_id=ends or None,
            pad_token_id=0, **options,
        )  # fmt: skip
        longest, device = max(map(len, prompts)), model.device
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        with torch.no_grad():
            output = bare(model).generate(input_ids=ids, attention_mask=mask, generation_config=config)
        return until_end(output[:, longest:].tolist(), ends)

    def static() -> Sequence[Sequence[int]]:
        with merged_meanwhile(model):
            return generate(cache_implementation="static")

    draws = (ours(OURS), adapters_on, ours(CONTINUOUS), generate, static)
    return {name: Way(draw) for name, draw in zip(WAYS, draws, strict=True)}


def until_end(completions: list[list[int]], ends: Sequence[int]) -> list[list[int]]:
    """Up to and with the first end."""
    stops = [next((i for i, token in enumerate(tokens) if token in ends), len(tokens)) for tokens in completions]
    return [tokens[: stop + 1] for tokens, stop in zip(completions, stops, strict=True)]


def measure(name: str, way: Way, turn: int, device: torch.device) -> None:
    torch.manual_seed(turn)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    began = now(device)
    try:
        completions = way.draw()
        seconds = now(device) - began
    except Exception as error:  # whatever it is, the other ways are still worth their time
        way.failure = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        print(f"{name:28} failed: {way.failure}", flush=True)
        return
    tokens = sum(map(len, completions))
    if turn == 0:
        way.first_s = seconds
        way.peak_gib = peak_bytes(device) / 2**30  # later turns have the graphs of other ways beside them
    else:
        way.seconds.append(seconds)
        way.tokens.append(tokens)
        way.steps.append(max(map(len, completions)))
    print(f"{name:28} {seconds:7.2f} s, {tokens / len(completions):.1f} tokens on average", flush=True)


def table(ways: dict[str, Way], limit_s: float) -> str:
    """Medians of the turns after the first.

    Args:
        limit_s: Seconds that reading all weights once takes.
    """
    rows = [
        "",
        "| | ms a token | tokens/s | of the limit | first turn, s | peak GiB |",
        "|---|---|---|---|---|---|",
    ]
    for name, way in ways.items():
        if way.failure or not way.seconds:
            rows.append(f"| {name} | failed: {way.failure or 'one turn alone'} | | | {way.first_s:.1f} | |")
            continue
        step_s = statistics.median(seconds / steps for seconds, steps in zip(way.seconds, way.steps, strict=True))
        rate = statistics.median(tokens / seconds for tokens, seconds in zip(way.tokens, way.seconds, strict=True))
        rows.append(
            f"| {name} | {step_s * 1e3:.2f} | {rate:,.0f} | {limit_s / step_s:.0%} | {way.first_s:.1f} | "
            f"{way.peak_gib:.2f} |"
        )
    rows += [f"| limit: every weight read once | {limit_s * 1e3:.3g} | | 100% | | |", ""]
    return "\n".join(rows)


def weight_bytes(model: nn.Module) -> int:
    """Of what a token needs: an adapter is in the other weights, and of embeddings that are no head only a row is
    read."""
    policy = bare(model)
    embeddings, head = policy.get_input_embeddings().weight, policy.get_output_embeddings().weight
    weights = [weight for name, weight in policy.named_parameters() if "lora_" not in name]
    return sum(weight.nbytes for weight in weights if weight is head or weight is not embeddings)


def copy_rate(device: torch.device) -> float:
    """Bytes a second that are read and written, at best of a few copies."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(10):
        began = now(device)
        target.copy_(source)
        best = min(best, now(device) - began)
    return 2 * source.nbytes / best


def peak_bytes(device: torch.device) -> int:
    """On a GPU of this turn, on a CPU of the whole process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def now(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def describe(device: torch.device) -> str:
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, one thread"
    return f"{name}, torch {torch.__version__}"


if __name__ == "__main__":
    main()
