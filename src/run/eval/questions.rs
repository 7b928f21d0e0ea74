//! Questions: the log-likelihoods of choices, and greedy answers that are compared with the right one.

use std::collections::BTreeMap;
use std::path::PathBuf;

use regex::Regex;

use super::logged::{Generated, Logged, open_on_first, wrong_row};
use super::{Requests, pattern};
use crate::backend::Backend;
use crate::collective::on_first;
use crate::config::EvalArgs;
use crate::data::{ChatTokenizer, Choice, Example, Question, Task, read_questions};
use crate::exit::{self, Failure, Result};
use crate::files;
use crate::input;
use crate::report::{QUESTION_SCHEMA, QuestionResult, QuestionRow, QuestionsReport, RowLog, Sampling, json_lines};
use crate::run::generate::{Answer, Prompt, highest};
use crate::train::{ExampleLoss, Replica, example_losses};
use crate::ui::Ui;

/// Name of the file.
pub const FILE: &str = "questions.jsonl";

/// The questions of an evaluation.
pub struct Questions {
    /// The files of `--questions`.
    paths: Vec<PathBuf>,
    /// Each with the number of its file, from 0.
    all: Vec<(usize, Question)>,
    /// What of an answer is compared.
    pattern: Option<Regex>,
    max_new_tokens: usize,
}

impl Questions {
    /// Reads the files of `--questions`; `None` without any.
    ///
    /// # Errors
    /// A file that cannot be read, or a row that is no question; a file with the questions of an earlier one; a pattern that does not compile; questions that need an answer with
    /// `--skip-answers`.
    pub fn open(args: &EvalArgs, tokenizer: &ChatTokenizer, ui: &Ui) -> Result<Option<Self>> {
        let variables = args.chat_template_kwargs.clone().unwrap_or_default().0;
        let mut all: Vec<(usize, Question)> = Vec::new();
        for (file, path) in args.questions.iter().enumerate() {
            let (found, note) = read_questions(path, tokenizer, &variables, args.max_samples, args.max_length)?;
            if let Some(note) = note {
                ui.warn(note);
            }
            let needs_answer = found.iter().find(|question| matches!(question.task, Task::Answer(_)));
            if let Some(question) = needs_answer.filter(|_| args.skip_answers) {
                let message = format!(
                    "{}:{}: a question without choices needs an answer, but --skip-answers generates none: leave it out",
                    path.display(),
                    question.line
                );
                return Err(Failure::new(exit::CONFIG, message));
            }
            let of_file = |other: usize| all.iter().filter(move |(of, _)| *of == other).map(|(_, question)| question);
            if let Some(twice) = (0..file).find(|other| of_file(*other).eq(&found)) {
                let message = format!(
                    "--questions {}: it holds the questions of --questions {}: leave one out",
                    path.display(),
                    args.questions[twice].display()
                );
                return Err(Failure::new(exit::CONFIG, message));
            }
            all.extend(found.into_iter().map(|question| (file, question)));
        }
        let compile =
            |source: &String| pattern(source).map_err(|e| Failure::new(exit::USAGE, format!("--answer-pattern: {e}")));
        let pattern = args.answer_pattern.as_ref().map(compile).transpose()?;
        let questions = Self { paths: args.questions.clone(), all, pattern, max_new_tokens: args.max_new_tokens };
        Ok((!args.questions.is_empty()).then_some(questions))
    }

    /// The longest prompt or prompt with a choice, and the room for its answer, in tokens.
    pub fn longest(&self) -> usize {
        let of = |question: &Question| match &question.task {
            Task::Answer(_) => question.prompt.len() + self.max_new_tokens,
            Task::Choice { choices, .. } => choices.iter().map(|c| c.example.ids.len()).max().unwrap_or(0),
        };
        self.all.iter().map(|(_, question)| of(question)).max().unwrap_or(0)
    }

    /// Each file, with the requests of its questions.
    pub fn requests(&self) -> Vec<Requests> {
        let of_file = |file: usize| self.all.iter().filter(move |(of, _)| *of == file).map(|(_, q)| q.request.clone());
        self.paths.iter().enumerate().map(|(file, path)| (path.clone(), of_file(file).collect())).collect()
    }

