//! Vectors of float32, one type an instruction set.
//!
//! Every method is `inline(always)`: it must end up inside a function that has the target features,
//! which only [`Instructions`](super::block::Instructions) calls, and only where the machine has them.

use half::{bf16, f16};

/// The widest vector's lanes.
pub const MAX_LANES: usize = 16;

/// 1.5 * 2^23: a float32 of this size is an integer, and its low bits are that integer's.
pub const INTEGERS: f32 = 12_582_912.0;

/// How many octaves below 1 the power of the integer 0 is: see [`Vector::step_power`].
pub const OCTAVES_BELOW: usize = 125;

/// 2^(k/16)
#[rustfmt::skip]
#[expect(clippy::approx_constant, reason = "the square root of 2 is one of them")]
const ROOTS: [f32; 16] = [
    1.0, 1.044_273_8, 1.090_507_7, 1.138_788_6, 1.189_207_1, 1.241_857_8, 1.296_839_6, 1.354_255_6,
    1.414_213_5, 1.476_826_2, 1.542_210_8, 1.610_490_3, 1.681_792_9, 1.756_252_2, 1.834_008_1, 1.915_206_6,
];

/// For k = 0..S: what the bits of an integer i with i mod S = k, shifted until S is the unit of the
/// exponent, lack of the bits of 2^(i / S - OCTAVES_BELOW).
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

    fn splat(value: f32) -> Self;
    /// The first [`LANES`](Self::LANES) of `from`, which must hold as many.
    fn load(from: &[f32]) -> Self;
    /// To the first [`LANES`](Self::LANES) of `to`; `PAST_CACHE`, where the machine can: `to` then starts
    /// at a multiple of its own size.
    fn store<const PAST_CACHE: bool>(self, to: &mut [f32]);
    /// As [`load`](Self::load), widened.
    fn load_bf16(from: &[bf16]) -> Self;
    fn load_f16(from: &[f16]) -> Self;
    /// As [`store`](Self::store), rounded to nearest, ties to even.
    fn store_bf16<const PAST_CACHE: bool>(self, to: &mut [bf16]);
    fn store_f16<const PAST_CACHE: bool>(self, to: &mut [f16]);
    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
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
    /// The bits of `self`, and those that `integers` and [`INTEGERS`] do not share.
    fn or_bits_beside(self, integers: Self) -> Self;
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

/// Orders what this thread has stored past the cache before what it does next.
pub fn fence() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 has SSE.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}

/// What any machine can do; the compiler turns it into the vectors of the target it builds for.
#[derive(Clone, Copy)]
pub struct Portable([f32; 8]);

impl Portable {
    /// Whether the target's baseline multiplies and adds in one instruction. (Without one, `mul_add`
    /// would be a function call.)
    const FMA: bool = cfg!(any(target_arch = "aarch64", target_feature = "fma"));

    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        let mut lanes = self.0;
        for (lane, other) in lanes.iter_mut().zip(other.0) {
            *lane = f(*lane, other);
        }
        Self(lanes)
    }
}

