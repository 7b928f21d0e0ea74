//! Answers that are kept in a file as they come, so that an interrupted command goes on from there.

use std::path::Path;
use std::time::Instant;

use crate::backend::Backend;
use crate::collective::{Collective, all_ok};
use crate::exit::{self, Failure, Result};
use crate::report::{AnswerTimes, GenerationSpeed, RowLog, Sampling};
use crate::run::generate::{Answer, Prompt, batches, check_cache};
use crate::run::progress::Progress;
use crate::run::spread::Spread;
use crate::train::Replica;
use crate::ui::Ui;

/// How answers are generated.
pub struct Logged<'a> {
    /// What they are, in messages.
    pub what: &'static str,
    /// The option that limits their tokens.
    pub limit: &'static str,
    /// Tokens that end an answer.
    pub eos: &'a [u32],
    pub sampling: &'a Sampling,
    /// Answers in a batch.
    pub batch_size: usize,
    pub ui: &'a Ui,
}

/// What was made of all answers, or how many there are if a signal stopped the generation.
pub enum Generated<T> {
    All(T, AnswerTimes),
    Stopped { answers: usize, of: usize },
}

impl<T> Generated<T> {
    /// Makes something else of all answers.
    ///
    /// # Errors
    /// Those of `make`.
    pub fn try_map<U>(self, make: impl FnOnce(T) -> Result<U>) -> Result<Generated<U>> {
        Ok(match self {
            Self::All(all, times) => Generated::All(make(all)?, times),
            Self::Stopped { answers, of } => Generated::Stopped { answers, of },
        })
    }
}

/// A line of a file that is none of these rows.
pub fn wrong_row(path: &Path, line: usize, what: &str, why: &str) -> Failure {
    let message = format!("{}:{line}: is no {what} that moewarden wrote ({why}): delete the file", path.display());
    Failure::new(exit::DATA, message)
}

/// The file on rank 0 and the answers that it holds by prompt (`None`: not there).
pub type Kept = (Option<RowLog>, Vec<Option<Answer>>);

/// Lets rank 0 open the file, and tells the other ranks what it holds.
///
/// # Errors
/// Those of `open`; those of the collective.
pub fn open_on_first(
    world: &dyn Collective,
    open: impl FnOnce() -> Result<(RowLog, Vec<Option<Answer>>)>,
) -> Result<Kept> {
    let own = || {
        if world.rank() > 0 {
            return Ok((None, Vec::new()));
        }
        open().map(|(log, answers)| (Some(log), answers))
    };
    let (log, answers) = all_ok(world, own())?;
    let own = serde_json::to_vec(&answers).expect("answers are data");
    let answers = serde_json::from_slice(&world.all_gather(&own)?[0]).expect("the answers of rank 0");
    Ok((log, answers))
}

impl Logged<'_> {
    /// The answers to the prompts, in their order, the same on all ranks. Those that are kept are not generated again; `append` adds
    /// the others to the file, with the places of their prompts.
    ///
    /// # Errors
    /// Logits that are not finite; too little memory; a failed write; those of the collective.
    pub fn generate<B: Backend>(
        &self,
        replica: &Replica<B>,
        prompts: &[Prompt<'_>],
        (mut log, mut answers): Kept,
        append: impl Fn(&mut RowLog, &[(usize, Answer)]) -> Result<()>,
    ) -> Result<Generated<Vec<Answer>>> {
        let (world, ui, what) = (&*replica.world, self.ui, self.what);
        let kept = answers.iter().flatten().count();
        if kept > 0 {
            ui.line(format_args!("{what}: {kept} of {} are there already", prompts.len()));
        }
        let lengths: Vec<usize> = prompts.iter().map(|prompt| prompt.ids.len()).collect();
        // A batch is generated as a whole: then its sums are those of an uninterrupted run, whatever the backend.
        let mut batches = batches(&lengths, self.batch_size);
        batches.retain(|batch| batch.iter().any(|&i| answers[i].is_none()));
        let open = batches.iter().map(Vec::len).sum::<usize>();
        if open > 0 {
            let plan = check_cache(replica.model(), &lengths, &batches, self.sampling.max_new_tokens, self.limit);
            ui.line(format_args!("{what}: {}", all_ok(world, plan)?));
        }
        let clock = Instant::now();
        let mut spread = Spread {
            replica,
            eos: self.eos,
            sampling: self.sampling.clone(),
            progress: Progress::new(ui, open.div_ceil(world.world_size()), what),
            speed: GenerationSpeed { batch_size: self.batch_size, ..GenerationSpeed::default() },
        };
        let (mut generated, mut tokens) = (0, 0);
        spread.answers(prompts, &batches, |found, _| {
            generated += found.len();
            tokens += found.iter().map(|(_, answer)| answer.ids.len()).sum::<usize>();
            let new: Vec<_> = found.into_iter().filter(|(i, _)| answers[*i].is_none()).collect();
            let written = log.as_mut().map_or(Ok(()), |log| append(log, &new));
            new.into_iter().for_each(|(i, answer)| answers[i] = Some(answer));
            all_ok(world, written)
        })?;
        let (of, complete) = (answers.len(), answers.iter().flatten().count());
        if complete < of {
            return Ok(Generated::Stopped { answers: complete, of });
        }
        let seconds = clock.elapsed().as_secs_f64();
        let times = AnswerTimes::gather(world, spread.speed, [generated, tokens], seconds)?;
        ui.line(format_args!("{what}: {times}"));
        Ok(Generated::All(answers.into_iter().flatten().collect(), times))
    }
}
