//! Means of groups and the selection by the median, by numbers worked out by hand.

use atkd::{
    Batch, Logits, LogitsMut, Objective, Output, Reduction, Result, SelectionRule, TokenTerms, cpu,
    reference, select_hard,
};

const TOKENS: usize = 5;
const VOCAB: usize = 3;
/// The fourth token is ignored.
const LABELS: [i64; TOKENS] = [0, 0, 0, -100, 0];

/// Uncertainties of 1/5, 1/2, 1/3, - and 1/4, of which the lower median is 1/4. Beside the target the teacher has 3/4
/// and 1/4 of what is left.
fn teacher() -> Vec<f32> {
    let row = |unc: f64| [1.0 - unc, unc * 0.75, unc * 0.25].map(|p: f64| p.ln() as f32);
    [0.2, 0.5, 1.0 / 3.0, 0.5, 0.25].into_iter().flat_map(row).collect()
}

/// 1/2 for the target, 1/4 for each other.
fn student() -> Vec<f32> {
    [0.5, 0.25, 0.25].map(|p: f64| p.ln() as f32).repeat(TOKENS)
}

// TKD = KL of two classes: ln 2 - H(UNC), with H the entropy of (UNC, 1 - UNC).
const TKD_OF_FIFTH: f64 = 0.192_744_8;
const TKD_OF_HALF: f64 = 0.0;
const TKD_OF_THIRD: f64 = 0.056_633;
const TKD_OF_QUARTER: f64 = 0.130_812;
/// 3/4 ln(3/4 / 1/2) + 1/4 ln(1/4 / 1/2) of every token.
const DKD: f64 = 0.130_812;
/// -ln 1/2
const CE: f64 = std::f64::consts::LN_2;

/// The results of each backend, the gradient of those that have one in two ways twice.
fn results(objective: &Objective) -> Vec<(Output, Vec<f64>)> {
    let (teacher, student) = (teacher(), student());
    let view = |logits| Logits::new(logits, TOKENS, VOCAB).unwrap();
    let batch = Batch::new(view(&teacher), &LABELS).unwrap();
    let wide = |gradient: &[f32]| gradient.iter().map(|&g| g.into()).collect();
    let mut found = vec![reference::forward_backward(objective, &batch, view(&student)).unwrap()];

    let mut apart = vec![9.0; TOKENS * VOCAB];
    let to = LogitsMut::new(&mut apart, TOKENS, VOCAB).unwrap();
    let output = cpu::forward_backward(objective, &batch, view(&student), to).unwrap();
    found.push((output, wide(&apart)));
    let mut in_place = student.clone();
    let to = LogitsMut::new(&mut in_place, TOKENS, VOCAB).unwrap();
    let output = cpu::forward_backward_in_place(objective, &batch, to).unwrap();
    assert_eq!(output, cpu::forward(objective, &batch, view(&student)).unwrap());
    found.push((output, wide(&in_place)));

    #[cfg(feature = "simt")]
    {
        use atkd::simt::{Extra, Simulation};
        let mut apart = vec![9.0; TOKENS * VOCAB];
        let mut to = LogitsMut::new(&mut apart, TOKENS, VOCAB).unwrap();
        let (output, _) = Simulation::default()
            .run(objective, &batch, view(&student), Some(&mut to), Extra::default())
            .unwrap();
        found.push((output, wide(&apart)));
    }
    found
}

#[track_caller]
fn check(objective: Result<Objective>, hard: [bool; TOKENS], loss: f64, losses: [f64; TOKENS]) {
    for (output, _) in results(&objective.unwrap()) {
        let of = |term: fn(&TokenTerms) -> bool| output.tokens.iter().map(term).collect::<Vec<_>>();
        assert_eq!(of(|token| token.hard), hard);
        assert!((output.loss - loss).abs() < 2e-6, "{} {loss}", output.loss);
        for (token, expected) in output.tokens.iter().zip(losses) {
            assert!((token.loss - expected).abs() < 2e-6, "{} {expected}", token.loss);
        }
    }
}

fn atkd() -> Objective {
    Objective::default()
}

const HARD_BY_MEDIAN: [bool; TOKENS] = [false, true, true, false, true];
const HARD_BY_RATIO: [bool; TOKENS] = [false, true, true, false, false];

#[test]
fn the_authors_code() {
    let losses = [
        0.2 * DKD,
        0.8 * (TKD_OF_HALF + DKD),
        0.8 * (TKD_OF_THIRD + DKD),
        0.0,
        0.8 * (TKD_OF_QUARTER + DKD),
    ];
    let authors = atkd().with_selection_rule(SelectionRule::Median);
    let of_groups = authors.with_reduction(Reduction::GroupMean);
    // 0.2 * 0.130812 / 1 + 0.8 * (0.187445 + 3 * 0.130812) / 3
    check(of_groups.clone(), HARD_BY_MEDIAN, 0.180_797, losses);
    // The same over all four tokens, and their sum.
    check(Ok(authors), HARD_BY_MEDIAN, 0.122_517, losses);
    check(authors.with_reduction(Reduction::Sum), HARD_BY_MEDIAN, 0.490_067, losses);
    // The ratio is not used.
    for ratio in [0.0, 0.1, 1.0] {
        let objective = of_groups.clone().and_then(|o| o.with_hard_ratio(ratio));
        check(objective, HARD_BY_MEDIAN, 0.180_797, losses);
    }
    // Cross entropy has its mean over all four.
    let mixed = of_groups.and_then(|o| o.with_ce_weight(0.5)).and_then(|o| o.with_kd_weight(0.5));
    let half = losses.map(|loss| if loss == 0.0 { 0.0 } else { 0.5 * loss + 0.5 * CE });
    check(mixed, HARD_BY_MEDIAN, 0.5 * 0.180_797 + 0.5 * CE, half);
}

