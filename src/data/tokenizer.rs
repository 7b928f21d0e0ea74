//! A model's tokenizer: `tokenizer.json`, the special tokens of its configuration, and its chat template.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value};
use tokenizers::Tokenizer;

use super::template::{ChatTemplate, Rendered, TemplateError};
use super::{Error, Message};

/// Text to ids and back, and messages to text.
pub struct ChatTokenizer {
    path: PathBuf,
    tokenizer: Tokenizer,
    template: Arc<ChatTemplate>,
    /// Texts that the tokenizer turns into control tokens wherever they stand, longest first.
    special: Vec<String>,
    eos: Vec<u32>,
    largest_id: u32,
    /// Bytes of the longest token, and so a bound on the bytes of n tokens.
    longest_token: usize,
}

/// A tokenised text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// Token ids.
    pub ids: Vec<u32>,
    /// For each token the first byte of the text it stands for, and the byte after its last.
    pub offsets: Vec<(usize, usize)>,
}

impl ChatTokenizer {
    /// Opens the tokenizer of a model folder, with the template of `chat_template` instead of the model's where given.
    ///
    /// The model's template is `chat_template.jinja`, or else `chat_template` of `tokenizer_config.json`; of a list of
    /// named templates it is the one named "default".
    ///
    /// # Errors
    /// Files that are missing or not what they should be; no template; a template that does not compile or that takes
    /// time or memory without bound.
    pub fn open(model_dir: &Path, chat_template: Option<&Path>) -> Result<Self, Error> {
        let path = model_dir.join("tokenizer.json");
        let bytes = fs::read(&path).map_err(|source| Error::Read {
            path: path.clone(),
            source,
            hint: "a tokenizer of another form is converted with AutoTokenizer.from_pretrained(..).save_pretrained(..)",
        })?;
        let mut tokenizer =
            Tokenizer::from_bytes(&bytes).map_err(|e| Error::file(&path, format!("no tokenizer: {e}")))?;
        // A file may carry settings of its last use; transformers clears them for each call, too.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|e| Error::file(&path, e))?;

        let config = read_object(&model_dir.join("tokenizer_config.json"))?.unwrap_or_default();
        let older = read_object(&model_dir.join("special_tokens_map.json"))?.unwrap_or_default();
        let named = named_tokens(&config, &older);
        let (source, origin) = template_source(model_dir, &config, chat_template)?;
        let at_origin = |e: TemplateError| Error::file(&origin, e);
        let tokens = named.iter().map(|(name, v)| (name.clone(), template_value(v)));
        let template = Arc::new(ChatTemplate::new(&source, tokens).map_err(at_origin)?);
        template.try_out().map_err(at_origin)?;

        let vocabulary = tokenizer.get_vocab(true);
        let mut eos = BTreeSet::new();
        eos.extend(named.get("eos_token").and_then(Value::as_str).and_then(|t| tokenizer.token_to_id(t)));
        if let Some(generation) = read_object(&model_dir.join("generation_config.json"))? {
            eos.extend(ids(generation.get("eos_token_id")));
        }
        let added = tokenizer.get_added_tokens_decoder();
        let mut special: Vec<_> = added.into_values().filter(|t| t.special).map(|t| t.content).collect();
        special.sort_by_key(|t| std::cmp::Reverse(t.len()));
        Ok(Self {
            template,
            special,
            eos: eos.into_iter().collect(),
            largest_id: vocabulary.values().copied().max().unwrap_or(0),
            longest_token: vocabulary.keys().map(String::len).max().unwrap_or(0),
            path,
            tokenizer,
        })
    }

