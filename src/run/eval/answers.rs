//! The answers of an evaluation: generated over the ranks, kept in `generations.jsonl` as they come, and written there in the order
//! of the data file at the end.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;

use super::logged::{Generated, Logged, open_on_first};
use crate::backend::Backend;
use crate::collective::on_first;
use crate::data::{Message, Record};
use crate::exit::{self, Failure, Result};
use crate::files;
use crate::input;
use crate::judge::wilson;
use crate::report::{
    CutOff, EvaluatedModel, FinishReason, GENERATION_SCHEMA, GenerationRow, JudgedAnswer, PromptSide, RefusalOnset,
    RefusalRate, RowLog, Sampling, VerdictRow, json_lines,
};
use crate::run::generate::{Answer, Prompt};
use crate::run::refusals::{LISTS, PhraseList};
use crate::run::session::Session;
use crate::train::Replica;
use crate::ui::Ui;

/// Name of the file.
pub const FILE: &str = "generations.jsonl";

/// The sides, in the order of the reports.
const SIDES: [PromptSide; 2] = [PromptSide::Unsafe, PromptSide::Safe];

/// One prompt to answer.
pub struct Asked<'a> {
    /// The line of its row, and from the second row on that begins in this line (of a JSON array, say), which one it is: `1.2`.
    row: String,
    /// The side of the row that it is of.
    pub side: PromptSide,
    /// Tokens of the prompt.
    pub ids: &'a [u32],
    /// Messages of the prompt.
    pub messages: &'a [Message],
}

impl<'a> Asked<'a> {
    fn new(row: &str, side: PromptSide, ids: Option<&'a Vec<u32>>, messages: &'a [Message]) -> Option<Self> {
        Some(Self { row: row.to_owned(), side, ids: ids?, messages })
    }

    /// Row and side, `12-unsafe`: no other prompt of the file has it.
    pub fn id(&self) -> String {
        format!("{}-{}", self.row, self.side.name())
    }
}

/// The prompts of both sides, in the order of the file.
pub fn asked(records: &[Record]) -> Vec<Asked<'_>> {
    let mut asked = Vec::new();
    for (row, r) in row_names(records).iter().zip(records) {
        asked.extend(Asked::new(row, PromptSide::Unsafe, r.unsafe_prompt.as_ref(), &r.unsafe_messages));
        asked.extend(Asked::new(row, PromptSide::Safe, r.safe_prompt.as_ref(), &r.safe_messages));
    }
    asked
}

/// The name of each row: its line, and from the second row on that begins in this line, which one it is.
pub fn row_names(records: &[Record]) -> Vec<String> {
    let (mut line, mut nth) = (0, 0);
    let name = |r: &Record| {
        nth = if r.line == line { nth + 1 } else { 1 };
        line = r.line;
        if nth == 1 { line.to_string() } else { format!("{line}.{nth}") }
    };
    records.iter().map(name).collect()
}

/// What answers are made from and written with.
pub struct Answering<'a> {
    pub session: &'a Session,
    pub model: &'a EvaluatedModel,
    pub sampling: &'a Sampling,
    pub asked: &'a [Asked<'a>],
    /// Answers in a batch.
    pub batch_size: usize,
    /// The file, which may hold answers of an earlier run of the same evaluation.
    pub path: PathBuf,
    pub ui: &'a Ui,
    /// What was read in the answer to each prompt: it is needed for each writing of its row, and for the counts.
    pub found: Vec<OnceCell<Found>>,
}

/// What the program reads in an answer.
pub struct Found {
    /// The text.
    response: String,
    /// For each of the lists, in their order, the number of the token with which the refusal is complete.
    refused_at: Vec<Option<usize>>,
}

/// What is read back of a row of the file.
#[derive(Deserialize)]
struct KeptRow {
    schema: String,
    id: String,
    prompt_text: String,
    ids: Vec<u32>,
    finish_reason: FinishReason,
}

