"""Chat templates of strangers: each ends in one line, soon, and the next conversation renders all the same."""

import json
import signal
import subprocess
import sys
import time

import pytest

from hybrid_jax.core.errors import UserError
from hybrid_jax.data import rendering
from hybrid_jax.data.chat_templates import CHAT_TEMPLATES
from hybrid_jax.data.chat_text import rendered
from hybrid_jax.data.rendering import Job, Part, render_jobs

HI = [{"role": "user", "content": "Hi"}]
HONEST = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}{{ add_generation_prompt }}"
)
LOOP = "{% for i in range(90000) %}"
HOSTILE = {
    "{% for i in range(10**12) %}{% endfor %}": "refuses the messages: Range too big",
    LOOP * 3 + "{% endfor %}" * 3: "takes more than 1 s for one conversation; take another template",
    "{{ 10 ** (10 ** 10) }}": "takes more than 1 s for one conversation; take another template",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "refuses the messages: maximum recursion depth exceeded",
    "{{ 1 / 0 }}": "refuses the messages: division by zero",
    "{{ 'a' * 10**11 }}": "refuses the messages: MemoryError",
    "{{ '{:>100000000000}'.format(1) }}": "refuses the messages: MemoryError",
    "{{ 'a' * 70000000 }}": "writes more than 64 MiB for one conversation",
    "{{ ''.__class__.__mro__ }}": "refuses the messages: access to attribute '__class__' of 'str' object",
    "{{ messages.append(1) }}": "refuses the messages: access to attribute 'append' of 'list' object is unsafe",
    "{{ open('/etc/passwd') }}": "refuses the messages: 'open' is undefined",
    "{% include '/etc/passwd' %}": "refuses the messages: no loader for this environment specified",
    "{% if %}": "refuses the messages: Expected an expression",
    "{{ " + "(" * 20_000 + " }}": "refuses the messages: ",
    "a" * (2**20 + 1): "must have at most 1,048,576 letters, got 1,048,577",
}


def render(template: str, messages=HI) -> str:
    ((result,),) = render_jobs(
        template, [Job(messages, {"eos_token": "</s>"}, [Part(len(messages), ask=True)])]
    )
    return rendered(result).text


@pytest.mark.parametrize("template", HOSTILE, ids=lambda template: template[:40])
def test_a_hostile_template_is_one_line_within_seconds_and_the_next_one_renders(template, monkeypatch):
    assert render(HONEST) == "user: Hi</s>True"  # the process is there
    monkeypatch.setattr(rendering, "SECONDS", 1.0 if "takes more" in HOSTILE[template] else 20.0)
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        render(template)
    assert HOSTILE[template] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 10
    assert render(HONEST) == "user: Hi</s>True"


def test_the_templates_of_this_package_render_here_and_all_the_same(monkeypatch):
    ours = CHAT_TEMPLATES["chatml"].source
    messages = [*HI, {"role": "assistant", "content": "Yo"}]
    job = Job(messages, {"eos_token": "</s>"}, [Part(2), Part(1, ask=True)])
    ((whole, question),) = both = render_jobs(ours, [job], marks=True)
    text, spans = rendered(whole)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n"
    assert [text[start:end] for start, end in spans] == ["Yo<|im_end|>"]
    assert rendered(question) == ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", [])
    monkeypatch.setattr(rendering, "_OURS", frozenset())
    assert render_jobs(ours, [job], marks=True) == both


def test_messages_that_are_no_plain_values_are_refused():
    with pytest.raises(UserError, match="the messages must be plain values, such as JSON has"):
        render(HONEST, [{"role": "user", "content": object()}])


def test_a_hostile_template_does_not_outlive_a_parent_that_was_killed():
    start = "from hybrid_jax.data import template_worker as w; w.SECONDS = 1; w.main()"
    job = {"messages": HI, "variables": {}, "parts": [[1, False]]}
    request = {"template": "{{ 10 ** (10 ** 10) }}", "marks": False, "jobs": [job]}
    data = json.dumps(request).encode()
    worker = subprocess.Popen([sys.executable, "-c", start], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    try:
        worker.communicate(len(data).to_bytes(8, "little") + data, timeout=40)
        assert worker.returncode == -signal.SIGALRM
    finally:
        worker.kill()
