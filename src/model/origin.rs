//! How a checkpoint was made, by the names and number formats of its tensors, where it is not a plain model.

use super::safetensors::StoredDtype;
use crate::quote::quote;

/// The output head's tensor.
pub(super) const LM_HEAD: &str = "lm_head.weight";

/// Components of names that a wrapper around the model adds, and the wrapper.
const WRAPPERS: [(&str, &str); 7] = [
    ("module", "DistributedDataParallel or DeepSpeed"),
    ("_orig_mod", "torch.compile"),
    ("_fsdp_wrapped_module", "FSDP"),
    ("_checkpoint_wrapped_module", "activation checkpointing"),
    ("_forward_module", "Lightning"),
    ("base_model", "PEFT"),
    ("base_layer", "PEFT"),
];

/// Last components of names that hold the parts of a quantised weight.
const QUANTISED: [&str; 19] = [
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
    "weight_scale",
    "weight_scale_inv",
    "weight_scale_2",
    "weight_packed",
    "weight_shape",
    "weight_zero_point",
    "input_scale",
    "absmax",
    "quant_map",
    "nested_absmax",
    "SCB",
    "weight_format",
    "gate_up_proj_blocks",
    "down_proj_blocks",
    "weight_g_idx",
];

/// Those of bitsandbytes.
const BITSANDBYTES: [&str; 4] = ["absmax", "quant_map", "nested_absmax", "SCB"];

/// Number formats of integers and of floats below 16 bits.
const SMALL: [&str; 13] = [
    "I8",
    "U8",
    "I16",
    "U16",
    "I32",
    "U32",
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "F8_E4M3FNUZ",
    "F8_E5M2FNUZ",
    "F6_E2M3",
    "F4",
];

/// Parts of names of a model that PEFT has wrapped: what it trains beside the model's own weights. They come first, since other
/// names of such a model say less about it.
pub(super) fn is_trained_by_peft(tensor: &str) -> bool {
    tensor.split('.').any(|part| part.starts_with("lora_") || TO_SAVE.contains(&part))
}

/// The trained and the original copy of a module, of `modules_to_save` of PEFT.
const TO_SAVE: [&str; 2] = ["modules_to_save", "original_module"];

/// Why a tensor is none of a plain model, with the way out. `missing`: a tensor that the model needs and the checkpoint lacks.
pub(super) fn of(tensor: &str, dtype: StoredDtype, missing: Option<&str>) -> Option<String> {
    let parts: Vec<&str> = tensor.split('.').collect();
    let last = parts.last().copied().unwrap_or_default();
    if QUANTISED.contains(&last) || parts.contains(&"quant_state") || SMALL.contains(&&*dtype.to_string()) {
        let original = "give the original model in bf16, which the card of the quantised one usually names";
        // Of these formats transformers can make one.
        let of_bitsandbytes = BITSANDBYTES.contains(&last) || parts.contains(&"quant_state");
        let made = if of_bitsandbytes {
            ", or make one with: python -c \"from transformers import AutoModelForCausalLM as M; \
             M.from_pretrained('FOLDER').dequantize().save_pretrained('NEW_FOLDER')\", then copy the tokenizer files into NEW_FOLDER"
        } else {
            ""
        };
        return Some(format!(
            "the model is quantised (stored as {dtype}), and quantised weights cannot be trained: {original}{made}"
        ));
    }
    if parts.iter().any(|part| part.starts_with("lora_")) {
        return Some(
            "the weights of an adapter (LoRA) are beside those of the model: merge them with merge_and_unload() of PEFT, and \
             save the result with save_pretrained"
                .into(),
        );
    }
    if parts.iter().any(|part| TO_SAVE.contains(part)) {
        return Some(format!(
            "PEFT has trained a copy of this module (`modules_to_save`) beside the original one (`original_module`): save the model with \
             merge_and_unload() of PEFT and save_pretrained, or keep the trained copy in each file: {}",
            rewrite(
                "re.sub('modules_to_save[.][^.]+[.]', '', k).replace('base_model.model.', ''): v",
                " if '.original_module.' not in k"
            )
        ));
    }
    if parts.contains(&"language_model") {
        return Some(format!(
            "its name has the part `language_model.`: it is of the text model inside of one that takes images or sound, too. Keep the text \
             model: {}, and the object `text_config` of its config.json as config.json",
            rewrite("k.replace('language_model.', ''): v", " if 'language_model.' in k or k.startswith('lm_head.')")
        ));
    }
    if last.contains("flat_param") {
        return Some(
            "these are flat parameters of FSDP: gather them with `accelerate merge-weights FOLDER NEW_FOLDER`, or save with \
             state_dict_type FULL_STATE_DICT"
                .into(),
        );
    }
    let wrapped = parts.iter().find_map(|part| WRAPPERS.iter().find(|(name, _)| name == part));
    if let Some((name, wrapper)) = wrapped {
        let prefix = if *name == "base_model" { "base_model.model." } else { &format!("{name}.") };
        return Some(format!(
            "its name has the part {} of {wrapper}: {}",
            quote(prefix),
            rename(prefix, Rename::Anywhere)
        ));
    }
    let missing = missing?;
    if parts == ["score", "weight"] && missing == LM_HEAD {
        return Some(
            "it is the head of a reward model or a classifier, in place of the output head, so that the model writes no replies: give the \
             model that it was made from"
                .into(),
        );
    }
    if let Some(prefix) = tensor.strip_suffix(missing).filter(|prefix| prefix.ends_with('.')) {
        return Some(format!(
            "its name begins with {}, which the model's does not: {}",
            quote(prefix),
            rename(prefix, Rename::Beginning)
        ));
    }
    (missing.strip_prefix("model.") == Some(tensor)).then(|| {
        "its name lacks the beginning `model.`, as in a model that was saved without its output head (AutoModel): save it with \
         AutoModelForCausalLM"
            .into()
    })
}

