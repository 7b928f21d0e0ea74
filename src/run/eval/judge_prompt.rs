//! How a judge is asked about an answer, and how its text is read: in a published form, through the judge's own chat template; or as
//! a file of the user says.

use std::path::Path;
use std::sync::Arc;

use regex::Regex;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::pattern;
use crate::config::TemplateKwargs;
use crate::data::{ChatTemplate, ChatTokenizer, Message, TemplateError};
use crate::exit::{self, Failure, Result};
use crate::input;
use crate::judge::{Assessment, JudgeForm, Safety};

/// How a judge is asked and read.
pub enum Asking {
    /// In a published form: the conversation is rendered by the judge's chat template, with these variables, which writes the
    /// question.
    Published(JudgeForm, Map<String, Value>),
    /// By a template file.
    Template(Box<JudgeTemplate>),
}

/// The file of `--judge-template`.
pub struct JudgeTemplate {
    /// Makes the text of the judge's user turn.
    prompt: Arc<ChatTemplate>,
    patterns: Patterns,
    /// Variables of the judge's chat template.
    kwargs: Map<String, Value>,
    digest: blake3::Hash,
}

/// The keys of the file, in messages.
const KEYS: &str = "prompt, verdicts, refusal, categories and chat_template_kwargs";

/// The keys of the file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    prompt: String,
    verdicts: VerdictPatterns,
    #[serde(default)]
    refusal: Option<RefusalPatterns>,
    #[serde(default)]
    categories: Option<String>,
    #[serde(default)]
    chat_template_kwargs: TemplateKwargs,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct VerdictPatterns {
    #[serde(rename = "unsafe")]
    unsafe_: String,
    safe: String,
    #[serde(default)]
    controversial: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RefusalPatterns {
    yes: String,
    no: String,
}

/// The compiled patterns.
struct Patterns {
    safety: Vec<(Safety, Regex)>,
    refusal: Option<[Regex; 2]>,
    categories: Option<Regex>,
}

impl JudgeTemplate {
    /// Reads a template file.
    ///
    /// # Errors
    /// A file that cannot be read, is not YAML of these keys, or has a template or a pattern that does not compile.
    pub fn read(path: &Path) -> Result<Self> {
        let failed = |code, what: String| Failure::new(code, format!("{}: {what}", path.display()));
        let text = input::read_text(path).map_err(|e| failed(exit::NO_INPUT, format!("cannot be read: {e}")))?;
        let invalid = |what: String| failed(exit::DATA, what);
        let file: File = serde_saphyr::from_str(&text).map_err(|e| {
            let line = e.location().map_or(0, |location| location.line());
            let problem = input::yaml_words(&e);
            let message = format!("{}:{line}: {problem}; a template file has the keys {KEYS}", path.display());
            Failure::new(exit::DATA, message)
        })?;
        // It is no chat template of a model.
        let template = |e: TemplateError| {
            invalid(format!("prompt: {}", e.to_string().replace("the chat template", "the template")))
        };
        let prompt = Arc::new(ChatTemplate::new(&file.prompt, []).map_err(template)?);
        prompt.check_limits().map_err(template)?;
        let pattern = |key: &str, source: &str| pattern(source).map_err(|e| invalid(format!("{key}: {e}")));
        let mut safety = vec![
            (Safety::Unsafe, pattern("verdicts.unsafe", &file.verdicts.unsafe_)?),
            (Safety::Safe, pattern("verdicts.safe", &file.verdicts.safe)?),
        ];
        if let Some(source) = &file.verdicts.controversial {
            safety.push((Safety::Controversial, pattern("verdicts.controversial", source)?));
        }
        let refusal = match &file.refusal {
            None => None,
            Some(RefusalPatterns { yes, no }) => Some([pattern("refusal.yes", yes)?, pattern("refusal.no", no)?]),
        };
        let categories = file.categories.as_deref().map(|source| pattern("categories", source)).transpose()?;
        let patterns = Patterns { safety, refusal, categories };
        if let Some(name) = prompt.unknown_variable(&["prompt", "response", "messages", "add_generation_prompt"]) {
            return Err(invalid(format!("prompt: reads {name}; there are prompt, response and messages")));
        }
        patterns.check().map_err(|problem| invalid(format!("verdicts: {problem}")))?;
        let asked = |response: &str| ask(&prompt, &[Message::new("user", "a question")], response);
        if asked("an answer").map_err(template)? == asked("").map_err(template)? {
            return Err(invalid("prompt: does not depend on the answer: it should contain {{ response }}".into()));
        }
        let TemplateKwargs(kwargs) = file.chat_template_kwargs;
        Ok(Self { prompt, patterns, kwargs, digest: blake3::hash(text.as_bytes()) })
    }
}

impl Patterns {
    /// That each verdict can be given, and can be missing.
    fn check(&self) -> Result<(), String> {
        for (i, (_, pattern)) in self.safety.iter().enumerate() {
            if ["", "\u{1}"].iter().all(|text| pattern.is_match(text)) {
                return Err(format!("the pattern {:?} matches every text", pattern.as_str()));
            }
            if self.safety[..i].iter().any(|(_, other)| other.as_str() == pattern.as_str()) {
                return Err(format!("the pattern {:?} stands for two verdicts", pattern.as_str()));
            }
        }
        Ok(())
    }

    /// The verdict whose pattern matches; `None` if no pattern or patterns of several verdicts match.
    fn parse(&self, text: &str) -> Option<Assessment> {
        let mut found = self.safety.iter().filter(|(_, pattern)| pattern.is_match(text)).map(|(safety, _)| *safety);
        let (safety, None) = (found.next()?, found.next()) else { return None };
        let refusal = match &self.refusal {
            None => None,
            Some([yes, no]) => match (yes.is_match(text), no.is_match(text)) {
                (true, false) => Some(true),
                (false, true) => Some(false),
                _ => return None,
            },
        };
        // The first group of the pattern, or the whole match.
        let category = |found: regex::Captures<'_>| {
            let part = found.get(1).or_else(|| found.get(0));
            part.map(|part| part.as_str().to_owned())
        };
        let categories = self.categories.iter().flat_map(|pattern| pattern.captures_iter(text).filter_map(category));
        Some(Assessment { safety, categories: categories.collect(), refusal })
    }
}

