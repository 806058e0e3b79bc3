"""Checks of what a run reads and where it writes: checkpoints, rows, folders. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from alignctl.checks.checkpoints import (
    check_checkpoint,
    check_dtype,
    check_tokenizer_packages,
    check_trained_weights,
)
from alignctl.checks.code import check_template
from alignctl.checks.hub_data import check_hub_data
from alignctl.checks.mixtures import check_mix, entries_of
from alignctl.checks.values import check_choice, check_value, method_of
from alignctl.config.checkpoints import describe
from alignctl.config.schema import MISSING, QUANTIZED
from alignctl.config.stages import first_stage, merged_section, names_rows
from alignctl.config.suggest import did_you_mean
from alignctl.data.files import BadFile
from alignctl.data.formats import FORMATS, KINDS, accepted_kinds
from alignctl.data.mapping import how_to_read
from alignctl.data.messages import BadRow, is_messages
from alignctl.data.settings import DataSettings
from alignctl.data.sources import (
    BUILTIN_SOURCES,
    check_url,
    files_of,
    is_hub_id,
    is_on_this_machine,
    is_url,
    peek_rows,
    same_content,
    shown,
)
from alignctl.data.splits import overlap
from alignctl.data.templates import TEMPLATES, template_file
from alignctl.errors import Problem
from alignctl.methods.registry import Method


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_texts(value: Any) -> bool:
    return isinstance(value, Mapping) and all(map(_is_text, value.values()))


_MAKES = {"use": _is_text, "columns": _are_texts, "template": _is_text}
"""What `data` says of how rows are made of those of a file, where it is of its type; others are reported with it."""


def check_run_dir(config: Mapping[str, Any]) -> Iterator[Problem]:
    """Whether the folder of the run is there or can be made."""
    path = config.get("run_dir")
    if not isinstance(path, str):
        return
    place = Path(path).expanduser().absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        yield Problem(f"`run_dir={path}`: {place} is not a folder that can be written to")


def check_model(config: Mapping[str, Any], name: str) -> Iterator[Problem]:
    method = method_of(config, name)
    assert method is not None
    model, peft = merged_section(config, name, "model"), merged_section(config, name, "peft")
    yield from check_dtype(model, peft)
    if any(not str(token).strip() for token in model.get("add_tokens") or []):
        yield Problem("`model.add_tokens` has a token without a character", "take it out")
    if isinstance(template := model.get("chat_template"), str):
        yield from _chat_template(template)
    elif isinstance(source := model.get("tokenizer") or model.get("path"), str):
        yield from _own_template("model.tokenizer" if model.get("tokenizer") else "model.path", source)
    if isinstance(tokenizer := model.get("tokenizer"), str):
        if not Path(tokenizer).expanduser().exists() and not is_hub_id(tokenizer):
            yield Problem(f"`model.tokenizer={tokenizer}`: there is no such file or folder")
        yield from check_tokenizer_packages("model.tokenizer", tokenizer)
    own = config[name].get("model")
    own = own if isinstance(own, Mapping) else {}
    if config[name].get("from") is not None:
        for key in ("path", "revision", "scratch"):
            if own.get(key) is not None:
                start = config[name]["from"]
                yield Problem(
                    f"`{name}.model.{key}` would have no effect: `{name}` starts from the model of `{start}`",
                    f"set `{name}.from=null` to start from a model of its own",
                )
        return
    path, scratch = model.get("path"), model.get("scratch")
    where = f"{name}.model.path" if "path" in own else "model.path"
    if path == MISSING:
        yield Problem(f"`{where}` must be given: a checkpoint folder or a Hub id", f"add `{where}=...`")
    elif path is None and scratch is None:
        yield Problem(f"stage `{name}` has no model to start from", f"give `{where}=...`")
    elif path is not None and scratch is not None:
        yield Problem(f"`{where}` and `model.scratch` exclude each other", "set one of them to null")
    elif isinstance(path, str):
        yield from check_checkpoint(where, path, method.trained, True, model.get("revision"))
        yield from check_trained_weights(where, path, model, peft)
        if model.get("tokenizer") is None:
            yield from check_tokenizer_packages(where, path)
    elif isinstance(scratch, Mapping):
        yield from _scratch(scratch)
        if (kind := peft.get("type")) in QUANTIZED:
            yield Problem(
                f"`peft.type={kind}` holds the weights of a checkpoint in 4 bits, and there is none to start from"
            )


def _chat_template(given: str) -> Iterator[Problem]:
    """Whether a chat template is there: by name, as a file, or as text."""
    file = template_file(given)
    if file is not None and not file.is_file():
        yield Problem(
            f"`model.chat_template={given}`: there is no such template or file",
            did_you_mean(given, TEMPLATES, prefix="model.chat_template="),
        )
    elif given not in TEMPLATES:
        yield from _jinja("model.chat_template", given, file)


def _jinja(where: str, text: str, file: Path | None) -> Iterator[Problem]:
    """Whether a text, or the file where there is one, is a chat template."""
    try:
        text = text if file is None else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        yield Problem(f"`{where}={file}` cannot be read: {error}")
        return
    yield from check_template(where if file is None else f"{where}={file}", text)


def _own_template(where: str, source: str) -> Iterator[Problem]:
    """Whether the chat template that comes with a tokenizer is one, as far as it is on this machine."""
    file = Path(source).expanduser() / "chat_template.jinja"
    given = (describe(source, "tokenizer_config.json") or {}).get("chat_template")
    if file.is_file():
        yield from _jinja(where, "", file)
    elif isinstance(given, str):
        yield from _jinja(f"{where}={source}: chat_template", given, None)


def check_data(config: Mapping[str, Any], name: str) -> Iterator[Problem]:
    method = method_of(config, name)
    assert method is not None
    data = merged_section(config, name, "data")
    own = config[name].get("data")
    where = f"{name}.data" if isinstance(own, Mapping) and names_rows(own) else "data"
    yield from check_mix(config, name, where)
    yield from check_hub_data(data, where)
    if data.get("path", MISSING) in (MISSING, None) and data.get("from") is None and data.get("mix") is None:
        yield Problem(f"`{where}.path` must be given: a file or a Hub id", f"add `{where}.path=...`")
    if data.get("eval_path") and data.get("eval_split"):
        yield Problem(f"`{where}.eval_path` and `{where}.eval_split` exclude each other")
    elif data.get("eval_path") and (same := _same_rows(data.get("path"), data["eval_path"])):
        yield Problem(f"`{where}.eval_path` is {same}", f"leave it out: rows of `{where}.path` are held out")
    elif data.get("eval_split") and data["eval_split"] == data.get("split", DataSettings.split):
        yield Problem(
            f"`{where}.eval_split={data['eval_split']}` is the split that is trained on",
            f"leave it out: rows of `{where}.split` are held out",
        )
    elif _overlap(split := data.get("split", DataSettings.split), held := data.get("eval_split")):
        yield Problem(
            f"`{where}.eval_split={held}` has rows of `{where}.split={split}`, which is trained on",
            "take parts that have no row in common: "
            f"""`'{where}.split="train[:90%]"' '{where}.eval_split="train[90%:]"'`""",
        )
    if sets := data.get("eval"):
        for key in ("eval_path", "eval_split", "eval_rows"):
            if data.get(key):
                yield Problem(f"`{where}.eval` and `{where}.{key}` exclude each other", "take one of them out")
        for named in sets if isinstance(sets, Mapping) else ():
            if not str(named).isidentifier():
                yield Problem(f"`{where}.eval`: `{named}` cannot be the name of a set", "use letters, digits and `_`")
    elif "eval_rows" in data and (
        data.get("eval_path") or data.get("eval_split") or data.get("path") in BUILTIN_SOURCES
    ):
        yield Problem(f"`{where}.eval_rows` would have no effect: held-out rows are given", f"set `{where}.eval_limit`")
    eval_rows = data.get("eval_rows")
    if isinstance(eval_rows, float) and eval_rows >= 1:
        yield Problem(
            f"`{where}.eval_rows={eval_rows}` must be a whole number, or a share below 1",
            f"set `{where}.eval_rows={round(eval_rows)}`",
        )
    row_format = data.get("format", "auto")
    if problems := list(check_choice(f"{where}.format", row_format, ["auto", *FORMATS])):
        yield from problems
        return
    kinds = {"holds": data.get("holds"), "format": FORMATS[row_format].kind if row_format in FORMATS else None}
    for key, holds in kinds.items():
        if holds in KINDS and holds not in accepted_kinds(method.data_kind, data.get("use")):
            yield Problem(
                f"`{where}.{key}={data[key]}`: these rows are {holds} ({KINDS[holds]}), and the method `{method.name}` "
                f"needs {method.data_kind} ({KINDS[method.data_kind]})",
                f"choose other data, or another method for `{name}`",
            )
            return
    if data.get("use") and method.data_kind != "demonstrations":
        yield Problem(
            f"`{where}.use={data['use']}` would have no effect: `{name}` learns from {method.data_kind}", "take it out"
        )
        return
    template = _has_chat_template(config, name)
    for key in ("path", "eval_path"):
        if data.get(key) != MISSING and _is_path(data.get(key)):
            yield from _rows(f"{where}.{key}", data[key], data, method, template)
    for named, path in data["eval"].items() if isinstance(data.get("eval"), Mapping) else ():
        if _is_path(path):
            yield from _rows(f"{where}.eval.{named}", path, data, method, template)
            if same := _same_rows(data.get("path"), path):
                yield Problem(f"`{where}.eval.{named}` is {same}", "leave it out")
    for number, entry in enumerate(entries_of(data)):
        of = f"{where}.mix[{number}]"
        if _is_path(entry.get("path")):
            problems = list(check_choice(f"{of}.format", entry.get("format", "auto"), ["auto", *FORMATS]))
            yield from problems or _rows(f"{of}.path", entry["path"], data | entry, method, template)
        if data.get("eval_path") and (same := _same_rows(entry.get("path"), data["eval_path"])):
            yield Problem(f"`{where}.eval_path` is {same}", f"leave it out: rows of `{where}.mix` are held out")
    if data.get("eval_split") and _is_path(data.get("path")) and is_on_this_machine(data["path"]):
        yield Problem(f"`{where}.eval_split` is for Hub data sets", f"give the held-out file as `{where}.eval_path`")


def _overlap(split: Any, other: Any) -> bool:
    """Whether splits have rows in common; what is no text is reported with its type."""
    return _is_text(split) and _is_text(other) and overlap(split, other)


def _is_path(value: Any) -> bool:
    """Whether it is a path or several; anything else is reported with its type."""
    return isinstance(value, str) or isinstance(value, list) and all(map(_is_text, value))


def _same_rows(path: Any, other: Any) -> str | None:
    """What held-out rows are to those that are trained on, where they are no others; None where they are."""
    if path == other:
        return "the file that is trained on"
    if not _is_path(path) or not _is_path(other) or not all(map(is_on_this_machine, (path, other))):
        return None
    try:
        files, others = files_of(path), files_of(other)
        pairs = [(file, held_out) for file in files for held_out in others]
        for file, held_out in pairs:
            which = "the file" if len(pairs) == 1 else f"{file}, a file"
            if file.samefile(held_out):
                return f"{which} that is trained on, by another name"
            if same_content(file, held_out):
                return f"a copy of {which} that is trained on"
    except (BadFile, OSError):
        pass  # reported where the files are looked at
    return None


def _scratch(scratch: Mapping[str, Any]) -> Iterator[Problem]:
    known = {"vocab_size": "int", "config": "dict"}
    for key in scratch:
        if key not in known:
            yield Problem(f"unknown key `model.scratch.{key}`", did_you_mean(key, known, prefix="model.scratch."))
    for key, annotation in known.items():
        yield from check_value(f"model.scratch.{key}", scratch.get(key, MISSING), annotation)
    config = scratch.get("config")
    if isinstance(config, Mapping) and "model_type" not in config:
        yield Problem("`model.scratch.config.model_type` must be given", "for example `llama`")
    if isinstance(config, Mapping):
        yield from _sizes(config)


_WHOLE = (
    "hidden_size",
    "num_attention_heads",
    "num_hidden_layers",
    "intermediate_size",
    "num_key_value_heads",
    "head_dim",
)


def _sizes(config: Mapping[str, Any]) -> Iterator[Problem]:
    """Whether the sizes of a model that starts from random weights go together."""
    where = "model.scratch.config"
    sizes = {key: config[key] for key in _WHOLE if config.get(key) is not None}
    wrong = [key for key, size in sizes.items() if not isinstance(size, int) or isinstance(size, bool) or size < 1]
    for key in wrong:
        yield Problem(f"`{where}.{key}` must be a whole number of at least 1, got `{sizes[key]}`")
    hidden, heads, shared = (sizes.get(key) for key in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    if wrong or not heads:
        return
    if hidden and not sizes.get("head_dim") and hidden % heads:
        yield Problem(
            f"`{where}.hidden_size={hidden}` is no multiple of `{where}.num_attention_heads={heads}`",
            f"set `{where}.hidden_size={max(hidden // heads, 1) * heads}`",
        )
    if shared and heads % shared:
        yield Problem(f"`{where}.num_attention_heads={heads}` is no multiple of `{where}.num_key_value_heads={shared}`")


def _has_chat_template(config: Mapping[str, Any], name: str) -> bool:
    """Whether the tokenizer of a stage has a chat template, as far as it is on this machine; else it is believed to."""
    model = merged_section(config, first_stage(config, name), "model")
    model |= {key: value for key, value in merged_section(config, name, "model").items() if key != "path"}
    source = model.get("tokenizer") or model.get("path")
    if model.get("chat_template") or not isinstance(source, str):
        return True
    described = describe(source, "tokenizer_config.json")
    return (
        described is None
        or "chat_template" in described
        or Path(source).expanduser().joinpath("chat_template.jinja").is_file()
    )


def _rows(
    where: str, path: str | list[str], data: Mapping[str, Any], method: Method, has_template: bool
) -> Iterator[Problem]:
    """Whether a source of rows exists, its first row suits the method, and the tokenizer can write it."""
    if is_url(path):
        try:
            check_url(path)
        except BadFile as error:
            yield Problem(f"`{where}={path}`: {error}", error.hint)
        return
    if not is_on_this_machine(path):
        if path not in BUILTIN_SOURCES and not is_hub_id(path):
            yield Problem(f"unknown `{where}={path}`", did_you_mean(path, BUILTIN_SOURCES))
        return
    try:
        if rows := peek_rows(files_of(path)[0]):
            given = {key: data[key] for key, is_taken in _MAKES.items() if is_taken(data.get(key))}
            beside = [column.name for column in method.row_columns]
            found = how_to_read(rows, method.data_kind, data.get("format", "auto"), beside=beside, **given)
            first = found.format.rows({k: v for k, v in found.mapped(rows[0]).items() if v is not None})[0]
            if not has_template and found.format.as_text is None and any(map(is_messages, first.values())):
                yield Problem(
                    f"`{where}={shown(path)}` holds conversations, but the tokenizer has no chat template",
                    "give one with `model.chat_template=FILE` (Jinja), or start from a chat model",
                )
    except (BadRow, KeyError):
        pass  # the first row cannot be used; the worker says which cannot
    except BadFile as error:
        yield Problem(f"`{where}={shown(path)}`: {error}", error.hint)
    except ValueError as error:
        yield Problem(f"`{where}={shown(path)}`: {error}")
