"""Bad inputs by kind: configs, settings, data, model folders, run directories, judges and command lines.

Each kind is a generator of `Case`s. A case plants files in a folder of its own and names the command that meets
them; every one of them must end the same way, which `run.py` checks.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Place:
    """What cases start from: good things of which they break a copy."""

    config: Path  # of a tiny run
    data: Path  # its data, JSON lines
    run: Path  # finished
    model: Path  # its policy as a Hugging Face folder
    judge: str  # URL of a server whose path says how it misbehaves


@dataclass(frozen=True)
class Case:
    """One bad input.

    Attributes:
        kind: What is bad.
        name: Which of its kind.
        plant: Puts files into the folder that it is given and returns the command's arguments.
        command: Module of `hybrid_jax` whose ``main`` meets them.
    """

    kind: str
    name: str
    plant: Callable[[Path], list[Any]]
    command: str = "train"


def all_cases(place: Place) -> list[Case]:
    """Every case, in an order that never changes."""
    kinds = (configs, settings, command_lines, data, model_folders, run_directories, judges)
    return [case for kind in kinds for case in kind(place)]


def configs(place: Place) -> Iterator[Case]:
    """Files given to ``--config``, and to ``base:`` in one."""
    good = place.config.read_text()
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
    texts: dict[str, str | bytes] = {
        "empty": "",
        "only a comment": "# nothing\n",
        "null": "null\n",
        "a list": "- steps: 3\n",
        "a number": "7\n",
        "a text": "steps\n",
        "two documents": good + "---\n" + good,
        "a tab as indentation": "phases:\n\tsft: {}\n",
        "an open bracket": "steps: [1\n",
        "an open quote": "run_dir: 'x\n",
        "an open brace": "model: {name: decoder\n",
        "an unknown anchor": "steps: *gone\n",
        "a Python object": "steps: !!python/object/apply:os.system ['true']\n",
        "a Python name": "steps: !!python/name:os.system\n",
        "an unknown tag": "steps: !mine 3\n",
        "a set": "phases: !!set {sft}\n",
        "a binary": "run_dir: !!binary aGVsbG8=\n",
        "a date": good + "seed: 2026-01-01\n",
        "a bomb of aliases": bomb,
        "an alias that holds itself": "phases: &a {sft: *a}\n",
        "20,000 brackets": "steps: " + "[" * 20_000,
        "20,000 closed brackets": "steps: " + "[" * 20_000 + "]" * 20_000 + "\n",
        "20,000 braces": "steps: " + "{a: " * 20_000 + "1" + "}" * 20_000 + "\n",
        "5,000 levels of blocks": "".join(" " * i + "a:\n" for i in range(5_000)),
        "a number of 400 digits": f"steps: {'9' * 400}\n",
        "a number of 5,000 digits": f"steps: {'9' * 5000}\n",
        "a float of 400 digits": f"seed: {'9' * 400}.5\n",
        "a key of a megabyte": f"? {'k' * 1_000_000}\n: 1\n",
        "a null byte": b"steps: 3\x00\n",
        "control characters": b"steps: \x01\x02\n",
        "latin-1": "run_dir: caf\xe9\n".encode("latin-1"),
        "half of a UTF-16 file": "steps: 3\n".encode("utf-16")[:-1],
        "a PNG": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
        "gzip": gzip.compress(good.encode()),
        "a key twice": good + "steps: 4\n",
        "a key twice inside": good.replace("model:", "model: {name: decoder, name: decoder}\nmodel2:"),
        "a key that is a list": "? [a, b]\n: 1\n",
        "a key that is a number": "3: 4\n",
        "a key that is null": "~: 4\n",
        "a merge of nothing": "<<: 3\n",
        "sexagesimal steps": good.replace("steps: 3", "steps: 1:30"),
        "a base that is a number": "base: 3\n",
        "a base that is a list": "base: [a.yaml]\n",
        "a base that is not there": "base: gone.yaml\n",
        "a base that is a folder": "base: .\n",
        "a base that is itself": "base: config.yaml\n",
        "a base that is a device": "base: /dev/zero\n",
        "a base from the net": "base: https://example.invalid/a.yaml\n",
        "nothing that it needs": "steps: 3\n",
        "an unknown setting": good + "stepz: 3\n",
        "phases as a list": "phases: [sft, ppo]\nsteps: 3\n",
        "phases as null": good + "\nevaluation: null\n",
        "a megabyte of dashes": "-" * 1_000_000 + "\n",
        "a carriage return in a name": '"run\\rdir": x\n',
        "quotes that end a terminal": '"\\e[31mred": x\n',
    }
    for name, text in texts.items():
        yield Case("config", name, _config_file(text))
    yield Case("config", "a folder", lambda folder: ["--config", folder])
    yield Case("config", "not there", lambda folder: ["--config", folder / "gone.yaml"])
    yield Case("config", "an empty name", lambda folder: ["--config", ""])
    yield Case("config", "/dev/zero", lambda folder: ["--config", "/dev/zero"])
    yield Case("config", "/dev/null", lambda folder: ["--config", "/dev/null"])
    yield Case("config", "a pipe that nobody writes to", lambda folder: ["--config", _fifo(folder / "c.yaml")])
    yield Case(
        "config", "200 MB of nothing", lambda folder: ["--config", _sparse(folder / "c.yaml", 200 << 20)]
    )
    yield Case("config", "a link to itself", lambda folder: ["--config", _loop(folder / "c.yaml")])
    yield Case("config", "a name of 5,000 letters", lambda folder: ["--config", "c" * 5_000])
    yield Case("config", "a name with a null", lambda folder: ["--config", "c\0.yaml"])


def settings(place: Place) -> Iterator[Case]:
    """Values that a setting cannot have, given on the command line."""
    wrong: dict[str, tuple[Any, ...]] = {
        "steps": ("-1", "1.5", ".nan", ".inf", "x", "[1]", "1e30", "9" * 400, "null", "true", "1:30"),
        "seed": ("-1", "4294967296", "9" * 30, "1.5", "null", "x"),
        "run_dir": ("null", "''", "[a]", "3", "r" * 5_000, '"a\\0b"'),
        "start_from": ("r" * 5_000, "gone", "3", '"a\\0b"'),
        "model.width": ("0", "-16", ".nan", "x", "17", "1000000", "9999999999999"),
        "model.num_layers": ("-1", "1.5", "null", "x", "2000000000"),
        "model.num_heads": ("0", "3", "-2", "x"),
        "model.init_std": ("-1", ".nan", ".inf", "x"),
        "model.logit_scale": ("0", ".nan", ".inf"),
        "model.max_length": ("0", "-1", "x", "2000000000"),
        "model.dtype": ("float8", "3", "[]"),
        "phases.sft.batch_size": ("0", "-4", "1.5", "x", "null", "{}", "2000000000"),
        "phases.sft.length": ("0", "1", "-1", "1000000", "x"),
        "phases.sft.optimizer.learning_rate": ("-1", ".nan", ".inf", "x", "null", "[1]"),
        "phases.sft.optimizer.weight_decay": ("-1", ".nan", "x"),
        "phases.sft.optimizer": ("sgdd", "{name: 3}", "{nam: adamw}", "[]"),
        "phases.sft.microbatches": ("0", "3", "-1", "x"),
        "phases.ppo.value_coef": ("-1", ".nan", ".inf", "x"),
        "phases.ppo.clip_range": ("-1", ".nan", "0", "x"),
        "phases.ppo.target_kl": ("-1", ".nan", "0", "x"),
        "phases.ppo.value_warmup_steps": ("-5", "1.5", ".nan"),
        "phases.ppo.epochs": ("0", "-1", ".inf", "x"),
        "phases.ppo.discount": ("-0.1", "1.1", ".nan"),
        "phases.ppo.trace": ("-0.1", "1.1", ".nan"),
        "phases.ppo.minibatches": ("0", "3", "5", "x"),
        "phases.ppo.samples_per_prompt": ("0", "-1", "x", "2000000000"),
        "phases.ppo.sampler.temperature": ("-1", ".nan", ".inf", "x"),
        "phases.ppo.sampler.top_p": ("0", "1.5", ".nan"),
        "phases.ppo.sampler.max_new_tokens": ("0", "-1", "48", "1.5", "x"),
        "phases.ppo.kl_control": ("{name: fixed, coef: -1}", "{name: fixed, coef: .nan}", "{name: fixd}", "3"),
        "phases.ppo.reward": ("null", "{parts: {}}", "{parts: 3}", "3", "{parts: {a: {reward: lenght}}}"),
        "phases.ppo.reward.parts.length.weight": (".nan", ".inf", "x", "null"),
        "phases.ppo.reward.parts.length.clip": ("[1, -1]", "[1]", "3", "[.nan, 1]"),
        "phases.ppo.references": ("{a: {weight: -1}}", "3", "[a]"),
        "scheduler": ("zigzag", "{name: alternation, cycle: {}}", "{name: alternation, cycle: {dpo: 1}}", "3"),
        "scheduler.cycle.sft": ("-1", "1.5", "x"),
        "evaluation.every": ("0", "-1", "1.5", "x"),
        "evaluation.num_prompts": ("-1", "x"),  # 0 asks none
        "evaluation.batch_size": ("0", "2000000000"),
        "checkpoint.every": ("0", "-1", ".nan", "x"),
        "checkpoint.keep": ("0", "-1", "x"),
        "mesh.data": ("0", "-1", "1000", "x"),
        "tokenizer": (
            "bite",
            "{name: bpe, vocab_size: 3}",
            "{name: bpe, vocab_size: -1}",
            "{name: bpe, vocab_size: 2000000000}",
            "3",
        ),
        "data": ("null", "{name: jsonll}", "3", "{name: text, train: gone.txt}"),
        "data.held_out_fraction": ("0", "1", "-1", ".nan", "2", "x"),
        "data.prompt_field": ("gone", "3", "[a]"),
        "data.prompt_template": ("'{gone}'", "'{'", "'{0}'", "'{a.b}'"),
        "loggers": ("[tensorbord]", "3", "[{name: wandb, projekt: x}]"),
        "peak_tflops": ("0", "-1", ".nan"),
        "offload": ("[everything]", "3"),
    }
    for setting, values in wrong.items():
        for value in values:
            shown = value if len(value) < 40 else f"{value[:5]}… ({len(value)} characters)"
            yield Case("setting", f"{setting}={shown}", _override(place, f"{setting}={value}"))
    for override in (
        "steps",
        "=3",
        "steps=",
        "steps=[",
        "steps={",
        "steps=*a",
        "a..b=3",
        ".a=3",
        "phases.sft.lenght=8",
        "phases.sft.batch_size.more=8",
        "phases.dpo.length=8",
        "steps=" + "[" * 20_000,
        "steps=!!python/name:os.system",
    ):
        yield Case("setting", f"override {override[:40]}", _override(place, override))


def command_lines(place: Place) -> Iterator[Case]:
    """Arguments that make no sense, to every command."""
    run, model = str(place.run), str(place.model)
    lines: dict[str, tuple[list[str], ...]] = {
        "train": ([], ["--config"], ["--confg", "x"], ["x=1"], ["--config", str(place.config), "--stepz=3"]),
        "generate": (
            [],
            ["--run"],
            ["--run", run, "--model", model],
            ["--run", run, "--prompt", "a", "--prompts", "b"],
            ["--run", run, "--prompt", ""],
            ["--run", run, "--prompt", "a", "--num-samples", "0"],
            ["--run", run, "--prompt", "a", "--num-samples", "x"],
            ["--run", run, "--prompt", "a", "--seed", "-1"],
            ["--run", run, "--prompt", "a", "--seed", str(2**70)],
            ["--run", run, "--prompt", "a", "sampler.temperature=-1"],
            ["--run", run, "--prompt", "a", "sampler.temperature=.nan"],
            ["--run", run, "--prompt", "a", "sampler.top_p=0"],
            ["--run", run, "--prompt", "a", "sampler.tpo_p=0"],
            ["--run", run, "--prompt", "a", "temperature=1"],
            ["--run", run, "--prompt", "a" * 100_000],
            ["--run", run, "--prompts", "gone.txt"],
            ["--run", run, "--prompts", "/dev/zero"],
            ["--run", run, "--prompts", run],
            ["--model", "no/such/folder", "--prompt", "a"],
            ["--model", run, "--prompt", "a"],
            ["--run", model, "--prompt", "a"],
            ["--run", "", "--prompt", "a"],
        ),
        "evaluate": (
            [],
            ["--run"],
            ["--run", run, "--suite", "held_in"],
            ["--run", run, "--num-prompts", "-1"],
            ["--run", run, "--num-prompts", "x"],
            ["--run", run, "--json", "/no/such/folder/x.json"],
            ["--run", run, "evaluation.batch_size=0"],
            ["--run", "gone"],
            ["--suite", "rewards"],
            ["--suite", "rewards", "--reward", "lenght", "--data", str(place.data)],
            ["--suite", "rewards", "--reward", "length", "--data", "gone.jsonl"],
            ["--suite", "rewards", "--reward", "length", "--data", "/dev/zero"],
            ["--suite", "rewards", "--reward", "no_such_module:thing", "--data", str(place.data)],
            ["--suite", "rewards", "--reward", "bleu", "--data", str(place.data)],
        ),
        "export": (
            [],
            ["--run", run],
            ["--run", run, "--output", run],
            ["--run", "gone", "--output", "x"],
            ["--run", run, "--output", "/dev/null"],
            ["--run", run, "--output", "/proc/x"],
            ["--run", run, "--output", ""],
            ["--run", run, "--output", str(place.data)],
        ),
        "report": ([], ["--run"], ["--run", "gone"], ["--run", str(place.data)], ["--run", ""]),
        "plan": (
            [],
            ["--config", str(place.config)],
            ["--config", str(place.config), "--topology", "v9:2x2"],
            ["--config", str(place.config), "--topology", "v5e"],
            ["--config", str(place.config), "--topology", "v5e:0x4"],
            ["--config", str(place.config), "--topology", "v5e:axb"],
            ["--config", "gone.yaml", "--topology", "v5e:4x4"],
        ),
    }
    for command, arguments in lines.items():
        for line in (*arguments, *LONG_NAMES.get(command, ())):
            shown = " ".join(word if len(word) < 30 else f"…{word[-25:]}" for word in line)
            yield Case("command line", f"{command} {shown}", lambda folder, line=line: line, command)


LONG_NAMES = {
    "generate": (["--model", "m" * 5_000, "--prompt", "a"], ["--run", "r" * 5_000, "--prompt", "a"]),
    "evaluate": (["--run", "r" * 5_000],),
    "export": (["--run", "r" * 5_000, "--output", "o"],),
    "report": (["--run", "r" * 5_000],),
}


def data(place: Place) -> Iterator[Case]:
    """Files of rows."""
    row = {"prompt": "say 1:", "completion": "1 it is"}
    good = json.dumps(row) + "\n"
    deep = "[" * 50_000 + "]" * 50_000
    texts: dict[str, str | bytes] = {
        "empty": "",
        "blank lines": "\n\n \n",
        "half a row": good + '{"prompt": "a", "comp',
        "a list as a row": good + "[1, 2]\n",
        "a text as a row": good + '"a"\n',
        "a number as a row": good + "3\n",
        "null as a row": good + "null\n",
        "no prompt": good + '{"completion": "b"}\n',
        "no completion": good + '{"prompt": "b"}\n',
        "a number as the completion": good + '{"prompt": "a", "completion": 3}\n',
        "null as the completion": good + '{"prompt": "a", "completion": null}\n',
        "a list as the prompt": good + '{"prompt": ["a"], "completion": "b"}\n',
        "a field twice": good + '{"prompt": "a", "prompt": "b", "completion": "c"}\n',
        "NaN": good + '{"prompt": "a", "completion": "b", "x": NaN}\n',
        "Infinity": good + '{"prompt": "a", "completion": "b", "x": -Infinity}\n',
        "single quotes": good + "{'prompt': 'a', 'completion': 'b'}\n",
        "a comma at the end": good + '{"prompt": "a", "completion": "b",}\n',
        "a comment": good + "// rows\n",
        "two rows on a line": good.strip() + good,
        "one array over many lines": json.dumps([row, row], indent=1),
        "a half surrogate": good + '{"prompt": "\\ud800", "completion": "b"}\n',
        "50,000 brackets": good + f'{{"prompt": "a", "completion": "b", "x": {deep}}}\n',
        "50,000 brackets alone": "[" * 50_000,
        "a number of 5,000 digits": good + f'{{"prompt": "a", "completion": "b", "x": {"9" * 5000}}}\n',
        "latin-1": good.encode() + '{"prompt": "caf\xe9", "completion": "b"}\n'.encode("latin-1"),
        "UTF-16": (good * 3).encode("utf-16"),
        "a PNG": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
        "null bytes": b"\x00" * 100,
        "a null byte between": good.encode() + b"\x00\n",
        "a row of 20 MB that never ends": b'{"prompt": "' + b"a" * 20_000_000,
        "a control character": good.encode() + b'{"prompt": "a\x01", "completion": "b"}\n',
    }
    for name, text in texts.items():
        yield Case("data", name, _data_file(place, "data.jsonl", text))
    packed: dict[str, bytes] = {
        "gzip that is none": good.encode(),
        "gzip cut off": gzip.compress(good.encode() * 50)[:-12],
        "gzip with a wrong checksum": gzip.compress(good.encode())[:-8] + b"\0" * 8,
        "gzip of 300 MB of nothing": gzip.compress(b"\0" * 300_000_000, 9),
        "gzip of gzip": gzip.compress(gzip.compress(good.encode())),
        "gzip of nothing": gzip.compress(b""),
    }
    for name, content in packed.items():
        yield Case("data", name, _data_file(place, "data.jsonl.gz", content))
    special: dict[str, Callable[[Path], Any]] = {
        "not there": lambda folder: folder / "gone.jsonl",
        "a folder": lambda folder: folder,
        "a pipe that nobody writes to": lambda folder: _fifo(folder / "data.jsonl"),
        "/dev/zero": lambda folder: "/dev/zero",
        "/dev/null": lambda folder: "/dev/null",
        "a link to itself": lambda folder: _loop(folder / "data.jsonl"),
        "a URL": lambda folder: "https://example.invalid/data.jsonl",
        "an empty name": lambda folder: "''",
        "another user's file": lambda folder: "/proc/1/mem",
    }
    for name, path in special.items():
        yield Case("data", name, _data_path(place, path))
    chats: dict[str, Any] = {
        "messages as a text": {"messages": "hello"},
        "no messages": {"messages": []},
        "a message without a role": {"messages": [{"content": "a"}]},
        "a message without content": {"messages": [{"role": "user"}]},
        "an unknown role": {"messages": [{"role": "alien", "content": "a"}]},
        "content as a number": {"messages": [{"role": "user", "content": 3}]},
        "a message as a text": {"messages": ["hello"]},
        "only a user": {"messages": [{"role": "user", "content": "a"}]},
    }
    for name, chat in chats.items():
        yield Case("data", f"chat: {name}", _chat(place, chat, "chatml"))
    turns = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    templates: dict[str, str] = {
        "an endless loop": "{% for i in range(10**12) %}x{% endfor %}",
        "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
        "a macro that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "a division by zero": "{{ 1 / 0 }}",
        "a text of 10**10 letters": "{{ 'x' * 10**10 }}",
        "a power tower": "{{ 9**9**9 }}",
        "an attribute of a class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "an unknown filter": "{{ messages | gone }}",
        "an unknown name": "{{ gone.away }}",
        "a wrong syntax": "{% for %}",
        "an open block": "{% if messages %}",
        "an import": "{% import 'os' as os %}{{ os }}",
        "an include": "{% include '/etc/passwd' %}",
        "an error of its own": "{{ raise_exception('no') }}",
        "nothing": "",
        "only prompts": "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
    }
    for name, template in templates.items():
        yield Case("data", f"chat template: {name}", _chat(place, turns, template))


def model_folders(place: Place) -> Iterator[Case]:
    """Folders given to ``--model``, copies of a good one with one file changed."""

    def changed(change: Callable[[Path], None]) -> Callable[[Path], list[Any]]:
        def plant(folder: Path) -> list[Any]:
            copy = folder / "model"
            shutil.copytree(place.model, copy)
            change(copy)
            return ["--model", copy, "--prompt", "say 1:", "sampler.max_new_tokens=2"]

        return plant

    def config(**changes: Any) -> Callable[[Path], None]:
        return _json_change("config.json", changes)

    deep = '{"a": ' * 50_000 + "1" + "}" * 50_000
    files: dict[str, tuple[str, str | bytes | None]] = {
        f"{file}: {what}": (file, content)
        for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
        for what, content in (
            ("no JSON", "{"),
            ("a list", "[]"),
            ("50,000 levels", deep),
            ("no UTF-8", b"\xff\xfe{}"),
        )
    }
    files |= {
        "no config.json": ("config.json", None),
        "an empty config.json": ("config.json", ""),
        "special tokens of 50,000 levels": ("special_tokens_map.json", deep),
        "special tokens that are a list": ("special_tokens_map.json", "[]"),
        "added tokens twice": ("added_tokens.json", '{"a": 1, "a": 2}'),
        "a tokenizer without a model": ("tokenizer.json", "{}"),
        "a tokenizer of another kind": ("tokenizer.json", json.dumps({"model": {"type": "Alien"}})),
        "merges of unknown tokens": (
            "tokenizer.json",
            json.dumps({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["x", "y"]]}}),
        ),
        "a vocabulary with negative ids": (
            "tokenizer.json",
            json.dumps({"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}),
        ),
        "a generation of -1 tokens": ("generation_config.json", json.dumps({"max_new_tokens": -1})),
        "a temperature that is a text": (
            "generation_config.json",
            json.dumps({"do_sample": True, "temperature": "hot"}),
        ),
        "an end token that is a text": ("generation_config.json", json.dumps({"eos_token_id": "</s>"})),
        "no tokenizer.json": ("tokenizer.json", None),
        "no weights": ("model.safetensors", None),
        "empty weights": ("model.safetensors", b""),
        "weights cut off": ("model.safetensors", _cut(place.model / "model.safetensors")),
        "weights that are text": ("model.safetensors", "hello, weights"),
        "a header longer than the file": ("model.safetensors", struct.pack("<Q", 1 << 40) + b"{}"),
        "a header of 90 MB that is not there": ("model.safetensors", struct.pack("<Q", 90 << 20) + b"{}"),
        "a header that is no JSON": ("model.safetensors", struct.pack("<Q", 4) + b"nope"),
        "a header of 50,000 levels": ("model.safetensors", struct.pack("<Q", len(deep)) + deep.encode()),
        "a header that is a list": ("model.safetensors", struct.pack("<Q", 2) + b"[]"),
        "offsets behind the end": ("model.safetensors", _tensors({"w": ("F32", [4], [0, 16])}, b"")),
        "offsets the wrong way round": (
            "model.safetensors",
            _tensors({"w": ("F32", [4], [16, 0])}, b"\0" * 16),
        ),
        "tensors over each other": (
            "model.safetensors",
            _tensors({"w": ("F32", [4], [0, 16]), "v": ("F32", [4], [8, 24])}, b"\0" * 24),
        ),
        "a negative size": ("model.safetensors", _tensors({"w": ("F32", [-4], [0, 16])}, b"\0" * 16)),
        "an unknown dtype": ("model.safetensors", _tensors({"w": ("F99", [4], [0, 16])}, b"\0" * 16)),
        "other tensors": ("model.safetensors", _tensors({"w": ("F32", [4], [0, 16])}, b"\0" * 16)),
        "an index that leaves the folder": (
            "model.safetensors.index.json",
            json.dumps({"weight_map": {"w": "../../etc/passwd"}}),
        ),
        "an index to a file that is not there": (
            "model.safetensors.index.json",
            json.dumps({"weight_map": {"w": "gone.safetensors"}}),
        ),
        "an index that is a list": ("model.safetensors.index.json", "[]"),
        "an index whose map is a list": ("model.safetensors.index.json", json.dumps({"weight_map": ["w"]})),
    }
    for name, (file, content) in files.items():
        only_index = "index" in file
        yield Case("model folder", name, changed(_replace(file, content, only_index)), "generate")
    kinds: dict[str, dict[str, Any]] = {
        "an unknown family": {"model_type": "alien"},
        "a family as a number": {"model_type": 3},
        "no family": {"model_type": None},
        "a scorer's registry name that imports": {
            "model_type": "hybrid_jax_classifier",
            "model": {"name": "planted.module:thing"},
        },
        "a scorer without a model": {"model_type": "hybrid_jax_classifier"},
        "an auto map": {"model_type": "alien", "auto_map": {"AutoModelForCausalLM": "mine.Model"}},
        "no width": {"hidden_size": 0, "n_embd": 0},
        "a width of -16": {"hidden_size": -16, "n_embd": -16},
        "a width of 10**12": {"hidden_size": 10**12, "n_embd": 10**12},
        "layers as a text": {"num_hidden_layers": "many", "n_layer": "many"},
        "10**9 layers": {"num_hidden_layers": 10**9, "n_layer": 10**9},
        "10**9 labels": {"num_labels": 10**9},
        "10**12 positions": {"max_position_embeddings": 10**12, "n_positions": 10**12},
        "heads that do not divide": {"num_attention_heads": 3, "n_head": 3},
        "a vocabulary of 1": {"vocab_size": 1},
        "a vocabulary of -1": {"vocab_size": -1},
        "an unknown activation": {"hidden_act": "wobble", "activation_function": "wobble"},
    }
    for name, changes in kinds.items():
        yield Case("model folder", name, changed(config(**changes)), "generate")
    for name, make in {
        "config.json as a folder": lambda copy: _as_folder(copy / "config.json"),
        "config.json as a pipe": lambda copy: (os.unlink(copy / "config.json"), _fifo(copy / "config.json")),
        "config.json as /dev/zero": lambda copy: _link(copy / "config.json", "/dev/zero"),
        "merges.txt as /dev/zero": lambda copy: _link(_touched(copy / "merges.txt"), "/dev/zero"),
        "2 GB of nothing as a sentencepiece model": lambda copy: _sparse(copy / "tokenizer.model", 2 << 30),
        "generation_config.json as a pipe": lambda copy: (
            os.unlink(copy / "generation_config.json"),
            _fifo(copy / "generation_config.json"),
        ),
        "tokenizer.json as /dev/zero": lambda copy: _link(copy / "tokenizer.json", "/dev/zero"),
        "weights as a pipe": lambda copy: (
            os.unlink(copy / "model.safetensors"),
            _fifo(copy / "model.safetensors"),
        ),
        "weights as a folder": lambda copy: _as_folder(copy / "model.safetensors"),
        "weights as /dev/zero": lambda copy: _link(copy / "model.safetensors", "/dev/zero"),
        "2 GB of nothing as config.json": lambda copy: _sparse(copy / "config.json", 2 << 30),
        "2 GB of nothing as tokenizer.json": lambda copy: _sparse(copy / "tokenizer.json", 2 << 30),
        "pickled weights that run code": _pickle,
    }.items():
        yield Case("model folder", name, changed(make), "generate")


def run_directories(place: Place) -> Iterator[Case]:
    """Run directories, copies of a good one with one file changed."""

    def changed(command: str, change: Callable[[Path], Any]) -> Callable[[Path], list[Any]]:
        def plant(folder: Path) -> list[Any]:
            copy = folder / "run"
            shutil.copytree(place.run, copy)
            change(copy)
            extra = {"generate": ["--prompt", "a"], "export": ["--output", folder / "out"]}
            return ["--run", copy, *extra.get(command, [])]

        return plant

    def config(**changes: Any) -> Callable[[Path], None]:
        def change(copy: Path) -> None:
            settings = yaml.safe_load((copy / "config.yaml").read_text())
            (copy / "config.yaml").write_text(yaml.safe_dump({**settings, **changes}))

        return change

    planted = {"parts": {"mine": {"reward": {"name": "planted_module:reward"}}}}
    with_code = yaml.safe_load((place.run / "config.yaml").read_text())["phases"]
    with_code = {**with_code, "ppo": {**with_code["ppo"], "reward": planted}}
    changes: dict[str, Callable[[Path], Any]] = {
        "no config.yaml": lambda copy: (copy / "config.yaml").unlink(),
        "an empty config.yaml": lambda copy: (copy / "config.yaml").write_text(""),
        "a config.yaml that is a list": lambda copy: (copy / "config.yaml").write_text("- 1\n"),
        "a config.yaml with a bomb": lambda copy: (copy / "config.yaml").write_text("a: " + "[" * 20_000),
        "a config.yaml as a pipe": lambda copy: ((copy / "config.yaml").unlink(), _fifo(copy / "config.yaml")),
        "a config.yaml as /dev/zero": lambda copy: _link(copy / "config.yaml", "/dev/zero"),
        "a config.yaml without a model": config(model=None),
        "a config.yaml with another model": config(model={"name": "decoder", "width": 24, "num_heads": 2}),
        "a config.yaml with 10**9 layers": config(
            model={"name": "decoder", "width": 16, "num_heads": 2, "num_layers": 10**9}
        ),
        "a config.yaml whose model imports": config(model={"name": "planted_module:Model"}),
        "a tokenizer that is a file": lambda copy: (
            shutil.rmtree(copy / "tokenizer"),
            (copy / "tokenizer").write_text("x"),
        ),
        "no tokenizer": lambda copy: shutil.rmtree(copy / "tokenizer"),
        "an empty tokenizer": lambda copy: (shutil.rmtree(copy / "tokenizer"), (copy / "tokenizer").mkdir()),
        "no checkpoints": lambda copy: shutil.rmtree(copy / "checkpoints"),
        "empty checkpoints": lambda copy: (shutil.rmtree(copy / "checkpoints"), (copy / "checkpoints").mkdir()),
        "checkpoints that are a file": lambda copy: (
            shutil.rmtree(copy / "checkpoints"),
            (copy / "checkpoints").write_text("x"),
        ),
        "checkpoints with every file empty": lambda copy: _empty_files(copy / "checkpoints"),
        "checkpoints with every file flipped": lambda copy: _flip_files(copy / "checkpoints"),
        "checkpoints without half of their files": lambda copy: _drop_files(copy / "checkpoints"),
    }
    for name, change in changes.items():
        for command in ("generate", "export", "evaluate"):
            yield Case("run directory", f"{command}: {name}", changed(command, change), command)
    yield Case(
        "run directory",
        "evaluate: a config.yaml whose reward imports",
        changed("evaluate", config(phases=with_code)),
        "evaluate",
    )
    reports: dict[str, Callable[[Path], Any]] = {
        "no metrics": lambda copy: (copy / "metrics.jsonl").unlink(),
        "empty metrics": lambda copy: (copy / "metrics.jsonl").write_text(""),
        "metrics as a folder": lambda copy: _as_folder(copy / "metrics.jsonl"),
        "metrics as a pipe": lambda copy: ((copy / "metrics.jsonl").unlink(), _fifo(copy / "metrics.jsonl")),
        "metrics as /dev/zero": lambda copy: _link(copy / "metrics.jsonl", "/dev/zero"),
    }
    for name, change in reports.items():
        yield Case("run directory", f"report: {name}", changed("report", change), "report")


def judges(place: Place) -> Iterator[Case]:
    """Endpoints, asked once with no retry and no fallback; the server's path says how it misbehaves."""
    for path in JUDGE_PATHS:
        yield Case("judge", path, _judge(place, {"url": f"{place.judge}/{path}"}), "evaluate")
    for name, changes in {
        "a port where nobody listens": {"url": "http://127.0.0.1:9"},
        "no URL": {"url": ""},
        "a URL of another kind": {"url": "ftp://127.0.0.1"},
        "a file as URL": {"url": "file:///etc/passwd"},
        "a URL with a password": {"url": "http://me:secret@127.0.0.1"},
        "a key in the URL": {"url": "http://127.0.0.1?api_key=secret"},
        "a key as the variable": {"api_key_env": "sk-secret"},
        "a variable that is not set": {"api_key_env": "NO_SUCH_KEY_HERE"},
        "a key over http": {"url": "http://example.invalid", "api_key_env": "HOME"},
        "max_dollars of NaN": {"max_dollars": ".nan", "prompt_price": 1.0},
        "max_dollars without a price": {"max_dollars": 1.0},
        "negative retries": {"retries": -1},
        "read_seconds of 0": {"read_seconds": 0},
        "read_seconds of NaN": {"read_seconds": ".nan"},
        "read_seconds without end": {"read_seconds": ".inf"},
        "a fallback of 2": {"fallback": 2},
        "a concurrency of 0": {"concurrency": 0},
        "a cache that is a file": {"cache_dir": str(place.data)},
        "no model": {"model": None},
    }.items():
        yield Case("judge", name, _judge(place, changes), "evaluate")


