"""What the files of a checkpoint say of it before it is loaded: an adapter, a classifier, quantized weights.

Torch-free. Folders are read, and Hub ids as far as they are in the local cache. checks/ asks before a run, and
models/loading.py again once what was not there has been fetched.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignctl.config.forms import misfit
from alignctl.config.weights import find_broken
from alignctl.data.sources import is_hub_id
from alignctl.errors import Problem
from alignctl.methods.registry import Role

DESCRIPTIONS = ("adapter_config.json", "config.json")
"""The files that are looked at; a checkpoint has one of them or both."""

FOUR_BITS = "bitsandbytes"
"""The quantization that an adapter can be trained on."""

_CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
_CLASSES: dict[Role, str] = {
    "policy": "CausalLM", "reference": "CausalLM",
    "reward_model": "SequenceClassification", "value_model": "SequenceClassification",
}  # fmt: skip
FORMS = {
    "config.json": {
        "architectures?": "list[str]", "model_type?": "str", "max_position_embeddings?": "int", "id2label?": "dict",
        "quantization_config?": "dict", "compression_config?": "dict",
    } | dict.fromkeys(
        ("hidden_size?", "intermediate_size?", "num_hidden_layers?", "num_attention_heads?", "num_key_value_heads?",
         "vocab_size?", "head_dim?"), "int"),
    "adapter_config.json": {
        "base_model_name_or_path?": "str", "task_type?": "str", "peft_type?": "str", "r?": "int",
        "target_modules?": "list[str] | str", "modules_to_save?": "list[str]",
    },
    "tokenizer_config.json": {"chat_template?": "str | list[dict] | dict", "tokenizer_class?": "str"},
    "generation_config.json": {},
}  # fmt: skip
"""What is asked of each of its files."""

_SIZES = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
"""What a checkpoint and the one that it was quantized from have in common."""


def describe(source: str, file: str = "config.json", revision: str | None = None) -> dict[str, Any] | None:
    """A JSON file of a checkpoint; None where there is none on this machine."""
    folder = Path(source).expanduser()
    path = folder / file if folder.is_dir() else _cached(source, file, revision)
    content = _content(path) if path else None
    if not isinstance(content, dict):
        return None
    form = FORMS.get(file, {})
    return {
        key: one for key, one in content.items() if not misfit({key: one}, {f"{key}?": form.get(f"{key}?", "object")})
    }


def find_damage(given: str, source: str, revision: str | None = None) -> Problem | None:
    """What is wrong with the JSON files of a checkpoint in themselves."""
    for name, form in FORMS.items():
        path = _file(source, name, revision)
        flaw = misfit(_content(path), form) if path else None
        if flaw:
            return Problem(f"`{given}`: {name} is damaged: {flaw}", "copy or download the checkpoint again")
    return None


def _content(path: Path) -> Any:
    """Of a JSON file; None where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def describe_model(model: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a section `model` says of the model, or the config.json of its checkpoint; None where that is not on this
    machine."""
    described: Any = None
    if isinstance(model.get("scratch"), Mapping):
        described = model["scratch"].get("config")
    elif isinstance(model.get("path"), str):
        described = describe(model["path"], revision=model.get("revision"))
    return described if isinstance(described, Mapping) else None


def find_flaw(given: str, source: str, role: Role, trained: bool, revision: str | None = None) -> Problem | None:
    """The first thing because of which a checkpoint cannot be what it is given as, as far as its files tell.

    Args:
        given: The setting with its value, or what else people know it by.
        source: Folder or Hub id.
        trained: Whether the model of that role is the one that learns: a head that scores may then start at random.
    """
    if found := _in_shares(given, source) or find_damage(given, source, revision):
        return found
    if adapter := describe(source, "adapter_config.json", revision):
        return _an_adapter(given, source, role, adapter)
    described = describe(source, "config.json", revision) or {}
    return _another_head(given, described, role, trained) or _unknown_quantization(given, described) or _no_safetensors(
        given, source, role
    ) or _broken_weights(given, source, revision)  # fmt: skip


def quantization(described: Mapping[str, Any]) -> str | None:
    """How the weights of a checkpoint are quantized, by the name that transformers has for it; None where they are not.

    Args:
        described: Its config.json.
    """
    how = described.get("quantization_config") or described.get("compression_config")
    if not isinstance(how, Mapping):
        return None
    if how.get("load_in_8bit"):
        return "bitsandbytes in 8 bits"
    return str(how.get("quant_method") or (FOUR_BITS if how.get("load_in_4bit") else "in an unknown way"))


def find_flaw_of_training(
    given: str, described: Mapping[str, Any], adapter: bool, merge_into: str | None, keeps_adapter: bool
) -> Problem | None:
    """What keeps the weights of a checkpoint from being trained, or what is trained on them from being saved.

    Args:
        given: As above.
        described: Its config.json.
        adapter: Whether an adapter is trained, and not all weights.
        merge_into: The checkpoint that the adapter is to be merged into, where that is another.
        keeps_adapter: Whether it is not merged at all.
    """
    how = quantization(described)
    if merge_into and described and how is None:
        return Problem(
            f"`model.merge_into={merge_into}` would have no effect: the weights of `{given}` are not quantized",
            "take `model.merge_into` out",
        )
    if how != FOUR_BITS:
        return None
    if not adapter:
        return Problem(
            f"`{given}` is quantized (bitsandbytes): its weights cannot be trained, but an adapter on them can",
            "set `peft=lora`, or name the checkpoint that it was made from",
        )
    if merge_into is None and not keeps_adapter:
        return Problem(
            f"`{given}` is quantized (bitsandbytes): an adapter that is merged into 4 bits is rounded away",
            "name the checkpoint that it was made from, `model.merge_into=...`, or keep the adapter alone, "
            "`model.merge=false`",
        )
    whole = describe(merge_into) if merge_into else None
    key = next((key for key in _SIZES if whole and described.get(key) != whole.get(key)), None)
    return key and Problem(
        f"`model.merge_into={merge_into}` is not what `{given}` was made from: their `{key}` are {whole.get(key)} and "
        f"{described.get(key)}"
    )


def find_missing_packages(given: str, source: str) -> Problem | None:
    """What must be installed to read a tokenizer that is there only in SentencePiece's format.

    transformers (5.23) falls back to tiktoken without them, and asks for that.
    """
    files = [_file(source, name) for name in ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")]
    binary = [file for file in files if file and file.read_bytes()[:1] == b"\n"]  # tiktoken's files are text
    if not binary or _file(source, "tokenizer.json") or all(map(_installed, ("sentencepiece", "google.protobuf"))):
        return None
    return Problem(
        f"`{given}` has its tokenizer only as {binary[0].name}, which the packages `sentencepiece` and `protobuf` read",
        'pip install "alignctl[sentencepiece]"',
    )


def _an_adapter(given: str, source: str, role: Role, adapter: Mapping[str, Any]) -> Problem:
    base = adapter.get("base_model_name_or_path")
    merged = Path(source).expanduser().with_name("model")
    key = given.partition("=")[0]
    message = f"`{given}` is an adapter of {base}, and a whole model is needed"
    if Path(source).name == "adapter" and (merged / "config.json").is_file():
        return Problem(message, f"name the model that it is merged into, `{key}={merged}`")
    scores = adapter.get("task_type") == "SEQ_CLS" or _CLASSES[role] == "SequenceClassification"
    kind, options = ("SequenceClassification", ", num_labels=1") if scores else ("CausalLM", "")
    tokenizer = source if _file(source, "tokenizer_config.json") else base
    loaded = f"M.from_pretrained('{source}'{options}).merge_and_unload()"
    command = _command(f"from peft import AutoPeftModelFor{kind} as M", loaded, str(tokenizer), "MERGED")
    return Problem(message, f"merge it, and name the outcome, `{key}=MERGED`: {command}")


def _another_head(given: str, described: Mapping[str, Any], role: Role, trained: bool) -> Problem | None:
    """What is wrong with the head that a checkpoint was saved with."""
    classes = described.get("architectures") or [""]
    saved, classifies = str(classes[0]), str(classes[0]).endswith(_CLASSIFIERS)
    if _CLASSES[role] == "CausalLM":
        return Problem(
            f"`{given}` is a classifier ({saved}): the weights of an LM head are missing",
            "name a language model",
        ) if classifies else None  # fmt: skip
    labels = described.get("id2label")
    if classifies and labels and len(labels) != 1:
        return Problem(
            f"`{given}` gives {len(labels)} scores ({', '.join(map(str, labels.values()))}), and a reward model "
            "gives one",
            "name a reward model with one label, or train one from a language model",
        )
    if saved.endswith("ForCausalLM") and role == "reward_model" and not trained:
        return Problem(
            f"`{given}` is a language model ({saved}): the weights of a head that scores are missing",
            "train a reward model from it with a stage of the method `reward`, or name one",
        )
    return None


def _unknown_quantization(given: str, described: Mapping[str, Any]) -> Problem | None:
    how = quantization(described)
    if how in (None, FOUR_BITS):
        return None
    return Problem(
        f"`{given}` is quantized ({how}), and of quantized weights alignctl takes those of bitsandbytes in 4 bits",
        "name the checkpoint that it was made from; `peft=qlora` holds that in 4 bits",
    )


def _in_shares(given: str, source: str) -> Problem | None:
    """A checkpoint of a stage, of which each process that trained it under FSDP2 has written its share."""
    folder = Path(source).expanduser()
    if not any(folder.glob("shard-*-model-*.safetensors")):
        return None
    finished = folder.parent.parent / "model"
    hint = f"name the stage's model, `{given.partition('=')[0]}={finished}`" if finished.is_dir() else None
    return Problem(
        f"`{given}` is a checkpoint to continue training from: its weights lie in shares of the processes that wrote "
        "it",
        hint or "run its command again: the stage ends with a model",
    )


def _no_safetensors(given: str, source: str, role: Role) -> Problem | None:
    """What is wrong with a folder that has no weights which cannot run code."""
    folder = Path(source).expanduser()
    if not folder.is_dir() or any(folder.glob("*.safetensors*")):
        return None
    pickles = sorted(folder.glob("pytorch_model*.bin"))
    if not pickles:
        return Problem(f"`{given}` has a config.json, but no weights: there is no *.safetensors")
    convert = _command(
        f"from transformers import AutoModelFor{_CLASSES[role]} as M", f"M.from_pretrained('{source}')", source, "NEW"
    )
    return Problem(
        f"`{given}` has its weights in {pickles[0].name}: other files than safetensors can run code when they are "
        "loaded",
        f"if you trust them, convert them, and name the outcome, `{given.partition('=')[0]}=NEW`: {convert}",
    )


def _broken_weights(given: str, source: str, revision: str | None) -> Problem | None:
    """Files of weights that are not there as a whole; of a Hub id those that are in the local cache."""
    folder = Path(source).expanduser()
    here = folder.is_dir()
    config = None if here else _cached(source, "config.json", revision)
    if not here and config is None:
        return None
    flaw = find_broken(folder if here else config.parent, whole=here)  # type: ignore[union-attr]
    hint = "copy or download the checkpoint again" if here else f"hf download {source} --force-download"
    return Problem(f"`{given}`: {flaw}", hint) if flaw else None


def _command(imported: str, model: str, tokenizer: str, folder: str) -> str:
    """What to type to save a model and its tokenizer into a folder."""
    return (
        f"python -c \"{imported}; from transformers import AutoTokenizer as T; {model}.save_pretrained('{folder}'); "
        f"T.from_pretrained('{tokenizer}').save_pretrained('{folder}')\""
    )


def _file(source: str, name: str, revision: str | None = None) -> Path | None:
    """A file of a checkpoint, where it is on this machine."""
    folder = Path(source).expanduser()
    path = folder / name if folder.is_dir() else _cached(source, name, revision)
    return path if path and path.is_file() else None


def _cached(source: str, name: str, revision: str | None) -> Path | None:
    """A file of a Hub id, where it is in the local cache."""
    if not is_hub_id(source):
        return None
    from huggingface_hub import constants  # takes a hundredth of what all of it does

    if not os.path.isdir(os.path.join(constants.HF_HUB_CACHE, f"models--{source.replace('/', '--')}")):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source, name, revision=revision)
    return Path(found) if isinstance(found, str) else None


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of what it is in
        return False
