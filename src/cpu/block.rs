//! The arithmetic on one block of a row, in float32, compiled once for each instruction set.
//!
//! The loops are written once over a [`Vector`]; [`Instructions`] picks the widest one that the
//! machine has.

use std::sync::OnceLock;

use half::bf16;

#[cfg(target_arch = "x86_64")]
use super::vector::{Avx2, Avx512};
use super::vector::{MAX_LANES, Portable, Vector};

/// Below it a power of 2 is subnormal, and taken as 0.
const LOWEST_LOG2: f32 = -126.0;

/// log2(e) / T, what a logit difference is multiplied by to become an exponent of 2.
#[derive(Clone, Copy, Debug)]
pub struct Exponent {
    pub(super) exact: f64,
    /// Two parts whose sum is exact enough that the product with any logit difference is.
    pub(super) high: f32,
    pub(super) low: f32,
}

impl Exponent {
    pub fn new(inverse_temperature: f64) -> Self {
        let exact = std::f64::consts::LOG2_E * inverse_temperature;
        let high = exact as f32;
        Self { exact, high, low: (exact - f64::from(high)) as f32 }
    }

    /// Whether e^{difference / T} is surely left out.
    pub fn underflows(&self, difference: f32) -> bool {
        difference * self.high < LOWEST_LOG2
    }
}

/// What a block's exponentials are relative to.
#[derive(Clone, Copy, Debug)]
pub struct Frame {
    pub teacher_max: f32,
    pub student_max: f32,
    pub exponent: Exponent,
    /// Some exponential may underflow, or a logit be infinite: mind every element.
    pub careful: bool,
}

/// The exponentials of one block, written by [`Instructions::accumulate`] and read by
/// [`Instructions::combine`].
pub struct Exponentials<'a> {
    pub teacher: &'a mut [f32],
    pub student: &'a mut [f32],
    /// Of the student at temperature 1. Empty unless they are wanted.
    pub student_at_1: &'a mut [f32],
}

/// Sums over one block; [`RowState`](crate::row::RowState) has their meaning.
#[derive(Clone, Copy, Debug)]
pub struct Sums {
    pub teacher: f32,
    pub weighted_gap: f32,
    pub student: f32,
    pub student_at_1: f32,
    pub ruled_out: bool,
}

/// What exponentials are multiplied by to make a gradient.
#[derive(Clone, Copy, Debug)]
pub struct Scales {
    pub teacher: f32,
    pub student: f32,
    pub student_at_1: f32,
}

/// e^{x / T} where that is neither subnormal nor overflows, within 1.5 units in the last place; NaN
/// for NaN.
#[inline(always)]
fn exp<V: Vector>(x: V, exponent: Exponent) -> V {
    // Adding 1.5 * 2^23 rounds to an integer and leaves it, plus the exponent's bias, in the low bits.
    let round = V::splat(12_582_912.0 + 127.0);
    let shifted = x.mul_add(V::splat(exponent.high), round);
    let r = x.fraction(exponent, shifted.sub(round));
    // 2^r on [-1/2, 1/2], relative error 2e-9 before rounding.
    let mut p = V::splat(1.534_581_2e-4);
    for c in [1.339_993_1e-3, 9.618_489e-3, 5.550_329e-2, 2.402_264_7e-1, 6.931_472e-1, 1.0] {
        p = p.mul_add(r, V::splat(c));
    }
    p.mul(shifted.shift_into_exponent())
}

/// As [`exp`], and 0 where it would underflow.
#[inline(always)]
fn careful_exp<V: Vector>(x: V, exponent: Exponent) -> V {
    let log2 = x.mul(V::splat(exponent.high));
    // A NaN is not below anything, and stays.
    log2.select_below(LOWEST_LOG2, V::splat(0.0), exp(x, exponent))
}

#[inline(always)]
fn exp_if<V: Vector, const CAREFUL: bool>(x: V, exponent: Exponent) -> V {
    if CAREFUL { careful_exp(x, exponent) } else { exp(x, exponent) }
}

/// The whole vectors of `x`, and what is left, padded with -inf.
#[inline(always)]
fn split<V: Vector>(x: &[f32]) -> (impl ExactSizeIterator<Item = V>, V, usize) {
    let chunks = x.chunks_exact(V::LANES);
    let rest = chunks.remainder();
    let mut padded = [f32::NEG_INFINITY; MAX_LANES];
    padded[..rest.len()].copy_from_slice(rest);
    (chunks.map(V::load), V::load(&padded), rest.len())
}

/// Smallest and largest, NaN passed over; (+inf, -inf) for nothing.
#[inline(always)]
fn min_max<V: Vector>(x: &[f32]) -> (f32, f32) {
    let (mut low, mut high) = (V::splat(f32::INFINITY), V::splat(f32::NEG_INFINITY));
    let (chunks, rest, left) = split::<V>(x);
    for x in chunks {
        low = x.min_or(low);
        high = x.max_or(high);
    }
    let low = low.fold(f32::min);
    let high = rest.max_or(high).fold(f32::max);
    (x[x.len() - left..].iter().copied().fold(low, f32::min), high)
}

