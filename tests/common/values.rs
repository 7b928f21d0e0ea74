//! Random values, and comparison of f32 results with f64 references.

/// Panics with the worst index unless |actual - expected| ≤ abs + rel · |expected| everywhere. NaN is never close.
/// `why` says where the tolerance comes from.
#[track_caller]
pub fn assert_close(actual: &[f32], expected: &[f64], abs: f64, rel: f64, why: &str) {
    assert_eq!(actual.len(), expected.len(), "lengths ({why})");
    let mut worst = (0.0f64, 0usize);
    for (i, (&a, &e)) in actual.iter().zip(expected).enumerate() {
        let off = (f64::from(a) - e).abs();
        let excess = if off == 0.0 { 0.0 } else { off / (abs + rel * e.abs()) };
        let excess = if excess.is_nan() { f64::INFINITY } else { excess };
        if excess > worst.0 {
            worst = (excess, i);
        }
    }
    let (excess, i) = worst;
    assert!(
        excess <= 1.0,
        "index {i} of {}: {} instead of {}, {excess:.2} times the tolerance (abs {abs:e}, rel {rel:e}: {why})",
        actual.len(),
        actual[i],
        expected[i],
    );
}

/// A deterministic random number generator (SplitMix64, Steele et al. 2014).
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in [-1, 1).
    pub fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    }

    /// Uniform in 0..n.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// `n` values, uniform in [-scale, scale).
    pub fn values(&mut self, n: usize, scale: f32) -> Vec<f32> {
        (0..n).map(|_| self.unit() * scale).collect()
    }
}

/// Widened to f64.
pub fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&x| f64::from(x)).collect()
}
