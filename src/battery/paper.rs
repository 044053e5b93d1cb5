//! The reference itself, against finite differences, textbook formulas and the paper's words.

use super::case::{Case, random};
use super::cases::decoupled;
use super::compare::Worst;
use super::sparse::{Kept, Values};
use crate::{
    Batch, Divergence, Logits, Objective, Output, Reduction, Result, SelectionRule, Tail, Teacher,
    reference,
};

/// The divergences by their definitions.
fn defined(divergence: Divergence, p: &[f64], q: &[f64]) -> f64 {
    let kl = |p: &[f64], q: &[f64]| -> f64 {
        p.iter().zip(q).filter(|(p, _)| **p > 0.0).map(|(p, q)| p * (p / q).ln()).sum()
    };
    let mixed = |share: f64, p: &[f64], q: &[f64]| -> Vec<f64> {
        p.iter().zip(q).map(|(p, q)| share * p + (1.0 - share) * q).collect()
    };
    match divergence {
        Divergence::ForwardKl => kl(p, q),
        Divergence::ReverseKl => kl(q, p),
        Divergence::Jsd { beta } => {
            let m = mixed(beta, p, q);
            beta * kl(p, &m) + (1.0 - beta) * kl(q, &m)
        }
        Divergence::TotalVariation => {
            p.iter().zip(q).map(|(p, q)| (p - q).abs()).sum::<f64>() / 2.0
        }
        Divergence::SkewKl { alpha } => kl(p, &mixed(alpha, p, q)),
        Divergence::SkewReverseKl { alpha } => kl(q, &mixed(alpha, q, p)),
    }
}

/// UNC, TKD, DKD, the plain divergence and cross entropy by their textbook formulas, of logits of ordinary size.
fn textbook(divergence: Divergence, a: &[f64], b: &[f64], target: usize) -> [f64; 5] {
    let softmax = |logits: &[f64]| -> Vec<f64> {
        let sum: f64 = logits.iter().map(|z| z.exp()).sum();
        logits.iter().map(|z| z.exp() / sum).collect()
    };
    let (p, q) = (softmax(a), softmax(b));
    let of = |p: &[f64], q: &[f64]| defined(divergence, p, q);
    let renormalised = |p: &[f64]| -> Vec<f64> {
        let others = p.iter().enumerate().filter(|&(j, _)| j != target);
        others.map(|(_, p_j)| p_j / (1.0 - p[target])).collect()
    };
    let tkd = of(&[p[target], 1.0 - p[target]], &[q[target], 1.0 - q[target]]);
    let dkd = of(&renormalised(&p), &renormalised(&q));
    [1.0 - p[target], tkd, dkd, of(&p, &q), -q[target].ln()]
}

