//! The rows over which experts are scored: those of the data, or the same prompts with the model's own replies
//! (`--routing-replies own`).

use super::replies::{AskOptions, own_replies};
use super::session::Session;
use crate::backend::Backend;
use crate::config::RunConfig;
use crate::data::{Dataset, Example, Record, Sampler};
use crate::exit::{self, Failure, Result};
use crate::experts::ReplyCounts;
use crate::report::{OWN_REPLIES, OwnReply, PromptSide};
use crate::train::{CountedReplies, Recipe, Replica};
use crate::ui::Ui;

/// The rows over which experts are scored.
pub enum CountedRows {
    /// The rows of the session, or its routing traces.
    OfSession,
    /// Rows with the model's own replies, and how many of them comply. A row has an unsafe reply only if the model complies.
    Own(Box<Dataset>, ReplyCounts),
}

impl CountedRows {
    /// Asks the model for its own replies if the recipe wants them; the same on all ranks. `None`: some rank was asked to stop.
    ///
    /// # Errors
    /// Those of [`own_replies`].
    pub fn of<B: Backend>(
        session: &Session,
        config: &RunConfig,
        recipe: &Recipe,
        replica: &Replica<B>,
        ui: &Ui,
    ) -> Result<Option<Self>> {
        let CountedReplies::Own { max_new_tokens } = recipe.identify.counted_replies() else {
            return Ok(Some(Self::OfSession));
        };
        let cache = config.output_dir.join(OWN_REPLIES);
        let (data, sides) = (&session.data, &[PromptSide::Unsafe, PromptSide::Safe]);
        let ask = AskOptions {
            data,
            sides,
            max_new_tokens,
            batch_size: config.generation_batch_size,
            intervention: None,
            cache: Some(&cache),
        };
        let Some(replies) = own_replies(session, replica, ask, ui)? else { return Ok(None) };
        let (rows, counts) = rows_of_replies(data, &replies);
        ui.line(format_args!("own replies: {counts}"));
        Ok(Some(Self::Own(Box::new(rows), counts)))
    }

    /// A sampler of these rows, with the order and the batch size of `recipe`.
    pub fn sampler<'a>(&'a self, session: &'a Session, recipe: &Recipe) -> Sampler<'a> {
        match self {
            Self::OfSession => session.scored_sampler(recipe),
            Self::Own(data, _) => Sampler { data, ..session.sampler(recipe) },
        }
    }

    /// How many of the model's own replies comply, if it was asked.
    pub fn counts(&self) -> Option<ReplyCounts> {
        match self {
            Self::OfSession => None,
            Self::Own(_, counts) => Some(*counts),
        }
    }

    /// Refuses own replies without one to count on each side.
    ///
    /// # Errors
    /// How many replies comply and refuse.
    pub fn check(&self) -> Result<()> {
        let Self::Own(_, counts) = self else { return Ok(()) };
        if counts.unsafe_counted > 0 && counts.safe_counted > 0 {
            return Ok(());
        }
        let message = format!(
            "the model's own replies give nothing to count: {counts}. A model that refuses by itself has no experts that comply; to \
             count on the given refusals instead, use --routing-replies target"
        );
        Err(Failure::new(exit::DATA, message))
    }
}

/// The rows with the replies that count: an unsafe one if it complies; a safe one if it refuses or complies as the row's safe reply
/// does. Where a row has both prompts, both replies count or none.
fn rows_of_replies(data: &Dataset, replies: &[OwnReply]) -> (Dataset, ReplyCounts) {
    let mut counts = ReplyCounts::default();
    let bare = |r: &Record| Record { unsafe_reply: None, safe_reply: None, ..r.clone() };
    let mut records: Vec<Record> = data.records.iter().map(bare).collect();
    for reply in replies {
        let record = &mut records[reply.record];
        let (is_right, side, prompt) = match reply.side {
            PromptSide::Unsafe => (!reply.refuses, &mut record.unsafe_reply, &record.unsafe_prompt),
            PromptSide::Safe => {
                let is_right = reply.target_refuses.is_none_or(|refuses| refuses == reply.refuses);
                (is_right, &mut record.safe_reply, &record.safe_prompt)
            }
        };
        *match (reply.side, reply.refuses) {
            (PromptSide::Unsafe, false) => &mut counts.unsafe_complied,
            (PromptSide::Unsafe, true) => &mut counts.unsafe_refused,
            (PromptSide::Safe, false) => &mut counts.safe_complied,
            (PromptSide::Safe, true) => &mut counts.safe_refused,
        } += 1;
        if is_right && !reply.ids.is_empty() {
            let prompt = prompt.as_ref().expect("the prompt that was answered");
            *side = Some(Example {
                ids: [&prompt[..], &reply.ids[..]].concat(),
                loss: prompt.iter().map(|_| false).chain(reply.ids.iter().map(|_| true)).collect(),
            });
        }
    }
    for record in &mut records {
        let pair = record.unsafe_prompt.is_some() && record.safe_prompt.is_some();
        if pair && (record.unsafe_reply.is_none() || record.safe_reply.is_none()) {
            (record.unsafe_reply, record.safe_reply) = (None, None);
        }
        counts.unsafe_counted += usize::from(record.unsafe_reply.is_some());
        counts.safe_counted += usize::from(record.safe_reply.is_some());
    }
    (Dataset::of_records(records), counts)
}
