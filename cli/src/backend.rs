//! Which code computes.

use anyhow::{Result, bail};
use atkd::{Batch, Logits, LogitsMut, Objective, Output, battery, cpu, reference, simt};
use clap::ValueEnum;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Backend {
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

impl Backend {
    /// What `auto` stands for.
    pub fn resolve(self) -> Result<Self> {
        match self {
            Self::Auto => Ok(Self::Cpu),
            Self::Cuda => bail!(
                "the cuda backend is not part of this build: its kernels are written and run with \
                 --backend simt, but nothing launches them on a GPU yet; use --backend cpu, or --backend \
                 auto to get the fastest that is here"
            ),
            Self::Cpu | Self::Simt | Self::Reference => Ok(self),
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Cuda => "cuda",
            Self::Cpu => "cpu",
            Self::Simt => "simt",
            Self::Reference => "reference",
        }
    }

    pub fn forward(self, objective: &Objective, batch: &Batch, student: Logits) -> Result<Output> {
        Ok(match self.resolve()? {
            Self::Reference => reference::forward(objective, batch, student)?,
            Self::Simt => simt::forward(objective, batch, student)?,
            _ => cpu::forward(objective, batch, student)?,
        })
    }

    pub fn forward_backward(
        self,
        objective: &Objective,
        batch: &Batch,
        student: Logits,
        gradient: LogitsMut,
    ) -> atkd::Result<Output> {
        match self {
            Self::Reference => battery::reference_backend(objective, batch, student, gradient),
            Self::Simt => simt::forward_backward(objective, batch, student, gradient),
            _ => cpu::forward_backward(objective, batch, student, gradient),
        }
    }
}
