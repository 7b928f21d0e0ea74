//! Maps parameters to the tensors of a checkpoint. Every parameter needs a tensor and every tensor a parameter; otherwise the
//! checkpoint is refused.

use std::collections::HashSet;
use std::ops::Range;

use super::config::{Family, LayerKind, ModelConfig};
use super::ids::{ParamKind, ParamSpec, Proj};
use super::origin::{self, LM_HEAD};
use super::weights::{self, Checkpoint};
use crate::backend::HostTensor;
use crate::exit::{self, Coded};
use crate::quote::quote;

/// Why a checkpoint's tensors do not fit the model that config.json describes.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages are the documentation
pub enum Error {
    #[error("{dir}: tensor `{tensor}` is missing{}, but config.json requires it{}", and_more(.more), by_index(.listed))]
    Missing { dir: String, tensor: String, more: usize, listed: Option<String> },
    #[error(
        "{file}: tensor {}{} does not belong to the {model_type} model that config.json describes{}", quote(.tensor), and_more(.more), origin::left_over(.tensor)
    )]
    Unclaimed { file: String, tensor: String, model_type: String, more: usize },
    #[error("{file}: tensor {}: {message}", quote(.tensor))]
    NotPlain { file: String, tensor: String, message: String },
    #[error("{file}: tensor `{tensor}` has shape {found:?}, but config.json requires {expected:?}")]
    Shape { file: String, tensor: String, found: Vec<usize>, expected: Vec<usize> },
    #[error(
        "{file}: config.json sets tie_word_embeddings, but `{LM_HEAD}` differs from the embedding; \
         set it to false if the model has a separate output head"
    )]
    TiedHead { file: String },
    #[error(transparent)]
    Weights(#[from] weights::Error),
}

impl Coded for Error {
    fn exit_code(&self) -> u8 {
        match self {
            Error::Weights(error) => error.exit_code(),
            _ => exit::DATA,
        }
    }
}

fn and_more(more: &usize) -> String {
    if *more == 0 { String::new() } else { format!(" (and {more} more)") }
}

fn by_index(file: &Option<String>) -> String {
    file.as_ref().map_or_else(String::new, |file| {
        format!("; the index lists it in {}, which does not hold it: fetch that file again", quote(file))
    })
}

/// Names of the tensors of a layer's MoE block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BlockNames {
    /// Name of the block: `mlp` or `block_sparse_moe`.
    pub(crate) name: &'static str,
    /// Whether all experts of a layer are fused into two tensors.
    pub(crate) fused: bool,
}

impl BlockNames {
    /// The names that the checkpoint uses; if it has none of the known ones, those of the published checkpoints.
    fn detect(family: &Family, checkpoint: &Checkpoint, layer: usize) -> Self {
        let has = |block: &str, part: &str| checkpoint.get(&format!("model.layers.{layer}.{block}.{part}")).is_some();
        let name = family.blocks.iter().find(|block| has(block, "gate.weight")).unwrap_or(&family.blocks[0]);
        let fused = ["experts.gate_up_proj", "experts.down_proj"].iter().any(|part| has(name, part));
        Self { name, fused }
    }
}

