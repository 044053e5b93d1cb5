//! The loss as a differentiable operation of candle: on CPU tensors, and with the feature `candle-cuda`
//! on CUDA tensors.
//!
//! ```
//! use atkd::{Objective, candle::loss};
//! use candle_core::{DType, Device, Tensor, Var};
//!
//! let student = Var::zeros((4, 32000), DType::F32, &Device::Cpu)?;
//! let teacher = Tensor::zeros((4, 32000), DType::F32, &Device::Cpu)?;
//! let labels = Tensor::new(&[7i64, 9, 11, -100], &Device::Cpu)?;
//! let loss = loss(&Objective::default(), &student, &teacher, &labels)?;
//! let gradient = loss.backward()?.remove(&student);
//! # assert!(gradient.is_some());
//! # Ok::<(), candle_core::Error>(())
//! ```

#[cfg(feature = "candle-cuda")]
mod cuda;
mod linear;
mod sparse;

use candle_core::{
    CpuStorage, CustomOp1, DType, Device, Error, Layout, Result, Shape, Storage, Tensor, WithDType,
    bail,
};
use half::bf16;
pub use linear::{Layer, linear_loss, linear_loss_with_output};
pub use sparse::{KnownLogProbs, sparse_loss, sparse_loss_with_output};

use crate::{
    Batch, Elements, ElementsMut, Logits, LogitsMut, Objective, Output, Strides, Teacher, cpu,
};

/// The values that tokens have of their own, in tensors shaped as the logits without the last dimension, on their device.
/// A tensor of labels becomes those alone.
#[derive(Clone, Copy, Debug)]
pub struct Tokens<'a> {
    labels: &'a Tensor,
    weights: Option<&'a Tensor>,
    temperatures: Option<&'a Tensor>,
}

impl<'a> From<&'a Tensor> for Tokens<'a> {
    fn from(labels: &'a Tensor) -> Self {
        Self { labels, weights: None, temperatures: None }
    }
}

impl<'a> Tokens<'a> {
    /// Multiplies each token's terms and gradient by a weight, float32: see
    /// [`Batch::with_token_weights`](crate::Batch::with_token_weights). No gradient flows back to the weights.
    pub fn with_weights(self, weights: &'a Tensor) -> Self {
        Self { weights: Some(weights), ..self }
    }

    /// Divides each token's logits by a temperature of its own, float32: see
    /// [`Batch::with_temperatures`](crate::Batch::with_temperatures). No gradient flows back to the temperatures.
    pub fn with_temperatures(self, temperatures: &'a Tensor) -> Self {
        Self { temperatures: Some(temperatures), ..self }
    }

    /// The float32 values, if there are any, by their names.
    fn values(&self) -> [(&'static str, Option<&'a Tensor>); 2] {
        [("weights", self.weights), ("temperatures", self.temperatures)]
    }

    /// Checks that there is one of each per token, for the student's logits `[.., vocab]` or hidden states.
    fn check(&self, of: &str, rows: &Tensor) -> Result<()> {
        check_tokens("labels", self.labels, of, rows)?;
        if !self.labels.dtype().is_int() {
            bail!("the labels are {:?}, but must be integers", self.labels.dtype())
        }
        for (what, tensor) in self.values() {
            let Some(tensor) = tensor else { continue };
            check_tokens(what, tensor, of, rows)?;
            if tensor.dtype() != DType::F32 {
                bail!("the {what} are {:?}, but must be F32", tensor.dtype())
            }
        }
        Ok(())
    }
}

/// Checks that there is one value per token, where the student's logits or hidden states are.
fn check_tokens(what: &str, tensor: &Tensor, of: &str, rows: &Tensor) -> Result<()> {
    let shape = rows.dims();
    let expected = &shape[..shape.len() - 1];
    if tensor.dims() != expected {
        bail!("the {what} are {:?}, but for {of} {shape:?} must be {expected:?}", tensor.dims())
    }
    check_device(what, tensor, of, rows)
}

fn check_device(what: &str, tensor: &Tensor, of: &str, student: &Tensor) -> Result<()> {
    if !tensor.device().same_device(student.device()) {
        bail!(
            "the {what} are on {:?}, but the student's {of} are on {:?}",
            tensor.device().location(),
            student.device().location()
        )
    }
    Ok(())
}

