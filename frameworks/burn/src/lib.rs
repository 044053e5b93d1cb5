//! The loss of [`atkd`] as a differentiable operation of [burn](https://burn.dev), on its CPU backend Flex.
//!
//! ```
//! use atkd_burn::loss;
//! use burn::tensor::{Device, Int, Tensor};
//!
//! let device = Device::flex().autodiff();
//! let student = Tensor::<2>::zeros([4, 32000], &device).require_grad();
//! let teacher = Tensor::<2>::zeros([4, 32000], &Device::flex());
//! let labels = Tensor::<1, Int>::from_data([7, 9, 11, -100], &device);
//! let loss = loss(&atkd::Objective::default(), student.clone(), teacher, labels)?;
//! let gradient = student.grad(&loss.backward());
//! # assert_eq!(gradient.unwrap().dims(), [4, 32000]);
//! # Ok::<(), atkd_burn::Error>(())
//! ```
//!
//! An [`atkd::Objective`] says which loss it is. Other backends than Flex are an error: see
//! [`Error::Backend`].
#![warn(missing_docs)]

use atkd::{Batch, Elements, ElementsMut, Logits, LogitsMut, Objective, Output, Strides, cpu};
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::{
    BalancedCheckpointing, CheckpointStrategy, NoCheckpointing,
};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind, unary};
use burn::backend::flex::FlexTensor;
use burn::backend::ops::FloatTensorOps;
use burn::backend::{Autodiff, DispatchKindConversion, DispatchTensor, Flex};
use burn::tensor::{
    DType, Device, Element, FloatDType, GradientCheckpointingStrategy, Int, IntDType, Tensor,
    TensorData, bf16, f16,
};

