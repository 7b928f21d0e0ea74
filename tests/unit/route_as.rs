//! Locked routing: a model that takes the experts and routing weights of another one, in every family.

use moewarden::backend::{Dtype, HostTensor};
use moewarden::model::tiny::TinySpec;
use moewarden::model::{Inputs, ParamKind, PassEnd};

use crate::tiny_model::{Tiny, nothing_kept, specs};

/// Losses with the last layer pruned and not, the experts that were chosen, and logits of two decoding steps.
fn results(tiny: &Tiny) -> (f64, f64, Vec<u32>, [Vec<f32>; 2]) {
    let inputs: Inputs<_> = tiny.inputs();
    let forward = tiny.model.forward(&inputs, nothing_kept(PassEnd::Loss { all_rows: false }), None);
    let pruned = tiny.model.loss(&inputs, &forward);
    let (whole, chosen) = tiny.loss();
    let mut cache = tiny.model.kv_cache(&[9]);
    let logits = [&tiny.ids[..7], &tiny.ids[7..9]].map(|ids| tiny.model.decode(&[(0, ids)], &mut cache));
    (pruned, whole, chosen, logits)
}

/// The experts that each layer's own router would take are others: the weights of all routers change their sign.
fn destroy_routers(tiny: &mut Tiny) {
    let kinds: Vec<ParamKind> = tiny.model.table.params.iter().map(|p| p.kind).collect();
    for (id, _) in kinds.iter().enumerate().filter(|(_, kind)| matches!(kind, ParamKind::Router(_))) {
        let old = tiny.model.weight_host(id);
        let negated: Vec<f32> = old.to_f32().iter().map(|x| -x).collect();
        tiny.model.set_weight_host(id, HostTensor::encode(old.dtype, old.shape.clone(), &negated));
    }
}

#[test]
fn locked_routing_makes_destroyed_routers_harmless_bit_for_bit() {
    for (name, spec) in specs() {
        let original = results(&Tiny::new(&spec));
        let mut itself = Tiny::new(&spec);
        itself.model.route_as(Tiny::new(&spec).model).unwrap();
        assert_eq!(results(&itself), original, "{name}: routed as itself");

        let mut destroyed = Tiny::new(&spec);
        destroy_routers(&mut destroyed);
        let alone = results(&destroyed);
        assert!(alone.0 != original.0 && alone.2 != original.2, "{name}: the routers do not matter");
        destroyed.model.route_as(Tiny::new(&spec).model).unwrap();
        assert_eq!(results(&destroyed), original, "{name}: routed as the original");
    }
}

#[test]
fn the_routing_of_the_guide_follows_the_guides_own_hidden_states() {
    // An attention that differs changes the routing of the model that has it, and not of the model that is routed as the original.
    for (name, spec) in specs() {
        let (_, _, chosen, _) = results(&Tiny::new(&spec));
        let mut other = Tiny::new(&spec);
        let id = other.model.table.id(ParamKind::Embedding).unwrap();
        let old = other.model.weight_host(id);
        let moved: Vec<f32> = old.to_f32().iter().rev().copied().collect();
        other.model.set_weight_host(id, HostTensor::encode(Dtype::F32, old.shape.clone(), &moved));
        assert_ne!(results(&other).2, chosen, "{name}");
        other.model.route_as(Tiny::new(&spec).model).unwrap();
        assert_eq!(results(&other).2, chosen, "{name}");
    }
}

#[test]
fn a_guide_of_other_sizes_is_refused() {
    let spec = specs().remove(0).1;
    let mut tiny = Tiny::new(&spec);
    let other = Tiny::new(&TinySpec { num_experts: spec.num_experts + 1, ..spec.clone() });
    let error = tiny.model.route_as(other.model).unwrap_err();
    assert_eq!(error.what, "the number of experts");
    assert_eq!(results(&tiny), results(&Tiny::new(&spec)), "and nothing changed");
}
