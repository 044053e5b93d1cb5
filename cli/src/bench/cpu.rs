//! The backends in host memory.

use std::time::Instant;

use anyhow::Result;
use atkd::{Batch, Dtype, Elements, Objective, cpu, unfused};
use indicatif::ProgressBar;
use rayon::prelude::*;

use super::{Measured, Size, Timing, begin, middle};
use crate::backend::Backend;
use crate::tensors::Matrix;

pub fn device() -> Result<String> {
    Ok(format!("{} threads, {}", rayon::current_num_threads(), cpu::instruction_set()?))
}

pub fn measure(backend: &Backend, size: Size, bar: &ProgressBar) -> Result<Measured> {
    let Size { tokens, vocab, dtype, .. } = size;
    let mut random = fastrand::Rng::with_seed(1);
    let mut logits = || -> Result<Matrix> {
        let mut matrix = Matrix::zeros(dtype, tokens, vocab)?;
        matrix.fill(|_| 6.0 * (random.f32() + random.f32() + random.f32() - 1.5));
        Ok(matrix)
    };
    let (teacher, student, mut gradient) = (logits()?, logits()?, logits()?);
    let labels: Vec<usize> = (0..tokens).map(|i| i * 7919 % vocab).collect();
    let wide: Vec<i64> = labels.iter().map(|&label| label as i64).collect();
    let objective = Objective::default();
    let batch = Batch::new(teacher.logits()?, &wide)?;
    let student_logits = student.logits()?;

    let copy = copy_bytes_per_second(size, bar)?;
    let mut timings = Vec::new();
    let mut skipped = Vec::new();
    let mut time = |variant: &str, volumes, work: &mut dyn FnMut() -> Result<()>| -> Result<()> {
        let seconds = timed(size, bar, variant, work)?;
        timings.push(Timing { variant: variant.into(), seconds, volumes });
        Ok(())
    };
    time("fused", 3, &mut || {
        let gradient = gradient.logits_mut()?;
        backend.forward_backward(&objective, &batch, student_logits, gradient)?;
        Ok(())
    })?;
    let is_cpu = matches!(backend, Backend::Cpu);
    if is_cpu {
        let mut student = gradient;
        time("fused in place", 3, &mut || {
            cpu::forward_backward_in_place(&objective, &batch, student.logits_mut()?)?;
            Ok(())
        })?;
    }
    time("loss alone", 2, &mut || {
        backend.forward(&objective, &batch, student_logits)?;
        Ok(())
    })?;
    if is_cpu && dtype != Dtype::F16 {
        time("unfused", 3, &mut || {
            match (teacher.logits()?.elements(), student_logits.elements()) {
                (Elements::F32(teacher), Elements::F32(student)) => {
                    unfused::forward_backward(teacher, student, &labels, vocab);
                }
                (Elements::Bf16(teacher), Elements::Bf16(student)) => {
                    unfused::forward_backward_bf16(teacher, student, &labels, vocab);
                }
                _ => unreachable!("the baseline is for these two"),
            }
            Ok(())
        })?;
    } else if is_cpu {
        skipped.push("unfused, which is for F32 and BF16 alone on the CPU".into());
    }
    Ok(Measured { size, copy, timings, skipped })
}

/// The median seconds of `work`, after a run that does not count.
fn timed(
    size: Size,
    bar: &ProgressBar,
    variant: &str,
    work: &mut dyn FnMut() -> Result<()>,
) -> Result<f64> {
    begin(size, bar, variant);
    work()?;
    let mut times = Vec::with_capacity(size.runs);
    for _ in 0..size.runs {
        let start = Instant::now();
        work()?;
        times.push(start.elapsed().as_secs_f64());
        bar.inc(1);
    }
    Ok(middle(times))
}

/// Bytes read and written a second when all threads copy memory that no cache holds.
fn copy_bytes_per_second(size: Size, bar: &ProgressBar) -> Result<f64> {
    const BYTES: usize = 256 << 20;
    let from = vec![1_u8; BYTES];
    let mut to = vec![0_u8; BYTES];
    let chunk = BYTES / rayon::current_num_threads();
    let seconds = timed(size, bar, "copying memory", &mut || {
        to.par_chunks_mut(chunk)
            .zip(from.par_chunks(chunk))
            .for_each(|(to, from)| to.copy_from_slice(from));
        Ok(())
    })?;
    Ok(2.0 * BYTES as f64 / seconds)
}
