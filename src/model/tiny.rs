//! Random checkpoints in the Hugging Face layout: for the quickstart, tests and benches.
//!
//! A value depends only on the seed, the parameter and the index of the element, so models that differ only in layout,
//! number format or sharding have the same weights. Weights are streamed to disk: a benchmark's model may be larger than
//! memory.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use rayon::prelude::*;
use serde_json::{Map, Value, json};

use super::claim::{BlockNames, tensor_name, tensor_shape};
use super::config::{self, Family, ModelConfig, Rule};
use super::ids::{Group, ParamKind};
use super::random::DTYPE_NAMES;
use super::safetensors::write_header;
use crate::backend::{Dtype, encode_into};
use crate::exit::{self, Coded};

/// How experts are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// One tensor per expert and matrix.
    PerExpert,
    /// Two tensors for all experts of a layer.
    Fused,
}

/// Specification of a checkpoint. [`TinySpec::new`] gives sizes for tests; every field may be changed.
#[derive(Debug, Clone, PartialEq)]
pub struct TinySpec {
    /// `model_type` of one of [`FAMILIES`](super::FAMILIES).
    pub model_type: String,
    /// V
    pub vocab_size: usize,
    /// D
    pub hidden_size: usize,
    /// Decoder layers.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// E
    pub num_experts: usize,
    /// K
    pub top_k: usize,
    /// F
    pub expert_width: usize,
    /// Format of all tensors.
    pub dtype: Dtype,
    /// How experts are stored.
    pub layout: Layout,
    /// Maximum number of files for the weights.
    pub shards: usize,
    /// Whether the output head is the embedding.
    pub tie: bool,
    /// Seed of the weights.
    pub seed: u64,
    /// Standard deviation of the weights. The mean is 0, for norms 1.
    pub std: f32,
    /// Further keys of config.json, which override the fields above: `mlp_only_layers`, `rope_scaling`, `clip_qkv`, …
    pub extra: Map<String, Value>,
}

