//! The operation on CUDA tensors: nothing waits for the device. Where `backward` will ask for the gradient, the forward
//! pass computes it with the loss, so that each model's logits are read once a step.

use std::cell::RefCell;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::backend::BackendDevice;
use candle_core::cuda_backend::{CudaStorageSlice, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, DType, Error, Layout, Result, Shape, Storage, Tensor, bail,
};
use cudarc::driver::{CudaSlice, CudaStream, CudaView, CudaViewMut, DevicePtr};
use half::{bf16, f16};

use super::linear::Contiguous;
use super::{Rows, Tokens};
use crate::cuda::{
    DeviceBatch, DeviceElements, DeviceElementsMut, DeviceGradients, DeviceLayer, DeviceLogits,
    DeviceLogitsMut, DeviceSparseTeacher, DeviceTeacher, DeviceTokens, Head, Kernels, Workspace,
};
use crate::head::Chunks;
use crate::{Objective, Output, Tail};

/// The kernels of a device, loaded once.
fn kernels(stream: &CudaStream) -> Result<Arc<Kernels>> {
    static LOADED: Mutex<Vec<Arc<Kernels>>> = Mutex::new(Vec::new());
    let context = stream.context();
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(kernels) = loaded.iter().find(|kernels| kernels.context() == context) {
        return Ok(kernels.clone());
    }
    let kernels = Kernels::load(context).map_err(Error::wrap)?;
    loaded.push(kernels.clone());
    Ok(kernels)
}

/// A stream's workspace and head stay from step to step: the next step guesses by what the last one left in the workspace,
/// and allocates no other.
struct Kept {
    stream: Arc<CudaStream>,
    workspace: Workspace,
    head: Option<Head>,
}

impl Kept {
    /// A stream that is known here alone has no more calls.
    fn is_in_use(&self) -> bool {
        // By this, the workspace's memory, the head and its memory.
        let known = if self.head.is_some() { 4 } else { 2 };
        Arc::strong_count(&self.stream) > known
    }
}

/// Does some work with the workspace of a stream.
fn with_workspace<T>(
    stream: &Arc<CudaStream>,
    tokens: usize,
    work: impl FnOnce(&mut Workspace) -> crate::Result<T>,
) -> Result<T> {
    with_kept(stream, tokens, |kept| work(&mut kept.workspace))
}

fn with_kept<T>(
    stream: &Arc<CudaStream>,
    tokens: usize,
    work: impl FnOnce(&mut Kept) -> crate::Result<T>,
) -> Result<T> {
    thread_local! {
        // Each thread has its own: candle's default stream is a handle that means another stream to every thread.
        static ALL: RefCell<Vec<Kept>> = const { RefCell::new(Vec::new()) };
    }
    ALL.with_borrow_mut(|all| {
        let index = match all.iter().position(|kept| kept.stream == *stream) {
            Some(index) => index,
            None => {
                let workspace =
                    Workspace::new(&kernels(stream)?, stream, tokens).map_err(Error::wrap)?;
                all.retain(Kept::is_in_use);
                all.push(Kept { stream: stream.clone(), workspace, head: None });
                all.len() - 1
            }
        };
        let kept = &mut all[index];
        let workspace = &mut kept.workspace;
        if tokens > workspace.capacity() {
            // At least twice as many, so that batches that grow by and by seldom come here.
            let capacity = tokens.max(2 * workspace.capacity());
            workspace.reserve(stream, capacity).map_err(Error::wrap)?;
        }
        work(kept).map_err(Error::wrap)
    })
}

/// The teacher of a batch.
#[derive(Clone)]
pub(super) enum Teacher {
    /// Its logits.
    Dense(Tensor),
    /// The log-probabilities of some tokens of the vocabulary, and of each label.
    Sparse { indices: Tensor, log_probs: Tensor, target_log_probs: Option<Tensor>, tail: Tail },
}

/// A batch on one device: the teacher, and of each token the label and, if they have any, weight and temperature.
#[derive(Clone)]
pub(super) struct Batch {
    pub teacher: Teacher,
    pub labels: Tensor,
    pub values: [Option<Tensor>; 2],
}

