//! The planted model of the quickstart: a small OLMoE model whose unsafe experts are known, because they were put there.
//! `tests/planted/` makes it and documents its language, in which harmless invented words stand for forbidden topics.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::exit::Result;
use crate::experts::ExpertId;
use crate::files;
use crate::launch::{Existing, prepare_dir};

/// Files of the model folder.
const MODEL: [(&str, &[u8]); 5] = [
    ("config.json", include_bytes!("../../../assets/planted/model/config.json")),
    ("generation_config.json", include_bytes!("../../../assets/planted/model/generation_config.json")),
    ("model.safetensors", include_bytes!("../../../assets/planted/model/model.safetensors")),
    ("tokenizer.json", include_bytes!("../../../assets/planted/model/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("../../../assets/planted/model/tokenizer_config.json")),
];

const TRAIN: &[u8] = include_bytes!("../../../assets/planted/train.jsonl");
const HELD_OUT: &[u8] = include_bytes!("../../../assets/planted/held-out.jsonl");
const BENIGN: &[u8] = include_bytes!("../../../assets/planted/benign.jsonl");
const TRUTH: &[u8] = include_bytes!("../../../assets/planted/truth.json");

/// Where the files of the planted model lie.
#[derive(Debug, Clone)]
pub struct Planted {
    /// The model folder.
    pub model: PathBuf,
    /// Rows to train on: disguised requests, the same requests asked plainly, the refusal.
    pub train: PathBuf,
    /// The same kind of rows about requests that no training row disguises.
    pub held_out: PathBuf,
    /// Harmless requests with their answers, none of them in the training of the model.
    pub benign: PathBuf,
    /// The planted experts, in order.
    pub experts: Vec<ExpertId>,
}

/// The part of truth.json that the quickstart reads.
#[derive(Deserialize)]
struct Truth {
    unsafe_experts: Vec<ExpertId>,
}

impl Planted {
    /// Writes all files to `dir`.
    ///
    /// # Errors
    /// A failed write.
    pub fn unpack(dir: &Path) -> Result<Self> {
        let model = dir.join("model");
        for folder in [model.clone(), dir.join("rows")] {
            prepare_dir(&folder, Existing::Keep)?;
        }
        for (name, bytes) in MODEL {
            files::write(model.join(name), bytes)?;
        }
        let rows = |name: &str, bytes: &[u8]| -> Result<PathBuf> {
            let path = dir.join("rows").join(name);
            files::write(&path, bytes)?;
            Ok(path)
        };
        files::write(dir.join("truth.json"), TRUTH)?;
        let Truth { unsafe_experts } = serde_json::from_slice(TRUTH).expect("truth.json of the binary is valid");
        Ok(Self {
            model,
            train: rows("train.jsonl", TRAIN)?,
            held_out: rows("held-out.jsonl", HELD_OUT)?,
            benign: rows("benign.jsonl", BENIGN)?,
            experts: unsafe_experts,
        })
    }

    /// How many of these experts are planted ones.
    pub fn found(&self, selected: &[ExpertId]) -> usize {
        selected.iter().filter(|id| self.experts.contains(id)).count()
    }
}
