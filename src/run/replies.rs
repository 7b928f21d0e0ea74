//! The model's own replies to the prompts of a data set, by greedy decoding: spread over the ranks, and cached in the output folder.
//!
//! A reply depends on the model, its prompt and the largest number of tokens: not on the number of ranks, and not on the other
//! prompts, except where two tokens have the highest logit to within rounding: sums of one row may be rounded in another order than
//! those of several. Where logits are equal, the token with the lowest id is taken.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::generate::{Answer, Prompt, batches, check_cache};
use super::progress::Progress;
use super::refusals::LISTS;
use super::session::Session;
use super::spread::Spread;
use crate::backend::Backend;
use crate::collective::all_ok;
use crate::data::{Dataset, Example, Penalties, Record};
use crate::exit::{self, Context, Failure, Result};
use crate::files::{self, AtomicFile};
use crate::model::Intervention;
use crate::report::{FinishReason, GenerationSpeed, OwnReply, PromptSide, REPLY_SCHEMA, Sampling, read_rows};
use crate::train::Replica;
use crate::ui::Ui;

/// The cache is written at most this often before the end.
const BETWEEN_WRITES: Duration = Duration::from_secs(60);

/// Which prompts the model answers, and how.
#[derive(Debug, Clone, Copy)]
pub struct AskOptions<'a> {
    /// The rows whose prompts are answered.
    pub data: &'a Dataset,
    /// The sides that are answered: in this order, each in file order.
    pub sides: &'a [PromptSide],
    /// Largest number of tokens of a reply.
    pub max_new_tokens: usize,
    /// Replies that are generated together on each rank.
    pub batch_size: usize,
    /// The intervention that the replica's model has.
    pub intervention: Option<&'a Intervention>,
    /// The file that keeps the replies; `None`: they are not kept.
    pub cache: Option<&'a Path>,
}

/// One prompt to answer.
struct Question<'a> {
    record: usize,
    side: PromptSide,
    prompt: &'a [u32],
    key: String,
}

/// What a cache holds of a reply. Text and verdict follow from it.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Kept {
    key: String,
    ids: Vec<u32>,
    finish_reason: FinishReason,
}

/// The model's greedy replies, the same on all ranks. Replies that the cache holds for these weights and prompts are not generated
/// again. `None`: some rank was asked to stop; the cache holds the replies so far.
///
/// # Errors
/// Logits that are not finite; a cache that cannot be read or written; prompts too long for the model; those of the collective.
pub fn own_replies<B: Backend>(
    session: &Session,
    replica: &Replica<B>,
    ask: AskOptions<'_>,
    ui: &Ui,
) -> Result<Option<Vec<OwnReply>>> {
    let world = &*replica.world;
    world.set_activity("the model's own replies");
    let penalties = session.tokenizer.penalties()?;
    let questions = questions(session, replica, &ask, penalties)?;
    let longest = questions.iter().map(|q| q.prompt.len()).max().unwrap_or(0);
    session.model.check_length(longest.saturating_add(ask.max_new_tokens))?;

    let mut cache = Cache::open(replica, ask.cache)?;
    let mut seen = BTreeSet::new();
    let is_open = |q: &&Question<'_>| !cache.replies.contains_key(&q.key) && seen.insert(q.key.clone());
    let open: Vec<_> = questions.iter().filter(is_open).collect();
    let known = questions.iter().filter(|q| cache.replies.contains_key(&q.key)).count();
    if known > 0 {
        ui.line(format_args!("own replies: {known} of {} are in the cache", questions.len()));
    }
    let (rank, size) = (world.rank(), world.world_size());
    let lengths: Vec<usize> = open.iter().map(|q| q.prompt.len()).collect();
    let batches = batches(&lengths, ask.batch_size);
    let plan = all_ok(world, check_cache(replica.model(), &lengths, &batches, ask.max_new_tokens, "--max-new-tokens"))?;
    if !open.is_empty() {
        ui.line(format_args!("own replies: {plan}"));
    }
    let mut spread = Spread {
        replica,
        eos: session.tokenizer.eos_ids(),
        sampling: Sampling::greedy(ask.max_new_tokens).with(penalties),
        progress: Progress::new(ui, open.len().div_ceil(size), "own replies"),
        speed: GenerationSpeed { batch_size: ask.batch_size, ..GenerationSpeed::default() },
    };
    let prompts: Vec<_> = open.iter().map(|question| Prompt { ids: question.prompt, index: 0 }).collect();
    let stop = spread.answers(&prompts, &batches, |found, last| {
        for (place, Answer { ids, finish: finish_reason }) in found {
            let key = open[place].key.clone();
            cache.replies.insert(key.clone(), Kept { key, ids, finish_reason });
        }
        all_ok(world, cache.write(session, &ask, &questions, last))
    })?;
    if stop && questions.iter().any(|q| !cache.replies.contains_key(&q.key)) {
        return Ok(None);
    }
    if !open.is_empty() {
        ui.line(format_args!("own replies of rank {rank}: {}", spread.speed));
    }
    let replies = questions.iter().map(|q| q.reply(session, ask.data, &cache.replies[&q.key]));
    Ok(Some(replies.collect()))
}

