//! The two forms in which activations are stored: f32, and bf16 where products are of bf16 values.

use bytemuck::Pod;
use half::bf16;

use crate::backend::Dtype;

/// An element of a tensor. Arithmetic is in f32.
pub(super) trait Element: Pod + Send + Sync {
    const DTYPE: Dtype;

    fn get(self) -> f32;

    /// Rounded to the nearest, of two equally near ones to the even one.
    fn of(x: f32) -> Self;

    /// Stores values.
    #[inline(always)]
    fn store(from: &[f32], to: &mut [Self]) {
        for (to, &x) in to.iter_mut().zip(from) {
            *to = Self::of(x);
        }
    }
}

impl Element for f32 {
    const DTYPE: Dtype = Dtype::F32;
    #[inline(always)]
    fn get(self) -> f32 {
        self
    }
    #[inline(always)]
    fn of(x: f32) -> f32 {
        x
    }
}

impl Element for bf16 {
    const DTYPE: Dtype = Dtype::Bf16;
    #[inline(always)]
    fn get(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    #[inline(always)]
    fn of(x: f32) -> Self {
        Self::from_bits((rounded(x) >> 16) as u16)
    }
}

/// The bits of x rounded to bf16, to the nearest and of two equally near ones to the even one; the low half is zero. NaN
/// stays NaN. Unlike `half`'s, it vectorises.
#[inline(always)]
pub(super) fn rounded(x: f32) -> u32 {
    let bits = x.to_bits();
    let nearest = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) & 0xffff_0000;
    let nan = bits & 0xffff_0000 | 0x0040_0000;
    if bits & 0x7fff_ffff > 0x7f80_0000 { nan } else { nearest }
}

/// Calls a function that is generic over the [`Element`] with that of a tensor.
macro_rules! by_element {
    ($dtype:expr, $function:ident($($argument:expr),* $(,)?)) => {
        match $dtype {
            $crate::backend::Dtype::F32 => $function::<f32>($($argument),*),
            $crate::backend::Dtype::Bf16 => $function::<half::bf16>($($argument),*),
            $crate::backend::Dtype::F16 => unreachable!("activations are f32 or bf16"),
        }
    };
}

pub(super) use by_element;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_that_of_the_half_crate() {
        let special = [0.0, -0.0, f32::NAN, f32::INFINITY, -f32::INFINITY, f32::MAX, 1e-40, 1.003_906_3, 1.011_718_8];
        let many = (0..200_000u32).map(|i| f32::from_bits(i.wrapping_mul(2_654_435_761)));
        for x in special.into_iter().chain(many) {
            let (got, want) = (bf16::of(x), bf16::from_f32(x));
            assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(), "{x}: {got} {want}");
            assert!(got.is_nan() || got.get() == want.to_f32());
        }
    }
}
