//! Total variation distance: D(p, q) = sum |p - q| / 2.
//!
//! ```text
//! TKD = |sigmoid(w) - sigmoid(u)|      dTKD/dw = sign(w - u) sigmoid'(w)
//! h_j = sign(q_j - p_j) / 2, 0 where they are equal
//! ```
//!
//! The second sweep adds up |p_j - q_j| and q_j h_j. The sums of both models are added up alike, so that the
//! probabilities of equal rows are equal to the bit.

use super::two_sweeps::TwoSweeps;
use super::{
    Found, Margins, Normaliser, STUDENT, SecondSums, SecondSweep, TEACHER, sigmoid,
    sigmoid_difference, sigmoid_slope,
};
use crate::cpu::vector::Vector;

#[derive(Clone, Copy)]
pub(crate) struct TotalVariation;

impl SecondSweep for TotalVariation {
    const DISTANCES: bool = false;

    #[inline(always)]
    fn add<V: Vector>(
        self,
        _: [V; 2],
        exponentials: [V; 2],
        normaliser: &Normaliser,
        [differences, slopes, _]: &mut SecondSums<V>,
    ) -> V {
        let zero = V::splat(0.0);
        let [of_p, of_q] = normaliser.factors.map(|factor| factor as f32);
        let p = exponentials[TEACHER].mul(V::splat(of_p));
        let q = exponentials[STUDENT].mul(V::splat(of_q));
        let (above, below) = (q.sub(p), p.sub(q));
        *differences = differences.add(above.max_or(below));
        let half = exponentials[STUDENT].mul(V::splat(0.5));
        let kept = above.select_below(0.0, zero.sub(half), below.select_below(0.0, half, zero));
        *slopes = slopes.add(kept);
        kept
    }

    fn normalised([differences, slopes, rest]: SecondSums<f64>, [_, of_q]: [f64; 2]) -> [f64; 3] {
        [differences, slopes * of_q, rest]
    }

    /// Without the half of h.
    fn exchanged(self, [differences, slopes, _]: SecondSums<f64>) -> SecondSums<f64> {
        [differences, 2.0 * slopes, 0.0]
    }

    fn of_exchanged(self, [differences, signs, _]: SecondSums<f64>) -> SecondSums<f64> {
        [differences, signs / 2.0, 0.0]
    }
}

impl TwoSweeps for TotalVariation {
    fn unit(self) -> f64 {
        1.0
    }

    fn found(self, [differences, slopes, _]: SecondSums<f64>, target: Option<Margins>) -> Found {
        let (mut divergence, mut mean) = (differences / 2.0, slopes);
        if let Some(margins) = target {
            divergence += sigmoid_difference(margins.w, margins.u).abs() / 2.0;
            mean += sigmoid(-margins.w) * self.target_slope(margins);
        }
        Found { divergence, mean }
    }

    fn bernoulli(self, Margins { u, w }: Margins) -> [f64; 2] {
        [sigmoid_difference(w, u).abs(), sign(w - u) * sigmoid_slope(w)]
    }

    fn target_slope(self, Margins { u, w }: Margins) -> f64 {
        sign(u - w) / 2.0
    }
}

/// -1, 0 or 1; 0 for the NaN of two equal infinities.
fn sign(difference: f64) -> f64 {
    f64::from(i8::from(difference > 0.0) - i8::from(difference < 0.0))
}
