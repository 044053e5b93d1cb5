//! Every divergence against its definition in float64, for every instruction set.

use half::{bf16, f16};

use super::*;
use crate::objective::{Coefficient, Family};
use crate::{Divergence, Target};

const NONE: f64 = f64::NEG_INFINITY;

/// One token's exact terms, and its gradient before the reduction.
struct Exact {
    loss: f64,
    tkd: f64,
    dkd: f64,
    gradient: Vec<f64>,
    /// How far ties of total variation let an element of the gradient be off.
    slack: Vec<f64>,
}

/// D of two distributions given by logarithms; q_j h_j; and the elements where h may be anything in [-1/2, 1/2].
fn defined(family: Family, log_p: &[f64], log_q: &[f64]) -> (f64, Vec<f64>, Vec<bool>) {
    let mut total = 0.0;
    let mut slopes = Vec::new();
    let mut ties = Vec::new();
    let most = (0..log_q.len()).max_by(|&i, &j| log_q[i].total_cmp(&log_q[j]));
    let most = most.map_or([0.0; 2], |i| [log_p[i], log_q[i]]);
    let log_over = |x: f64, y: f64| if x == NONE { 0.0 } else { x.exp() * (x - y) };
    for (&lp, &lq) in log_p.iter().zip(log_q) {
        let (p, q) = (lp.exp(), lq.exp());
        ties.push((p - q).abs() <= 2e-6 * p.max(q));
        let (term, slope) = match family {
            Family::ForwardKl => (log_over(lp, lq), -p),
            // Less the h of the most probable element: no constant in h matters, but to the digits of the difference.
            Family::ReverseKl => {
                let h = (lq - most[1]) - (lp - most[0]);
                (log_over(lq, lp), if lq == NONE { 0.0 } else { q * h })
            }
            Family::Mixture(m) => {
                let (x, y) = (m.share.ln() + lp, (1.0 - m.share).ln() + lq);
                let log_m =
                    if x == y { x + 2_f64.ln() } else { x.max(y) + (-(x - y).abs()).exp().ln_1p() };
                if lp == NONE && lq == NONE {
                    (0.0, 0.0)
                } else {
                    let ratio = (lp - log_m).exp();
                    let of_ratio = m.of_student * m.share - m.of_teacher * (1.0 - m.share);
                    (
                        m.of_teacher * log_over(lp, log_m) + m.of_student * log_over(lq, log_m),
                        m.of_student * log_over(lq, log_m) + of_ratio * q * ratio,
                    )
                }
            }
            Family::TotalVariation => {
                let sign = if p == q { 0.0 } else { (q - p).signum() };
                ((p - q).abs() / 2.0, q * sign / 2.0)
            }
        };
        total += term;
        slopes.push(slope);
    }
    if family != Family::TotalVariation {
        ties.fill(false);
    }
    (total, slopes, ties)
}

/// The margin, and the logarithms of the probabilities off the target, renormalised.
fn split(z: &[f64], temperature: f64, target: usize) -> (f64, Vec<f64>) {
    let rest: Vec<f64> = (0..z.len()).filter(|&j| j != target).map(|j| z[j]).collect();
    let max = rest.iter().copied().fold(NONE, f64::max);
    if max == NONE {
        return (NONE, rest);
    }
    let over = |z: f64| (z - max) / temperature;
    let log_sum = rest.iter().map(|&z| over(z).exp()).sum::<f64>().ln();
    (log_sum - over(z[target]), rest.iter().map(|&z| over(z) - log_sum).collect())
}

fn log_sigmoid(x: f64) -> f64 {
    x.min(0.0) - (-x.abs()).exp().ln_1p()
}

