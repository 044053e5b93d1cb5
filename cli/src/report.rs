//! A page about a batch.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use atkd::report::{Report, row_norms};

use crate::destination::Destination;
use crate::loss::{self, BatchArgs, Wanted};
use crate::{output, tensors};

/// A page about a batch: which tokens are uncertain, what they lose, and where the gradient goes.
///
/// The file is one of `atkd loss`, and so are the settings. The page is one HTML file that loads nothing and has no
/// scripts: the teacher's uncertainty and where it parts easy tokens from hard ones, TKD beside DKD, both groups' shares of
/// the loss and of the gradient, the norms of the gradient (of logits, not of hidden states), the tokens of the largest
/// loss, and means and percentiles.
///
/// Example: atkd report batch.safetensors --out report.html
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    batch: BatchArgs,
    /// The page
    #[arg(long, value_name = "PAGE.html", default_value = "report.html")]
    out: PathBuf,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    let batch = &args.batch;
    let call = batch.call()?;
    let destination = Destination::open(&args.out, &batch.file)?;
    let bytes = tensors::open(&batch.file)?;
    let file = tensors::parse(&batch.file, &bytes)?;
    let arguments: Vec<_> = std::env::args_os().skip(1).map(|a| a.display().to_string()).collect();
    let computed = loss::compute(call, &file, Wanted { gradient: true, entropies: false }, None)?;
    let norms = match &computed.gradient {
        Some(gradient) => Some(row_norms(gradient.logits()?)),
        None => None,
    };
    let mut report = Report::new(&computed.output.tokens)
        .with_title(format!("Distillation loss of {}", batch.file.display()))
        .with_fact("loss", format!("{:.9}", computed.output.loss))
        .with_fact("command", format!("atkd {}", arguments.join(" ")))
        .with_fact("backend", &computed.backend);
    if let Some(labels) = &computed.labels {
        report = report.with_labels(labels)?;
    }
    if let Some(norms) = &norms {
        report = report.with_gradient_norms(norms)?;
    }
    destination.write([report.to_html().as_bytes()])?;
    output::print(&format!("{} is there: open it in a browser", args.out.display()))?;
    Ok(ExitCode::SUCCESS)
}
