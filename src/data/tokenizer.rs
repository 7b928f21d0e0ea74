//! A model's tokenizer: `tokenizer.json`, the special tokens of its configuration, and its chat template.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value};
use tokenizers::models::ModelWrapper;
use tokenizers::{AddedToken, Tokenizer};

use super::declared_tokens::{DeclaredTokens, TokenFiles};
use super::generation::GenerationFile;
use super::template::{Rendered, TemplateError};
use super::templates::Templates;
use super::tokenizer_class::TokenizerClass;
use super::{Error, Message, Penalties};
use crate::input;
use crate::panics::catch_expected;
use crate::quote::quote;

/// A tokenizer with its special tokens and chat template.
pub struct ChatTokenizer {
    path: PathBuf,
    tokenizer: Tokenizer,
    templates: Templates,
    /// Texts of the special tokens, longest first. The tokenizer recognises them anywhere in a text.
    special: Vec<String>,
    eos: Vec<u32>,
    generation: GenerationFile,
    /// Of `tokenizer.json`; tokens that are declared beside it may have larger ids.
    max_id: u32,
    /// Embeddings of the model, once [`Self::check_vocab`] knows it.
    vocab_size: usize,
    /// Bytes of the longest token.
    max_token_bytes: usize,
    /// BPE dropout that the file asks for, and that is switched off.
    dropout: Option<f32>,
}

/// A tokenised text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// Token ids.
    pub ids: Vec<u32>,
    /// The byte range of the text that each token stands for: start, and end (exclusive).
    pub offsets: Vec<(usize, usize)>,
}

impl ChatTokenizer {
    /// Opens the tokenizer of a model folder. The file `chat_template`, if given, replaces the model's templates (see
    /// `templates`).
    ///
    /// # Errors
    /// A file that is missing or invalid; no template; a template that does not compile or that takes unbounded time or
    /// memory.
    pub fn open(model_dir: &Path, chat_template: Option<&Path>) -> Result<Self, Error> {
        let path = model_dir.join("tokenizer.json");
        let bytes = input::read(&path).map_err(|source| Error::Read {
            path: path.clone(),
            source,
            hint: "convert another tokenizer format with AutoTokenizer.from_pretrained(..).save_pretrained(..)",
        })?;
        let file = |name: &str| model_dir.join(name);
        let [config_file, special_tokens_map, added_tokens, model_config] =
            ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json"].map(file);
        let object = |path: &Path| Ok::<_, Error>(read_object(path)?.unwrap_or_default());
        let config = object(&config_file)?;
        let model = object(&model_config)?;
        let class = TokenizerClass::of(&config, &model).map_err(|e| Error::file(&config_file, e))?;
        let Loaded { mut tokenizer, added } = load(&path, &bytes, class, &config)?;
        let files = TokenFiles {
            class,
            config: (&config_file, config),
            special_tokens_map: (&special_tokens_map, object(&special_tokens_map)?),
            added_tokens: (&added_tokens, object(&added_tokens)?),
            added,
        };
        let DeclaredTokens { named, missing } = DeclaredTokens::read(&files, &tokenizer)?;
        let config = files.config.1;
        let own_ids = tokenizer.get_vocab(true);
        guarded(&path, || {
            // The file may hold truncation and padding settings of an earlier use. transformers resets them on each call,
            // too.
            tokenizer.with_padding(None);
            tokenizer.with_truncation(None)?;
            tokenizer
                .set_encode_special_tokens(config.get("split_special_tokens").and_then(Value::as_bool) == Some(true));
            tokenizer.add_tokens(missing)
        })?;
        let dropout = without_dropout(&mut tokenizer);
        let tokens: Vec<_> = named.iter().map(|(name, v)| (name.clone(), template_value(v))).collect();
        let templates = Templates::open(model_dir, &config, chat_template, &tokens)?;

        let vocabulary = tokenizer.get_vocab(true);
        let mut eos = BTreeSet::new();
        eos.extend(named.get("eos_token").and_then(Value::as_str).and_then(|t| tokenizer.token_to_id(t)));
        let generation = GenerationFile::new(model_dir, read_object(&file("generation_config.json"))?, model);
        eos.extend(generation.eos()?);
        let added = tokenizer.get_added_tokens_decoder();
        let mut special: Vec<_> = added.into_values().filter(|t| t.special).map(|t| t.content).collect();
        special.sort_by_key(|t| std::cmp::Reverse(t.len()));
        Ok(Self {
            templates,
            special,
            eos: eos.into_iter().collect(),
            generation,
            max_id: own_ids.into_values().max().unwrap_or(0),
            vocab_size: usize::MAX,
            max_token_bytes: vocabulary.keys().map(String::len).max().unwrap_or(0),
            path,
            tokenizer,
            dropout,
        })
    }