fn exact(objective: &Objective, a: &[f64], b: &[f64], target: usize, hard: bool) -> Exact {
    let family = objective.divergence().family();
    let temperature = objective.temperature();
    let (u, log_p) = split(a, temperature, target);
    let (w, log_q) = split(b, temperature, target);
    let (w_at_1, log_q_at_1) = split(b, 1.0, target);
    let classes = |u: f64| [log_sigmoid(u), log_sigmoid(-u)];
    let full = |u: f64, rest: &[f64]| {
        let mut full: Vec<f64> = rest.iter().map(|x| x + log_sigmoid(u)).collect();
        full.push(log_sigmoid(-u));
        full
    };
    // The gradient with respect to b, and its slack.
    let chain = |log_q: &[f64], slopes: &[f64], ties: &[bool], c: f64| -> (Vec<f64>, Vec<f64>) {
        let mean: f64 = slopes.iter().sum();
        let tied: f64 =
            log_q.iter().zip(ties).map(|(q, &tie)| if tie { q.exp() } else { 0.0 }).sum();
        let element = |j: usize| c * (slopes[j] - log_q[j].exp() * mean);
        let slack = |j: usize| c.abs() * log_q[j].exp() * (tied + f64::from(u8::from(ties[j])));
        let all = 0..log_q.len();
        (all.clone().map(element).collect(), all.map(slack).collect())
    };
    let times = |c: f64, x: f64| if c == 0.0 { 0.0 } else { c * x };

    let (tkd, slopes, ties) = defined(family, &classes(u), &classes(w));
    let (of_classes, slack_of_classes) = chain(&classes(w), &slopes, &ties, 1.0);
    let (slope, slope_slack) = (of_classes[0], slack_of_classes[0]);
    let no_p = log_p.iter().all(|&x| x == NONE);
    let no_q = log_q.iter().all(|&x| x == NONE);
    let (dkd, slopes, ties) = match family {
        Family::ForwardKl if no_p => (0.0, vec![0.0; log_p.len()], vec![false; log_p.len()]),
        Family::ReverseKl if no_q => (0.0, vec![0.0; log_p.len()], vec![false; log_p.len()]),
        Family::Mixture(_) | Family::TotalVariation if no_p || no_q => {
            (0.0, vec![0.0; log_p.len()], vec![false; log_p.len()])
        }
        _ => defined(family, &log_p, &log_q),
    };
    let scale = objective.distillation_scale();
    let (mut columns, loss, mut gradient, mut slack);
    if objective.is_plain() {
        let (log_p, log_q) = (full(u, &log_p), full(w, &log_q));
        let (value, slopes, ties) = defined(family, &log_p, &log_q);
        loss = scale * value;
        (gradient, slack) = chain(&log_q, &slopes, &ties, scale);
        columns = [tkd, dkd];
        if matches!(family, Family::Mixture(_) | Family::TotalVariation) {
            columns = [f64::NAN; 2];
        }
    } else {
        let coefficients = if hard { objective.hard() } else { objective.easy() };
        let number = |c| match c {
            Coefficient::Constant(c) => c * scale,
            Coefficient::Uncertainty => log_sigmoid(u).exp() * scale,
        };
        let (c_tkd, c_dkd) = (number(coefficients.tkd), number(coefficients.dkd));
        loss = times(c_tkd, tkd) + times(c_dkd, dkd);
        columns = [tkd, dkd];
        (gradient, slack) = chain(&log_q, &slopes, &ties, c_dkd);
        for j in 0..gradient.len() {
            gradient[j] = times(c_dkd, gradient[j]) / if c_dkd == 0.0 { 1.0 } else { c_dkd };
            gradient[j] += log_q[j].exp() * times(c_tkd, slope);
            slack[j] += log_q[j].exp() * c_tkd.abs() * slope_slack;
        }
        gradient.push(-times(c_tkd, slope));
        slack.push(c_tkd.abs() * slope_slack);
    }
    if family == Family::ReverseKl && !loss.is_finite() {
        gradient.fill(f64::NAN);
    }
    let c_ce = objective.ce_weight();
    for (j, g) in gradient.iter_mut().enumerate() {
        let of_ce = match log_q_at_1.get(j) {
            Some(log) => (log_sigmoid(w_at_1) + log).exp(),
            None => -log_sigmoid(w_at_1).exp(),
        };
        *g = *g / temperature + times(c_ce, of_ce);
        slack[j] /= temperature;
    }
    // The target was last.
    let to = |x: &mut Vec<f64>| {
        let last = x.pop().expect("a target");
        x.insert(target, last);
    };
    to(&mut gradient);
    to(&mut slack);
    let loss = loss + times(c_ce, -log_sigmoid(-w_at_1));
    Exact { loss, tkd: columns[0], dkd: columns[1], gradient, slack }
}

