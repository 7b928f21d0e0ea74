//! The command line: its grammar, and which handler serves which command.

mod argv;

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use serde_json::Value;

use crate::config::{
    AblateArgs, CheckArgs, CompareArgs, EvalArgs, ExportArgs, Init, ORIGINAL_SPELLINGS, QuickstartArgs, RawOptions,
    ReportArgs, Resolved, RunConfig, heading, is_bool, resolve, resolve_compare,
};
use crate::exit::{self, Ended, Failure};
use crate::launch::download::Wanted;
use crate::launch::{self, Launch, Ranks, Started, stop_on_signals};
use crate::quote::cut;
use crate::run;
use crate::train::fault::Fault;
use crate::ui::{Ui, colors_errors};

/// Find the experts of a Mixture-of-Experts language model that answer unsafe prompts, and retrain only those experts
/// and the routers.
#[derive(Debug, Parser)]
#[command(name = "moewarden", version, arg_required_else_help = true, max_term_width = 120)]
pub struct Cli {
    /// Print no progress: only results, warnings and errors
    #[arg(long, short, global = true)]
    pub quiet: bool,
    /// The command.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
#[allow(clippy::large_enum_variant)] // one a process
pub enum Command {
    /// Identify the unsafe experts, retrain them, align the routers; repeat for each round
    Train(RunArgs),
    /// Score and select experts; changes no weight
    Identify(RunArgs),
    /// Generate responses, and measure refusals, loss and routing
    Eval(EvalArgs),
    /// Switch a selection of experts off, compare with random sets: does it cause the answers to unsafe prompts?
    Ablate(AblateArgs),
    /// Draw heatmaps of the scores and selections of finished runs, and compare the runs
    Report(ReportArgs),
    /// Train a matrix of methods, ablations and swept options, evaluate every variant, and test the differences
    Compare {
        /// The matrix.
        #[command(flatten)]
        args: CompareArgs,
        /// The base configuration of all its runs.
        #[command(flatten)]
        run: RunArgs,
    },
    /// Merge a base model and a delta into a complete model folder
    Export(ExportArgs),
    /// Validate model, data and options, show the loss mask, predict memory and time; trains nothing
    Check {
        /// Options of `check` itself.
        #[command(flatten)]
        args: CheckArgs,
        /// The run to check.
        #[command(flatten)]
        run: RunArgs,
    },
    /// Generate a tiny model and data set, train and report, in seconds
    Quickstart(QuickstartArgs),
}

/// The options of a run, as flags and in a YAML file.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// YAML file of these options; flags win over the file. Paths in the file are relative to the current folder
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Download the model if it is a hub id that is not in the local hub cache
    #[arg(long, help_heading = heading::INPUT)]
    pub download: bool,
    /// The flags.
    #[command(flatten)]
    pub options: RawOptions,
}

impl RunArgs {
    /// The options of a run.
    fn resolve(&self, ui: &Ui) -> exit::Result<RunConfig> {
        self.accept(resolve(self.config.as_deref(), &self.options)?, ui)
    }

    /// [`Self::resolve`] for `compare`, and its own options.
    fn resolve_compare(&self, own: &CompareArgs, ui: &Ui) -> exit::Result<(RunConfig, CompareArgs)> {
        let (resolved, args) = resolve_compare(self.config.as_deref(), &self.options, own)?;
        Ok((self.accept(resolved, ui)?, args))
    }

    fn accept(&self, resolved: Resolved, ui: &Ui) -> exit::Result<RunConfig> {
        for warning in &resolved.warnings {
            ui.warn(warning);
        }
        Ok(resolved.config)
    }

    /// Downloads the model, if asked to.
    fn download(&self, config: &RunConfig, ranks: &Ranks, ui: &Ui) -> exit::Result<()> {
        let wanted = if config.init == Init::Random { Wanted::NoWeights } else { Wanted::Model };
        download(self.download, &[(&config.model_name, wanted)], ranks, ui)
    }
}

/// Parses the command line. The error carries its exit code (2; 0 for help and version) and its output.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Cli, clap::Error> {
    let mut command = command();
    let args = argv::canonical(args.into_iter().collect(), &mut command)?;
    let matches = command.try_get_matches_from_mut(args)?;
    Cli::from_arg_matches(&matches)
}

