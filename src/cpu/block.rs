//! The arithmetic on one block of a row, in float32, compiled once for each instruction set.
//!
//! The loops are written once over a [`Vector`]; [`Instructions`] picks the widest one that the
//! machine has.

use std::ffi::OsStr;
use std::ops::Range;
use std::sync::OnceLock;

use half::{bf16, f16};

#[cfg(target_arch = "x86_64")]
use super::vector::{Avx2, Avx512};
use super::vector::{INTEGERS, MAX_LANES, OCTAVES_BELOW, Portable, Vector};
use crate::{Error, Result};

/// Names the instruction set to use, for machines that must agree to the bit.
const VARIABLE: &str = "ATKD_INSTRUCTIONS";

/// Below it a power of 2 is subnormal, and taken as 0.
const LOWEST_LOG2: f32 = -126.0;

/// How many octaves above 1 an exponential may be, and not be noticed: with those below it a power of 2,
/// so that a bit tells.
const OCTAVES_ABOVE: usize = 3;
const OCTAVES: usize = OCTAVES_BELOW + OCTAVES_ABOVE;
const _: () = assert!(OCTAVES.is_power_of_two());

/// How far below its reference a student's logit may be for float32 to weigh the distance to it. Masks are
/// farther: the sum of their distances may overflow, and a teacher's probability that float32 takes for 0
/// may still count.
pub const FAR: f32 = 1e20;

/// Vectors that are added up before what that rounds off is looked after. Beside an exponential near 1 every
/// addition of a small one may be off by 6e-8: four of them in each model, and 2e-7 for the scales and
/// products, are about the 5e-7 that a gradient may be off by.
const STRETCH: usize = 4;

/// log2(e) / T, what a logit difference is multiplied by to become an exponent of 2. Its rounding and
/// the product's change e^y, y = x / T <= 0, by |y| e^y times 1.2e-7: never more than 5e-8.
#[derive(Clone, Copy, Debug)]
pub struct Exponent(f32);

impl Exponent {
    pub fn new(inverse_temperature: f64) -> Self {
        Self((std::f64::consts::LOG2_E * inverse_temperature) as f32)
    }

    /// 1 / T, as the exponentials have it: what is relative to them must use the same.
    pub fn inverse_temperature(&self) -> f64 {
        f64::from(self.0) * std::f64::consts::LN_2
    }

    /// Whether e^{difference / T} is left out.
    pub fn underflows(&self, difference: f32) -> bool {
        difference * self.0 < LOWEST_LOG2
    }
}

/// What logits and gradients are made of.
pub trait Element: Copy + Default {
    const NEG_INFINITY: Self;
    fn load<V: Vector>(from: &[Self]) -> V;
    /// As [`Vector::store`].
    fn store<V: Vector, const PAST_CACHE: bool>(value: V, to: &mut [Self]);
    fn widen(self) -> f32;
}