impl Answering<'_> {
    /// The answers to the prompts, in their order, the same on all ranks. Answers that the file holds are not generated again. At the
    /// end the file holds all answers, in the order of the data file.
    ///
    /// # Errors
    /// Logits that are not finite; a file of another evaluation; a failed write; those of the collective.
    pub fn answers<B: Backend>(&self, replica: &Replica<B>) -> Result<Generated<Vec<Answer>>> {
        let (world, asked) = (&*replica.world, self.asked);
        world.set_activity("generating the answers");
        let kept = open_on_first(world, || {
            let (log, lines) = RowLog::open(&self.path)?;
            Ok((log, self.read(&lines)?))
        })?;
        let prompts: Vec<_> = asked.iter().enumerate().map(|(i, a)| Prompt { ids: a.ids, index: i as u64 }).collect();
        let logged = Logged {
            what: "answers",
            limit: "--max-new-tokens",
            eos: self.session.tokenizer.eos_ids(),
            sampling: self.sampling,
            batch_size: self.batch_size,
            ui: self.ui,
        };
        let done = logged.generate(replica, &prompts, kept, |log, new| {
            Ok(log.append(new.iter().map(|(i, answer)| self.row(*i, answer)))?)
        })?;
        done.try_map(|answers| {
            on_first(world, || self.write(&answers, None))?;
            Ok(answers)
        })
    }

    /// Writes all answers in their order, with the verdicts of the judge with this hash.
    ///
    /// # Errors
    /// A failed write.
    pub fn write(&self, answers: &[Answer], verdicts: Option<(&str, &[VerdictRow])>) -> Result<()> {
        let judged = |i: usize| {
            let (sha, rows) = verdicts?;
            let VerdictRow { text, verdict, .. } = &rows[i];
            Some(JudgedAnswer { sha, text, verdict: verdict.as_ref() })
        };
        let rows = answers.iter().enumerate();
        let rows = rows.map(|(i, answer)| GenerationRow { judge: judged(i), ..self.row(i, answer) });
        Ok(files::write(&self.path, json_lines(rows))?)
    }

    /// The answers in these lines of the file.
    fn read(&self, lines: &[String]) -> Result<Vec<Option<Answer>>> {
        let asked = self.asked;
        let places: BTreeMap<String, usize> = asked.iter().enumerate().map(|(i, prompt)| (prompt.id(), i)).collect();
        let mut answers = vec![None; asked.len()];
        for (i, line) in lines.iter().enumerate() {
            let wrong = |what: String| {
                let message = format!("{}:{}: {what}: evaluate again with --overwrite", self.path.display(), i + 1);
                Failure::new(exit::DATA, message)
            };
            let row: KeptRow = serde_json::from_str(line).map_err(|e| {
                let problem = input::line_problem(line.as_bytes(), &e);
                wrong(format!("is no answer that this version of moewarden wrote ({problem})"))
            })?;
            if row.schema != GENERATION_SCHEMA {
                return Err(wrong(format!("has the schema {:?}, not {GENERATION_SCHEMA:?}", row.schema)));
            }
            let Some(&place) = places.get(&row.id) else {
                return Err(wrong(format!("has the id {:?}, which no prompt of the data file has", row.id)));
            };
            if row.prompt_text != self.prompt_text(&asked[place]) {
                return Err(wrong(format!("answers another prompt than {} of the data file", row.id)));
            }
            answers[place] = Some(Answer { ids: row.ids, finish: row.finish_reason });
        }
        Ok(answers)
    }

    fn prompt_text(&self, prompt: &Asked<'_>) -> String {
        self.session.tokenizer.token_texts(prompt.ids).concat()
    }

    /// What is found in the answer to this prompt.
    fn found(&self, i: usize, said: &Answer) -> &Found {
        self.found[i].get_or_init(|| {
            let decode = |ids: &[u32]| self.session.tokenizer.decode(ids);
            let refused_at = LISTS.iter().map(|list| list.refused_at(&said.ids, decode)).collect();
            Found { response: decode(&said.ids), refused_at }
        })
    }

    /// The text of the answer to this prompt.
    pub fn response(&self, i: usize, said: &Answer) -> &str {
        &self.found(i, said).response
    }

    /// A line of the file.
    fn row<'r>(&'r self, i: usize, said: &'r Answer) -> GenerationRow<'r> {
        let (prompt, found) = (&self.asked[i], self.found(i, said));
        let by_list = || LISTS.iter().map(PhraseList::id).zip(&found.refused_at);
        GenerationRow {
            schema: GENERATION_SCHEMA,
            id: prompt.id(),
            behavior_id: prompt.row.clone(),
            category: prompt.side,
            messages: prompt.messages,
            prompt_text: self.prompt_text(prompt),
            refused_at: by_list().map(|(list, at)| (list, *at)).collect(),
            proxy: by_list().map(|(list, at)| (list, at.is_some())).collect(),
            response: &found.response,
            ids: &said.ids,
            judge: None,
            finish_reason: said.finish,
            n_tokens: said.ids.len(),
            sampling: self.sampling,
            model: self.model,
            template_sha: format!("blake3:{}", self.session.tokenizer.template_digest()),
        }
    }

    /// The answers to the prompts of one side, with what is found in them.
    fn of_side<'r>(&'r self, answers: &'r [Answer], side: PromptSide) -> impl Iterator<Item = (&'r Answer, &'r Found)> {
        let of_side = answers.iter().enumerate().filter(move |(i, _)| self.asked[*i].side == side);
        of_side.map(|(i, said)| (said, self.found(i, said)))
    }

    /// When the answers refuse, by phrase list and side.
    pub fn onsets(&self, answers: &[Answer]) -> Vec<RefusalOnset> {
        let of = |((place, list), side): ((usize, &PhraseList), PromptSide)| {
            let found = self.of_side(answers, side);
            let found: Vec<_> =
                found.map(|(said, found)| (found.refused_at[place], said.finish == FinishReason::Length)).collect();
            let max_new_tokens = self.sampling.max_new_tokens;
            (!found.is_empty()).then(|| RefusalOnset::new(list.id(), side, max_new_tokens, &found))
        };
        LISTS.iter().enumerate().flat_map(|list| SIDES.map(|side| (list, side))).filter_map(of).collect()
    }

    /// How many answers the largest number of tokens cut off, by side.
    pub fn cut_off(&self, answers: &[Answer]) -> Vec<CutOff> {
        let of = |side| {
            let of_side = || self.of_side(answers, side).map(|(said, _)| said);
            let cut_off = of_side().filter(|said| said.finish == FinishReason::Length).count();
            CutOff { side, answers: of_side().count(), cut_off }
        };
        SIDES.map(of).into_iter().filter(|found| found.answers > 0).collect()
    }

    /// Refusals among the answers by phrase list and side.
    pub fn refusals(&self, answers: &[Answer]) -> Vec<RefusalRate> {
        // (answers, refusals by list) of each side
        let mut counts: BTreeMap<PromptSide, (usize, Vec<usize>)> = BTreeMap::new();
        for (i, said) in answers.iter().enumerate() {
            let found = self.found(i, said);
            let (answers, refused) = counts.entry(self.asked[i].side).or_insert_with(|| (0, vec![0; LISTS.len()]));
            *answers += 1;
            refused.iter_mut().zip(&found.refused_at).for_each(|(n, at)| *n += usize::from(at.is_some()));
        }
        let rates = counts.into_iter().flat_map(|(side, (answers, refused))| {
            LISTS.iter().zip(refused).map(move |(list, refused)| RefusalRate {
                list: list.id(),
                side,
                refused,
                answers,
                rate: refused as f64 / answers as f64,
                interval: wilson(refused, answers),
            })
        });
        rates.collect()
    }
}