    /// What differs from the folder's files, for the user: BPE dropout is switched off.
    pub fn note(&self) -> Option<String> {
        self.dropout.map(|dropout| {
            format!(
                "{}: its model has dropout {dropout}, which splits words at random (transformers keeps it): it is switched off, so \
                 that the same text always gives the same tokens",
                self.path.display()
            )
        })
    }

    /// Token ids of a text, without added special tokens: the chat template writes those itself.
    ///
    /// # Errors
    /// Those of the tokenizer.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        let ids = guarded(&self.path, || Ok(self.tokenizer.encode_fast(text, false)?.get_ids().to_vec()))?;
        self.check_embedded(&ids)?;
        Ok(ids)
    }

    /// Token ids of a text and their byte ranges in it. Like [`Self::encode`], without added special tokens.
    ///
    /// # Errors
    /// Those of the tokenizer.
    pub fn encode_with_offsets(&self, text: &str) -> Result<Encoded, Error> {
        let encoding = guarded(&self.path, || self.tokenizer.encode(text, false))?;
        self.check_embedded(encoding.get_ids())?;
        Ok(Encoded { ids: encoding.get_ids().to_vec(), offsets: encoding.get_offsets().to_vec() })
    }

    /// The text of token ids, special tokens left out.
    pub fn decode(&self, ids: &[u32]) -> String {
        // The tokenizer skips ids beyond the vocabulary. A decoder that fails on ids it knows has no text for them.
        guarded(&self.path, || self.tokenizer.decode(ids, true)).unwrap_or_default()
    }

    /// The text of each token id, special tokens included. If a character takes several tokens, the last of them has
    /// the text and the others are empty.
    pub fn token_texts(&self, ids: &[u32]) -> Vec<String> {
        let mut stream = self.tokenizer.decode_stream(false);
        ids.iter().map(|id| guarded(&self.path, || stream.step(*id)).ok().flatten().unwrap_or_default()).collect()
    }

    /// Renders a conversation by the template of rows without tools: see [`super::ChatTemplate::render`].
    ///
    /// # Errors
    /// Those of the chat template.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, TemplateError> {
        self.templates.default().render(messages, add_generation_prompt).map(|Rendered { text, .. }| text)
    }

    /// [`Self::render`] with further variables, such as `enable_thinking`.
    ///
    /// # Errors
    /// Those of the chat template.
    pub fn render_with(
        &self,
        messages: &[Message],
        variables: &Map<String, Value>,
        add_generation_prompt: bool,
    ) -> Result<String, TemplateError> {
        let rendered = self.templates.default().render_with(messages, variables, add_generation_prompt);
        rendered.map(|Rendered { text, .. }| text)
    }

    /// Whether the template of rows without tools reads this variable.
    pub fn reads_variable(&self, name: &str) -> bool {
        self.templates.default().reads_variable(name)
    }

    /// The chat templates.
    pub(super) fn templates(&self) -> &Templates {
        &self.templates
    }

    /// A hash of the chat templates.
    pub fn template_digest(&self) -> blake3::Hash {
        self.templates.digest()
    }

    /// Ids of the end-of-sequence tokens, ascending: the tokenizer's `eos_token` and `eos_token_id` of
    /// `generation_config.json`.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos
    }

    /// How `generation_config.json`, or without one `config.json`, changes the logits before a token is chosen.
    ///
    /// # Errors
    /// A field by which transformers changes answers in a way that is not supported.
    pub fn penalties(&self) -> Result<Penalties, Error> {
        self.generation.penalties()
    }

    /// A special token whose text occurs in `text`. The tokenizer encodes it as that special token, as in transformers.
    pub fn special_token_in<'a>(&'a self, text: &str) -> Option<&'a str> {
        self.special.iter().find(|t| text.contains(t.as_str())).map(String::as_str)
    }

    /// Whether a text of `bytes` certainly has more than `tokens` tokens, so that it need not be rendered and
    /// tokenised. The factor 16 allows for white space that some tokenizers drop, and for text that a template leaves
    /// out.
    pub(super) fn exceeds_by_far(&self, bytes: usize, tokens: usize) -> bool {
        bytes / 16 > tokens.max(1).saturating_mul(self.max_token_bytes.max(1))
    }

    /// Checks that the model has an embedding for every token id of `tokenizer.json`. Of tokens that are declared beside it, such as
    /// one for padding, a model may have none: a text with such a token is then an error.
    ///
    /// # Errors
    /// The largest id is not below `vocab_size`.
    pub fn check_vocab(&mut self, vocab_size: usize) -> Result<(), Error> {
        self.vocab_size = vocab_size;
        if (self.max_id as usize) < vocab_size {
            return Ok(());
        }
        let max_id = self.max_id;
        let token = self.tokenizer.id_to_token(max_id).unwrap_or_default();
        let message = format!(
            "the tokenizer has ids up to {max_id} ({}), but the model's vocabulary has {vocab_size}; it belongs to another \
             model, or the model's embeddings were not resized after tokens were added",
            quote(&token)
        );
        Err(Error::file(&self.path, message))
    }

    /// Refuses tokens for which the model has no embedding.
    fn check_embedded(&self, ids: &[u32]) -> Result<(), Error> {
        let Some(id) = ids.iter().find(|id| **id as usize >= self.vocab_size) else { return Ok(()) };
        let message = format!(
            "a text has the token {}, id {id}, but the model's vocabulary has {}: the token is declared beside this file, in \
             tokenizer_config.json, special_tokens_map.json or added_tokens.json, or is a default of the tokenizer's class, and the model's \
             embeddings were not resized for it: resize them, or take the token out of the rows and the chat template",
            quote(&self.tokenizer.id_to_token(*id).unwrap_or_default()),
            self.vocab_size
        );
        Err(Error::file(&self.path, message))
    }
}

