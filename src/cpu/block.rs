//! The arithmetic on one block of a row, in float32 lanes, compiled once for each instruction set.
//!
//! Every function here is plain Rust over arrays of [`LANES`] numbers, which the compiler turns into
//! vector instructions of whatever width the enclosing `#[target_feature]` allows. [`Block`] picks the
//! widest set the machine has, once.

use std::sync::OnceLock;

use half::bf16;

/// Numbers that go through the loops together: one AVX-512 register, two of AVX, four of SSE or NEON.
const LANES: usize = 16;

type Lanes = [f32; LANES];

/// Below it e^x is left out (taken as 0): the next lower integer exponent of 2 is subnormal.
const LOWEST_LOG2: f32 = -126.0;

/// log2(e) / T, what a logit difference is multiplied by to become an exponent of 2.
#[derive(Clone, Copy, Debug)]
pub struct Exponent {
    exact: f64,
    /// Two parts whose sum is exact enough that the product with any logit difference is.
    high: f32,
    low: f32,
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

#[inline(always)]
fn multiply_add<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// e^{x / T} where that is neither subnormal nor overflows, within 1.5 units in the last place; NaN
/// for NaN.
#[inline(always)]
fn exp<const FMA: bool>(x: f32, exponent: Exponent) -> f32 {
    // Adding 1.5 * 2^23 rounds to an integer and leaves it, plus the exponent's bias, in the low bits.
    const ROUND: f32 = 12_582_912.0 + 127.0;
    let shifted = multiply_add::<FMA>(x, exponent.high, ROUND);
    let integer = shifted - ROUND;
    let r = if FMA {
        let r = x.mul_add(exponent.high, -integer);
        x.mul_add(exponent.low, r)
    } else {
        (f64::from(x) * exponent.exact - f64::from(integer)) as f32
    };
    // 2^r on [-1/2, 1/2], relative error 2e-9 before rounding.
    let mut p = 1.534_581_2e-4;
    for c in [1.339_993_1e-3, 9.618_489e-3, 5.550_329e-2, 2.402_264_7e-1, 6.931_472e-1, 1.0] {
        p = multiply_add::<FMA>(p, r, c);
    }
    p * f32::from_bits(shifted.to_bits() << 23)
}

/// As [`exp`], and 0 where it would underflow.
#[inline(always)]
fn careful_exp<const FMA: bool>(x: f32, exponent: Exponent) -> f32 {
    let e = exp::<FMA>(x, exponent);
    // A NaN does not underflow, and stays.
    if exponent.underflows(x) { 0.0 } else { e }
}

#[inline(always)]
fn exp_if<const FMA: bool, const CAREFUL: bool>(x: f32, exponent: Exponent) -> f32 {
    if CAREFUL { careful_exp::<FMA>(x, exponent) } else { exp::<FMA>(x, exponent) }
}

/// Smallest and largest, NaN passed over; (+inf, -inf) for nothing.
#[inline(always)]
fn min_max(x: &[f32]) -> (f32, f32) {
    let (mut low, mut high) = ([f32::INFINITY; LANES], [f32::NEG_INFINITY; LANES]);
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            low[i] = if chunk[i] < low[i] { chunk[i] } else { low[i] };
            high[i] = if chunk[i] > high[i] { chunk[i] } else { high[i] };
        }
    }
    let low = low.iter().chain(rest).fold(f32::INFINITY, |m, &x| if x < m { x } else { m });
    let high = high.iter().chain(rest).fold(f32::NEG_INFINITY, |m, &x| if x > m { x } else { m });
    (low, high)
}

/// sum e^{(x_j - max) / T}
#[inline(always)]
fn sum_exp<const FMA: bool, const CAREFUL: bool>(x: &[f32], max: f32, exponent: Exponent) -> f32 {
    let mut sum = [0.0; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            sum[i] += exp_if::<FMA, CAREFUL>(chunk[i] - max, exponent);
        }
    }
    let rest = rest.iter().map(|x| careful_exp::<FMA>(x - max, exponent));
    sum.into_iter().chain(rest).sum()
}

/// One running sum a lane.
#[derive(Default)]
struct LaneSums {
    teacher: Lanes,
    weighted_gap: Lanes,
    student: Lanes,
    student_at_1: Lanes,
    ruled_out: [bool; LANES],
}

impl LaneSums {
    /// Adds one chunk and leaves its exponentials in `p`, `q` and, with `AT_1`, `q_at_1`.
    #[inline(always)]
    fn step<const FMA: bool, const CAREFUL: bool, const AT_1: bool>(
        &mut self,
        frame: &Frame,
        (a, b): (&Lanes, &Lanes),
        (p, q, q_at_1): (&mut Lanes, &mut Lanes, &mut Lanes),
    ) {
        for i in 0..LANES {
            let (da, db) = (a[i] - frame.teacher_max, b[i] - frame.student_max);
            p[i] = exp_if::<FMA, CAREFUL>(da, frame.exponent);
            q[i] = exp_if::<FMA, CAREFUL>(db, frame.exponent);
            let mut gap = da - db;
            if CAREFUL {
                let masked = b[i] == f32::NEG_INFINITY;
                self.ruled_out[i] |= masked & (a[i] > f32::NEG_INFINITY);
                // Neither 0 * inf, nor a vanishing weight times the distance to a mask of -3e38.
                gap = if masked | (p[i] == 0.0) { 0.0 } else { gap };
            }
            self.teacher[i] += p[i];
            self.weighted_gap[i] = multiply_add::<FMA>(p[i], gap, self.weighted_gap[i]);
            self.student[i] += q[i];
            if AT_1 {
                q_at_1[i] = exp_if::<FMA, CAREFUL>(db, Exponent::new(1.0));
                self.student_at_1[i] += q_at_1[i];
            }
        }
    }
}