#[test]
fn the_definitions_have_these_derivatives() {
    for objective in objectives() {
        let mut random = fastrand::Rng::with_seed(9);
        for _ in 0..20 {
            let vocab = random.usize(2..9);
            let mut logits = || (0..vocab).map(|_| 6.0 * random.f64() - 3.0).collect::<Vec<_>>();
            let (a, mut b) = (logits(), logits());
            for hard in [false, true] {
                let found = exact(&objective, &a, &b, 1, hard).gradient;
                for j in 0..vocab {
                    let at = b[j];
                    let mut loss = |z: f64| {
                        b[j] = z;
                        exact(&objective, &a, &b, 1, hard).loss
                    };
                    let step = 1e-5;
                    let numeric = (loss(at + step) - loss(at - step)) / (2.0 * step);
                    b[j] = at;
                    let error = (numeric - found[j]).abs();
                    assert!(
                        error < 1e-7 * (1.0 + numeric.abs()),
                        "{objective:?}: {numeric} {}",
                        found[j]
                    );
                }
            }
        }
    }
}

fn divergences() -> Vec<Divergence> {
    vec![
        Divergence::ForwardKl,
        Divergence::ReverseKl,
        Divergence::Jsd { beta: 0.5 },
        Divergence::Jsd { beta: 0.1 },
        Divergence::Jsd { beta: 0.9 },
        Divergence::TotalVariation,
        Divergence::SkewKl { alpha: 0.1 },
        Divergence::SkewReverseKl { alpha: 0.1 },
        Divergence::SkewKl { alpha: 0.7 },
    ]
}

fn objectives() -> Vec<Objective> {
    let mut objectives = Vec::new();
    let uneven = Objective::decoupled(
        Coefficients::new(0.3, 0.9),
        Coefficients::new(Coefficient::Uncertainty, 0.4),
    );
    for divergence in divergences() {
        for base in [Objective::default(), uneven.clone().unwrap(), Objective::plain()] {
            let base = base.with_divergence(divergence).unwrap();
            objectives.push(base);
            objectives.push(
                base.with_temperature(2.0)
                    .unwrap()
                    .with_temperature_squared(true)
                    .with_ce_weight(0.5)
                    .unwrap(),
            );
        }
        for base in [Objective::dkd(), Objective::tkd()] {
            objectives.push(base.with_divergence(divergence).unwrap());
        }
    }
    objectives
}