JUDGE_PATHS = (
    "empty",
    "no_json",
    "a_list",
    "no_choices",
    "empty_choices",
    "choices_of_text",
    "no_message",
    "content_null",
    "content_number",
    "content_prose",
    "content_wrong_json",
    "score_of_text",
    "score_of_nan",
    "score_of_9",
    "deep_json",
    "digits",
    "latin_1",
    "2_megabytes",
    "endless",
    "drip_body",
    "drip_header",
    "drip_status",
    "continue_forever",
    "long_header",
    "many_headers",
    "closes_at_once",
    "closes_in_the_middle",
    "says_nothing",
    "no_http",
    "status_400",
    "status_401",
    "status_403",
    "status_404",
    "status_429",
    "status_500",
    "status_503_later",
    "status_999",
    "redirect",
    "redirect_to_file",
    "gzip_of_nothing",
    "wrong_length",
    "negative_length",
)


def _config_file(text: str | bytes) -> Callable[[Path], list[Any]]:
    def plant(folder: Path) -> list[Any]:
        path = folder / "config.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return ["--config", path, f"run_dir={folder / 'run'}"]

    return plant


def _override(place: Place, override: str) -> Callable[[Path], list[Any]]:
    def plant(folder: Path) -> list[Any]:
        return ["--config", place.config, f"run_dir={folder / 'run'}", override]

    return plant


