//! A golden case: its files, and a replica of its model.

use std::path::PathBuf;
use std::sync::Arc;

use moewarden::backend::{Backend, cpu::Cpu};
use moewarden::config::{RunConfig, Schedule};
use moewarden::data::{Example, MicroBatch, Sampler};
use moewarden::experts::ExpertId;
use moewarden::launch::Rank;
use moewarden::model::{
    GradPlan, LossGrads, Model, OffloadedBelow, ParamId, ParamKind, ParamSpec, PassEnd, Proj, Sinks,
};
use moewarden::run::session::Session;
use moewarden::train::memory::KeptLayers;
use moewarden::train::{
    ExpertCrossEntropy, Identification, JointConsistency, Objective, PhasePlan, Recipe, Recompute, Replica, Retention,
    RouterAlignment, StepResult, TrainingPhase, find,
};
use moewarden::ui::Ui;
use serde_json::Value;

/// One folder of `tests/golden`, opened.
pub struct Case {
    pub expect: Value,
    /// The defaults with the values of `options`, and rows in the order of the file.
    pub config: RunConfig,
    pub session: Session,
}

/// The folder of the golden cases. cargo sets `CARGO_MANIFEST_DIR` when it runs tests; a test program that runs on another
/// machine than it was built on gets it from its caller.
pub fn golden_dir() -> PathBuf {
    let root = std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    root.join("tests/golden")
}

impl Case {
    /// A case with the targets that its fixture gives, in place of the targets that the program derives from the rows.
    pub fn open(name: &str) -> Self {
        let mut case = Self::open_as_read(name);
        let records = case.expect["records"].as_array().expect("records");
        for (ours, theirs) in case.session.data.records.iter_mut().zip(records) {
            ours.unsafe_reply = example(&theirs["unsafe_reply"], false);
            ours.safe_reply = example(&theirs["safe_reply"], false);
        }
        case
    }

    /// A case with the targets that the program derives from the rows.
    pub fn open_as_read(name: &str) -> Self {
        let dir = golden_dir().join(name);
        let text = std::fs::read_to_string(dir.join("expect.json")).expect("expect.json");
        let expect: Value = serde_json::from_str(&text).expect("expect.json is JSON");
        let options = &expect["options"];
        let number = |key: &str| options[key].as_f64().unwrap_or_else(|| panic!("option {key}"));
        let config = RunConfig {
            model_name: dir.join("model").to_str().expect("a path in UTF-8").into(),
            dataset_path: dir.join("data.json"),
            shuffle: false,
            num_rounds: 1,
            batch_size: number("batch_size") as usize,
            top_k_experts: number("top_k_experts") as usize,
            expert_lr: number("expert_lr"),
            router_lr: number("router_lr"),
            router_consistency_weight: number("router_consistency_weight"),
            safe_ratio: number("safe_ratio"),
            weight_decay: number("weight_decay"),
            recompute: Recompute::Never,
            ..RunConfig::default()
        };
        let recipe = config.recipe().expect("options without contradictions");
        let session = Session::open(&config, &recipe, &Ui::silent()).expect("the case opens");
        Self { expect, config, session }
    }

    /// The case with these options on the CPU. (The number of threads changes no result; tests use 1 and 2.)
    pub fn run(&self, config: &RunConfig, threads: usize) -> CaseRun<'_, Cpu> {
        self.run_on(config, Arc::new(Cpu::new(threads)))
    }

    /// The case with these options on another backend.
    pub fn run_on<B: Backend>(&self, config: &RunConfig, backend: Arc<B>) -> CaseRun<'_, B> {
        self.run_as(config, backend, &Rank::single(Ui::silent()))
    }

    /// The case with these options as one rank of several.
    pub fn run_as<B: Backend>(&self, config: &RunConfig, backend: Arc<B>, rank: &Rank) -> CaseRun<'_, B> {
        CaseRun::new(&self.session, config, backend, rank)
    }

    /// Whether it is one of the four cases (one per family) with the long list of training runs.
    pub fn is_long(&self) -> bool {
        self.expect["training"].as_array().expect("training runs").len() > 4
    }

    /// The selection that the case trains.
    pub fn selected(&self) -> Vec<ExpertId> {
        experts(&self.expect["selection"]["highest"])
    }

    /// The configuration with these options changed; the keys are those of `expect.json` (`grad_accum`, ...).
    pub fn config_with(&self, options: &Value) -> RunConfig {
        let mut all = serde_json::to_value(&self.config).expect("a configuration is data");
        for (key, value) in options.as_object().expect("options") {
            if key != "phase" {
                let key = key.replace('_', "-");
                assert!(all.get(&key).is_some(), "there is no option {key}");
                all[key] = value.clone();
            }
        }
        let mut config: RunConfig = serde_json::from_value(all).expect("options of a run");
        if options["phase"] == "joint" {
            config.schedule = Schedule::Joint;
            config.use_router_consistency_loss = true;
            config.batch_size = self.expect["options"]["joint_batch_size"].as_u64().expect("joint_batch_size") as usize;
        }
        config
    }
}

