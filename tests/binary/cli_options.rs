//! Options: the documentation lists all of them, the real binary refuses invalid ones with the right exit code, and every
//! resolved configuration round-trips through YAML.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use assert_cmd::Command;
use clap::ValueEnum;
use moewarden::cli::{self, Cli};
use moewarden::config::{
    CompareArgs, ConfigError, Device, Mode, RawOptions, Resolved, RunConfig, SaveRounds, Schedule, is_bool, resolve,
    resolve_compare,
};
use moewarden::data::{LongRows, LossOn};
use moewarden::exit::Coded;
use moewarden::experts::{Method, RandomMatch, RoutingTokens, Score, ScorePer, Select, Selection};
use moewarden::optim::LrSchedule;
use moewarden::routers::{ConsistencyLayers, KlType, Statistic};
use moewarden::train::Recompute;
use proptest::prelude::*;

/// The command line after the program's name.
fn parse(line: &str) -> Cli {
    cli::parse(args(line)).unwrap_or_else(|e| panic!("{line}: {e}"))
}

fn args(line: &str) -> Vec<OsString> {
    std::iter::once("moewarden").chain(line.split_whitespace()).map(OsString::from).collect()
}

/// Resolves options of `train` after the required ones.
fn train(line: &str) -> Result<Resolved, ConfigError> {
    match parse(&format!("train --model-name m --dataset-path d {line}")).command {
        cli::Command::Train(run) => resolve(run.config.as_deref(), &run.options),
        other => panic!("{other:?}"),
    }
}

fn config(line: &str) -> RunConfig {
    train(line).unwrap_or_else(|e| panic!("{line}: {e}")).config
}

/// The required options alone.
fn base() -> RunConfig {
    RunConfig { model_name: "m".into(), dataset_path: "d".into(), ..RunConfig::default() }
}

fn moewarden(line: &str) -> Command {
    let mut command = Command::cargo_bin("moewarden").unwrap();
    command.args(line.split_whitespace());
    command
}

fn yaml_file(text: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(&file, text).unwrap();
    file
}

#[test]
fn clap_accepts_the_definition_of_the_options() {
    cli::command().debug_assert();
}

#[test]
fn flags_win_over_yaml_over_defaults() {
    let file = yaml_file("top_k_experts: 7\nbatch-size: 3\nlayers: 2-5\nshuffle: false\n");
    let path = file.path().display();
    assert_eq!(
        config(&format!("--config {path} --batch_size 4 --layers all")),
        RunConfig { top_k_experts: 7, batch_size: 4, shuffle: false, ..base() }
    );
    assert_eq!(config(&format!("--config {path}")).layers, Some(2..=5));
    assert!(config(&format!("--config {path} --shuffle")).shuffle);
    assert_eq!(config(""), base());
}

#[test]
fn command_lines_of_the_original_scripts_carry_over() {
    assert_eq!(
        config(
            "--output_dir z --num_rounds 3 --top_k_experts 100 --batch_size 8 --expert_lr 5e-5 --router_lr 1e-6 --max_samples 64 --kl_type symmetric"
        ),
        RunConfig { output_dir: "z".into(), router_lr: 1e-6, max_samples: 64, kl_type: KlType::Symmetric, ..base() }
    );
    assert_eq!(
        config("--epochs_per_round 2 --skip_router_training --full_param_training"),
        RunConfig { expert_epochs_per_round: 2, skip_router_training: true, mode: Mode::Baseline, ..base() }
    );
    assert_eq!(
        config(
            "--expert_epochs_per_round 2 --skip_expert_training=false --use_random_experts --random_seed 1 --unsafe_expert_top_k 9"
        ),
        RunConfig { expert_epochs_per_round: 2, method: Method::Random, seed: 1, top_k_experts: 9, ..base() }
    );
    assert!(!config("--skip_expert_training").finetune_unsafe_experts);
    // the script with the consistency loss has epochs and no rounds
    assert_eq!(
        config(
            "--num_epochs 3 --learning_rate 1e-5 --batch_size 16 --safe_ratio 0.25 --use_router_consistency_loss \
             --router_consistency_weight 0.2 --router_consistency_type forward --router_consistency_layers unsafe_only \
             --mode selective --finetune_unsafe_experts"
        ),
        RunConfig {
            num_rounds: 1,
            expert_epochs_per_round: 3,
            expert_lr: 1e-5,
            batch_size: 16,
            safe_ratio: 0.25,
            schedule: Schedule::Joint,
            use_router_consistency_loss: true,
            router_consistency_weight: 0.2,
            router_consistency_type: KlType::Forward,
            router_consistency_layers: ConsistencyLayers::UnsafeOnly,
            ..base()
        }
    );
    let c = config("--num_epochs 2 --num_rounds 4");
    assert_eq!((c.num_rounds, c.expert_epochs_per_round, c.router_epochs_per_round), (4, 2, 2));
    assert!(!config("--no_finetune_unsafe_experts").finetune_unsafe_experts);
}

