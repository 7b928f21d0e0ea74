//! Random weights for the shape that a config.json describes: to try its size and speed without a checkpoint.
//!
//! As Hugging Face begins a training: norms are ones, biases zeros, all else has the standard deviation
//! `initializer_range`. A value depends on the seed, the parameter and the place in it alone, and is made on the device
//! that uses it: every rank makes the same, and the host holds none.

use std::path::Path;

use super::claim::{BlockNames, tensor_name};
use super::config::{Error, ModelConfig, RawConfig};
use super::ids::{Group, ParamId, ParamKind, ParamSpec};
use crate::backend::{Backend, Dtype, HostTensor, random_bits};

/// What transformers takes where config.json gives no `initializer_range`.
const DEFAULT_STD: f64 = 0.02;

/// Finite in every number format, and far beyond what a model has.
const LARGEST_STD: f64 = 1000.0;

/// Number formats as config.json names them.
pub(super) const DTYPE_NAMES: [(&str, Dtype); 3] =
    [("bfloat16", Dtype::Bf16), ("float16", Dtype::F16), ("float32", Dtype::F32)];

/// How weights are made of nothing.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RandomInit {
    /// Decides all of them.
    pub seed: u64,
    /// Standard deviation of the matrices.
    pub std: f32,
    /// Number format of all parameters.
    pub dtype: Dtype,
}

impl RandomInit {
    /// By `initializer_range` and `dtype` (older: `torch_dtype`) of the config.json in this folder; 0.02 and bf16 where it
    /// has none.
    ///
    /// # Errors
    /// A file that cannot be read, a value that is wrong or a number format that is not supported; each names the key.
    pub fn from_dir(dir: &Path, seed: u64) -> Result<Self, Error> {
        let raw = RawConfig::read(&dir.join("config.json"))?;
        let std = raw.number_above("initializer_range", 0.0)?.unwrap_or(DEFAULT_STD);
        if std > LARGEST_STD {
            return Err(raw.invalid("initializer_range", format!("{std} must be at most {LARGEST_STD}")));
        }
        let key = if raw.get("dtype").is_some() { "dtype" } else { "torch_dtype" };
        let name = raw.string(key)?.unwrap_or("bfloat16");
        match DTYPE_NAMES.iter().find(|(known, _)| name.trim_start_matches("torch.") == *known) {
            Some(&(_, dtype)) => Ok(Self { seed, std: std as f32, dtype }),
            None => {
                Err(raw.unsupported(key, format!("`{name}` is none of {}", DTYPE_NAMES.map(|(n, _)| n).join(", "))))
            }
        }
    }

    /// Every parameter of such a model, as a checkpoint with a tensor for each expert would name it.
    pub(super) fn params(&self, config: &ModelConfig) -> Vec<ParamSpec> {
        let family = config.family();
        let block = BlockNames { name: family.blocks[0], fused: false };
        let spec = |kind: ParamKind| {
            let value = HostTensor::absent(self.dtype, kind.shape(config));
            ParamSpec::new(kind, tensor_name(kind, family, block), 0..value.bytes.len(), value)
        };
        ParamKind::all(config).into_iter().map(spec).collect()
    }

    /// One of them, on a backend.
    pub(super) fn weight<B: Backend>(&self, backend: &B, id: ParamId, spec: &ParamSpec) -> B::Weight {
        use ParamKind::{KBias, OBias, QBias, VBias};
        let shape = spec.shape().to_vec();
        let all = |x: f32| {
            let values = vec![x; spec.len()];
            backend.weight(HostTensor::encode(self.dtype, shape.clone(), &values))
        };
        match spec.kind {
            kind if kind.group() == Group::Norm => all(1.0),
            QBias(_) | KBias(_) | VBias(_) | OBias(_) => all(0.0),
            _ => backend.random_weight(self.dtype, shape, random_bits(self.seed, id as u64), self.std),
        }
    }
}
