mod cpu;
mod cuda;
mod plot;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use atkd::Dtype;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use crate::backend::{Backend, Choice, RowKernelArgs};
use crate::output;
use crate::tensors::DtypeName;

/// Time the fused loss and gradient against the unfused one.
///
/// GB/s counts volumes, [tokens, vocab] elements: three for loss and gradient (teacher and student read,
/// gradient written), two for the loss alone, whatever a variant really moves; four for a CUDA call in place,
/// whose selection reads the teacher once more. It is compared with what copying memory reaches here and now.
/// Elsewhere a CUDA call guesses its selection from the call before, here the same batch, and so is right. In
/// training some rows are guessed wrong and done once more.
///
/// Example: atkd bench --backend cuda --tokens 2048,8192 --vocab 32000,128256 --dtype bf16 --save results
#[derive(clap::Args)]
pub struct Args {
    /// The backend to time
    #[arg(long, value_enum, default_value = "auto")]
    backend: Choice,
    #[command(flatten)]
    row_kernel: RowKernelArgs,
    /// Rows; several sizes with commas between
    #[arg(long, value_delimiter = ',', default_value = "256")]
    tokens: Vec<usize>,
    /// Logits in a row; several sizes with commas between
    #[arg(long, value_delimiter = ',', default_value = "32000")]
    vocab: Vec<usize>,
    /// The type of both models' logits and of the gradient
    #[arg(long, value_enum, default_value = "f32", ignore_case = true)]
    dtype: DtypeName,
    /// Runs of each variant, up to a million; the median counts
    #[arg(long, default_value_t = 15)]
    runs: usize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Also write bench.json, bench.md with the table, and bench.svg, GB/s over V, into this folder
    #[arg(long, value_name = "FOLDER")]
    save: Option<PathBuf>,
}

/// Their times are kept.
const MOST_RUNS: usize = 1_000_000;

/// One size of a benchmark.
#[derive(Clone, Copy)]
struct Size {
    tokens: usize,
    vocab: usize,
    dtype: Dtype,
    runs: usize,
}

impl Size {
    fn volume(self) -> usize {
        self.tokens * self.vocab * self.dtype.size()
    }
}

struct Timing {
    variant: String,
    seconds: f64,
    /// [tokens, vocab] elements moved, or counted as moved.
    volumes: usize,
}

/// All variants at one size.
struct Measured {
    size: Size,
    /// Bytes read and written a second by a copy.
    copy: f64,
    timings: Vec<Timing>,
    /// Variants that were not timed, and why.
    skipped: Vec<String>,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    let backend = args.row_kernel.backend(args.backend)?;
    let dtype = args.dtype.dtype();
    if !(1..=MOST_RUNS).contains(&args.runs) {
        bail!("--runs is {}, but must be at least 1 and at most {MOST_RUNS}", args.runs);
    }
    let mut sizes = Vec::new();
    for &tokens in &args.tokens {
        for &vocab in &args.vocab {
            if tokens == 0 || vocab < 2 {
                bail!(
                    "a benchmark needs at least one token and two logits, but was given --tokens {tokens} \
                     --vocab {vocab}"
                );
            }
            let volume =
                tokens.checked_mul(vocab).and_then(|count| count.checked_mul(dtype.size()));
            if volume.is_none() {
                bail!("--tokens {tokens} times --vocab {vocab} does not fit into memory");
            }
            sizes.push(Size { tokens, vocab, dtype, runs: args.runs });
        }
    }

    if let Some(folder) = &args.save {
        // Told before anything is timed.
        std::fs::create_dir_all(folder)
            .and_then(|()| tempfile::tempfile_in(folder).map(drop))
            .with_context(|| format!("cannot write to {}", folder.display()))?;
    }
    let style = "{bar:40} {pos}/{len} runs, {eta} left  {msg}";
    let bar = ProgressBar::new(0).with_style(ProgressStyle::with_template(style)?);
    let device = match &backend {
        Backend::Cuda(kernels) => cuda::device(kernels)?,
        _ => cpu::device()?,
    };
    let measured = sizes
        .into_iter()
        .map(|size| match &backend {
            Backend::Cuda(kernels) => cuda::measure(kernels, size, &bar),
            _ => cpu::measure(&backend, size, &bar),
        })
        .collect::<Result<Vec<_>>>()?;
    bar.finish_and_clear();