/// Prints help, or an error in the user's words, with a long value cut.
pub fn print(help_or_error: &clap::Error) -> std::io::Result<()> {
    /// What Rust's parsers of numbers say.
    const WORDS: [(&str, &str); 6] = [
        ("invalid digit found in string", "expected a whole number, not negative"),
        ("number too large to fit in target type", "the number is too large"),
        ("cannot parse integer from empty string", "expected a whole number"),
        ("invalid float literal", "expected a number"),
        ("cannot parse float from empty string", "expected a number"),
        ("provided string was not `true` or `false`", "expected true or false"),
    ];
    /// Characters of a value that are shown.
    const VALUE: usize = 200;
    if !help_or_error.use_stderr() {
        return help_or_error.print();
    }
    let text = help_or_error.render();
    let own = if colors_errors() { text.ansi().to_string() } else { text.to_string() };
    let mut shown = own.clone();
    if help_or_error.kind() == ErrorKind::ValueValidation
        && let Some((theirs, ours)) = WORDS.iter().find(|(theirs, _)| shown.contains(theirs))
    {
        shown = shown.replacen(theirs, ours, 1);
    }
    for kind in [ContextKind::InvalidValue, ContextKind::InvalidArg, ContextKind::InvalidSubcommand] {
        if let Some(ContextValue::String(value)) = help_or_error.get(kind)
            && value.chars().count() > VALUE
        {
            shown = shown.replace(&**value, &cut(value, VALUE));
        }
    }
    // clap knows what else decides colours.
    if shown == own { help_or_error.print() } else { std::io::stderr().write_all(shown.as_bytes()) }
}

/// Runs one command to its end.
pub fn run(cli: &Cli) -> exit::Result<Ended<()>> {
    let launch = Launch::from_env()?;
    let ui = &if launch.rank == 0 { Ui::new(cli.quiet) } else { Ui::silent() };
    ui.show_meters();
    let start = |config: &RunConfig| {
        let fault = Fault::from_variable(launch::fault().as_deref())?;
        Started::new(config, &launch, stop_on_signals()?, fault, ui)
    };
    match cli.command {
        Command::Train(_) | Command::Identify(_) | Command::Ablate(_) | Command::Eval(_) | Command::Compare { .. } => {}
        _ => launch.check_single()?,
    }
    let done = |()| Ended::Done(());
    match &cli.command {
        Command::Train(run) => {
            let config = run.resolve(ui)?;
            let started = start(&config)?;
            run.download(&config, &started.ranks, ui)?;
            Ok(match run::train(&config, &started, ui)? {
                Ended::Done(_) => Ended::Done(()),
                Ended::Stopped(stopped) => Ended::Stopped(stopped),
            })
        }
        Command::Identify(run) => {
            refuse_training_flags(&run.options)?;
            let config = run.resolve(ui)?;
            let started = start(&config)?;
            run.download(&config, &started.ranks, ui)?;
            run::identify(&config, &started, ui)
        }
        Command::Eval(args) => {
            let others = [&args.routers, &args.route_as, &args.drift_from, &args.judge];
            let models = [&args.model_name].into_iter().chain(others.into_iter().flatten());
            let models: Vec<_> = models.map(|name| (name, Wanted::Model)).collect();
            let started = start(&args.run_config()?)?;
            download(args.download, &models, &started.ranks, ui)?;
            run::eval(args, &started, ui)
        }
        Command::Ablate(args) => {
            let config = args.run_config()?;
            let started = start(&config)?;
            download(args.download, &[(&args.model_name, Wanted::Model)], &started.ranks, ui)?;
            run::ablate(&config, args, &started, ui)
        }
        Command::Report(args) => run::report(args, ui).map(done),
        Command::Compare { args, run } => {
            let (config, args) = run.resolve_compare(args, ui)?;
            let started = start(&config)?;
            run.download(&config, &started.ranks, ui)?;
            if let Some(judge) = &args.judge {
                download(run.download, &[(judge, Wanted::Model)], &started.ranks, ui)?;
            }
            run::compare(&config, &args, &started, ui)
        }
        Command::Export(args) => {
            download(args.download, &[(&args.base, Wanted::Model)], &Ranks::single(), ui)?;
            run::export(args, ui).map(done)
        }
        Command::Check { args, run } => {
            let config = run.resolve(ui)?;
            run.download(&config, &Ranks::single(), ui)?;
            run::check(&config, args, ui).map(done)
        }
        Command::Quickstart(args) => run::quickstart(args, ui).map(done),
    }
}