#[test]
fn the_schedule_and_the_loss_follow_each_other() {
    for line in ["--use-router-consistency-loss", "--schedule joint", "--schedule joint --use-router-consistency-loss"]
    {
        let c = config(line);
        assert!(c.schedule == Schedule::Joint && c.use_router_consistency_loss, "{line}");
    }
    let file = yaml_file("schedule: joint\nuse-router-consistency-loss: true\n");
    let path = file.path().display();
    for flag in ["--schedule alternate", "--no-use-router-consistency-loss"] {
        let c = config(&format!("--config {path} {flag}"));
        assert!(c.schedule == Schedule::Alternate && !c.use_router_consistency_loss, "{flag}");
    }
}

#[test]
fn contradictions_and_invalid_values_are_configuration_errors() {
    let cases = [
        ("--batch-size 0", "--batch-size is 0"),
        ("--grad-accum 0", "--grad-accum is 0"),
        ("--num-rounds 0", "--num-rounds is 0"),
        ("--top-k-experts 0", "--no-finetune-unsafe-experts"),
        ("--experts-per-layer 0", "no limit"),
        ("--max-samples 0", "--max-samples is 0"),
        ("--max-length 1", "at least 2"),
        ("--expert-epochs-per-round 0", "at least 1"),
        ("--router-epochs-per-round 0", "--skip-router-training"),
        ("--logging-steps 0", "at least 1"),
        ("--ranks 0", "at least 1"),
        ("--expert-lr 0", "above 0"),
        ("--expert-lr nan", "finite"),
        ("--learning_rate -1e-4", "above 0"),
        ("--weight-decay inf", "finite"),
        ("--weight-decay -1", "not negative"),
        ("--max-grad-norm 0", "no clipping"),
        ("--layers 15-8", "write the lower one first, 8-15"),
        ("--safe-ratio 1 --schedule joint", "between 0 and 1"),
        ("--safe-ratio 0 --schedule joint", "between 0 and 1"),
        ("--router-consistency-weight -1 --schedule joint", "not negative"),
        ("--method routing --risk-threshold 1.5", "between -1 and 1"),
        ("--use-router-consistency-loss --schedule alternate", "leave one out"),
        ("--no-use-router-consistency-loss --schedule joint", "leave one out"),
        ("--schedule joint --skip-router-training", "leave one out"),
        ("--schedule joint --batch-size 1", "at least 2"),
        ("--mode baseline --no-finetune-unsafe-experts", "leave one out"),
        ("--method random --selection per-batch", "--selection global"),
        ("--bootstrap 100001", "at most 100000"),
        ("--identify-until 1.5", "between 0 and 1"),
        ("--identify-until nan", "finite"),
        ("--method given", "--experts FILE"),
        ("--method given --experts f --selection per-batch", "--selection global"),
        ("--method given --experts ~/f", "`~`"),
        ("--overwrite --resume", "leave one out"),
        ("--init random --resume", "leave one out"),
        ("--output-dir=~/runs", "`~`"),
        ("--num-epochs 2 --expert-epochs-per-round 3", "leave one out"),
        ("--num-epochs 2 --epochs-per-round 3", "leave one out"),
        // options without effect
        ("--random-match layer", "--method random"),
        ("--random-exclude-found", "--method random"),
        ("--method routing --score-norm layer", "--method gradient"),
        ("--method random --score-norm layer", "--method gradient"),
        ("--identify once --num-rounds 1", "only one round"),
        ("--identify once --selection per-batch", "every step"),
        ("--identify once --method random", "once a run"),
        ("--identify once --method given --experts f", "all rounds"),
        ("--identify once --identify-until 0.2", "every-round"),
        ("--identify-until 0 --method routing", "--method gradient"),
        ("--identify-until 0 --num-rounds 1", "only one round"),
        ("--bootstrap 0 --method random", "are resampled"),
        ("--bootstrap 50 --selection per-batch", "are resampled"),
        ("--experts f", "--method given"),
        ("--method given --experts f --top-k-experts 7", "selects the experts of --experts"),
        ("--method given --experts f --layers 1-2", "selects the experts of --experts"),
        ("--method given --experts f --experts-per-layer 1", "selects the experts of --experts"),
        ("--method given --experts f --select lowest", "selects the experts of --experts"),
        ("--risk-threshold 0.1", "--method routing"),
        ("--routing-tokens all", "--method routing"),
        ("--routing-replies own", "--method routing"),
        ("--method routing --max-new-tokens 7", "--routing-replies own"),
        ("--method routing --routing-replies traces.jsonl --max-new-tokens 7", "--routing-replies own"),
        ("--method routing --routing-replies own --max-new-tokens 0", "at least 1"),
        ("--method routing --generation-batch-size 7", "--routing-replies own and --verify"),
        ("--verify 3 --generation-batch-size 0", "at least 1"),
        ("--method routing --routing-replies own --selection per-batch", "--selection global"),
        ("--method routing --score l2", "--method gradient"),
        ("--method random --score-per token", "--method gradient"),
        ("--method random --select lowest", "does not rank"),
        ("--skip-router-training --router-lr 1e-3", "not trained"),
        ("--skip-router-training --kl-type reverse", "not trained"),
        ("--skip-router-training --router-epochs-per-round 2", "not trained"),
        ("--skip-expert-training --expert-lr 1e-3", "not trained"),
        ("--mode baseline --selection per-batch", "--mode selective"),
        ("--schedule joint --kl-type reverse", "alternate"),
        ("--schedule joint --router-statistic sample-logits", "alternate"),
        ("--safe-ratio 0.3", "--use-router-consistency-loss"),
        ("--router-consistency-type forward", "--use-router-consistency-loss"),
    ];
    for (line, message) in cases {
        let error = train(line).expect_err(line);
        assert_eq!(error.exit_code(), 78, "{line}: {error}");
        assert!(error.to_string().contains(message), "{line}: {error}");
    }
}

