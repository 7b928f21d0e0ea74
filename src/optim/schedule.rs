//! Learning-rate schedules: linear warm-up, then constant, linear or cosine decay.

use std::f64::consts::PI;

use super::LrSchedule;

/// A schedule over a known number of steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LrPlan {
    /// The schedule after the warm-up.
    pub schedule: LrSchedule,
    /// Number of warm-up steps, w.
    pub warmup_steps: usize,
    /// Total number of steps including the warm-up, n.
    pub total_steps: usize,
}

impl LrPlan {
    /// The factor of the base learning rate at step s (`step`, from 0):
    ///
    /// ```text
    /// warm-up    (s + 1) / w                              for s < w
    /// constant   1
    /// linear     (n − s) / (n − w)
    /// cosine     ½ (1 + cos(π (s − w) / (n − w)))
    /// ```
    ///
    /// The factor is positive at every step s < n, and 0 afterwards except for the constant schedule.
    pub fn factor(&self, step: usize) -> f64 {
        let (s, w, n) = (step as f64, self.warmup_steps as f64, self.total_steps as f64);
        if step < self.warmup_steps {
            return (s + 1.0) / w;
        }
        match self.schedule {
            LrSchedule::Constant => 1.0,
            _ if step >= self.total_steps => 0.0,
            LrSchedule::Linear => (n - s) / (n - w),
            LrSchedule::Cosine => 0.5 * (1.0 + (PI * (s - w) / (n - w)).cos()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn factors(schedule: LrSchedule, warmup_steps: usize, total_steps: usize) -> Vec<f64> {
        let plan = LrPlan { schedule, warmup_steps, total_steps };
        (0..total_steps + 2).map(|s| plan.factor(s)).collect()
    }

    #[test]
    fn factors_computed_by_hand() {
        assert_eq!(factors(LrSchedule::Constant, 2, 4), [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]);
        assert_eq!(factors(LrSchedule::Linear, 2, 6), [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]);
        let cosine = factors(LrSchedule::Cosine, 0, 4);
        let root = 0.5f64.sqrt();
        for (x, y) in cosine.iter().zip([1.0, 0.5 + root / 2.0, 0.5, 0.5 - root / 2.0, 0.0, 0.0]) {
            assert!((x - y).abs() < 1e-15, "{cosine:?}"); // rounding of the cosine
        }
    }

    #[test]
    fn every_factor_is_positive() {
        for schedule in [LrSchedule::Constant, LrSchedule::Linear, LrSchedule::Cosine] {
            for total in 1..20 {
                for warmup in 0..total + 3 {
                    let plan = LrPlan { schedule, warmup_steps: warmup, total_steps: total };
                    assert!((0..total).all(|s| plan.factor(s) > 0.0 && plan.factor(s) <= 1.0), "{plan:?}");
                }
            }
        }
    }
}
