//! Properties that hold for any shape, dtype, stride and objective.

use atkd::battery::compare::{
    gradient_floor, gradient_within, loss_within, reduction_scales, ties,
};
use atkd::{
    Batch, Coefficient, Coefficients, Divergence, Dtype, Logits, LogitsMut, Objective, Output,
    Reduction, SelectionRule, Target, cpu, reference,
};
use half::{bf16, f16};
use proptest::prelude::*;

fn coefficient() -> impl Strategy<Value = Coefficient> {
    prop_oneof![
        (0.0..2.0).prop_map(Coefficient::Constant),
        Just(Coefficient::Constant(0.0)),
        Just(Coefficient::Uncertainty),
    ]
}

/// The ends of beta and alpha too.
fn divergence() -> impl Strategy<Value = Divergence> {
    let beta = prop_oneof![6 => 1e-6..0.999, 1 => Just(0.0), 1 => Just(1.0)];
    let alpha = || prop_oneof![6 => 1e-6..0.999, 1 => Just(0.0)];
    prop_oneof![
        2 => Just(Divergence::ForwardKl),
        2 => Just(Divergence::ReverseKl),
        2 => beta.prop_map(|beta| Divergence::Jsd { beta }),
        1 => Just(Divergence::TotalVariation),
        1 => alpha().prop_map(|alpha| Divergence::SkewKl { alpha }),
        1 => alpha().prop_map(|alpha| Divergence::SkewReverseKl { alpha }),
    ]
}

fn objective() -> impl Strategy<Value = Objective> {
    let coefficients = [coefficient(), coefficient(), coefficient(), coefficient()];
    let reduction = prop_oneof![
        Just(Reduction::Mean),
        Just(Reduction::Sum),
        Just(Reduction::GroupMean),
        (0.5..1e4).prop_map(Reduction::Denominator),
    ];
    let target = prop_oneof![Just(Target::Label), Just(Target::Teacher)];
    let rule = prop_oneof![Just(SelectionRule::TopK), Just(SelectionRule::Median)];
    let form = (divergence(), prop::bool::weighted(0.3), rule);
    let rest = (0.0..=1.0, 0.3..5.0, any::<bool>(), 0.0..2.0, 0.0..2.0, -3.0..3.0);
    (coefficients, form, reduction, target, rest).prop_map(
        |([a, b, c, d], form, reduction, target, rest)| {
            let (divergence, plain, rule) = form;
            let (ratio, temperature, squared, kd, ce, upstream) = rest;
            let parts = Objective::decoupled(Coefficients::new(a, b), Coefficients::new(c, d));
            let objective = if plain { Objective::plain() } else { parts.unwrap() };
            let reduction = match reduction {
                // There are none.
                Reduction::GroupMean if objective.easy() == objective.hard() => Reduction::Mean,
                other => other,
            };
            objective
                .with_selection_rule(rule)
                .with_divergence(divergence)
                .and_then(|o| o.with_hard_ratio(ratio))
                .and_then(|o| o.with_temperature(temperature))
                .and_then(|o| o.with_kd_weight(kd))
                .and_then(|o| o.with_ce_weight(ce))
                .and_then(|o| o.with_upstream_gradient(upstream))
                .and_then(|o| o.with_reduction(reduction))
                .unwrap()
                .with_temperature_squared(squared)
                .with_target(target)
        },
    )
}

#[derive(Clone, Debug)]
struct Input {
    tokens: usize,
    vocab: usize,
    stride: usize,
    teacher: Vec<f32>,
    student: Vec<f32>,
    labels: Vec<i64>,
}

fn input() -> impl Strategy<Value = Input> {
    (0_usize..7, 1_usize..70, 0_usize..5, 0.1_f32..30.0).prop_flat_map(
        |(tokens, vocab, padding, spread)| {
            let stride = vocab + padding;
            let logits = || proptest::collection::vec(-spread..spread, tokens * stride);
            let label = prop_oneof![9 => 0..vocab as i64, 1 => Just(-100)];
            let labels = proptest::collection::vec(label, tokens);
            (logits(), logits(), labels).prop_map(move |(teacher, student, labels)| Input {
                tokens,
                vocab,
                stride,
                teacher,
                student,
                labels,
            })
        },
    )
}

/// A bound on what the objective multiplies a token's terms by.
fn weight(objective: &Objective) -> f64 {
    2.0 * objective.distillation_scale() + objective.ce_weight()
}

/// For comparison: a term that is not computed is NaN.
fn bits(output: &Output) -> Vec<[u64; 7]> {
    let mut all = vec![[output.loss.to_bits(), 0, 0, 0, 0, 0, 0]];
    all.extend(output.tokens.iter().map(|token| {
        [
            token.margin.to_bits(),
            token.uncertainty.to_bits(),
            token.tkd.to_bits(),
            token.dkd.to_bits(),
            token.loss.to_bits(),
            token.valid.into(),
            token.hard.into(),
        ]
    }));
    all
}

