//! The loss mask: which bytes of a rendered conversation, and from them which tokens, carry loss.
//!
//! If the template marks assistant text with `{% generation %}`, the marks decide. Else the span of an assistant turn
//! begins after the generation prompt and ends where the next turn would begin, so it includes the end-of-turn token
//! and what the template writes after that token. The span is found by rendering prefixes of the conversation:
//!
//! ```text
//! render(turns before the turn, with generation prompt)  is a prefix of
//! render(turns up to and including the turn)             is a prefix of
//! render(all turns)
//! ```
//!
//! A template that breaks this rule renders a turn differently once others follow. Its mask would be a guess, so the
//! conversation is refused.

use std::ops::Range;

use serde_json::{Map, Value};

use super::Message;
use super::template::{Access, ChatTemplate, TemplateError};

/// Why the loss mask of a conversation cannot be determined.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum MaskError {
    #[error(transparent)]
    Template(#[from] TemplateError),
    #[error("message {turn}: {source}")]
    Turn { turn: usize, source: TemplateError },
    #[error(
        "message {turn}: the chat template renders it differently when {when}, so its tokens cannot be found; give \
         --chat-template FILE with a template that marks them with {{% generation %}}, or exclude the turn from the loss \
         with \"loss\": false"
    )]
    Prefix { turn: usize, when: &'static str },
    #[error("the chat template marks {marks} generations in a conversation with {turns} assistant turns")]
    Marks { marks: usize, turns: usize },
}

/// A rendered conversation and the byte ranges of its text that carry loss, ascending.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct MaskedText {
    pub text: String,
    pub spans: Vec<Range<usize>>,
    /// What the template read.
    pub access: Access,
}

/// Renders a conversation with these variables, and finds the spans of its assistant turns, except those with `loss: false`.
pub(super) fn render_with_mask(
    template: &ChatTemplate,
    messages: &[Message],
    variables: &Map<String, Value>,
) -> Result<MaskedText, MaskError> {
    let whole = template.render_with(messages, variables, false)?;
    let assistant = || messages.iter().enumerate().filter(|(_, m)| m.is_assistant());
    let carries_loss = |m: &Message| m.loss != Some(false);
    if template.marks_generation() {
        let (marks, turns) = (whole.generated.len(), assistant().count());
        let all_carry_loss = assistant().all(|(_, m)| carries_loss(m));
        // Marks must correspond to turns one to one only if some turns are excluded.
        if (marks == 0 && turns > 0) || (marks != turns && !all_carry_loss) {
            return Err(MaskError::Marks { marks, turns });
        }
        let spans = if all_carry_loss {
            whole.generated
        } else {
            let spans = whole.generated.into_iter().zip(assistant());
            spans.filter(|(_, (_, m))| carries_loss(m)).map(|(span, _)| span).collect()
        };
        return Ok(MaskedText { text: whole.text, spans, access: whole.access });
    }
    let (text, access) = (whole.text, whole.access);
    let mut spans = Vec::new();
    for (i, _) in assistant().filter(|(_, m)| carries_loss(m)) {
        let turn = i + 1;
        let render = |turns: usize, add_generation_prompt: bool| {
            template
                .render_with(&messages[..turns], variables, add_generation_prompt)
                .map(|r| r.text)
                .map_err(|source| MaskError::Turn { turn, source })
        };
        let before = render(i, true)?;
        let after = if turn == messages.len() { text.clone() } else { render(turn, false)? };
        if !after.starts_with(&before) {
            return Err(MaskError::Prefix { turn, when: "the conversation ends with its generation prompt" });
        }
        if !text.starts_with(&after) {
            return Err(MaskError::Prefix { turn, when: "further messages follow" });
        }
        spans.push(before.len()..after.len());
    }
    Ok(MaskedText { text, spans, access })
}

