//! What a folder is that is given as a model, where it is not one, or not only one.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value};

use crate::input;
use crate::quote::quote;

const ADAPTER: &str = "adapter_config.json";

const COPY_TOKENIZER: &str = "then copy the tokenizer files into NEW_FOLDER";

/// File extensions of weights in formats that are not read, for messages.
const OTHER_WEIGHTS: [(&str, &str); 6] =
    [("gguf", "GGUF"), ("ggml", "GGML"), ("h5", "TensorFlow"), ("msgpack", "Flax"), ("npz", "MLX"), ("onnx", "ONNX")];

/// Files and folders of training checkpoints (a name, or its beginning before a number), and whose they are.
const TRAINERS: [(&str, &str); 4] = [
    ("model_and_optim", "OLMo-core"),
    ("latest_checkpointed_iteration.txt", "Megatron"),
    ("iter_*", "Megatron"),
    ("mp_rank_*", "Megatron or DeepSpeed"),
];

fn is_like(name: &str, pattern: &str) -> bool {
    let is_number = |rest: &str| !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_digit());
    pattern.strip_suffix('*').map_or(name == pattern, |start| name.strip_prefix(start).is_some_and(is_number))
}

/// Endings of files that a download has not finished.
const PARTS: [&str; 5] = [".incomplete", ".part", ".partial", ".crdownload", ".aria2"];

/// The names in a folder, sorted.
fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// A JSON object of the folder; empty where it cannot be read.
fn object(dir: &Path, name: &str) -> Map<String, Value> {
    let bytes = input::read(&dir.join(name)).unwrap_or_default();
    serde_json::from_slice(input::without_mark(&bytes)).unwrap_or_default()
}

/// Why the adapter (PEFT) beside a model keeps it from being used: transformers would load both, and a copy of the folder
/// without the adapter's weights could not be loaded at all.
pub(super) fn adapter_beside_model(dir: &Path) -> Option<String> {
    dir.join(ADAPTER).exists().then(|| {
        format!(
            "{ADAPTER}: an adapter (PEFT) lies beside the model, and transformers would load both. To train the model \
             without it, move {ADAPTER} and adapter_model.* out of the folder. To train both, move them to a folder ADAPTER and \
             merge them: python -c \"from peft import PeftModel as P; from transformers import AutoModelForCausalLM as M; \
             P.from_pretrained(M.from_pretrained('{}', dtype='auto'), 'ADAPTER').merge_and_unload().save_pretrained('NEW_FOLDER')\", \
             {COPY_TOKENIZER}",
            dir.display()
        )
    })
}

/// What a folder is that lacks config.json or weights, with the way out. `None`: nothing is known.
pub(super) fn not_a_model(dir: &Path) -> Option<String> {
    let names = names(dir);
    let ends = |ending: &str| names.iter().find(|name| name.ends_with(ending));
    if names.iter().any(|name| name == ADAPTER || name.starts_with("adapter_model.")) {
        let config = object(dir, ADAPTER);
        let base = config.get("base_model_name_or_path").and_then(Value::as_str);
        let base = base.map_or_else(String::new, |base| format!(" of {}", quote(base)));
        return Some(format!(
            "this is an adapter (PEFT){base}, not a model: merge it into its base model with: python -c \"from peft import \
             AutoPeftModelForCausalLM as M; M.from_pretrained('{}', dtype='auto').merge_and_unload().save_pretrained('NEW_FOLDER')\", \
             {COPY_TOKENIZER}",
            dir.display()
        ));
    }
    if let Some(message) = fsdp(dir, &names) {
        return Some(message);
    }
    if names.iter().any(|name| name == "zero_to_fp32.py" || name.starts_with("global_step")) {
        return Some(
            "this is a training checkpoint of DeepSpeed: merge it with `python zero_to_fp32.py FOLDER NEW_FOLDER \
             --safe_serialization`, then copy config.json and the tokenizer files into NEW_FOLDER"
                .into(),
        );
    }
    if let Some(what) =
        TRAINERS.iter().find(|(file, _)| names.iter().any(|name| is_like(name, file))).map(|(_, what)| what)
    {
        return Some(format!(
            "this is a training checkpoint of {what}: convert it to a model of transformers by its own tools"
        ));
    }
    if names.iter().any(|name| name == "snapshots") && names.iter().any(|name| name == "blobs" || name == "refs") {
        return Some(
            "this is a model's folder in the cache of Hugging Face: give the model's id ORG/NAME, or one of the folders in its snapshots"
                .into(),
        );
    }
    let safetensors: Vec<&String> = names.iter().filter(|name| name.ends_with(".safetensors")).collect();
    if dir.join("config.json").exists()
        && let Some(first) = safetensors.first()
    {
        let index = names.iter().find(|name| name.contains(".safetensors.index.") && name.ends_with(".json"));
        return Some(match (first.contains("-of-"), index) {
            (true, Some(index)) => format!(
                "its index is named {}, such as save_pretrained(variant=..) names it: rename it to model.safetensors.index.json",
                quote(index)
            ),
            (true, None) => {
                format!("{} is a shard, but model.safetensors.index.json is missing: fetch it, too", quote(first))
            }
            (false, _) => format!(
                "it holds {}: if that is the whole model in the names of transformers, rename it to model.safetensors",
                quote(first)
            ),
        });
    }
    if let Some(part) = names.iter().find(|name| PARTS.iter().any(|ending| name.ends_with(ending))) {
        return Some(format!("{} is a part of a download that was stopped: fetch the file again", quote(part)));
    }
    if let Some((_, format)) = OTHER_WEIGHTS.iter().find(|(extension, _)| ends(&format!(".{extension}")).is_some()) {
        return Some(format!("it holds weights of {format}: give the original model in safetensors"));
    }
    // Of several checkpoints the last one, by its number, that has weights.
    let number =
        |name: &str| name.rsplit(|c: char| !c.is_ascii_digit()).next().and_then(|digits| digits.parse::<u64>().ok());
    let has_weights = |name: &String| {
        let files = fs::read_dir(dir.join(name)).into_iter().flatten().flatten();
        let names = files.filter_map(|file| file.file_name().into_string().ok());
        names.into_iter().any(|file| [".safetensors", ".bin"].iter().any(|ending| file.ends_with(ending)))
    };
    let models = names.iter().filter(|name| dir.join(name).join("config.json").is_file());
    let model = models.max_by_key(|name| (has_weights(name), number(name)));
    model.map(|name| format!("the folder {} in it holds a config.json: give that one", quote(name)))
}

