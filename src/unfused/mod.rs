//! A model of what the ATKD loss costs in an eager framework: one operation a pass, each with a full-size result, and
//! the backward steps of each in turn. For benchmarks of time only, where it is compared with [`cpu`](crate::cpu).
//!
//! It is no baseline of accuracy. Its logarithms and quotients have an epsilon of 1e-8, by which the zeros at the
//! target stay finite; no public implementation has it, and at real vocabularies it is an error of percents.
//! `benches/pytorch_baseline.py` has what people run, and `python/benchmarks/compare.py` its errors.

#[cfg(any(feature = "cuda", feature = "simt"))]
pub(crate) mod device;

use half::bf16;
use rayon::prelude::*;

/// Keeps log(0) and 0 / 0 out of the steps.
const EPSILON: f32 = 1e-8;

/// A matrix `[tokens, vocab]`, the result of one operation.
struct Matrix {
    data: Vec<f32>,
    vocab: usize,
}

impl Matrix {
    /// One pass over `self`, row by row; `f` sees the row's index.
    fn map(&self, f: impl Fn(usize, f32) -> f32 + Sync) -> Self {
        let mut data = vec![0.0; self.data.len()];
        let rows = data.par_chunks_mut(self.vocab).zip(self.data.par_chunks(self.vocab));
        rows.enumerate().for_each(|(i, (out, row))| {
            out.iter_mut().zip(row).for_each(|(out, &x)| *out = f(i, x));
        });
        Self { data, vocab: self.vocab }
    }

    /// One pass over both.
    fn zip(&self, other: &Self, f: impl Fn(usize, f32, f32) -> f32 + Sync) -> Self {
        let mut data = vec![0.0; self.data.len()];
        let rows = self.data.par_chunks(self.vocab).zip(other.data.par_chunks(self.vocab));
        data.par_chunks_mut(self.vocab).zip(rows).enumerate().for_each(|(i, (out, (a, b)))| {
            out.iter_mut().zip(a.iter().zip(b)).for_each(|(out, (&a, &b))| *out = f(i, a, b));
        });
        Self { data, vocab: self.vocab }
    }

    fn reduce(&self, f: impl Fn(&[f32]) -> f32 + Send + Sync) -> Vec<f32> {
        self.data.par_chunks(self.vocab).map(f).collect()
    }

    fn sum(&self) -> Vec<f32> {
        self.reduce(|row| {
            let lanes = row.chunks(8).fold([0.0_f32; 8], |mut lanes, chunk| {
                lanes.iter_mut().zip(chunk).for_each(|(lane, x)| *lane += x);
                lanes
            });
            lanes.iter().sum()
        })
    }

    fn softmax(&self) -> Self {
        let max = self.reduce(|row| row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        let exponentials = self.map(|i, z| (z - max[i]).exp());
        let sum = exponentials.sum();
        exponentials.map(|i, e| e / sum[i])
    }

    fn gather(&self, labels: &[usize]) -> Vec<f32> {
        labels.iter().enumerate().map(|(i, &j)| self.data[i * self.vocab + j]).collect()
    }
}

/// The ATKD loss (lambda 0.2, hard ratio 0.5, mean over the tokens) and its gradient with respect to
/// the student's logits, of float32 logits `[tokens, vocab]`.
///
/// # Panics
/// If a label is not below `vocab`, or the slices do not hold a row for each label.
pub fn forward_backward(
    teacher: &[f32],
    student: &[f32],
    labels: &[usize],
    vocab: usize,
) -> (f32, Vec<f32>) {
    let tokens = labels.len();
    assert!(teacher.len() == tokens * vocab && student.len() == tokens * vocab);
    let matrix = |data: &[f32]| Matrix { data: data.to_vec(), vocab };
    let p = matrix(teacher).softmax();
    let q = matrix(student).softmax();
    let (p_target, q_target) = (p.gather(labels), q.gather(labels));
    let uncertainty: Vec<f32> = p_target.iter().map(|p| 1.0 - p).collect();
    let rest: Vec<f32> = q_target.iter().map(|q| 1.0 - q).collect();
    let mut mask = Matrix { data: vec![1.0; tokens * vocab], vocab };
    for (i, &j) in labels.iter().enumerate() {
        mask.data[i * vocab + j] = 0.0;
    }
    let p_others = p.zip(&mask, |_, p, m| p * m);
    let q_others = q.zip(&mask, |_, q, m| q * m);
    let p_hat = p_others.map(|i, p| p / (uncertainty[i] + EPSILON));
    let q_hat = q_others.map(|i, q| q / (rest[i] + EPSILON));
    let log_p = p_hat.map(|_, p| (p + EPSILON).ln());
    let log_q = q_hat.map(|_, q| (q + EPSILON).ln());
    let gap = log_p.zip(&log_q, |_, p, q| p - q);
    let dkd = p_hat.zip(&gap, |_, p, gap| p * gap).sum();
    let log = |x: f32| (x + EPSILON).ln();
    let tkd = |i: usize| {
        p_target[i] * (log(p_target[i]) - log(q_target[i]))
            + uncertainty[i] * (log(uncertainty[i]) - log(rest[i]))
    };

    let mut ranked: Vec<usize> = (0..tokens).collect();
    ranked.sort_by(|&i, &j| uncertainty[j].total_cmp(&uncertainty[i]));
    let mut hard = vec![false; tokens];
    ranked[..tokens.div_ceil(2)].iter().for_each(|&i| hard[i] = true);
    let (c_tkd, c_dkd): (Vec<f32>, Vec<f32>) =
        hard.iter().map(|&hard| if hard { (0.8, 0.8) } else { (0.0, 0.2) }).unzip();
    let loss =
        (0..tokens).map(|i| c_tkd[i] * tkd(i) + c_dkd[i] * dkd[i]).sum::<f32>() / tokens as f32;

    // Backwards, step by step.
    let scale = 1.0 / tokens as f32;
    let d_log_q = p_hat.map(|i, p| -c_dkd[i] * scale * p);
    let d_q_hat = d_log_q.zip(&q_hat, |_, d, q| d / (q + EPSILON));
    let d_q_others = d_q_hat.map(|i, d| d / (rest[i] + EPSILON));
    let d_rest = d_q_hat
        .zip(&q_others, |i, d, q| -d * q / ((rest[i] + EPSILON) * (rest[i] + EPSILON)))
        .sum();
    let mut d_q = d_q_others.zip(&mask, |_, d, m| d * m);
    for (i, &j) in labels.iter().enumerate() {
        let d_tkd = p_target[i] / (q_target[i] + EPSILON) - uncertainty[i] / (rest[i] + EPSILON);
        d_q.data[i * vocab + j] -= c_tkd[i] * scale * d_tkd + d_rest[i];
    }
    let dot = d_q.zip(&q, |_, d, q| d * q).sum();
    let gradient = q.zip(&d_q, |i, q, d| q * (d - dot[i]));
    (loss, gradient.data)
}

/// [`forward_backward`] for bfloat16, which frameworks widen first and whose gradient they narrow.
///
/// # Panics
/// As [`forward_backward`] does.
pub fn forward_backward_bf16(
    teacher: &[bf16],
    student: &[bf16],
    labels: &[usize],
    vocab: usize,
) -> (f32, Vec<bf16>) {
    let widen = |v: &[bf16]| -> Vec<f32> { v.par_iter().map(|z| z.to_f32()).collect() };
    let (loss, gradient) = forward_backward(&widen(teacher), &widen(student), labels, vocab);
    (loss, gradient.par_iter().map(|&g| bf16::from_f32(g)).collect())
}
