//! The loss on CUDA devices, with all memory torch's.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use atkd::call::{
    RawEntropies, RawLogits, RawOutput, RawSelection, RawShard, RawStage, RawTeacher,
};
use atkd::cuda::cudarc::driver::CudaStream;
use atkd::cuda::{self, Kernels};
use atkd::{Objective, Result};
use pyo3::prelude::*;

use super::AnyCall;

/// The kernels, by the device's ordinal, in its primary context, which is torch's too.
static KERNELS: Mutex<BTreeMap<usize, Arc<Kernels>>> = Mutex::new(BTreeMap::new());

fn kernels(ordinal: usize) -> Result<Arc<Kernels>> {
    let mut kernels = KERNELS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(kernels) = kernels.get(&ordinal) {
        return Ok(kernels.clone());
    }
    let loaded = Kernels::load(&cuda::context(ordinal)?)?;
    kernels.insert(ordinal, loaded.clone());
    Ok(loaded)
}

/// Bytes of device memory that a call of so many tokens works in.
#[pyfunction]
pub fn workspace_bytes(tokens: usize) -> usize {
    Kernels::workspace_bytes(tokens)
}

/// A device's ordinal, and the address of a CUstream of its primary context.
pub type Queue = (usize, usize);

/// The kernels of its device, and the stream.
///
/// # Safety
/// It is one, until what is returned is dropped.
unsafe fn open((ordinal, stream): Queue) -> Result<(Arc<Kernels>, Arc<CudaStream>)> {
    let kernels = kernels(ordinal)?;
    // SAFETY: the caller's.
    let stream = unsafe { kernels.context().wrap_borrowed_stream(stream as *mut _) };
    Ok((kernels, stream))
}

/// # Safety
/// As [`Kernels::launch_raw`] or, with a sparse teacher, [`Kernels::launch_sparse_raw`].
pub unsafe fn run(
    queue: Queue,
    workspace: u64,
    objective: &Objective,
    call: &AnyCall,
    output: &RawOutput,
) -> Result<()> {
    // SAFETY: the caller's.
    unsafe {
        let (kernels, stream) = open(queue)?;
        match call {
            AnyCall::Dense(call) => kernels.launch_raw(&stream, objective, call, workspace, output),
            AnyCall::Sparse(call) => {
                kernels.launch_sparse_raw(&stream, objective, call, workspace, output)
            }
        }
    }
}

/// # Safety
/// As [`Kernels::launch_shard_raw`].
pub unsafe fn run_shard(
    queue: Queue,
    workspace: u64,
    objective: &Objective,
    shard: &RawShard,
    stage: &RawStage,
) -> Result<()> {
    // SAFETY: the caller's.
    unsafe {
        let (kernels, stream) = open(queue)?;
        kernels.launch_shard_raw(&stream, objective, shard, stage, workspace)
    }
}

/// # Safety
/// As [`Kernels::launch_margins_raw`].
pub unsafe fn teacher_margins(
    queue: Queue,
    workspace: u64,
    objective: &Objective,
    teacher: &RawTeacher,
    to: u64,
) -> Result<()> {
    // SAFETY: the caller's.
    unsafe {
        let (kernels, stream) = open(queue)?;
        kernels.launch_margins_raw(&stream, objective, teacher, to, workspace)
    }
}

/// # Safety
/// The contract of [`Kernels::token_entropies_raw`] holds.
pub unsafe fn token_entropies(queue: Queue, of: &RawEntropies) -> Result<()> {
    // SAFETY: the caller's.
    unsafe {
        let (kernels, stream) = open(queue)?;
        kernels.token_entropies_raw(&stream, of)
    }
}

/// # Safety
/// As [`Kernels::launch_selection_raw`].
pub unsafe fn select_hard(
    queue: Queue,
    workspace: u64,
    selection: &RawSelection,
    hard_ratio: f64,
) -> Result<()> {
    // SAFETY: the caller's.
    unsafe {
        let (kernels, stream) = open(queue)?;
        kernels.launch_selection_raw(&stream, selection, hard_ratio, workspace)
    }
}

/// # Safety
/// As [`Kernels::scale_gradient`].
pub unsafe fn scale(
    queue: Queue,
    gradient: RawLogits,
    (tokens, vocab): (usize, usize),
    factor: u64,
) -> Result<()> {
    // SAFETY: the caller's.
    unsafe {
        let (kernels, stream) = open(queue)?;
        kernels.scale_gradient(&stream, gradient, tokens, vocab, factor)
    }
}
