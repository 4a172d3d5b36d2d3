"""Prompts and responses outside chat templates, against the tokenizers that transformers makes."""

import json
import logging

import numpy as np
import pytest

from hybrid_jax.core.batches import Example
from hybrid_jax.core.errors import UserError
from hybrid_jax.data.continuations import decode_behind, encode_continuations, encode_prompts
from hybrid_jax.data.loader import PromptStream, SFTStream
from hybrid_jax.data.long_rows import LongRows
from hybrid_jax.data.packing import encode_examples
from hybrid_jax.data.scored_text import encode_scored
from hybrid_jax.data.tokenizer import Bytes, HuggingFace, load_tokenizer

CORPUS = [
    "Question: how many are four and two?\nAnswer: six, or 6 if you like.",
    "def f(x):\n    return x + 1  # a function that adds one\n",
    "The prefix is prefixed; the answer: 42, and 4 more tokens.\n\n  two  spaces",
] * 20
KINDS = ("sentencepiece", "metaspace", "unigram", "wordpiece", "byte level", "slow")
PROMPTS = (
    "A:\n",
    "A: ",
    "A:",
    "Write code:\n\n",
    "x\t",
    "日本",
    "🍕",
    "pre",
    "  two  ",
    "end.\n ",
    "a\r\n",
    "4",
)
RESPONSES = (
    "four",
    "4",
    "    return x",
    " lead",
    "\nnext",
    "\ttab",
    "🍕 pizza",
    "語です",
    "",
    "fix",
    " ",
    "</s>",
    "\n",
)