/// The loss mask of tokens with byte ranges `offsets`, for `spans` of bytes that carry loss; both ascending.
///
/// A token that straddles the edge of a span carries loss, so that every character of the reply is trained;
/// transformers decides the same for its generation masks. A token with an empty byte range carries loss if the byte
/// after it does. The first token of a sequence never carries loss, because no token precedes it.
pub(super) fn token_mask(offsets: &[(usize, usize)], spans: &[Range<usize>]) -> Vec<bool> {
    let mut spans = spans.iter().peekable();
    let carries = |(i, (start, end)): (usize, &(usize, usize))| {
        while spans.next_if(|s| s.end <= *start).is_some() {}
        // The next span ends after the token's first byte.
        i > 0 && spans.peek().is_some_and(|s| s.start < *end || (start == end && s.start <= *start))
    };
    offsets.iter().enumerate().map(carries).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PLAIN: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}</s>\n{% endif %}\
                         {% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";
    const MARKED: &str = "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>\
                          {% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}\
                          <assistant>{% endif %}";

    fn mask(source: &str, turns: &[(&str, &str, Option<bool>)]) -> Result<Vec<String>, MaskError> {
        let messages: Vec<_> =
            turns.iter().map(|(r, c, loss)| Message { loss: *loss, ..Message::new(*r, *c) }).collect();
        let masked = render_with_mask(&ChatTemplate::new(source, []).unwrap(), &messages, &Map::new())?;
        Ok(masked.spans.into_iter().map(|s| masked.text[s].to_owned()).collect())
    }

    #[test]
    fn replies_and_end_of_turn_tokens_carry_loss() {
        let turns = [("user", "q", None), ("assistant", "a", None), ("user", "r", None), ("assistant", "b", None)];
        assert_eq!(mask(PLAIN, &turns).unwrap(), ["a</s>\n", "b</s>\n"]);
        assert_eq!(mask(MARKED, &turns).unwrap(), ["a</s>", "b</s>"]);
        let mut without_first = turns;
        without_first[1].2 = Some(false);
        assert_eq!(mask(PLAIN, &without_first).unwrap(), ["b</s>\n"]);
        assert_eq!(mask(MARKED, &without_first).unwrap(), ["b</s>"]);
    }

    #[test]
    fn a_template_without_the_prefix_property_is_refused() {
        let turns = [("user", "q", None), ("assistant", "a", None), ("user", "r", None), ("assistant", "b", None)];
        let forgets =
            "{% for m in messages %}{% if loop.index0 > messages | length - 3 %}{{ m.content }}{% endif %}{% endfor %}";
        assert_eq!(mask(forgets, &turns).unwrap_err(), MaskError::Prefix { turn: 2, when: "further messages follow" });
        let differs =
            "{% for m in messages %}<{{ m.content }}>{% endfor %}{% if add_generation_prompt %}<think>{% endif %}";
        let error = mask(differs, &turns[..2]).unwrap_err();
        assert!(
            matches!(error, MaskError::Prefix { turn: 2, .. }) && error.to_string().contains("--chat-template"),
            "{error}"
        );
        let marks_none = format!("{{% if false %}}{{% generation %}}{{% endgeneration %}}{{% endif %}}{PLAIN}");
        assert_eq!(mask(&marks_none, &turns).unwrap_err(), MaskError::Marks { marks: 0, turns: 2 });
        let fails =
            format!("{{{{ messages[0].content[0] ~ raise_exception('no') if messages | length == 1 }}}}{PLAIN}");
        assert_eq!(
            mask(&fails, &turns).unwrap_err().to_string(),
            "message 2: the chat template failed: no (line 1 of the template)"
        );
    }

    #[test]
    fn tokens_at_the_edges_of_spans() {
        let offsets = [(0, 2), (2, 5), (5, 5), (5, 6), (6, 8), (8, 8), (8, 9)];
        let tokens = |spans: &[(usize, usize)]| {
            let spans: Vec<_> = spans.iter().map(|(start, end)| *start..*end).collect();
            let mask = token_mask(&offsets, &spans);
            (0..offsets.len()).filter(|i| mask[*i]).collect::<Vec<_>>()
        };
        assert_eq!(tokens(&[(5, 8)]), [2, 3, 4]);
        assert_eq!(tokens(&[(4, 7)]), [1, 2, 3, 4]);
        assert_eq!(tokens(&[(6, 6)]), [0_usize; 0]);
        assert_eq!(tokens(&[(0, 9)]), [1, 2, 3, 4, 5, 6]);
        assert_eq!(tokens(&[(2, 5), (8, 9)]), [1, 5, 6]);
        assert_eq!(tokens(&[]), [0_usize; 0]);
    }

    proptest! {
        #[test]
        fn a_mask_is_as_long_as_its_tokens_and_covers_its_spans(
            lengths in prop::collection::vec(0_usize..4, 0..30),
            cuts in prop::collection::btree_set(0_usize..60, 0..8),
        ) {
            let mut offsets = vec![];
            let mut at = 0;
            for n in lengths {
                offsets.push((at, at + n));
                at += n;
            }
            let cuts: Vec<_> = cuts.into_iter().collect();
            let spans: Vec<_> = cuts.chunks_exact(2).map(|c| c[0]..c[1]).collect();
            let mask = token_mask(&offsets, &spans);
            prop_assert_eq!(mask.len(), offsets.len());
            for (i, (start, end)) in offsets.into_iter().enumerate() {
                let wanted = if start == end {
                    spans.iter().any(|s| s.contains(&start))
                } else {
                    (start..end).any(|byte| spans.iter().any(|s| s.contains(&byte)))
                };
                prop_assert_eq!(mask[i], wanted && i > 0, "token {} {}..{}", i, start, end);
            }
        }

        #[test]
        fn the_prefix_rule_holds_for_any_text(texts in prop::collection::vec(".{0,12}", 1..7)) {
            let roles = ["user", "assistant"];
            let turns: Vec<_> = texts.iter().enumerate().map(|(i, t)| (roles[i % 2], t.as_str(), None)).collect();
            let want: Vec<_> = texts.iter().skip(1).step_by(2).map(|t| format!("{t}</s>\n")).collect();
            prop_assert_eq!(mask(PLAIN, &turns).unwrap(), want);
        }
    }
}