impl Batch {
    /// Enqueues a call; with the terms of each token, waits for it.
    pub fn forward(
        &self,
        objective: &Objective,
        student: &Rows,
        want_output: bool,
    ) -> Result<(Loss, Option<Output>)> {
        let stream = student.tensor.device().as_cuda_device()?.cuda_stream();
        // In float16 a gradient may vanish before the factor comes that would have rescued it.
        let rounds_away = student.tensor.dtype() == DType::F16;
        let keeps_gradient = student.tensor.track_op() && !rounds_away && student.tokens > 0;
        let mut gradient = if keeps_gradient { Some(gradient_memory(student)?) } else { None };
        let (value, output) =
            self.launch(objective, student, gradient.as_mut(), None, |workspace| {
                let value = stream.clone_dtod(&workspace.loss());
                let output = if want_output { Some(workspace.read(&stream)?) } else { None };
                Ok((value, output))
            })?;
        let loss = Loss {
            objective: *objective,
            batch: self.clone(),
            value: Mutex::new(Some(value.w()?)),
            gradient: Mutex::new(gradient),
        };
        Ok((loss, output))
    }

    /// Enqueues a call, and what is `then` to be done with its results before the next call overwrites them.
    fn launch<T>(
        &self,
        objective: &Objective,
        student: &Rows,
        gradient: Option<&mut CudaStorage>,
        upstream: Option<CudaView<f32>>,
        then: impl FnOnce(&mut Workspace) -> crate::Result<T>,
    ) -> Result<T> {
        let stream = student.tensor.device().as_cuda_device()?.cuda_stream();
        let (student_storage, _) = student.tensor.storage_and_layout();
        let student_logits = logits(student, &student_storage)?;
        let gradient = gradient.map(|gradient| gradient_logits(student, gradient)).transpose()?;
        let values = self.values.each_ref().map(Option::as_ref);
        with_teacher(&self.teacher, student, |teacher| {
            with_tokens(&self.labels, values, student.vocab, |tokens| {
                let batch = DeviceBatch::of_tokens(teacher, tokens).map_err(Error::wrap)?;
                with_workspace(&stream, student.tokens, |workspace| {
                    // A label that another step met, whose loss nobody read, is not this one's.
                    workspace.clear_faults(&stream)?;
                    match gradient {
                        None => workspace.forward(&stream, objective, &batch, &student_logits)?,
                        Some(gradient) => workspace.forward_backward(
                            &stream,
                            objective,
                            &batch,
                            &student_logits,
                            gradient,
                            upstream.as_ref(),
                        )?,
                    }
                    then(workspace)
                })
            })
        })
    }
}

/// Does some work with a teacher of the student's tokens and vocabulary.
fn with_teacher<T>(
    teacher: &Teacher,
    student: &Rows,
    work: impl FnOnce(DeviceTeacher) -> Result<T>,
) -> Result<T> {
    let (indices, log_probs, target_log_probs, tail) = match teacher {
        Teacher::Dense(tensor) => {
            let teacher = Rows::new("teacher's ", tensor)?;
            let (storage, _) = teacher.tensor.storage_and_layout();
            return work(logits(&teacher, &storage)?.into());
        }
        Teacher::Sparse { indices, log_probs, target_log_probs, tail } => {
            (indices, log_probs, target_log_probs, *tail)
        }
    };
    let (count, top_k) = (indices.elem_count(), indices.dims()[indices.rank() - 1]);
    let indices = indices.to_dtype(DType::I64)?.contiguous()?;
    let (indices_storage, layout) = indices.storage_and_layout();
    let indices = cuda_storage(&indices_storage)?.as_cuda_slice::<i64>()?;
    let indices = indices.slice(layout.start_offset()..layout.start_offset() + count);
    let log_probs = log_probs.contiguous()?;
    let (storage, _) = log_probs.storage_and_layout();
    let log_probs = elements("teacher's log-probabilities", &log_probs, &storage, count)?;
    let (tokens, vocab) = (student.tokens, student.vocab);
    let mut sparse = DeviceSparseTeacher::new(indices, log_probs, tokens, top_k, vocab)
        .map_err(Error::wrap)?
        .with_tail(tail);
    let of_targets = target_log_probs.as_ref().map(Tensor::contiguous).transpose()?;
    let of_targets = of_targets.as_ref().map(Tensor::storage_and_layout);
    if let Some((storage, layout)) = &of_targets {
        let of_targets = floats(storage, layout, tokens)?;
        sparse = sparse.with_target_log_probs(of_targets).map_err(Error::wrap)?;
    }
    work(sparse.into())
}

