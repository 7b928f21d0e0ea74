//! How the tokens of a phase are spread over the experts.

use serde::{Deserialize, Serialize};

use crate::collective::{self, Collective};

/// Tokens routed to each expert, by MoE layer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExpertLoads {
    /// Decoder-layer indices of the MoE layers, ascending.
    pub layers: Vec<usize>,
    /// Tokens of each expert, `[L][E]`. A token counts for each of its K experts.
    pub counts: Vec<Vec<u64>>,
}

/// How evenly the tokens of each MoE layer are spread over its E experts; c is the number of tokens of an expert.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct LoadBalance {
    /// Decoder-layer indices of the MoE layers.
    pub layers: Vec<usize>,
    /// The share of the busiest expert: max c / Σ c. 1/E if all experts have the same load.
    pub busiest: Vec<f64>,
    /// The experts without a token.
    pub idle: Vec<usize>,
    /// The coefficient of variation: the standard deviation of c over its mean, √(E · Σ c² / (Σ c)² − 1). 0 if all experts have
    /// the same load, √(E − 1) if one has all tokens.
    pub cv: Vec<f64>,
}

impl ExpertLoads {
    /// Without tokens.
    pub fn new(layers: &[usize], num_experts: usize) -> Self {
        Self { layers: layers.to_vec(), counts: vec![vec![0; num_experts]; layers.len()] }
    }

    /// Whether nothing was counted, not even zeros.
    pub fn is_empty(&self) -> bool {
        self.counts.is_empty()
    }

    /// Whether these are loads of a model with these layers and experts, or nothing.
    pub fn fits(&self, layers: &[usize], num_experts: usize) -> bool {
        let of_model = self.layers == layers && self.counts.len() == layers.len();
        (self.is_empty() && self.layers.is_empty())
            || (of_model && self.counts.iter().all(|row| row.len() == num_experts))
    }

    /// Adds the tokens of a pass. `index`: the layer's index among the MoE layers.
    pub fn add_layer(&mut self, index: usize, tokens: &[usize]) {
        self.counts[index].iter_mut().zip(tokens).for_each(|(sum, tokens)| *sum += *tokens as u64);
    }

    /// Adds the loads of other passes of the same model.
    pub fn add(&mut self, other: &Self) {
        if self.is_empty() {
            self.clone_from(other);
            return;
        }
        for (sum, tokens) in self.counts.iter_mut().flatten().zip(other.counts.iter().flatten()) {
            *sum += tokens;
        }
    }

    /// Sums over all ranks.
    ///
    /// # Errors
    /// Those of the collective.
    pub fn all_reduce(&mut self, world: &dyn Collective) -> Result<(), collective::Error> {
        // Integers below 2^53: their sums are exact in any order.
        let mut sums: Vec<f64> = self.counts.iter().flatten().map(|tokens| *tokens as f64).collect();
        world.all_reduce_f64(&mut sums)?;
        self.counts.iter_mut().flatten().zip(sums).for_each(|(tokens, sum)| *tokens = sum as u64);
        Ok(())
    }

    /// How even the loads are, to six decimals.
    pub fn balance(&self) -> LoadBalance {
        let mut balance = LoadBalance { layers: self.layers.clone(), ..LoadBalance::default() };
        let rounded = |x: f64| (x * 1e6).round() / 1e6;
        for row in &self.counts {
            let sum = row.iter().sum::<u64>().max(1) as f64;
            let busiest = row.iter().copied().max().unwrap_or(0) as f64 / sum;
            let squares: f64 = row.iter().map(|tokens| (*tokens as f64 / sum).powi(2)).sum();
            balance.busiest.push(rounded(busiest));
            balance.idle.push(row.iter().filter(|tokens| **tokens == 0).count());
            balance.cv.push(rounded((row.len() as f64 * squares - 1.0).max(0.0).sqrt()));
        }
        balance
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn balance_of_even_uneven_and_no_loads() {
        let counts = vec![vec![5, 5, 5, 5], vec![0, 0, 12, 0], vec![1, 2, 3, 0], vec![0; 4]];
        let balance = ExpertLoads { layers: vec![1, 2, 4, 5], counts }.balance();
        assert_eq!(balance.layers, [1, 2, 4, 5]);
        assert_eq!(balance.busiest, [0.25, 1.0, 0.5, 0.0]);
        assert_eq!(balance.idle, [0, 3, 1, 4]);
        // Of 1, 2, 3, 0 the mean is 3/2 and the variance 5/4.
        assert_eq!(balance.cv, [0.0, 1.732_051, 0.745_356, 0.0]);
    }

    #[test]
    fn loads_add_up() {
        let mut sum = ExpertLoads::default();
        let mut of_pass = ExpertLoads::new(&[0, 2], 3);
        of_pass.add_layer(1, &[4, 0, 1]);
        (0..2).for_each(|_| sum.add(&of_pass));
        assert_eq!(sum, ExpertLoads { layers: vec![0, 2], counts: vec![vec![0; 3], vec![8, 0, 2]] });
        assert!(sum.fits(&[0, 2], 3) && ExpertLoads::default().fits(&[0, 2], 3));
        assert!(!sum.fits(&[0, 1], 3) && !sum.fits(&[0, 2], 4) && !sum.fits(&[0], 3));
    }
}
