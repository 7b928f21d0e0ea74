//! Mean losses over tokens, and gradient clipping.

use crate::collective::{self, Collective};

/// A mean loss over tokens. It keeps sum and count, so the mean does not depend on how a batch is split over
/// micro-batches and ranks.
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

    /// The mean loss per token; `None` without tokens.
    pub fn mean(&self) -> Option<f64> {
        (self.tokens > 0).then(|| self.sum / self.tokens as f64)
    }

    /// All-reduces sum and count over the ranks.
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

/// The factor that clips a gradient of norm `norm` to `max_norm`: min(1, max_norm / (norm + 1e-6)), as in PyTorch's
/// `clip_grad_norm_`; 1 if `max_norm` is `None`.
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
