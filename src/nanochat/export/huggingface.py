"""A trained model as a folder that transformers loads with `AutoModelForCausalLM` and `AutoTokenizer`.

transformers knows the classic variant as NanoChatForCausalLM (since version 5); weights, logits and ids are then the
same as here. Of the modern variant it lacks parts, and a model without them is another model, so that one is refused.

The files are written from what their readers expect, without transformers, which is not needed to train or export.
"""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from nanochat.checkpoint.trained_model import TrainedModel, load_trained_model
from nanochat.config import ModelConfig
from nanochat.errors import DataError, NanochatError, UsageError
from nanochat.files import (
    MANIFEST_NAME,
    file_entry,
    read_manifest,
    verify_files,
    whole_folder,
    write_json,
    write_manifest,
    write_text,
)
from nanochat.model.gpt import GPT, NORM_EPSILON, ROPE_THETA
from nanochat.model.loss import LOGIT_CAP
from nanochat.runtime import Runtime
from nanochat.tokenizer.huggingface import huggingface_tokenizer
from nanochat.tracking.console import Console, format_count
from nanochat.tracking.metrics import read
from nanochat.training.session import metrics_path
from nanochat.workspace import Stage, Workspace

KIND = "huggingface"
WeightType = Literal["float32", "bfloat16"]

