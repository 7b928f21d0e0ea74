//! A model's chat template: renders messages as text, like `apply_chat_template` of Hugging Face transformers.

use std::io;
use std::ops::Range;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use minijinja::{Environment, ErrorKind, Value};

use super::Message;
use super::jinja::{self, GENERATION};
use crate::panics;

/// Maximum size of a template's source in bytes; the longest published templates have about 20 KiB.
const MAX_SOURCE: usize = 64 << 10;
/// A rendering may have at most [`BASE_OUTPUT`] bytes plus `MAX_GROWTH` times the bytes of its messages.
const MAX_GROWTH: usize = 16;
const BASE_OUTPUT: usize = 1 << 20;
/// Limits of the trial renderings; no usable template comes near them.
const TRIAL_TIME: Duration = Duration::from_secs(10);
const TRIAL_MEMORY: u64 = 512 << 20;

/// Why a template cannot be compiled, or cannot render some messages.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// The source is too long or has a syntax error.
    #[error("the chat template does not compile: {0}")]
    Source(String),
    /// The template raised an exception, or failed on these messages.
    #[error("the chat template failed: {0}")]
    Render(String),
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
}

/// A compiled chat template and the special tokens it can refer to.
pub struct ChatTemplate {
    env: Environment<'static>,
    digest: blake3::Hash,
    marks_generation: bool,
    /// Special tokens by variable name: `bos_token`, `eos_token`, ...
    tokens: Vec<(String, Value)>,
}

const NAME: &str = "chat_template";

impl ChatTemplate {
    /// Compiles a template. `tokens`: its variables for special tokens, by name.
    ///
    /// # Errors
    /// A source that is too long or does not compile.
    pub fn new(source: &str, tokens: impl IntoIterator<Item = (String, Value)>) -> Result<Self, TemplateError> {
        if source.len() > MAX_SOURCE {
            return Err(TemplateError::Source(format!("it has {} bytes, more than {MAX_SOURCE}", source.len())));
        }
        let digest = blake3::hash(source.as_bytes());
        let (source, marks_generation) = jinja::to_minijinja(source);
        let mut env = jinja::environment();
        env.add_template_owned(NAME, source).map_err(|e| TemplateError::Source(error_text(&e)))?;
        Ok(Self { env, digest, marks_generation, tokens: tokens.into_iter().collect() })
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
        if self.marks_generation && messages.iter().any(|m| m.content.contains(GENERATION)) {
            return Err(TemplateError::Render(
                "a message holds the noncharacter U+10FFFE or U+10FFFF; remove it".into(),
            ));
        }
        let variables = [
            (
                "messages",
                messages.iter().map(|m| Value::from_pairs([("role", &m.role), ("content", &m.content)])).collect(),
            ),
            ("add_generation_prompt", Value::from(add_generation_prompt)),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
        ];
        let variables = variables.into_iter().map(|(name, value)| (name.to_owned(), value));
        let context = Value::from_pairs(self.tokens.iter().cloned().chain(variables));
        let bytes: usize = messages.iter().map(|m| m.content.len() + m.role.len()).sum();
        let limit = bytes.saturating_mul(MAX_GROWTH).saturating_add(BASE_OUTPUT);
        let mut output = LimitedOutput { bytes: Vec::new(), limit, exceeded: false };
        // minijinja panics on some templates (seen in 3.0.5: `[::-1]` of an empty list).
        let result = panics::catch_expected(|| {
            let template = self.env.get_template(NAME)?;
            template.render_captured_to(context, &mut output).map(drop)
        });
        let Some(result) = result else { return Err(TemplateError::Render("it crashed the template engine".into())) };
        if output.exceeded {
            return Err(TemplateError::Bounds(format!(
                "it wrote more than {limit} bytes for {bytes} bytes of messages"
            )));
        }
        result.map_err(|e| match e.kind() {
            ErrorKind::OutOfFuel => TemplateError::Bounds("it took too many steps; does it loop without end?".into()),
            _ => TemplateError::Render(error_text(&e)),
        })?;
        let text = String::from_utf8(output.bytes).map_err(|e| TemplateError::Render(e.to_string()))?;
        Ok(if self.marks_generation { strip_generation_marks(&text) } else { Rendered { text, generated: vec![] } })
    }