/// Name of the tensor that holds a parameter.
pub(crate) fn tensor_name(kind: ParamKind, family: &Family, block: BlockNames) -> String {
    use ParamKind as P;
    let layer = |l: usize, part: &str| format!("model.layers.{l}.{part}");
    let routed = |l: usize, part: &str| format!("model.layers.{l}.{}.{part}", block.name);
    let swiglu = |proj: Proj| ["gate_proj", "up_proj", "down_proj"][proj as usize];
    match kind {
        P::Embedding => "model.embed_tokens.weight".into(),
        P::FinalNorm => "model.norm.weight".into(),
        P::LmHead => LM_HEAD.into(),
        P::InputNorm(l) => layer(l, "input_layernorm.weight"),
        P::PostNorm(l) => layer(l, "post_attention_layernorm.weight"),
        P::Q(l) => layer(l, "self_attn.q_proj.weight"),
        P::QBias(l) => layer(l, "self_attn.q_proj.bias"),
        P::K(l) => layer(l, "self_attn.k_proj.weight"),
        P::KBias(l) => layer(l, "self_attn.k_proj.bias"),
        P::V(l) => layer(l, "self_attn.v_proj.weight"),
        P::VBias(l) => layer(l, "self_attn.v_proj.bias"),
        P::O(l) => layer(l, "self_attn.o_proj.weight"),
        P::OBias(l) => layer(l, "self_attn.o_proj.bias"),
        P::QNorm(l) => layer(l, "self_attn.q_norm.weight"),
        P::KNorm(l) => layer(l, "self_attn.k_norm.weight"),
        P::Dense(l, proj) => layer(l, &format!("mlp.{}.weight", swiglu(proj))),
        P::Router(l) => routed(l, "gate.weight"),
        P::Expert(l, _, Proj::Gate | Proj::Up) if block.fused => routed(l, "experts.gate_up_proj"),
        P::Expert(l, _, Proj::Down) if block.fused => routed(l, "experts.down_proj"),
        P::Expert(l, e, proj) => routed(l, &format!("experts.{e}.{}.weight", family.expert_matrices[proj as usize])),
        P::Shared(l, proj) => routed(l, &format!("shared_expert.{}.weight", swiglu(proj))),
        P::SharedGate(l) => routed(l, "shared_expert_gate.weight"),
    }
}

/// The shape of the tensor that holds a parameter, and the range of the parameter's elements in it.
pub(crate) fn tensor_shape(kind: ParamKind, config: &ModelConfig, fused: bool) -> (Vec<usize>, Range<usize>) {
    let own = kind.shape(config);
    let (e, d, f) = (config.num_experts, config.hidden_size, config.expert_width);
    let size = f * d;
    let (shape, start) = match kind {
        // gate_up is [E, 2F, D], each expert's gate rows before its up rows; down is [E, D, F].
        ParamKind::Expert(_, x, Proj::Gate) if fused => (vec![e, 2 * f, d], 2 * x * size),
        ParamKind::Expert(_, x, Proj::Up) if fused => (vec![e, 2 * f, d], (2 * x + 1) * size),
        ParamKind::Expert(_, x, Proj::Down) if fused => (vec![e, d, f], x * size),
        _ => {
            let len = own.iter().product();
            return (own, 0..len);
        }
    };
    (shape, start..start + size)
}

/// All parameters in order, each with its tensor in the checkpoint.
pub(super) fn claim(config: &ModelConfig, checkpoint: &Checkpoint) -> Result<Vec<ParamSpec>, Error> {
    claim_all(config, checkpoint).map_err(|error| not_plain(checkpoint, &error).unwrap_or(error))
}

/// The reason behind `error` where the names or number formats of the tensors show how the checkpoint was made.
fn not_plain(checkpoint: &Checkpoint, error: &Error) -> Option<Error> {
    let missing = match error {
        Error::Missing { tensor, .. } => Some(tensor.as_str()),
        Error::TiedHead { .. } => return None,
        _ => None,
    };
    let by_peft = checkpoint.tensors().filter(|(_, tensor)| origin::is_trained_by_peft(&tensor.name));
    by_peft.chain(checkpoint.tensors()).find_map(|(shard, tensor)| {
        let message = origin::of(&tensor.name, tensor.dtype, missing)?;
        Some(Error::NotPlain { file: shard.file.clone(), tensor: tensor.name.clone(), message })
    })
}

