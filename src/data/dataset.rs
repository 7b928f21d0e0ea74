//! Reads a data file into tokenised records.

use std::collections::HashSet;
use std::path::Path;

use rayon::prelude::*;

use super::deep;
use super::head;
use super::kinds::Row;
use super::record::{RecordBuilder, RowOutcome};
use super::report::{DataReport, list_counts};
use super::{ChatTokenizer, DataOptions, Error, Example, LossOn, Record, fields, values};
use crate::meter::{Meter, Unit};

/// The records of a file, in file order.
#[derive(Debug, Clone, PartialEq)]
pub struct Dataset {
    /// Never empty after [`Dataset::read`].
    pub records: Vec<Record>,
    /// Counts of rows read, kept and dropped.
    pub report: DataReport,
}

impl Dataset {
    /// A data set of given records with an empty report, for benchmarks and tests.
    pub fn of_records(records: Vec<Record>) -> Self {
        Self { records, report: DataReport::default() }
    }

    /// Whether a safe and an unsafe prompt exist (not necessarily in one record). Router alignment needs both.
    pub fn has_both_prompts(&self) -> bool {
        let any = |side: fn(&Record) -> bool| self.records.iter().any(side);
        any(|r| r.safe_prompt.is_some()) && any(|r| r.unsafe_prompt.is_some())
    }

    /// Whether a reply on the safe and one on the unsafe side exist (not necessarily in one record). Routing
    /// frequencies and the joint schedule need both.
    pub fn has_both_replies(&self) -> bool {
        let any = |side: fn(&Record) -> bool| self.records.iter().any(side);
        any(|r| r.safe_reply.is_some()) && any(|r| r.unsafe_reply.is_some())
    }

    /// Reads, filters, renders and tokenises a data file: a JSON array of rows, or JSONL.
    ///
    /// Attacks without a verdict are kept and counted; attacks with a null verdict are dropped. Both sides of a row are
    /// kept or both are dropped, so an unsafe prompt keeps its safe counterpart.
    ///
    /// # Errors
    /// A file that cannot be read or is empty; the first row that is invalid, or that the template cannot render or
    /// renders as an empty prompt; with [`super::LongRows::Error`], a row that is too long; no row left, or no loss token
    /// (unless [`DataOptions::prompts_suffice`]).
    pub fn read(path: &Path, tokenizer: &ChatTokenizer, options: &DataOptions) -> Result<Self, Error> {
        let read = |name: &str| tokenizer.templates().any_reads_variable(name);
        let given = || options.chat_template_kwargs.iter().filter(|(name, value)| !fields::is_missing(name, value));
        if let Some((name, _)) = given().find(|(name, _)| !read(name)) {
            return Err(Error::Kwargs { name: values::name_of(name) });
        }
        let mut report = DataReport { path: path.to_owned(), ..DataReport::default() };
        let mut parsed = head::read(path, options, &mut report)?;
        for row in &mut parsed {
            for (name, value) in given() {
                row.variables.entry(name).or_insert_with(|| value.clone());
            }
            // All tokens carry loss, those of earlier turns, too.
            row.earlier_excluded &= options.loss_on != LossOn::All;
        }
        let pool = deep::pool().map_err(|e| Error::file(path, e))?;
        let meter = Meter::start(format!("rendering the rows of {}", path.display()), Unit::Rows, parsed.len() as u64);
        let build = |row: &Row| {
            meter.add(1);
            RecordBuilder::build(path, tokenizer, options, row)
        };
        let outcomes: Vec<_> = pool.install(|| parsed.par_iter().map(build).collect());
        drop(meter);
        let mut records = Vec::new();
        // In file order: the error returned is that of the first bad row, whichever thread finished first.
        for (row, outcome) in parsed.iter().zip(outcomes) {
            match outcome? {
                RowOutcome::Kept { record, truncated, unread, left_out } => {
                    report.count(row, &record, truncated);
                    report.note_fields(row.line, [unread, left_out, row.nulls.clone()]);
                    report.note_special_tokens(row, tokenizer);
                    records.push(*record);
                }
                RowOutcome::Dropped(reason) => *report.dropped.entry(reason).or_default() += 1,
            }
        }
        if records.is_empty() {
            return Err(Error::file(path, format!("{}\n{report}", report.why_none())));
        }
        if report.loss_tokens == 0 && !options.prompts_suffice {
            return Err(Error::file(path, format!("no row has a token that carries loss\n{report}")));
        }
        Ok(Self { records, report })
    }