/// Switches BPE dropout off: with it each encoding of a text is another one, and a run could not be repeated.
fn without_dropout(tokenizer: &mut Tokenizer) -> Option<f32> {
    let ModelWrapper::BPE(model) = tokenizer.get_model() else { return None };
    let dropout = model.dropout.filter(|dropout| *dropout > 0.0)?;
    let mut model = model.clone();
    model.dropout = None;
    tokenizer.with_model(model);
    Some(dropout)
}

/// A tokenizer as its class makes it, and the added tokens of its file.
struct Loaded {
    tokenizer: Tokenizer,
    added: BTreeMap<u32, AddedToken>,
}

/// Reads a `tokenizer.json`.
fn load(path: &Path, bytes: &[u8], class: TokenizerClass, config: &Map<String, Value>) -> Result<Loaded, Error> {
    let bytes = input::without_mark(bytes);
    let as_in_file = || {
        guarded(path, || Tokenizer::from_bytes(bytes)).map_err(|error| {
            // Of a file that is no JSON the library's own error says less, or it panics.
            match serde_json::from_slice::<serde::de::IgnoredAny>(bytes) {
                Err(syntax) => Error::file(path, input::not_json(bytes, &syntax)),
                Ok(_) => error,
            }
        })
    };
    if class == TokenizerClass::AsInFile {
        let tokenizer = as_in_file()?;
        // By the ids of the file: the library numbers them anew where they leave a gap.
        let added =
            serde_json::from_slice(bytes).ok().and_then(|AddedTokens { added_tokens }| read_added(&added_tokens));
        return Ok(Loaded { tokenizer, added: added.unwrap_or_default() });
    }
    let content: Map<String, Value> =
        serde_json::from_slice(bytes).map_err(|e| Error::file(path, input::not_json(bytes, &e)))?;
    let added = content.get("added_tokens").map_or_else(|| Some(BTreeMap::new()), read_added);
    let added = added.ok_or_else(|| Error::file(path, "added_tokens holds what is no token"))?;
    let content = class.made_anew(content, config).map_err(|e| Error::file(path, e))?;
    let tokenizer = guarded(path, || Tokenizer::from_bytes(serde_json::to_vec(&content)?))?;
    Ok(Loaded { tokenizer, added })
}

