use std::borrow::Cow;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use atkd::head::Chunks;
use atkd::{Batch, Divergence, Objective, Output, Reduction, SelectionRule, Target, Teacher};
use clap::ValueEnum;
use safetensors::SafeTensors;
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::{Value, json};

use crate::backend::{Backend, Choice};
use crate::destination::Destination;
use crate::sparse::{self, Sparse, TailName};
use crate::tensors::{self, Matrix};
use crate::{head, output};

/// The loss of a file of logits or of hidden states, and its gradient.
///
/// The file holds `student` and `teacher` [N, V] (F32, F16 or BF16, each its own) and `labels` [N] (I64); and, if tokens
/// are to have their own, `token_weights` [N] (F32), which multiply their losses and gradients, and `temperatures` [N]
/// (F32), in place of --temperature.
///
/// In the place of `teacher` it may hold what is known of one that is not in memory: `teacher_indices` [N, K] (I64 or I32),
/// some tokens of the vocabulary in each row, in any order, -1 for none; `teacher_log_probs` [N, K] (F32, F16 or BF16), their
/// log-probabilities: natural logarithms at --temperature, which divides the student's logits alone; and
/// `teacher_target_log_prob` [N] (F32), those of the labels, which then need not be among the K. --tail says what the
/// teacher gives all other tokens; the backends cuda and simt have no kernel for --tail uniform.
///
/// In the place of `student` and `teacher` it may hold what their last layers multiply, and these: `student_hidden`
/// [N, Hq] and `student_weight` [V, Hq], `teacher_hidden` [N, Hp] and `teacher_weight` [V, Hp], and `student_bias` or
/// `teacher_bias` [V] where there is one. The logits, hidden times the transpose of weight plus bias, then exist for a chunk
/// of tokens at a time, in float32; on the CPU. With `teacher_log_prob` [N] (F32), the teacher's log p(label) from elsewhere,
/// the hard tokens are selected by it.
///
/// Example: atkd loss batch.safetensors --grad gradient.safetensors --json
///
/// Example, as eight ranks would: atkd loss batch.safetensors --shards 8
///
/// Example, of the top K of a teacher: atkd loss top-k.safetensors --tail uniform
///
/// Example, of hidden states: atkd loss hidden.safetensors --chunk 128 --grad gradients.safetensors
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    batch: BatchArgs,
    /// Write `grad` [N, V] in the student's dtype and, per token and before the reduction, `uncertainty`,
    /// `tkd`, `dkd`, `loss` (F32) and `hard` (U8) to this safetensors file; from hidden states, in the place of `grad`,
    /// `grad_hidden` [N, Hq] in their dtype, `grad_weight` [V, Hq] and, with a bias, `grad_bias` [V] (F32)
    #[arg(long, value_name = "OUT.safetensors")]
    grad: Option<PathBuf>,
    /// Add the entropies of both models' distributions at --temperature, in nats: the means of the valid tokens and, to
    /// the file of --grad, `teacher_entropy` and `student_entropy` (F32) per token
    #[arg(long)]
    entropies: bool,
    /// Print one JSON object, with `tail` and `top_k` (K) of a sparse teacher; the numbers of a divergence's parts, tkd and
    /// dkd, are "NaN" where they are not computed: for plain jsd, tvd, skew-kl and skew-reverse-kl
    #[arg(long)]
    json: bool,
}

