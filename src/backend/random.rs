//! Counter-based random numbers: each depends only on a seed and an index, so every backend can generate any part of a
//! sequence with the same bits. `kernels/elements.cu` implements the same functions.

/// Element `index` of the SplitMix64 sequence of `seed` (Steele et al., "Fast splittable pseudorandom number
/// generators", 2014).
#[inline(always)]
pub fn random_bits(seed: u64, index: u64) -> u64 {
    let mut z = seed.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The spacing of 2^24 equally likely, evenly spaced values around 0 with this standard deviation.
pub(super) fn uniform_step(std: f32) -> f32 {
    (f64::from(std) * 12f64.sqrt() / f64::from(1 << 24)) as f32
}

/// One of these values, for [`uniform_step`]'s `step`. A 24-bit integer is exact in f32, so only the product is
/// rounded.
#[inline(always)]
pub(super) fn uniform(seed: u64, index: u64, step: f32) -> f32 {
    ((random_bits(seed, index) >> 40) as i32 - (1 << 23)) as f32 * step
}
