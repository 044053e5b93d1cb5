//! The loss from hidden states and the weights of both models' last layers.

use candle_core::{
    CpuStorage, CustomOp3, DType, Device, Error, Layout, Result, Shape, Tensor, WithDType, bail,
};
#[cfg(feature = "candle-cuda")]
use candle_core::{CudaStorage, Storage, backend::BackendStorage};
use half::bf16;

use super::{HostTokens, Tokens, check_device, elements, not_here, scaled};
use crate::cpu::Session;
use crate::head::{self, Chunks, Gradients};
use crate::{ElementsMut, Objective, Output};

/// A model's last layer and what it multiplies.
#[derive(Clone, Copy, Debug)]
pub struct Layer<'a> {
    hidden: &'a Tensor,
    weight: &'a Tensor,
    bias: Option<&'a Tensor>,
}

impl<'a> Layer<'a> {
    /// Hidden states `[.., H]`, such as `[tokens, H]` or `[batch, time, H]`, and a weight `[vocab, H]`, as a
    /// `candle_nn::Linear` has it.
    pub fn new(hidden: &'a Tensor, weight: &'a Tensor) -> Self {
        Self { hidden, weight, bias: None }
    }

    /// Adds a bias `[vocab]`.
    pub fn with_bias(self, bias: &'a Tensor) -> Self {
        Self { bias: Some(bias), ..self }
    }

    fn check(&self, whose: &str, student: &Tensor) -> Result<()> {
        let (hidden, weight) = (self.hidden.dims(), self.weight.dims());
        let Some(&features) = hidden.last() else {
            bail!("the {whose} hidden states are a scalar, but must be [tokens, H]")
        };
        if weight.len() != 2 || weight[1] != features || weight[0] == 0 {
            bail!(
                "the {whose} weight is {weight:?}, but for hidden states {hidden:?} must be [vocab, {features}]"
            )
        }
        if let Some(bias) = self.bias
            && bias.dims() != &weight[..1]
        {
            bail!(
                "the {whose} bias is {:?}, but for a weight {weight:?} must be {:?}",
                bias.dims(),
                &weight[..1]
            )
        }
        let tensors = [Some(self.hidden), Some(self.weight), self.bias];
        for tensor in tensors.into_iter().flatten() {
            check_device(
                &format!("{whose} hidden states, weight or bias"),
                tensor,
                "hidden states",
                student,
            )?;
        }
        Ok(())
    }

    fn contiguous(&self, whose: &'static str) -> Result<Contiguous> {
        Ok(Contiguous {
            whose,
            hidden: self.hidden.contiguous()?,
            weight: self.weight.contiguous()?,
            bias: self.bias.map(Tensor::contiguous).transpose()?,
        })
    }
}

/// A layer whose tensors have their elements in order.
pub(super) struct Contiguous {
    pub whose: &'static str,
    pub hidden: Tensor,
    pub weight: Tensor,
    pub bias: Option<Tensor>,
}

impl Contiguous {
    /// Does some work with the layer.
    fn with<T>(&self, work: impl FnOnce(&head::Layer) -> Result<T>) -> Result<T> {
        let Self { whose, hidden, weight, bias } = self;
        let (hidden_storage, hidden_layout) = hidden.storage_and_layout();
        let (weight_storage, weight_layout) = weight.storage_and_layout();
        let bias_storage = bias.as_ref().map(|bias| bias.storage_and_layout());
        let (vocab, features) = weight.dims2()?;
        let hidden =
            elements(format_args!("{whose} hidden states"), hidden_layout, &hidden_storage)?
                .slice(0..hidden.elem_count());
        let weight = elements(format_args!("{whose} weights"), weight_layout, &weight_storage)?
            .slice(0..vocab * features);
        let mut layer = head::Layer::new(hidden, weight, features).map_err(Error::wrap)?;
        if let Some((storage, layout)) = &bias_storage {
            let bias = elements(format_args!("{whose} biases"), layout, storage)?.slice(0..vocab);
            layer = layer.with_bias(bias).map_err(Error::wrap)?;
        }
        work(&layer)
    }
}