/// A file and the loss of it.
#[derive(clap::Args)]
pub struct BatchArgs {
    /// Logits or hidden states, and labels, as safetensors
    pub file: PathBuf,
    /// The backend that computes
    #[arg(long, value_enum, default_value = "auto")]
    backend: Choice,
    /// The loss that the student learns by
    #[arg(long, value_enum, default_value = "atkd")]
    objective: Name,
    /// How far the student's distribution q is from the teacher's p
    #[arg(long, value_enum, default_value = "forward-kl")]
    divergence: DivergenceName,
    /// The teacher's share in the mixture of jsd and skew-kl, the student's in that of skew-reverse-kl: in [0, 1], below 1
    /// for the skewed ones, and no nearer than 1e-9 to an end that it is not
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
    /// The first columns of either model's logits that count, or rows of its weight, where vocabularies are padded: the
    /// others have gradient 0
    #[arg(long, value_name = "V")]
    vocab_size: Option<usize>,
    /// Tokens with this label are dropped
    #[arg(long, default_value_t = -100, allow_negative_numbers = true)]
    ignore_index: i64,
    /// The probabilities of the tokens of which the teacher has no log-probability, where the file has `teacher_indices` and
    /// `teacher_log_probs` [default: bucket]
    #[arg(long, value_enum)]
    tail: Option<TailName>,
    /// Tokens whose logits exist at a time, of a file of hidden states: less memory, and more passes over the weights
    /// [default: as many as fit into 512 MB]
    #[arg(long, value_name = "TOKENS")]
    chunk: Option<usize>,
    /// Cut the vocabulary into so many uneven shards, one of which is empty if there are more than two, and compute as
    /// ranks would: each its own columns, with what they exchange merged
    #[arg(long, value_name = "R", value_parser = clap::value_parser!(u16).range(1..=1024))]
    shards: Option<u16>,
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

impl BatchArgs {
    /// A backend that is not here is told before a file is looked at.
    pub fn call(&self) -> Result<Call<'_>> {
        Ok(Call { args: self, objective: self.objective()?, backend: self.backend.backend()? })
    }

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

/// The values that a file has for each token.
pub struct OfTokens<'a> {
    pub labels: Option<Vec<i64>>,
    pub weights: Option<Cow<'a, [f32]>>,
    pub temperatures: Option<Cow<'a, [f32]>>,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    let batch = &args.batch;
    let call = batch.call()?;
    let destination =
        args.grad.as_ref().map(|path| Destination::open(path, &batch.file)).transpose()?;
    let bytes = tensors::open(&batch.file)?;
    let file = tensors::parse(&batch.file, &bytes)?;
    let wanted = Wanted { gradient: destination.is_some(), entropies: args.entropies };
    print(args, &compute(call, &file, wanted, destination)?)?;
    Ok(ExitCode::SUCCESS)
}

/// A loss of a file, of which nothing is read yet.
pub struct Call<'a> {
    args: &'a BatchArgs,
    objective: Objective,
    backend: Backend,
}

/// The results that are wanted beside the loss.
pub struct Wanted {
    /// With respect to the student's logits, or, if these are made of hidden states, to what is written.
    pub gradient: bool,
    pub entropies: bool,
}

/// The results of a call.
pub struct Computed<'a> {
    pub backend: Backend,
    pub output: Output,
    /// With respect to the logits, where these are in the file.
    pub gradient: Option<Matrix<'static>>,
    pub labels: Option<Vec<i64>>,
    entropies: Option<Entropies>,
    sparse: Option<Sparse<'a>>,
}

