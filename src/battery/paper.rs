//! The reference itself, against finite differences, textbook formulas and the paper's words.

use super::case::{Case, random};
use super::cases::decoupled;
use super::compare::Worst;
use crate::{Batch, Logits, Objective, Reduction, Result, reference};

/// KL divergence and cross entropy by their textbook formulas, of logits of ordinary size.
fn textbook(a: &[f64], b: &[f64], target: usize) -> [f64; 5] {
    let softmax = |logits: &[f64]| -> Vec<f64> {
        let sum: f64 = logits.iter().map(|z| z.exp()).sum();
        logits.iter().map(|z| z.exp() / sum).collect()
    };
    let (p, q) = (softmax(a), softmax(b));
    let kl = |p: &[f64], q: &[f64]| -> f64 { p.iter().zip(q).map(|(p, q)| p * (p / q).ln()).sum() };
    let renormalised = |p: &[f64]| -> Vec<f64> {
        let others = p.iter().enumerate().filter(|&(j, _)| j != target);
        others.map(|(_, p_j)| p_j / (1.0 - p[target])).collect()
    };
    let tkd = kl(&[p[target], 1.0 - p[target]], &[q[target], 1.0 - q[target]]);
    let dkd = kl(&renormalised(&p), &renormalised(&q));
    [1.0 - p[target], tkd, dkd, kl(&p, &q), -q[target].ln()]
}

/// The reference's gradient against central differences of its loss.
pub(super) fn differences(case: &Case) -> Result<Worst> {
    const STEP: f64 = 1e-4;
    let batch = Batch::new(Logits::new(&case.teacher, case.tokens(), case.vocab)?, &case.labels)?;
    let student = Logits::new(&case.student, case.tokens(), case.vocab)?;
    let (output, gradient) = reference::forward_backward(&case.objective, &batch, student)?;
    let upstream = case.objective.upstream_gradient();
    let mut worst = Worst::none();
    for (index, &analytic) in gradient.iter().enumerate() {
        let loss_at = |step: f64| -> Result<f64> {
            let row = |token: usize| {
                let row = &case.student[token * case.vocab..][..case.vocab];
                let mut row: Vec<f64> = row.iter().map(|&z| z.into()).collect();
                if token == index / case.vocab {
                    row[index % case.vocab] += step;
                }
                row
            };
            Ok(reference::compute(&case.objective, &batch, row, None)?.loss)
        };
        let slope = upstream * (loss_at(STEP)? - loss_at(-STEP)?) / (2.0 * STEP);
        // The step's square times a third derivative, and the loss's rounding over the step.
        let allowed = 2e-9 * (1.0 + output.loss.abs()) * (1.0 + upstream.abs());
        worst.add(|| format!("d loss / d student[{index}]"), analytic, slope, allowed);
    }
    Ok(worst)
}

/// The reference's terms against textbook formulas, KL = TKD + UNC DKD, and rows shifted by a constant.
pub(super) fn identities(case: &Case) -> Result<Worst> {
    let vocab = case.vocab;
    let batch = Batch::new(Logits::new(&case.teacher, case.tokens(), vocab)?, &case.labels)?;
    let student = Logits::new(&case.student, case.tokens(), vocab)?;
    let (output, gradient) = reference::forward_backward(&case.objective, &batch, student)?;
    // Cross entropy is no term of its own: it is the loss where nothing else has a weight.
    let alone = Objective::tkd().with_kd_weight(0.0)?.with_ce_weight(1.0)?;
    let cross_entropy = reference::forward(&alone, &batch, student)?;
    let mut worst = Worst::none();
    let wide = |row: &[f32]| -> Vec<f64> { row.iter().map(|&z| z.into()).collect() };
    let rows = |token: usize| wide(&case.student[token * vocab..][..vocab]);
    for (i, token) in output.tokens.iter().enumerate() {
        let teacher = wide(&case.teacher[i * vocab..][..vocab]);
        let [uncertainty, tkd, dkd, kl, ce] = textbook(&teacher, &rows(i), case.labels[i] as usize);
        for (what, actual, expected) in [
            ("UNC", token.uncertainty, uncertainty),
            ("TKD", token.tkd, tkd),
            ("DKD", token.dkd, dkd),
            ("TKD + UNC DKD", token.tkd + token.uncertainty * token.dkd, kl),
            ("cross entropy", cross_entropy.tokens[i].loss, ce),
        ] {
            worst.add(
                || format!("{what} of token {i}"),
                actual,
                expected,
                1e-12 * (1.0 + expected),
            );
        }
        let sum: f64 = gradient[i * vocab..][..vocab].iter().sum();
        worst.add(|| format!("sum of gradient[{i}]"), sum, 0.0, 1e-14);
    }
    let shifted = |token: usize| rows(token).iter().map(|z| z + 17.25 * token as f64).collect();
    let shifted = reference::compute(&case.objective, &batch, shifted, None)?.loss;
    worst.add(|| "loss of shifted rows".into(), shifted, output.loss, 1e-12 * (1.0 + output.loss));
    Ok(worst)
}

/// Batch sizes whose valid tokens, one fewer, do not all divide evenly by the hard ratios.
pub(super) const PAPER_TOKENS: [usize; 4] = [1, 4, 5, 12];