    /// A hash of the questions.
    pub fn hash(&self) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_derive_key("moewarden questions of an evaluation 2");
        for (file, question) in &self.all {
            hasher.update(format!("\n{file} {question:?}").as_bytes());
        }
        hasher.finalize()
    }

    /// What of a response is compared with the right answer: without a pattern all of it, without white space around it; else the
    /// first group, or the whole, of the last match, [`without_marks`].
    fn given(&self, response: &str) -> Option<String> {
        let Some(pattern) = &self.pattern else { return Some(response.trim().to_owned()) };
        let last = pattern.captures_iter(response).last()?;
        let part = last.get(1).or_else(|| last.get(0))?;
        Some(without_marks(part.as_str()))
    }

    /// Whether what is [`Self::given`] is this answer.
    fn is_right(&self, given: &str, answer: &str) -> bool {
        match self.pattern {
            None => given == answer,
            Some(_) => given == without_marks(answer),
        }
    }
}

/// What asking needs besides the questions.
pub struct AskingQuestions<'a> {
    pub questions: &'a Questions,
    pub tokenizer: &'a ChatTokenizer,
    /// Choices in a micro-batch.
    pub batch_size: usize,
    /// Answers in a batch.
    pub generation_batch_size: usize,
    pub path: PathBuf,
    pub ui: &'a Ui,
}

impl AskingQuestions<'_> {
    /// Asks all questions, greedily, and writes `questions.jsonl`; the results by file, the same on all ranks. Answers that the file holds are not
    /// generated again.
    ///
    /// # Errors
    /// Logits that are not finite; a file with other rows; a failed write; those of the collective.
    pub fn ask<B: Backend>(&self, replica: &Replica<B>) -> Result<Generated<Vec<QuestionsReport>>> {
        let (world, all) = (&*replica.world, &self.questions.all);
        world.set_activity("asking the questions");
        let examples: Vec<&Example> =
            all.iter().flat_map(|(_, q)| choices_of(q)).map(|choice| &choice.example).collect();
        let mut losses = example_losses(replica, &examples, self.batch_size, |_| {})?.into_iter();
        let losses: Vec<Vec<ExampleLoss>> =
            all.iter().map(|(_, q)| losses.by_ref().take(choices_of(q).len()).collect()).collect();

        let open: Vec<usize> = (0..all.len()).filter(|&i| choices_of(&all[i].1).is_empty()).collect();
        let kept = open_on_first(world, || {
            let (log, lines) = RowLog::open(&self.path)?;
            Ok((log, self.read(&open, &lines)?))
        })?;
        let prompts: Vec<_> = open.iter().map(|&i| Prompt { ids: &all[i].1.prompt, index: 0 }).collect();
        let logged = Logged {
            what: "questions",
            limit: "--max-new-tokens",
            eos: self.tokenizer.eos_ids(),
            sampling: &Sampling::greedy(self.questions.max_new_tokens).with(self.tokenizer.penalties()?),
            batch_size: self.generation_batch_size,
            ui: self.ui,
        };
        let append = |log: &mut RowLog, new: &[(usize, Answer)]| -> Result<()> {
            Ok(log.append(new.iter().map(|(place, said)| self.row(open[*place], &[], Some(said))))?)
        };
        logged.generate(replica, &prompts, kept, append)?.try_map(|said| {
            let mut said = said.iter();
            let answer = |i: usize| if choices_of(&all[i].1).is_empty() { said.next() } else { None };
            let answers: Vec<Option<&Answer>> = (0..all.len()).map(answer).collect();
            let rows: Vec<QuestionRow> = (0..all.len()).map(|i| self.row(i, &losses[i], answers[i])).collect();
            on_first(world, || Ok(files::write(&self.path, json_lines(&rows))?))?;
            let of_file = |(file, path): (usize, &PathBuf)| {
                let pattern = self.questions.pattern.as_ref().map(|pattern| pattern.as_str().to_owned());
                QuestionsReport::of(path.clone(), pattern, rows.iter().filter(move |row| row.file == file + 1))
            };
            Ok(self.questions.paths.iter().enumerate().map(of_file).collect())
        })
    }

    /// The answers in these lines of the file to the questions with these places.
    fn read(&self, open: &[usize], lines: &[String]) -> Result<Vec<Option<Answer>>> {
        let mut rows = BTreeMap::new();
        for (i, line) in lines.iter().enumerate() {
            let wrong = |why: &str| wrong_row(&self.path, i + 1, "question", why);
            let row: QuestionRow =
                serde_json::from_str(line).map_err(|e| wrong(&input::line_problem(line.as_bytes(), &e)))?;
            if row.schema != QUESTION_SCHEMA {
                return Err(wrong(&format!("its schema is {:?}, not {QUESTION_SCHEMA:?}", row.schema)));
            }
            if let QuestionResult::Answer { ids, finish_reason, .. } = row.result {
                rows.insert((row.file, row.id), Answer { ids, finish: finish_reason });
            }
        }
        let key = |&i: &usize| (self.questions.all[i].0 + 1, self.questions.all[i].1.id.clone());
        Ok(open.iter().map(|i| rows.get(&key(i)).cloned()).collect())
    }

    /// A line of the file.
    fn row(&self, i: usize, losses: &[ExampleLoss], said: Option<&Answer>) -> QuestionRow {
        let (file, Question { id, line, request: _, prompt, task }) = &self.questions.all[i];
        let (correct, result) = match task {
            Task::Choice { choices, answer } => {
                let sums: Vec<f64> = losses.iter().map(|loss| -loss.sum).collect();
                let by_byte: Vec<f64> = sums.iter().zip(choices).map(|(s, c)| s / c.bytes as f64).collect();
                let (chosen, chosen_by_byte) = (highest(&sums), highest(&by_byte));
                let result = QuestionResult::Choice {
                    answer: *answer,
                    chosen,
                    chosen_by_byte,
                    log_likelihoods: sums,
                    tokens: losses.iter().map(|loss| loss.tokens).collect(),
                    bytes: choices.iter().map(|choice| choice.bytes).collect(),
                };
                (chosen == *answer, result)
            }
            Task::Answer(answer) => {
                let said = said.expect("each question without choices has an answer");
                let response = self.tokenizer.decode(&said.ids);
                let given = self.questions.given(&response);
                let correct = given.as_ref().is_some_and(|given| self.questions.is_right(given, answer));
                let (answer, ids) = (answer.clone(), said.ids.clone());
                (correct, QuestionResult::Answer { answer, given, response, ids, finish_reason: said.finish })
            }
        };
        let digest = format!("blake3:{}", blake3::hash(format!("{prompt:?} {task:?}").as_bytes()));
        let (schema, file, id) = (QUESTION_SCHEMA.into(), file + 1, id.clone());
        QuestionRow { schema, file, id, line: *line, digest, correct, result }
    }
}

