//! `ablate`: whether a selection of experts causes the answers to unsafe prompts, and the same check after an identification.
//!
//! The rule is in docs/method.md, section "Causal check".

mod check;
mod verify;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

pub(super) use verify::{report_again, verify};

use check::{CausalCheck, Judged};

use super::dense::fit_recipe;
use super::forecast::forward_passes;
use super::prepare;
use super::session::Session;
use crate::backend::Backend;
use crate::collective::on_first;
use crate::config::{AblateArgs, RunConfig};
use crate::exit::{self, Ended, Failure, Result};
use crate::experts::ExpertId;
use crate::launch::{Opened, Rank, Started};
use crate::report::{AblationReport, ExpertsFile};
use crate::train::{DeviceTransport, Recipe, can_switch_off};
use crate::ui::Ui;

/// The experts of a file, all of which the model has.
fn read_experts(path: &Path, session: &Session) -> Result<BTreeSet<ExpertId>> {
    let file = ExpertsFile::read(path)?;
    file.check(&session.model.moe_layers().layers, session.model.num_experts)?;
    Ok(file.experts.into_iter().collect())
}

/// Switches a selection off in the model, compares it with random sets, and says whether it causes compliance. Writes
/// `ablation.json` and `ablation.html`; changes no weight.
///
/// # Errors
/// Inputs that cannot be read or are invalid; experts that the model does not have or that cannot be switched off; an output
/// folder or a device that cannot be used; losses that are not finite; a rank that fails.
pub fn ablate(config: &RunConfig, args: &AblateArgs, started: &Started, ui: &Ui) -> Result<Ended<()>> {
    let ranks = &started.ranks;
    let recipe = config.recipe_of_identification()?; // needs no safe rows, unlike routing frequencies
    let recipe = ranks.all_ok(fit_recipe(recipe, config, ui))?;
    let session = prepare::open(config, None, &recipe, ranks, ui)?;
    let selected = ranks.all_ok(read_experts(&args.experts, &session))?;
    ranks.all_ok(session.tokenizer.penalties().map_err(Failure::from))?; // before there is a folder
    if let Some(path) = &args.benign_dataset_path {
        let benign = session.held_out.as_ref().map_or(0, |data| check::benign_rows(data).count());
        if benign == 0 {
            let message = format!(
                "{} holds no benign row: a chat row labelled safe with an assistant turn; without such rows leave \
                 --benign-dataset-path out",
                path.display()
            );
            return Err(Failure::new(exit::DATA, message));
        }
    }
    let _lock = prepare::take_output_dir(config, ranks)?;
    ui.line(session.describe());
    let (config, args, device) = (config.clone(), args.clone(), started.device.clone());
    ranks.run(ui, move |rank| {
        let run = RankInputs { session: &session, config: &config, recipe: &recipe, args: &args, rank };
        match device.open(&config, session.workload(config.batch_size), rank)? {
            Opened::Cpu(cpu) => run.judge(&selected, cpu, None),
            Opened::Cuda(cuda, transport) => run.judge(&selected, cuda, transport),
        }
    })
}

/// The inputs of one rank.
struct RankInputs<'a> {
    session: &'a Session,
    config: &'a RunConfig,
    recipe: &'a Recipe,
    args: &'a AblateArgs,
    rank: &'a Rank,
}

impl RankInputs<'_> {
    fn judge<B: Backend>(
        &self,
        selected: &BTreeSet<ExpertId>,
        backend: Arc<B>,
        transport: Option<Arc<dyn DeviceTransport<B>>>,
    ) -> Result<Ended<()>> {
        let Self { session, config, recipe, args, rank } = *self;
        let ui = &rank.ui;
        let offloaded = prepare::place_experts(session, config, rank, 1, &*backend, |budget| {
            let prompts = session.data.records.iter().filter_map(|r| Some(r.unsafe_prompt.as_ref()?.len()));
            let prompts: Vec<usize> = prompts.collect();
            let replies = (&*prompts, args.max_new_tokens, config.generation_batch_size);
            forward_passes(session, recipe.batch_size, replies, budget)
        })?;
        let mut replica = session.replica(backend, transport, rank, offloaded);
        can_switch_off(&mut replica, selected, args.switch).map_err(|reason| {
            let message =
                format!("{}: {reason}; give fewer experts of a layer, or --switch zero", args.experts.display());
            Failure::new(exit::CONFIG, message)
        })?;
        let check = CausalCheck {
            session,
            benign: args.benign_dataset_path.as_deref().zip(session.held_out.as_ref()),
            selected,
            random_sets: args.random_sets,
            switch: args.switch,
            matching: args.matching,
            seed: args.seed,
            batch_size: recipe.batch_size,
            max_new_tokens: args.max_new_tokens,
        };
        let report = match check.run(&mut replica, config, ui)? {
            Judged::Report(report) => report,
            Judged::Stopped(stopped) => return Ok(Ended::Stopped(stopped)),
        };
        on_first(&*rank.world, || check::write(&report, config))?;
        replica.finish();
        show(&report, ui);
        ui.result(format_args!("outcomes of all sets: {}", config.output_dir.join("ablation.json").display()));
        ui.result(format_args!("page: {}", config.output_dir.join("ablation.html").display()));
        Ok(Ended::Done(()))
    }
}

/// Prints the table and the verdict.
fn show(report: &AblationReport, ui: &Ui) {
    ui.result(report.table().to_text().trim_end());
    ui.result(report.headline());
    if let Some(warning) = report.warning() {
        ui.warn(warning);
    }
}
