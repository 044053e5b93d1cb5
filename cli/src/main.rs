//! `atkd`: the ATKD knowledge-distillation loss on files of logits or of hidden states.

mod backend;
mod bench;
mod destination;
mod gradcheck;
mod head;
mod info;
mod loss;
mod output;
mod report;
mod sparse;
mod teacher;
mod tensors;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// The ATKD knowledge-distillation loss and its gradient (Zhong et al., ACL 2024).
///
/// For every token the KL divergence from teacher to student is split at the target token into TKD (the
/// target or not) and DKD (the renormalised rest). Tokens of which the teacher is uncertain learn both,
/// the others DKD alone.
///
/// Example, with files that PyTorch and safetensors write:
///
///   python -c "import torch, safetensors.torch as s; s.save_file({'teacher': torch.randn(8, 50),
///   'student': torch.randn(8, 50), 'labels': torch.randint(50, (8,))}, 'batch.safetensors')"
///
///   atkd loss batch.safetensors --grad gradient.safetensors
#[derive(Parser)]
#[command(name = "atkd", version, arg_required_else_help = true, verbatim_doc_comment)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Loss(loss::Args),
    Report(report::Args),
    Gradcheck(gradcheck::Args),
    Bench(bench::Args),
    Info(info::Args),
    Teacher(teacher::Args),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Loss(args) => loss::run(&args),
        Command::Report(args) => report::run(&args),
        Command::Gradcheck(args) => gradcheck::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Info(args) => info::run(&args),
        Command::Teacher(args) => teacher::run(&args),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}
