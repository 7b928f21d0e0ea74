"""Writes templates.json: chat templates, conversations, and how transformers renders them.

Needs transformers (the file was made with 5.17): python tests/golden/templates.py
A case holds the names of template and conversation, the rendered text (null if the template raised an exception), and the
byte ranges of the {% generation %} blocks. The templates are written for this test; each uses features of published ones.
"""

import json
import pathlib

from transformers.utils.chat_template_utils import render_jinja_template

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

TEMPLATES = {
    # Role and content of each turn between special tokens.
    "chatml": "{%- for turn in messages %}\n    {{- '<|im_start|>' ~ turn.role ~ '\\n' ~ turn.content ~ '<|im_end|>' ~ '\\n' }}\n"
              "{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n",
    # A default system turn; stripped contents.
    "chatml_system": "{% set first = messages[0] if messages and messages[0]['role'] == 'system' else none %}\n"
                     "<|im_start|>system\n{{ first['content'] | trim if first else 'Be kind.' }}<|im_end|>\n"
                     "{% for m in (messages[1:] if first else messages) %}\n"
                     "<|im_start|>{{ m['role'] }}\n{{ m['content'].strip() }}<|im_end|>\n{% endfor %}\n"
                     "{% if add_generation_prompt is defined and add_generation_prompt %}\n<|im_start|>assistant\n{% endif %}\n",
    # Role tags on lines of their own; an end-of-sequence token after each assistant turn.
    "tulu": "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
            "{{ '<|assistant|>\\n' + message['content'] + eos_token }}{{ '' if loop.last else '\\n' }}"
            "{% else %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '\\n' }}{% endif %}"
            "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}",
    # Roles must alternate; the system turn is part of the first user turn; errors by raise_exception.
    "inst": "{%- if messages[0].role == 'system' -%}\n{%- set sys = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' -%}\n"
            "{%- set rest = messages[1:] -%}\n{%- else -%}{%- set sys = '' -%}{%- set rest = messages -%}{%- endif -%}\n"
            "{{- bos_token -}}\n{%- for m in rest -%}\n"
            "{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}{{- raise_exception('roles must take turns') -}}{%- endif -%}\n"
            "{%- if m.role == 'user' -%}{{- '[INST] ' ~ (sys if loop.first else '') ~ m.content.strip() ~ ' [/INST]' -}}\n"
            "{%- elif m.role == 'assistant' -%}{{- ' ' ~ m.content.strip() ~ eos_token -}}\n"
            "{%- else -%}{{- raise_exception('unknown role ' ~ m.role) -}}{%- endif -%}\n{%- endfor -%}",
    # White space control only by trim_blocks and lstrip_blocks; comments; CRLF line endings.
    "spaces": "{# a comment #}\r\n<head>\r\n  {% for m in messages %}\r\n    {# another #}\r\n  {{ m.role }}: {{ m.content }}\r\n"
              "  {% if loop.last %}\r\n  end\r\n  {% endif %}\r\n  {%+ if true %} kept{% endif +%}\r\n  {% endfor %}\r\n</head>\r\n\r\n",
    # The filter tojson with its options.
    "tojson": "{{ messages | tojson }}\n{{ messages | tojson(indent=2) }}\n{{ messages | tojson(ensure_ascii=True) }}\n"
              "{{ {'b': [1, 2.5, none, true], 'a': {}, 'c': []} | tojson(sort_keys=True, indent=1) }}"
              "{{ [1, 'x'] | tojson(separators=(',', ':')) }}{{ '<&\\'\">\u2028' | tojson }}",
    # Printing of values and results of arithmetic as in Python.
    "printing": "{{ none }} {{ true }} {{ add_generation_prompt }} {{ [1, 'a', none] }} {{ {'k': \"it's\"} }} {{ nothing }}|"
                "{{ 7 // 2 }} {{ 7 / 2 }} {{ 2 ** 5 }} {{ -7 % 3 }} {{ '%s-%d' | format('a', 3) }} {{ 1.0 }} {{ 'ab' * 2 }} {{ ('a',) }}",
    # Methods, slices, tests and filters of strings and lists.
    "methods": "{% for m in messages[::-1] %}{% set c = m.content %}{{ c.upper()[:4] }}|{{ c.split(' ')[-1] }}|{{ c.replace('a', 'oo') }}|"
               "{{ c.startswith('W') }}|{{ c.endswith(('?', '!')) }}|{{ c.title() }}|{{ c | length }}|{{ c.find('a') }}|{{ c.rstrip('.?! ') }}|"
               "{{ c.split('\\n') | join('+') }}|{{ c | replace('\\n', '/') }}|{{ c.splitlines() }}|{{ 'x' in c }}|{{ c[1:-1:2] }}|"
               "{{ ('a\n\nb ' ~ m.role) | indent(2) }}|{{ c.lstrip() | first }}|{{ c is string }}|{{ m is mapping }}|{{ m.get('name', 'nobody') }}|"
               "{{ m.items() | list }}|{{ m.missing is defined }}\n{% endfor %}{{ messages | map(attribute='role') | unique | join(',') }}"
               "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ messages | rejectattr('role', 'eq', 'user') | map(attribute='content') | list }}",
    # Namespaces, macros, loop controls, loop variables, conditional expressions.
    "flow": "{% macro say(m, mark='>') %}{{ mark }}{{ m.content }}{% endmacro %}{% set ns = namespace(seen=0, last='') %}"
            "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{% if ns.seen > 3 %}{% break %}{% endif %}"
            "{% set ns.seen = ns.seen + 1 %}{% set ns.last = m.role %}{{ loop.index }}/{{ loop.length }}{{ loop.revindex0 }}{{ say(m) }}"
            "{{ say(m, mark='=') if not loop.last }}{{ loop.previtem.role if loop.previtem is defined else '^' }}{{ loop.cycle('a', 'b') }}"
            "{% else %}nobody{% endfor %}{{ ns.seen }}{{ ns.last }}{% for k, v in {'x': 1, 'y': 2}.items() %}{{ k }}{{ v }}{% endfor %}"
            "{% filter upper %}loud{% endfilter %}{% set block %}cap{{ ns.seen }}{% endset %}{{ block }}{% for i in range(3) if i != 1 %}{{ i }}{% endfor %}",
    # {% generation %} blocks without white space control.
    "marked": "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>\n{% generation %}{{ m.content }}{{ eos_token }}"
              "{% endgeneration %}\n{% else %}<|{{ m.role }}|>\n{{ m.content }}\n{% endif %}{% endfor %}"
              "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    # {% generation %} blocks with white space control, on lines of their own.
    "marked_lines": "{%- for m in messages %}\n    {%- if m['role'] == 'assistant' %}\n        {{- '<|im_start|>assistant\\n' }}\n"
                    "        {%- generation %}\n            {{- m['content'] + '<|im_end|>' }}\n        {%- endgeneration %}\n        {{- '\\n' }}\n"
                    "    {%- else %}\n        {{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}\n    {%- endif %}\n"
                    "{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}",
    # Keeps the thinking of the last turn only, so a rendering is not a prefix of that with more turns.
    "thinking": "{% for m in messages %}{% set c = m.content %}{% if m.role == 'assistant' and '</think>' in c and not loop.last %}"
                "{% set c = c.split('</think>')[-1].lstrip('\\n') %}{% endif %}<{{ m.role }}>{{ c }}</{{ m.role }}>{% endfor %}",
}