/// The loss of the student's logits, a float32 scalar that `backward` goes through.
///
/// - `student`, `teacher`: logits `[.., vocab]` of one shape, such as `[tokens, vocab]` or
///   `[batch, time, vocab]`, each float32, float16 or bfloat16. They are read where they lie if rows
///   are contiguous and at most two strides lead to them, as in `narrow(1, 0, time - 1)` of the latter,
///   and copied otherwise.
/// - `tokens`: labels, their shape without the last dimension, of any integer dtype; or [`Tokens`], with weights and
///   temperatures beside them.
///
/// `narrow` gives the columns that count of a padded vocabulary; it copies nothing, but its own backward pass makes
/// a gradient as wide as the logits.
///
/// If the student is tracked (it depends on a `Var`), the gradient is computed together with the
/// loss, which then holds it: as large as the student's logits (in float32 for float16 logits, so that
/// a scaled loss rescues gradients that float16 cannot represent). `backward` multiplies it by the
/// gradient that arrives, and returns it in the student's dtype. Nothing flows back to the teacher.
///
/// On CUDA tensors nothing waits for the device. `backward` takes the gradient from the loss; another `backward` of the
/// same loss computes it anew. For float16 logits the loss holds none, and `backward` computes it with the gradient that
/// arrives as a factor, which reads both models' logits once more. A label out of range is met by a kernel, which drops
/// its token and makes the loss NaN; [`loss_with_output`], which waits, returns the error. A workspace of 33 bytes per token
/// and 100 KB stays for each thread and stream that computes losses.
///
/// # Errors
/// If tensors are on different devices or of other dtypes, shapes differ, or a label is out of range.
pub fn loss<'a>(
    objective: &Objective,
    student: &Tensor,
    teacher: &Tensor,
    tokens: impl Into<Tokens<'a>>,
) -> Result<Tensor> {
    Ok(loss_and_output(objective, student, teacher, &tokens.into(), false)?.0)
}

/// [`loss`], and the terms of each token, in the order of the labels' elements.
///
/// # Errors
/// Those of [`loss`].
pub fn loss_with_output<'a>(
    objective: &Objective,
    student: &Tensor,
    teacher: &Tensor,
    tokens: impl Into<Tokens<'a>>,
) -> Result<(Tensor, Output)> {
    loss_and_output(objective, student, teacher, &tokens.into(), true)
        .map(|(loss, output)| (loss, output.expect("it was asked for")))
}

/// The entropy of the distribution of each of a model's tokens, in nats, float32, of logits `[.., vocab]` divided by a
/// temperature, in one read of them: as [`cpu::token_entropies`]. It has no derivative.
///
/// # Errors
/// If the logits are of other dtypes or on another device than [`loss`] takes, or the temperature is not in
/// [1e-30, 1e30].
pub fn token_entropies(logits: &Tensor, temperature: f64) -> Result<Tensor> {
    let rows = Rows::new("", logits)?;
    let shape = &logits.dims()[..logits.rank() - 1];
    match logits.device() {
        Device::Cpu => {
            let (storage, _) = rows.tensor.storage_and_layout();
            let entropies =
                cpu::token_entropies(rows.logits(&storage)?, temperature).map_err(Error::wrap)?;
            Tensor::from_vec(entropies, shape, &Device::Cpu)
        }
        #[cfg(feature = "candle-cuda")]
        Device::Cuda(_) => cuda::token_entropies(&rows, temperature, shape),
        other => not_here("logits", other),
    }
}