/// sum e^{(x_j - max) / T}
#[inline(always)]
fn sum_exp<V: Vector, const CAREFUL: bool>(x: &[f32], max: f32, exponent: Exponent) -> f32 {
    let max = V::splat(max);
    let (chunks, rest, _) = split::<V>(x);
    let mut sum = careful_exp(rest.sub(max), exponent);
    for x in chunks {
        sum = sum.add(exp_if::<V, CAREFUL>(x.sub(max), exponent));
    }
    sum.fold(|a, b| a + b)
}

/// [`Sums`] by lane.
#[derive(Clone, Copy)]
struct LaneSums<V> {
    teacher: V,
    weighted_gap: V,
    student: V,
    student_at_1: V,
    /// 1 where the student rules out a token that the teacher does not.
    ruled_out: V,
}

impl<V: Vector> LaneSums<V> {
    /// Adds logits `a` of the teacher and `b` of the student, and returns their exponentials: teacher,
    /// student, and with `AT_1` student at temperature 1.
    #[inline(always)]
    fn add<const CAREFUL: bool, const AT_1: bool>(&mut self, frame: &Frame, a: V, b: V) -> [V; 3] {
        let zero = V::splat(0.0);
        let da = a.sub(V::splat(frame.teacher_max));
        let db = b.sub(V::splat(frame.student_max));
        let p = exp_if::<V, CAREFUL>(da, frame.exponent);
        let q = exp_if::<V, CAREFUL>(db, frame.exponent);
        let mut gap = da.sub(db);
        if CAREFUL {
            // Neither 0 * inf, nor a vanishing weight times the distance to a mask of -3e38.
            gap = p.select_below(f32::MIN_POSITIVE, zero, gap);
            gap = b.select_below(f32::MIN, zero, gap);
            let ruled_out = a.select_below(f32::MIN, zero, V::splat(1.0));
            self.ruled_out = b.select_below(f32::MIN, ruled_out, zero).max_or(self.ruled_out);
        }
        self.teacher = self.teacher.add(p);
        self.weighted_gap = p.mul_add(gap, self.weighted_gap);
        self.student = self.student.add(q);
        let q_at_1 = if AT_1 { exp_if::<V, CAREFUL>(db, Exponent::new(1.0)) } else { zero };
        if AT_1 {
            self.student_at_1 = self.student_at_1.add(q_at_1);
        }
        [p, q, q_at_1]
    }
}

#[inline(always)]
fn accumulate<V: Vector, const CAREFUL: bool, const AT_1: bool>(
    teacher: &[f32],
    student: &[f32],
    frame: &Frame,
    out: Exponentials,
) -> Sums {
    let frame = *frame;
    let zero = V::splat(0.0);
    let mut sums = LaneSums {
        teacher: zero,
        weighted_gap: zero,
        student: zero,
        student_at_1: zero,
        ruled_out: zero,
    };
    let (a_chunks, a_rest, left) = split::<V>(teacher);
    let (b_chunks, b_rest, _) = split::<V>(student);
    let mut p_chunks = out.teacher.chunks_exact_mut(V::LANES);
    let mut q_chunks = out.student.chunks_exact_mut(V::LANES);
    let mut q1_chunks = out.student_at_1.chunks_exact_mut(V::LANES);
    for (((a, b), p), q) in a_chunks.zip(b_chunks).zip(&mut p_chunks).zip(&mut q_chunks) {
        let exponentials = sums.add::<CAREFUL, AT_1>(&frame, a, b);
        exponentials[0].store(p);
        exponentials[1].store(q);
        if AT_1 && let Some(q1) = q1_chunks.next() {
            exponentials[2].store(q1);
        }
    }
    if left > 0 {
        let exponentials = sums.add::<true, AT_1>(&frame, a_rest, b_rest);
        let rests =
            [p_chunks.into_remainder(), q_chunks.into_remainder(), q1_chunks.into_remainder()];
        for (exponentials, rest) in exponentials.into_iter().zip(rests) {
            let mut padded = [0.0; MAX_LANES];
            exponentials.store(&mut padded);
            rest.copy_from_slice(&padded[..rest.len()]);
        }
    }
    let total = |lanes: V| lanes.fold(|a, b| a + b);
    Sums {
        teacher: total(sums.teacher),
        weighted_gap: total(sums.weighted_gap),
        student: total(sums.student),
        student_at_1: total(sums.student_at_1),
        ruled_out: sums.ruled_out.fold(f32::max) > 0.0,
    }
}

#[inline(always)]
fn combine<V: Vector>(from: &Exponentials, scales: Scales, gradient: &mut [f32]) {
    let exponentials = from.teacher.iter().zip(&*from.student);
    for (out, (p, q)) in gradient.iter_mut().zip(exponentials) {
        *out = scales.student * q - scales.teacher * p;
    }
    for (out, q) in gradient.iter_mut().zip(&*from.student_at_1) {
        *out += scales.student_at_1 * q;
    }
}

