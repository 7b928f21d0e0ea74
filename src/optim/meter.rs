//! Losses and norms: summed where they arise, divided once, and never acted upon unless finite.

use std::ops::Range;

use super::Error;
use crate::backend::Backend;
use crate::collective::{self, Collective};

/// A mean over tokens, from sums: however a batch is spread over micro-batches and ranks, the mean is the same.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct LossMeter {
    sum: f64,
    tokens: u64,
}

impl LossMeter {
    /// Adds a sum of losses over `tokens` loss tokens.
    pub fn add(&mut self, sum: f64, tokens: usize) {
        self.sum += sum;
        self.tokens += tokens as u64;
    }

    /// Loss tokens so far.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// The mean loss of a token; `None` of no token.
    pub fn mean(&self) -> Option<f64> {
        (self.tokens > 0).then(|| self.sum / self.tokens as f64)
    }

    /// Adds up the meters of all ranks; all then hold the same.
    ///
    /// # Errors
    /// Those of [`Collective::barrier`].
    pub fn merge(&mut self, collective: &dyn Collective) -> Result<(), collective::Error> {
        let mut both = [self.sum, self.tokens as f64];
        collective.all_reduce_f64(&mut both)?;
        *self = Self { sum: both[0], tokens: both[1] as u64 };
        Ok(())
    }
}

/// The Euclidean norm over parts of a gradient buffer, in f64, each part's sum in the order given.
pub fn global_norm<B: Backend>(backend: &B, grads: &B::Buffer, parts: impl IntoIterator<Item = Range<usize>>) -> f64 {
    parts.into_iter().map(|part| backend.sum_squares(grads, part)).sum::<f64>().sqrt()
}

/// By what gradients of this norm are multiplied so that it does not exceed `max_norm`: 1 where it does not, or where there
/// is no limit.
pub fn clip_factor(norm: f64, max_norm: Option<f64>) -> f64 {
    match max_norm {
        Some(max) if norm > max => max / norm,
        _ => 1.0,
    }
}

/// Refuses NaN and infinity before they reach a weight.
///
/// # Errors
/// [`Error::NotFinite`], with `what` it is.
pub fn check_finite(value: f64, what: impl FnOnce() -> String) -> Result<f64, Error> {
    if value.is_finite() { Ok(value) } else { Err(Error::NotFinite { what: what(), value }) }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::collective::threads;
    use crate::exit::Coded;

    #[test]
    fn the_mean_is_over_tokens_on_any_number_of_ranks() {
        for world in 1..=3 {
            let means = threads::run(world, Duration::from_secs(60), |c| {
                let mut meter = LossMeter::default();
                for (i, (sum, tokens)) in [(6.0, 3), (0.0, 0), (2.0, 1)].into_iter().enumerate() {
                    if i % world == c.rank() {
                        meter.add(sum, tokens);
                    }
                }
                meter.merge(&c).unwrap();
                (meter.tokens(), meter.mean())
            });
            assert_eq!(means, vec![(4, Some(2.0)); world]);
        }
        assert_eq!(LossMeter::default().mean(), None);
    }

    #[test]
    fn clipping_only_shrinks() {
        assert_eq!(clip_factor(4.0, Some(1.0)), 0.25);
        assert_eq!(clip_factor(0.5, Some(1.0)), 1.0);
        assert_eq!(clip_factor(0.0, Some(1.0)), 1.0);
        assert_eq!(clip_factor(1e9, None), 1.0);
    }

    #[test]
    fn what_is_not_finite_is_named() {
        assert_eq!(check_finite(1.5, || unreachable!()), Ok(1.5));
        for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let error = check_finite(value, || "the loss of step 7".into()).unwrap_err();
            assert_eq!(error.exit_code(), crate::exit::NOT_FINITE);
            assert!(error.to_string().starts_with(&format!("the loss of step 7 is {value}")), "{error}");
        }
    }
}
