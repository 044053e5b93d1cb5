//! The entropies of one model's distributions, against their definition in float64.

use atkd::{Error, Logits, Result, cpu};
use half::{bf16, f16};

const VOCAB: usize = 1203;
const TEMPERATURES: [f64; 4] = [0.05, 1.0, 1.7, 10.0];

type Backend = fn(Logits, f64) -> Result<Vec<f32>>;

const BACKENDS: &[Backend] = &[
    cpu::token_entropies,
    #[cfg(feature = "simt")]
    |logits, temperature| {
        Ok(atkd::simt::Simulation::default().token_entropies(logits, temperature)?.0)
    },
];

/// -sum p log p, p of logits whose largest is subtracted.
fn definition(row: &[f32], temperature: f64) -> f64 {
    let scaled: Vec<f64> = row.iter().map(|&z| f64::from(z) / temperature).collect();
    let max = scaled.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = scaled.iter().map(|z| (z - max).exp()).sum();
    let log_p = scaled.iter().map(|z| z - max - sum.ln());
    log_p.filter(|log| log.is_finite()).map(|log| -log.exp() * log).sum()
}

/// Rows from one that is all equal to one of a logit that stands alone, shifted, masked, and with equals among the
/// largest.
fn rows() -> Vec<f32> {
    let mut random = fastrand::Rng::with_seed(5);
    let mut rows = Vec::new();
    for (spread, shift) in [(0.0, 3.0), (1.0, 0.0), (6.0, -1e3), (30.0, 1e3), (6.0, 0.0)] {
        rows.push((0..VOCAB).map(|_| shift + spread * random.f32()).collect::<Vec<f32>>());
    }
    for (logit, mask) in [(7.0, f32::NEG_INFINITY), (0.0, -1e4), (3e38, f32::MIN), (25.0, -1e30)] {
        let mut row: Vec<f32> = (0..VOCAB).map(|_| random.f32()).collect();
        row[3..600].fill(mask);
        row[[0, 700, VOCAB - 1][rows.len() % 3]] = logit;
        rows.push(row);
    }
    let mut pair = vec![f32::NEG_INFINITY; VOCAB];
    pair[17] = -5.0;
    pair[1111] = -5.0;
    rows.push(pair);
    rows.push(vec![bf16::MIN.to_f32(); VOCAB]);
    rows.concat()
}

#[test]
fn entropies_are_those_of_the_definition() {
    let logits = rows();
    let tokens = logits.len() / VOCAB;
    let narrow: Vec<bf16> = logits.iter().map(|&z| bf16::from_f32(z)).collect();
    let half: Vec<f16> = logits.iter().map(|&z| f16::from_f32(z.clamp(-6e4, 6e4))).collect();
    let rounded = [
        logits.clone(),
        narrow.iter().map(|z| z.to_f32()).collect(),
        half.iter().map(|z| z.to_f32()).collect(),
    ];
    let views = [
        Logits::new(&logits, tokens, VOCAB).unwrap(),
        Logits::new(&narrow, tokens, VOCAB).unwrap(),
        Logits::new(&half, tokens, VOCAB).unwrap(),
    ];
    for backend in BACKENDS {
        for (view, values) in views.iter().zip(&rounded) {
            for temperature in TEMPERATURES {
                let found = backend(*view, temperature).unwrap();
                for (token, (&found, row)) in found.iter().zip(values.chunks(VOCAB)).enumerate() {
                    let exact = definition(row, temperature);
                    let off = (f64::from(found) - exact).abs();
                    assert!(off <= 2e-6 * (1.0 + exact), "{token}: {found}, but exactly {exact}");
                }
            }
        }
    }
}

/// The entropy e^-x (1 + x) of a logit that is x above one other keeps its digits however small it is.
#[test]
fn the_sure_keep_their_digits() {
    for backend in BACKENDS {
        for gap in [5.0_f32, 20.0, 60.0] {
            let row = [gap, 0.0];
            let found = f64::from(backend(Logits::new(&row[..], 1, 2).unwrap(), 1.0).unwrap()[0]);
            let (x, rest) = (f64::from(gap), (-f64::from(gap)).exp());
            let exact = rest.ln_1p() + rest * x / (1.0 + rest);
            assert!((found - exact).abs() <= 5e-6 * exact, "{gap}: {found}, but exactly {exact}");
        }
    }
}

#[test]
fn what_is_no_distribution_has_no_entropy() {
    for backend in BACKENDS {
        for row in [
            [0.0, f32::NAN, 1.0],
            [f32::NAN, 0.0, 1.0],
            [0.0, f32::INFINITY, 1.0],
            [f32::INFINITY, f32::INFINITY, 1.0],
            [f32::NEG_INFINITY; 3],
        ] {
            let found = backend(Logits::new(&row[..], 1, 3).unwrap(), 1.0).unwrap()[0];
            assert!(found.is_nan(), "{row:?}: {found}");
        }
        let one = backend(Logits::new(&[4.0_f32][..], 1, 1).unwrap(), 1.0).unwrap();
        assert_eq!(one, [0.0]);
        let none = [0.0_f32; 0];
        assert!(backend(Logits::new(&none[..], 0, 3).unwrap(), 1.0).unwrap().is_empty());
        for temperature in [0.0, -1.0, f64::NAN, 1e-31] {
            let error =
                backend(Logits::new(&[0.0_f32; 3][..], 1, 3).unwrap(), temperature).unwrap_err();
            assert!(matches!(error, Error::Setting { name: "the temperature", .. }), "{error}");
        }
    }
}

#[cfg(feature = "simt")]
#[test]
fn the_kernel_reads_each_logit_once() {
    let logits = rows();
    let view = Logits::new(&logits, logits.len() / VOCAB, VOCAB).unwrap();
    let (_, traffic) = atkd::simt::Simulation::default().token_entropies(view, 1.0).unwrap();
    let [(_, buffers)] = &traffic[..] else { panic!("one launch") };
    assert_eq!(buffers[0].read, (logits.len() * size_of::<f32>()) as u64);
}