/// The loss of what the file holds; the gradient goes to its destination, if there is one.
pub fn compute<'a>(
    call: Call,
    file: &SafeTensors<'a>,
    wanted: Wanted,
    destination: Option<Destination>,
) -> Result<Computed<'a>> {
    let Call { args, objective, backend } = call;
    let has = |name| file.tensor(name).is_ok();
    let of_sparse = sparse::first_tensor(file);
    if let (Some(sparse), Some(dense)) = (
        of_sparse,
        ["teacher", "teacher_hidden", head::STUDENT_HIDDEN].into_iter().find(|name| has(name)),
    ) {
        bail!(
            "{} holds `{sparse}` and `{dense}`: either some log-probabilities of the teacher, beside \
             `student`, or all logits or hidden states",
            args.file.display()
        );
    }
    if args.tail.is_some() && of_sparse.is_none() {
        bail!(
            "--tail says what a teacher gives the tokens of which it has no log-probability, but {} holds no \
             `teacher_indices` and `teacher_log_probs`: leave --tail out",
            args.file.display()
        );
    }
    if !has(head::STUDENT_HIDDEN) {
        if args.chunk.is_some() {
            bail!(
                "--chunk says how many tokens' logits are made of hidden states at a time, but {} holds no \
                 `{}`",
                args.file.display(),
                head::STUDENT_HIDDEN
            );
        }
        let (teacher, backend) = match of_sparse {
            Some(_) => sparse_teacher(args, file, backend, wanted.entropies)?,
            None => (FileTeacher::Dense(Matrix::read(&args.file, file, "teacher")?), backend),
        };
        let of_tokens = of_tokens(args, file, &objective)?;
        let (output, gradient, entropies) =
            of_logits(args, &objective, &backend, file, &teacher, &of_tokens, &wanted)?;
        if let Some(destination) = destination
            && let Some(gradient) = &gradient
        {
            write_gradient(destination, gradient, entropies.as_ref(), &output)?;
        }
        let sparse = match teacher {
            FileTeacher::Sparse(sparse) => Some(sparse),
            FileTeacher::Dense(_) => None,
        };
        let labels = of_tokens.labels;
        return Ok(Computed { backend, output, gradient, labels, entropies, sparse });
    }
    if let Some(name) = ["student", "teacher"].into_iter().find(|name| has(name)) {
        bail!(
            "{} holds `{}` and `{name}`: either hidden states and weights, or logits, of both models",
            args.file.display(),
            head::STUDENT_HIDDEN
        );
    }
    for (option, given) in [("--shards", args.shards.is_some()), ("--entropies", wanted.entropies)]
    {
        if given {
            bail!(
                "{option} are of logits, but {} holds hidden states: use a file with `student` and `teacher`",
                args.file.display()
            );
        }
    }
    let backend = head::backend(args.backend)?;
    let chunks = args.chunk.map_or(Chunks::default(), Chunks::Tokens);
    let path = &args.file;
    let of_tokens = of_tokens(args, file, &objective)?;
    let output =
        head::loss(path, file, &objective, &of_tokens, args.vocab_size, chunks, destination)?;
    let labels = of_tokens.labels;
    Ok(Computed { backend, output, gradient: None, labels, entropies: None, sparse: None })
}

fn of_tokens<'a>(
    args: &BatchArgs,
    file: &SafeTensors<'a>,
    objective: &Objective,
) -> Result<OfTokens<'a>> {
    let required = objective.target() == Target::Label;
    Ok(OfTokens {
        labels: tensors::labels(&args.file, file, required)?,
        weights: tensors::of_tokens(file, "token_weights")?,
        temperatures: tensors::of_tokens(file, "temperatures")?,
    })
}

/// The teacher of a file that has the student's logits.
enum FileTeacher<'a> {
    Dense(Matrix<'a>),
    Sparse(Sparse<'a>),
}

impl FileTeacher<'_> {
    /// The teacher of a batch, of the student's tokens and vocabulary.
    fn teacher(&self, student: &Matrix, vocab_size: Option<usize>) -> Result<Teacher<'_>> {
        let teacher = match self {
            Self::Dense(teacher) => teacher,
            Self::Sparse(sparse) => {
                let vocab = vocab_size.unwrap_or(student.columns);
                return Ok(sparse.teacher(student, vocab)?.into());
            }
        };
        let same_vocab = student.columns == teacher.columns || vocab_size.is_some();
        if student.rows != teacher.rows || !same_vocab {
            bail!(
                "`student` is [{}, {}], but `teacher` is [{}, {}]: both must have a row for each token and \
                 a logit for each entry of one vocabulary{}",
                student.rows,
                student.columns,
                teacher.rows,
                teacher.columns,
                if same_vocab { "" } else { "; --vocab-size says where its padding starts" }
            );
        }
        let vocab = vocab_size.unwrap_or(teacher.columns);
        let logits = teacher.logits().and_then(|logits| logits.with_vocab(vocab));
        Ok(logits.context("`teacher`")?.into())
    }
}

