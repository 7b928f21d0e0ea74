//! What a run will take: memory from shapes, time from counted operations and measured rates.

mod generation;
mod memory;
mod placement;
mod rates;
mod time;
mod work;

pub use memory::{MemoryForecast, forward_passes, room_for_passes};
pub use placement::ExpertPlacement;
pub use rates::{Rates, Sizes};
pub use time::{Forecast, duration};
pub use work::{TokenWork, Tokens, Work};