/// Why a checkpoint could not be written.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages are the documentation
pub enum Error {
    #[error("the model family `{0}` is not supported; moewarden knows {known}", known = config::known())]
    Family(String),
    #[error("cannot write {path}")]
    Write { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Config(#[from] config::Error),
}

impl Coded for Error {
    fn exit_code(&self) -> u8 {
        match self {
            Error::Family(_) => exit::CONFIG,
            Error::Write { .. } => exit::IO,
            Error::Config(error) => error.exit_code(),
        }
    }
}

impl TinySpec {
    /// A model of this family with about 150 000 parameters, in f32, in one file.
    pub fn new(model_type: &str) -> Self {
        Self {
            model_type: model_type.into(),
            vocab_size: 400,
            hidden_size: 48,
            num_layers: 3,
            num_heads: 4,
            num_kv_heads: 2,
            head_dim: 12,
            num_experts: 8,
            top_k: 2,
            expert_width: 24,
            dtype: Dtype::F32,
            layout: Layout::PerExpert,
            shards: 1,
            tie: false,
            seed: 42,
            std: 0.08,
            extra: Map::new(),
        }
    }

    fn config_json(&self, family: &Family) -> Map<String, Value> {
        let (dtype, _) = DTYPE_NAMES.iter().find(|(_, dtype)| *dtype == self.dtype).expect("every format has a name");
        let experts_key = if self.model_type == "mixtral" { "num_local_experts" } else { "num_experts" };
        let Value::Object(mut object) = json!({
            "architectures": [family.architecture],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": 2 * self.expert_width,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": 4096,
            "rms_norm_eps": family.defaults.eps,
            "rope_theta": family.defaults.theta,
            "tie_word_embeddings": self.tie,
            "torch_dtype": dtype,
        }) else {
            unreachable!("an object is written above")
        };
        if !family.is_dense() {
            object.insert(experts_key.into(), self.num_experts.into());
            object.insert("num_experts_per_tok".into(), self.top_k.into());
            object.insert(family.expert_width_key.into(), self.expert_width.into());
        }
        if let Some((key, _)) = family.shared_expert {
            object.insert(key.into(), (2 * self.expert_width).into());
        }
        for rule in [family.renormalize, family.qkv_bias, family.o_bias] {
            if let Rule::Key(key, default) = rule {
                object.insert(key.into(), default.into());
            }
        }
        object.extend(self.extra.clone());
        object
    }
}

/// A tensor to write: its header entry and its parameters in order.
struct Tensor {
    entry: (String, Dtype, Vec<usize>),
    pieces: Vec<Piece>,
}

/// Part of a tensor: `len` values of the random stream `stream`, from index `start`.
#[derive(Clone, Copy)]
struct Piece {
    stream: u64,
    start: usize,
    len: usize,
    mean: f32,
}

impl Tensor {
    fn bytes(&self) -> usize {
        self.entry.2.iter().product::<usize>() * self.entry.1.size()
    }
}

/// Creates `dir` and writes config.json and random weights to it, but no tokenizer. Returns the configuration as read from
/// the written file.
///
/// # Errors
/// A specification that is not a valid model, and failed writes.
pub fn write_random_checkpoint(dir: &Path, spec: &TinySpec) -> Result<ModelConfig, Error> {
    let family = Family::find(&spec.model_type).ok_or_else(|| Error::Family(spec.model_type.clone()))?;
    let write = |path: &Path| {
        let path = path.to_path_buf();
        move |source| Error::Write { path, source }
    };
    fs::create_dir_all(dir).map_err(write(dir))?;
    let json = |name: &str, value: &Map<String, Value>| {
        let text = serde_json::to_string_pretty(value).expect("JSON values serialise");
        fs::write(dir.join(name), text + "\n").map_err(write(&dir.join(name)))
    };
    json("config.json", &spec.config_json(family))?;
    let config = ModelConfig::from_dir(dir)?;

    let shards = split(tensors(&config, family, spec), spec.shards);
    let mut weight_map = Map::new();
    let mut total = 0;
    for (n, shard) in shards.iter().enumerate() {
        let file = match shards.len() {
            1 => "model.safetensors".to_string(),
            of => format!("model-{:05}-of-{of:05}.safetensors", n + 1),
        };
        let path = dir.join(&file);
        write_shard(&path, shard, spec).map_err(write(&path))?;
        for tensor in shard {
            weight_map.insert(tensor.entry.0.clone(), file.clone().into());
            total += tensor.bytes();
        }
    }
    if shards.len() > 1 {
        weight_map.sort_keys();
        let metadata = json!({ "total_size": total });
        let index = [("metadata".to_string(), metadata), ("weight_map".to_string(), weight_map.into())];
        json("model.safetensors.index.json", &Map::from_iter(index))?;
    }
    Ok(config)
}

fn tensors(config: &ModelConfig, family: &Family, spec: &TinySpec) -> Vec<Tensor> {
    let block = BlockNames { name: family.blocks[0], fused: spec.layout == Layout::Fused };
    let mut tensors: Vec<Tensor> = Vec::new();
    let mut index = std::collections::HashMap::new();
    for (stream, kind) in ParamKind::all(config).into_iter().enumerate() {
        let name = tensor_name(kind, family, block);
        let (shape, elements) = tensor_shape(kind, config, block.fused);
        let at = *index.entry(name.clone()).or_insert_with(|| {
            tensors.push(Tensor { entry: (name, spec.dtype, shape), pieces: Vec::new() });
            tensors.len() - 1
        });
        let mean = if kind.group() == Group::Norm { 1.0 } else { 0.0 };
        tensors[at].pieces.push(Piece { stream: stream as u64, start: 0, len: elements.len(), mean });
    }
    tensors
}

/// Splits the tensors into at most `shards` consecutive parts of about equal size.
fn split(tensors: Vec<Tensor>, shards: usize) -> Vec<Vec<Tensor>> {
    let total: usize = tensors.iter().map(Tensor::bytes).sum();
    let mut out: Vec<Vec<Tensor>> = Vec::new();
    let (mut at, mut last) = (0, None);
    for tensor in tensors {
        let shard = at * shards.max(1) / total.max(1);
        at += tensor.bytes();
        if last != Some(shard) {
            out.push(Vec::new());
            last = Some(shard);
        }
        out.last_mut().expect("one was pushed").push(tensor);
    }
    out
}

fn write_shard(path: &Path, tensors: &[Tensor], spec: &TinySpec) -> io::Result<()> {
    /// Values that one thread generates at a time.
    const CHUNK: usize = 1 << 18;
    /// Chunks in memory at a time.
    const BATCH: usize = 64;

    let mut out = BufWriter::with_capacity(1 << 20, File::create(path)?);
    let entries: Vec<_> = tensors.iter().map(|tensor| tensor.entry.clone()).collect();
    write_header(&mut out, &[("format".into(), "pt".into())], &entries)?;
    let chunks: Vec<Piece> = tensors
        .iter()
        .flat_map(|tensor| &tensor.pieces)
        .flat_map(|piece| {
            let cut = move |start| Piece { start, len: CHUNK.min(piece.len - start), ..*piece };
            (0..piece.len).step_by(CHUNK).map(cut)
        })
        .collect();
    for chunks in chunks.chunks(BATCH) {
        let encoded: Vec<Vec<u8>> = chunks.par_iter().map(|piece| random_bytes(piece, spec)).collect();
        encoded.iter().try_for_each(|bytes| out.write_all(bytes))?;
    }
    out.into_inner()?.sync_all()
}

/// Uniform values with the standard deviation of `spec`, each from one 32-bit word, so that any part can be generated alone.
fn random_bytes(piece: &Piece, spec: &TinySpec) -> Vec<u8> {
    let mut rng = ChaCha8Rng::seed_from_u64(spec.seed);
    rng.set_stream(piece.stream);
    rng.set_word_pos(piece.start as u128);
    let mut words = vec![0; 4 * piece.len];
    rng.fill_bytes(&mut words);
    let half_width = spec.std * 3f32.sqrt();
    let uniform = |word: [u8; 4]| {
        let bits = u32::from_le_bytes(word) >> 8; // 24 bits are exact in f32
        piece.mean + half_width * (bits as f32 / (1 << 23) as f32 - 1.0)
    };
    let values: Vec<f32> = words.as_chunks::<4>().0.iter().copied().map(uniform).collect();
    let mut bytes = vec![0; piece.len * spec.dtype.size()];
    encode_into(spec.dtype, &values, &mut bytes);
    bytes
}