#[test]
fn an_option_without_effect_is_accepted_with_its_default_value() {
    config("--kl-type forward --skip-router-training --risk-threshold 0.05");
    config("--method random --random-match layer --score l2");
    config("--method random --random-exclude-found --score-norm layer --select lowest");
    config("--method given --experts f --expert-lr 1e-3");
    config("--identify once --method routing");
    config("--identify-until 0");
}

#[test]
fn an_option_of_the_file_without_effect_is_a_warning() {
    let file = yaml_file("router-lr: 1e-3\n");
    let path = file.path().display();
    assert_eq!(train(&format!("--config {path}")).unwrap().warnings, Vec::<String>::new());
    let warnings = train(&format!("--config {path} --skip-router-training")).unwrap().warnings;
    assert!(warnings.len() == 1 && warnings[0].contains("router-lr"), "{warnings:?}");
}

#[test]
fn a_number_that_is_not_finite_is_never_dropped() {
    let command = cli::command();
    let mut numbers = 0;
    for arg in command.find_subcommand("train").unwrap().get_arguments() {
        let Some(name) = arg.get_long() else { continue };
        // only floating-point options parse these words, as values that JSON cannot represent
        for word in ["nan", "inf", "-inf"] {
            let line = format!("train --model-name m --dataset-path d --{name}={word}");
            let Ok(Cli { command: cli::Command::Train(run), .. }) = cli::parse(args(&line)) else { continue };
            if serde_json::to_value(&run.options).unwrap()[name].is_null() && name != "config" {
                numbers += 1;
                let error = resolve(None, &run.options).expect_err(&line);
                assert!(error.exit_code() == 78 && error.to_string().contains("finite"), "{line}: {error}");
            }
        }
    }
    assert_eq!(numbers, 3 * 10);
}

