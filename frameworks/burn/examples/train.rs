//! Distils a teacher into a smaller student, on tokens of a made-up language: `cargo run --release --example train`.
//! Prints the loss, and fails unless it falls below half of what it was.

use atkd::Objective;
use atkd_burn::loss;
use burn::module::Module;
use burn::nn::{Embedding, EmbeddingConfig, Linear, LinearConfig};
use burn::optim::{AdamConfig, GradientsParams};
use burn::tensor::{Device, Distribution, Int, Tensor};

const VOCAB: usize = 200;

/// A model that predicts the next token from the last.
#[derive(Module, Debug)]
struct Model {
    embedding: Embedding,
    head: Linear,
}

impl Model {
    fn new(width: usize, device: &Device) -> Self {
        Self {
            embedding: EmbeddingConfig::new(VOCAB, width).init(device),
            head: LinearConfig::new(width, VOCAB).init(device),
        }
    }

    /// Logits `[batch, time, vocab]` of tokens `[batch, time]`.
    fn forward(&self, tokens: Tensor<2, Int>) -> Tensor<3> {
        self.head.forward(self.embedding.forward(tokens))
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let device = Device::flex();
    device.seed(1);
    let teacher = Model::new(64, &device);
    let device = device.autodiff();
    let mut student = Model::new(16, &device);
    let mut optimizer = AdamConfig::new().init();
    let objective = Objective::default().with_ce_weight(0.1)?;

    let (mut first, mut last) = (None, f32::INFINITY);
    for step in 0..200 {
        let sizes = Distribution::Uniform(0.0, VOCAB as f64);
        let tokens = Tensor::<2>::random([4, 16], sizes, &Device::flex()).int();
        let teacher_logits = teacher.forward(tokens.clone()).mul_scalar(4.0);
        // The language is what the teacher thinks likeliest.
        let labels = teacher_logits.clone().argmax(2).squeeze_dim::<2>(2);
        let loss = loss(&objective, student.forward(tokens), teacher_logits, labels)?;
        last = loss.clone().into_scalar::<f32>();
        first.get_or_insert(last);
        if step % 20 == 0 {
            println!("step {step:3}: loss {last:.4}");
        }
        let gradients = GradientsParams::from_grads(loss.backward(), &student);
        student = optimizer.step(1e-2, student, gradients);
    }
    let first = first.expect("there were steps");
    println!("after them: loss {last:.4}");
    if last < first / 2.0 { Ok(()) } else { Err(format!("it was {first:.4} before").into()) }
}