/// The prompts of these sides, with their keys.
fn questions<'a, B: Backend>(
    session: &Session,
    replica: &Replica<B>,
    ask: &AskOptions<'a>,
    penalties: Penalties,
) -> Result<Vec<Question<'a>>> {
    let mut state = blake3::Hasher::new_derive_key("moewarden own reply 1");
    state.update(session.weights_hash()?.as_bytes());
    for (id, value) in replica.changed() {
        state.update(&(id as u64).to_le_bytes());
        state.update(&(value.bytes.len() as u64).to_le_bytes());
        state.update_rayon(&value.bytes);
    }
    state.update(format!("{:?} {} {:?}", ask.intervention, ask.max_new_tokens, session.tokenizer.eos_ids()).as_bytes());
    state.update(penalties.key().as_bytes());
    let key = |prompt: &[u32]| {
        let mut hasher = state.clone();
        prompt.iter().for_each(|id| _ = hasher.update(&id.to_le_bytes()));
        hasher.finalize().to_hex().to_string()
    };
    let of_side = |side: PromptSide| {
        let prompts = ask.data.records.iter().map(move |r| prompt_of(r, side)).enumerate();
        prompts.filter_map(move |(record, prompt)| prompt.map(|prompt| (record, side, prompt)))
    };
    let all = ask.sides.iter().copied().flat_map(of_side);
    Ok(all.map(|(record, side, prompt)| Question { record, side, prompt, key: key(prompt) }).collect())
}

fn prompt_of(record: &Record, side: PromptSide) -> Option<&[u32]> {
    match side {
        PromptSide::Unsafe => record.unsafe_prompt.as_deref(),
        PromptSide::Safe => record.safe_prompt.as_deref(),
    }
}

impl Question<'_> {
    /// The reply with its text and verdict.
    fn reply(&self, session: &Session, data: &Dataset, kept: &Kept) -> OwnReply {
        let record = &data.records[self.record];
        let eos = session.tokenizer.eos_ids();
        let target_of = |side: PromptSide| {
            let (example, prompt) = match side {
                PromptSide::Unsafe => (record.unsafe_reply.as_ref(), record.unsafe_prompt.as_ref()),
                PromptSide::Safe => (record.safe_reply.as_ref(), record.safe_prompt.as_ref()),
            };
            Some(target_ids(prompt?, example?, eos))
        };
        let refuses = |text: &str| LISTS.iter().any(|list| list.is_refusal(text));
        let response = session.tokenizer.decode(&kept.ids);
        let proxy: BTreeMap<_, _> = LISTS.iter().map(|list| (list.id(), list.is_refusal(&response))).collect();
        let target = target_of(self.side);
        let target_refuses = target.map(|target| {
            let refusal = target_of(PromptSide::Unsafe);
            refusal.is_some_and(|refusal| refusal == target) || refuses(&session.tokenizer.decode(target))
        });
        let equals_target = target.map(|target| equals(kept, target));
        OwnReply {
            schema: REPLY_SCHEMA.into(),
            key: kept.key.clone(),
            line: record.line,
            side: self.side,
            prompt_tokens: self.prompt.len(),
            ids: kept.ids.clone(),
            finish_reason: kept.finish_reason,
            refuses: equals_target == Some(true) && target_refuses == Some(true) || refuses(&response),
            response,
            proxy,
            equals_target,
            target_refuses,
            record: self.record,
        }
    }
}

