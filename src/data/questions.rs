//! Rows that ask what a model still can do: questions with choices, and questions with one right answer.
//!
//! | field | |
//! |---|---|
//! | `messages`, or `question`, or `prompt` | the question: turns, or the text of one user turn |
//! | `choices` | texts, of which one is right |
//! | `answer` | with `choices` the number of the right one (from 0), its letter (`A` is the first) or its text; else the text of the answer |
//! | `id` | names the row; by default its number in the file, from 1 |
//!
//! Fields that all rows can have (`system`, `tools`, `documents`, `chat_template_kwargs`, those of turns) mean what they mean there. Others
//! are counted.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::Path;

use serde_json::{Map, Value};

use super::fields;
use super::kinds::{check_request, last_user_message};
use super::message::Message;
use super::report::named_fields;
use super::rows::{self, Rows};
use super::turns::text_or_messages;
use super::values::{Result, filled, quoted};
use super::{ChatTokenizer, Error, Example};

/// One question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// Unique in its file.
    pub id: String,
    /// Line of the row.
    pub line: usize,
    /// See [`super::Record::request`].
    pub request: String,
    /// Tokens of the rendered prompt, at least one.
    pub prompt: Vec<u32>,
    /// What is asked of the model.
    pub task: Task,
}

/// What is asked of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Task {
    /// Which of these continuations is the most probable.
    Choice {
        /// At least two.
        choices: Vec<Choice>,
        /// The right one.
        answer: usize,
    },
    /// To give this answer.
    Answer(String),
}

/// A continuation of a prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// The prompt with the choice; the tokens of the choice carry loss.
    pub example: Example,
    /// Bytes of the choice's text in UTF-8.
    pub bytes: usize,
}

/// Reads the questions of a file: the first `max_samples` of them (0: all). The text, if there is one, names fields that nothing reads.
/// `variables`: those of the chat template for all rows.
///
/// # Errors
/// A file that cannot be read or holds no row; the first row that is no question, that has a field that would be dropped, that the
/// template cannot render, or that has more than `max_length` tokens.
pub fn read_questions(
    path: &Path,
    tokenizer: &ChatTokenizer,
    variables: &Map<String, Value>,
    max_samples: usize,
    max_length: usize,
) -> std::result::Result<(Vec<Question>, Option<String>), Error> {
    let text = rows::read_text(path)?;
    let mut questions = Vec::new();
    let mut unread = BTreeMap::new();
    let mut ids = HashSet::new();
    for row in Rows::new(path, &text) {
        if max_samples > 0 && questions.len() == max_samples {
            break;
        }
        let (line, row) = row?;
        let failed = |e: String| Error::row(path, line, e);
        fields::refuse_bytes(&row, fields::QUESTION_FIELDS).map_err(failed)?;
        let id = id_of(&row).unwrap_or_else(|| (questions.len() + 1).to_string());
        if !ids.insert(id.clone()) {
            return Err(failed(format!("the id {} is that of another row, too", quoted(&id))));
        }
        let question = question(&row).map_err(failed)?;
        let (prompt, names) = render(tokenizer, &row, &question.turns, variables).map_err(failed)?;
        for name in names {
            unread.entry(name).or_insert((0, line)).0 += 1;
        }
        let task = match question.asked {
            Asked::Answer(answer) => Task::Answer(answer),
            Asked::Choice(choices, answer) => {
                let choices = choices.iter().map(|choice| continuation(tokenizer, &prompt, choice));
                Task::Choice { choices: choices.collect::<std::result::Result<_, _>>()?, answer }
            }
        };
        let prompt = tokenizer.encode(&prompt)?;
        let longest = match &task {
            Task::Answer(_) => prompt.len(),
            Task::Choice { choices, .. } => choices.iter().map(|c| c.example.ids.len()).max().unwrap_or(0),
        };
        if prompt.is_empty() {
            return Err(failed("the chat template renders the question as an empty prompt".into()));
        }
        if longest > max_length {
            return Err(failed(format!(
                "a question of {longest} tokens does not fit into --max-length {max_length}: raise it"
            )));
        }
        if let Task::Choice { choices, .. } = &task
            && let Some(empty) = choices.iter().position(|c| !c.example.loss.contains(&true))
        {
            return Err(failed(format!("choice {} has no token", empty + 1)));
        }
        let request = last_user_message(&question.turns).to_owned();
        questions.push(Question { id, line, request, prompt, task });
    }
    if questions.is_empty() {
        return Err(Error::file(path, "it holds no question: a row has question and answer, and may have choices"));
    }
    let note = (!unread.is_empty()).then(|| {
        let named = named_fields(&unread);
        format!("{}: fields that neither moewarden nor the chat template reads: {named}", path.display())
    });
    Ok((questions, note))
}

