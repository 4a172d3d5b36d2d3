"""python -m hybrid_jax.generate (--run DIR | --model FOLDER) [--prompt TEXT] [sampler.a=value …]"""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybrid_jax.core.cli import ArgumentParser, add_trust, run_command, set_up_logging
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.files import MEBIBYTE, decode, read_text
from hybrid_jax.parallel.devices import check_devices

MOST_PROMPTS = 64 * MEBIBYTE  # of a file of prompts, or of standard input

EXAMPLES = """\
  python -m hybrid_jax.generate --run runs/quickstart --prompt "name: Luna | food: Thai ->"
  python -m hybrid_jax.generate --model gpt2_folder --prompt "Once" sampler.temperature=0.7
  python -m hybrid_jax.generate --model chat_folder --chat --prompt "What is a comet?"
  python -m hybrid_jax.generate --model chat_folder --chat
  python -m hybrid_jax.generate --run runs/lstm --memory memories --user ann --prompt "I am Ann."
  head -3 prompts.txt | python -m hybrid_jax.generate --run runs/quickstart --num-samples 4 --json
"""


def main(arguments: list[str]) -> None:
    """Runs the command on the arguments of a command line."""
    parser = ArgumentParser(
        prog="python -m hybrid_jax.generate",
        description="Samples responses from a run or a folder. Prompts come from --prompt, from a "
        "file, or from standard input, one a line. With --chat in a terminal and without prompts it is a "
        "conversation.",
        epilog="examples:\n" + EXAMPLES,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", metavar="DIR", help="a run directory: its newest checkpoint answers")
    source.add_argument(
        "--model", metavar="FOLDER", help="a folder of Hugging Face, or an export: its model answers"
    )
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--prompt", metavar="TEXT", action="append", help="a prompt; may be given again")
    asked.add_argument(
        "--prompts", metavar="FILE", help='prompts, one a line; .jsonl: objects with a field "prompt"'
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="by the chat template: a prompt is a user's message, .jsonl conversations",
    )
    parser.add_argument(
        "--memory", metavar="DIR", help="go on from what the model has read of --user, and keep it there"
    )
    parser.add_argument("--user", metavar="NAME", help="whose memory it is, with --memory")
    parser.add_argument("--num-samples", type=int, default=1, metavar="N", help="answers to each prompt")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (default 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a response")
    add_trust(parser)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="sampler.a=value",
        help="name, max_new_tokens, temperature (0 is greedy), top_k, top_p, min_p, repetition_penalty and "
        "others (docs/decoding.md), over those of the run or folder",
    )
    options = parser.parse_intermixed_args(arguments)
    set_up_logging()
    if (options.memory is None) != (options.user is None):
        raise UserError("--memory DIR and --user NAME belong together: give both or none")
    if options.memory is not None and options.num_samples != 1:
        raise UserError(f"with --memory a prompt has one answer, got --num-samples {options.num_samples}")
    check_devices()

    from hybrid_jax.runs.policy import load_policy, load_pretrained_policy, names_to_trust, run_settings
    from hybrid_jax.training.compilation import cache_folder, keep_compiled

    trust = names_to_trust(options.trust, options.config)
    if options.run is not None:
        keep_compiled(run_settings(options.run).get("compilation_cache"))
        policy = load_policy(options.run, options.overrides, trust)
    else:
        keep_compiled(cache_folder(), instead=False)
        policy = load_pretrained_policy(options.model, options.overrides, trust)
    memory = None
    if options.memory is not None:
        from hybrid_jax.runs.remembering import Remembering

        memory = Remembering(policy, options.memory, options.user, options.seed)
    if options.chat and not (options.prompt or options.prompts) and sys.stdin and sys.stdin.isatty():
        return _talk(policy, memory, options)
    prompts = options.prompt or _read_prompts(options.prompts, options.chat)
    if options.chat:
        prompts = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
    if memory is not None:
        answers = memory.answers(prompts)
    else:
        answers = policy.generate(prompts, seed=options.seed, num_samples=options.num_samples)
    for answer in answers:
        print(_json(answer) if options.json else _readable(answer))


def _talk(policy: Any, memory: Any, options: Any) -> None:
    """A conversation in the terminal."""
    from hybrid_jax.runs.terminal_chat import TerminalChat, talk

    if options.num_samples != 1:
        raise UserError(f"a conversation has one answer to a message, got --num-samples {options.num_samples}")
    show = lambda answer: print(_said(answer, options.json))  # noqa: E731
    if memory is None:
        return talk(TerminalChat(policy, options.seed), show)
    talk(memory, show, (memory.memory,), lambda turns: memory.keep(*turns))


def _said(answer, as_json: bool) -> str:
    """An answer in a conversation, whose question stands above it."""
    return _json(answer) if as_json else answer.response + ("" if answer.complete else " […]") + "\n"


def _json(answer) -> str:
    return json.dumps(dataclasses.asdict(answer), ensure_ascii=False)


def _readable(answer) -> str:
    end = "" if answer.complete else " […]"
    return f"prompt:   {answer.prompt}\nresponse: {answer.response}{end}\n"


def _read_prompts(file: str | None, chat: bool) -> Sequence[Any]:
    """Prompts of a file, or of standard input; conversations of a file of them."""
    if file is None:
        stdin = sys.stdin or io.TextIOWrapper(io.BytesIO())  # None where it was closed
        if stdin.isatty():
            print("prompts, one a line; Ctrl-D ends:", file=sys.stderr)
        content = stdin.buffer.read(MOST_PROMPTS + 1)
        if len(content) > MOST_PROMPTS:
            raise UserError(f"standard input must have at most {MOST_PROMPTS} bytes, got more")
        prompts = _lines(decode(content, "standard input"))
    elif file.endswith(".jsonl") and chat:
        from hybrid_jax.data.conversations import Chat

        prompts = Chat(train=Path(file)).load("train")
    elif file.endswith(".jsonl"):
        from hybrid_jax.data.sources import Jsonl

        prompts = [example.prompt for example in Jsonl(train=Path(file), response_field=None).load("train")]
    else:
        prompts = _lines(read_text(file, MOST_PROMPTS, "prompts file"))
    if not prompts:
        raise UserError(f"{file or 'standard input'} holds no prompts; give --prompt TEXT or --prompts FILE")
    return prompts


def _lines(text: str) -> list[str]:
    return [line.rstrip("\r") for line in text.split("\n") if line.strip()]


if __name__ == "__main__":
    run_command(main)
