//! Vectors of eight lanes: AVX2, FMA and F16C.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::{INTEGERS, ROOT_OF_HALF, Vector, step_table};

#[derive(Clone, Copy)]
pub struct Avx2(__m256);

/// # Safety
/// AVX2; 16 bytes to write at `to`, a multiple of 16 if `NON_TEMPORAL`.
#[inline(always)]
unsafe fn store_128<const NON_TEMPORAL: bool>(bits: __m128i, to: *mut __m128i) {
    unsafe {
        match NON_TEMPORAL {
            true => _mm_stream_si128(to, bits),
            false => _mm_storeu_si128(to, bits),
        }
    }
}

// SAFETY of the whole implementation: the rule of the parent module gives the target features. `load` and `store`
// check that the slice holds a whole vector. Neither needs alignment, but for a non-temporal store, which only
// `tile::write_gradient` asks for, from an aligned element on.
impl Vector for Avx2 {
    const LANES: usize = 8;
    const STEPS: usize = 8;
    const COEFFICIENTS: &[f32] = &[1.083_910_6e-4, 3.754_025_6e-3, 8.664_340_5e-2];
    const COEFFICIENTS_M1: &[f32] = &[2.348_323e-6, 1.084_166_4e-4, 3.753_539_2e-3, 8.664_34e-2];

    #[inline(always)]
    fn splat(value: f32) -> Self {
        unsafe { Self(_mm256_set1_ps(value)) }
    }
    #[inline(always)]
    fn load(from: &[f32]) -> Self {
        unsafe { Self(_mm256_loadu_ps(from[..Self::LANES].as_ptr())) }
    }
    #[inline(always)]
    fn store<const NON_TEMPORAL: bool>(self, to: &mut [f32]) {
        let to = to[..Self::LANES].as_mut_ptr();
        unsafe {
            match NON_TEMPORAL {
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
    fn store_bf16<const NON_TEMPORAL: bool>(self, to: &mut [bf16]) {
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
            store_128::<NON_TEMPORAL>(_mm256_castsi256_si128(packed), to);
        }
    }
    #[inline(always)]
    fn store_f16<const NON_TEMPORAL: bool>(self, to: &mut [f16]) {
        unsafe {
            let narrow = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0);
            store_128::<NON_TEMPORAL>(narrow, to[..Self::LANES].as_mut_ptr().cast());
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
    fn div(self, other: Self) -> Self {
        unsafe { Self(_mm256_div_ps(self.0, other.0)) }
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
    fn split_octaves(self) -> (Self, Self) {
        unsafe {
            let root = _mm256_set1_epi32(ROOT_OF_HALF as i32);
            let steps = _mm256_sub_epi32(_mm256_castps_si256(self.0), root);
            let octaves = _mm256_cvtepi32_ps(_mm256_srai_epi32::<23>(steps));
            let mantissa = _mm256_and_si256(steps, _mm256_set1_epi32(0x7f_ffff));
            (Self(octaves), Self(_mm256_castsi256_ps(_mm256_add_epi32(mantissa, root))))
        }
    }
    #[inline(always)]
    fn or_integer_bits(self, integers: Self) -> Self {
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