/// Does some work with the labels of tokens, and their weights and temperatures where they have any.
fn with_tokens<T>(
    labels: &Tensor,
    values: [Option<&Tensor>; 2],
    vocab: usize,
    work: impl FnOnce(DeviceTokens) -> Result<T>,
) -> Result<T> {
    let count = labels.elem_count();
    let labels = labels.to_dtype(DType::I64)?.contiguous()?;
    let (labels_storage, labels_layout) = labels.storage_and_layout();
    let labels = cuda_storage(&labels_storage)?.as_cuda_slice::<i64>()?;
    let labels = labels.slice(labels_layout.start_offset()..).slice(..count);
    let mut tokens = DeviceTokens::new(labels, vocab);
    let [weights, temperatures] = values.map(|tensor| tensor.map(Tensor::contiguous).transpose());
    let [weights, temperatures] = [weights?, temperatures?];
    let [weights, temperatures] =
        [&weights, &temperatures].map(|tensor| tensor.as_ref().map(Tensor::storage_and_layout));
    if let Some((storage, layout)) = &weights {
        let weights = floats(storage, layout, count)?;
        tokens = tokens.with_token_weights(weights).map_err(Error::wrap)?;
    }
    if let Some((storage, layout)) = &temperatures {
        let temperatures = floats(storage, layout, count)?;
        tokens = tokens.with_temperatures(temperatures).map_err(Error::wrap)?;
    }
    work(tokens)
}

/// Computes the loss of hidden states, the gradients that are wanted of the student's hidden states (in float32 for
/// float16), weight and bias, and, waiting for it, the output.
pub(super) fn linear_loss(
    objective: &Objective,
    student: &Contiguous,
    teacher: &Contiguous,
    tokens: &Tokens,
    wanted: [bool; 3],
    chunks: Chunks,
    want_output: bool,
) -> Result<(Tensor, [Option<Tensor>; 3], Option<Output>)> {
    let device = student.hidden.device().as_cuda_device()?;
    let stream = device.cuda_stream();
    let count = tokens.labels.elem_count();
    let (vocab, _) = student.weight.dims2()?;

    let hidden_dtype = match student.hidden.dtype() {
        DType::BF16 => DType::BF16,
        _ => DType::F32,
    };
    let room = |wanted: bool, tensor: Option<&Tensor>, dtype| -> Result<Option<CudaStorage>> {
        let Some(tensor) = tensor.filter(|_| wanted) else { return Ok(None) };
        // SAFETY: the head writes every element.
        unsafe { device.alloc_uninit(tensor.shape(), dtype) }.map(Some)
    };
    let mut hidden = room(wanted[0], Some(&student.hidden), hidden_dtype)?;
    let mut weight = room(wanted[1], Some(&student.weight), DType::F32)?;
    let mut bias = room(wanted[2], student.bias.as_ref(), DType::F32)?;
    let gradients = DeviceGradients {
        hidden: hidden.as_mut().map(elements_mut),
        weight: weight.as_mut().map(floats_mut).transpose()?,
        bias: bias.as_mut().map(floats_mut).transpose()?,
    };
    let values = [tokens.weights, tokens.temperatures];
    let (value, output) = with_tokens(tokens.labels, values, vocab, |of_tokens| {
        with_layer(student, |student| {
            with_layer(teacher, |teacher| {
                with_kept(&stream, count, |Kept { workspace, head, .. }| {
                    workspace.clear_faults(&stream)?;
                    let made = match head.take() {
                        Some(head) => head,
                        None => Head::new(&stream)?,
                    };
                    let made = head.insert(made.with_chunks(chunks));
                    made.loss(workspace, objective, of_tokens, student, teacher, gradients)?;
                    let value = stream.clone_dtod(&workspace.loss());
                    let output = if want_output { Some(workspace.read(&stream)?) } else { None };
                    Ok((value, output))
                })
            })
        })
    })?;
    let tensor = |storage, shape: &Shape| {
        Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false)
    };
    let value = CudaStorage::wrap_cuda_slice(value.w()?, device.clone());
    let gradients = [
        hidden.map(|hidden| tensor(hidden, student.hidden.shape())),
        weight.map(|weight| tensor(weight, student.weight.shape())),
        bias.zip(student.bias.as_ref()).map(|(bias, like)| tensor(bias, like.shape())),
    ];
    Ok((tensor(value, &Shape::from(())), gradients, output))
}