def train(kind):
    """A tokenizer as those that folders hold, with a BOS in front of every text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = ["<unk>", "<s>", "</s>"]
    if kind == "byte level":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    elif kind == "unigram":
        backend = Tokenizer(models.Unigram())
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=150, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    elif kind == "wordpiece":
        backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    else:  # as Llama's: spaces become letters, and what the vocabulary lacks becomes bytes
        backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        trainer = trainers.BpeTrainer(
            vocab_size=200, special_tokens=special, show_progress=False, max_token_length=8
        )
    backend.train_from_iterator(CORPUS, trainer)
    if kind in ("sentencepiece", "metaspace"):
        state = json.loads(backend.to_str())
        vocabulary = state["model"]["vocab"]
        vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
        backend = Tokenizer.from_str(json.dumps(state))
        if kind == "sentencepiece":
            backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
            backend.pre_tokenizer = None
        else:
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B:1", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return backend


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

    def make(kind):
        folder = tmp_path_factory.mktemp("tokenizer") / "folder"
        if kind == "slow":
            ByT5Tokenizer().save_pretrained(folder)
        else:
            names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
            PreTrainedTokenizerFast(tokenizer_object=train(kind), **names).save_pretrained(folder)
        return folder

    return {kind: make(kind) for kind in KINDS}


@pytest.fixture(params=KINDS)
def tokenizer(request, folders):
    return HuggingFace(str(folders[request.param])).build()


@pytest.fixture
def llama(folders):
    return HuggingFace(str(folders["sentencepiece"])).build()


@pytest.fixture
def theirs(folders):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folders["sentencepiece"])


def pairs_of(tokenizer, plain=False):
    pairs = [(prompt, response) for prompt in PROMPTS for response in RESPONSES]
    prompts, responses = zip(*pairs, strict=True)
    return list(zip(pairs, encode_continuations(tokenizer, prompts, responses, plain=plain), strict=True))


def test_prompts_are_the_tokens_of_transformers_and_responses_the_rest_of_the_whole_text(tokenizer, folders):
    theirs = tokenizer._backend
    behind = len(theirs("a")["input_ids"]) - len(theirs("a", add_special_tokens=False)["input_ids"])
    behind -= len(tokenizer.start_ids)  # ByT5 ends a text; our end token does that
    checked = 0
    for (prompt, response), tokens in pairs_of(tokenizer):
        if response == "</s>" and behind:
            continue
        asked = theirs(prompt)["input_ids"]
        assert tokens.prompt == asked[: len(asked) - behind]
        whole = theirs(prompt + response)["input_ids"]
        if not tokens.joined:
            assert tokens.prompt + tokens.response == whole[: len(whole) - behind]
            checked += 1
    assert checked > len(PROMPTS) * len(RESPONSES) / 2


def test_every_response_reads_behind_its_prompt_as_it_is_written(tokenizer, request):
    kind = request.node.callspec.params["tokenizer"]
    for (prompt, response), tokens in pairs_of(tokenizer, plain=kind != "slow"):
        if kind == "slow" and response == "</s>":
            continue  # ByT5 cannot write its special tokens as letters
        text = decode_behind(tokenizer, tokens.prompt, tokens.response)
        if kind in ("unigram", "wordpiece"):  # they know no spaces at the ends, no line breaks and few letters
            known = set(prompt + response) <= set(CORPUS[0])
            assert not known or "".join(text.split()) == "".join(response.split()), (prompt, response, text)
        else:
            assert text == response, (prompt, response, text)


def test_a_response_on_a_new_line_gets_no_space_and_one_behind_a_space_not_two(llama):
    words = llama._backend.convert_ids_to_tokens
    (line, space) = encode_continuations(llama, ["A:\n", "A: "], ["four", "4"])
    assert words(line.response)[0][0] != "▁"
    assert llama.decode([*line.prompt, *line.response]) == "A:\nfour"
    assert llama.decode([*space.prompt, *space.response]) == "A: 4"


def test_rows_that_are_learned_begin_with_bos_once_and_never_learn_it(llama, theirs):
    rows = [Example("A:\n", "four"), Example("", "a document"), Example("<s>A:", " 4")]
    pair, document, written = encode_examples(rows, llama, None)
    end = theirs.eos_token_id
    assert pair.tokens.tolist() == [*theirs("A:\nfour")["input_ids"], end]
    assert pair.loss_mask.tolist() == [n >= len(theirs("A:\n")["input_ids"]) for n in range(len(pair.tokens))]
    assert document.tokens.tolist() == [*theirs("a document")["input_ids"], end]
    assert document.loss_mask.tolist() == [False] + [True] * (len(document.tokens) - 1)
    assert written.tokens.tolist() == [*theirs("<s>A: 4", add_special_tokens=False)["input_ids"], end]


def test_an_end_token_that_a_response_writes_is_not_taught_twice(llama, theirs):
    (row,) = encode_examples([Example("A:", " 4</s>")], llama, None)
    assert row.tokens.tolist() == theirs("A: 4</s>")["input_ids"]


def test_rows_whose_prompt_and_response_share_a_token_are_counted_once(llama, caplog):
    rows = [Example("A:\n", "four", where="d.jsonl:1"), Example("A: ", "four", where="d.jsonl:2")]
    with caplog.at_level(logging.INFO, "hybrid_jax"):
        encode_examples(rows, llama, None)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("1 of 2 rows (50 %) of d.jsonl, first line 2, have a prompt whose end")


def test_prompts_and_scored_rows_begin_with_bos_also_where_their_start_is_cut(llama, theirs):
    prompt = "Question: how many are four and two?"
    whole = theirs(prompt)["input_ids"]
    stream = PromptStream([Example(prompt)], llama, None)
    assert stream.batch(0, 1).unpadded() == [whole]
    cut = PromptStream([Example(prompt)], llama, 5, long_rows=LongRows("truncate_start", "max_prompt_length"))
    assert cut.batch(0, 1).unpadded() == [[whole[0], *whole[-4:]]]
    end = [theirs.eos_token_id]
    (row,) = encode_scored(llama, [prompt], [" six"], None)
    assert row.tolist() == theirs(prompt + " six")["input_ids"] + end
    (row,) = encode_scored(llama, [prompt], [" six"], 6)
    six = theirs(prompt + " six")["input_ids"][len(whole) :]
    assert row.tolist() == [whole[0], *whole[len(whole) - (4 - len(six)) :], *six, *end]
    (row,) = encode_scored(llama, None, ["six"], None)
    assert row.tolist() == theirs("six")["input_ids"] + end


def test_a_learned_row_whose_start_is_cut_keeps_its_bos(llama, theirs):
    (whole,) = encode_examples([Example("Question: how many?", " four")], llama, None)
    policy = LongRows("truncate_start", "max_length")
    (row,) = encode_examples([Example("Question: how many?", " four")], llama, len(whole.tokens) - 2, policy)
    assert row.tokens.tolist() == [theirs.bos_token_id, *whole.tokens[3:]]
    assert row.loss_mask.tolist() == [False, *whole.loss_mask[3:]]
    (row,) = encode_examples([Example("", "Question: how many?")], llama, 5, policy)
    assert row.tokens[0] == theirs.bos_token_id
    assert row.loss_mask.tolist() == [False, False, True, True, True]  # no beginning is taught from the middle


def test_windows_of_long_documents_begin_with_bos_and_score_every_token_once(llama, theirs):
    documents = [CORPUS[0], CORPUS[1]]
    stream = SFTStream([Example("", text) for text in documents], llama, 12)
    bos, learned = theirs.bos_token_id, []
    for batch in (*stream.sequential(4), stream.batch(0, 4), stream.batch(stream.num_rows, 3)):
        tokens, segments, mask = map(np.asarray, (batch.tokens, batch.segment_ids, batch.loss_mask))
        for row, segment, targets in zip(tokens, segments, mask, strict=True):
            if segment[0]:
                assert (row[0], targets[0], targets[1]) == (bos, False, False)
                # A second BOS is the document's own, and nothing reads the first one then.
                assert (row[1] == bos) == (segment[1] != segment[0])
    for batch in stream.sequential(4):
        learned += np.asarray(batch.tokens)[np.asarray(batch.loss_mask)].tolist()
    end = theirs.eos_token_id
    assert learned == [token for text in documents for token in [*theirs(text)["input_ids"][1:], end]]


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("kind", ["sentencepiece", "byte level"])
def test_forced_bos_is_what_transformers_does_with_the_saved_folder(folders, tmp_path, kind, wanted):
    from transformers import AutoTokenizer

    own = [theirs_id] if (theirs_id := HuggingFace(str(folders[kind])).build().start_ids[0]) and wanted else []
    HuggingFace(str(folders[kind]), add_bos=not wanted).build().save(tmp_path / "other")
    forced = HuggingFace(str(tmp_path / "other"), add_bos=wanted).build()
    forced.save(tmp_path / "saved")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    plain = theirs("A: 4", add_special_tokens=False)["input_ids"]
    assert theirs("A: 4")["input_ids"] == [*own, *plain]
    for tokenizer in (forced, load_tokenizer(tmp_path / "saved")):
        assert encode_prompts(tokenizer, ["A: 4"]) == [[*own, *plain]]


def test_what_transformers_puts_behind_a_text_stays_where_bos_is_forced(folders, tmp_path):
    from tokenizers import processors
    from transformers import AutoTokenizer

    backend = AutoTokenizer.from_pretrained(folders["sentencepiece"])
    backend.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B:1 </s>", special_tokens=[("</s>", backend.eos_token_id)]
    )
    backend.save_pretrained(tmp_path / "T5")
    tokenizer = HuggingFace(str(tmp_path / "T5")).build()
    assert tokenizer.start_ids == ()
    HuggingFace(str(tmp_path / "T5"), add_bos=True).build().save(tmp_path / "forced")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "forced")
    plain = theirs("four", add_special_tokens=False)["input_ids"]
    assert theirs("four")["input_ids"] == [theirs.bos_token_id, *plain, theirs.eos_token_id]


def test_a_bos_that_cannot_be_added_is_one_clear_line(folders):
    with pytest.raises(UserError, match=r"tokenizer.add_bos must not be true for .* has no BOS token"):
        HuggingFace(str(folders["slow"]), add_bos=True).build()
    assert HuggingFace(str(folders["slow"]), add_bos=False).build().start_ids == ()


def test_bytes_have_no_start_and_continue_as_they_are():
    tokenizer = Bytes().build()
    assert tokenizer.start_ids == ()
    (tokens,) = encode_continuations(tokenizer, ["A: "], ["é"])
    assert tokens == (list(b"A: "), list("é".encode()), False)
