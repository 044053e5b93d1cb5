//! A GPU, timed with its own events.

use std::sync::Arc;

use anyhow::{Context, Result};
use atkd::call::RawEntropies;
use atkd::cuda::cudarc::driver::sys::CUevent_flags;
use atkd::cuda::cudarc::driver::{
    CudaEvent, CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, ValidAsZeroBits,
};
use atkd::cuda::unfused::Unfused;
use atkd::cuda::{Kernels, RawCall, RawLabels, RawLogits, RawOutput, Workspace};
use atkd::{Divergence, Dtype, Objective};
use half::{bf16, f16};
use indicatif::ProgressBar;

use super::{Measured, Size, Timing, begin, middle};

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

    let raw = |address| RawLogits { address, dtype, strides: vocab.into() };
    let call = RawCall {
        tokens,
        vocab,
        teacher: raw(teacher.device_ptr(stream).0),
        student: raw(student.device_ptr(stream).0),
        gradient: Some(raw(gradient.device_ptr_mut(stream).0)),
        gradient_padding: 0,
        labels: Some(RawLabels::I64(labels.device_ptr(stream).0)),
        sequences: None,
        margins: None,
        hard: None,
        token_weights: None,
        temperatures: None,
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
            Ok(unsafe { workspace.launch(stream, objective, call, &RawOutput::default()) }?)
        })
    };
    let forward = RawCall { gradient: None, ..call };
    add("fused", 3, time("fused", &objective, &call)?);
    add("fused, KL", 3, time("fused, KL", &Objective::kl(), &call)?);
    add("loss alone", 2, time("loss alone", &objective, &forward)?);
    for (variant, divergence) in [
        ("fused, reverse KL", Divergence::ReverseKl),
        ("fused, JSD", Divergence::Jsd { beta: 0.5 }),
        ("fused, TVD", Divergence::TotalVariation),
        ("fused, skew KL", Divergence::SkewKl { alpha: 0.1 }),
        ("fused, skew reverse KL", Divergence::SkewReverseKl { alpha: 0.1 }),
    ] {
        let objective = Objective::plain().with_divergence(divergence)?;
        add(variant, 3, time(variant, &objective, &call)?);
    }
    let at_2 = objective.with_temperature(2.0)?.with_ce_weight(0.5)?;
    let variant = "fused, T = 2, with cross entropy";
    add(variant, 3, time(variant, &at_2, &call)?);
    if dtype != Dtype::F32 {
        let wide = || -> Result<_> {
            let model = |seed| logits::<f32>(stream, size, seed, |z| z);
            Ok((model(1)?, model(2)?, stream.alloc_zeros::<f32>(tokens * vocab)?))
        };
        match wide() {
            Ok((teacher, student, mut gradient)) => {
                let [teacher, student, gradient] = [
                    teacher.device_ptr(stream).0,
                    student.device_ptr(stream).0,
                    gradient.device_ptr_mut(stream).0,
                ]
                .map(|address| RawLogits { dtype: Dtype::F32, ..raw(address) });
                for (variant, volumes, call) in [
                    ("fused, float32 gradient", 4, RawCall { gradient: Some(gradient), ..call }),
                    ("fused, float32 logits", 5, RawCall { teacher, student, ..call }),
                    (
                        "fused, float32 student",
                        5,
                        RawCall { student, gradient: Some(gradient), ..call },
                    ),
                ] {
                    add(variant, volumes, time(variant, &objective, &call)?);
                }
            }
            Err(error) => {
                skipped.push(format!("float32 beside {dtype} at {tokens} x {vocab}: {error}"));
            }
        }
    }
    let mut entropies = stream.alloc_zeros::<f32>(tokens)?;
    let to = entropies.device_ptr_mut(stream).0;
    let of = RawEntropies { tokens, vocab, logits: call.teacher, temperature: 1.0, to };
    let seconds = elapsed(size, bar, "entropies", stream, || {
        // SAFETY: as above.
        Ok(unsafe { kernels.token_entropies_raw(stream, &of) }?)
    })?;
    add("entropies", 1, seconds);

    workspace.take_times();
    let by_kernel = times_by_kernel(size, bar, &mut workspace, stream, &objective, &call)?;
    for (i, (kernel, seconds)) in by_kernel.iter().enumerate() {
        let again = by_kernel[..i].iter().any(|(before, _)| before == kernel);
        let volumes = if kernel.starts_with("row_") && !again { 3 } else { 0 };
        add(&format!("{kernel}{}", if again { ", again" } else { "" }), volumes, *seconds);
    }

    // From here on the student's logits become gradients, and of gradients, which takes as long.
    let in_place = RawCall { gradient: Some(call.student), ..call };
    let by_kernel = times_by_kernel(size, bar, &mut workspace, stream, &objective, &in_place)?;
    let (margin, seconds) = by_kernel[0];
    add(margin, 1, seconds);
    let mut workspace = Workspace::new(kernels, stream, tokens)?;
    let seconds = elapsed(size, bar, "fused, in place", stream, || {
        // SAFETY: as above.
        Ok(unsafe { workspace.launch(stream, &objective, &in_place, &RawOutput::default()) }?)
    })?;
    add("fused, in place", 4, seconds);

    // Last: kernels that ran within some tenths of a second after it were slower by up to an eighth.
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

/// The median seconds of each kernel of a call, in their order.
fn times_by_kernel(
    size: Size,
    bar: &ProgressBar,
    workspace: &mut Workspace,
    stream: &Arc<CudaStream>,
    objective: &Objective,
    call: &RawCall,
) -> Result<Vec<(&'static str, f64)>> {
    let mut runs = Vec::new();
    begin(size, bar, "by kernel");
    for _ in 0..size.runs {
        // The times are the second call's. While the device is at the first, the host enqueues this one.
        for _ in 0..2 {
            // SAFETY: the caller's call; `times` awaits the kernels.
            unsafe { workspace.launch(stream, objective, call, &RawOutput::default()) }?;
        }
        runs.push(workspace.times()?);
        bar.inc(1);
    }
    Ok((0..runs[0].len())
        .map(|i| {
            let times = runs.iter().map(|run| f64::from(run[i].1) / 1e3).collect();
            (runs[0][i].0, middle(times))
        })
        .collect())
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

/// The median seconds of `work`, from event to event. All runs are enqueued at once, so that the device never waits
/// for the host; as many before them, while its clocks rise, do not count.
fn elapsed(
    size: Size,
    bar: &ProgressBar,
    variant: &str,
    stream: &Arc<CudaStream>,
    mut work: impl FnMut() -> Result<()>,
) -> Result<f64> {
    begin(size, bar, variant);
    for _ in 0..size.runs {
        work()?;
    }
    let mut events = vec![tick(stream)?];
    for _ in 0..size.runs {
        work()?;
        events.push(tick(stream)?);
    }
    let times = events.windows(2).map(|pair| Ok(f64::from(pair[0].elapsed_ms(&pair[1])?) / 1e3));
    let times = times.collect::<Result<Vec<_>>>()?;
    bar.inc(size.runs as u64);
    Ok(middle(times))
}

fn tick(stream: &CudaStream) -> Result<CudaEvent> {
    Ok(stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT))?)
}