/// Does some work with a layer.
fn with_layer<T>(layer: &Contiguous, work: impl FnOnce(&DeviceLayer) -> Result<T>) -> Result<T> {
    let Contiguous { whose, hidden, weight, bias } = layer;
    let (_, features) = weight.dims2()?;
    let (hidden_storage, _) = hidden.storage_and_layout();
    let (weight_storage, _) = weight.storage_and_layout();
    let bias_storage = bias.as_ref().map(Tensor::storage_and_layout);
    let of = |what, tensor: &Tensor, storage| {
        elements(format_args!("{whose} {what}"), tensor, storage, tensor.elem_count())
    };
    let (at_hidden, at_weight) =
        (of("hidden states", hidden, &hidden_storage)?, of("weights", weight, &weight_storage)?);
    let mut found = DeviceLayer::new(at_hidden, at_weight, features).map_err(Error::wrap)?;
    if let (Some(bias), Some((storage, _))) = (bias, &bias_storage) {
        found = found.with_bias(of("biases", bias, storage)?).map_err(Error::wrap)?;
    }
    work(&found)
}

fn cuda_storage(storage: &Storage) -> Result<&CudaStorage> {
    match storage {
        Storage::Cuda(storage) => Ok(storage),
        other => bail!(
            "a tensor is on {:?}, but must be on the student's CUDA device",
            other.device().location()
        ),
    }
}

/// The float32 values of so many tokens.
fn floats<'a>(storage: &'a Storage, layout: &Layout, tokens: usize) -> Result<CudaView<'a, f32>> {
    let values = cuda_storage(storage)?.as_cuda_slice::<f32>()?;
    Ok(values.slice(layout.start_offset()..layout.start_offset() + tokens))
}

fn floats_mut(storage: &mut CudaStorage) -> Result<CudaViewMut<'_, f32>> {
    Ok(storage.as_cuda_slice_mut::<f32>()?.as_view_mut())
}

/// Enqueues the entropies of the tokens, to a tensor of this shape.
pub(super) fn token_entropies(rows: &Rows, temperature: f64, shape: &[usize]) -> Result<Tensor> {
    let device = rows.tensor.device().as_cuda_device()?;
    let stream = device.cuda_stream();
    let (storage, _) = rows.tensor.storage_and_layout();
    let logits = logits(rows, &storage)?;
    let mut entropies = stream.alloc_zeros::<f32>(rows.tokens).w()?;
    with_workspace(&stream, rows.tokens, |workspace| {
        workspace.token_entropies(&stream, &logits, temperature, entropies.slice_mut(..))
    })?;
    let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(entropies, device.clone()));
    Ok(Tensor::from_storage(storage, shape, BackpropOp::none(), false))
}

fn logits<'a>(rows: &Rows, storage: &'a Storage) -> Result<DeviceLogits<'a>> {
    let count = rows.strides.span(rows.tokens, rows.vocab).map_err(Error::msg)?;
    let elements = elements(format_args!("{}logits", rows.whose), &rows.tensor, storage, count)?;
    DeviceLogits::strided(elements, rows.tokens, rows.vocab, rows.strides).map_err(Error::wrap)
}

/// So many elements of a tensor, from its first on.
fn elements<'a>(
    what: impl std::fmt::Display,
    tensor: &Tensor,
    storage: &'a Storage,
    count: usize,
) -> Result<DeviceElements<'a>> {
    let storage = cuda_storage(storage)?;
    let start = tensor.layout().start_offset();
    let range = start..start + count;
    Ok(match tensor.dtype() {
        DType::F32 => storage.as_cuda_slice::<f32>()?.slice(range).into(),
        DType::F16 => storage.as_cuda_slice::<f16>()?.slice(range).into(),
        DType::BF16 => storage.as_cuda_slice::<bf16>()?.slice(range).into(),
        other => bail!("the {what} are {other:?}, but must be F32, F16 or BF16"),
    })
}

