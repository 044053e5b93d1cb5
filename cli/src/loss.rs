use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use atkd::{Batch, Divergence, Objective, Output, Reduction, SelectionRule, Target};
use clap::ValueEnum;
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::{Value, json};

use crate::backend::{Backend, Choice};
use crate::destination::Destination;
use crate::output;
use crate::tensors::{self, Matrix};

/// The loss of a file of logits, and its gradient.
///
/// The file holds `student` and `teacher` [N, V] (F32, F16 or BF16, each its own) and `labels` [N] (I64); and, if tokens
/// are to have their own, `token_weights` [N] (F32), which multiply their losses and gradients, and `temperatures` [N]
/// (F32), in place of --temperature.
///
/// Example: atkd loss batch.safetensors --grad gradient.safetensors --json
#[derive(clap::Args)]
pub struct Args {
    /// Logits and labels, as safetensors
    file: PathBuf,
    /// The backend that computes
    #[arg(long, value_enum, default_value = "auto")]
    backend: Choice,
    /// The loss that the student learns by
    #[arg(long, value_enum, default_value = "atkd")]
    objective: Name,
    /// How far the student's distribution q is from the teacher's p
    #[arg(long, value_enum, default_value = "forward-kl")]
    divergence: DivergenceName,
    /// The teacher's share in the mixture of jsd and skew-kl, the student's in that of skew-reverse-kl
    #[arg(long, default_value_t = 0.5, allow_negative_numbers = true)]
    beta: f64,
    /// ATKD's weight of easy tokens; hard ones have 1 - lambda
    #[arg(long, default_value_t = 0.2, allow_negative_numbers = true)]
    lambda: f64,
    /// The rule that says which tokens are hard, by the teacher's uncertainty
    #[arg(long, value_enum, default_value = "top-k")]
    selection_rule: SelectionRuleName,
    /// Share of the valid tokens that is hard, by top-k
    #[arg(long, default_value_t = 0.5, allow_negative_numbers = true)]
    hard_ratio: f64,
    /// Divides both models' logits; cross entropy is taken at 1
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true)]
    temperature: f64,
    /// Multiply the distillation terms by the square of the temperature
    #[arg(long)]
    temperature_squared: bool,
    /// The token that splits the distributions: the label, or the teacher's most probable
    #[arg(long, value_enum, default_value = "label")]
    target: TargetName,
    /// Over the valid tokens
    #[arg(long, value_enum, default_value = "mean")]
    reduction: ReductionName,
    /// Weight of the student's cross entropy at the target
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    ce_weight: f64,
    /// Weight of the distillation terms
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true)]
    kd_weight: f64,
    /// The first columns of either model that count, where vocabularies are padded: the others have gradient 0
    #[arg(long, value_name = "V")]
    vocab_size: Option<usize>,
    /// Tokens with this label are dropped
    #[arg(long, default_value_t = -100, allow_negative_numbers = true)]
    ignore_index: i64,
    /// Write `grad` [N, V] in the student's dtype and, per token and before the reduction, `uncertainty`,
    /// `tkd`, `dkd`, `loss` (F32) and `hard` (U8) to this safetensors file
    #[arg(long, value_name = "OUT.safetensors")]
    grad: Option<PathBuf>,
    /// Add the entropies of both models' distributions at --temperature, in nats: the means of the valid tokens and, to
    /// the file of --grad, `teacher_entropy` and `student_entropy` (F32) per token
    #[arg(long)]
    entropies: bool,
    /// Print one JSON object; the numbers of a divergence's parts, tkd and dkd, are "NaN" where they are not computed: for
    /// plain jsd, tvd, skew-kl and skew-reverse-kl
    #[arg(long)]
    json: bool,
}

