//! The entropy of a distribution, in double precision.

use super::element::Element;
use crate::Elements;

/// NaN for a row with a NaN or +inf, and for one of -inf alone.
pub fn entropy(row: Elements, temperature: f64) -> f64 {
    match row {
        Elements::F32(row) => of(row, temperature),
        Elements::F16(row) => of(row, temperature),
        Elements::Bf16(row) => of(row, temperature),
    }
}

/// With exponents x_j <= 0 relative to the row's largest logit, R the sum of e^{x_j} over the others, and W that of
/// e^{x_j} x_j: log(1 + R) - W / (1 + R). Neither term is below 0, so that nothing cancels however sure the model is.
fn of<L: Element>(row: &[L], temperature: f64) -> f64 {
    let max = row.iter().fold(f32::NEG_INFINITY, |max, z| max.max(z.widen()));
    if !max.is_finite() {
        return f64::NAN;
    }
    let first = row.iter().position(|z| z.widen() == max).expect("the largest is one of them");
    let (mut rest, mut weighted) = (0.0, 0.0);
    for z in row[..first].iter().chain(&row[first + 1..]) {
        let x = (f64::from(z.widen()) - f64::from(max)) / temperature;
        let power = x.exp();
        rest += power;
        // The product is 0 where the power is: of -inf it would be NaN.
        weighted += power * x.max(-800.0);
    }
    rest.ln_1p() - weighted / (1.0 + rest)
}
