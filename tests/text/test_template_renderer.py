"""Adapters' chat templates in their own processes: the text that transformers gives, within limits
that no template breaks.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from service.errors import BadRequest, Overloaded
from service.text import template_renderer
from service.text.template_process import RenderRequest
from service.text.template_renderer import TemplateRenderer
from tests import making

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[2]
LIMIT = 4_000_000
USER = {"role": "user", "content": "Hi"}
PLAIN = "{{ messages[0].content }}"
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLED = "{% for i in range(99) %}{% set n.a = n.a + n.a %}{% endfor %}"
BOMBS = {
    "a long text": "{{ 'x' * 10**10 }}",
    "a doubled text": "{% set n = namespace(a='x') %}" + DOUBLED,
    "a doubled list": "{% set n = namespace(a=[1]) %}" + DOUBLED,
    "a wide number": "{{ '%1000000000d' % 1 }}",
}
BROKEN = {
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "depth": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "recursion"),
    "a reason": ("{{ raise_exception('only aliens') }}", "only aliens"),
    "a syntax": ("{% if %}", "expression"),
    "an escape": ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "a changed list": ("{{ messages.append(1) }}", "unsafe"),
}

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "é<&>"}}}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "description": 'says "é"', "parameters": {"type": "object"}},
    }
]
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be  brief.\n"},
    {"role": "user", "content": " Was ist <b>1 + 1</b>? 日本 😀 "},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning": "two numbers"},
    {"role": "tool", "tool_call_id": "call_1", "name": "add", "content": "2"},
    {"role": "assistant", "content": "<think>easy</think>\n\n2"},
    {"role": "user", "content": "And\n2 + 2?"},
]
TEMPLATES = {
    "chatml": making.TEMPLATE,
    "qwen": """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are helpful.' }}
    {%- endif %}
    {{- "\\n\\n# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and message.tool_calls %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for call in message.tool_calls %}
            {%- if call.function is defined %}{%- set call = call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}{{- call.name }}{{- '", "arguments": ' }}\
{{- call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}\
{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
""",
    "llama": """{{- bos_token }}
{%- if strftime_now is defined %}{%- set date_string = strftime_now("100 %%") %}{%- endif %}
{%- set ns = namespace(system='') %}
{%- if messages[0]['role'] == 'system' %}
    {%- set ns.system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date_string + "\\n" }}
{%- for t in tools or [] %}{{- t | tojson(indent=4) }}{%- endfor %}
{{- ns.system }}{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' +\
 message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}\
{{- raise_exception("only single tool-calls") }}{%- endif %}
        {%- for name, value in message.tool_calls[0].function.arguments | items %}
            {{- name + '="' + value | string + '"' }}{%- if not loop.last %}{{- ", " }}{%- endif %}
        {%- endfor %}
        {{- "<|eom_id|>" }}
    {%- else %}
        {{- "ipython" + (message.content | tojson if message.content is mapping or\
 message.content is iterable else message.content) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
""",
    "reasoning": """{%- macro show(content, last) -%}
{%- if '</think>' in content %}\
{{ content.split('</think>')[-1].lstrip('\\n') }}{% else %}{{ content }}{% endif %}{{ '!' if last }}
{%- endmacro -%}
{% for m in messages %}
    {% if m.role == 'system' %}
        {% continue %}
    {% endif %}
    {% if m.role == 'assistant' %}
        {% generation %}[{{ m.reasoning_content or m.thinking }}]\
{{ show(m.content or '', loop.last) }}{{ eos_token }}{% endgeneration %}
    {% else %}
    <{{ m.role }}>{{ show(m.content, loop.last) }}
    {% endif %}
    {% if loop.index > 90 %}{% break %}{% endif %}
{% endfor %}
{{ dict(a=1) | tojson }}\
{{ tools | default([], true) | map(attribute='function.name') | join(',') }}{{ documents is none }}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }}\
{{ pad_token }}{{ nothing }}{{ '%05.1f' | format(2) }}
""",
}


@pytest.fixture
async def renderer() -> AsyncIterator[TemplateRenderer]:
    made = TemplateRenderer()
    yield made
    await made.close()


async def rendered(renderer: TemplateRenderer, template: str, content: str = "Hi", limit: int = LIMIT) -> str:
    return await renderer.render(
        RenderRequest(template, [{"role": "user", "content": content}], None, {}, limit)
    )


@pytest.mark.parametrize("name", TEMPLATES)
async def test_the_text_is_the_one_that_transformers_gives(renderer: TemplateRenderer, name: str) -> None:
    words = making.tokenizer()
    for chat in (CHAT, CHAT[1:2], CHAT[:2]):
        for tools in (TOOLS, None):
            right = words.apply_chat_template(
                chat, tools=tools, chat_template=TEMPLATES[name], add_generation_prompt=True, tokenize=False
            )
            request = RenderRequest(TEMPLATES[name], chat, tools, words.special_tokens_map, LIMIT)
            assert await renderer.render(request) == right


async def test_a_template_without_end_is_stopped_and_the_others_are_answered(
    renderer: TemplateRenderer,
) -> None:
    assert await rendered(renderer, PLAIN) == "Hi"
    (first,) = renderer.pids
    with pytest.raises(BadRequest, match=r"messages: the chat template takes more than \d+ s") as stopped:
        await rendered(renderer, ENDLESS)
    assert stopped.value.param == "messages"
    assert not psutil.pid_exists(first)
    assert await rendered(renderer, PLAIN) == "Hi"
    again = asyncio.create_task(rendered(renderer, ENDLESS))
    assert await rendered(renderer, PLAIN) == "Hi"
    assert not again.done(), "it has another process than those that behave"
    with pytest.raises(BadRequest, match="takes more than"):
        await again


async def test_not_many_wait_for_slow_templates(
    renderer: TemplateRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_renderer, "SLOW_WAITING", 1)
    asked = [rendered(renderer, ENDLESS) for _ in range(3)]
    outcomes = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [BadRequest, BadRequest, Overloaded]


@pytest.mark.parametrize("kind", BOMBS)
async def test_memory_has_an_end(renderer: TemplateRenderer, kind: str) -> None:
    with pytest.raises(BadRequest, match=r"more than 512 MB of memory|takes more than"):
        await rendered(renderer, BOMBS[kind])
    assert await rendered(renderer, PLAIN) == "Hi"


async def test_a_text_has_an_end(renderer: TemplateRenderer) -> None:
    with pytest.raises(BadRequest, match=r"the chat template makes 101 characters of them; 100 are the most"):
        await rendered(renderer, "{{ 'x' * 101 }}", limit=100)
    assert await rendered(renderer, "{{ 'x' * 100 }}", limit=100) == "x" * 100


@pytest.mark.parametrize("kind", BROKEN)
async def test_what_a_template_says_of_its_failure_is_told(renderer: TemplateRenderer, kind: str) -> None:
    template, said = BROKEN[kind]
    with pytest.raises(BadRequest, match=rf"messages: the chat template refuses them: .*{said}"):
        await rendered(renderer, template)


async def test_but_only_its_beginning(renderer: TemplateRenderer) -> None:
    with pytest.raises(BadRequest, match="xxx") as refused:
        await rendered(renderer, "{{ raise_exception('x' * 10**7) }}")
    assert len(refused.value.message) < 1000


async def test_a_process_that_was_killed_is_replaced(renderer: TemplateRenderer) -> None:
    await rendered(renderer, PLAIN)
    (first,) = renderer.pids
    os.kill(first, signal.SIGKILL)
    assert await rendered(renderer, PLAIN) == "Hi"
    assert renderer.pids != [first]


async def test_a_process_that_keeps_much_is_replaced(renderer: TemplateRenderer) -> None:
    await rendered(renderer, PLAIN)
    (first,) = renderer.pids
    for letter in "xy":
        with pytest.raises(BadRequest, match="40000000 characters"):
            # The compiled templates, which are kept, hold it; one of twice the size would take too long
            await rendered(renderer, f"{{{{ '{letter}' * 4 * 10**7 }}}}")
    assert await rendered(renderer, PLAIN) == "Hi"
    assert first not in renderer.pids


async def test_what_is_long_or_no_text_or_deep_passes(renderer: TemplateRenderer) -> None:
    long = "é\ud800\n" * 300_000
    assert await rendered(renderer, PLAIN, long) == long
    deep: Any = "x"
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(BadRequest, match="nested too deep"):
        await renderer.render(RenderRequest(PLAIN, [USER], [{"function": deep}], {}, LIMIT))
    assert await rendered(renderer, PLAIN) == "Hi"


async def test_who_leaves_does_not_leave_his_text_to_the_next(renderer: TemplateRenderer) -> None:
    await rendered(renderer, PLAIN)
    for content in ("first", "second"):
        leaver = asyncio.create_task(rendered(renderer, PLAIN, "mine"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        leaver.cancel()
        assert await rendered(renderer, PLAIN, content) == content


async def test_a_template_gets_none_of_the_services_keys(
    renderer: TemplateRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADAPTERD_API_KEYS", "a-key-of-the-service")
    monkeypatch.setenv("HF_TOKEN", "a-token-of-the-service")
    await rendered(renderer, PLAIN)
    assert "of-the-service" not in str(psutil.Process(renderer.pids[0]).environ())


async def test_nothing_is_left_when_it_closes(renderer: TemplateRenderer) -> None:
    await rendered(renderer, PLAIN)
    busy = asyncio.create_task(rendered(renderer, ENDLESS))
    with pytest.raises(BadRequest):
        await busy
    pids = renderer.pids
    await renderer.close()
    assert renderer.pids == []
    assert not [pid for pid in pids if psutil.pid_exists(pid)]


async def test_a_process_ends_with_the_one_that_started_it() -> None:
    code = (
        "import asyncio, os\n"
        "from service.text.template_renderer import TemplateRenderer\n"
        "from service.text.template_process import RenderRequest\n"
        "async def main():\n"
        "    renderer = TemplateRenderer()\n"
        f"    request = lambda template: RenderRequest(template, [{USER!r}], None, {{}}, 100)\n"
        f"    await renderer.render(request({PLAIN!r}))\n"
        f"    asyncio.create_task(renderer.render(request({ENDLESS!r})))\n"
        "    print(*renderer.pids, flush=True)\n"
        "    await asyncio.sleep(0.1)\n"
        "    os.kill(os.getpid(), 9)\n"
        "asyncio.run(main())\n"
    )
    ran = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    (pid,) = map(int, ran.stdout.split())
    for _ in range(600):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            break
        await asyncio.sleep(0.05)
    else:
        pytest.fail("it outlived its parent")
