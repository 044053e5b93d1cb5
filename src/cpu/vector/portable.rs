//! Vectors of eight lanes in plain Rust, which the compiler turns into those of the target it builds for.

use half::{bf16, f16};

use super::{INTEGERS, ROOT_OF_HALF, Vector, step_table};

#[derive(Clone, Copy)]
pub struct Portable([f32; 8]);

impl Portable {
    /// True if the target's baseline multiplies and adds in one instruction. (Without one, `mul_add`
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
    const COEFFICIENTS_M1: &[f32] =
        &[1.545_316_4e-4, 1.339_086_3e-3, 9.618_083e-3, 5.550_357e-2, 2.402_265e-1, 6.931_472e-1];

    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self([value; 8])
    }
    #[inline(always)]
    fn load(from: &[f32]) -> Self {
        Self(*from.first_chunk().expect("a whole vector"))
    }
    #[inline(always)]
    fn store<const NON_TEMPORAL: bool>(self, to: &mut [f32]) {
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
    fn store_bf16<const NON_TEMPORAL: bool>(self, to: &mut [bf16]) {
        let to: &mut [bf16; 8] = to.first_chunk_mut().expect("a whole vector");
        for (to, lane) in to.iter_mut().zip(self.0) {
            let bits = lane.to_bits();
            let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
            let quiet = bits | 0x40_0000;
            *to = bf16::from_bits((if lane.is_nan() { quiet } else { rounded } >> 16) as u16);
        }
    }
    #[inline(always)]
    fn store_f16<const NON_TEMPORAL: bool>(self, to: &mut [f16]) {
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
    fn div(self, other: Self) -> Self {
        self.zip(other, |a, b| a / b)
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
    fn split_octaves(self) -> (Self, Self) {
        let mut octaves = self.0;
        let mut rest = self.0;
        for (octaves, rest) in octaves.iter_mut().zip(&mut rest) {
            let steps = rest.to_bits().wrapping_sub(ROOT_OF_HALF) as i32;
            *octaves = (steps >> 23) as f32;
            *rest = f32::from_bits((steps as u32 & 0x7f_ffff) + ROOT_OF_HALF);
        }
        (Self(octaves), Self(rest))
    }
    #[inline(always)]
    fn or_integer_bits(self, integers: Self) -> Self {
        self.zip(integers, |a, b| f32::from_bits(a.to_bits() | (b.to_bits() ^ INTEGERS.to_bits())))
    }
    #[inline(always)]
    fn prefetch(_: *const u8) {}
}
