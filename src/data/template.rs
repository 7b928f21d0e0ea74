//! A model's chat template: renders messages as text, like `apply_chat_template` of Hugging Face transformers.

mod contents;
mod trial;

use std::collections::HashSet;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use minijinja::{Environment, ErrorKind, Value};
use serde_json::{Map, Value as Json};

use super::Message;
use super::deep;
use super::jinja::{self, GENERATION, Names};
use super::message::{Form, map_bytes};
use super::printed_numbers::printed_otherwise;
pub(super) use super::turn_object::{Access, Reads};
use super::turn_object::{Turn, Variables, template_value};
use crate::panics;

/// Maximum size of a template's source in bytes; the longest published templates have about 20 KiB.
const MAX_SOURCE: usize = 64 << 10;
/// A rendering may have at most [`BASE_OUTPUT`] bytes plus `MAX_GROWTH` times the bytes of its messages.
const MAX_GROWTH: usize = 16;
const BASE_OUTPUT: usize = 1 << 20;
/// Why a template cannot be compiled, or cannot render some messages.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// The source is too long or has a syntax error.
    #[error("the chat template does not compile: {0}")]
    Source(String),
    /// The source is blank.
    #[error("the chat template is empty: fetch or write it anew, or give another one with --chat-template")]
    Empty,
    /// The template raised an exception, or failed on these messages.
    #[error("the chat template failed: {0}")]
    Render(String),
    /// The template leaves the content of turns out.
    #[error(
        "the chat template of {file} renders a turn of the role {role} with the content {content:?} as {text}, without its content: it \
         is no chat template, or reads another field; fetch or write it anew, or give another one with --chat-template"
    )]
    Content {
        /// The turn's role.
        role: &'static str,
        /// Its content.
        content: &'static str,
        /// The template's file.
        file: String,
        /// What a conversation with that turn is rendered as, quoted.
        text: String,
    },
    /// The template engine panicked.
    #[error("the chat template failed: it crashed the template engine")]
    Crashed,
    /// The template exceeded a limit on steps, output, time or memory.
    #[error("the chat template was stopped: {0}")]
    Bounds(String),
}

/// Messages rendered as text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// The rendered text.
    pub text: String,
    /// Byte ranges of `text` that the template marks with `{% generation %}`, ascending.
    pub generated: Vec<Range<usize>>,
    /// What the template read.
    pub(super) access: Access,
}

/// A compiled chat template and the special tokens it can refer to.
pub struct ChatTemplate {
    env: Environment<'static>,
    digest: blake3::Hash,
    marks_generation: bool,
    /// Special tokens by variable name: `bos_token`, `eos_token`, ...
    tokens: Vec<(String, Value)>,
    /// Names of the variables that the template reads.
    variables: HashSet<String>,
    names: Names,
    /// The file that holds it.
    file: PathBuf,
    /// See [`ChatTemplate::takes_parts`].
    takes_parts: OnceLock<bool>,
    /// See [`ChatTemplate::writes_text`].
    writes_text: OnceLock<bool>,
    /// Whether it writes replies, in one form or the other.
    writes_replies: OnceLock<Result<(), TemplateError>>,
}

const NAME: &str = "chat_template";

/// Whether a row with these variables has tools.
pub(super) fn has_tools(variables: &Map<String, Json>) -> bool {
    variables.get("tools").is_some_and(|tools| !tools.is_null())
}

