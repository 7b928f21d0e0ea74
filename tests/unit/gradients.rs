//! Gradients of whole models: against finite differences, against candle's autograd, and of a subset of the parameters
//! against the gradients of all parameters.

use std::num::NonZeroUsize;
use std::sync::Arc;

use crate::autograd::Autograd;
use crate::tiny_model::{Tiny, dense_specs, nothing_kept, specs};
use crate::values::{Rng, assert_close};
use moewarden::backend::{Backend, HostTensor, cpu::Cpu};
use moewarden::launch::Rank;
use moewarden::model::tiny::TinySpec;
use moewarden::model::{
    BaseHead, ForwardOptions, Group, LossGrads, ParamId, ParamKind, PassEnd, Routed, RouterGrad, Sinks, expert_params,
};
use moewarden::routers::{KlType, Statistic};
use moewarden::train::alignment::{GlobalAlignment, RoutingSide, align};
use moewarden::ui::Ui;

// --- finite differences ----------------------------------------------------------------------------------------------

/// The derivative of `f` along both halves (the even and the odd entries) of every parameter's gradient, by central
/// differences, against its analytic value: the norm of the half.
///
/// Single entries are not enough: `f` is a sum of f32 terms that rounds at about 1e-7, so a difference must be of the order
/// of 1e-3 to have three digits; along the gradient that takes a step of 1e-3/‖g‖. Two halves detect an error that is
/// orthogonal to the whole gradient. Where a step changes the routing, f is discontinuous and the step is too long.
fn check_along_gradients(name: &str, tiny: &mut Tiny, gradients: &[Vec<f32>], f: impl Fn(&Tiny) -> (f64, Vec<u32>)) {
    let (_, choices) = f(tiny);
    for (id, gradient) in gradients.iter().enumerate() {
        for half in 0..2 {
            let spec = &tiny.model.table.params[id];
            let what = format!("{name}: {} (half {half})", spec.name());
            let direction: Vec<f64> =
                gradient.iter().enumerate().map(|(i, g)| if i % 2 == half { f64::from(*g) } else { 0.0 }).collect();
            let norm = direction.iter().map(|g| g * g).sum::<f64>().sqrt();
            if norm == 0.0 {
                continue; // the tests below check which parameters may have a zero gradient
            }
            let before = tiny.model.weight_host(id);
            let mut at = |step: f64| {
                let moved: Vec<f32> = before
                    .to_f32()
                    .iter()
                    .zip(&direction)
                    .map(|(w, g)| (f64::from(*w) + step * g / norm) as f32)
                    .collect();
                tiny.model.set_weight_host(id, HostTensor::from_f32(before.shape.clone(), &moved));
                f(tiny)
            };
            let mut step = (CHANGE / norm).min(LONGEST);
            // Near the edge of a clamp, or with strong curvature, a shorter step is closer to the derivative.
            loop {
                let ((above, up), (below, down)) = (at(step), at(-step));
                let measured = (above - below) / (2.0 * step);
                // 1 %: the third derivative over such a step. The rest: the rounding of f over the step.
                let near = (measured - norm).abs() <= 0.01 * norm + ROUNDING / step;
                if near && up == choices && down == choices {
                    break;
                }
                step /= 2.0;
                assert!(
                    ROUNDING / step <= 0.02 * norm,
                    "{what}: {measured} by differences at {step:e}, {norm} by the backward pass"
                );
            }
            tiny.model.set_weight_host(id, before);
        }
    }
}

/// The intended change of the loss by a step.
const CHANGE: f64 = 1e-3;
/// Norm of the longest step: a tenth of the norm of a matrix.
const LONGEST: f64 = 0.1;
/// Rounding error of the loss: 2⁻²⁴ = 6e-8 of each term, which are about 5; less in the mean of 11 terms.
const ROUNDING: f64 = 2e-7;

#[test]
fn cross_entropy_agrees_with_finite_differences() {
    for (name, spec) in specs().into_iter().chain(dense_specs()) {
        let mut tiny = Tiny::new(&spec);
        let (_, gradients) = tiny.gradients(&tiny.all());
        check_along_gradients(name, &mut tiny, &gradients, Tiny::loss);
    }
}