fn loss_and_output(
    objective: &Objective,
    student: &Tensor,
    teacher: &Tensor,
    tokens: &Tokens,
    #[cfg_attr(not(feature = "candle-cuda"), expect(unused_variables))] want_output: bool,
) -> Result<(Tensor, Option<Output>)> {
    let (student_rows, teacher_rows) =
        (Rows::new("student's ", student)?, Rows::new("teacher's ", teacher)?);
    if student.dims() != teacher.dims() {
        bail!(
            "the student's logits are {:?}, but the teacher's are {:?}",
            student.dims(),
            teacher.dims()
        )
    }
    tokens.check("logits", student)?;
    check_device("teacher's logits", teacher, "logits", student)?;
    match student.device() {
        Device::Cpu => {
            let (storage, _) = teacher_rows.tensor.storage_and_layout();
            let teacher = teacher_rows.logits(&storage)?;
            let (loss, output) =
                cpu_loss(objective, student, &student_rows, teacher.into(), tokens)?;
            Ok((loss, Some(output)))
        }
        #[cfg(feature = "candle-cuda")]
        Device::Cuda(_) => {
            let batch = cuda::Batch {
                teacher: cuda::Teacher::Dense(teacher.detach()),
                labels: tokens.labels.clone(),
                values: tokens.values().map(|(_, tensor)| tensor.map(Tensor::detach)),
            };
            let (op, output) = batch.forward(objective, &student_rows, want_output)?;
            Ok((student.apply_op1(op)?, output))
        }
        other => not_here("logits", other),
    }
}

fn not_here<T>(what: &str, device: &Device) -> Result<T> {
    bail!(
        "the {what} are on {:?}, but must be on the CPU, or on CUDA with the feature candle-cuda",
        device.location()
    )
}

/// [`Tokens`] in slices.
struct HostTokens {
    labels: Vec<i64>,
    weights: Option<Vec<f32>>,
    temperatures: Option<Vec<f32>>,
}

impl HostTokens {
    fn new(tokens: &Tokens) -> Result<Self> {
        let values = |tensor: Option<&Tensor>| -> Result<Option<Vec<f32>>> {
            tensor.map(|tensor| tensor.flatten_all()?.to_vec1()).transpose()
        };
        Ok(Self {
            labels: tokens.labels.to_dtype(DType::I64)?.flatten_all()?.to_vec1()?,
            weights: values(tokens.weights)?,
            temperatures: values(tokens.temperatures)?,
        })
    }
}

fn cpu_loss(
    objective: &Objective,
    student: &Tensor,
    student_rows: &Rows,
    teacher: Teacher,
    tokens: &Tokens,
) -> Result<(Tensor, Output)> {
    let HostTokens { labels, weights, temperatures } = HostTokens::new(tokens)?;

    let (student_storage, _) = student_rows.tensor.storage_and_layout();
    let logits = student_rows.logits(&student_storage)?;
    let mut batch = Batch::new(teacher, &labels).map_err(Error::wrap)?;
    if let Some(weights) = &weights {
        batch = batch.with_token_weights(weights).map_err(Error::wrap)?;
    }
    if let Some(temperatures) = &temperatures {
        batch = batch.with_temperatures(temperatures).map_err(Error::wrap)?;
    }

    if !student.track_op() {
        let output = cpu::forward(objective, &batch, logits).map_err(Error::wrap)?;
        return Ok((Tensor::new(output.loss as f32, &Device::Cpu)?, output));
    }
    let (output, gradient) = match student.dtype() {
        DType::BF16 => forward_backward(objective, &batch, logits, student.shape(), bf16::ZERO)?,
        _ => forward_backward(objective, &batch, logits, student.shape(), 0f32)?,
    };
    let op = Loss { value: output.loss as f32, gradient };
    Ok((student.apply_op1(op)?, output))
}

/// The loss and its gradient, of the dtype of `zero`.
fn forward_backward<T: WithDType>(
    objective: &Objective,
    batch: &Batch,
    student: Logits,
    shape: &Shape,
    zero: T,
) -> Result<(Output, Tensor)>
where
    for<'a> ElementsMut<'a>: From<&'a mut Vec<T>>,
{
    let (tokens, vocab) = (student.tokens(), student.vocab());
    let mut gradient = vec![zero; tokens * vocab];
    let output = LogitsMut::new(&mut gradient, tokens, vocab)
        .and_then(|gradient| cpu::forward_backward(objective, batch, student, gradient))
        .map_err(Error::wrap)?;
    Ok((output, Tensor::from_vec(gradient, shape, &Device::Cpu)?))
}

/// A loss that is already known, and its gradient.
struct Loss {
    value: f32,
    gradient: Tensor,
}

