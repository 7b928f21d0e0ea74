//! The chat templates of a model, and which of them renders a row, as transformers 5.17 chooses it.
//!
//! Named templates are `chat_template.jinja` (the one named `default`) and the files of `additional_chat_templates/`; only
//! where there is none of them, the key `chat_template` of `tokenizer_config.json` counts: one text, a list of objects with
//! `name` and `template`, or an object from name to text. A row with tools takes `tool_use`, where there is one.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use minijinja::Value;
use serde_json::{Map, Value as Json};

use super::template::{ChatTemplate, TemplateError, has_tools};
use super::{Error, values};
use crate::input;

/// The template of rows without tools, and the one of rows with tools.
const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";

/// The compiled chat templates of a model.
pub(super) struct Templates {
    /// An error is one of the rows that need the template: transformers chooses and compiles it only where it renders.
    default: Result<Arc<ChatTemplate>, Error>,
    tool_use: Option<Result<Arc<ChatTemplate>, Error>>,
}

/// The source of a template.
struct Source {
    name: String,
    text: String,
    /// The file that holds it.
    file: PathBuf,
}

impl Templates {
    /// Opens the templates of a model folder with this `tokenizer_config.json`. The file `chosen`, if given, replaces them all.
    /// `tokens`: variables for special tokens.
    ///
    /// # Errors
    /// A file that cannot be read; no template named `default`, or one that does not compile; one that takes unbounded time or
    /// memory.
    pub(super) fn open(
        dir: &Path,
        config: &Map<String, Json>,
        chosen: Option<&Path>,
        tokens: &[(String, Value)],
    ) -> Result<Self, Error> {
        let sources = match chosen {
            Some(file) => vec![Source { name: DEFAULT.into(), text: read(file)?, file: file.to_owned() }],
            None => sources(dir, config)?,
        };
        let named = |name: &str| sources.iter().rfind(|source| source.name == name);
        let tool_use = match named(TOOL_USE).map(|source| compile(source, tokens)) {
            // It may still be running.
            Some(Err((e @ TemplateError::Bounds(_), file))) => return Err(Error::file(&file, e)),
            other => other.map(|compiled| compiled.map_err(|(e, file)| Error::file(&file, e))),
        };
        let default = match named(DEFAULT) {
            Some(source) => Ok(compile(source, tokens).map_err(|(e, file)| Error::file(&file, e))?),
            None => Err(no_default(dir, &sources)),
        };
        match (default, tool_use) {
            (Err(missing), None | Some(Err(_))) => Err(missing),
            (default, tool_use) => Ok(Self { default, tool_use }),
        }
    }

    /// The template of rows without tools, or else that of rows with tools.
    pub(super) fn default(&self) -> &ChatTemplate {
        self.all().next().expect("one of them was compiled")
    }

    /// The template that renders a row with these variables.
    ///
    /// # Errors
    /// There is none of that name, or it does not compile.
    pub(super) fn of_row(&self, variables: &Map<String, Json>) -> Result<&ChatTemplate, &Error> {
        match self.tool_use.as_ref().filter(|_| has_tools(variables)) {
            Some(tool_use) => tool_use.as_ref().map(|template| &**template),
            None => self.default.as_ref().map(|template| &**template),
        }
    }

    fn all(&self) -> impl Iterator<Item = &ChatTemplate> {
        self.default.iter().chain(self.tool_use.iter().flatten()).map(|template| &**template)
    }

    /// Whether a row can have a template that reads this variable.
    pub(super) fn any_reads_variable(&self, name: &str) -> bool {
        self.all().any(|template| template.reads_variable(name))
    }

    /// A hash of all sources that can render a row: of one source, the hash of that.
    pub(super) fn digest(&self) -> blake3::Hash {
        let hashes: Vec<_> = self.all().map(ChatTemplate::digest).collect();
        match hashes[..] {
            [one] => one,
            _ => blake3::hash(&hashes.iter().flat_map(|hash| *hash.as_bytes()).collect::<Vec<_>>()),
        }
    }
}