#[inline(always)]
fn widen_bf16(from: &[bf16], to: &mut [f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = f32::from_bits(u32::from(from.to_bits()) << 16);
    }
}

/// Rounds to nearest, ties to even.
#[inline(always)]
fn narrow_bf16(from: &[f32], to: &mut [bf16]) {
    for (to, from) in to.iter_mut().zip(from) {
        let bits = from.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
        let quiet = bits | 0x40_0000;
        *to = bf16::from_bits((if from.is_nan() { quiet } else { rounded } >> 16) as u16);
    }
}

/// Compiles the functions above for one instruction set.
macro_rules! compile {
    ($module:ident, $vector:ty, $(#[$features:meta])*) => {
        mod $module {
            use super::*;
            type V = $vector;

            $(#[$features])*
            pub fn min_max(x: &[f32]) -> (f32, f32) {
                super::min_max::<V>(x)
            }

            $(#[$features])*
            pub fn sum_exp(x: &[f32], max: f32, exponent: Exponent, careful: bool) -> f32 {
                match careful {
                    false => super::sum_exp::<V, false>(x, max, exponent),
                    true => super::sum_exp::<V, true>(x, max, exponent),
                }
            }

            $(#[$features])*
            pub fn accumulate(a: &[f32], b: &[f32], frame: &Frame, out: Exponentials) -> Sums {
                match (frame.careful, out.student_at_1.is_empty()) {
                    (false, true) => super::accumulate::<V, false, false>(a, b, frame, out),
                    (false, false) => super::accumulate::<V, false, true>(a, b, frame, out),
                    (true, true) => super::accumulate::<V, true, false>(a, b, frame, out),
                    (true, false) => super::accumulate::<V, true, true>(a, b, frame, out),
                }
            }

            $(#[$features])*
            pub fn combine(from: &Exponentials, scales: Scales, gradient: &mut [f32]) {
                super::combine::<V>(from, scales, gradient)
            }

            $(#[$features])*
            pub fn widen_bf16(from: &[bf16], to: &mut [f32]) {
                super::widen_bf16(from, to)
            }

            $(#[$features])*
            pub fn narrow_bf16(from: &[f32], to: &mut [bf16]) {
                super::narrow_bf16(from, to)
            }
        }
    };
}

compile!(portable, Portable,);
#[cfg(target_arch = "x86_64")]
compile!(avx2, Avx2, #[target_feature(enable = "avx2,fma")]);
#[cfg(target_arch = "x86_64")]
compile!(avx512, Avx512, #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]);

/// An instruction set that this machine has: holding one is the proof.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instructions(Set);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Set {
    /// What every machine of this architecture has: SSE2, or NEON.
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

macro_rules! dispatch {
    ($self:ident, $function:ident($($argument:expr),*)) => {
        match $self.0 {
            Set::Portable => portable::$function($($argument),*),
            // SAFETY: `available` makes these only where the processor has the features.
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => unsafe { avx2::$function($($argument),*) },
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => unsafe { avx512::$function($($argument),*) },
        }
    };
}

impl Instructions {
    /// All that this machine has, the widest last.
    pub fn available() -> Vec<Self> {
        #[allow(unused_mut, reason = "nothing is added on other architectures")]
        let mut sets = vec![Self(Set::Portable)];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                sets.push(Self(Set::Avx2));
                if is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                {
                    sets.push(Self(Set::Avx512));
                }
            }
        }
        sets
    }

    /// The widest that this machine has.
    pub fn widest() -> Self {
        static WIDEST: OnceLock<Instructions> = OnceLock::new();
        *WIDEST.get_or_init(|| *Self::available().last().expect("the portable one is always there"))
    }

    pub fn name(self) -> &'static str {
        match self.0 {
            Set::Portable if cfg!(target_arch = "x86_64") => "SSE2",
            Set::Portable if cfg!(target_arch = "aarch64") => "NEON",
            Set::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => "AVX2",
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => "AVX-512",
        }
    }

    pub fn min_max(self, x: &[f32]) -> (f32, f32) {
        dispatch!(self, min_max(x))
    }

    pub fn sum_exp(self, x: &[f32], max: f32, exponent: Exponent, careful: bool) -> f32 {
        dispatch!(self, sum_exp(x, max, exponent, careful))
    }

    /// Sums over one block of both models, whose exponentials it leaves in `out`.
    pub fn accumulate(
        self,
        teacher: &[f32],
        student: &[f32],
        frame: &Frame,
        out: Exponentials,
    ) -> Sums {
        dispatch!(self, accumulate(teacher, student, frame, out))
    }

    pub fn combine(self, from: &Exponentials, scales: Scales, gradient: &mut [f32]) {
        dispatch!(self, combine(from, scales, gradient))
    }

    pub fn widen_bf16(self, from: &[bf16], to: &mut [f32]) {
        dispatch!(self, widen_bf16(from, to))
    }

    pub fn narrow_bf16(self, from: &[f32], to: &mut [bf16]) {
        dispatch!(self, narrow_bf16(from, to))
    }
}
