#!/usr/bin/env python3
"""Makes chats.json: chat templates rendered by Jinja2 as transformers sets it up.

    pip install jinja2
    python3 make_chats.py DIRECTORY > chats.json

DIRECTORY holds the templates of published models, as llama.cpp keeps them in models/templates. Used are those of
models under the Apache licence 2.0 or the MIT licence: Qwen 2.5, Qwen 3 and QwQ (Alibaba Cloud), DeepSeek R1's
distillations and V3.1 (DeepSeek), SmolLM3 (Hugging Face), gpt-oss (OpenAI). The templates below were written for this test.
"""
import datetime
import json
import os
import sys

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

FILES = ["Qwen-Qwen2.5-7B-Instruct.jinja", "Qwen-Qwen3-0.6B.jinja", "Qwen-QwQ-32B.jinja",
         "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B.jinja", "deepseek-ai-DeepSeek-V3.1.jinja",
         "HuggingFaceTB-SmolLM3-3B.jinja", "openai-gpt-oss-120b.jinja"]
OWN = [
    "{% for m in messages %}\n  {% if loop.first %}\nfirst\n  {% endif %}\n{{ m.role | upper }}: {{ m['content'] | trim }}\n"
    "{% endfor %}\n",
    "{%- for m in messages[::-1] %}{{ loop.index0 }}{{ m.content.split('</think>')[-1].lstrip('\\n') }}{%- if loop.last %}"
    "{% continue %}{% endif %}|{% endfor %}{{ messages[1:] | length }}{{ messages | map(attribute='role') | join(',') }}",
    "{{ tools | tojson(indent=2) if tools else tools }} {{ [1, 2.5, none, true, 'x\"y', {'a': 'b'}] }} "
    "{{ {'b': [], 'a': {}} | tojson(sort_keys=true, separators=(',', ':')) }} {{ messages | tojson(ensure_ascii=true) }}",
    "{{ strftime_now('%d %b %Y') }}{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}"
    "{{ bos_token ~ eos_token ~ pad_token }}{% set ns = namespace(n=0) %}{% for m in messages %}{% if m.content is string "
    "and m.content.startswith('H') %}{% set ns.n = ns.n + 1 %}{% endif %}{% endfor %}{{ ns.n }}",
]
TOOLS = [{"type": "function", "function": {
    "name": "get_weather", "description": "Weather in a café <b> & 'quotes'",
    "parameters": {"type": "object", "properties": {"city": {"type": "string", "enum": ["a", "b"]},
                                                    "days": {"type": "integer"}}, "required": ["city"]}}}]
CHATS = [
    [{"role": "user", "content": "Hello!"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <b>"},
     {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello & bye"}, {"role": "user", "content": "  And?\n"}],
    [{"role": "user", "content": "Weather?"},
     {"role": "assistant", "content": "", "tool_calls": [{"id": "call_1", "type": "function", "function": {
         "name": "get_weather", "arguments": {"city": "Paris", "days": 2}}}]},
     {"role": "tool", "content": "{\"t\": 3}", "name": "get_weather", "tool_call_id": "call_1"}],
]


def environment():
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    env.filters["tojson"] = lambda x, ensure_ascii=False, indent=None, separators=None, sort_keys=False: json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    env.globals["strftime_now"] = lambda form: datetime.datetime(2024, 12, 31, 23, 59, 59).strftime(form)

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)
    env.globals["raise_exception"] = raise_exception
    return env


def main():
    templates = [open(os.path.join(sys.argv[1], name), encoding="utf-8").read() for name in FILES] + OWN
    groups = []
    for template in templates:
        cases = []
        groups.append({"template": template, "cases": cases})
        for messages in CHATS:
            for tools, prompt, thinking in ((None, True, None), (TOOLS, True, False), (None, False, True)):
                variables = {"messages": messages, "tools": tools, "documents": None, "bos_token": "<s>",
                             "eos_token": "</s>", "add_generation_prompt": prompt}
                if thinking is not None:
                    variables["enable_thinking"] = thinking
                try:
                    text = environment().from_string(template).render(**variables)
                except (TypeError, jinja2.exceptions.TemplateError):
                    continue
                cases.append({"messages": messages, "add_generation_prompt": prompt,
                              "enable_thinking": thinking, "tools": tools, "text": text})
    json.dump(groups, sys.stdout, ensure_ascii=False, separators=(",", ":"))
    print()


main()
