"""How the model of a Hugging Face folder samples: generation_config.json, both ways.

A policy that answers takes all of it. Training takes the end tokens alone: how PPO samples is its own setting,
since it must neither truncate nor be greedy, and a temperature changes what it optimises.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybrid_jax.core.config import parse
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.json_text import read_json
from hybrid_jax.data.chat import end_of_turn
from hybrid_jax.data.tokenizer import Tokenizer
from hybrid_jax.sampling.ancestral import Ancestral
from hybrid_jax.sampling.base import Sampler

log = logging.getLogger(__name__)

FILE = "generation_config.json"
TOP_K = 50  # of transformers where a folder that samples does not say

# Settings that would change the distribution and that `Ancestral` has not, with the values that change nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "bad_words_ids": ([],),
    "begin_suppress_tokens": ([],),
    "diversity_penalty": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "sequence_bias": ({}, []),
    "stop_strings": ([],),
    "suppress_tokens": ([],),
    "top_h": (),
}


def read_generation_config(folder: str | Path, max_new_tokens: int) -> tuple[Ancestral, tuple[int, ...]]:
    """Sampler and end tokens as `transformers` takes them: greedy unless ``do_sample``.

    They stand in generation_config.json; in older folders, in config.json.

    Args:
        folder: A Hugging Face folder.
        max_new_tokens: Where the folder does not say.

    Returns:
        The sampler, and the ids of all end tokens, in the folder's order; none if it names none.

    Raises:
        UserError: a file is not JSON, or a setting has a wrong type or value.
    """
    path, settings = _settings(Path(folder))
    if ignored := [name for name, nothing in UNSUPPORTED.items() if settings.get(name) not in (None, *nothing)]:
        log.warning("%s: settings that are not supported are left out: %s", path, ", ".join(ignored))
    chosen: dict[str, Any] = {"max_new_tokens": settings.get("max_new_tokens") or max_new_tokens}
    if settings.get("do_sample"):
        top_k = settings.get("top_k")
        chosen["temperature"] = _or(settings.get("temperature"), 1.0)
        chosen["top_k"] = TOP_K if top_k is None else top_k or None  # there, 0 cuts nothing off
        for name, nothing in (("top_p", 1), ("min_p", 0), ("typical_p", 1)):
            chosen[name] = None if settings.get(name) == nothing else settings.get(name)
    else:
        chosen["temperature"] = 0.0
    if settings.get("repetition_penalty") != 1:  # of greedy answers, too
        chosen["repetition_penalty"] = settings.get("repetition_penalty")
    try:
        return parse(Ancestral, chosen), _ids(settings.get("eos_token_id"))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def read_eos_ids(folder: str | Path) -> tuple[int, ...]:
    """The ids of all end tokens that the folder names; none if it names none."""
    path, settings = _settings(Path(folder))
    try:
        return _ids(settings.get("eos_token_id"))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def write_generation_config(folder: str | Path, sampler: Sampler | None, eos_ids: Sequence[int]) -> None:
    """Adds to generation_config.json the end tokens, and how to sample where `transformers` can."""
    path = Path(folder) / FILE
    settings = {**(read_json(path) if path.exists() else {}), "eos_token_id": _one_or_all(eos_ids)}
    settings.pop("_from_model_config", None)
    if isinstance(sampler, Ancestral):
        settings |= {"max_new_tokens": sampler.max_new_tokens, "do_sample": sampler.temperature > 0}
        if sampler.temperature > 0:
            settings["temperature"] = sampler.temperature
            settings["top_k"] = sampler.top_k or 0
            settings["top_p"] = 1.0 if sampler.top_p is None else sampler.top_p
        for name in ("min_p", "typical_p", "repetition_penalty"):
            settings.pop(name, None)
            if (value := getattr(sampler, name)) is not None:
                settings[name] = value
        if sampler.frequency_penalty is not None or sampler.presence_penalty is not None:
            log.info("%s: Hugging Face has no frequency_penalty and presence_penalty, they are left out", path)
    elif sampler is not None:
        settings["max_new_tokens"] = sampler.max_new_tokens
        log.info("%s: Hugging Face's settings do not say %s, only its max_new_tokens", path, sampler)
    path.write_text(json.dumps(settings, indent=2) + "\n")


def _settings(folder: Path) -> tuple[Path, dict[str, Any]]:
    path = folder / FILE
    if path.exists():
        settings = read_json(path)
        if settings.get("eos_token_id") is None and (folder / "config.json").exists():
            settings["eos_token_id"] = read_json(folder / "config.json").get("eos_token_id")
        return path, settings
    path = folder / "config.json"
    return path, read_json(path) if path.exists() else {}


def _ids(value: Any) -> tuple[int, ...]:
    values = [] if value is None else value if isinstance(value, list) else [value]
    for item in values:
        if not isinstance(item, int) or isinstance(item, bool) or item < 0:
            raise UserError(f"eos_token_id must be a token id or a list of them, got {value!r}")
    return tuple(dict.fromkeys(values))


def _one_or_all(ids: Sequence[int]) -> int | list[int] | None:
    return list(ids) if len(ids) > 1 else next(iter(ids), None)


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def end_tokens(model: Any, tokenizer: Tokenizer, *, chat: bool) -> tuple[int, ...]:
    """Every token that ends a response: those of the model's folder if it has one, those that SFT teaches."""
    folder = getattr(model, "folder", None)
    of_folder = read_eos_ids(folder) if folder is not None and Path(folder).is_dir() else ()
    of_chat = end_of_turn(tokenizer) if chat else None
    return tuple(dict.fromkeys((*of_folder, tokenizer.eos_id, *([] if of_chat is None else [of_chat]))))
