"""Writes declared_tokens.json: what transformers makes of tokens that a model folder declares beside tokenizer.json.

    python tests/golden/declared_tokens.py        # needs transformers 5.17

A case is a set of files; `tokenizer.json` is tokenizers/marks-304.json with the fields in `tokenizer`. Its results are the ids of each text without added special tokens, and the special tokens that
a chat template can name. The tokenizer_class of every case is PreTrainedTokenizerFast: transformers loads tokenizer.json as
it is, and adds what the other files declare.
"""

import json
import pathlib
import tempfile

from transformers import AutoTokenizer

HERE = pathlib.Path(__file__).parent
BASE = "marks-304"
TEXTS = [
    "<|im_start|>user\nhi  <|im_end|> there<|im_end|>\n",
    "a <x> b<y>c <|new|>d",
    "Hello <X> [PAD]<|im_end|><img>",
]


def flags(content, **more):
    base = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    return {"content": content, **base, **more}


def typed(content, **more):
    return {"__type": "AddedToken", **flags(content, **more)}


def own(*tokens):
    """Entries of tokenizer.json: (id, content, flags)."""
    return [{"id": id, **flags(content, **more)} for id, content, more in tokens]


END = own((0, "<|endoftext|>", {}))
MARKS = ["<|im_start|>", "<|im_end|>"]
CONFIG = "tokenizer_config.json"
MAP = "special_tokens_map.json"
ADDED = "added_tokens.json"
PADDING = {
    "strategy": "BatchLongest",
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "[PAD]",
}

