//! The Rust of README.md compiles: each of its blocks is a function's body here, line by line, or the whole of one.
#![allow(
    unused_imports,
    unused_variables,
    dead_code,
    reason = "the blocks show what they are about, and no more"
)]

use std::error::Error;
use std::ops::Range;

use atkd::{Labels, Logits, LogitsMut, Objective};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

mod step {
    use atkd::{Batch, Logits, LogitsMut, Objective, cpu};

    fn step(
        teacher: &[f32],
        student: &mut [f32],
        labels: &[i64],
        vocab: usize,
    ) -> atkd::Result<f64> {
        let tokens = labels.len();
        let batch = Batch::new(Logits::new(teacher, tokens, vocab)?, labels)?;
        // In place: the gradient replaces the student's logits.
        let student = LogitsMut::new(student, tokens, vocab)?;
        let output = cpu::forward_backward_in_place(&Objective::default(), &batch, student)?;
        println!("{:?}", output.summary());
        Ok(output.loss)
    }
}

fn parts(
    (objective, batch, teacher, labels): (Objective, atkd::Batch, Logits, &[i64]),
    (all_margins, valid, part): (Vec<f32>, Vec<bool>, Range<usize>),
) -> Result<()> {
    use atkd::{Batch, cpu, select_hard};

    let margins = cpu::teacher_margins(&objective, &batch)?; // of each part: one number a token, to keep or to gather
    let hard = select_hard(&all_margins, Some(&valid), 0.5, None)?; // over all parts
    let batch = Batch::new(teacher, labels)?.with_hard(&hard[part])?; // each call gets its share, on the CPU or a GPU
    Ok(())
}

fn ranks(
    (objective, labels, vocab, first_column): (Objective, Vec<i64>, usize, usize),
    (teacher, student, gradient): (Logits, Logits, LogitsMut),
    (states, valid): (Vec<atkd::shards::RowState>, Vec<bool>),
) -> Result<()> {
    use atkd::{
        cpu::shards,
        shards::{Exchanged, Shard},
    };

    let shard = Shard::new(&labels, vocab, first_column)?; // labels are tokens of the whole vocabulary, and may be in any shard
    let own = shards::states(&objective, &shard, teacher, student)?;
    let exchanged = Exchanged::new(&states); // [ranks, tokens], gathered from all
    let margins = shards::margins(&objective, &shard, &exchanged)?;
    let hard = objective.select_hard(&margins, Some(&valid), None)?;
    let shard = shard.with_hard(&hard)?;
    shards::gradient(&objective, &shard, &exchanged, teacher, student, gradient)?; // of the rank's columns
    let output = shards::finish(&objective, &shard, &exchanged)?;
    Ok(())
}

mod sparse {
    use atkd::{Batch, Logits, LogitsMut, Objective, SparseTeacher, Tail, cpu};

    fn step(
        indices: &[i32],
        log_probs: &[f32],
        of_labels: &[f32],
        student: &mut [f32],
        labels: &[i64],
    ) -> atkd::Result<f64> {
        let (tokens, top_k, vocab) = (labels.len(), 64, 32_000);
        let teacher = SparseTeacher::new(indices, log_probs, tokens, top_k, vocab)? // [tokens, 64] both, -1 for no index
            .with_target_log_probs(of_labels)?; // where a label may be outside of the 64
        let batch = Batch::new(teacher.with_tail(Tail::Bucket), labels)?;
        let student = LogitsMut::new(student, tokens, vocab)?;
        Ok(cpu::forward_backward_in_place(&Objective::default(), &batch, student)?.loss)
    }
}

fn cache(
    (indices, log_probs, target_log_prob): (&[i32], &[f32], &[f32]),
    (tail_mass, labels): (Option<&[f32]>, &[i64]),
) -> Result<()> {
    use atkd::Dtype;
    use atkd::teacher_cache::{NewRows, Settings, TeacherCache, Writer};

    let mut writer = Writer::open("cache", &Settings::new(151_936, 64))?; // a killed run goes on at writer.tokens()
    writer.push(&NewRows {
        indices,
        log_probs,
        target_log_prob,
        tail_mass,
        labels,
        rounding: Dtype::F32,
    })?;
    writer.finish()?;
    let rows = TeacherCache::open("cache")?.read(1000..3048)?;
    Ok(())
}