/// That part of a `tokenizer.json`.
#[derive(Deserialize)]
struct AddedTokens {
    #[serde(default)]
    added_tokens: Value,
}

/// The added tokens of a `tokenizer.json` by id; `None`: there is something else among them.
fn read_added(added_tokens: &Value) -> Option<BTreeMap<u32, AddedToken>> {
    let token =
        |entry: &Value| Some((u32::try_from(entry.get("id")?.as_u64()?).ok()?, AddedToken::deserialize(entry).ok()?));
    match added_tokens {
        Value::Null => Some(BTreeMap::new()),
        list => list.as_array()?.iter().map(token).collect(),
    }
}

/// Runs `f`, which calls the tokenizers library. It panics on some files that are no valid tokenizer; that is the file's fault.
fn guarded<T>(path: &Path, f: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, Error> {
    let again =
        "if it is damaged, fetch it again, or write it anew with AutoTokenizer.from_pretrained(..).save_pretrained(..)";
    let problem = match catch_expected(f) {
        Some(Ok(value)) => return Ok(value),
        Some(Err(error)) => format!("not a valid tokenizer: {}", problem_of(&error.to_string())),
        None => {
            "not a valid tokenizer: its parts contradict each other, so that the tokenizers library fails on it".into()
        }
    };
    Err(Error::file(path, format!("{problem}; {again}")))
}

/// An error of the tokenizers library in the words of the file. Of a part of the file it names only the type that it has no form of.
fn problem_of(error: &str) -> String {
    const PARTS: [(&str, &str); 5] = [
        ("PreTokenizer", "pre_tokenizer"),
        ("PostProcessor", "post_processor"),
        ("Normalizer", "normalizer"),
        ("Decoder", "decoder"),
        ("Model", "model"),
    ];
    let part = error.split_once("any variant of untagged enum ");
    let part = part.and_then(|(_, of)| PARTS.iter().find(|(start, _)| of.starts_with(start)));
    match part {
        // Of valid JSON: the library does not read the value of such a field.
        None if error.starts_with("expected `,` or `}`") => {
            "it has a field that the tokenizers library does not know".into()
        }
        Some((_, part)) => format!("its {part} has a type or fields that the tokenizers library does not know"),
        None => input::words(error),
    }
}

/// Reads a JSON object; `None` if the file does not exist.
fn read_object(path: &Path) -> Result<Option<Map<String, Value>>, Error> {
    let bytes = match input::read(path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::read(path, e)),
    };
    let text = input::without_mark(&bytes);
    serde_json::from_slice(text).map(Some).map_err(|e| Error::file(path, input::not_json(text, &e)))
}

fn template_value(token: &Value) -> minijinja::Value {
    match token {
        Value::Array(list) => list.iter().map(template_value).collect(),
        other => other.as_str().unwrap_or_default().into(),
    }
}