#[test]
fn all_problems_are_reported_at_once() {
    let error = train("--batch-size 0 --expert-lr 0").unwrap_err().to_string();
    assert!(error.contains("--batch-size") && error.contains("--expert-lr"), "{error}");
}

#[test]
fn exit_codes_and_messages_of_the_process() {
    let yaml = yaml_file("seed: 1\n\ntop-k-expert: 3\n");
    let yaml = yaml.path().display().to_string();
    let run = "train --model-name m --dataset-path d";
    let cases = [
        (format!("{run} --top-k-expert 3"), 2, "--top-k-experts"),
        (format!("{run} --learning_rat 3"), 2, "--learning-rate"),
        (format!("{run} --kl-type forwards"), 2, "[possible values: forward, reverse, symmetric]"),
        (format!("{run} --batch-size eight"), 2, "--batch-size"),
        (format!("{run} --seed 1 --random_seed 2"), 2, "different values"),
        (format!("{run} --seed 1 --seed 2"), 2, "cannot be used multiple times"),
        (format!("{run} --layers 3-x"), 2, "one range of layers"),
        (format!("{run} --max-samples -1"), 2, "expected a whole number, not negative"),
        (format!("{run} --max-samples 1.5"), 2, "expected a whole number, not negative"),
        (format!("{run} --threads 99999999999999999999"), 2, "the number is too large"),
        (format!("{run} --expert-lr fast"), 2, "expected a number"),
        ("trian".into(), 2, "train"),
        ("train --model-name m".into(), 2, "--dataset-path is required"),
        ("eval --model-name m --dataset-path d --temperature nan".into(), 2, "finite"),
        (format!("{run} --config {yaml}"), 78, ":3: unknown option `top-k-expert`; did you mean `top-k-experts`?"),
        (format!("{run} --config /nowhere.yaml"), 66, "/nowhere.yaml"),
        (format!("{run} --batch-size 0"), 78, "--batch-size is 0"),
        ("identify --model-name m --dataset-path d --expert-lr 1e-3".into(), 78, "`identify` trains nothing"),
        (format!("{run} --device cpu --profile"), 78, "--profile would do nothing: only GPUs use it"),
        (format!("{run} --device cpu --transport host"), 78, "--transport would do nothing"),
        (
            format!("{run} --device cpu --offload host"),
            78,
            "--offload would do nothing: only GPUs use it (--device cuda)",
        ),
        ("eval --model-name m --dataset-path d --device cpu --offload host".into(), 78, "--offload would do nothing"),
        (format!("{run} --ranks 0"), 78, "--ranks is 0"),
    ];
    for (line, code, message) in cases {
        let output = moewarden(&line).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{line}: {stderr}");
        assert!(stderr.starts_with("error: ") && stderr.contains(message), "{line}: {stderr}");
    }
    for line in ["--help", "train --help", "--version"] {
        moewarden(line).assert().success();
    }
}