/// Everything that can be wrong with a call.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "the messages name the fields")]
pub enum Error {
    /// Teacher and student must have one shape, and labels and other values of tokens that without the last dimension.
    #[error("the {what} are {actual:?}, but for student's logits {student:?} must be {expected:?}")]
    Shape { what: &'static str, actual: Vec<usize>, student: Vec<usize>, expected: Vec<usize> },
    /// A dtype that is not read.
    #[error("the {what} are {actual:?}, but must be {allowed}")]
    Dtype { what: &'static str, actual: DType, allowed: &'static str },
    /// All tensors must be on the student's device.
    #[error("the {what} are on {actual}, but the student's logits are on {student}")]
    Device { what: &'static str, actual: String, student: String },
    /// Logits on another backend than Flex. Move them: `tensor.to_device(&Device::flex().autodiff())` keeps the student
    /// tracked.
    #[error("the logits are on {device}, but must be on burn's CPU backend, Flex")]
    Backend { device: String },
    /// What the loss itself refuses, such as a label out of range.
    #[error(transparent)]
    Loss(#[from] atkd::Error),
}

/// A [`Result`](std::result::Result) with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// The values that tokens have of their own, in tensors shaped as the logits without the last dimension, on their device.
/// A tensor of labels becomes those alone.
#[derive(Clone, Debug)]
pub struct Tokens<const L: usize> {
    labels: Tensor<L, Int>,
    weights: Option<Tensor<L>>,
    temperatures: Option<Tensor<L>>,
}

impl<const L: usize> From<Tensor<L, Int>> for Tokens<L> {
    fn from(labels: Tensor<L, Int>) -> Self {
        Self { labels, weights: None, temperatures: None }
    }
}

impl<const L: usize> Tokens<L> {
    /// Multiplies each token's terms and gradient by a weight, float32: see [`Batch::with_token_weights`]. No gradient
    /// flows back to the weights.
    pub fn with_weights(self, weights: Tensor<L>) -> Self {
        Self { weights: Some(weights), ..self }
    }

    /// Divides each token's logits by a temperature of its own, float32: see [`Batch::with_temperatures`]. No gradient
    /// flows back to the temperatures.
    pub fn with_temperatures(self, temperatures: Tensor<L>) -> Self {
        Self { temperatures: Some(temperatures), ..self }
    }
}

/// The loss of the student's logits in nats, float32 `[1]`, that `backward` goes through.
///
/// - `student`, `teacher`: logits `[.., vocab]` of one shape, such as `[tokens, vocab]` or `[batch, time, vocab]`, each
///   float32, float16 or bfloat16. They are read where they lie if rows are contiguous and at most two strides lead to
///   them, as in `slice(s![.., ..-1])` of the latter, and copied otherwise.
/// - `tokens`: labels, their shape without the last dimension, of any integer dtype; or [`Tokens`], with weights and
///   temperatures beside them.
///
/// If the student is tracked (it depends on a tensor that requires a gradient), the gradient is computed together with
/// the loss, which then holds it: as large as the student's logits, in float32 for float16 logits, so that a scaled loss
/// rescues gradients that float16 cannot represent. `backward` multiplies it by the gradient that arrives, and returns
/// it in the student's dtype. Nothing flows back to the teacher, which may be on a device with or without autodiff.
///
/// The calling thread works, and those of rayon's current pool that are free: see [`atkd::cpu`].
///
/// # Errors
/// If the logits are on another backend than Flex or tensors on different devices, dtypes or shapes are others than
/// these, or a label is out of range.
pub fn loss<const D: usize, const L: usize>(
    objective: &Objective,
    student: Tensor<D>,
    teacher: Tensor<D>,
    tokens: impl Into<Tokens<L>>,
) -> Result<Tensor<1>> {
    Ok(loss_with_output(objective, student, teacher, tokens)?.0)
}

/// [`loss`], and the terms of each token, in the order of the labels' elements.
///
/// # Errors
/// Those of [`loss`].
pub fn loss_with_output<const D: usize, const L: usize>(
    objective: &Objective,
    student: Tensor<D>,
    teacher: Tensor<D>,
    tokens: impl Into<Tokens<L>>,
) -> Result<(Tensor<1>, Output)> {
    let batch = HostBatch::new(&student, teacher, tokens.into())?;
    let call = Call { objective, batch: &batch };
    match student.device().gradient_checkpointing_strategy() {
        None => {
            let (loss, output) = call.forward(Rows::new("student's logits", flex(student)?)?)?;
            Ok((Tensor::from_primitive::<Flex>(loss), output))
        }
        Some(GradientCheckpointingStrategy::Disabled) => {
            call.on_graph::<D, NoCheckpointing>(student)
        }
        Some(GradientCheckpointingStrategy::Balanced) => {
            call.on_graph::<D, BalancedCheckpointing>(student)
        }
    }
}

/// Everything of a batch but the student's logits.
struct HostBatch {
    teacher: Rows,
    labels: Vec<i64>,
    weights: Option<Vec<f32>>,
    temperatures: Option<Vec<f32>>,
}

impl HostBatch {
    fn new<const D: usize, const L: usize>(
        student: &Tensor<D>,
        teacher: Tensor<D>,
        tokens: Tokens<L>,
    ) -> Result<Self> {
        let shape = student.dims();
        let check = |what, actual: &[usize], expected: &[usize], device: &Device| {
            if actual != expected {
                let (actual, expected) = (actual.to_vec(), expected.to_vec());
                return Err(Error::Shape { what, actual, student: shape.to_vec(), expected });
            }
            let of_student = student.device().without_autodiff();
            let device = device.clone().without_autodiff();
            if device != of_student {
                let (actual, student) = (format!("{device:?}"), format!("{of_student:?}"));
                return Err(Error::Device { what, actual, student });
            }
            Ok(())
        };
        logits_dtype("student's logits", student.dtype())?;
        logits_dtype("teacher's logits", teacher.dtype())?;
        let Tokens { labels, weights, temperatures } = tokens;
        let of_tokens = &shape[..D.saturating_sub(1)];
        check("teacher's logits", &teacher.dims(), &shape, &teacher.device())?;
        check("labels", &labels.dims(), of_tokens, &labels.device())?;
        let values = |what, values: Option<Tensor<L>>| -> Result<Option<Vec<f32>>> {
            let Some(values) = values else { return Ok(None) };
            check(what, &values.dims(), of_tokens, &values.device())?;
            match values.dtype() {
                DType::F32 => Ok(Some(host(values.into_data()))),
                actual => Err(Error::Dtype { what, actual, allowed: "F32" }),
            }
        };
        let weights = values("weights", weights)?;
        let temperatures = values("temperatures", temperatures)?;
        let teacher = Rows::new("teacher's logits", flex(teacher.without_autodiff())?)?;
        let labels = host(labels.cast(IntDType::I64).into_data());
        Ok(Self { teacher, labels, weights, temperatures })
    }
}

/// The elements of data that are known to be of this type.
fn host<T: Element>(data: TensorData) -> Vec<T> {
    data.as_slice().expect("the dtype is this type's").to_vec()
}

fn flex<const D: usize>(tensor: Tensor<D>) -> Result<FlexTensor> {
    let device = tensor.device();
    tensor
        .try_into_primitive::<Flex>()
        .map_err(|_| Error::Backend { device: format!("{device:?}") })
}

/// A loss that is to be computed.
struct Call<'a> {
    objective: &'a Objective,
    batch: &'a HostBatch,
}

impl Call<'_> {
    fn batch(&self) -> Result<Batch<'_>> {
        let HostBatch { teacher, labels, weights, temperatures } = self.batch;
        let mut batch = Batch::new(teacher.logits()?, labels)?;
        if let Some(weights) = weights {
            batch = batch.with_token_weights(weights)?;
        }
        if let Some(temperatures) = temperatures {
            batch = batch.with_temperatures(temperatures)?;
        }
        Ok(batch)
    }

    /// The loss alone.
    fn forward(&self, student: Rows) -> Result<(FlexTensor, Output)> {
        let output = cpu::forward(self.objective, &self.batch()?, student.logits()?)?;
        Ok((scalar(output.loss), output))
    }