/// A replica of a case's model, and what the options of a run make of it.
pub struct CaseRun<'a, B: Backend> {
    pub replica: Replica<B>,
    pub recipe: Recipe,
    /// Added to every step, if it is set.
    pub retention: Option<Arc<Retention<'a, B>>>,
    session: &'a Session,
}

impl<'a, B: Backend> CaseRun<'a, B> {
    pub fn new(session: &'a Session, config: &RunConfig, backend: Arc<B>, rank: &Rank) -> Self {
        Self::offloaded(session, config, backend, rank, OffloadedBelow::default())
    }

    /// With the routed experts of lower layers in the host's memory.
    pub fn offloaded(
        session: &'a Session,
        config: &RunConfig,
        backend: Arc<B>,
        rank: &Rank,
        below: OffloadedBelow,
    ) -> Self {
        let recipe = config.recipe().expect("options without contradictions");
        let mut replica = session.replica(backend, None, rank, below);
        if recipe.recompute == Recompute::Always {
            replica.kept = KeptLayers(1);
        }
        Self { replica, recipe, retention: None, session }
    }

    pub fn model(&self) -> &Model<B> {
        self.replica.model()
    }

    pub fn sampler(&self) -> Sampler<'a> {
        self.session.sampler(&self.recipe)
    }

    /// The identification of the first round.
    pub fn identify(&self) -> Identification {
        self.find(self.sampler().unsafe_order(0))
    }

    /// The identification over these micro-batches.
    pub fn find(&self, micro_batches: Vec<Vec<usize>>) -> Identification {
        find(&self.replica, &self.recipe.identify, self.sampler(), micro_batches).expect("finite losses")
    }

    /// Micro-batches of all unsafe replies, in the order of the first round.
    pub fn unsafe_batches(&self) -> Vec<MicroBatch> {
        self.sampler().unsafe_order(0).iter().map(|records| self.sampler().pack_unsafe(records)).collect()
    }

    /// Runs one phase (`expert`, `router`, `joint`) of the first round; its steps.
    pub fn run_phase(&mut self, name: &str, selected: &[ExpertId]) -> Vec<StepResult> {
        let recipe = self.recipe.clone();
        let (identify, sampler, selected) = (&recipe.identify, self.sampler(), selected.to_vec());
        let phases = recipe.phases();
        let named = |plan: &&PhasePlan<'_>| serde_json::to_value(plan.phase()).expect("a name") == name;
        match *phases.iter().find(named).unwrap_or_else(|| panic!("a run with the phase {name}")) {
            PhasePlan::Identify => panic!("a phase that trains"),
            PhasePlan::Expert(phase) => self.run_objective(ExpertCrossEntropy { phase, identify, sampler, selected }),
            PhasePlan::Router(phase) => self.run_objective(RouterAlignment::new(phase, sampler).expect("safe prompts")),
            PhasePlan::Joint(phase) => {
                self.run_objective(JointConsistency::new(phase, identify, sampler, selected).expect("safe examples"))
            }
        }
    }

    fn run_objective<O: Objective<B>>(&mut self, objective: O) -> Vec<StepResult> {
        let updates = self.recipe.updates.clone();
        let phase = TrainingPhase::new(objective, &updates, 0, &self.replica);
        let mut phase = phase.with_retention(self.retention.clone());
        phase.prepare(&self.replica).expect("finite statistics");
        let mut steps = Vec::new();
        while !phase.is_done() {
            steps.push(phase.step(&mut self.replica).expect("a step"));
        }
        steps
    }
}

