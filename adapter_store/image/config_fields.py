"""What each field of adapter_config.json is to serving: honoured, without effect, or refused by name. None is ignored.

Source: peft.LoraConfig 0.21, gone through field by field; a test compares the tables with the installed one.
"""

from __future__ import annotations

from typing import Any

from adapter_store.errors import AdapterRejected

HONOURED = frozenset(
    {
        "peft_type",
        "task_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "bias",
        "init_lora_weights",
    }
)
# Fields that leave y = W x + scaling * B (A x) as it is once the adapter is trained.
HARMLESS: dict[str, str] = {
    "auto_mapping": "tells how to load the base",
    "peft_version": "informs",
    "base_model_name_or_path": "informs; the shapes of all tensors are checked against the base instead",
    "revision": "informs",
    "inference_mode": "freezes the weights",
    "lora_dropout": "acts in training only",
    "fan_in_fan_out": "tells how the base stores W; A and B are stored alike for Linear and Conv1D",
    "megatron_core": "is used with megatron_config only",
    "loftq_config": "is used by init_lora_weights='loftq' only, which is refused",
    "eva_config": "is used at initialization only",
    "corda_config": "is used by init_lora_weights='corda' only, which is refused",
    "lora_ga_config": "is used by init_lora_weights='lora_ga' only, which is refused",
    "qalora_group_size": "is used with use_qalora only",
    "runtime_config": "tells where PEFT computes",
}
# Fields that change what the adapter computes: refused when set.
REFUSED_WHEN_SET: dict[str, str] = {
    "modules_to_save": "full copies of base modules are not served; train LoRA on those modules instead",
    "trainable_token_indices": "changed embedding rows are not served; train LoRA on the embedding instead",
    "use_dora": "DoRA is not implemented; train with use_dora=False",
    "use_qalora": "QALoRA is not implemented; train with use_qalora=False",
    "lora_bias": "a bias on lora_B is not implemented; train with lora_bias=False",
    "layer_replication": "replicated layers need another base model; serve the expanded model as the base",
    "megatron_config": "Megatron's parallel layers are not implemented; export the adapter without it",
    "alora_invocation_tokens": "activated LoRA is not implemented; train a plain LoRA",
    "target_parameters": "LoRA on bare parameters (fused experts) is not implemented; target modules instead",
    "use_bdlora": "block-diagonal LoRA is not implemented; train a plain LoRA",
    "arrow_config": "Arrow routing is not implemented; serve its adapters one by one",
    "kasa_config": "KaSA truncates the base's weights; train a plain LoRA",
    "monteclora_config": "MonteCLoRA's sampling is not implemented; train a plain LoRA",
    "velora_config": "VeLoRA keeps buffers beside A and B; convert the adapter to a plain LoRA",
    "ensure_weight_tying": "adapters tied between embedding and head are not implemented; train them untied",
}
# Fields that are not PEFT's and change nothing either: what programs beside it write into the file, and wrote once.
INFORMATIVE = frozenset(
    {
        "_commit_hash",
        "_name_or_path",
        "base_model_class",
        "created_by",
        "dtype",
        "library_name",
        "license",
        "merge_weights",  # of PEFT before 0.3: whether to add B A to W while it computes
        "model_type",
        "parent_library",
        "tags",
        "torch_dtype",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
    }
)
TASK_TYPES = ("CAUSAL_LM", "FEATURE_EXTRACTION")
HEADED_TASK_TYPES = ("SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
BIASES = ("none", "all", "lora_only")
# Initializations that leave the base alone; the others move a part of W into A and B, so that the adapter is right
# only on the base they changed.
INITS = ("gaussian", "eva", "orthogonal", "mica")
_SHOWN_CHARS = 60


def check_fields(raw: dict[str, Any]) -> tuple[str, ...]:
    """What is accepted and left out, told. Raises: AdapterRejected for the first field that cannot be honoured."""
    notices = []
    for name, value in raw.items():
        if name in HONOURED or name in HARMLESS or name in INFORMATIVE or name == "ensure_weight_tying":
            continue
        if is_neutral(value):
            continue
        why = REFUSED_WHEN_SET.get(name, "this field is unknown here, so what it changes cannot be honoured")
        raise AdapterRejected(f"{name if name in REFUSED_WHEN_SET else shown(name)} is set to {shown(value)}: {why}")
    bias = raw.get("bias")
    if bias not in (None, *BIASES):
        raise AdapterRejected(f"bias is {shown(bias)}; it must be one of {', '.join(BIASES)}")
    if bias not in (None, "none"):
        notices.append(f"bias is {bias!r}, and the file has no biases: there is nothing to add")
    task = raw.get("task_type")
    if task in HEADED_TASK_TYPES:
        notices.append(f"task_type is {task!r}: it is served without that task's head, as a language model")
    elif task not in (None, *TASK_TYPES):
        raise AdapterRejected(
            f"task_type is {shown(task)}; it must be one of {', '.join((*TASK_TYPES, *HEADED_TASK_TYPES))}, or null"
        )
    _check_init(raw.get("init_lora_weights"))
    return tuple(notices)


def is_neutral(value: Any) -> bool:
    """Whether a field set to this is as good as left out: null, false, 0, "", "none", empty, or made of such alone."""
    if isinstance(value, dict):
        return all(map(is_neutral, value.values()))
    if isinstance(value, list):
        return all(map(is_neutral, value))
    return not value or (isinstance(value, str) and value.lower() in ("none", "null", "false"))


def shown(value: Any) -> str:
    """A stranger's value in a message: cut, and with nothing that a terminal would obey."""
    text = repr(value[: _SHOWN_CHARS + 1] if isinstance(value, str | list) else value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[: _SHOWN_CHARS - 3]}..."


def _check_init(init: Any) -> None:
    if not (init is None or isinstance(init, bool) or (isinstance(init, str) and init.lower() in INITS)):
        raise AdapterRejected(
            f"init_lora_weights is {shown(init)}: it changes the base's weights, so the adapter is wrong on any other "
            "base; convert it to a plain LoRA (save_pretrained with path_initial_model_for_weight_conversion), or, "
            "when the served base is the changed one, set init_lora_weights to true"
        )
