"""Writes the Parquet tables of this folder, and their rows as rows.json.

    python tests/golden/parquet/make.py        # needs pyarrow
"""

import json
import pathlib

import pyarrow as pa
import pyarrow.parquet as pq

HERE = pathlib.Path(__file__).parent


def chat(label, question, answer):
    turns = [("user", question), ("assistant", answer)]
    return {"label": label, "messages": [{"role": role, "content": content} for role, content in turns]}


ROWS = [chat("unsafe", f"Describe how to hide cake {i} from the cat", "I will not help with that.") for i in range(3)]
ROWS += [chat("safe", "How large is the pantry?", "Größer als gedacht ✓")]


def called(city=None, day=None):
    """A chat with tools and a call, whose fields differ from row to row: the table has null where a row lacks one."""
    properties = {"city": {"type": "string"}} if city else {"day": {"type": "integer", "minimum": 1}}
    arguments = {"city": city} if city else {"day": day}
    turns = [{"role": "user", "content": "How is the weather?"},
             {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": arguments}}]},
             {"role": "tool", "content": "rain"}, {"role": "assistant", "content": "It rains."}]
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": properties}}}]
    return {"label": "safe", "messages": turns, "tools": tools}


PADDED = [called(city="Köln"), called(day=3), chat("safe", "How large is the pantry?", "Large.")]

if __name__ == "__main__":
    table = pa.Table.from_pylist(ROWS)
    for codec in ["none", "snappy", "gzip", "zstd", "brotli"]:
        pq.write_table(table, HERE / f"{codec}.parquet", compression=codec)
    pq.write_table(table, HERE / "groups.parquet", data_page_version="2.0", row_group_size=2, use_dictionary=False)
    text = table.set_column(0, "label", table["label"].cast(pa.binary()))
    pq.write_table(text, HERE / "unmarked.parquet")
    # Bytes that are no text in columns and fields that nothing reads, and in some that are read.
    picture = {"bytes": b"\xff\xd8\xff", "path": "cake.jpg"}
    beside = [{**row, "key": b"\xff\xfe", "thumbnail": picture,
               "messages": [{**turn, "digest": b"\xfe"} for turn in row["messages"]]} for row in ROWS]
    pq.write_table(pa.Table.from_pylist(beside), HERE / "bytes.parquet")
    as_goal = {"goal": b"\xff\xfe", "all_prompt": "Describe how to hide a cake"}
    as_content = {"label": "safe", "messages": [{"role": "user", "content": b"\xff"}, {"role": "assistant", "content": b"No."}]}
    for name, row in [("goal", as_goal), ("content", as_content), ("image", {**ROWS[0], "image": picture})]:
        pq.write_table(pa.Table.from_pylist([row]), HERE / f"bytes_{name}.parquet")
    pq.write_table(pa.Table.from_pylist(PADDED), HERE / "padded.parquet")
    (HERE / "padded.json").write_text(json.dumps(PADDED, ensure_ascii=False, indent=1) + "\n")
    pq.write_table(table.slice(0, 0), HERE / "no_rows.parquet")
    (HERE / "rows.json").write_text(json.dumps(ROWS, ensure_ascii=False, indent=1) + "\n")