def _data_file(place: Place, name: str, content: str | bytes) -> Callable[[Path], list[Any]]:
    def path(folder: Path) -> Path:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return folder / name

    return _data_path(place, path)


def _data_path(place: Place, path: Callable[[Path], Any]) -> Callable[[Path], list[Any]]:
    def plant(folder: Path) -> list[Any]:
        return ["--config", place.config, f"run_dir={folder / 'run'}", f"data.train={path(folder)}"]

    return plant


def _chat(place: Place, row: Any, template: str) -> Callable[[Path], list[Any]]:
    def plant(folder: Path) -> list[Any]:
        (folder / "chat.jsonl").write_text((json.dumps(row) + "\n") * 8)
        (folder / "template.jinja").write_text(template)
        named = template if template == "chatml" else folder / "template.jinja"
        source = f"data={{name: chat, train: {folder / 'chat.jsonl'}, held_out_fraction: 0.5}}"
        tokenizer = f"tokenizer={{name: bytes, chat_template: {named}}}"
        return ["--config", place.config, f"run_dir={folder / 'run'}", source, tokenizer]

    return plant


def _judge(place: Place, changes: dict[str, Any]) -> Callable[[Path], list[Any]]:
    def plant(folder: Path) -> list[Any]:
        endpoint = {
            "url": f"{place.judge}/no_json",
            "model": "m",
            "api_key_env": None,
            "retries": 0,
            "connect_seconds": 1.0,
            "read_seconds": 1.0,
            "concurrency": 1,
            "cache_dir": str(folder / "cache"),
            **changes,
        }
        endpoint = {name: float(v[1:]) if v in (".nan", ".inf") else v for name, v in endpoint.items()}
        reward = {"name": "rubric_judge", "rubric": "Is it kind?", "endpoint": endpoint}
        (folder / "reward.yaml").write_text(yaml.safe_dump(reward))
        (folder / "texts.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
        return ["--suite", "rewards", "--reward", folder / "reward.yaml", "--data", folder / "texts.jsonl"]

    return plant


_OF_ANY_FAMILY = (
    "model_type",
    "auto_map",
    "num_labels",
    "model",
)  # the others are called one thing in GPT-2, another in Llama


def _json_change(file: str, changes: dict[str, Any]) -> Callable[[Path], None]:
    def change(copy: Path) -> None:
        settings = json.loads((copy / file).read_text())
        known = {name: value for name, value in changes.items() if name in settings or name in _OF_ANY_FAMILY}
        (copy / file).write_text(json.dumps({**settings, **known}))

    return change


def _replace(file: str, content: str | bytes | None, only_index: bool) -> Callable[[Path], None]:
    def change(copy: Path) -> None:
        if only_index:
            (copy / "model.safetensors").unlink()
        if content is None:
            (copy / file).unlink()
        else:
            (copy / file).write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def _tensors(tensors: dict[str, tuple[str, list[int], list[int]]], body: bytes) -> bytes:
    header = {name: {"dtype": d, "shape": s, "data_offsets": o} for name, (d, s, o) in tensors.items()}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def _cut(path: Path) -> bytes:
    content = path.read_bytes()
    return content[: len(content) // 2]


def _fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def _loop(path: Path) -> Path:
    path.symlink_to(path)
    return path


def _link(path: Path, target: str) -> Path:
    path.unlink()
    path.symlink_to(target)
    return path


def _touched(path: Path) -> Path:
    path.touch()
    return path


def _sparse(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


def _as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _empty_files(folder: Path) -> None:
    for path in _files(folder):
        path.write_bytes(b"")


def _flip_files(folder: Path) -> None:
    for path in _files(folder):
        path.write_bytes(bytes(byte ^ 0xFF for byte in path.read_bytes()))


def _drop_files(folder: Path) -> None:
    for path in _files(folder)[::2]:
        path.unlink()


class _Evil:
    def __reduce__(self):
        return (os.system, ("touch planted_by_a_pickle",))


def _pickle(copy: Path) -> None:
    import pickle

    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(_Evil()))
