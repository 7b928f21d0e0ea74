//! Folders as people have them: adapters, quantised and wrapped weights, indices with more than the model needs, stray files.

use std::fs;

use moewarden::model::tiny::TinySpec;
use serde_json::{Value, json};

use super::model::Weights;
use super::{Scene, files, spec};

const INDEX: &str = "model.safetensors.index.json";

#[test]
fn an_adapter_is_named_beside_a_model_and_in_its_place() {
    let config = json!({"base_model_name_or_path": "org/base\u{1b}[2J", "peft_type": "LORA"}).to_string();
    let scene = Scene::new();
    // The weights of an adapter without its configuration are a stray file: transformers does not read them.
    fs::write(scene.model().join("adapter_model.safetensors"), "").unwrap();
    scene.train(&["--save-rounds", "delta"]).is(0, &[]);
    assert!(!scene.out().join("final_model/adapter_model.safetensors").exists());
    fs::remove_dir_all(scene.out()).unwrap();

    fs::write(scene.model().join("adapter_config.json"), &config).unwrap();
    scene.refuses(&[], 65, &["adapter_config.json", "beside the model", "merge_and_unload", "move"]);

    fs::remove_file(scene.model().join("model.safetensors")).unwrap();
    scene.refuses(&[], 66, &["this is an adapter (PEFT) of `org/base\\u{1b}[2J`", "merge"]);
    fs::remove_file(scene.model().join("config.json")).unwrap();
    scene.refuses(&[], 65, &["holds no config.json", "this is an adapter (PEFT) of", "merge"]);
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        fs::rename(scene.model().join(name), scene.path("aside")).unwrap();
    }
    fs::rename(scene.path("aside"), scene.model().join("adapter_model.bin")).unwrap();
    scene.refuses(&[], 65, &["this is an adapter (PEFT), not a model"]);
}