#[test]
fn every_shipped_configuration_resolves() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
    let mut files: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    assert!(files.len() >= 4, "{files:?}");
    for file in files {
        let flags = RawOptions { dataset_path: Some("d".into()), ..RawOptions::default() };
        let (resolved, args) =
            resolve_compare(Some(&file), &flags, &CompareArgs::default()).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(resolved.warnings, Vec::<String>::new(), "{}", file.display());
        let warnings = resolve(Some(&file), &flags).unwrap().warnings;
        if file.ends_with("experiment.yaml") {
            // Three methods with nine settings of the joint schedule, and alone with three rates; routers; everything with nine
            // settings; nothing.
            assert_eq!(args.variants(&resolved.config).len(), 3 * 9 + 3 * 3 + 1 + 9 + 1);
            let grid = CompareArgs { sweep_mode: None, ..args };
            assert_eq!(grid.variants(&resolved.config).len(), 3 * 45 + 3 * 3 + 1 + 45 + 1);
            assert!(
                warnings.iter().any(|w| w.contains("`sweep`") && w.contains("only `compare` uses it")),
                "{warnings:?}"
            );
        } else {
            assert_eq!(warnings, Vec::<String>::new(), "{}", file.display());
        }
    }
}

#[test]
fn every_field_of_the_configuration_is_an_option() {
    let config = serde_json::to_value(RunConfig::default()).unwrap();
    let raw = serde_json::to_value(RawOptions::default()).unwrap();
    let missing: Vec<_> = config.as_object().unwrap().keys().filter(|k| raw.get(*k).is_none()).collect();
    assert!(missing.is_empty(), "no option for {missing:?}");
    let extra: Vec<_> = raw.as_object().unwrap().keys().filter(|k| config.get(*k).is_none()).collect();
    assert_eq!(extra, ["epochs-per-round", "num-epochs"], "options that decide nothing");
}

// ---- round trip through YAML ----

fn any_of<T: ValueEnum + std::fmt::Debug + 'static>() -> impl Strategy<Value = Option<T>> {
    let values: Vec<T> = T::value_variants().to_vec();
    proptest::option::of(proptest::sample::select(values))
}

fn rate() -> impl Strategy<Value = Option<f64>> {
    proptest::option::of(prop_oneof![1e-9..1.0f64, Just(5e-324), Just(f64::MAX), Just(1.0), Just(0.1)])
}

/// Arbitrary text, and text that YAML could read as another type.
fn text() -> impl Strategy<Value = Option<String>> {
    let tricky = [
        "yes", "null", "~x", "8", "1e5", "#", "- a", "a: b", " a ", "a\nb\n", "\"", "'", "\u{85}", "\u{2028}", "\t",
        "😀", "*", "!x", "%", "\u{feff}",
    ];
    proptest::option::of(prop_oneof![
        proptest::sample::select(tricky.to_vec()).prop_map(String::from),
        ".{1,40}",
        "\\PC*x"
    ])
}