/// The sparse teacher of a file that has one, and the backend for it.
fn sparse_teacher<'a>(
    args: &BatchArgs,
    file: &SafeTensors<'a>,
    backend: Backend,
    entropies: bool,
) -> Result<(FileTeacher<'a>, Backend)> {
    for (option, given) in [("--shards", args.shards.is_some()), ("--entropies", entropies)] {
        if given {
            bail!(
                "{option} takes the logits of both models, but {} holds a sparse teacher: leave {option} out, \
                 or use a file with `student` and `teacher`",
                args.file.display()
            );
        }
    }
    let backend = sparse::backend(args.backend, backend, args.tail)?;
    Ok((FileTeacher::Sparse(Sparse::read(&args.file, file, args.tail)?), backend))
}

/// The loss of a file of logits, or of a student's logits and a sparse teacher.
fn of_logits(
    args: &BatchArgs,
    objective: &Objective,
    backend: &Backend,
    file: &SafeTensors,
    teacher: &FileTeacher,
    of_tokens: &OfTokens,
    wanted: &Wanted,
) -> Result<(Output, Option<Matrix<'static>>, Option<Entropies>)> {
    let student = Matrix::read(&args.file, file, "student")?;
    let vocab = args.vocab_size.unwrap_or(student.columns);
    let teacher = teacher.teacher(&student, args.vocab_size)?;
    let OfTokens { labels, weights, temperatures } = of_tokens;

    let batch = match labels {
        Some(labels) => Batch::new(teacher, labels).context("`labels`")?,
        None => Batch::unlabelled(teacher),
    };
    let batch = match weights {
        Some(weights) => batch.with_token_weights(weights).context("`token_weights`")?,
        None => batch,
    };
    let batch = match temperatures {
        Some(temperatures) => batch.with_temperatures(temperatures).context("`temperatures`")?,
        None => batch,
    };
    let logits = student.logits().and_then(|logits| logits.with_vocab(vocab));
    let logits = logits.context("`student`")?;
    let entropies = match wanted.entropies {
        true => {
            let of = |logits| backend.token_entropies(logits, args.temperature);
            Some(Entropies { teacher: of(batch.teacher_logits()?)?, student: of(logits)? })
        }
        false => None,
    };
    let ranks = args.shards.map(usize::from);
    if !wanted.gradient {
        let output = match ranks {
            Some(ranks) => backend.in_shards(ranks, objective, &batch, logits, None)?,
            None => backend.forward(objective, &batch, logits)?,
        };
        return Ok((output, None, entropies));
    }
    let mut gradient = Matrix::zeros(logits.dtype(), student.rows, student.columns)?;
    let view = gradient.logits_mut()?.with_vocab(vocab)?;
    let output = match ranks {
        Some(ranks) => backend.in_shards(ranks, objective, &batch, logits, Some(view))?,
        None => backend.forward_backward(objective, &batch, logits, view)?,
    };
    Ok((output, Some(gradient), entropies))
}

/// The gradient with respect to the logits, and each token's terms and entropies.
fn write_gradient(
    destination: Destination,
    gradient: &Matrix,
    entropies: Option<&Entropies>,
    output: &Output,
) -> Result<()> {
    let shape = vec![gradient.rows, gradient.columns];
    let mut tensors = vec![("grad", gradient.safetensors_dtype(), shape, gradient.bytes())];
    if let Some(Entropies { teacher, student }) = entropies {
        for (name, values) in [("teacher_entropy", teacher), ("student_entropy", student)] {
            let bytes = bytemuck::cast_slice(values);
            tensors.push((name, safetensors::Dtype::F32, vec![values.len()], bytes));
        }
    }
    write(destination, tensors, output)
}

/// A tensor to write: its name, dtype, shape and bytes.
pub type Written<'a> = (&'a str, safetensors::Dtype, Vec<usize>, &'a [u8]);

