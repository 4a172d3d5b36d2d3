"""A policy that answers: out of a run directory, or out of a Hugging Face folder."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax.core.batches import Example
from hybrid_jax.core.config import load_yaml, local_path, parse
from hybrid_jax.core.errors import Untrusted, UserError
from hybrid_jax.core.keys import Purpose, root_key
from hybrid_jax.core.registry import EVERYTHING, NOTHING, names_in
from hybrid_jax.core.seeds import check_seed
from hybrid_jax.data.bounded_tokenizer import bounded
from hybrid_jax.data.conversations import chat_example
from hybrid_jax.data.loader import PromptStream
from hybrid_jax.data.messages import check_messages
from hybrid_jax.data.packing import encode_prompt
from hybrid_jax.data.template_inputs import KWARGS
from hybrid_jax.data.tokenizer import Tokenizer, load_tokenizer
from hybrid_jax.models import markov, memory, ngrams, recurrent, text_encoder  # noqa: F401  these fill BACKBONES
from hybrid_jax.models.base import BACKBONES, LanguageModel, Params
from hybrid_jax.models.decoder import Decoder
from hybrid_jax.models.folders import hf
from hybrid_jax.models.folders.family_folder import Dtype
from hybrid_jax.models.folders.files import CONFIG
from hybrid_jax.models.folders.hub import find_folder
from hybrid_jax.models.folders.ours import save_ours
from hybrid_jax.models.folders.peft import ADAPTER_CONFIG
from hybrid_jax.models.folders.peft_writing import save_adapter
from hybrid_jax.models.folders.pretrained import has_format, load_pretrained, save_pretrained
from hybrid_jax.models.lora import split, whole
from hybrid_jax.models.vocabulary import RESIZE, own_tokenizer_of
from hybrid_jax.parallel import hosts
from hybrid_jax.runs.export_folder import claim_export_folder
from hybrid_jax.runs.files import fetched
from hybrid_jax.runs.samplers import default_sampler, overridden, run_sampler
from hybrid_jax.runs.saved_tokenizer import saved_tokenizer
from hybrid_jax.sampling.base import Sampler, sample
from hybrid_jax.sampling.generation_config import (
    read_eos_ids,
    read_generation_config,
    write_generation_config,
)
from hybrid_jax.sampling.responses import decode_responses, ended
from hybrid_jax.training.checkpoint import newest_policy
from hybrid_jax.training.compilation import free_programs

log = logging.getLogger(__name__)

NO_ANSWERS = "trains heads and no language model, so it gives no answers: evaluate or export it"
BATCH_SIZE = 64  # responses sampled at a time


@dataclass(frozen=True)
class Answer:
    """One sampled response."""

    prompt: str
    response: str
    complete: bool  # it ended by itself, not by its length


@dataclass(frozen=True)
class Policy:
    """A model with all that it takes to answer in text."""

    model: LanguageModel
    params: Params
    tokenizer: Tokenizer
    sampler: Sampler
    eos_ids: tuple[int, ...]
    step: int | None = None  # of the run that it comes from
    component: Any = None  # the settings of the model
    template_variables: Mapping[str, Any] = field(default_factory=dict)  # of its data, for a chat template

    def generate(
        self,
        prompts: Sequence[str | Sequence[Mapping[str, Any]] | Example],
        *,
        seed: int = 0,
        num_samples: int = 1,
    ) -> list[Answer]:
        """Gives ``num_samples`` answers to every prompt, those to one prompt one after the other.

        A prompt is a text, or a conversation: a list of ``{"role": …, "content": …}`` that the tokenizer's
        chat template renders, with the header of an answer behind it. An example is its question, with what
        the template reads beside the messages.

        Raises:
            UserError: a prompt is empty, or leaves no room for ``sampler.max_new_tokens`` in the context.
        """
        if num_samples < 1:
            raise UserError(f"num_samples must be at least 1, got {num_samples}")
        try:
            check_seed(seed)
        except ValueError as error:
            raise UserError(str(error)) from None
        asked = [
            example_of(prompt, row, self.template_variables) for row, prompt in enumerate(prompts, start=1)
        ]
        examples = [example for example in asked for _ in range(num_samples)]
        if not examples:
            return []
        free_programs()  # each other sampler compiles another one
        stream = PromptStream(examples, self.tokenizer, self._longest_prompt(asked))
        answers = []
        for index, (batch, count) in enumerate(stream.sequential(min(BATCH_SIZE, len(examples)))):
            key = jax.random.fold_in(root_key(seed, Purpose.GENERATION), index)
            prompt, mask = jnp.asarray(batch.tokens), jnp.asarray(batch.mask)
            inputs = (self.model, self.params, prompt, mask, key)
            drawn = sample(self.sampler, *inputs, eos_ids=self.eos_ids, tokenizer=self.tokenizer)
            tokens, mask = np.asarray(drawn.tokens)[:count], np.asarray(drawn.action_mask)[:count]
            texts = decode_responses(self.tokenizer, batch.unpadded()[:count], tokens, mask, self.eos_ids)
            complete = np.asarray(ended(drawn.tokens, drawn.action_mask, self.eos_ids))
            answers += [
                Answer(example.prompt, text, bool(end))
                for example, text, end in zip(batch.examples, texts, complete, strict=False)
            ]
        return answers

    def save_pretrained(self, folder: str | Path, *, adapter: bool = False, dtype: Dtype = "float32") -> Path:
        """Writes a Hugging Face folder, or ours, with tokenizer and generation settings; returns it.

        Args:
            folder: a new or an empty one, or an earlier export.
            adapter: writes the adapter alone, as `peft` keeps it, in place of the whole model.
            dtype: of the weights in the file; an adapter's are float32.

        Raises:
            UserError: the folder holds something that we did not export, or cannot be written.
        """
        folder = local_path(folder, "the folder to export to")
        if not hosts.is_first():
            self._save_weights(folder, adapter, dtype)
            return folder
        is_new = not folder.exists()
        claim_export_folder(folder, self.step)
        try:
            self.tokenizer.save(folder)
            self._save_weights(folder, adapter, dtype)
            write_generation_config(folder, self.sampler, self.eos_ids)
        except UserError:  # of a model that has no such format
            if is_new:
                shutil.rmtree(folder)
            raise
        except OSError as error:
            raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error
        return folder

    def _save_weights(self, folder: Path, adapter: bool, dtype: Dtype) -> None:
        if adapter:
            return save_adapter(folder, self.model, self.params)
        if has_format(self.model):
            end = self.eos_ids
            save_pretrained(folder, self.model, self.params, eos_ids=end, pad_id=end[0], dtype=dtype)
        else:
            log.info("Hugging Face has no format for this model, it is written for hybrid_jax alone")
            save_ours(folder, self.model, self.params, self.component, dtype)

    def prompt_room(self) -> int | None:
        """Tokens of a prompt at most, which leave room for an answer; None has no bound.

        Raises:
            UserError: the answer alone fills the context.
        """
        context, new = self.model.max_length, self.sampler.max_new_tokens
        if context is not None and context <= new:
            raise UserError(
                f"sampler.max_new_tokens must leave room for a prompt in the context of {context} tokens, "
                f"got {new}"
            )
        return None if context is None else context - new

    def _longest_prompt(self, prompts: Sequence[Example]) -> int:
        lengths = [self._prompt_length(prompt, row) for row, prompt in enumerate(prompts, start=1)]
        context, new = self.model.max_length, self.sampler.max_new_tokens
        room = self.prompt_room() or 2**30
        for row, length in enumerate(lengths, start=1):
            if length == 0:
                raise UserError(f"prompt {row} is empty; give it at least one token to go on from")
            if length > room:
                raise UserError(
                    f"prompt {row} must have at most {room} tokens (context {context} less "
                    f"sampler.max_new_tokens {new}), got {length}; shorten it or lower sampler.max_new_tokens"
                )
        return max(room, 2)

    def _prompt_length(self, prompt: Example, row: int) -> int:
        try:
            return len(encode_prompt(prompt, self.tokenizer))
        except UserError as error:
            raise UserError(f"prompt {row}: {error}") from error


def load_policy(run_dir: str | Path, overrides: Sequence[str] = (), trust: Container[str] = NOTHING) -> Policy:
    """The newest policy of a run; it needs neither the run's data nor its reward.

    Args:
        run_dir: of a run that has saved a checkpoint.
        overrides: ``sampler.a=value`` over the settings that the run samples with.
        trust: names in the run's config that may run code.

    Raises:
        Untrusted: the name of the model or of the sampler runs code and is not in ``trust``.
    """
    files = fetched(run_dir)
    settings, tokenizer = run_settings(run_dir), saved_tokenizer(files)
    with trust_explained(run_dir):
        component, model, trained, base = run_model(settings, tokenizer, trust)
        own = run_sampler(settings, model.max_length, trust)
    found = newest_policy(files.checkpoints, trained, base)
    if found is None:
        raise UserError(f"{run_dir} holds no checkpoint yet: train it up to its first checkpoint")
    step, params = found
    model, params = as_list(model, whole(base, params))
    tokenizer = bounded(tokenizer, model.vocab_size, RESIZE)
    sampler = overridden(own, overrides)
    eos_ids = read_eos_ids(files.folder / "tokenizer") or (tokenizer.eos_id,)
    variables = (settings.get("data") or {}).get(KWARGS) or {}
    return Policy(model, params, tokenizer, sampler, eos_ids, step, component, variables)


def as_list(model: LanguageModel, params: Params) -> tuple[LanguageModel, Params]:
    """A model as files and a single device want it: its layers one by one."""
    return (model.as_list(), model.listed(params)) if isinstance(model, Decoder) else (model, params)


def load_pretrained_policy(
    folder: str | Path, overrides: Sequence[str] = (), trust: Container[str] = NOTHING
) -> Policy:
    """The model of a folder, of Hugging Face or ours, or of an id on the hub, and how that samples.

    Args:
        folder: it may be an adapter of `peft` that says where its base is.
        overrides: ``sampler.a=value`` over the settings of the folder.
        trust: names in one of our own folders that may run code.

    Raises:
        Untrusted: the folder names code that is not in ``trust``.
        UserError: it holds no language model.
    """
    folder = find_folder(folder)
    if (folder / CONFIG).is_file():
        model, params = load_pretrained(folder, trust=trust)
    elif (folder / ADAPTER_CONFIG).is_file():
        model, params = hf.load_adapted(folder)
        folder = folder if (folder / "tokenizer_config.json").is_file() else Path(model.folder)
    else:
        hint = "; it is a run directory, which --run takes" if (folder / "config.yaml").is_file() else ""
        raise UserError(f"{folder} is no Hugging Face folder: it holds no config.json{hint}")
    tokenizer = bounded(load_tokenizer(folder), model.vocab_size, own_tokenizer_of(folder))
    sampler, eos_ids = read_generation_config(folder, default_sampler(model.max_length).max_new_tokens)
    return Policy(model, params, tokenizer, overridden(sampler, overrides), eos_ids or (tokenizer.eos_id,))


def run_settings(run_dir: str | Path) -> dict[str, Any]:
    """The config of a run directory, as it was written."""
    folder = fetched(run_dir).folder
    if not (folder / "config.yaml").is_file():
        problem = "it holds no config.yaml" if folder.is_dir() else "there is no such directory"
        raise UserError(f"{run_dir} is no run directory: {problem}")
    settings = load_yaml(folder / "config.yaml")
    check_spelling(settings, f"{run_dir}/config.yaml is of an older version: ")
    phases, evaluation = settings.get("phases") or {}, settings.get("evaluation") or {}
    of_phases = phases.values() if isinstance(phases, Mapping) else [None]
    if not all(isinstance(part, Mapping) for part in (evaluation, *of_phases)):
        raise UserError(f"{run_dir}/config.yaml is not as a run writes it: phases and evaluation hold settings")
    return settings


def check_spelling(settings: Any, where: str = "") -> None:
    """Says how a head is spelled now, where a model has the labels that it had before version 0.5.

    Raises:
        UserError: it has.
    """
    model = settings.get("model") if isinstance(settings, Mapping) else None
    if isinstance(model, Mapping) and ("labels" in model or model.get("name") == "classifier"):
        labels = model.get("labels") or "[…]"
        kind = "regression" if len(labels) == 1 else "classification"
        raise UserError(
            f"{where}since version 0.5 a model has no labels, a head on it has: "
            f"heads: {{NAME: {{name: {kind}, labels: {labels}}}}}; "
            "freeze is its trains_trunk: false, hidden_width and dropout are the head's, and "
            "model: {name: classifier, backbone: …} is the backbone itself"
        )


def names_to_trust(trust: bool, config: str | None) -> Container[str]:
    """The names of code that ``--trust`` or ``--config FILE`` allow a run's config to use."""
    if trust:
        return EVERYTHING
    return NOTHING if config is None else names_in(load_yaml(config))


