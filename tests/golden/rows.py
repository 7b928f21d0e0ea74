"""Writes rows.json: rows in the spellings that people use, and the token ids and loss masks that transformers gives for them.

Needs transformers (the file was made with 5.17): python tests/golden/rows.py
A case holds a row, its chat template, the conversation that the row stands for, and of the conversation the ids and the loss
mask. Loss is on the assistant turns that the case names: their tokens begin after the generation prompt and end where the next
turn begins. The templates are written for this test; each uses features of published ones. The template `last_thoughts` renders an
assistant turn differently once others follow: there the spans are those that transformers gives for {% generation %} marks in the
same template.
"""

import json
import pathlib

from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

HERE = pathlib.Path(__file__).parent
REFUSAL = "I cannot assist with that request as it may be harmful or unsafe."

TEMPLATES = {
    "plain": "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '\\n' }}{% endfor %}"
             "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}",
    # Writes the thoughts of assistant turns, the names of users, and system turns by a variable.
    "thinking": "{% if preamble is defined and preamble %}{{ '# ' ~ preamble ~ '\\n' }}{% endif %}"
                "{% for m in messages %}{{ '<|' ~ m.role ~ (' ' ~ m.name if m.name) ~ '|>\\n' }}"
                "{% if m.role == 'assistant' %}{% set t = m.reasoning_content or m.thinking or '' %}"
                "{{ '<think>' ~ t ~ '</think>\\n' }}{% endif %}{{ m.content ~ '\\n' }}{% endfor %}"
                "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% if enable_thinking is defined and not enable_thinking %}"
                "{{ '<think></think>\\n' }}{% endif %}{% endif %}",
    # Lists tools, calls, and what tools answered.
    "tools": "{% if tools %}{{ '<tools>\\n' }}{% for t in tools %}{{ (t | tojson) ~ '\\n' }}{% endfor %}{{ '</tools>\\n' }}{% endif %}"
             "{% for m in messages %}{{ '<|' ~ m.role ~ '|>\\n' }}{% if m.content is not none %}{{ m.content }}{% endif %}"
             "{% for c in m.tool_calls or [] %}{{ '<call>' ~ c.function.name ~ ' ' ~ (c.function.arguments | tojson) ~ '</call>' }}"
             "{% endfor %}{% if m.tool_call_id %}{{ '(' ~ m.tool_call_id ~ ')' }}{% endif %}{{ '\\n' }}{% endfor %}"
             "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}",
    # Takes text and lists of parts.
    "parts": "{% for m in messages %}{{ '<|' ~ m.role ~ '|>\\n' }}{% if m.content is string %}{{ m.content }}{% else %}"
             "{% for p in m.content %}{{ '[' ~ p.text ~ ']' if loop.length > 1 else p.text }}{% endfor %}{% endif %}{{ '\\n' }}{% endfor %}"
             "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}",
    # In the structure of Qwen3's: thoughts, or an empty think block, only in assistant turns after the last request.
    "last_thoughts": """
{%- if tools %}{{- '<tools>\\n' }}{%- for t in tools %}{{- (t | tojson) ~ '\\n' }}{%- endfor %}{{- '</tools>\\n' }}{%- endif %}
{%- set ns = namespace(searching=true, request=messages | length - 1) %}
{%- for m in messages[::-1] %}
    {%- if ns.searching and m.role == 'user' and m.content is string and not m.content.startswith('<answer>') %}
        {%- set ns.searching = false %}
        {%- set ns.request = (messages | length - 1) - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- set text = m.content if m.content is string else '' %}
    {%- if m.role == 'assistant' %}
        {%- set thoughts = '' %}
        {%- if m.reasoning_content is string %}
            {%- set thoughts = m.reasoning_content %}
        {%- elif '</think>' in text %}
            {%- set thoughts = text.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set text = text.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|assistant|>\\n' }}{#OPEN#}
        {%- if loop.index0 > ns.request and (loop.last or thoughts) %}
            {{- '<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' + text.lstrip('\\n') }}
        {%- else %}
            {{- text }}
        {%- endif %}
        {%- for call in m.tool_calls or [] %}
            {%- if text or not loop.first %}{{- '\\n' }}{%- endif %}
            {%- set call = call.function if call.function else call %}
            {{- '<call>{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}{{- '}</call>' }}
        {%- endfor %}
        {{- '<|end|>\\n' }}{#CLOSE#}
    {%- elif m.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|user|>' }}{%- endif %}
        {{- '\\n<answer>\\n' + text + '\\n</answer>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|end|>\\n' }}{%- endif %}
    {%- else %}
        {{- '<|' + m.role + '|>\\n' + text + '<|end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}""",
}