impl ChatTemplate {
    /// Compiles a template. `tokens`: its variables for special tokens, by name.
    ///
    /// # Errors
    /// A source that is blank or too long, or does not compile.
    pub fn new(source: &str, tokens: impl IntoIterator<Item = (String, Value)>) -> Result<Self, TemplateError> {
        if source.trim().is_empty() {
            return Err(TemplateError::Empty);
        }
        if source.len() > MAX_SOURCE {
            return Err(TemplateError::Source(format!("it has {} bytes, more than {MAX_SOURCE}", source.len())));
        }
        let digest = blake3::hash(source.as_bytes());
        let names = Names::of(source);
        let (source, marks_generation) = jinja::to_minijinja(source);
        jinja::check(&source).map_err(TemplateError::Source)?;
        let compile = || {
            let mut env = jinja::environment();
            let compiled = env.add_template_owned(NAME, source);
            compiled.map_err(|e| TemplateError::Source(error_text(&e)))?;
            let mut variables = env.get_template(NAME).expect("added above").undeclared_variables(false);
            // minijinja takes the variable as set before it is read.
            variables.extend(names.read_and_set().map(str::to_owned));
            Ok((env, variables))
        };
        let compiled = deep::run(|| panics::catch_expected(compile)).map_err(TemplateError::Source)?;
        let (env, variables) = compiled.ok_or(TemplateError::Crashed)??;
        let tokens = tokens.into_iter().collect();
        Ok(Self {
            env,
            digest,
            marks_generation,
            tokens,
            variables,
            names,
            file: PathBuf::new(),
            takes_parts: OnceLock::new(),
            writes_text: OnceLock::new(),
            writes_replies: OnceLock::new(),
        })
    }

    /// The template with the name of its file, for messages.
    #[must_use]
    pub fn of_file(self, file: &Path) -> Self {
        Self { file: file.into(), ..self }
    }

    /// The file that holds it.
    pub(super) fn file(&self) -> &Path {
        &self.file
    }

    /// Whether the template reads this variable somewhere.
    pub fn reads_variable(&self, name: &str) -> bool {
        self.variables.contains(name)
    }

    /// A variable that the template reads and that is none of these.
    pub fn unknown_variable(&self, known: &[&str]) -> Option<&str> {
        let mut unknown: Vec<&str> = self.variables.iter().map(String::as_str).collect();
        unknown.retain(|name| !known.contains(name) && !self.is_function(name));
        unknown.into_iter().min()
    }

    /// Whether this name is a function of the template engine.
    pub(super) fn is_function(&self, name: &str) -> bool {
        self.env.globals().any(|(global, _)| global == name)
    }

    /// Whether the template uses a field of this name, so that it decides itself in which turns it writes it.
    pub(super) fn names_field(&self, name: &str) -> bool {
        self.names.has_field(name)
    }

    /// The blake3 hash of the source.
    pub fn digest(&self) -> blake3::Hash {
        self.digest
    }

    /// Whether the template marks assistant text with `{% generation %}`.
    pub fn marks_generation(&self) -> bool {
        self.marks_generation
    }