fn no_default(dir: &Path, sources: &[Source]) -> Error {
    let names: Vec<_> = sources.iter().map(|source| values::name_of(&source.name)).collect();
    let message = match names.is_empty() {
        true => "it has no chat template".into(),
        false => format!("none of its chat templates ({}) is named {DEFAULT}", names.join(", ")),
    };
    Error::NoTemplate { folder: dir.to_owned(), message }
}

/// Compiles a template and checks its limits; an error comes with the file.
fn compile(source: &Source, tokens: &[(String, Value)]) -> Result<Arc<ChatTemplate>, (TemplateError, PathBuf)> {
    let of_file = |e: TemplateError| (e, source.file.clone());
    let template = ChatTemplate::new(&source.text, tokens.iter().cloned()).map_err(of_file)?;
    let template = Arc::new(template.of_file(&source.file));
    template.check_limits().map_err(of_file)?;
    // One for rows with tools may write nothing without tools.
    if source.name == DEFAULT {
        template.check_content().map_err(of_file)?;
    }
    Ok(template)
}

/// The named templates of a model folder; of two with one name the later counts.
fn sources(dir: &Path, config: &Map<String, Json>) -> Result<Vec<Source>, Error> {
    let mut sources = Vec::new();
    let mut add = |name: &str, file: PathBuf| {
        sources.push(Source { name: name.to_owned(), text: read(&file)?, file });
        Ok::<(), Error>(())
    };
    let file = dir.join("chat_template.jinja");
    if input::is_there(&file) {
        add(DEFAULT, file)?;
    }
    for file in additional_templates(dir).map_err(|e| Error::read(dir, e))? {
        let name = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        add(&name, file)?;
    }
    if sources.is_empty() {
        sources = in_config(&dir.join("tokenizer_config.json"), config)?;
    }
    Ok(sources)
}

/// The files `additional_chat_templates/NAME.jinja` of a model folder, sorted.
///
/// # Errors
/// A folder that cannot be read.
pub fn additional_templates(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let folder = dir.join("additional_chat_templates");
    if !folder.is_dir() {
        return Ok(vec![]);
    }
    let mut files = folder.read_dir()?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
    files.retain(|file| file.extension().is_some_and(|extension| extension == "jinja"));
    files.sort();
    Ok(files)
}

/// The templates under the key `chat_template`.
fn in_config(path: &Path, config: &Map<String, Json>) -> Result<Vec<Source>, Error> {
    let source = |name: &str, text: &Json| {
        let text = text.as_str().ok_or_else(|| wrong(path, "a template that is no text"))?.to_owned();
        Ok(Source { name: name.to_owned(), text, file: path.to_owned() })
    };
    match config.get("chat_template") {
        None | Some(Json::Null) => Ok(vec![]),
        Some(text @ Json::String(_)) => Ok(vec![source(DEFAULT, text)?]),
        Some(Json::Object(named)) => named.iter().map(|(name, text)| source(name, text)).collect(),
        Some(Json::Array(list)) => {
            let entry = |entry: &Json| match (entry["name"].as_str(), entry.get("template")) {
                (Some(name), Some(text)) => source(name, text),
                _ => Err(wrong(path, "an entry without name and template")),
            };
            list.iter().map(entry).collect()
        }
        Some(_) => Err(wrong(path, "what is no template")),
    }
}

fn wrong(path: &Path, what: &str) -> Error {
    let message = format!(
        "chat_template holds {what}: it should be a text, a list of objects with name and template, or an object from names to \
         texts; or give a template with --chat-template"
    );
    Error::file(path, message)
}

/// The text of a template. A byte order mark is a part of it, as transformers reads it.
fn read(path: &Path) -> Result<String, Error> {
    input::read_marked_text(path).map_err(|e| Error::read(path, e))
}
