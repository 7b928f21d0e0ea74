//! The experts that `ablate` judges, from a file.

use std::collections::BTreeSet;
use std::path::Path;

use crate::exit::{self, Failure, Result};
use crate::experts::ExpertId;
use crate::model::ModelConfig;
use crate::report::ScoresFile;

/// Reads `expert_scores.json` of an earlier run (its first round, which the original model gave), or a list: JSON
/// `[[layer, expert], ..]`, or `layer.expert` separated by white space or commas.
///
/// # Errors
/// A file that cannot be read or has another form; experts that the model does not have; none.
pub fn read(path: &Path, model: &ModelConfig) -> Result<BTreeSet<ExpertId>> {
    let bad = |what: String| Failure::new(exit::DATA, format!("{}: {what}", path.display()));
    let text = std::fs::read_to_string(path)
        .map_err(|e| Failure::new(exit::NO_INPUT, format!("{}: cannot be read: {e}", path.display())))?;
    let experts: Vec<ExpertId> = match text.trim_start().chars().next() {
        Some('{') => {
            let file = ScoresFile::read(path)?;
            file.rounds.into_iter().next().map_or_else(Vec::new, |(_, round)| round.selected)
        }
        Some('[') => serde_json::from_str(&text)
            .map_err(|e| bad(format!("{e}: give [[layer, expert], ..], layer.expert, or an expert_scores.json")))?,
        _ => text
            .split(|c: char| c.is_whitespace() || c == ',')
            .filter(|word| !word.is_empty())
            .map(|word| dotted(word).ok_or_else(|| bad(format!("{word:?} is not of the form layer.expert"))))
            .collect::<Result<_>>()?,
    };
    let exists = |id: &ExpertId| id.expert < model.num_experts && model.moe_layers().layers.contains(&id.layer);
    if let Some(id) = experts.iter().find(|id| !exists(id)) {
        return Err(bad(format!("the model has no expert {} in layer {}", id.expert, id.layer)));
    }
    if experts.is_empty() {
        return Err(bad("it holds no expert".into()));
    }
    let distinct: BTreeSet<_> = experts.iter().copied().collect();
    if distinct.len() < experts.len() {
        return Err(bad("an expert is listed twice".into()));
    }
    Ok(distinct)
}

fn dotted(word: &str) -> Option<ExpertId> {
    let (layer, expert) = word.split_once('.')?;
    Some((layer.parse().ok()?, expert.parse().ok()?).into())
}