/// Runs a call and compares it. Returns the largest errors over what is allowed: of terms, of the gradient.
fn compared<L: Copy + Into<f64>>(
    name: &str,
    instructions: Instructions,
    objective: &Objective,
    batch: &Batch,
    student: Logits,
    [a, b]: [&[L]; 2],
    labels: &[i64],
) -> [f64; 2] {
    let (tokens, vocab) = (student.tokens(), student.vocab());
    let mut gradient = vec![0_f32; tokens * vocab];
    let to = LogitsMut::new(&mut gradient, tokens, vocab).unwrap();
    let workers = Workers { instructions: Some(instructions), ..Workers::default() };
    let output = forward_backward_by(workers, objective, batch, student, to).unwrap();
    let alone = forward_by(workers, objective, batch, student).unwrap();
    let bits = |output: &Output| {
        output.tokens.iter().map(|t| [t.tkd, t.dkd, t.loss].map(f64::to_bits)).collect::<Vec<_>>()
    };
    assert_eq!(bits(&alone), bits(&output), "{name}: the loss alone");
    let valid = labels.iter().filter(|label| **label >= 0).count();
    let scale = objective.reduction_scales(valid, 0).ce;
    let mut worst = [0.0_f64; 2];
    for (token, terms) in output.tokens.iter().enumerate() {
        let row = token * vocab..(token + 1) * vocab;
        let found = &gradient[row.clone()];
        if labels[token] < 0 {
            assert!(found.iter().all(|&g| g == 0.0));
            continue;
        }
        let wide = |x: &[L]| x[row.clone()].iter().map(|&x| x.into()).collect::<Vec<f64>>();
        let target = match objective.target() {
            Target::Label => labels[token] as usize,
            Target::Teacher => unreachable!("not in these tests"),
        };
        let exact = exact(objective, &wide(a), &wide(b), target, terms.hard);
        let mut check = |what: &str, kind: usize, x: f64, exact: f64, allowed: f64| {
            if x == exact || x.is_nan() && exact.is_nan() {
                return;
            }
            let ratio = (x - exact).abs() / allowed;
            assert!(
                ratio <= 1.0,
                "{name} {objective:?} {} token {token} {what}: {x:e}, exactly {exact:e}: {ratio}",
                instructions.name()
            );
            worst[kind] = worst[kind].max(ratio);
        };
        let bound = |x: f64| 2e-6 * (1.0 + x.abs());
        check("tkd", 0, terms.tkd, exact.tkd, bound(exact.tkd));
        check("dkd", 0, terms.dkd, exact.dkd, bound(exact.dkd));
        let weight = objective.distillation_scale() + objective.ce_weight();
        // A token's own bound: one logit far below the others may make all of its loss.
        check("loss", 0, terms.loss, exact.loss, 2e-6 * exact.loss.abs() + 4e-7 * weight);
        let largest = exact.gradient.iter().fold(0.0_f64, |x, g| x.max(g.abs())).min(1e300);
        for (j, &g) in found.iter().enumerate() {
            let what = format!("gradient {j} (target {target})");
            let exactly = exact.gradient[j] * scale;
            let allowed =
                scale * (1e-6 * largest + 5e-7 * weight / objective.temperature() + exact.slack[j]);
            if exactly.abs() > f64::from(f32::MAX) * (1.0 - 1e-6) && g.is_infinite() {
                assert_eq!(f64::from(g) > 0.0, exactly > 0.0);
                continue;
            }
            check(&what, 1, g.into(), exactly, allowed);
        }
    }
    worst
}

fn check_f32(
    name: &str,
    vocab: usize,
    a: &[f32],
    b: &[f32],
    labels: &[i64],
    objectives: &[Objective],
) {
    let tokens = labels.len();
    let view = |x| Logits::new(x, tokens, vocab).unwrap();
    let batch = Batch::new(view(a), labels).unwrap();
    let mut worst = [0.0_f64; 2];
    for instructions in Instructions::available() {
        for objective in objectives {
            let found = compared(name, instructions, objective, &batch, view(b), [a, b], labels);
            worst = [0, 1].map(|i| worst[i].max(found[i]));
        }
    }
    println!("{name}: {worst:?}");
}

fn normal(random: &mut fastrand::Rng) -> f32 {
    (0..12).map(|_| random.f32() - 0.5).sum()
}

struct Rows {
    vocab: usize,
    a: Vec<f32>,
    b: Vec<f32>,
    labels: Vec<i64>,
}

fn rows(tokens: usize, vocab: usize, seed: u64) -> Rows {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut logits =
        || (0..tokens * vocab).map(|_| 3.0 * normal(&mut random)).collect::<Vec<f32>>();
    let (a, b) = (logits(), logits());
    let labels =
        (0..tokens).map(|i| if i % 5 == 4 { -100 } else { (i * 7919 % vocab) as i64 }).collect();
    Rows { vocab, a, b, labels }
}

