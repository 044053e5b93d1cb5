//! Vectors of float32, one type per instruction set, each in a file of its own.
//!
//! [`Vector`] is all that the loops of [`tile`](super::tile) know of a machine. Every method is `inline(always)`: it
//! must end up inside a function that has the target features, which only
//! [`Instructions`](super::dispatch::Instructions) calls, and only where the machine has them. A closure or an iterator
//! adapter does not inherit target features, so neither has a place around these methods.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;
mod two;

use half::{bf16, f16};

#[cfg(target_arch = "x86_64")]
pub use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub use avx512::Avx512;
pub use portable::Portable;
pub use two::Two;

/// The widest vector's lanes, but for those of [`Two`].
pub const MAX_LANES: usize = 16;

/// 1.5 * 2^23: a float32 of this size is an integer, and its low bits are that integer's.
pub const INTEGERS: f32 = 12_582_912.0;

/// The bits of 1 / sqrt(2): see [`Vector::split_octaves`].
const ROOT_OF_HALF: u32 = std::f32::consts::FRAC_1_SQRT_2.to_bits();

/// How many octaves below 1 the power of the integer 0 is: see [`Vector::step_power`].
pub const OCTAVES_BELOW: usize = 125;

/// 2^(k/16)
#[rustfmt::skip]
#[expect(clippy::approx_constant, reason = "the square root of 2 is one of them")]
const ROOTS: [f32; 16] = [
    1.0, 1.044_273_8, 1.090_507_7, 1.138_788_6, 1.189_207_1, 1.241_857_8, 1.296_839_6, 1.354_255_6,
    1.414_213_5, 1.476_826_2, 1.542_210_8, 1.610_490_3, 1.681_792_9, 1.756_252_2, 1.834_008_1, 1.915_206_6,
];

/// Entry k, for k = 0..S, is the difference between the bits of 2^(i / S - OCTAVES_BELOW) and those of an integer i with
/// i mod S = k, shifted until S is the unit of the exponent.
const fn step_table<const S: usize>() -> [u32; S] {
    let mut table = [0; S];
    let mut k = 0;
    while k < S {
        let steps = (k + OCTAVES_BELOW * S) as u32;
        table[k] = ROOTS[k * 16 / S].to_bits().wrapping_sub(steps << (23 - S.ilog2()));
        k += 1;
    }
    table
}

pub trait Vector: Copy {
    const LANES: usize;
    /// An octave's steps, between which [`step_power`](Self::step_power) knows no power of 2.
    const STEPS: usize;
    /// (2^(r / STEPS) - 1) / r for |r| <= 1/2, the highest power first: the polynomial that makes the
    /// relative error of 2^(r / STEPS) least.
    const COEFFICIENTS: &[f32];
    /// The same, but the polynomial that makes its own relative error least, and so that of 2^(r / STEPS) - 1 near 0.
    const COEFFICIENTS_M1: &[f32];

    fn splat(value: f32) -> Self;
    /// The first [`LANES`](Self::LANES) of `from`, which must hold as many.
    fn load(from: &[f32]) -> Self;
    /// Writes the first [`LANES`](Self::LANES) of `to`. A `NON_TEMPORAL` store bypasses the cache, where the machine has
    /// such stores; `to` must then start at a multiple of the vector's size.
    fn store<const NON_TEMPORAL: bool>(self, to: &mut [f32]);
    /// [`load`](Self::load) of bfloat16, widened.
    fn load_bf16(from: &[bf16]) -> Self;
    /// [`load`](Self::load) of float16, widened.
    fn load_f16(from: &[f16]) -> Self;
    /// [`store`](Self::store) to bfloat16, rounded to nearest, ties to even.
    fn store_bf16<const NON_TEMPORAL: bool>(self, to: &mut [bf16]);
    /// [`store`](Self::store) to float16, rounded to nearest, ties to even.
    fn store_f16<const NON_TEMPORAL: bool>(self, to: &mut [f16]);
    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    fn div(self, other: Self) -> Self;
    /// self * a + b, rounded once where the machine can.
    fn mul_add(self, a: Self, b: Self) -> Self;
    /// The smaller; `other` where either is NaN.
    fn min_or(self, other: Self) -> Self;
    /// The larger; `other` where either is NaN.
    fn max_or(self, other: Self) -> Self;
    /// `then` where self < limit, else (also for NaN) `otherwise`.
    fn select_below(self, limit: f32, then: Self, otherwise: Self) -> Self;
    /// 2^(i / STEPS - OCTAVES_BELOW) of INTEGERS + i, where that is not subnormal and does not overflow.
    fn step_power(self) -> Self;
    /// (k, x) of self = 2^k x with 1 / sqrt(2) <= x < sqrt(2), for positive numbers that are not subnormal.
    fn split_octaves(self) -> (Self, Self);
    /// The bits of `self`, together with those of each integer i of `integers`, which holds INTEGERS + i.
    fn or_integer_bits(self, integers: Self) -> Self;
    /// Asks for the cache line at `address`, which need not be readable.
    fn prefetch(address: *const u8);
    /// All lanes, first to last.
    #[inline(always)]
    fn fold(self, f: impl Fn(f32, f32) -> f32) -> f32 {
        let mut lanes = [0.0; MAX_LANES];
        self.store::<false>(&mut lanes);
        lanes[1..Self::LANES].iter().fold(lanes[0], |sum, &lane| f(sum, lane))
    }
}

/// Orders this thread's non-temporal stores before what it does next.
pub fn fence() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 has SSE.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}
