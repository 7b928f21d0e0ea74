//! The loss mask: which bytes of a rendered conversation, and from them which tokens, carry loss.
//!
//! If the template marks assistant text with `{% generation %}`, the marks in the turns that carry loss decide. Where some turns
//! carry none, the marks are told apart by what they hold, not by their number alone: a turn may have several marks, or none.
//! Without marks in the template, `turn_spans.rs` finds the turns in the text.

use std::ops::Range;

use serde_json::{Map, Value};

use super::Message;
use super::template::{Access, ChatTemplate, Rendered};
use super::turn_spans::{Conversation, FOLLOWED, MaskError};

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
    let Rendered { text, generated, access } = template.render_with(messages, variables, false)?;
    let carries_loss = |m: &Message| m.loss != Some(false);
    let conversation = Conversation::new(template, messages, variables, &text);
    let assistant = || conversation.assistant_turns();
    let turns = || -> Result<Vec<Range<usize>>, MaskError> {
        let mut spans: Vec<Range<usize>> = Vec::new();
        for (i, _) in assistant().filter(|(_, m)| carries_loss(m)) {
            let span = conversation.span(i)?;
            if spans.last().is_some_and(|before| before.end > span.start) {
                return Err(MaskError::Prefix { turn: i + 1, when: FOLLOWED });
            }
            spans.push(span);
        }
        Ok(spans)
    };
    if !template.marks_generation() {
        let spans = turns()?;
        return Ok(MaskedText { text, spans, access });
    }
    let (marks, count) = (generated.len(), assistant().count());
    let uncertain = MaskError::Marks { marks, turns: count };
    let spans: Vec<_> = if assistant().all(|(_, m)| carries_loss(m)) {
        generated
    } else if !assistant().any(|(_, m)| carries_loss(m)) {
        Vec::new()
    } else if conversation.one_generation_each(&generated) {
        generated.into_iter().zip(assistant()).filter(|(_, (_, m))| carries_loss(m)).map(|(span, _)| span).collect()
    } else {
        // Several marks in one turn, or none: those in the turns that carry loss.
        let turns = match turns() {
            Ok(turns) => turns,
            Err(MaskError::Prefix { .. } | MaskError::Reply { .. }) => return Err(uncertain),
            Err(e) => return Err(e),
        };
        let within = |mark: &Range<usize>| turns.iter().any(|turn| turn.start <= mark.start && mark.end <= turn.end);
        let touches = |mark: &Range<usize>| turns.iter().any(|turn| turn.start < mark.end && mark.start < turn.end);
        if generated.iter().any(|mark| touches(mark) && !within(mark)) {
            return Err(uncertain);
        }
        generated.into_iter().filter(within).collect()
    };
    if spans.is_empty() && assistant().any(|(_, m)| carries_loss(m)) {
        return Err(uncertain);
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
    use super::super::turn_spans::PROMPTED;
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
        spans(source, &messages)
    }

    fn spans(source: &str, messages: &[Message]) -> Result<Vec<String>, MaskError> {
        let masked = render_with_mask(&ChatTemplate::new(source, []).unwrap(), messages, &Map::new())?;
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
        // Two marks in a turn, and marks in the last turn only.
        let twice = MARKED.replace("{{ m.content }}</s>", "{{ m.content }}{% endgeneration %}-{% generation %}</s>");
        assert_eq!(mask(&twice, &turns).unwrap(), ["a", "</s>", "b", "</s>"]);
        assert_eq!(mask(&twice, &without_first).unwrap(), ["b", "</s>"]);
        let last = MARKED.replace("m.role == 'assistant'", "m.role == 'assistant' and loop.last");
        assert_eq!(mask(&last, &without_first).unwrap(), ["b</s>"]);
        without_first[3].2 = Some(false);
        assert_eq!(mask(&twice, &without_first).unwrap(), [""; 0]);
        without_first[1].2 = None;
        assert!(matches!(
            mask(&last, &without_first).unwrap_err(),
            MaskError::Marks { marks: 1, turns: 2 } | MaskError::Prefix { .. }
        ));
    }

    #[test]
    fn marks_belong_to_the_turns_that_hold_them() {
        let turn = |content: &str, loss: Option<bool>, fields: serde_json::Value| Message {
            loss,
            fields: fields.as_object().cloned().unwrap(),
            ..Message::new("assistant", content)
        };
        let thoughts = "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% if m.reasoning_content %}{% generation %}\
                        {{ m.reasoning_content }}{% endgeneration %}|{% endif %}{% if m.content %}{% generation %}{{ m.content }}\
                        {% endgeneration %}{% endif %}{% for c in m.tool_calls or [] %}({% generation %}{{ c.name }}{% endgeneration %})\
                        {% endfor %}</s>{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>\
                        {% endif %}";
        let user = || Message::new("user", "q");
        let call = serde_json::json!({"tool_calls": [{"name": "f"}]});
        for first in
            [turn("bad", Some(false), serde_json::json!({"reasoning_content": "why"})), turn("bad", Some(false), call)]
        {
            // As many marks as turns: two in the first turn, none in the second.
            let none = || turn("", None, serde_json::json!({}));
            let mut row = vec![user(), first, user(), none(), user(), turn("good", None, serde_json::json!({}))];
            assert_eq!(spans(thoughts, &row).unwrap(), ["good"]);
            row[1].loss = None;
            row[5].loss = Some(false);
            assert_eq!(spans(thoughts, &row).unwrap().len(), 2);
            // Where turns cannot be found either.
            let forgets = format!("{{{{ messages | length }}}}{thoughts}");
            let error = spans(&forgets, &row).unwrap_err();
            assert_eq!(error, MaskError::Marks { marks: 3, turns: 3 });
            assert!(error.to_string().contains("--chat-template"), "{error}");
        }
        // One mark in each turn, in a template that renders a prefix otherwise, or whose marks hold the header.
        let rows =
            [("user", "q", None), ("assistant", " a ", Some(false)), ("user", "r", None), ("assistant", "", None)];
        let counts = format!("{{{{ messages | length }}}}{MARKED}");
        assert_eq!(mask(&counts, &rows).unwrap(), ["</s>"]);
        let trims = counts.replace("{{ m.content }}</s>", "{{ m.content | trim }}</s>");
        assert_eq!(mask(&trims, &rows).unwrap(), ["</s>"]);
        let header = MARKED
            .replace(
                "<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}",
                "\
            {% if m.role == 'assistant' %}{% generation %}<assistant>",
            )
            .replace("{% else %}", "{% else %}<{{ m.role }}>");
        assert_eq!(mask(&header, &rows).unwrap(), ["<assistant></s>"]);
        // Two marks, of which one holds the header.
        let twice = header.replace("</s>", "{% endgeneration %}{% generation %}</s>");
        let rows = [rows[0], rows[1], rows[2], ("assistant", "b", None)];
        assert_eq!(mask(&twice, &rows).unwrap_err(), MaskError::Marks { marks: 4, turns: 2 });
    }

    #[test]
    fn a_template_without_the_prefix_property_is_refused() {
        let turns = [("user", "q", None), ("assistant", "a", None), ("user", "r", None), ("assistant", "b", None)];
        let forgets =
            "{% for m in messages %}{% if loop.index0 > messages | length - 3 %}{{ m.content }}{% endif %}{% endfor %}";
        assert_eq!(mask(forgets, &turns).unwrap_err(), MaskError::Prefix { turn: 2, when: FOLLOWED });
        let differs =
            "{% for m in messages %}<{{ m.content }}>{% endfor %}{% if add_generation_prompt %}<think>{% endif %}";
        let error = mask(differs, &turns[..2]).unwrap_err();
        assert_eq!(error, MaskError::Reply { turn: 2, joined: false });
        let text = error.to_string();
        assert!(
            text.contains("--chat-template") && text.contains("remove the thoughts") && !text.contains("loss"),
            "{text}"
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

    /// Writes an empty think block into the last turn, calls, and a trimmed content.
    const LAST: &str = "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% if loop.last %}<think></think>{% endif %}\
                        {{ m.content | trim }}{% for c in m.tool_calls or [] %}({{ c.name }} {{ c.x }}){% endfor %}</s>\n{% else %}\
                        {{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";

    #[test]
    fn a_turn_is_found_where_the_template_writes_more_into_the_last_one() {
        let turns = [("user", "q", None), ("assistant", " a ", None), ("user", "r", None), ("assistant", "", None)];
        assert_eq!(mask(LAST, &turns[..2]).unwrap(), ["<think></think>a</s>\n"]);
        assert_eq!(mask(LAST, &turns).unwrap(), ["a</s>\n", "<think></think></s>\n"]);
        // Two in a row, of which the prompt of the second has the first as its last turn.
        let doubled = [&turns[..2], &turns[1..]].concat();
        assert_eq!(mask(LAST, &doubled).unwrap(), ["a</s>\n", "a</s>\n", "<think></think></s>\n"]);
        assert_eq!(mask(LAST, &doubled[..3]).unwrap(), ["a</s>\n", "<think></think>a</s>\n"]);
        // A template that joins them, and one whose generation prompt is not in the text.
        let joins = LAST.replace("</s>\n", "{% if loop.last or loop.nextitem.role != 'assistant' %}</s>\n{% endif %}");
        assert_eq!(mask(&joins, &doubled).unwrap_err(), MaskError::Prefix { turn: 2, when: FOLLOWED });
        let thinks = LAST.replace("%}<assistant>{%", "%}<assistant><think>\n{%");
        assert_eq!(mask(&thinks, &doubled[..3]).unwrap_err(), MaskError::Reply { turn: 3, joined: true });
        // A template that writes no content beside calls.
        let calls = LAST.replace("{{ m.content | trim }}", "{{ m.content | trim if not m.tool_calls }}");
        let mut messages = vec![Message::new("user", "q"), Message::new("assistant", "x"), Message::new("user", "r")];
        messages[1]
            .fields
            .insert("tool_calls".into(), serde_json::json!([{"name": "f", "x": 1}, {"name": "g", "x": 2}]));
        messages.push(Message::new("assistant", "y"));
        let masked = render_with_mask(&ChatTemplate::new(&calls, []).unwrap(), &messages, &Map::new()).unwrap();
        let spans: Vec<_> = masked.spans.into_iter().map(|span| &masked.text[span]).collect();
        assert_eq!(spans, ["(f 1)(g 2)</s>\n", "<think></think>y</s>\n"]);
    }

    #[test]
    fn a_generation_prompt_that_nobody_asked_for_carries_no_loss() {
        let always = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}<assistant>";
        let template = ChatTemplate::new(always, [("bos_token".into(), "<s>".into())]).unwrap();
        let turns = [("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")];
        for turns in [&turns[..2], &turns[..]] {
            let messages: Vec<_> = turns.iter().map(|(role, content)| Message::new(*role, *content)).collect();
            let masked = render_with_mask(&template, &messages, &Map::new()).unwrap();
            let spans: Vec<_> = masked.spans.iter().map(|span| &masked.text[span.clone()]).collect();
            assert_eq!(spans, ["a</s>", "b</s>"][..turns.len() / 2], "{}", masked.text);
        }
    }

    #[test]
    fn what_follows_the_last_turn_belongs_to_none_of_the_others() {
        let turns = [("user", "q", None), ("assistant", "a", None), ("user", "r", None), ("assistant", "b", None)];
        let ends = PLAIN.replace(
            "{% endif %}{% endfor %}{% if",
            "{% endif %}{% endfor %}{% if not add_generation_prompt %}<eos>{% endif %}{% if",
        );
        assert_ne!(ends, PLAIN);
        for head in ["", "{{ bos_token }}"] {
            let template = ChatTemplate::new(&format!("{head}{ends}"), [("bos_token".into(), "<s>".into())]).unwrap();
            let messages: Vec<_> = turns.iter().map(|(r, c, _)| Message::new(*r, *c)).collect();
            let masked = render_with_mask(&template, &messages, &Map::new()).unwrap();
            let spans: Vec<_> = masked.spans.iter().map(|span| &masked.text[span.clone()]).collect();
            assert_eq!(spans, ["a</s>\n", "b</s>\n<eos>"], "{}", masked.text);
        }
        // Another text for no turns than after the last one.
        let other = ends.replace("<eos>", "<{{ messages | length }}>");
        assert_eq!(mask(&other, &turns).unwrap_err(), MaskError::Prefix { turn: 2, when: FOLLOWED });
    }

    #[test]
    fn a_greeting_is_found_where_the_template_reads_the_first_turn() {
        let turns = [("assistant", "hello", None), ("user", "q", None), ("assistant", "a", None)];
        let system = "{% if messages[0].role != 'system' %}<system>help</s>\n{% endif %}";
        let think = "<assistant>\n<think></think>{% endif %}";
        for (template, last) in [
            (PLAIN.to_owned(), "a</s>\n"),
            (format!("{system}{PLAIN}"), "a</s>\n"),
            (format!("{}{PLAIN}", system.replace("messages[0].role", "(messages | first).role")), "a</s>\n"),
            // Of no turns it renders another text.
            (format!("{{% if messages %}}{system}{{% endif %}}{PLAIN}"), "a</s>\n"),
            // Written into the last turn only, and into the generation prompt.
            (
                format!("{system}{}", LAST.replace("<assistant>{% endif %}", think).replace("}}>{%", "}}>\n{%")),
                "a</s>\n",
            ),
        ] {
            let want = ["hello</s>\n".to_owned(), last.to_owned()];
            assert_eq!(mask(&template, &turns).unwrap(), want, "{template}");
        }
        // Thoughts before the content, and another header than the generation prompt.
        for (from, to) in [("{{ m.content }}", "<think>{{ m.content }}"), ("<{{ m.role }}>", "<{{ m.role | upper }}>")]
        {
            let template = format!("{system}{}", PLAIN.replace(from, to));
            assert_eq!(mask(&template, &turns[..2]).unwrap_err().to_string().split(':').next(), Some("message 1"));
        }
    }

    /// Writes thoughts, or an empty think block, only into turns after the last request.
    const LAST_THOUGHTS: &str = "{% set ns = namespace(request=0) %}{% for m in messages %}{% if m.role == 'user' %}\
                                 {% set ns.request = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}<{{ m.role }}>\
                                 {% if m.role == 'assistant' %}{% if loop.index0 > ns.request and (loop.last or m.thinking) %}\
                                 <think>{{ m.thinking }}</think>{% endif %}{{ m.content }}{% for c in m.tool_calls or [] %}({{ c.name }})\
                                 {% endfor %}{% else %}{{ m.content }}{% endif %}</s>\n{% endfor %}{% if add_generation_prompt %}\
                                 <assistant>{% if quick %}<think></think>{% endif %}{% endif %}";

    #[test]
    fn a_turn_is_found_after_turns_whose_thoughts_are_left_out() {
        let call = serde_json::json!([{"name": "f"}]);
        let mut step = Message::new("assistant", "");
        step.fields.insert("tool_calls".into(), call);
        step.fields.insert("thinking".into(), "why".into());
        let turn = |role: &str, content: &str| Message::new(role, content);
        let answer = || turn("tool", "42 ");
        let row = vec![
            turn("user", "q"),
            step.clone(),
            answer(),
            step.clone(),
            answer(),
            turn("assistant", "it is 42"),
            turn("user", "r"),
            step,
            answer(),
            turn("assistant", "a"),
        ];
        let want =
            ["(f)</s>\n", "(f)</s>\n", "it is 42</s>\n", "<think>why</think>(f)</s>\n", "<think></think>a</s>\n"];
        assert_eq!(spans(LAST_THOUGHTS, &row).unwrap(), want);
        // The generation prompt goes on with what is only in the last turn.
        let quick = |template: &str, row: &[Message]| -> Result<Vec<String>, MaskError> {
            let variables = serde_json::json!({"quick": true}).as_object().cloned().unwrap();
            let masked = render_with_mask(&ChatTemplate::new(template, []).unwrap(), row, &variables)?;
            Ok(masked.spans.into_iter().map(|s| masked.text[s].to_owned()).collect())
        };
        let short = [&row[..7], &row[9..]].concat();
        assert_eq!(quick(LAST_THOUGHTS, &short).unwrap(), [&want[..3], &["a</s>\n"]].concat());
        assert_eq!(quick(LAST_THOUGHTS, &row).unwrap_err(), MaskError::Prefix { turn: 8, when: PROMPTED });
        // The reply with thoughts that the generation prompt rules out.
        assert_eq!(quick(LAST_THOUGHTS, &row[..2]).unwrap_err(), MaskError::Reply { turn: 2, joined: false });
        for (from, to) in [
            // Another text before the first turn, another end of the turn before, or another header.
            ("{% for m in messages %}<{{ m.role }}>", "{{ messages | length }}{% for m in messages %}<{{ m.role }}>"),
            ("</s>\n", "{% if m.role == 'tool' and loop.last %}</t>{% else %}</s>{% endif %}\n"),
            ("<{{ m.role }}>", "<{{ m.role }}{{ '!' if loop.index0 < ns.request }}>"),
        ] {
            let source = LAST_THOUGHTS.replace(from, to);
            assert_ne!(source, LAST_THOUGHTS);
            let error = spans(&source, &row).unwrap_err();
            assert!(matches!(error, MaskError::Prefix { turn: 2 | 4, .. }), "{to}: {error}");
        }
    }

    #[test]
    fn a_turn_that_cannot_be_found_for_certain_is_refused() {
        let turns = [("user", "q", None), ("assistant", "a", None), ("user", "r", None), ("assistant", "b", None)];
        for (from, to) in [
            // Another end, another content, or another text before the turn, once others follow.
            ("</s>\n", "{% if loop.last %}</s>{% else %}</t>{% endif %}\n"),
            ("{{ m.content | trim }}", "{{ m.content | trim if loop.last else m.content | upper ~ '!' }}"),
            ("{{ m.content | trim }}", "{{ m.content ~ m.content }}"),
            ("{% for m in messages %}<", "{{ messages | length }}{% for m in messages %}<"),
            ("{% for m in messages %}<", "{{ messages[1].content if messages | length > 1 }}{% for m in messages %}<"),
            // The text after the turn depends on the turn.
            (
                "{{ m.content }}{% endif %}",
                "{{ m.content }}{{ messages[1].content | length if loop.index == 3 }}{% endif %}",
            ),
        ] {
            let source = LAST.replace(from, to);
            assert_ne!(source, LAST);
            let error = mask(&source, &turns).unwrap_err();
            assert!(matches!(error, MaskError::Prefix { turn: 2, .. }), "{to}: {error}");
        }
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
        fn turns_of_any_text_are_found_where_the_last_one_has_more(texts in prop::collection::vec("[a<>/s\u{f8ff}\u{f8fe} \n]{0,9}", 1..7)) {
            let roles = ["user", "assistant"];
            let mut turns: Vec<_> = texts.iter().enumerate().map(|(i, t)| (roles[i % 2], t.as_str(), None)).collect();
            if turns.len() % 2 == 1 {
                turns.push(("assistant", "end", None));
            }
            let mut want: Vec<_> = turns.iter().skip(1).step_by(2).map(|turn| format!("{}</s>\n", turn.1.trim())).collect();
            if let Some(last) = want.last_mut() {
                last.insert_str(0, "<think></think>");
            }
            prop_assert_eq!(mask(LAST, &turns).unwrap(), want);
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
