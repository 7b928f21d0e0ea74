//! Whether a template writes the contents of turns, and in which forms: tried out on a short conversation.

use serde_json::{Map, Value as Json};

use super::{ChatTemplate, TemplateError, has_tools};
use crate::data::Message;
use crate::data::message::Form;
use crate::data::turn_object::Turn;
use crate::quote::quote;

/// A conversation whose contents are looked for. Nothing in them has to be escaped.
const TURNS: [(&str, &str); 2] = [
    ("user", "It is seven in the evening, and the lamps are lit."),
    ("assistant", "The kettle is warm, and the tea is ready."),
];

impl ChatTemplate {
    /// Whether the template writes the texts of a content that is a list of parts.
    pub(super) fn takes_parts(&self) -> bool {
        *self.takes_parts.get_or_init(|| {
            const TEXT: &str = "seven";
            let parts = Message { form: Form::Parts(vec![TEXT.into()]), ..Message::new("user", TEXT) };
            self.render_turns(&[Turn::new(&parts, true)], &Map::new(), false, TEXT.len())
                .is_ok_and(|(text, _)| text.contains(TEXT) && !text.contains("type"))
        })
    }

    /// Checks that the template writes the content of a user's turn, be it a text or a list of parts, whatever becomes of its white space
    /// and of its letters' case. One that raises an exception for such a turn passes.
    ///
    /// # Errors
    /// A content that is left out.
    pub fn check_content(&self) -> Result<(), TemplateError> {
        if self.writes_text() { Ok(()) } else { self.check_last_content(&TURNS[..1]) }
    }

    /// Checks the same of what a conversation holds: of texts, where the template writes parts only, and of replies. Not every template
    /// has to write replies: one for prompts alone need not. Of rows with tools nothing is known: a template may be for them alone.
    ///
    /// # Errors
    /// A content that is left out.
    pub(in crate::data) fn check_contents(
        &self,
        messages: &[Message],
        variables: &Map<String, Json>,
    ) -> Result<(), TemplateError> {
        if has_tools(variables) {
            return Ok(());
        }
        let is_text = |m: &Message| m.form == Form::Text && !m.content.is_empty();
        if let Some(i) = messages.iter().position(is_text).filter(|_| !self.writes_text()) {
            return Err(TemplateError::Render(format!(
                "the content of message {} is a string, and the template writes only lists of parts: write it as [{{\"type\": \"text\", \
                 \"text\": ...}}]",
                i + 1
            )));
        }
        match messages.iter().any(Message::is_assistant) {
            true => self.writes_replies.get_or_init(|| self.check_last_content(&TURNS)).clone(),
            false => Ok(()),
        }
    }

    /// Whether the template writes a user's content that is a string.
    fn writes_text(&self) -> bool {
        *self.writes_text.get_or_init(|| self.left_out(&TURNS[..1], false).is_none())
    }

    fn check_last_content(&self, turns: &[(&'static str, &'static str)]) -> Result<(), TemplateError> {
        let (role, content) = turns[turns.len() - 1];
        match self.left_out(turns, false) {
            Some(text) if !self.takes_parts() || self.left_out(turns, true).is_some() => {
                let file = self.file.display().to_string();
                Err(TemplateError::Content { role, content, file, text: quote(&text) })
            }
            _ => Ok(()),
        }
    }

    /// What this conversation is rendered as, if the content of its last turn is not in it.
    fn left_out(&self, turns: &[(&'static str, &'static str)], as_parts: bool) -> Option<String> {
        let turn = |(role, content): &(&'static str, &'static str)| {
            let form = if as_parts { Form::Parts(vec![(*content).into()]) } else { Form::Text };
            Turn::new(&Message { form, ..Message::new(*role, *content) }, as_parts)
        };
        let bytes = turns.iter().map(|(role, content)| role.len() + content.len()).sum();
        let turned: Vec<_> = turns.iter().map(turn).collect();
        let (text, _) = self.render_turns(&turned, &Map::new(), false, bytes).ok()?;
        let plain = |text: &str| text.split_whitespace().collect::<String>().to_lowercase();
        (!plain(&text).contains(&plain(turns[turns.len() - 1].1))).then_some(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(source: &str) -> ChatTemplate {
        ChatTemplate::new(source, []).unwrap()
    }

    #[test]
    fn a_template_that_leaves_contents_out_is_found() {
        let reply = [Message::new("user", "q"), Message::new("assistant", "a")];
        let parts = |m: &Message| Message { form: Form::Parts(vec![m.content.clone()]), ..m.clone() };
        let parts = [parts(&reply[0]), parts(&reply[1])];
        let role = |checked: Result<(), TemplateError>| match checked {
            Ok(()) => "",
            Err(TemplateError::Content { role, .. }) => role,
            Err(e) => panic!("{e}"),
        };
        let checked = |source: &str, messages: &[Message]| {
            let template = template(source);
            role(template.check_content().and_then(|()| template.check_contents(messages, &Map::new())))
        };
        let turns = |content: &str| format!("{{% for m in messages %}}<{{{{ m.role }}}}>{content}{{% endfor %}}");
        let lines = "{% for word in m.content.split() %}{{ word }}\n{% endfor %}";
        let last = "{% if loop.last %}{{ m.content }}{% endif %}";
        for fine in ["{{ m.content }}", "{{ m['content'] | trim | upper }}", last, lines] {
            assert_eq!(checked(&turns(fine), &reply), "", "{fine}");
        }
        assert_eq!(checked("{{ raise_exception('never') }}", &reply), "");
        for other in ["{{ m.text }}", "{{ m.content[:6] }}", "{% if m.role != 'user' %}{{ m.content }}{% endif %}"] {
            assert_eq!(checked(&turns(other), &reply), "user", "{other}");
        }
        assert_eq!(checked("version https://git-lfs.github.com/spec/v1\noid sha256:1\n", &reply), "user");
        // One for prompts alone.
        let prompts = turns("{% if m.role == 'user' %}{{ m.content }}{% endif %}");
        assert_eq!((checked(&prompts, &reply), checked(&prompts, &reply[..1])), ("assistant", ""));
        // One that writes parts only.
        let source =
            turns("{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}");
        assert_eq!(checked(&source, &parts), "");
        let error = template(&source).check_contents(&reply, &Map::new()).unwrap_err().to_string();
        assert!(error.contains("message 1 is a string, and the template writes only lists of parts"), "{error}");
        // One for rows with tools.
        let tools = Map::from_iter([("tools".to_owned(), serde_json::json!([{}]))]);
        assert_eq!(template(&turns("{% if tools %}{{ m.content }}{% endif %}")).check_contents(&reply, &tools), Ok(()));
    }
}
