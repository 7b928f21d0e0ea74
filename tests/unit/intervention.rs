//! Interventions on the routing: experts that are switched off or silenced, in every family, against models that lack them.

use std::collections::BTreeSet;

use moewarden::backend::HostTensor;
use moewarden::model::tiny::TinySpec;
use moewarden::model::{Intervention, InterventionError, Model, ParamKind, Proj};

use crate::tiny_model::{Tiny, specs};

const EXPERTS: usize = 5;

/// Another expert in each layer that routes.
fn one_in_each_layer<B: moewarden::backend::Backend>(model: &Model<B>) -> BTreeSet<(usize, usize)> {
    model.config.moe_layers().layers.iter().map(|&l| (l, (3 * l + 1) % EXPERTS)).collect()
}

/// Parameter of `model`.
fn read(model: &Tiny, kind: ParamKind) -> HostTensor {
    model.model.weight_host(model.model.table.id(kind).unwrap())
}

/// A model with the weights of `full` except for one expert in each layer, which does not exist.
fn without(full: &Tiny, spec: &TinySpec, experts: &BTreeSet<(usize, usize)>) -> Tiny {
    let mut small = Tiny::new(&TinySpec { num_experts: EXPERTS - 1, ..spec.clone() });
    let kinds: Vec<ParamKind> = small.model.table.params.iter().map(|p| p.kind).collect();
    for (id, kind) in kinds.into_iter().enumerate() {
        let gone = |layer| experts.iter().find(|(l, _)| *l == layer).expect("one in each layer").1;
        let value = match kind {
            ParamKind::Router(layer) => {
                let (all, d) = (read(full, kind), full.model.config.hidden_size);
                let mut rows: Vec<Vec<f32>> = all.to_f32().chunks(d).map(<[f32]>::to_vec).collect();
                rows.remove(gone(layer));
                HostTensor::encode(all.dtype, vec![EXPERTS - 1, d], &rows.concat())
            }
            ParamKind::Expert(layer, expert, proj) => {
                read(full, ParamKind::Expert(layer, expert + usize::from(expert >= gone(layer)), proj))
            }
            other => read(full, other),
        };
        small.model.set_weight_host(id, value);
    }
    small
}

fn last_logits(model: &Tiny) -> Vec<f32> {
    let mut cache = model.model.kv_cache(&[9]);
    model.model.decode(&[(0, &model.ids[..7])], &mut cache);
    model.model.decode(&[(0, &model.ids[7..9])], &mut cache)
}

fn assert_same(a: (f64, Vec<f32>), b: (f64, Vec<f32>), what: &str) {
    // The softmax and the sums have their terms in other lanes: a few roundings of f32.
    assert!((a.0 - b.0).abs() < 2e-6 * a.0.abs(), "{what}: losses {} and {}", a.0, b.0);
    let largest = b.1.iter().fold(0f32, |m, x| m.max(x.abs()));
    for (x, y) in a.1.iter().zip(&b.1) {
        assert!((x - y).abs() < 2e-5 * largest, "{what}: logits {x} and {y}");
    }
}

fn results(model: &Tiny) -> (f64, Vec<f32>) {
    (model.loss().0, last_logits(model))
}

#[test]
fn an_expert_that_is_switched_off_is_absent() {
    for (name, spec) in specs() {
        let spec = TinySpec { num_experts: EXPERTS, ..spec };
        let mut full = Tiny::new(&spec);
        let before = results(&full);
        let experts = one_in_each_layer(&full.model);
        full.model.set_intervention(Some(&Intervention::SwitchedOff(experts.clone()))).unwrap();
        let off = results(&full);
        assert!((off.0 - before.0).abs() > 1e-4, "{name}: the expert does not matter");
        let (_, chosen) = full.loss();
        let per_layer = chosen.len() / experts.len();
        for (ids, (_, expert)) in chosen.chunks(per_layer).zip(&experts) {
            assert!(!ids.contains(&(*expert as u32)), "{name}");
        }
        assert_same(off, results(&without(&full, &spec, &experts)), name);
        full.model.set_intervention(None).unwrap();
        assert_eq!(results(&full), before, "{name}: cleared");
    }
}

#[test]
fn a_silenced_expert_is_one_with_a_down_projection_of_zero() {
    for (name, spec) in specs() {
        let spec = TinySpec { num_experts: EXPERTS, ..spec };
        let mut full = Tiny::new(&spec);
        let (before, chosen) = full.loss();
        // In each layer one that was chosen.
        let layers = &full.model.config.moe_layers().layers;
        let first = chosen.len() / layers.len();
        let experts: BTreeSet<_> =
            layers.iter().zip(chosen.chunks(first)).map(|(&l, ids)| (l, ids[0] as usize)).collect();
        full.model.set_intervention(Some(&Intervention::ZeroOutput(experts.clone()))).unwrap();
        let silenced = results(&full);
        assert!((silenced.0 - before).abs() > 1e-4, "{name}: the expert does not matter");
        assert_eq!(full.loss().1[..first], chosen[..first], "{name}: the first layer routes as before");
        full.model.set_intervention(None).unwrap();
        for &(layer, expert) in &experts {
            let id = full.model.table.id(ParamKind::Expert(layer, expert, Proj::Down)).unwrap();
            let old = full.model.weight_host(id);
            let zeros = vec![0.0; old.len()];
            full.model.set_weight_host(id, HostTensor::encode(old.dtype, old.shape.clone(), &zeros));
        }
        assert_same(silenced, results(&full), name);
    }
}

#[test]
fn impossible_interventions_are_refused() {
    let spec = TinySpec { num_experts: EXPERTS, top_k: 2, ..specs().remove(0).1 };
    let mut full = Tiny::new(&spec);
    let before = results(&full);
    let mut refused = |experts: &[(usize, usize)]| {
        let experts = experts.iter().copied().collect();
        full.model.set_intervention(Some(&Intervention::SwitchedOff(experts))).unwrap_err()
    };
    assert_eq!(refused(&[(0, 5)]), InterventionError::NoSuchExpert { layer: 0, expert: 5 });
    assert_eq!(refused(&[(2, 0)]), InterventionError::NoSuchExpert { layer: 2, expert: 0 });
    let error = refused(&[(0, 0), (1, 0), (1, 1), (1, 2), (1, 3)]);
    assert_eq!(error, InterventionError::TooFewLeft { layer: 1, off: 4, experts: 5, left: 1, needed: 2 });
    assert!(error.to_string().contains("each token needs 2"), "{error}");
    assert_eq!(results(&full), before);
    let all = (0..EXPERTS).map(|e| (0, e)).collect();
    full.model.set_intervention(Some(&Intervention::ZeroOutput(all))).unwrap();
    assert!(full.loss().0.is_finite());
}