    /// Renders messages; with `add_generation_prompt`, the text ends with the beginning of an assistant turn.
    ///
    /// # Errors
    /// The exception that the template raised, or the limit that it exceeded.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<Rendered, TemplateError> {
        self.render_with(messages, &Map::new(), add_generation_prompt)
    }

    /// [`Self::render`] with further variables, such as `tools`.
    ///
    /// # Errors
    /// As [`Self::render`]; a content of several parts, for a template that takes only text.
    pub fn render_with(
        &self,
        messages: &[Message],
        variables: &Map<String, Json>,
        add_generation_prompt: bool,
    ) -> Result<Rendered, TemplateError> {
        let noncharacter = |m: &Message| {
            m.content.contains(GENERATION)
                || (!m.fields.is_empty() && m.fields.values().any(|v| v.to_string().contains(GENERATION)))
        };
        let in_variables = || variables.values().any(|v| v.to_string().contains(GENERATION));
        if self.marks_generation && (messages.iter().any(noncharacter) || in_variables()) {
            return Err(TemplateError::Render(
                "a message holds the noncharacter U+10FFFE or U+10FFFF; remove it".into(),
            ));
        }
        let turns: Vec<_> = messages
            .iter()
            .enumerate()
            .map(|(i, m)| match &m.form {
                Form::Parts(parts) if parts.len() > 1 && !self.takes_parts() => Err(TemplateError::Render(format!(
                    "the content of message {} has {} parts, and the template takes only text: join them into one string",
                    i + 1,
                    parts.len()
                ))),
                Form::Parts(_) => Ok(Turn::new(m, self.takes_parts())),
                _ => Ok(Turn::new(m, false)),
            })
            .collect::<Result<_, _>>()?;
        let bytes = messages.iter().map(Message::bytes).sum::<usize>() + map_bytes(variables);
        let (text, access) = self.render_turns(&turns, variables, add_generation_prompt, bytes)?;
        if let Some((rust, python)) = printed_otherwise(&text, messages, variables) {
            return Err(TemplateError::Render(format!(
                "it writes the number {python} as {rust}, by `~` or a format string, unlike Python: write the number as a string, or \
                 give a template that prints it by {{{{ }}}} or tojson"
            )));
        }
        let (text, generated) = if self.marks_generation { strip_generation_marks(&text) } else { (text, Vec::new()) };
        Ok(Rendered { text, generated, access })
    }

    /// The text with the marks of generation blocks, and what was read. `bytes`: those of all inputs.
    fn render_turns(
        &self,
        turns: &[Arc<Turn>],
        variables: &Map<String, Json>,
        add_generation_prompt: bool,
        bytes: usize,
    ) -> Result<(String, Access), TemplateError> {
        let limit = bytes.saturating_mul(MAX_GROWTH).saturating_add(BASE_OUTPUT);
        let mut output = LimitedOutput { bytes: Vec::new(), limit, exceeded: false };
        // Values may be deep, and are dropped and printed recursively. minijinja panics on some templates (seen in 3.0.5:
        // `[::-1]` of an empty list).
        let render = || {
            let messages: Value = turns.iter().map(|turn| Value::from_dyn_object(turn.clone())).collect();
            let own = [("tools", Value::from(())), ("documents", Value::from(()))].map(|(k, v)| (k.to_owned(), v));
            let given = variables.iter().map(|(name, value)| (name.clone(), template_value(value)));
            let last = [("messages", messages), ("add_generation_prompt", Value::from(add_generation_prompt))];
            let last = last.map(|(k, v)| (k.to_owned(), v));
            let context = Variables::new(self.tokens.iter().cloned().chain(own).chain(given).chain(last));
            let template = self.env.get_template(NAME).map_err(|e| render_error(&e))?;
            // The error is dropped here, too: it may hold the values of the template.
            let rendered = template.render_captured_to(Value::from_dyn_object(context.clone()), &mut output).map(drop);
            rendered.map(|()| context.read()).map_err(|e| render_error(&e))
        };
        let result = deep::run(|| panics::catch_expected(render)).map_err(TemplateError::Bounds)?;
        let Some(result) = result else { return Err(TemplateError::Crashed) };
        if output.exceeded {
            return Err(TemplateError::Bounds(format!(
                "it wrote more than {limit} bytes for {bytes} bytes of messages"
            )));
        }
        let variables = result?;
        let text = String::from_utf8(output.bytes).map_err(|e| TemplateError::Render(e.to_string()))?;
        Ok((text, Access { turns: turns.iter().map(|turn| turn.reads()).collect(), variables }))
    }
}

/// The message of a minijinja error and its line in the template.
fn error_text(error: &minijinja::Error) -> String {
    let message = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    // In the words of templates; the library names states of its own.
    let message = match &*message {
        "undefined value" => "it reads a field of what is not there".to_owned(),
        "recursion limit exceeded" => "its macros call each other too deep".to_owned(),
        "template exceeds maximum recursion limits" => "it is nested too deep".to_owned(),
        end if end.starts_with("unexpected end of input") => {
            "it ends where more should stand: a tag is open, or its {% endif %}, {% endfor %} or the like is missing"
                .to_owned()
        }
        _ => message,
    };
    error.line().map_or(message.clone(), |line| format!("{message} (line {line} of the template)"))
}