# Our names of weights, or parts of them, and those of NanoChatForCausalLM; `lm_head` has the same in both.
THEIR_NAMES = {
    "transformer.wte": "model.embed_tokens",
    "transformer.h.": "model.layers.",
    "attn.c_q": "self_attn.q_proj",
    "attn.c_k": "self_attn.k_proj",
    "attn.c_v": "self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}

# The tokens that `nanochat.tokenizer.conversation` places, with the system message where
# `nanochat.corpus.conversation` puts it. What a template renders is parsed for special tokens, the users' words
# included: it cannot keep those inert, as our own renderer does.
CHAT_TEMPLATE = """\
{%- macro render(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part.type == 'text' -%}
                {{- part.text -}}
            {%- elif part.type == 'python' -%}
                {{- '<|python_start|>' + part.text + '<|python_end|>' -}}
            {%- elif part.type == 'python_output' -%}
                {{- '<|output_start|>' + part.text + '<|output_end|>' -}}
            {%- else -%}
                {{- raise_exception('a part is of type text, python or python_output') -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- set system = '' -%}
{%- if messages and messages[0].role == 'system' -%}
    {%- set system = render(messages[0].content) -%}
    {%- set messages = messages[1:] -%}
{%- endif -%}
{{- '<|bos|>' -}}
{%- for message in messages -%}
    {%- if message.role != ('assistant' if loop.index0 % 2 else 'user') -%}
        {{- raise_exception('user and assistant speak in turn, the user first, after at most one system message') -}}
    {%- endif -%}
    {{- '<|' + message.role + '_start|>' -}}
    {%- if loop.first and system -%}
        {{- system + '\\n\\n' -}}
    {%- endif -%}
    {{- render(message.content) + '<|' + message.role + '_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {%- if not messages or messages[-1].role != 'user' -%}
        {{- raise_exception('the last message of a prompt is by the user') -}}
    {%- endif -%}
    {{- '<|assistant_start|>' -}}
{%- endif -%}
"""

# Packages that the model card names, of those that a checkpoint records.
VERSIONS = ("nanochat-hpc", "torch")

CHAT_EXAMPLE = """\
messages = [{"role": "user", "content": "What does os.path.join do?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")"""
TEXT_EXAMPLE = """\
inputs = tokenizer("The capital of France is", return_tensors="pt")"""
CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- nanochat
---

# {tag}

A language model trained with nanochat for HPC. transformers, from version 5 on, loads it as `NanoChatForCausalLM`:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = {title}
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
{example}
output = model.generate(**inputs, max_new_tokens=32)
print(tokenizer.decode(output[0]))
```

| | |
| --- | --- |
{figures}

The tokenizer turns text that spells a special token, such as `<|assistant_end|>`, into that token. Where users type the
text, take such words out first, or, without the chat template, encode it with `split_special_tokens=True`.

## Settings that decided the weights

```json
{settings}
```
"""


def export_huggingface(
    workspace: Workspace, stage: Stage, model_tag: str | None, folder: Path, dtype: WeightType, console: Console
) -> TrainedModel:
    """Write the newest checkpoint of a model with its configuration, tokenizer, chat template and model card.

    The folder appears whole or not at all. An earlier export in it is replaced, anything else is left alone.

    Args:
        model_tag: which model; None for the only one there is.
        folder: the folder to make.
        dtype: of the stored weights. float32 is what was trained; bfloat16 takes half the room.

    Returns:
        The model that was exported.

    Raises:
        UsageError: there is no such model, it is of the modern variant, or the folder holds something else.
        DataError: checkpoint or tokenizer is damaged.
        NanochatError: the folder cannot be written. What was there is then untouched.
    """
    _refuse_foreign_folder(folder)
    trained = load_trained_model(workspace, stage, model_tag, Runtime(torch.device("cpu"), torch.float32), console)
    if trained.model.config.variant != "classic":
        raise UsageError(
            f"{trained.tag} is of the modern variant, of which transformers has no value embeddings, residual and x0 "
            "lambdas, smear, backout, sliding windows and QK scale; without them it would be another model",
            "train with --variant classic",
        )
    try:
        with whole_folder(folder) as new:
            _write_files(trained, new, dtype)
            write_text(new / "README.md", _model_card(trained, workspace, folder.resolve().name, dtype))
            files = [file_entry(path) for path in sorted(new.iterdir())]
            write_manifest(new, KIND, files, stage=stage, step=trained.step, checkpoint=trained.fingerprint)
    except (OSError, SafetensorError) as error:
        raise NanochatError(
            f"the export to {folder} could not be written: {error}",
            "free space or quota there, or choose another folder",
        ) from error
    return trained


def huggingface_weights(model: GPT) -> dict[str, Tensor]:
    """The weights of a classic model under the names of NanoChatForCausalLM."""
    weights = {}
    for name, weight in model.state_dict().items():
        for our_part, their_part in THEIR_NAMES.items():
            name = name.replace(our_part, their_part)
        weights[name] = weight
    return weights


def huggingface_config(shape: ModelConfig) -> dict[str, Any]:
    """The fields of NanoChatConfig that describe a classic model's computation.

    All that decide it are given, since several defaults (width of the MLP, rotary base) are those of other models.
    """
    return {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.n_embd,
        "intermediate_size": 4 * shape.n_embd,
        "num_hidden_layers": shape.n_layer,
        "num_attention_heads": shape.n_head,
        "num_key_value_heads": shape.n_kv_head,
        "max_position_embeddings": shape.sequence_len,
        "hidden_act": "relu2",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rms_norm_eps": NORM_EPSILON,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
        "final_logit_softcapping": LOGIT_CAP,
        "tie_word_embeddings": False,
    }


def _refuse_foreign_folder(folder: Path) -> None:
    """Make sure that nothing but an export, as it was written, is replaced.

    Raises:
        UsageError: what is there is something else, or an export that was changed since; the message says which.
    """
    if folder.is_dir():
        there = {path.name for path in folder.iterdir()}
        if not there:
            return
        fix = "choose another folder, or remove this one"
        try:
            files = read_manifest(folder, KIND, fix)["files"]
            verify_files(folder, files, fix)
        except DataError as error:
            raise UsageError(f"{folder} is not an export as nanochat wrote it: {error.what}", fix) from None
        added = sorted(there - {MANIFEST_NAME} - {entry["name"] for entry in files})
        if added:
            raise UsageError(f"{folder} holds more than an export: {', '.join(added)}", fix)
    elif folder.exists():
        raise UsageError(f"{folder} is not a folder", "choose another name")


def _write_files(trained: TrainedModel, new: Path, dtype: WeightType) -> None:
    """What transformers reads."""
    tokenizer, is_chat = trained.tokenizer, trained.stage != "base"
    # In a chat the start of another document is an end too: a model that was trained little may say it.
    ends = ["<|assistant_end|>", "<|bos|>"] if is_chat else ["<|bos|>"]
    # There is no token for padding. One that ends no answer serves: trainers leave padding out of the loss, and with
    # `<|assistant_end|>` the model would unlearn to stop.
    ids = {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.bos_id}
    write_json(
        new / "config.json",
        {
            "architectures": ["NanoChatForCausalLM"],
            "model_type": "nanochat",
            "dtype": dtype,
            **huggingface_config(trained.model.config),
            **ids,
            "eos_token_id": tokenizer.special_id(ends[0]),
        },
    )
    write_json(new / "generation_config.json", {**ids, "eos_token_id": [tokenizer.special_id(name) for name in ends]})
    write_text(new / "tokenizer.json", huggingface_tokenizer(tokenizer).to_str())
    write_json(
        new / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|bos|>",
            "eos_token": ends[0],
            "pad_token": "<|bos|>",
            "model_max_length": trained.model.config.sequence_len,
            "clean_up_tokenization_spaces": False,
        },
    )
    if is_chat:
        write_text(new / "chat_template.jinja", CHAT_TEMPLATE)
    weights = {name: weight.to(getattr(torch, dtype)) for name, weight in huggingface_weights(trained.model).items()}
    save_file(weights, new / "model.safetensors", metadata={"format": "pt"})
    # safetensors makes its files private; whoever may read the rest of an export may read these.
    (new / "model.safetensors").chmod((new / "config.json").stat().st_mode)


def _model_card(trained: TrainedModel, workspace: Workspace, title: str, dtype: WeightType) -> str:
    """`README.md` as model hubs show it: how to use the model, what it is and what it was made from."""
    shape, identity = trained.model.config, trained.config["identity"]
    environment = trained.config.get("environment", {})
    git = environment.get("git", {})
    made_with = [f"{name} {version}" for name, version in environment.get("packages", {}).items() if name in VERSIONS]
    figures = {
        "Stage": f"{trained.stage}, {trained.step} steps",
        "Parameters": format_count(trained.model.parameter_counts()["total"]),
        "Layers": f"{shape.n_layer}, width {shape.n_embd}",
        "Heads": f"{shape.n_head} for queries, {shape.n_kv_head} for keys and values",
        "Context": f"{shape.sequence_len} tokens",
        "Vocabulary": f"{shape.vocab_size} tokens",
        "Weights": dtype,
        "Validation bits per byte": _bits_per_byte(trained, workspace),
        "Run": trained.config.get("run"),
        "Checkpoint": trained.fingerprint,
        "Tokenizer": identity["tokenizer"],
        "Data": identity.get("data"),
        "Commit": f"{git['commit']}{', and changes to it' if git['dirty'] else ''}" if git else None,
        "Made with": ", ".join(made_with),
    }
    return CARD.format(
        tag=trained.tag,
        title=json.dumps(title),
        example=TEXT_EXAMPLE if trained.stage == "base" else CHAT_EXAMPLE,
        figures="\n".join(f"| {name} | {value} |" for name, value in figures.items() if value),
        settings=json.dumps(identity, indent=2, sort_keys=True),
    )


def _bits_per_byte(trained: TrainedModel, workspace: Workspace) -> str | None:
    """The validation that the run recorded for this checkpoint, if its metrics are still there."""
    path = metrics_path(workspace, trained.config["run"], trained.stage, trained.tag)
    if not path.is_file():
        return None
    found = [row["epoch/bpb"] for row in read(path) if row["step"] == trained.step and "epoch/bpb" in row]
    return f"{found[-1]:.4f}" if found else None
