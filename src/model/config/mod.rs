//! A model's configuration, read from `config.json` into one form for all families.

mod error;
mod families;
mod layers;
mod raw;
mod rope;

use std::path::Path;

pub use self::error::Error;
pub(crate) use self::error::known;
pub(crate) use self::families::Rule;
use self::families::WindowRule;
pub use self::families::{ExpertLayers, FAMILIES, Family, QkNorm};
pub use self::layers::{LayerKind, MoeLayers};
pub(super) use self::raw::RawConfig;
use crate::backend::{Heads, Rope};

/// A model's sizes and the properties of its family.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// `model_type` of config.json.
    pub model_type: String,
    /// V
    pub vocab_size: usize,
    /// D
    pub hidden_size: usize,
    /// One entry for each decoder layer.
    pub layers: Vec<LayerKind>,
    /// [`MoeLayers::of`] `layers`.
    pub(crate) moe_layers: MoeLayers,
    /// One entry for each decoder layer; only the window may differ.
    pub heads: Vec<Heads>,
    /// E; 1 in a dense model, none of whose layers has experts.
    pub num_experts: usize,
    /// K; 1 in a dense model.
    pub num_experts_per_tok: usize,
    /// F; 1 in a dense model.
    pub expert_width: usize,
    /// Whether the K routing weights of a token are divided by their sum.
    pub renormalize: bool,
    /// Width of the shared expert, which processes every token.
    pub shared_expert_width: Option<usize>,
    /// Norms of queries and keys.
    pub qk_norm: QkNorm,
    /// Limit c: queries, keys and values are clamped to [-c, c].
    pub clip_qkv: Option<f32>,
    /// Whether the q, k and v projections have biases.
    pub qkv_bias: bool,
    /// Whether the output projection of attention has a bias.
    pub o_bias: bool,
    /// Whether the output head is the embedding.
    pub tie_word_embeddings: bool,
    /// Epsilon of all RMS norms, added to the mean square.
    pub rms_norm_eps: f32,
    /// Rotary embedding.
    pub rope: Rope,
    /// The longest sequence, in tokens, for which `rope` is valid: types `dynamic` and `longrope` change their frequencies
    /// above it. `None`: no limit.
    pub rope_limit: Option<usize>,
}

impl ModelConfig {
    /// Reads and validates the config.json of the model in this folder.
    ///
    /// # Errors
    /// A file that is missing or not a JSON object, an unsupported family or feature, an invalid value, or values that
    /// contradict each other. Each error names the file and the key.
    pub fn from_dir(dir: &Path) -> Result<Self, Error> {
        let path = dir.join("config.json");
        Self::of_raw(&RawConfig::read(&path)?, &path)
    }

    /// [`Self::from_dir`] of the text of a config.json, which the file `path` holds.
    ///
    /// # Errors
    /// As [`Self::from_dir`].
    pub fn from_text(path: &Path, text: &str) -> Result<Self, Error> {
        Self::of_raw(&RawConfig::of_text(path, text.as_bytes())?, path)
    }

    fn of_raw(raw: &RawConfig, path: &Path) -> Result<Self, Error> {
        let model_type = raw.string("model_type")?.unwrap_or("(none)");
        let Some(family) = Family::find(model_type) else {
            return Err(Error::ModelType { path: path.into(), found: model_type.into() });
        };
        read(raw, family)
    }

    /// The family's row in [`FAMILIES`].
    pub fn family(&self) -> &'static Family {
        Family::find(&self.model_type).expect("a configuration is only made for a known family")
    }

    /// The MoE layers.
    pub fn moe_layers(&self) -> &MoeLayers {
        &self.moe_layers
    }

    /// Whether no layer has experts.
    pub fn is_dense(&self) -> bool {
        self.moe_layers.layers.is_empty()
    }

    /// Checks that [`Self::rope`] is valid for sequences of `length` tokens.
    ///
    /// # Errors
    /// A length beyond [`Self::rope_limit`].
    pub fn check_length(&self, length: usize) -> Result<(), Error> {
        match self.rope_limit {
            Some(limit) if length > limit => Err(Error::TooLong { length, limit }),
            _ => Ok(()),
        }
    }
}

/// Most experts of all layers together.
const MAX_EXPERTS: usize = 1 << 20;

/// Widest head of attention.
const MAX_HEAD: usize = 1 << 16;

