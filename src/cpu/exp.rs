//! e^{x / T} by vectors, and how a loop learns that its exponents have left the range where that is exact.
//!
//! x log2(e) / T is rounded to a multiple of 1 / STEPS octaves. That integer becomes the power of 2 by a shift and a small
//! table ([`Vector::step_power`]), and the rest, at most half a step, goes through a polynomial.
//!
//! The plain [`exp`] handles neither subnormal results nor infinities. It costs nothing to notice them: every call ORs
//! its integer's bits into `range_bits`, and since the range is a power of 2 of octaves, one comparison per tile tells
//! whether any exponent was outside ([`in_range`]). The tile is then done again, against a larger shift or by
//! [`guarded_exp`].

use super::element::Element;
use super::vector::{INTEGERS, MAX_LANES, OCTAVES_BELOW, Vector};

/// Powers of 2 below this one are subnormal, and taken as 0.
const LOWEST_LOG2: f32 = -126.0;

/// Octaves above 1 that an exponential in range may reach.
const OCTAVES_ABOVE: usize = 3;
const OCTAVES: usize = OCTAVES_BELOW + OCTAVES_ABOVE;
const _: () = assert!(OCTAVES.is_power_of_two());

/// log2(e) / T, which turns a difference of logits into an exponent of 2. Its rounding and the product's change
/// e^y, y = x / T <= 0, by |y| e^y times 1.2e-7, which is never more than 5e-8.
#[derive(Clone, Copy, Debug)]
pub struct Exponent {
    octaves: f32,
    exact: f64,
}

impl Exponent {
    /// For numbers that are exponents of 2 themselves.
    pub const BINARY: Self = Self { octaves: 1.0, exact: std::f64::consts::LN_2 };

    pub fn new(inverse_temperature: f64) -> Self {
        let octaves = (std::f64::consts::LOG2_E * inverse_temperature) as f32;
        Self { octaves, exact: inverse_temperature }
    }

    /// 1 / T, as the exponentials have it: everything that is combined with them must use the same.
    pub fn inverse_temperature(&self) -> f64 {
        f64::from(self.octaves) * std::f64::consts::LN_2
    }

    /// 1 / T as it was given, for exponentials so small that the rounding of the other would show.
    pub fn exact_inverse_temperature(&self) -> f64 {
        self.exact
    }

    /// [`log2`](Self::log2) of one number.
    pub fn octaves(self, x: f32) -> f32 {
        x * self.octaves
    }

    /// x log2(e) / T
    #[inline(always)]
    pub fn log2<V: Vector>(self, x: V) -> V {
        x.mul(V::splat(self.octaves))
    }

    /// x log2(e) / T + log2
    #[inline(always)]
    pub fn log2_plus<V: Vector>(self, x: V, log2: V) -> V {
        x.mul_add(V::splat(self.octaves), log2)
    }

    /// True if e^{difference / T} is subnormal, and so left out.
    pub fn underflows(&self, difference: f32) -> bool {
        difference * self.octaves < LOWEST_LOG2
    }
}

/// e^{x / T} where that is neither subnormal nor overflows, within 2 parts in 10^7 beside [`Exponent`]'s error; NaN for
/// NaN. The bits of the exponent, an integer in steps above `OCTAVES_BELOW` octaves below 1, are ORed into `range_bits`.
#[inline(always)]
pub fn exp<V: Vector>(x: V, exponent: Exponent, range_bits: &mut V) -> V {
    let (steps, r) = steps_and_rest(x, exponent);
    *range_bits = range_bits.or_integer_bits(steps);
    let power = steps.step_power();
    polynomial(r, V::COEFFICIENTS).mul(r).mul_add(power, power)
}

/// [`exp`], and that less 1, to whose own size its error is relative where it is small.
#[inline(always)]
pub fn exp_and_exp_m1<V: Vector>(x: V, exponent: Exponent) -> (V, V) {
    let (steps, r) = steps_and_rest(x, exponent);
    let power = steps.step_power();
    let rest = polynomial(r, V::COEFFICIENTS_M1).mul(r);
    (rest.mul_add(power, power), rest.mul_add(power, power.sub(V::splat(1.0))))
}

/// INTEGERS and the integer of a power of 2 near e^{x / T}, and the rest of the exponent, both in steps.
#[inline(always)]
fn steps_and_rest<V: Vector>(x: V, exponent: Exponent) -> (V, V) {
    // Adding this rounds to an integer.
    let round = V::splat(INTEGERS + (OCTAVES_BELOW * V::STEPS) as f32);
    let exponent = V::splat(exponent.octaves * V::STEPS as f32);
    let steps = x.mul_add(exponent, round);
    (steps, x.mul_add(exponent, round.sub(steps)))
}

/// The polynomial of these coefficients, the highest power's first.
#[inline(always)]
pub fn polynomial<V: Vector>(x: V, coefficients: &[f32]) -> V {
    let mut p = V::splat(coefficients[0]);
    for &c in &coefficients[1..] {
        p = p.mul_add(x, V::splat(c));
    }
    p
}

/// [`exp`], but 0 where that would underflow.
#[inline(always)]
pub fn guarded_exp<V: Vector>(x: V, exponent: Exponent, range_bits: &mut V) -> V {
    let log2 = exponent.log2(x);
    // A NaN is not below anything, and stays.
    log2.select_below(LOWEST_LOG2, V::splat(0.0), exp(x, exponent, range_bits))
}

#[inline(always)]
pub fn exp_by<V: Vector, const GUARDED: bool>(x: V, exponent: Exponent, range_bits: &mut V) -> V {
    if GUARDED { guarded_exp(x, exponent, range_bits) } else { exp(x, exponent, range_bits) }
}

/// True if no integer whose bits are in `range_bits` lay outside the [`OCTAVES`].
#[inline(always)]
pub fn in_range<V: Vector>(range_bits: V) -> bool {
    let mut lanes = [0.0; MAX_LANES];
    range_bits.store::<false>(&mut lanes);
    lanes[..V::LANES].iter().all(|lane| (lane.to_bits() as usize) < OCTAVES * V::STEPS)
}

/// [`in_range`] for logits too few for a vector. They always get [`guarded_exp`], so that only large ones matter.
#[inline(always)]
pub fn tail_in_range<L: Element>(tail: &[L], shift: f32, exponent: Exponent) -> bool {
    tail.iter().all(|x| (x.widen() - shift) * exponent.octaves < OCTAVES_ABOVE as f32)
}