def chat(*contents, roles=("user", "assistant")):
    return [{"role": roles[i % len(roles)], "content": c} for i, c in enumerate(contents)]


CHATS = {
    "short": chat("Why?", "Because."),
    "open": chat("What a day!"),
    "system": [{"role": "system", "content": " Be brief. "}] + chat("Who's \"there\"?", "Nobody.", "  Really?\n\nYes? ", "No!"),
    "unicode": chat("Größe\t中文 😀 \u0085 <b>&amp;</b>", "née \\ / \x07", "ﬁ", "x" * 40),
    "thought": chat("Say a number", "<think>\nseven\n</think>\n\n7", "another", "<think>\n</think>\n\n8"),
    "empty": chat("", ""),
    "disorder": chat("a", "b", "c", roles=("assistant", "assistant", "user")),
    "nobody": [],
}


def byte_offsets(text, chars):
    return [len(text[:c].encode()) for c in chars]


def case(name, messages, prompt):
    template = TEMPLATES[name]
    marks = "generation %}" in template
    try:
        texts, spans = render_jinja_template([messages], chat_template=template, return_assistant_tokens_mask=marks,
                                             add_generation_prompt=prompt, **TOKENS)
        return texts[0], [byte_offsets(texts[0], s) for s in spans[0]] if marks else []
    except Exception:  # noqa: BLE001 - an exception is an expected result
        return None, []


def main():
    cases = []
    for template in TEMPLATES:
        for chat_name, messages in CHATS.items():
            for prompt in (False, True):
                text, spans = case(template, messages, prompt)
                cases.append({"template": template, "chat": chat_name, "prompt": prompt, "text": text, "spans": spans})
    out = {"tokens": TOKENS, "templates": TEMPLATES, "chats": CHATS, "cases": cases}
    path = pathlib.Path(__file__).with_name("templates.json")
    path.write_text(json.dumps(out, indent=1, ensure_ascii=True) + "\n")
    print(f"{path}: {len(cases)} cases, {sum(c['text'] is None for c in cases)} of them raise")


if __name__ == "__main__":
    main()
