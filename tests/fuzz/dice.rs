//! Random choices that follow from a seed.

use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// A generator with the choices that mutations need.
pub struct Dice(ChaCha8Rng);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(ChaCha8Rng::seed_from_u64(seed))
    }

    /// A number below `n`; 0 if that is 0.
    pub fn below(&mut self, n: usize) -> usize {
        if n == 0 { 0 } else { self.0.random_range(0..n) }
    }

    /// True in one of `n` cases.
    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }

    pub fn byte(&mut self) -> u8 {
        self.0.next_u32() as u8
    }

    /// A part of `0..n`, often short.
    pub fn range(&mut self, n: usize) -> std::ops::Range<usize> {
        let start = self.below(n);
        let longest = if self.one_in(2) { 16 } else { n };
        start..(start + 1 + self.below(longest)).min(n)
    }
}
