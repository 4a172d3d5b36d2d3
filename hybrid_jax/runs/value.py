"""The value function of a run, written beside its exported policy."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from hybrid_jax.core.config import local_path
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.registry import NOTHING
from hybrid_jax.models.classifier import Classifier, save_classifier
from hybrid_jax.models.decoder import Decoder
from hybrid_jax.models.folders.family_folder import Dtype
from hybrid_jax.models.heads import init_value_head
from hybrid_jax.models.lora import merge, whole
from hybrid_jax.runs.export_folder import VALUE
from hybrid_jax.runs.files import fetched
from hybrid_jax.runs.policy import run_model, run_settings, trust_explained
from hybrid_jax.runs.saved_tokenizer import saved_tokenizer
from hybrid_jax.training.checkpoint import newest_params, saved_progress, saved_steps
from hybrid_jax.training.checkpoint_note import param_groups


def save_value(
    run_dir: str | Path, folder: str | Path, dtype: Dtype = "float32", trust: Container[str] = NOTHING
) -> Path:
    """Writes the newest value function of a run beside its exported policy; returns the folder ``value``.

    It is a classifier with one label (`classifier.load_classifier`): the network that the value reads, the
    policy's own or a separate one, and its head as ``score``. Its logit at the last token of a text is V there.
    Where several phases have a value, each has a folder of its name in ``value``.

    Raises:
        UserError: the run trains no value, or the model is no decoder that can be a classifier.
    """
    files, beside = fetched(run_dir), local_path(folder, "the folder to export to") / VALUE
    settings, tokenizer = run_settings(run_dir), saved_tokenizer(files)
    with trust_explained(run_dir):
        _, model, trained, base = run_model(settings, tokenizer, trust)
    saved = saved_steps(files.checkpoints)
    if not saved:
        raise UserError(f"{run_dir} holds no checkpoint yet: train it up to its first checkpoint")
    there = param_groups(saved_progress(files.checkpoints, saved[0]))
    values = sorted(group for name in settings["phases"] if (group := f"{name}/value") in there)
    if not values:
        raise UserError(
            f"{run_dir} has no value: none of its phases {', '.join(settings['phases'])} trains one"
        )
    if not isinstance(model, Decoder) or model.config.embedding_width is not None:
        raise UserError(
            "this model's value has no Hugging Face format: its head does not read what theirs would"
        )
    head: dict[str, Any] = {"head": jax.eval_shape(lambda: init_value_head(model.width))}
    separate = {group: {"model": trained} if f"{group}/model" in there else {} for group in values}
    groups = {"model": trained} | {group: {**head, **separate[group]} for group in values}
    found = newest_params(files.checkpoints, groups, base)
    assert found is not None, "there is a checkpoint"
    params = found[1]
    classifier = Classifier(replace(model.as_list().config, lora=None), labels=("value",), has_bias=True)
    for group in values:
        trunk = params[group]["model"] if separate[group] else params["model"]
        backbone = model.listed(whole(base, trunk))
        backbone = merge(model.config.lora, backbone)
        weights = {name: leaf for name, leaf in backbone.items() if name != "lm_head"}
        weights["score"] = params[group]["head"]
        place = beside if len(values) == 1 else beside / group.removesuffix("/value")
        like = getattr(model, "folder", None)
        save_classifier(place, classifier, weights, pad_id=tokenizer.eos_id, dtype=dtype, like=like)
    return beside
