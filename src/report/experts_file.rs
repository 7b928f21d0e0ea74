//! A file of experts: the selection of an earlier run, or a list from elsewhere.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{Error, ScoresFile};
use crate::experts::ExpertId;
use crate::input;

/// The most entries that a file may list. No model has nearly as many experts.
const MAX_EXPERTS: usize = 1 << 20;

/// The experts that a file lists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpertsFile {
    /// Path of the file, for messages.
    pub path: PathBuf,
    /// In the order of the file, without duplicates; at least one.
    pub experts: Vec<ExpertId>,
    /// The MoE layers, and the experts of each, of the model that an `expert_scores.json` is of; lists do not say.
    shape: Option<(Vec<usize>, usize)>,
}

impl ExpertsFile {
    /// Reads one of three formats: `expert_scores.json` of a run, of which the first round's selection is taken; a JSON list
    /// of `[layer, expert]`; or text of `layer.expert`, separated by white space or commas, where `#` starts a comment.
    /// Layers and experts count from 0; dense layers count too.
    ///
    /// # Errors
    /// [`Error::Missing`]; [`Error::Invalid`], which names the entry: one that is not an expert, one that comes twice, or a file
    /// without any.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let invalid = |reason: String| Error::Invalid { path: path.to_owned(), reason };
        let bytes = input::read(path).map_err(|source| {
            let folder = "it is a folder: give a file, such as the expert_scores.json of a run";
            let source = if path.is_dir() { io::Error::new(source.kind(), folder) } else { source };
            Error::Missing { path: path.to_owned(), source }
        })?;
        let text = String::from_utf8(input::without_mark(&bytes).to_vec())
            .map_err(|_| invalid("it is not text in UTF-8".into()))?;
        let (experts, shape) = match text.trim_start().chars().next() {
            Some('{') => {
                let file = scores(path)?;
                let first = file.rounds.into_values().next();
                (first.map_or_else(Vec::new, |round| round.selected), Some((file.layers, file.num_experts)))
            }
            Some('[') => (list(&text).map_err(invalid)?, None),
            _ => (lines(&text).map_err(invalid)?, None),
        };
        let mut seen = BTreeSet::new();
        if let Some(i) = experts.iter().position(|id| !seen.insert(*id)) {
            return Err(invalid(format!("entry {}, {}, comes twice: leave one out", i + 1, name(experts[i]))));
        }
        if experts.is_empty() {
            return Err(invalid("it lists no expert".into()));
        }
        Ok(Self { path: path.to_owned(), experts, shape })
    }

    /// Checks that a model with the routing layers `layers` of `num_experts` experts each has all these experts.
    ///
    /// # Errors
    /// [`Error::Invalid`], which names the first entry that does not exist, or says that the scores are of a model of another
    /// shape.
    pub fn check(&self, layers: &[usize], num_experts: usize) -> Result<(), Error> {
        if let Some((l, e)) = self.shape.as_ref().filter(|(l, e)| (&**l, *e) != (layers, num_experts)) {
            let reason = format!(
                "its scores are of {} MoE layers of {e} experts, but the model has {} of {num_experts}: are they of another model?",
                l.len(),
                layers.len()
            );
            return Err(Error::Invalid { path: self.path.clone(), reason });
        }
        for (i, id) in self.experts.iter().enumerate() {
            let reason = if !layers.contains(&id.layer) {
                let of_model = layers.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
                format!("the model's layers with experts are {of_model}")
            } else if id.expert >= num_experts {
                format!("the model has the experts 0 to {} in each layer", num_experts - 1)
            } else {
                continue;
            };
            let reason = format!("entry {}, {}, does not exist: {reason}", i + 1, name(*id));
            return Err(Error::Invalid { path: self.path.clone(), reason });
        }
        Ok(())
    }
}

fn name(id: ExpertId) -> String {
    format!("expert {} of layer {}", id.expert, id.layer)
}

/// The `expert_scores.json` of a run.
fn scores(path: &Path) -> Result<ScoresFile, Error> {
    ScoresFile::read(path).map_err(|error| match error {
        Error::Invalid { path, reason } => {
            let reason = format!(
                "it is not the expert_scores.json of a run ({reason}); experts may also be a JSON list of [layer, expert], or text \
                 with layer.expert"
            );
            Error::Invalid { path, reason }
        }
        other => other,
    })
}

/// A JSON list of `[layer, expert]`.
fn list(text: &str) -> Result<Vec<ExpertId>, String> {
    let entries: Vec<Value> =
        serde_json::from_str(text).map_err(|e| format!("it is not a JSON list: {}", input::json_problem(&e)))?;
    let parsed = entries.iter().enumerate().map(|(i, entry)| {
        serde_json::from_value::<ExpertId>(entry.clone())
            .map_err(|_| format!("entry {}, {entry}, is not [layer, expert] with two numbers from 0", i + 1))
    });
    parsed.collect()
}

