//! Vectors of sixteen lanes: AVX-512 F, BW, DQ and VL.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::{INTEGERS, ROOT_OF_HALF, Vector, step_table};

#[derive(Clone, Copy)]
pub struct Avx512(__m512);

/// # Safety
/// AVX2; 32 bytes to write at `to`, a multiple of 32 if `NON_TEMPORAL`.
#[inline(always)]
unsafe fn store_256<const NON_TEMPORAL: bool>(bits: __m256i, to: *mut __m256i) {
    unsafe {
        match NON_TEMPORAL {
            true => _mm256_stream_si256(to, bits),
            false => _mm256_storeu_si256(to, bits),
        }
    }
}

// SAFETY of the whole implementation: the rule of the parent module gives the target features. `load` and `store`
// check that the slice holds a whole vector. Neither needs alignment, but for a non-temporal store, which only
// `tile::write_gradient` asks for, from an aligned element on.
impl Vector for Avx512 {
    const LANES: usize = 16;
    const STEPS: usize = 16;
    const COEFFICIENTS: &[f32] = &[1.355_032_6e-5, 9.384_152e-4, 4.332_17e-2];
    const COEFFICIENTS_M1: &[f32] = &[1.467_633e-7, 1.355_112_5e-5, 9.383_848e-4, 4.332_17e-2];

    #[inline(always)]
    fn splat(value: f32) -> Self {
        unsafe { Self(_mm512_set1_ps(value)) }
    }
    #[inline(always)]
    fn load(from: &[f32]) -> Self {
        unsafe { Self(_mm512_loadu_ps(from[..Self::LANES].as_ptr())) }
    }
    #[inline(always)]
    fn store<const NON_TEMPORAL: bool>(self, to: &mut [f32]) {
        let to = to[..Self::LANES].as_mut_ptr();
        unsafe {
            match NON_TEMPORAL {
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
    fn store_bf16<const NON_TEMPORAL: bool>(self, to: &mut [bf16]) {
        unsafe {
            let bits = _mm512_castps_si512(self.0);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(self.0, self.0);
            let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x40_0000));
            let rounded = _mm512_mask_mov_epi32(_mm512_add_epi32(bits, half), nan, quiet);
            let narrow = _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(rounded));
            store_256::<NON_TEMPORAL>(narrow, to[..Self::LANES].as_mut_ptr().cast());
        }
    }
    #[inline(always)]
    fn store_f16<const NON_TEMPORAL: bool>(self, to: &mut [f16]) {
        unsafe {
            let narrow = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0);
            store_256::<NON_TEMPORAL>(narrow, to[..Self::LANES].as_mut_ptr().cast());
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
    fn div(self, other: Self) -> Self {
        unsafe { Self(_mm512_div_ps(self.0, other.0)) }
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
    fn split_octaves(self) -> (Self, Self) {
        unsafe {
            let root = _mm512_set1_epi32(ROOT_OF_HALF as i32);
            let steps = _mm512_sub_epi32(_mm512_castps_si512(self.0), root);
            let octaves = _mm512_cvtepi32_ps(_mm512_srai_epi32::<23>(steps));
            let mantissa = _mm512_and_si512(steps, _mm512_set1_epi32(0x7f_ffff));
            (Self(octaves), Self(_mm512_castsi512_ps(_mm512_add_epi32(mantissa, root))))
        }
    }
    #[inline(always)]
    fn or_integer_bits(self, integers: Self) -> Self {
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