/// The prompt of a row, ending with the generation prompt, and the names of its fields that nothing reads. Fields that would be
/// dropped are errors, as in rows of `--dataset-path`.
fn render(
    tokenizer: &ChatTokenizer,
    row: &Map<String, Value>,
    turns: &[Message],
    variables: &Map<String, Value>,
) -> Result<(String, Vec<String>)> {
    fields::refuse_unsupported(row, fields::QUESTION_FIELDS)?;
    let mut of_row = fields::variables(row, &mut BTreeSet::new())?;
    let own: Vec<_> = of_row.keys().filter(|name| !variables.contains_key(*name)).cloned().collect();
    for (name, value) in variables {
        of_row.entry(name).or_insert_with(|| value.clone());
    }
    let template = tokenizer.templates().of_row(&of_row).map_err(|e| e.to_string())?;
    let text = |turns: &[Message], variables: &Map<String, Value>| template.render_with(turns, variables, true);
    let rendered = text(turns, &of_row).map_err(|e| e.to_string())?;
    let mut unread = fields::check_turns(turns, &rendered.access.turns, template)?;
    let unused = fields::unused(row, fields::QUESTION_FIELDS);
    unread.extend(fields::check_row(own.iter().map(String::as_str), &unused, &rendered.access.variables, template)?);
    let render = |turns: &[Message], variables: &Map<String, Value>| text(turns, variables).map(|other| other.text);
    fields::check_written(turns, false, &of_row, &rendered.text, template, render)?;
    Ok((rendered.text, unread))
}

/// A row before it is rendered.
struct Parsed {
    turns: Vec<Message>,
    asked: Asked,
}

enum Asked {
    Choice(Vec<String>, usize),
    Answer(String),
}

fn id_of(row: &Map<String, Value>) -> Option<String> {
    match filled(row, "id")? {
        Value::String(id) => Some(id.clone()),
        Value::Number(id) => Some(id.to_string()),
        _ => None,
    }
}

fn question(row: &Map<String, Value>) -> Result<Parsed> {
    let names = ["messages", "question", "prompt"];
    let given: Vec<(&str, &Value)> = names.iter().filter_map(|name| Some((*name, filled(row, name)?))).collect();
    let [(name, value)] = given[..] else {
        return Err(format!("a question has one of the fields messages, question and prompt, not {}", given.len()));
    };
    let turns = fields::with_system(row, text_or_messages(value, name, "user")?)?;
    // What a tool returned may come last; a system or an assistant turn asks nothing.
    match turns.last().map(|last| &*last.role) {
        Some("user" | "tool") => {}
        Some(role) => {
            return Err(format!(
                "{name} ends with the turn of role {role}: it should end with the question, as a user turn"
            ));
        }
        None => return Err(format!("{name} is empty: it should end with the question, as a user turn")),
    }
    check_request(&turns, name)?;
    let answer = filled(row, "answer").ok_or("a question without its answer")?;
    let Some(choices) = filled(row, "choices") else {
        return match answer {
            Value::String(text) => Ok(Parsed { turns, asked: Asked::Answer(text.trim().to_owned()) }),
            Value::Number(number) => Ok(Parsed { turns, asked: Asked::Answer(number.to_string()) }),
            _ => Err("answer should be a text or a number".into()),
        };
    };
    let texts = choices.as_array().map(|list| list.iter().map(|c| c.as_str().map(str::to_owned)).collect());
    let Some(Some(choices)) = texts else { return Err("choices should be a list of texts".into()) };
    let choices: Vec<String> = choices;
    if choices.len() < 2 {
        return Err(format!("choices has {} entries; it needs two", choices.len()));
    }
    let equal = (0..choices.len()).find_map(|i| Some((choices[..i].iter().position(|c| *c == choices[i])?, i)));
    if let Some((first, second)) = equal {
        return Err(format!("choices {} and {} are equal", first + 1, second + 1));
    }
    let answer = right_choice(answer, &choices)?;
    Ok(Parsed { turns, asked: Asked::Choice(choices, answer) })
}