/// The routers' KL divergence: the first sequence is the safe side and constant; the gradient goes through the second. Over all
/// tokens and over the last two of each sequence.
#[test]
fn the_routers_divergence_agrees_with_finite_differences() {
    for (name, spec) in specs() {
        for statistic in [Statistic::TokenProbs, Statistic::SampleLogits] {
            // A clamp is an edge in the loss, and few tokens average less over it.
            let few = NonZeroUsize::new(2).filter(|_| !name.contains("clipped"));
            for last_tokens in [None, few] {
                let mut tiny = Tiny::new(&spec);
                let safe = side(&tiny, statistic, last_tokens, 0);
                let f = |tiny: &Tiny| {
                    let unsafe_ = side(tiny, statistic, last_tokens, 1);
                    (divergence(tiny, &safe, &unsafe_).loss(), tiny.loss().1)
                };
                let unsafe_ = side(&tiny, statistic, last_tokens, 1);
                let layers = tiny.model.config.moe_layers();
                let routers = divergence(&tiny, &safe, &unsafe_).through_unsafe(&unsafe_, layers, 1.0);
                let grads = LossGrads { ce_scale: 0.0, routers: &routers };
                let gradients = tiny.backward(&tiny.all(), PassEnd::Routers, grads).1;
                let what = format!("{name}, {statistic:?}, last {last_tokens:?}");
                check_along_gradients(&what, &mut tiny, &gradients, f);
            }
        }
    }
}

/// The routing statistic of one sequence.
fn side(tiny: &Tiny, kind: Statistic, last_tokens: Option<NonZeroUsize>, sequence: usize) -> RoutingSide {
    let (b, config) = (&*tiny.model.backend, &tiny.model.config);
    let layers = config.moe_layers();
    let (count, sequences) = (layers.layers.len(), sequence..sequence + 1);
    let mut side = RoutingSide::new(kind, last_tokens, count, config.num_experts, &tiny.packing, sequences);
    let mut observe = |routed: Routed<'_, Cpu>| side.observe(b, layers.index_of(routed.layer), routed.logits);
    tiny.model.forward(&tiny.inputs(), nothing_kept(PassEnd::Routers), Some(&mut observe));
    side
}

fn divergence(tiny: &Tiny, safe: &RoutingSide, unsafe_: &RoutingSide) -> GlobalAlignment {
    let (world, config) = (&*Rank::single(Ui::silent()).world, &tiny.model.config);
    let indices = config.moe_layers().indices();
    let loss = align(world, KlType::Symmetric, &[safe], &[unsafe_], &indices, config.num_experts);
    loss.unwrap().expect("both sides have tokens")
}

/// The divergences from a base model, at the head and of the routers: here from arbitrary distributions.
#[test]
fn the_divergence_from_a_base_model_agrees_with_finite_differences() {
    for (name, spec) in specs() {
        let mut tiny = Tiny::new(&spec);
        let mut rng = Rng::new(31);
        let (n, d, v) = (tiny.targets.len(), spec.hidden_size, spec.vocab_size);
        let b = tiny.model.backend.clone();
        let normed = b.upload(n, d, &rng.values(n * d, 1.0));
        let head = b.weight(HostTensor::from_f32(vec![v, d], &rng.values(v * d, 0.5)));
        let layers = tiny.model.config.moe_layers().clone();
        let base: Vec<Arc<[f32]>> =
            layers.layers.iter().map(|_| rng.values(tiny.ids.len() * spec.num_experts, 2.0).into()).collect();
        let (head_scale, router_scale) = (1.0 / n as f64, 0.3 / tiny.ids.len() as f64);
        let f = |tiny: &Tiny| {
            let (mut routers, mut chosen) = (0.0, Vec::new());
            let mut observe = |routed: Routed<'_, Cpu>| {
                routers += b.softmax_kl(routed.logits, &base[layers.index_of(routed.layer)]);
                chosen.extend(b.expert_ids(routed.routing));
            };
            let end = PassEnd::Loss { all_rows: true };
            let forward = tiny.model.forward(&tiny.inputs(), nothing_kept(end), Some(&mut observe));
            let (kl, _) = tiny.model.kl(&forward, &BaseHead { normed: &normed, head: Some(&head) });
            (head_scale * kl + router_scale * routers, chosen)
        };

        let all = tiny.all();
        let plan = tiny.plan(&all);
        let inputs = tiny.inputs();
        let options = ForwardOptions { lowest: 0, keep_from: 0, end: PassEnd::Loss { all_rows: true } };
        let forward = tiny.model.forward(&inputs, options, None);
        let mut routers = vec![None; layers.depth];
        for (base, &layer) in base.iter().zip(&layers.layers) {
            routers[layer] = Some(RouterGrad::SoftmaxKl { base: base.clone(), scale: router_scale as f32 });
        }
        let (mut buffer, mut scores) = (b.buffer(plan.len()), b.scores(0));
        let mut sinks = Sinks { plan: &plan, grads: &mut buffer, scores: &mut scores, done: None };
        let of_base = BaseHead { normed: &normed, head: Some(&head) };
        tiny.model.backward_kl(&inputs, forward, &of_base, head_scale as f32, &routers, &mut sinks);
        let read = |id: &ParamId| {
            let at = plan.slot(*id).unwrap();
            b.buffer_read(&buffer, at..at + tiny.model.table.params[*id].len())
        };
        let gradients: Vec<_> = all.iter().map(read).collect();
        check_along_gradients(&format!("{name}, KL"), &mut tiny, &gradients, f);
    }
}

