//! What the results of an evaluation depend on: kept beside them, so that `--resume` continues no other evaluation.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::config::EvalArgs;
use crate::data::Penalties;
use crate::exit::{self, Failure, Result};
use crate::input;
use crate::report::{EvaluatedModel, read_json, write_json};
use crate::run::session::{Session, tokens_hash};

/// Name of the file.
pub const FILE: &str = "eval_options.json";
const SCHEMA: &str = "moewarden.eval_options/1";

/// What of the machine decides the results.
pub struct Machine {
    /// The kind of device.
    pub device: &'static str,
    /// The number format of matrix products.
    pub number_format: String,
}

/// The options and inputs that decide the results of an evaluation: those that do not, such as the number of ranks, are left out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DecidingOptions {
    schema: String,
    /// By the name that messages use: an option, or `model weights`.
    values: BTreeMap<String, Value>,
}

impl DecidingOptions {
    /// Those of an evaluation of `model` on the rows of the session. `questions`: a hash of the questions. `drift_from`: the hash of
    /// the weights of the model of `--drift-from`. `penalties`: of the answers.
    ///
    /// # Errors
    /// A config.json that cannot be read.
    pub fn of(
        args: &EvalArgs,
        session: &Session,
        model: &EvaluatedModel,
        questions: Option<blake3::Hash>,
        drift_from: Option<&str>,
        machine: &Machine,
        penalties: Penalties,
    ) -> Result<Self> {
        let kwargs = args.chat_template_kwargs.as_ref().map(|kwargs| json!(kwargs.0));
        let values = [
            ("version of moewarden", json!(env!("CARGO_PKG_VERSION"))),
            ("model weights", json!(model.sha)),
            ("config.json", json!(config_hash(&session.dir)?.to_string())),
            ("other routing", json!(model.other_routing.as_ref().map(|other| (other.from, &other.sha)))),
            ("--drift-from", json!(drift_from)),
            ("rows and their tokens", json!(tokens_hash(&session.data.records, true).to_string())),
            ("chat template", json!(session.tokenizer.template_digest().to_string())),
            ("end-of-sequence tokens", json!(session.tokenizer.eos_ids())),
            ("--chat-template-kwargs", json!(kwargs)),
            ("--max-samples", json!(args.max_samples)),
            ("--max-length", json!(args.max_length)),
            ("--long-rows", json!(args.long_rows)),
            ("--keep-failed", json!(args.keep_failed)),
            ("--safe-response", json!(args.safe_response())),
            ("--batch-size", json!(args.batch_size)),
            ("--skip-answers", json!(args.skip_answers)),
            ("--max-new-tokens", json!(args.max_new_tokens)),
            ("--temperature", json!(args.temperature)),
            ("--top-p", json!(args.top_p)),
            ("--seed", json!(args.seed)),
            ("--questions", json!(questions.map(|hash| hash.to_string()))),
            ("--answer-pattern", json!(args.answer_pattern)),
            // Not the option itself: what `auto` is depends on the processor.
            ("--precision", json!(machine.number_format)),
            ("device", json!(machine.device)),
        ];
        let penalties = (!penalties.is_none()).then(|| ("penalties of generation_config.json", json!(penalties)));
        let values = values.into_iter().chain(penalties).map(|(name, value)| (name.to_owned(), value)).collect();
        Ok(Self { schema: SCHEMA.into(), values })
    }

    /// Their bytes, for the check that all ranks have the same.
    pub fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("values have string keys")
    }

    /// Refuses the folder of an evaluation with other options, of which it names the first.
    ///
    /// # Errors
    /// What differs; a file that cannot be read.
    pub fn check(&self, dir: &Path) -> Result<()> {
        let path = dir.join(FILE);
        let refused = |what: String| {
            let message = format!("{}: {what}: give the same, another --output-dir, or --overwrite", path.display());
            Failure::new(exit::CONFIG, message)
        };
        if !path.exists() {
            let begun = ["generations.jsonl", "eval.json"].iter().find(|name| dir.join(name).exists());
            return match begun {
                None => Ok(()),
                Some(name) => Err(refused(format!(
                    "is missing, so --resume cannot tell what {name} in its folder is an evaluation of"
                ))),
            };
        }
        let theirs: Self = read_json(&path)?;
        if theirs.schema != SCHEMA {
            return Err(refused(format!("has the schema {:?}, not {SCHEMA:?}", theirs.schema)));
        }
        let names: BTreeSet<&String> = self.values.keys().chain(theirs.values.keys()).collect();
        let differs = |name: &&String| self.values.get(*name) != theirs.values.get(*name);
        // An option says most; then the weights, which other inputs go with.
        let weights = names.iter().copied().filter(|name| *name == "model weights");
        let options = names.iter().copied().filter(|name| name.starts_with("--"));
        let Some(name) = options.chain(weights).chain(names.iter().copied()).find(differs) else { return Ok(()) };
        let text = |of: &Self| of.values.get(name).map_or_else(|| "nothing".to_owned(), Value::to_string);
        let (was, now) = (text(&theirs), text(self));
        Err(refused(format!("the evaluation to continue is of other inputs or options, {name}: {was}, not {now}")))
    }

    /// Writes them into the folder.
    ///
    /// # Errors
    /// A failed write.
    pub fn write(&self, dir: &Path) -> Result<()> {
        Ok(write_json(dir.join(FILE), self)?)
    }
}

/// The hash of the config.json of a model folder.
pub fn config_hash(dir: &Path) -> Result<blake3::Hash> {
    let path = dir.join("config.json");
    input::hash(&path).map_err(|e| Failure::new(exit::NO_INPUT, format!("{}: cannot be read: {e}", path.display())))
}