prop_compose! {
    /// Options that often, but not always, resolve.
    fn options()(
        (model_name, safe_response, path) in (text(), text(), text()),
        (long_rows, loss_on, method, score, score_per) in
            (any_of::<LongRows>(), any_of::<LossOn>(), any_of::<Method>(), any_of::<Score>(), any_of::<ScorePer>()),
        (routing_tokens, random_match, select, selection) in
            (any_of::<RoutingTokens>(), any_of::<RandomMatch>(), any_of::<Select>(), any_of::<Selection>()),
        (mode, schedule, lr_schedule, router_statistic) in
            (any_of::<Mode>(), any_of::<Schedule>(), any_of::<LrSchedule>(), any_of::<Statistic>()),
        (kl_type, router_consistency_type, router_consistency_layers, save_rounds, recompute) in
            (any_of::<KlType>(), any_of::<KlType>(), any_of::<ConsistencyLayers>(), any_of::<SaveRounds>(), any_of::<Recompute>()),
        (expert_lr, router_lr, max_grad_norm, weight_decay, router_consistency_weight) in
            (rate(), rate(), rate(), rate(), rate()),
        (risk_threshold, safe_ratio) in (proptest::option::of(-1.0..1.0f64), proptest::option::of(0.001..0.999f64)),
        (keep_failed, shuffle, skip_router_training, use_router_consistency_loss) in
            (any::<Option<bool>>(), any::<Option<bool>>(), any::<Option<bool>>(), any::<Option<bool>>()),
        (seed, threads, warmup_steps, num_epochs) in
            (any::<Option<u64>>(), proptest::option::of(0..64usize), proptest::option::of(0..10_000_001usize), proptest::option::of(1..9usize)),
        (max_samples, top_k_experts, experts_per_layer, layers) in
            (proptest::option::of(1..usize::MAX), proptest::option::of(1..9999usize), proptest::option::of(1..99usize), proptest::option::of((0..9usize, 0..9usize))),
        (finetune_unsafe_experts, overwrite, resume) in (any::<Option<bool>>(), any::<Option<bool>>(), any::<Option<bool>>()),
    ) -> RawOptions {
        let path = path.map(PathBuf::from);
        RawOptions {
            model_name: model_name.or(Some("m".into())),
            dataset_path: Some(path.clone().unwrap_or("d".into())),
            eval_dataset_path: path.clone(),
            retain_dataset_path: path.clone(),
            retain_weight: risk_threshold.map(f64::abs),
            retain_routing_weight: safe_ratio,
            output_dir: path,
            layers: layers.map(|(a, n)| moewarden::config::Layers::Range(a..=a + n)),
            device: Some(Device::Cpu),
            safe_response, long_rows, loss_on, method, score, score_per, routing_tokens, random_match, select, selection, mode,
            schedule, lr_schedule, router_statistic, kl_type, router_consistency_type, router_consistency_layers, save_rounds,
            recompute, expert_lr, router_lr, max_grad_norm, weight_decay, router_consistency_weight, risk_threshold, safe_ratio,
            keep_failed, shuffle, skip_router_training, use_router_consistency_loss, seed, threads, warmup_steps, num_epochs,
            max_samples, top_k_experts, experts_per_layer, finetune_unsafe_experts, overwrite, resume,
            ..RawOptions::default()
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, max_global_rejects: 100_000, ..ProptestConfig::default() })]

    /// Texts are given as flags. The other options are given in a file, where an option without effect is only a warning:
    /// as flags, most combinations would be refused.
    #[test]
    fn a_resolved_configuration_round_trips_through_yaml(mut options in options()) {
        let flags = RawOptions {
            model_name: options.model_name.take(),
            dataset_path: options.dataset_path.take(),
            eval_dataset_path: options.eval_dataset_path.take(),
            retain_dataset_path: options.retain_dataset_path.take(),
            output_dir: options.output_dir.take(),
            safe_response: options.safe_response.take(),
            ..RawOptions::default()
        };
        let file = yaml_file(&serde_json::to_string_pretty(&options).unwrap());
        let config = match resolve(Some(file.path()), &flags) {
            Ok(resolved) => resolved.config,
            Err(ConfigError::Invalid(_)) => return Err(TestCaseError::reject("contradictory")),
            Err(other) => return Err(TestCaseError::fail(other.to_string())),
        };
        let yaml = config.to_yaml().unwrap();
        let again = yaml_file(&yaml);
        let back = resolve(Some(again.path()), &RawOptions::default()).map_err(|e| TestCaseError::fail(format!("{e}\n{yaml}")))?;
        prop_assert_eq!(back.config, config, "{}", yaml);
    }
}

// ---- the documentation ----

