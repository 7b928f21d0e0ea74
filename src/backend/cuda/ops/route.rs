//! The router: softmax over the experts and top-k.

use super::flat_grid;
use crate::backend::Dtype;
use crate::backend::cuda::gpu::Grid;
use crate::backend::cuda::ops::elements::in_dtype;
use crate::backend::cuda::{Cuda, Indices, Routing, Tensor, kernels};

/// A limit of the kernel: each of 32 lanes marks its experts in 32 bits.
const MOST_EXPERTS: usize = 1024;

fn grid(tokens: usize) -> Grid {
    Grid::row(tokens.div_ceil(4), 128)
}

/// See [`crate::backend::Backend::route`].
pub fn route(cuda: &Cuda, logits: &Tensor, top_k: usize, renormalize: bool) -> Routing {
    let (t, e) = (logits.rows(), logits.cols());
    assert!((1..=e).contains(&top_k), "{top_k} of {e} experts");
    assert!(e <= MOST_EXPERTS, "{e} experts in a layer, the kernel supports {MOST_EXPERTS}");
    let logits = in_dtype(cuda, logits, Dtype::F32);
    let mut routing = Routing {
        ids: cuda.array(t * top_k),
        weights: cuda.tensor(t, top_k, Dtype::F32),
        probabilities: cuda.tensor(t, e, Dtype::F32),
        renormalize,
    };
    kernels::route(
        cuda,
        grid(t),
        logits.input().of(),
        routing.ids.output(),
        routing.weights.output().of(),
        routing.probabilities.output().of(),
        t,
        e as u32,
        top_k as u32,
        renormalize,
    );
    routing
}

/// See [`crate::backend::Backend::zero_routing_weights`].
pub fn zero_weights(cuda: &Cuda, routing: &mut Routing, experts: &Indices) {
    let slots = routing.tokens() * routing.top_k();
    if experts.is_empty() {
        return;
    }
    kernels::zero_weights(
        cuda,
        flat_grid(slots, 1),
        routing.ids.input(),
        routing.weights.inout().of(),
        experts.input(),
        slots,
        experts.len(),
    );
}

/// d logits, F32 `[T, E]`.
pub fn backward(cuda: &Cuda, dweights: &Tensor, routing: &Routing) -> Tensor {
    let (t, k, e) = (routing.tokens(), routing.top_k(), routing.probabilities.cols());
    dweights.expect_shape("gradient of the routing weights", t, k);
    let dweights = in_dtype(cuda, dweights, Dtype::F32);
    let mut dlogits = cuda.tensor(t, e, Dtype::F32);
    kernels::route_backward(
        cuda,
        grid(t),
        dweights.input().of(),
        routing.ids.input(),
        routing.weights.input().of(),
        routing.probabilities.input().of(),
        dlogits.output().of(),
        t,
        e as u32,
        k as u32,
        routing.renormalize,
    );
    dlogits
}