/// The error of a rendering.
fn render_error(error: &minijinja::Error) -> TemplateError {
    match error.kind() {
        ErrorKind::OutOfFuel => {
            let steps = "it took too many steps; does it loop without end?";
            TemplateError::Bounds(error.detail().unwrap_or(steps).to_owned())
        }
        _ => TemplateError::Render(error_text(error)),
    }
}

/// Removes the marks of `{% generation %}` blocks from a rendering and records the byte ranges of the outermost blocks.
fn strip_generation_marks(marked: &str) -> (String, Vec<Range<usize>>) {
    let (mut text, mut generated) = (String::with_capacity(marked.len()), Vec::new());
    let (mut depth, mut start) = (0_usize, 0);
    for piece in marked.split_inclusive(GENERATION) {
        let mark = piece.chars().next_back().filter(|c| GENERATION.contains(c));
        text.push_str(&piece[..piece.len() - mark.map_or(0, char::len_utf8)]);
        match mark {
            Some(c) if c == GENERATION[0] => {
                if depth == 0 {
                    start = text.len();
                }
                depth += 1;
            }
            Some(_) => {
                depth = depth.saturating_sub(1);
                if depth == 0 {
                    generated.push(start..text.len());
                }
            }
            None => {}
        }
    }
    (text, generated)
}

/// A writer into memory that fails beyond `limit` bytes.
struct LimitedOutput {
    bytes: Vec<u8>,
    limit: usize,
    /// Whether a write was refused.
    exceeded: bool,
}

