use std::process::ExitCode;

use anyhow::Result;
use atkd::cuda::Kernels;
use atkd::plan::{DeviceProperties, HardTokens, Plan, Problem, RowKernel, Schedule};
use atkd::{Target, cpu};
use clap::ValueEnum;

use crate::backend::{Backend, Choice, row_kernel_option};
use crate::output;
use crate::tensors::DtypeName;

/// Backends and devices: what this build can use here, why not the rest, and how a call is cut up.
#[derive(clap::Args)]
pub struct Args {
    /// Show the plan of a CUDA call with so many logits in a row
    #[arg(long, default_value_t = 128_256)]
    vocab: usize,
    /// Rows of that call
    #[arg(long, default_value_t = 8192)]
    tokens: usize,
    /// The type of both models' logits and of the gradient
    #[arg(long, value_enum, default_value = "bf16", ignore_case = true)]
    dtype: DtypeName,
    /// Print the kernels that --row-kernel of other commands chooses among, and nothing else
    #[arg(long)]
    row_kernels: bool,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    if args.row_kernels {
        output::print(&RowKernel::ALL.map(row_kernel_option).join("\n"))?;
        return Ok(ExitCode::SUCCESS);
    }
    for (name, value) in [("--vocab", args.vocab), ("--tokens", args.tokens)] {
        anyhow::ensure!(
            (1..=i32::MAX as usize).contains(&value),
            "{name} is {value}, but must be at least 1 and at most {}",
            i32::MAX
        );
    }
    let mut table = output::table(&["backend", "usable", "what it is"]);
    let cuda = Choice::Cuda.backend();
    for choice in [Choice::Cpu, Choice::Cuda, Choice::Reference, Choice::Simt] {
        let (usable, what) = match choice.backend() {
            Err(error) => ("no", error.root_cause().to_string()),
            Ok(Backend::Cuda(kernels)) => ("yes", describe(&kernels)?),
            Ok(Backend::Cpu) => match cpu::instruction_set() {
                Ok(set) => ("yes", format!("{} threads, {set}", rayon::current_num_threads())),
                Err(error) => ("no", error.to_string()),
            },
            Ok(Backend::Reference) => ("yes", "float64, straight from the definitions".into()),
            Ok(Backend::Simt) => ("yes", "the CUDA kernels, simulated as a test; slow".into()),
        };
        let name = choice.to_possible_value().expect("every choice has a name");
        let what = match Kernels::missing() {
            Some(_) if choice == Choice::Cuda => "the kernels are not in this build, see below",
            _ => &what,
        };
        table.add_row([name.get_name(), usable, what]);
    }
    output::print(&format!(
        "atkd {} on {} {}\n\n{}",
        env!("CARGO_PKG_VERSION"),
        std::env::consts::OS,
        std::env::consts::ARCH,
        table.trim_fmt()
    ))?;
    output::print(&format!("\nauto is {}", Choice::Auto.backend()?))?;
    let built: Vec<String> =
        Kernels::architectures().map(|number| format!("sm_{number}")).collect();
    output::print(&match Kernels::missing() {
        Some(hint) => format!("kernels in this build: none; {hint}"),
        None => format!("kernels in this build: {}, and PTX", built.join(", ")),
    })?;

    let (device, whose) = match &cuda {
        Ok(Backend::Cuda(kernels)) => (kernels.device(), "this device"),
        _ => (DeviceProperties::H200, "an H200, since no device can be used here"),
    };
    let dtype = args.dtype.dtype();
    let problem = Problem {
        tokens: args.tokens,
        vocab: args.vocab,
        teacher: dtype,
        student: dtype,
        gradient: dtype,
        sum_at_1: false,
        aligned_alike: true,
        scopes: 1,
        target: Target::Label,
        hard: HardTokens::Selected,
        gradient_depends_on_hard: true,
        needs_group_sizes: false,
        in_place: false,
    };
    let plan = Plan::new(&device, &problem, None);
    let mut table = output::table(&["kernel", "launch"]);
    for (kernel, shape) in [
        ("teacher_margin", plan.margin),
        ("count_valid", plan.count),
        ("select_hard", plan.select),
        (&plan.row_kernel.to_string(), plan.rows),
        ("token_terms", plan.terms),
    ] {
        table.add_row([kernel, &shape.to_string()]);
    }
    let order = match plan.schedule {
        Schedule::PredictThenRepair => {
            "the rows by the threshold that the last call left, then the selection, then the rows predicted wrong again"
        }
        Schedule::SelectFirst => "the selection before the rows",
        Schedule::SelectLast => "the selection after the rows",
        Schedule::Given => "no selection",
    };
    let schedule =
        format!("Schedule of a call with a gradient of its own: {} ({order}).", plan.schedule);
    let why = plan.reason(&device);
    output::print(&format!(
        "\n{} x {} {dtype} on {whose} ({} multiprocessors, L2 cache {:.1} MB):\n\n{}\n\n{schedule}\n{why}",
        args.tokens,
        args.vocab,
        device.multiprocessors,
        device.l2_bytes as f64 / 1e6,
        table.trim_fmt(),
    ))?;
    Ok(ExitCode::SUCCESS)
}

fn describe(kernels: &Kernels) -> Result<String> {
    let context = kernels.context();
    let (major, minor) = context.compute_capability()?;
    let memory = context.total_mem()? as f64 / 1e9;
    Ok(format!("{}, compute capability {major}.{minor}, {memory:.0} GB", context.name()?))
}
