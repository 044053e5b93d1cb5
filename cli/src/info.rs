use std::process::ExitCode;

use anyhow::Result;
use atkd::cpu;

use crate::backend::Backend;

/// Backends and devices: what this build can use here, and why not the rest.
#[derive(clap::Args)]
pub struct Args {}

pub fn run(_: &Args) -> Result<ExitCode> {
    let mut table = crate::table(&["backend", "usable", "what it is"]);
    let cpu_line = format!("{} threads, {}", rayon::current_num_threads(), cpu::instruction_set());
    for backend in [Backend::Cpu, Backend::Reference, Backend::Cuda, Backend::Simt] {
        let (usable, what) = match backend.resolve() {
            Err(_) => ("no", "not part of this build".into()),
            Ok(Backend::Reference) => ("yes", "float64, straight from the definitions".into()),
            Ok(Backend::Simt) => ("yes", "the CUDA kernels, simulated as a test; slow".into()),
            Ok(_) => ("yes", cpu_line.clone()),
        };
        table.add_row([backend.name(), usable, &what]);
    }
    crate::print(&format!("atkd {}\n\n{}", env!("CARGO_PKG_VERSION"), table.trim_fmt()))?;
    crate::print(&format!("\nauto is {}", Backend::Auto.resolve()?.name()))?;
    Ok(ExitCode::SUCCESS)
}
