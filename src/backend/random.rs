//! Random values by counter: each depends on a seed and its place alone, so any part can be made anywhere, with the same
//! bits (`kernels/elements.cu` is the twin).

/// Bits at a place of the sequence that `seed` begins: SplitMix64 (Steele et al. 2014).
pub fn random_bits(seed: u64, place: u64) -> u64 {
    let mut z = seed.wrapping_add(place.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The distance between neighbours of the 2^24 equally likely values, centred on 0, that have this standard deviation.
pub(super) fn uniform_step(std: f32) -> f32 {
    (f64::from(std) * 12f64.sqrt() / f64::from(1 << 24)) as f32
}

/// One of these values: 24 bits are exact in f32, so the product is the only rounding.
pub(super) fn uniform(seed: u64, place: u64, step: f32) -> f32 {
    ((random_bits(seed, place) >> 40) as i32 - (1 << 23)) as f32 * step
}