impl Rows {
    fn check(&self, name: &str, objectives: &[Objective]) {
        check_f32(name, self.vocab, &self.a, &self.b, &self.labels, objectives);
    }
}

#[test]
fn any_size() {
    for vocab in [1, 2, 3, 7, 8, 9, 17, 64, 300, 1061] {
        rows(6, vocab, vocab as u64).check(&format!("V = {vocab}"), &objectives());
    }
    rows(2, 50257, 3).check("long", &objectives());
}

#[test]
fn any_temperature() {
    let rows = rows(6, 211, 2);
    for temperature in [0.05, 0.5, 1.0, 2.0, 10.0] {
        for squared in [false, true] {
            let objectives: Vec<_> = objectives()
                .iter()
                .map(|o| o.with_temperature(temperature).unwrap().with_temperature_squared(squared))
                .collect();
            rows.check(&format!("T = {temperature}"), &objectives);
        }
    }
}

#[test]
fn offsets() {
    for (da, db) in [(1e3, 0.0), (0.0, 1e3), (-1e3, 1e3)] {
        let mut rows = rows(4, 300, 4);
        rows.a.iter_mut().for_each(|z| *z += da);
        rows.b.iter_mut().for_each(|z| *z += db);
        rows.check("offsets", &objectives());
    }
}

/// Masks at tokens of either model or both, also at the target and at most of the row.
#[test]
fn masks() {
    for mask in [f32::NEG_INFINITY, -1e4, -1e9, -1e20, -1e30, f32::MIN] {
        for (in_a, in_b) in [(true, false), (false, true), (true, true)] {
            for (vocab, share) in [(3, 0.4), (40, 0.2), (40, 0.9), (1100, 0.3)] {
                let mut rows = rows(12, vocab, 5 + vocab as u64);
                let mut random = fastrand::Rng::with_seed(6);
                for i in 0..rows.a.len() {
                    if random.f64() < share {
                        rows.a[i] = if in_a { mask } else { rows.a[i] };
                        rows.b[i] = if in_b { mask } else { rows.b[i] };
                    }
                }
                // A row of nothing but -inf is NaN, and tested elsewhere.
                for token in 0..rows.labels.len() {
                    let j = token * vocab + random.usize(0..vocab);
                    (rows.a[j], rows.b[j]) = (rows.a[j].max(-20.0), rows.b[j].max(-20.0));
                }
                for temperature in [1.0, 0.05] {
                    let objectives: Vec<_> = objectives()
                        .into_iter()
                        .filter(|o| o.temperature() == 1.0)
                        .map(|o| o.with_temperature(temperature).unwrap())
                        .collect();
                    rows.check(
                        &format!("mask {mask:e} {in_a} {in_b} V {vocab} {share} T {temperature}"),
                        &objectives,
                    );
                }
            }
        }
    }
}

/// One model, or both, with nearly all of its mass on one token, at the other's mask or not.
#[test]
fn sure_models() {
    let objectives: Vec<_> = objectives().into_iter().filter(|o| o.temperature() == 1.0).collect();
    for height in [8.0, 15.0, 60.0] {
        for depth in [0.0, -15.0, -1e4, -1e9, -1e30, f32::MIN] {
            for place in [0, 256, 1300] {
                let mut sure = rows(4, 1301, 8);
                for token in 0..4 {
                    let j = token * sure.vocab + place;
                    sure.b[j] = 6.0 + height;
                    sure.a[j] = depth;
                }
                sure.labels = vec![5, 700, 1024, 9];
                sure.check(&format!("sure student {height} {depth} at {place}"), &objectives);
                std::mem::swap(&mut sure.a, &mut sure.b);
                sure.check(&format!("sure teacher {height} {depth} at {place}"), &objectives);
            }
        }
    }
}

