//! A token at a temperature of its own is that token in a call at this temperature.

use atkd::{
    Batch, Divergence, Error, Logits, LogitsMut, Objective, Output, Reduction, Result, cpu,
    reference,
};

const TOKENS: usize = 5;
const VOCAB: usize = 40;
const LABELS: [i64; TOKENS] = [3, 39, -100, 0, 17];
const TEMPERATURES: [f32; TOKENS] = [2.0, 0.5, 3.0, 1.0, 7.5];

type Backend = fn(&Objective, &Batch, Logits) -> Result<(Output, Vec<f64>)>;

fn on_cpu(objective: &Objective, batch: &Batch, student: Logits) -> Result<(Output, Vec<f64>)> {
    let mut gradient = vec![9.0_f32; student.tokens() * VOCAB];
    let to = LogitsMut::new(&mut gradient, student.tokens(), VOCAB)?;
    let output = cpu::forward_backward(objective, batch, student, to)?;
    Ok((output, gradient.into_iter().map(f64::from).collect()))
}

#[cfg(feature = "simt")]
fn simulated(objective: &Objective, batch: &Batch, student: Logits) -> Result<(Output, Vec<f64>)> {
    use atkd::simt::{Extra, Simulation};
    let mut gradient = vec![9.0_f32; student.tokens() * VOCAB];
    let mut to = LogitsMut::new(&mut gradient, student.tokens(), VOCAB)?;
    let extra = Extra::default();
    let (output, _) = Simulation::default().run(objective, batch, student, Some(&mut to), extra)?;
    Ok((output, gradient.into_iter().map(f64::from).collect()))
}

#[test]
fn each_token_is_as_in_a_call_of_its_own() {
    let mut random = fastrand::Rng::with_seed(3);
    let mut logits = || (0..TOKENS * VOCAB).map(|_| 6.0 * random.f32()).collect::<Vec<_>>();
    let (teacher, student) = (logits(), logits());
    let hard = [true, false, false, true, false];
    let backends: &[Backend] = &[
        reference::forward_backward,
        on_cpu,
        #[cfg(feature = "simt")]
        simulated,
    ];
    for divergence in [Divergence::ForwardKl, Divergence::ReverseKl, Divergence::Jsd { beta: 0.3 }]
    {
        for squared in [false, true] {
            let objective = Objective::default()
                .with_temperature_squared(squared)
                .with_divergence(divergence)
                .and_then(|o| o.with_reduction(Reduction::Sum))
                .and_then(|o| o.with_ce_weight(0.5))
                .and_then(|o| o.with_kd_weight(0.7))
                .unwrap();
            for backend in backends {
                let view = |logits| Logits::new(logits, TOKENS, VOCAB).unwrap();
                let batch = Batch::new(view(&teacher), &LABELS).unwrap().with_hard(&hard).unwrap();
                let batch = batch.with_temperatures(&TEMPERATURES).unwrap();
                let (output, gradient) = backend(&objective, &batch, view(&student)).unwrap();
                let mut sum = 0.0;
                for token in 0..TOKENS {
                    let row = token * VOCAB..(token + 1) * VOCAB;
                    let one = |logits| Logits::new(logits, 1, VOCAB).unwrap();
                    let batch = Batch::new(one(&teacher[row.clone()]), &LABELS[token..][..1]);
                    let batch = batch.unwrap().with_hard(&hard[token..][..1]).unwrap();
                    let alone = objective.with_temperature(TEMPERATURES[token].into()).unwrap();
                    let student = one(&student[row.clone()]);
                    let (exact, expected) =
                        reference::forward_backward(&alone, &batch, student).unwrap();
                    let (found, exact) = (output.tokens[token], exact.tokens[0]);
                    assert_eq!((found.valid, found.hard), (exact.valid, exact.hard));
                    let unit = if squared { TEMPERATURES[token].powi(2).into() } else { 1.0 };
                    for (found, exact, unit) in [
                        (found.tkd, exact.tkd, 1.0),
                        (found.dkd, exact.dkd, 1.0),
                        (found.uncertainty, exact.uncertainty, 1.0),
                        (found.loss, exact.loss, f64::max(unit, 1.0)),
                    ] {
                        assert!(
                            (found - exact).abs() < 2e-6 * (unit + exact.abs()),
                            "{found} {exact}"
                        );
                    }
                    for (found, exact) in gradient[row].iter().zip(&expected) {
                        assert!((found - exact).abs() < 1e-5, "{found} {exact}");
                    }
                    sum += exact.loss;
                }
                assert!(
                    (output.loss - sum).abs() < 1e-5 * (1.0 + sum.abs()),
                    "{} {sum}",
                    output.loss
                );
            }
        }
    }
}

#[test]
fn impossible_temperatures() {
    let logits = [0.0; TOKENS * VOCAB];
    let view = || Logits::new(&logits[..], TOKENS, VOCAB).unwrap();
    let batch = Batch::new(view(), &LABELS).unwrap();
    let error = batch.with_temperatures(&TEMPERATURES[1..]).unwrap_err();
    let what = "the temperatures";
    assert_eq!(error, Error::MaskCount { what, values: TOKENS - 1, tokens: TOKENS });
    for wrong in [0.0, -1.0, f32::NAN, f32::INFINITY, 1e-31] {
        let mut temperatures = TEMPERATURES;
        // An ignored token's is not looked at.
        temperatures[2] = wrong;
        let ignored = batch.with_temperatures(&temperatures).unwrap();
        let calls: [Backend; 2] = [reference::forward_backward, on_cpu];
        for call in calls {
            call(&Objective::default(), &ignored, view()).unwrap();
        }
        temperatures[3] = wrong;
        let batch = batch.with_temperatures(&temperatures).unwrap();
        let margins = cpu::teacher_margins(&Objective::default(), &batch).unwrap_err();
        let calls = calls.map(|call| call(&Objective::default(), &batch, view()).unwrap_err());
        for error in calls.into_iter().chain([margins]) {
            let error = error.to_string();
            for part in ["temperature of token 3", "1e-30"] {
                assert!(error.contains(part), "{error}");
            }
        }
        #[cfg(feature = "simt")]
        {
            let (output, gradient) = simulated(&Objective::default(), &batch, view()).unwrap();
            let is_nan = |token: usize| output.tokens[token].loss.is_nan();
            assert_eq!([0, 1, 2, 3, 4].map(is_nan), [false, false, false, true, false]);
            for (token, row) in gradient.chunks(VOCAB).enumerate() {
                assert!(row.iter().all(|g| g.is_nan() == (token == 3)), "{token}: {row:?}");
            }
        }
    }
}