// --- autograd --------------------------------------------------------------------------------------------------------

#[test]
fn every_gradient_agrees_with_autograd() {
    for (name, spec) in specs().into_iter().chain(dense_specs()) {
        let tiny = Tiny::new(&spec);
        let (loss, gradients) = tiny.gradients(&tiny.all());
        let autograd = Autograd::new(&tiny.model).unwrap();
        let theirs = autograd.loss(&tiny).unwrap();
        // f32 against f64 over rows of 24 entries.
        let off = loss - theirs.to_scalar::<f64>().unwrap();
        assert!(off.abs() < 1e-6, "{name}: loss off by {off:e}");
        let theirs = theirs.backward().unwrap();
        // Rounding errors of a backward pass are relative to the summed terms: at least to the largest gradient.
        let scale = gradients.iter().flatten().fold(0.0f32, |a, g| a.max(g.abs()));
        for ((_, spec), ours) in tiny.model.table.iter().zip(&gradients) {
            let theirs = autograd.gradient(&theirs, spec.kind).unwrap();
            let why = &format!("{name}, {}: f32 against f64", spec.name());
            assert_close(ours, &theirs, 2e-6 * f64::from(scale), 1e-4, why);
            assert!(ours.iter().any(|g| *g != 0.0) || theirs.iter().all(|g| *g == 0.0), "{why}");
        }
    }
}

// --- parts -----------------------------------------------------------------------------------------------------------

/// A plan's gradients do not depend on which other gradients it has, bit for bit, and no layer below its lowest one is
/// computed (see [`Tiny::gradients`]).
#[test]
fn a_plan_for_some_parameters_gives_the_gradients_of_a_full_plan() {
    for (name, spec) in specs() {
        let tiny = Tiny::new(&TinySpec { num_layers: 3, ..spec });
        let table = &tiny.model.table;
        let all = tiny.all();
        let (_, whole) = tiny.gradients(&all);
        let top = tiny.model.config.layers.len() - 1;
        let only = |wanted: &dyn Fn(ParamKind) -> bool| -> Vec<ParamId> {
            all.iter().copied().filter(|id| wanted(table.params[*id].kind)).collect()
        };
        let parts: Vec<(&str, Option<usize>, Vec<ParamId>)> = vec![
            ("the top layer's experts", Some(top), only(&|k| matches!(k, ParamKind::Expert(l, ..) if l == top))),
            ("one expert of the middle", Some(1), expert_params(table, 1, 2).collect()),
            (
                "routers",
                tiny.model.config.moe_layers().layers.first().copied(),
                only(&|k| matches!(k, ParamKind::Router(_))),
            ),
            ("attention of the middle", Some(1), only(&|k| k.layer() == Some(1) && k.group() == Group::Attention)),
            ("the head's norm", None, only(&|k| k == ParamKind::FinalNorm)),
            ("the embedding", Some(0), only(&|k| k == ParamKind::Embedding)),
        ];
        for (part, lowest, ids) in parts {
            assert!(!ids.is_empty(), "{name}: {part}");
            assert_eq!(tiny.plan(&ids).lowest_layer(), lowest, "{name}: {part}");
            let (_, gradients) = tiny.gradients(&ids);
            for (id, gradient) in ids.iter().zip(gradients) {
                let equal = gradient.iter().zip(&whole[*id]).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(equal, "{name}: {part}: {}", table.params[*id].name());
            }
        }
    }
}