/// Room for a gradient in the student's dtype.
fn gradient_memory(student: &Rows) -> Result<CudaStorage> {
    let device = student.tensor.device().as_cuda_device()?;
    let shape = Shape::from((student.tokens, student.vocab));
    // SAFETY: the kernels write every element.
    unsafe { device.alloc_uninit(&shape, student.tensor.dtype()) }
}

fn gradient_logits<'a>(
    student: &Rows,
    gradient: &'a mut CudaStorage,
) -> Result<DeviceLogitsMut<'a>> {
    DeviceLogitsMut::new(elements_mut(gradient), student.tokens, student.vocab).map_err(Error::wrap)
}

fn elements_mut(storage: &mut CudaStorage) -> DeviceElementsMut<'_> {
    match &mut storage.slice {
        CudaStorageSlice::F32(slice) => slice.into(),
        CudaStorageSlice::F16(slice) => slice.into(),
        CudaStorageSlice::BF16(slice) => slice.into(),
        _ => unreachable!("tensors of other dtypes are refused"),
    }
}

/// A loss that is already enqueued.
pub(super) struct Loss {
    objective: Objective,
    batch: Batch,
    /// Until it is in a tensor.
    value: Mutex<Option<CudaSlice<f32>>>,
    /// If the forward pass computed it, until `backward` takes it.
    gradient: Mutex<Option<CudaStorage>>,
}

fn take<T>(kept: &Mutex<Option<T>>) -> Option<T> {
    kept.lock().unwrap_or_else(PoisonError::into_inner).take()
}

impl CustomOp1 for Loss {
    fn name(&self) -> &'static str {
        "atkd-loss"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        bail!("the loss of CUDA tensors was asked for on the CPU")
    }

    fn cuda_fwd(&self, student: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        let Some(value) = take(&self.value) else { bail!("the loss is already in a tensor") };
        Ok((CudaStorage::wrap_cuda_slice(value, student.device.clone()), Shape::from(())))
    }

    fn bwd(&self, student: &Tensor, _: &Tensor, upstream: &Tensor) -> Result<Option<Tensor>> {
        let stream = student.device().as_cuda_device()?.cuda_stream();
        let rows = Rows::new("student's ", student)?;
        let (upstream_storage, layout) = upstream.storage_and_layout();
        let upstream = cuda_storage(&upstream_storage)?.as_cuda_slice::<f32>()?;
        let upstream = upstream.slice(layout.start_offset()..layout.start_offset() + 1);
        let gradient = match take(&self.gradient) {
            Some(mut gradient) => {
                scale(&stream, &rows, &mut gradient, &upstream)?;
                gradient
            }
            // It was not kept, or an earlier `backward` has it.
            None => {
                let mut gradient = gradient_memory(&rows)?;
                let to = Some(&mut gradient);
                self.batch.launch(&self.objective, &rows, to, Some(upstream), |_| Ok(()))?;
                gradient
            }
        };
        let gradient = Storage::Cuda(gradient);
        Ok(Some(Tensor::from_storage(gradient, student.shape(), BackpropOp::none(), false)))
    }
}

/// Enqueues the multiplication of a gradient by what arrives, which reads no more than that where it is 1.
fn scale(
    stream: &Arc<CudaStream>,
    student: &Rows,
    gradient: &mut CudaStorage,
    upstream: &CudaView<f32>,
) -> Result<()> {
    let (tokens, vocab) = (student.tokens, student.vocab);
    let mut gradient = gradient_logits(student, gradient)?;
    let (gradient, _gradient) = gradient.raw(stream);
    let (factor, _factor) = upstream.device_ptr(stream);
    // SAFETY: the gradient is borrowed alone and has this shape, and the guards let the owners of both wait for the
    // stream.
    unsafe { kernels(stream)?.scale_gradient(stream, gradient, tokens, vocab, factor) }
        .map_err(Error::wrap)
}