impl Element for f32 {
    const NEG_INFINITY: f32 = f32::NEG_INFINITY;
    #[inline(always)]
    fn load<V: Vector>(from: &[f32]) -> V {
        V::load(from)
    }
    #[inline(always)]
    fn store<V: Vector, const PAST_CACHE: bool>(value: V, to: &mut [f32]) {
        value.store::<PAST_CACHE>(to);
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}

impl Element for f16 {
    const NEG_INFINITY: f16 = f16::NEG_INFINITY;
    #[inline(always)]
    fn load<V: Vector>(from: &[f16]) -> V {
        V::load_f16(from)
    }
    #[inline(always)]
    fn store<V: Vector, const PAST_CACHE: bool>(value: V, to: &mut [f16]) {
        value.store_f16::<PAST_CACHE>(to);
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }
}

impl Element for bf16 {
    const NEG_INFINITY: bf16 = bf16::NEG_INFINITY;
    #[inline(always)]
    fn load<V: Vector>(from: &[bf16]) -> V {
        V::load_bf16(from)
    }
    #[inline(always)]
    fn store<V: Vector, const PAST_CACHE: bool>(value: V, to: &mut [bf16]) {
        value.store_bf16::<PAST_CACHE>(to);
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

/// What a block's exponentials of one model are relative to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Reference {
    /// The block's largest logit, or a little less, or anything more.
    pub max: f32,
    /// Some exponential may underflow, or a logit be infinite: mind every element.
    pub careful: bool,
}

/// Smallest and largest logit, NaN passed over; (+inf, -inf) for nothing.
#[derive(Clone, Copy, Debug)]
pub struct Extent {
    pub low: f32,
    pub high: f32,
}

/// The exponentials of one block, written by [`Instructions::accumulate`] and read by
/// [`Instructions::combine`].
pub struct Exponentials<'a> {
    pub teacher: &'a mut [f32],
    pub student: &'a mut [f32],
    /// Of the student at temperature 1. Empty unless they are wanted.
    pub student_at_1: &'a mut [f32],
}

/// Logits that will be read next: their lines are asked for while the arithmetic runs.
#[derive(Clone, Copy)]
pub struct Ahead {
    pub address: *const u8,
    /// Bytes of one logit.
    pub size: usize,
}

impl Ahead {
    /// Asks for the line of logit `index`, if the slice does not end before it.
    #[inline(always)]
    fn fetch<V: Vector>(self, index: usize) {
        V::prefetch(self.address.wrapping_add(index * self.size));
    }
}

/// Sums over one block; [`RowState`](crate::row::RowState) has their meaning.
#[derive(Clone, Copy, Debug)]
pub struct Sums {
    pub teacher: f64,
    /// But for logits that are [`FAR`] below the student's reference.
    pub weighted_gap: f64,
    pub student: f64,
    pub student_at_1: f64,
    pub ruled_out: bool,
    /// A finite logit is [`FAR`] below the student's reference.
    pub far: bool,
    /// Of the teacher, the student: no logit is infinite or NaN, no exponential subnormal or above 2^3.5.
    pub tame: [bool; 2],
}

/// What exponentials are multiplied by to make a gradient.
#[derive(Clone, Copy, Debug)]
pub struct Scales {
    pub teacher: f32,
    pub student: f32,
    pub student_at_1: f32,
}

/// e^{x / T} where that is neither subnormal nor overflows, within 2 parts in 10^7 beside what
/// [`Exponent`] says; NaN for NaN. `seen` gets the bits of the integer i that is the exponent in steps above
/// `OCTAVES_BELOW` octaves below 1.
#[inline(always)]
fn exp<V: Vector>(x: V, exponent: Exponent, seen: &mut V) -> V {
    // Adding this rounds to an integer.
    let round = V::splat(INTEGERS + (OCTAVES_BELOW * V::STEPS) as f32);
    let exponent = V::splat(exponent.0 * V::STEPS as f32);
    let steps = x.mul_add(exponent, round);
    *seen = seen.or_bits_beside(steps);
    let r = x.mul_add(exponent, round.sub(steps));
    let mut p = V::splat(V::COEFFICIENTS[0]);
    for &c in &V::COEFFICIENTS[1..] {
        p = p.mul_add(r, V::splat(c));
    }
    let power = steps.step_power();
    p.mul(r).mul_add(power, power)
}

/// As [`exp`], and 0 where it would underflow.
#[inline(always)]
fn careful_exp<V: Vector>(x: V, exponent: Exponent, seen: &mut V) -> V {
    let log2 = x.mul(V::splat(exponent.0));
    // A NaN is not below anything, and stays.
    log2.select_below(LOWEST_LOG2, V::splat(0.0), exp(x, exponent, seen))
}

/// Whether all integers whose bits `seen` has are steps of the [`OCTAVES`].
#[inline(always)]
fn all_in_octaves<V: Vector>(seen: V) -> bool {
    let mut lanes = [0.0; MAX_LANES];
    seen.store::<false>(&mut lanes);
    lanes[..V::LANES].iter().all(|lane| (lane.to_bits() as usize) < OCTAVES * V::STEPS)
}

/// The same of logits too few for a vector, which always get [`careful_exp`]: small ones do no harm.
#[inline(always)]
fn rest_in_octaves<L: Element>(rest: &[L], max: f32, exponent: Exponent) -> bool {
    rest.iter().all(|x| (x.widen() - max) * exponent.0 < OCTAVES_ABOVE as f32)
}

#[inline(always)]
fn exp_if<V: Vector, const CAREFUL: bool>(x: V, exponent: Exponent, seen: &mut V) -> V {
    if CAREFUL { careful_exp(x, exponent, seen) } else { exp(x, exponent, seen) }
}

/// Index of what is left of `x` after its whole vectors, and that, padded with -inf.
#[inline(always)]
fn tail<L: Element, V: Vector>(x: &[L]) -> (usize, V) {
    let whole = x.len() - x.len() % V::LANES;
    let mut padded = [L::NEG_INFINITY; MAX_LANES];
    padded[..x.len() - whole].copy_from_slice(&x[whole..]);
    (whole, L::load(&padded))
}

// The loops count by hand: iterator adapters are not always inlined into a function with target
// features, and then cost more than the arithmetic.

#[inline(always)]
fn extent<L: Element, V: Vector>(x: &[L]) -> Extent {
    let mut low = V::splat(f32::INFINITY);
    let mut high = V::splat(f32::NEG_INFINITY);
    let whole = x.len() - x.len() % V::LANES;
    let mut i = 0;
    while i < whole {
        let x: V = L::load(&x[i..i + V::LANES]);
        low = x.min_or(low);
        high = x.max_or(high);
        i += V::LANES;
    }
    let mut extent = Extent { low: low.fold(f32::min), high: high.fold(f32::max) };
    for &x in &x[whole..] {
        let x = x.widen();
        extent = Extent { low: extent.low.min(x), high: extent.high.max(x) };
    }
    extent
}

/// A sum by lane, and what its additions have rounded off.
#[derive(Clone, Copy)]
struct Total<V> {
    sum: V,
    lost: V,
}

impl<V: Vector> Total<V> {
    #[inline(always)]
    fn zero() -> Self {
        Self { sum: V::splat(0.0), lost: V::splat(0.0) }
    }