    /// The loss of a student on a device with autodiff, and its gradient if it is tracked.
    fn on_graph<const D: usize, C: CheckpointStrategy>(
        &self,
        student: Tensor<D>,
    ) -> Result<(Tensor<1>, Output)>
    where
        DispatchTensor: DispatchKindConversion<Autodiff<Flex, C>>,
    {
        let device = student.device();
        let student = student
            .try_into_primitive::<Autodiff<Flex, C>>()
            .map_err(|_| Error::Backend { device: format!("{device:?}") })?;
        let (student, node) = student.into_parts();
        let student = Rows::new("student's logits", student)?;
        let (loss, output) = match Loss.prepare::<C>([node]).compute_bound().stateful() {
            OpsKind::Tracked(operation) => {
                let (output, gradient) = match student.dtype {
                    FloatDType::BF16 => self.forward_backward(&student, bf16::ZERO)?,
                    _ => self.forward_backward(&student, 0f32)?,
                };
                let gradient = Gradient { gradient, dtype: student.dtype };
                (operation.finish(gradient, scalar(output.loss)), output)
            }
            OpsKind::UnTracked(operation) => {
                let (loss, output) = self.forward(student)?;
                (operation.finish(loss), output)
            }
        };
        Ok((Tensor::from_primitive::<Autodiff<Flex, C>>(loss), output))
    }

    /// The loss and its gradient, of the dtype of `zero`.
    fn forward_backward<T: Element>(&self, student: &Rows, zero: T) -> Result<(Output, FlexTensor)>
    where
        for<'a> ElementsMut<'a>: From<&'a mut Vec<T>>,
    {
        let mut gradient = vec![zero; student.tokens * student.vocab];
        let output = cpu::forward_backward(
            self.objective,
            &self.batch()?,
            student.logits()?,
            LogitsMut::new(&mut gradient, student.tokens, student.vocab)?,
        )?;
        let shape = student.tensor.layout().shape().clone();
        Ok((output, FlexTensor::from_data(TensorData::new(gradient, shape))))
    }
}

fn scalar(value: f64) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(vec![value as f32], [1]))
}

/// The operation in burn's graph.
#[derive(Debug)]
struct Loss;

/// The loss's gradient, float32 or of the student's dtype, which is kept for `backward`.
#[derive(Clone, Debug)]
struct Gradient {
    gradient: FlexTensor,
    dtype: FloatDType,
}

impl Backward<Flex, 1> for Loss {
    type State = Gradient;

    fn backward(self, ops: Ops<Gradient, 1>, gradients: &mut Gradients, _: &mut Checkpointer) {
        let Gradient { gradient, dtype } = ops.state;
        unary::<Flex, _>(ops.parents, ops.node, gradients, |upstream| {
            let upstream = upstream.as_slice::<f32>().expect("it is one number, as the loss")[0];
            if upstream == 1.0 {
                return Flex::float_cast(gradient, dtype);
            }
            let gradient = Flex::float_cast(gradient, FloatDType::F32);
            Flex::float_cast(Flex::float_mul_scalar(gradient, upstream.into()), dtype)
        });
    }
}

fn logits_dtype(what: &'static str, dtype: DType) -> Result<FloatDType> {
    match dtype {
        DType::F32 => Ok(FloatDType::F32),
        DType::F16 => Ok(FloatDType::F16),
        DType::BF16 => Ok(FloatDType::BF16),
        actual => Err(Error::Dtype { what, actual, allowed: "F32, F16 or BF16" }),
    }
}

/// Logits `[.., vocab]` as rows with one stride or two.
struct Rows {
    tensor: FlexTensor,
    dtype: FloatDType,
    tokens: usize,
    vocab: usize,
    strides: Strides,
}

impl Rows {
    fn new(what: &'static str, tensor: FlexTensor) -> Result<Self> {
        let dtype = logits_dtype(what, tensor.dtype())?;
        let shape = tensor.layout().shape().to_vec();
        let (&vocab, leading) = shape.split_last().expect("burn's tensors have a dimension");
        let strides: Option<Vec<usize>> =
            tensor.layout().strides().iter().map(|&stride| stride.try_into().ok()).collect();
        let (tensor, strides) =
            match strides.and_then(|strides| Strides::of_tensor(&shape, &strides)) {
                Some(strides) => (tensor, strides),
                None => (tensor.to_contiguous(), vocab.into()),
            };
        Ok(Self { tensor, dtype, tokens: leading.iter().product(), vocab, strides })
    }

    fn logits(&self) -> Result<Logits<'_>> {
        let start = self.tensor.layout().start_offset();
        let elements = match self.dtype {
            FloatDType::F16 => Elements::F16(from(self.tensor.storage::<f16>(), start)),
            FloatDType::BF16 => Elements::Bf16(from(self.tensor.storage::<bf16>(), start)),
            _ => Elements::F32(from(self.tensor.storage::<f32>(), start)),
        };
        Ok(Logits::strided(elements, self.tokens, self.vocab, self.strides)?)
    }
}

/// The elements from the first of a view on, which in a view of none may lie behind the last.
fn from<T>(elements: &[T], start: usize) -> &[T] {
    elements.get(start..).unwrap_or_default()
}
