use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DeviceRepr};

use super::{
    DeviceBatch, DeviceElements, DeviceLabels, DeviceLogits, DeviceLogitsMut, DeviceSparseTeacher,
    DeviceTeacher, Kernels, Workspace, driver,
};
use crate::{
    Batch, Elements, ElementsMut, Labels, Logits, LogitsMut, Objective, Output, Result, Teacher,
};

#[cfg(feature = "battery")]
mod shards;

/// A copy on the device of logits of any dtype.
enum Copy {
    F32(CudaSlice<f32>),
    F16(CudaSlice<half::f16>),
    Bf16(CudaSlice<half::bf16>),
}

fn upload<T: DeviceRepr>(stream: &Arc<CudaStream>, slice: &[T]) -> Result<CudaSlice<T>> {
    // The driver refuses to allocate nothing. SAFETY: beyond the slice nothing is read.
    unsafe { stream.alloc(slice.len().max(1)) }
        .and_then(|mut copy| stream.memcpy_htod(slice, &mut copy).map(|()| copy))
        .map_err(driver("copying to the device"))
}

impl Copy {
    fn new(stream: &Arc<CudaStream>, elements: Elements) -> Result<Self> {
        Ok(match elements {
            Elements::F32(slice) => Self::F32(upload(stream, slice)?),
            Elements::F16(slice) => Self::F16(upload(stream, slice)?),
            Elements::Bf16(slice) => Self::Bf16(upload(stream, slice)?),
        })
    }

    fn elements(&self, count: usize) -> DeviceElements<'_> {
        match self {
            Self::F32(slice) => slice.slice(..count).into(),
            Self::F16(slice) => slice.slice(..count).into(),
            Self::Bf16(slice) => slice.slice(..count).into(),
        }
    }

    fn logits(&self, like: Logits) -> Result<DeviceLogits<'_>> {
        let (tokens, vocab, strides) = (like.tokens(), like.vocab(), like.strides());
        match self {
            Self::F32(slice) => DeviceLogits::strided(slice, tokens, vocab, strides),
            Self::F16(slice) => DeviceLogits::strided(slice, tokens, vocab, strides),
            Self::Bf16(slice) => DeviceLogits::strided(slice, tokens, vocab, strides),
        }
    }

    fn logits_mut(&mut self, like: Logits) -> Result<DeviceLogitsMut<'_>> {
        let (tokens, vocab, strides) = (like.tokens(), like.vocab(), like.strides());
        match self {
            Self::F32(slice) => DeviceLogitsMut::strided(slice, tokens, vocab, strides),
            Self::F16(slice) => DeviceLogitsMut::strided(slice, tokens, vocab, strides),
            Self::Bf16(slice) => DeviceLogitsMut::strided(slice, tokens, vocab, strides),
        }
    }

    fn download(&self, stream: &Arc<CudaStream>, to: ElementsMut) -> Result<()> {
        match (self, to) {
            (Self::F32(from), ElementsMut::F32(to)) => {
                stream.memcpy_dtoh(&from.slice(..to.len()), to)
            }
            (Self::F16(from), ElementsMut::F16(to)) => {
                stream.memcpy_dtoh(&from.slice(..to.len()), to)
            }
            (Self::Bf16(from), ElementsMut::Bf16(to)) => {
                stream.memcpy_dtoh(&from.slice(..to.len()), to)
            }
            _ => unreachable!("the copy has the dtype of what it was copied from"),
        }
        .map_err(driver("copying from the device"))
    }
}

impl Kernels {
    /// Does what [`cpu::forward`](crate::cpu::forward) does, from and to host memory: everything is copied to the
    /// device and back, for checks and small jobs.
    ///
    /// # Errors
    /// As [`cpu::forward`](crate::cpu::forward), or if the driver reports an error.
    pub fn forward(
        self: &Arc<Self>,
        objective: &Objective,
        batch: &Batch,
        student: Logits,
    ) -> Result<Output> {
        self.call(objective, batch, student, None)
    }

    /// Does what [`cpu::forward_backward`](crate::cpu::forward_backward) does; see [`forward`](Self::forward).
    ///
    /// # Errors
    /// As [`cpu::forward_backward`](crate::cpu::forward_backward), or if the driver reports an error.
    pub fn forward_backward(
        self: &Arc<Self>,
        objective: &Objective,
        batch: &Batch,
        student: Logits,
        gradient: LogitsMut,
    ) -> Result<Output> {
        self.call(objective, batch, student, Some(gradient))
    }