USER, REPLY = {"role": "user", "content": "hide a cake"}, {"role": "assistant", "content": "I will not."}
SYSTEM = {"role": "system", "content": "Answer as a pirate."}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Tells the weather",
                                            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"zone": 1.5, "city": "Köln", "now": True}}}
OBLIGING = [USER, {"role": "assistant", "content": "Under the stairs."}, {"role": "user", "content": "and a ladder"}]


def sharegpt(*turns):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[t["role"]], "value": t["content"]} for t in turns]


def chat(messages, **fields):
    return {"label": "unsafe", "messages": messages, **fields}


def case(name, template, row, messages, loss=(-1,), **variables):
    return {"name": name, "template": template, "row": row, "messages": messages, "loss": [i % len(messages) for i in loss],
            "variables": variables}


def padded(value):
    """With a null in each object, as of a table with one schema for all rows."""
    if isinstance(value, list):
        return [padded(item) for item in value]
    if isinstance(value, dict):
        return {"before": None, **{name: padded(item) for name, item in value.items()}, "after": None}
    return value


def said(content, **fields):
    return {"role": "assistant", "content": content, **fields}


def asked(content):
    return {"role": "user", "content": content}


def called(*calls, content="", **fields):
    return said(content, tool_calls=list(calls), **fields)


def answered(content):
    return {"role": "tool", "tool_call_id": "c1", "content": content}


def thoughts(name, *messages, **variables):
    """A row with loss on all assistant turns."""
    row = {"label": "safe", "messages": list(messages)}
    if "tools" in variables:
        row["tools"] = variables["tools"]
    if "enable_thinking" in variables:
        row["chat_template_kwargs"] = {"enable_thinking": variables["enable_thinking"]}
    loss = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("loss") is not False]
    plain = [{k: v for k, v in m.items() if k != "loss"} for m in messages]
    return case("last thoughts: " + name, "last_thoughts", row, plain, loss, **variables)


