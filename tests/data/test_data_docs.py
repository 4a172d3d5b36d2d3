"""The rows that docs/data.md shows are read by the sources that it names, and mean what it says."""

import json
import re
from pathlib import Path

import yaml

from hybrid_jax.core.config import parse
from hybrid_jax.data import conversations  # noqa: F401  it registers its source
from hybrid_jax.data.sources import SOURCES

DOCS = Path(__file__).parents[2] / "docs" / "data.md"


def test_every_row_that_the_docs_show_is_read_by_the_source_that_they_name(tmp_path):
    section = DOCS.read_text().split("## What rows may look like")[1].split("\n## ")[0]
    found = re.findall(r"`(\{name: [^`]*\})`[^`]*(?:`[^`]+`[^`]*)*?```json\n(.*?)```", section, re.DOTALL)
    assert len(found) == section.count("```json") == 6
    for settings, rows in found:
        path = tmp_path / "rows.json"
        path.write_text(rows)
        settings = {**yaml.safe_load(settings), "train": str(path)}
        source = parse(SOURCES[settings.pop("name")], settings, "data")
        examples = source.load("train")
        assert {example.response for example in examples} <= {"4", "Hello!"}
        texts = {message["content"] for example in examples for message in example.messages}
        assert texts <= {"Hi", "Hm?", "2 + 2?", "4", ""}
        for example in examples:
            assert all(not isinstance(example.columns.get(name), str) for name in ("tools", "documents"))
    alpaca = json.loads(found[1][1])
    assert len(alpaca) == 2