impl CustomOp1 for Loss {
    fn name(&self) -> &'static str {
        "atkd-loss"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![self.value]), Shape::from(())))
    }

    fn bwd(&self, student: &Tensor, _: &Tensor, upstream: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(scaled(&self.gradient, upstream, student.dtype())?))
    }
}

/// A gradient times what arrives.
fn scaled(gradient: &Tensor, upstream: &Tensor, dtype: DType) -> Result<Tensor> {
    match upstream.to_scalar::<f32>()? {
        1.0 => gradient.to_dtype(dtype),
        upstream => {
            let scaled = gradient.to_dtype(DType::F32)?.affine(upstream.into(), 0.0)?;
            scaled.to_dtype(dtype)
        }
    }
}

/// The elements of a tensor from its first on.
fn elements<'a>(
    what: impl std::fmt::Display,
    layout: &Layout,
    storage: &'a Storage,
) -> Result<Elements<'a>> {
    let start = layout.start_offset();
    Ok(match storage {
        Storage::Cpu(CpuStorage::F32(v)) => Elements::F32(v.get(start..).unwrap_or_default()),
        Storage::Cpu(CpuStorage::F16(v)) => Elements::F16(v.get(start..).unwrap_or_default()),
        Storage::Cpu(CpuStorage::BF16(v)) => Elements::Bf16(v.get(start..).unwrap_or_default()),
        other => bail!("the {what} are {:?}, but must be F32, F16 or BF16", other.dtype()),
    })
}

/// Logits `[.., vocab]` as rows with one stride or two.
struct Rows {
    whose: &'static str,
    tensor: Tensor,
    tokens: usize,
    vocab: usize,
    strides: Strides,
}

impl Rows {
    fn new(whose: &'static str, tensor: &Tensor) -> Result<Self> {
        let Some((&vocab, leading)) = tensor.dims().split_last() else {
            bail!("the {whose}logits are a scalar, but must be [tokens, vocab]")
        };
        let (tensor, strides) = match strides(tensor) {
            Some(strides) => (tensor.clone(), strides),
            None => (tensor.contiguous()?, vocab.into()),
        };
        let tokens = leading.iter().product();
        Ok(Self { whose, tensor, tokens, vocab, strides })
    }

    fn logits<'a>(&self, storage: &'a Storage) -> Result<Logits<'a>> {
        let elements =
            elements(format_args!("{}logits", self.whose), self.tensor.layout(), storage)?;
        Logits::strided(elements, self.tokens, self.vocab, self.strides).map_err(Error::wrap)
    }
}

fn strides(tensor: &Tensor) -> Option<Strides> {
    Strides::of_tensor(tensor.dims(), tensor.stride())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_two_strides_need_no_copy() -> Result<()> {
        let logits = Tensor::zeros((2, 3, 8), DType::F32, &Device::Cpu)?;
        let strides = |tensor: Tensor| strides(&tensor);
        assert_eq!(strides(logits.clone()), Some(8.into()));
        assert_eq!(strides(logits.narrow(2, 1, 5)?), Some(8.into()));
        assert_eq!(strides(logits.narrow(0, 1, 1)?), Some(8.into()));
        assert_eq!(strides(logits.narrow(1, 2, 1)?), Some(24.into()));
        let one = logits.narrow(1, 0, 1)?.narrow(0, 0, 1)?.narrow(2, 0, 4)?;
        assert_eq!(strides(one), Some(4.into()));
        assert_eq!(strides(logits.narrow(1, 0, 2)?), Some(Strides::nested(2, 24, 8)));
        assert_eq!(strides(logits.transpose(0, 1)?), Some(Strides::nested(2, 8, 24)));
        assert_eq!(strides(logits.transpose(1, 2)?), None);
        let blocks = Tensor::zeros((2, 3, 4, 5, 8), DType::F32, &Device::Cpu)?;
        assert_eq!(strides(blocks.narrow(2, 0, 3)?), Some(Strides::nested(15, 160, 8)));
        assert_eq!(strides(blocks.narrow(2, 0, 3)?.narrow(3, 0, 4)?), None);
        let broadcast = Tensor::zeros(8, DType::F32, &Device::Cpu)?.broadcast_as((3, 8))?;
        assert_eq!(strides(broadcast), None);
        Ok(())
    }
}
