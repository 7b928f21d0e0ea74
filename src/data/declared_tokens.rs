//! The tokens that a model folder declares beside `tokenizer.json`, as transformers 5.17 loads them.
//!
//! `tokenizer_config.json` names tokens under `added_tokens_decoder`, `extra_special_tokens` (before version 5:
//! `additional_special_tokens`) and keys such as `eos_token`. Only where it has no `added_tokens_decoder`, the older files
//! `special_tokens_map.json` and `added_tokens.json` count too, and the former takes precedence. What `tokenizer.json` does not
//! declare itself is added to it: otherwise the text of such a token would be split into pieces.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use serde_json::{Map, Value};
use tokenizers::{AddedToken, Tokenizer};

use super::Error;
use super::tokenizer_class::TokenizerClass;
use crate::quote::quote;

/// The named special tokens of every model, in the order in which they are added.
const NAMES: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Older name of the key `extra_special_tokens`.
const OLD_EXTRA: &str = "additional_special_tokens";
const EXTRA: &str = "extra_special_tokens";
/// Tokens by other names, where no key of its own and no object of extra tokens names one.
const MODEL_SPECIFIC: &str = "model_specific_special_tokens";

/// The files of a model folder that declare tokens: each with its path, for messages. An absent file is empty.
pub(super) struct TokenFiles<'a> {
    pub class: TokenizerClass,
    pub config: (&'a Path, Map<String, Value>),
    pub special_tokens_map: (&'a Path, Map<String, Value>),
    pub added_tokens: (&'a Path, Map<String, Value>),
    /// The added tokens of `tokenizer.json`.
    pub added: BTreeMap<u32, AddedToken>,
}

/// The declared tokens.
pub(super) struct DeclaredTokens {
    /// Texts of the special tokens that a chat template can name, such as `eos_token`.
    pub named: Map<String, Value>,
    /// Tokens to add to the tokenizer, in this order.
    pub missing: Vec<AddedToken>,
}

/// A token as declared.
#[derive(Clone)]
struct Declared {
    content: String,
    /// Whether it is a string, without flags.
    is_text: bool,
    special: bool,
    single_word: bool,
    lstrip: bool,
    rstrip: bool,
    /// Unless stated, whether it is declared as not special.
    normalized: bool,
}

impl Declared {
    fn new(content: &str, special: bool) -> Self {
        let content = content.to_owned();
        Self {
            content,
            is_text: false,
            special,
            single_word: false,
            lstrip: false,
            rstrip: false,
            normalized: !special,
        }
    }

    /// A string, which is a special token, or an object with `content` and flags, which is one where it or `special` says so.
    /// `None`: neither.
    fn read(value: &Value, special: bool) -> Option<Self> {
        let Value::Object(fields) = value else {
            return Some(Self { is_text: true, ..Self::new(value.as_str()?, true) });
        };
        let flag = |name: &str| fields.get(name).and_then(Value::as_bool);
        // save_pretrained marks objects that state all flags.
        let special = special && !fields.contains_key("__type");
        let special = special || flag("special").unwrap_or(false);
        Some(Self {
            single_word: flag("single_word").unwrap_or(false),
            lstrip: flag("lstrip").unwrap_or(false),
            rstrip: flag("rstrip").unwrap_or(false),
            normalized: flag("normalized").unwrap_or(!special),
            ..Self::new(fields.get("content")?.as_str()?, special)
        })
    }

    fn added(&self) -> AddedToken {
        AddedToken::from(&*self.content, self.special)
            .single_word(self.single_word)
            .lstrip(self.lstrip)
            .rstrip(self.rstrip)
            .normalized(self.normalized)
    }
}

impl From<&AddedToken> for Declared {
    fn from(token: &AddedToken) -> Self {
        Self {
            content: token.content.clone(),
            is_text: false,
            special: token.special,
            single_word: token.single_word,
            lstrip: token.lstrip,
            rstrip: token.rstrip,
            normalized: token.normalized,
        }
    }
}

impl PartialEq for Declared {
    fn eq(&self, other: &Self) -> bool {
        (self.is_text, self.added()) == (other.is_text, other.added())
    }
}

type Named = Vec<(String, Option<Declared>)>;

/// Tokens under names and without: the special tokens of a file.
#[derive(Default)]
struct Special {
    /// By the names of [`NAMES`].
    named: Named,
    /// By other names, as keys of the file: in `tokenizer_config.json` objects with a type.
    keys: Named,
    /// By other names, that `tokenizer_config.json` gives as strings, or under [`MODEL_SPECIFIC`].
    own: Named,
    /// By any names, in an object of extra tokens: they count before all others.
    of_object: Named,
    /// `None`: the file has no such key.
    extra: Option<Vec<Declared>>,
    /// Texts of the tokens that `tokenizer_config.json` has with flags: transformers does not find them in `added_tokens.json`.
    flagged: HashSet<String>,
}

impl Special {
    /// `in_config`: `object` is that of `tokenizer_config.json`, where only a standard name takes an object without a type.
    fn read(path: &Path, object: &Map<String, Value>, in_config: bool) -> Result<Self, Error> {
        let wrong = |key: &str, value: &Value| {
            let message = format!(
                "{key} holds {}, which is no token: a token is a string, or an object with the string `content`",
                quote(&value.to_string())
            );
            Error::file(path, message)
        };
        let mut special = Self::default();
        let mut flagged = HashSet::new();
        let mut one = |key: &str, value: &Value| {
            let mut token = Declared::read(value, true).ok_or_else(|| wrong(key, value))?;
            // special_tokens_map.json says nothing of that.
            token.special |= !in_config;
            if !in_config && value.get("normalized").is_none() {
                token.normalized = false;
            }
            if in_config && !token.is_text {
                flagged.insert(token.content.clone());
            }
            Ok(token)
        };
        for (key, value) in object {
            match (&**key, value) {
                // Flags such as `add_bos_token`.
                (name, Value::Bool(_)) if name.ends_with("_token") => {}
                (name, value)
                    if in_config
                        && name.ends_with("_token")
                        && !NAMES.contains(&name)
                        && !value.is_string()
                        && value.get("__type").is_none() => {}
                (name, value) if name.ends_with("_token") => {
                    let list = match NAMES.contains(&name) {
                        true => &mut special.named,
                        false if in_config && value.is_string() => &mut special.own,
                        false => &mut special.keys,
                    };
                    set(list, key, if value.is_null() { None } else { Some(one(name, value)?) });
                }
                (EXTRA | OLD_EXTRA, Value::Object(more)) => {
                    for (name, value) in more {
                        set(&mut special.of_object, name, Some(one(key, value)?));
                    }
                }
                // The new key counts where a file has both.
                (OLD_EXTRA, Value::Array(_)) if object.contains_key(EXTRA) => {}
                (EXTRA | OLD_EXTRA, Value::Array(list)) => {
                    special.extra = Some(list.iter().map(|value| one(key, value)).collect::<Result<_, _>>()?);
                }
                (EXTRA | OLD_EXTRA, Value::Null) => _ = special.extra.get_or_insert_default(),
                (EXTRA | OLD_EXTRA, value) => return Err(wrong(key, value)),
                _ => {}
            }
        }
        let named_otherwise = |(key, value): (&String, &Value)| match value {
            Value::String(_) => key.ends_with("_token") && !NAMES.contains(&&**key),
            Value::Object(more) => [EXTRA, OLD_EXTRA].contains(&&**key) && !more.is_empty(),
            _ => false,
        };
        match object.get(MODEL_SPECIFIC) {
            Some(Value::Object(more)) if !object.iter().any(named_otherwise) => {
                for (name, value) in more {
                    set(&mut special.own, name, Some(one(MODEL_SPECIFIC, value)?));
                }
            }
            Some(value) if !value.is_null() && !value.is_object() => return Err(wrong(MODEL_SPECIFIC, value)),
            _ => {}
        }
        special.flagged = flagged;
        Ok(special)
    }

    fn has(&self, name: &str) -> bool {
        self.named.iter().any(|(other, _)| other == name)
    }

    /// The tokens by name, in the order in which they are added.
    fn in_order(self) -> Vec<(String, Declared)> {
        let Self { mut named, mut keys, own, of_object, .. } = self;
        for (name, token) in own.into_iter().chain(of_object) {
            set(if NAMES.contains(&&*name) { &mut named } else { &mut keys }, &name, token);
        }
        named.sort_by_key(|(name, _)| NAMES.iter().position(|known| known == name));
        named.into_iter().chain(keys).filter_map(|(name, token)| Some((name, token?))).collect()
    }
}

/// Gives a name this token; a name that is there keeps its place.
fn set(list: &mut Named, name: &str, token: Option<Declared>) {
    match list.iter_mut().find(|(other, _)| other == name) {
        Some((_, there)) => *there = token,
        None => list.push((name.to_owned(), token)),
    }
}

impl DeclaredTokens {
    /// What the files declare beyond `tokenizer`.
    ///
    /// # Errors
    /// An entry that is no token.
    pub(super) fn read(files: &TokenFiles<'_>, tokenizer: &Tokenizer) -> Result<Self, Error> {
        let (config_path, config) = &files.config;
        let mut special = Special::read(config_path, config, true)?;
        for (name, text) in files.class.defaults().iter().filter(|(name, _)| !config.contains_key(*name)) {
            set(&mut special.named, name, Some(Declared::new(text, true)));
        }
        if let Some(padding) = tokenizer.get_padding().filter(|_| !special.has("pad_token")) {
            set(&mut special.named, "pad_token", Some(Declared::new(&padding.pad_token, true)));
        }
        let own: Vec<_> = tokenizer.get_added_tokens_decoder().into_values().collect();
        let mut entries = Vec::new();
        match config.get("added_tokens_decoder") {
            Some(decoder) => entries.extend(read_decoder(config_path, decoder)?),
            None => {
                let (path, object) = &files.special_tokens_map;
                let older = Special::read(path, object, false)?;
                let lists = [
                    (&mut special.named, older.named),
                    (&mut special.keys, older.keys),
                    (&mut special.own, older.own),
                    (&mut special.of_object, older.of_object),
                ];
                for (list, older) in lists {
                    for (name, token) in older {
                        special.flagged.retain(|text| token.as_ref().is_none_or(|token| token.content != *text));
                        set(list, &name, token);
                    }
                }
                special.extra = match (special.extra, older.extra) {
                    // An object of names is no list: then that of the map counts.
                    (Some(ours), Some(theirs)) if object.get(EXTRA).is_some_and(Value::is_array) => {
                        let new = |t: &Declared| ours.iter().all(|o| o.content != t.content);
                        let theirs: Vec<_> = theirs.into_iter().filter(new).collect();
                        Some(ours.into_iter().chain(theirs).collect())
                    }
                    // A null takes the place of the list of the config.
                    _ if object.get(EXTRA).is_some_and(Value::is_null) => None,
                    (ours, theirs) => ours.or(theirs),
                };
                let older = read_added_tokens(&files.added_tokens, &special)?;
                let in_file = |token: &Declared| files.added.values().any(|t| t.content == token.content);
                entries.extend(older.into_iter().filter(|(_, token)| !in_file(token)));
                entries.extend(files.added.iter().map(|(id, token)| (u64::from(*id), Declared::from(token))));
            }
        }
        let mut declared = Self::merge(special, entries, &own);
        if files.class == TokenizerClass::Qwen2 {
            declared.make_special();
        }
        Ok(declared)
    }

    /// Adds the named and extra tokens again, without flags: so does the class Qwen2Tokenizer.
    fn make_special(&mut self) {
        let texts = self.named.values().flat_map(|value| match value {
            Value::Array(list) => list.iter().collect(),
            one => vec![one],
        });
        let again: Vec<_> = texts.filter_map(|text| Some(AddedToken::from(text.as_str()?, true))).collect();
        self.missing.extend(again);
    }

    /// `entries`: tokens with ids; of two with the same id or text the later counts.
    fn merge(mut special: Special, entries: Vec<(u64, Declared)>, own: &[AddedToken]) -> Self {
        let by_text: HashMap<String, Declared> =
            entries.iter().map(|(_, token)| (token.content.clone(), token.clone())).collect();
        let by_id: BTreeMap<u64, Declared> = entries.into_iter().collect();
        // The flags of a named token are those of its entry.
        for (_, token) in &mut special.named {
            if let Some(token) = token
                && let Some(entry) = by_text.get(&token.content)
            {
                *token = entry.clone();
            }
        }
        let extra = special.extra.take();
        let named = special.in_order();

        let mut add: Vec<Declared> = by_id.into_values().filter(|token| !own.contains(&token.added())).collect();
        let known: HashSet<String> =
            own.iter().map(|token| &token.content).chain(add.iter().map(|token| &token.content)).cloned().collect();
        // Of one text with different flags the last counts.
        for token in named.iter().map(|(_, token)| token).chain(extra.iter().flatten()) {
            if !known.contains(&token.content) && !add.contains(token) {
                add.push(token.clone());
            }
        }
        for token in &mut add {
            token.special |= named.iter().any(|(_, other)| other.content == token.content);
        }
        let missing = add.iter().map(Declared::added).collect();
        let mut texts: Map<String, Value> =
            named.into_iter().map(|(name, token)| (name, token.content.into())).collect();
        if let Some(extra) = extra {
            texts.insert(OLD_EXTRA.into(), extra.into_iter().map(|token| Value::from(token.content)).collect());
        }
        Self { named: texts, missing }
    }
}

/// `added_tokens_decoder`: id → token.
fn read_decoder(path: &Path, decoder: &Value) -> Result<Vec<(u64, Declared)>, Error> {
    let wrong = |what: &str| {
        let message = format!(
            "added_tokens_decoder: {} is no entry: an entry is an id with an object that has the string `content`",
            quote(what)
        );
        Error::file(path, message)
    };
    let entries = decoder.as_object().ok_or_else(|| wrong(&decoder.to_string()))?;
    let read = |(id, value): (&String, &Value)| {
        let token = Declared::read(value, false).filter(|_| value.is_object());
        let id = id.trim().parse().ok();
        id.zip(token)
            .ok_or_else(|| wrong(&format!("{}: {value}", id.map_or_else(|| "?".into(), |id: u64| id.to_string()))))
    };
    entries.iter().map(read).collect()
}

/// `added_tokens.json`: text → id.
fn read_added_tokens(
    (path, texts): &(&Path, Map<String, Value>),
    special: &Special,
) -> Result<Vec<(u64, Declared)>, Error> {
    let named = special.named.iter().filter_map(|(_, token)| token.as_ref());
    let declared = named.chain(special.extra.iter().flatten()).map(|token| &*token.content);
    let special: Vec<&str> = declared.filter(|text| !special.flagged.contains(*text)).collect();
    let read = |(text, id): (&String, &Value)| {
        let token = Declared::new(text, special.contains(&&**text));
        let id = id.as_u64().ok_or_else(|| {
            Error::file(path, format!("the id of {} is {}, not a number", quote(text), quote(&id.to_string())))
        })?;
        Ok((id, token))
    };
    texts.iter().map(read).collect()
}
