//! A GPU, timed with its own events.

use std::sync::Arc;

use anyhow::{Context, Result};
use atkd::cuda::cudarc::driver::sys::CUevent_flags;
use atkd::cuda::cudarc::driver::{
    CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, ValidAsZeroBits,
};
use atkd::cuda::unfused::Unfused;
use atkd::cuda::{Kernels, RawCall, RawLabels, RawLogits, Workspace};
use atkd::{Dtype, Objective};
use half::{bf16, f16};
use indicatif::ProgressBar;

use super::{Measured, Size, Timing, median};

/// Rows that are made on the host; the others repeat them.
const DISTINCT_ROWS: usize = 128;

pub fn device(kernels: &Kernels) -> Result<String> {
    let context = kernels.context();
    let mut version = 0;
    // SAFETY: writes one number.
    unsafe { atkd::cuda::cudarc::driver::sys::cuDriverGetVersion(&mut version) }.result()?;
    Ok(format!("{}, driver for CUDA {}.{}", context.name()?, version / 1000, version % 1000 / 10))
}

pub fn measure(kernels: &Arc<Kernels>, size: Size, bar: &ProgressBar) -> Result<Measured> {
    match size.dtype {
        Dtype::F32 => measure_as(kernels, size, bar, |z| z),
        Dtype::F16 => measure_as(kernels, size, bar, f16::from_f32),
        Dtype::Bf16 => measure_as(kernels, size, bar, bf16::from_f32),
    }
}

fn measure_as<T: DeviceRepr + ValidAsZeroBits + Copy>(
    kernels: &Arc<Kernels>,
    size: Size,
    bar: &ProgressBar,
    narrow: fn(f32) -> T,
) -> Result<Measured> {
    let Size { tokens, vocab, dtype, runs: _ } = size;
    let stream = &kernels.context().default_stream();
    let too_large = || format!("three tensors of {tokens} x {vocab} {dtype} on the device");
    let teacher = logits(stream, size, 1, narrow).with_context(too_large)?;
    let student = logits(stream, size, 2, narrow).with_context(too_large)?;
    let mut gradient = stream.alloc_zeros::<T>(tokens * vocab).with_context(too_large)?;
    let labels: Vec<i64> = (0..tokens).map(|i| (i * 7919 % vocab) as i64).collect();
    let labels = stream.clone_htod(&labels)?;

    let copy_seconds = elapsed(size, bar, "copying memory", stream, || {
        Ok(stream.memcpy_dtod(&teacher, &mut gradient)?)
    })?;
    let copy = 2.0 * size.volume() as f64 / copy_seconds;

    let raw = |address| RawLogits { address, dtype, row_stride: vocab };
    let call = RawCall {
        tokens,
        vocab,
        teacher: raw(teacher.device_ptr(stream).0),
        student: raw(student.device_ptr(stream).0),
        gradient: Some(raw(gradient.device_ptr_mut(stream).0)),
        labels: Some(RawLabels::I64(labels.device_ptr(stream).0)),
        sequences: None,
        margins: None,
        upstream: None,
    };
    let mut workspace = Workspace::new(kernels, stream, tokens)?;
    let objective = Objective::default();
    let mut timings = Vec::new();
    let mut skipped = Vec::new();
    let mut add = |variant: &str, volumes, seconds| {
        timings.push(Timing { variant: variant.into(), seconds, volumes });
    };
    let mut time = |variant: &str, objective: &Objective, call: &RawCall| {
        elapsed(size, bar, variant, stream, || {
            // SAFETY: the call's memory is above, and outlives the stream's work, which `elapsed` awaits.
            Ok(unsafe { workspace.launch(stream, objective, call) }?)
        })
    };
    let forward = RawCall { gradient: None, ..call };
    add("fused", 4, time("fused", &objective, &call)?);
    add("fused, KL", 3, time("fused, KL", &Objective::kl(), &call)?);
    add("loss alone", 3, time("loss alone", &objective, &forward)?);

    workspace.take_times();
    let mut by_kernel: Vec<(&str, Vec<f64>)> = Vec::new();
    median(size, bar, "by kernel", || {
        // SAFETY: as above; `times` awaits the kernels.
        unsafe { workspace.launch(stream, &objective, &call) }?;
        for (kernel, milliseconds) in workspace.times()? {
            match by_kernel.iter_mut().find(|(name, _)| *name == kernel) {
                Some((_, times)) => times.push(f64::from(milliseconds) / 1e3),
                None => by_kernel.push((kernel, vec![f64::from(milliseconds) / 1e3])),
            }
        }
        Ok(0.0)
    })?;
    for (kernel, mut times) in by_kernel {
        times.sort_by(f64::total_cmp);
        let volumes = match kernel {
            _ if kernel.starts_with("teacher_margin") => 1,
            _ if kernel.starts_with("row_") => 3,
            _ => 0,
        };
        add(kernel, volumes, times[times.len() / 2]);
    }

    match Unfused::new(kernels, stream, tokens, vocab) {
        Ok(mut unfused) => {
            let seconds = elapsed(size, bar, "unfused", stream, || {
                // SAFETY: as above, and every label is below the vocabulary's size.
                unsafe { unfused.launch(stream, &call) }?;
                Ok(())
            })?;
            add("unfused", 3, seconds);
        }
        Err(error) => skipped.push(format!("unfused at {tokens} x {vocab}: {error}")),
    }
    Ok(Measured { size, copy, timings, skipped })
}

/// Random logits of the size, on the device.
fn logits<T: DeviceRepr + ValidAsZeroBits + Copy>(
    stream: &Arc<CudaStream>,
    size: Size,
    seed: u64,
    narrow: fn(f32) -> T,
) -> Result<CudaSlice<T>> {
    let mut random = fastrand::Rng::with_seed(seed);
    let distinct = size.tokens.min(DISTINCT_ROWS) * size.vocab;
    let rows: Vec<T> = (0..distinct)
        .map(|_| narrow(6.0 * (random.f32() + random.f32() + random.f32() - 1.5)))
        .collect();
    let count = size.tokens * size.vocab;
    let mut logits = stream.alloc_zeros::<T>(count)?;
    let rows = stream.clone_htod(&rows)?;
    for start in (0..count).step_by(distinct) {
        let length = distinct.min(count - start);
        stream.memcpy_dtod(&rows.slice(..length), &mut logits.slice_mut(start..start + length))?;
    }
    stream.synchronize()?;
    Ok(logits)
}

/// The median seconds from event to event around `work`.
fn elapsed(
    size: Size,
    bar: &ProgressBar,
    variant: &str,
    stream: &Arc<CudaStream>,
    mut work: impl FnMut() -> Result<()>,
) -> Result<f64> {
    median(size, bar, variant, || {
        let start = stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT))?;
        work()?;
        let end = stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT))?;
        Ok(f64::from(start.elapsed_ms(&end)?) / 1e3)
    })
}