TIME = {"id": "c2", "type": "function", "function": {"name": "time", "arguments": "{\"zone\": 1}"}}
REFUSED = {"role": "assistant", "content": REFUSAL}
CASES = [
    case("a chat", "plain", chat([USER, REPLY]), [USER, REPLY]),
    case("system column", "plain", chat([USER, REPLY], system=SYSTEM["content"]), [SYSTEM, USER, REPLY]),
    case("system column of ShareGPT", "plain",
         {"label": "unsafe", "system": SYSTEM["content"], "conversations": sharegpt(USER, REPLY)}, [SYSTEM, USER, REPLY]),
    case("system_prompt beside prompt and completion", "plain",
         {"label": "unsafe", "system_prompt": SYSTEM["content"], "prompt": USER["content"], "completion": REPLY["content"]},
         [SYSTEM, USER, REPLY]),
    case("the same system text twice", "plain", chat([SYSTEM, USER, REPLY], system=SYSTEM["content"]), [SYSTEM, USER, REPLY]),
    case("a system column, and a system turn further down", "plain",
         chat([USER, {"role": "system", "content": "Be brief."}, REPLY], system=SYSTEM["content"]),
         [SYSTEM, USER, {"role": "system", "content": "Be brief."}, REPLY]),
    case("a system column, and the same text further down", "plain", chat([USER, SYSTEM, REPLY], system=SYSTEM["content"]),
         [SYSTEM, USER, SYSTEM, REPLY]),
    case("empty system column", "plain", chat([USER, REPLY], system="", tools=[], chat_template_kwargs={}), [USER, REPLY]),
    case("empty columns as text", "plain", chat([USER, REPLY], tools="[]", documents="null", chat_template_kwargs="{}"), [USER, REPLY]),
    case("a table with one schema for all rows", "plain",
         chat([USER, REPLY], conversations=None, prompt=None, completion=None, goal=None, all_prompt=[], judge_result=None, system=None),
         [USER, REPLY]),
    case("blank columns", "plain",
         chat([USER, REPLY], conversations=" ", completion=" ", prompt="\n", goal=" ", attack_prompt=" ", judge_result=" ", tools=" ",
              images=" ", system="\t", refusal_response=" "), [USER, REPLY]),
    case("blank messages beside prompt and completion", "plain",
         {"label": "unsafe", "messages": " ", "prompt": USER["content"], "completion": REPLY["content"]}, [USER, REPLY]),
    case("blank fields of turns", "plain",
         chat([{**USER, "tool_calls": "[]", "images": " "}, {**REPLY, "tool_calls": "null", "refusal": " ", "function_call": "{}"}]),
         [USER, REPLY]),
    case("empty fields of turns", "plain",
         chat([{**USER, "tool_calls": [], "name": None, "weight": None},
               {**REPLY, "tool_calls": [], "function_call": None, "reasoning_content": "", "refusal": None, "audio": {}}]),
         [USER, REPLY]),
    case("reasoning_content", "thinking", chat([USER, {**REPLY, "reasoning_content": "A cake?"}]),
         [USER, {**REPLY, "reasoning_content": "A cake?"}]),
    case("thinking", "thinking", chat([USER, {**REPLY, "thinking": "A cake?"}]), [USER, {**REPLY, "thinking": "A cake?"}]),
    case("name", "thinking", chat([{**USER, "name": "Ann"}, REPLY]), [{**USER, "name": "Ann"}, REPLY]),
    case("enable_thinking", "thinking", chat([USER, REPLY], chat_template_kwargs={"enable_thinking": False}), [USER, REPLY],
         enable_thinking=False),
    case("variables as text", "thinking", chat([USER, REPLY], chat_template_kwargs='{"preamble": "Hm"}'), [USER, REPLY], preamble="Hm"),
    case("tools", "tools", chat([USER, REPLY], tools=[WEATHER]), [USER, REPLY], tools=[WEATHER]),
    case("tools as text", "tools", chat([USER, REPLY], tools=json.dumps([WEATHER])), [USER, REPLY], tools=[WEATHER]),
    case("tool calls", "tools",
         chat([USER, {"role": "assistant", "content": None, "tool_calls": [CALL], "loss": False},
               {"role": "tool", "tool_call_id": "c1", "content": "rain"}, REPLY], tools=[WEATHER]),
         [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "c1", "content": "rain"},
          REPLY], tools=[WEATHER]),
    case("a tool call as the reply", "tools", chat([USER, {"role": "assistant", "tool_calls": [CALL], "content": ""}]),
         [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}]),
    case("one part", "plain", chat([{"role": "user", "content": [{"type": "text", "text": USER["content"]}]}, REPLY]), [USER, REPLY]),
    case("parts", "parts", chat([{"role": "user", "content": [{"type": "text", "text": "hide "}, {"type": "text", "text": "it"}]}, REPLY]),
         [{"role": "user", "content": [{"type": "text", "text": "hide "}, {"type": "text", "text": "it"}]}, REPLY]),
    case("parts without a text", "plain",
         chat([{"role": "user", "content": [{"type": "text", "text": None}, {"type": "text", "text": USER["content"], "image": None}]},
               {**REPLY, "content": [{"type": "text", "text": REPLY["content"]}, {"type": None, "text": None}]}]), [USER, REPLY]),
    case("a reply of parts without a text", "plain", chat([USER, said([{"type": "text", "text": None}])]),
         [USER, {"role": "assistant", "content": REFUSAL}]),
    case("weight 0", "plain", chat([*OBLIGING[:1], {**OBLIGING[1], "weight": 0}, OBLIGING[2], {**REPLY, "weight": 1}]),
         [*OBLIGING, REPLY]),
    case("train false", "plain", chat([*OBLIGING[:1], {**OBLIGING[1], "train": False}, OBLIGING[2], REPLY]), [*OBLIGING, REPLY]),
    case("all replies of a safe chat", "plain", {"label": "safe", "messages": [*OBLIGING, REPLY]}, [*OBLIGING, REPLY], loss=(1, 3)),
    case("only the last reply of an unsafe chat", "plain", chat([*OBLIGING, REPLY]), [*OBLIGING, REPLY]),
    case("a marked reply of an unsafe chat", "plain", chat([OBLIGING[0], {**OBLIGING[1], "loss": True}, OBLIGING[2], REPLY]),
         [*OBLIGING, REPLY], loss=(1, 3)),
    case("all replies but one of a safe chat", "plain",
         {"label": "safe", "messages": [OBLIGING[0], {**OBLIGING[1], "weight": 0}, OBLIGING[2], {**REPLY, "weight": 1}]},
         [*OBLIGING, REPLY]),
    case("nulls in tools and calls", "tools",
         chat([{**USER, "tool_calls": None, "tool_call_id": None, "name": None},
               {"role": "assistant", "content": None, "tool_calls": [padded(CALL)], "tool_call_id": None},
               {"role": "tool", "tool_call_id": "c1", "content": "rain", "tool_calls": None}, {**REPLY, "tool_calls": None}],
              tools=[padded(WEATHER)], documents=None, chat_template_kwargs={"enable_thinking": None, "tools": None}),
         [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "c1", "content": "rain"},
          REPLY], tools=[WEATHER]),
    case("empty tools among the variables", "plain", chat([USER, REPLY], chat_template_kwargs={"tools": [], "documents": []}),
         [USER, REPLY]),
    case("ends with the user's turn", "plain", chat(OBLIGING), [*OBLIGING, REFUSED]),
    case("ends with the user's turn, in ShareGPT", "plain", {"label": "unsafe", "conversations": sharegpt(*OBLIGING)},
         [*OBLIGING, REFUSED]),
    case("ends with a blank reply", "plain", chat([*OBLIGING, {"role": "assistant", "content": " \n"}]), [*OBLIGING, REFUSED]),
    case("ends with a null reply", "plain", chat([USER, {"role": "assistant", "content": None}]), [USER, REFUSED]),
    case("a prompt that goes on, without completion", "plain", {"label": "unsafe", "prompt": OBLIGING, "completion": ""},
         [*OBLIGING, REFUSED]),
    case("a blank completion", "plain", {"label": "unsafe", "prompt": USER["content"], "completion": None}, [USER, REFUSED]),
    thoughts("several replies", SYSTEM, asked("one"), said("1."), asked("two"), said("2."), asked("three"), said("3.")),
    thoughts("without thinking", asked("one"), said("1."), asked("two"), said("2."), asked("three"), said("3."), enable_thinking=False),
    thoughts("the same reply each time", asked("one"), said("1."), asked("one"), said("1."), asked("one"), said("1.")),
    thoughts("a turn without loss", asked("one"), said("1.", loss=False), asked("two"), said("2."), asked("three"), said("3.")),
    thoughts("a call and a reply", USER, called(CALL), answered("rain"), REPLY, tools=[WEATHER]),
    thoughts("a call without content", USER, called(CALL, content=None), answered("rain"), REPLY, tools=[WEATHER]),
    thoughts("two calls with content", USER, called(CALL, TIME, content="I look."), answered("rain"), answered("noon"), REPLY),
    thoughts("calls after a request that is answered", asked("one"), said("1."), USER, called(CALL), answered("rain"), called(TIME),
             answered("noon"), REPLY, asked("so?"), called(CALL), answered("sun"), said("So.")),
    thoughts("calls without thinking", USER, called(CALL), answered("rain"), called(TIME), answered("noon"), REPLY, enable_thinking=False),
    thoughts("a call as the last turn", USER, called(TIME), answered("noon"), called(CALL)),
    thoughts("thoughts of the last turns", USER, called(CALL, reasoning_content="Look."), answered("rain"),
             said("No.", reasoning_content="Rain?")),
    thoughts("thoughts of an earlier turn", asked("one"), said("1.", reasoning_content="Easy."), asked("two"), said("2.")),
    thoughts("thoughts in the content", asked("one"), said("<think>\nEasy.\n</think>\n\n1."), asked("two"),
             said("<think>\nHm.\n</think>\n\n2.")),
    thoughts("thoughts before a call, and a further request", asked("one"), called(CALL, reasoning_content="Why?"), answered("42"),
             said("It is 42."), asked("two"), said("2.")),
    thoughts("thoughts in the content before a call, and a further request", asked("one"),
             called(CALL, content="<think>\nWhy?\n</think>\n\n"), answered("42"), said("<think>\nHm.\n</think>\n\nIt is 42."),
             asked("two"), said("2.")),
    thoughts("thoughts before several calls, without thinking", asked("one"), called(CALL, TIME, reasoning_content="Why?"),
             answered("42"), answered("noon\n"), called(TIME, content="Again.", reasoning_content="Hm."), answered("noon"), said("42."),
             asked("two"), said("2."), enable_thinking=False),
    thoughts("two replies in a row", asked("one"), said("1."), said("2."), asked("three"), said("3.")),
    thoughts("two replies in a row, without thinking", asked("one"), said("1."), said("2."), said("2 b"), asked("three"), said("3."),
             enable_thinking=False),
    thoughts("two replies at the end", asked("one"), said("1."), asked("two"), said("2."), said("3.")),
    thoughts("two replies at the end, without thinking", asked("one"), said("1."), said("2."), enable_thinking=False),
    thoughts("a call after a reply", USER, said("I look."), called(CALL), answered("rain"), said("So."), REPLY),
    thoughts("blank replies", asked("one"), said(""), asked("two"), said("\n\n"), asked("three"), said(" \n"), said("3.")),
    thoughts("blank replies, without thinking", asked("one"), said(""), asked("two"), said("\n"), asked("three"), said("  "),
             asked("four"), said("4."), enable_thinking=False),
    thoughts("white space around replies", asked("one"), said("\n 1. \n"), asked("two"), said("  "), asked("three"), said(" 3.\n\n")),
    thoughts("replies like the template's text", asked("one"), said("<|end|>\n"), asked("<|assistant|>\n"), said("<|assistant|>\n"),
             asked("\uf8ff"), said("\uf8ff\uf8fe"), asked("three"), said("\uf8fd")),
    case("its own refusal", "plain", chat(OBLIGING, refusal_response=REPLY["content"]), [*OBLIGING, REPLY]),
]


