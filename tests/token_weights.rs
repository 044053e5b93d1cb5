//! A token's weight multiplies its loss and its gradient, and changes nothing else.

use atkd::{Batch, Logits, LogitsMut, Objective, Output, Reduction, Result, cpu, reference};

const TOKENS: usize = 7;
const VOCAB: usize = 40;
const LABELS: [i64; TOKENS] = [3, 39, -100, 0, 17, 9, 9];
const WEIGHTS: [f32; TOKENS] = [2.0, 0.5, 3.0, 0.0, -1.0, 0.25, 4.0];

type Backend = fn(&Objective, &Batch, Logits) -> Result<(Output, Vec<f64>)>;

fn on_cpu(objective: &Objective, batch: &Batch, student: Logits) -> Result<(Output, Vec<f64>)> {
    let mut gradient = vec![9.0_f32; TOKENS * VOCAB];
    let to = LogitsMut::new(&mut gradient, TOKENS, VOCAB)?;
    let output = cpu::forward_backward(objective, batch, student, to)?;
    Ok((output, gradient.into_iter().map(f64::from).collect()))
}

#[cfg(feature = "simt")]
fn simulated(objective: &Objective, batch: &Batch, student: Logits) -> Result<(Output, Vec<f64>)> {
    use atkd::simt::{Extra, Simulation};
    let mut gradient = vec![9.0_f32; TOKENS * VOCAB];
    let mut to = LogitsMut::new(&mut gradient, TOKENS, VOCAB)?;
    let extra = Extra::default();
    let (output, _) = Simulation::default().run(objective, batch, student, Some(&mut to), extra)?;
    Ok((output, gradient.into_iter().map(f64::from).collect()))
}

#[test]
fn weights_multiply_losses_and_gradients() {
    let mut random = fastrand::Rng::with_seed(3);
    let mut logits = || (0..TOKENS * VOCAB).map(|_| 6.0 * random.f32()).collect::<Vec<_>>();
    let (teacher, student) = (logits(), logits());
    let view = |logits| Logits::new(logits, TOKENS, VOCAB).unwrap();
    let plain = Batch::new(view(&teacher), &LABELS).unwrap();
    let weighted = plain.with_token_weights(&WEIGHTS).unwrap();
    let backends: &[Backend] = &[
        reference::forward_backward,
        on_cpu,
        #[cfg(feature = "simt")]
        simulated,
    ];
    for reduction in [Reduction::Sum, Reduction::Mean, Reduction::GroupMean] {
        let objective = Objective::default().with_reduction(reduction).unwrap();
        let objective = objective.with_ce_weight(0.5).unwrap();
        for backend in backends {
            let (before, gradient) = backend(&objective, &plain, view(&student)).unwrap();
            let (after, weighted) = backend(&objective, &weighted, view(&student)).unwrap();
            let (mut sum, mut largest) = (0.0, 0.0_f64);
            for (i, weight) in WEIGHTS.map(f64::from).into_iter().enumerate() {
                let [before, after] = [before.tokens[i], after.tokens[i]];
                assert_eq!((before.hard, before.valid), (after.hard, after.valid));
                assert_eq!((before.tkd, before.dkd), (after.tkd, after.dkd));
                assert!((weight * before.loss - after.loss).abs() < 1e-12);
                sum += after.loss;
                let row = i * VOCAB..(i + 1) * VOCAB;
                for (before, after) in gradient[row.clone()].iter().zip(&weighted[row]) {
                    largest = largest.max((weight * before - after).abs());
                }
            }
            assert!(largest < 1e-6, "{largest} {reduction:?}");
            // The mean is over the valid tokens, whatever they weigh.
            match reduction {
                Reduction::Sum => assert!((after.loss - sum).abs() < 1e-6),
                Reduction::Mean => assert!((after.loss - sum / 6.0).abs() < 1e-6),
                _ => {}
            }
        }
    }
}

#[test]
fn one_weight_per_token() {
    let teacher = [0.0; TOKENS * VOCAB];
    let batch = Batch::new(Logits::new(&teacher[..], TOKENS, VOCAB).unwrap(), &LABELS).unwrap();
    let error = batch.with_token_weights(&WEIGHTS[1..]).unwrap_err().to_string();
    for part in ["token weights", "6", "7"] {
        assert!(error.contains(part), "{error}");
    }
}