#[test]
fn a_left_over_quantization_config_is_decided_by_the_tensors() {
    let scene = Scene::new();
    scene.configure(json!({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": true}}));
    let identified = super::Outcome::of(scene.run("identify", &[]));
    identified.is(0, &["quantization_config (`bitsandbytes`)", "left over"]);
    let with = fs::read_to_string(scene.out().join("expert_scores.json")).unwrap();
    fs::remove_dir_all(scene.out()).unwrap();
    scene.configure(json!({"quantization_config": null}));
    let without = super::Outcome::of(scene.run("identify", &[]));
    without.is(0, &[]);
    assert!(!without.stderr.contains("quantization_config"));
    assert_eq!(with, fs::read_to_string(scene.out().join("expert_scores.json")).unwrap());
}

/// Header, renamed: every tensor's name by `rename`.
fn renamed(header: &str, rename: impl Fn(&str) -> String) -> String {
    let tensors: serde_json::Map<String, Value> = serde_json::from_str(header).unwrap();
    let renamed: serde_json::Map<String, Value> = tensors
        .into_iter()
        .map(|(name, info)| (if name == "__metadata__" { name } else { rename(&name) }, info))
        .collect();
    json!(renamed).to_string()
}

/// Removes the parts of all wrappers from a name.
const RENAMED: &str = "re.sub(r'(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module|base_model[.]model|base_layer)[.]', '', k)";

#[test]
fn names_show_how_the_weights_were_saved() {
    let scene = Scene::new();
    let weights = Weights::read(&scene);
    let each = |rename: &dyn Fn(&str) -> String| renamed(&weights.header, rename);
    let q = "model.layers.0.self_attn.q_proj.weight";
    let one = |new: &str| each(&|name| if name == q { new.into() } else { name.into() });
    let cases = [
        (each(&|n| format!("module.{n}")), ["part `module.` of DistributedDataParallel", RENAMED]),
        (each(&|n| format!("_orig_mod.{n}")), ["part `_orig_mod.` of torch.compile", "save_pretrained"]),
        (each(&|n| format!("base_model.model.{n}")), ["part `base_model.model.` of PEFT", RENAMED]),
        (each(&|n| format!("_forward_module.{n}")), ["_forward_module", "Lightning"]),
        (
            each(&|n| n.replacen("model.", "model._fsdp_wrapped_module.", 1)),
            ["`_fsdp_wrapped_module.` of FSDP", "unwrap_model"],
        ),
        (each(&|n| n.replace(".mlp.", "._checkpoint_wrapped_module.mlp.")), ["activation checkpointing", "rename"]),
        (each(&|n| n.replace(".0.", ".0._orig_mod.")), ["torch.compile", RENAMED]),
        (each(&|n| format!("transformer.{n}")), ["begins with `transformer.`", "k.removeprefix('transformer.')"]),
        (each(&|n| format!("x'; rm -rf ~; '.{n}")), ["begins with `x'; rm -rf ~; '.`", "k.removeprefix('PREFIX')"]),
        (each(&|n| n.trim_start_matches("model.").into()), ["lacks the beginning `model.`", "AutoModelForCausalLM"]),
        (one("model.layers.0.self_attn.q_proj.base_layer.weight"), ["`base_layer.` of PEFT", "unwrap_model"]),
        (one("model.layers.0.self_attn.q_proj.lora_A.default.weight"), ["adapter (LoRA)", "merge_and_unload"]),
        // What PEFT trains decides, whatever its other names and their order.
        (
            each(&|n| match n {
                "lm_head.weight" => "base_model.model.lm_head.modules_to_save.default.weight".into(),
                "model.norm.weight" => "base_model.model.lm_head.original_module.weight".into(),
                n => format!("base_model.model.{n}"),
            }),
            ["has trained a copy of this module (`modules_to_save`)", "re.sub('modules_to_save[.][^.]+[.]', '', k)"],
        ),
        (
            each(&|n| match n {
                "model.norm.weight" => "model.layers.0.self_attn.q_proj.lora_A.default.weight".into(),
                n => n.replace("q_proj.weight", "q_proj.base_layer.weight"),
            }),
            ["adapter (LoRA)", "merge_and_unload"],
        ),
        (
            each(&|n| n.replacen("model.", "model.language_model.", 1)),
            ["the text model inside", "k.replace('language_model.', ''): v"],
        ),
        (each(&|n| format!("language_model.{n}")), ["the text model inside", "`text_config`"]),
        (
            each(&|n| if n == "lm_head.weight" { "score.weight".into() } else { n.into() }),
            ["the head of a reward model", "the model that it was made from"],
        ),
        (one("model.layers.0._flat_param"), ["flat parameters of FSDP", "accelerate merge-weights"]),
        (one("model.layers.0.self_attn.q_proj.qweight"), ["quantised", "the original model in bf16"]),
        (one("model.layers.0.self_attn.q_proj.weight_packed"), ["quantised", "bf16"]),
        (one("model.layers.0.self_attn.q_proj.weight.quant_state.bitsandbytes__nf4"), ["quantised", "dequantize()"]),
    ];
    for (header, says) in cases {
        weights.write(&scene, &header);
        scene.refuses(&[], 65, &says);
    }
    // A tensor too many, which the model has no place for.
    for (extra, says) in [
        ("v_head.summary.weight", ["a head for values or scores", "if not k.startswith('v_head.')"]),
        ("model.layers.0.self_attn.q_proj.bias", ["is config.json that of another model?", "can be left out"]),
    ] {
        let end = weights.data.len();
        let empty = json!({"dtype": "F32", "shape": [0], "data_offsets": [end, end]});
        weights.write(&scene, &weights.with(extra, |entry| *entry = empty));
        scene.refuses(&[], 65, &[&[extra], &says[..]].concat());
    }
    // Formats of 32 bits stand for those of quantised weights: the sizes stay right.
    for dtype in ["I32", "U32"] {
        weights.write(&scene, &weights.with(q, |info| info["dtype"] = dtype.into()));
        scene.refuses(&[], 65, &["q_proj", &format!("quantised (stored as {dtype})"), "bf16"]);
    }
}

#[test]
fn an_index_may_list_more_than_the_model_needs() {
    let tied = TinySpec { tie: true, shards: 2, ..spec() };
    let scene = Scene::with(&tied);
    let path = scene.model().join(INDEX);
    let good: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let shard = good["weight_map"]["model.norm.weight"].clone();
    let first = good["weight_map"]["model.embed_tokens.weight"].clone();
    assert_ne!(shard, first);
    let with = |name: &str, file: Value| {
        let mut index = good.clone();
        index["weight_map"][name] = file;
        fs::write(&path, format!("\u{feff}{index}")).unwrap();
    };
    for (name, file) in [
        ("lm_head.weight", &shard),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", &shard),
        ("ghost", &first),
        // As transformers does, the index is read for the names of the shards only.
        ("model.norm.weight", &first),
    ] {
        with(name, file.clone());
        scene.train(&[]).is(0, &[]);
        assert_eq!(fs::read(&path).unwrap(), fs::read(scene.out().join("final_model").join(INDEX)).unwrap());
        fs::remove_dir_all(scene.out()).unwrap();
    }
    with("ghost", json!("model-00009-of-00009.safetensors"));
    scene.refuses(&[], 65, &["model-00009-of-00009.safetensors does not exist"]);
    // What the model needs is missed, and the index says where it should be.
    with("ghost", shard.clone());
    scene.configure(json!({"tie_word_embeddings": false}));
    scene.refuses(&[], 65, &["`lm_head.weight` is missing"]);
    with("lm_head.weight", shard.clone());
    let file = shard.as_str().unwrap();
    scene.refuses(&[], 65, &["`lm_head.weight` is missing", &format!("the index lists it in `{file}`")]);
}

#[test]
fn stray_weights_are_named_and_not_exported() {
    let scene = Scene::new();
    for name in ["consolidated.safetensors", "pytorch_model.bin", "model.gguf", INDEX, "notes.txt"] {
        fs::write(scene.model().join(name), "x").unwrap();
    }
    let ran = scene.train(&[]);
    ran.is(0, &[]);
    let said = ran.stdout.lines().find(|line| line.contains("neither read nor exported")).expect("a line about them");
    assert!(said.starts_with("`consolidated.safetensors` and 2 more"), "{said}");
    let exported = files(&scene.out().join("final_model"));
    for name in ["consolidated.safetensors", "pytorch_model.bin", "model.gguf", INDEX] {
        assert!(!exported.iter().any(|file| file.ends_with(name)), "{name} in {exported:?}");
    }
    assert!(exported.iter().any(|file| file.ends_with("notes.txt")));
}

#[test]
fn a_link_that_an_export_could_not_copy_is_refused_before_the_run() {
    for (target, code, says) in
        [("/nowhere/x", 66, "a broken symbolic link"), ("/etc/hostname", 65, "outside the checkpoint")]
    {
        let scene = Scene::new();
        std::os::unix::fs::symlink(target, scene.model().join("README.md")).unwrap();
        scene.refuses(&[], code, &["README.md", says]);
        super::Outcome::of(scene.run("check", &[])).is(code, &["README.md", says]);
        super::Outcome::of(scene.run("identify", &[])).is(0, &[]);
    }
}

#[test]
fn a_folder_without_weights_says_what_it_holds() {
    for (found, code, says) in [
        ("__0_0.distcp", 66, "accelerate merge-weights"),
        ("pytorch_model_fsdp_0/x", 66, "model/pytorch_model_fsdp_0' NEW_FOLDER`"),
        ("pytorch_model_fsdp_0/__0_0.distcp", 66, "accelerate merge-weights '"),
        ("pytorch_model_fsdp.bin", 66, "model/pytorch_model_fsdp.bin', map_location='cpu', weights_only=True)"),
        ("pytorch_model_fsdp_1.bin", 66, "save_file({k: v.clone() for k, v in t.items()}"),
        ("pytorch_model_fsdp_rank3.bin", 66, "the part of a training checkpoint (FSDP) that one rank saved"),
        ("zero_to_fp32.py", 66, "DeepSpeed"),
        ("global_step10/x", 66, "DeepSpeed"),
        ("model-00001-of-00002.safetensors", 66, "is a shard, but model.safetensors.index.json is missing"),
        ("model.fp16.safetensors", 66, "rename it to model.safetensors"),
        ("model.Q4_K_M.gguf", 66, "weights of GGUF"),
        ("model.safetensors.incomplete", 66, "is a part of a download that was stopped"),
        ("tf_model.h5", 66, "weights of TensorFlow"),
        ("checkpoint-500/config.json", 66, "the folder `checkpoint-500` in it holds a config.json"),
        ("pytorch_model.bin", 65, "M.from_pretrained('FOLDER', dtype='auto').save_pretrained('NEW_FOLDER')"),
        ("consolidated.00.pth", 65, "consolidated.00.pth is a pickle file"),
        ("last.ckpt", 65, "nor does transformers by this name: load it with the program that wrote it"),
        ("model_and_optim/x", 66, "a training checkpoint of OLMo-core"),
        ("iter_0000500/x", 66, "a training checkpoint of Megatron"),
        ("training_args.bin", 66, "--init random"),
    ] {
        let scene = Scene::new();
        fs::remove_file(scene.model().join("model.safetensors")).unwrap();
        let path = scene.model().join(found);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "x").unwrap();
        scene.refuses(&[], code, &[says]);
    }
    let scene = Scene::new();
    fs::rename(scene.model().join("model.safetensors"), scene.model().join("model.fp16-00001-of-00001.safetensors"))
        .unwrap();
    fs::write(scene.model().join("model.safetensors.index.fp16.json"), "{}").unwrap();
    scene.refuses(&[], 66, &["`model.safetensors.index.fp16.json`", "rename it to model.safetensors.index.json"]);
    // The folder of a model in the hub's cache, in place of its snapshot.
    let cached = scene.path("models--org--m");
    ["snapshots", "blobs", "refs"].iter().for_each(|name| fs::create_dir_all(cached.join(name)).unwrap());
    scene.refuses(
        &["--model-name", "models--org--m"],
        65,
        &["give the model's id ORG/NAME, or one of the folders in its snapshots"],
    );
    // Packed weights.
    for (head, says) in
        [(&b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03rest"[..], "gzip -d"), (b"\xfd7zXZ\0\0\x04rest", "xz -d")]
    {
        let scene = Scene::new();
        fs::write(scene.model().join("model.safetensors"), head).unwrap();
        scene.refuses(&[], 65, &["model.safetensors: the file is compressed", says]);
    }
    // Of several checkpoints the last one that has weights.
    let scene = Scene::new();
    fs::remove_file(scene.model().join("model.safetensors")).unwrap();
    for file in ["checkpoint-9/x", "checkpoint-90/x", "checkpoint-100/x", "checkpoint-200/config.json"] {
        let folder = scene.model().join(file).parent().unwrap().to_owned();
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("config.json"), "{}").unwrap();
        if file.ends_with('x') {
            fs::write(folder.join("model.safetensors"), "x").unwrap();
        }
    }
    scene.refuses(&[], 66, &["the folder `checkpoint-100` in it"]);
    // A folder of runs, without config.json itself.
    let scene = Scene::new();
    scene.refuses(&["--model-name", "."], 65, &["holds no config.json", "the folder `model` in it"]);
}