    /// Renders short conversations of common shapes on a thread of their own, to find a template that takes unbounded
    /// time or memory before any data are read. (The limit on steps does not find all of them: doubling a string takes
    /// few steps.) A template that raises an exception for a shape passes.
    ///
    /// # Errors
    /// The limit that was exceeded. The thread cannot be stopped and keeps rendering: the process should exit soon.
    pub fn check_limits(self: &Arc<Self>) -> Result<(), TemplateError> {
        let turn = |role: &str| Message::new(role, "It is 7 o'clock.");
        let conversations =
            [vec!["user"], vec!["system", "user"], vec!["system", "user", "assistant", "user", "assistant"]];
        let (done, outcome) = mpsc::channel();
        let template = Arc::clone(self);
        thread::spawn(move || {
            let outcome = conversations.iter().try_for_each(|roles| {
                let messages: Vec<_> = roles.iter().map(|r| turn(r)).collect();
                [false, true].into_iter().try_for_each(|add_generation_prompt| {
                    match template.render(&messages, add_generation_prompt) {
                        Err(e @ TemplateError::Bounds(_)) => Err(e),
                        _ => Ok(()),
                    }
                })
            });
            // The receiver is gone if a limit was exceeded.
            let _ = done.send(outcome);
        });
        let (start, before) = (Instant::now(), anonymous_bytes());
        loop {
            match outcome.recv_timeout(Duration::from_millis(2)) {
                Ok(outcome) => return outcome,
                Err(mpsc::RecvTimeoutError::Disconnected) => unreachable!("rendering catches panics"),
                Err(mpsc::RecvTimeoutError::Timeout) => {}
            }
            if start.elapsed() > TRIAL_TIME {
                return Err(TemplateError::Bounds(format!("a short conversation took more than {TRIAL_TIME:?}")));
            }
            // Checked only after the first timeout: most templates have finished by then.
            if anonymous_bytes() > before + TRIAL_MEMORY {
                return Err(TemplateError::Bounds("a short conversation took more than 512 MiB of memory".into()));
            }
        }
    }
}

/// Resident memory of this process without mapped files, in bytes; 0 where /proc does not exist.
fn anonymous_bytes() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: Vec<u64> = pages.split(' ').map_while(|n| n.trim().parse().ok()).collect();
    match pages[..] {
        [_, resident, shared, ..] => resident.saturating_sub(shared) * 4096,
        _ => 0,
    }
}

/// The message of a minijinja error and its line in the template.
fn error_text(error: &minijinja::Error) -> String {
    let message = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    error.line().map_or(message.clone(), |line| format!("{message} (line {line} of the template)"))
}

/// Removes the marks of `{% generation %}` blocks from a rendering and records the byte ranges of the outermost blocks.
fn strip_generation_marks(marked: &str) -> Rendered {
    let mut out = Rendered { text: String::with_capacity(marked.len()), generated: vec![] };
    let (mut depth, mut start) = (0_usize, 0);
    for piece in marked.split_inclusive(GENERATION) {
        let mark = piece.chars().next_back().filter(|c| GENERATION.contains(c));
        out.text.push_str(&piece[..piece.len() - mark.map_or(0, char::len_utf8)]);
        match mark {
            Some(c) if c == GENERATION[0] => {
                if depth == 0 {
                    start = out.text.len();
                }
                depth += 1;
            }
            Some(_) => {
                depth = depth.saturating_sub(1);
                if depth == 0 {
                    out.generated.push(start..out.text.len());
                }
            }
            None => {}
        }
    }
    out
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
        let long = ChatTemplate::new(&"x".repeat(MAX_SOURCE + 1), []).err().unwrap();
        assert!(long.to_string().contains("65537 bytes"));
    }

    #[test]
    fn a_panic_of_the_engine_is_an_error() {
        // A backward slice of an empty list, whose result is indexed: see `push_with_reverse` in jinja.rs.
        let crashed = TemplateError::Render("it crashed the template engine".into());
        assert_eq!(render("{{ messages[9:][::-1][0] }}"), Err(crashed));
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
    fn the_trial_rendering_finds_a_string_that_doubles() {
        let doubling = "{% set ns = namespace(x='a') %}{% for i in range(30) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x[:1] }}";
        assert!(matches!(template(doubling).check_limits(), Err(TemplateError::Bounds(_))));
        assert_eq!(template("{{ messages[5].x.y }}").check_limits(), Ok(()));
        assert_eq!(template("{{ raise_exception('never') }}").check_limits(), Ok(()));
    }

    #[test]
    fn generation_marks_become_byte_ranges() {
        let template =
            template("{% for m in messages %}é{% generation %}{{ m.content }}.{% endgeneration %}{% endfor %}");
        let rendered =
            template.render(&[Message::new("assistant", "ü"), Message::new("assistant", "b")], false).unwrap();
        assert_eq!(rendered, Rendered { text: "éü.éb.".into(), generated: vec![2..5, 7..9] });
        let bad = template.render(&[Message::new("assistant", "\u{10ffff}")], false).unwrap_err();
        assert!(bad.to_string().contains("U+10FFFF"));
    }
}
