//! `--verify N`: the causal check in short, after an identification.

use std::collections::BTreeSet;

use super::check::{self, CausalCheck, Judged};
use crate::backend::Backend;
use crate::collective::on_first;
use crate::config::RunConfig;
use crate::exit::{Result, Stopped};
use crate::experts::ExpertId;
use crate::judge::{Matching, Verdict};
use crate::report::{AblationReport, read_json};
use crate::run::generate::verify_new_tokens;
use crate::run::session::Session;
use crate::train::{Identification, Replica, Switch, can_switch_off};
use crate::ui::Ui;

/// Judges a selection of the model as it is, against `--verify` random sets; writes `ablation.json` and `ablation.html`, and
/// prints the result. `Some`: a signal stopped it.
///
/// # Errors
/// Those of the check; a failed write.
pub fn verify<B: Backend>(
    session: &Session,
    config: &RunConfig,
    replica: &mut Replica<B>,
    found: &Identification,
    ui: &Ui,
) -> Result<Option<Stopped>> {
    let selected: BTreeSet<ExpertId> = found.selected.experts.iter().copied().collect();
    if selected.is_empty() {
        ui.warn("--verify: nothing is selected, so nothing is checked");
        return Ok(None);
    }
    if let Err(reason) = can_switch_off(replica, &selected, Switch::Off) {
        ui.warn(format_args!("--verify: the selection cannot be checked: {reason}; lower --top-k-experts"));
        return Ok(None);
    }
    let check = CausalCheck {
        session,
        benign: session.retain_data().filter(|(_, rows)| check::benign_rows(rows).next().is_some()),
        selected: &selected,
        random_sets: config.verify,
        switch: Switch::Off,
        matching: Matching::LayerLoad,
        seed: config.seed,
        batch_size: config.batch_size,
        max_new_tokens: verify_new_tokens(config),
    };
    let report = match check.run(replica, config, ui)? {
        Judged::Report(report) => report,
        Judged::Stopped(stopped) => return Ok(Some(stopped)),
    };
    on_first(&*replica.world, || check::write(&report, config))?;
    say(&report, ui);
    Ok(None)
}

/// Prints the result of the check before the first round once more, from its file.
pub fn report_again(config: &RunConfig, ui: &Ui) {
    // The check may have had nothing to check; then it has said so, and written nothing.
    if let Ok(report) = read_json::<AblationReport>(&config.output_dir.join("ablation.json")) {
        say(&report, ui);
    }
}

fn say(report: &AblationReport, ui: &Ui) {
    let percent = |share: Option<f64>| share.map_or_else(|| "-".into(), |share| format!("{:.1} %", 100.0 * share));
    let switched = report.selection.prefer_refusal;
    ui.result(format_args!(
        "causal check of the selection in the original model: {} of {} complying rows ({}) prefer the refusal with the selection \
         switched off; with {} random sets {} in the mean; p = {:.4}",
        switched.hits,
        switched.of,
        percent(switched.rate),
        report.random_sets,
        percent(report.random_prefer_refusal.map(|spread| spread.mean)),
        report.p,
    ));
    ui.result(report.headline());
    if let Some(warning) = report.warning() {
        ui.warn(warning);
    } else if report.verdict == Verdict::NotLocalised {
        ui.warn(format_args!(
            "the selection does no more than random sets of experts: nothing special was found. Training it is not known to act \
             on what makes the model comply (p = {:.4}; {} of the complying rows switch)",
            report.p,
            percent(switched.rate),
        ));
    }
}