    /// Adds `part`, which becomes 0. (Dekker's sum of two. Where `part` is the larger, which at most doubles a sum of
    /// exponentials, what is lost may be off by half an ulp of it, as one plain addition is.)
    #[inline(always)]
    fn take(&mut self, part: &mut V) {
        let sum = self.sum.add(*part);
        let lost = part.sub(sum.sub(self.sum));
        *self = Self { sum, lost: self.lost.add(lost) };
        *part = V::splat(0.0);
    }

    #[inline(always)]
    fn fold(self) -> f64 {
        let mut lanes = [[0.0; MAX_LANES]; 2];
        self.sum.store::<false>(&mut lanes[0]);
        self.lost.store::<false>(&mut lanes[1]);
        let mut wide = [0.0; MAX_LANES];
        let mut i = 0;
        while i < V::LANES {
            wide[i] = f64::from(lanes[0][i]) + f64::from(lanes[1][i]);
            i += 1;
        }
        // In halves, which are vectors again.
        let mut half = V::LANES / 2;
        while half > 0 {
            let mut i = 0;
            while i < half {
                wide[i] += wide[i + half];
                i += 1;
            }
            half /= 2;
        }
        wide[0]
    }
}

/// sum e^{(x_j - max) / T}, added as in [`accumulate`], to the same bits; and whether the block is tame as in
/// [`Sums`].
#[inline(always)]
fn sum_exp<L: Element, V: Vector, const CAREFUL: bool>(
    x: &[L],
    max: f32,
    exponent: Exponent,
    ahead: Ahead,
) -> (f64, bool) {
    let (whole, rest) = tail::<L, V>(x);
    let reference = V::splat(max);
    let (mut sum, mut total, mut seen) = (V::splat(0.0), Total::zero(), V::splat(0.0));
    let mut i = 0;
    while i < whole {
        let end = whole.min(i + STRETCH * V::LANES);
        while i < end {
            ahead.fetch::<V>(i);
            let x: V = L::load(&x[i..i + V::LANES]);
            sum = sum.add(exp_if::<V, CAREFUL>(x.sub(reference), exponent, &mut seen));
            i += V::LANES;
        }
        total.take(&mut sum);
    }
    let tame = all_in_octaves(seen) && rest_in_octaves(&x[whole..], max, exponent);
    sum = sum.add(careful_exp(rest.sub(reference), exponent, &mut seen));
    total.take(&mut sum);
    (total.fold(), tame)
}

/// [`Sums`] over a stretch by lane, and what they are relative to.
#[derive(Clone, Copy)]
struct LaneSums<V> {
    teacher_max: V,
    student_max: V,
    exponent: Exponent,
    teacher: V,
    weighted_gap: V,
    student: V,
    student_at_1: V,
    /// Of all stretches: 1 where the student rules out a token that the teacher does not.
    ruled_out: V,
    /// 1 where a finite logit is [`FAR`] below the student's reference.
    far: V,
    /// By [`exp`], of the teacher and the student.
    seen: [V; 2],
}

impl<V: Vector> LaneSums<V> {
    /// Adds logits `a` of the teacher and `b` of the student, and returns their exponentials: teacher,
    /// student, and with `AT_1` student at temperature 1.
    #[inline(always)]
    fn add<const CAREFUL: bool, const AT_1: bool>(&mut self, a: V, b: V) -> [V; 3] {
        let zero = V::splat(0.0);
        let da = a.sub(self.teacher_max);
        let db = b.sub(self.student_max);
        let [teacher_seen, student_seen] = &mut self.seen;
        let p = exp_if::<V, CAREFUL>(da, self.exponent, teacher_seen);
        let q = exp_if::<V, CAREFUL>(db, self.exponent, student_seen);
        let mut gap = da.sub(db);
        if CAREFUL {
            // Neither 0 * inf, nor what is added in float64.
            gap = p.select_below(f32::MIN_POSITIVE, zero, gap);
            gap = db.select_below(-FAR, zero, gap);
            let one = V::splat(1.0);
            let far = b.select_below(f32::MIN, zero, db.select_below(-FAR, one, zero));
            self.far = far.max_or(self.far);
            let ruled_out = a.select_below(f32::MIN, zero, one);
            self.ruled_out = b.select_below(f32::MIN, ruled_out, zero).max_or(self.ruled_out);
        }
        self.teacher = self.teacher.add(p);
        self.weighted_gap = p.mul_add(gap, self.weighted_gap);
        self.student = self.student.add(q);
        let mut q_at_1 = zero;
        if AT_1 {
            q_at_1 = exp_if::<V, CAREFUL>(db, Exponent::new(1.0), student_seen);
            self.student_at_1 = self.student_at_1.add(q_at_1);
        }
        [p, q, q_at_1]
    }

