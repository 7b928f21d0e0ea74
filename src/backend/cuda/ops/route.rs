//! The router: softmax over the experts and the choice of the K largest.

use crate::backend::Dtype;
use crate::backend::cuda::gpu::{Grid, Kernel};
use crate::backend::cuda::kernels::kernel;
use crate::backend::cuda::ops::elements::in_dtype;
use crate::backend::cuda::{Cuda, Routing, Tensor};

const ROUTE: Kernel = kernel!(ROUTE, "route");
const ROUTE_BACKWARD: Kernel = kernel!(ROUTE, "route_backward");
/// A lane of the kernel marks its experts in 32 bits.
const MOST_EXPERTS: usize = 1024;

fn grid(tokens: usize) -> Grid {
    Grid::row(tokens.div_ceil(4), 128)
}

/// See [`crate::backend::Backend::route`].
pub fn route(cuda: &Cuda, logits: &Tensor, top_k: usize, renormalize: bool) -> Routing {
    let (t, e) = (logits.rows(), logits.cols());
    assert!((1..=e).contains(&top_k), "{top_k} of {e} experts");
    assert!(e <= MOST_EXPERTS, "{e} experts in a layer, the kernel knows {MOST_EXPERTS}");
    let logits = in_dtype(cuda, logits, Dtype::F32);
    let routing = Routing {
        ids: cuda.scratch(4 * t * top_k),
        weights: cuda.tensor(t, top_k, Dtype::F32),
        probabilities: cuda.tensor(t, e, Dtype::F32),
        renormalize,
    };
    let args = [
        logits.address().into(),
        routing.ids.address().into(),
        routing.weights.address().into(),
        routing.probabilities.address().into(),
        t.into(),
        (e as u32).into(),
        (top_k as u32).into(),
        i32::from(renormalize).into(),
    ];
    cuda.launch(&ROUTE, grid(t), &args);
    routing
}

/// d logits, F32 `[T, E]`.
pub fn backward(cuda: &Cuda, dweights: &Tensor, routing: &Routing) -> Tensor {
    let (t, k, e) = (routing.tokens(), routing.top_k(), routing.probabilities.cols());
    dweights.expect_shape("gradient of the routing weights", t, k);
    let dweights = in_dtype(cuda, dweights, Dtype::F32);
    let dlogits = cuda.tensor(t, e, Dtype::F32);
    let args = [
        dweights.address().into(),
        routing.ids.address().into(),
        routing.weights.address().into(),
        routing.probabilities.address().into(),
        dlogits.address().into(),
        t.into(),
        (e as u32).into(),
        (k as u32).into(),
        i32::from(routing.renormalize).into(),
    ];
    cuda.launch(&ROUTE_BACKWARD, grid(t), &args);
    dlogits
}
