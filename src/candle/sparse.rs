//! The loss with a teacher of which a few log-probabilities per token are known.

use candle_core::{DType, Device, Error, Result, Tensor, bail};

use super::{Rows, Tokens, check_device, check_tokens, cpu_loss, elements};
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

/// [`loss`](super::loss) with a [`SparseTeacher`], on CPU tensors. Nothing flows back to the teacher.
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
/// Those of [`loss`](super::loss); if a value of the teacher's is none that it may be; on CUDA tensors, for which there is no
/// kernel yet.
pub fn sparse_loss<'a>(
    objective: &Objective,
    student: &Tensor,
    teacher: KnownLogProbs,
    tokens: impl Into<Tokens<'a>>,
) -> Result<Tensor> {
    Ok(sparse_loss_with_output(objective, student, teacher, tokens)?.0)
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
    let tokens = tokens.into();
    let rows = Rows::new("student's ", student)?;
    if !matches!(student.device(), Device::Cpu) {
        bail!(
            "the logits are on {:?}, but there is no kernel for sparse teachers yet: move them to the CPU, or \
             use loss with the teacher's logits",
            student.device().location()
        )
    }
    teacher.check(student)?;
    tokens.check("logits", student)?;
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
    cpu_loss(objective, student, &rows, known.into(), &tokens)
}
