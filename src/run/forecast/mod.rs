//! What a run will take: time from counted operations, memory from shapes.

mod memory;
mod time;

pub use memory::MemoryForecast;
pub use time::{Forecast, TokenWork, Tokens, duration, measure_rate, probe_name};