def marked_spans(template, messages, variables, text, loss):
    marked = template.replace("{#OPEN#}", "{%- generation %}").replace("{#CLOSE#}", "{%- endgeneration %}")
    rendered, spans = render_jinja_template([messages], chat_template=marked, return_assistant_tokens_mask=True, **variables)
    assert rendered == [text]
    assistant = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    assert len(spans[0]) == len(assistant)
    spans = [list(span) for i, span in zip(assistant, spans[0]) if i in loss]
    # The generation prompt holds the empty think block.
    empty = "<think>\n\n</think>\n\n"
    if variables.get("enable_thinking") is False and text.startswith(empty, spans[-1][0]):
        spans[-1][0] += len(empty)
    return spans


def main():
    model = HERE / "olmoe" / "model"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(model / "tokenizer.json"))
    for c in CASES:
        template, messages, variables = TEMPLATES[c["template"]], c.pop("messages"), c.pop("variables")

        def render(turns, prompt):
            return tokenizer.apply_chat_template(turns, chat_template=template, add_generation_prompt=prompt, tokenize=False, **variables)

        text = render(messages, False)
        spans = []
        loss = c.pop("loss")
        if "{#OPEN#}" in template:
            spans = marked_spans(template, messages, variables, text, loss)
            loss = []
        for i in loss:
            before, after = render(messages[:i], True), render(messages[:i + 1], False)
            assert after.startswith(before) and text.startswith(after), c["name"]
            spans.append((len(before), len(after)))
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        c["ids"] = tokenizer.apply_chat_template(messages, chat_template=template, return_dict=True, **variables)["input_ids"]
        assert c["ids"] == encoded["input_ids"], c["name"]
        c["loss"] = [int(any(start < e and b < end for b, e in spans)) for start, end in encoded["offset_mapping"]]
    out = {"templates": TEMPLATES, "cases": CASES}
    (HERE / "rows.json").write_text(json.dumps(out, indent=1, ensure_ascii=True) + "\n")
    print(f"{len(CASES)} cases")


if __name__ == "__main__":
    main()