fn read(raw: &RawConfig, family: &Family) -> Result<ModelConfig, Error> {
    let defaults = &family.defaults;
    refuse_unsupported(raw, family)?;
    let size = |key, default| raw.size_or(key, default);
    let rule = |rule| match rule {
        Rule::Fixed(value) => Ok(value),
        Rule::Key(key, default) => raw.flag(key, default),
    };

    let vocab_size = size("vocab_size", defaults.vocab_size)?;
    let hidden_size = size("hidden_size", defaults.hidden_size)?;
    let num_layers = size("num_hidden_layers", defaults.layers)?;
    if num_layers > 100_000 {
        return Err(raw.invalid("num_hidden_layers", format!("{num_layers} layers are more than the supported 100000")));
    }
    // What a dense model's config.json says of experts is not read.
    let of_experts = |key, default| if family.is_dense() { Ok(default) } else { size(key, default) };
    let expert_width = of_experts(family.expert_width_key, defaults.expert_width)?;
    let shared_expert_width = family.shared_expert.map(|(key, default)| size(key, default)).transpose()?;

    // transformers reads both names in every family; which one it writes depends on its version.
    let experts_key = if raw.get("num_local_experts").is_some() { "num_local_experts" } else { "num_experts" };
    let num_experts = of_experts(experts_key, defaults.experts)?;
    let top_k = of_experts("num_experts_per_tok", defaults.top_k)?;
    if top_k > num_experts {
        return Err(raw.invalid("num_experts_per_tok", format!("{top_k} of only {num_experts} experts")));
    }

    let heads = heads(raw, family, hidden_size)?;
    let moe = moe_flags(raw, family, num_layers)?;
    let dense_width = match family.expert_layers {
        ExpertLayers::All => 0,
        ExpertLayers::ByKeys | ExpertLayers::None => size("intermediate_size", defaults.dense_width)?,
    };
    let kind = |moe: bool| if moe { LayerKind::Moe } else { LayerKind::Dense(dense_width) };
    let layers: Vec<_> = moe.into_iter().map(kind).collect();
    let largest = [
        ("vocab_size", [vocab_size, hidden_size, 1]),
        (family.expert_width_key, [num_experts, 2 * expert_width, hidden_size]),
        ("num_attention_heads", [heads.queries, heads.dim, hidden_size]),
        ("intermediate_size", [dense_width, hidden_size, 1]),
    ];
    for (key, shape) in largest {
        // Bytes in f32, the format of gradients.
        let bytes = shape.iter().try_fold(4usize, |n, &d| n.checked_mul(d));
        if bytes.is_none_or(|n| n > isize::MAX as usize) {
            return Err(raw.invalid(key, format!("a tensor of shape {shape:?} is too large for this machine")));
        }
    }

    // Far above any real model; a false number must not decide how much is allocated before the weights are looked at.
    if num_experts * num_layers > MAX_EXPERTS {
        let message = format!(
            "{num_experts} experts in {num_layers} layers are more than the supported {MAX_EXPERTS} in the whole model"
        );
        return Err(raw.invalid(experts_key, message));
    }
    if heads.dim > MAX_HEAD {
        return Err(raw.invalid("head_dim", format!("{} is more than the supported {MAX_HEAD}", heads.dim)));
    }

    let positions = size("max_position_embeddings", defaults.positions)?;
    let (rope, rope_limit) = rope::read(raw, defaults.theta, heads.dim, positions)?;
    Ok(ModelConfig {
        model_type: family.model_type.into(),
        vocab_size,
        hidden_size,
        heads: windows(raw, family, num_layers)?.into_iter().map(|window| Heads { window, ..heads }).collect(),
        moe_layers: MoeLayers::of(&layers),
        layers,
        num_experts,
        num_experts_per_tok: top_k,
        expert_width,
        renormalize: rule(family.renormalize)?,
        shared_expert_width,
        qk_norm: family.qk_norm,
        clip_qkv: if family.clip_qkv { raw.number_above("clip_qkv", 0.0)?.map(|x| x as f32) } else { None },
        qkv_bias: rule(family.qkv_bias)?,
        o_bias: rule(family.o_bias)?,
        tie_word_embeddings: raw.flag("tie_word_embeddings", false)?,
        rms_norm_eps: raw.number_above("rms_norm_eps", 0.0)?.unwrap_or(defaults.eps) as f32,
        rope,
        rope_limit,
    })
}

/// Refuses values of keys that would change the computation in a way that is not implemented.
fn refuse_unsupported(raw: &RawConfig, family: &Family) -> Result<(), Error> {
    if let Some(act) = raw.string("hidden_act")?.filter(|act| !matches!(*act, "silu" | "swish")) {
        return Err(raw.unsupported("hidden_act", format!("`{act}` is not supported; these families use `silu`")));
    }
    if family.window == WindowRule::Never && raw.get("sliding_window").is_some() {
        return Err(raw.unsupported(
            "sliding_window",
            format!("models of the family {} have no attention window", family.model_type),
        ));
    }
    if !raw.flag("is_causal", true)? {
        return Err(raw.unsupported("is_causal", "attention to later tokens is not supported"));
    }
    if family.is_dense() && raw.flag("mlp_bias", false)? {
        return Err(raw.unsupported("mlp_bias", "biases of feed-forward layers are not supported"));
    }
    Ok(())
}

