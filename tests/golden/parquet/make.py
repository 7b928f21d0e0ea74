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

if __name__ == "__main__":
    table = pa.Table.from_pylist(ROWS)
    for codec in ["none", "snappy", "gzip", "zstd", "brotli"]:
        pq.write_table(table, HERE / f"{codec}.parquet", compression=codec)
    pq.write_table(table, HERE / "groups.parquet", data_page_version="2.0", row_group_size=2, use_dictionary=False)
    text = table.set_column(0, "label", table["label"].cast(pa.binary()))
    pq.write_table(text, HERE / "unmarked.parquet")
    pq.write_table(pa.table({"goal": ["a"], "image": pa.array([b"\xff\xfe"])}), HERE / "bytes.parquet")
    (HERE / "rows.json").write_text(json.dumps(ROWS, ensure_ascii=False, indent=1) + "\n")
