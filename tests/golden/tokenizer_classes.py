"""Writes tokenizer_classes.json: model folders whose files name a class of tokenizer, and what transformers loads from them.

Needs transformers (the file was made with 5.17): python tests/golden/tokenizer_classes.py
Some classes take only vocabulary, merges and post-processor of tokenizer.json, and make the rest of the tokenizer anew. A case
holds a base (a tokenizer.json), changes of its fields, and the other files; and the token ids of the texts and the named tokens
(ids of null: it cannot be loaded).
"""

import json
import pathlib
import tempfile

from transformers import AutoTokenizer

HERE = pathlib.Path(__file__).parent
CONFIG = "tokenizer_config.json"
TEXTS = ["<s>[INST] hi there [/INST]</s> hi", " hi  hi\nthere", "<|im_start|>hi é 123 it's<|im_end|>", "Åå ﬁ <x>hi", ""]


def added(id, content, **more):
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    return {"id": id, "content": content, **flags, **more}


def sentencepiece():
    """As the tokenizer.json of Llama 2 and Mixtral: BPE with byte fallback; a normalizer writes the spaces."""
    words = ["▁hi", "▁there", "hi", "▁[", "INST"]
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", *"hitere[]INST/", *"åﬁ"]
    merges = [("h", "i"), ("▁", "hi"), ("t", "h"), ("th", "e"), ("the", "r"), ("ther", "e"), ("▁", "there"), ("▁", "["), ("I", "N"),
              ("S", "T"), ("IN", "ST")]
    vocab = {}
    for piece in ["<unk>", "<s>", "</s>", *pieces, *(a + b for a, b in merges), *words]:
        vocab.setdefault(piece, len(vocab))
    model = {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None, "end_of_word_suffix": None,
             "fuse_unk": True, "byte_fallback": True, "ignore_merges": False, "vocab": vocab, "merges": [f"{a} {b}" for a, b in merges]}
    normalizers = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    decoders = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    return {"version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [added(0, "<unk>"), added(1, "<s>"), added(2, "</s>")],
            "normalizer": {"type": "Sequence", "normalizers": normalizers}, "pre_tokenizer": None, "post_processor": None,
            "decoder": {"type": "Sequence", "decoders": decoders}, "model": model}


BASES = {"spm": sentencepiece(), "bytes": json.loads((HERE / "tokenizers" / "marks-304.json").read_text())}
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
MARKS = [added(302, "<|im_start|>"), added(303, "<|im_end|>", lstrip=True)]


def case(base, model_type=None, name=None, config=None, fields=None, **files):
    config = {**({"tokenizer_class": name} if name is not None else {}), **(config or {})}
    files = {f.replace("_json", ".json"): content for f, content in files.items()}
    if model_type:
        files["config.json"] = {"model_type": model_type, **files.get("config.json", {})}
    return {"base": base, "fields": fields or {}, "files": {CONFIG: config, **files}}


CASES = {}
for model_type in ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "qwen3", "llama", "mistral", None):
    for name in ("LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", "GPTNeoXTokenizerFast", "Qwen2Tokenizer",
                 "TokenizersBackend", "NoSuchTokenizer", None):
        if model_type or name:
            CASES[f"{model_type} {name} spm"] = case("spm", model_type, name, NAMED)
            CASES[f"{model_type} {name} bytes"] = case("bytes", model_type, name)
for more in ({"legacy": True}, {"legacy": False}, {"legacy": None}, {"add_prefix_space": False}, {"add_prefix_space": True},
             {"add_prefix_space": None}, {"add_bos_token": True, "add_eos_token": True}, {"eos_token": None}, {"pad_token": "<pad>"},
             {"split_special_tokens": True}):
    for name, base in (("LlamaTokenizerFast", "spm"), ("Qwen2Tokenizer", "bytes"), ("GPTNeoXTokenizer", "bytes")):
        model_type = {"GPTNeoXTokenizer": "olmoe"}.get(name, "qwen3_moe")
        named = NAMED if base == "spm" else {}
        CASES[f"{name} {json.dumps(more)}"] = case(base, model_type, name, {**named, **more})
for model_type in ("olmoe", "qwen3_moe"):
    for name in ("Phi3Tokenizer", ""):
        CASES[f"{model_type} {json.dumps(name)}"] = case("spm", model_type, name, NAMED)
CASES.update({
    "a class in config.json": case("spm", "olmoe", None, NAMED, config_json={"tokenizer_class": "LlamaTokenizer"}),
    "two classes": case("spm", "olmoe", "PreTrainedTokenizerFast", NAMED, config_json={"tokenizer_class": "LlamaTokenizer"}),
    "a decoder that lacks tokens": case("spm", "olmoe", "LlamaTokenizer", {**NAMED, "added_tokens_decoder": {"1": {"content": "<s>"}}}),
    "a decoder": case("bytes", "qwen3_moe", "Qwen2Tokenizer", {"added_tokens_decoder": {"302": {"content": "<x>", "special": True}}}),
    "added tokens of tokenizer.json": case("bytes", "qwen3_moe", "Qwen2Tokenizer", fields={"added_tokens": [added(0, "<|endoftext|>"), *MARKS]}),
    "added tokens of tokenizer.json, GPTNeoX": case("bytes", "olmoe", "GPTNeoXTokenizer", fields={"added_tokens": [added(0, "<|endoftext|>"), *MARKS]}),
    "Qwen2Tokenizer drops flags": case("bytes", "qwen3_moe", "Qwen2Tokenizer", {
        "eos_token": "<|im_end|>", "extra_special_tokens": ["<x>"],
        "added_tokens_decoder": {"302": added(302, "<|im_end|>", lstrip=True), "303": added(303, "<x>", rstrip=True)}}),
    "a normalizer that is dropped": case("bytes", "olmoe", "GPTNeoXTokenizer", fields={"normalizer": {"type": "Lowercase"}}),
    "a normalizer that is kept": case("bytes", "olmoe", "PreTrainedTokenizerFast", fields={"normalizer": {"type": "Lowercase"}}),
    "ignore_merges is dropped": case("bytes", "qwen3_moe", "Qwen2Tokenizer", fields={"model": {"ignore_merges": True}}),
    "padding": case("spm", "olmoe", "LlamaTokenizer", NAMED, fields={"padding": {
        "strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"}}),
})


def result(case):
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        base = BASES[case["base"]]
        fields = {key: {**base["model"], **value} if key == "model" else value for key, value in case["fields"].items()}
        (folder / "tokenizer.json").write_text(json.dumps({**base, **fields}))
        for file, content in case["files"].items():
            (folder / file).write_text(json.dumps(content))
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
            return {**case, "ids": ids, "named": tokenizer.special_tokens_map, "class": type(tokenizer).__name__}
        except Exception as error:  # noqa: BLE001 - an exception is an expected result
            return {**case, "ids": None, "class": f"{type(error).__name__}: {error}"[:90]}


if __name__ == "__main__":
    cases = {name: result(case) for name, case in CASES.items()}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(case)}" for name, case in cases.items())
    bases = ",\n".join(f"{json.dumps(name)}: {json.dumps(base)}" for name, base in BASES.items())
    text = f'{{"texts": {json.dumps(TEXTS)},\n"bases": {{\n{bases}\n}},\n"cases": {{\n{lines}\n}}}}\n'
    (HERE / "tokenizer_classes.json").write_text(text)
    for name, case in cases.items():
        print(name, "->", case["class"])
