"""Tokens and masks of the chat templates that TRL ships, against `transformers` and TRL's training templates.

docs/chat_templates.md lists, for each template and each conversation, that both are equal or why they are not.
A sign is given only where what it says of the tokens is true (`scripts/chat_template_table.py`).
"""

import importlib.util
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location(
    "chat_template_table", ROOT / "scripts" / "chat_template_table.py"
)
table = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = table
SPEC.loader.exec_module(table)

PAGE = table.PAGE.read_text(encoding="utf-8")
SOME = ("qwen3", "llama3_1", "phi3", "deepseek_r1_distill", "gemma")


@pytest.fixture(scope="module", autouse=True)
def same_trl():
    """The page is about one version; another one ships other templates."""
    (version,) = re.findall(r"that TRL\n(\S+) ships", PAGE)
    if importlib.util.find_spec("trl") is None or metadata.version("trl") != version:
        pytest.skip(f"the page is about TRL {version}")


@pytest.mark.parametrize("name", SOME)
def test_tokens_and_mask_are_those_of_the_training_template_or_the_page_says_why_not(name):
    (template,) = table.templates(lambda found: found == name)
    assert table.row(template) in PAGE.splitlines()


@pytest.mark.slow
def test_the_page_is_what_the_script_writes_and_no_difference_is_without_a_reason():
    assert table.page() == PAGE
    assert not [line for line in PAGE.splitlines() if re.search(r"  \?( |$)", line)]


def test_equal_means_equal_tokens_and_an_equal_mask():
    """Of a template whose reference mask is known by hand, so that the comparison itself is checked."""
    (template,) = table.templates(lambda found: found == "qwen3_instruct_2507")
    messages, variables = template.shape("parallel calls, results, answer")
    reference = template.reference(messages, variables)
    assert table.compare(template, "parallel calls, results, answer") == "="
    pairs = zip(reference.ids, reference.mask, strict=True)
    learned = template.theirs.decode([token for token, kept in pairs if kept], skip_special_tokens=False)
    calls = "\n".join(
        f'<tool_call>\n{{"name": "weather", "arguments": {{"city": "{city}"}}}}\n</tool_call>'
        for city in ("Oslo", "Rome")
    )
    assert learned == f"{calls}<|im_end|>\nYes, it is.<|im_end|>\n"
    changed = template.reference(messages[:-1], variables)
    assert template.own(messages, variables) == [reference] != [changed]
