//! Losses summed where they arise and divided once; the bound on a gradient's norm.

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

/// By what gradients of this norm are multiplied so that it does not exceed `max_norm`: min(1, max / (norm + 1e-6)) as in
/// PyTorch, 1 where there is no limit.
pub fn clip_factor(norm: f64, max_norm: Option<f64>) -> f64 {
    max_norm.map_or(1.0, |max| (max / (norm + 1e-6)).min(1.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::conformance::on_threads;

    #[test]
    fn the_mean_is_over_tokens_on_any_number_of_ranks() {
        for world in 1..=3 {
            let means = on_threads(world, move |c| {
                let mut meter = LossMeter::default();
                for (i, (sum, tokens)) in [(6.0, 3), (0.0, 0), (2.0, 1)].into_iter().enumerate() {
                    if i % world == c.rank() {
                        meter.add(sum, tokens);
                    }
                }
                meter.merge(&c).unwrap();
                meter.mean()
            });
            assert_eq!(means, vec![Some(2.0); world]);
        }
        assert_eq!(LossMeter::default().mean(), None);
    }

    #[test]
    fn clipping_only_shrinks() {
        assert_eq!(clip_factor(4.0, Some(1.0)), 1.0 / 4.000001);
        assert_eq!(clip_factor(1e-3, Some(1e-3)), 1e-3 / 1.001e-3);
        assert_eq!(clip_factor(0.5, Some(1.0)), 1.0);
        assert_eq!(clip_factor(0.0, Some(1.0)), 1.0);
        assert_eq!(clip_factor(1e9, None), 1.0);
    }
}