/// The right one of some choices.
fn right_choice(answer: &Value, choices: &[String]) -> Result<usize> {
    let found = match answer {
        Value::Number(number) => number.as_u64().map(|n| n as usize),
        // A text that is a choice is that choice, even if it is a letter.
        Value::String(text) => {
            choices.iter().position(|choice| choice == text).or_else(|| match text.trim().as_bytes() {
                [letter @ b'A'..=b'Z'] => Some(usize::from(letter - b'A')),
                _ => None,
            })
        }
        _ => None,
    };
    found.filter(|n| *n < choices.len()).ok_or_else(|| {
        format!(
            "answer {answer} is none of the {} choices: give its number from 0, its letter or its text",
            choices.len()
        )
    })
}

/// A prompt with a continuation: the tokens of the whole text; those beyond the prompt's number of tokens are the continuation.
fn continuation(tokenizer: &ChatTokenizer, prompt: &str, choice: &str) -> std::result::Result<Choice, Error> {
    let ids = tokenizer.encode(&format!("{prompt}{choice}"))?;
    let start = tokenizer.encode(prompt)?.len();
    let loss = (0..ids.len()).map(|i| i >= start).collect();
    Ok(Choice { example: Example { ids, loss }, bytes: choice.len() })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(row: Value) -> Result<Parsed> {
        question(row.as_object().unwrap())
    }

    #[test]
    fn answers_are_numbers_letters_or_texts() {
        for (answer, wanted) in [(json!(1), 1), (json!("B"), 1), (json!("seven"), 2), (json!("A"), 0)] {
            let row = json!({"question": "How many?", "choices": ["five", "six", "seven"], "answer": answer});
            let Asked::Choice(choices, found) = parse(row).unwrap().asked else { panic!("choices") };
            assert_eq!((choices.len(), found), (3, wanted));
        }
        let letters = json!({"prompt": "Which?", "choices": ["B", "A"], "answer": "A"});
        assert!(matches!(parse(letters).unwrap().asked, Asked::Choice(_, 1)), "a text before a letter");
        for (answer, wanted) in [(json!(" 42 "), "42"), (json!(42), "42")] {
            let Asked::Answer(text) = parse(json!({"prompt": "?", "answer": answer})).unwrap().asked else {
                panic!("text")
            };
            assert_eq!(text, wanted);
        }
    }

    #[test]
    fn what_is_no_question_is_named() {
        let choices = ["a", "b"];
        let asked_last = |role: &str| {
            let turns = json!([{"role": "user", "content": "How many?"}, {"role": role, "content": "Be brief."}]);
            json!({"messages": turns, "answer": "y"})
        };
        assert!(parse(asked_last("user")).is_ok() && parse(asked_last("tool")).is_ok());
        for (row, said) in [
            (json!({"answer": 1}), "messages, question and prompt, not 0"),
            (json!({"question": "x", "prompt": "y", "answer": 1}), "not 2"),
            (json!({"question": "x"}), "without its answer"),
            (json!({"question": "x", "answer": [1]}), "a text or a number"),
            (json!({"question": "x", "choices": "a", "answer": 0}), "a list of texts"),
            (json!({"question": "x", "choices": ["a"], "answer": 0}), "it needs two"),
            (json!({"question": "x", "choices": ["a", "b", "a"], "answer": 0}), "choices 1 and 3 are equal"),
            (json!({"question": "x", "choices": choices, "answer": 2}), "answer 2 is none of the 2 choices"),
            (json!({"question": "x", "choices": choices, "answer": "C"}), "answer \"C\" is none"),
            (
                json!({"messages": [{"role": "assistant", "content": "x"}], "answer": "y"}),
                "ends with the turn of role assistant",
            ),
            (asked_last("system"), "messages ends with the turn of role system"),
            (asked_last("developer"), "messages ends with the turn of role developer"),
        ] {
            let error = parse(row.clone()).map(drop).unwrap_err();
            assert!(error.contains(said), "{row}: {error}");
        }
    }
}