#[cfg(feature = "head")]
fn head(
    (student_hidden, student_weight): (Vec<f32>, Vec<f32>),
    (teacher_hidden, teacher_weight, teacher_bias): (Vec<f32>, Vec<f32>, Vec<f32>),
    (mut of_hidden, mut of_weight): (Vec<f32>, Vec<f32>),
    (labels, vocab): (Vec<i64>, usize),
) -> Result<()> {
    use atkd::head::{self, Chunks, Gradients, Layer};
    use atkd::{Objective, cpu::Session};

    let student = Layer::new(&student_hidden, &student_weight, 2048)?; // [tokens, 2048] and [vocab, 2048]
    let teacher = Layer::new(&teacher_hidden, &teacher_weight, 4096)?.with_bias(&teacher_bias)?;
    let gradients = Gradients {
        hidden: Some((&mut of_hidden).into()),
        weight: Some(&mut of_weight),
        bias: None,
    };
    let session = Session::begin(&Objective::default(), &labels, vocab)?;
    let output = head::loss(session, &student, &teacher, Chunks::default(), gradients)?;
    Ok(())
}

#[cfg(feature = "candle")]
fn candle_hidden_states(
    (student_hidden, student_weight): (candle_core::Tensor, candle_core::Tensor),
    (teacher_hidden, teacher_weight): (candle_core::Tensor, candle_core::Tensor),
    labels: candle_core::Tensor,
) -> Result<()> {
    use atkd::candle::{Layer, linear_loss};
    use atkd::head::Chunks;

    let student = Layer::new(&student_hidden, &student_weight); // [batch, time, H] and [vocab, H]
    let teacher = Layer::new(&teacher_hidden, &teacher_weight);
    let loss = linear_loss(&Objective::default(), student, teacher, &labels, Chunks::default())?;
    Ok(())
}

#[cfg(feature = "candle")]
fn candle_step(
    (student, teacher): (impl candle_nn::Module, impl candle_nn::Module),
    (tokens, labels): (candle_core::Tensor, candle_core::Tensor),
    mut optimizer: impl candle_nn::Optimizer,
) -> Result<()> {
    use atkd::{Objective, candle::loss};

    let student_logits = student.forward(&tokens)?; // [batch, time, vocab], F32, F16 or BF16
    let teacher_logits = teacher.forward(&tokens)?.detach();
    let loss = loss(&Objective::default(), &student_logits, &teacher_logits, &labels)?;
    optimizer.backward_step(&loss)?;
    Ok(())
}

#[cfg(all(feature = "cuda", feature = "head"))]
fn device_head(
    (stream, mut workspace): (std::sync::Arc<cudarc::driver::CudaStream>, atkd::cuda::Workspace),
    [student_hidden, student_weight]: [cudarc::driver::CudaSlice<f32>; 2],
    (teacher, gradients): (atkd::cuda::DeviceLayer, atkd::cuda::DeviceGradients),
    (objective, labels, vocab): (Objective, cudarc::driver::CudaSlice<i64>, usize),
) -> Result<()> {
    use atkd::cuda::{self, DeviceLayer, DeviceTokens};

    let mut head = cuda::Head::new(&stream)?; // .with_chunks(Chunks::Memory(1 << 30))
    let student = DeviceLayer::new(&student_hidden, &student_weight, 2048)?;
    let tokens = DeviceTokens::new(&labels, vocab);
    let workspace = head.loss(&mut workspace, &objective, tokens, &student, &teacher, gradients)?;
    Ok(())
}

#[cfg(feature = "cuda")]
fn device(
    (teacher, mut student): (cudarc::driver::CudaSlice<f32>, cudarc::driver::CudaSlice<f32>),
    (labels, tokens, vocab): (cudarc::driver::CudaSlice<i64>, usize, usize),
) -> Result<()> {
    use atkd::Objective;
    use atkd::cuda::{self, DeviceBatch, DeviceLogits, DeviceLogitsMut, Kernels, Workspace};

    let context = cuda::context(0)?;
    let stream = context.default_stream();
    let kernels = Kernels::load(&context)?;
    let mut workspace = Workspace::new(&kernels, &stream, tokens)?; // once; 33 bytes a token, 100 KB

    let batch = DeviceBatch::new(DeviceLogits::new(&teacher, tokens, vocab)?, &labels)?;
    let student = DeviceLogitsMut::new(&mut student, tokens, vocab)?;
    workspace.forward_backward_in_place(&stream, &Objective::default(), &batch, student, None)?;
    Ok(())
}

/// Lines without what indents them.
fn lines(text: &str) -> Vec<&str> {
    text.lines().map(str::trim).filter(|line| !line.is_empty()).collect()
}

#[test]
fn every_block_is_compiled_here() {
    let here = lines(include_str!("readme.rs"));
    let mut blocks = include_str!("../README.md").split("```rust\n").skip(1).peekable();
    assert!(blocks.peek().is_some());
    for block in blocks {
        let (code, _) = block.split_once("```").unwrap();
        let block = lines(code);
        assert!(
            here.windows(block.len()).any(|part| part == block),
            "not in tests/readme.rs:\n{code}"
        );
    }
}