fn claim_all(config: &ModelConfig, checkpoint: &Checkpoint) -> Result<Vec<ParamSpec>, Error> {
    let family = config.family();
    let none = BlockNames { name: family.blocks[0], fused: false };
    let blocks: Vec<BlockNames> = (0..config.layers.len())
        .map(|l| match config.layers[l] {
            LayerKind::Moe => BlockNames::detect(family, checkpoint, l),
            LayerKind::Dense(_) => none,
        })
        .collect();

    check_counts(config, checkpoint, &blocks)?;
    let mut params = Vec::new();
    let mut claimed = HashSet::new();
    let mut missing = Vec::new();
    for kind in ParamKind::all(config) {
        let block = kind.layer().map_or(none, |l| blocks[l]);
        let tensor = tensor_name(kind, family, block);
        let Some((shard, info)) = checkpoint.get(&tensor) else {
            if claimed.insert(tensor.clone()) {
                missing.push(tensor); // once, although every expert needs a fused tensor
            }
            continue;
        };
        let (expected, elements) = tensor_shape(kind, config, block.fused);
        if info.shape != expected {
            let (file, found) = (shard.file.clone(), info.shape.clone());
            return Err(Error::Shape { file, tensor, found, expected });
        }
        let whole = shard.value(info)?;
        let size = whole.dtype.size();
        let byte_range = elements.start * size..elements.end * size;
        let value = HostTensor::new(whole.dtype, kind.shape(config), whole.bytes.slice(byte_range.clone()));
        claimed.insert(tensor.clone());
        params.push(ParamSpec::new(kind, tensor, byte_range, value));
    }
    if let Some(tensor) = missing.first() {
        let dir = checkpoint.dir().display().to_string();
        let listed = checkpoint.absent(tensor).map(str::to_owned);
        return Err(Error::Missing { dir, tensor: tensor.clone(), more: missing.len() - 1, listed });
    }

    let unclaimed = || checkpoint.tensors().filter(|(_, t)| !claimed.contains(&t.name) && !is_extra(&t.name, config));
    if let Some((shard, tensor)) = unclaimed().next() {
        return Err(Error::Unclaimed {
            file: shard.file.clone(),
            tensor: tensor.name.clone(),
            model_type: config.model_type.clone(),
            more: unclaimed().count() - 1,
        });
    }
    check_tied_head(checkpoint, &params)?;
    Ok(params)
}

/// Holds the numbers of layers and experts against the tensors, before lists of that length are made: only for numbers that are
/// far too large, since the other errors say more.
fn check_counts(config: &ModelConfig, checkpoint: &Checkpoint, blocks: &[BlockNames]) -> Result<(), Error> {
    const MANY_EXPERTS: usize = 1 << 14;
    let family = config.family();
    let tensors = checkpoint.tensors().count();
    let routers = (0..config.layers.len()).filter(|&l| config.layers[l] == LayerKind::Moe).map(ParamKind::Router);
    let wanted = if config.layers.len() > tensors {
        (0..config.layers.len()).map(ParamKind::InputNorm).collect()
    } else if config.num_experts * config.layers.len() > MANY_EXPERTS {
        routers.collect()
    } else {
        Vec::new()
    };
    for kind in wanted {
        let tensor = tensor_name(kind, family, blocks[kind.layer().expect("a layer's tensor")]);
        let Some((shard, info)) = checkpoint.get(&tensor) else {
            let listed = checkpoint.absent(&tensor).map(str::to_owned);
            return Err(Error::Missing { dir: checkpoint.dir().display().to_string(), tensor, more: 0, listed });
        };
        let (expected, _) = tensor_shape(kind, config, false);
        if info.shape != expected {
            return Err(Error::Shape { file: shard.file.clone(), tensor, found: info.shape.clone(), expected });
        }
    }
    Ok(())
}

/// Tensors that some checkpoints hold but the model does not read: exported unchanged, otherwise ignored.
fn is_extra(name: &str, config: &ModelConfig) -> bool {
    name.ends_with(".rotary_emb.inv_freq") || (config.tie_word_embeddings && name == LM_HEAD)
}

/// The output head of a model with tied embeddings, if the checkpoint stores this second copy.
pub(crate) fn tied_head<'a>(
    checkpoint: &'a Checkpoint,
    params: &[ParamSpec],
) -> Option<(&'a weights::Shard, &'a super::safetensors::TensorInfo)> {
    let own_head = params.last().is_some_and(|spec| spec.kind == ParamKind::LmHead);
    if own_head { None } else { checkpoint.get(LM_HEAD) }
}

/// transformers loads a copy that differs from the embedding as a separate head, even if config.json sets
/// tie_word_embeddings.
fn check_tied_head(checkpoint: &Checkpoint, params: &[ParamSpec]) -> Result<(), Error> {
    let Some((shard, info)) = tied_head(checkpoint, params) else { return Ok(()) };
    let head = shard.value(info)?;
    let embedding = &params[0].base;
    if head.shape != embedding.shape || head.dtype != embedding.dtype || *head.bytes != *embedding.bytes {
        return Err(Error::TiedHead { file: shard.file.clone() });
    }
    Ok(())
}
