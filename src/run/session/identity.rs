//! What makes two sets of inputs the same: hashes of weights and files, for checkpoints and between ranks.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use super::Session;
use crate::collective::{self, Collective, all_agree};
use crate::config::RunConfig;
use crate::data::{Dataset, Example, Record, additional_templates};
use crate::exit::{self, Failure, Result};
use crate::input::{self, Format, RowsError};

impl Session {
    /// blake3 over the base model's parameters, its configuration, tokenizer and templates, and the tokens of all rows: in
    /// whichever format a file holds them.
    ///
    /// # Errors
    /// A failed read.
    pub fn fingerprint(&self, config: &RunConfig) -> Result<blake3::Hash> {
        once(&self.fingerprint, || {
            let mut hasher = self.table.hashed().clone();
            let files = self.model_files()?.into_iter().chain(other_files(config));
            hasher.update(self.hash_files(files)?.as_bytes());
            let retained = self.retain.as_ref().map(|(_, data)| data);
            for data in [Some(&self.data), self.held_out.as_ref(), retained] {
                hasher.update(&[u8::from(data.is_some())]);
                hasher.update(tokens_hash(data.map_or(&[], |data| &data.records), false).as_bytes());
            }
            Ok(hasher.finalize())
        })
    }

    /// A hash of each of the inputs of [`Self::fingerprint`], by names for messages.
    ///
    /// # Errors
    /// A failed read.
    pub fn named_inputs(&self, config: &RunConfig) -> Result<BTreeMap<String, String>> {
        if let Some(named) = self.named_inputs.get() {
            return Ok(named.clone());
        }
        let mut named = BTreeMap::from([("the weights of the model".to_owned(), self.table.hashed().finalize())]);
        for path in self.model_files()? {
            let name = path.strip_prefix(&self.dir).unwrap_or(&path).display();
            named.insert(format!("{name} of the model"), hash_data(&path)?);
        }
        let [template, replies] = [config.chat_template.as_deref(), config.routing_replies.path()];
        for (option, path) in [("--chat-template", template), ("--routing-replies", replies)] {
            let Some(path) = path else { continue };
            named.insert(format!("the file of {option}"), hash_data(path)?);
        }
        if let Some(experts) = &self.given {
            named.insert("the experts of --method given".into(), blake3::Hash::from_bytes(*experts));
        }
        let retained = self.retain.as_ref().map(|(_, data)| data);
        for (option, data) in [
            ("--dataset-path", Some(&self.data)),
            ("--eval-dataset-path", self.held_out.as_ref()),
            ("--retain-dataset-path", retained),
        ] {
            let Some(data) = data else { continue };
            named.insert(format!("the tokens of the rows of {option}"), tokens_hash(&data.records, false));
        }
        let named = named.into_iter().map(|(name, hash)| (name, hash.to_string())).collect();
        Ok(self.named_inputs.get_or_init(|| named).clone())
    }

    /// [`Self::fingerprint`] as earlier versions computed it: of the files of rows, not of the rows.
    ///
    /// # Errors
    /// A failed read.
    pub fn earlier_fingerprint(&self, config: &RunConfig) -> Result<blake3::Hash> {
        once(&self.earlier_fingerprint, || {
            let mut hasher = self.table.hashed().clone();
            hasher.update(self.fingerprint_of_files(config)?.as_bytes());
            // Of such rows earlier versions trained on more turns: these are other inputs.
            let excluded = |data: &Dataset| data.report.earlier_excluded > 0;
            if [Some(&self.data), self.held_out.as_ref()].into_iter().flatten().any(excluded) {
                hasher.update(b"the last turn alone");
            }
            Ok(hasher.finalize())
        })
    }

    /// blake3 over the base model's parameters and its configuration.
    ///
    /// # Errors
    /// A failed read.
    pub fn weights_hash(&self) -> Result<blake3::Hash> {
        once(&self.weights_hash, || {
            let mut hasher = blake3::Hasher::new();
            hasher.update(hash_file(&self.dir.join("config.json"))?.as_bytes());
            self.table.hash_into(&mut hasher);
            Ok(hasher.finalize())
        })
    }

    fn fingerprint_of_files(&self, config: &RunConfig) -> Result<blake3::Hash> {
        self.hash_files(self.model_files()?.into_iter().chain(data_files(config)))
    }

    /// The files of the model beside its weights.
    fn model_files(&self) -> Result<Vec<PathBuf>> {
        let names = [
            "config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
            "special_tokens_map.json",
            "added_tokens.json",
        ];
        let model = names.iter().map(|name| self.dir.join(name)).filter(|path| path.is_file());
        let named = additional_templates(&self.dir)
            .map_err(|e| Failure::new(exit::IO, format!("{}: cannot be read: {e}", self.dir.display())))?;
        Ok(model.chain(named).collect())
    }