/// Downloads these models, if asked to, unless they are folders or in the cache.
fn download(asked: bool, models: &[(&String, Wanted)], ranks: &Ranks, ui: &Ui) -> exit::Result<()> {
    if !asked {
        return Ok(());
    }
    ranks.in_turns("downloading the model", || {
        models.iter().try_for_each(|(name, wanted)| {
            let (cache, access) = (launch::hub_cache(), launch::hub_access());
            Ok(launch::download::download(name, *wanted, &cache, access, ranks.stop(), ui)?)
        })
    })
}

/// The grammar: clap's derived one, plus the defaults of [`RunConfig::default`] in the help, and boolean options that
/// need no value.
pub fn command() -> clap::Command {
    let defaults = serde_json::to_value(RunConfig::default()).expect("the defaults are text and numbers");
    let originals: String = ORIGINAL_SPELLINGS
        .iter()
        .map(|(spelling, option, value)| match *value {
            "false" => format!("  --{spelling} = --no-{option}\n"),
            value => format!("  --{spelling} = --{option} {value}\n"),
        })
        .collect();
    let after = format!(
        "Options accept underscores instead of dashes (--top_k_experts). --no-OPTION sets a boolean option to false.\n\
         Flags of the original scripts:\n{originals}"
    );
    Cli::command().mut_subcommands(|command| {
        let is_run = command.get_arguments().any(|a| a.get_id() == "num_rounds");
        let identify = command.get_name() == "identify";
        let command = if is_run { command.after_help(after.clone()) } else { command };
        command.mut_args(|arg| {
            let arg = if is_run { run_option(arg, &defaults) } else { arg };
            let hidden = identify && is_training(&arg);
            arg.hide(hidden)
        })
    })
}

/// Adds the default of a run option to its help, and makes the value of a boolean option optional.
fn run_option(arg: Arg, defaults: &Value) -> Arg {
    let default = arg.get_long().and_then(|name| defaults.get(name)).map_or_else(String::new, |value| match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        Value::Number(n) if n.as_f64().is_some_and(|x| x > 0.0 && x < 1e-3) => {
            format!("{:e}", n.as_f64().unwrap_or_default())
        }
        other => other.to_string(),
    });
    let is_bool = is_bool(&arg);
    let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
    let name = arg.get_long().unwrap_or_default();
    let help = match default.as_str() {
        "true" if is_bool => format!("{help} [default: true; --no-{name} turns it off]"),
        "false" if is_bool => help,
        "" => help,
        default => format!("{help} [default: {default}]"),
    };
    let arg = arg.help(help);
    if is_bool {
        arg.num_args(0..=1)
            .require_equals(true)
            .default_missing_value("true")
            .hide_possible_values(true)
            .value_name("BOOL")
    } else {
        arg
    }
}

/// Whether an option concerns only training.
fn is_training(arg: &Arg) -> bool {
    matches!(
        arg.get_help_heading(),
        Some(heading::TRAINING | heading::OPTIMIZER | heading::ROUTERS | heading::CHECKPOINTS)
    )
}

/// Refuses training flags of `identify`, where they have no effect. (In its options file, which `train` may share, they
/// are allowed.)
fn refuse_training_flags(flags: &RawOptions) -> exit::Result<()> {
    let options = RawOptions::augment_args(clap::Command::new("options"));
    for arg in options.get_arguments().filter(|a| is_training(a)) {
        let name = arg.get_long().unwrap_or_default();
        if flags.is_given(name) {
            return Err(Failure::new(
                exit::CONFIG,
                format!("--{name} would do nothing: `identify` trains nothing; leave it out"),
            ));
        }
    }
    Ok(())
}
