"""Text to token ids and back: bytes, a byte-level BPE trained on the data, or a Hugging Face tokenizer.

Whatever its kind, a tokenizer saves as a folder that ``transformers.AutoTokenizer`` loads with the same ids.
Bytes and BPE never import ``transformers``, which takes seconds.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

from annotated_types import Interval

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.json_text import read_json
from hybrid_jax.core.ranges import settings
from hybrid_jax.core.registry import Registry
from hybrid_jax.data.chat_templates import ChatTemplate, read_chat_template
from hybrid_jax.data.huggingface_tokenizer import HuggingFaceTokenizer, end_id
from hybrid_jax.data.start_tokens import AddBos, force_bos
from hybrid_jax.data.tokenizer_base import Tokenizer, Tokens, encodable, one_at_a_time
from hybrid_jax.data.tokenizer_files import (
    CONFIG,
    SENTENCEPIECE,
    VOCABULARY,
    check_tokenizer_files,
    missing_package,
)

EOS_TOKEN = "<|endoftext|>"
KIND_KEY = "hybrid_jax_kind"  # in tokenizer_config.json; transformers ignores it
BYTES = 256


class TokenizerBuilder(Protocol):
    """Settings of a tokenizer, an entry of `TOKENIZERS`."""

    def build(self, texts: Iterable[str]) -> Tokenizer:
        """The tokenizer; ``texts`` are read only by kinds that are trained on the data."""
        ...


TOKENIZERS: Registry[TokenizerBuilder] = Registry("tokenizer")


class FastTokenizer:
    """A ``tokenizers.Tokenizer`` with an end token. In a text, special tokens are ordinary letters."""

    start_ids = ()

    def __init__(self, backend: Any, kind: str, chat_template: str | None = None):
        backend.encode_special_tokens = True
        self._backend = backend
        self._lock = threading.Lock()
        self._kind = kind
        self.chat_template = chat_template
        self.template_variables = {"eos_token": EOS_TOKEN}
        added = backend.get_added_tokens_decoder().items()
        self.special_tokens = {token.content: id for id, token in added if token.special}

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return self._backend.get_vocab_size()

    @property
    def eos_id(self) -> int:
        """The id of the end token."""
        return self._backend.token_to_id(EOS_TOKEN)

    @property
    def vocabulary(self) -> Mapping[str, int]:
        """The ids of all tokens."""
        return self._backend.get_vocab()

    @one_at_a_time
    def encode(self, text: str) -> list[int]:
        """The ids of ``text``; special tokens written in it are ordinary letters."""
        return self._backend.encode(encodable(text), add_special_tokens=False).ids

    @one_at_a_time
    def encode_batch(self, texts: Sequence[str], *, plain: bool = False) -> list[list[int]]:
        """The ids of each text; special tokens are ordinary letters, ``plain`` or not."""
        encodings = self._backend.encode_batch_fast([*map(encodable, texts)], add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_rendered(self, text: str, *, plain: bool = False) -> Tokens:
        """The ids of a rendered chat, whose special tokens count unless ``plain``."""
        return self.encode_all_rendered([text], plain=plain)[0]

    @one_at_a_time
    def encode_all_rendered(self, texts: Sequence[str], *, plain: bool = False) -> list[Tokens]:
        """The ids of rendered chats, as of each alone."""
        self._backend.encode_special_tokens = plain
        try:
            encoded = self._backend.encode_batch(list(texts), add_special_tokens=False)
        finally:
            self._backend.encode_special_tokens = True
        return [Tokens(one.ids, one.offsets) for one in encoded]

    @one_at_a_time
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids`` without special tokens."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(folder / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": EOS_TOKEN,
            "clean_up_tokenization_spaces": False,
            KIND_KEY: self._kind,
        }
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


@TOKENIZERS.register("bytes")
@settings
class Bytes:
    """The 256 bytes of UTF-8 as ids 0 to 255, and the end token 256.

    Attributes:
        chat_template: the name of a template ("chatml", "plain") or a jinja file; its special tokens follow
            the end token.
    """

    chat_template: str | None = None

    def build(self, texts: Iterable[str] = ()) -> Tokenizer:
        """Makes the tokenizer; it reads no texts."""
        from tokenizers import AddedToken, models

        letters = _byte_letters()
        backend = _byte_level(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
        template = _named_template(self.chat_template)
        special = (EOS_TOKEN, *template.special_tokens)
        backend.add_special_tokens([AddedToken(token, special=True) for token in special])
        return FastTokenizer(backend, "bytes", template.source or None)


@TOKENIZERS.register("bpe")
@settings
class Bpe:
    """Byte-level byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909) trained on the data.

    Attributes:
        vocab_size: ids in all, at least 257: the bytes, the end token, and merges for the rest (fewer where
            the data has no more pairs to merge).
        chat_template: as in `Bytes`; its special tokens are part of ``vocab_size``.
    """

    vocab_size: Annotated[int, Interval(ge=257, le=2**20)] = 512
    chat_template: str | None = None

    def build(self, texts: Iterable[str]) -> Tokenizer:
        """Trains the merges on ``texts``."""
        from tokenizers import models, pre_tokenizers, trainers

        backend = _byte_level(models.BPE())
        template = _named_template(self.chat_template)
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=[EOS_TOKEN, *template.special_tokens],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator((encodable(text) for text in texts), trainer)
        return FastTokenizer(backend, "bpe", template.source or None)


@TOKENIZERS.register("huggingface")
@settings
class HuggingFace:
    """The tokenizer of a Hugging Face folder (or of a cached model name). Code in the folder is never run.

    Attributes:
        path: the folder or the name.
        chat_template: instead of the folder's own template, as in `Bytes`, but no token is added: the
            vocabulary must have those that the template writes.
        add_bos: whether a text outside chat templates begins with the BOS token: "auto" as transformers does
            by default with this folder; true or false instead, also in what is exported.
    """

    path: str
    chat_template: str | None = None
    add_bos: AddBos = "auto"

    def build(self, texts: Iterable[str] = ()) -> Tokenizer:
        """Reads the folder; it reads no texts."""
        return _load_huggingface(self.path, self.chat_template, self.add_bos)


def load_tokenizer(folder: str | Path, add_bos: AddBos = "auto") -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote, or that of any Hugging Face folder, with or without BOS."""
    folder = Path(folder)
    check_tokenizer_files(folder)
    config = read_json(folder / CONFIG) if (folder / CONFIG).exists() else {}
    if KIND_KEY not in config:
        return _load_huggingface(str(folder), add_bos=add_bos)
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_file(str(folder / VOCABULARY))
    except Exception as error:  # tokenizers raises nothing more specific
        raise UserError(f"the tokenizer in {str(folder)!r} cannot be read: {error}") from error
    if backend.token_to_id(EOS_TOKEN) is None:
        raise UserError(f"the tokenizer in {str(folder)!r} has no token {EOS_TOKEN!r}, with which texts end")
    kind, template = config[KIND_KEY], config.get("chat_template")
    if not isinstance(kind, str) or not isinstance(template, str | None):
        raise UserError(f"{folder / CONFIG}: {KIND_KEY} and chat_template must be texts")
    return FastTokenizer(backend, kind, template)