CASES = {
    "nothing": ({}, END),
    "decoder": ({CONFIG: {"added_tokens_decoder": {"1": flags(MARKS[0]), "2": flags(MARKS[1])}}}, END),
    "decoder_strips": (
        {CONFIG: {"added_tokens_decoder": {"7": flags(MARKS[1], lstrip=True, rstrip=True), "3": flags("<x>", single_word=True)}}},
        END,
    ),
    "decoder_changes_flags": (
        {CONFIG: {"added_tokens_decoder": {"0": flags(MARKS[0], rstrip=True), "1": flags("<x>", special=False, normalized=True)}}},
        own((0, MARKS[0], {}), (300, "<x>", {})),
    ),
    "decoder_makes_older_files_void": (
        {
            CONFIG: {"added_tokens_decoder": {"1": flags(MARKS[0])}, "bos_token": None},
            MAP: {"bos_token": "<x>", "additional_special_tokens": ["<y>"]},
            ADDED: {"<|new|>": 290},
        },
        END,
    ),
    "decoder_defaults": ({CONFIG: {"added_tokens_decoder": {"9": {"content": "<x>"}, "8": {"content": "<|new|>"}}}}, END),
    "additional": ({CONFIG: {"additional_special_tokens": MARKS}}, END),
    "additional_typed": ({CONFIG: {"additional_special_tokens": [typed(MARKS[0], rstrip=True), typed("<x>", special=False)]}}, END),
    "extra_list": ({CONFIG: {"extra_special_tokens": MARKS}}, END),
    "extra_and_additional": ({CONFIG: {"extra_special_tokens": ["<x>"], "additional_special_tokens": MARKS}}, END),
    "extra_named": ({CONFIG: {"extra_special_tokens": {"image_token": "<img>", "x_token": "<x>"}}}, END),
    "own_names": ({CONFIG: {"image_token": "<img>", "add_bos_token": True, "eos_token": MARKS[1]}}, END),
    "named": ({CONFIG: {"bos_token": MARKS[0], "eos_token": MARKS[1], "pad_token": "[PAD]", "unk_token": "<x>"}}, END),
    "named_typed": ({CONFIG: {"eos_token": typed(MARKS[1], lstrip=True), "cls_token": typed("<y>", special=False)}}, END),
    "named_takes_flags_of_entry": (
        {CONFIG: {"eos_token": MARKS[1], "added_tokens_decoder": {"2": flags(MARKS[1], lstrip=True, special=False)}}},
        END,
    ),
    "one_token_with_two_names": ({CONFIG: {"eos_token": MARKS[1], "pad_token": MARKS[1], "extra_special_tokens": [MARKS[1], "<y>"]}}, END),
    "map_additional": ({CONFIG: {}, MAP: {"additional_special_tokens": MARKS}}, END),
    "map_extra_joins": ({CONFIG: {"extra_special_tokens": ["<x>"]}, MAP: {"extra_special_tokens": [MARKS[0], "<x>"]}}, END),
    "map_over_config": (
        {CONFIG: {"bos_token": None, "eos_token": "<x>", "unk_token": "<y>"}, MAP: {"bos_token": MARKS[0], "eos_token": MARKS[1]}},
        END,
    ),
    "map_null": ({CONFIG: {"eos_token": MARKS[1]}, MAP: {"eos_token": None}}, END),
    "map_objects": (
        {MAP: {"eos_token": {k: v for k, v in flags(MARKS[1], rstrip=True).items() if k != "special"}, "mask_token": "<y>"}},
        END,
    ),
    "untyped_own_name": ({CONFIG: {"think_token": {"content": "<x>"}, "image_token": flags("<img>"), "y_token": typed("<y>")}}, END),
    "untyped_own_name_and_decoder": (
        {CONFIG: {"think_token": flags("<x>"), "added_tokens_decoder": {"1": flags("<x>", special=False), "2": flags(MARKS[1])}}},
        END,
    ),
    "untyped_map_own_name": ({CONFIG: {}, MAP: {"think_token": flags("<x>", lstrip=True), "y_token": {"content": "<y>"}}}, END),
    "other_types": ({CONFIG: {"think_token": 7, "x_token": ["<x>"], "y_token": {"text": "<y>"}, "eos_token": MARKS[1]}}, END),
    "map_list_and_no_names": ({CONFIG: {"extra_special_tokens": {}}, MAP: {"additional_special_tokens": MARKS}}, END),
    "map_list_and_names": ({CONFIG: {"extra_special_tokens": {"image_token": "<img>"}}, MAP: {"extra_special_tokens": MARKS}}, END),
    "map_list_and_old_names": ({CONFIG: {"additional_special_tokens": {"image_token": "<img>"}}, MAP: {"additional_special_tokens": MARKS}}, END),
    "map_list_and_null": ({CONFIG: {"extra_special_tokens": None}, MAP: {"extra_special_tokens": MARKS}}, END),
    "map_old_list_and_null": ({CONFIG: {"extra_special_tokens": None}, MAP: {"additional_special_tokens": MARKS}}, END),
    "map_old_list_and_old_null": ({CONFIG: {"additional_special_tokens": None}, MAP: {"additional_special_tokens": MARKS}}, END),
    "map_list_and_old_null": ({CONFIG: {"additional_special_tokens": None}, MAP: {"extra_special_tokens": MARKS}}, END),
    "map_old_list_and_empty": ({CONFIG: {"extra_special_tokens": []}, MAP: {"additional_special_tokens": MARKS}}, END),
    "map_list_and_empty": ({CONFIG: {"additional_special_tokens": []}, MAP: {"extra_special_tokens": MARKS}}, END),
    "map_both_lists": ({CONFIG: {}, MAP: {"extra_special_tokens": [MARKS[0]], "additional_special_tokens": [MARKS[1], "<x>"]}}, END),
    "map_null_and_list": ({CONFIG: {"extra_special_tokens": MARKS}, MAP: {"extra_special_tokens": None}}, END),
    "added_tokens_with_the_id_of_own": ({ADDED: {"<x>": 305, "<y>": 306}}, own((0, "<|endoftext|>", {}), (305, "<|new|>", {}))),
    "added_tokens_with_other_ids_than_own": ({ADDED: {"<x>": 304, "<|new|>": 305}}, own((0, "<|endoftext|>", {}), (304, "<|new|>", {}))),
    "added_tokens": ({ADDED: {MARKS[0]: 1, MARKS[1]: 2, "<|new|>": 304}}, END),
    "added_tokens_special": (
        {CONFIG: {"eos_token": MARKS[1], "extra_special_tokens": ["<x>"]}, ADDED: {MARKS[1]: 2, "<x>": 5, "<y>": 4}},
        END,
    ),
    "added_tokens_and_own": ({ADDED: {"<x>": 301}}, own((0, "<|endoftext|>", {}), (301, "<x>", {"lstrip": True}))),
    "model_specific": ({CONFIG: {"model_specific_special_tokens": {"image_token": "<img>", "x_token": typed("<x>", lstrip=True)}}}, END),
    "model_specific_and_own_names": (
        {CONFIG: {"model_specific_special_tokens": {"image_token": "<img>"}, "x_token": "<x>"}},
        END,
    ),
    "model_specific_and_extra_named": (
        {CONFIG: {"model_specific_special_tokens": {"image_token": "<img>"}, "extra_special_tokens": {"x_token": "<x>"}}},
        END,
    ),
    "model_specific_and_extra_list": (
        {CONFIG: {"model_specific_special_tokens": {"image_token": "<img>"}, "extra_special_tokens": ["<y>"], "eos_token": "<x>"}},
        END,
    ),
    "model_specific_and_typed_name": (
        {CONFIG: {"model_specific_special_tokens": {"image_token": "<img>"}, "x_token": typed("<x>")}},
        END,
    ),
    "model_specific_and_map": (
        {CONFIG: {"model_specific_special_tokens": {"image_token": "<img>"}}, MAP: {"extra_special_tokens": ["<y>"], "eos_token": "<x>"}},
        END,
    ),
    "two_names_with_other_flags": ({CONFIG: {}, MAP: {"eos_token": flags(MARKS[1], rstrip=True), "pad_token": MARKS[1]}}, END),
    "name_and_extra_with_other_flags": (
        {CONFIG: {"eos_token": MARKS[1], "extra_special_tokens": [MARKS[0], typed(MARKS[1], rstrip=True)]}},
        END,
    ),
    "typed_name_and_additional": ({CONFIG: {"eos_token": typed(MARKS[1], rstrip=True), "additional_special_tokens": MARKS}}, END),
    "extra_twice": ({CONFIG: {"extra_special_tokens": [MARKS[1], typed(MARKS[1], rstrip=True, lstrip=True), MARKS[1]]}}, END),
    "own_names_typed_and_not": ({CONFIG: {"image_token": MARKS[0], "sot_token": typed("<x>"), "a_token": MARKS[1]}}, END),
    "own_names_and_map": ({CONFIG: {"sot_token": "<img>", "x_token": "<x>"}, MAP: {"y_token": MARKS[1], "x_token": flags("<x>", lstrip=True)}}, END),
    "own_names_typed_and_map": ({CONFIG: {"sot_token": typed("<img>"), "x_token": typed("<x>")}, MAP: {"y_token": MARKS[1], "sot_token": None}}, END),
    "object_before_own_names": ({CONFIG: {"extra_special_tokens": {"a_token": "<x>"}, "zz_token": "<img>"}}, END),
    "object_and_own_names": (
        {CONFIG: {"extra_special_tokens": {"a_token": "<x>", "mask_token": "<y>"}, "a_token": "<img>", "mask_token": "[PAD]"}},
        END,
    ),
    "object_and_map": ({CONFIG: {"extra_special_tokens": {"pad_token": "<x>"}}, MAP: {"pad_token": "<y>", "z_token": "<img>"}}, END),
    "map_objects_are_special": ({CONFIG: {}, MAP: {"eos_token": typed("<X>", special=False), "extra_special_tokens": [{"content": "<x>", "lstrip": True}]}}, END),
    "typed_name_in_added_tokens": (
        {CONFIG: {"cls_token": typed("<X>", lstrip=True), "extra_special_tokens": [typed("Hello")]}, ADDED: {"<X>": 306, "Hello": 305}},
        END,
        {"normalizer": {"type": "Lowercase"}},
    ),
    "map_name_in_added_tokens": (
        {CONFIG: {"cls_token": typed("<X>", lstrip=True)}, MAP: {"cls_token": "<X>"}, ADDED: {"<X>": 306}},
        END,
        {"normalizer": {"type": "Lowercase"}},
    ),
    "split_special_tokens": ({CONFIG: {"split_special_tokens": True, "eos_token": MARKS[1]}}, END),
    "padding": ({CONFIG: {}}, END, {"padding": PADDING}),
    "padding_and_null": ({CONFIG: {"pad_token": None}}, END, {"padding": PADDING}),
    "normalized": (
        {CONFIG: {"added_tokens_decoder": {"1": flags("<X>", normalized=True, special=False), "2": flags(MARKS[1])}}},
        END,
        {"normalizer": {"type": "Lowercase"}},
    ),
    "added_tokens_normalized": ({ADDED: {"<X>": 1, "Hello": 304}}, END, {"normalizer": {"type": "Lowercase"}}),
}


def result(files, added, more=None):
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        fields = {"added_tokens": added, **(more or {})}
        base = json.loads((HERE / "tokenizers" / f"{BASE}.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps({**base, **fields}))
        written = {CONFIG: {}, **files}
        written[CONFIG] = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ messages[-1].content }}", **written[CONFIG]}
        for file, content in written.items():
            (folder / file).write_text(json.dumps(content))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
        return {
            "files": written,
            "tokenizer": fields,
            "ids": ids,
            "named": tokenizer.special_tokens_map,
        }


if __name__ == "__main__":
    cases = {name: result(*case) for name, case in CASES.items()}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(case)}" for name, case in cases.items())
    about = json.dumps("written by declared_tokens.py with transformers 5.17")
    text = f'{{"about": {about},\n"base": {json.dumps(BASE)},\n"texts": {json.dumps(TEXTS)},\n"cases": {{\n{lines}\n}}}}\n'
    (HERE / "declared_tokens.json").write_text(text)