/// `docs/options.md`, from the parser.
fn documentation() -> String {
    let mut out = String::from(
        "# Options\n\n\
         Generated from the parser by `MOEWARDEN_BLESS=1 cargo test --test binary cli_options`; a test fails when it is out of \
         date.\n\n\
         Every option of `train` is also a key of the YAML file that `--config` reads; flags win over the file, the file \
         over the defaults. Both accept underscores instead of dashes. A boolean option may stand alone \
         (`--resume`), take a value (`--resume=false`) or be negated (`--no-resume`). An option whose value is JSON may be a \
         map in the file.\n",
    );
    let command = cli::command();
    let options = |c: &clap::Command| -> Vec<clap::Arg> {
        c.get_arguments()
            .filter(|a| !a.is_hide_set() && !matches!(a.get_id().as_str(), "help" | "version"))
            .cloned()
            .collect()
    };
    let train: Vec<String> =
        options(command.find_subcommand("train").unwrap()).iter().map(|a| a.get_id().to_string()).collect();
    for sub in command.get_subcommands() {
        let about = sub.get_about().map(ToString::to_string).unwrap_or_default();
        let stop = if about.ends_with('?') { "" } else { "." };
        writeln!(out, "\n## moewarden {}\n\n{about}{stop}", sub.get_name()).unwrap();
        let mut shown = options(sub);
        if sub.get_name() != "train"
            && shown.iter().any(|a| a.get_id() == "num_samples" || a.get_id() == "top_k_experts")
        {
            let all = shown.iter().any(|a| a.get_id() == "num_rounds");
            shown.retain(|a| !train.contains(&a.get_id().to_string()));
            let which = if all {
                "All options of `train`"
            } else {
                "The options of `train` about its input, finding experts, output and machine"
            };
            writeln!(out, "\n{which}{}", if shown.is_empty() { "." } else { ", and:" }).unwrap();
        }
        let mut topic = None;
        for arg in &shown {
            let heading = arg.get_help_heading().unwrap_or("General");
            if topic != Some(heading) {
                topic = Some(heading);
                writeln!(out, "\n### {heading}\n\n| option | values | meaning |\n|---|---|---|").unwrap();
            }
            let name = arg.get_long().map_or_else(|| format!("{}...", value_name(arg)), |long| format!("--{long}"));
            let aliases: String = arg
                .get_visible_aliases()
                .unwrap_or_default()
                .iter()
                .fold(String::new(), |all, a| all + &format!(", `--{a}`"));
            let values = match arg.get_possible_values() {
                _ if is_bool(arg) || !arg.get_action().takes_values() => "true, false".into(),
                values if values.is_empty() => value_name(arg),
                values => values.iter().map(|v| v.get_name().to_owned()).collect::<Vec<_>>().join(", "),
            };
            let default: Vec<_> = arg.get_default_values().iter().map(|v| v.to_string_lossy()).collect();
            let default = if default.is_empty() { String::new() } else { format!(" [default: {}]", default.join(",")) };
            let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
            assert!(!help.is_empty(), "{name} has no help");
            writeln!(out, "| `{name}`{aliases} | {} | {help}{default} |", values.replace('|', "\\|")).unwrap();
            for value in arg.get_possible_values().iter().filter(|_| !is_bool(arg) && arg.get_action().takes_values()) {
                assert!(value.get_help().is_some(), "{name} {} has no help", value.get_name());
            }
        }
    }
    out
}

fn value_name(arg: &clap::Arg) -> String {
    arg.get_value_names().and_then(|names| names.first()).map(ToString::to_string).unwrap_or_default()
}

#[test]
fn the_documentation_lists_every_option() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/options.md");
    let now = documentation();
    if std::env::var_os("MOEWARDEN_BLESS").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, now).unwrap();
        return;
    }
    let written = fs::read_to_string(&path).unwrap_or_default();
    let differs = written.lines().zip(now.lines()).find(|(a, b)| a != b);
    assert!(
        written == now,
        "docs/options.md is out of date (first difference: {differs:?}): run MOEWARDEN_BLESS=1 cargo test --test binary cli_options"
    );
}