@contextlib.contextmanager
def trust_explained(run_dir: str | Path) -> Iterator[None]:
    """Says how to let a run's config run code, where it may not."""
    try:
        yield
    except Untrusted as error:
        raise Untrusted(
            f"{run_dir}/config.yaml: {error}; if you trust this run, give --trust, or --config with the file "
            "that you trained it by"
        ) from error


@dataclass(frozen=True)
class _ModelSettings:
    model: Annotated[Any, BACKBONES]


def run_model(
    settings: dict[str, Any], tokenizer: Tokenizer, trust: Container[str]
) -> tuple[Any, LanguageModel, Params, Params]:
    """Settings and functions of a run's model, the shapes of what trains, and the parameters below adapters."""
    named = parse(_ModelSettings, {"model": settings.get("model")}, trust=trust)
    model = named.model.build(tokenizer.vocab_size)
    if not trains_language_model(settings):
        raise UserError(f"this run {NO_ANSWERS}")
    trained, base = split(hf.abstract_params(model))
    if base:
        base = split(model.init(root_key(settings.get("seed", 0), Purpose.MODEL)))[1]
    return named.model, model, trained, base


def trains_language_model(settings: Mapping[str, Any]) -> bool:
    """Tells whether any phase of a run trains its language model; the others say which ``head`` they train."""
    return any("head" not in phase for phase in (settings.get("phases") or {}).values())


def trains_heads(settings: Mapping[str, Any]) -> bool:
    """Tells whether any phase of a run trains a head."""
    return any("head" in phase for phase in (settings.get("phases") or {}).values())


def example_of(
    prompt: str | Sequence[Mapping[str, Any]] | Example, row: int, variables: Mapping[str, Any]
) -> Example:
    """The example that asks for an answer to a prompt of `Policy.generate`; ``row`` is its number, for errors.

    What a row gives its template goes before ``variables``.
    """
    if isinstance(prompt, Example):
        variables = {**variables, **prompt.template_variables}
        return replace(prompt, messages=prompt.question, template_variables=variables)
    if isinstance(prompt, str):
        return Example(prompt)
    messages = check_messages(prompt, f"prompt {row}")
    if messages[-1]["role"] == "assistant":
        raise UserError(
            f"prompt {row} ends with a message of the assistant; end it with what is to be answered"
        )
    return chat_example(messages, f"prompt {row}", None, variables)