/// A loss as the paper and the documentation word it, with none of [`Objective`]'s own arithmetic.
pub(super) struct Paper {
    pub name: &'static str,
    objective: Result<Objective>,
    temperature: f64,
    hard_ratio: f64,
    /// A token's loss from its textbook [UNC, TKD, DKD, KL, CE] and whether it is hard.
    token: fn([f64; 5], bool) -> f64,
    /// The divisor of the sum over so many valid tokens.
    divisor: fn(f64) -> f64,
}

pub(super) fn paper() -> Vec<Paper> {
    let atkd = Objective::default();
    let kl = Objective::kl();
    let row = |name, objective, token| Paper {
        name,
        objective,
        temperature: 1.0,
        hard_ratio: 0.5,
        token,
        divisor: |valid| valid,
    };
    let atkd_token: fn([f64; 5], bool) -> f64 =
        |[_, tkd, dkd, ..], hard| if hard { 0.8 * (tkd + dkd) } else { 0.2 * dkd };
    let at_ratio = |name, hard_ratio| Paper {
        hard_ratio,
        ..row(name, atkd.with_hard_ratio(hard_ratio), atkd_token)
    };
    let reduced = |name, reduction, divisor| Paper {
        divisor,
        ..row(name, atkd.with_reduction(reduction), atkd_token)
    };
    vec![
        row("atkd", Ok(atkd), atkd_token),
        row("atkd, lambda 0.3", Objective::atkd(0.3), |[_, tkd, dkd, ..], hard| {
            if hard { 0.7 * (tkd + dkd) } else { 0.3 * dkd }
        }),
        row("kl", Ok(kl), |[.., kl, _], _| kl),
        row("tkd", Ok(Objective::tkd()), |[_, tkd, ..], _| tkd),
        row("dkd", Ok(Objective::dkd()), |[_, _, dkd, ..], _| dkd),
        row("decoupled", decoupled((0.9, 0.1), (0.25, 0.75)), |[_, tkd, dkd, ..], hard| {
            if hard { 0.25 * tkd + 0.75 * dkd } else { 0.9 * tkd + 0.1 * dkd }
        }),
        row(
            "cross entropy mixed in",
            kl.with_ce_weight(0.7).and_then(|o| o.with_kd_weight(0.3)),
            |[.., kl, ce], _| 0.3 * kl + 0.7 * ce,
        ),
        Paper {
            temperature: 2.0,
            ..row("temperature 2", kl.with_temperature(2.0), |[.., kl, _], _| kl)
        },
        Paper {
            temperature: 2.0,
            ..row(
                "temperature 2, squared",
                kl.with_temperature(2.0).map(|o| o.with_temperature_squared(true)),
                |[.., kl, _], _| 4.0 * kl,
            )
        },
        at_ratio("hard ratio 0", 0.0),
        at_ratio("hard ratio 0.1", 0.1),
        at_ratio("hard ratio 0.7", 0.7),
        at_ratio("hard ratio 1", 1.0),
        reduced("sum", Reduction::Sum, |_| 1.0),
        reduced("denominator 8", Reduction::Denominator(8.0), |_| 8.0),
    ]
}

/// The reference's selection and loss against [`Paper`], one token ignored.
pub(super) fn by_the_paper(paper: &Paper, tokens: usize) -> Result<Worst> {
    const VOCAB: usize = 23;
    let mut case = random(tokens, VOCAB, tokens as u64).with(paper.objective.clone());
    case.labels[tokens / 2] = -100;
    let batch = Batch::new(Logits::new(&case.teacher, tokens, VOCAB)?, &case.labels)?;
    let student = Logits::new(&case.student, tokens, VOCAB)?;
    let output = reference::forward(&case.objective, &batch, student)?;

    let row = |logits: &[f32], i: usize| -> Vec<f64> {
        logits[i * VOCAB..][..VOCAB].iter().map(|&z| f64::from(z) / paper.temperature).collect()
    };
    let terms: Vec<(usize, [f64; 5])> = (0..tokens)
        .filter(|&i| case.labels[i] != -100)
        .map(|i| {
            let terms =
                textbook(&row(&case.teacher, i), &row(&case.student, i), case.labels[i] as usize);
            (i, terms)
        })
        .collect();
    let mut worst = Worst::none();
    let mut sum = 0.0;
    for &(i, token) in &terms {
        // A whole number of tokens is below ceil(x) exactly if it is below x.
        let before = terms
            .iter()
            .filter(|&&(j, other)| other[0] > token[0] || (other[0] == token[0] && j < i));
        let hard = (before.count() as f64) < paper.hard_ratio * terms.len() as f64;
        if output.tokens[i].hard != hard {
            return Ok(Worst::fail(format!("token {i}: hard {}, by the paper {hard}", !hard)));
        }
        sum += (paper.token)(token, hard);
    }
    let valid = output.tokens.iter().filter(|token| token.valid).count();
    worst.add(|| "valid tokens".into(), valid as f64, terms.len() as f64, 0.0);
    let expected = if terms.is_empty() { 0.0 } else { sum / (paper.divisor)(terms.len() as f64) };
    worst.add(|| "loss".into(), output.loss, expected, 1e-12 * (1.0 + expected));
    Ok(worst)
}