def _load_huggingface(path: str, chat_template: str | None = None, add_bos: AddBos = "auto") -> Tokenizer:
    from transformers import AutoTokenizer

    if Path(path).is_dir():
        check_tokenizer_files(Path(path))
    try:
        backend = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # its readers raise many kinds of errors
        if package := missing_package(Path(path)):
            raise UserError(
                f"the tokenizer in {path!r} is {SENTENCEPIECE!r} alone, which the package {package} reads: "
                f"pip install {package}, or add the tokenizer.json of the same model"
            ) from error
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"no tokenizer can be loaded from {path!r}: {reason}") from error
    if end_id(backend) is None:
        raise UserError(f"the tokenizer of {path!r} has no end token; set eos_token in tokenizer_config.json")
    if chat_template is not None:
        template = _named_template(chat_template)
        if missing := [token for token in template.special_tokens if token not in backend.get_vocab()]:
            raise UserError(
                f"chat_template {chat_template!r} needs the token {missing[0]!r}, which the tokenizer of "
                f"{path!r} has not; take 'plain', or a template of its own tokens"
            )
        backend.chat_template = template.source
    if add_bos != "auto":
        force_bos(backend, bool(add_bos), path)
    return HuggingFaceTokenizer(backend)


def _named_template(name: str | None) -> ChatTemplate:
    return ChatTemplate("") if name is None else read_chat_template(name)


def _byte_level(model: Any) -> Any:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, pre_tokenizers

    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore
    backend.decoder = decoders.ByteLevel()  # type: ignore
    return backend


def _byte_letters() -> list[str]:
    """The printable letter that byte-level tokenizers write for each byte, in byte order, as GPT-2 does.

    Printable Latin-1 stands for itself; the other bytes take the letters from U+0100 on, in order.
    """
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    letters, borrowed = [], 0
    for byte in range(BYTES):
        letters.append(chr(byte) if byte in printable else chr(0x100 + borrowed))
        borrowed += byte not in printable
    return letters