    /// Does what [`cpu::token_entropies`](crate::cpu::token_entropies) does; see [`forward`](Self::forward).
    ///
    /// # Errors
    /// If the temperature is not in [1e-30, 1e30], or the driver reports an error.
    pub fn token_entropies(self: &Arc<Self>, logits: Logits, temperature: f64) -> Result<Vec<f32>> {
        let stream = &self.context().default_stream();
        let copy = Copy::new(stream, logits.elements())?;
        let mut entropies = vec![0.0; logits.tokens()];
        let mut to = upload(stream, &entropies)?;
        let workspace = Workspace::new(self, stream, 0)?;
        let view = to.slice_mut(..entropies.len());
        workspace.token_entropies(stream, &copy.logits(logits)?, temperature, view)?;
        stream
            .memcpy_dtoh(&to.slice(..entropies.len()), &mut entropies)
            .map_err(driver("copying from the device"))?;
        Ok(entropies)
    }

    fn call(
        self: &Arc<Self>,
        objective: &Objective,
        batch: &Batch,
        student: Logits,
        gradient: Option<LogitsMut>,
    ) -> Result<Output> {
        // Here an error can name the label.
        batch.valid_labels(objective)?;
        let stream = &self.context().default_stream();
        let (logits, indices_i64, indices_i32, log_probs, target_log_probs);
        let teacher: DeviceTeacher = match batch.teacher() {
            Teacher::Dense(teacher) => {
                logits = Copy::new(stream, teacher.elements())?;
                logits.logits(teacher)?.into()
            }
            Teacher::Sparse(teacher) => {
                let (indices, values, of_targets) = teacher.values();
                let indices = match indices {
                    Labels::I64(indices) => {
                        indices_i64 = upload(stream, indices)?;
                        DeviceLabels::I64(indices_i64.slice(..indices.len()))
                    }
                    Labels::I32(indices) => {
                        indices_i32 = upload(stream, indices)?;
                        DeviceLabels::I32(indices_i32.slice(..indices.len()))
                    }
                };
                log_probs = Copy::new(stream, values)?;
                let values = log_probs.elements(values.len());
                let (tokens, top_k) = (batch.teacher().tokens(), teacher.top_k());
                let vocab = batch.teacher().vocab();
                let on_device = DeviceSparseTeacher::new(indices, values, tokens, top_k, vocab)?
                    .with_target_rounding(teacher.target_rounding())
                    .with_tail(teacher.tail());
                match of_targets {
                    None => on_device.into(),
                    Some(given) => {
                        target_log_probs = upload(stream, given)?;
                        let view = target_log_probs.slice(..given.len());
                        on_device.with_target_log_probs(view)?.into()
                    }
                }
            }
        };
        let (labels_i64, labels_i32);
        let device_batch = match batch.labels() {
            None => DeviceBatch::unlabelled(teacher),
            Some(Labels::I64(labels)) => {
                labels_i64 = upload(stream, labels)?;
                DeviceBatch::new(teacher, DeviceLabels::I64(labels_i64.slice(..labels.len())))?
            }
            Some(Labels::I32(labels)) => {
                labels_i32 = upload(stream, labels)?;
                DeviceBatch::new(teacher, DeviceLabels::I32(labels_i32.slice(..labels.len())))?
            }
        };
        let offsets;
        let device_batch = match batch.sequences() {
            None => device_batch,
            Some(sequences) => {
                let sequences: Vec<i64> = sequences.iter().map(|&offset| offset as i64).collect();
                offsets = upload(stream, &sequences)?;
                device_batch.with_sequences(offsets.as_view())?
            }
        };
        let margins;
        let device_batch = match batch.margins() {
            None => device_batch,
            Some(given) => {
                margins = upload(stream, given)?;
                device_batch.with_margins(margins.slice(..given.len()))?
            }
        };
        let hard;
        let device_batch = match batch.hard() {
            None => device_batch,
            Some(given) => {
                let bytes: Vec<u8> = given.iter().map(|&hard| hard.into()).collect();
                hard = upload(stream, &bytes)?;
                device_batch.with_hard(hard.slice(..given.len()))?
            }
        };
        let token_weights;
        let device_batch = match batch.token_weights() {
            None => device_batch,
            Some(given) => {
                token_weights = upload(stream, given)?;
                device_batch.with_token_weights(token_weights.slice(..given.len()))?
            }
        };
        let temperatures;
        let device_batch = match batch.temperatures() {
            None => device_batch,
            Some(given) => {
                temperatures = upload(stream, given)?;
                device_batch.with_temperatures(temperatures.slice(..given.len()))?
            }
        };
        let capacity = batch.teacher().tokens();
        let mut workspace = Workspace::new(self, stream, capacity)?;
        let student_copy = Copy::new(stream, student.elements())?;
        let student = student_copy.logits(student)?;
        match gradient {
            None => workspace.forward(stream, objective, &device_batch, &student)?,
            Some(mut gradient) => {
                // The elements between the rows come back as they went.
                let mut copy = Copy::new(stream, gradient.as_logits().elements())?;
                let to = copy.logits_mut(gradient.as_logits())?;
                workspace.forward_backward(stream, objective, &device_batch, &student, to, None)?;
                copy.download(stream, gradient.elements_mut())?;
            }
        }
        workspace.read(stream)
    }
}