/// The tokens of the last turn of an example, up to the end-of-sequence token.
fn target_ids<'a>(prompt: &[u32], example: &'a Example, eos: &[u32]) -> &'a [u32] {
    let start = match example.ids.starts_with(prompt) {
        true => prompt.len(),
        // A template may render the prompt alone in other tokens; then the reply is the last run of tokens with loss.
        false => example.loss.iter().rposition(|loss| !loss).map_or(0, |last| last + 1),
    };
    let reply = &example.ids[start..];
    let end = reply.iter().position(|id| eos.contains(id)).unwrap_or(reply.len());
    &reply[..end]
}

fn equals(reply: &Kept, target: &[u32]) -> bool {
    match reply.finish_reason {
        FinishReason::Stop => reply.ids == target,
        FinishReason::Length => target.starts_with(&reply.ids),
    }
}

/// Rows by line, side and key: the order of the file, which is the same at any number of ranks.
type Rows = BTreeMap<(usize, PromptSide, String), OwnReply>;

/// The replies that are known, on all ranks.
struct Cache {
    path: Option<PathBuf>,
    /// The rows of the file, on rank 0: also those of other weights and prompts, which stay.
    rows: Rows,
    replies: BTreeMap<String, Kept>,
    writes: bool,
    written: Instant,
}

impl Cache {
    /// Rank 0 reads the file, and tells the others what it holds.
    fn open<B: Backend>(replica: &Replica<B>, path: Option<&Path>) -> Result<Self> {
        let world = &*replica.world;
        let writes = world.rank() == 0;
        let rows = all_ok(world, if writes { read(path) } else { Ok(Rows::new()) })?;
        let kept = rows.values().map(|row| Kept {
            key: row.key.clone(),
            ids: row.ids.clone(),
            finish_reason: row.finish_reason,
        });
        let own = serde_json::to_vec(&kept.collect::<Vec<_>>()).expect("replies are data");
        let known: Vec<Kept> = serde_json::from_slice(&world.all_gather(&own)?[0]).expect("the replies of rank 0");
        let replies = known.into_iter().map(|reply| (reply.key.clone(), reply)).collect();
        Ok(Self { path: path.map(Path::to_owned), rows, replies, writes, written: Instant::now() })
    }

    /// Writes all rows, on rank 0: if `now`, or if the last write is long ago.
    fn write(&mut self, session: &Session, ask: &AskOptions<'_>, questions: &[Question<'_>], now: bool) -> Result<()> {
        let Some(path) = self.path.as_ref().filter(|_| self.writes) else { return Ok(()) };
        if !now && self.written.elapsed() < BETWEEN_WRITES {
            return Ok(());
        }
        for question in questions {
            if let Some(kept) = self.replies.get(&question.key) {
                let row = question.reply(session, ask.data, kept);
                self.rows.insert((row.line, row.side, row.key.clone()), row);
            }
        }
        let mut file = AtomicFile::create(path)?;
        for row in self.rows.values() {
            let mut line = serde_json::to_vec(row).expect("a reply has string keys");
            line.push(b'\n');
            file.write_all(&line).map_err(|source| files::Error::Write { path: path.clone(), source })?;
        }
        file.commit()?;
        self.written = Instant::now();
        Ok(())
    }
}

/// The rows of a cache; none if the file does not exist. The reply of a torn last line is generated again.
fn read(path: Option<&Path>) -> Result<Rows> {
    let Some(path) = path.filter(|path| path.exists()) else { return Ok(Rows::new()) };
    let replies: Vec<OwnReply> = read_rows(path).context("replies of earlier runs: delete the file")?.rows;
    let mut rows = Rows::new();
    for (i, row) in replies.into_iter().enumerate() {
        if row.schema != REPLY_SCHEMA {
            let place = format!("{}:{}", path.display(), i + 1);
            let message = format!("{place}: has the schema {:?}, not {REPLY_SCHEMA:?}: delete the file", row.schema);
            return Err(Failure::new(exit::DATA, message));
        }
        rows.insert((row.line, row.side, row.key.clone()), row);
    }
    Ok(rows)
}
