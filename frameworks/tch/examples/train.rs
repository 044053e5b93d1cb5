//! Distils a teacher into a smaller student, on tokens of a made-up language. Prints the loss, and fails unless it falls
//! below half of what it was.

use atkd::Objective;
use atkd_tch::loss;
use tch::nn::{self, Module, OptimizerConfig};
use tch::{Device, Kind, Tensor};

const VOCAB: i64 = 200;

/// A model that predicts the next token from the last.
fn model(path: nn::Path, width: i64) -> impl Module {
    nn::seq()
        .add(nn::embedding(&path / "embedding", VOCAB, width, Default::default()))
        .add(nn::linear(&path / "head", width, VOCAB, Default::default()))
}

fn main() -> atkd_tch::Result<()> {
    tch::manual_seed(1);
    let frozen = nn::VarStore::new(Device::Cpu);
    let teacher = model(frozen.root(), 64);
    let trained = nn::VarStore::new(Device::Cpu);
    let student = model(trained.root(), 16);
    let mut optimizer = nn::Adam::default().build(&trained, 1e-2)?;
    let objective = Objective::default().with_ce_weight(0.1)?;

    let (mut first, mut last) = (None, f64::INFINITY);
    for step in 0..200 {
        let tokens = Tensor::randint(VOCAB, [4, 16], (Kind::Int64, Device::Cpu));
        let teacher_logits = tch::no_grad(|| teacher.forward(&tokens));
        // The language is what the teacher thinks likeliest.
        let labels = teacher_logits.argmax(-1, false);
        let loss = loss(&objective, &student.forward(&tokens), &teacher_logits, &labels)?;
        last = loss.double_value(&[]);
        first.get_or_insert(last);
        if step % 20 == 0 {
            println!("step {step:3}: loss {last:.4}");
        }
        optimizer.backward_step(&loss);
    }
    let first = first.expect("there were steps");
    println!("after them: loss {last:.4}");
    if last < first / 2.0 { Ok(()) } else { Err(format!("it was {first:.4} before").into()) }
}
