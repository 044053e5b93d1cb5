//! Vectors of float32, one type an instruction set.
//!
//! Every method is `inline(always)`: it must end up inside a function that has the target features,
//! which only [`Instructions`](super::block::Instructions) calls, and only where the machine has them.

use half::bf16;

/// The widest vector's lanes.
pub const MAX_LANES: usize = 16;

pub trait Vector: Copy {
    const LANES: usize;

    fn splat(value: f32) -> Self;
    /// The first [`LANES`](Self::LANES) of `from`, which must hold as many.
    fn load(from: &[f32]) -> Self;
    fn store(self, to: &mut [f32]);
    /// As [`load`](Self::load), widened.
    fn load_bf16(from: &[bf16]) -> Self;
    /// As [`store`](Self::store), rounded to nearest, ties to even.
    fn store_bf16(self, to: &mut [bf16]);
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
    /// The bits shifted left by the 23 of the fraction: an integer in the low bits becomes an exponent.
    fn shift_into_exponent(self) -> Self;
    /// Asks for the cache line at `address`, which need not be readable.
    fn prefetch(address: *const u8);
    /// All lanes, first to last.
    #[inline(always)]
    fn fold(self, f: impl Fn(f32, f32) -> f32) -> f32 {
        let mut lanes = [0.0; MAX_LANES];
        self.store(&mut lanes);
        lanes[1..Self::LANES].iter().fold(lanes[0], |sum, &lane| f(sum, lane))
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

    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self([value; 8])
    }
    #[inline(always)]
    fn load(from: &[f32]) -> Self {
        Self(*from.first_chunk().expect("a whole vector"))
    }
    #[inline(always)]
    fn store(self, to: &mut [f32]) {
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
    fn store_bf16(self, to: &mut [bf16]) {
        let to: &mut [bf16; 8] = to.first_chunk_mut().expect("a whole vector");
        for (to, lane) in to.iter_mut().zip(self.0) {
            let bits = lane.to_bits();
            let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
            let quiet = bits | 0x40_0000;
            *to = bf16::from_bits((if lane.is_nan() { quiet } else { rounded } >> 16) as u16);
        }
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
    fn shift_into_exponent(self) -> Self {
        self.zip(self, |a, _| f32::from_bits(a.to_bits() << 23))
    }
    #[inline(always)]
    fn prefetch(_: *const u8) {}
}

#[cfg(target_arch = "x86_64")]
pub use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use half::bf16;

    use super::Vector;

    #[derive(Clone, Copy)]
    pub struct Avx2(__m256);

    #[derive(Clone, Copy)]
    pub struct Avx512(__m512);

    // SAFETY of both implementations: the module's rule gives the target features; `load` and `store`
    // check that the slice holds a whole vector, and neither needs alignment.
    impl Vector for Avx2 {
        const LANES: usize = 8;

        #[inline(always)]
        fn splat(value: f32) -> Self {
            unsafe { Self(_mm256_set1_ps(value)) }
        }
        #[inline(always)]
        fn load(from: &[f32]) -> Self {
            unsafe { Self(_mm256_loadu_ps(from[..Self::LANES].as_ptr())) }
        }
        #[inline(always)]
        fn store(self, to: &mut [f32]) {
            unsafe { _mm256_storeu_ps(to[..Self::LANES].as_mut_ptr(), self.0) }
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
        fn store_bf16(self, to: &mut [bf16]) {
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
                _mm_storeu_si128(to, _mm256_castsi256_si128(packed));
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
        fn shift_into_exponent(self) -> Self {
            unsafe {
                Self(_mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_castps_si256(self.0))))
            }
        }
        #[inline(always)]
        fn prefetch(address: *const u8) {
            unsafe { _mm_prefetch::<_MM_HINT_T1>(address.cast()) }
        }
    }

    impl Vector for Avx512 {
        const LANES: usize = 16;

        #[inline(always)]
        fn splat(value: f32) -> Self {
            unsafe { Self(_mm512_set1_ps(value)) }
        }
        #[inline(always)]
        fn load(from: &[f32]) -> Self {
            unsafe { Self(_mm512_loadu_ps(from[..Self::LANES].as_ptr())) }
        }
        #[inline(always)]
        fn store(self, to: &mut [f32]) {
            unsafe { _mm512_storeu_ps(to[..Self::LANES].as_mut_ptr(), self.0) }
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
        fn store_bf16(self, to: &mut [bf16]) {
            unsafe {
                let bits = _mm512_castps_si512(self.0);
                let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
                let half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
                let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(self.0, self.0);
                let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x40_0000));
                let rounded = _mm512_mask_mov_epi32(_mm512_add_epi32(bits, half), nan, quiet);
                let narrow = _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(rounded));
                _mm256_storeu_si256(to[..Self::LANES].as_mut_ptr().cast(), narrow);
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
        fn shift_into_exponent(self) -> Self {
            unsafe {
                Self(_mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_castps_si512(self.0))))
            }
        }
        #[inline(always)]
        fn prefetch(address: *const u8) {
            unsafe { _mm_prefetch::<_MM_HINT_T1>(address.cast()) }
        }
    }
}
