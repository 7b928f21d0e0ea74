//! The model's own greedy answers to the unsafe prompts, shared among the ranks.

use crate::backend::Backend;
use crate::collective::all_ok;
use crate::exit::{self, Failure, Result};
use crate::report::Sampling;
use crate::run::generate::answer;
use crate::run::progress::Progress;
use crate::train::{Replica, share};
use crate::ui::Ui;

/// The greedy answer to each prompt, at most `max_new_tokens` long, without the end-of-sequence token. Prompt i is answered by
/// rank i mod world size; all ranks get all answers.
///
/// # Errors
/// Logits that are not finite, on any rank; those of the collective.
pub fn own_answers<B: Backend>(
    replica: &Replica<B>,
    prompts: &[&[u32]],
    eos: &[u32],
    max_new_tokens: usize,
    ui: &Ui,
) -> Result<Vec<Vec<u32>>> {
    let world = &*replica.world;
    world.set_activity("the model's own answers");
    let greedy = Sampling { temperature: 0.0, top_p: 1.0, max_new_tokens, seed: 0 };
    let progress = Progress::new(ui, prompts.len().div_ceil(world.world_size()), "own answers");
    let generate = || -> Result<Vec<(usize, Vec<u32>)>> {
        let own = share(prompts, world).map(|(i, prompt)| {
            let said = answer(replica.model(), prompt, eos, &greedy, 0)?;
            progress.step(prompt.len() + said.ids.len(), "");
            Ok((i, said.ids))
        });
        own.collect()
    };
    let own = all_ok(world, generate())?;
    let bytes = serde_json::to_vec(&own).expect("numbers");
    let mut all = vec![Vec::new(); prompts.len()];
    for part in world.all_gather(&bytes)? {
        let part: Vec<(usize, Vec<u32>)> = serde_json::from_slice(&part)
            .map_err(|e| Failure::new(exit::INTERNAL, format!("answers of another rank cannot be read: {e}")))?;
        for (i, ids) in part {
            all[i] = ids;
        }
    }
    Ok(all)
}
