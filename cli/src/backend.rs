//! The code that computes: a backend, and its kernel for rows.

use std::fmt;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use atkd::battery::shards::{self, in_shards};
use atkd::cuda::{self, Kernels};
use atkd::plan::{Preference, RowKernel};
use atkd::{Batch, Logits, LogitsMut, Objective, Output, battery, cpu, reference, simt};
use clap::ValueEnum;
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Choice {
    /// The fastest that is here.
    Auto,
    /// An NVIDIA GPU.
    Cuda,
    /// Fused and vectorised, on all cores.
    Cpu,
    /// The CUDA kernels, run on the CPU as a test.
    Simt,
    /// The definitions in float64, slow.
    Reference,
}

/// The choice of the kernel for rows.
#[derive(clap::Args)]
pub struct RowKernelArgs {
    /// A kernel for rows other than the plan's choice, wherever it can do the call; only with cuda
    #[arg(long, value_parser = row_kernels())]
    row_kernel: Option<RowKernel>,
    /// Blocks that share a row, up to 32, of the pipelined kernels, or of the stream kernel on a device without
    /// clusters, where it is a power of two; 0 for the plan's choice
    #[arg(long, default_value_t = 0, requires = "row_kernel")]
    team: u32,
}

fn row_kernels() -> impl TypedValueParser<Value = RowKernel> {
    let values = RowKernel::ALL
        .map(|kernel| PossibleValue::new(row_kernel_option(kernel)).help(kernel.summary()));
    PossibleValuesParser::new(values).map(|name| {
        let kernel = RowKernel::ALL.into_iter().find(|&kernel| row_kernel_option(kernel) == name);
        kernel.expect("the value is one of those")
    })
}

/// The name of a kernel for rows as an option has it.
pub fn row_kernel_option(kernel: RowKernel) -> String {
    kernel.name().trim_start_matches("row_").replace('_', "-")
}

impl RowKernelArgs {
    pub fn backend(&self, choice: Choice) -> Result<Backend> {
        let Some(row_kernel) = self.row_kernel else { return choice.backend() };
        match choice.backend()? {
            Backend::Cuda(kernels) => {
                let preferred = Preference { row_kernel, team: self.team };
                Ok(Backend::Cuda(Kernels::load_preferring(kernels.context(), Some(preferred))?))
            }
            other => bail!("--row-kernel chooses among CUDA kernels, but the backend is {other}"),
        }
    }
}

impl Choice {
    pub fn backend(self) -> Result<Backend> {
        Ok(match self {
            Self::Auto => load().map_or(Backend::Cpu, Backend::Cuda),
            Self::Cuda => Backend::Cuda(load().context(
                "the cuda backend cannot be used here (use --backend cpu, or --backend auto to get the \
                 fastest that is here)",
            )?),
            Self::Cpu => Backend::Cpu,
            Self::Simt => Backend::Simt,
            Self::Reference => Backend::Reference,
        })
    }
}

fn load() -> atkd::Result<Arc<Kernels>> {
    // Before the driver is looked for, whose absence would hide it.
    if let Some(hint) = Kernels::missing() {
        return Err(atkd::Error::NoKernels { hint });
    }
    Kernels::load(&cuda::context(0)?)
}

pub enum Backend {
    Cuda(Arc<Kernels>),
    Cpu,
    Simt,
    Reference,
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Self::Cuda(_) => "cuda",
            Self::Cpu => "cpu",
            Self::Simt => "simt",
            Self::Reference => "reference",
        })
    }
}

impl Backend {
    pub fn forward(
        &self,
        objective: &Objective,
        batch: &Batch,
        student: Logits,
    ) -> atkd::Result<Output> {
        match self {
            Self::Cuda(kernels) => kernels.forward(objective, batch, student),
            Self::Cpu => cpu::forward(objective, batch, student),
            Self::Simt => simt::forward(objective, batch, student),
            Self::Reference => reference::forward(objective, batch, student),
        }
    }

    pub fn forward_backward(
        &self,
        objective: &Objective,
        batch: &Batch,
        student: Logits,
        gradient: LogitsMut,
    ) -> atkd::Result<Output> {
        match self {
            Self::Cuda(kernels) => kernels.forward_backward(objective, batch, student, gradient),
            Self::Cpu => cpu::forward_backward(objective, batch, student, gradient),
            Self::Simt => simt::forward_backward(objective, batch, student, gradient),
            Self::Reference => battery::reference_backend(objective, batch, student, gradient),
        }
    }

    /// The same by so many ranks, of which each has some columns of the vocabulary.
    pub fn in_shards(
        &self,
        ranks: usize,
        objective: &Objective,
        batch: &Batch,
        student: Logits,
        gradient: Option<LogitsMut>,
    ) -> Result<Output> {
        let output = match self {
            Self::Cuda(kernels) => in_shards(kernels, ranks, objective, batch, student, gradient),
            Self::Cpu => in_shards(&shards::Cpu, ranks, objective, batch, student, gradient),
            Self::Simt => {
                let simulation = simt::Simulation::default();
                in_shards(&simulation, ranks, objective, batch, student, gradient)
            }
            Self::Reference => bail!(
                "the reference backend has no shards: use --backend cpu, simt or cuda, or leave --shards out"
            ),
        };
        Ok(output?)
    }

    /// See [`cpu::token_entropies`].
    pub fn token_entropies(&self, logits: Logits, temperature: f64) -> atkd::Result<Vec<f32>> {
        match self {
            Self::Cuda(kernels) => kernels.token_entropies(logits, temperature),
            Self::Cpu => cpu::token_entropies(logits, temperature),
            Self::Simt => {
                let simulation = simt::Simulation::default();
                simulation.token_entropies(logits, temperature).map(|(entropies, _)| entropies)
            }
            Self::Reference => {
                let exact = reference::token_entropies(logits, temperature)?;
                Ok(exact.into_iter().map(|entropy| entropy as f32).collect())
            }
        }
    }
}
