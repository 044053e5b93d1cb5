//! The operation on CUDA tensors: nothing waits for the device. The gradient is computed when it is asked
//! for, with the gradient that arrives as its factor, so a forward pass keeps nothing of its size.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::cuda_backend::{CudaDType, CudaDevice, WrapErr};
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, DType, Error, Layout, Result, Shape, Storage, Tensor, bail,
};
use cudarc::driver::{CudaSlice, CudaView, DeviceRepr};
use half::{bf16, f16};

use super::Rows;
use crate::cuda::{
    DeviceBatch, DeviceElements, DeviceElementsMut, DeviceLogits, DeviceLogitsMut, Kernels,
    Workspace,
};
use crate::{Objective, Output};

/// The kernels of a device, loaded once.
fn kernels(device: &CudaDevice) -> Result<Arc<Kernels>> {
    static LOADED: Mutex<Vec<Arc<Kernels>>> = Mutex::new(Vec::new());
    let context = device.cuda_stream().context().clone();
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(kernels) = loaded.iter().find(|kernels| *kernels.context() == context) {
        return Ok(kernels.clone());
    }
    let kernels = Kernels::load(&context).map_err(Error::wrap)?;
    loaded.push(kernels.clone());
    Ok(kernels)
}

/// A batch on one device: the teacher's logits and a label a token.
#[derive(Clone)]
pub(super) struct Batch {
    pub teacher: Tensor,
    pub labels: Tensor,
}

impl Batch {
    /// Enqueues a call; with the terms of each token, waits for it.
    pub fn forward(
        &self,
        objective: &Objective,
        student: &Rows,
        want_output: bool,
    ) -> Result<(Loss, Option<Output>)> {
        let device = student.tensor.device().as_cuda_device()?;
        let mut workspace = self.launch(objective, student, None, None)?;
        let stream = device.cuda_stream();
        let value = stream.clone_dtod(&workspace.loss()).w()?;
        let output =
            if want_output { Some(workspace.read(&stream).map_err(Error::wrap)?) } else { None };
        Ok((Loss { objective: *objective, batch: self.clone(), value }, output))
    }

    fn launch(
        &self,
        objective: &Objective,
        student: &Rows,
        gradient: Option<DeviceLogitsMut>,
        upstream: Option<CudaView<f32>>,
    ) -> Result<Workspace> {
        let device = student.tensor.device().as_cuda_device()?;
        let stream = device.cuda_stream();
        let teacher = Rows::new("teacher's", &self.teacher)?;
        let labels = self.labels.to_dtype(DType::I64)?.contiguous()?;
        let (teacher_storage, _) = teacher.tensor.storage_and_layout();
        let (student_storage, _) = student.tensor.storage_and_layout();
        let (labels_storage, labels_layout) = labels.storage_and_layout();
        let labels = cuda_storage(&labels_storage)?.as_cuda_slice::<i64>()?;
        let labels = labels.slice(labels_layout.start_offset()..).slice(..student.tokens);

        let batch =
            DeviceBatch::new(logits(&teacher, &teacher_storage)?, labels).map_err(Error::wrap)?;
        let student_logits = logits(student, &student_storage)?;
        let mut workspace =
            Workspace::new(&kernels(device)?, &stream, student.tokens).map_err(Error::wrap)?;
        match gradient {
            None => workspace.forward(&stream, objective, &batch, &student_logits),
            Some(gradient) => workspace.forward_backward(
                &stream,
                objective,
                &batch,
                &student_logits,
                gradient,
                upstream.as_ref(),
            ),
        }
        .map_err(Error::wrap)?;
        Ok(workspace)
    }
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

fn logits<'a>(rows: &Rows, storage: &'a Storage) -> Result<DeviceLogits<'a>> {
    let storage = cuda_storage(storage)?;
    let start = rows.tensor.layout().start_offset();
    let elements: DeviceElements = match rows.tensor.dtype() {
        DType::F32 => storage.as_cuda_slice::<f32>()?.slice(start..).into(),
        DType::F16 => storage.as_cuda_slice::<f16>()?.slice(start..).into(),
        DType::BF16 => storage.as_cuda_slice::<bf16>()?.slice(start..).into(),
        other => bail!("the {} logits are {other:?}, but must be F32, F16 or BF16", rows.whose),
    };
    DeviceLogits::strided(elements, rows.tokens, rows.vocab, rows.row_stride).map_err(Error::wrap)
}

/// A loss that is already enqueued.
pub(super) struct Loss {
    objective: Objective,
    batch: Batch,
    value: CudaSlice<f32>,
}

impl CustomOp1 for Loss {
    fn name(&self) -> &'static str {
        "atkd-loss"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        bail!("the loss of CUDA tensors was asked for on the CPU")
    }

    fn cuda_fwd(&self, student: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        let value = self.value.try_clone().w()?;
        Ok((CudaStorage::wrap_cuda_slice(value, student.device.clone()), Shape::from(())))
    }

    fn bwd(&self, student: &Tensor, _: &Tensor, upstream: &Tensor) -> Result<Option<Tensor>> {
        let gradient = match student.dtype() {
            DType::F16 => self.gradient::<f16>(student, upstream)?,
            DType::BF16 => self.gradient::<bf16>(student, upstream)?,
            _ => self.gradient::<f32>(student, upstream)?,
        };
        Ok(Some(gradient))
    }
}

impl Loss {
    fn gradient<T: CudaDType + DeviceRepr>(
        &self,
        student: &Tensor,
        upstream: &Tensor,
    ) -> Result<Tensor>
    where
        for<'a> DeviceElementsMut<'a>: From<&'a mut CudaSlice<T>>,
    {
        let device = student.device().as_cuda_device()?;
        let rows = Rows::new("student's", student)?;
        let (upstream_storage, layout) = upstream.storage_and_layout();
        let upstream = cuda_storage(&upstream_storage)?.as_cuda_slice::<f32>()?;
        let upstream = upstream.slice(layout.start_offset()..layout.start_offset() + 1);
        // SAFETY: the kernels write every element.
        let mut gradient =
            unsafe { device.cuda_stream().alloc::<T>(rows.tokens * rows.vocab) }.w()?;
        let view =
            DeviceLogitsMut::new(&mut gradient, rows.tokens, rows.vocab).map_err(Error::wrap)?;
        self.batch.launch(&self.objective, &rows, Some(view), Some(upstream))?;
        let storage = CudaStorage::wrap_cuda_slice(gradient, device.clone());
        Ok(Tensor::from_storage(
            Storage::Cuda(storage),
            student.shape(),
            candle_core::op::BackpropOp::none(),
            false,
        ))
    }
}