    /// Each [`Record::request`], [`normalized`]; empty ones are left out.
    pub fn requests(&self) -> impl Iterator<Item = String> {
        self.records.iter().map(|record| normalized(&record.request)).filter(|request| !request.is_empty())
    }

    /// Number of records whose request also occurs in `other`. Should be 0 for a held-out file against a training file.
    pub fn count_shared_requests(&self, other: &Self) -> usize {
        let others: HashSet<_> = other.requests().collect();
        self.requests().filter(|request| others.contains(request)).count()
    }
}

/// A request without differences of case and white space.
pub fn normalized(request: &str) -> String {
    request.split_whitespace().collect::<Vec<_>>().join(" ").to_lowercase()
}

impl DataReport {
    /// Why no row was kept.
    fn why_none(&self) -> String {
        if self.dropped.is_empty() {
            "the file holds no rows".into()
        } else {
            format!("no row is left: dropped {}", list_counts(&self.dropped))
        }
    }

    fn count(&mut self, row: &Row, record: &Record, truncated: bool) {
        self.kept += 1;
        *self.by_kind.entry(row.kind).or_default() += 1;
        self.truncated += usize::from(truncated);
        self.without_verdict += usize::from(row.without_verdict);
        self.completed += usize::from(row.completed);
        self.earlier_excluded += usize::from(row.earlier_excluded);
        let added = row.has_safe_response();
        self.safe_responses.iter_mut().zip(added).for_each(|(count, added)| *count += usize::from(added));
        let replies = || record.unsafe_reply.iter().chain(&record.safe_reply);
        self.without_reply += usize::from(replies().next().is_none());
        self.tokens += replies().map(|e| e.ids.len()).sum::<usize>();
        self.loss_tokens += replies().map(|e| e.loss.iter().filter(|l| **l).count()).sum::<usize>();
        self.lengths.extend(replies().next().map(|e| e.ids.len()));
    }

    fn note_special_tokens(&mut self, row: &Row, tokenizer: &ChatTokenizer) {
        let mut contents = row.sides().flat_map(|side| &side.messages).map(|m| m.content.as_str());
        if let Some(token) = contents.find_map(|text| tokenizer.special_token_in(text)) {
            self.special_tokens_in_content += 1;
            self.first_special_token.get_or_insert_with(|| (row.line, token.to_owned()));
        }
    }
}

/// A conversation as text, token by token, for showing the loss mask to the user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// 1-based line of the row.
    pub line: usize,
    /// Whether it is the unsafe side of the row.
    pub is_unsafe: bool,
    /// The text of each token, and whether it carries loss. If a character takes several tokens, the last of them has
    /// the text and the others are empty.
    pub tokens: Vec<(String, bool)>,
}

/// The conversations of the first `n` records, token by token with the loss mask.
pub fn loss_mask_samples(dataset: &Dataset, tokenizer: &ChatTokenizer, n: usize) -> Vec<Sample> {
    let sample = |line, is_unsafe, example: &Example| Sample {
        line,
        is_unsafe,
        tokens: tokenizer.token_texts(&example.ids).into_iter().zip(example.loss.iter().copied()).collect(),
    };
    let of_record = |r: &Record| {
        let sides = [(true, &r.unsafe_reply), (false, &r.safe_reply)];
        sides.map(|(is_unsafe, reply)| reply.as_ref().map(|example| sample(r.line, is_unsafe, example)))
    };
    dataset.records.iter().take(n).flat_map(of_record).flatten().collect()
}