    let json = json(&backend, &device, &measured).to_string();
    let table = table(&backend, &device, &measured);
    if let Some(folder) = &args.save {
        std::fs::write(folder.join("bench.json"), &json)
            .and_then(|()| std::fs::write(folder.join("bench.md"), &table))
            .with_context(|| format!("cannot write to {}", folder.display()))?;
        let title = format!("{device}, {dtype}");
        plot::save(&folder.join("bench.svg"), &title, &measured)
            .with_context(|| format!("cannot draw into {}", folder.display()))?;
    }
    output::print(if args.json { &json } else { &table })?;
    Ok(ExitCode::SUCCESS)
}

impl Measured {
    fn bytes_per_second(&self, timing: &Timing) -> f64 {
        (timing.volumes * self.size.volume()) as f64 / timing.seconds
    }
}

/// "copy_gb_per_s" is the first size's; every result has its own as well.
fn json(backend: &Backend, device: &str, measured: &[Measured]) -> serde_json::Value {
    let result = |at: &Measured, timing: &Timing| {
        json!({
            "variant": timing.variant,
            "tokens": at.size.tokens,
            "vocab": at.size.vocab,
            "dtype": at.size.dtype.to_string(),
            "median_ms": timing.seconds * 1e3,
            "volumes": timing.volumes,
            "gb_per_s": at.bytes_per_second(timing) / 1e9,
            "share_of_copy": at.bytes_per_second(timing) / at.copy,
            "copy_gb_per_s": at.copy / 1e9,
        })
    };
    let results: Vec<_> = measured
        .iter()
        .flat_map(|at| at.timings.iter().map(move |timing| result(at, timing)))
        .collect();
    let skipped: Vec<_> = measured.iter().flat_map(|at| &at.skipped).collect();
    json!({
        "device": device,
        "backend": backend.to_string(),
        "copy_gb_per_s": measured[0].copy / 1e9,
        "results": results,
        "skipped": skipped,
    })
}

/// In Markdown.
fn table(backend: &Backend, device: &str, measured: &[Measured]) -> String {
    let header = ["size", "variant", "median ms", "GB/s", "share of copy", "times the fused time"];
    let mut table = output::table(&header);
    table.load_style(comfy_table::presets::ASCII_MARKDOWN);
    for at in measured {
        for timing in &at.timings {
            let rate = at.bytes_per_second(timing);
            // Selection moves no volume.
            let (rate, share) = match timing.volumes {
                0 => ("".into(), "".into()),
                _ => (format!("{:.1}", rate / 1e9), format!("{:.0}%", 100.0 * rate / at.copy)),
            };
            table.add_row([
                format!("{} x {} {}", at.size.tokens, at.size.vocab, at.size.dtype),
                timing.variant.clone(),
                format!("{:.3}", timing.seconds * 1e3),
                rate,
                share,
                format!("{:.2}", timing.seconds / at.timings[0].seconds),
            ]);
        }
    }
    let copies: Vec<f64> = measured.iter().map(|at| at.copy / 1e9).collect();
    let most = copies.iter().fold(0.0_f64, |most, &copy| most.max(copy));
    let least = copies.iter().fold(f64::INFINITY, |least, &copy| least.min(copy));
    let mut text = format!(
        "{backend}: {device}; copying memory reaches {least:.1} to {most:.1} GB/s\n\n{}\n",
        table.trim_fmt()
    );
    for skipped in measured.iter().flat_map(|at| &at.skipped) {
        text += &format!("\nSkipped: {skipped}\n");
    }
    text
}

/// Announces the runs of a variant.
fn begin(size: Size, bar: &ProgressBar, variant: &str) {
    bar.set_message(format!("{} x {}: {variant}", size.tokens, size.vocab));
    bar.inc_length(size.runs as u64);
}

/// The median.
fn middle(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