#[inline(always)]
fn accumulate<const FMA: bool, const CAREFUL: bool, const AT_1: bool>(
    teacher: &[f32],
    student: &[f32],
    frame: &Frame,
    out: Exponentials,
) -> Sums {
    let mut sums = LaneSums::default();
    let mut unused = [0.0; LANES];
    let (a_chunks, a_rest) = teacher.as_chunks::<LANES>();
    let (b_chunks, b_rest) = student.as_chunks::<LANES>();
    let (p_chunks, p_rest) = out.teacher.as_chunks_mut::<LANES>();
    let (q_chunks, q_rest) = out.student.as_chunks_mut::<LANES>();
    let (q1_chunks, q1_rest) = out.student_at_1.as_chunks_mut::<LANES>();
    let chunks = a_chunks.iter().zip(b_chunks).zip(p_chunks.iter_mut().zip(q_chunks)).enumerate();
    for (k, ((a, b), (p, q))) in chunks {
        let q1 = if AT_1 { &mut q1_chunks[k] } else { &mut unused };
        sums.step::<FMA, CAREFUL, AT_1>(frame, (a, b), (p, q, q1));
    }
    let n = a_rest.len();
    if n > 0 {
        let (mut a, mut b) = ([f32::NEG_INFINITY; LANES], [f32::NEG_INFINITY; LANES]);
        a[..n].copy_from_slice(a_rest);
        b[..n].copy_from_slice(b_rest);
        let (mut p, mut q, mut q1) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
        sums.step::<FMA, true, AT_1>(frame, (&a, &b), (&mut p, &mut q, &mut q1));
        p_rest.copy_from_slice(&p[..n]);
        q_rest.copy_from_slice(&q[..n]);
        if AT_1 {
            q1_rest.copy_from_slice(&q1[..n]);
        }
    }
    Sums {
        teacher: sums.teacher.iter().sum(),
        weighted_gap: sums.weighted_gap.iter().sum(),
        student: sums.student.iter().sum(),
        student_at_1: sums.student_at_1.iter().sum(),
        ruled_out: sums.ruled_out.contains(&true),
    }
}

#[inline(always)]
fn combine<const FMA: bool>(from: &Exponentials, scales: Scales, gradient: &mut [f32]) {
    let exponentials = from.teacher.iter().zip(&*from.student);
    for (out, (p, q)) in gradient.iter_mut().zip(exponentials) {
        *out = multiply_add::<FMA>(scales.student, *q, -(scales.teacher * p));
    }
    for (out, q) in gradient.iter_mut().zip(&*from.student_at_1) {
        *out = multiply_add::<FMA>(scales.student_at_1, *q, *out);
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
    ($module:ident, $fma:expr, $(#[$features:meta])*) => {
        mod $module {
            use super::*;
            const FMA: bool = $fma;

            $(#[$features])*
            pub fn min_max(x: &[f32]) -> (f32, f32) {
                super::min_max(x)
            }

            $(#[$features])*
            pub fn sum_exp(x: &[f32], max: f32, exponent: Exponent, careful: bool) -> f32 {
                match careful {
                    false => super::sum_exp::<FMA, false>(x, max, exponent),
                    true => super::sum_exp::<FMA, true>(x, max, exponent),
                }
            }

            $(#[$features])*
            pub fn accumulate(a: &[f32], b: &[f32], frame: &Frame, out: Exponentials) -> Sums {
                match (frame.careful, out.student_at_1.is_empty()) {
                    (false, true) => super::accumulate::<FMA, false, false>(a, b, frame, out),
                    (false, false) => super::accumulate::<FMA, false, true>(a, b, frame, out),
                    (true, true) => super::accumulate::<FMA, true, false>(a, b, frame, out),
                    (true, false) => super::accumulate::<FMA, true, true>(a, b, frame, out),
                }
            }

            $(#[$features])*
            pub fn combine(from: &Exponentials, scales: Scales, gradient: &mut [f32]) {
                super::combine::<FMA>(from, scales, gradient)
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

compile!(portable, cfg!(any(target_arch = "aarch64", target_feature = "fma")),);
#[cfg(target_arch = "x86_64")]
compile!(avx2, true, #[target_feature(enable = "avx2,fma")]);
#[cfg(target_arch = "x86_64")]
compile!(avx512, true, #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]);

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