/// Two tokens of each group: twice the mean over all.
#[test]
fn groups_of_equal_size() {
    let losses = [0.2 * DKD, 0.8 * (TKD_OF_HALF + DKD), 0.8 * (TKD_OF_THIRD + DKD), 0.0, 0.2 * DKD];
    // (0.2 * 2 * 0.130812 + 0.8 * (0.056633 + 2 * 0.130812)) / 4, and over 2.
    check(Ok(atkd()), HARD_BY_RATIO, 0.076_733, losses);
    let of_groups = atkd().with_reduction(Reduction::GroupMean);
    check(of_groups.clone(), HARD_BY_RATIO, 0.153_465, losses);
    let mean = results(&atkd());
    for ((twice, gradient), (once, of_mean)) in results(&of_groups.unwrap()).iter().zip(mean) {
        assert!((twice.loss - 2.0 * once.loss).abs() < 1e-15);
        for (g, of_mean) in gradient.iter().zip(of_mean) {
            assert!((g - 2.0 * of_mean).abs() <= 1e-7 * of_mean.abs(), "{g} {of_mean}");
        }
    }
}

/// All four are hard, or easy.
#[test]
fn an_empty_group_adds_nothing() {
    let at =
        |ratio| atkd().with_hard_ratio(ratio).and_then(|o| o.with_reduction(Reduction::GroupMean));
    let easy = [0.2 * DKD, 0.2 * DKD, 0.2 * DKD, 0.0, 0.2 * DKD];
    check(at(0.0), [false; TOKENS], 0.2 * DKD, easy);
    let tkd = [TKD_OF_FIFTH, TKD_OF_HALF, TKD_OF_THIRD, -DKD, TKD_OF_QUARTER];
    let hard = tkd.map(|tkd| 0.8 * (tkd + DKD));
    check(at(1.0), [true, true, true, false, true], 0.180_688, hard);
}

/// With s = 1/2 and qhat = (1/2, 1/2): at the target -gamma, beside it gamma / 2 + c (qhat - phat).
#[test]
fn gradients() {
    let authors = atkd().with_selection_rule(SelectionRule::Median);
    let of_groups = authors.with_reduction(Reduction::GroupMean).unwrap();
    let doubled = of_groups.with_upstream_gradient(-2.0).unwrap();
    let with_ce = of_groups.with_ce_weight(0.4).unwrap();
    for (objective, upstream, ce) in
        [(of_groups, 1.0, 0.0), (doubled, -2.0, 0.0), (with_ce, 1.0, 0.4)]
    {
        for (_, gradient) in results(&objective) {
            for (token, unc) in [(0, 0.2), (1, 0.5), (2, 1.0 / 3.0), (4, 0.25)] {
                // Over the count of each group, and cross entropy over all four.
                let (tkd, dkd) = if token == 0 { (0.0, 0.2) } else { (0.8 / 3.0, 0.8 / 3.0) };
                let gamma = tkd * (0.5 - unc) + ce / 4.0 * 0.5;
                let expected = [-gamma, gamma / 2.0 - 0.25 * dkd, gamma / 2.0 + 0.25 * dkd];
                for (g, expected) in gradient[token * VOCAB..].iter().zip(expected) {
                    let expected = upstream * expected;
                    assert!((g - expected).abs() < 2e-7, "{token}: {g} {expected}");
                }
            }
            assert!(gradient[3 * VOCAB..4 * VOCAB].iter().all(|&g| g == 0.0));
        }
    }
}

/// The selection apart from a call is by the ratio.
#[test]
fn a_mask_has_the_sizes_of_its_groups() {
    let (teacher, student) = (teacher(), student());
    let view = |logits| Logits::new(logits, TOKENS, VOCAB).unwrap();
    // The ignored token is in none.
    let hard = [true, false, false, true, false];
    let batch = Batch::new(view(&teacher), &LABELS).unwrap().with_hard(&hard).unwrap();
    let objective = atkd().with_reduction(Reduction::GroupMean).unwrap();
    let expected = 0.8 * (TKD_OF_FIFTH + DKD) + 0.2 * DKD;
    let exact = reference::forward(&objective, &batch, view(&student)).unwrap().loss;
    let loss = cpu::forward(&objective, &batch, view(&student)).unwrap().loss;
    assert!((exact - expected).abs() < 2e-6 && (loss - expected).abs() < 2e-6, "{exact} {loss}");

    let margins = cpu::teacher_margins(&objective, &batch).unwrap();
    let valid = LABELS.map(|label| label >= 0);
    assert_eq!(select_hard(&margins, Some(&valid), 0.5, None).unwrap(), HARD_BY_RATIO);
}