/// A text as lm-evaluation-harness compares it for GSM8K: without commas, so that 1,234 is 1234, without dollar signs, and without
/// the full stop that ends it.
fn without_marks(text: &str) -> String {
    let text = text.replace([',', '$'], "");
    text.trim().trim_end_matches('.').to_owned()
}

fn choices_of(question: &Question) -> &[Choice] {
    match &question.task {
        Task::Choice { choices, .. } => choices,
        Task::Answer(_) => &[],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_compared_without_their_marks() {
        let with = |pattern: Option<&str>| {
            let pattern = pattern.map(|source| Regex::new(source).unwrap());
            Questions { paths: Vec::new(), all: Vec::new(), pattern, max_new_tokens: 1 }
        };
        let right = |questions: &Questions, response: &str, answer: &str| {
            questions.given(response).is_some_and(|given| questions.is_right(&given, answer))
        };
        let gsm8k = with(Some(r"-?[$0-9.,]{2,}|-?[0-9]+"));
        for (response, answer) in [
            ("It is 2 * 617 = 1,234.", "1234"),
            ("So she pays $1,234.50.", "1,234.50"),
            ("#### 18", "18"),
            ("That leaves -7.", "-7"),
            ("12 and then $5.", "5"),
        ] {
            assert!(right(&gsm8k, response, answer), "{response}: {:?}", gsm8k.given(response));
        }
        for (response, answer) in [("1,234", "234"), ("1.5", "15"), ("none", "0")] {
            assert!(!right(&gsm8k, response, answer), "{response}: {:?}", gsm8k.given(response));
        }
        assert_eq!(with(Some("answer is (.*)")).given("the answer is  x, y. "), Some("x y".into()));
        // Without a pattern the whole response counts, as it is.
        let whole = with(None);
        assert!(right(&whole, " 1,234\n", "1,234") && !right(&whole, "1,234", "1234"));
    }
}