/// The loss of the logits that are each model's hidden states times the transpose of its weight, plus its bias, which exist
/// for a chunk of tokens at a time, in float32: a float32 scalar that `backward` goes through, to the student's hidden states,
/// weight and bias. See [`head`] for how, and for what is exact.
///
/// - `student`, `teacher`: layers of the same tokens and one vocabulary, with hidden sizes of their own, of float32, float16
///   or bfloat16. Tensors that are not contiguous are copied.
/// - `tokens`: as [`loss`](super::loss) takes them, shaped as the hidden states without the last dimension.
/// - `chunks`: how many tokens have logits at a time; `Chunks::default()` takes as many as fit into 512 MB.
///
/// The gradients of those of the three that are tracked are computed together with the loss, which then holds them: the
/// hidden states' in their dtype (float32 for float16), the weight's and the bias's in float32. `backward` multiplies them
/// by the gradient that arrives, and returns them in the tensors' dtypes. Nothing flows back to the teacher.
///
/// ```
/// use atkd::candle::{Layer, linear_loss};
/// use atkd::{Objective, head::Chunks};
/// use candle_core::{DType, Device, Tensor, Var};
///
/// let hidden = Var::ones((4, 64), DType::F32, &Device::Cpu)?;
/// let weight = Var::zeros((1000, 64), DType::F32, &Device::Cpu)?;
/// let teacher_hidden = Tensor::ones((4, 128), DType::F32, &Device::Cpu)?;
/// let teacher_weight = Tensor::zeros((1000, 128), DType::F32, &Device::Cpu)?;
/// let labels = Tensor::new(&[7i64, 9, 11, -100], &Device::Cpu)?;
/// let student = Layer::new(&hidden, &weight);
/// let teacher = Layer::new(&teacher_hidden, &teacher_weight);
/// let loss = linear_loss(&Objective::default(), student, teacher, &labels, Chunks::Tokens(2))?;
/// let gradients = loss.backward()?;
/// # assert!(gradients.get(&hidden).is_some() && gradients.get(&weight).is_some());
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// On CUDA tensors (with the feature `candle-cuda`) this is [`cuda::Head`](crate::cuda::Head): a layer's tensors are of one
/// dtype; the call waits once for the selection, and `backward` for the gradient that arrives, which it reads. A label out of
/// range is met by a kernel, which drops its token and makes the loss NaN; [`linear_loss_with_output`] returns the error.
///
/// # Errors
/// If tensors are on different devices, are of other dtypes or of shapes that do not go together, a label is out of range, or
/// a chunk would have no token.
pub fn linear_loss<'a>(
    objective: &Objective,
    student: Layer,
    teacher: Layer,
    tokens: impl Into<Tokens<'a>>,
    chunks: Chunks,
) -> Result<Tensor> {
    Ok(loss_and_output(objective, student, teacher, &tokens.into(), chunks, false)?.0)
}

/// [`linear_loss`], and the terms of each token, in the order of the labels' elements.
///
/// # Errors
/// Those of [`linear_loss`].
pub fn linear_loss_with_output<'a>(
    objective: &Objective,
    student: Layer,
    teacher: Layer,
    tokens: impl Into<Tokens<'a>>,
    chunks: Chunks,
) -> Result<(Tensor, Output)> {
    loss_and_output(objective, student, teacher, &tokens.into(), chunks, true)
        .map(|(loss, output)| (loss, output.expect("it was asked for")))
}

fn loss_and_output(
    objective: &Objective,
    student: Layer,
    teacher: Layer,
    tokens: &Tokens,
    chunks: Chunks,
    #[cfg_attr(not(feature = "candle-cuda"), expect(unused_variables))] want_output: bool,
) -> Result<(Tensor, Option<Output>)> {
    student.check("student's", student.hidden)?;
    teacher.check("teacher's", student.hidden)?;
    tokens.check("hidden states", student.hidden)?;
    let leading = |layer: &Layer| layer.hidden.dims()[..layer.hidden.rank() - 1].to_vec();
    let vocab = student.weight.dims()[0];
    if leading(&student) != leading(&teacher) || vocab != teacher.weight.dims()[0] {
        bail!(
            "the student's hidden states are {:?} and its weight {:?}, but the teacher's {:?} and {:?}: they must be \
             of the same tokens and one vocabulary",
            student.hidden.dims(),
            student.weight.dims(),
            teacher.hidden.dims(),
            teacher.weight.dims()
        )
    }
    let layers = (student.contiguous("student's")?, teacher.contiguous("teacher's")?);
    let (op, output) = match student.hidden.device() {
        Device::Cpu => {
            let host = HostTokens::new(tokens)?;
            let session = session(objective, &host, vocab)?;
            let (op, output) = match student.hidden.dtype() {
                DType::BF16 => forward_backward(session, &student, layers, chunks, bf16::ZERO)?,
                _ => forward_backward(session, &student, layers, chunks, 0f32)?,
            };
            (op, Some(output))
        }
        #[cfg(feature = "candle-cuda")]
        Device::Cuda(_) => {
            let (value, gradients, output) = super::cuda::linear_loss(
                objective,
                &layers.0,
                &layers.1,
                tokens,
                [Some(student.hidden), Some(student.weight), student.bias]
                    .map(|tensor| tensor.is_some_and(Tensor::track_op)),
                chunks,
                want_output,
            )?;
            (LinearLoss { value, gradients }, output)
        }
        other => not_here("hidden states", other)?,
    };
    // The weight takes the place of a bias that is not there; nothing flows to it from that place.
    let bias = student.bias.unwrap_or(student.weight);
    Ok((student.hidden.apply_op3(student.weight, bias, op)?, output))
}