#[test]
fn equal_models() {
    let mut rows = rows(6, 1500, 11);
    rows.b.clone_from(&rows.a);
    rows.check("equal", &objectives());
    let view = |x| Logits::new(x, 6, 1500).unwrap();
    let batch = Batch::new(view(&rows.a[..]), &rows.labels).unwrap();
    for objective in objectives() {
        if objective.ce_weight() == 0.0 && objective.divergence() == Divergence::TotalVariation {
            let mut gradient = vec![7_f32; 9000];
            let to = LogitsMut::new(&mut gradient, 6, 1500).unwrap();
            let output = forward_backward(&objective, &batch, view(&rows.b[..]), to).unwrap();
            assert_eq!(output.loss, 0.0);
            assert!(gradient.iter().all(|&g| g == 0.0), "{objective:?}");
        }
    }
}

/// The errors that remain where the models are close, beside those of forward KL.
#[test]
fn close_models() {
    for instructions in Instructions::available() {
        for difference in [1e-1, 1e-2, 1e-3, 1e-4] {
            let case = close(200, 1000, difference, 3);
            let mut of_forward = [0.0; 2];
            for divergence in divergences() {
                let objective = Objective::plain().with_divergence(divergence).unwrap();
                let (output, gradient) = case.run(instructions, &objective);
                let (mut error, mut size, mut bias, mut loss) = (0.0, 0.0, 0.0, 0.0);
                for (token, &label) in case.labels.iter().enumerate() {
                    let row = token * 1000..(token + 1) * 1000;
                    let wide =
                        |x: &[f32]| x[row.clone()].iter().map(|&x| x.into()).collect::<Vec<f64>>();
                    let exact = exact(
                        &objective,
                        &wide(&case.teacher),
                        &wide(&case.student),
                        label as usize,
                        false,
                    );
                    for (g, x) in gradient[row.clone()].iter().zip(&exact.gradient) {
                        error += (f64::from(*g) * 200.0 - x).powi(2);
                        size += x * x;
                    }
                    bias += output.tokens[token].loss - exact.loss;
                    loss += exact.loss;
                }
                let (error, bias, loss) = ((error / size).sqrt(), bias / 200.0, loss / 200.0);
                println!(
                    "{} {difference:e} {divergence:?}: gradient {error:.1e}, bias {bias:.1e} of {loss:.1e}",
                    instructions.name()
                );
                if divergence == Divergence::ForwardKl {
                    of_forward = [error, bias];
                }
                assert!(
                    bias.abs() <= 2e-7 / 200_f64.sqrt() + 1e-6 * loss,
                    "{divergence:?} {difference:e} {bias:e}"
                );
                if divergence != Divergence::TotalVariation {
                    assert!(
                        error <= 1.5 * of_forward[0] + 1e-7,
                        "{divergence:?} {difference:e} {error:e}"
                    );
                }
            }
        }
    }
}

#[test]
fn any_dtype() {
    let Rows { vocab, a, b, labels } = rows(5, 777, 12);
    let tokens = labels.len();
    fn batch_of<'a>(teacher: Logits<'a>, labels: &'a [i64]) -> Batch<'a> {
        Batch::new(teacher, labels).unwrap()
    }
    macro_rules! check {
        ($a:ty, $b:ty) => {{
            let a: Vec<$a> = a.iter().map(|&z| <$a>::from_f32(z)).collect();
            let b: Vec<$b> = b.iter().map(|&z| <$b>::from_f32(z)).collect();
            let wide = (
                a.iter().map(|z| z.to_f32()).collect::<Vec<f32>>(),
                b.iter().map(|z| z.to_f32()).collect::<Vec<f32>>(),
            );
            let batch = batch_of(Logits::new(&a[..], tokens, vocab).unwrap(), &labels);
            let student = Logits::new(&b[..], tokens, vocab).unwrap();
            for instructions in Instructions::available() {
                for objective in objectives() {
                    let both = [&wide.0[..], &wide.1[..]];
                    compared("dtype", instructions, &objective, &batch, student, both, &labels);
                }
            }
        }};
    }
    check!(bf16, bf16);
    check!(f16, f16);
    check!(bf16, f16);
    let wide: Vec<f32> = a.iter().map(|&z| bf16::from_f32(z).to_f32()).collect();
    let narrow: Vec<bf16> = a.iter().map(|&z| bf16::from_f32(z)).collect();
    let batch = batch_of(Logits::new(&narrow[..], tokens, vocab).unwrap(), &labels);
    let student = Logits::new(&b[..], tokens, vocab).unwrap();
    for objective in objectives() {
        let widest = Instructions::named(None).unwrap();
        compared("mixed", widest, &objective, &batch, student, [&wide, &b], &labels);
    }
}