    /// Ids of a text. Nothing is put before or after it: the template writes the first and last tokens itself.
    ///
    /// # Errors
    /// What the tokenizer answers.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        self.tokenizer.encode_fast(text, false).map(|e| e.get_ids().to_vec()).map_err(|e| Error::file(&self.path, e))
    }

    /// Ids of a text, and for each the bytes of the text it stands for.
    ///
    /// # Errors
    /// What the tokenizer answers.
    pub fn encode_with_offsets(&self, text: &str) -> Result<Encoded, Error> {
        let encoding = self.tokenizer.encode(text, false).map_err(|e| Error::file(&self.path, e))?;
        Ok(Encoded { ids: encoding.get_ids().to_vec(), offsets: encoding.get_offsets().to_vec() })
    }

    /// The text of ids, without the special tokens.
    pub fn decode(&self, ids: &[u32]) -> String {
        // An id beyond the vocabulary is skipped by the tokenizer; the rest cannot fail for ids it knows.
        self.tokenizer.decode(ids, true).unwrap_or_default()
    }

    /// The text of each id, special tokens included. Of characters that take several tokens, the last one has the text.
    pub fn token_texts(&self, ids: &[u32]) -> Vec<String> {
        let mut stream = self.tokenizer.decode_stream(false);
        ids.iter().map(|id| stream.step(*id).ok().flatten().unwrap_or_default()).collect()
    }

    /// Text of a conversation, with the beginning of an assistant turn at its end if asked for.
    ///
    /// # Errors
    /// What the template raised.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, TemplateError> {
        self.template.render(messages, add_generation_prompt).map(|Rendered { text, .. }| text)
    }

    /// The chat template.
    pub fn template(&self) -> &ChatTemplate {
        &self.template
    }

    /// Ids that end a reply, ascending: the tokenizer's `eos_token` and those of `generation_config.json`.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos
    }

    /// A special token's text within `text`. The tokenizer makes a control token of it, as in transformers.
    pub fn special_token_in<'a>(&'a self, text: &str) -> Option<&'a str> {
        self.special.iter().find(|t| text.contains(t.as_str())).map(String::as_str)
    }

    /// Whether a text of `bytes` is far too long for `tokens` tokens, so that it need not be tokenised to know it. The
    /// factor covers white space that some tokenizers drop, and text that a template leaves out.
    pub(super) fn is_hopeless(&self, bytes: usize, tokens: usize) -> bool {
        bytes / 16 > tokens.max(1).saturating_mul(self.longest_token.max(1))
    }

    /// Checks that the model has an embedding for every id.
    ///
    /// # Errors
    /// The largest id, where it is not below `vocab_size`.
    pub fn check_vocab(&self, vocab_size: usize) -> Result<(), Error> {
        if (self.largest_id as usize) < vocab_size {
            return Ok(());
        }
        let largest = self.largest_id;
        let what = format!(
            "the tokenizer has ids up to {largest}, but the model's vocabulary has {vocab_size}; it belongs to another \
             model, or the model's embeddings were not resized after tokens were added"
        );
        Err(Error::file(&self.path, what))
    }
}

/// A JSON object, where the file is there.
fn read_object(path: &Path) -> Result<Option<Map<String, Value>>, Error> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::read(path, e)),
    };
    serde_json::from_slice(&text).map(Some).map_err(|e| Error::file(path, format!("no JSON object: {e}")))
}

/// The special tokens a template may name: `bos_token` and its kin, as text or an object with `content`, and
/// `additional_special_tokens`. `tokenizer_config.json` wins.
fn named_tokens(config: &Map<String, Value>, older: &Map<String, Value>) -> Map<String, Value> {
    let text = |value: &Value| value.as_str().or_else(|| value.get("content")?.as_str()).map(Value::from);
    let mut out = Map::new();
    for (name, value) in older.iter().chain(config) {
        if value.is_null() {
            // It says that the model has no such token, whatever the older file holds.
            out.shift_remove(name);
        } else if let (true, Some(token)) = (name.ends_with("_token"), text(value)) {
            out.insert(name.clone(), token);
        } else if let ("additional_special_tokens", Some(list)) = (name.as_str(), value.as_array()) {
            out.insert(name.clone(), list.iter().filter_map(text).collect());
        } else if let ("extra_special_tokens", Some(more)) = (name.as_str(), value.as_object()) {
            out.extend(more.iter().filter_map(|(name, v)| Some((name.clone(), text(v)?))));
        }
    }
    out
}

fn template_value(token: &Value) -> minijinja::Value {
    match token {
        Value::Array(list) => list.iter().map(template_value).collect(),
        other => other.as_str().unwrap_or_default().into(),
    }
}

fn ids(value: Option<&Value>) -> Vec<u32> {
    let one = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
    match value {
        Some(Value::Array(list)) => list.iter().filter_map(one).collect(),
        Some(value) => one(value).into_iter().collect(),
        None => vec![],
    }
}

/// A template's source and the file it came from.
fn template_source(dir: &Path, config: &Map<String, Value>, given: Option<&Path>) -> Result<(String, PathBuf), Error> {
    let read = |path: &Path| fs::read_to_string(path).map_err(|e| Error::read(path, e));
    if let Some(path) = given {
        return Ok((read(path)?, path.to_owned()));
    }
    let file = dir.join("chat_template.jinja");
    if file.exists() {
        return Ok((read(&file)?, file));
    }
    let missing = |what: String| Error::NoTemplate { folder: dir.to_owned(), what };
    let source = match config.get("chat_template") {
        Some(Value::String(source)) => source.clone(),
        Some(Value::Array(named)) => {
            let name = |t: &Value| t.get("name").and_then(Value::as_str).unwrap_or_default().to_owned();
            let default = named.iter().find(|t| name(t) == "default").and_then(|t| t.get("template")?.as_str());
            let names = || named.iter().map(name).collect::<Vec<_>>().join(", ");
            default
                .ok_or_else(|| missing(format!("none of its chat templates ({}) is named default", names())))?
                .to_owned()
        }
        _ => return Err(missing("it has no chat template".into())),
    };
    Ok((source, dir.join("tokenizer_config.json")))
}