/// A call on the host.
fn session<'a>(objective: &Objective, host: &'a HostTokens, vocab: usize) -> Result<Session<'a>> {
    let mut session = Session::begin(objective, &host.labels, vocab).map_err(Error::wrap)?;
    if let Some(weights) = &host.weights {
        session = session.with_token_weights(weights).map_err(Error::wrap)?;
    }
    if let Some(temperatures) = &host.temperatures {
        session = session.with_temperatures(temperatures).map_err(Error::wrap)?;
    }
    Ok(session)
}

/// The loss, and the gradients of the student's tensors that are tracked, that of the hidden states of the dtype of `zero`.
fn forward_backward<T: WithDType>(
    session: Session,
    student: &Layer,
    (student_layer, teacher_layer): (Contiguous, Contiguous),
    chunks: Chunks,
    zero: T,
) -> Result<(LinearLoss, Output)>
where
    for<'a> ElementsMut<'a>: From<&'a mut Vec<T>>,
{
    fn zeros<T: Clone>(zero: T, of: Option<&Tensor>) -> Option<Vec<T>> {
        of.filter(|tensor| tensor.track_op()).map(|tensor| vec![zero; tensor.elem_count()])
    }
    let mut hidden = zeros(zero, Some(student.hidden));
    let mut weight = zeros(0f32, Some(student.weight));
    let mut bias = zeros(0f32, student.bias);
    let gradients = Gradients {
        hidden: hidden.as_mut().map(ElementsMut::from),
        weight: weight.as_deref_mut(),
        bias: bias.as_deref_mut(),
    };
    let output = student_layer.with(|student| {
        teacher_layer.with(|teacher| {
            head::loss(session, student, teacher, chunks, gradients).map_err(Error::wrap)
        })
    })?;
    fn tensor<T: WithDType>(
        values: Option<Vec<T>>,
        like: Option<&Tensor>,
    ) -> Result<Option<Tensor>> {
        let Some((values, like)) = values.zip(like) else { return Ok(None) };
        Tensor::from_vec(values, like.shape(), &Device::Cpu).map(Some)
    }
    let gradients = [
        tensor(hidden, Some(student.hidden))?,
        tensor(weight, Some(student.weight))?,
        tensor(bias, student.bias)?,
    ];
    let value = Tensor::new(output.loss as f32, &Device::Cpu)?;
    Ok((LinearLoss { value, gradients }, output))
}

/// A loss that is already known, and the gradients of hidden states, weight and bias that are wanted.
struct LinearLoss {
    value: Tensor,
    gradients: [Option<Tensor>; 3],
}

impl CustomOp3 for LinearLoss {
    fn name(&self) -> &'static str {
        "atkd-linear-loss"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![self.value.to_scalar()?]), Shape::from(())))
    }

    #[cfg(feature = "candle-cuda")]
    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (storage, layout) = self.value.storage_and_layout();
        let Storage::Cuda(value) = &*storage else { bail!("the loss is not on the device") };
        Ok((value.try_clone(layout)?, Shape::from(())))
    }

    fn bwd(
        &self,
        hidden: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        upstream: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [of_hidden, of_weight, of_bias] = &self.gradients;
        let times_upstream = |gradient: &Option<Tensor>, of: &Tensor| {
            gradient.as_ref().map(|gradient| scaled(gradient, upstream, of.dtype())).transpose()
        };
        Ok((
            times_upstream(of_hidden, hidden)?,
            times_upstream(of_weight, weight)?,
            times_upstream(of_bias, bias)?,
        ))
    }
}