/// Per token, in nats.
struct Entropies {
    teacher: Vec<f32>,
    student: Vec<f32>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Name {
    /// Easy tokens lambda DKD, hard ones (1 - lambda) (TKD + DKD)
    Atkd,
    /// The divergence over the whole vocabulary
    Plain,
    /// The plain forward KL divergence, TKD + UNC DKD
    Kl,
    /// The target part alone
    Tkd,
    /// The rest alone
    Dkd,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum DivergenceName {
    /// KL(p, q)
    ForwardKl,
    /// KL(q, p)
    ReverseKl,
    /// beta KL(p, m) + (1 - beta) KL(q, m), m = beta p + (1 - beta) q; forward KL for 0, reverse for 1
    Jsd,
    /// Total variation, half the sum of |p - q|
    Tvd,
    /// KL(p, beta p + (1 - beta) q)
    SkewKl,
    /// KL(q, beta q + (1 - beta) p)
    SkewReverseKl,
}

#[derive(Clone, Copy, ValueEnum)]
enum TargetName {
    Label,
    Teacher,
}

#[derive(Clone, Copy, ValueEnum)]
enum ReductionName {
    Mean,
    Sum,
    /// The mean of the easy tokens plus the mean of the hard ones, as the code of ATKD's authors has it
    GroupMean,
}

#[derive(Clone, Copy, ValueEnum)]
enum SelectionRuleName {
    /// The hard ratio's share of the tokens, rounded up, the most uncertain ones
    TopK,
    /// Those from the lower median on, as the code of ATKD's authors has it
    Median,
}

impl Args {
    fn objective(&self) -> Result<Objective> {
        // Checked whatever the objective: a lambda of 7 is a mistake even where it is not used. So is a beta.
        let atkd = Objective::atkd(self.lambda)?;
        let beta = self.beta;
        atkd.with_divergence(Divergence::Jsd { beta })?;
        let divergence = match self.divergence {
            DivergenceName::ForwardKl => Divergence::ForwardKl,
            DivergenceName::ReverseKl => Divergence::ReverseKl,
            DivergenceName::Jsd => Divergence::Jsd { beta },
            DivergenceName::Tvd => Divergence::TotalVariation,
            DivergenceName::SkewKl => Divergence::SkewKl { alpha: beta },
            DivergenceName::SkewReverseKl => Divergence::SkewReverseKl { alpha: beta },
        };
        let objective = match self.objective {
            Name::Atkd => atkd,
            Name::Plain => Objective::plain(),
            Name::Kl if self.divergence != DivergenceName::ForwardKl => bail!(
                "--objective kl is the forward KL divergence; another over the whole vocabulary is --objective plain"
            ),
            Name::Kl => Objective::kl(),
            Name::Tkd => Objective::tkd(),
            Name::Dkd => Objective::dkd(),
        };
        let target = match self.target {
            TargetName::Label => Target::Label,
            TargetName::Teacher => Target::Teacher,
        };
        let reduction = match self.reduction {
            ReductionName::Mean => Reduction::Mean,
            ReductionName::Sum => Reduction::Sum,
            ReductionName::GroupMean => Reduction::GroupMean,
        };
        let rule = match self.selection_rule {
            SelectionRuleName::TopK => SelectionRule::TopK,
            SelectionRuleName::Median => SelectionRule::Median,
        };
        Ok(objective
            .with_divergence(divergence)?
            .with_selection_rule(rule)
            .with_hard_ratio(self.hard_ratio)?
            .with_temperature(self.temperature)?
            .with_temperature_squared(self.temperature_squared)
            .with_target(target)
            .with_reduction(reduction)?
            .with_ce_weight(self.ce_weight)?
            .with_kd_weight(self.kd_weight)?
            .with_ignore_index(self.ignore_index))
    }
}

pub fn run(args: &Args) -> Result<ExitCode> {
    let objective = args.objective()?;
    let backend = args.backend.backend()?;
    let destination =
        args.grad.as_ref().map(|path| Destination::open(path, &args.file)).transpose()?;
    let bytes = tensors::open(&args.file)?;
    let file = tensors::parse(&args.file, &bytes)?;
    let student = Matrix::read(&args.file, &file, "student")?;
    let teacher = Matrix::read(&args.file, &file, "teacher")?;
    let same_vocab = student.vocab == teacher.vocab || args.vocab_size.is_some();
    if student.tokens != teacher.tokens || !same_vocab {
        bail!(
            "`student` is [{}, {}], but `teacher` is [{}, {}]: both must have a row for each token and \
             a logit for each entry of one vocabulary{}",
            student.tokens,
            student.vocab,
            teacher.tokens,
            teacher.vocab,
            if same_vocab { "" } else { "; --vocab-size says where its padding starts" }
        );
    }
    let vocab = |matrix: &Matrix| args.vocab_size.unwrap_or(matrix.vocab);
    let required = objective.target() == Target::Label;
    let labels = tensors::labels(&args.file, &file, required)?;
    let token_weights = tensors::of_tokens(&file, "token_weights")?;
    let temperatures = tensors::of_tokens(&file, "temperatures")?;

    let teacher_logits = teacher.logits().and_then(|logits| logits.with_vocab(vocab(&teacher)));
    let teacher = teacher_logits.context("`teacher`")?;
    let batch = match &labels {
        Some(labels) => Batch::new(teacher, labels).context("`labels`")?,
        None => Batch::unlabelled(teacher),
    };
    let batch = match &token_weights {
        Some(weights) => batch.with_token_weights(weights).context("`token_weights`")?,
        None => batch,
    };
    let batch = match &temperatures {
        Some(temperatures) => batch.with_temperatures(temperatures).context("`temperatures`")?,
        None => batch,
    };
    let logits = student.logits().and_then(|logits| logits.with_vocab(vocab(&student)));
    let logits = logits.context("`student`")?;
    let entropies = args
        .entropies
        .then(|| -> atkd::Result<Entropies> {
            let of = |logits| backend.token_entropies(logits, args.temperature);
            Ok(Entropies { teacher: of(teacher)?, student: of(logits)? })
        })
        .transpose()?;
    let output = match destination {
        None => backend.forward(&objective, &batch, logits)?,
        Some(destination) => {
            let mut gradient = Matrix::zeros(logits.dtype(), student.tokens, student.vocab)?;
            let view = gradient.logits_mut()?.with_vocab(vocab(&student))?;
            let output = backend.forward_backward(&objective, &batch, logits, view)?;
            write(destination, &gradient, &output, entropies.as_ref())?;
            output
        }
    };
    report(args, &backend, &output, entropies.as_ref())?;
    Ok(ExitCode::SUCCESS)
}

/// The gradient and each token's terms, as safetensors.
fn write(
    destination: Destination,
    gradient: &Matrix,
    output: &Output,
    entropies: Option<&Entropies>,
) -> Result<()> {
    let tokens = output.tokens.len();
    let bytes = |column: &mut dyn Iterator<Item = f32>| {
        column.flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>()
    };
    let column = |term: fn(&atkd::TokenTerms) -> f64| {
        bytes(&mut output.tokens.iter().map(|token| term(token) as f32))
    };
    let mut columns = vec![
        ("uncertainty", column(|token| token.uncertainty)),
        ("tkd", column(|token| token.tkd)),
        ("dkd", column(|token| token.dkd)),
        ("loss", column(|token| token.loss)),
    ];
    if let Some(Entropies { teacher, student }) = entropies {
        columns.push(("teacher_entropy", bytes(&mut teacher.iter().copied())));
        columns.push(("student_entropy", bytes(&mut student.iter().copied())));
    }
    let hard: Vec<u8> = output.tokens.iter().map(|token| token.hard.into()).collect();
    let matrix = vec![gradient.tokens, gradient.vocab];
    let mut tensors = vec![("grad", gradient.dtype(), matrix, gradient.bytes())];
    for (name, bytes) in &columns {
        tensors.push((name, safetensors::Dtype::F32, vec![tokens], bytes));
    }
    tensors.push(("hard", safetensors::Dtype::U8, vec![tokens], &hard));
    // The widest elements come first, so that all are aligned.
    tensors.sort_by_key(|tensor| std::cmp::Reverse(tensor.1.bitsize()));

    let mut end = 0;
    let mut parts = Vec::new();
    let mut infos = Vec::new();
    for (name, dtype, shape, bytes) in tensors {
        let start = end;
        end += bytes.len();
        infos.push((name.into(), TensorInfo { dtype, shape, data_offsets: (start, end) }));
        parts.push(bytes);
    }
    let mut header = serde_json::to_vec(&Metadata::new(None, infos)?)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let length = (header.len() as u64).to_le_bytes();
    destination.write([&length[..], &header].into_iter().chain(parts))
}

/// A number, or its name where JSON has none.
fn number(value: f64) -> Value {
    if value.is_finite() {
        value.into()
    } else if value.is_nan() {
        "NaN".into()
    } else if value > 0.0 {
        "Infinity".into()
    } else {
        "-Infinity".into()
    }
}

fn report(
    args: &Args,
    backend: &Backend,
    output: &Output,
    entropies: Option<&Entropies>,
) -> Result<()> {
    let summary = output.summary();
    let mean_of_valid = |values: &[f32]| {
        let valid = output.tokens.iter().zip(values).filter(|(token, _)| token.valid);
        // The sum of nothing is -0.
        let sum = valid.map(|(_, &value)| f64::from(value)).sum::<f64>() + 0.0;
        sum / summary.valid_tokens.max(1) as f64
    };
    let mean_entropies = entropies.map(|Entropies { teacher, student }| {
        [("teacher", mean_of_valid(teacher)), ("student", mean_of_valid(student))]
    });
    if args.json {
        let mut object = json!({
            "loss": number(output.loss),
            "tokens": summary.tokens,
            "valid_tokens": summary.valid_tokens,
            "hard_tokens": summary.hard_tokens,
            "non_finite_tokens": summary.non_finite_tokens,
            "threshold_uncertainty": summary.threshold_uncertainty.map(number),
            "mean_uncertainty": number(summary.mean_uncertainty),
            "mean_tkd": number(summary.mean_tkd),
            "mean_dkd": number(summary.mean_dkd),
            "backend": backend.to_string(),
        });
        for (model, mean) in mean_entropies.iter().flatten() {
            object[format!("mean_{model}_entropy")] = number(*mean);
        }
        return output::print(&object.to_string());
    }
    let mut table = output::table(&[]);
    let threshold = match summary.threshold_uncertainty {
        Some(threshold) => format!("{threshold:.6}"),
        None => "no hard token".into(),
    };
    for (name, value) in [
        ("loss", format!("{:.9}", output.loss)),
        ("tokens", summary.tokens.to_string()),
        ("valid tokens", summary.valid_tokens.to_string()),
        ("hard tokens", summary.hard_tokens.to_string()),
        ("least uncertainty of a hard token", threshold),
        ("mean uncertainty", format!("{:.6}", summary.mean_uncertainty)),
        ("mean TKD", format!("{:.6}", summary.mean_tkd)),
        ("mean DKD", format!("{:.6}", summary.mean_dkd)),
    ] {
        table.add_row([name, &value]);
    }
    for (model, mean) in mean_entropies.iter().flatten() {
        table.add_row([format!("mean entropy of the {model}"), format!("{mean:.6}")]);
    }
    table.add_row(["backend", &backend.to_string()]);
    output::print(&table.trim_fmt())?;
    if summary.non_finite_tokens > 0 {
        eprintln!(
            "warning: the loss of {} of {} valid tokens is NaN or infinite",
            summary.non_finite_tokens, summary.valid_tokens
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use atkd::battery::settings::fields;
    use clap::{Args as _, Command, FromArgMatches};

    use super::*;

    fn command() -> Command {
        Args::augment_args(Command::new("loss"))
    }

    fn objective(options: &[&str]) -> Objective {
        let matches = command().get_matches_from([&["loss", "file"], options].concat());
        Args::from_arg_matches(&matches).unwrap().objective().unwrap()
    }

    #[test]
    fn every_setting_of_an_objective_is_an_option() {
        assert_eq!(objective(&[]), Objective::default());
        let default = fields(&Objective::default());
        // Options, and the fields of the objective that they change.
        let changes: [(&[&str], &[&str]); 14] = [
            (&["--objective", "plain"], &["easy", "hard", "plain"]),
            (&["--divergence", "jsd"], &["divergence"]),
            (&["--beta", "0.1", "--divergence", "jsd"], &["divergence"]),
            (&["--lambda", "0.3"], &["easy", "hard"]),
            (&["--hard-ratio", "0.4"], &["hard_ratio"]),
            (&["--temperature", "2"], &["temperature"]),
            (&["--temperature-squared"], &["temperature_squared"]),
            (&["--target", "teacher"], &["target"]),
            (&["--reduction", "sum"], &["reduction"]),
            (&["--reduction", "group-mean"], &["reduction"]),
            (&["--selection-rule", "median"], &["selection_rule"]),
            (&["--ce-weight", "0.5"], &["ce_weight"]),
            (&["--kd-weight", "0.5"], &["kd_weight"]),
            (&["--ignore-index", "-1"], &["ignore_index"]),
        ];
        // An upstream gradient is the business of a program that goes on with the loss.
        let mut reached = BTreeSet::from(["upstream"]);
        for (options, expected) in changes {
            let other = fields(&objective(options));
            let actual: Vec<&String> =
                default.keys().filter(|&name| default[name] != other[name]).collect();
            assert_eq!(actual, expected, "{options:?}");
            reached.extend(expected);
        }
        let all: BTreeSet<&str> = default.keys().map(String::as_str).collect();
        assert_eq!(reached, all, "settings of Rust");

        let not_settings = ["file", "backend", "vocab_size", "grad", "entropies", "json"];
        let options: BTreeSet<String> = command()
            .get_arguments()
            .filter(|option| !not_settings.contains(&option.get_id().as_str()))
            .map(|option| format!("--{}", option.get_long().unwrap()))
            .collect();
        let tried: BTreeSet<String> =
            changes.iter().map(|(options, _)| options[0].into()).collect();
        assert_eq!(options, tried, "options of the CLI");
    }
}
