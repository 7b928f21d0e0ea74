//! The models that a run writes: of each round, and the final one.

use super::RankRun;
use crate::backend::Backend;
use crate::checkpoint::{Position, export_replacing};
use crate::collective::{all_ok, with_heartbeat};
use crate::config::SaveRounds;
use crate::exit::Result;
use crate::run::rounds;
use crate::run::verify::verify_frozen;
use crate::train::{Measured, Phase};

impl<B: Backend> RankRun<'_, B> {
    /// Writes the model of a round, as `--save-rounds` says, and the metadata so far.
    pub(super) fn save_round(&mut self, round: usize) -> Result<()> {
        let Self { session, outputs, replica, config, ui, .. } = self;
        let dir = outputs.path(format!("round_{}", round + 1));
        let write = || -> Result<Option<String>> {
            if replica.world.rank() != 0 {
                return Ok(None);
            }
            let weights = rounds::write(session, config, replica, &dir)?;
            if session.checkpoint.is_some() && config.save_rounds != SaveRounds::None {
                ui.line(format_args!("round {} saved: {}", round + 1, dir.display()));
            }
            outputs.write_metadata()?;
            Ok(weights)
        };
        let world = &*replica.world;
        world.set_activity(&format!("saving the model of round {}", round + 1));
        if let Some(weights) = all_ok(world, with_heartbeat(world, write)?)? {
            outputs.round_written(round + 1, weights);
        }
        Ok(())
    }

    /// Writes the model of the last round again, if a run that resumes at its end lacks it; warns of earlier ones, which are in
    /// no checkpoint, and keeps those that are damaged for the end of the run.
    pub(super) fn write_rounds_again(&mut self, position: Position) -> Result<()> {
        for round in 0..position.round {
            let Self { session, outputs, replica, config, ui, .. } = &*self;
            let (dir, world) = (outputs.path(format!("round_{}", round + 1)), &*replica.world);
            let find = || match world.rank() {
                0 => rounds::find(session, config, &dir, outputs.weights_of_round(round + 1)),
                _ => rounds::Found::Whole,
            };
            world.set_activity(&format!("verifying the model of round {}", round + 1));
            let found = with_heartbeat(world, find)?;
            if found == rounds::Found::Unverified {
                rounds::note_unverified(&dir, ui);
            }
            let lacking = !matches!(found, rounds::Found::Whole | rounds::Found::Unverified);
            if position == Position::start(round + 1, Phase::Identify) {
                let [again] = replica.any([lacking])?;
                if again {
                    self.save_round(round)?;
                }
            } else if found == rounds::Found::Missing {
                rounds::warn_of_missing(&dir, ui);
            } else if lacking {
                match found {
                    rounds::Found::OtherFiles => rounds::warn_of_other_files(&dir, &session.dir, ui),
                    _ => rounds::warn_of_damaged(&dir, ui),
                }
                self.damaged.push(dir);
            }
        }
        Ok(())
    }

    /// Writes the final model, and verifies that all frozen parameters are bit-identical to their source.
    pub(super) fn write_final_model(&mut self, after: &Measured) -> Result<()> {
        self.outputs.measured(&self.before, after);
        let Self { session, outputs, ui, replica, .. } = self;
        let write = || -> Result<()> {
            if replica.world.rank() != 0 {
                return Ok(());
            }
            outputs.write_metadata()?;
            let Some(checkpoint) = &session.checkpoint else {
                ui.result("no model is written: its weights are random (--init random)");
                return Ok(());
            };
            let final_model = outputs.path("final_model");
            export_replacing(&session.dir, checkpoint, &session.table, &replica.changed(), &final_model)?;
            let frozen = verify_frozen(session, &final_model, replica.written())?;
            ui.result(format_args!(
                "frozen: {} parameters ({:.2} % of the elements) have the source's bits, blake3 {}",
                frozen.frozen,
                100.0 * frozen.frozen_elements as f64 / session.table.total().elements as f64,
                &frozen.hash.to_hex()[..16]
            ));
            ui.result(format_args!("trained: {} parameters, {} of them changed", frozen.trained, frozen.changed));
            if frozen.trained > 0 && frozen.changed == 0 {
                ui.warn(
                    "training changed no parameter: the final model is the original one. Are the learning rates, or the number of steps after \
                     the warm-up, too small?",
                );
            }
            ui.result(format_args!("final model: {}", final_model.display()));
            Ok(())
        };
        let world = &*replica.world;
        world.set_activity("writing the final model");
        all_ok(world, with_heartbeat(world, write)?)
    }
}