    /// Into the totals of teacher, weighted gap, student and student at temperature 1.
    #[inline(always)]
    fn end_stretch<const AT_1: bool>(&mut self, totals: &mut [Total<V>; 4]) {
        totals[0].take(&mut self.teacher);
        totals[1].take(&mut self.weighted_gap);
        totals[2].take(&mut self.student);
        if AT_1 {
            totals[3].take(&mut self.student_at_1);
        }
    }
}

#[inline(always)]
fn accumulate<L: Element, V: Vector, const CAREFUL: bool, const AT_1: bool>(
    teacher: &[L],
    student: &[L],
    maxima: (f32, f32),
    exponent: Exponent,
    out: &mut Exponentials,
    ahead: [Ahead; 2],
) -> Sums {
    let zero = V::splat(0.0);
    let mut sums = LaneSums {
        teacher_max: V::splat(maxima.0),
        student_max: V::splat(maxima.1),
        exponent,
        teacher: zero,
        weighted_gap: zero,
        student: zero,
        student_at_1: zero,
        ruled_out: zero,
        far: zero,
        seen: [zero; 2],
    };
    let mut totals = [Total::<V>::zero(); 4];
    let (whole, a_rest) = tail::<L, V>(teacher);
    let (_, b_rest) = tail::<L, V>(student);
    let mut i = 0;
    while i < whole {
        let end = whole.min(i + STRETCH * V::LANES);
        while i < end {
            ahead[0].fetch::<V>(i);
            ahead[1].fetch::<V>(i);
            let lanes = i..i + V::LANES;
            let a: V = L::load(&teacher[lanes.clone()]);
            let b: V = L::load(&student[lanes.clone()]);
            let [p, q, q_at_1] = sums.add::<CAREFUL, AT_1>(a, b);
            p.store::<false>(&mut out.teacher[lanes.clone()]);
            q.store::<false>(&mut out.student[lanes.clone()]);
            if AT_1 {
                q_at_1.store::<false>(&mut out.student_at_1[lanes]);
            }
            i += V::LANES;
        }
        sums.end_stretch::<AT_1>(&mut totals);
    }
    let mut tame = [all_in_octaves(sums.seen[0]), all_in_octaves(sums.seen[1])];
    if whole < teacher.len() {
        let (a, b) = (&teacher[whole..], &student[whole..]);
        tame[0] &= rest_in_octaves(a, maxima.0, exponent);
        tame[1] &= rest_in_octaves(b, maxima.1, exponent);
        if AT_1 {
            tame[1] &= rest_in_octaves(b, maxima.1, Exponent::new(1.0));
        }
        let [p, q, q_at_1] = sums.add::<true, AT_1>(a_rest, b_rest);
        let mut padded = [0.0; MAX_LANES];
        let left = teacher.len() - whole;
        p.store::<false>(&mut padded);
        out.teacher[whole..].copy_from_slice(&padded[..left]);
        q.store::<false>(&mut padded);
        out.student[whole..].copy_from_slice(&padded[..left]);
        if AT_1 {
            q_at_1.store::<false>(&mut padded);
            out.student_at_1[whole..].copy_from_slice(&padded[..left]);
        }
        sums.end_stretch::<AT_1>(&mut totals);
    }
    Sums {
        teacher: totals[0].fold(),
        weighted_gap: totals[1].fold(),
        student: totals[2].fold(),
        student_at_1: if AT_1 { totals[3].fold() } else { 0.0 },
        ruled_out: sums.ruled_out.fold(f32::max) > 0.0,
        far: sums.far.fold(f32::max) > 0.0,
        tame,
    }
}

/// -teacher's scale * p_j + student's scale * q_j, and what the student at temperature 1 adds, for a
/// vector of j from `at`.
#[inline(always)]
fn gradient<V: Vector>(from: [&[f32]; 3], scales: Scales, at: usize) -> V {
    let [p, q, q_at_1] = from;
    let lanes = at..at + V::LANES;
    let student = V::load(&q[lanes.clone()]).mul(V::splat(scales.student));
    let sum = V::load(&p[lanes.clone()]).mul_add(V::splat(-scales.teacher), student);
    if q_at_1.is_empty() {
        return sum;
    }
    V::load(&q_at_1[lanes]).mul_add(V::splat(scales.student_at_1), sum)
}

/// The same for a range too short for a vector.
#[inline(always)]
fn combine_part<G: Element, V: Vector>(
    from: [&[f32]; 3],
    scales: Scales,
    range: Range<usize>,
    to: &mut [G],
) {
    if range.is_empty() {
        return;
    }
    let mut padded = [[0.0; MAX_LANES]; 3];
    for (padded, from) in padded.iter_mut().zip(from) {
        if !from.is_empty() {
            padded[..range.len()].copy_from_slice(&from[range.clone()]);
        }
    }
    let [p, q, q_at_1] = &padded;
    let q_at_1: &[f32] = if from[2].is_empty() { &[] } else { q_at_1 };
    let sum = gradient::<V>([p, q, q_at_1], scales, 0);
    let mut out = [G::default(); MAX_LANES];
    G::store::<V, false>(sum, &mut out);
    to[range.clone()].copy_from_slice(&out[..range.len()]);
}

#[inline(always)]
fn combine<G: Element, V: Vector, const PAST_CACHE: bool>(
    from: &Exponentials,
    scales: Scales,
    to: &mut [G],
) {
    let from = [&*from.teacher, &*from.student, &*from.student_at_1];
    let mut i = 0;
    if PAST_CACHE {
        let behind = to.as_ptr().addr() % (V::LANES * size_of::<G>()) / size_of::<G>();
        i = if behind == 0 { 0 } else { to.len().min(V::LANES - behind) };
        combine_part::<G, V>(from, scales, 0..i, to);
    }
    while i + V::LANES <= to.len() {
        let sum = gradient::<V>(from, scales, i);
        G::store::<V, PAST_CACHE>(sum, &mut to[i..i + V::LANES]);
        i += V::LANES;
    }
    combine_part::<G, V>(from, scales, i..to.len(), to);
}

/// Compiles the functions above for one instruction set.
macro_rules! compile {
    ($module:ident, $vector:ty, $(#[$features:meta])*) => {
        mod $module {
            use super::*;
            type V = $vector;

            $(#[$features])*
            pub fn extent<L: Element>(x: &[L]) -> Extent {
                super::extent::<L, V>(x)
            }

            $(#[$features])*
            pub fn sum_exp<L: Element>(
                x: &[L],
                to: Reference,
                exponent: Exponent,
                ahead: Ahead,
            ) -> (f64, bool) {
                match to.careful {
                    false => super::sum_exp::<L, V, false>(x, to.max, exponent, ahead),
                    true => super::sum_exp::<L, V, true>(x, to.max, exponent, ahead),
                }
            }

            $(#[$features])*
            pub fn accumulate<L: Element>(
                logits: [&[L]; 2],
                to: [Reference; 2],
                exponent: Exponent,
                out: &mut Exponentials,
                ahead: [Ahead; 2],
            ) -> Sums {
                let [a, b] = logits;
                let maxima = (to[0].max, to[1].max);
                match (to[0].careful || to[1].careful, out.student_at_1.is_empty()) {
                    (false, true) => {
                        super::accumulate::<L, V, false, false>(a, b, maxima, exponent, out, ahead)
                    }
                    (false, false) => {
                        super::accumulate::<L, V, false, true>(a, b, maxima, exponent, out, ahead)
                    }
                    (true, true) => {
                        super::accumulate::<L, V, true, false>(a, b, maxima, exponent, out, ahead)
                    }
                    (true, false) => {
                        super::accumulate::<L, V, true, true>(a, b, maxima, exponent, out, ahead)
                    }
                }
            }

            $(#[$features])*
            pub fn combine<G: Element>(
                from: &Exponentials,
                scales: Scales,
                to: &mut [G],
                past_cache: bool,
            ) {
                match past_cache {
                    false => super::combine::<G, V, false>(from, scales, to),
                    true => super::combine::<G, V, true>(from, scales, to),
                }
            }
        }
    };
}

compile!(portable, Portable,);
#[cfg(target_arch = "x86_64")]
compile!(avx2, Avx2, #[target_feature(enable = "avx2,fma,f16c")]);
#[cfg(target_arch = "x86_64")]
compile!(avx512, Avx512, #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]);

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
            if is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c")
            {
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

    /// The one that the environment variable `ATKD_INSTRUCTIONS` names, else the widest that this machine has.
    ///
    /// # Errors
    /// If the machine has none of that name.
    pub fn chosen() -> Result<Self> {
        static CHOSEN: OnceLock<Result<Instructions>> = OnceLock::new();
        CHOSEN.get_or_init(|| Self::named(std::env::var_os(VARIABLE).as_deref())).clone()
    }

    /// As [`chosen`](Self::chosen), without a name or by an empty one the widest.
    pub fn named(name: Option<&OsStr>) -> Result<Self> {
        let available = Self::available();
        let found = match name.filter(|name| !name.is_empty()) {
            Some(name) => available.iter().find(|set| name == set.key()),
            None => available.last(),
        };
        found.copied().ok_or_else(|| Error::Instructions {
            variable: VARIABLE,
            name: name.unwrap_or_default().to_string_lossy().into(),
            available: available.iter().map(|set| set.key()).collect::<Vec<_>>().join(", "),
        })
    }

    /// How `ATKD_INSTRUCTIONS` names it.
    fn key(self) -> &'static str {
        match self.0 {
            Set::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => "avx512",
        }
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

    /// Numbers in a vector.
    pub fn lanes(self) -> usize {
        match self.0 {
            Set::Portable => Portable::LANES,
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => Avx2::LANES,
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => Avx512::LANES,
        }
    }

    pub fn extent<L: Element>(self, x: &[L]) -> Extent {
        dispatch!(self, extent(x))
    }

    pub fn sum_exp<L: Element>(
        self,
        x: &[L],
        to: Reference,
        exponent: Exponent,
        ahead: Ahead,
    ) -> (f64, bool) {
        dispatch!(self, sum_exp(x, to, exponent, ahead))
    }

    /// Sums over one block of the teacher's and the student's logits, whose exponentials it leaves in
    /// `out`.
    pub fn accumulate<L: Element>(
        self,
        logits: [&[L]; 2],
        to: [Reference; 2],
        exponent: Exponent,
        out: &mut Exponentials,
        ahead: [Ahead; 2],
    ) -> Sums {
        dispatch!(self, accumulate(logits, to, exponent, out, ahead))
    }

    /// The gradient of one block into `to`. `past_cache`, if the machine can; then no other thread may be
    /// told of it before a [`fence`](super::vector::fence).
    pub fn combine<G: Element>(
        self,
        from: &Exponentials,
        scales: Scales,
        to: &mut [G],
        past_cache: bool,
    ) {
        dispatch!(self, combine(from, scales, to, past_cache))
    }
}
