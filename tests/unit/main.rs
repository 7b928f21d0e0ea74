//! Tests of the library: each file tests one part of it, against definitions, reference implementations and recorded values.

#[path = "../common/case.rs"]
mod case;
#[path = "../common/golden_copy.rs"]
mod golden_copy;
#[path = "../common/shared.rs"]
mod shared;
#[path = "../common/values.rs"]
mod values;

mod autograd;
mod model_folder;
mod reference;
mod router_target;
mod tiny_model;

mod adamw;
mod bf16;
mod data;
mod declared_tokens;
mod decode;
mod deltas;
mod frozen;
mod fused;
mod golden;
mod gradients;
mod hostile;
mod intervention;
mod layering;
mod measure;
mod method;
mod operations;
mod ops;
mod ops_autograd;
mod published;
mod recipe;
mod replies;
mod retention;
mod route_as;
mod routing_replies;
mod rows;
mod second_opinion;
mod sharding;
mod shared_goldens;
mod templates;
mod weights;