/// The reference's gradient against central differences of its loss.
pub(super) fn differences(case: &Case) -> Result<Worst> {
    const STEP: f64 = 1e-4;
    let sparse = case.sparse.map(|kept| Values::of(case, kept));
    let teacher = match &sparse {
        Some(values) => Teacher::Sparse(values.teacher(case.tokens(), case.vocab)?),
        None => Teacher::Dense(Logits::new(&case.teacher, case.tokens(), case.vocab)?),
    };
    let batch = Batch::new(teacher, &case.labels)?;
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

/// The reference's terms by a sparse teacher against the words of [`Tail`] and textbook formulas, in probabilities.
pub(super) fn textbook_tails(case: &Case, divergence: Divergence, kept: Kept) -> Result<Worst> {
    let (tokens, vocab) = (case.tokens(), case.vocab);
    let values = Values::of(case, kept);
    let batch = Batch::new(values.teacher(tokens, vocab)?, &case.labels)?;
    let student = Logits::new(&case.student, tokens, vocab)?;
    let objective = Objective::default().with_divergence(divergence)?;
    let output = reference::forward(&objective, &batch, student)?;
    let plain = Objective::plain().with_divergence(divergence)?;
    let plain = reference::forward(&plain, &batch, student)?;
    let mut worst = Worst::none();
    for (i, token) in output.tokens.iter().enumerate() {
        let target = case.labels[i] as usize;
        let mut known = values.entries(i);
        known.insert(target, values.target_probability(i));
        let mass: f64 = known.values().sum();
        let (left, left_of_1) = (vocab - known.len(), 1.0 - known[&target]);
        let total: f64 =
            case.student[i * vocab..][..vocab].iter().map(|&z| f64::from(z).exp()).sum();
        let q = |j: usize| f64::from(case.student[i * vocab + j]).exp() / total;
        let (mut p, mut of_student, mut of_target) = (Vec::new(), Vec::new(), 0);
        let mut rest = 0.0;
        for j in 0..vocab {
            let probability = match (known.get(&j), kept.tail) {
                (Some(p), Tail::Zero) => p / mass,
                (Some(p), Tail::Sampled) if j != target => p / (mass - known[&target]) * left_of_1,
                (Some(p), _) => *p,
                (None, Tail::Zero | Tail::Sampled) => 0.0,
                (None, Tail::Uniform) => (1.0 - mass) / left as f64,
                (None, Tail::Bucket) => {
                    rest += q(j);
                    continue;
                }
            };
            of_target = if j == target { p.len() } else { of_target };
            p.push(probability);
            of_student.push(q(j));
        }
        if kept.tail == Tail::Bucket && left > 0 {
            p.push(1.0 - mass);
            of_student.push(rest);
        }
        let [uncertainty, of_others] = [&p, &of_student].map(|of| 1.0 - of[of_target]);
        let two = |of: &[f64]| [of[of_target], 1.0 - of[of_target]];
        let renormalised = |of: &[f64], rest: f64| -> Vec<f64> {
            let others = of.iter().enumerate().filter(|&(k, _)| k != of_target);
            others.map(|(_, p)| p / rest).collect()
        };
        let tkd = defined(divergence, &two(&p), &two(&of_student));
        // A teacher without mass off the target has no rest.
        let dkd = match uncertainty {
            0.0 => 0.0,
            _ => defined(
                divergence,
                &renormalised(&p, uncertainty),
                &renormalised(&of_student, of_others),
            ),
        };
        for (what, actual, expected) in [
            ("UNC", token.uncertainty, uncertainty),
            ("TKD", token.tkd, tkd),
            ("DKD", token.dkd, dkd),
            ("plain divergence", plain.tokens[i].loss, defined(divergence, &p, &of_student)),
        ] {
            worst.add(|| format!("{what} of token {i}"), actual, expected, 1e-9 * (1.0 + expected));
        }
    }
    Ok(worst)
}

/// The reference's terms against textbook formulas, and rows shifted by a constant.
pub(super) fn textbook_terms(case: &Case, divergence: Divergence) -> Result<Worst> {
    let vocab = case.vocab;
    let batch = Batch::new(Logits::new(&case.teacher, case.tokens(), vocab)?, &case.labels)?;
    let student = Logits::new(&case.student, case.tokens(), vocab)?;
    let objective = Objective::default().with_divergence(divergence)?;
    let (output, gradient) = reference::forward_backward(&objective, &batch, student)?;
    let plain = Objective::plain().with_divergence(divergence)?;
    let (plain, plain_gradient) = reference::forward_backward(&plain, &batch, student)?;
    // Cross entropy is no term of its own: it is the loss where nothing else has a weight.
    let alone = Objective::tkd().with_kd_weight(0.0)?.with_ce_weight(1.0)?;
    let cross_entropy = reference::forward(&alone, &batch, student)?;
    let mut worst = Worst::none();
    let wide = |row: &[f32]| -> Vec<f64> { row.iter().map(|&z| z.into()).collect() };
    let rows = |token: usize| wide(&case.student[token * vocab..][..vocab]);
    for (i, token) in output.tokens.iter().enumerate() {
        let teacher = wide(&case.teacher[i * vocab..][..vocab]);
        let [uncertainty, tkd, dkd, whole, ce] =
            textbook(divergence, &teacher, &rows(i), case.labels[i] as usize);
        for (what, actual, expected) in [
            ("UNC", token.uncertainty, uncertainty),
            ("TKD", token.tkd, tkd),
            ("DKD", token.dkd, dkd),
            ("plain divergence", plain.tokens[i].loss, whole),
            ("cross entropy", cross_entropy.tokens[i].loss, ce),
        ] {
            let allowed = 1e-12 * (1.0 + expected);
            worst.add(|| format!("{what} of token {i}"), actual, expected, allowed);
        }
        for gradient in [&gradient, &plain_gradient] {
            let sum: f64 = gradient[i * vocab..][..vocab].iter().sum();
            worst.add(|| format!("sum of gradient[{i}]"), sum, 0.0, 1e-14);
        }
    }
    let shifted = |token: usize| rows(token).iter().map(|z| z + 17.25 * token as f64).collect();
    let shifted = reference::compute(&objective, &batch, shifted, None)?.loss;
    worst.add(|| "loss of shifted rows".into(), shifted, output.loss, 1e-12 * (1.0 + output.loss));
    Ok(worst)
}

/// Identities of divergences, and of the plain ones and their parts.
pub(super) fn identities(case: &Case) -> Result<Worst> {
    let (tokens, vocab) = (case.tokens(), case.vocab);
    let models = [&case.teacher, &case.student];
    let run = |objective: Objective, [teacher, student]: [&Vec<f32>; 2]| {
        let batch = Batch::new(Logits::new(teacher, tokens, vocab)?, &case.labels)?;
        reference::forward_backward(&objective, &batch, Logits::new(student, tokens, vocab)?)
    };
    let plain = |divergence, models| run(Objective::plain().with_divergence(divergence)?, models);
    let atkd = |divergence| run(Objective::default().with_divergence(divergence)?, models);
    let losses = |output: &Output| output.tokens.iter().map(|token| token.loss).collect::<Vec<_>>();
    let mut worst = Worst::none();
    let mut equal = |what: &str, actual: &[f64], expected: &[f64], allowed: f64| {
        for (i, (actual, expected)) in actual.iter().zip(expected).enumerate() {
            worst.add(|| format!("{what} [{i}]"), *actual, *expected, allowed);
        }
    };

    // The loss of a sum of parts, and the gradient too where the weight of DKD is none of the student's.
    let parts = |output: &Output, weights: &Output| -> Vec<f64> {
        let tokens = output.tokens.iter().zip(&weights.tokens);
        tokens.map(|(token, weight)| token.tkd + weight.uncertainty * token.dkd).collect()
    };
    let (forward, forward_gradient) = plain(Divergence::ForwardKl, models)?;
    equal("forward KL = TKD + UNC DKD", &losses(&forward), &parts(&forward, &forward), 1e-12);
    let (reverse, reverse_gradient) = plain(Divergence::ReverseKl, models)?;
    let (of_student, _) = plain(Divergence::ForwardKl, [&case.student; 2])?;
    equal("reverse KL = TKD + s DKD", &losses(&reverse), &parts(&reverse, &of_student), 1e-12);

    // The ends of the ranges of beta and alpha are KL divergences, and nothing jumps there.
    for (what, limit, end, near) in [
        (
            "JSD(0)",
            (&forward, &forward_gradient),
            Divergence::Jsd { beta: 0.0 },
            Divergence::Jsd { beta: 1e-9 },
        ),
        (
            "JSD(1)",
            (&reverse, &reverse_gradient),
            Divergence::Jsd { beta: 1.0 },
            Divergence::Jsd { beta: 1.0 - 1e-9 },
        ),
        (
            "skew KL(0)",
            (&forward, &forward_gradient),
            Divergence::SkewKl { alpha: 0.0 },
            Divergence::SkewKl { alpha: 1e-9 },
        ),
        (
            "skew reverse KL(0)",
            (&reverse, &reverse_gradient),
            Divergence::SkewReverseKl { alpha: 0.0 },
            Divergence::SkewReverseKl { alpha: 1e-9 },
        ),
    ] {
        let (at_end, at_end_gradient) = plain(end, models)?;
        equal(what, &losses(&at_end), &losses(limit.0), 0.0);
        equal(what, &at_end_gradient, limit.1, 0.0);
        let (nearby, nearby_gradient) = plain(near, models)?;
        // JSD(beta) is of the size of beta (1 - beta).
        let size = if let Divergence::Jsd { .. } = near { 1e-9 } else { 1.0 };
        let scaled = |values: &[f64]| values.iter().map(|x| x / size).collect::<Vec<_>>();
        equal(&format!("near {what}"), &scaled(&losses(&nearby)), &losses(limit.0), 2e-5);
        equal(&format!("near {what}"), &scaled(&nearby_gradient), limit.1, 2e-5);
    }

    // Exchanging the models turns one divergence into another.
    let swapped = [&case.student, &case.teacher];
    for (what, one, other) in [
        ("forward and reverse KL", Divergence::ForwardKl, Divergence::ReverseKl),
        ("JSD", Divergence::Jsd { beta: 0.5 }, Divergence::Jsd { beta: 0.5 }),
        ("JSD, its beta", Divergence::Jsd { beta: 0.25 }, Divergence::Jsd { beta: 0.75 }),
        ("TVD", Divergence::TotalVariation, Divergence::TotalVariation),
        (
            "skew KL and skew reverse KL",
            Divergence::SkewKl { alpha: 0.25 },
            Divergence::SkewReverseKl { alpha: 0.25 },
        ),
    ] {
        let (one, other) = (plain(one, models)?.0, plain(other, swapped)?.0);
        equal(&format!("models exchanged, {what}"), &losses(&one), &losses(&other), 1e-13);
    }

    // Bounds, and 0 of equal models.
    let ln = |x: f64| -x.ln();
    let entropy = |beta: f64| beta * ln(beta) + (1.0 - beta) * ln(1.0 - beta);
    for (what, divergence, bound) in [
        ("JSD(0.5)", Divergence::Jsd { beta: 0.5 }, entropy(0.5)),
        ("JSD(0.1)", Divergence::Jsd { beta: 0.1 }, entropy(0.1)),
        ("TVD", Divergence::TotalVariation, 1.0),
        ("skew KL(0.1)", Divergence::SkewKl { alpha: 0.1 }, ln(0.1)),
        ("skew reverse KL(0.1)", Divergence::SkewReverseKl { alpha: 0.1 }, ln(0.1)),
        ("reverse KL", Divergence::ReverseKl, f64::MAX),
    ] {
        let mut values = losses(&plain(divergence, models)?.0);
        values.extend(atkd(divergence)?.0.tokens.iter().flat_map(|token| [token.tkd, token.dkd]));
        let clamped: Vec<f64> = values.iter().map(|value| value.clamp(0.0, bound)).collect();
        equal(&format!("{what}, at most {bound}"), &values, &clamped, 1e-15);
        let (same, mut values) = plain(divergence, [&case.teacher; 2])?;
        values.extend(losses(&same));
        equal(&format!("{what} of equal models"), &values, &vec![0.0; values.len()], 1e-15);
    }
    Ok(worst)
}

/// Batch sizes whose valid tokens, one fewer, do not all divide evenly by the hard ratios.
pub(super) const PAPER_TOKENS: [usize; 4] = [1, 4, 5, 12];

/// A loss as the paper and the documentation word it, with none of [`Objective`]'s own arithmetic.
pub(super) struct Paper {
    pub name: &'static str,
    objective: Result<Objective>,
    divergence: Divergence,
    temperature: f64,
    hard_ratio: f64,
    /// Hard from the lower median on, instead of the ratio.
    median: bool,
    /// The weight of cross entropy beside the token's loss.
    ce_weight: f64,
    /// A token's loss from its textbook [UNC, TKD, DKD, plain divergence, CE] and whether it is hard.
    token: fn([f64; 5], bool) -> f64,
    /// The divisors of the sums over the easy tokens, the hard ones, and of cross entropy, from how many are valid and how
    /// many of them hard.
    divisors: fn(f64, f64) -> [f64; 3],
}

pub(super) fn paper() -> Vec<Paper> {
    let atkd = Objective::default();
    let kl = Objective::kl();
    let row = |name, objective, token| Paper {
        name,
        objective,
        divergence: Divergence::ForwardKl,
        temperature: 1.0,
        hard_ratio: 0.5,
        median: false,
        ce_weight: 0.0,
        token,
        divisors: |valid, _| [valid; 3],
    };
    let atkd_token: fn([f64; 5], bool) -> f64 =
        |[_, tkd, dkd, ..], hard| if hard { 0.8 * (tkd + dkd) } else { 0.2 * dkd };
    let at_ratio = |name, hard_ratio| Paper {
        hard_ratio,
        ..row(name, atkd.with_hard_ratio(hard_ratio), atkd_token)
    };
    let by = |name, objective: Objective, token, divergence| Paper {
        divergence,
        ..row(name, objective.with_divergence(divergence), token)
    };
    let plain: fn([f64; 5], bool) -> f64 = |[.., plain, _], _| plain;
    let reduced = |name, reduction, divisors| Paper {
        divisors,
        ..row(name, atkd.with_reduction(reduction), atkd_token)
    };
    let by_group: fn(f64, f64) -> [f64; 3] = |valid, hard| [valid - hard, hard, valid];
    let by_median = |name, objective: Objective| Paper {
        median: true,
        ..row(name, Ok(objective.with_selection_rule(SelectionRule::Median)), atkd_token)
    };
    let of_groups = atkd.with_reduction(Reduction::GroupMean).expect("ATKD has groups");
    vec![
        row("atkd", Ok(atkd), atkd_token),
        row("atkd, lambda 0.3", Objective::atkd(0.3), |[_, tkd, dkd, ..], hard| {
            if hard { 0.7 * (tkd + dkd) } else { 0.3 * dkd }
        }),
        row("kl", Ok(kl), plain),
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
        Paper { temperature: 2.0, ..row("temperature 2", kl.with_temperature(2.0), plain) },
        Paper {
            temperature: 2.0,
            ..row(
                "temperature 2, squared",
                kl.with_temperature(2.0).map(|o| o.with_temperature_squared(true)),
                |[.., kl, _], _| 4.0 * kl,
            )
        },
        by("reverse KL, atkd", atkd, atkd_token, Divergence::ReverseKl),
        by("reverse KL, plain", Objective::plain(), plain, Divergence::ReverseKl),
        by("JSD, atkd", atkd, atkd_token, Divergence::Jsd { beta: 0.3 }),
        by("JSD, plain", Objective::plain(), plain, Divergence::Jsd { beta: 0.3 }),
        by("TVD, atkd", atkd, atkd_token, Divergence::TotalVariation),
        by("TVD, plain", Objective::plain(), plain, Divergence::TotalVariation),
        by("skew KL, atkd", atkd, atkd_token, Divergence::SkewKl { alpha: 0.2 }),
        by("skew KL, plain", Objective::plain(), plain, Divergence::SkewKl { alpha: 0.2 }),
        by("skew reverse KL, atkd", atkd, atkd_token, Divergence::SkewReverseKl { alpha: 0.2 }),
        by(
            "skew reverse KL, plain",
            Objective::plain(),
            plain,
            Divergence::SkewReverseKl { alpha: 0.2 },
        ),
        at_ratio("hard ratio 0", 0.0),
        at_ratio("hard ratio 0.1", 0.1),
        at_ratio("hard ratio 0.7", 0.7),
        at_ratio("hard ratio 1", 1.0),
        reduced("sum", Reduction::Sum, |_, _| [1.0; 3]),
        reduced("denominator 8", Reduction::Denominator(8.0), |_, _| [8.0; 3]),
        reduced("group mean", Reduction::GroupMean, by_group),
        Paper {
            hard_ratio: 0.1,
            divisors: by_group,
            ..row("group mean, hard ratio 0.1", of_groups.with_hard_ratio(0.1), atkd_token)
        },
        Paper {
            hard_ratio: 1.0,
            divisors: by_group,
            ..row("group mean, hard ratio 1", of_groups.with_hard_ratio(1.0), atkd_token)
        },
        by_median("median", atkd),
        Paper {
            divisors: by_group,
            ..by_median("the authors' code: group mean, median", of_groups)
        },
        Paper {
            ce_weight: 0.7,
            divisors: by_group,
            ..row(
                "group mean, cross entropy",
                of_groups.with_ce_weight(0.7).and_then(|o| o.with_kd_weight(0.3)),
                |[_, tkd, dkd, ..], hard| 0.3 * if hard { 0.8 * (tkd + dkd) } else { 0.2 * dkd },
            )
        },
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
            let terms = textbook(
                paper.divergence,
                &row(&case.teacher, i),
                &row(&case.student, i),
                case.labels[i] as usize,
            );
            (i, terms)
        })
        .collect();
    let mut ascending: Vec<f64> = terms.iter().map(|(_, token)| token[0]).collect();
    ascending.sort_by(f64::total_cmp);
    let mut worst = Worst::none();
    // Sums of the easy tokens, of the hard ones, and of cross entropy.
    let (mut sums, mut hard_tokens) = ([0.0; 3], 0.0);
    for &(i, token) in &terms {
        // A whole number of tokens is below ceil(x) exactly if it is below x.
        let before = terms
            .iter()
            .filter(|&&(j, other)| other[0] > token[0] || (other[0] == token[0] && j < i));
        let hard = match paper.median {
            true => token[0] >= ascending[(terms.len() - 1) / 2],
            false => (before.count() as f64) < paper.hard_ratio * terms.len() as f64,
        };
        if output.tokens[i].hard != hard {
            return Ok(Worst::fail(format!("token {i}: hard {}, by the paper {hard}", !hard)));
        }
        sums[usize::from(hard)] += (paper.token)(token, hard);
        sums[2] += paper.ce_weight * token[4];
        hard_tokens += f64::from(u8::from(hard));
    }
    let valid = output.tokens.iter().filter(|token| token.valid).count();
    worst.add(|| "valid tokens".into(), valid as f64, terms.len() as f64, 0.0);
    let divisors = (paper.divisors)(terms.len() as f64, hard_tokens);
    let parts = sums.iter().zip(divisors).filter(|(sum, _)| **sum != 0.0);
    let expected = parts.map(|(sum, divisor)| sum / divisor).sum::<f64>();
    worst.add(|| "loss".into(), output.loss, expected, 1e-12 * (1.0 + expected));
    Ok(worst)
}
