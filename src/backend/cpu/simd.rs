//! Run-time dispatch of loops to the widest SIMD instruction set, and vectorisable building blocks: exp, sums, softmax.

/// Evaluates an expression with code compiled for this processor's widest instruction set (AVX-512, AVX2 or the
/// baseline).
///
/// Only inlined code is compiled for that set: functions called in the expression must be `#[inline(always)]`, and
/// loops must be `for` loops, because the closure of a `for_each` becomes a separate function, compiled for the
/// baseline.
macro_rules! simd {
    ($body:expr) => {
        $crate::backend::cpu::simd::widest(
            #[inline(always)]
            || $body,
        )
    };
}

/// Implements [`simd!`]. The bound types the closure as `FnOnce`, so that its body is `call_once` itself. Passed to
/// `dispatch` directly, it would be called through a shim that is not inlined.
#[inline(always)]
pub(super) fn widest<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}

pub(super) use simd;

/// e^x in f32, with an error of at most 2 ulp for normal results; 0 below -87.33 (where e^x would be subnormal), ∞
/// above 88.72, NaN for NaN.
///
/// libm's `expf` cannot be vectorised and would dominate softmax and cross-entropy. This uses Cody-Waite range
/// reduction: x = n·ln 2 + r with |r| ≤ ln 2 / 2, e^x = 2^n · e^r, and a polynomial of degree 6 for e^r (coefficients
/// of Cephes' `expf`). It uses no fused multiply-add, so all instruction sets give the same bits.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // Adding and then subtracting 1.5 · 2^23 rounds to the nearest integer.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 split in two; LN2_HI has so few bits that n · LN2_HI is exact.
    const LN2_HI: f32 = 355.0 / 512.0;
    const LN2_LO: f32 = -2.121_944_4e-4;
    const LOWEST: f32 = -87.336_54;
    const HIGHEST: f32 = 88.722_83;
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN2_HI) - n * LN2_LO;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    let e = (p * (r * r) + r) + 1.0;
    // Multiplies by 2^n: adds n, the low bits of `shifted`, to the exponent of e. The exponent of the result is that of a
    // normal number from LOWEST (n = -126, e ≥ 1) to HIGHEST (n = 128, e < 1). Outside, and for NaN, this bit pattern is
    // arbitrary, and replaced. ROUND has no bit that the shift keeps.
    let y = f32::from_bits(e.to_bits().wrapping_add(shifted.to_bits() << 23));
    let y = if x < LOWEST { 0.0 } else { y };
    // ∞ + ∞, or NaN + ∞
    if x <= HIGHEST { y } else { x + f32::INFINITY }
}

/// e^x in f64, with an error of at most 2 ulp for normal results; 0 below -708.39 (where e^x would be subnormal), NaN for NaN, and
/// ∞ above 709.78. As [`exp`], with the Taylor polynomial of degree 13, whose error is 5e-18 for |r| ≤ ln 2 / 2.
#[inline(always)]
pub(super) fn exp_f64(x: f64) -> f64 {
    // Adding and then subtracting 1.5 · 2^52 rounds to the nearest integer.
    const ROUND: f64 = 6_755_399_441_055_744.0;
    // ln 2 split in two; LN2_HI has so few bits that n · LN2_HI is exact.
    const LN2_HI: f64 = f64::from_bits(0x3fe6_2e42_fee0_0000);
    const LN2_LO: f64 = f64::from_bits(0x3dea_39ef_3579_3c76);
    const LOWEST: f64 = -708.396;
    const HIGHEST: f64 = 709.782;
    /// 1 / n! from n = 13 down to 2.
    const INVERSE_FACTORIALS: [f64; 12] = [
        1.0 / 6_227_020_800.0,
        1.0 / 479_001_600.0,
        1.0 / 39_916_800.0,
        1.0 / 3_628_800.0,
        1.0 / 362_880.0,
        1.0 / 40_320.0,
        1.0 / 5_040.0,
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
    ];
    let shifted = x * std::f64::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN2_HI) - n * LN2_LO;
    let mut p = 0.0;
    for c in INVERSE_FACTORIALS {
        p = p * r + c;
    }
    let e = (p * (r * r) + r) + 1.0;
    let y = f64::from_bits(e.to_bits().wrapping_add(shifted.to_bits() << 52));
    let y = if x < LOWEST { 0.0 } else { y };
    if x <= HIGHEST { y } else { x + f64::INFINITY }
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub(super) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Parallel lanes of a running sum. There are enough that the compiler keeps the loop over them and vectorises it; a
/// shorter loop would be unrolled into scalar code.
const LANES: usize = 128;
/// Elements summed in f32 before the lanes are added in f64. A lane sums at most 32 terms, and 8 lanes are then folded
/// into one, so the rounding error stays below 40 · 2^-24 of the sum of the terms' absolute values.
const RUN: usize = 32 * LANES;

/// `Σ term(a[i], b[i])` in a fixed order: f32 lanes over [`RUN`] elements, then f64.
#[inline(always)]
pub(super) fn sum2(a: &[f32], b: &[f32], term: impl Fn(f32, f32) -> f32) -> f64 {
    let b = &b[..a.len()];
    let mut total = 0.0;
    for (a, b) in a.chunks(RUN).zip(b.chunks(RUN)) {
        let mut lanes = [0f32; LANES];
        for (a, b) in a.chunks(LANES).zip(b.chunks(LANES)) {
            for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
                *lane += term(*a, *b);
            }
        }
        let mut folded = [0f32; 16];
        for group in lanes.as_chunks::<16>().0 {
            for (f, x) in folded.iter_mut().zip(group) {
                *f += x;
            }
        }
        for x in folded {
            total += f64::from(x);
        }
    }
    total
}

