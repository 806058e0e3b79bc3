"""How fast are the ways to draw PPO's completions? Draws the same number from one model with both, in turns.

    python scripts/bench_generation.py                                       # stories260K, one CPU core
    python scripts/bench_generation.py --ends 16                             # completions of many lengths
    python scripts/bench_generation.py --device cuda --model 1b --length 128 # a Llama with random weights

The first turn of each is a warm-up. Seconds are CPU time on a CPU, so that other work on the machine counts little.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from bench_ppo import shared
from bench_preference import SHAPES
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from alignctl.models.packing import put_packed_attention_on
from alignctl.rollout.drawing import draw_completions
from alignctl.rollout.settings import RolloutSettings

STORIES = shared() / "models" / "stories260K"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("stories260K", "1b"), default="stories260K")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--length", type=int, default=64, help="new tokens of a completion, at most")
    parser.add_argument("--ends", type=int, help="one in so many tokens of the vocabulary ends a completion")
    parser.add_argument("--turns", type=int, default=6, help="of each way, the warm-up included")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    model = load(arguments.model, device)
    put_packed_attention_on(model, device)  # as it is in training
    if arguments.ends:
        model.generation_config.eos_token_id = list(range(3, model.config.vocab_size, arguments.ends))
    prompts = draw_prompts(arguments.prompts, len(tokenizer))
    rates: dict[str, list[float]] = {"transformers": [], "continuous": []}
    for turn in range(arguments.turns):
        for way, measured in rates.items():
            torch.manual_seed(turn)
            began = now(device)
            settings = RolloutSettings(response_length=arguments.length, generation=way)
            drawn = draw_completions(model, tokenizer, prompts, settings)
            seconds = now(device) - began
            tokens = sum(map(len, drawn.completions))
            if turn:
                measured.append(tokens / seconds)
            print(f"{way:12} {seconds:7.2f} s, {tokens / len(prompts):.1f} tokens on average", flush=True)
    for way, measured in rates.items():
        print(f"{way:12} {statistics.median(measured):,.0f} tokens/s ({min(measured):,.0f} to {max(measured):,.0f})")


def load(name: str, device: torch.device) -> PreTrainedModel:
    if name == "stories260K":
        return AutoModelForCausalLM.from_pretrained(STORIES).to(device).eval()
    torch.manual_seed(0)
    layers, width, inner, heads, key_heads = SHAPES[name]
    config = LlamaConfig(
        vocab_size=32000, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=key_heads, tie_word_embeddings=True,
    )  # fmt: skip
    with device:
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def draw_prompts(count: int, vocabulary: int) -> list[list[int]]:
    """Of 20 to 119 tokens."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(20, 120, (count,), generator=generator).tolist()
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def now(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