/// What accelerate and PyTorch save of a model that FSDP shards: all of it in one file, a part for each rank, or shards.
fn fsdp(dir: &Path, names: &[String]) -> Option<String> {
    const ALL: &str = "pytorch_model_fsdp";
    let (shown, saved) = (dir.display(), names.iter().find(|name| name.starts_with(ALL)));
    if let Some(file) = saved.filter(|name| name.contains("_rank")) {
        return Some(format!(
            "{} is the part of a training checkpoint (FSDP) that one rank saved: load the checkpoint in its training, and save it with \
             fsdp_state_dict_type FULL_STATE_DICT or SHARDED_STATE_DICT",
            quote(file)
        ));
    }
    if let Some(file) = saved.filter(|name| name.ends_with(".bin")) {
        // As accelerate names it: no character that a shell would obey.
        let file = if file.bytes().all(|b| b.is_ascii_alphanumeric() || b"._".contains(&b)) { file } else { "FILE" };
        return Some(format!(
            "`{file}` holds all weights of a training checkpoint (FSDP) as a pickle, which moewarden does not load: make a model of it: \
             python -c \"import torch; from safetensors.torch import save_file; t = torch.load('{shown}/{file}', map_location='cpu', \
             weights_only=True); save_file({{k: v.clone() for k, v in t.items()}}, '{shown}/model.safetensors', {{'format': 'pt'}})\""
        ));
    }
    let (file, folder) = match names.iter().find(|name| name.ends_with(".distcp")) {
        Some(file) => (file, shown.to_string()),
        None => saved.map(|folder| (folder, format!("{shown}/{folder}")))?,
    };
    Some(format!(
        "{} is of a training checkpoint (FSDP) in shards: merge them with `accelerate merge-weights '{folder}' NEW_FOLDER`, then copy \
         config.json and the tokenizer files into NEW_FOLDER",
        quote(file)
    ))
}

/// Files with weights in the model's folder that are neither read nor exported, where `read` names those that are.
pub(super) fn unread_weights(dir: &Path, read: impl Fn(&str) -> bool) -> Vec<String> {
    let weights = |name: &String| {
        let extension = Path::new(name).extension().and_then(|e| e.to_str()).unwrap_or_default();
        let pickle = ["bin", "pt", "pth", "ckpt", "safetensors"].contains(&extension);
        !name.starts_with('.') && (pickle || OTHER_WEIGHTS.iter().any(|(other, _)| *other == extension))
    };
    names(dir).into_iter().filter(|name| weights(name) && !read(name)).collect()
}

/// A warning about a `quantization_config` in config.json: read only where the weights are not quantised, so that it is left
/// over.
pub fn left_over_quantization(dir: &Path) -> Option<String> {
    let config = object(dir, "config.json");
    let quantization = config.get("quantization_config").filter(|value| !value.is_null())?;
    let method = quantization.get("quant_method").and_then(Value::as_str);
    let method = method.map_or_else(String::new, |method| format!(" ({})", quote(method)));
    Some(format!(
        "config.json has a quantization_config{method}, but no tensor is quantised: it is taken for left over. transformers obeys \
         it when it loads this model or a model trained from it: remove the key from config.json"
    ))
}