/// `Σ term(a[i], b[i])` in f64, in a fixed order.
#[inline(always)]
pub(super) fn sum2_f64(a: &[f32], b: &[f32], term: impl Fn(f64, f64) -> f64) -> f64 {
    const LANES: usize = 32;
    let b = &b[..a.len()];
    let mut lanes = [0.0; LANES];
    for (a, b) in a.chunks(LANES).zip(b.chunks(LANES)) {
        for ((lane, &a), &b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += term(f64::from(a), f64::from(b));
        }
    }
    lanes.iter().sum()
}

/// `Σ term(a[i])`, summed as in [`sum2`].
#[inline(always)]
pub(super) fn sum(a: &[f32], term: impl Fn(f32) -> f32) -> f64 {
    sum2(a, a, |x, _| term(x))
}

/// `Σ a[i] · b[i]`, summed as in [`sum2`].
#[inline(always)]
pub(super) fn dot(a: &[f32], b: &[f32]) -> f64 {
    sum2(a, b, |x, y| x * y)
}

/// y += a · x.
#[inline(always)]
pub(super) fn axpy(y: &mut [f32], a: f32, x: &[f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += a * x;
    }
}

/// The largest value, ignoring NaN; -∞ for an empty slice.
#[inline(always)]
pub(super) fn max(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in x.chunks(LANES) {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = if x > *lane { x } else { *lane };
        }
    }
    fold(lanes, |a, b| if b > a { b } else { a })
}

/// Combines all values, whose number is a power of two, in halves: one after the other, each would wait for the previous one.
#[inline(always)]
pub(super) fn fold<const N: usize>(mut values: [f32; N], combine: impl Fn(f32, f32) -> f32) -> f32 {
    let mut half = N / 2;
    while half > 0 {
        let (low, high) = values.split_at_mut(half);
        for (a, &b) in low.iter_mut().zip(&high[..half]) {
            *a = combine(*a, b);
        }
        half /= 2;
    }
    values[0]
}

/// Writes softmax(`logits`) into `out`. Returns the log-sum-exp.
#[inline(always)]
pub(super) fn softmax(logits: &[f32], out: &mut [f32]) -> f64 {
    let highest = max(logits);
    for (p, &l) in out.iter_mut().zip(logits) {
        *p = exp(l - highest);
    }
    let total = sum(out, |p| p);
    let inverse = (1.0 / total) as f32;
    for p in out.iter_mut() {
        *p *= inverse;
    }
    f64::from(highest) + total.ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        let mut worst = (0.0f64, 0.0f32);
        let mut x = -87.33f32;
        while x < 88.72 {
            let want = f64::from(x).exp();
            let ulp = f64::from((want as f32).next_up()) - f64::from(want as f32);
            let off = (f64::from(exp(x)) - want).abs() / ulp;
            if off > worst.0 {
                worst = (off, x);
            }
            x += 0.000_37;
        }
        assert!(worst.0 <= 2.0, "{} ulp at {}", worst.0, worst.1);
    }

    #[test]
    fn exp_in_f64_is_within_two_units_in_the_last_place() {
        let mut worst = (0.0f64, 0.0);
        let mut x = -708.39f64;
        while x < 709.78 {
            let want = x.exp();
            let off = (exp_f64(x) - want).abs() / (want.next_up() - want);
            if off > worst.0 {
                worst = (off, x);
            }
            x += 0.001_37;
        }
        assert!(worst.0 <= 2.0, "{} ulp at {}", worst.0, worst.1);
        assert_eq!([0.0, -0.0, -1e300, f64::NEG_INFINITY, -750.0].map(exp_f64), [1.0, 1.0, 0.0, 0.0, 0.0]);
        assert!(exp_f64(f64::NAN).is_nan() && exp_f64(710.0) == f64::INFINITY && exp_f64(709.78).is_finite());
        let x: Vec<f64> = (0..10_000).map(|i| f64::from(i - 9_000) * 0.0171).collect();
        let plain: Vec<u64> = x.iter().map(|&x| exp_f64(x).to_bits()).collect();
        let wide: Vec<u64> = simd!(x.iter().map(|&x| exp_f64(x).to_bits()).collect());
        assert_eq!(plain, wide, "every instruction set gives the same bits");
    }

    #[test]
    fn exp_of_the_extremes() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1e30), 0.0);
        assert_eq!(exp(-100.0), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(89.0), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(88.72).is_finite());
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let x: Vec<f32> = (0..10_000).map(|i| (i as f32 - 5000.0) * 0.0171).collect();
        let plain: Vec<u32> = x.iter().map(|&x| exp(x).to_bits()).collect();
        let wide: Vec<u32> = simd!(x.iter().map(|&x| exp(x).to_bits()).collect());
        assert_eq!(plain, wide);
        assert_eq!(dot(&x, &x).to_bits(), simd!(dot(&x, &x)).to_bits());
    }

    #[test]
    fn sums_of_any_length() {
        for n in [0, 1, 127, 128, 129, 4095, 4096, 4097, 9000] {
            let x: Vec<f32> = (0..n).map(|i| (i % 7) as f32).collect();
            let want: f64 = (0..n).map(|i| f64::from((i % 7) * (i % 7))).sum();
            // Small integers: every partial sum is exact.
            assert_eq!(dot(&x, &x), want, "n = {n}");
        }
        assert_eq!(max(&[]), f32::NEG_INFINITY);
        assert_eq!(max(&[f32::NAN, 2.0, -3.0]), 2.0);
    }
}
