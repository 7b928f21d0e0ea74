//! What the files of a model say of generation, as `generate` of transformers 5.17 takes it.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::Error;
use crate::quote::quote;

/// Fields that change even the most probable answer, each with the values that change nothing. Not computed here.
const UNSUPPORTED: [(&str, &[&str]); 20] = [
    ("bad_words_ids", &["[]"]),
    ("begin_suppress_tokens", &["[]"]),
    ("constraints", &["[]"]),
    ("dola_layers", &[]),
    ("encoder_no_repeat_ngram_size", &["0"]),
    ("encoder_repetition_penalty", &["1", "1.0"]),
    ("exponential_decay_length_penalty", &[]),
    ("force_words_ids", &["[]"]),
    ("forced_bos_token_id", &[]),
    ("forced_eos_token_id", &[]),
    ("guidance_scale", &["1", "1.0"]),
    ("min_length", &["0"]),
    ("min_new_tokens", &["0"]),
    ("num_beams", &["1"]),
    ("penalty_alpha", &["0", "0.0"]),
    ("sequence_bias", &["{}", "[]"]),
    ("stop_strings", &["[]"]),
    ("suppress_tokens", &["[]"]),
    ("token_healing", &["false"]),
    ("watermarking_config", &[]),
];

/// How tokens that are in a sequence change the logits of the next one.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Penalties {
    /// The logit of each such token is divided by this if positive, and multiplied if negative (Keskar et al., arXiv 1909.05858).
    #[serde(skip_serializing_if = "is_one")]
    pub repetition_penalty: f64,
    /// No sequence of so many tokens occurs twice; 0: it may.
    #[serde(skip_serializing_if = "is_zero")]
    pub no_repeat_ngram_size: usize,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_one(value: &f64) -> bool {
    *value == 1.0
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_zero(value: &usize) -> bool {
    *value == 0
}

impl Default for Penalties {
    fn default() -> Self {
        Self { repetition_penalty: 1.0, no_repeat_ngram_size: 0 }
    }
}

impl Penalties {
    /// Whether no logit changes.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// What tells answers with different penalties apart; empty without any.
    pub fn key(&self) -> String {
        if self.is_none() { String::new() } else { format!("{self:?}") }
    }
}

/// `generation_config.json`, or `config.json`, whose fields count where there is no such file.
pub(super) struct GenerationFile {
    path: PathBuf,
    fields: Map<String, Value>,
    /// Whether it is `config.json`.
    is_model: bool,
}

impl GenerationFile {
    /// `generation`: the content of `generation_config.json`, if there is one; `model`: that of `config.json`.
    pub(super) fn new(dir: &Path, generation: Option<Map<String, Value>>, model: Map<String, Value>) -> Self {
        match generation {
            Some(fields) => Self { path: dir.join("generation_config.json"), fields, is_model: false },
            None => Self { path: dir.join("config.json"), fields: model, is_model: true },
        }
    }

    /// Ids that end a generation: `eos_token_id`, or where `config.json` counts and does not have it, the default of its family.
    ///
    /// # Errors
    /// An `eos_token_id` that is no id and no list of ids.
    pub(super) fn eos(&self) -> Result<Vec<u32>, Error> {
        /// Families whose configuration in transformers 5.17 has a default.
        const DEFAULTS: [(&str, u32); 4] = [("mixtral", 2), ("olmoe", 50279), ("llama", 2), ("mistral", 2)];
        if self.is_model && !self.fields.contains_key("eos_token_id") {
            let family = self.fields.get("model_type").and_then(Value::as_str);
            return Ok(DEFAULTS.iter().filter(|(name, _)| Some(*name) == family).map(|(_, id)| *id).collect());
        }
        ids(&self.path, self.fields.get("eos_token_id"))
    }

    /// The penalties of this file.
    ///
    /// # Errors
    /// A value that is none; a field that changes answers otherwise.
    pub(super) fn penalties(&self) -> Result<Penalties, Error> {
        let given = |name: &str| self.fields.get(name).filter(|value| !value.is_null());
        for (name, without_effect) in UNSUPPORTED {
            if let Some(value) = given(name).map(Value::to_string).filter(|v| !without_effect.contains(&&**v)) {
                let message = format!(
                    "{name} is {}, by which transformers changes the answers, which moewarden does not support: remove the field, if \
                     answers without it are what you want",
                    quote(&value)
                );
                return Err(Error::file(&self.path, message));
            }
        }
        let wrong = |name: &str, value: &Value, what: &str| {
            Error::file(&self.path, format!("{name} is {}, but should be {what}", quote(&value.to_string())))
        };
        let mut penalties = Penalties::default();
        const PENALTY: &str = "repetition_penalty";
        if let Some(value) = given(PENALTY) {
            let positive = value.as_f64().filter(|penalty| *penalty as f32 > 0.0 && (*penalty as f32).is_finite());
            penalties.repetition_penalty = positive.ok_or_else(|| wrong(PENALTY, value, "a number above 0"))?;
        }
        const NGRAM: &str = "no_repeat_ngram_size";
        if let Some(value) = given(NGRAM) {
            let size = value.as_u64().and_then(|size| usize::try_from(size).ok());
            penalties.no_repeat_ngram_size = size.ok_or_else(|| wrong(NGRAM, value, "a whole number"))?;
        }
        Ok(penalties)
    }
}

/// One id or a list of ids.
fn ids(path: &Path, value: Option<&Value>) -> Result<Vec<u32>, Error> {
    let one = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
    let found = match value {
        None | Some(Value::Null) => return Ok(vec![]),
        Some(Value::Array(list)) => list.iter().map(one).collect::<Option<Vec<_>>>().filter(|ids| !ids.is_empty()),
        Some(value) => one(value).map(|id| vec![id]),
    };
    found.ok_or_else(|| {
        let value = value.unwrap_or(&Value::Null).to_string();
        Error::file(path, format!("eos_token_id is {}, but should be a token id or a list of ids", quote(&value)))
    })
}