/// These tensors and each token's terms, as safetensors.
pub fn write(destination: Destination, tensors: Vec<Written>, output: &Output) -> Result<()> {
    let mut tensors = tensors;
    let tokens = output.tokens.len();
    let column = |term: fn(&atkd::TokenTerms) -> f64| {
        output
            .tokens
            .iter()
            .flat_map(|token| (term(token) as f32).to_le_bytes())
            .collect::<Vec<u8>>()
    };
    let columns = [
        ("uncertainty", column(|token| token.uncertainty)),
        ("tkd", column(|token| token.tkd)),
        ("dkd", column(|token| token.dkd)),
        ("loss", column(|token| token.loss)),
    ];
    let hard: Vec<u8> = output.tokens.iter().map(|token| token.hard.into()).collect();
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

fn print(args: &Args, computed: &Computed) -> Result<()> {
    let Computed { backend, output, entropies, sparse, .. } = computed;
    let summary = output.summary();
    let mean_of_valid = |values: &[f32]| {
        let valid = output.tokens.iter().zip(values).filter(|(token, _)| token.valid);
        // The sum of nothing is -0.
        let sum = valid.map(|(_, &value)| f64::from(value)).sum::<f64>() + 0.0;
        sum / summary.valid_tokens.max(1) as f64
    };
    let mean_entropies = entropies.as_ref().map(|Entropies { teacher, student }| {
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
        if let Some(sparse) = sparse {
            object["tail"] = sparse.tail().into();
            object["top_k"] = sparse.top_k().into();
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
    if let Some(sparse) = sparse {
        table.add_row(["tail of the teacher", sparse.tail()]);
        table.add_row(["its known tokens in a row", &format!("up to {}", sparse.top_k())]);
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
        BatchArgs::augment_args(Command::new("loss"))
    }

    fn objective(options: &[&str]) -> Objective {
        let matches = command().get_matches_from([&["loss", "file"], options].concat());
        BatchArgs::from_arg_matches(&matches).unwrap().objective().unwrap()
    }

    /// The choices of an objective as options. Each match is over all that Rust has: a variant without a word does not
    /// compile.
    fn options_of(objective: &Objective) -> [String; 5] {
        let (divergence, beta) = match objective.divergence() {
            Divergence::ForwardKl => ("forward-kl", 0.5),
            Divergence::ReverseKl => ("reverse-kl", 0.5),
            Divergence::Jsd { beta } => ("jsd", beta),
            Divergence::TotalVariation => ("tvd", 0.5),
            Divergence::SkewKl { alpha } => ("skew-kl", alpha),
            Divergence::SkewReverseKl { alpha } => ("skew-reverse-kl", alpha),
        };
        let target = match objective.target() {
            Target::Label => "label",
            Target::Teacher => "teacher",
        };
        let rule = match objective.selection_rule() {
            SelectionRule::TopK => "top-k",
            SelectionRule::Median => "median",
        };
        let reduction = match objective.reduction() {
            Reduction::Mean => "mean",
            Reduction::Sum => "sum",
            Reduction::GroupMean => "group-mean",
            Reduction::Denominator(_) => unreachable!("it is for programs that accumulate"),
        };
        [
            format!("--divergence={divergence}"),
            format!("--beta={beta}"),
            format!("--target={target}"),
            format!("--selection-rule={rule}"),
            format!("--reduction={reduction}"),
        ]
    }

    #[test]
    fn every_choice_has_its_word() {
        let default = Objective::default();
        let number = 0.3;
        let divergences = [
            Divergence::ForwardKl,
            Divergence::ReverseKl,
            Divergence::Jsd { beta: number },
            Divergence::TotalVariation,
            Divergence::SkewKl { alpha: number },
            Divergence::SkewReverseKl { alpha: number },
        ];
        let divergences =
            divergences.map(|divergence| default.with_divergence(divergence).unwrap());
        let targets = [Target::Label, Target::Teacher].map(|target| default.with_target(target));
        let rules = [SelectionRule::TopK, SelectionRule::Median];
        let rules = rules.map(|rule| default.with_selection_rule(rule));
        let reductions = [Reduction::Mean, Reduction::Sum, Reduction::GroupMean];
        let reductions = reductions.map(|reduction| default.with_reduction(reduction).unwrap());
        for expected in divergences.into_iter().chain(targets).chain(rules).chain(reductions) {
            let options = options_of(&expected);
            assert_eq!(objective(&options.each_ref().map(String::as_str)), expected, "{options:?}");
        }
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

        let not_settings = [
            "file",
            "backend",
            "vocab_size",
            "tail",
            "chunk",
            "shards",
            "grad",
            "entropies",
            "json",
        ];
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