macro_rules! check {
    ($element:ty, $convert:expr, $input:expr, $objective:expr) => {{
        let (input, objective): (&Input, &Objective) = ($input, $objective);
        let narrow = |v: &[f32]| -> Vec<$element> { v.iter().map(|&z| $convert(z)).collect() };
        let (teacher, student) = (narrow(&input.teacher), narrow(&input.student));
        let Input { tokens, vocab, stride, .. } = *input;
        let teacher = Logits::strided(&teacher, tokens, vocab, stride).unwrap();
        let logits = Logits::strided(&student, tokens, vocab, stride).unwrap();
        let batch = Batch::new(teacher, &input.labels).unwrap();
        let (exact, exact_gradient) =
            reference::forward_backward(objective, &batch, logits).unwrap();

        let mut apart = student.clone();
        let view = LogitsMut::strided(&mut apart, tokens, vocab, stride).unwrap();
        let output = cpu::forward_backward(objective, &batch, logits, view).unwrap();
        let mut in_place = student.clone();
        let view = LogitsMut::strided(&mut in_place, tokens, vocab, stride).unwrap();
        let output_in_place = cpu::forward_backward_in_place(objective, &batch, view).unwrap();
        prop_assert_eq!(bits(&output_in_place), bits(&output));
        prop_assert_eq!(&in_place, &apart);
        prop_assert_eq!(bits(&cpu::forward(objective, &batch, logits).unwrap()), bits(&output));

        let (valid, scales) = (exact.summary().valid_tokens, reduction_scales(objective, &exact));
        let unit = weight(objective) * scales.easy.max(scales.hard) * valid as f64;
        let allowed = loss_within(exact.loss, unit);
        prop_assert!((output.loss - exact.loss).abs() <= allowed, "{} {}", output.loss, exact.loss);
        let floor = gradient_floor(objective, weight(objective), &exact);
        let ties = ties(objective, &batch, logits, &exact).unwrap();
        for i in 0..tokens {
            prop_assert_eq!(output.tokens[i].hard, exact.tokens[i].hard);
            let exact = &exact_gradient[i * vocab..][..vocab];
            let largest = exact.iter().fold(0.0_f64, |max, g| max.max(g.abs()));
            for (j, exact) in exact.iter().enumerate() {
                let g = f64::from(f32::from(apart[i * stride + j]));
                let tie = ties[i * vocab + j];
                let end = exact.abs() + tie;
                let allowed = tie + gradient_within(logits.dtype(), end, largest, floor);
                prop_assert!((g - exact).abs() <= allowed, "gradient[{i}, {j}]: {g:e}, {exact:e}");
            }
            for (k, untouched) in
                student.iter().enumerate().skip(i * stride + vocab).take(stride - vocab)
            {
                prop_assert_eq!(apart[k], *untouched);
            }
        }
    }};
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..Default::default() })]

    #[test]
    fn cpu_is_the_reference(
        input in input(),
        objective in objective(),
        dtype in prop_oneof![Just(Dtype::F32), Just(Dtype::F16), Just(Dtype::Bf16)],
    ) {
        match dtype {
            Dtype::F32 => check!(f32, |z| z, &input, &objective),
            Dtype::F16 => check!(f16, f16::from_f32, &input, &objective),
            Dtype::Bf16 => check!(bf16, bf16::from_f32, &input, &objective),
        }
    }

    /// Adding a constant to a row changes no loss, however large the constant that float32 can hold
    /// beside the logits' digits.
    #[test]
    fn shifted_rows_are_the_same(mut input in input(), shift in -64_i32..64) {
        // Multiples of 1/256, so that the shift rounds nothing.
        for z in input.teacher.iter_mut().chain(&mut input.student) {
            *z = (*z * 256.0).round() / 256.0;
        }
        let loss = |input: &Input| {
            let Input { tokens, vocab, stride, .. } = *input;
            let view = |v| Logits::strided(v, tokens, vocab, stride).unwrap();
            let batch = Batch::new(view(&input.teacher), &input.labels).unwrap();
            cpu::forward(&Objective::default(), &batch, view(&input.student)).unwrap().loss
        };
        let before = loss(&input);
        input.teacher.iter_mut().for_each(|z| *z += shift as f32);
        input.student.iter_mut().for_each(|z| *z -= 3.0 * shift as f32);
        let after = loss(&input);
        prop_assert!((before - after).abs() <= loss_within(before, 1.0), "{before} {after}");
    }
}

#[test]
fn a_summary_of_nothing_is_zero() {
    let logits = [1.0_f32, 2.0, 3.0, 4.0];
    let batch = Batch::new(Logits::new(&logits[..], 2, 2).unwrap(), &[-100_i64, -100]).unwrap();
    let student = Logits::new(&logits[..], 2, 2).unwrap();
    let summary = cpu::forward(&Objective::default(), &batch, student).unwrap().summary();
    for mean in [summary.mean_uncertainty, summary.mean_tkd, summary.mean_dkd] {
        assert_eq!(mean.to_bits(), 0.0_f64.to_bits(), "{mean}");
    }
}