/// Heads of attention, without the window.
fn heads(raw: &RawConfig, family: &Family, hidden_size: usize) -> Result<Heads, Error> {
    let queries = raw.size_or("num_attention_heads", family.defaults.heads)?;
    let default = if raw.is_null("num_key_value_heads") { None } else { family.defaults.kv_heads };
    let keys = raw.size("num_key_value_heads")?.or(default).unwrap_or(queries);
    if !queries.is_multiple_of(keys) {
        return Err(raw.invalid("num_key_value_heads", format!("{queries} query heads are not divisible by {keys}")));
    }
    let dim = match raw.size("head_dim")?.or(family.defaults.head_dim) {
        Some(dim) => dim,
        None if hidden_size.is_multiple_of(queries) => hidden_size / queries,
        None => {
            let message =
                format!("hidden_size {hidden_size} is not divisible by {queries} heads, and no head_dim is given");
            return Err(raw.invalid("num_attention_heads", message));
        }
    };
    if !dim.is_multiple_of(2) {
        return Err(raw.invalid("head_dim", format!("{dim} is odd, but the rotary embedding rotates pairs")));
    }
    if family.qk_norm == QkNorm::WholeWidth && dim.checked_mul(queries) != Some(hidden_size) {
        // The norm of the queries has the width of the hidden state.
        let message = format!("{queries} heads of {dim} must have the width hidden_size {hidden_size} in this family");
        return Err(raw.invalid("head_dim", message));
    }
    Ok(Heads { queries, keys, dim, window: None })
}

/// For each decoder layer whether it has routed experts.
fn moe_flags(raw: &RawConfig, family: &Family, num_layers: usize) -> Result<Vec<bool>, Error> {
    let mut moe = vec![!family.is_dense(); num_layers];
    if family.expert_layers == ExpertLayers::ByKeys {
        let step = raw.size("decoder_sparse_step")?.unwrap_or(1);
        moe.iter_mut().enumerate().for_each(|(l, moe)| *moe = (l + 1).is_multiple_of(step));
        for value in raw.list("mlp_only_layers")?.into_iter().flatten() {
            let layer = value.as_u64().and_then(|l| moe.get_mut(l as usize));
            *layer.ok_or_else(|| {
                raw.invalid("mlp_only_layers", format!("{value} is not one of the {num_layers} layers"))
            })? = false;
        }
        if !moe.contains(&true) {
            return Err(
                raw.invalid("mlp_only_layers", "together with decoder_sparse_step it leaves no layer with experts")
            );
        }
    }
    Ok(moe)
}

/// Each layer's window. A window W in transformers lets query q attend to keys q − W < k ≤ q: W positions, as in [`Heads`].
fn windows(raw: &RawConfig, family: &Family, num_layers: usize) -> Result<Vec<Option<usize>>, Error> {
    let used = match family.window {
        WindowRule::Never => false,
        WindowRule::IfSet(default) => {
            raw.get("sliding_window").is_some() || default.is_some() && !raw.is_null("sliding_window")
        }
        WindowRule::IfUsed | WindowRule::ByLayer | WindowRule::FromLayer => raw.flag("use_sliding_window", false)?,
    };
    // An unused `sliding_window` may have any value: Qwen2-MoE is saved with 0.
    let window = if used { Some(raw.size("sliding_window")?.unwrap_or(4096)) } else { None };
    if !matches!(family.window, WindowRule::ByLayer | WindowRule::FromLayer) {
        return Ok(vec![window; num_layers]);
    }
    let Some(types) = raw.list("layer_types")? else {
        let border = max_window_layers(raw)?;
        let in_window = |l: usize| match family.window {
            WindowRule::FromLayer => l >= border,
            _ => l.is_multiple_of(2) && l < border,
        };
        return Ok((0..num_layers).map(|l| window.filter(|_| in_window(l))).collect());
    };
    if types.len() != num_layers {
        return Err(raw.invalid("layer_types", format!("{} entries for {num_layers} layers", types.len())));
    }
    let of_type = |value: &serde_json::Value| match value.as_str() {
        Some("full_attention") => Ok(None),
        Some("sliding_attention") if window.is_some() => Ok(window),
        Some("sliding_attention") => {
            Err(raw.invalid("layer_types", "an entry is sliding_attention, but use_sliding_window is false"))
        }
        _ => Err(raw.unsupported("layer_types", format!("{value} is not supported"))),
    };
    types.iter().map(of_type).collect()
}

/// `max_window_layers`, which may be 0.
fn max_window_layers(raw: &RawConfig) -> Result<usize, Error> {
    match raw.number("max_window_layers")? {
        Some(0.0) => Ok(0),
        _ => Ok(raw.size("max_window_layers")?.unwrap_or(28)),
    }
}

#[cfg(test)]
mod tests;
