//! The loss with a teacher of which a few log-probabilities per token are known.

use candle_core::{DType, Device, Error, Result, Tensor, bail};

#[cfg(feature = "candle-cuda")]
use super::cuda;
use super::{Rows, Tokens, check_device, check_tokens, cpu_loss, elements, not_here};
use crate::{Objective, Output, SparseTeacher, Tail};

/// The tensors of a [`SparseTeacher`], on the device of the student's logits.
#[derive(Clone, Copy, Debug)]
pub struct KnownLogProbs<'a> {
    indices: &'a Tensor,
    log_probs: &'a Tensor,
    target_log_probs: Option<&'a Tensor>,
    tail: Tail,
}

impl<'a> KnownLogProbs<'a> {
    /// Tokens of the vocabulary and their log-probabilities, both `[.., K]` where the student's logits are `[.., vocab]`: the
    /// first of any integer dtype, -1 for none, the second float32, float16 or bfloat16. See [`SparseTeacher::new`].
    pub fn new(indices: &'a Tensor, log_probs: &'a Tensor) -> Self {
        Self { indices, log_probs, target_log_probs: None, tail: Tail::default() }
    }

    /// With the log-probability of each token's label, float32, shaped as the labels: see
    /// [`SparseTeacher::with_target_log_probs`].
    pub fn with_target_log_probs(self, log_probs: &'a Tensor) -> Self {
        Self { target_log_probs: Some(log_probs), ..self }
    }

    /// With another tail than [`Tail::Bucket`].
    pub fn with_tail(self, tail: Tail) -> Self {
        Self { tail, ..self }
    }

    fn check(&self, student: &Tensor) -> Result<()> {
        let (indices, log_probs) = (self.indices.dims(), self.log_probs.dims());
        let logits = student.dims();
        let leading = &logits[..logits.len() - 1];
        if indices.split_last().is_none_or(|(_, of_tokens)| of_tokens != leading) {
            bail!(
                "the teacher's indices are {indices:?}, but for logits {logits:?} must be {leading:?} and K"
            )
        }
        if log_probs != indices {
            bail!(
                "the teacher's log-probabilities are {log_probs:?}, but for indices {indices:?} must be the same"
            )
        }
        if !self.indices.dtype().is_int() {
            bail!("the teacher's indices are {:?}, but must be integers", self.indices.dtype())
        }
        for (what, tensor) in [("indices", self.indices), ("log-probabilities", self.log_probs)] {
            check_device(&format!("teacher's {what}"), tensor, "logits", student)?;
        }
        if let Some(tensor) = self.target_log_probs {
            check_tokens("targets' log-probabilities", tensor, "logits", student)?;
            if tensor.dtype() != DType::F32 {
                bail!("the targets' log-probabilities are {:?}, but must be F32", tensor.dtype())
            }
        }
        Ok(())
    }
}

/// [`loss`](super::loss) with a [`SparseTeacher`]. Nothing flows back to the teacher. On CUDA tensors, which have no
/// [`Tail::Uniform`], a kernel checks the teacher's values, as it does labels: wrong ones make the loss NaN, and are an error of
/// [`sparse_loss_with_output`], which waits.
///
/// ```
/// use atkd::{Objective, candle::{KnownLogProbs, sparse_loss}};
/// use candle_core::{DType, Device, Tensor, Var};
///
/// let student = Var::zeros((2, 32000), DType::F32, &Device::Cpu)?;
/// let indices = Tensor::new(&[[7i64, 2, 11], [9, 7, -1]], &Device::Cpu)?;
/// let log_probs = Tensor::new(&[[-0.5f32, -1.5, -3.0], [-0.1, -4.0, 0.0]], &Device::Cpu)?;
/// let labels = Tensor::new(&[7i64, 9], &Device::Cpu)?;
/// let teacher = KnownLogProbs::new(&indices, &log_probs);
/// let loss = sparse_loss(&Objective::default(), &student, teacher, &labels)?;
/// let gradient = loss.backward()?.remove(&student);
/// # assert!(gradient.is_some());
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// Those of [`loss`](super::loss); if a value of the teacher's is none that it may be; for [`Tail::Uniform`] on CUDA tensors.
pub fn sparse_loss<'a>(
    objective: &Objective,
    student: &Tensor,
    teacher: KnownLogProbs,
    tokens: impl Into<Tokens<'a>>,
) -> Result<Tensor> {
    Ok(sparse_loss_and_output(objective, student, teacher, &tokens.into(), false)?.0)
}

/// [`sparse_loss`], and the terms of each token, in the order of the labels' elements.
///
/// # Errors
/// Those of [`sparse_loss`].
pub fn sparse_loss_with_output<'a>(
    objective: &Objective,
    student: &Tensor,
    teacher: KnownLogProbs,
    tokens: impl Into<Tokens<'a>>,
) -> Result<(Tensor, Output)> {
    sparse_loss_and_output(objective, student, teacher, &tokens.into(), true)
        .map(|(loss, output)| (loss, output.expect("it was asked for")))
}

fn sparse_loss_and_output(
    objective: &Objective,
    student: &Tensor,
    teacher: KnownLogProbs,
    tokens: &Tokens,
    #[cfg_attr(not(feature = "candle-cuda"), expect(unused_variables))] want_output: bool,
) -> Result<(Tensor, Option<Output>)> {
    let rows = Rows::new("student's ", student)?;
    teacher.check(student)?;
    tokens.check("logits", student)?;
    match student.device() {
        Device::Cpu => {
            let (loss, output) = on_cpu(objective, student, &rows, teacher, tokens)?;
            Ok((loss, Some(output)))
        }
        #[cfg(feature = "candle-cuda")]
        Device::Cuda(_) => {
            let KnownLogProbs { indices, log_probs, target_log_probs, tail } = teacher;
            let batch = cuda::Batch {
                teacher: cuda::Teacher::Sparse {
                    indices: indices.clone(),
                    log_probs: log_probs.detach(),
                    target_log_probs: target_log_probs.map(Tensor::detach),
                    tail,
                },
                labels: tokens.labels.clone(),
                values: tokens.values().map(|(_, tensor)| tensor.map(Tensor::detach)),
            };
            let (op, output) = batch.forward(objective, &rows, want_output)?;
            Ok((student.apply_op1(op)?, output))
        }
        other => not_here("logits", other),
    }
}

fn on_cpu(
    objective: &Objective,
    student: &Tensor,
    rows: &Rows,
    teacher: KnownLogProbs,
    tokens: &Tokens,
) -> Result<(Tensor, Output)> {
    let KnownLogProbs { indices, log_probs, target_log_probs, tail } = teacher;
    let top_k = indices.dims()[indices.rank() - 1];
    let indices: Vec<i64> = indices.to_dtype(DType::I64)?.flatten_all()?.to_vec1()?;
    let log_probs = log_probs.contiguous()?;
    let (storage, layout) = log_probs.storage_and_layout();
    let log_probs =
        elements("teacher's log-probabilities", layout, &storage)?.slice(0..indices.len());
    let of_targets: Option<Vec<f32>> =
        target_log_probs.map(|tensor| tensor.flatten_all()?.to_vec1()).transpose()?;
    let mut known = SparseTeacher::new(&indices, log_probs, rows.tokens, top_k, rows.vocab)
        .map_err(Error::wrap)?
        .with_tail(tail);
    if let Some(of_targets) = &of_targets {
        known = known.with_target_log_probs(of_targets).map_err(Error::wrap)?;
    }
    cpu_loss(objective, student, rows, known.into(), tokens)
}
