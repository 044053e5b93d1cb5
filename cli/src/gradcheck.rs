use std::cell::Cell;
use std::collections::BTreeMap;
use std::process::ExitCode;

use anyhow::Result;
use atkd::battery::{self, Bounds, Check};
use atkd::{Batch, Error, Logits, LogitsMut, Objective, cpu};
use indicatif::{ProgressBar, ProgressStyle};

use crate::backend::{Backend, Choice, RowKernelArgs};
use crate::output;

/// Check a backend: every shape, dtype and edge case against float64 and finite differences, and once more with sparse
/// teachers.
///
/// Prints a table of the largest errors, each as a share of what is allowed, and exits with 1 if any
/// exceeds it.
#[derive(clap::Args)]
pub struct Args {
    /// The backend to check
    #[arg(long, value_enum, default_value = "auto")]
    backend: Choice,
    #[command(flatten)]
    row_kernel: RowKernelArgs,
    /// List every case, not only the groups
    #[arg(long)]
    verbose: bool,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    let backend = args.row_kernel.backend(args.backend)?;
    let bar = ProgressBar::new((battery::len() + battery::sparse::len()) as u64)
        .with_style(ProgressStyle::with_template("{bar:40} {pos}/{len} cases, {eta} left  {msg}")?);
    let bounds = match backend {
        Backend::Cuda(_) | Backend::Simt => Bounds::Kernels,
        Backend::Cpu | Backend::Reference => Bounds::Cpu,
    };
    let run = |objective: &Objective, batch: &Batch, student: Logits, gradient: LogitsMut| {
        backend.forward_backward(objective, batch, student, gradient)
    };
    let report = |check: &Check| {
        bar.set_message(check.group);
        bar.inc(1);
    };
    let checks = battery::run(bounds, run, report);
    let by_cpu = Cell::new(0);
    let run_sparse =
        |objective: &Objective, batch: &Batch, student: Logits, mut gradient: LogitsMut| {
            let to = gradient.columns(0..student.vocab())?;
            match run(objective, batch, student, to) {
                Err(Error::NoUniformTail) => {
                    by_cpu.set(by_cpu.get() + 1);
                    cpu::forward_backward(objective, batch, student, gradient)
                }
                output => output,
            }
        };
    let sparse_checks = battery::sparse::run(bounds, run_sparse, report);
    bar.finish_and_clear();

    let mut groups: BTreeMap<String, Vec<&Check>> = BTreeMap::new();
    for check in &checks {
        groups.entry(check.group.into()).or_default().push(check);
    }
    for check in &sparse_checks {
        groups.entry(format!("sparse teachers: {}", check.group)).or_default().push(check);
    }
    let mut table = output::table(&["group", "case", "passed", "largest error / allowed"]);
    let verdict = |passed: bool| if passed { "yes" } else { "NO" };
    for (group, checks) in groups {
        let passed = checks.iter().filter(|check| check.passed()).count();
        let worst = checks.iter().map(|check| check.worst).fold(0.0, f64::max);
        let cases = format!("{} cases", checks.len());
        let share = format!("{passed} of {}", checks.len());
        table.add_row([&group, &cases, &share, &format!("{worst:.1e}")]);
        for check in checks {
            if args.verbose || !check.passed() {
                let error = format!("{:.1e}  {}", check.worst, check.detail);
                table.add_row(["", &check.case, verdict(check.passed()), &error]);
            }
        }
    }
    output::print(&table.trim_fmt())?;
    let total = checks.len() + sparse_checks.len();
    let passed = checks.iter().chain(&sparse_checks).filter(|check| check.passed()).count();
    output::print(&format!("\n{backend}: {passed} of {total} cases passed"))?;
    if by_cpu.get() > 0 {
        output::print(&format!(
            "{} of the sparse teachers' have tail uniform, for which there is no kernel: the CPU computed them",
            by_cpu.get()
        ))?;
    }
    Ok(if passed == total { ExitCode::SUCCESS } else { ExitCode::from(1) })
}
