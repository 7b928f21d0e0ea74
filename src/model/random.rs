//! Random weights for the model that a config.json describes: to measure memory and speed without a checkpoint.
//!
//! The initialisation follows Hugging Face transformers: norms are ones, biases zeros, all other parameters have the standard
//! deviation `initializer_range`. A value depends only on the seed, the parameter and the index of the element, and is
//! generated on the device that uses it: every rank generates the same weights, and the host holds no copy.

use std::path::Path;

use super::claim::{BlockNames, tensor_name};
use super::config::{Error, ModelConfig, RawConfig};
use super::ids::{Group, ParamId, ParamKind, ParamSpec};
use crate::backend::{Backend, Dtype, HostTensor, random_bits};

/// Default of `initializer_range` in transformers.
const DEFAULT_STD: f64 = 0.02;

/// Weights stay finite in every number format, and far above real values.
const LARGEST_STD: f64 = 1000.0;

/// Names of number formats in config.json.
pub(super) const DTYPE_NAMES: [(&str, Dtype); 3] =
    [("bfloat16", Dtype::Bf16), ("float16", Dtype::F16), ("float32", Dtype::F32)];

/// How random weights are generated.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RandomInit {
    /// Seed of all weights.
    pub seed: u64,
    /// Standard deviation of the matrices.
    pub std: f32,
    /// Number format of all parameters.
    pub dtype: Dtype,
}

impl RandomInit {
    /// Reads `initializer_range` and `dtype` (older: `torch_dtype`) of the config.json in this folder; the defaults are 0.02
    /// and bf16.
    ///
    /// # Errors
    /// A file that cannot be read, an invalid value, or an unsupported number format. Each error names the key.
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
                Err(raw.unsupported(key, format!("`{name}` is not one of {}", DTYPE_NAMES.map(|(n, _)| n).join(", "))))
            }
        }
    }

    /// Every parameter of the model, with the tensor names of a checkpoint with one tensor per expert and matrix.
    pub(super) fn params(&self, config: &ModelConfig) -> Vec<ParamSpec> {
        let family = config.family();
        let block = BlockNames { name: family.blocks[0], fused: false };
        let spec = |kind: ParamKind| {
            let value = HostTensor::absent(self.dtype, kind.shape(config));
            ParamSpec::new(kind, tensor_name(kind, family, block), 0..value.bytes.len(), value)
        };
        ParamKind::all(config).into_iter().map(spec).collect()
    }

    /// Generates one parameter on a backend.
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