impl Vector for Portable {
    const LANES: usize = 8;
    const STEPS: usize = 1;
    #[expect(clippy::approx_constant, reason = "a fitted coefficient, though near ln 2")]
    const COEFFICIENTS: &[f32] =
        &[1.326_472_7e-3, 9.671_513e-3, 5.550_733_6e-2, 2.402_224_2e-1, 6.931_47e-1];

    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self([value; 8])
    }
    #[inline(always)]
    fn load(from: &[f32]) -> Self {
        Self(*from.first_chunk().expect("a whole vector"))
    }
    #[inline(always)]
    fn store<const PAST_CACHE: bool>(self, to: &mut [f32]) {
        *to.first_chunk_mut().expect("a whole vector") = self.0;
    }
    #[inline(always)]
    fn load_bf16(from: &[bf16]) -> Self {
        let from: &[bf16; 8] = from.first_chunk().expect("a whole vector");
        let mut lanes = [0.0; 8];
        for (lane, from) in lanes.iter_mut().zip(from) {
            *lane = f32::from_bits(u32::from(from.to_bits()) << 16);
        }
        Self(lanes)
    }
    #[inline(always)]
    fn load_f16(from: &[f16]) -> Self {
        let from: &[f16; 8] = from.first_chunk().expect("a whole vector");
        Self(from.map(f16::to_f32))
    }
    #[inline(always)]
    fn store_bf16<const PAST_CACHE: bool>(self, to: &mut [bf16]) {
        let to: &mut [bf16; 8] = to.first_chunk_mut().expect("a whole vector");
        for (to, lane) in to.iter_mut().zip(self.0) {
            let bits = lane.to_bits();
            let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
            let quiet = bits | 0x40_0000;
            *to = bf16::from_bits((if lane.is_nan() { quiet } else { rounded } >> 16) as u16);
        }
    }
    #[inline(always)]
    fn store_f16<const PAST_CACHE: bool>(self, to: &mut [f16]) {
        *to.first_chunk_mut().expect("a whole vector") = self.0.map(f16::from_f32);
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }
    #[inline(always)]
    fn mul_add(self, a: Self, b: Self) -> Self {
        if Self::FMA {
            let mut lanes = self.0;
            for (i, lane) in lanes.iter_mut().enumerate() {
                *lane = lane.mul_add(a.0[i], b.0[i]);
            }
            Self(lanes)
        } else {
            self.mul(a).add(b)
        }
    }
    #[inline(always)]
    fn min_or(self, other: Self) -> Self {
        self.zip(other, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn max_or(self, other: Self) -> Self {
        self.zip(other, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn select_below(self, limit: f32, then: Self, otherwise: Self) -> Self {
        let mut lanes = otherwise.0;
        for (i, lane) in lanes.iter_mut().enumerate() {
            *lane = if self.0[i] < limit { then.0[i] } else { *lane };
        }
        Self(lanes)
    }
    #[inline(always)]
    fn step_power(self) -> Self {
        const TABLE: [u32; 1] = step_table();
        self.zip(self, |i, _| f32::from_bits((i.to_bits() << 23).wrapping_add(TABLE[0])))
    }
    #[inline(always)]
    fn or_bits_beside(self, integers: Self) -> Self {
        self.zip(integers, |a, b| f32::from_bits(a.to_bits() | (b.to_bits() ^ INTEGERS.to_bits())))
    }
    #[inline(always)]
    fn prefetch(_: *const u8) {}
}

#[cfg(target_arch = "x86_64")]
pub use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use half::{bf16, f16};

    use super::{INTEGERS, Vector, step_table};

    #[derive(Clone, Copy)]
    pub struct Avx2(__m256);

    #[derive(Clone, Copy)]
    pub struct Avx512(__m512);

    /// # Safety
    /// AVX2; 16 bytes to write at `to`, a multiple of 16 if `PAST_CACHE`.
    #[inline(always)]
    unsafe fn store_128<const PAST_CACHE: bool>(bits: __m128i, to: *mut __m128i) {
        unsafe {
            match PAST_CACHE {
                true => _mm_stream_si128(to, bits),
                false => _mm_storeu_si128(to, bits),
            }
        }
    }

    /// # Safety
    /// AVX2; 32 bytes to write at `to`, a multiple of 32 if `PAST_CACHE`.
    #[inline(always)]
    unsafe fn store_256<const PAST_CACHE: bool>(bits: __m256i, to: *mut __m256i) {
        unsafe {
            match PAST_CACHE {
                true => _mm256_stream_si256(to, bits),
                false => _mm256_storeu_si256(to, bits),
            }
        }
    }

    // SAFETY of both implementations: the module's rule gives the target features; `load` and `store`
    // check that the slice holds a whole vector, and neither needs alignment but a store past the cache,
    // which only `combine` asks for, from an aligned element on.
    impl Vector for Avx2 {
        const LANES: usize = 8;
        const STEPS: usize = 8;
        const COEFFICIENTS: &[f32] = &[1.083_910_6e-4, 3.754_025_6e-3, 8.664_340_5e-2];

        #[inline(always)]
        fn splat(value: f32) -> Self {
            unsafe { Self(_mm256_set1_ps(value)) }
        }
        #[inline(always)]
        fn load(from: &[f32]) -> Self {
            unsafe { Self(_mm256_loadu_ps(from[..Self::LANES].as_ptr())) }
        }
        #[inline(always)]
        fn store<const PAST_CACHE: bool>(self, to: &mut [f32]) {
            let to = to[..Self::LANES].as_mut_ptr();
            unsafe {
                match PAST_CACHE {
                    true => _mm256_stream_ps(to, self.0),
                    false => _mm256_storeu_ps(to, self.0),
                }
            }
        }
        #[inline(always)]
        fn load_bf16(from: &[bf16]) -> Self {
            unsafe {
                let bits = _mm_loadu_si128(from[..Self::LANES].as_ptr().cast());
                let wide = _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(bits));
                Self(_mm256_castsi256_ps(wide))
            }
        }
        #[inline(always)]
        fn load_f16(from: &[f16]) -> Self {
            unsafe {
                let bits = _mm_loadu_si128(from[..Self::LANES].as_ptr().cast());
                Self(_mm256_cvtph_ps(bits))
            }
        }
        #[inline(always)]
        fn store_bf16<const PAST_CACHE: bool>(self, to: &mut [bf16]) {
            unsafe {
                let bits = _mm256_castps_si256(self.0);
                let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
                let half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
                let rounded = _mm256_add_epi32(bits, half);
                let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x40_0000));
                let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(self.0, self.0));
                let wide = _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, quiet, nan));
                // Packing works within each half of 128 bits; the permutation joins the two.
                let packed = _mm256_permute4x64_epi64::<0b1000>(_mm256_packus_epi32(wide, wide));
                let to = to[..Self::LANES].as_mut_ptr().cast();
                store_128::<PAST_CACHE>(_mm256_castsi256_si128(packed), to);
            }
        }
        #[inline(always)]
        fn store_f16<const PAST_CACHE: bool>(self, to: &mut [f16]) {
            unsafe {
                let narrow = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0);
                store_128::<PAST_CACHE>(narrow, to[..Self::LANES].as_mut_ptr().cast());
            }
        }
        #[inline(always)]
        fn add(self, other: Self) -> Self {
            unsafe { Self(_mm256_add_ps(self.0, other.0)) }
        }
        #[inline(always)]
        fn sub(self, other: Self) -> Self {
            unsafe { Self(_mm256_sub_ps(self.0, other.0)) }
        }
        #[inline(always)]
        fn mul(self, other: Self) -> Self {
            unsafe { Self(_mm256_mul_ps(self.0, other.0)) }
        }
        #[inline(always)]
        fn mul_add(self, a: Self, b: Self) -> Self {
            unsafe { Self(_mm256_fmadd_ps(self.0, a.0, b.0)) }
        }
        #[inline(always)]
        fn min_or(self, other: Self) -> Self {
            unsafe { Self(_mm256_min_ps(self.0, other.0)) }
        }
        #[inline(always)]
        fn max_or(self, other: Self) -> Self {
            unsafe { Self(_mm256_max_ps(self.0, other.0)) }
        }
        #[inline(always)]
        fn select_below(self, limit: f32, then: Self, otherwise: Self) -> Self {
            unsafe {
                let below = _mm256_cmp_ps::<_CMP_LT_OQ>(self.0, _mm256_set1_ps(limit));
                Self(_mm256_blendv_ps(otherwise.0, then.0, below))
            }
        }
        #[inline(always)]
        fn step_power(self) -> Self {
            const TABLE: [u32; 8] = step_table();
            unsafe {
                let i = _mm256_castps_si256(self.0);
                let table = _mm256_loadu_si256(TABLE.as_ptr().cast());
                // The permutation looks at the lowest three bits.
                let lacking = _mm256_permutevar8x32_epi32(table, i);
                Self(_mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32::<20>(i), lacking)))
            }
        }
        #[inline(always)]
        fn or_bits_beside(self, integers: Self) -> Self {
            unsafe {
                let beside = _mm256_xor_ps(integers.0, _mm256_set1_ps(INTEGERS));
                Self(_mm256_or_ps(self.0, beside))
            }
        }
        #[inline(always)]
        fn prefetch(address: *const u8) {
            unsafe { _mm_prefetch::<_MM_HINT_T1>(address.cast()) }
        }
    }

    impl Vector for Avx512 {
        const LANES: usize = 16;
        const STEPS: usize = 16;
        const COEFFICIENTS: &[f32] = &[1.355_032_6e-5, 9.384_152e-4, 4.332_17e-2];

        #[inline(always)]
        fn splat(value: f32) -> Self {
            unsafe { Self(_mm512_set1_ps(value)) }
        }
        #[inline(always)]
        fn load(from: &[f32]) -> Self {
            unsafe { Self(_mm512_loadu_ps(from[..Self::LANES].as_ptr())) }
        }
        #[inline(always)]
        fn store<const PAST_CACHE: bool>(self, to: &mut [f32]) {
            let to = to[..Self::LANES].as_mut_ptr();
            unsafe {
                match PAST_CACHE {
                    true => _mm512_stream_ps(to, self.0),
                    false => _mm512_storeu_ps(to, self.0),
                }
            }
        }
        #[inline(always)]
        fn load_bf16(from: &[bf16]) -> Self {
            unsafe {
                let bits = _mm256_loadu_si256(from[..Self::LANES].as_ptr().cast());
                let wide = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits));
                Self(_mm512_castsi512_ps(wide))
            }
        }
        #[inline(always)]
        fn load_f16(from: &[f16]) -> Self {
            unsafe {
                let bits = _mm256_loadu_si256(from[..Self::LANES].as_ptr().cast());
                Self(_mm512_cvtph_ps(bits))
            }
        }
        #[inline(always)]
        fn store_bf16<const PAST_CACHE: bool>(self, to: &mut [bf16]) {
            unsafe {
                let bits = _mm512_castps_si512(self.0);
                let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
                let half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
                let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(self.0, self.0);
                let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x40_0000));
                let rounded = _mm512_mask_mov_epi32(_mm512_add_epi32(bits, half), nan, quiet);
                let narrow = _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(rounded));
                store_256::<PAST_CACHE>(narrow, to[..Self::LANES].as_mut_ptr().cast());
            }
        }
        #[inline(always)]
        fn store_f16<const PAST_CACHE: bool>(self, to: &mut [f16]) {
            unsafe {
                let narrow = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0);
                store_256::<PAST_CACHE>(narrow, to[..Self::LANES].as_mut_ptr().cast());
            }
        }
        #[inline(always)]
        fn add(self, other: Self) -> Self {
            unsafe { Self(_mm512_add_ps(self.0, other.0)) }
        }
        #[inline(always)]
        fn sub(self, other: Self) -> Self {
            unsafe { Self(_mm512_sub_ps(self.0, other.0)) }
        }
        #[inline(always)]
        fn mul(self, other: Self) -> Self {
            unsafe { Self(_mm512_mul_ps(self.0, other.0)) }
        }
        #[inline(always)]
        fn mul_add(self, a: Self, b: Self) -> Self {
            unsafe { Self(_mm512_fmadd_ps(self.0, a.0, b.0)) }
        }
        #[inline(always)]
        fn min_or(self, other: Self) -> Self {
            unsafe { Self(_mm512_min_ps(self.0, other.0)) }
        }
        #[inline(always)]
        fn max_or(self, other: Self) -> Self {
            unsafe { Self(_mm512_max_ps(self.0, other.0)) }
        }
        #[inline(always)]
        fn select_below(self, limit: f32, then: Self, otherwise: Self) -> Self {
            unsafe {
                let below = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(self.0, _mm512_set1_ps(limit));
                Self(_mm512_mask_blend_ps(below, otherwise.0, then.0))
            }
        }
        #[inline(always)]
        fn step_power(self) -> Self {
            const TABLE: [u32; 16] = step_table();
            unsafe {
                let i = _mm512_castps_si512(self.0);
                let table = _mm512_loadu_si512(TABLE.as_ptr().cast());
                // The permutation looks at the lowest four bits.
                let lacking = _mm512_permutexvar_epi32(i, table);
                Self(_mm512_castsi512_ps(_mm512_add_epi32(_mm512_slli_epi32::<19>(i), lacking)))
            }
        }
        #[inline(always)]
        fn or_bits_beside(self, integers: Self) -> Self {
            unsafe {
                let beside = _mm512_xor_ps(integers.0, _mm512_set1_ps(INTEGERS));
                Self(_mm512_or_ps(self.0, beside))
            }
        }
        #[inline(always)]
        fn prefetch(address: *const u8) {
            unsafe { _mm_prefetch::<_MM_HINT_T1>(address.cast()) }
        }
    }
}