impl io::Write for LimitedOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > self.limit {
            self.exceeded = true;
            return Err(io::Error::other("the rendering is too long"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    fn template(source: &str) -> Arc<ChatTemplate> {
        Arc::new(ChatTemplate::new(source, [("bos_token".to_owned(), Value::from("<s>"))]).unwrap())
    }

    fn render(source: &str) -> Result<String, TemplateError> {
        template(source).render(&[Message::new("user", "hi")], true).map(|r| r.text)
    }

    #[test]
    fn variables_of_a_template() {
        let source =
            "{{ bos_token }}{{ eos_token }}|{{ messages[0] | tojson }}|{{ tools }}|{{ add_generation_prompt }}";
        assert_eq!(render(source).unwrap(), r#"<s>|{"role": "user", "content": "hi"}|None|True"#);
    }

    #[test]
    fn errors_name_the_template_and_its_line() {
        let refused = render("\n{{ raise_exception('no users') }}").unwrap_err();
        assert_eq!(refused, TemplateError::Render("no users (line 2 of the template)".into()));
        let broken = ChatTemplate::new("{% if %}", []).err().unwrap();
        assert!(matches!(&broken, TemplateError::Source(e) if e.contains("line 1")), "{broken}");
        for (source, says) in [
            ("{% for m in messages %}", "it ends where more should stand"),
            ("{{ messages.x.y }}", "it reads a field of what is not there (line 1 of the template)"),
            ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "its macros call each other too deep"),
        ] {
            let compiled = ChatTemplate::new(source, []);
            let error = compiled.and_then(|t| Arc::new(t).render(&[Message::new("user", "hi")], true)).err().unwrap();
            assert!(error.to_string().contains(says), "{error}");
        }
        let long = ChatTemplate::new(&"x".repeat(MAX_SOURCE + 1), []).err().unwrap();
        assert!(long.to_string().contains("65537 bytes"));
    }

    #[test]
    fn a_panic_of_the_engine_is_an_error() {
        assert_eq!(render("{{ '%(é)s' | format(1) }}"), Err(TemplateError::Crashed));
    }

    #[test]
    fn unbounded_loops_strings_and_widths_are_stopped() {
        let start = Instant::now();
        for source in [
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "{% for a in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
            "{{ 'a' * 90000000 }}",
            "{{ 'a' * 900000000000 }}",
            "{{ '{:>2000000000}'.format('a') }}",
            "{{ '{:>{}}'.format('a', 2000000000) }}",
            "{{ '{:>{w}}'.format('a', w=2000000000) }}",
            "{{ '%2000000000d' | format(1) }}",
            "{{ '%*d' | format(2000000000, 1) }}",
            "{{ ('a' * 9000) | replace('a', 'a' * 9000) }}",
            "{{ ('a' * 9000).replace('a', 'a' * 9000) }}",
            "{{ ('a' * 90000).join(range(9000) | map('string')) }}",
            "{{ range(9000) | join('a' * 90000) }}",
            "{{ ('a\n' * 9000) | indent(2000000000) }}",
            "{% set ns = namespace(x=['aaaaaaaa']) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson }}",
            "{% set ns = namespace(x=['aaaaaaaa']) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
        ] {
            let error = render(source).unwrap_err();
            assert!(!matches!(error, TemplateError::Source(_)), "{source}: {error}");
        }
        // All together take a second or two; without limits, one of them would take minutes or all memory.
        assert!(start.elapsed() < Duration::from_secs(60), "{:?}", start.elapsed());
    }

    #[test]
    fn deep_templates_and_deep_values_do_not_exhaust_a_stack() {
        // Refused by the limits on tags.
        for source in [format!("{{{{ {}1 }}}}", "-".repeat(20_000)), format!("{{{{ a{} }}}}", ".b".repeat(20_000))] {
            let error = ChatTemplate::new(&source, []).err().unwrap();
            assert!(error.to_string().contains("tokens"), "{error}");
        }
        // Not seen by these limits: to them, the quotation mark in the raw block begins a string.
        let hidden = format!("{{% raw %}}{{{{ ' {{% endraw %}}{{{{ {}1 }}}}", "-".repeat(65_000));
        drop(ChatTemplate::new(&hidden, []));
        // As deep as the limits allow.
        for (open, unit, close, n) in [
            ("{{ ", "-", "1 }}", 2900),
            ("{{ ", "not ", "1 }}", 2900),
            ("{{ a", " + a", " }}", 1400),
            ("{{ a", ".b", " }}", 1400),
            ("{{ a", "|upper", " }}", 1400),
            ("{{ a", "()", " }}", 1400),
            ("{{ 1", "**1", " }}", 900),
            ("{% if a %}", "{% elif a %}", "{% endif %}", 1000),
            ("{{ ", "(", "1", 2900),
            ("", "{% if a %}", "", 3000),
        ] {
            drop(ChatTemplate::new(&format!("{open}{}{close}", unit.repeat(n)), []));
        }
        // Values as deep as the steps of a rendering allow, dropped, printed and compared.
        for (grow, end) in [
            ("[ns.x]", ""),
            ("{'a': ns.x}", "{{ ns.x }}"),
            ("[ns.x]", "{{ ns.x == ns.x }}{{ ns.x | string | length }}"),
            ("(ns.x,)", "{{ ns.x | tojson }}"),
        ] {
            for rounds in [99_999, 20_000] {
                drop(render(&format!(
                    "{{% set ns = namespace(x=[1]) %}}{{% for i in range({rounds}) %}}{{% for j in range(9) %}}{{% set ns.x = {grow} %}}\
                     {{% endfor %}}{{% endfor %}}{end}"
                )));
            }
        }
    }

    #[test]
    fn generation_marks_become_byte_ranges() {
        let template =
            template("{% for m in messages %}é{% generation %}{{ m.content }}.{% endgeneration %}{% endfor %}");
        let rendered =
            template.render(&[Message::new("assistant", "ü"), Message::new("assistant", "b")], false).unwrap();
        assert_eq!((rendered.text.as_str(), rendered.generated), ("éü.éb.", vec![2..5, 7..9]));
        let bad = template.render(&[Message::new("assistant", "\u{10ffff}")], false).unwrap_err();
        assert!(bad.to_string().contains("U+10FFFF"));
    }
}