/// What a tensor may be that the model has no place for, with the way out.
pub(super) fn left_over(tensor: &str) -> String {
    const HEADS: [&str; 3] = ["v_head", "value_head", "score"];
    match HEADS.iter().find(|head| tensor.split('.').next() == Some(head)) {
        Some(head) => format!(
            ": it is a head for values or scores, as TRL trains one beside a model: leave it out: {}",
            rewrite("k: v", &format!(" if not k.startswith('{head}.')"))
        ),
        None => {
            "; is config.json that of another model? A tensor that the model does not need can be left out of the file"
                .into()
        }
    }
}

/// Where tensor names have the part that is too much.
fn wrapper_names() -> String {
    let name = |name: &str| if name == "base_model" { "base_model[.]model".to_owned() } else { name.to_owned() };
    WRAPPERS.map(|(wrapper, _)| name(wrapper)).join("|")
}

enum Rename {
    /// A wrapper may be around a module within the model.
    Anywhere,
    /// What follows may be spelled the same: `model.model.embed_tokens`.
    Beginning,
}

fn rename(prefix: &str, place: Rename) -> String {
    // Names come from the file, and this is to be pasted into a shell.
    let plain = prefix.bytes().all(|b| b.is_ascii_alphanumeric() || b"._".contains(&b)) && prefix.len() <= 80;
    let prefix = if plain { prefix } else { "PREFIX" };
    let renamed = match place {
        // Whole parts, and those of all wrappers, which may be around each other.
        Rename::Anywhere => format!("re.sub(r'(?<![^.])({})[.]', '', k)", wrapper_names()),
        Rename::Beginning => format!("k.removeprefix('{prefix}')"),
    };
    format!(
        "save the model that is wrapped, not the wrapper (accelerator.unwrap_model(model).save_pretrained(..)), or rename the \
         tensors of each file: {}",
        rewrite(&format!("{renamed}: v"), "")
    )
}

/// The command that writes a file of tensors anew: `entry` of the tensors `k`, `v` that `which` keeps.
fn rewrite(entry: &str, which: &str) -> String {
    let re = if entry.starts_with("re.") { "re, " } else { "" };
    format!(
        "python -c \"import {re}safetensors.torch as s; t = s.load_file('FILE'); \
         s.save_file({{{entry} for k, v in t.items(){which}}}, 'NEW_FILE', {{'format': 'pt'}})\""
    )
}