    /// blake3 over what files hold, and the experts of `--method given`.
    fn hash_files(&self, files: impl Iterator<Item = PathBuf>) -> Result<blake3::Hash> {
        let mut hasher = blake3::Hasher::new();
        for path in files {
            hasher.update(hash_data(&path)?.as_bytes());
        }
        if let Some(experts) = &self.given {
            hasher.update(experts);
        }
        Ok(hasher.finalize())
    }

    /// Verifies that all processes run the same program with the same options, rows and model.
    ///
    /// # Errors
    /// What differs, and on which rank.
    pub fn agree(&self, config: &RunConfig, world: &dyn Collective) -> Result<()> {
        world.set_activity("the check that all ranks have the same inputs");
        all_agree(world, "version of moewarden", env!("CARGO_PKG_VERSION").as_bytes())?;
        agree_on_options(world, &config.result_options_yaml()?)?;
        let files = self.fingerprint_of_files(config)?;
        all_agree(world, "file of rows, chat template, tokenizer or config.json", files.as_bytes())?;
        Ok(all_agree(world, "set of model weights", self.fingerprint(config)?.as_bytes())?)
    }
}

/// The hash in the cell, computed if it holds none yet.
fn once(cell: &OnceLock<blake3::Hash>, hash: impl FnOnce() -> Result<blake3::Hash>) -> Result<blake3::Hash> {
    match cell.get() {
        Some(hash) => Ok(*hash),
        None => hash().map(|hash| *cell.get_or_init(|| hash)),
    }
}

/// Verifies that all ranks have the same options, one a line; the error names the first line that differs.
fn agree_on_options(world: &dyn Collective, options: &str) -> Result<()> {
    let all = world.all_gather(options.as_bytes())?;
    let Some(rank) = all.iter().position(|other| *other != all[0]) else { return Ok(()) };
    let [ours, theirs] = [0, rank].map(|rank| String::from_utf8_lossy(&all[rank]));
    let mut lines = ours.lines().zip(theirs.lines()).filter(|(ours, theirs)| ours != theirs);
    let (ours, theirs) = lines.next().unwrap_or(("fewer of them", "more"));
    Err(collective::Error::Disagreement { what: format!("set of options (`{theirs}`, not `{ours}`)"), rank }.into())
}

/// The data files and the chat template of a run.
fn data_files(config: &RunConfig) -> impl Iterator<Item = PathBuf> + '_ {
    let optional = [&config.eval_dataset_path, &config.retain_dataset_path];
    // Without rows, the path is empty.
    let rows = Some(&config.dataset_path).filter(|path| !path.as_os_str().is_empty());
    let files = std::iter::once(rows).chain(optional.map(Option::as_ref));
    files.flatten().cloned().chain(other_files(config))
}

/// The files of a run that hold no rows: its chat template, and the replies on which routing is counted.
fn other_files(config: &RunConfig) -> impl Iterator<Item = PathBuf> + '_ {
    config.chat_template.iter().cloned().chain(config.routing_replies.path().map(Path::to_owned))
}

/// A hash over the tokens of all rows and their loss masks. `lines`: and over the lines of the rows, by which outputs name them.
pub(in crate::run) fn tokens_hash(records: &[Record], lines: bool) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new_derive_key("moewarden rows of an evaluation 1");
    let mut add = |ids: Option<&[u32]>| {
        hasher.update(&ids.map_or(u64::MAX, |ids| ids.len() as u64).to_le_bytes());
        ids.into_iter().flatten().for_each(|id| _ = hasher.update(&id.to_le_bytes()));
    };
    for record in records {
        if lines {
            add(Some(&[record.line as u32]));
        }
        [&record.unsafe_prompt, &record.safe_prompt].into_iter().for_each(|ids| add(ids.as_deref()));
        for reply in [&record.unsafe_reply, &record.safe_reply] {
            let loss = |e: &Example| e.loss.iter().map(|loss| u32::from(*loss)).collect::<Vec<_>>();
            add(reply.as_ref().map(|e| &e.ids[..]));
            add(reply.as_ref().map(loss).as_deref());
        }
    }
    hasher.finalize()
}

/// The hash of what a data file holds: packed by gzip or zstd, it is the same data.
fn hash_data(path: &Path) -> Result<blake3::Hash> {
    let failed = |e: String| Failure::new(exit::NO_INPUT, format!("{}: cannot be read: {e}", path.display()));
    let mut head = Vec::new();
    let mut file = input::open(path).map_err(|e| failed(e.to_string()))?;
    file.by_ref().take(16).read_to_end(&mut head).map_err(|e| failed(e.to_string()))?;
    if !matches!(input::recognise(&head), Some(Format::Gzip | Format::Zstd)) {
        return hash_file(path);
    }
    match input::read_rows(path) {
        Ok(content) => Ok(blake3::hash(&content)),
        Err(RowsError::Io(e)) => Err(failed(e.to_string())),
        Err(RowsError::Format(e)) => Err(failed(e)),
    }
}

fn hash_file(path: &Path) -> Result<blake3::Hash> {
    input::hash(path).map_err(|e| Failure::new(exit::NO_INPUT, format!("{}: cannot be read: {e}", path.display())))
}
