use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, bail};
use atkd::{Batch, Dtype, Elements, Objective, cpu, unfused};
use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressStyle};
use rayon::prelude::*;
use serde_json::json;

use crate::backend::Backend;
use crate::tensors::Matrix;

/// Time the fused loss and gradient against the unfused one.
///
/// GB/s counts three volumes (teacher and student read, gradient written; two for the loss alone),
/// whatever a variant really moves, and is compared with what copying memory reaches here and now.
#[derive(clap::Args)]
pub struct Args {
    /// What is timed
    #[arg(long, value_enum, default_value = "auto")]
    backend: Backend,
    /// Rows
    #[arg(long, default_value_t = 256)]
    tokens: usize,
    /// Logits in a row
    #[arg(long, default_value_t = 32000)]
    vocab: usize,
    /// Of both models and the gradient
    #[arg(long, value_enum, default_value = "f32", ignore_case = true)]
    dtype: DtypeName,
    /// Runs of each variant; the median counts
    #[arg(long, default_value_t = 15)]
    runs: usize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum DtypeName {
    F32,
    F16,
    Bf16,
}

struct Timing {
    variant: &'static str,
    seconds: f64,
    volumes: usize,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    let backend = args.backend.resolve()?;
    let (tokens, vocab) = (args.tokens, args.vocab);
    let dtype = match args.dtype {
        DtypeName::F32 => Dtype::F32,
        DtypeName::F16 => Dtype::F16,
        DtypeName::Bf16 => Dtype::Bf16,
    };
    if tokens == 0 || vocab < 2 || args.runs == 0 {
        bail!(
            "a benchmark needs at least one token, two logits and one run, but was given --tokens \
             {tokens} --vocab {vocab} --runs {}",
            args.runs
        );
    }
    let Some(volume) = tokens.checked_mul(vocab).and_then(|count| count.checked_mul(dtype.size()))
    else {
        bail!("--tokens {tokens} times --vocab {vocab} does not fit into memory");
    };

    let mut random = fastrand::Rng::with_seed(1);
    let mut logits = || {
        let mut matrix = Matrix::zeros(dtype, tokens, vocab);
        matrix.fill(|_| 6.0 * (random.f32() + random.f32() + random.f32() - 1.5));
        matrix
    };
    let (teacher, student, mut gradient) = (logits(), logits(), logits());
    let labels: Vec<usize> = (0..tokens).map(|i| i * 7919 % vocab).collect();
    let wide: Vec<i64> = labels.iter().map(|&label| label as i64).collect();
    let objective = Objective::default();
    let batch = Batch::new(teacher.logits()?, &wide)?;
    let student_logits = student.logits()?;

    let unfused_too = backend == Backend::Cpu && dtype != Dtype::F16;
    let steps = args.runs as u64 * (4 + u64::from(unfused_too));
    let bar = ProgressBar::new(steps)
        .with_style(ProgressStyle::with_template("{bar:40} {pos}/{len} runs, {eta} left  {msg}")?);
    let copy = copy_gb_per_s(args.runs, &bar);
    let mut timings = Vec::new();
    let mut time = |variant, volumes, work: &mut dyn FnMut() -> Result<()>| -> Result<()> {
        let seconds = median(args.runs, &bar, variant, work)?;
        timings.push(Timing { variant, seconds, volumes });
        Ok(())
    };
    time("fused", 3, &mut || {
        let gradient = gradient.logits_mut()?;
        backend.forward_backward(&objective, &batch, student_logits, gradient)?;
        Ok(())
    })?;
    if backend == Backend::Cpu {
        let mut student = gradient;
        time("fused in place", 3, &mut || {
            cpu::forward_backward_in_place(&objective, &batch, student.logits_mut()?)?;
            Ok(())
        })?;
    }
    time("loss alone", 2, &mut || backend.forward(&objective, &batch, student_logits).map(drop))?;
    if unfused_too {
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
    }
    bar.finish_and_clear();
    report(args, backend, dtype, volume, copy, &timings)?;
    Ok(ExitCode::SUCCESS)
}

fn report(
    args: &Args,
    backend: Backend,
    dtype: Dtype,
    volume: usize,
    copy: f64,
    timings: &[Timing],
) -> Result<()> {
    let threads = rayon::current_num_threads();
    let device = format!("{} threads, {}", threads, cpu::instruction_set());
    let rate = |timing: &Timing| (timing.volumes * volume) as f64 / timing.seconds / 1e9;
    if args.json {
        let results: Vec<_> = timings
            .iter()
            .map(|timing| {
                json!({
                    "variant": timing.variant,
                    "tokens": args.tokens,
                    "vocab": args.vocab,
                    "dtype": dtype.to_string(),
                    "median_ms": timing.seconds * 1e3,
                    "gb_per_s": rate(timing),
                    "share_of_copy": rate(timing) / copy,
                })
            })
            .collect();
        let object = json!({
            "device": device,
            "backend": backend.name(),
            "copy_gb_per_s": copy,
            "results": results,
        });
        return crate::print(&object.to_string());
    }
    let fused = timings[0].seconds;
    let mut table =
        crate::table(&["variant", "median ms", "GB/s", "share of copy", "times the fused time"]);
    for timing in timings {
        table.add_row([
            timing.variant.to_string(),
            format!("{:.2}", timing.seconds * 1e3),
            format!("{:.1}", rate(timing)),
            format!("{:.0}%", 100.0 * rate(timing) / copy),
            format!("{:.2}", timing.seconds / fused),
        ]);
    }
    crate::print(&format!(
        "{} x {} {dtype}, {}: {device}; copying memory reaches {copy:.1} GB/s\n",
        args.tokens,
        args.vocab,
        backend.name()
    ))?;
    crate::print(&table.trim_fmt())
}

/// The median time of `runs` runs, in seconds, after one that does not count.
fn median(
    runs: usize,
    bar: &ProgressBar,
    variant: &'static str,
    work: &mut dyn FnMut() -> Result<()>,
) -> Result<f64> {
    bar.set_message(variant);
    work()?;
    let mut times = Vec::with_capacity(runs);
    for _ in 0..runs {
        let start = Instant::now();
        work()?;
        times.push(start.elapsed().as_secs_f64());
        bar.inc(1);
    }
    times.sort_by(f64::total_cmp);
    Ok(times[runs / 2])
}

/// Bytes read and written a second when all threads copy memory that no cache holds.
fn copy_gb_per_s(runs: usize, bar: &ProgressBar) -> f64 {
    const BYTES: usize = 256 << 20;
    let from = vec![1_u8; BYTES];
    let mut to = vec![0_u8; BYTES];
    let chunk = BYTES / rayon::current_num_threads();
    let seconds = median(runs, bar, "copying memory", &mut || {
        to.par_chunks_mut(chunk)
            .zip(from.par_chunks(chunk))
            .for_each(|(to, from)| to.copy_from_slice(from));
        Ok(())
    })
    .expect("copying cannot fail");
    2.0 * BYTES as f64 / seconds / 1e9
}