/// The text of the judge's user turn about an answer.
fn ask(template: &ChatTemplate, messages: &[Message], response: &str) -> Result<String, TemplateError> {
    let last = messages.iter().rfind(|turn| turn.role == "user").map_or("", |turn| &turn.content);
    let variables: Map<String, Value> = [("prompt", last), ("response", response)]
        .map(|(name, text)| (name.to_owned(), text.into()))
        .into_iter()
        .collect();
    Ok(template.render_with(messages, &variables, false)?.text)
}

impl Asking {
    /// Whether its verdicts can say `controversial`.
    pub fn knows_controversial(&self) -> bool {
        match self {
            Self::Published(form, _) => *form == JudgeForm::Qwen3guard,
            Self::Template(file) => file.patterns.safety.iter().any(|(safety, _)| *safety == Safety::Controversial),
        }
    }

    /// Its name in `eval.json`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Published(JudgeForm::Qwen3guard, _) => "qwen3guard",
            Self::Published(JudgeForm::LlamaGuard, _) => "llama-guard",
            Self::Template(_) => "template",
        }
    }

    /// A hash of all that makes the prompt: the judge's chat template and its variables, or the template file.
    pub fn digest(&self, judge: &ChatTokenizer) -> blake3::Hash {
        match self {
            Self::Published(_, kwargs) if kwargs.is_empty() => judge.template_digest(),
            Self::Published(_, kwargs) => {
                let mut hasher = blake3::Hasher::new();
                hasher.update(judge.template_digest().as_bytes()).update(json!(kwargs).to_string().as_bytes());
                hasher.finalize()
            }
            Self::Template(file) => {
                let mut hasher = blake3::Hasher::new();
                hasher.update(judge.template_digest().as_bytes()).update(file.digest.as_bytes());
                hasher.finalize()
            }
        }
    }

    /// The judge's prompt about an answer, as text.
    ///
    /// # Errors
    /// What a template says against this conversation.
    pub fn prompt(&self, judge: &ChatTokenizer, messages: &[Message], response: &str) -> Result<String, String> {
        match self {
            Self::Published(form, kwargs) => {
                // The published templates know user and assistant turns only.
                let turns = messages.iter().filter(|turn| turn.role == "user" || turn.role == "assistant").cloned();
                let turns: Vec<Message> = turns.chain([Message::new("assistant", response)]).collect();
                judge.render_with(&turns, kwargs, form.adds_generation_prompt()).map_err(|e| e.to_string())
            }
            Self::Template(file) => {
                let text = ask(&file.prompt, messages, response).map_err(|e| e.to_string())?;
                judge.render_with(&[Message::new("user", text)], &file.kwargs, true).map_err(|e| e.to_string())
            }
        }
    }

    /// A variable for the judge's chat template that this one does not read.
    pub fn unread_variable(&self, judge: &ChatTokenizer) -> Option<&str> {
        let kwargs = match self {
            Self::Published(_, kwargs) => kwargs,
            Self::Template(file) => &file.kwargs,
        };
        kwargs.keys().map(String::as_str).find(|name| !judge.reads_variable(name))
    }

    /// The verdict in the judge's text.
    pub fn parse(&self, text: &str) -> Option<Assessment> {
        match self {
            Self::Published(form, _) => form.parse(text),
            Self::Template(file) => file.patterns.parse(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(text: &str) -> Result<JudgeTemplate> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("judge.yaml");
        std::fs::write(&path, text).unwrap();
        JudgeTemplate::read(&path)
    }

    #[test]
    fn a_template_file_makes_prompts_and_reads_verdicts() {
        let file = template(
            "prompt: |\n  Q: {{ prompt }} A: {{ response }} of {{ messages | length }}\n\
             verdicts: {unsafe: '(?m)^BAD', safe: '(?m)^GOOD'}\n\
             refusal: {yes: 'refuses', no: 'complies'}\ncategories: 'C(\\d+)'\n",
        )
        .unwrap();
        let messages = [Message::new("user", "Hi"), Message::new("assistant", "Yes?"), Message::new("user", "Tell me")];
        let variables = [("prompt", "Tell me"), ("response", "No.")];
        let variables: Map<String, Value> =
            variables.into_iter().map(|(name, text)| (name.to_owned(), text.into())).collect();
        let rendered = file.prompt.render_with(&messages, &variables, false).unwrap().text;
        assert_eq!(rendered.trim(), "Q: Tell me A: No. of 3");
        let parse = |text: &str| file.patterns.parse(text);
        let found = parse("so:\nBAD, complies, C1 and C22").unwrap();
        assert_eq!((found.safety, found.refusal), (Safety::Unsafe, Some(false)));
        assert_eq!(found.categories, ["1", "22"]);
        assert_eq!(parse("GOOD refuses").unwrap().safety, Safety::Safe);
        for neither in ["", "bad refuses", "GOOD", "GOOD\nBAD refuses", "GOOD refuses and complies"] {
            assert_eq!(parse(neither), None, "{neither:?}");
        }
    }

    fn judge_with(template: &str) -> ChatTokenizer {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("judge.jinja");
        std::fs::write(&path, template).unwrap();
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/dense_qwen3/model");
        ChatTokenizer::open(&model, Some(&path)).unwrap()
    }

    #[test]
    fn published_judges_are_asked_as_their_authors_do() {
        let judge = judge_with(
            "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}{% for c in excluded or [] %} without {{ c }}:{% endfor %} Your verdict:\
             {% if add_generation_prompt %}<assistant>{% endif %}",
        );
        let messages = [Message::new("system", "Be good"), Message::new("user", "Hi")];
        let asking = |form, without: &str| {
            let kwargs: TemplateKwargs = without.parse().unwrap();
            Asking::Published(form, kwargs.0)
        };
        let prompt = |form, without| asking(form, without).prompt(&judge, &messages, "Ho").unwrap();
        assert_eq!(prompt(JudgeForm::Qwen3guard, "{}"), "user: Hi;assistant: Ho; Your verdict:");
        assert_eq!(prompt(JudgeForm::LlamaGuard, "{}"), "user: Hi;assistant: Ho; Your verdict:<assistant>");
        let without = r#"{"excluded": ["S14"]}"#;
        assert_eq!(prompt(JudgeForm::Qwen3guard, without), "user: Hi;assistant: Ho; without S14: Your verdict:");
        let digest = |without| asking(JudgeForm::Qwen3guard, without).digest(&judge);
        assert!(digest("{}") == judge.template_digest() && digest("{}") != digest(without));
        assert_eq!(asking(JudgeForm::Qwen3guard, r#"{"exclude": 1}"#).unread_variable(&judge), Some("exclude"));
    }

    #[test]
    fn variables_of_the_template_file_reach_the_judges_template() {
        let judge = judge_with(
            "{{ messages[0].content }}{% if add_generation_prompt %}|{% if enable_thinking is false %}no {% endif %}thought{% endif %}",
        );
        let asking = |more: &str| {
            let text = format!("prompt: '{{{{ response }}}}'\nverdicts: {{unsafe: a, safe: b}}\n{more}");
            Asking::Template(Box::new(template(&text).unwrap()))
        };
        let of = |asking: &Asking| asking.prompt(&judge, &[Message::new("user", "Hi")], "Ho").unwrap();
        let plain = asking("");
        assert_eq!((of(&plain), plain.unread_variable(&judge)), ("Ho|thought".into(), None));
        let quiet = asking("chat_template_kwargs: {enable_thinking: false}");
        assert_eq!((of(&quiet), quiet.unread_variable(&judge)), ("Ho|no thought".into(), None));
        let wrong = asking("chat_template_kwargs: {enable_thinking: false, thinking: {budget: 0}}");
        assert_eq!(wrong.unread_variable(&judge), Some("thinking"));
    }

    #[test]
    fn a_wrong_template_file_is_named_with_its_fault() {
        let verdicts = "verdicts: {unsafe: a, safe: b}";
        for (text, said) in [
            ("prompt: x", "verdicts"),
            (&format!("prompt: '{{% if %}}'\n{verdicts}"), "prompt: "),
            (&format!("prompt: x\n{verdicts}\nverdict: y"), "judge.yaml:3: "),
            (
                "prompt: x\nverdicts: {unsafe: '(', safe: b}",
                "verdicts.unsafe: the pattern \"(\" does not compile: unclosed group",
            ),
            (
                &format!("prompt: '{{{{ response }}}}'\n{verdicts}\nchat_template_kwargs: {{messages: 1}}"),
                "judge.yaml:3: the rows decide messages",
            ),
            (&format!("prompt: x\n{verdicts}\ncategories: '['"), "categories"),
            (&format!("prompt: '{{{{ prompt }}}}'\n{verdicts}"), "does not depend on the answer"),
            (
                &format!("prompt: '{{{{ promt }}}} {{{{ response }}}}'\n{verdicts}"),
                "prompt: reads promt; there are prompt, response and messages",
            ),
            ("prompt: '{{ response }}'\nverdicts: {unsafe: a, safe: ''}", "the pattern \"\" matches every text"),
            ("prompt: '{{ response }}'\nverdicts: {unsafe: a, safe: a}", "the pattern \"a\" stands for two verdicts"),
        ] {
            let error = template(text).map(drop).unwrap_err();
            assert_eq!(error.code(), exit::DATA, "{error}");
            let text = error.to_string();
            assert!(text.contains("judge.yaml:") && text.contains(said), "{error}: {said}");
            assert!(!text.contains("line 3") && text.lines().count() == 1, "the place once: {error}");
        }
    }
}
