"""The tiny models, their tokenizer, and control over their routing."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

import language

LAYERS, EXPERTS, TOP_K, HIDDEN, HEADS, WIDTH = 4, 16, 2, 64, 4, 32
SHAPES = {"olmoe": (OlmoeConfig, OlmoeForCausalLM), "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM)}
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<assistant> ' + m['content'] + ' <end>' }}"
    "{% else %}{{ '<user> ' + m['content'] + ' ' }}{% endif %}{% if not loop.last and m['role'] == 'assistant' %}"
    "{{ ' ' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
Expert = tuple[int, int]


def build(shape: str, seed: int) -> torch.nn.Module:
    """An untrained model."""
    torch.manual_seed(seed)
    config_class, model_class = SHAPES[shape]
    extra = {"head_dim": HIDDEN // HEADS, "moe_intermediate_size": WIDTH, "norm_topk_prob": True} if shape == "qwen3_moe" else {}
    config = config_class(
        vocab_size=len(language.vocabulary()), hidden_size=HIDDEN, intermediate_size=WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, num_experts=EXPERTS, num_experts_per_tok=TOP_K,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=None, eos_token_id=1, experts_implementation="grouped_mm",
        initializer_range=0.05, **extra,
    )  # fmt: skip
    return model_class(config)


class Routing:
    """Switches experts off by router logits of -1e9, and keeps the logits of the last forward pass."""

    def __init__(self, model: torch.nn.Module):
        self.off = torch.zeros(LAYERS, EXPERTS)
        self.logits: list[Tensor] = [torch.empty(0)] * LAYERS
        for number, layer in enumerate(model.model.layers):
            self._control(number, layer.mlp.gate)

    def _control(self, number: int, gate: torch.nn.Module) -> None:
        def forward(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits = torch.nn.functional.linear(hidden.reshape(-1, HIDDEN), gate.weight)
            self.logits[number] = logits
            probs = torch.softmax(logits + self.off[number], dim=-1)
            weights, chosen = torch.topk(probs, TOP_K, dim=-1)
            if gate.norm_topk_prob:
                weights = weights / weights.sum(-1, keepdim=True)
            return logits, weights, chosen

        gate.forward = forward

    def switch_off(self, experts: Sequence[Expert]) -> None:
        """Switches these experts off, and all others on."""
        self.off.zero_()
        for layer, expert in experts:
            self.off[layer, expert] = -1e9


def round_weights(model: torch.nn.Module) -> None:
    """Rounds all weights to bf16, the type in which they are stored."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.to(torch.bfloat16))


def save(model: torch.nn.Module, folder: Path) -> None:
    """Writes the model folder, with one tensor for each expert's matrix, as the published models have it."""
    words = language.vocabulary()
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", additional_special_tokens=words[2:4]
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder, save_jinja_files=False)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 1, 0
    stored = torch.get_default_dtype()
    model.to(torch.bfloat16).save_pretrained(folder, save_original_format=True)
    model.to(stored)


def load(folder: Path) -> torch.nn.Module:
    """Reads a model folder, with weights widened to f32."""
    architecture = json.loads((folder / "config.json").read_text())["model_type"]
    return SHAPES[architecture][1].from_pretrained(folder, dtype=torch.float32)
