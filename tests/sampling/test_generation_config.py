import json

import pytest

from hybrid_jax.core.errors import UserError
from hybrid_jax.sampling.ancestral import Ancestral
from hybrid_jax.sampling.generation_config import read_eos_ids, read_generation_config, write_generation_config


def read(folder, **settings):
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return read_generation_config(folder, 7)


def test_settings_that_sample_are_taken_and_missing_ones_are_those_of_transformers(tmp_path):
    everything = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "max_new_tokens": 9}
    assert read(tmp_path, **everything)[0] == Ancestral(9, 0.6, 20, 0.95)
    assert read(tmp_path, do_sample=True)[0] == Ancestral(7, 1.0, 50, None)
    assert read(tmp_path, do_sample=True, top_k=0, top_p=1.0)[0] == Ancestral(7, 1.0, None, None)
    assert read(tmp_path, do_sample=True, top_k=None, temperature=None)[0] == Ancestral(7, 1.0, 50, None)


def test_rules_for_one_token_are_taken_and_what_changes_nothing_is_none(tmp_path):
    rules = {"min_p": 0.1, "typical_p": 0.9, "repetition_penalty": 1.05}
    assert read(tmp_path, do_sample=True, top_k=0, **rules)[0] == Ancestral(7, **rules)
    off = {"min_p": 0, "typical_p": 1.0, "repetition_penalty": 1.0}
    assert read(tmp_path, do_sample=True, top_k=0, **off)[0] == Ancestral(7)
    assert read(tmp_path, **rules)[0] == Ancestral(7, 0.0, repetition_penalty=1.05)  # penalties are no draw


def test_without_do_sample_it_is_greedy(tmp_path):
    assert read(tmp_path, temperature=0.6, top_p=0.9)[0] == Ancestral(7, temperature=0.0)
    assert read(tmp_path)[0] == Ancestral(7, temperature=0.0)


def test_end_tokens_are_one_or_a_list_in_its_order(tmp_path):
    assert read(tmp_path, eos_token_id=2)[1] == (2,)
    assert read(tmp_path, eos_token_id=[128001, 128008, 128009])[1] == (128001, 128008, 128009)
    assert read(tmp_path, eos_token_id=[5, 3, 5])[1] == (5, 3)
    assert read(tmp_path)[1] == ()
    assert read_eos_ids(tmp_path / "nowhere") == ()


def test_an_older_folder_says_all_of_it_in_its_config(tmp_path):
    old = {"model_type": "gpt2", "eos_token_id": 4, "do_sample": True, "temperature": 0.5, "top_k": 3}
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert read_generation_config(tmp_path, 7) == (Ancestral(7, 0.5, 3, None), (4,))
    assert read_eos_ids(tmp_path) == (4,)
    # A generation_config.json stands alone, but for the end tokens that it does not name.
    assert read(tmp_path, max_new_tokens=2) == (Ancestral(2, 0.0), (4,))
    assert read(tmp_path, eos_token_id=[6, 7])[1] == read_eos_ids(tmp_path) == (6, 7)


def test_settings_that_would_change_the_distribution_are_named_in_one_warning(tmp_path, caplog):
    read(tmp_path, epsilon_cutoff=0.1, min_length=5, num_beams=4, do_sample=True, bad_words_ids=[[3]])
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{tmp_path}/generation_config.json: settings that are not supported are left out: "
        "bad_words_ids, epsilon_cutoff, min_length, num_beams"
    )
    caplog.clear()
    read(tmp_path, min_p=None, repetition_penalty=1.0, num_beams=1, typical_p=1.0, no_repeat_ngram_size=0)
    assert not caplog.records


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"do_sample": True, "temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"do_sample": True, "top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 1, got -1"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be a token id or a list of them, got '</s>'"),
        ({"eos_token_id": [2, None]}, "eos_token_id must be a token id or a list of them"),
    ],
)
def test_a_wrong_setting_is_one_line_with_its_file(settings, problem, tmp_path):
    with pytest.raises(UserError, match=rf"^{tmp_path}/generation_config\.json: {problem}"):
        read(tmp_path, **settings)


@pytest.mark.parametrize("content", ["{", "[1]", "\udcff", "[" * 50_000])
def test_a_damaged_file_is_one_line_with_its_name(content, tmp_path):
    (tmp_path / "generation_config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"generation_config\.json"):
        read_generation_config(tmp_path, 7)


@pytest.mark.parametrize(
    "sampler",
    [
        Ancestral(5),
        Ancestral(5, 0.0, repetition_penalty=1.2),
        Ancestral(5, 0.7, 4),
        Ancestral(5, 1.0, None, 0.9),
        Ancestral(5, min_p=0.1, typical_p=0.9),
    ],
)
def test_what_is_written_is_read_again_beside_what_was_there(sampler, tmp_path):
    before = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 3, "min_p": 0.3}
    (tmp_path / "generation_config.json").write_text(json.dumps(before))
    write_generation_config(tmp_path, sampler, (3, 9))
    assert read_generation_config(tmp_path, 7) == (sampler, (3, 9))
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"]) == (1, [3, 9])
    assert "_from_model_config" not in written


def test_end_tokens_alone_are_one_id_or_a_list(tmp_path):
    write_generation_config(tmp_path, None, (3,))
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": 3}