/// Stages, in place or not, give what one call does.
#[test]
fn stages() {
    let Rows { vocab, a, b, labels } = rows(40, 301, 13);
    let tokens = labels.len();
    let view = |x| Logits::new(x, tokens, vocab).unwrap();
    let batch = Batch::new(view(&a[..]), &labels).unwrap();
    for objective in objectives() {
        let mut gradient = vec![0_f32; tokens * vocab];
        let to = LogitsMut::new(&mut gradient, tokens, vocab).unwrap();
        let output = forward_backward(&objective, &batch, view(&b[..]), to).unwrap();
        let mut in_place = b.clone();
        let to = LogitsMut::new(&mut in_place, tokens, vocab).unwrap();
        let again = forward_backward_in_place(&objective, &batch, to).unwrap();
        let bits = |x: &Output| x.tokens.iter().map(|t| t.loss.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&output), bits(&again));
        assert_eq!(gradient, in_place);
        let hard: Vec<bool> = output.tokens.iter().map(|t| t.hard).collect();
        let mut known = vec![0_f32; tokens * vocab];
        let to = LogitsMut::new(&mut known, tokens, vocab).unwrap();
        forward_backward(&objective, &batch.with_hard(&hard).unwrap(), view(&b[..]), to).unwrap();
        assert_eq!(gradient, known);
    }
}

/// Margins at and beyond the ends of float64's sigmoid, and target logits of -inf.
#[test]
fn certain_targets() {
    for (at_a, at_b) in [
        (800.0, 700.0),
        (800.0, -700.0),
        (-800.0, 700.0),
        (1e30, 1.0),
        (1.0, 1e30),
        (-1e30, 1e30),
        (f32::NEG_INFINITY, 0.0),
        (0.0, f32::NEG_INFINITY),
        (f32::NEG_INFINITY, f32::NEG_INFINITY),
        (40.0, 40.001),
        (-40.0, -40.001),
    ] {
        let mut rows = rows(3, 33, 14);
        for (token, label) in rows.labels.clone().into_iter().enumerate() {
            rows.a[token * 33 + label as usize] = at_a;
            rows.b[token * 33 + label as usize] = at_b;
        }
        rows.check(&format!("target at {at_a} {at_b}"), &objectives());
    }
}

/// No mass off the target in one model or both.
#[test]
fn nothing_but_the_target() {
    for (none_in_a, none_in_b) in [(true, false), (false, true), (true, true)] {
        let mut rows = rows(3, 21, 15);
        for (token, label) in rows.labels.clone().into_iter().enumerate() {
            for j in (0..21).filter(|&j| j != label as usize) {
                let i = token * 21 + j;
                rows.a[i] = if none_in_a { f32::NEG_INFINITY } else { rows.a[i] };
                rows.b[i] = if none_in_b { f32::NEG_INFINITY } else { rows.b[i] };
            }
        }
        rows.check(&format!("nothing but the target {none_in_a} {none_in_b}"), &objectives());
    }
}