/// Token ids, where the fixture has them.
pub fn ids(value: &Value) -> Option<Vec<u32>> {
    value.as_array().map(|ids| ids.iter().map(|id| id.as_u64().expect("an id") as u32).collect())
}

/// A reply of the fixture: `{ids, loss}`, where `loss` lists half-open ranges of targets. `last_turn`: only the last range.
pub fn example(value: &Value, last_turn: bool) -> Option<Example> {
    let ids = ids(&value["ids"])?;
    let mut loss = vec![false; ids.len()];
    let ranges = value["loss"].as_array().expect("ranges");
    for range in &ranges[if last_turn { ranges.len() - 1 } else { 0 }..] {
        let edge = |i: usize| range[i].as_u64().expect("an edge") as usize;
        loss[edge(0)..edge(1)].fill(true);
    }
    loss[0] = false; // nothing predicts the first token
    Some(Example { ids, loss })
}

/// The gradients of the mean cross-entropy of one micro-batch by these parameters, and the loss.
pub fn ce_gradients<B: Backend>(replica: &Replica<B>, batch: &MicroBatch, ids: &[ParamId]) -> (f64, Vec<Vec<f32>>) {
    let (b, model) = (&*replica.model().backend, replica.model());
    let plan = GradPlan::train(&model.table, model.config.layers.len(), ids);
    let inputs = replica.inputs(batch);
    let forward = replica.forward(&inputs, Some(&plan), PassEnd::Loss { all_rows: false }, None);
    let (mut grads, mut scores) = (b.buffer(plan.len()), b.scores(0));
    let mut sinks = Sinks { plan: &plan, grads: &mut grads, scores: &mut scores, done: None };
    let n = batch.targets.len() as f64;
    let loss_grads = LossGrads { ce_scale: (1.0 / n) as f32, routers: &[] };
    let loss = model.backward(&inputs, forward, loss_grads, &mut sinks).expect("a pass to the loss") / n;
    let read = |id: &ParamId| {
        let at = plan.slot(*id).expect("a slot");
        b.buffer_read(&grads, at..at + model.table.params[*id].len())
    };
    (loss, ids.iter().map(read).collect())
}

/// The name that the fixtures give a parameter.
pub fn fixture_name(spec: &ParamSpec) -> String {
    match spec.kind {
        ParamKind::Expert(layer, expert, proj) => {
            let matrix = match proj {
                Proj::Gate => "gate",
                Proj::Up => "up",
                Proj::Down => "down",
            };
            format!("layers.{layer}.experts.{expert}.{matrix}")
        }
        _ => spec.tensor.clone(),
    }
}

/// All numbers in a JSON value, in order, however they are nested.
pub fn numbers(value: &Value) -> Vec<f64> {
    match value {
        Value::Array(items) => items.iter().flat_map(numbers).collect(),
        other => vec![other.as_f64().unwrap_or_else(|| panic!("a number, not {other}"))],
    }
}

/// A list of [layer, expert].
pub fn experts(value: &Value) -> Vec<ExpertId> {
    serde_json::from_value(value.clone()).expect("a list of experts")
}

/// The largest allowed difference from an expected list, and the reason for it.
#[derive(Clone, Copy)]
pub struct Tolerance {
    /// Relative to the largest expected number of the list.
    pub relative: f64,
    /// Added to the relative part.
    pub absolute: f64,
    /// The source of the difference.
    pub why: &'static str,
}

/// Panics, naming the worst index, unless both lists agree within the tolerance. NaN is never close.
#[track_caller]
pub fn assert_near(what: &str, actual: &[f64], expected: &[f64], tolerance: Tolerance) {
    assert_eq!(actual.len(), expected.len(), "{what}: lengths");
    let largest = expected.iter().fold(0.0f64, |m, x| m.max(x.abs()));
    let allowed = tolerance.absolute + tolerance.relative * largest;
    for (i, (a, e)) in actual.iter().zip(expected).enumerate() {
        let off = (a - e).abs();
        if off > 0.0 && std::env::var_os("MOEWARDEN_SHOW_ERRORS").is_some() {
            eprintln!("error {:.1e} of the tolerance: {what}[{i}]", off / allowed);
        }
        assert!(
            off <= allowed,
            "{what}, index {i} of {}: {a} instead of {e}, off by {off:.2e} where {allowed:.2e} is allowed ({})",
            actual.len(),
            tolerance.why
        );
    }
}
