//! A call by address on the CPU, as other languages make it.

use atkd::call::{RawCall, RawLabels, RawLogits, RawOutput};
use atkd::cpu::raw;
use atkd::{Dtype, Objective};

pub const VOCAB: usize = 1000;

/// Random logits `[tokens, VOCAB]`, and labels.
pub struct Data {
    pub teacher: Vec<f32>,
    pub student: Vec<f32>,
    pub labels: Vec<i64>,
}

impl Data {
    pub fn new(tokens: usize) -> Self {
        let mut random = fastrand::Rng::with_seed(9);
        let mut logits = || (0..tokens * VOCAB).map(|_| 6.0 * random.f32()).collect();
        let (teacher, student) = (logits(), logits());
        Self { teacher, student, labels: (0..tokens as i64).collect() }
    }

    /// The loss and the gradient `[tokens, VOCAB]`, on a pool's threads, or those of rayon's current pool.
    pub fn run(&self, pool: Option<&rayon::ThreadPool>) -> (f32, Vec<f32>) {
        let logits = |address: *const f32| RawLogits {
            address: address as u64,
            dtype: Dtype::F32,
            strides: VOCAB.into(),
        };
        let mut gradient = vec![f32::NAN; self.student.len()];
        let call = RawCall {
            tokens: self.labels.len(),
            vocab: VOCAB,
            teacher: logits(self.teacher.as_ptr()),
            student: logits(self.student.as_ptr()),
            gradient: Some(logits(gradient.as_mut_ptr())),
            gradient_padding: 0,
            labels: Some(RawLabels::I64(self.labels.as_ptr() as u64)),
            sequences: None,
            margins: None,
            hard: None,
            token_weights: None,
            temperatures: None,
            upstream: None,
        };
        let mut loss = f32::NAN;
        let output = RawOutput { loss: Some(&raw mut loss as u64), ..RawOutput::default() };
        // SAFETY: the addresses are those of arrays of the shapes given.
        unsafe { raw::run(pool, &Objective::default(), &call, &output).unwrap() };
        (loss, gradient)
    }
}