/// `layer.expert`, separated by white space or commas.
fn lines(text: &str) -> Result<Vec<ExpertId>, String> {
    let mut experts = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.split('#').next().unwrap_or_default();
        let separates = |c: char| c == ',' || c.is_whitespace();
        for entry in line.split(separates).filter(|entry| !entry.is_empty()) {
            let both = entry.split_once('.').and_then(|(layer, expert)| Some((index(layer)?, index(expert)?)));
            let Some(both) = both else {
                return Err(format!("line {}: {entry:?} is not layer.expert, such as 3.17", number + 1));
            };
            if experts.len() == MAX_EXPERTS {
                return Err(format!("line {}: it lists more than {MAX_EXPERTS} experts", number + 1));
            }
            experts.push(both.into());
        }
    }
    Ok(experts)
}

/// Digits only: no sign, no spaces.
fn index(text: &str) -> Option<usize> {
    text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::{self, Coded};
    use crate::experts::{Method, Score};
    use crate::report::{RoundScores, write_json};

    fn read(text: &str) -> Result<Vec<(usize, usize)>, Error> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        ExpertsFile::read(file.path()).map(|file| file.experts.into_iter().map(Into::into).collect())
    }

    #[test]
    fn three_formats() {
        assert_eq!(read("[[3, 17], [0, 2]]").unwrap(), [(3, 17), (0, 2)]);
        assert_eq!(read("# found by hand\n3.17\n\n0.2, 1.0 2.5 # three\n").unwrap(), [(3, 17), (0, 2), (1, 0), (2, 5)]);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("expert_scores.json");
        let mut scores = ScoresFile::new(Method::Gradient, Score::L1Mean, vec![0, 3], 20);
        for (round, selected) in [(2, [(0, 1).into()]), (1, [(3, 17).into()]), (10, [(0, 2).into()])] {
            scores.rounds.insert(round, RoundScores::new(None, &selected, 1, vec![]));
        }
        write_json(&path, &scores).unwrap();
        let file = ExpertsFile::read(&path).unwrap();
        assert_eq!(file.experts, [(3, 17).into()], "the first round's selection");
        assert!(file.check(&[0, 3], 20).is_ok());
        let error = file.check(&[0, 1, 2, 3], 64).unwrap_err().to_string();
        assert!(
            error.ends_with("of 2 MoE layers of 20 experts, but the model has 4 of 64: are they of another model?")
        );
    }

    #[test]
    fn errors_name_the_entry() {
        for (text, named) in [
            ("", "lists no expert"),
            ("[]", "lists no expert"),
            ("[[1, 2], [1, -2]]", "entry 2, [1,-2], is not [layer, expert]"),
            ("[[1, 2, 3]]", "entry 1"),
            ("[[1, 2], [0, 0], [1, 2]]", "entry 3, expert 2 of layer 1, comes twice"),
            ("[[1, 2]", "not a JSON list"),
            ("1.2\n1:3", "line 2: \"1:3\" is not layer.expert"),
            ("1.+3", "\"1.+3\""),
            ("1.2,1.2", "comes twice"),
            ("{}", "not the expert_scores.json of a run (not what this file should hold: the field schema is missing"),
            ("{\"layers\": 4}", "not the expert_scores.json of a run"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.to_string().contains(named), "{named} not in: {error}");
            assert_eq!(error.exit_code(), exit::DATA);
        }
        let missing = ExpertsFile::read(Path::new("/nowhere/list")).unwrap_err();
        assert_eq!(missing.exit_code(), exit::NO_INPUT);
        let Err(Error::Missing { source, .. }) = ExpertsFile::read(Path::new("/")) else { panic!("a folder was read") };
        assert!(source.to_string().contains("the expert_scores.json of a run"), "{source}");
    }

    #[test]
    fn a_model_without_these_experts_is_named() {
        let file = |id: (usize, usize)| ExpertsFile {
            path: "list.txt".into(),
            experts: vec![(1, 0).into(), id.into()],
            shape: None,
        };
        let error = |id| file(id).check(&[1, 3], 4).unwrap_err().to_string();
        assert!(file((3, 3)).check(&[1, 3], 4).is_ok());
        assert_eq!(
            error((0, 1)),
            "list.txt: entry 2, expert 1 of layer 0, does not exist: the model's layers with experts are 1, 3"
        );
        assert!(error((3, 4)).ends_with("the model has the experts 0 to 3 in each layer"));
    }
}
